"""Merging of model folders: what is written, what is refused, and that a killed merge leaves nothing and comes out the same again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
import torch
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.store.errors import DataError, UsageError
from fuseline.train import weight_files
from fuseline.train.merging import merge as merge_module
from fuseline.train.merging import plan
from fuseline.train.merging.config import MergeConfig
from fuseline.train.merging.identity import merge_identity, merged_before
from fuseline.train.merging.merge import merge
from fuseline.train.merging.methods import rule_of
from fuseline.train.merging.rule import Block
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from support.tiny import save_model
from transformers import AutoModelForCausalLM

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def family(tmp_path_factory, byte_level_folder) -> Path:
    """A folder with a tiny model, `base`, and three that moved from it, in bfloat16."""
    folder = tmp_path_factory.mktemp("family")
    save_model(folder / "base", tokenizer_folder=byte_level_folder, seed=1, hidden_size=16, layers=1)
    change(folder / "base", lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    for index, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(index)
        copy(folder / "base", folder / name)
        change(folder / name, lambda tensors, of=generator: {key: moved(tensor, of) for key, tensor in tensors.items()})
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in most tensors."""
    monkeypatch.setattr(plan, "BLOCK", 500)


def moved(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (tensor.float() + 0.02 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def change(folder: Path, how, **settings) -> Path:
    """Rewrite a model's weights, and keys of its config."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in how(load_file(path)).items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def shard(folder: Path, *, file_bytes: int) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shapes, dtypes = ({name: getattr(tensor, of) for name, tensor in tensors.items()} for of in ("shape", "dtype"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_files, "FILE_BYTES", file_bytes)
        weight_files.write_weights(iter(tensors.items()), shapes=shapes, dtypes=dtypes, folder=folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def run(family: Path, output: Path, *, names=NAMES, base="base", config=None, **others):
    models = {name: family / name for name in names} | others.pop("models", {})
    settings = {"identity": {}, "lineage": {}} | others
    return merge(config or MergeConfig(), base=base and family / base, models=models, output=output, **settings)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_merge_is_that_of_each_tensor_and_a_model_that_loads(family, tmp_path):
    told = []
    report = run(family, tmp_path / "out", on_progress=lambda done, total: told.append((done, total)))
    found = load_file(tmp_path / "out" / "model.safetensors")
    read = {name: load_file(family / name / "model.safetensors") for name in ("base", *NAMES)}
    assert found.keys() == read["base"].keys() == {tensor.name for tensor in report.tensors}
    for tensor in report.tensors:
        base = read["base"][tensor.name].float().flatten()
        block = Block(base, torch.stack([read[name][tensor.name].float().flatten() for name in sorted(NAMES)]))
        rule = rule_of(MergeConfig(), tensor=tensor.name, models=sorted(NAMES), blocks=[block], n_positions=len(base))
        expected = rule.apply(block).bfloat16()
        assert torch.equal(found[tensor.name].flatten(), expected)
        assert list(tensor.weights.values()) == pytest.approx(rule.weights)
        assert tensor.moved == pytest.approx(float((expected != base.bfloat16()).float().mean()))
    assert told[-1] == (report.n_bytes, report.n_bytes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not report.warnings
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (family / "base" / name).read_bytes()


def test_the_order_of_the_models_their_sharding_and_the_blocks_change_nothing(family, tmp_path, monkeypatch):
    run(family, tmp_path / "out")
    copy(family / "base", tmp_path / "base")
    for index, name in enumerate(NAMES):
        shard(copy(family / name, tmp_path / name), file_bytes=1000 + 700 * index)
    monkeypatch.setattr(plan, "BLOCK", 300)
    run(tmp_path, tmp_path / "again", names=NAMES[::-1])
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_large_merges_are_sharded(family, tmp_path, monkeypatch):
    run(family, tmp_path / "out")
    monkeypatch.setattr(weight_files, "FILE_BYTES", 1500)
    run(family, tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    found = {name: load_file(tmp_path / "shards" / file)[name] for name, file in index["weight_map"].items()}
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert len(set(index["weight_map"].values())) > 2
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "varm", "sce"])
def test_models_that_are_the_base_give_the_base(method, family, tmp_path):
    run(family, tmp_path / "out", models=dict.fromkeys(NAMES, family / "base"), config=MergeConfig(method=method))
    base, found = (load_file(folder / "model.safetensors") for folder in (family / "base", tmp_path / "out"))
    assert all(torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in base.items())


def test_dare_is_the_same_again_and_another_with_another_seed(family, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(family, tmp_path / name, config=MergeConfig(method="dare_ties", seed=seed))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_each_tensor_keeps_the_dtype_of_the_models(family, tmp_path):
    kinds = {EMBEDDINGS: torch.float16, NORM: torch.float32}
    for name in ("base", *NAMES):
        copy(family / name, tmp_path / name)
    for name in NAMES[:2]:
        change(tmp_path / name, lambda tensors: {key: tensor.to(kinds.get(key, tensor.dtype)) for key, tensor in tensors.items()})
    run(tmp_path, tmp_path / "of-two", names=NAMES[:2])
    for name, tensor in load_file(tmp_path / "of-two" / "model.safetensors").items():
        assert tensor.dtype == kinds.get(name, torch.bfloat16)
    run(tmp_path, tmp_path / "of-three")  # of different dtypes the one that holds both
    found = load_file(tmp_path / "of-three" / "model.safetensors")
    assert found[EMBEDDINGS].dtype == found[NORM].dtype == torch.float32
    report = run(tmp_path, tmp_path / "as-asked", config=MergeConfig(dtype="float16"))
    assert {tensor.dtype for tensor in report.tensors} == {"float16"}
    assert json.loads((tmp_path / "as-asked" / "config.json").read_text())["dtype"] == "float16"


def test_linear_needs_no_base(family, tmp_path):
    report = run(family, tmp_path / "out", base=None, config=MergeConfig(method="linear"))
    assert all(tensor.moved is None for tensor in report.tensors)
    run(family, tmp_path / "with-base", config=MergeConfig(method="linear"))
    assert weights(tmp_path / "out") == weights(tmp_path / "with-base")


def test_a_copy_of_tied_embeddings_is_not_merged_but_one_that_differs_is_refused(family, tmp_path):
    run(family, tmp_path / "out")
    copy(family / "base", tmp_path / "base")
    for name in NAMES:
        change(copy(family / name, tmp_path / name), lambda tensors: tensors | {HEAD: tensors[EMBEDDINGS].clone()})
    run(tmp_path, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    change(tmp_path / "one", lambda tensors: tensors | {HEAD: tensors[EMBEDDINGS] + 1})
    with pytest.raises(
        DataError,
        match=r"model one stores an output layer, lm_head\.weight, that differs from its embeddings.*Set tie_word_embeddings = false",
    ):
        run(tmp_path, tmp_path / "refused")


def test_of_vocabularies_of_different_sizes_the_common_rows_are_merged(family, tmp_path):
    copy(family / "base", tmp_path / "base")
    copy(family / "two", tmp_path / "two")
    rows = len(load_file(family / "one" / "model.safetensors")[EMBEDDINGS])

    def grown(tensors):
        return tensors | {EMBEDDINGS: torch.cat([tensors[EMBEDDINGS], torch.ones(3, 16).bfloat16()])}

    change(copy(family / "one", tmp_path / "one"), grown, vocab_size=rows + 3)
    with pytest.raises(
        DataError, match=rf"vocab_size of model one \({rows + 3}\) must equal that of the base \({rows}\).*vocabulary = 'common'"
    ):
        run(tmp_path, tmp_path / "refused", names=NAMES[:2])
    config = MergeConfig(method="linear", vocabulary="common")
    run(tmp_path, tmp_path / "out", names=NAMES[:2], config=config)
    run(family, tmp_path / "same", names=NAMES[:2], config=MergeConfig(method="linear"))
    assert weights(tmp_path / "out") == weights(tmp_path / "same")
    change(tmp_path / "base", grown, vocab_size=rows + 3)  # now only `two` lacks the last rows
    run(tmp_path, tmp_path / "grown", names=NAMES[:2], config=config)
    found = load_file(tmp_path / "grown" / "model.safetensors")[EMBEDDINGS]
    assert torch.equal(found[:rows], load_file(tmp_path / "out" / "model.safetensors")[EMBEDDINGS])
    assert torch.equal(found[rows:], torch.ones(3, 16).bfloat16())
    with pytest.raises(UsageError, match="base must be given for vocabulary = 'common'"):
        run(tmp_path, tmp_path / "refused", names=NAMES[:2], base=None, config=config)


def test_buffers_and_integers_are_the_bases_where_they_are_equal(family, tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "model.counts": torch.arange(3),
        "model.flag": torch.tensor(True),
    }
    for name in ("base", *NAMES):
        change(copy(family / name, tmp_path / name), lambda tensors: tensors | extra)
    change(tmp_path / "two", lambda tensors: {key: value for key, value in tensors.items() if "inv_freq" not in key})
    report = run(tmp_path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())
    assert {tensor.name for tensor in report.tensors if not tensor.weights} == extra.keys()
    for name in extra:
        change(tmp_path / "three", lambda tensors, name=name: tensors | {name: ~tensors[name] if "flag" in name else tensors[name] + 1})
        with pytest.raises(DataError, match=f"{name} .* does not hold weights .* differs between the base and model three"):
            run(tmp_path, tmp_path / "refused")
        change(tmp_path / "three", lambda tensors: tensors | extra)


def without(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def with_one(key, value):
    def how(tensors):
        tensors[key].view(-1)[-1] = value
        return tensors

    return how


@pytest.mark.parametrize(
    ("how", "settings", "message"),
    [
        (lambda t: t, {"hidden_size": 32}, r"hidden_size of model one \(32\) must equal that of the base \(16\)"),
        (lambda t: t, {"rope_theta": 5.0, "rope_parameters": None}, r"rope_parameters\S* of model one"),
        (lambda t: t, {"model_type": "mistral"}, r"model_type of model one \('mistral'\) must equal that of the base \('llama'\)"),
        (without(NORM), {}, "model one must have the tensors of the base, but lacks model.norm.weight"),
        (lambda t: t | {"extra.weight": torch.ones(2)}, {}, "the base must have the tensors of model one, but lacks extra.weight"),
        (lambda t: t | {NORM: torch.ones(8)}, {}, r"model\.norm\.weight: the shape of model one \[8\] must equal that of the base \[16\]"),
        (lambda t: t | {NORM: torch.ones(16, dtype=torch.int64)}, {}, r"the dtype of model one \(torch.int64\)"),
        (lambda t: t | {NORM: torch.ones(16).to(torch.float8_e4m3fn)}, {}, r"the dtype of model.norm.weight \(F8_E4M3\) must be one of"),
        (with_one(EMBEDDINGS, float("nan")), {}, "model.embed_tokens.weight of model one holds NaN"),
        (with_one(NORM, -float("inf")), {}, "model.norm.weight of model one holds an infinite number"),
        (lambda t: t | {HEAD: t[EMBEDDINGS] + 1}, {"tie_word_embeddings": False}, r"tie_word_embeddings of model one \(False\) must equal"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name_and_nothing_is_left(how, settings, message, family, tmp_path):
    change(copy(family / "one", tmp_path / "one"), how, **settings)
    with pytest.raises(DataError, match=message):
        run(family, tmp_path / "out" / "merged", models={"one": tmp_path / "one"})
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_pickles_are_refused(family, tmp_path):
    copy(family / "one", tmp_path / "one")
    torch.save(load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "one" / "pytorch_model.bin")
    (tmp_path / "one" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="pickles"):
        run(family, tmp_path / "out", models={"one": tmp_path / "one"})


def test_rows_that_mean_other_tokens_are_refused_and_other_added_tokens_reported(family, tmp_path):
    copy(family / "one", tmp_path / "one")
    path = tmp_path / "one" / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["added_tokens"][0]["content"] = "<other>"
    path.write_text(json.dumps(definition))
    report = run(family, tmp_path / "out", models={"one": tmp_path / "one"})
    assert report.warnings == ("the tokenizers of the base and model one differ in 1 added tokens, first 0 ('<|endoftext|>', '<other>')",)
    vocabulary = definition["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[10:12]
    vocabulary |= {a: j, b: i}
    path.write_text(json.dumps(definition))
    with pytest.raises(DataError, match=rf"Token {min(i, j)} of model one .* must be that of the base"):
        run(family, tmp_path / "refused", models={"one": tmp_path / "one"})


def test_the_tokenizer_can_be_that_of_a_model(family, tmp_path):
    copy(family / "one", tmp_path / "one")
    (tmp_path / "one" / "tokenizer_config.json").write_text("{}")
    run(family, tmp_path / "out", models={"one": tmp_path / "one"}, tokenizer_of=tmp_path / "one")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("config", "names", "base", "message"),
    [
        (MergeConfig(), NAMES, None, "merge.base must be given for method = 'sce'"),
        (MergeConfig(), NAMES[:1], "base", r"The models \(1\) must be at least 2"),
        (MergeConfig(method="slerp"), NAMES, "base", r"The models \(3\) must be 1 for method = 'slerp'"),
        (
            MergeConfig(method="linear", weights={"other": 1.0}),
            NAMES,
            None,
            "merge.weights: 'other' must be one of the models: one, three, two",
        ),
        (MergeConfig(method="ties", densities={"other": 1.0}), NAMES, "base", "merge.densities: 'other' must be one of"),
        (MergeConfig(method="linear", weights={"one": -1.0}), NAMES[:2], None, "must not sum to 0"),
    ],
)
def test_settings_that_do_not_fit_the_models(config, names, base, message, family, tmp_path):
    with pytest.raises(UsageError, match=message):
        run(family, tmp_path / "out", names=names, base=base, config=config)


def test_keys_of_other_methods_are_refused():
    for key, value in {"t": 0.5, "density": 0.5, "seed": 1, "variant": "fuseai", "scale": 2.0, "densities": {}}.items():
        with pytest.raises(ValidationError, match=f"{key} is only for method = "):
            MergeConfig(method="linear", **{key: value})


def test_weights_that_the_dtype_cannot_hold_are_reported(family, tmp_path):
    with pytest.raises(DataError, match=r"too large for torch\.float16"):
        run(family, tmp_path / "out", config=MergeConfig(method="task_arithmetic", scale=1e9, dtype="float16"))


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(family, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(DataError, match=r"The free space of .* must be more than the merged model takes"):
        run(family, tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from fuseline.train.merging import plan
from fuseline.train.merging.config import MergeConfig
from fuseline.train.merging.merge import merge

plan.BLOCK = 500
def follow(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

family, output = Path(sys.argv[1]), Path(sys.argv[2])
models = {name: family / name for name in ("one", "two", "three")}
merge(MergeConfig(), base=family / "base", models=models, output=output, identity={}, lineage={}, on_progress=follow)
"""


def test_a_killed_merge_leaves_nothing_under_its_name_and_comes_out_the_same_again(family, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(family), str(tmp_path / "out")], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-")
    run(family, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    run(family, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()
    }


# ---- the command ----------------------------------------------------------------------------------------------------------------------

FILE = """[merge]
base = "base"
density = 0.2

[[merge.models]]
name = "first"
model = "one"

[[merge.models]]
name = "second"
model = "two"
"""


def command(*arguments, exit_code: int = 0) -> str:
    result = CliRunner().invoke(main, ["merge", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.output


def test_the_command(family, tmp_path):
    for name in ("base", "one", "two"):
        (tmp_path / name).symlink_to(family / name)
    (tmp_path / "merge.toml").write_text(FILE)
    output = tmp_path / "made" / "merged"
    shown = command(tmp_path / "merge.toml", "-o", output)
    assert "embed_tokens" in shown
    assert "second" in shown
    run(family, tmp_path / "same", names=(), models={"first": family / "one", "second": family / "two"}, config=MergeConfig(density=0.2))
    assert weights(output) == weights(tmp_path / "same")
    card = (output / "README.md").read_text()
    assert str(tmp_path) not in card
    assert '"density": 0.2' in card
    query = f"SELECT t.name, t.moved, t.weights.first FROM (SELECT unnest(tensors) AS t FROM '{output}/merge_report.json') ORDER BY ALL"
    rows = duckdb.sql(query).fetchall()
    assert [row[0] for row in rows] == sorted(load_file(output / "model.safetensors"))
    assert all(0 < share <= 1 and 0 < weight < 1 for _, share, weight in rows)
    # Again: nothing to do. With other settings: the folder is taken.
    before = output.stat().st_mtime_ns
    assert "nothing to do" in command(tmp_path / "merge.toml", "-o", output)
    assert json.loads(command(tmp_path / "merge.toml", "-o", output, "--json"))["done"] == "nothing to do"
    assert output.stat().st_mtime_ns == before
    (tmp_path / "other.toml").write_text(FILE.replace("0.2", "0.3"))
    assert "must be a new folder" in command(tmp_path / "other.toml", "-o", output, exit_code=2)
    template = tmp_path / "one" / "chat_template.jinja"  # of the model whose tokenizer is then to be copied
    (tmp_path / "tokenizer.toml").write_text(FILE.replace("[merge]\n", '[merge]\ntokenizer = "first"\n', 1))
    template.write_text("{{ messages }}")
    try:
        assert "must be a new folder" in command(tmp_path / "tokenizer.toml", "-o", output, exit_code=2)
    finally:
        template.unlink()
    shown = CliRunner().invoke(main, ["merge", str(tmp_path / "other.toml"), "-o", str(tmp_path / "json"), "--json"])
    record = json.loads(shown.stdout)
    assert record["done"] == "merged"
    assert sum(group["parameters"] for group in record["groups"]) == sum(
        t.numel() for t in load_file(output / "model.safetensors").values()
    )
    # mergekit's YAML makes the same of the same.
    yaml = "merge_method: sce\nbase_model: base\nmodels: [{model: one}, {model: two}]\nparameters: {select_topk: 0.2}\n"
    (tmp_path / "merge.yaml").write_text(yaml)
    command(tmp_path / "merge.yaml", "-o", tmp_path / "by-yaml")
    sources = "[{model: base, layer_range: [0, 1]}, {model: one, layer_range: [0, 1]}]"
    slices = f"merge_method: slerp\nbase_model: base\nparameters: {{t: 0.5}}\nslices: [{{sources: {sources}}}]\n"
    (tmp_path / "slices.yml").write_text(slices)
    command(tmp_path / "slices.yml", "-o", tmp_path / "by-slices")
    (tmp_path / "slices.yml").write_text(slices.replace("[0, 1]", "[0, 2]"))
    assert "must be all layers of one (1)" in command(tmp_path / "slices.yml", "-o", tmp_path / "refused", exit_code=2)
    (tmp_path / "mergekit.toml").write_text(FILE.replace("density", 'variant = "mergekit"\ndensity'))
    command(tmp_path / "mergekit.toml", "-o", tmp_path / "by-toml")
    assert weights(tmp_path / "by-yaml") == weights(tmp_path / "by-toml") != weights(output)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("density = 0.2", "densty = 0.2", "line 3: merge.densty: unknown key. Did you mean density? Valid are: base, "),
        ("density = 0.2", "density = 2.0", "line 3: merge.density: 2.0 should be less than or equal to 1"),
        ("density = 0.2", "weights = { first = 1.0 }", "line 3: merge.weights: remove it, and set `weight` in each of [[merge.models]]"),
        ('model = "two"', "", "line 9: merge.models.1.model: is missing"),
        ('name = "second"', 'name = "first"', "line 10: merge.models.1.name: 'first' is also the name of another model"),
        ('model = "two"', 'model = "two"\nweight = 1', "merge: weights is only for method"),
        ('model = "two"', 'model = "./none"', "The model second (./none) is not a local folder"),
        ("density = 0.2", 'tokenizer = "third"', "line 3: merge.tokenizer: 'third' must be one of the models: first, second"),
        ("[merge]", "[other]\n[merge]", "must have one section, [merge]"),
        ("[merge]", "[merge", "is not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_reported_with_its_line(old, new, message, family, tmp_path):
    for name in ("base", "one", "two"):
        (tmp_path / name).symlink_to(family / name)
    (tmp_path / "merge.toml").write_text(FILE.replace(old, new))
    shown = command(tmp_path / "merge.toml", "-o", tmp_path / "out", exit_code=1 if "none" in new else 2)
    assert message in shown
    assert not (tmp_path / "out").exists()


def test_the_same_merge_has_the_same_identity_however_it_is_said():
    digests = {"a": "1", "b": "2"}
    plain = merge_identity(MergeConfig(), base="0", models=digests)
    assert plain == merge_identity(MergeConfig(density=0.1, name="other"), base="0", models=dict(reversed(digests.items())))
    assert plain != merge_identity(MergeConfig(density=0.2), base="0", models=digests)
    assert plain != merge_identity(MergeConfig(), base="0", models=digests | {"b": "3"})
    assert not merged_before(Path("nowhere"), identity=plain)


def test_help_needs_no_torch():
    program = (
        "import sys; from fuseline.cli import main; main(['merge', '--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
