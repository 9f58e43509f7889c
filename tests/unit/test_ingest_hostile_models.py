"""A model folder from a stranger: nothing outside it is read or copied, none of its code runs, and what it promises is bounded."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from fuseline.ingest.model_config import ModelConfig
from fuseline.ingest.models import ModelFolder, find_model
from fuseline.store.errors import DataError
from fuseline.store.inside import OutsideFolder
from fuseline.store.json_text import DEEPEST_JSON
from fuseline.store.model_files import check_model_files
from fuseline.store.model_sizes import check_sizes
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.transformers_folder import for_transformers
from fuseline.store.weights import tensors_of, weight_files
from fuseline.train.model_folder import copy_config, copy_tokenizer, tokenizer_files_digest

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
KERNEL = "stranger/attention"


@pytest.fixture
def folder(models_dir, tmp_path) -> Path:
    return Path(shutil.copytree(models_dir / "tiny-target", tmp_path / "models" / "model"))


@pytest.fixture
def secrets(tmp_path) -> Path:
    """A folder that nothing may read or change."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name in ("key.txt", "key.json", WEIGHTS):
        (secrets / name).write_text('{"secret": "BEGIN PRIVATE KEY"}')
    return secrets


def find(folder: Path) -> ModelFolder:
    config = ModelConfig(name="m", model=folder.name)
    return find_model(config, models_dir=folder.parent, base=folder.parent, download=False)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def state(folder: Path) -> str:
    found = sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))
    return hashlib.sha256(repr(found).encode()).hexdigest()


# ---- links and names that lead out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("merges.txt", "../../secrets/key.txt"),
        ("vocab.json", "../../secrets/key.json"),
        ("config.json", "../../secrets/key.json"),
        ("generation_config.json", "../../secrets/key.json"),
        ("chat_template.jinja", "../../secrets/key.txt"),
        ("additional_chat_templates/rag.jinja", "../../../secrets/key.txt"),
        ("additional_chat_templates", "../../secrets"),
        ("modeling.py", "../../secrets/key.txt"),
        ("model.safetensors", "../../secrets/model.safetensors"),
        ("tokenizer.json", "/etc/hostname"),
        ("special_tokens_map.json", "/dev/zero"),
        ("extra.json", "extra.json"),
        ("adapter_config.json", "/nowhere/at/all"),
    ],
)
def test_a_link_out_of_the_folder_is_refused_and_nothing_is_copied(folder, secrets, tmp_path, name, target):
    path, before = folder / name, state(secrets)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    out = tmp_path / "out"
    out.mkdir()
    for use in (
        lambda: find(folder),
        lambda: check_model_files(folder),
        lambda: for_transformers(folder).__enter__(),
        lambda: copy_tokenizer(folder, to=out),
        lambda: copy_config(folder, to=out, dtype="float32"),
        lambda: tokenizer_files_digest(folder),
    ):
        with pytest.raises(OutsideFolder, match="leads out of") as caught:
            use()
        assert "PRIVATE" not in str(caught.value)
    assert list(out.iterdir()) == []
    assert state(secrets) == before


def test_links_inside_the_folder_and_of_a_snapshot_are_as_good_as_files(folder, tmp_path):
    (folder / "real.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("real.json")
    find(folder)
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    config = ModelConfig(name="m", model=str(snapshot))
    assert find_model(config, models_dir=tmp_path, base=tmp_path, download=False).vocab_size == 600


@pytest.mark.parametrize(
    "named",
    [
        "../../secrets/model.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "",
        ".",
        "x\x00.safetensors",
        "x\n.safetensors",
        "\\\\host\\x",
    ],
)
def test_an_index_names_plain_files(folder, secrets, named):
    tensors = list(tensors_of(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "shard.safetensors") | {"x": named}}))
    for use in (find, weight_files):
        with pytest.raises(OutsideFolder, match="weight_map of") as caught:
            use(folder)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        3,
        [],
        "x",
        {"a": 3},
        {"a": None},
        {"a": ["b"]},
        {"a": "pytorch_model.bin"},
        {"a": "config.json"},
        {str(i): i for i in range(9999)},
    ],
)
def test_an_index_of_another_shape_is_refused(folder, weight_map):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DataError, match=r"Download it again|has shards|plain name|lacks weights") as caught:
        find(folder)
    assert len(str(caught.value)) < 600


