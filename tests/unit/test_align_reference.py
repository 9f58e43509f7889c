"""Parity with the published FuseLLM code, on its own outputs (`tests/data`), and its vocabulary map against a search over all tokens.

`benchmarks/parity.py` compares whole vocabularies and more cases.
"""

import gzip
import json
from pathlib import Path

import fuseline
import numpy as np
import pytest
from fuseline.align.dtw import Spellings
from fuseline.align.reference import nearest_pieces, published_map
from fuseline.store.tokenizer import Tokenizer
from support.published import align_published
from support.textbook import edit_distance

FIXTURE = json.loads(gzip.decompress((Path(fuseline.__file__).parent / "tests" / "data" / "fusellm_reference.json.gz").read_bytes()))
MARKS = {"source_word_start": FIXTURE["source_word_start"], "target_word_start": FIXTURE["target_word_start"]}


def pieces(side: str) -> list[str]:
    known = {int(token_id): piece for token_id, piece in FIXTURE[f"{side}_pieces"].items()}
    return [known.get(token_id, "") for token_id in range(max(known) + 1)]


@pytest.fixture(scope="module")
def spellings() -> Spellings:
    return Spellings.of_pieces(pieces("source"), target_pieces=pieces("target"), **MARKS)


def mined_map(case: dict) -> np.ndarray:
    """The published map of a case, by id; names that are not in the vocabulary are lost."""
    ids = {piece: target_id for target_id, piece in enumerate(pieces("target")) if piece}
    spelled = [piece.replace(FIXTURE["source_word_start"], FIXTURE["target_word_start"]) for piece in pieces("source")]
    return np.array([ids.get(case["vocab_map"].get(piece, ""), -1) for piece in spelled], np.int32)


def spelling_map() -> np.ndarray:
    ids = {piece: target_id for target_id, piece in enumerate(pieces("target")) if piece}
    spelled = [piece.replace(FIXTURE["source_word_start"], FIXTURE["target_word_start"]) for piece in pieces("source")]
    return np.array([ids.get(piece, -1) for piece in spelled], np.int32)


def aligned(case: dict, spellings: Spellings, *, match: str, one_hot: str = "published"):
    mined_ids_V = mined_map(case)
    return align_published(
        np.array(case["source_ids"]),
        topk_ids_UK=np.array(case["source_topk_ids"]),
        topk_logits_UK=np.array(case["source_topk_logits"]),
        target_ids_T=np.array(case["target_ids"]),
        spellings=spellings,
        match=match,
        agreeing_ids_V=mined_ids_V,
        entry_ids_V=mined_ids_V if match == "mined" else spelling_map(),
        one_hot=one_hot,
    )


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=range(len(FIXTURE["cases"])))
def test_the_path_is_the_published_one(case, spellings):
    matches = aligned(case, spellings, match="em").matches
    runs = [list(range(first, last + 1)) for first, last in zip(matches.first_T.tolist(), matches.last_T.tolist(), strict=True)]
    assert runs == case["dtw_target_to_source"]
    assert matches.cost_S.tolist() == [case["dtw_cost"]]


@pytest.mark.parametrize("match", ["em", "mined"])
@pytest.mark.parametrize("case", FIXTURE["cases"], ids=range(len(FIXTURE["cases"])))
def test_the_aligned_entries_are_the_published_ones(case, spellings, match):
    result = aligned(case, spellings, match=match)
    assert result.ids == case[f"{match}_ids"]
    assert result.logits == case[f"{match}_logits"]


def test_the_corrected_one_hot_is_the_next_token_where_the_published_one_is_the_token_itself(spellings):
    case = FIXTURE["cases"][0]
    published, corrected = (aligned(case, spellings, match="em", one_hot=one_hot) for one_hot in ("published", "next"))
    n_one_hot = 0
    for t, token_id in enumerate(case["target_ids"]):
        if case["em_logits"][t] == [1.0]:
            n_one_hot += 1
            assert published.ids[t] == [token_id]
            assert corrected.ids[t] == case["target_ids"][t + 1 : t + 2]
            assert corrected.logits[t] == [1.0] * len(corrected.ids[t])
        else:
            assert corrected.ids[t] == published.ids[t]
    assert n_one_hot > 10


def test_the_published_map_is_that_of_a_search_over_spellings(byte_level_folder, sentencepiece_folder):
    source, target = (Tokenizer.from_model_folder(folder) for folder in (byte_level_folder, sentencepiece_folder))
    spelled = [target.backend.id_to_token(token_id) for token_id in range(target.vocab_size)]
    known = target.backend.get_vocab(with_added_tokens=True)
    table = published_map(source, target=target)
    found = {"exact": 0, "mined": 0}
    for row in table.sample(80, seed=1).iter_rows(named=True):
        piece = source.backend.id_to_token(row["source_id"]).replace("Ġ", "▁")
        distances = [0 if piece == other else edit_distance(piece, other) for other in spelled]
        best = known.get(piece, known.get(spelled[int(np.argmin(distances))]))
        assert row["target_id"] == best, piece
        if best is not None:
            assert row["distance"] == min(distances)
            found[row["rule"]] += 1
            assert (row["rule"] == "exact") == (row["distance"] == 0)
    assert min(found.values()) > 10


def test_a_token_that_is_nearest_to_a_spelling_outside_the_vocabulary_is_lost():
    ids_V, distance_V = nearest_pieces(
        ["▁199", "Ġthe", "zzzz"], target_pieces=["▁<s>", "▁the", "zz"], target_ids={"<s>": 0, "▁the": 1, "zz": 2}, **MARKS
    )
    assert ids_V.tolist() == [-1, 1, 2]
    assert distance_V.tolist() == [3, 0, 2]
