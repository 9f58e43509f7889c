"""Recipes: those that come with the package load, and all mistakes in one are reported at once, each with its line."""

import re
from pathlib import Path

import fuseline
import pytest
from fuseline.align.config import AlignmentConfig
from fuseline.pipeline.graph import products
from fuseline.pipeline.plan import plan
from fuseline.pipeline.recipe_file import load_recipe
from fuseline.store.errors import UsageError
from fuseline.store.layout import Layout
from fuseline.store.toml_text import Lines

RECIPES = sorted((Path(fuseline.__file__).parent / "recipes").glob("*.toml"))
GOOD = """\
# what to fuse
[corpus]
path = "data"

[target]
name = "target"
model = "org/target"

[[sources]]
name = "one"
model = "org/one"

[[sources]]
name = "two"
model = "org/two"
"""


def reported(tmp_path: Path, text: str) -> list[tuple[int, str, str]]:
    """(line, key, what) of every problem that is reported of a recipe."""
    path = tmp_path / "recipe.toml"
    path.write_bytes(text.encode())
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    first, *lines = str(error.value).splitlines()
    problems = [re.fullmatch(r"  line (\d+): ([^:]+): (.*)", line).groups() for line in lines]
    assert first == f"The recipe {path} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:"
    return [(int(line), key, what) for line, key, what in problems]


def line(text: str, beginning: str, *, nth: int = 1) -> int:
    """The line, from 1, that begins so for the nth time."""
    return [number for number, written in enumerate(text.split("\n"), start=1) if written.startswith(beginning)][nth - 1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_of_the_package_load(path):
    recipe = load_recipe(path)
    assert len({model.name for model in recipe.models}) == len(recipe.sources) + 1
    assert recipe.models[0] == recipe.target


def test_there_are_recipes():
    assert {"demo.toml", "fusellm-7b.toml", "fusechat-7b.toml"} <= {path.name for path in RECIPES}


def test_the_published_setting_takes_one_source_for_each_pack_and_one_token_where_nothing_is_aligned():
    (path,) = (path for path in RECIPES if path.name == "fusellm-7b.toml")
    recipe = load_recipe(path)
    assert (recipe.fusion.unit, recipe.fusion.pack_length, recipe.fusion.fallback) == ("pack", 2048, "one_hot")
    assert (recipe.fusion.method, recipe.fusion.metric, recipe.alignment.gold_anchor) == ("mince", "ce", False)


def test_fusechat_is_pairwise_with_the_published_settings():
    (path,) = (path for path in RECIPES if path.name == "fusechat-7b.toml")
    recipe = load_recipe(path)
    training, alignment = recipe.training, recipe.alignment
    assert (training.epochs, training.learning_rate, training.global_batch_size, training.clm_weight) == (3, 5e-6, 128, 0.9)
    assert (alignment.positions, alignment.dtw_match, alignment.vocabulary) == ("dtw", "fusechat", "stat")
    assert recipe.merge is not None
    assert (recipe.merge.method, recipe.merge.variant, recipe.merge.density) == ("sce", "fuseai", 0.1)
    assert (len(recipe.fusions), len(recipe.trainings), recipe.merged_name) == (6, 7, "merged-5")
    assert all(model.expected_parameters and model.expected_vocab_size for model in recipe.models)


def made(text: str, tmp_path: Path) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str, float]], str | None]:
    """Targets with the sources in them, trainings with their targets and λ, and the merged model, of a recipe."""
    (tmp_path / "recipe.toml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.toml")
    fusions = [(fusion.name, [source.name for source in fusion.sources]) for fusion in recipe.fusions]
    trainings = [(training.name, training.fusion.name, training.config.clm_weight) for training in recipe.trainings]
    assert all(training.config.name == training.name for training in recipe.trainings)
    return fusions, trainings, recipe.merged_name


def test_without_merge_all_sources_are_fused_at_once(tmp_path):
    assert made(GOOD, tmp_path) == ([("fused", ["one", "two"])], [("clm", "fused", 1.0), ("fused", "fused", 0.1)], None)


