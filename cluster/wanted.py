"""What a recipe wants of a workspace, dataset by dataset: there, missing, or of other inputs. Read from files alone, as `store.status` is.

Neither a model nor the source of the corpus is opened: that one of these was changed since is only noticed by a run.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..align.alignments import alignment_identity
from ..align.config import AlignmentConfig
from ..align.fusion import fusion_identity
from ..align.maps import end_of_turn, vocabulary_map_identity
from ..align.matches import matches_identity
from ..align.sources import FusionSource
from ..ingest.corpus import corpus_choices
from ..recipe import Fusion, Recipe, Training
from ..store.corpus_plan import read_plan
from ..store.dataset import Dataset
from ..store.fingerprint import differences, fingerprint
from ..store.status import DatasetStatus, TrainingStatus, dataset_statuses, training_statuses
from ..store.workspace import Workspace
from ..train.records import read_done
from .conflicts import fusion_conflicts
from .merging import merge_differences, planned_merge

State = Literal["done", "incomplete", "missing", "other inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One dataset, training or merge of a recipe."""

    kind: str
    name: str
    state: State
    expected_parts: int | None  # None where the corpus is not planned yet, and of trainings and merges
    differences: list[str]  # between what is there under this name and what the recipe asks for
    status: DatasetStatus | TrainingStatus | None  # of what is there


def wanted(recipe: Recipe, *, workspace: Workspace) -> list[Wanted]:
    """Everything that a recipe makes, in order."""
    there = {(status.kind, status.name): status for status in dataset_statuses(workspace)}
    trainings = {status.name: status for status in training_statuses(workspace)}
    found = [
        _dataset(kind, name, recipe=recipe, workspace=workspace, status=there.get((kind, name))) for kind, name in _before_training(recipe)
    ]
    found += [_training(training, recipe=recipe, workspace=workspace, status=trainings.get(training.name)) for training in recipe.trainings]
    if recipe.merged_name is not None:
        found.append(_merge(recipe, recipe.merged_name, workspace=workspace))
    evaluated = [model.name for model in recipe.models] + recipe.made_models
    for name in (f"{model}--{recipe.evaluation.split}" for model in evaluated):
        found.append(_dataset("evaluations", name, recipe=recipe, workspace=workspace, status=there.get(("evaluations", name))))
    return found


