"""The graph of a recipe: order, names, and what variants share."""

from collections import Counter
from pathlib import Path

import pytest
from fuseline.pipeline.drawn import drawn
from fuseline.pipeline.graph import Graph, products
from fuseline.pipeline.recipe_file import parse_recipe
from fuseline.store.errors import UsageError

RECIPE = """
[corpus]
path = "corpus.parquet"
domain_column = "domain"

[target]
name = "t"
model = "target"

[[sources]]
name = "a"
model = "first"

[[sources]]
name = "b"
model = "second"
"""


def graph(more: str = "") -> Graph:
    return products(parse_recipe(RECIPE + more, path=Path("r.toml")))


def names(found: Graph) -> list[str]:
    return [f"{product.kind}/{product.name}" for product in found]


def test_a_recipe_without_variants():
    assert names(graph()) == [
        "corpus/corpus",
        "distributions/t",
        "distributions/a",
        "distributions/b",
        "vocab_maps/a--t--prefix",
        "vocab_maps/b--t--prefix",
        "alignments/a--t",
        "alignments/b--t",
        "targets/fused",
        "training/clm",
        "training/fused",
        "evaluations/t--test",
        "evaluations/a--test",
        "evaluations/b--test",
        "evaluations/clm--test",
        "evaluations/fused--test",
    ]


MERGE = "[merge]\n[evaluation]\nall_at_once = true\n[training]\nevaluate_every = 5\n"
STAT = '[alignment]\npositions = "dtw"\nvocabulary = "stat"\n'
ABLATIONS = """
[[variants]]
name = "one"
sources = ["a"]

[[variants]]
name = "mean"
fusion.method = "avgce"

[[variants]]
name = "spans"
alignment.positions = "span"

[[variants]]
name = "seed"
training.seed = 1
"""


@pytest.mark.parametrize("more", ["", MERGE, STAT, ABLATIONS, STAT + ABLATIONS.replace('"span"', '"span"\nalignment.gold_anchor = true')])
def test_everything_comes_after_what_it_is_made_from(more):
    found = list(graph(more))
    for place, product in enumerate(found):
        assert all(found.index(needed) < place for needed in product.inputs)
        assert set(product.determining) <= set(product.inputs)


def test_a_pairwise_recipe_fuses_trains_and_merges_each_source():
    found = names(graph(MERGE))
    assert found[found.index("targets/fused--a") :] == [
        "targets/fused--a",
        "targets/fused--b",
        "targets/fused-all-2",
        "evaluations/t--test",  # which the trainings are evaluated on
        "training/clm",
        "training/fused--a",
        "training/fused--b",
        "training/fused-all-2",
        "merge/merged-2",
        "evaluations/a--test",
        "evaluations/b--test",
        "evaluations/clm--test",
        "evaluations/fused--a--test",
        "evaluations/fused--b--test",
        "evaluations/fused-all-2--test",
        "evaluations/merged-2--test",
    ]


def test_variants_share_what_is_the_same():
    found = graph(ABLATIONS)
    new = sorted(set(names(found)) - set(names(graph())))
    assert new == sorted(
        [
            "targets/fused-one",
            "targets/fused-mean",
            "targets/fused-spans",
            "alignments/a--t--span",  # whose own name says what differs
            "alignments/b--t--span",
            *(f"training/fused-{name}" for name in ("one", "mean", "spans", "seed")),
            "training/clm-seed",  # the baseline of the others learns from the same text in the same way
            *(f"evaluations/fused-{name}--test" for name in ("one", "mean", "spans", "seed")),
            "evaluations/clm-seed--test",
        ]
    )
    by_name = {f"{product.kind}/{product.name}": product for product in found}
    assert found.variants_of(by_name["distributions/a"]) == ["base", "one", "mean", "spans", "seed"]
    assert found.variants_of(by_name["distributions/b"]) == ["base", "mean", "spans", "seed"]
    assert found.variants_of(by_name["training/clm"]) == ["base", "one", "mean", "spans"]
    assert found.variants_of(by_name["targets/fused-mean"]) == ["mean"]


def test_one_variant_alone():
    found = graph(ABLATIONS).only("one")
    assert Counter(product.kind for product in found) == {
        "corpus": 1,
        "distributions": 2,
        "vocab_maps": 1,
        "alignments": 1,
        "targets": 1,
        "training": 2,
        "evaluations": 4,
    }
    with pytest.raises(UsageError, match=r"--variant \(two\) must be one of: base, one, mean, spans, seed"):
        graph(ABLATIONS).only("two")


