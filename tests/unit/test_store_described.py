"""A config.json that describes another model than the weights beside it can be: refused before transformers makes the model."""

import json
import shutil
from pathlib import Path

import pytest
from fuseline.ingest.agreement import disagreements
from fuseline.ingest.forward import CausalModel
from fuseline.ingest.models import ModelConfig, ModelFolder
from fuseline.store.errors import DataError
from fuseline.store.model_sizes import check_sizes
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoConfig


@pytest.fixture
def folder(models_dir, tmp_path) -> Path:
    return Path(shutil.copytree(models_dir / "tiny-target", tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def saved(config, *, to: Path) -> Path:
    """A model of random numbers, beside a tokenizer that is there already."""
    AutoModelForCausalLM.from_config(config).save_pretrained(to)
    return to


def loaded_by_transformers(folder: Path, *, tmp_path: Path):
    """Both ways in which transformers makes a model: with stand-ins of the weights, and with the weights."""
    return [
        lambda: disagreements(ModelFolder(ModelConfig(name="m", model="m"), folder), cache=tmp_path / "cache"),
        lambda: CausalModel(folder, dtype="float32", arithmetic="float32", trust_remote_code=False),
    ]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            None,
            {"hidden_size": 16_384, "num_hidden_layers": 1000},
            r"describes [\d,]{12,} parameters, but the weights hold [\d,]{5,7}\. Download",
        ),
        (None, {"hidden_size": 65_536, "intermediate_size": 65_536}, r"describes [\d,]{14,} parameters, but the weights hold"),
        (
            GPTNeoConfig(vocab_size=600, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]),
            {"max_position_embeddings": 40_000},
            r"describes buffers .* of 3,200,000,000 bytes, but the weights have [\d,]+\. Download",
        ),
        (GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2), {"n_positions": 1 << 24}, r"describes [\d,]{11,} parameters"),
    ],
)
def test_a_config_of_numbers_that_are_too_large_together_is_refused(folder, tmp_path, config, changes, message):
    if config is not None:
        saved(config, to=folder)
    edit(folder / "config.json", **changes)
    check_sizes(folder)  # each number alone is harmless
    for load in loaded_by_transformers(folder, tmp_path=tmp_path):
        with pytest.raises(DataError, match=message):
            load()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "a"},
        {"num_hidden_layers": None},
        {"rope_scaling": [1]},
        {"hidden_act": "no-such"},
        {"model_type": "no-such"},
        {"model_type": "vit"},
        {"model_type": ["llama"]},
    ],
)
def test_values_that_transformers_cannot_use_are_reported_with_the_file_and_what_to_do(folder, tmp_path, changes):
    edit(folder / "config.json", **changes)
    for load in loaded_by_transformers(folder, tmp_path=tmp_path):
        with pytest.raises(DataError) as caught:
            load()
        message = str(caught.value)
        assert message.startswith(f"{folder}/config.json: ")
        assert message.endswith("; fix the file or download the model again.")
        assert "\n" not in message
