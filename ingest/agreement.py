"""Checks that transformers and fuseline read a model folder in the same way, when the model is opened and not when its first part fails.

transformers loads the model with placeholders for the stored tensors that take no memory, so that its own rules decide which weights are
missing (in tenths of a second after its import, for a model of any size). Its tokenizer reads a probe text.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..store import durable
from ..store.described import described_model
from ..store.errors import DataError
from ..store.json_files import read_object
from ..store.roles import ROLES
from ..store.shown import in_short
from ..store.transformers_folder import for_transformers, quiet
from .models import ModelFolder

PROBE = "The 3 cats sat on a mat, didn't they?\nYes: they did."
_STAGE = "agreement/2"
_SHOWN = 20  # ids or names in a message


def disagreements(model: ModelFolder, *, cache: Path) -> list[str]:
    """The differences between how transformers and fuseline read a model folder, as sentences; cached in the folder `cache`.

    Raises:
        DataError: transformers cannot load the model, or would fill weights with random numbers.
    """
    path = cache / f"{_digest(model)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # an unreadable cache is made again
        kept = read_object(path)["disagreements"]
        if isinstance(kept, list) and all(isinstance(text, str) for text in kept):
            return kept
    found = [*_of_weights(model), *_of_tokenizer(model)]
    cache.mkdir(parents=True, exist_ok=True)
    durable.write_json(path, {"disagreements": found})
    return found


def _digest(model: ModelFolder) -> str:
    """The digest of everything that is compared, with the headers of the weights for the weights."""
    tensors = {name: [tensor["dtype"], tensor["shape"]] for name, tensor in model.tensors.items()}
    versions = [_STAGE, importlib.metadata.version("transformers")]
    digest = hashlib.sha256(json.dumps([versions, tensors, model.config.prepends_bos, model.tokenizer.digest], sort_keys=True).encode())
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        digest.update(f"\n{name}\n".encode())
        if (model.folder / name).exists():
            digest.update((model.folder / name).read_bytes())
    return digest.hexdigest()


def _of_weights(model: ModelFolder) -> Iterator[str]:
    # A model's own code may use its weights in any way. Experts are joined when they are loaded, which would take their memory.
    if model.config.trust_remote_code or any(".experts." in name for name in model.tensors):
        return
    info = _loading_info(model)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise DataError(
            f"{model.folder}: the shape of {name} in the weights {list(stored)} must equal the shape in config.json {list(wanted)}. "
            "Correct config.json, or download the model again."
        )
    if missing:
        raise DataError(f"The model {model.folder} lacks weights: {_shown(missing)}. {_what_to_do(model, missing)}")
    if unexpected:
        yield f"{len(unexpected)} tensors in its weights are not used, because config.json does not describe them: {_shown(unexpected)}"


def _what_to_do(model: ModelFolder, missing: list[str]) -> str:
    if all("lm_head" in name or "embed_out" in name for name in missing) and model.hf_config.get("tie_word_embeddings") is not True:
        return "If its output layer is its embeddings, set tie_word_embeddings = true in config.json; otherwise download the weights again."
    return "Download them again."


def _loading_info(model: ModelFolder) -> Mapping[str, Any]:
    import torch

    stand_ins = {name: torch.zeros(1).expand(tensor["shape"]) for name, tensor in model.tensors.items()}
    with for_transformers(model.folder) as folder, quiet():
        try:
            kind, config = described_model(model.folder, readable=folder)
            _, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=stand_ins,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except DataError:
            raise
        except Exception as error:  # transformers raises any exception
            raise DataError(f"The model {model.folder} cannot be loaded: {type(error).__name__}: {in_short(error)}") from error
    return info


def _of_tokenizer(model: ModelFolder) -> Iterator[str]:
    import transformers

    ours = model.tokenizer
    with for_transformers(model.folder) as folder, quiet():
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=model.config.trust_remote_code
            )
            ids = list(theirs(PROBE)["input_ids"])
        except Exception as error:  # transformers raises any exception
            why = f"{type(error).__name__}: {in_short(error)}"
            yield f"its tokenizer could not be compared with transformers, which cannot load it ({why})"
            return
    (text_ids,) = ours.encode([PROBE])
    while ids and ids[-1] in theirs.all_special_ids:  # remove an eos at the end: a segment does not end the document
        ids.pop()
    before = ids[: -len(text_ids)]
    own_before = [ours.roles["bos"]] if ours.prepends_bos else []
    if ids[len(before) :] != text_ids:
        yield (
            f"its tokenizer.json reads {PROBE!r} as {_shown(text_ids)}, but AutoTokenizer of transformers, which builds some tokenizers by "
            f"its own rules, reads it as {_shown(ids)}. fuseline uses the ids of tokenizer.json"
        )
    elif model.config.prepends_bos is None and before != own_before:
        yield (
            f"its texts start with {own_before or 'no token'}, but those of AutoTokenizer of transformers with {before or 'no token'}: "
            f"{PROBE[:5]!r}… is {_shown([*own_before, *text_ids])} and {_shown(ids)}. If transformers is right, set prepends_bos = "
            f"{str(not ours.prepends_bos).lower()} for this model in the recipe"
        )
    known = {role: getattr(theirs, f"{role}_token_id") for role in ROLES}
    for role, token_id in known.items():
        is_added = token_id is not None and token_id >= ours.vocab_size  # transformers added it and extended the vocabulary
        if not is_added and token_id != ours.roles[role] and not (role == "bos" and before == own_before):
            yield f"its {role} token is {ours.roles[role]}, but in AutoTokenizer of transformers it is {token_id}"


def _shown(items: list[Any]) -> str:
    return ", ".join(map(str, items[:_SHOWN])) + (f" … ({len(items)} in all)" if len(items) > _SHOWN else "")
