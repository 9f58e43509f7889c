"""SentencePiece tokenizers add a space before a text. In the middle of a text they must not."""

import json
from typing import Any


def without_dummy_prefix(definition: str, *, only_first: bool) -> str:
    """A `tokenizer.json` that adds no space before a text.

    With `only_first`, tokenizers that add one before every stretch of text between control tokens still do so.
    """
    tokenizer = json.loads(definition)
    tokenizer["pre_tokenizer"] = _without(tokenizer.get("pre_tokenizer"), "pretokenizers", only_first=only_first)
    if not only_first:
        tokenizer["normalizer"] = _without(tokenizer.get("normalizer"), "normalizers", only_first=False)
    return json.dumps(tokenizer, ensure_ascii=False)


def _without(step: dict[str, Any] | None, inner: str, *, only_first: bool) -> dict[str, Any] | None:
    if step is None:
        return None
    match step:
        case {"type": "Sequence"}:
            kept = [_without(each, inner, only_first=only_first) for each in step[inner]]
            return {**step, inner: [each for each in kept if each is not None]}
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace", **rest} if not only_first or rest.get("prepend_scheme") == "first":
            return {**step, "prepend_scheme": "never"}
        case {"type": "ByteLevel"} if not only_first:
            return {**step, "add_prefix_space": False}
        case _:
            return step
