"""The merge of a recipe: the models that were trained each with one source become one, in parameter space (FuseChat, arXiv:2408.07990)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ingest.models import ModelFolder
from ..store.fingerprint import differences, fingerprint
from ..store.json_files import read_object
from ..train.merging.config import MergeConfig
from ..train.merging.identity import REPORT, merge_identity
from .conflicts import Conflict, require_free
from .jobs import Jobs
from .origin import merged_lineage
from .progress import Progress


class Merging:
    """The merge of a recipe in a workspace.

    Its identity says which trainings the models are from, besides what they are: so a merged model of other sources is told before anything
    is trained.
    """

    def __init__(self, jobs: Jobs, *, config: MergeConfig, name: str) -> None:
        """`name` is that of the merged model: the recipe's, and the number of the models."""
        self.jobs, self.config, self.name = jobs, config, name
        self.export_folder = jobs.workspace.folder("exports", name)

    @property
    def is_there(self) -> bool:
        """Whether there is a model of this name; whether it is this one, `is_done` says."""
        return (self.export_folder / "config.json").exists()

    def conflicts(self) -> list[Conflict]:
        """Whether the model of this name is of another merge, as far as that is known before the trainings are done."""
        return self._conflicts(self._planned)

    def is_done(self) -> bool:
        """Whether this merge is there; all trainings must be done.

        Raises:
            UsageError: one is not.
            FingerprintMismatch: the workspace has something else under this name.
        """
        require_free(self._conflicts(self._identity), workspace=self.jobs.workspace)
        return self.is_there

    def run(self, *, progress: Progress) -> None:
        """Merge, with a run in the workspace. The model appears in one step.

        Raises:
            FuselineError: the models cannot be merged.
        """
        from ..train.merging.merge import merge  # loads torch

        jobs, models = self.jobs, self._models
        start, title = jobs.stages.models[jobs.recipe.target.name], f"merge {self.name}"
        with (
            jobs.workspace.run("merge", name=self.name, parameters=self.config.model_dump()) as run,
            progress.writing(title) as follow,
        ):
            report = merge(
                self.config,
                base=start.folder,
                models={name: model.folder for name, model in models.items()},
                output=self.export_folder,
                identity=self._identity,
                lineage=self._lineage,
                tokenizer_of=next(iter(models.values())).folder,  # with the chat template that they were trained in
                on_progress=follow,
            )
            run.metrics.update(models=len(models), tensors=len(report.tensors), stored_bytes=report.n_bytes)
        for warning in report.warnings:
            progress.say(f"{title}: {warning}")

    def model(self) -> ModelFolder:
        """The merged model."""
        return self.jobs.exported(self.name)

    @property
    def _models(self) -> dict[str, ModelFolder]:
        """What is merged, by name of the source that each learned from."""
        trained = self.jobs.models
        return {source: trained[training.name] for source, training in self.jobs.recipe.merged_trainings.items()}

    @property
    def _planned(self) -> dict[str, Any]:
        """What of the identity is known before the trainings are done."""
        jobs = self.jobs
        trainings = {source: fingerprint(jobs.job(training).identity) for source, training in jobs.recipe.merged_trainings.items()}
        return planned_merge(self.config, base=jobs.stages.models[jobs.recipe.target.name].weights_digest, trainings=trainings)

    @property
    def _identity(self) -> dict[str, Any]:
        start, models = self.jobs.stages.models[self.jobs.recipe.target.name], self._models
        digests = {name: model.weights_digest for name, model in models.items()}
        return self._planned | merge_identity(self.config, base=start.weights_digest, models=digests)

    @property
    def _lineage(self) -> dict[str, Any]:
        jobs, stages = self.jobs, self.jobs.stages
        trainings = {source: jobs.job(training).lineage for source, training in jobs.recipe.merged_trainings.items()}
        return merged_lineage(trainings, recipe=jobs.recipe, models=stages.models, corpus=stages.corpus.dataset, merged=self._models)

    def _conflicts(self, asked: Mapping[str, Any]) -> list[Conflict]:
        found = merge_differences(self.export_folder, asked=asked)
        what, folders = f"exports/{self.name}", [self.export_folder]
        key, name = ("merge", "name"), self.config.name
        return [Conflict(key=key, name=name, what=what, folders=folders, differences=found)] if found else []


def planned_merge(config: MergeConfig, *, base: str, trainings: Mapping[str, str]) -> dict[str, Any]:
    """What of a merge's identity is known before its models are: `base` is the start's digest, `trainings` are fingerprints by source."""
    identity = merge_identity(config, base=base, models=dict.fromkeys(trainings, ""))
    return {key: value for key, value in identity.items() if key != "models"} | {"trainings": dict(sorted(trainings.items()))}


def merge_differences(folder: Path, *, asked: Mapping[str, Any]) -> list[str]:
    """Between what a folder's model was merged from and what is asked for; nothing if there is no folder."""
    if not folder.exists():
        return []
    try:
        stored = dict(read_object(folder / REPORT)["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"is no merge: {REPORT} cannot be read"]
    asked = json.loads(json.dumps(asked))
    return differences({key: stored.get(key, {}) for key in asked}, asked)
