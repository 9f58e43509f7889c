"""Which tokens of a tokenizer have a role, and whether texts start with bos: as `AutoTokenizer` of transformers 5 reads a model folder.

    roles   tokenizer_config.json, special_tokens_map.json too where that has no added_tokens_decoder; defaults of the tokenizer's class
    bos     what the post-processor of tokenizer.json puts before a text; add_bos_token of tokenizer_config.json plays no part

One thing is read as in transformers 4, with which these files were written: a LlamaTokenizer with `add_bos_token: true` over a byte-level
tokenizer.json (DeepSeek's) puts bos before texts. transformers 5 drops that class, and bos with it; the models were trained with bos.
"""

from pathlib import Path
from typing import Any

import tokenizers

from .model_json import read_json

ROLES = ("bos", "eos", "pad", "unk")
_GPT = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
CLASS_DEFAULTS: dict[str, dict[str, str]] = {  # where the files name no token for a role
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "CodeLlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "GemmaTokenizer": {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"},
    "GPT2Tokenizer": _GPT,
    "GPTNeoXTokenizer": _GPT | {"pad": "<|padding|>"},
    "Qwen2Tokenizer": {"eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"},
    "CohereTokenizer": {"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "pad": "<PAD>", "unk": "<UNK>"},
}
CLASS_OF_MODEL_TYPE = {  # where the files name no class
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo", "olmoe", "mamba"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
}


def role_tokens(folder: Path, *, is_byte_level: bool) -> dict[str, str | None]:
    """The token of each role, None where it has none.

    Raises:
        ValueError: a file is not a JSON object.
    """
    config, model = _settings(folder / "tokenizer_config.json"), _settings(folder / "config.json")
    named = config
    if "added_tokens_decoder" not in config:
        named = config | _settings(folder / "special_tokens_map.json")
    defaults = CLASS_DEFAULTS.get(_class_of(config, model=model, is_byte_level=is_byte_level) or "", {})
    return {role: _content(named.get(f"{role}_token", defaults.get(role))) for role in ROLES}


def leading_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """What the post-processor of tokenizer.json puts before a text."""
    alone, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    starts = range(len(whole) - len(alone) + 1)
    return next((whole[:start] for start in starts if whole[start : start + len(alone)] == alone), [])


def asks_for_bos(folder: Path, *, is_byte_level: bool) -> bool:
    """Whether the files ask for a bos that transformers 5 leaves out."""
    config = _settings(folder / "tokenizer_config.json")
    return is_byte_level and config.get("add_bos_token") is True and _named_class(config) == "LlamaTokenizer"


def _class_of(config: dict[str, Any], *, model: dict[str, Any], is_byte_level: bool) -> str | None:
    name = _named_class(config) or _named_class(model) or CLASS_OF_MODEL_TYPE.get(model.get("model_type", ""))
    return None if name == "LlamaTokenizer" and is_byte_level else name


def _named_class(settings: dict[str, Any]) -> str | None:
    name = settings.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        settings = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} is not an object.")
    return settings


def _content(token: str | dict[str, Any] | None) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None
