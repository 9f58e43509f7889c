"""What to do about damage in a workspace: for each kind of damage one complete command, quoted for a shell."""

import shlex
from pathlib import Path


def remake_part(folder: Path, *, full: bool = False) -> str:
    """What to do about a damaged or missing part; `folder` is its dataset's, in a workspace. Some damage is only found with `full`."""
    return remake(folder.parent.parent, full=full)


def remake(workspace: Path, *, full: bool = False) -> str:
    """What to do about data that stages can make again."""
    return f"Make it again with: fuseline store repair RECIPE -w {shlex.quote(str(workspace))}{' --full' * full}"


def rebuild(workspace: Path) -> str:
    """What to do about an unusable catalog."""
    return f"Make it again (it is only an index) with: fuseline store rebuild -w {shlex.quote(str(workspace))}"
