"""What the commands share: their options, and how they show a user's error."""

import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

import click

from ..store.errors import FuselineError
from ..store.paths import expanded
from ..store.shown import harmless
from .terminal import say

WORKSPACES = Path("workspaces")  # in the current folder: the default parent of workspaces
_LEAST_SIZE = 1_000_000  # bytes
Command = TypeVar("Command", bound=Callable[..., Any])


class _Shown(click.ClickException):
    def __init__(self, text: str, *, exit_code: int) -> None:
        super().__init__(harmless(text))
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


class _ClosedStream(io.TextIOBase):
    """Replaces a standard output that the caller has closed."""

    @property
    def buffer(self) -> Self:
        """The stream for bytes."""
        return self

    def write(self, _: object) -> int:
        """Raise OSError: nothing can be written."""
        raise OSError(errno.EBADF, "The standard output is closed", "redirect it to a file, or to /dev/null")


def prepare_streams() -> None:
    """Make the standard streams safe: characters that their encoding lacks become `?`, and a closed output gives an error message.

    Reopen closed file descriptors. Otherwise the next file that is opened would receive what a library prints.
    """
    while (taken := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(taken)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  # see below
    if sys.stdout is None:
        sys.stdout = _ClosedStream()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Size(click.ParamType):
    """A number of bytes: 500MB, 8GiB, 1.5TB."""

    name = "size"
    _FORM = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([kKMGT]?)(i?)B?", re.ASCII)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        found = self._FORM.fullmatch(value.strip())
        n_bytes = int(float(found[1]) * (1024 if found[3] else 1000) ** " kMGT".index(found[2].replace("K", "k") or " ")) if found else 0
        if n_bytes < _LEAST_SIZE:
            self.fail(f"{value!r} must be a size of at least {_LEAST_SIZE // 1_000_000} MB, such as 500MB or 8GiB.", param, ctx)
        return n_bytes


SIZE = _Size()


class Group(click.Group):
    """A group of commands that shows a user's error as one message, without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        prepare_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # in text that click prints, such as the help
            say(f"Error: {error.strerror or error}.", err=True)
            sys.exit(1)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except FuselineError as error:
            raise _Shown(str(error), exit_code=error.exit_code) from error
        except BrokenPipeError:
            raise  # click exits silently if nobody reads the output
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            text = f"{error.strerror or error}{where}. Fix this, and run the same command again. Committed parts are safe."
            raise _Shown(text, exit_code=1) from error
        except KeyboardInterrupt:
            raise _Shown(
                "Stopped. Run the same command again to continue: finished parts and checkpoints are kept.", exit_code=130
            ) from None


class StageGroup(click.Group):
    """A stage with further commands: `fuseline align RECIPE` means `fuseline align run RECIPE`."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in context.help_option_names:
            args = ["run", *args]
        return super().parse_args(context, args)

    def format_usage(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(context.command_path, "[OPTIONS] RECIPE")
        formatter.write_usage(context.command_path, "COMMAND [ARGS]...")


def models_default() -> Path:
    """The default folder of models."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache"))
    return Path(os.environ.get("FUSELINE_MODELS", cache / "fuseline" / "models"))


models_option = click.option(
    "--models",
    "models_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=models_default,
    show_default="$FUSELINE_MODELS or ~/.cache/fuseline/models",
    help="Folder of models (OWNER/NAME, OWNER--NAME or NAME); it is searched before the Hugging Face hub.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOptions:
    """The options of a command that makes a recipe's products."""

    recipe: Path
    workspace: Path | None
    models_dir: Path
    variant: str | None = None
    executor: str | None = None
    workers: int | None = None

    @property
    def workspace_folder(self) -> Path:
        """The named workspace, or the recipe's default."""
        return self.workspace or default_workspace(self.recipe)


def default_workspace(recipe: Path) -> Path:
    """The default workspace of a recipe."""
    return WORKSPACES / recipe.stem


def recipe_options(command: Command) -> Command:
    """Add RECIPE, --workspace and --models. The command gets them as its first argument, a `RecipeOptions`."""
    return _with_options(command, _RECIPE_OPTIONS)


def parts_options(command: Command) -> Command:
    """Add the same options, and --executor and --workers, to a command that makes parts."""
    return _with_options(command, (*_RECIPE_OPTIONS, *_EXECUTOR_OPTIONS))


def _with_options(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    names = [each.name for each in fields(RecipeOptions)]

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        return command(RecipeOptions(**{name: given.pop(name) for name in names if name in given}), **given)

    found: Any = call
    for decorate in reversed(options):
        found = decorate(found)
    return found


def _workspace_option(*, show_default: str) -> Callable[[Any], Any]:
    return click.option(
        "--workspace",
        "-w",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="FUSELINE_WORKSPACE",
        show_default=show_default,
        help="Folder that holds everything of the project.",
    )


_RECIPE_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path)),
    _workspace_option(show_default="workspaces/<name of the recipe>"),
    models_option,
    click.option("--variant", metavar="NAME", help="Work only on what this variant of the recipe needs; the recipe itself is `base`."),
)
_EXECUTOR_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--executor",
        type=click.Choice(["local", "slurm", "ray"]),
        help="Where parts run: processes here, a Slurm job array, or a Ray cluster. Overrides the recipe.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Number of parts computed at the same time. Overrides the recipe."),
)


workspace_option = _workspace_option(show_default="the only one in workspaces/")
