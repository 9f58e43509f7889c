"""Whole training runs in real ranks: parity of layouts, crashes, resumption, errors and the export."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import FingerprintMismatch, FuselineError
from fuseline.store.trainings import checkpoint_damage, checkpoint_folder, read_machine, read_metrics
from fuseline.train import records
from fuseline.train.config import TrainJob
from fuseline.train.cost import Cost
from fuseline.train.data import TargetsData
from fuseline.train.families import read_architecture
from fuseline.train.ranks import Ranks
from safetensors.torch import load_file
from support.rounding import model_terms, rounding
from support.trainings import DOMAINS, STEPS, VOCAB, make_job, start_and_wait, train, write_inputs, write_targets
from transformers import AutoModelForCausalLM

REAL = ("loss", "clm_loss", "fusion_loss", "grad_norm")
LOSSES = ("step", *REAL, "learning_rate", "tokens")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_other_start(folder: Path, *, like: Dataset) -> Dataset:
    """Distributions of another model than the start: every token has the same log-probability, which no model says."""
    dataset = Dataset.create(folder, identity={"dtype": "float32"})
    token_ids_T, offsets = like.read(0, "token_ids_T", "segment_offsets")
    arrays = {"token_ids_T": token_ids_T, "segment_offsets": offsets, "gold_logprob_T": np.full(len(token_ids_T), -1.0, np.float16)}
    dataset.commit(0, content=PartContent(data=arrays, counts={"tokens": len(token_ids_T)}), seconds=0.0)
    return dataset


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Records of the same steps by ranks that sum in another order: a step's losses come of all steps' forward and backward passes."""
    terms = model_terms(layers=2, hidden=64, ffn=160, head_dim=16, length=64) + VOCAB
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        steps, tokens = other[LOSSES.index("step")], other[LOSSES.index("tokens")]
        atol = rounding(other[[LOSSES.index(name) for name in REAL]], terms=3 * terms * steps, averaged=int(tokens))
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


