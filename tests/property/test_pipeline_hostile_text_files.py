"""Recipes and merge files of strangers: whatever types, depths and numbers are in them, they end in a value or in one message."""

import copy
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from fuseline.commands.merge_file import load_merge_file
from fuseline.pipeline.problems import MOST_PROBLEMS
from fuseline.pipeline.recipe_file import load_recipe, parse_recipe
from fuseline.store.errors import FuselineError, UsageError
from fuseline.store.toml_text import Lines, holds, parse_toml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RECIPES = Path(__file__).parents[2] / "recipes"
MERGE = {
    "merge": {
        "method": "ties",
        "base": "org/base",
        "density": 0.5,
        "models": [{"name": "a", "model": "org/a", "weight": 1.0}, {"name": "b", "model": "org/b", "weight": 0.5}],
    }
}
MERGEKIT = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [{"model": "org/a", "parameters": {"weight": 1.0}}, {"model": "org/b", "parameters": {"weight": [0.5], "density": 0.5}}],
    "parameters": {"normalize": True, "lambda": 1.0},
    "dtype": "float32",
    "tokenizer_source": "base",
}
SLICES = {
    "merge_method": "slerp",
    "base_model": "org/a",
    "slices": [{"sources": [{"model": "org/a", "layer_range": [0, 4]}, {"model": "org/b", "layer_range": [0, 4]}]}],
    "parameters": {"t": [{"filter": "*", "value": 0.5}]},
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 10**4000]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", ".", "..", "/", "~", "\x00", "\ud7ff", "a" * 5000, "\x1b[2J", "{{", "%s", "a+b", "org/a@../../x", "@", "/etc/passwd"]
    ),
)
keys = st.one_of(st.text(max_size=8), st.sampled_from(["name", "model", "weight", "models", "a" * 2000, "", "a.b", '"', "\n", "__class__"]))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=8)


def paths(node: Any, before: tuple = ()) -> list[tuple]:
    found = [before] if before else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += paths(value, (*before, key))
    return found


@st.composite
def changed(draw, base: dict) -> dict:
    """A sound file with some values replaced, removed or added."""
    data = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        choices = paths(data)
        if not choices:
            break
        path = draw(st.sampled_from(choices))
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                holder[path[-1]] = draw(values)
            case "remove":
                del holder[path[-1]]
            case "add" if isinstance(holder, dict):
                holder[draw(keys)] = draw(values)
    return data


