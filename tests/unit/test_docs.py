"""The documentation says what the program does. `python tests/unit/test_docs.py` writes the two generated pages again."""

import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
import fuseline
import pytest
from fuseline.cli import main
from fuseline.commands.merge_file import load_merge_file
from fuseline.pipeline.executors.config import Resources
from fuseline.pipeline.graph import KINDS, products
from fuseline.pipeline.recipe import Recipe, changed_data, section_of
from fuseline.pipeline.recipe_checks import impossible
from fuseline.pipeline.recipe_file import parse_recipe
from fuseline.store import catalog
from fuseline.store.sql.database import LAZY_TABLES
from fuseline.store.workspace import Workspace
from pydantic import BaseModel

ROOT = Path(fuseline.__file__).parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RECIPE_PAGE, CLI_PAGE = ROOT / "docs" / "recipe.md", ROOT / "docs" / "cli.md"
MOST_README_WORDS, LONGEST_LINE = 900, 140
LANGUAGES = {"console", "bash", "toml", "sql", "python", "text"}

RECIPE_INTRODUCTION = """# Recipe

A recipe is a TOML file that says what to fuse into what. This page lists every key. A key without a default is required.

fuseline checks the whole recipe before it does anything. It reports all mistakes together, each with its line. If there are more than ten,
it lists the first ten.

Without `[merge]` all sources are fused at once. With `[merge]` the recipe is pairwise, as in FuseChat:

1. Each source is fused with the target's start alone, into `targets/<fusion.name>--<source>`.
2. A model is trained on each of these targets, as `<training.name>--<source>`.
3. The trained models are merged into one, as `<merge.name>-<number of sources>`.

`fuseline fuse add-source` adds a source to a pairwise recipe and makes nothing again that is already there.

Relative paths in a recipe start at the recipe's folder. `recipes/` has complete recipes. [variants.md](variants.md) explains
`[[variants]]`.
"""
SECTIONS = {
    "corpus": "[corpus]",
    "corpus.chat": "[corpus.chat]",
    "target": "[target], and each of [[sources]]",
    "distributions": "[distributions]",
    "alignment": "[alignment]",
    "fusion": "[fusion]",
    "training": "[training]",
    "merge": "[merge]",
    "evaluation": "[evaluation]",
    "executor": "[executor]",
    "executor.resources": "[executor.resources]",
    "executor.resources.distributions": "[executor.resources.<kind>]",
    "variants": "[[variants]]",
}
VARIANTS_END = (
    "| any section or key above, but `executor` |  | as in the recipe | the value that differs: `training.seed = 1`, "
    '`fusion.method = "avgce"` |\n'
    "| `sources` | list of text | all | names of the recipe's sources that the variant uses |\n"
)
CLI_INTRODUCTION = """# Commands

This page is generated from the commands themselves. It lists every command and every option. `fuseline --help` and `--help` after any
command print the same text.

`RECIPE` is the path of a recipe, a [TOML file](recipe.md). A command that is interrupted continues when you run it again.
"""
# A whole recipe that blocks with a part of one are merged onto.
MINIMAL = """
[corpus]
path = "texts/"
domain_column = "domain"

[target]
name = "smollm2"
model = "HuggingFaceTB/SmolLM2-135M"

[[sources]]
name = "gemma3"
model = "google/gemma-3-270m"

[[sources]]
name = "qwen"
model = "Qwen/Qwen2.5-0.5B"
"""


# ---- the generated pages ---------------------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    page = [RECIPE_INTRODUCTION]
    for name, title in SECTIONS.items():
        section: type[BaseModel] = Recipe
        for key in name.split("."):
            inner = section_of(section, key)
            assert inner is not None
            section = inner
        about = inspect.cleandoc(section.__doc__ or "")
        page += [f"\n## `{title}`\n\n{about}\n\n| key | type | default | what it says |\n|---|---|---|---|\n"]
        for key, field in section.model_fields.items():
            default = "" if field.is_required() or isinstance(field.default, BaseModel) else f"`{_toml(field.default)}`"
            page.append(f"| `{key}` | {_type(field.annotation)} | {default} | {field.description} |\n")
    return "".join([*page, VARIANTS_END])