def test_with_merge_each_source_is_fused_by_itself_and_all_at_once_where_that_is_a_baseline(tmp_path):
    text = GOOD + '[fusion]\nname = "f"\n[training]\nname = "t"\n[merge]\nname = "m"\n[evaluation]\nall_at_once = true\n'
    fusions, trainings, merged = made(text, tmp_path)
    assert fusions == [("f--one", ["one"]), ("f--two", ["two"]), ("f-all-2", ["one", "two"])]
    assert trainings == [("clm", "f--one", 1.0), ("t--one", "f--one", 0.1), ("t--two", "f--two", 0.1), ("t-all-2", "f-all-2", 0.1)]
    assert merged == "m-2"
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert {source: training.name for source, training in recipe.merged_trainings.items()} == {"one": "t--one", "two": "t--two"}
    assert recipe.made_models == ["clm", "t--one", "t--two", "t-all-2", "m-2"]


def test_a_source_that_is_added_takes_no_name_of_what_was_made_before(tmp_path):
    text = GOOD + "[merge]\n[evaluation]\nall_at_once = true\n"
    before = made(text, tmp_path)
    after = made(text + '[[sources]]\nname = "three"\nmodel = "org/three"\n', tmp_path)
    for was, now in zip(before[:2], after[:2], strict=True):
        same_names = {name: rest for name, *rest in now}
        assert all(same_names.get(name, rest) == rest for name, *rest in was)
    assert {name for name, *_ in after[1]} - {name for name, *_ in before[1]} == {"fused--three", "fused-all-3"}
    assert (before[2], after[2]) == ("merged-2", "merged-3")


def test_one_source_by_itself_is_not_merged_where_the_method_compares_several(tmp_path):
    alone = GOOD.split('[[sources]]\nname = "two"')[0]
    assert made(alone + "[merge]\n", tmp_path)[2] is None
    assert made(alone + '[merge]\nmethod = "linear"\n', tmp_path)[2] == "merged-1"


def test_a_minimal_recipe_has_the_defaults(tmp_path):
    (tmp_path / "recipe.toml").write_text(GOOD)
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert (recipe.top_k, recipe.fusion.method, recipe.alignment.vocabulary) == (10, "mince", "prefix")
    assert [training.name for training in recipe.trainings] == ["clm", "fused"]
    assert [training.config.clm_weight for training in recipe.trainings] == [1.0, 0.1]
    baseline = recipe.trainings[0].config
    assert baseline.model_copy(update={"name": "fused", "clm_weight": 0.1}) == recipe.training == recipe.trainings[1].config


def test_the_fusions_top_k_comes_before_the_distributions(tmp_path):
    (tmp_path / "recipe.toml").write_text(GOOD + "[distributions]\ntop_k = 20\n")
    assert load_recipe(tmp_path / "recipe.toml").top_k == 20
    (tmp_path / "recipe.toml").write_text(GOOD + "[distributions]\ntop_k = 20\n[fusion]\ntop_k = 7\n")
    assert load_recipe(tmp_path / "recipe.toml").top_k == 7


def test_all_problems_are_reported_at_once_in_the_order_of_their_lines(tmp_path):
    text = (
        GOOD.replace('path = "data"', 'path = "data"\ncontext_lenght = 512\nseed = "x"\npart_bytes = 10')
        .replace('model = "org/one"', "model = 3\ndtype = 'float64'")
        .replace('name = "two"\n', "")
        + '\n[fusion]\nmethod = "best"\nmetric = "bpb"\n\n[evalution]\nsplit = "test"\n\n[training]\ntail = "cut"\nclm_weight = 1.5\n'
    )
    problems = reported(tmp_path, text)
    assert [(number, key) for number, key, _ in problems] == [
        (line(text, "context_lenght"), "corpus.context_lenght"),
        (line(text, "seed"), "corpus.seed"),
        (line(text, "part_bytes"), "corpus.part_bytes"),
        (line(text, "model = 3"), "sources.0.model"),
        (line(text, "dtype"), "sources.0.dtype"),
        (line(text, "[[sources]]", nth=2), "sources.1.name"),
        (line(text, 'method = "best"'), "fusion.method"),
        (line(text, "[evalution]"), "evalution"),
        (line(text, "tail"), "training.tail"),
        (line(text, "clm_weight"), "training.clm_weight"),
    ]
    what = {key: text for _, key, text in problems}
    assert what["corpus.context_lenght"].startswith("unknown key. Did you mean context_length? Valid are: name, path, splits, ")
    assert what["corpus.seed"] == "'x' should be a valid integer"
    assert what["corpus.part_bytes"] == "10 should be greater than or equal to 1024"
    assert what["sources.0.model"] == "3 should be a valid string"
    assert what["sources.0.dtype"] == "'float64' should be 'bfloat16', 'float16' or 'float32'"
    assert what["sources.1.name"] == "is missing: name of the model in the workspace"
    assert what["fusion.method"] == "'best' should be 'mince', 'avgce', 'entropy', 'confidence' or 'fixed'"
    assert what["evalution"].startswith("unknown key. Did you mean evaluation? Valid are: corpus, target, sources, ")
    assert what["training.clm_weight"] == "1.5 should be less than or equal to 1"


