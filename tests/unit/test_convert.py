"""Hugging Face weights to Megatron-core and back bitwise, and the same logits and gradients as transformers, on one and two ranks."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuseline.store.errors import DataError, UsageError
from fuseline.train.architecture import read_architecture
from fuseline.train.config import TrainingConfig
from fuseline.train.convert import GATE_UP, QKV, VOCABULARY, load_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SHAPE = {
    "vocab_size": 259,  # odd: padded on two ranks
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE | {"tie_word_embeddings": True}),
    "llama-3-rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
LENGTHS = [70, 3, 41]
TRAINING = TrainingConfig(sequence_length=128, global_batch_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every model as a Hugging Face folder, and what ranks made of each: gathered weights, logits, gradients."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / name)
    ranks = [process for world_size in (1, 2) for process in start_ranks(folder, world_size=world_size)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0, 0]
    return folder


def start_ranks(folder: Path, *, world_size: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([sys.executable, __file__, folder], env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def token_ids() -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise_equal(folder, name, world_size):
    original = load_file(folder / name / "model.safetensors")
    found = torch.load(folder / f"{name}-{world_size}.pt")["weights"]
    assert found.keys() == original.keys()
    assert all(torch.equal(found[key], original[key]) for key in original)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_match_transformers(folder, name, world_size):
    found = torch.load(folder / f"{name}-{world_size}.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    losses, logits = [], []
    for ids in token_ids().split(LENGTHS):
        logits.append(model(ids[None]).logits[0])
        losses.append(torch.nn.functional.cross_entropy(logits[-1][:-1], ids[1:], reduction="sum"))
    (sum(losses) / (sum(LENGTHS) - len(LENGTHS))).backward()
    torch.testing.assert_close(found["logits"], torch.cat(logits), atol=1e-4, rtol=0)
    gradients = {parameter_name: parameter.grad for parameter_name, parameter in model.named_parameters()}
    assert found["gradients"].keys() == gradients.keys()
    for parameter_name, gradient in gradients.items():
        torch.testing.assert_close(found["gradients"][parameter_name], gradient, atol=1e-5, rtol=0, msg=parameter_name)


@pytest.mark.parametrize("name", MODELS)
def test_packed_segments_do_not_see_each_other(folder, name):
    found = torch.load(folder / f"{name}-1.pt")
    torch.testing.assert_close(found["logits"], found["logits of segments alone"], atol=3e-6, rtol=0)


@pytest.mark.parametrize("layout", [VOCABULARY, QKV, GATE_UP])
def test_join_undoes_split_on_any_number_of_ranks(folder, layout):
    architecture = read_architecture(folder / "llama", training=TRAINING)
    rows = {VOCABULARY: [259], QKV: [64, 32, 32], GATE_UP: [160, 160]}[layout]
    full = [torch.randn(n, 8) for n in rows]
    for ranks in (1, 2):
        joined = layout.join([layout.split(full, architecture, ranks, rank) for rank in range(ranks)], architecture)
        assert all(map(torch.equal, joined, full))


def test_unsupported_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(DataError, match=r"'gpt_neox' cannot be trained\. Supported: llama, mistral, qwen2, qwen3"):
        read_architecture(tmp_path, training=TRAINING)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_act": "gelu"}, "hidden_act (gelu) must be silu"),
        ({"attention_bias": True}, "attention_bias (True) must be False"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear' cannot be trained"),
        ({"max_position_embeddings": 64}, "sequence_length (128) must not exceed max_position_embeddings (64)"),
        ({"num_key_value_heads": 1}, "tensor_parallel (2) must divide the model's key/value heads (1)"),
    ],
)
def test_what_the_trainer_would_get_wrong_is_refused(tmp_path, change, text):
    LlamaConfig(**SHAPE | change).save_pretrained(tmp_path)
    with pytest.raises((DataError, UsageError), match=re.escape(text)):
        read_architecture(tmp_path, training=TrainingConfig(sequence_length=128, tensor_parallel=2))


def test_window_shorter_than_the_sequence_is_refused(tmp_path):
    MistralConfig(**SHAPE, sliding_window=100).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=re.escape("sequence_length (128) must not exceed sliding_window (100)")):
        read_architecture(tmp_path, training=TRAINING)


def damaged(folder: Path, tmp_path: Path, change) -> None:
    tensors = load_file(folder / "llama-tied" / "model.safetensors")
    tensors = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    MODELS["llama-tied"].save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path, training=TRAINING)
    model = torch.nn.Module()
    model.embedding = torch.nn.Module()
    model.embedding.word_embeddings = torch.nn.Embedding(259, 64)
    load_weights(model, model_folder=tmp_path, architecture=architecture, ranks=1, rank=0)


def test_vocabularies_that_disagree_are_refused(folder, tmp_path):
    text = "vocab_size (259) of config.json must equal the rows of model.embed_tokens.weight (250)"
    with pytest.raises(DataError, match=re.escape(text)):
        damaged(folder, tmp_path, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(250, 64)}))


def test_a_missing_tensor_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"has no tensor model\.embed_tokens\.weight"):
        damaged(folder, tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight"))


def test_a_tensor_too_many_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"does not account for: .*q_proj\.bias"):
        damaged(folder, tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))


def run_rank(folder: Path) -> None:
    """One rank: load every model, and save what `folder` lists."""
    from fuseline.train.batch import MicroBatch
    from fuseline.train.export import gathered
    from fuseline.train.loss import IGNORED
    from fuseline.train.megatron import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from fuseline.train.model import FusionModel
    from fuseline.train.runtime import open_runtime

    training = TRAINING.model_copy(update={"tensor_parallel": int(os.environ["WORLD_SIZE"])})
    ids = token_ids()
    labels_T = torch.cat([torch.cat([part[1:], torch.tensor([IGNORED])]) for part in ids.split(LENGTHS)])
    batch = MicroBatch(token_ids_T=ids, lengths=LENGTHS, labels_T=labels_T, soft=None)
    with open_runtime(training) as runtime:
        for name in MODELS:
            architecture = read_architecture(folder / name, training=training)
            model = FusionModel(architecture, runtime=runtime, max_length=128, recompute=name == "llama")
            ranks, rank = runtime.tensor_parallel, runtime.tensor_rank
            load_weights(model, model_folder=folder / name, architecture=architecture, ranks=ranks, rank=rank)
            found = {"weights": dict(gathered(model, architecture=architecture, runtime=runtime))}
            alone = [MicroBatch(token_ids_T=part, lengths=[len(part)], labels_T=part, soft=None) for part in ids.split(LENGTHS)]
            for key, batches in (("logits", [batch]), ("logits of segments alone", alone)):
                shards = [torch.empty(0)] * runtime.tensor_parallel
                logits_TV = torch.cat([model.logits(each).detach() for each in batches])
                torch.distributed.all_gather_object(shards, logits_TV, group=runtime.tensor_group)
                found[key] = torch.cat(shards, 1)[:, : architecture.vocab_size]
            wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
            ce_T, _ = wrapped(batch)
            (ce_T.sum() / (labels_T != IGNORED).sum()).backward()
            finalize_model_grads([wrapped])
            for parameter in model.parameters():
                parameter.data.copy_(parameter.main_grad)
            found["gradients"] = dict(gathered(model, architecture=architecture, runtime=runtime))
            if runtime.leads:
                torch.save(found, folder / f"{name}-{runtime.tensor_parallel}.pt")


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
