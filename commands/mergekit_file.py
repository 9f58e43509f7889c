"""Reads mergekit's YAML. A key that has no exact equivalent here is refused by name; none is ignored."""

import contextlib
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from ..ingest.model_config import ModelConfig
from ..pipeline.problems import problems_of
from ..store.errors import UsageError
from ..store.shown import in_short, shown, written
from ..store.yaml_text import parse_yaml
from ..train.merging.config import MergeConfig
from .merge_request import MergeRequest

_METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "sce")
_DTYPES = ("float32", "bfloat16", "float16")
# Parameters of the whole merge, and their names here.
_SETTINGS = {"normalize": "normalize", "lambda": "scale", "t": "t", "select_topk": "density"}
_OF_SLICE = {"sources", "parameters"}
_DENSE = {"ties", "dare_linear", "dare_ties"}  # mergekit's default density is 1
_DARE = {"dare_linear", "dare_ties"}


def parse_mergekit(text: str, *, path: Path) -> MergeRequest:
    """The merge that a mergekit file asks for.

    Raises:
        UsageError: the file is not valid, or asks for something that is not supported.
    """
    return _Reader(path).request(text)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, where: str, what: str) -> NoReturn:
        """Raise what is wrong, and where."""
        raise UsageError(f"The merge file {self.path}: {where} {what}")

    def request(self, text: str) -> MergeRequest:
        """The merge that a file asks for."""
        try:
            data = parse_yaml(text)
        except ValueError as error:
            self.refuse("is not valid YAML:", in_short(error))
        if not isinstance(data, dict):
            self.refuse("must", "contain keys and values, including merge_method and models.")
        known = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
        for key in data:
            if key not in known:
                self.refuse(written(key), f"is not supported. Remove it. Supported keys: {', '.join(known)}.")
        method = data.get("merge_method")
        if method not in _METHODS:
            self.refuse(f"merge_method ({written(method)})", f"must be a supported method: {', '.join(_METHODS)}.")
        sources, common, n_layers = self.sources(data)
        settings: dict[str, Any] = {"method": method} | self.settings(common, method=method)
        base = self.model(data["base_model"], name="base") if data.get("base_model") else None
        if method != "linear":  # mergekit also ignores the base's own entry
            sources = [(model, parameters) for model, parameters in sources if base is None or not _same(model, base)]
        self.per_model(sources, common=common, method=method, settings=settings)
        for key in ("dtype", "out_dtype"):  # the second takes precedence
            if data.get(key) is not None:
                if data[key] not in _DTYPES:
                    self.refuse(f"{key} ({written(data[key])})", f"must be one of {', '.join(_DTYPES)}.")
                settings["dtype"] = data[key]
        try:
            config = MergeConfig.model_validate(settings | ({"variant": "mergekit"} if method == "sce" else {}))
        except ValidationError as error:
            problem = problems_of(error, of=MergeConfig)[0]
            self.refuse(".".join(map(str, problem.path)) or "parameters:", f"{problem.text}.")  # no path: the key belongs to another method
        models = tuple(model for model, _ in sources)
        if not models:
            self.refuse("models", "must name at least one model other than base_model.")
        return MergeRequest(config=config, base=base, models=models, tokenizer=self.tokenizer(data, base, models), n_layers=n_layers)

    def sources(self, data: Mapping[str, Any]) -> tuple[list[tuple[ModelConfig, dict[str, Any]]], dict[str, Any], int | None]:
        """Models with their parameters, the common parameters, and how many layers the file expects."""
        if ("models" in data) == ("slices" in data):
            self.refuse("models", "or slices must be given, but not both.")
        common, n_layers = self.table("parameters", data.get("parameters")), None
        entries = data.get("models")
        if "slices" in data:
            slices = data["slices"]
            if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict) or slices[0].keys() - _OF_SLICE:
                self.refuse("slices", "must be one slice over all layers, with sources: only whole models can be merged.")
            common |= self.table("slices.parameters", slices[0].get("parameters"))
            entries = slices[0].get("sources")
            n_layers = self.layers(entries)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "model" in entry for entry in entries):
            self.refuse("models", "must be a list of entries with `model` and, where needed, `parameters`.")
        names: list[str] = []
        found = []
        for entry in entries:
            for key in set(entry) - {"model", "parameters", *(["layer_range"] if n_layers else [])}:
                self.refuse(f"models.{written(key)}", "is not supported. Remove it.")
            name = _free_name(written(entry["model"]).partition("@")[0], taken=names)
            names.append(name)
            parameters = self.table("models.parameters", entry.get("parameters"))
            found.append((self.model(entry["model"], name=name), parameters))
        return found, common, n_layers

    def layers(self, entries: Any) -> int:
        """The number of layers in the slice."""
        ranges = [entry.get("layer_range") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        first = ranges[0] if ranges else None
        if not (
            isinstance(first, list)
            and len(first) == 2
            and first[0] == 0
            and isinstance(first[1], int)
            and all(other == first for other in ranges)
        ):
            self.refuse(
                "slices",
                f"must have the layer_range [0, number of layers] for each source, not {shown(ranges)}: only whole models can be merged.",
            )
        return first[1]

    def settings(self, common: dict[str, Any], *, method: str) -> dict[str, Any]:
        """The settings of the whole merge."""
        for key, value in common.items():
            if key in {"weight", "density"} | _SETTINGS.keys() and (key != "select_topk" or method == "sce"):
                continue
            if key == "int8_mask":  # mergekit's storage of masks; the result is the same
                continue
            if key == "rescale" and method in _DARE and value is True:
                continue
            self.refuse(f"parameters.{written(key)} ({written(value)})", "is not supported. Remove it.")
        return {ours: self.number(key, common[key]) for key, ours in _SETTINGS.items() if key in common}

    def per_model(
        self, sources: list[tuple[ModelConfig, dict[str, Any]]], *, common: dict[str, Any], method: str, settings: dict[str, Any]
    ) -> None:
        """Put weights and densities into the settings, by model name."""
        for key, ours in (("weight", "weights"), ("density", "densities")):
            said = {}
            for model, parameters in sources:
                if key in parameters or key in common:
                    said[model.name] = self.number(f"{model.name}.{key}", parameters.get(key, common.get(key)))
                elif key == "density" and method in _DENSE:
                    said[model.name] = 1.0
            if said:
                settings[ours] = said
        for model, parameters in sources:
            for key in parameters.keys() - {"weight", "density"}:
                self.refuse(
                    f"models.parameters.{written(key)} of {model.name}",
                    "is not supported for one model. Remove it, or set it for all models.",
                )

    def number(self, where: str, value: Any) -> Any:
        """One number for all layers; for `normalize` a boolean."""
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        if isinstance(value, dict) and value.keys() <= {"value", "filter"} and value.get("filter", "*") in ("*", None):
            value = value.get("value")
        if isinstance(value, bool) and where == "normalize":
            return value
        if not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                return float(value)
        what = "must be one number for all layers: gradients over layers and filters by tensor are not supported."
        return self.refuse(where, f"({written(value)}) {what}")

    def table(self, where: str, value: Any) -> dict[str, Any]:
        """A table of keys and values; empty if it is not given."""
        if not isinstance(value, dict | None):
            self.refuse(f"{where} ({written(value)})", "must contain keys and values.")
        return dict(value or {})

    def model(self, said: Any, *, name: str) -> ModelConfig:
        """The model with a path or id."""
        if not isinstance(said, str):
            self.refuse(f"model ({written(said)})", "must be a path or an id on the Hugging Face hub, as text.")
        if "+" in said:
            self.refuse(f"model ({written(said)})", "must not have an adapter: merge the adapter into its model first.")
        path, _, revision = said.partition("@")
        return ModelConfig(name=name, model=path, revision=revision or None)

    def tokenizer(self, data: Mapping[str, Any], base: ModelConfig | None, models: tuple[ModelConfig, ...]) -> str | None:
        """Name of the model that gives the tokenizer; None if it is the base."""
        said = data.get("tokenizer_source")
        if said in (None, "base") or (base is not None and said == base.model):
            return None
        named = [model.name for model in models if model.model == said]
        if not named:
            self.refuse(
                f"tokenizer_source ({written(said)})",
                "must be base, or one of the models: a union of tokenizers would need embeddings that no model has.",
            )
        return named[0]


def _same(one: ModelConfig, other: ModelConfig) -> bool:
    return (one.model, one.revision) == (other.model, other.revision)


def _free_name(model: str, *, taken: list[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9]*$", "", re.sub(r"[^A-Za-z0-9.]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).lstrip("-.")) or "model"
    name = re.sub(r"([.-])[.-]+", r"\1", name)
    return name if name not in taken else next(free for n in itertools.count(2) if (free := f"{name}-{n}") not in taken)
