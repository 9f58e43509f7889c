"""What a recipe would take: parts, tokens, bytes on disk and operations of each stage, from what is at hand or expected; and how long."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..ingest.chat.readings import CorpusTemplate
from ..ingest.corpus import choose_documents, corpus_source, parts_of
from ..ingest.models import find_model, require_different_folders
from ..ingest.places import find_place
from ..recipe import Recipe
from ..store.corpus_plan import read_plan
from ..store.errors import DataError, UsageError
from ..store.machine import arithmetic_for, flops, has_gpu, threads
from ..store.workspace import Workspace
from ..train.config import TrainingConfig

BYTES_PER_TOKEN = 4.2  # English text, vocabularies of 32,000 to 50,000
GPU_FLOPS = 989e12  # one H100 in bfloat16
UTILISATION = 0.4  # share of it that a good forward pass or training step reaches

# Bytes per token on disk (benchmarks/store.py): scalars; and of each of the k entries its id, of two or four bytes, and its value.
_SCALAR_BYTES, _ID_BYTES_U16, _ID_BYTES_U32 = 6.4, 1.35, 1.44
_VALUE_BYTES = {"f16": 1.12, "q8": 0.74}
_SMALL_VOCABULARY = 65_536
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a stage that runs a model on a processor (benchmarks/README.md, the demo): to start and load it; and what is between the matrix
# products (norms, softmax, attention), as a share of the time that these would take in float32.
_START_SECONDS, _BETWEEN = 15.0, 0.5
_MATCHES_BYTES = 0.3  # of a token: a part of 1M has about 60,000 different pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One line of a plan."""

    stage: str
    parts: int
    parts_done: int
    tokens: float
    stored_bytes: float
    flops: float = 0  # operations of the models
    dtype: str = "float32"  # of their weights

    @property
    def gpu_hours(self) -> float:
        """Of one GPU."""
        return self.flops / (GPU_FLOPS * UTILISATION) / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    name: str
    parameters: float
    vocab_size: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    text_bytes: int
    documents: int
    parts: int


def plan(recipe: Recipe, *, base: Path, models_dir: Path, workspace: Workspace) -> list[PlannedStage]:
    """Plan every stage without changing or downloading anything.

    Raises:
        UsageError: a model or the corpus is not at hand, and the recipe does not say what to expect of it.
    """
    train, held_out = _splits(recipe, base=base, workspace=workspace, models_dir=models_dir)
    tokens = train.text_bytes / BYTES_PER_TOKEN
    models = _models(recipe, base=base, models_dir=models_dir)
    target, k, codec = models[0], recipe.distributions.top_k, recipe.distributions.codec

    def planned(stage: str, folder: str, *, parts: int, tokens: float = tokens, stored: float, **work: Any) -> PlannedStage:
        done = len(list((workspace.root / folder).glob("part-*.json")))
        return PlannedStage(stage=stage, parts=parts, parts_done=done, tokens=tokens, stored_bytes=stored, **work)

    stored = 0.45 * (train.text_bytes + held_out.text_bytes) + 60 * (train.documents + held_out.documents)
    stages = [planned("corpus", f"corpus/{recipe.corpus.name}", parts=train.parts + held_out.parts, stored=stored)]
    for model in models:
        stored = tokens * (_SCALAR_BYTES + k * _entry_bytes(model, codec))
        work: dict[str, Any] = {"flops": 2 * model.parameters * tokens, "dtype": model.dtype}
        stages.append(planned(f"distributions {model.name}", f"distributions/{model.name}", parts=train.parts, stored=stored, **work))
    for model in models[1:]:
        pair = f"{model.name}--{target.name}"
        alignment = recipe.alignment
        if alignment.vocabulary == "stat":
            folder = f"token_matches/{alignment.matches_name(pair)}"
            stages.append(planned(f"token matches {pair}", folder, parts=train.parts, stored=_MATCHES_BYTES * tokens))
        folder = f"vocab_maps/{alignment.map_name(pair)}"
        stages.append(planned(f"vocabulary map {pair}", folder, parts=1, tokens=0, stored=14 * model.vocab_size))
        folder = f"alignments/{alignment.alignment_name(pair)}"
        stages.append(planned(f"alignment {pair}", folder, parts=train.parts, stored=1.5 * tokens))
    stored = tokens * (3.5 + recipe.top_k * _entry_bytes(target, codec))
    stages += [planned(f"targets {fusion.name}", f"targets/{fusion.name}", parts=train.parts, stored=stored) for fusion in recipe.fusions]
    stages += [_training(training.config, target=target, tokens=tokens, workspace=workspace) for training in recipe.trainings]
    if recipe.merged_name is not None:
        stages.append(_merge(recipe, recipe.merged_name, target=target, workspace=workspace))
    made = [replace(target, name=name) for name in recipe.made_models]
    held_out_tokens = held_out.text_bytes / BYTES_PER_TOKEN
    for model in (*models, *made):
        folder = f"evaluations/{model.name}--{recipe.evaluation.split}"
        work = {"flops": 2 * model.parameters * held_out_tokens, "dtype": recipe.evaluation.dtype}
        stored = 6 * held_out_tokens
        stages.append(planned(f"evaluation {model.name}", folder, parts=held_out.parts, tokens=held_out_tokens, stored=stored, **work))
    return stages


