"""The vocabulary maps `mined` and `stat` against searches over all tokens, and the counts that `stat` reads."""

import numpy as np
import polars as pl
import pytest
from fuseline.align.vocabulary import target_ids, vocabulary_map
from fuseline.store.tokenizer import Tokenizer
from support.textbook import edit_distance


def text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def candidates(target: Tokenizer) -> list[int]:
    """Tokens that stand for text: neither special ones nor stray bytes."""
    return [v for v in range(target.vocab_size) if target.token_bytes[v] and v not in target.byte_fallback_ids]


def matches(*rows: tuple[int, int, int]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"source_id": pl.UInt32, "target_id": pl.UInt32, "count": pl.UInt64}, orient="row")


def test_mined_is_exact_where_it_can_be_and_else_the_lowest_id_at_the_smallest_distance(source_and_target):
    source, target = source_and_target
    exact = vocabulary_map(source, target=target, rule="exact")
    mined = vocabulary_map(source, target=target, rule="mined")
    assert mined["count"].null_count() == len(mined)
    is_known = pl.Series(exact["target_id"].is_not_null())
    assert mined.filter(is_known).equals(exact.filter(is_known))
    assert set(exact.filter(rule="exact")["distance"]) == {0}
    searched = candidates(target)
    texts = [text(target.token_bytes[v]) for v in searched]
    rows = mined.filter(rule="mined")
    assert len(rows) > 30
    n_not_text = 0
    for row in rows.iter_rows(named=True):
        distances = [edit_distance(text(row["source_bytes"]), other) for other in texts]
        assert row["distance"] == min(distances) > 0
        assert row["target_id"] == searched[distances.index(min(distances))]
        assert row["target_bytes"] == target.token_bytes[row["target_id"]]
        n_not_text += "\udc80" <= max(text(row["source_bytes"])) <= "\udcff"
    assert n_not_text > 0 or not source.is_byte_level, "no half characters were among them"
    assert mined.filter(rule="none")["source_bytes"].bin.size().sum() == 0, "a token with a text is always mapped"


def test_stat_prefers_the_most_frequent_partner_then_the_nearest_then_the_lowest_id(pair):
    source, target = pair["byte_level"], pair["sentencepiece"]
    exact = target_ids(vocabulary_map(source, target=target, rule="exact"))
    mined = vocabulary_map(source, target=target, rule="mined")
    rest = [v for v in mined.filter(rule="mined")["source_id"] if mined["distance"][v] > 1][:4]
    known = next(v for v in range(source.vocab_size) if exact[v] >= 0 and source.token_bytes[v] == b" the")
    distances = {
        v: sorted((edit_distance(text(source.token_bytes[v]), text(target.token_bytes[w])), w) for w in candidates(target)) for v in rest
    }
    far, near = [w for _, w in distances[rest[1]][-3:]], distances[rest[1]][5]
    of_equal_distance = next(
        sorted([w, other]) for (a, w), (b, other) in zip(distances[rest[2]], distances[rest[2]][1:], strict=False) if a == b
    )
    frequent = distances[rest[0]][-1]
    table = vocabulary_map(
        source,
        target=target,
        rule="stat",
        matches=matches(
            (rest[0], frequent[1], 3),  # the more frequent one, however far
            (rest[0], distances[rest[0]][0][1], 2),
            *((rest[1], w, 7) for w in (*far, near[1])),  # equally frequent: the nearest
            *((rest[2], w, 1) for w in of_equal_distance),  # and equally near: the lowest id
            (known, far[0], 1_000),  # the same bytes come before any count
            (known, int(exact[known]), 4),
            (rest[3], target.roles["bos"], 9),  # special tokens are no partners
        ),
    )
    rows = table.rows_by_key("source_id", named=True, unique=True)
    found = {v: (rows[v]["target_id"], rows[v]["rule"], rows[v]["distance"], rows[v]["count"]) for v in (*rest, known)}
    assert found == {
        rest[0]: (frequent[1], "stat", frequent[0], 3),
        rest[1]: (near[1], "stat", near[0], 7),
        rest[2]: (
            of_equal_distance[0],
            "stat",
            edit_distance(text(source.token_bytes[rest[2]]), rows[rest[2]]["target_bytes"].decode()),
            1,
        ),
        rest[3]: (mined["target_id"][rest[3]], "mined", mined["distance"][rest[3]], 0),
        known: (int(exact[known]), "exact", 0, 4),
    }
    others = ~pl.Series(np.isin(np.arange(len(table)), [*rest, known]))
    columns = ["source_id", "target_id", "rule", "distance"]
    assert table.filter(others).select(columns).equals(mined.filter(others).select(columns)), "what never occurred is as in mined"


@pytest.mark.parametrize("rule", ["mined", "stat"])
def test_other_ids_for_the_same_tokens_change_no_distance(pair, rule):
    """The lowest of several ids may be another token then, at the same distance."""
    import json

    source, target = pair["sentencepiece"], pair["byte_level"]
    definition = json.loads(target.definition)
    vocabulary = definition["model"]["vocab"]
    ordinary = [piece for piece in vocabulary if vocabulary[piece] > 2]
    ids = sorted(vocabulary[piece] for piece in ordinary)
    definition["model"]["vocab"] = vocabulary | dict(zip(ordinary, ids[::-1], strict=True))
    renumbered = Tokenizer(json.dumps(definition), roles=target.roles, prepends_bos=False)
    assert renumbered.token_bytes.to_list() != target.token_bytes.to_list()
    counts = matches() if rule == "stat" else None
    before, after = (vocabulary_map(source, target=one, rule=rule, matches=counts) for one in (target, renumbered))
    assert before.select("source_id", "rule", "distance").equals(after.select("source_id", "rule", "distance"))
    of_exact = pl.col("rule") == "exact"
    assert before.filter(of_exact)["target_bytes"].equals(after.filter(of_exact)["target_bytes"])


def test_of_a_token_with_several_roles_the_first_role_counts(byte_level_folder, sentencepiece_folder):
    """Many models pad with eos: it still means the end of the text."""
    source, target = (Tokenizer.from_model_folder(folder) for folder in (byte_level_folder, sentencepiece_folder))
    source.roles = source.roles | {"pad": source.roles["eos"]}
    target.roles = target.roles | {"pad": 7}
    row = vocabulary_map(source, target=target, rule="exact").row(source.roles["eos"], named=True)
    assert (row["target_id"], row["rule"], row["distance"]) == (target.roles["eos"], "role", None)
    source.roles["pad"] = 1
    row = vocabulary_map(source, target=target, rule="exact").row(1, named=True)
    assert (row["target_id"], row["rule"]) == (7, "role")
