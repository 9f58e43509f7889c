"""A source that is added to a recipe file: what was there stays, byte for byte, and mistakes are reported before anything is written."""

import re
import tomllib
from pathlib import Path

import pytest
from fuseline.pipeline.added_source import add_source
from fuseline.pipeline.recipe_file import load_recipe
from fuseline.store.errors import UsageError

RECIPE = """\
# what to fuse
[corpus]
path = "data"

[target]
name = "target"
model = "org/target"

[[sources]]
name = "one"  # the first
model = "org/one"

[[sources]]
name = "two"
model = "org/two"

[merge]
method = "linear"
weights = {one = 2}
"""


def recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.toml"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        RECIPE,
        RECIPE.rstrip("\n"),
        RECIPE + "\n\n  # the end",
        RECIPE.replace("\n", "\r\n"),
        RECIPE.replace("\n", "\r\n").rstrip(),
        RECIPE + "[evaluation]\nsplit = 'x'\n[executor]\n# the end\n",
        RECIPE.replace("# what to fuse", "# was zu verschmelzen ist: größer, 大 \U0001f600"),
        RECIPE.split("[merge]")[0].replace("[corpus]", 'merge.method = "linear"\n[corpus]', 1),
    ],
)  # fmt: skip
def test_every_byte_that_was_there_stays_and_one_source_is_there_more(tmp_path, text):
    path = recipe(tmp_path, text)
    added = add_source(path, name="three", model="org/three", revision='v"1', dtype="float32")
    assert path.read_bytes() == text.encode(), "nothing is written yet"
    added.save()
    written = path.read_bytes()
    assert written.startswith(text.encode())
    if b"\r\n" in written:
        assert written.count(b"\n") == written.count(b"\r\n")
    data, before = tomllib.loads(written.decode()), tomllib.loads(text)
    assert data.pop("sources") == [
        *before.pop("sources"),
        {"name": "three", "model": "org/three", "revision": 'v"1', "dtype": "float32"},
    ]
    assert data == before
    assert load_recipe(path) == added.recipe
    assert [source.name for source in added.recipe.sources] == ["one", "two", "three"]


def test_another_one_can_be_added_to_what_was_added_to(tmp_path):
    path = recipe(tmp_path, RECIPE.rstrip("\n"))
    for name in ("three", "four"):
        add_source(path, name=name, model=f"org/{name}").save()
    assert [source.name for source in load_recipe(path).sources] == ["one", "two", "three", "four"]
    assert path.read_text().endswith('\n\n[[sources]]\nname = "four"\nmodel = "org/four"\n')


def test_a_folder_is_named_as_the_recipe_finds_it(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    path = recipe(tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    assert add_source(path, name="three", model="models/mine").recipe.sources[-1].model == "../models/mine"
    absolute = str(tmp_path / "models" / "mine")
    assert add_source(path, name="three", model=absolute).recipe.sources[-1].model == absolute
    assert add_source(path, name="three", model="models/other").recipe.sources[-1].model == "models/other"


def test_what_a_link_leads_to_is_written_and_its_mode_stays(tmp_path):
    path = recipe(tmp_path)
    path.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    add_source(link, name="three", model="org/three").save()
    assert link.is_symlink()
    assert len(load_recipe(path).sources) == 3
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.toml", "recipe.toml"]


def test_a_recipe_that_was_changed_meanwhile_stays(tmp_path):
    path = recipe(tmp_path)
    added = add_source(path, name="three", model="org/three")
    recipe(tmp_path, RECIPE + "# mine\n")
    with pytest.raises(UsageError, match="has changed since it was read"):
        added.save()
    assert path.read_text() == RECIPE + "# mine\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (RECIPE.split("[merge]")[0], {}, r"has no \[merge\]: it fuses all sources at once"),
        (RECIPE, {"name": "one"}, r"--name \(one\) must be a new name; the recipe already has: target, one, two, clm, fused--one, "),
        (RECIPE, {"name": "merged-2"}, r"--name \(merged-2\) must be a new name"),
        (RECIPE, {"name": "a b"}, r"--name: 'a b' is wrong: String should match pattern"),
        (RECIPE, {"dtype": "float8"}, r"--dtype: 'float8' should be"),
        (RECIPE, {"model": "org/target"}, r"three cannot be added\.[\s\S]*line 23: sources\.2\.model: is the target's start"),
        (RECIPE.replace('method = "linear"\nweights = {one = 2}', 'method = "slerp"'), {}, "'slerp' merges 1 model"),
        ("nonsense = 1\n" + RECIPE, {}, "nonsense: unknown key"),
        (
            "sources = [{name = 'one', model = 'org/one'}, {name = 'two', model = 'org/two'}]\n" + re.sub(r"\[\[sou[^[]*", "", RECIPE),
            {},
            r"Write the sources of .* as \[\[sources\]\] tables.*No table can be added",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_reported_and_the_recipe_stays(tmp_path, text, options, message):
    path = recipe(tmp_path, text)
    with pytest.raises(UsageError, match=message):
        add_source(path, **{"name": "three", "model": "org/three"} | options)
    assert path.read_bytes() == text.encode()


def test_a_source_may_read_its_own_chat_template(tmp_path):
    chat = RECIPE.replace("[corpus]\n", "[corpus]\nchat = {}\n", 1)
    added = add_source(recipe(tmp_path, chat), name="three", model="org/three", chat_template="own")
    assert added.recipe.sources[-1].chat_template == "own"
    with pytest.raises(UsageError, match=r"'own' needs \[corpus.chat\]"):
        add_source(recipe(tmp_path, RECIPE), name="three", model="org/three", chat_template="own")
