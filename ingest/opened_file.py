"""The bytes of a corpus file: decompressed, in UTF-8, without a byte order mark."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import pyarrow as pa

from ..store.errors import DataError, UsageError
from ..store.shown import in_short, shown
from .files import CorpusFile

_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, MemoryError)
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda stored: gzip.GzipFile(fileobj=stored),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": lambda stored: pa.CompressedInputStream(pa.PythonFile(stored, "r"), "zstd"),
}
_BUFFER_BYTES = 1 << 20
EXPANSION_VARIABLE = "FUSELINE_LARGEST_EXPANSION"
LARGEST_EXPANSION = 300  # times as large as on disk
LEAST_EXPANDED = 256 << 20  # bytes that every file may expand to
LARGEST_TEXT = 1 << 30  # bytes of a line, and of a text file, which is one document
_CONVERT = "Convert the file to UTF-8, for example with: iconv -f WINDOWS-1252 -t UTF-8."


@contextmanager
def opened_file(file: CorpusFile) -> Iterator[io.BufferedReader]:
    """The decompressed bytes of a file, without a byte order mark. Every read error names the file."""
    try:
        with file.path.open("rb") as stored:
            if stored.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
                raise DataError(f"{file.where} is a Git LFS pointer, not the file itself. Fetch it with: git lfs pull.")
            with _decompressed(stored, file) as data:
                start = data.peek(len(_UTF8_MARK))
                if file.kind != "parquet" and start.startswith(_UTF16_MARKS):
                    raise DataError(f"{file.where} is in UTF-16, not UTF-8. {_CONVERT}")
                if start.startswith(_UTF8_MARK):
                    data.read(len(_UTF8_MARK))
                yield data
    except (DataError, UsageError):
        raise
    except PermissionError as error:
        raise DataError(f"{file.where} cannot be read: {error.strerror}. Make it readable.") from error
    except Exception as error:
        if file.kind != "parquet" and not isinstance(error, _UNREADABLE):
            raise  # pyarrow raises any exception for damaged Parquet
        raise DataError(f"{file.where} cannot be read: {type(error).__name__}: {in_short(error)}. Restore or remove it.") from error


def _decompressed(stored: io.BufferedReader, file: CorpusFile) -> io.BufferedReader:
    if file.compression is None:
        return stored
    return io.BufferedReader(_Bounded(_DECOMPRESSORS[file.compression](stored), file=file), _BUFFER_BYTES)


class _Bounded(io.RawIOBase):
    """Decompressed bytes, limited by `require_small_expansion`."""

    def __init__(self, data: Any, *, file: CorpusFile) -> None:
        super().__init__()
        self._data, self._file, self._n_read = data, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_bytes = self._data.readinto(buffer)
        self._n_read += n_bytes
        require_small_expansion(self._n_read, file=self._file)
        return n_bytes

    def close(self) -> None:
        self._data.close()
        super().close()


def require_small_expansion(n_bytes: int, *, file: CorpusFile) -> None:
    """Raise DataError if a file expands by more than a factor when it is decompressed: a small file may hold endless text.

    Text expands 3 to 10 times, and some logs 100 times.
    """
    if n_bytes <= LEAST_EXPANDED:
        return
    most = largest_expansion()
    if n_bytes > most * file.size:
        raise DataError(
            f"{file.where} ({file.size:,} bytes) expands to more than {most} times its size when it is decompressed. If that is right, set "
            f"the environment variable {EXPANSION_VARIABLE} to a larger number; otherwise remove the file."
        )


def largest_expansion() -> int:
    """How many times its size on disk a file may have when it is decompressed.

    Raises:
        UsageError: the environment variable is not a number.
    """
    text = os.environ.get(EXPANSION_VARIABLE, "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"The environment variable {EXPANSION_VARIABLE} ({shown(text)}) must be a whole number.")
    return int(text or LARGEST_EXPANSION)


def bounded_lines(data: io.BufferedReader, *, file: CorpusFile) -> Iterator[bytes]:
    """The lines of a file.

    Raises:
        DataError: a line has more than `LARGEST_TEXT` bytes.
    """
    for number, line in enumerate(iter(partial(data.readline, LARGEST_TEXT + 1), b""), start=1):
        if len(line) > LARGEST_TEXT:
            raise DataError(f"{file.where}, line {number}: must have at most {LARGEST_TEXT >> 20:,} MiB. Split it into several.")
        yield line


def decoded(data: bytes, *, file: CorpusFile, line: int = 1) -> str:
    """The text of some bytes.

    Args:
        data: bytes of the file.
        file: for the message.
        line: number of the first line of the bytes.

    Raises:
        DataError: they are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        raise DataError(f"{file.where}, line {number}: is not valid UTF-8 (byte 0x{data[error.start]:02x}). {_CONVERT}") from error