def test_combinations_are_reported_beside_wrong_and_unknown_keys_and_sections(tmp_path):
    text = (
        GOOD.replace('name = "two"', 'name = "one"').replace('model = "org/one"', 'model = "org/target"\ndtyp = "float32"')
        + '[nonsense]\nx = 1\n[[more.nonsense]]\n[training]\nname = "target"\nepochs = 1\nsteps = 5\n[evaluation]\nsplit = "train"\n'
    )
    assert {(number, key, what.split(":")[0]) for number, key, what in reported(tmp_path, text)} == {
        (line(text, 'name = "one"', nth=2), "sources.1.name", "'one' is also sources.0.name"),
        (line(text, 'model = "org/target"', nth=2), "sources.0.model", "is the target's start, which is always a source"),
        (line(text, "dtyp"), "sources.0.dtyp", "unknown key. Did you mean dtype? Valid are"),
        (line(text, "[nonsense]"), "nonsense", "unknown key. Valid are"),
        (line(text, "[[more.nonsense]]"), "more", "unknown key. Valid are"),
        (line(text, "[training]"), "training", "epochs (1) and steps (5) must not both be given"),
        (line(text, 'name = "target"', nth=2), "training.name", "'target' is also target.name"),
        (line(text, "split"), "evaluation.split", "'train' is the training data of the models"),
    }


@pytest.mark.parametrize(
    ("added", "key", "what"),
    [
        ('[training]\n[evaluation]\nclm_name = "fused"', "evaluation.clm_name", "'fused' is also training.name: choose another"),
        ('[evaluation]\nclm_name = "one"', "evaluation.clm_name", "'one' is also sources.0.name: choose another"),
        ("[training]\nclm_weight = 1", "training.clm_weight", "1 is the value of the baseline: set evaluation.clm_baseline = false"),
        ('[training]\nname = "two"', "training.name", "'two' is also sources.1.name: choose another"),
        (
            "[evaluation]\nall_at_once = true",
            "evaluation.all_at_once",
            "needs [merge]; without it all sources are fused at once: remove it",
        ),
        (
            '[merge]\nmethod = "slerp"',
            "merge.method",
            "'slerp' merges 1 model with the target's start, but there are 2: choose another",
        ),
        (
            '[merge]\nmethod = "linear"\nweights = {one = 1, tow = 2}',
            "merge.weights.tow",
            "'tow' must be the name of a source: one, two",
        ),
        (
            '[merge]\nvocabulary = "common"',
            "merge.vocabulary",
            "is for models with different vocabularies, but all models here have the target's: remove it",
        ),
        (
            "[evaluation]\nclm_baseline = false\n[merge]\n[training]\nclm_weight = 1",
            "training.clm_weight",
            "1 learns nothing from the sources: with [merge] their models would all be the same",
        ),
        ("[merge]\ndensity = 2", "merge.density", "2 should be less than or equal to 1"),
        (
            "[training]\nglobal_batch_size = 3\nmicro_batch_size = 2",
            "training",
            "global_batch_size (3) must be a multiple of micro_batch_size (2) × data_parallel (1)",
        ),
    ],
)
def test_what_does_not_go_together_is_reported(tmp_path, added, key, what):
    text = GOOD + added + "\n"
    section, name, *_ = [*key.split("."), ""]
    at = line(text, name, nth=4 if key == "training.name" else 1) if name else line(text, f"[{section}]")
    assert reported(tmp_path, text) == [(at, key, what)]


