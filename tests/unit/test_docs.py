"""The documentation says what the program does. `python tests/unit/test_docs.py` writes the page of recipe keys anew."""

import inspect
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
import fuseline
import pytest
from fuseline.cli import main
from fuseline.pipeline.recipe import Recipe
from pydantic import BaseModel

ROOT = Path(fuseline.__file__).parent
PAGE = ROOT / "docs" / "recipe.md"
INTRODUCTION = """# Recipe

A recipe is a TOML file. Every key that it may hold is here; a key without a default must be given. A recipe is checked as a whole before
anything is done: mistakes are reported together, with their lines; of many, the first ten.

All sources are fused at once, unless there is a `[merge]`. With one, the recipe is pairwise, as in FuseChat: each source is fused with
the target's start alone, into `targets/<fusion.name>--<source>`, a model is trained on each, as `<training.name>--<source>`, and these
models are merged, as `<merge.name>-<number of sources>`. `fuseline fuse add-source` adds a source to such a recipe; nothing that is there
is made again.
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
}


def recipe_page() -> str:
    page = [INTRODUCTION]
    for name, title in SECTIONS.items():
        section: Any = Recipe
        for key in name.split("."):
            annotation = section.model_fields[key].annotation
            section = next(choice for choice in (*get_args(annotation), annotation) if isinstance(choice, type))  # one may be left out
        assert issubclass(section, BaseModel)
        about = inspect.cleandoc(section.__doc__ or "")
        page += [f"\n## `{title}`\n\n{about}\n\n| key | type | default | what it says |\n|---|---|---|---|\n"]
        for key, field in section.model_fields.items():
            default = "" if field.is_required() or isinstance(field.default, BaseModel) else f"`{_toml(field.default)}`"
            page.append(f"| `{key}` | {_type(field.annotation)} | {default} | {field.description} |\n")
    return "".join(page)


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


def test_the_page_of_recipe_keys_is_up_to_date():
    assert PAGE.read_text() == recipe_page()


@pytest.mark.parametrize("page", ["README.md", "docs/chat.md"])
def test_the_recipes_on_the_pages_are_valid(page):
    texts = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert texts
    for text in texts:
        Recipe.model_validate(tomllib.loads(text))


def _commands(group: click.Group, prefix: str) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if not isinstance(command, click.Group) or "run" in command.commands:  # the latter is short for its `run`
            found[f"{prefix} {name}"] = command
        if isinstance(command, click.Group):
            found |= _commands(command, f"{prefix} {name}")
    return found


def test_every_command_that_the_readme_names_exists_and_every_command_has_help_and_an_example():
    commands = _commands(main, "fuseline")
    named = set(
        re.findall(r"(?:`|\$ )(fuseline (?:(?:ingest|store) |align (?=show)|fuse (?=add))?[a-z-]+)", (ROOT / "README.md").read_text())
    )
    assert len(named) > 8
    assert named <= commands.keys()
    for name, command in commands.items():
        assert command.help, name
        assert "Example:" in command.help or name == "fuseline demo", name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help or parameter.name in {"style", "workspace"}, (
                name,
                parameter.name,
            )


if __name__ == "__main__":
    PAGE.write_text(recipe_page())
