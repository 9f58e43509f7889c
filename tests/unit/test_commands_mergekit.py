"""mergekit's YAML asks for the same merges here as there, to the precision of the dtype; what does not mean the same is refused by name.

`tests/data/mergekit_reference.py` has run mergekit.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from fuseline.commands.mergekit_file import parse_mergekit
from fuseline.store.errors import UsageError
from fuseline.train.merging import plan
from fuseline.train.merging.merge import merge
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.rounding import rounding

REFERENCE = Path(__file__).parents[1] / "data" / "mergekit_reference.safetensors"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

with safe_open(REFERENCE, framework="pt") as file:
    CASES, CONFIG = (json.loads(file.metadata()[key]) for key in ("cases", "config"))


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """What mergekit wrote, and read."""
    return load_file(REFERENCE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, reference) -> dict[str, Path]:
    """The models it read, in each dtype."""
    places = {code: tmp_path_factory.mktemp(code) for code in DTYPES}
    for code, dtype in DTYPES.items():
        models: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in reference.items():
            if key.startswith("inputs/"):
                _, model, name = key.split("/")
                models.setdefault(model, {})[name] = tensor.to(dtype)
        for model, tensors in models.items():
            (places[code] / model).mkdir()
            (places[code] / model / "config.json").write_text(json.dumps(CONFIG))
            save_file(tensors, places[code] / model / "model.safetensors", metadata={"format": "pt"})
    return places


def merged(case: dict, folder: Path, output: Path) -> dict[str, torch.Tensor]:
    asked = parse_mergekit(yaml.safe_dump(case), path=Path("merge.yaml"))
    base = asked.base and folder / asked.base.model
    models = {model.name: folder / model.model for model in asked.models}
    merge(asked.config, base=base, models=models, output=output, identity={}, lineage={})
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize(
    ("case", "code"), [(case, code) for case in CASES for code in DTYPES if code == "f32" or not case.endswith("-near")]
)
def test_what_mergekit_makes(case, code, reference, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "BLOCK", 100)  # several blocks in a tensor
    found = merged(CASES[case], folders[code], tmp_path / "merged")
    for name, tensor in found.items():
        expected = reference[f"{code}/{case}/{name}"]
        assert tensor.dtype == expected.dtype == DTYPES[code]
        if CASES[case]["merge_method"] == "ties":
            decided = ~at_the_cut(CASES[case], name, reference=reference)
            tensor, expected = tensor[decided], expected[decided]
        if code == "f32":
            torch.testing.assert_close(tensor, expected, rtol=rounding(1, terms=16), atol=rounding(expected, terms=1) / 2)
        else:  # computed in float32 and rounded once, in both: at most the last bit differs, and rarely
            torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=1e-6)
            assert (tensor != expected).float().mean() < 0.01
    assert len(found) == sum(key.startswith(f"{code}/{case}/") for key in reference)


def at_the_cut(case: dict, name: str, *, reference: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where a model's change is as large as the smallest that TIES keeps: of several such, mergekit keeps any, and we the first."""
    found = torch.zeros_like(reference[f"inputs/base/{name}"], dtype=torch.bool)
    for entry in case["models"]:
        sizes = (reference[f"inputs/{entry['model']}/{name}"] - reference[f"inputs/base/{name}"]).abs()
        density = entry["parameters"].get("density", case["parameters"].get("density"))
        smallest = sizes.flatten().sort(descending=True).values[max(1, int(density * sizes.numel())) - 1]
        found |= (sizes == smallest) & (sizes > 0)
    assert found.sum() <= 3 + 0.1 * found.numel()
    return found