FIXED = '[fusion]\nmethod = "fixed"\n'


@pytest.mark.parametrize(
    ("added", "at", "key", "what"),
    [
        (
            "[fusion]\npack_length = 64",
            "pack_length",
            "fusion.pack_length",
            "is only for unit = 'pack' (unit is 'segment'): remove it, or set unit",
        ),
        (
            "[fusion.weights]\none = 1",
            "[fusion.weights]",
            "fusion.weights",
            "is only for method = 'fixed' (method is 'mince'): remove it, or set method",
        ),
        (
            '[fusion]\nmethod = "fixed"',
            "[fusion]",
            "fusion.weights",
            "method = 'fixed' needs a weight above 0 for at least one of the models: target, one, two",
        ),
        (
            FIXED + "[fusion.weights]\none = 0\ntwo = 0.0",
            "[fusion.weights]",
            "fusion.weights",
            "method = 'fixed' needs a weight above 0 for at least one of the models: target, one, two",
        ),
        (FIXED + "weights = {one = 1, tow = 1}", "weights", "fusion.weights.tow", "'tow' must be the name of a model: target, one, two"),
        (FIXED + "weights = {one = 1, two = -1}", "weights", "fusion.weights.two", "-1 should be greater than or equal to 0"),
        (FIXED + "weights = {one = inf}", "weights", "fusion.weights.one", "inf should be a finite number"),
        (
            FIXED + "weights = {one = 1}\n[fusion.domain_weights.code]\ntwo = 1",
            "[fusion.domain_weights.code]",
            "fusion.domain_weights",
            "needs the domains of the documents: set corpus.domain_column",
        ),
    ],
)
def test_weights_that_cannot_be_meant_are_reported(tmp_path, added, at, key, what):
    text = GOOD + added + "\n"
    found = {key: (number, what) for number, key, what in reported(tmp_path, text)}
    assert found.pop(key) == (line(text, at), what)
    assert set(found) <= {"fusion.weights"}, "what was wrong is dropped, and then may be missing"


def test_with_merge_a_weight_is_needed_in_each_pair(tmp_path):
    text = GOOD + FIXED + "weights = {one = 1}\n[merge]\n"
    what = "method = 'fixed' needs a weight above 0 for at least one of the models: target, two"
    assert reported(tmp_path, text) == [(line(text, "weights"), "fusion.weights", what)]
    (tmp_path / "recipe.toml").write_text(text.replace("one = 1", "one = 1, target = 0.5"))
    load_recipe(tmp_path / "recipe.toml")


def test_a_source_with_the_name_of_what_is_made_is_reported(tmp_path):
    text = GOOD.replace('name = "one"', 'name = "merged-2"').replace('name = "two"', 'name = "fused-all-2"')
    assert reported(tmp_path, text + "[merge]\n[evaluation]\nall_at_once = true\n") == [
        (1, "training.name", "'fused-all-2' is also sources.1.name: choose another"),
        (len(text.splitlines()) + 1, "merge.name", "'merged-2' is also sources.0.name: choose another"),
    ]


def test_a_wrong_weight_of_a_domain_is_reported_in_its_place(tmp_path):
    weights = "[fusion.weights]\none = 1\n[fusion.domain_weights.law]\nthree = 1\n[fusion.domain_weights.code]\none = 0\n"
    text = GOOD.replace('path = "data"', 'path = "data"\ndomain_column = "domain"') + FIXED + weights
    assert [(number, key) for number, key, _ in reported(tmp_path, text)] == [
        (line(text, "three"), "fusion.domain_weights.law.three"),
        (line(text, "[fusion.domain_weights.code]"), "fusion.domain_weights.code"),
    ]


def test_a_pack_is_by_default_as_long_as_the_context(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        GOOD.replace('path = "data"', 'path = "data"\ncontext_length = 300') + '[fusion]\nunit = "pack"\n'
    )
    assert load_recipe(tmp_path / "recipe.toml").pack_length == 300
    (tmp_path / "recipe.toml").write_text(GOOD + '[fusion]\nunit = "pack"\npack_length = 64\n')
    assert load_recipe(tmp_path / "recipe.toml").pack_length == 64


