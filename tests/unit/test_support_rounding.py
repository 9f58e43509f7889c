"""Rounded weights beside their masters, against a training in bfloat16 weights written out; and which arithmetic a run takes."""

import pytest
import torch
from fuseline.store.trainings import checkpoint_folder
from fuseline.train import records
from fuseline.train.rounding import RoundedWeights


def moved(parameter: torch.Tensor, step: int) -> torch.Tensor:
    """An update that is too small for bfloat16 to hold by itself."""
    return parameter * (1 + 1e-4 * (step + 1))


def test_masters_move_and_the_model_sees_them_rounded():
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 5)
    masters = [parameter.detach().bfloat16().float() for parameter in model.parameters()]
    weights = RoundedWeights(model, dtype=torch.bfloat16)
    for step in range(40):
        for parameter, master in zip(model.parameters(), masters, strict=True):
            assert torch.equal(parameter, master.bfloat16().float())
        with weights.masters(), torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(moved(parameter, step))
        masters = [moved(master, step) for master in masters]
    assert all((master != master.bfloat16()).any() for master in masters)


def test_weights_of_the_dtype_are_left_alone():
    model = torch.nn.Linear(7, 5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with RoundedWeights(model, dtype=torch.float32).masters():
        pass
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(model.parameters(), before, strict=True))


def test_a_run_keeps_the_arithmetic_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "arithmetic_for", lambda dtype: "float32")
    assert records.arithmetic_of(tmp_path, dtype="bfloat16") == "float32"
    records.write_machine(tmp_path, dtype="bfloat16", arithmetic="float32")
    monkeypatch.setattr(records, "arithmetic_for", lambda dtype: pytest.fail("it is chosen once"))
    assert records.arithmetic_of(tmp_path, dtype="bfloat16") == "float32"


def test_a_run_without_a_checkpoint_may_get_another_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "arithmetic_for", lambda dtype: dtype)
    records.write_machine(tmp_path, dtype="bfloat16", arithmetic="bfloat16")
    assert records.arithmetic_of(tmp_path, dtype="float32") == "float32"
    records.write_machine(tmp_path, dtype="float32", arithmetic="float32")
    assert records.arithmetic_of(tmp_path, dtype="bfloat16") == "bfloat16", "the machine is asked"


@pytest.mark.parametrize("run_says", [None, "bfloat16", "{"])
def test_the_newest_checkpoint_says_what_a_lost_record_said(tmp_path, monkeypatch, run_says):
    monkeypatch.setattr(records, "arithmetic_for", lambda dtype: pytest.fail("it is chosen once"))
    for step, arithmetic in ((3, "bfloat16"), (4, "float32")):
        folder = checkpoint_folder(tmp_path, step=step)
        folder.mkdir(parents=True)
        records.write_machine(folder, dtype="bfloat16", arithmetic=arithmetic)
    if run_says is not None:
        (tmp_path / "machine.json").write_text(f'{{"dtype": "bfloat16", "arithmetic": "{run_says}"}}' if run_says != "{" else run_says)
    assert records.arithmetic_of(tmp_path, dtype="bfloat16") == "float32"


@pytest.mark.parametrize("damage", [None, "{", '{"arithmetic": "float3r"}', "[]"])
def test_a_run_from_before_or_with_a_damaged_record_goes_on_as_its_folder_says_or_in_its_dtype(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(records, "arithmetic_for", lambda dtype: "float32")
    folder = checkpoint_folder(tmp_path, step=3)
    folder.mkdir(parents=True)
    if damage is not None:
        (folder / "machine.json").write_text(damage)
    assert records.arithmetic_of(tmp_path, dtype="bfloat16") == "bfloat16"
    (tmp_path / "machine.json").write_text('{"arithmetic": "float32", "threads": 2}')
    assert records.arithmetic_of(tmp_path, dtype="bfloat16") == "float32"