def numbers(found: list[dict]) -> np.ndarray:
    return np.array([[record[name] for name in LOSSES] for record in found])


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The run of one rank that the others are compared with."""
    job = make_job(inputs, tmp_path_factory.mktemp("runs") / "alone", epochs=None)
    return job, train(job)


@pytest.fixture(scope="module")
def tensor_parallel(inputs, tmp_path_factory):
    """Shares the tokens too; without that a test below goes on from a checkpoint."""
    job = make_job(inputs, tmp_path_factory.mktemp("runs") / "tp2", tensor_parallel=2, sequence_parallel=True)
    return job, train(job)


@pytest.fixture(scope="module")
def data_parallel(inputs, tmp_path_factory):
    job = make_job(inputs, tmp_path_factory.mktemp("runs") / "dp2", data_parallel=2)
    start = write_other_start(inputs / "start", like=Dataset.open(inputs / "targets"))
    job = job.model_copy(update={"start_folder": start.folder, "tokens_fingerprint": start.fingerprint})
    return job, train(job)


def test_the_run_folder_is_complete(alone):
    job, found = alone
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert read_metrics(job.run_folder) == found
    assert records.checkpoint_steps(job.run_folder) == [7, 14, 21, 28, STEPS]
    assert (job.run_folder / "checkpoints" / "latest").resolve() == checkpoint_folder(job.run_folder, step=STEPS)
    assert list((job.run_folder / "tensorboard").iterdir())
    done = records.read_done(job.run_folder)
    assert (done["step"], done["loss"]) == (STEPS, found[-1]["loss"])
    assert not list(job.run_folder.rglob(".tmp-*"))
    weight = job.config.clm_weight
    for record in found:
        assert record["loss"] == pytest.approx(weight * record["clm_loss"] + (1 - weight) * record["fusion_loss"])
    assert found[-1]["learning_rate"] < found[0]["learning_rate"] <= 1e-3


def test_a_start_that_is_another_model_than_that_of_the_distributions_is_reported(alone, data_parallel):
    job, found = data_parallel
    assert [record["warning"] is not None for record in found] == [True] + [False] * (len(found) - 1)
    assert "The training does not start from the model of the target's stored distributions" in found[0]["warning"]
    check = json.loads((job.run_folder / "start.json").read_text())
    assert check["difference"] > check["tolerance"]
    assert not (alone[0].run_folder / "start.json").exists()  # no distributions were named


def test_tensor_and_data_parallel_give_the_same_losses(alone, tensor_parallel, data_parallel):
    assert_same(tensor_parallel[1], alone[1])
    assert_same(data_parallel[1], alone[1])


def test_a_run_that_is_done_is_not_run_again(alone):
    assert train(alone[0]) == []


def test_a_run_folder_of_another_training_is_refused(alone):
    job = alone[0].model_copy(update={"config": alone[0].config.model_copy(update={"learning_rate": 2e-3})})
    with pytest.raises(FingerprintMismatch, match=r"config\.learning_rate: stored 0\.001, asked for 0\.002"):
        train(job)


def test_the_export_loads_in_transformers_with_the_trained_loss(inputs, alone):
    """One more step of training from the last checkpoint would start with the loss of the exported model."""
    job, _ = alone
    model = AutoModelForCausalLM.from_pretrained(job.export_folder)
    assert model.dtype == torch.float32
    assert (job.export_folder / "tokenizer.json").exists()
    assert '"one"' in (job.export_folder / "README.md").read_text()
    start = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert clm_loss(model, job) < clm_loss(start, job)
    assert clm_loss(start, job) == pytest.approx(alone[1][0]["clm_loss"], abs=first_rounding(alone[1][0]["clm_loss"]))


def first_rounding(loss: float, *, tokens: int = 64) -> float:
    """Of a mean loss of the start, over so many tokens or more."""
    return rounding(loss, terms=model_terms(layers=2, hidden=64, ffn=160, head_dim=16, length=64) + VOCAB, averaged=tokens)


def clm_loss(model, job: TrainJob) -> float:
    """Next-token loss on the first batch, segment by segment."""
    losses = []
    for batch in TargetsData.of(job, vocab_size=VOCAB).micro_batches(0, data_rank=0):
        for ids, labels in zip(batch.token_ids_T.split(batch.lengths), batch.labels_T.split(batch.lengths), strict=True):
            logits = model(ids[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels >= 0])
    return torch.cat(losses).mean().item()


def test_the_first_step_has_the_losses_that_its_settings_say(inputs, tmp_path):
    """Two ranks, and everything at once: packs as published, weights by domain, divergence at a temperature, and λ that goes to 1."""
    weights = {"code": 3.0, "news": 0.25}
    settings = {"packing": "concatenated", "domain_weights": weights, "fusion_loss": "kl", "temperature": 2.0, "tail": "renormalise"}
    job = make_job(inputs, tmp_path / "all", steps=2, clm_weight=0.7, clm_weight_end=1.0, data_parallel=2, **settings)
    first, last = train(job)
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    clm, fusion, labelled, aimed = 0.0, 0.0, 0.0, 0.0
    data = TargetsData.of(job.model_copy(update={"config": job.config.model_copy(update={"data_parallel": 1})}), vocab_size=VOCAB)
    for batch, pack in zip(data.micro_batches(0, data_rank=0), data.packs(0), strict=True):
        assert len(batch.lengths) == 1
        domains = [DOMAINS[(100 * piece.part + piece.segment) % 3] for piece in pack for _ in range(piece.length)]
        weights_T = torch.tensor([weights.get(domain, 1.0) for domain in domains])
        logits_TV = model(batch.token_ids_T[None]).logits[0].detach()
        has_label_T, has_target_T = batch.labels_T >= 0, batch.soft.is_known_N()
        clm += (weights_T * torch.nn.functional.cross_entropy(logits_TV, batch.labels_T, reduction="none")).sum()
        target_TV = torch.zeros_like(logits_TV).scatter_add_(1, batch.soft.topk_ids_NK, batch.soft.topk_masses_NK)
        divergence_T = torch.nn.functional.kl_div((logits_TV / 2).log_softmax(-1), target_TV, reduction="none").sum(-1)
        fusion += 4 * (weights_T * has_target_T * divergence_T).sum()
        labelled, aimed = labelled + (weights_T * has_label_T).sum(), aimed + (weights_T * has_target_T).sum()
    assert first["clm_loss"] == pytest.approx((clm / labelled).item(), abs=first_rounding(first["clm_loss"]))
    # A divergence is a difference of sums that are larger: of 4 times a cross-entropy at twice the temperature.
    assert first["fusion_loss"] == pytest.approx((fusion / aimed).item(), abs=first_rounding(4 * math.log(VOCAB)))
    assert first["loss"] == pytest.approx(0.7 * first["clm_loss"] + 0.3 * first["fusion_loss"], abs=rounding(first["loss"], terms=3))
    assert last["loss"] == last["clm_loss"]
    assert last["fusion_loss"] > 0


def ranks_of(run_folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for_no_ranks(run_folder: Path) -> None:
    deadline = time.monotonic() + 20
    while ranks_of(run_folder):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="ranks die with their launcher by a Linux call")
def test_a_killed_run_resumes_to_exactly_the_same_losses(inputs, alone, tmp_path):
    job = make_job(inputs, tmp_path / "killed")
    process = start_and_wait(job, until_step=random.randrange(1, STEPS - 20))
    process.kill()
    process.wait()
    wait_for_no_ranks(job.run_folder)
    assert records.read_done(job.run_folder) is None
    torn = job.run_folder / "checkpoints" / ".tmp-step-00000099"
    torn.mkdir(parents=True)
    with (job.run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    resumed_from = records.last_checkpoint(job.run_folder) or 0
    again = train(job)
    assert again[0]["step"] == resumed_from + 1
    assert not torn.exists()
    assert np.array_equal(numbers(read_metrics(job.run_folder)), numbers(alone[1]))
    exported, expected = (AutoModelForCausalLM.from_pretrained(each.export_folder).state_dict() for each in (job, alone[0]))
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_a_signal_saves_a_checkpoint_and_a_second_trainer_is_kept_out(inputs, tmp_path):
    job = make_job(inputs, tmp_path / "stopped", steps=2000, checkpoint_every=1000)
    process = start_and_wait(job, until_step=1)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    other = subprocess.run(
        [sys.executable, "-m", "fuseline.train", job.run_folder], env=os.environ | place, capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert other.stderr == f"fuseline.train: error: Another trainer is running in {job.run_folder}. Wait for it, or stop it.\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 128 + signal.SIGUSR1
    assert not ranks_of(job.run_folder)
    steps = [record["step"] for record in read_metrics(job.run_folder)]
    assert records.checkpoint_steps(job.run_folder) == [steps[-1]]


@pytest.mark.parametrize(("ranks", "layout"), [(2, {}), (1, {"tensor_parallel": 2})])
def test_a_checkpoint_resumes_on_another_number_of_ranks(inputs, alone, tensor_parallel, tmp_path, ranks, layout):
    found = resumed(make_job(inputs, tmp_path / "other", **layout), of=(alone if ranks == 1 else tensor_parallel)[0])
    assert_same(found, alone[1][7:])


def test_two_ranks_that_share_the_optimizers_state_resume_with_their_own_bits(data_parallel, tmp_path):
    job, whole = data_parallel
    found = resumed(job.model_copy(update={"run_folder": tmp_path / "again", "export_folder": tmp_path / "again" / "export"}), of=job)
    assert np.array_equal(numbers(found), numbers(whole)[7:])


def resumed(job: TrainJob, *, of: TrainJob) -> list[dict]:
    """The records of a training that goes on from another's checkpoint after step 7."""
    checkpoint = checkpoint_folder(of.run_folder, step=7)
    shutil.copytree(checkpoint, job.run_folder / "checkpoints" / checkpoint.name)
    found = train(job)
    assert [record["step"] for record in found] == list(range(8, STEPS + 1))
    return found


