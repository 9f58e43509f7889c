"""A start that is not the model of the stored distributions gives a warning; rounding alone gives none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fuseline.store.dataset import Dataset, PartContent
from fuseline.train.config import TrainingConfig, TrainJob
from fuseline.train.runtime import Runtime
from fuseline.train.start import StartCheck, check_start

LENGTHS = [70, 1, 90, 300]
N_LAYERS = 30


class Fixed(torch.nn.Module):
    """Says of each token what it was given, and fails where a segment is not as stored."""

    def __init__(self, gold_T: np.ndarray) -> None:
        super().__init__()
        self.gold_T = torch.from_numpy(gold_T)

    def forward(self, batch):
        first = batch.token_ids_T
        assert (first[1:] - first[:-1] == 1).sum() >= len(first) - len(batch.lengths)
        return torch.where(batch.labels_T >= 0, -self.gold_T[first], 0.0), None


class Here:
    device = torch.device("cpu")


def stored(folder: Path, *, dtype: str) -> tuple[Dataset, np.ndarray]:
    """Tokens that are numbered, and a log-probability of each next one."""
    dataset = Dataset.create(folder, identity={"dtype": dtype})
    offsets = np.cumsum([0, *LENGTHS])
    gold_T = -np.random.default_rng(0).gamma(2, 1.5, offsets[-1]).astype(np.float32)
    kept_T = gold_T.copy()
    kept_T[offsets[1:] - 1] = np.nan
    arrays = {
        "token_ids_T": np.arange(offsets[-1], dtype=np.uint16),
        "segment_offsets": offsets,
        "gold_logprob_T": kept_T.astype(np.float16),
    }
    dataset.commit(0, content=PartContent(data=arrays, counts={"tokens": int(offsets[-1])}), seconds=0.0)
    return dataset, gold_T


def check(tmp_path: Path, *, stored_in: str, trained_in: str, noise: float, **change) -> StartCheck | None:
    dataset, gold_T = stored(tmp_path / "distributions", dtype=stored_in)
    job = TrainJob(
        run_folder=tmp_path / "run",
        model_folder=tmp_path / "model",
        model_fingerprint="",
        targets_folder=tmp_path / "targets",
        targets_fingerprint="",
        tokens_fingerprint=dataset.fingerprint,
        start_folder=dataset.folder,
        parts=[0],
        export_folder=tmp_path / "export",
        lineage={},
        config=TrainingConfig(sequence_length=200, micro_batch_size=2, global_batch_size=2, dtype=trained_in),
    ).model_copy(update=change)
    gold_T = gold_T + noise * np.random.default_rng(1).normal(size=len(gold_T)).astype(np.float32)
    runtime: Runtime = Here()  # type: ignore[assignment]
    return check_start(Fixed(gold_T), job=job, runtime=runtime, n_layers=N_LAYERS)


@pytest.mark.parametrize(
    ("stored_in", "trained_in", "noise", "is_told"),
    [
        ("float32", "float32", 0.0, False),
        ("float32", "float32", 1e-5, False),
        ("float32", "float32", 0.02, True),
        # SmolLM2-135M and Gemma-3-270M, with 30 and 18 layers, differ by 0.046 and 0.033 nats on average: 0.06 and 0.04 of a normal noise.
        ("bfloat16", "bfloat16", 0.06, False),
        ("bfloat16", "float32", 0.06, False),
        ("bfloat16", "bfloat16", 1.0, True),
        ("float16", "bfloat16", 0.06, False),
        ("float16", "float32", 0.006, False),
        ("float16", "float32", 0.2, True),
    ],
)
def test_what_rounding_does_not_explain_is_reported(tmp_path, stored_in, trained_in, noise, is_told):
    found = check(tmp_path, stored_in=stored_in, trained_in=trained_in, noise=noise)
    assert found is not None
    # Two tokens a segment at most are not compared: the last of all has no next one, and one is cut.
    assert found.tokens == (70 - 1) + (90 - 1) + (200 - 1)
    assert (found.warning is not None) == is_told
    if is_told:
        for text in (f"{found.tokens} tokens", f"{found.difference:.3g} nats", f"at most {found.tolerance:.3g}", "Compare config.json"):
            assert text in found.warning


def test_without_the_distributions_nothing_is_compared(tmp_path):
    how = {"stored_in": "float32", "trained_in": "float32", "noise": 1.0}
    assert check(tmp_path / "a", **how, start_folder=None) is None
    assert check(tmp_path / "b", **how, start_folder=tmp_path / "nowhere") is None
    assert check(tmp_path / "c", **how, tokens_fingerprint="another") is None
    assert check(tmp_path / "d", **how, parts=[1]) is None