def seconds_here(stages: Iterable[PlannedStage]) -> float:
    """How long what is missing takes on this machine, if nothing else runs on it; on a processor by the race of `store.machine`."""
    seconds = 0.0
    for stage in stages:
        missing = 1 - stage.parts_done / max(stage.parts, 1)
        if stage.flops and missing > 0:
            seconds += _START_SECONDS + missing * stage.flops * _seconds_per_operation(stage.dtype)
    return seconds


def _seconds_per_operation(dtype: str) -> float:
    """Products run at the speed of the race; what is between them takes its own time, in whatever number format."""
    if has_gpu():
        return 1 / (GPU_FLOPS * UTILISATION)
    return (1 / flops(arithmetic_for(dtype)) + _BETWEEN / flops("float32")) / threads()


def _training(training: TrainingConfig, *, target: _Model, tokens: float, workspace: Workspace) -> PlannedStage:
    if training.steps is None:
        trained = tokens * (training.epochs or 1)
    else:
        trained = float(training.steps * training.global_batch_size * training.sequence_length)
    item = _ITEM_BYTES[training.dtype]
    return PlannedStage(
        stage=f"training {training.name} (TP {training.tensor_parallel} × DP {training.data_parallel})",
        parts=1,
        parts_done=int((workspace.folder("runs", training.name) / "done.json").exists()),
        tokens=trained,
        # Weights, float32 master weights and two moments in each checkpoint that is kept; and the export.
        stored_bytes=(training.keep_checkpoints * (item + 12) + item) * target.parameters,
        flops=6 * target.parameters * trained,
        dtype=training.dtype,
    )


def _merge(recipe: Recipe, name: str, *, target: _Model, workspace: Workspace) -> PlannedStage:
    assert recipe.merge is not None
    return PlannedStage(
        stage=f"merge {name} ({recipe.merge.method} of {len(recipe.sources)})",
        parts=1,
        parts_done=int((workspace.folder("exports", name) / "config.json").exists()),
        tokens=0,
        stored_bytes=_ITEM_BYTES[recipe.merge.dtype or recipe.training.dtype] * target.parameters,
    )


def _entry_bytes(model: _Model, codec: str) -> float:
    return (_ID_BYTES_U16 if model.vocab_size <= _SMALL_VOCABULARY else _ID_BYTES_U32) + _VALUE_BYTES[codec]


def _splits(recipe: Recipe, *, base: Path, workspace: Workspace, models_dir: Path) -> tuple[_Split, _Split]:
    """The split to train on and the held-out one: as planned in the workspace, else as the recipe expects, else by reading the corpus."""
    config = recipe.corpus
    planned = read_plan(workspace.folder("corpus", config.name))
    if planned is not None:
        parts = planned["parts"]
    elif config.expected_bytes and config.expected_documents:
        n_bytes = min(config.expected_bytes, config.max_train_bytes or config.expected_bytes)
        train = _Split(text_bytes=n_bytes, documents=config.expected_documents, parts=-(-n_bytes // config.part_bytes))
        held_out_bytes = config.expected_held_out_bytes or 0
        return train, _Split(text_bytes=held_out_bytes, documents=0, parts=-(-held_out_bytes // config.part_bytes))
    else:
        chat = None
        try:
            source = corpus_source(config, base=base, download=False)
            if config.chat is not None:
                target = find_model(recipe.target, models_dir=models_dir, base=base, download=False)
                chat = CorpusTemplate.of(config.chat, target=target, base=base)
        except DataError as error:
            raise UsageError(
                f"{error}\nTo plan without it, say corpus.expected_bytes and corpus.expected_documents in the recipe."
            ) from error
        parts = parts_of(choose_documents(config, source=source, chat=chat).documents)

    def total(split: str) -> _Split:
        chosen = [part for part in parts if part["split"] == split]
        return _Split(
            text_bytes=sum(part["text_bytes"] for part in chosen), documents=sum(part["documents"] for part in chosen), parts=len(chosen)
        )

    return total("train"), total(recipe.evaluation.split)


def _models(recipe: Recipe, *, base: Path, models_dir: Path) -> list[_Model]:
    """The models of a recipe: as it expects them, else as they are found. Whether transformers reads them alike is left to a run."""
    models, found = [], []
    for config in recipe.models:
        if config.expected_parameters and config.expected_vocab_size:
            sizes = config.expected_parameters, config.expected_vocab_size
            models.append(_Model(name=config.name, parameters=sizes[0], vocab_size=sizes[1], dtype=config.dtype))
            continue
        try:
            find_place(config, models_dir=models_dir, base=base, download=False)
        except DataError as error:
            raise UsageError(f"{error}\nTo plan without it, set expected_parameters and expected_vocab_size of this model.") from error
        found.append(find_model(config, models_dir=models_dir, base=base, download=False))
        sizes = found[-1].n_parameters, found[-1].vocab_size
        models.append(_Model(name=config.name, parameters=sizes[0], vocab_size=sizes[1], dtype=config.dtype))
    require_different_folders(found)
    return models
