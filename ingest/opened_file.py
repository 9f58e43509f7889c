"""The bytes of a corpus's file: decompressed, in UTF-8, without a byte order mark."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa

from ..store.errors import DataError
from .files import CorpusFile

_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda stored: gzip.GzipFile(fileobj=stored),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": lambda stored: pa.CompressedInputStream(pa.PythonFile(stored, "r"), "zstd"),
}
_BUFFER_BYTES = 1 << 20
_CONVERT = "Convert the file to UTF-8, for example with: iconv -f WINDOWS-1252 -t UTF-8."


@contextmanager
def opened_file(file: CorpusFile) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed, after a byte order mark; whatever goes wrong in reading names the file."""
    try:
        with file.path.open("rb") as stored:
            if stored.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
                raise DataError(f"{file.where} is a pointer of Git LFS, not the file itself. Fetch it with: git lfs pull.")
            with _decompressed(stored, file.compression) as data:
                start = data.peek(len(_UTF8_MARK))
                if file.kind != "parquet" and start.startswith(_UTF16_MARKS):
                    raise DataError(f"{file.where} is in UTF-16, not UTF-8. {_CONVERT}")
                if start.startswith(_UTF8_MARK):
                    data.read(len(_UTF8_MARK))
                yield data
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{file.where} cannot be read: {error.strerror}. Allow it to be read.") from error
    except _UNREADABLE as error:
        raise DataError(f"{file.where} cannot be read: {type(error).__name__}: {error}. Restore or remove it.") from error


def _decompressed(stored: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    return stored if compression is None else io.BufferedReader(_DECOMPRESSORS[compression](stored), _BUFFER_BYTES)


def decoded(data: bytes, *, file: CorpusFile, line: int = 1) -> str:
    """The text of some bytes.

    Args:
        data: of the file.
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
