"""Impossible settings are refused with both fields and both values; a job survives its file; identity is what determines the weights."""

import re
from pathlib import Path

import pytest
from fuseline.store.errors import DataError
from fuseline.train.config import TrainingConfig, TrainJob
from pydantic import ValidationError


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"epochs": 2, "steps": 100}, "epochs (2) and steps (100) must not both be given"),
        (
            {"global_batch_size": 6, "data_parallel": 4},
            "global_batch_size (6) must be a multiple of micro_batch_size (1) × data_parallel (4)",
        ),
        ({"sequence_parallel": True}, "sequence_parallel (True) must be False if tensor_parallel (1) is 1"),
        ({"clm_weight": 1.5}, "less than or equal to 1"),
        ({"learning_rate": 0}, "greater than 0"),
        (
            {"temperature": 2.0},
            "temperature (2.0) must be 1 if tail is 'ghost', because the entries in the tail are not known: set tail = 'renormalise'",
        ),
        ({"domain_weights": {"code": 0}}, "greater than 0"),
        ({"clm_weight_end": -0.1}, "greater than or equal to 0"),
        ({"sequence_length": "2048"}, "valid integer"),
        ({"sequence_lenght": 2048}, "Extra inputs are not permitted"),
        ({"name": "../elsewhere"}, "should match pattern"),
    ],
)
def test_impossible_settings_are_refused(settings, text):
    with pytest.raises(ValidationError, match=re.escape(text)):
        TrainingConfig(**settings)


def test_integers_are_accepted_for_floats():
    assert TrainingConfig(clm_weight=1, weight_decay=0).uses_targets is False


def test_every_field_is_documented():
    for model in (TrainingConfig, TrainJob):
        assert [name for name, field in model.model_fields.items() if not field.description and name != "config"] == []


def make_job(run_folder: Path, **settings) -> TrainJob:
    return TrainJob(
        run_folder=run_folder,
        model_folder=run_folder / "model",
        model_fingerprint="m",
        targets_folder=run_folder / "targets",
        targets_fingerprint="t",
        tokens_fingerprint="i",
        parts=[0, 2],
        export_folder=run_folder / "export",
        lineage={"sources": ["a"]},
        config=TrainingConfig(**settings),
    )


def test_a_job_is_read_back_as_it_was_saved(tmp_path):
    job = make_job(tmp_path / "run", steps=3)
    job.save()
    assert TrainJob.load(tmp_path / "run") == job


def test_a_job_file_that_is_not_one_is_refused(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(DataError, match=r"job\.json cannot be read as a training job"):
        TrainJob.load(tmp_path)


def test_identity_leaves_out_what_only_changes_speed(tmp_path):
    assert make_job(tmp_path).identity == make_job(tmp_path, tensor_parallel=2, recompute=True, checkpoint_every=7).identity
    assert make_job(tmp_path).identity != make_job(tmp_path, learning_rate=2e-5).identity


def test_keys_that_came_later_are_in_the_identity_only_with_another_value(tmp_path):
    """A run that was begun before they were there is still the same run."""
    first = {"clm_weight", "tail", "epochs", "steps", "sequence_length", "global_batch_size", "learning_rate", "min_learning_rate_ratio"}
    first |= {"warmup_fraction", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "gradient_clip", "dtype", "seed"}
    assert make_job(tmp_path).identity["config"].keys() == first
    others = {
        "clm_weight_end": 1.0,
        "fusion_loss": "kl",
        "domain_weights": {"code": 2.0},
        "packing": "concatenated",
    }
    for name, value in others.items():
        assert make_job(tmp_path, **{name: value}).identity["config"].keys() == first | {name}
    assert "temperature" in make_job(tmp_path, temperature=2.0, tail="renormalise").identity["config"]


def test_what_targets_are_turned_into_is_no_matter_where_they_weigh_nothing(tmp_path):
    plain = make_job(tmp_path, clm_weight=1.0)
    assert plain.identity["targets"] == "i"
    assert plain.identity == make_job(tmp_path, clm_weight=1.0, tail="renormalise", fusion_loss="kl", temperature=2.0).identity
    assert plain.identity != make_job(tmp_path, clm_weight=1.0, domain_weights={"code": 2.0}).identity
    decayed = make_job(tmp_path, clm_weight=1.0, clm_weight_end=0.5)
    assert decayed.config.uses_targets
    assert decayed.identity["targets"] == "t"