def test_a_damaged_checkpoint_is_reported(inputs, alone, tmp_path):
    job = make_job(inputs, tmp_path / "damaged")
    damaged = checkpoint_folder(job.run_folder, step=7)
    shutil.copytree(checkpoint_folder(alone[0].run_folder, step=7), damaged)
    assert checkpoint_damage(damaged) is None
    (shard,) = damaged.glob("*.distcp")
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    reason = rf"\({re.escape(shard.name)} has changed since it was written\)"
    with pytest.raises(
        FuselineError, match=rf"The checkpoint {damaged} cannot be read {reason}\. Remove it to continue from the previous one\."
    ):
        train(job)
    os.truncate(shard, shard.stat().st_size // 2)
    assert re.fullmatch(r"\S+ has \d+ bytes, but had \d+", checkpoint_damage(damaged, full=False))


def test_a_checkpoint_has_the_predicted_size(alone):
    job, _ = alone
    size = sum(path.stat().st_size for path in checkpoint_folder(job.run_folder, step=7).iterdir())
    architecture = read_architecture(job.model_folder, training=job.config)
    cost = Cost.of(job.model_folder, architecture=architecture, config=job.config, arithmetic="float32")
    assert size == pytest.approx(cost.checkpoint_bytes, rel=0.15)  # beside the tensors it has a description of each


def test_a_loss_that_is_not_finite_stops_with_the_segments_and_the_last_checkpoint(inputs, tmp_path):
    write_targets(inputs / "spoiled", spoil=True)
    job = make_job(inputs, tmp_path / "spoiled", targets="spoiled", steps=None, checkpoint_every=1, data_parallel=2)
    named = r"documents .*\b107\b.* \(part 1, segments [\d, ]*\b7\b.*\)"
    text = rf"Step \d+: the loss is nan in a batch with .*{named}.*; (the last good|there is no) checkpoint"
    with pytest.raises(FuselineError, match=text) as caught:
        train(job)
    log = Path(re.search(r"\(log: (.*)\)", str(caught.value))[1])
    assert "Traceback" not in log.read_text().split("fuseline.train: error:")[1]


def test_a_model_of_many_buckets_goes_on_from_its_own_state_on_another_number_of_ranks(inputs, tmp_path):
    job = make_job(inputs, tmp_path / "run", dtype="bfloat16", data_parallel=2)
    script = Path(__file__).parents[1] / "support" / "buckets.py"
    for ranks, mode in ((2, "save"), (1, "load")):
        job.model_copy(update={"config": job.config.model_copy(update={"data_parallel": ranks})}).save()
        command = list(map(str, [sys.executable, script, job.run_folder, mode]))
        with Ranks(command, n=ranks, environment={}, logs=tmp_path) as processes:
            while processes.are_running():
                time.sleep(0.1)
            assert processes.first_failed is None, processes.logs[0].read_text()[-3000:]


def write_arithmetic(job: TrainJob, arithmetic: str) -> TrainJob:
    """Begin the run as on a machine that computes fastest in a number format."""
    job.save()
    records.write_machine(job.run_folder, dtype=job.config.dtype, arithmetic=arithmetic)
    return job


@pytest.fixture(scope="module")
def from_rounded_weights(inputs, tmp_path_factory) -> tuple[TrainJob, list[dict]]:
    """The first steps of a float32 training that starts from weights rounded to bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.bfloat16)
    model.float().save_pretrained(inputs / "rounded")
    job = make_job(inputs, tmp_path_factory.mktemp("runs") / "rounded", tail="ghost", recompute=True, steps=4)
    job = job.model_copy(update={"model_folder": inputs / "rounded"})
    return job, train(job)


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for _, tensor in sorted(load_file(folder / "model.safetensors").items())])


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
def test_bfloat16_trains_saves_by_the_clock_resumes_and_exports(inputs, from_rounded_weights, tmp_path, monkeypatch, arithmetic):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")  # of the user's terminal, which has no letters for the folder that ranks name
    by_the_clock = {"checkpoint_every": 1000, "checkpoint_minutes": 1e-6, "keep_checkpoints": 3}
    job = make_job(inputs, tmp_path / "漢", dtype="bfloat16", tail="ghost", recompute=True, steps=4, **by_the_clock)
    first = train(write_arithmetic(job, arithmetic))
    in_float32, reference = from_rounded_weights
    is_same = [first[step]["loss"] == reference[step]["loss"] for step in range(4)]
    assert is_same == [arithmetic == "float32", False, False, False], "after each step the weights are rounded again"
    start, moved, as_far = (weights(folder) for folder in (in_float32.model_folder, in_float32.export_folder, job.export_folder))
    assert (as_far - moved).abs().mean() < 0.3 * (moved - start).abs().mean(), "the masters are not rounded"
    assert records.checkpoint_steps(job.run_folder) == [2, 3, 4]
    for lost in ("done.json", "machine.json"):
        (job.run_folder / lost).unlink()
    for step in (3, 4):
        shutil.rmtree(checkpoint_folder(job.run_folder, step=step))
    assert np.array_equal(numbers(train(job)), numbers(first)[2:])
    assert read_machine(job.run_folder)["arithmetic"] == arithmetic
    assert AutoModelForCausalLM.from_pretrained(job.export_folder).dtype == torch.bfloat16
    assert json.loads((job.export_folder / "config.json").read_text())["dtype"] == "bfloat16"
