"""What would stop a training later is refused before anything is loaded, with both numbers; the estimates are those of the real thing."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import DataError, UsageError
from fuseline.train.config import TrainingConfig, TrainJob
from fuseline.train.cost import Cost, count_parameters, step_flops
from fuseline.train.families import read_architecture
from fuseline.train.preflight import preflight, require_memory
from safetensors.torch import load_file, save_file
from support.tiny import save_model, train_byte_level
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

VOCAB = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    tokenizer = train_byte_level(folder / "tokenizer", texts=["one two three four"] * 10, vocab_size=VOCAB)
    save_model(folder / "model", tokenizer_folder=tokenizer, seed=0)
    return folder


def make_job(folder: Path, *, largest_id: int = 5, model: str = "model", **settings) -> TrainJob:
    dataset = Dataset.create(folder / f"targets-{largest_id}", identity={"largest": largest_id})
    arrays = {
        "token_ids_T": np.array([1, 2, 3], np.uint16),
        "segment_offsets": np.array([0, 3]),
        "topk_ids_TK": np.array([[1, 2], [3, largest_id], [0, 0]], np.uint16),
    }
    if not dataset.parts():
        dataset.commit(0, content=PartContent(data=arrays, counts={"tokens": 3}), seconds=0.0)
    return TrainJob(
        run_folder=folder / "run",
        model_folder=folder / model,
        model_fingerprint="",
        targets_folder=dataset.folder,
        targets_fingerprint=dataset.fingerprint,
        tokens_fingerprint="",
        parts=[0],
        export_folder=folder / "export",
        lineage={},
        config=TrainingConfig(**{"sequence_length": 64} | settings),
    )


def vocab_size(folder: Path) -> int:
    return json.loads((folder / "model" / "config.json").read_text())["vocab_size"]


def test_a_training_that_fits_is_described(folder):
    cost = preflight(make_job(folder))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.export_bytes == pytest.approx((folder / "model" / "model.safetensors").stat().st_size, rel=0.05)


def test_what_is_no_weight_of_its_own_is_not_counted(folder, tmp_path):
    """Published folders hold buffers, and copies of what is tied."""
    shutil.copytree(folder / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model" / "model.safetensors")
    architecture = read_architecture(tmp_path / "model", training=TrainingConfig(sequence_length=64))
    assert count_parameters(tmp_path / "model", architecture=architecture) == preflight(make_job(folder)).parameters


def test_targets_of_another_vocabulary_are_refused(folder):
    size = vocab_size(folder)
    with pytest.raises(DataError, match=re.escape(f"vocab_size ({size})") + rf".*above the largest id \({size}\) in topk_ids_TK of part 0"):
        preflight(make_job(folder, largest_id=size))
    preflight(make_job(folder, largest_id=size, clm_weight=1))  # then they are not read


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text())
    first = max(tokenizer["model"]["vocab"].values()) + 1

    def write(*, special: bool) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = {"id": first, "content": "<new>", "special": special} | flags
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": [*tokenizer["added_tokens"], added]}))

    write(special=True)
    preflight(make_job(folder, model=str(tmp_path)))  # text never gets it: Gemma 3's has such a one for images
    write(special=False)
    with pytest.raises(DataError, match=rf"vocab_size \({vocab_size(folder)}\) .* above the largest id of its tokenizer \({first}\)"):
        preflight(make_job(folder, model=str(tmp_path)))


def test_a_disk_without_room_is_refused(folder):
    with pytest.raises(UsageError, match=r"GB free, but the training fused needs .*1000000000001 checkpoints .* lower keep_checkpoints"):
        preflight(make_job(folder, keep_checkpoints=10**12))


def test_more_state_than_memory_is_refused():
    cost = Cost(parameters=1, state_bytes=2 * 10**9, activation_bytes=0, checkpoint_bytes=0, export_bytes=0)
    text = r"of a rank take 2\.0 GB, but it has 1\.0 GB free: raise tensor_parallel \(1\) or data_parallel \(1\)"
    with pytest.raises(UsageError, match=text):
        require_memory(cost, config=TrainingConfig(), free=10**9)


def test_ranks_share_the_state(folder):
    def state(**settings) -> int:
        config = TrainingConfig(sequence_length=64, **settings)
        architecture = read_architecture(folder / "model", training=config)
        return Cost.of(folder / "model", architecture=architecture, config=config, arithmetic=config.dtype).state_bytes

    parameters = preflight(make_job(folder)).parameters
    assert state() == 16 * parameters
    assert state(tensor_parallel=2) == 8 * parameters
    assert state(dtype="bfloat16", data_parallel=4) == 9 * parameters


def test_flops_are_those_that_torch_counts(folder):
    """Attention is counted without its upper half, which torch's counter includes where the kernel is not fused."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    architecture = read_architecture(folder / "model", training=TrainingConfig(sequence_length=64))
    length = 48
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 100, (1, length))).logits.sum().backward()
    attention = 6 * len(architecture.layers) * architecture.n_heads * architecture.head_dim * length**2
    estimate = step_flops(architecture, parameters=preflight(make_job(folder)).parameters, lengths=[length])
    assert counter.get_total_flops() == pytest.approx(estimate + attention, rel=0.02)
