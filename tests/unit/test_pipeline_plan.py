"""How long a recipe takes: the operations of what is missing, at the speed that products have on the machine."""

from pathlib import Path

import fuseline
import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.pipeline import plan
from fuseline.pipeline.graph import products
from fuseline.pipeline.plan import PlannedStage, seconds_here
from fuseline.pipeline.recipe_file import load_recipe
from fuseline.store.layout import Layout

DEMO = Path(fuseline.__file__).parent / "recipes" / "demo.toml"


@pytest.fixture
def machine(monkeypatch):
    """A processor by its rates: operations a second of one core, of float32 and of the 16-bit formats."""

    def set_to(*, float32: float, bfloat16: float, threads: int = 2) -> None:
        rates = {"float32": float32, "bfloat16": bfloat16}
        monkeypatch.setattr(plan, "flops", rates.get)
        monkeypatch.setattr(plan, "arithmetic_for", lambda dtype: max(dtype, "float32", key=rates.get))
        monkeypatch.setattr(plan, "has_gpu", lambda: False)
        monkeypatch.setattr(plan, "threads", lambda: threads)

    return set_to


def stage(*, done: int, flops: float, dtype: str = "bfloat16") -> PlannedStage:
    return PlannedStage(stage="", parts=4, parts_done=done, tokens=0, stored_bytes=0, flops=flops, dtype=dtype)


def test_what_is_missing_takes_the_time_of_its_operations(machine):
    machine(float32=1e9, bfloat16=4e9)
    start, between = plan._START_SECONDS, plan._BETWEEN
    missing = [stage(done=4, flops=1e12), stage(done=1, flops=8e10), stage(done=0, flops=2e10, dtype="float32"), stage(done=0, flops=0)]
    of_each = [start + 6e10 * (1 / 4e9 + between / 1e9) / 2, start + 2e10 * (1 / 1e9 + between / 1e9) / 2]
    assert seconds_here(missing) == pytest.approx(sum(of_each))
    assert seconds_here(missing[:1]) == 0
    machine(float32=1e9, bfloat16=1e7, threads=1)
    assert seconds_here(missing[1:2]) == pytest.approx(start + 6e10 * (1 + between) / 1e9)


@pytest.mark.parametrize(("rates", "minutes"), [({"float32": 2.5e10, "bfloat16": 5e8}, 15), ({"float32": 5e10, "bfloat16": 1e11}, 10)])
def test_the_demo_is_short_on_two_slow_cores(machine, tmp_path, rates, minutes):
    machine(**rates)
    stages = plan.plan(products(load_recipe(DEMO)), base=DEMO.parent, models_dir=tmp_path / "none", layout=Layout(tmp_path))
    assert 60 * minutes / 4 < seconds_here(stages) < 60 * minutes


def test_the_demo_says_how_long_it_takes_before_it_looks_for_its_models(machine, monkeypatch, tmp_path):
    machine(float32=1e10, bfloat16=1e8, threads=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = CliRunner().invoke(main, ["demo", "-w", str(tmp_path / "w"), "--models", str(tmp_path / "none")])
    assert result.exit_code == 1
    first, *rest = result.stderr.splitlines()
    stages = plan.plan(products(load_recipe(DEMO)), base=DEMO.parent, models_dir=tmp_path, layout=Layout(tmp_path))
    minutes = round(seconds_here(stages) / 60)
    how_long = f"This takes {minutes} to {2 * minutes} minutes here (1 thread)"
    assert first == f"{how_long}, without downloads, if nothing else runs on the machine."
    assert "SmolLM2-135M-Instruct" in "".join(rest)


@pytest.mark.parametrize(
    ("models", "code", "message"),
    [
        (["alice/tiny-source", "bob/tiny-source"], 1, "are different, but both are found in the same folder"),
        (["alice/nowhere"], 2, "To plan without it, set expected_parameters and expected_vocab_size"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_by_name_and_folder(tmp_path, models_dir, models, code, message):
    (tmp_path / "texts.txt").write_text("a text")
    sources = "".join(f'[[sources]]\nname = "s{number}"\nmodel = "{model}"\n' for number, model in enumerate(models))
    (tmp_path / "recipe.toml").write_text(f'[corpus]\npath = "texts.txt"\n[target]\nname = "t"\nmodel = "tiny-target"\n{sources}')
    result = CliRunner().invoke(
        main, ["run", str(tmp_path / "recipe.toml"), "--dry-run", "--models", str(models_dir), "-w", str(tmp_path / "w")]
    )
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert code == 2 or "expected_parameters" not in result.output