def test_selections_near_mergekits_threshold_have_equal_weights(reference, folders, tmp_path):
    merged(CASES["sce-near"], folders["f32"], tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert all(set(tensor["weights"].values()) == {0.5} for tensor in report["tensors"])


VALID = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/one@main
    parameters: {weight: 0.5, density: 0.4}
  - model: ./else/one
    parameters: {weight: [{value: 2}]}
parameters: {normalize: false, int8_mask: true, lambda: 0.9}
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""


def test_the_keys_of_mergekit_by_ours():
    asked = parse_mergekit(VALID, path=Path("merge.yaml"))
    assert asked.base.model == "org/base"
    assert [(model.name, model.model, model.revision) for model in asked.models] == [
        ("one", "org/one", "main"),
        ("one-2", "./else/one", None),
    ]
    config = asked.config
    assert (config.method, config.normalizes, config.scale, config.dtype) == ("ties", False, 0.9, "bfloat16")
    assert config.weights == {"one": 0.5, "one-2": 2.0}
    assert config.densities == {"one": 0.4, "one-2": 1.0}  # mergekit's default


def test_one_slice_over_all_layers_is_the_whole_model():
    sources = "".join(f"\n      - {{model: {name}, layer_range: [0, 12]}}" for name in ("base", "one"))
    text = f"merge_method: slerp\nbase_model: base\nparameters: {{t: 0.25}}\nslices:\n  - sources:{sources}"
    asked = parse_mergekit(text, path=Path("merge.yaml"))
    assert (asked.n_layers, asked.config.t, [model.name for model in asked.models]) == (12, 0.25, ["one"])
    for other in (text.replace("[0, 12]}\n", "[0, 6]}\n"), text.replace("[0, 12]", "[2, 12]"), text + "\n  - sources: []"):
        with pytest.raises(UsageError, match=r"merge\.yaml: slices must"):
            parse_mergekit(other, path=Path("merge.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ties", "della", r"merge_method \(della\) must be a supported method: .*ties"),
        ("dtype: float32", "dtype: float64", r"dtype \(float64\) must be one of float32"),
        ("tokenizer_source: base", "tokenizer_source: union", r"tokenizer_source \(union\) must be base, or one of the models"),
        ("tokenizer_source: base", "chat_template: auto", "chat_template is not supported"),
        ("weight: 0.5", "weight: [0, 0.5, 1]", "one.weight .* must be one number for all layers: gradients"),
        ("weight: 0.5", "weight: [{filter: mlp, value: 1}, {value: 0}]", "one.weight .* filters"),
        ("weight: 0.5", "gamma: 0.5", "models.parameters.gamma of one is not supported for one model"),
        ("int8_mask: true", "epsilon: 0.1", r"parameters.epsilon \(0.1\) is not supported"),
        ("int8_mask: true", "select_topk: 0.1", r"parameters.select_topk \(0.1\) is not supported"),
        ("int8_mask: true", "t: 0.1", "t is only for method = slerp"),
        ("int8_mask: true", "rescale: true", r"parameters.rescale \(True\) is not supported"),
        ("org/one@main", "org/one+org/adapter", "must not have an adapter"),
        ("density: 0.4", "density: 0", "densities.one"),
        ("models:", "modules: {}\nmodels:", "modules is not supported"),
        ("models:", "slices: []\nmodels:", "models or slices must be given, but not both"),
        ("merge_method: ties", "merge_method: [", "is not valid YAML"),
        ("merge_method: ties", "merge_method: [ties]", r"merge_method \(\['ties'\]\) must be a supported method"),
        ("parameters: {weight: 0.5, density: 0.4}", "parameters: [1]", r"models.parameters \(\[1\]\) must contain keys and values"),
        ("parameters: {normalize: false, int8_mask: true, lambda: 0.9}", "parameters: 3", r"parameters \(3\) must contain keys"),
        ("tokenizer_source: base", "tokenizer_source: [base]", r"tokenizer_source \(\['base'\]\) must be base"),
        ("model: org/base", "model: {path: org/base}", r"model \(.*\) must be a path or an id"),
        ("weight: 0.5", "weight: true", r"one.weight \(True\) must be one number"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(old, new, message):
    assert old in VALID
    with pytest.raises(UsageError, match=message):
        parse_mergekit(VALID.replace(old, new), path=Path("merge.yaml"))
