"""The tokens with a role, and whether texts start with bos, read from a model folder as `AutoTokenizer` of transformers 5 does.

    roles   tokenizer_config.json, also special_tokens_map.json if it has no added_tokens_decoder; defaults of the tokenizer's class
    bos     what the post-processor of tokenizer.json, or the class, puts before a text; add_bos_token is ignored

One case is read as in transformers 4, which wrote these files: a LlamaTokenizer with `add_bos_token: true` and a byte-level tokenizer.json
(DeepSeek's) puts bos before texts. transformers 5 dropped that class, and with it bos; the models were trained with bos.
"""

from pathlib import Path
from typing import Any

import tokenizers

from .model_json import read_json

ROLES = ("bos", "eos", "pad", "unk")
_GPT = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
CLASS_DEFAULTS: dict[str, dict[str, str]] = {  # if the files name no token for a role
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "CodeLlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "GemmaTokenizer": {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"},
    "GPT2Tokenizer": _GPT,
    "GPTNeoXTokenizer": _GPT | {"pad": "<|padding|>"},
    "Qwen2Tokenizer": {"eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"},
    "CohereTokenizer": {"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "pad": "<PAD>", "unk": "<UNK>"},
}
CLASS_PREPENDS = {"CodeLlamaTokenizer": True, "GPTNeoXTokenizer": False}  # overrides the post-processor
CLASS_OF_MODEL_TYPE = {  # if the files name no class
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma", "zaya"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2", "codegen", "dbrx", "emu3", "jais2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo", "olmoe", "mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "dots3_note", "moss_transcribe_diarize"), "Qwen2Tokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
}


def read_roles(
    folder: Path, *, backend: tokenizers.Tokenizer, is_byte_level: bool, prepends_bos: bool | None
) -> tuple[dict[str, int | None], bool]:
    """The id of each role's token (None if there is none), and whether texts start with bos.

    Args:
        folder: the model's folder.
        backend: its tokenizer.json.
        is_byte_level: whether it is byte-level.
        prepends_bos: the recipe's setting.

    Raises:
        ValueError: a file is not a JSON object.
    """
    config, model = _settings(folder / "tokenizer_config.json"), _settings(folder / "config.json")
    named = config
    if "added_tokens_decoder" not in config:
        named = config | _settings(folder / "special_tokens_map.json")
    kind = _class_of(config, model=model, is_byte_level=is_byte_level) or ""
    defaults = CLASS_DEFAULTS.get(kind, {})
    tokens = {role: _content(named.get(f"{role}_token", defaults.get(role))) for role in ROLES}
    roles = {role: backend.token_to_id(token) if token else None for role, token in tokens.items()}
    leading = _leading_ids(backend)
    is_by_processor = prepends_bos is None and kind not in CLASS_PREPENDS
    if len(leading) == 1 and (is_by_processor or (prepends_bos and roles["bos"] is None)):
        roles["bos"] = leading[0]
    if prepends_bos is None:
        asks = is_byte_level and config.get("add_bos_token") is True and _named_class(config) == "LlamaTokenizer"
        starts = CLASS_PREPENDS.get(kind, bool(leading) and leading[0] == roles["bos"])
        prepends_bos = asks or (starts and (roles["bos"] is not None))
    return roles, prepends_bos


def _leading_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """The token that the post-processor of tokenizer.json puts before a text."""
    alone, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    starts = range(len(whole) - len(alone) + 1)
    return next((whole[:start] for start in starts if whole[start : start + len(alone)] == alone), [])


def _class_of(config: dict[str, Any], *, model: dict[str, Any], is_byte_level: bool) -> str | None:
    name = _named_class(config) or _named_class(model) or CLASS_OF_MODEL_TYPE.get(str(model.get("model_type")))
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
        raise ValueError(f"{path.name} is not a JSON object.")
    return settings


def _content(token: str | dict[str, Any] | None) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None
