"""A model folder is checked before anything is computed with it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuseline.ingest.forward import CausalModel
from fuseline.ingest.model_config import ModelConfig
from fuseline.ingest.models import ModelFolder, find_model
from fuseline.store.errors import DataError
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder(models_dir, tmp_path) -> Path:
    return Path(shutil.copytree(models_dir / "tiny-target", tmp_path / "model"))


def check(folder: Path) -> ModelFolder:
    return ModelFolder(ModelConfig(name="m", model="m"), folder).check()


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split_weights(folder: Path) -> None:
    """Put the weights into two files and an index, as large models have them."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sound_model_passes_and_is_counted(folder):
    model = check(folder)
    tensors = load_file(folder / WEIGHTS)
    assert model.n_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert {name: tensor["shape"] for name, tensor in model.tensors.items()} == {n: list(t.shape) for n, t in tensors.items()}
    assert (model.vocab_size, model.tokenizer.vocab_size) == (600, 600)


def test_a_model_in_several_files_is_the_same_model(folder):
    n_parameters = check(folder).n_parameters
    split_weights(folder)
    assert check(folder).n_parameters == n_parameters


def test_a_multimodal_config_is_read_for_its_text(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "both", "text_config": config}))
    assert check(folder).vocab_size == 600
    (folder / "config.json").write_text(json.dumps(config | {"text_config": None}))
    assert check(folder).vocab_size == 600


def test_the_digest_is_of_the_content_and_not_of_the_place(folder, tmp_path):
    digest = check(folder).weights_digest
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "other-name"))
    assert check(copy).weights_digest == digest
    edit_json(copy / "config.json", rms_norm_eps=0.5)
    assert check(copy).weights_digest != digest
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    assert check(folder).weights_digest != digest


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def gguf_only(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "model.gguf")


def without_a_file_of_two(folder: Path) -> None:
    split_weights(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def broken_index(folder: Path) -> None:
    split_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def cut(n_left: int) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:n_left])


def weights(raw: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(raw)


def config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def file(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"model has no tokenizer\.json\. Save the model's fast tokenizer"),
        (pickle_only, r"model has no \*\.safetensors file\. .*pickles.* convert them"),
        (config(vocab_size=500), r"vocab_size of config\.json \(500\) must equal the rows of model\.embed_tokens\.weight .*\(600\)"),
        (config(vocab_size="600"), r"config\.json has no vocab_size"),
        (lambda folder: (folder / "config.json").unlink(), r"model is not a model folder: config\.json cannot be read"),
        (gguf_only, r"model is not a model folder: it holds GGUF, .* Name a folder with config\.json and safetensors"),
        (file("config.json", '{"vocab'), r"model is not a model folder: config\.json cannot be read"),
        (file("config.json", "[]"), r"model is not a model folder: config\.json cannot be read"),
        (file("config.json", "{}"), r"config\.json has no vocab_size"),
        (file("tokenizer.json", "{}"), r"model: tokenizer\.json cannot be read"),
        (file("tokenizer_config.json", "{"), r"model: .*line 1"),
        (cut(0), r"model\.safetensors is cut short"),
        (cut(5), r"model\.safetensors is cut short"),
        (cut(8), r"model\.safetensors is cut short"),
        (cut(300), r"model\.safetensors is cut short"),
        (cut(-1), r"model\.safetensors must have \d+ bytes, but has \d+: it was cut short"),
        (cut(-40_000), r"model\.safetensors must have \d+ bytes, but has \d+: it was cut short"),
        (weights(POINTER), r"model\.safetensors is a git-lfs pointer.*Run `git lfs pull`"),
        (weights(struct.pack("<Q", 2) + b"[]"), r"model\.safetensors is cut short, or not a safetensors file"),
        (weights(struct.pack("<Q", 9) + b'{"a": {}}'), r"model\.safetensors is cut short, or not a safetensors file"),
        (without_a_file_of_two, r"lacks weights: .*names model-00002-of-00002\.safetensors\. Download"),
        (broken_index, r"model\.safetensors\.index\.json cannot be read"),
    ],
)
def test_what_is_wrong_with_a_model_folder_is_reported(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        check(folder)


def test_a_tokenizer_larger_than_the_vocabulary_is_reported(folder, models_dir):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models_dir / "tiny-source" / name, folder / name)
    with pytest.raises(DataError, match=r"the largest id of the tokenizer \(799\) must be below vocab_size of config\.json \(600\)"):
        check(folder)


def test_a_vocabulary_larger_than_the_tokenizer_is_padding_and_fine(models_dir, folder):
    """Many models round their number of logits up."""
    for name in ("config.json", WEIGHTS):
        shutil.copy(models_dir / "tiny-source" / name, folder / name)
    model = check(folder)
    assert (model.vocab_size, model.tokenizer.vocab_size) == (800, 600)


def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks weights: model\.layers\.1\.mlp\.down_proj\.weight"):
        CausalModel(folder, dtype="float32", arithmetic="float32", trust_remote_code=False)


def test_bos_is_what_the_recipe_says_else_what_the_tokenizer_does(models_dir):
    for name, by_default in (("tiny-source", True), ("tiny-target", False)):
        assert ModelFolder(ModelConfig(name="m", model="m"), models_dir / name).tokenizer.prepends_bos is by_default
    told = ModelConfig(name="m", model="m", prepends_bos=False)
    assert not ModelFolder(told, models_dir / "tiny-source").tokenizer.prepends_bos
    with pytest.raises(DataError, match="names no bos_token"):
        _ = ModelFolder(ModelConfig(name="m", model="m", prepends_bos=True), models_dir / "tiny-target").tokenizer


# Where models are looked for


@pytest.fixture
def places(models_dir, tmp_path, monkeypatch) -> dict[str, Path]:
    """The two places in which a model is looked for, and the current folder, each with a model of the same id."""
    found = {"base": tmp_path / "recipes", "here": tmp_path / "here", "models": tmp_path / "models"}
    for name, parent in found.items():
        model = parent / ("tiny" if name == "models" else "org/tiny")
        model.parent.mkdir(parents=True)
        shutil.copytree(models_dir / "tiny-target", model)
    monkeypatch.chdir(found["here"])
    return found


def find(places: dict[str, Path], model: str = "org/tiny") -> Path:
    return find_model(ModelConfig(name="m", model=model), models_dir=places["models"], base=places["base"]).folder


def test_a_model_is_looked_for_beside_the_recipe_then_in_the_models_folder_wherever_the_command_is_given(places):
    assert find(places) == places["base"] / "org" / "tiny"
    shutil.rmtree(places["base"] / "org")
    assert find(places) == places["models"] / "tiny"


def test_a_model_that_is_nowhere_is_reported_with_the_ways_to_name_it(places):
    for parent in places.values():
        shutil.rmtree(parent)
    places["here"].mkdir()
    with pytest.raises(DataError) as error:
        find(places)
    text = str(error.value)
    assert text.startswith("The model m (org/tiny) is not a local folder")
    assert str(places["models"]) in text
    assert "as tiny and name that with --models" in text
    assert "\n" not in text


@pytest.mark.parametrize("model", ["not a valid id", "a/b/c", "../nowhere"])
def test_an_id_that_no_hub_has_is_reported_likewise(places, model):
    with pytest.raises(DataError, match=r"The model m"):
        find(places, model)


def test_a_found_model_is_checked(places):
    (places["base"] / "org" / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        find(places)
