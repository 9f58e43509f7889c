"""Every family there and back bitwise, with the logits and gradients of transformers, on one and two ranks, and with shared tokens."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fuseline.store.errors import DataError, UsageError
from fuseline.train.config import TrainingConfig, TrainJob
from fuseline.train.convert import load_weights
from fuseline.train.families import FAMILIES, read_architecture
from safetensors.torch import load_file, save_file
from support.rounding import model_terms, rounding
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 259  # odd: padded on two ranks
COMMON = {"vocab_size": VOCAB, "initializer_range": 0.08, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
NEOX = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SHAPE = NEOX | {"num_key_value_heads": 2}
GEMMA = SHAPE | {"head_dim": 24, "tie_word_embeddings": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = 16  # shorter than the longest segment
MODELS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE | {"tie_word_embeddings": True}),
    "llama-3-rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "llama-attention-bias": LlamaConfig(**SHAPE, attention_bias=True),
    "llama-mlp-bias": LlamaConfig(**SHAPE, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=24),
    "gemma": GemmaConfig(**GEMMA),
    "gemma3": Gemma3TextConfig(
        **GEMMA,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt-neox": GPTNeoXConfig(**NEOX),
    "gpt-neox-in-sequence": GPTNeoXConfig(**NEOX, use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_new"),
    "gpt-neox-no-attention-bias": GPTNeoXConfig(**NEOX, attention_bias=False, hidden_act="gelu_fast"),
    # Its heads are no power of two, so that the slopes of ALiBi are out of order.
    "mpt": MptConfig(**COMMON, d_model=96, n_heads=6, n_layers=2, max_seq_len=256),
}
# Two that are stored otherwise than config.json says: transformers then goes by the tensors (`store.tied`).
OWN_HEAD, HEAD_ALONE = "llama-own-head", "gemma-head-alone"
MODELS |= {OWN_HEAD: LlamaConfig(**SHAPE | {"tie_word_embeddings": True}), HEAD_ALONE: GemmaConfig(**GEMMA)}
PACKED = ("llama", "mistral-window", "gemma3", "gpt-neox", "mpt")  # one of each kind of attention
LENGTHS = [70, 3, 40]  # odd together: padded where two ranks share the tokens
TRAINING = TrainingConfig(sequence_length=128, global_batch_size=2)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run a model that must make no difference."""

    world_size: int
    sequence_parallel: bool = False
    recompute: bool = False

    def __str__(self) -> str:
        return f"{self.world_size}{'-sequence' * self.sequence_parallel}{'-recompute' * self.recompute}"