def test_a_pipe_is_not_waited_for(folder):
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")
    with pytest.raises(DataError, match="must be a regular file"):
        find(folder)


def test_notes_of_the_hub_are_not_read_through_links(folder, secrets):
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").symlink_to(secrets / "key.txt")
    (notes / "tokenizer.json.metadata").write_text("\x1b[2Jnot a commit\n")
    model = find_model(ModelConfig(name="m", model=f"org/{folder.name}", revision="main"), models_dir=folder.parent, base=folder.parent)
    assert all("PRIVATE" not in note and "\x1b" not in note for note in model.notes)


# ---- code --------------------------------------------------------------------------------------------------------------------------------


def test_exports_have_no_code_and_nothing_that_names_it(folder, tmp_path):
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    names = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "attn_implementation": KERNEL}
    names |= {"attribute_map": {"foo": "auto_map"}, "transformers_weights": "modeling_evil.safetensors"}
    edit(folder / "config.json", **names, text_config={"inner": [names], "hidden_size": 8})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]})
    out = tmp_path / "out"
    out.mkdir()
    copy_config(folder, to=out, dtype="float32", is_tied=False)
    copy_tokenizer(folder, to=out)
    assert not list(out.glob("*.py"))
    written = "".join(path.read_text() for path in out.glob("*.json"))
    assert not any(word in written for word in ("modeling_evil", KERNEL, *names))
    assert json.loads((out / "config.json").read_text())["text_config"] == {"inner": [{}], "hidden_size": 8}


def test_a_tokenizer_without_code_is_copied_to_the_byte(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    copy_tokenizer(folder, to=out)
    for path in out.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": KERNEL},
        {"_attn_implementation": KERNEL},
        {"_attn_implementation_internal": KERNEL},
        {"attn_implementation": {"text_config": KERNEL}},
        {"attn_implementation": "flash_attention_2"},
        {"experts_implementation": KERNEL},
        {"_experts_implementation": "sonicmoe"},
        {"transformers_weights": "other.safetensors.index.json"},
        {"text_config": {"attn_implementation": KERNEL}},
        {"vision_config": {"encoder": [{"_attn_implementation": KERNEL}]}},
        {"attribute_map": {"foo": "_attn_implementation"}, "foo": "other"},
        {"vision_config": {"attribute_map": {"foo": "num_hidden_layers"}, "foo": 3_000_000}},
    ],
)
def test_keys_that_fetch_code_or_other_weights_do_not_reach_transformers(folder, changes):
    text = (folder / "config.json").read_text()
    edit(folder / "config.json", **changes)
    with for_transformers(folder) as readable:
        read = (readable / "config.json").read_text()
        assert not any(word in read for word in (KERNEL, "flash_attention", "sonicmoe", "other.safetensors", "attribute_map"))
        assert json.loads(read).items() >= json.loads(text).items()
        assert (readable / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_folder_with_an_implementation_of_transformers_is_read_where_it_lies(folder, implementation):
    edit(folder / "config.json", _attn_implementation=implementation)
    with for_transformers(folder) as readable:
        assert readable == folder


# ---- sizes -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "num_experts"])
@pytest.mark.parametrize("value", [3_000_000, 10**18, 10**400, 1e30])
@pytest.mark.parametrize("where", [None, "vision_config"])
def test_a_config_that_promises_more_than_the_weights_is_refused(folder, key, value, where):
    edit(folder / "config.json", **({key: value} if where is None else {where: {key: value}}))
    for use in (find, check_sizes, lambda folder: for_transformers(folder).__enter__()):
        with pytest.raises(DataError, match=f"{key} .*must be at most") as caught:
            use(folder)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", ["n_positions", "max_position_embeddings", "n_ctx"])
def test_a_table_of_positions_is_bounded(folder, key):
    edit(folder / "config.json", **{key: 10_485_760})  # the longest that is published
    check_sizes(folder)
    edit(folder / "config.json", **{key: 10**10})
    with pytest.raises(DataError, match=f"{key} .*must be at most"):
        check_sizes(folder)


@pytest.mark.parametrize("name", ["a" * 300 + ".safetensors", "é" * 130 + ".safetensors", "/".join(["a" * 200] * 20) + "/b.safetensors"])
def test_an_index_names_files_that_a_disk_can_hold(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(DataError, match=r"must be the plain name|Download it again") as caught:
        weight_files(folder)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-1-of-9999999999.safetensors"], "and 9,999,999,995 more into it"),
        (["model-00001-of-00003.safetensors"], r"index\.json, model-00002-of-00003.safetensors, model-00003-of-00003.safetensors into it"),
        (["model-9-of-3.safetensors", "model-2-of-3.safetensors"], r"model-1-of-3.safetensors, model-3-of-3.safetensors into it"),
    ],
)
def test_shards_without_an_index_are_counted_and_not_listed(folder, names, message):
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).touch()
    with pytest.raises(DataError, match=message):
        weight_files(folder)


