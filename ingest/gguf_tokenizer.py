"""The content of `tokenizer.json` for the demo's models, from the fields of their GGUF files."""

from typing import Any

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


def tokenizer_json(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json: the pieces and merges from the GGUF file, the rest as in the originals."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if fields["tokenizer.ggml.model"] == "llama":  # the converter to GGUF has unescaped the pieces that are runs of spaces
        tokens = [token.replace(" ", "▁") for token in tokens]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, "special": kind == _CONTROL, **flags}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    bpe = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    if fields["tokenizer.ggml.model"] == "gpt2":
        return (
            content
            | _byte_level()
            | {
                "model": bpe
                | {
                    "unk_token": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "vocab": vocab,
                    "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
                }
            }
        )
    bos = tokens[fields["tokenizer.ggml.bos_token_id"]]
    return (
        content
        | _sentencepiece(bos, bos_id=vocab[bos])
        | {
            "model": bpe
            | {
                "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": _merges(vocab),
            }
        }
    )


def _byte_level() -> dict[str, Any]:
    """SmolLM2: each digit is a separate word, then GPT-2's words in the byte alphabet; nothing is added."""
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level | {"add_prefix_space": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
    }


def _sentencepiece(bos: str, *, bos_id: int) -> dict[str, Any]:
    """Gemma: spaces are written ▁, nothing is split beforehand, unknown characters become bytes, and the text starts with bos."""
    first, second = ([{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": "AB"[i], "type_id": i}}] for i in (0, 1))
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
    }


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary: all pairs of pieces that make a piece, in the order of the resulting pieces.

    The pieces' ids are their order of training. Among the pairs for one piece, the one with the longest left part comes first, as in the
    originals; it decides how runs of one character are cut.
    """
    return [(token[:i], token[i:]) for token in vocab for i in range(len(token) - 1, 0, -1) if token[:i] in vocab and token[i:] in vocab]