VARIANTS = (Variant(1), Variant(2), Variant(2, sequence_parallel=True), Variant(2, sequence_parallel=True, recompute=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every model as a Hugging Face folder, and what ranks made of each: exports, logits, gradients."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
        model.save_pretrained(folder / name)
        store_otherwise(name, folder / name / "model.safetensors")
    for world_size in (2, 1):  # in this order: one rank loads the checkpoints of two
        assert [process.wait(timeout=240) for process in start_ranks(folder, world_size=world_size)] == [0] * world_size
    return folder


def store_otherwise(name: str, path: Path) -> None:
    """Give one model an output layer of its own; of the other store the output layer in place of the embeddings, and no prefixes."""
    tensors = load_file(path)
    if name == OWN_HEAD:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1 * torch.randn_like(tensors["model.embed_tokens.weight"])
    if name == HEAD_ALONE:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def as_transformers_writes(name: str, path: Path) -> dict[str, torch.Tensor]:
    """A model's tensors under the names that an export has."""
    tensors = load_file(path)
    if name == HEAD_ALONE:
        tensors["embed_tokens.weight"] = tensors.pop("lm_head.weight")
        tensors = {f"model.{key}": tensor for key, tensor in tensors.items()}
    return tensors


def start_ranks(folder: Path, *, world_size: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    place |= {"PYTHONPATH": os.pathsep.join(sys.path)}  # with what the tests share
    return [
        subprocess.Popen([sys.executable, __file__, folder], env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def terms_of(name: str) -> int:
    """Terms of the sums on the way to a model's logits."""
    hidden, ffn, head_dim = (96, 384, 16) if name == "mpt" else (64, 160, 24)
    return model_terms(layers=2, hidden=hidden, ffn=ffn, head_dim=head_dim, length=max(LENGTHS))


def loss_rounding(loss: torch.Tensor, *, name: str) -> float:
    """Of the mean over positions of a sum over the vocabulary."""
    return rounding(loss, terms=terms_of(name) + VOCAB, averaged=sum(LENGTHS) - len(LENGTHS))


def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MODELS)
def expected(folder, request):
    """A model's name, and its logits and gradients in transformers, segment by segment."""
    model = AutoModelForCausalLM.from_pretrained(folder / request.param, dtype=torch.float32)
    losses, logits = [], []
    for ids in token_ids().split(LENGTHS):
        logits.append(model(ids[None]).logits[0])
        losses.append(torch.nn.functional.cross_entropy(logits[-1][:-1], ids[1:], reduction="sum"))
    loss = sum(losses) / (sum(LENGTHS) - len(LENGTHS))
    loss.backward()
    # On disk, this one tensor has another name than in memory.
    renamed = {"lm_head.weight": "embed_out.weight"} if model.config.model_type == "gpt_neox" else {}
    gradients = {renamed.get(name, name): parameter.grad for name, parameter in model.named_parameters()}
    return request.param, {"logits": torch.cat(logits).detach(), "gradients": gradients, "loss": loss.detach()}


def test_every_family_is_here():
    assert {config.model_type for config in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_and_gradients_match_transformers(folder, expected, variant):
    name, reference = expected
    found = torch.load(folder / f"{name}-{variant}.pt")
    terms = terms_of(name)
    torch.testing.assert_close(found["logits"], reference["logits"], atol=rounding(reference["logits"], terms=terms), rtol=0)
    assert found["gradients"].keys() == reference["gradients"].keys()
    largest = max(gradient.abs().max() for gradient in reference["gradients"].values())
    atol = rounding(largest, terms=3 * terms + sum(LENGTHS))
    for parameter_name, gradient in reference["gradients"].items():
        torch.testing.assert_close(found["gradients"][parameter_name], gradient, atol=atol, rtol=0, msg=parameter_name)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_export_is_the_start_bit_for_bit(folder, name, world_size):
    original, exported = folder / name, folder / f"{name}-{world_size}-export"
    tensors, found = as_transformers_writes(name, original / "model.safetensors"), load_file(exported / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    config, written = (json.loads((each / "config.json").read_text()) for each in (original, exported))
    assert written.pop("dtype") == "float32"
    config.pop("dtype")
    assert written == config | ({"tie_word_embeddings": False} if name == OWN_HEAD else {})


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_two_ranks_is_the_start_on_one(folder, name):
    tensors, found = as_transformers_writes(name, folder / name / "model.safetensors"), torch.load(folder / f"{name}-reshaped.pt")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_the_export_has_the_same_loss_in_transformers(folder, expected):
    name, reference = expected
    model = AutoModelForCausalLM.from_pretrained(folder / f"{name}-2-export")
    logits = [model(ids[None]).logits[0, :-1] for ids in token_ids().split(LENGTHS)]
    labels = [ids[1:] for ids in token_ids().split(LENGTHS)]
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    torch.testing.assert_close(loss, reference["loss"], atol=loss_rounding(loss, name=name), rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_changes_no_bit_of_the_gradients(folder, name):
    kept, again = (torch.load(folder / f"{name}-{Variant(2, True, recompute)}.pt") for recompute in (False, True))
    assert all(torch.equal(again["gradients"][key], kept["gradients"][key]) for key in kept["gradients"])


@pytest.mark.parametrize("name", PACKED)
def test_packed_segments_do_not_see_each_other(folder, name):
    found = torch.load(folder / f"{name}-packed.pt")
    torch.testing.assert_close(found["loss"], found["loss of segments alone"], atol=loss_rounding(found["loss"], name=name), rtol=0)
    atol = rounding(found["logits"], terms=terms_of(name), dtype=torch.float64)
    torch.testing.assert_close(found["logits"], found["logits of segments alone"], atol=atol, rtol=0)
    assert found["logits"].dtype == torch.float64


def test_unsupported_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        DataError, match=r"'gpt2' cannot be trained\. Supported: gemma, gemma3_text, gpt_neox, llama, mistral, mpt, qwen2, qwen3"
    ):
        read_architecture(tmp_path, training=TRAINING)


def llama(**change) -> PretrainedConfig:
    return LlamaConfig(**SHAPE | change)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (llama(hidden_act="mish"), "activation (mish) must be one of silu, gelu"),
        (llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "rope_type 'dynamic' cannot be trained"),
        (llama(max_position_embeddings=64), "sequence_length (128) must be at most the number of positions of"),
        (llama(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}), "rope_type 'yarn' cannot be trained"),
        (llama(num_key_value_heads=1), "tensor_parallel (2) must divide the model's key/value heads (1)"),
        (Gemma3TextConfig(**GEMMA, final_logit_softcapping=30.0), "final_logit_softcapping (30.0) must be None"),
        (Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True), "use_bidirectional_attention (True) must be False"),
        (Qwen2Config(**SHAPE, layer_types=["linear_attention", "full_attention"]), "layer_types (linear_attention) must be"),
        (MptConfig(attn_config={"clip_qkv": 6.0}), "clip_qkv (6.0) must be None"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_the_trainer_would_get_wrong_is_refused(tmp_path, config, text):
    config.save_pretrained(tmp_path)
    with pytest.raises((DataError, UsageError), match=re.escape(text)) as caught:
        read_architecture(tmp_path, training=TrainingConfig(sequence_length=128, tensor_parallel=2))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["[]", '{"model_type": "llama", "hidden_size": "wide"}', '{"model_type": '])
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "config.json"))):
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


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_of_a_configuration_are_those_that_transformers_writes(folder, name):
    architecture = read_architecture(folder / name, training=TRAINING)
    assert architecture.tensor_names - {architecture.head} == set(as_transformers_writes(name, folder / name / "model.safetensors")) - {
        architecture.head
    }


def test_a_tensor_too_many_is_named(folder, tmp_path):
    names = ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(DataError, match=r"has 2 tensors that its config\.json does not describe.*: .*q_proj\.bias, .*2\.mlp"):
        damaged(folder, tmp_path, lambda tensors: tensors.update({name: torch.zeros(64) for name in names}))


def test_buffers_in_published_folders_are_passed_over(folder, tmp_path):
    names = ("gpt_neox.layers.0.attention.masked_bias", "model.layers.0.self_attn.rotary_emb.inv_freq")
    damaged(folder, tmp_path, lambda tensors: tensors.update({name: torch.zeros(1) for name in names}))


def run_rank(folder: Path) -> None:
    """One rank: load every model in every variant, and save what `folder` lists."""
    from fuseline.train.export import export
    from fuseline.train.runtime import open_runtime

    world_size = int(os.environ["WORLD_SIZE"])
    config = TRAINING.model_copy(update={"tensor_parallel": world_size})
    with open_runtime(config, choose_arithmetic=lambda: config.dtype) as runtime:
        for name in MODELS:
            for variant in (each for each in VARIANTS if each.world_size == world_size):
                place = dataclasses.replace(runtime, sequence_parallel=variant.sequence_parallel)
                model = loaded(folder / name, runtime=place, recompute=variant.recompute)
                if variant == Variant(world_size):
                    checkpoint(model, folder=folder / f"{name}-checkpoint", runtime=place)
                    export(model, job=job_of(folder / name), architecture=model.architecture, runtime=place, facts={})
                found = {"logits": logits_of(model, [packed()]), "gradients": dict(gradients_of(model))}
                if runtime.leads:
                    torch.save(found, folder / f"{name}-{variant}.pt")
        for name in PACKED if world_size == 1 else ():
            model = loaded(folder / name, runtime=runtime)
            found = {"loss": model(packed())[0].mean(), "loss of segments alone": torch.cat([model(each)[0] for each in alone()]).mean()}
            model = loaded(folder / name, runtime=dataclasses.replace(runtime, dtype=torch.float64)).double()
            found |= {"logits": logits_of(model, [packed()]), "logits of segments alone": logits_of(model, alone())}
            torch.save(found, folder / f"{name}-packed.pt")


def checkpoint(model, *, folder: Path, runtime) -> None:
    """Two ranks save one; one loads it, and saves its weights under their Hugging Face names."""
    from fuseline.train.checkpoint import _InThisProcess
    from fuseline.train.convert import gathered
    from fuseline.train.megatron import dist_checkpointing

    metadata = {"dp_cp_group": runtime.data_group}
    if runtime.tensor_parallel == 2:
        folder.mkdir(exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder), _InThisProcess("torch_dist", 1))
        return
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), str(folder)))
    found = dict(gathered(model, architecture=model.architecture, runtime=runtime))
    torch.save(found, folder.with_name(folder.name.replace("checkpoint", "reshaped.pt")))


