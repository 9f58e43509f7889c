"""Vocabulary maps between the two families of tokenizers, against their models asked directly."""

import json

import numpy as np
import polars as pl
import pytest
import tokenizers
from fuseline.align.maps import VocabularyMapStage
from fuseline.align.rests import with_rests
from fuseline.align.vocabulary import target_ids, vocabulary_map
from fuseline.store.tokenizer import Tokenizer
from tokenizers import models, normalizers


def pieces_in_mid_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """An oracle: the pieces of a text without dummy prefix, from the tokenizer's parts instead of its whole."""
    model = tokenizer.backend.model
    if not tokenizer.is_byte_level:
        return [token.id for token in model.tokenize(text.replace(" ", "▁"))]
    return [token.id for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text) for token in model.tokenize(word)]


def tokens_with(tokenizer: Tokenizer, piece: bytes) -> list[int]:
    return [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.token_bytes[token_id] == piece]


def test_exact_pairs_all_tokens_of_the_same_bytes_and_no_others(source_and_target):
    source, target = source_and_target
    table = vocabulary_map(source, target=target, rule="exact")
    assert table["source_id"].to_list() == list(range(source.vocab_size))
    n_exact = 0
    for row in table.filter(pl.col("rule") != "role").iter_rows(named=True):
        piece = source.token_bytes[row["source_id"]]
        assert row["source_bytes"] == piece
        same = tokens_with(target, piece) if piece else []
        assert (row["target_id"] in same) if same else row["target_id"] is None
        assert row["rule"] == ("exact" if same else "none")
        assert row["target_bytes"] == (piece if same else None)
        n_exact += bool(same)
    assert n_exact > 300


@pytest.mark.parametrize("char", ["a", "Z", "0", " ", "\n", ",", "é"])
def test_of_several_tokens_with_the_same_bytes_the_one_that_the_tokenizer_writes_is_meant(pair, char):
    """`<0x61>` has a lower id than `a` and never occurs in tokens of text."""
    source, target = pair["byte_level"], pair["sentencepiece"]
    written = pieces_in_mid_text(target, char)
    for rule in ("exact", "prefix"):
        table = vocabulary_map(source, target=target, rule=rule)
        for row in table.filter(pl.col("source_bytes") == char.encode()).iter_rows(named=True):
            assert [row["target_id"]] == written
    if char.isascii():
        assert len(tokens_with(target, char.encode())) == 2, "the case does not arise"


def test_prefix_is_the_first_piece_in_mid_text(source_and_target):
    source, target = source_and_target
    table = vocabulary_map(source, target=target, rule="prefix")
    exact = target_ids(vocabulary_map(source, target=target, rule="exact"))
    n_prefix = 0
    for row in table.filter(pl.col("rule") != "role").iter_rows(named=True):
        piece, found = row["source_bytes"], row["target_id"]
        if not piece:
            assert (found, row["rule"]) == (None, "none")
        elif exact[row["source_id"]] >= 0:
            assert (found, row["rule"]) == (exact[row["source_id"]], "exact")
        else:
            try:
                expected = pieces_in_mid_text(target, piece.decode())[0]
            except UnicodeDecodeError:  # half a character: the longest beginning that the target has
                longest = next(piece[:end] for end in range(len(piece), 0, -1) if tokens_with(target, piece[:end]))
                assert target.token_bytes[found] == longest
            else:
                assert found == expected, piece
            assert row["rule"] == "prefix"
            assert piece.startswith(row["target_bytes"])
            n_prefix += 1
    assert n_prefix > 30


def test_the_word_start_of_one_family_is_the_space_of_the_other(pair):
    for source, target in (("byte_level", "sentencepiece"), ("sentencepiece", "byte_level")):
        table = vocabulary_map(pair[source], target=pair[target], rule="exact")
        rows = table.filter(pl.col("source_bytes") == b" the")
        assert rows["target_bytes"].to_list() == [b" the"]
        (token_id,) = rows["target_id"]
        assert pair[target].backend.id_to_token(token_id) == {"sentencepiece": "▁the", "byte_level": "Ġthe"}[target]


@pytest.mark.parametrize("rule", ["exact", "prefix", "mined"])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_a_tokenizer_maps_to_itself(pair, name, rule):
    tokenizer = pair[name]
    table = vocabulary_map(tokenizer, target=tokenizer, rule=rule)
    for row in table.iter_rows(named=True):
        token_id = row["source_id"]
        if tokenizer.token_bytes.is_special_V[token_id]:
            is_role = token_id in tokenizer.roles.values()
            assert (row["target_id"], row["rule"]) == ((token_id, "role") if is_role else (None, "none"))
        elif len(tokens_with(tokenizer, row["source_bytes"])) == 1:
            assert row["target_id"] == token_id
        else:  # `<0x61>` to `a`, and `a` to itself
            assert tokenizer.backend.id_to_token(row["target_id"]) == row["source_bytes"].decode().replace(" ", "▁")