EVERYTHING_BEFORE_EVALUATION = (
    *(f"distributions/{name}-v" for name in "tab"),
    *(f"alignments/{name}--t-v" for name in "ab"),
    "targets/fused-v",
    *(f"{kind}{name}-v{ending}" for name in ("clm", "fused") for kind, ending in (("training/", ""), ("evaluations/", "--test"))),
)
MERGED = 'sources = ["b"]'


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("distributions.top_k = 32", [*EVERYTHING_BEFORE_EVALUATION]),
        (
            "corpus.max_train_bytes = 1000",
            ["corpus/corpus-v", *EVERYTHING_BEFORE_EVALUATION, *(f"evaluations/{name}-v--test" for name in "tab")],
        ),
        ('evaluation.split = "validation"', [f"evaluations/{name}--validation" for name in ("t", "a", "b", "clm", "fused")]),
        ("training.evaluate_every = 2", []),  # changes nothing of what is computed
        ('fusion.name = "other"', []),  # a name is no difference
        ("target.dtype = 'float32'", sorted({*EVERYTHING_BEFORE_EVALUATION} - {f"distributions/{name}-v" for name in "ab"})),
    ],
)
def test_what_a_change_makes_new(changes, expected):
    found = set(names(graph(f'[[variants]]\nname = "v"\n{changes}\n'))) - set(names(graph()))
    assert {name.replace("a-v--t-v", "a--t-v").replace("b-v--t-v", "b--t-v") for name in found} == set(expected)


@pytest.mark.parametrize("changes", ["distributions.top_k = 32", "corpus.max_train_bytes = 1000", "target.dtype = 'float32'", MERGED])
def test_one_variant_alone_needs_nothing_of_the_others(changes):
    """It has as many products as a recipe that says the same; of the others only what is the same."""
    variants = f'[[variants]]\nname = "v"\n{changes}\n'
    found, own = graph(variants).only("v"), graph(variants).recipes["v"]
    assert [product.kind for product in found] == [product.kind for product in products(own)]
    assert {id(recipe) for product in found for recipe in found.users(product)} <= {
        id(found.recipes["v"]),
        id(graph(variants).recipes["base"]),
    }


def test_models_of_all_kinds_share_one_folder():
    found = graph(MERGE + '[[variants]]\nname = "v"\nmerge.name = "fused"\n[[variants]]\nname = "2"\ntraining.seed = 1\n')
    exports = [product.name for product in found.made_models]
    assert len(set(exports)) == len(exports)


def test_the_order_of_sources_makes_no_other_merge():
    found = graph(MERGE.replace("all_at_once = true", "all_at_once = false") + '[[variants]]\nname = "v"\nsources = ["b", "a"]\n')
    assert len([product for product in found if product.kind == "merge"]) == 1


def test_a_section_is_changed_key_by_key_and_a_table_of_weights_is_replaced():
    weights = '[fusion]\nmethod = "fixed"\nunit = "document"\nweights = { a = 1.0, b = 1.0 }\n[[variants]]\nname = "v"\n'
    recipe = parse_recipe(RECIPE + weights + 'sources = ["a"]\nfusion.weights = { a = 2.0 }\n', path=Path("r.toml"))
    changed = recipe.with_variant(recipe.variants[0])
    assert (changed.fusion.unit, changed.fusion.weights) == ("document", {"a": 2.0})
    assert [source.name for source in changed.sources] == ["a"]


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ('name = "base"', r"variants\.0\.name: 'base' is taken"),
        ('name = "x"\n[[variants]]\nname = "x"', r"variants\.1\.name: 'x' is taken"),
        ('name = "x"\nfusion.metod = "avgce"', r"variants\.0\.fusion\.metod: unknown key\. Did you mean method\?"),
        ('name = "x"\ntrainig.seed = 1', r"variants\.0\.trainig: unknown key\. Did you mean training\?"),
        ('name = "x"\nsources = ["c"]', r"variants\.0\.sources: 'c' must be the name of a source: a, b"),
        ('name = "x"\nexecutor.kind = "ray"', r"variants\.0\.executor: is the same for all variants: remove it here"),
        ('name = "x"\ntraining.seed = "one"', r"variants\.0\.training\.seed: 'one' should be a valid integer"),
        ('name = "x"\nsources = []', r"variants\.0\.sources: "),
        (
            'name = "x"\nevaluation.all_at_once = true',
            r"variants\.0\.evaluation\.all_at_once: needs \[merge\]",
        ),
        (
            'name = "x"\ntraining.clm_weight = 1.0',
            r"variants\.0\.training\.clm_weight: 1 is the value of the baseline",
        ),
        ('name = "a b"', r"variants\.0\.name: 'a b' "),
        ("training.seed = 1", r"variants\.0\.name: is missing"),
    ],
)
def test_wrong_variants_are_refused_by_line(variants, said):
    with pytest.raises(UsageError, match=rf"The recipe r\.toml has 1 problem:\n  line \d+: {said}"):
        parse_recipe(RECIPE + "[[variants]]\n" + variants + "\n", path=Path("r.toml"))


def test_the_graph_is_drawn_in_three_languages():
    found = graph(ABLATIONS)
    text, dot, mermaid = (drawn(found, style=style) for style in ("text", "dot", "mermaid"))
    assert "targets/fused-one  (for one)\n  from distributions/t\n  from distributions/a\n" in text
    assert dot.count("->") == mermaid.count("-->") == sum(len(product.inputs) for product in found)
    assert '"distributions/a" -> "targets/fused-one";' in dot
    assert mermaid.startswith("flowchart LR\n")
    assert '["targets/fused-one"]' in mermaid