def test_a_model_named_clm_is_reported_only_where_there_is_a_baseline(tmp_path):
    text = GOOD.replace('name = "one"', 'name = "clm"')
    ((_, key, what),) = reported(tmp_path, text)
    assert (key, what) == ("evaluation.clm_name", "'clm' is also sources.0.name: choose another")
    (tmp_path / "recipe.toml").write_text(text + "[evaluation]\nclm_baseline = false\n")
    assert [training.name for training in load_recipe(tmp_path / "recipe.toml").trainings] == ["fused"]


def test_the_same_model_at_another_revision_is_a_source(tmp_path):
    (tmp_path / "recipe.toml").write_text(GOOD.replace('model = "org/one"', 'model = "org/target"\nrevision = "v1"'))
    assert load_recipe(tmp_path / "recipe.toml").sources[0].revision == "v1"


def test_missing_sections_and_no_sources_are_reported(tmp_path):
    assert {key for _, key, _ in reported(tmp_path, "")} == {"corpus", "target", "sources"}
    text = "sources = []\n" + GOOD.split("[[sources]]")[0]
    ((number, key, what),) = reported(tmp_path, text)
    assert (number, key) == (1, "sources")
    assert "at least 1" in what


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "a b", "a--b", "ü"])
def test_names_that_would_not_do_for_a_folder_are_reported(tmp_path, name):
    text = GOOD.replace('name = "one"', f'name = "{name}"')
    assert [(number, key) for number, key, _ in reported(tmp_path, text)] == [(line(text, f'name = "{name}"'), "sources.0.name")]


def test_lines_are_right_after_values_of_several_lines_and_odd_characters(tmp_path):
    text = (
        '[corpus]\npath = """\nseed = 1\n"""\n# a comment\u2028with odd\x85line ends\nseed = [\n  1,\n  # two\n  2,\n]\n\n\nnope = 1\n'
        + GOOD[GOOD.index("[target]") :]
        + "[training]\nsteps = 'x'\n"
    )
    assert [(number, key) for number, key, _ in reported(tmp_path, text)] == [
        (line(text, "seed = ["), "corpus.seed"),
        (line(text, "nope"), "corpus.nope"),
        (line(text, "steps"), "training.steps"),
    ]
    assert [(number, key) for number, key, _ in reported(tmp_path, text.replace("\n", "\r\n"))] == [
        (line(text, "seed = ["), "corpus.seed"),
        (line(text, "nope"), "corpus.nope"),
        (line(text, "steps"), "training.steps"),
    ]


def test_dotted_and_inline_tables_have_lines_too(tmp_path):
    text = (
        'training.steps = "x"\nsources = [\n'
        '  {name = "one", model = "org/one"},\n'
        '  {name = "two", model = "org/two", dtyp = "float32"},\n'
        "]\n" + GOOD.split("[[sources]]")[0]
    )
    problems = reported(tmp_path, text)
    assert (problems[0][:2], problems[1][1]) == ((1, "training.steps"), "sources.1.dtyp")
    assert line(text, "sources") <= problems[1][0] <= line(text, "  {name", nth=2)


def test_a_value_of_several_lines_at_the_very_beginning_has_line_one(tmp_path):
    text = "sources = [\n  1,\n]\n" + GOOD.split("[[sources]]")[0]
    assert {number for number, key, _ in reported(tmp_path, text) if key.startswith("sources")} == {1}


def test_line_of_what_is_not_there_is_the_line_of_its_section():
    assert Lines(GOOD).of(("target", "dtype")) == line(GOOD, "[target]")
    assert Lines(GOOD).of(("sources", 1, "dtype")) == line(GOOD, "[[sources]]", nth=2)
    assert Lines(GOOD).of(("nowhere", "at", "all")) == 1
    assert Lines(GOOD).of(("sources", 0, "model")) == line(GOOD, 'model = "org/one"')


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[corpus\npath = 1", r"is not valid TOML: .*line 1"),
        (b"[corpus]\npath = 1\npath = 2\n", r"is not valid TOML: .*line 3"),
        (b"[corpus]\npath = \"\xff\"\n", r"line 2: is not valid UTF-8"),
    ],
)  # fmt: skip
def test_what_is_not_toml_is_reported(tmp_path, raw, message):
    (tmp_path / "recipe.toml").write_bytes(raw)
    with pytest.raises(UsageError, match=message):
        load_recipe(tmp_path / "recipe.toml")