def test_special_tokens_are_mapped_by_their_role_and_by_nothing_else(source_and_target):
    source, target = source_and_target
    for rule in ("exact", "prefix", "mined"):
        table = vocabulary_map(source, target=target, rule=rule)
        by_id = {row["source_id"]: row for row in table.iter_rows(named=True)}
        eos = by_id[source.roles["eos"]]
        assert (eos["target_id"], eos["rule"]) == (target.roles["eos"], "role")
        assert table.filter(pl.col("rule") == "role").height == 1  # only one of the two has a bos
        for token_id in np.flatnonzero(source.token_bytes.is_special_V).tolist():
            if token_id != source.roles["eos"]:
                assert (by_id[token_id]["target_id"], by_id[token_id]["rule"]) == (None, "none")
        mapped = set(table.filter(pl.col("rule") != "role")["target_id"].drop_nulls())
        assert not mapped & set(np.flatnonzero(target.token_bytes.is_special_V).tolist()), "text became a control token"


def test_text_that_spells_a_control_token_is_text(byte_level_folder, tmp_path):
    """A vocabulary may have `</s>` as an ordinary token; it means those four characters, not the other's end of text."""
    definition = json.loads((byte_level_folder / "tokenizer.json").read_text())
    definition["model"]["vocab"]["</s"] = 600
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text((byte_level_folder / "tokenizer_config.json").read_text())
    source = Tokenizer.from_model_folder(tmp_path)
    target = Tokenizer.from_model_folder(byte_level_folder)
    row = vocabulary_map(source, target=target, rule="prefix").row(600, named=True)
    assert (row["source_bytes"], row["rule"], row["target_bytes"]) == (b"</s", "prefix", b"<")


def test_half_characters_map_to_the_byte_tokens_of_the_other(pair):
    table = vocabulary_map(pair["byte_level"], target=pair["sentencepiece"], rule="exact")
    halves = table.filter(pl.col("source_bytes").bin.size() == 1).rows(named=True)
    halves = [row for row in halves if row["source_bytes"][0] >= 0x80]
    assert len(halves) == 128
    for row in halves:
        assert pair["sentencepiece"].backend.id_to_token(row["target_id"]) == f"<0x{row['source_bytes'][0]:02X}>"


def test_the_map_as_an_array_has_minus_one_where_it_is_unmapped(pair):
    table = vocabulary_map(pair["byte_level"], target=pair["sentencepiece"], rule="exact")
    array = target_ids(table)
    assert array.dtype == np.int32
    assert array.tolist() == [-1 if target_id is None else target_id for target_id in table["target_id"]]
    assert (array == -1).any()


def test_the_first_piece_is_the_one_in_mid_text_and_not_the_longest_nor_the_one_after_a_dummy_prefix(byte_level_folder, tmp_path):
    """`abc` is `a` + `bc` here; after the dummy prefix `▁a` + `bc`; and the longest beginning that is a token is `ab`."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "▁a", "bc", "ab"]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [("▁", "a"), ("b", "c"), ("a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    target = Tokenizer(backend.to_str(), roles=dict.fromkeys(("bos", "eos", "pad")) | {"unk": 0}, prepends_bos=False)
    definition = json.loads((byte_level_folder / "tokenizer.json").read_text())
    definition["model"]["vocab"] |= {"abc": 600, "Ġabc": 601}
    source = Tokenizer(json.dumps(definition), roles=dict.fromkeys(("bos", "eos", "pad", "unk")), prepends_bos=False)
    table = vocabulary_map(source, target=target, rule="prefix")
    assert table.row(600, named=True)["target_bytes"] == b"a"
    assert table.row(601, named=True)["target_bytes"] == b" a"


def test_what_is_left_of_a_token_goes_on_with_its_first_piece(source_and_target):
    source, target = source_and_target
    table = VocabularyMapStage(None, source=source, target=target, rule="prefix").compute(0).data
    lists = table["rest_target_ids"].to_list()
    assert [len(rests) for rests in lists] == [max(len(piece) - 1, 0) for piece in source.token_bytes.to_list()]
    n_exact = n_first = 0
    for source_id, rests in enumerate(lists):
        for n, target_id in enumerate(rests, start=1):
            rest = source.token_bytes[source_id][n:]
            same = tokens_with(target, rest)
            if same:
                n_exact += 1
                assert target_id in same
            else:
                n_first += 1
                assert rest.startswith(target.token_bytes[target_id])
                if rest.isascii():
                    assert target_id == pieces_in_mid_text(target, rest.decode())[0]
    assert min(n_exact, n_first) > 50
    arrays = with_rests(table)
    offsets = arrays.offsets_V1
    for source_id, rests in enumerate(lists):
        assert arrays.rest_ids_B[offsets[source_id] + 1 : offsets[source_id + 1]].tolist() == rests
        assert bytes(arrays.buffer_B[offsets[source_id] : offsets[source_id + 1]]) == source.token_bytes[source_id]


def test_what_is_left_and_has_no_target_token_stays_unmapped(pair):
    """A tokenizer of a few letters knows nothing of most bytes."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    small = Tokenizer(backend.to_str(), roles=dict.fromkeys(("bos", "eos", "pad", "unk")) | {"unk": 0}, prepends_bos=False)
    source = pair["byte_level"]
    table = VocabularyMapStage(None, source=source, target=small, rule="prefix").compute(0).data
    arrays = with_rests(table)
    starts = {1: b"a", 2: b"b", 3: b"ab"}
    for source_id, token in enumerate(source.token_bytes.to_list()):
        for n in range(1, len(token)):
            target_id = int(arrays.rest_ids_B[arrays.offsets_V1[source_id] + n])
            assert token[n:].startswith(starts[target_id]) if target_id >= 0 else token[n : n + 1] not in (b"a", b"b")
