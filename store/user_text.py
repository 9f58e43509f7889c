"""Reads text files that users write: recipes, merge files, chat templates."""

from pathlib import Path

from .errors import UsageError

LARGEST_USER_TEXT = 1 << 20  # bytes; the largest recipes and templates have about ten thousand
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_user_text(path: Path, *, what: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: of the file.
        what: its name in messages, such as "The recipe x.toml".

    Raises:
        UsageError: it cannot be read, has more than `LARGEST_USER_TEXT` bytes, or is in another encoding.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_USER_TEXT + 1)
    except (OSError, ValueError) as error:  # ValueError for a path with NUL
        raise UsageError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > LARGEST_USER_TEXT:
        raise UsageError(f"{what} must have at most {LARGEST_USER_TEXT >> 20} MiB, but has more. Name the right file.")
    if data.startswith(_UTF16_MARKS):
        raise UsageError(f"{what} is in UTF-16, not UTF-8. Save it as UTF-8.")
    return decode_user_text(data, what=what)


def decode_user_text(data: bytes, *, what: str) -> str:
    """The text of a file's bytes; see `read_user_text`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{what}, line {line}: is not valid UTF-8 ({error.reason}). Save it as UTF-8.") from error