def to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {to_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
        return hex(abs(value))
    return '"null"' if value is None else json.dumps(value).replace("\\u007f", "\\u007F").replace("\x7f", "\\u007F")


def as_toml(data: dict) -> str:
    return "\n".join(f"{json.dumps(key)} = {to_toml(value)}".replace("\x7f", "\\u007F") for key, value in data.items())


def ends_well(read: Any, path: Path) -> str:
    """The message, or nothing."""
    try:
        read(path)
    except FuselineError as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < 6000
        return message
    return ""


@pytest.fixture
def file(tmp_path):
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        return tmp_path / name

    return write


@quick
@given(data=changed(tomllib.loads((RECIPES / "chat.toml").read_text())))
def test_a_recipe_of_any_values_ends_well(data, file):
    ends_well(load_recipe, file("r.toml", as_toml(data)))


@quick
@given(data=changed(MERGE))
def test_a_merge_file_of_any_values_ends_well(data, file):
    ends_well(load_merge_file, file("m.toml", as_toml(data)))


@quick
@given(data=changed(MERGEKIT) | changed(SLICES))
@example(data={**SLICES, "slices": [None]})
@example(data={**SLICES, "slices": [{"sources": 3}]})
@example(data={**MERGEKIT, "models": [{"model": "a"}] * 1200})
@example(data={**MERGEKIT, "parameters": {"lambda": 10**400}})
@example(data={**MERGEKIT, "models": [{"model": "@main"}]})
@example(data={**MERGEKIT, "models": [{"model": [["a"] * 50] * 50}]})
def test_a_file_of_mergekit_of_any_values_ends_well(data, file):
    ends_well(load_merge_file, file("m.yaml", json_text(data)))


def json_text(data: Any) -> str:
    """As JSON, which is YAML; numbers that Python does not write are hexadecimal."""
    if isinstance(data, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {json_text(value)}" for key, value in data.items()) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(map(json_text, data)) + "]"
    if isinstance(data, int) and not isinstance(data, bool) and abs(data) > 10**300:
        return hex(abs(data))
    if isinstance(data, float) and not math.isfinite(data):
        return ".nan" if math.isnan(data) else ".inf"
    return json.dumps(data)


@quick
@given(data=st.binary(max_size=300) | st.text(alphabet="[]{}&*!<:-,.'\"\n #=?|>%@`ax0", max_size=120).map(str.encode))
def test_bytes_of_any_kind_end_well(data, tmp_path):
    for name, read in (("r.toml", load_recipe), ("m.toml", load_merge_file), ("m.yaml", load_merge_file)):
        (tmp_path / name).write_bytes(data)
        assert ends_well(read, tmp_path / name)


N = 60_000
BOMBS = {
    "toml": {
        "lists": "a = " + "[" * N + "]" * N,
        "tables": "a = " + "{a=" * N + "1" + "}" * N,
        "dots": "a" + ".a" * N + " = 1",
        "quoted dots": "'a'" + ' . "a"' * N + " = 1",
        "section": "[" + "a." * N + "a]",
        "number": "a = " + "1" * 10**5,
        "hexadecimal": "a = 0x" + "f" * 10**5,
        "keys": "\n".join(f"key{i} = {i}" for i in range(1500)),
        "keys of a section": "[training]\n" + "\n".join(f"key{i} = {i}" for i in range(1500)),
        "lines of a value": "a = [\n" + "1,\n" * 10_000 + "]\nb = 1",
        "text": "a = '" + "x" * 10**5 + "'",
        "key": "a" * 10**5 + " = 1",
    },
    "yaml": {
        "lists": "a: " + "[" * N + "]" * N,
        "blocks": "- " * N,
        "laughs": "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)),
        "laughing keys": "merge_method: &a0 {x: y}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
        "circle": "merge_method: &a [*a]",
        "circle of keys": "merge_method: &a {x: *a}",
        "number": "a: " + "1" * 10**5,
        "tags": "a: !!timestamp x\n",
        "time": "a: 1" + ":59" * N,
        "numbers of tags": "a: !!int ''\n",
        "truth": "a: !!bool x\n",
        "object": "a: !!python/object/apply:os.system ['touch /tmp/x']\n",
        "keys": "\n".join(f"key{i}: {i}" for i in range(1500)),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, bombs in BOMBS.items() for name in bombs])
def test_bombs_end_in_a_short_message(kind, name, file):
    path = file(f"m.{kind}", BOMBS[kind][name])
    for read in (load_merge_file, *([load_recipe] if kind == "toml" else [])):
        message = ends_well(read, path)
        assert 0 < len(message) < 4000
        assert message.count("\n") <= MOST_PROBLEMS + 2


LONG, SHORT = "a." * 50 + "a = 1", "a." * 49 + "a = 1"


@pytest.mark.parametrize(
    "before",
    [
        "",
        '"\\"" . ',
        "'\\' . ",
        "# it's \" \"\"\" '''\n",
        "x = 'it\"s'\n",
        'x = "it\'s \\" # "\n',
        'x = """\n it\'s ""\\"""" # """\n',
        "x = '''\n it\"s # '''\n",
        "[",
    ],
)
def test_keys_of_many_parts_are_refused_whatever_stands_before_them(before):
    is_section = before == "["
    with pytest.raises(UsageError, match="a key must have at most 50 parts"):
        parse_toml(before + (LONG.replace(" = 1", "]") if is_section else LONG), what="x")
    if before.endswith("\n") or not before:
        parse_toml(before + SHORT, what="x")


@pytest.mark.parametrize("part", ['"\\""', '"a\\"."', '"\\\\\\""'])
def test_quotes_in_the_parts_of_a_key_do_not_hide_how_many_there_are(part):
    with pytest.raises(UsageError, match="a key must have at most 50 parts"):
        parse_toml(".".join([part] * 60) + " = 1", what="x")


@pytest.mark.parametrize("quoted", ['x = "{}"', "x = '{}'", 'x = """\n{}"""', "x = '''\n{}'''", "# {}", 'x = "\\" {}"'])
def test_what_looks_like_a_long_key_in_a_text_is_a_text(quoted):
    parse_toml(quoted.format("a." * 60), what="x")


def test_many_problems_are_counted_and_some_are_listed(file):
    text = "\n".join(f"key{i} = {i}" for i in range(1500)) + "\n" + (RECIPES / "demo.toml").read_text()
    message = ends_well(load_recipe, file("r.toml", text))
    assert message.startswith(f"The recipe {file('r.toml', text)} has 1,500 problems:\n  line 1: key0: unknown key.")
    assert message.endswith("and 1,490 more")


def test_a_file_that_is_too_large_is_not_read(file, tmp_path):
    path = file("r.toml", "# " + "x" * (1 << 20))
    for read in (load_recipe, load_merge_file):
        assert "must have at most 1 MiB" in ends_well(read, path)
    assert "must have at most 1 MiB" in ends_well(load_recipe, Path("/dev/zero"))


def reference_line(text: str, path: tuple) -> int:
    """The line of a key by parsing every beginning of the text, as the definition says."""
    lines = [f"{line}\n" for line in text.split("\n")]
    while path:
        start = 1
        for number in range(1, len(lines) + 1):
            try:
                data = tomllib.loads("".join(lines[:number]))
            except tomllib.TOMLDecodeError:
                continue
            if holds(data, path):
                return next((n for n in range(start, number + 1) if lines[n - 1].strip()), number)
            start = number + 1
        path = path[:-1]
    return 1


LINED = '''# [comment
a = 1

b = """
[x]
"" ]
"""
c = [ # [
  "]", ']', "\\"]",
  [1, 2], # ]

]
[d."e]".f]

g = """x\\"""" # "
h = \'\'\'
\'[\'\'\'\'
[[i]]
j = {k = [1, {l = 2}]}
[[i]]

j = ""
'''


@pytest.mark.parametrize(
    "text", [LINED, LINED.replace("\n", "\r\n"), LINED + "[z]", *(path.read_text() for path in sorted(RECIPES.glob("d*.toml")))]
)
def test_lines_are_those_of_the_definition(text):
    lines, data = Lines(text), tomllib.loads(text)
    for path in [*paths(data), ("nowhere",), ("a", "nowhere"), ("i", 1, "nowhere"), ("i", 7)]:
        assert lines.of(path) == reference_line(text, path), path


def test_a_problem_of_a_recipe_is_still_reported_in_full():
    text = (RECIPES / "demo.toml").read_text() + "\n[nonsense]\na = 1\n"
    with pytest.raises(UsageError, match=r"has 1 problem:\n  line \d+: nonsense: unknown key"):
        parse_recipe(text, path=Path("r.toml"))
