"""The file of a merge: TOML, or mergekit's YAML (`mergekit_file.py`). It is read and checked as a whole."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..ingest.model_config import ModelConfig
from ..pipeline.problems import problems_of, said_of_problems
from ..store.errors import UsageError
from ..store.shown import listed, written
from ..store.toml_text import KeyPath, parse_toml
from ..store.user_text import read_user_text
from ..train.merging.config import Density, Finite, MergeConfig
from .merge_request import MergeRequest
from .mergekit_file import parse_mergekit


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$")
    model: str
    revision: str | None = None
    weight: Finite | None = None
    density: Density | None = None


class _Models(BaseModel):
    """The keys of `[merge]` that name the models; `MergeConfig` has the others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    models: list[_Model] = Field(min_length=1)
    base: str | None = None
    base_revision: str | None = None
    tokenizer: str | None = None


_PER_MODEL = {"weights": "weight", "densities": "density"}  # keys of MergeConfig that the merge file sets for each model
_KEYS = sorted({*_Models.model_fields, *MergeConfig.model_fields} - _PER_MODEL.keys())  # of [merge]


def load_merge_file(path: Path) -> MergeRequest:
    """Read `FILE.toml`, or a mergekit file: `FILE.yaml`, `FILE.yml`.

    Raises:
        UsageError: the file cannot be read, or a value is wrong or not supported; the text names it.
    """
    text = read_user_text(path, what=f"The merge file {path}")
    if path.suffix in {".yaml", ".yml"}:
        return parse_mergekit(text, path=path)
    data = parse_toml(text, what=f"The merge file {path}", hint="(mergekit's files must end in .yaml or .yml.)")
    if set(data) != {"merge"} or not isinstance(data["merge"], dict):
        found = listed([written(key) for key in data], most=5) or "none"
        raise UsageError(f"The merge file {path} must have one section, [merge], with [[merge.models]]; it has {found}.")
    problems: list[tuple[KeyPath, str]] = []
    request = _request(data["merge"], problems=problems)
    if request is None or problems:
        raise UsageError(said_of_problems(problems, text=text, what=f"The merge file {path}"))
    return request


def _request(section: dict[str, Any], *, problems: list[tuple[KeyPath, str]]) -> MergeRequest | None:
    def note(path: KeyPath, what: str) -> None:
        problems.append((("merge", *path), what))

    for key, of_model in _PER_MODEL.items():
        if key in section:
            note((key,), f"remove it, and set `{of_model}` in each of [[merge.models]]")
    of_models = {key: section[key] for key in _Models.model_fields if key in section}
    settings = {key: value for key, value in section.items() if key not in {*_Models.model_fields, *_PER_MODEL}}
    found = _validated(_Models, of_models, note=note)
    if found is None:
        _validated(MergeConfig, settings, note=note)
        return None
    names = [model.name for model in found.models]
    for index, name in enumerate(names):
        if name in names[:index]:
            note(("models", index, "name"), f"{name!r} is also the name of another model: give each model a unique name")
    if found.tokenizer is not None and found.tokenizer not in names:
        note(("tokenizer",), f"{found.tokenizer!r} must be one of the models: {', '.join(names)}")
    for key, of_model in _PER_MODEL.items():
        said = {model.name: getattr(model, of_model) for model in found.models if getattr(model, of_model) is not None}
        settings |= {key: said} if said else {}
    config = _validated(MergeConfig, settings, note=note)
    if config is None:
        return None
    return MergeRequest(
        config=config,
        base=None if found.base is None else ModelConfig(name="base", model=found.base, revision=found.base_revision),
        models=tuple(ModelConfig(name=model.name, model=model.model, revision=model.revision) for model in found.models),
        tokenizer=found.tokenizer,
    )


def _validated(kind: type[BaseModel], data: dict[str, Any], *, note: Any) -> Any:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        for problem in problems_of(error, of=kind, valid=_KEYS):
            note(problem.path, problem.text)
        return None
