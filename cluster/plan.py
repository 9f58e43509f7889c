"""What a recipe would take: parts, tokens, bytes on disk and GPU hours of each stage, from what is at hand or expected."""

from dataclasses import dataclass
from pathlib import Path

from ..ingest.corpus import choose_documents, find_corpus, load_splits
from ..ingest.models import ModelConfig, find_model
from ..recipe import Recipe
from ..store.errors import DataError, UsageError
from ..store.workspace import Workspace

BYTES_PER_TOKEN = 4.2  # English text, vocabularies of 32,000 to 50,000
GPU_FLOPS = 989e12  # one H100 in bfloat16
UTILISATION = 0.4  # share of it that a good forward pass or training step reaches

# Bytes per token on disk (benchmarks/store.py): scalars, and each of the k entries with ids of two or four bytes.
_SCALAR_BYTES, _ENTRY_BYTES_U16, _ENTRY_BYTES_U32 = 6.6, 2.7, 3.0
_SMALL_VOCABULARY = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One line of a plan."""

    stage: str
    parts: int
    parts_done: int
    tokens: float
    stored_bytes: float
    gpu_hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    name: str
    parameters: float
    vocab_size: int


def plan(recipe: Recipe, *, base: Path, models_dir: Path, workspace: Workspace) -> list[PlannedStage]:
    """Plan every stage without changing anything. Needs no network where the recipe says what to expect.

    Raises:
        UsageError: a model or the corpus is not at hand, and the recipe does not say what to expect of it.
    """
    train_bytes, documents = _corpus_size(recipe, base=base)
    parts = max(1, -(-train_bytes // recipe.corpus.part_bytes))
    tokens = train_bytes / BYTES_PER_TOKEN
    models = [_model(config, base=base, models_dir=models_dir) for config in recipe.models]
    k = recipe.distributions.top_k

    def done(kind: str, name: str) -> int:
        return len(list(workspace.folder(kind, name).glob("part-*.json")))

    def planned(stage: str, kind: str, name: str, *, stored: float, flops: float = 0, n_parts: int = parts) -> PlannedStage:
        hours = flops / (GPU_FLOPS * UTILISATION) / 3600
        return PlannedStage(stage=stage, parts=n_parts, parts_done=done(kind, name), tokens=tokens, stored_bytes=stored, gpu_hours=hours)

    stages = [planned("corpus", "corpus", recipe.corpus.name, stored=0.45 * train_bytes + 60 * documents)]
    for model in models:
        stored = tokens * (_SCALAR_BYTES + k * _entry_bytes(model))
        stages.append(
            planned(f"distributions {model.name}", "distributions", model.name, stored=stored, flops=2 * model.parameters * tokens)
        )
    target = models[0]
    for model in models[1:]:
        pair = f"{model.name}--{target.name}"
        stages.append(planned(f"alignment {pair}", "alignments", pair, stored=1.5 * tokens))
    stored = tokens * (3.5 + recipe.top_k * _entry_bytes(target))
    stages.append(planned(f"targets {recipe.fusion.name}", "targets", recipe.fusion.name, stored=stored))
    for training in recipe.trainings:
        epochs = training.epochs or 1
        trained = (
            tokens * epochs if training.steps is None else float(training.steps * training.global_batch_size * training.sequence_length)
        )
        # Weights in training precision plus float32 master weights and two moments, for each checkpoint kept.
        checkpoints = training.keep_checkpoints * target.parameters * 14 + 2 * target.parameters
        stage = f"training {training.name} (TP {training.tensor_parallel} × DP {training.data_parallel})"
        stages.append(planned(stage, "runs", training.name, stored=checkpoints, flops=6 * target.parameters * trained, n_parts=1))
    return stages


def _entry_bytes(model: _Model) -> float:
    return _ENTRY_BYTES_U16 if model.vocab_size <= _SMALL_VOCABULARY else _ENTRY_BYTES_U32


def _corpus_size(recipe: Recipe, *, base: Path) -> tuple[int, int]:
    """Bytes and documents of the train split."""
    config = recipe.corpus
    if config.expected_bytes and config.expected_documents:
        limit = config.max_train_bytes or config.expected_bytes
        return min(config.expected_bytes, limit), config.expected_documents
    try:
        source = find_corpus(config, base=base)
    except DataError as error:
        raise UsageError(f"{error}\nTo plan without it, say corpus.expected_bytes and corpus.expected_documents in the recipe.") from error
    chosen = choose_documents(config, source=source, splits=load_splits(source)).documents
    train = chosen.filter(chosen["split"] == "train")
    return int(train["n_bytes"].sum()), len(train)


def _model(config: ModelConfig, *, base: Path, models_dir: Path) -> _Model:
    if config.expected_parameters and config.expected_vocab_size:
        return _Model(name=config.name, parameters=config.expected_parameters, vocab_size=config.expected_vocab_size)
    try:
        folder = find_model(config, models_dir=models_dir, base=base)
    except DataError as error:
        raise UsageError(f"{error}\nTo plan without it, say expected_parameters and expected_vocab_size of this model.") from error
    return _Model(name=config.name, parameters=folder.n_parameters, vocab_size=folder.vocab_size)
