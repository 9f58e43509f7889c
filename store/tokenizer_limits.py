"""Limits for a tokenizer.json. It may be a stranger's: a small file can cause endless tables, texts and searches.

The `tokenizers` library only limits the search of a regular expression at one place of a text, and then panics.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import tokenizers

from .errors import DataError
from .shown import in_short, shown

LARGEST_VOCABULARY = 1 << 24  # ids; tables have a row for each, used or not. The largest published vocabularies have some 262,000
LARGEST_GROWTH = 1000  # how many times longer a normalizer may make a text; published ones stay below 20
PROBE_SECONDS = 60  # for a text of two thousand characters, which should take a millisecond
_PROBE = "".join(f"{character * 250}!" for character in ("a", " ", "1", ".", "\n", "é", "中", "aB"))


def require_small_ids(ids: dict[str, int]) -> None:
    """Raise DataError if an id of a vocabulary is too large for a table with a row per id."""
    token = max(ids, key=ids.__getitem__, default=None)
    if token is None:
        raise DataError("tokenizer.json has no token. Download the tokenizer again.")
    if ids[token] >= LARGEST_VOCABULARY:
        raise DataError(
            f"tokenizer.json: the id of {shown(token)} ({ids[token]:,}) must be below {LARGEST_VOCABULARY:,}. Download the tokenizer again."
        )


def require_small_growth(backend: tokenizers.Tokenizer) -> None:
    """Raise DataError if the steps of a normalizer make a text many times longer."""
    if backend.normalizer is None:
        return
    steps, growth = [json.loads(backend.normalizer.__getstate__())], 1.0
    while steps:
        step = steps.pop()
        match step:
            case {"type": "Sequence", "normalizers": [*inner]}:
                steps += inner
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                growth *= max(1, len(content) / max(1, len(pattern)))
            case {"content": str(added)} | {"prepend": str(added)}:  # for a regular expression, or a text of one character
                growth *= max(1, len(added))
    if growth > LARGEST_GROWTH:
        raise DataError(
            f"tokenizer.json: its normalizer makes texts up to {growth:.3g} times as long; the limit is {LARGEST_GROWTH} times. "
            "Download the tokenizer again."
        )


def require_quick(backend: tokenizers.Tokenizer) -> None:
    """Raise DataError if two thousand characters take longer than `PROBE_SECONDS`, or make the library panic.

    A search cannot be interrupted: its thread continues until the process ends, which is soon.
    """
    failures: list[BaseException] = []

    def read() -> None:
        try:
            with panics_as_errors():
                backend.encode_batch_fast([_PROBE], add_special_tokens=False)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if thread.is_alive():
        raise DataError(
            f"tokenizer.json: its regular expressions need more than {PROBE_SECONDS} seconds for {len(_PROBE):,} characters. "
            "Use another tokenizer, or correct the expression of its pre_tokenizer."
        )
    if failures:
        raise failures[0]


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise DataError if the `tokenizers` library panics, which Python sees as an unusual exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"tokenizer.json: the tokenizers library cannot tokenize a text with it ({in_short(error)}). An expression of its "
            "pre_tokenizer or normalizer may need endless steps. Use another tokenizer, or correct the expression."
        ) from error


def backend_of(definition: str) -> Any:
    """The tokenizer of a tokenizer.json.

    Raises:
        DataError: it is not a tokenizer, or exceeds the limits.
    """
    try:
        with panics_as_errors():
            backend = tokenizers.Tokenizer.from_str(definition)
    except DataError:
        raise
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"tokenizer.json cannot be read: {in_short(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    require_small_growth(backend)
    return backend