def test_what_transformers_says_of_a_config_does_not_reach_the_terminal(folder):
    edit(folder / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "\x1b[31mkey": 1}, bos_token_id=99_999)
    script = f"from fuseline.store.transformers_folder import *; completed_config(Path({str(folder)!r}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, check=True)
    assert b"\x1b" not in result.stderr


@pytest.mark.parametrize("value", [True, "600", 600.0, None, [600], 10**400])
def test_a_vocabulary_of_another_type_is_refused(folder, value):
    edit(folder / "config.json", vocab_size=value)
    with pytest.raises(DataError, match="vocab_size"):
        find(folder)


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(shape: list, offsets: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DEEP = "[" * 60_000 + "]" * 60_000


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 10) + b"{}",
        struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 4) + b"\xff\xfe\xff\xff",
        header(a=3),
        header(a=tensor([2], [0, 8])),
        header(a=tensor([2], [0, 8])) + b"\x00" * 9,
        header(a=tensor([1], [0, 8])) + b"\x00" * 8,
        header(a=tensor([-1, -2], [0, 8])) + b"\x00" * 8,
        header(a=tensor([2], [-8, 0])) + b"\x00" * 8,
        header(a=tensor([2], [8, 16])) + b"\x00" * 16,
        header(a=tensor([2], [8, 0])) + b"\x00" * 8,
        header(a=tensor([2], [0, 8]), b=tensor([2], [4, 12])) + b"\x00" * 12,
        header(a=tensor([2], [0, 8]), b=tensor([2], [0, 8])) + b"\x00" * 8,
        header(a=tensor([2], [0, 8]), b=tensor([2], [12, 20])) + b"\x00" * 20,
        header(a=tensor([2], [0, 10**30])) + b"\x00" * 8,
        header(a=tensor([10**400], [0, 8])) + b"\x00" * 8,
        header(a=tensor([2.0], [0, 8])) + b"\x00" * 8,
        header(a=tensor([True], [0, 4])) + b"\x00" * 4,
        header(a=tensor(["2"], [0, 8])) + b"\x00" * 8,
        header(a=tensor([2], [0, 8], dtype="F12")) + b"\x00" * 8,
        header(a=tensor([2], [0, 8], dtype="f32")) + b"\x00" * 8,
        header(a=tensor([2], [0, 8]) | {"dtype": None}) + b"\x00" * 8,
        struct.pack("<Q", 119)
        + b'{"a":'
        + json.dumps(tensor([1], [0, 4])).encode()
        + b',"a":'
        + json.dumps(tensor([1], [0, 4])).encode()
        + b"}",
        struct.pack("<Q", 8) + b'{"a":1' + b"1" * 5000 + b"}",
    ],
    ids=range(31),
)
def test_headers_that_lie_are_refused(folder, raw):
    (folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(DataError, match="Download it again") as caught:
        find(folder)
    assert len(str(caught.value)) < 1500


# ---- depths ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", INDEX])
@pytest.mark.parametrize("depth", [DEEPEST_JSON + 1, 60_000])
@pytest.mark.parametrize("kind", ["list", "object"])
def test_json_that_is_deep_is_refused(folder, name, depth, kind):
    text = "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    if name == "special_tokens_map.json":
        (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text('{"x":' + text + "}")
    with pytest.raises(DataError, match=r"deep|recursion limit|cannot be read"):
        find(folder)


# ---- tokenizers --------------------------------------------------------------------------------------------------------------------------


def edit_tokenizer(folder: Path, **changes) -> None:
    edit(folder / "tokenizer.json", **changes)


def with_token(token_id: int):
    def change(folder: Path) -> None:
        definition = json.loads((folder / "tokenizer.json").read_text())
        definition["model"]["vocab"]["zzzz"] = token_id
        (folder / "tokenizer.json").write_text(json.dumps(definition))

    return change


def split(pattern: str):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return lambda folder: edit_tokenizer(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": [step, byte_level]})


def replace(n: int, pattern: dict, content: str):
    steps = [{"type": "Replace", "pattern": pattern, "content": content}] * n
    return lambda folder: edit_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": steps})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_token(4_294_967_290), "id of 'zzzz' .*must be below"),
        (with_token(1 << 24), "id of 'zzzz' .*must be below"),
        (with_token(1 << 32), "tokenizer.json cannot be read"),
        (with_token(-1), "tokenizer.json cannot be read"),
        (split("(a+)+$"), "cannot tokenize a text with it .*expression"),
        (split("(?=(a+a+a+a+a+b))"), "cannot tokenize a text with it .*expression"),
        (split("("), "tokenizer.json cannot be read"),
        (replace(40, {"String": "a"}, "aa"), "normalizer makes texts up to"),
        (replace(1, {"String": " "}, "a" * 100_000), "normalizer makes texts up to"),
        (replace(2, {"Regex": "."}, "a" * 1000), "normalizer makes texts up to"),
        (lambda folder: edit_tokenizer(folder, normalizer={"type": "Prepend", "prepend": "a" * 5000}), "normalizer makes texts up to"),
    ],
    ids=range(11),
)
def test_tokenizers_that_ask_for_too_much_are_refused(folder, change, message):
    change(folder)
    for use in (find, Tokenizer.from_model_folder):
        with pytest.raises(DataError, match=message) as caught:
            use(folder)
        assert str(folder) in str(caught.value)
        assert len(str(caught.value)) < 2000


def test_a_tokenizer_that_panics_on_a_text_of_the_corpus_names_the_cause(folder):
    split("(é+)+$|(Q+)+$")(folder)  # the probe has too few Q
    edit(
        folder / "tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": "(Q+)+$"}, "behavior": "Isolated", "invert": False}
    )
    definition = (folder / "tokenizer.json").read_text()
    tokenizer = Tokenizer(definition, roles=dict.fromkeys(("bos", "eos", "pad", "unk")), prepends_bos=False)
    with pytest.raises(DataError, match="cannot tokenize a text"):
        tokenizer.encode(["Q" * 100 + "!"])


def test_the_command_line_ends_with_one_message(folder, secrets, tmp_path):
    (folder / "merges.txt").symlink_to(secrets / "key.txt")
    (tmp_path / "merge.toml").write_text('[merge]\nmethod = "linear"\n[[merge.models]]\nname = "a"\nmodel = "models/model"\nweight = 1.0\n')
    command = [sys.executable, "-m", "fuseline", "merge", str(tmp_path / "merge.toml"), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "merges.txt is a link that leads out of" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
