"""A name from a file never leads out of its folder."""

import os
from pathlib import Path

import pytest
from fuseline.store.errors import DataError
from fuseline.store.inside import OutsideFolder, inside, lies_inside, plain_name, require_inside
from fuseline.store.shown import LONGEST_SHOWN, listed, shown
from hypothesis import given
from hypothesis import strategies as st

HOSTILE = [
    "..",
    "../secret",
    "a/../../secret",
    "a/..",
    ".",
    "./a",
    "a/./b",
    "",
    "/etc/passwd",
    "//host/a",
    "a//b",
    "a/",
    "a\\..\\b",
    "C:\\a",
    "a\x00b",
    "a\nb",
    "a\x1b[2Jb",
    "a\u202eb",
    "a\ud800b",
    "a" * 5000,
    None,
    3,
    ["a"],
    {"a": "b"},
    True,
    b"a",
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_names_that_are_not_plain_are_refused(name, tmp_path):
    with pytest.raises(OutsideFolder, match=r"weight_map .*plain name") as caught:
        inside(tmp_path, name, what="weight_map")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "a/b.parquet", "..a", "ü 1*?.x", "..."])
def test_plain_names_are_taken(name, tmp_path):
    assert plain_name(name) == name
    assert inside(tmp_path, name) == tmp_path / name


@given(st.lists(st.sampled_from(["..", ".", "a", "", "b", "~", "..."]), min_size=1, max_size=6).map("/".join))
def test_what_is_taken_is_below_the_folder_as_text(name):
    try:
        path = inside(Path("/no/such/folder"), name)
    except OutsideFolder:
        return
    normal = Path(os.path.normpath(path))
    assert normal.is_relative_to("/no/such/folder")
    assert normal != Path("/no/such/folder")


def test_links_that_lead_out_are_refused(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    (folder / "real").mkdir(parents=True)
    secret.mkdir()
    (secret / "key").write_text("x")
    (folder / "merges.txt").symlink_to(secret / "key")
    (folder / "relative").symlink_to("../secret/key")
    (folder / "gone").symlink_to(tmp_path / "nothing")
    (folder / "round").symlink_to("round")
    (folder / "folder").symlink_to(secret)
    (folder / "within").symlink_to("real")
    for name in ("merges.txt", "relative", "gone", "folder", "folder/key"):
        with pytest.raises(OutsideFolder, match="leads out of"):
            inside(folder, name)
    with pytest.raises(DataError):
        inside(folder, "round")
    assert inside(folder, "within") == folder / "within"
    assert inside(folder, "within/new") == folder / "within" / "new"
    require_inside(folder, folder=folder)


def test_a_folder_whose_name_begins_the_same_is_outside(tmp_path):
    for name in ("model", "model-2"):
        (tmp_path / name).mkdir()
    assert not lies_inside(tmp_path / "model-2", folder=tmp_path / "model")


def test_the_folder_itself_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path / "link", "config.json").read_text() == "{}"


def test_snapshots_consist_of_links_to_the_blobs_of_their_own_model(tmp_path):
    for owner in ("models--a--b", "models--c--d"):
        (tmp_path / owner / "blobs").mkdir(parents=True)
        (tmp_path / owner / "blobs" / "f00").write_text("{}")
        (tmp_path / owner / "snapshots" / "0123").mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0123")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "other.json").symlink_to("../../../models--c--d/blobs/f00")
    (snapshot / "main.json").symlink_to("../../refs/main")
    assert inside(snapshot, "config.json").read_text() == "{}"
    for name in ("other.json", "main.json"):
        with pytest.raises(OutsideFolder):
            inside(snapshot, name)
    (tmp_path / "linked").symlink_to(snapshot)
    assert inside(tmp_path / "linked", "config.json").read_text() == "{}"


def endless() -> list:
    value: list = ["lol"]
    for _ in range(200):
        value = [value] * 10
    return value


def test_values_are_shown_in_few_characters():
    for value in ("a" * 10**6, endless(), {"a": endless()}, 16**10_000, list(range(10**5)), {str(i): "b" * 99 for i in range(10**4)}):
        assert len(shown(value)) <= LONGEST_SHOWN + 3


@pytest.mark.parametrize("value", ["text", 7, -1.5, None, True, ["a", 1], {"b": 1, "a": [2]}, (), "it's", "a\nb\x1b"])
def test_short_values_are_shown_as_python_writes_them(value):
    assert shown(value) == repr(value)


def test_lists_say_how_many_more():
    assert listed(["a", "b"], most=2) == "a, b"
    assert listed([str(i) for i in range(1500)], most=2, what=" keys") == "0, 1 and 1,498 more keys"
