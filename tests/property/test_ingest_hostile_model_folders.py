"""The JSON files of a stranger's model, with values of any types in any places: a folder is read, or refused with one message."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuseline.ingest.chat.template import ChatTemplate
from fuseline.ingest.model_config import ModelConfig
from fuseline.ingest.models import ModelFolder
from fuseline.store.errors import DataError, FuselineError
from fuseline.store.transformers_folder import completed_config
from fuseline.store.weights import refuse_adapter, unread_shards, weight_files
from fuseline.train.config import TrainingConfig
from fuseline.train.families import read_architecture
from fuseline.train.merging.configs import compare_tokenizers, read_settings
from fuseline.train.model_folder import copy_config, copy_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**32 - 6, 2**63, 10**30, -(2**63), 1e300, float("nan"), float("inf")]),
    st.text(max_size=8),
    st.sampled_from(["", "\x00", "\ud800", "a" * 3000, "../x", "llama", "mistral", "LlamaTokenizer", "<s>", "float32", "{{ 1 }}"]),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "content", "id", "rope_type", "text_config", "a", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
ADDED_KEYS = [
    *("text_config", "quantization_config", "auto_map", "rope_parameters", "rope_scaling", "layer_types", "dtype", "torch_dtype"),
    *("tie_word_embeddings", "tokenizer_class", "bos_token", "added_tokens_decoder", "chat_template", "per_layer_config", "sub_configs"),
    *(
        "max_position_embeddings",
        "num_labels",
        "id2label",
        "attn_implementation",
        "add_bos_token",
        "extra_special_tokens",
        "post_processor",
    ),
]


def paths(node: Any, before: tuple = (), deepest: int = 4) -> list[tuple]:
    found = [before] if before else []
    if len(before) < deepest:
        items = list(node.items())[:60] if isinstance(node, dict) else list(enumerate(node))[:5] if isinstance(node, list) else ()
        for key, value in items:
            found += paths(value, (*before, key), deepest)
    return found


def changed(data: st.DataObject, content: Any) -> Any:
    content = copy.deepcopy(content)
    if data.draw(st.integers(0, 12)) == 0:
        return data.draw(values)
    for _ in range(data.draw(st.integers(1, 2))):
        choices = paths(content)
        if data.draw(st.integers(0, 2)) == 0 and isinstance(content, dict):
            content[data.draw(st.sampled_from(ADDED_KEYS))] = data.draw(values)
        elif choices:
            *above, last = data.draw(st.sampled_from(choices))
            holder = content
            for key in above:
                holder = holder[key]
            if data.draw(st.integers(0, 3)) == 0:
                del holder[last]
            else:
                holder[last] = data.draw(values)
    return content


@pytest.fixture
def folder(models_dir, tmp_path) -> Path:
    return Path(shutil.copytree(models_dir / "tiny-source", tmp_path / "model"))


def ends_well(use: Any, *arguments: Any, **named: Any) -> Any:
    """What it returns, None where it refuses with a message."""
    message = ""
    try:
        return use(*arguments, **named)
    except FuselineError as error:
        message = str(error)
    assert 0 < len(message) < 5000
    return None


def use_everything(folder: Path) -> None:
    """What commands do with a folder before they compute anything."""
    model = ModelFolder(ModelConfig(name="m", model="m"), folder)
    if ends_well(model.check) is not None:
        ends_well(lambda: list(model.remarks))
        assert model.start_digest
        assert model.n_parameters
        out = folder.parent / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        ends_well(copy_config, folder, to=out, dtype="float32", is_tied=True)
        ends_well(copy_tokenizer, folder, to=out)
        ends_well(ChatTemplate.of_model, folder, tokenizer=model.tokenizer, date="2024-07-26")
    ends_well(completed_config, folder)
    ends_well(read_architecture, folder, training=TrainingConfig(sequence_length=64))
    found = ends_well(read_settings, folder, label="m")
    if found is not None:
        ends_well(compare_tokenizers, found, found)


@quick
@given(data=st.data())
def test_a_config_of_any_values(folder, models_dir, data):
    original = json.loads((models_dir / "tiny-source" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(data, original)))
    use_everything(folder)


@quick
@given(
    data=st.data(),
    name=st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"]),
)
def test_settings_of_any_values(folder, models_dir, data, name):
    path = models_dir / "tiny-source" / name
    (folder / name).write_text(
        json.dumps(changed(data, json.loads(path.read_text()) if path.exists() else {"bos_token": {"content": "<s>"}}))
    )
    model = ModelFolder(ModelConfig(name="m", model="m"), folder)
    if ends_well(model.check) is not None:
        ends_well(ChatTemplate.of_model, folder, tokenizer=model.tokenizer, date="2024-07-26", source="{{ messages[0].content }}")
        assert model.tokenizer.encode(["a b"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_half_characters_are_refused_and_whole_ones_are_not(folder, name):
    (folder / "special_tokens_map.json").write_text("{}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "added_tokens_decoder"})
    )
    original = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(original | {"note": "\U0001f600"}))
    ModelFolder(ModelConfig(name="m", model="m"), folder).check()
    (folder / name).write_text(json.dumps(original | {"note": "\ud83d"}))
    with pytest.raises(DataError, match="half a surrogate pair"):
        ModelFolder(ModelConfig(name="m", model="m"), folder).check()


@quick
@given(data=st.data())
def test_a_tokenizer_of_any_values(folder, models_dir, data):
    original = json.loads((models_dir / "tiny-source" / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(changed(data, original)))
    model = ModelFolder(ModelConfig(name="m", model="m"), folder)
    if ends_well(model.check) is not None:
        ends_well(model.tokenizer.encode_segments, ["a b é <s> 1", ""])
        assert model.tokenizer.pieces
    found = ends_well(read_settings, folder, label="m")
    ends_well(compare_tokenizers, found, read_settings(models_dir / "tiny-target", label="other"))


@quick
@given(data=st.data(), raw=st.none() | st.binary(max_size=40))
def test_an_index_and_an_adapter_of_any_values(folder, data, raw):
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    text = raw if raw is not None else json.dumps(changed(data, index)).encode()
    (folder / "model.safetensors.index.json").write_bytes(text)
    assert unread_shards(folder) is False
    (folder / "model.safetensors").rename(folder / "elsewhere.bin")
    try:
        with pytest.raises(DataError):
            weight_files(folder)
    finally:
        (folder / "elsewhere.bin").rename(folder / "model.safetensors")
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(DataError, match="holds an adapter"):
        refuse_adapter(folder)
    (folder / "adapter_config.json").unlink()