def _toml(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in {Union, type(int | None)}:
        return " or ".join(_type(choice) for choice in get_args(annotation) if choice is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    if get_origin(annotation) is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"table of {_type(get_args(annotation)[1])}"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[
        get_args(annotation)[0] if get_args(annotation) else annotation
    ]


def cli_page() -> str:
    page = [CLI_INTRODUCTION]
    for name, command in every_command():
        context = click.Context(command, info_name=name)
        usage = command.collect_usage_pieces(context) if not isinstance(command, click.Group) else _usage_of_group(command)
        page.append(f"\n## `{name}`\n\n```text\n{' '.join([name, *usage])}\n```\n")
        page += [f"\n{paragraph}\n" for paragraph in _paragraphs(command.help or "")]
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        if options:
            page.append("\n| option | what it does |\n|---|---|\n")
        for option in options:
            record = option.get_help_record(context)
            assert record is not None
            said, about = record[0].replace("|", "\\|"), record[1].replace("  ", " ").replace("<", "\\<")
            page.append(f"| `{said}` | {about} |\n")
    return "".join(page)


def _usage_of_group(group: click.Group) -> list[str]:
    return ["[RECIPE | COMMAND]" if "run" in group.commands and group is not main else "COMMAND"]


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a help text; examples are commands in a block."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = [line.strip() for line in paragraph.replace("\b", "").splitlines() if line.strip()]
        if lines[0].startswith(("Example:", "Begin with:")):
            lines[0] = lines[0].split(":", 1)[1]
            yield "```console\n" + "\n".join(f"$ {line.strip()}" for line in _joined(lines)) + "\n```"
        else:
            yield "\n".join(lines)


def _joined(lines: list[str]) -> list[str]:
    """Commands, each on a line of its own."""
    joined: list[str] = []
    for line in map(str.strip, lines):
        if line.startswith("fuseline"):
            joined.append(line)
        else:
            joined[-1] += f" {line}"
    return joined


def every_command() -> Iterator[tuple[str, click.Command]]:
    """All commands and groups with their names, in the order of the program."""

    def under(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
        for name, command in group.commands.items():
            yield f"{prefix} {name}", command
            if isinstance(command, click.Group):
                yield from under(command, f"{prefix} {name}")

    yield "fuseline", main
    yield from under(main, "fuseline")


@pytest.mark.parametrize(("path", "text"), [(RECIPE_PAGE, recipe_page), (CLI_PAGE, cli_page)])
def test_the_generated_pages_are_up_to_date(path, text):
    assert path.read_text() == text(), "run: python tests/unit/test_docs.py"


def test_the_page_of_the_recipe_has_every_section():
    assert {name.split(".")[0] for name in SECTIONS} | {"sources"} == set(Recipe.model_fields)


# ---- form ------------------------------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """Code in the lines of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_README_WORDS


@each_page
def test_lines_are_short(page):
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")] == []  # a row of a table is one line


@each_page
def test_words_are_plain(page):
    assert re.findall(r"\b(?:anew|at hand|to be had|is told|are told|mend(?:ed)?|other inputs)\b", prose(page)) == []


@each_page
def test_every_block_of_code_is_in_a_language_that_is_checked(page):
    """A block of `text` is output."""
    assert set(re.findall(r"^```(\S*)\n.*?^```$", page.read_text(), re.DOTALL | re.MULTILINE)) <= LANGUAGES


@each_page
def test_python_on_a_page_compiles_and_imports_what_exists(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for module, names in re.findall(r"^from (fuseline\S*) import (.*)$", block, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name)


@each_page
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


@each_page
def test_every_file_that_a_page_names_exists(page):
    """Files of the project: `recipes/demo.toml`, `pipeline/graph.py`."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"workspaces", "models"}
    for span in spans(page):
        if re.fullmatch(r"[\w./-]+\.(py|toml|md|gz|safetensors)", span) and span.split("/")[0] in folders and "/" in span:
            assert (ROOT / span).exists(), span


def test_the_index_lists_every_page():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_the_glossary_has_each_term_once():
    terms = re.findall(r"^\| \*\*([^*]+)\*\* \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 20
    assert terms == sorted(set(terms), key=str.lower)


def test_the_page_on_architecture_names_every_kind_of_product():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert [kind.__name__ for kind in KINDS if f"`{kind.__name__}`" not in page] == []


# ---- commands --------------------------------------------------------------------------------------------------------------------------


def invocations(page: Path) -> Iterator[str]:
    """Commands of fuseline that a page shows."""
    for language in ("console", "bash"):
        for block in blocks(page, language):
            for line in block.splitlines():
                if found := re.match(r"(?:\$ |exec )?(?:[A-Z_]+=\S+ )*(fuseline\b.*)$", line):
                    yield found[1]
    yield from (span for span in spans(page) if re.match(r"fuseline(?: |$)", span))


def invoked(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command, and what follows its name."""
    command: click.Command = main
    for index, word in enumerate(words):
        if not isinstance(command, click.Group):
            return command, words[index:]
        if word in command.commands:
            command = command.commands[word]
        elif "run" in command.commands and command is not main:  # of which the group is short
            return command.commands["run"], words[index:]
        else:
            assert word.startswith("-"), word
            return command, words[index:]
    return command, []


def option_names(command: click.Command) -> set[str]:
    return {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts} | {"--help", "-h"}


@each_page
def test_every_command_and_option_on_a_page_exists(page):
    for line in invocations(page):
        words = shlex.split(line, comments=True)[1:]
        command, rest = invoked(words)
        for word in rest:
            if word in ("|", "&", ">"):
                break
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in option_names(command), line
    known = set().union(*(option_names(command) for _, command in every_command()))
    for span in spans(page):
        if found := re.match(r"(--[a-z][a-z-]*)(?: |$)", span):
            assert found[1] in known, span


def test_every_command_has_help_and_an_example():
    for name, command in every_command():
        assert command.help, name
        if not isinstance(command, click.Group):
            assert "Example:" in command.help or name == "fuseline demo", name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help or parameter.name in {"style", "workspace"}, (
                name,
                parameter.name,
            )


# ---- recipes ---------------------------------------------------------------------------------------------------------------------------


def checked(data: dict[str, Any]) -> None:
    """Check a whole recipe, and each of its variants."""
    recipe = Recipe.model_validate(data)
    for each in (recipe, *(recipe.with_variant(variant) for variant in recipe.variants)):
        assert list(impossible(each)) == []
    products(recipe)


TOML = [(page, text) for page in PAGES for text in blocks(page, "toml")]


@pytest.mark.parametrize(("page", "text"), TOML, ids=[f"{name_of(page)}-{number}" for number, (page, _) in enumerate(TOML)])
def test_every_block_of_toml_is_a_recipe_a_part_of_one_or_a_file_of_a_merge(page, text, tmp_path):
    data = tomllib.loads(text)
    if "models" in data.get("merge", {}):
        path = tmp_path / "merge.toml"
        path.write_text(text)
        load_merge_file(path)
    elif {"corpus", "target", "sources"} <= data.keys():
        parse_recipe(text, path=Path("recipe.toml"))
    else:
        checked(changed_data(tomllib.loads(MINIMAL), data) | ({"variants": data["variants"]} if "variants" in data else {}))


def keys_of(section: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """All keys of a section and of those in it, each with its annotation."""
    for key, field in section.model_fields.items():
        yield key, field.annotation
        if inner := section_of(section, key):
            yield from keys_of(inner)


def resolves(path: str) -> bool:
    """Whether a recipe has this section or key; what follows a table of names and values is free, as are `<placeholders>`."""
    section: type[BaseModel] | None = Recipe
    for key in path.split("."):
        if section is None:
            return True
        if key.startswith("<"):
            section = Resources
            continue
        if key not in section.model_fields:
            return False
        section = section_of(section, key)
    return True


OF_SBATCH = {"partition", "exclusive"}  # options in `[executor.slurm]`
OF_A_MERGE = {"merge.models", "base", "base_revision", "tokenizer", "weight", "density"}  # only in the file of `fuseline merge`


@each_page
def test_every_section_and_key_on_a_page_exists(page):
    known: dict[str, list[Any]] = {}
    for key, annotation in keys_of(Recipe):
        known.setdefault(key, []).append(annotation)
    for span in spans(page):
        if found := re.fullmatch(r"\[\[?([a-z_]+(?:\.[a-z_<>]+)*)\]?\]", span):
            assert resolves(found[1]) or found[1] in OF_A_MERGE, span
        elif (found := re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?: = .*)?", span)) and found[1].split(".")[0] in Recipe.model_fields:
            assert resolves(found[1]) or found[1].endswith(".py"), span
        elif found := re.fullmatch(r"([a-z_]+) = ([^'].*)", span):
            assert found[1] in known or found[1] in OF_A_MERGE | OF_SBATCH, span
            choices = [choice for annotation in known.get(found[1], []) for choice in _choices(annotation)]
            if choices and found[2].startswith('"'):
                assert found[2].strip('"') in choices, span
    for key, section in re.findall(r"`([a-z_]+)`(?: = \S+)? in `\[([a-z_.]+)\]`", prose(page)):
        assert resolves(f"{section}.{key}") or (section == "merge" and key in OF_A_MERGE), f"{section}.{key}"


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


# ---- SQL -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Workspace:
    """A workspace with all tables and no rows."""
    workspace = Workspace.create(tmp_path_factory.mktemp("docs") / "workspace")
    catalog.fold(workspace)
    return workspace


def queries(page: Path) -> list[str]:
    found = blocks(page, "sql")
    for line in invocations(page):
        words = shlex.split(line, comments=True)[1:]
        if words[:1] == ["sql"] and "--external-access" not in words:
            found += [word for word in words[1:] if re.match(r"SELECT|FROM|WITH", word) and "…" not in word]
    return found


@each_page
def test_every_query_on_a_page_names_tables_and_columns_that_exist(page, empty):
    for query in queries(page):
        empty.sql(query)


def test_every_table_is_documented_and_every_table_that_is_documented_exists(empty):
    tables = {row[0] for row in empty.sql("SHOW TABLES").iter_rows()} - {"migrations"}
    text = (ROOT / "docs" / "sql.md").read_text()
    lazy = set(re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE))
    section = re.search(r"^## Catalog tables$(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    assert lazy == set(LAZY_TABLES)
    assert set(re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)) == tables - lazy
    assert tables <= set(re.findall(r"\w+", main.commands["sql"].help or ""))


if __name__ == "__main__":
    RECIPE_PAGE.write_text(recipe_page())
    CLI_PAGE.write_text(cli_page())