def test_a_recipe_that_is_not_there_is_reported(tmp_path):
    for path in (tmp_path / "nowhere.toml", tmp_path):
        with pytest.raises(UsageError, match=rf"The recipe {path} cannot be read: "):
            load_recipe(path)


@pytest.mark.parametrize(
    ("alignment", "what"),
    [
        ('vocabulary = "mined"', 'positions ("cover") needs vocabulary = "prefix", which maps the rests of tokens, but it is "mined"'),
        (
            'positions = "span"\ndtw_match = "em"',
            'dtw_match ("em") is only for positions = "dtw", but positions is "span". Remove dtw_match',
        ),
        ('collisions = "first"', 'positions ("cover") sums the mass of several source tokens, but collisions is "first". Set'),
        ("gold_anchor = false", 'positions ("cover") always has the gold anchor: set gold_anchor = true'),
        ('positions = "dtw"\ngold_anchor = true', "gold_anchor (true) needs positions whose prefixes end at the same byte"),
    ],
)
def test_ways_to_align_that_do_not_go_together_are_reported(tmp_path, alignment, what):
    text = f"{GOOD}[alignment]\n{alignment}\n"
    ((number, key, what_is_reported),) = reported(tmp_path, text)
    assert (number, key) == (line(text, "[alignment]"), "alignment")
    assert what_is_reported.startswith(what)


def test_dtw_has_no_gold_anchor_unless_other_positions_are_asked_for(tmp_path):
    for alignment, expected in (('positions = "dtw"', ("mined", False)), ('positions = "span"', ("mined", True)), ("", ("mined", True))):
        (tmp_path / "recipe.toml").write_text(f"{GOOD}[alignment]\n{alignment}\n")
        found = load_recipe(tmp_path / "recipe.toml").alignment
        assert (found.dtw_match, found.gold_anchor) == expected


def test_each_way_to_align_has_its_own_place_in_the_workspace():
    ways = [
        {"positions": "dtw", "dtw_match": match, "vocabulary": vocabulary}
        for match in ("em", "mined", "fusechat")
        for vocabulary in ("exact", "prefix", "mined", "stat", "mined_published")
    ]
    configs = [AlignmentConfig.model_validate(way) for way in [*ways, {"positions": "span"}, {"positions": "span", "vocabulary": "stat"}]]
    assert len({config.alignment_name("a--b") for config in configs}) == 1 + 10 + 1, "em does not read the map, span has one"
    assert len({config.map_name("a--b") for config in configs}) == 6, "stat counts by dtw, or by span"
    assert {config.matches_name("a--b") for config in configs} == {"a--b--dtw", "a--b--span"}
    assert all(name.startswith("a--b") for config in configs for name in (config.alignment_name("a--b"), config.map_name("a--b")))


@pytest.mark.parametrize("name", ["fusellm-7b", "fusechat-7b"])
def test_what_the_published_settings_take_is_reported_without_a_network(tmp_path, name):
    (path,) = (path for path in RECIPES if path.stem == name)
    recipe = load_recipe(path)
    stages = plan(products(recipe), base=path.parent, models_dir=tmp_path / "models", layout=Layout(tmp_path / "workspace"))
    names = [stage.stage.split(" (")[0] for stage in stages]
    assert len(names) == len(set(names))
    assert {f"distributions {model.name}" for model in recipe.models} < set(names)
    assert {f"targets {fusion.name}" for fusion in recipe.fusions} | {f"training {training.name}" for training in recipe.trainings} < set(
        names
    )
    assert {f"evaluation {model}" for model in (*(model.name for model in recipe.models), *recipe.made_models)} < set(names)
    assert ("merge merged-5" in names) == (name == "fusechat-7b")
    assert not (tmp_path / "workspace").exists()
    trainings = [stage for stage in stages if stage.stage.startswith("training ")]
    assert all(stage.tokens == stages[0].tokens * (recipe.training.epochs or 1) for stage in trainings)
