"""What to do about damage in a workspace: one command for each kind of it, whole, and quoted for a shell."""

import shlex
from pathlib import Path


def remake_part(folder: Path, *, full: bool = False) -> str:
    """What to do about a part that is damaged or gone; `folder` is its dataset's, in a workspace. Some damage needs `full` to be found."""
    return remake(folder.parent.parent, full=full)


def remake(workspace: Path, *, full: bool = False) -> str:
    """What to do about what stages can make again."""
    return f"Make it again with: fuseline store repair RECIPE -w {shlex.quote(str(workspace))}{' --full' * full}"


def rebuild(workspace: Path) -> str:
    """What to do about a catalog that cannot be used."""
    return f"It is only an index: make it again with: fuseline store rebuild -w {shlex.quote(str(workspace))}"