def loaded(model_folder: Path, *, runtime, recompute: bool = False):
    from fuseline.train.model import FusionModel

    training = TRAINING.model_copy(update={"tensor_parallel": runtime.tensor_parallel})
    architecture = read_architecture(model_folder, training=training)
    model = FusionModel(architecture, runtime=runtime, recompute=recompute)
    ranks, rank = runtime.tensor_parallel, runtime.tensor_rank
    load_weights(model, model_folder=model_folder, architecture=architecture, ranks=ranks, rank=rank)
    return model


def job_of(model_folder: Path) -> TrainJob:
    return TrainJob(
        run_folder=model_folder,
        model_folder=model_folder,
        model_fingerprint="",
        targets_folder=model_folder,
        targets_fingerprint="",
        tokens_fingerprint="",
        parts=[0],
        export_folder=model_folder.with_name(f"{model_folder.name}-{os.environ['WORLD_SIZE']}-export"),
        lineage={},
        config=TRAINING,
    )


def alone():
    """Each segment as a micro-batch of its own."""
    from fuseline.train.batch import MicroBatch
    from fuseline.train.loss import IGNORED

    for ids in token_ids().split(LENGTHS):
        labels_T = torch.cat([ids[1:], torch.tensor([IGNORED])])
        yield MicroBatch(token_ids_T=ids, lengths=[len(ids)], labels_T=labels_T, soft=None)


def packed():
    """All segments as one micro-batch."""
    labels_T = torch.cat([batch.labels_T for batch in alone()])
    return dataclasses.replace(next(alone()), token_ids_T=token_ids(), lengths=LENGTHS, labels_T=labels_T)


def logits_of(model, batches) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = torch.cat([model.logits(batch) for batch in batches])
    shards = [torch.empty_like(logits_TV) for _ in range(model.runtime.tensor_parallel)]
    torch.distributed.all_gather(shards, logits_TV, group=model.runtime.tensor_group)
    return torch.cat(shards, 1)[:, :VOCAB]


def gradients_of(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the mean loss, gathered under their Hugging Face names. The weights are overwritten."""
    from fuseline.train.convert import gathered
    from fuseline.train.megatron import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    batch = packed()
    ce_T, _ = wrapped(batch)
    (ce_T.sum() / (batch.labels_T >= 0).sum()).backward()
    finalize_model_grads([wrapped])
    for parameter in model.parameters():
        parameter.data.copy_(parameter.main_grad)
    return gathered(model, architecture=model.architecture, runtime=model.runtime)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