def _before_training(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "corpus", recipe.corpus.name
    yield from (("distributions", model.name) for model in recipe.models)
    for source in recipe.sources:
        pair, alignment = f"{source.name}--{recipe.target.name}", recipe.alignment
        if alignment.vocabulary == "stat":
            yield "token_matches", alignment.matches_name(pair)
        yield "vocab_maps", alignment.map_name(pair)
        yield "alignments", alignment.alignment_name(pair)
    yield from (("targets", fusion.name) for fusion in recipe.fusions)


def _dataset(kind: str, name: str, *, recipe: Recipe, workspace: Workspace, status: DatasetStatus | None) -> Wanted:
    expected = status.expected_parts if status else _expected_parts(kind, recipe=recipe, workspace=workspace)
    found = _differences(kind, name, recipe=recipe, workspace=workspace) if status else []
    state: State = "missing"
    if found:
        state = "other inputs"
    elif status and status.parts:
        state = "done" if status.parts == expected else "incomplete"
    return Wanted(kind=kind, name=name, state=state, expected_parts=expected, differences=found, status=status)


def _expected_parts(kind: str, *, recipe: Recipe, workspace: Workspace) -> int | None:
    if kind == "vocab_maps":
        return 1
    plan = read_plan(workspace.folder("corpus", recipe.corpus.name))
    if plan is None:
        return None
    splits = [part["split"] for part in plan["parts"]]
    return splits.count(recipe.evaluation.split if kind == "evaluations" else "train")


def _differences(kind: str, name: str, *, recipe: Recipe, workspace: Workspace) -> list[str]:
    """Between the identity of what is there and what of it can be told without the models."""
    stored = Dataset.open(workspace.folder(kind, name)).identity
    match kind:
        case "corpus":
            return _differing(stored, corpus_choices(recipe.corpus))
        case "distributions" | "evaluations":
            choices = _forward_choices(kind, name, recipe=recipe, workspace=workspace)
            rendering = stored.get("chat", {}).get("rendering")
            wanted_rendering = _rendering(name, recipe=recipe)
            same = rendering == wanted_rendering
            return _differing(stored, choices) + ([] if same else [f"chat template: stored {rendering}, asked for {wanted_rendering}"])
        case "targets":
            (fusion,) = (fusion for fusion in recipe.fusions if fusion.name == name)
            return _fusion_differences(fusion, recipe=recipe, workspace=workspace)
        case _:
            asked = _pair_identity(kind, name, alignment=recipe.alignment, workspace=workspace)
            return [] if asked is None else differences(stored, asked)


def _differing(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    return differences({key: stored.get(key) for key in asked}, asked)


def _forward_choices(kind: str, name: str, *, recipe: Recipe, workspace: Workspace) -> dict[str, Any]:
    """What of a forward pass's identity is known without its model."""
    if kind == "evaluations":
        choices = {"split": recipe.evaluation.split, "dtype": recipe.evaluation.dtype, "top_k": 0, "codec": "f16"}
    else:
        (dtype,) = (model.dtype for model in recipe.models if model.name == name)
        choices = {"split": "train", "dtype": dtype, "top_k": recipe.distributions.top_k, "codec": recipe.distributions.codec}
    corpus = _open(workspace.folder("corpus", recipe.corpus.name))
    return choices if corpus is None else choices | {"corpus": corpus.fingerprint}


def _rendering(name: str, *, recipe: Recipe) -> str | None:
    """How the model of a forward pass reads conversations; None of plain text."""
    if recipe.corpus.chat is None:
        return None
    readings = {source.name: "own" if source.chat_template == "own" else "foreign" for source in recipe.sources}
    return readings.get(name.removesuffix(f"--{recipe.evaluation.split}"), "shared")


def _pair_identity(kind: str, name: str, *, alignment: AlignmentConfig, workspace: Workspace) -> dict[str, Any] | None:
    """The identity of what is made of a source and the target; None while something that it is made from is not there."""
    source_name, target_name = name.split("--")[:2]
    pair = f"{source_name}--{target_name}"
    source, target = (_open(workspace.folder("distributions", model)) for model in (source_name, target_name))
    if source is None or target is None:
        return None
    if kind == "token_matches":
        return matches_identity(source, target=target, positions=alignment.positions)
    if kind == "vocab_maps":
        counts = alignment.vocabulary == "stat"
        matches = _open(workspace.folder("token_matches", alignment.matches_name(pair))) if counts else None
        if counts and matches is None:
            return None
        digests = source.identity["tokenizer"], target.identity["tokenizer"]
        ends = end_of_turn(source, target=target)
        return vocabulary_map_identity(digests[0], target=digests[1], rule=alignment.vocabulary, matches=matches, end_of_turn=ends)
    vocabulary_map = _open(workspace.folder("vocab_maps", alignment.map_name(pair))) if alignment.reads_map else None
    if alignment.reads_map and vocabulary_map is None:
        return None
    match = alignment.dtw_match if alignment.positions == "dtw" else None
    return alignment_identity(source, target=target, positions=alignment.positions, match=match, vocabulary_map=vocabulary_map)


def _open(folder: Path) -> Dataset | None:
    return Dataset.open(folder) if (folder / "dataset.json").exists() else None


def _fusion_differences(fusion: Fusion, *, recipe: Recipe, workspace: Workspace) -> list[str]:
    sources = []
    for model in (recipe.target, *fusion.sources):
        pair = f"{model.name}--{recipe.target.name}"
        distributions = _open(workspace.folder("distributions", model.name))
        if distributions is None:
            return [f"sources: asked for {model.name}, which is not there yet"]
        if model.name == recipe.target.name:
            sources.append(FusionSource(name=model.name, distributions=distributions))
            continue
        alignment = _open(workspace.folder("alignments", recipe.alignment.alignment_name(pair)))
        vocabulary_map = _open(workspace.folder("vocab_maps", recipe.alignment.map_name(pair)))
        if alignment is None or vocabulary_map is None:
            return [f"sources: asked for {model.name}, which is not aligned yet"]
        sources.append(FusionSource(name=model.name, distributions=distributions, alignment=alignment, vocabulary_map=vocabulary_map))
    config = recipe.fusion.model_copy(update={"pack_length": recipe.pack_length})
    codec = recipe.distributions.codec
    identity = fusion_identity(sources, alignment=recipe.alignment, fusion=config, top_k=recipe.top_k, codec=codec)
    conflicts = fusion_conflicts(workspace, name=fusion.name, identity=identity, recipe_name=config.name)
    return list(itertools.chain.from_iterable(conflict.differences for conflict in conflicts))


def _training(training: Training, *, recipe: Recipe, workspace: Workspace, status: TrainingStatus | None) -> Wanted:
    found = _training_differences(training, recipe=recipe, workspace=workspace)
    state: State = "other inputs" if found else "missing" if status is None else "done" if status.done else "incomplete"
    return Wanted(kind="training", name=training.name, state=state, expected_parts=None, differences=found, status=status)


def _training_differences(training: Training, *, recipe: Recipe, workspace: Workspace) -> list[str]:
    """Of a training that is finished; one that goes on is compared by the run that takes it up."""
    done = read_done(workspace.folder("runs", training.name))
    if done is None:
        return []
    config, fusion = training.config, training.fusion
    changed = differences(done["identity"]["config"], json.loads(json.dumps(config.determines)))
    if changed:
        return changed
    learned_from = ("targets", fusion.name) if config.uses_targets else ("distributions", recipe.target.name)
    there = _open(workspace.folder(*learned_from))
    if there is None or done["identity"]["targets"] != there.fingerprint:
        return [f"learned from something else than {'/'.join(learned_from)}"]
    if config.uses_targets and _fusion_differences(fusion, recipe=recipe, workspace=workspace):
        return ["learned from targets of other inputs"]
    return []


def _merge(recipe: Recipe, name: str, *, workspace: Workspace) -> Wanted:
    folder = workspace.folder("exports", name)
    found = _merge_differences(recipe, folder=folder, workspace=workspace)
    state: State = "other inputs" if found else "done" if folder.exists() else "missing"
    return Wanted(kind="merge", name=name, state=state, expected_parts=None, differences=found, status=None)


def _merge_differences(recipe: Recipe, *, folder: Path, workspace: Workspace) -> list[str]:
    """Between the trainings that a merged model is from, with the settings of its merge, and those that the recipe asks for."""
    if not folder.exists():
        return []
    assert recipe.merge is not None
    trainings, bases = {}, set()
    for source, training in recipe.merged_trainings.items():
        done = read_done(workspace.folder("runs", training.name))
        if done is None or _training_differences(training, recipe=recipe, workspace=workspace):
            return [f"trainings: asked for {training.name}, which is not there yet, or of other inputs"]
        trainings[source] = fingerprint(done["identity"])
        bases.add(done["identity"]["model"])
    return merge_differences(folder, asked=planned_merge(recipe.merge, base=min(bases), trainings=trainings))
