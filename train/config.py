"""The settings of a training run. Imports neither torch nor Megatron-core, so the command line loads fast."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..store import durable
from ..store.errors import DataError

DEFAULT_EPOCHS = 1

# These change the speed of a run or how often it saves, never its result: a run may be resumed with different values.
_NOT_IDENTITY = {
    "micro_batch_size",
    "tensor_parallel",
    "data_parallel",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "evaluate_every",
    "evaluation_tokens",
    "recompute",
    "sequence_parallel",
}
# Later keys. They are in the identity only if they differ from their default, so that earlier runs keep their identity.
_LATER = {"clm_weight_end", "fusion_loss", "temperature", "domain_weights", "packing"}
_OF_TARGETS = {"tail", "fusion_loss", "temperature"}  # how the fused targets are used: ignored if their weight is 0

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TrainingConfig(BaseModel):
    """How the target model is trained on fused targets.

    Defaults are FuseLLM's (arXiv:2401.10491, section 4.1), except `clm_weight` and `tail`, which were measured (`benchmarks/README.md`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field("fused", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run and the exported model")
    clm_weight: Fraction = Field(0.1, description="λ: weight of next-token cross-entropy; 1 - λ weighs the fused targets (the papers: 0.9)")
    clm_weight_end: Fraction | None = Field(
        None, description="λ at the last step; it changes linearly from clm_weight at the first step; by default it is constant"
    )
    fusion_loss: Literal["ce", "kl"] = Field(
        "ce",
        description="cross-entropy with the fused targets, or minus their entropy (0 if they are matched); both have the same gradient",
    )
    temperature: Positive = Field(
        1.0, description="divides the logits of model and targets in the fusion loss, which is multiplied by its square; needs renormalise"
    )
    domain_weights: dict[str, Positive] = Field(
        {}, description="weight of the documents of some domains in both losses, as `[training.domain_weights]`; 1 for other domains"
    )
    tail: Literal["renormalise", "ghost"] = Field(
        "ghost", description="mass outside the stored top-k: scaled away, or one extra bucket against the student's own tail mass"
    )
    epochs: Count | None = Field(None, description=f"passes over the targets; by default {DEFAULT_EPOCHS} unless steps is given")
    steps: Count | None = Field(None, description="optimizer steps, instead of epochs")
    sequence_length: Annotated[int, Field(ge=2)] = Field(2048, description="most tokens of a packed sequence")
    packing: Literal["isolated", "concatenated"] = Field(
        "isolated",
        description="`isolated`: segments in a packed sequence do not see each other; `concatenated`, as published: segments are joined "
        "and cut as one text",
    )
    global_batch_size: Count = Field(128, description="packed sequences in an optimizer step")
    micro_batch_size: Count = Field(1, description="packed sequences in one forward pass of a rank")
    learning_rate: Positive = Field(1e-5, description="peak learning rate")
    min_learning_rate_ratio: Fraction = Field(0.0, description="the cosine ends at this share of learning_rate")
    warmup_fraction: BelowOne = Field(0.008, description="share of the steps over which the learning rate rises linearly")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.1, description="decoupled; not on norms and biases")
    adam_beta1: BelowOne = Field(0.9, description="decay of the first moment")
    adam_beta2: BelowOne = Field(0.95, description="decay of the second moment")
    adam_eps: Positive = Field(1e-8, description="added to the root of the second moment")
    gradient_clip: Positive = Field(1.0, description="largest norm of the gradient; a larger one is scaled down")
    tensor_parallel: Count = Field(
        1, description="ranks that share each layer; must divide the heads, the key/value heads and the MLP's size"
    )
    sequence_parallel: bool = Field(
        False,
        description="the ranks of each layer also share the tokens between its matrix products: less memory at the same speed",
    )
    data_parallel: Count = Field(1, description="copies of the model that share each batch")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights in training (bfloat16 keeps float32 masters) and in the export"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of the order of the data")
    checkpoint_every: Count = Field(100, description="steps from one checkpoint to the next")
    checkpoint_minutes: Positive | None = Field(
        None, description="minutes from one checkpoint to the next, in addition to checkpoint_every"
    )
    keep_checkpoints: Count = Field(2, description="number of newest checkpoints to keep")
    evaluate_every: Count | None = Field(
        None, description="steps between evaluations on the held-out split, which also run at the start and the end; none: no evaluation"
    )
    evaluation_tokens: Count = Field(1_000_000, description="most held-out tokens of these evaluations")
    recompute: bool = Field(False, description="recompute activations in the backward pass: less memory, about a third more time")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs ({self.epochs}) and steps ({self.steps}) must not both be given: remove one of them")
        if self.temperature != 1 and self.tail == "ghost":
            raise ValueError(
                f"temperature ({self.temperature}) must be 1 if tail is 'ghost', because the entries in the tail are not known: "
                "set tail = 'renormalise'"
            )
        share = self.micro_batch_size * self.data_parallel
        if self.global_batch_size % share:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size}) × data_parallel ({self.data_parallel})"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                f"sequence_parallel ({self.sequence_parallel}) must be False if tensor_parallel ({self.tensor_parallel}) is 1, "
                "because there are no ranks to share the tokens with"
            )
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.data_parallel

    @property
    def uses_targets(self) -> bool:
        """Whether the fused targets have any weight; if not, they are not read."""
        return self.clm_weight < 1 or (self.clm_weight_end is not None and self.clm_weight_end < 1)

    @property
    def determines(self) -> dict[str, Any]:
        """The settings that change what a run computes."""
        fields = type(self).model_fields
        at_default = {name for name in _LATER if getattr(self, name) == fields[name].default}
        return self.model_dump(exclude=_NOT_IDENTITY | {"name"} | at_default | (set() if self.uses_targets else _OF_TARGETS))


class HeldOut(BaseModel):
    """The evaluation text of a training: parts of a dataset of the target's evaluations."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    folder: Path = Field(description="dataset with the tokens")
    parts: list[int] = Field(min_length=1, description="indices of its parts")


class TrainJob(BaseModel):
    """Everything that a rank needs to know, stored as `job.json` in the run folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run_folder: Path = Field(description="checkpoints, metrics, logs and TensorBoard events of this run")
    model_folder: Path = Field(description="Hugging Face folder of the starting model")
    model_fingerprint: str = Field(description="of the starting weights")
    targets_folder: Path = Field(description="dataset of fused targets; for a training on text alone, a dataset with the same tokens")
    targets_fingerprint: str = Field(description="of that dataset")
    tokens_fingerprint: str = Field(description="of the dataset with its token ids")
    parts: list[int] = Field(min_length=1, description="indices of the parts to train on")
    corpus_folder: Path | None = Field(None, description="dataset of the texts; its plan has the documents' domains")
    start_folder: Path | None = Field(None, description="dataset of the start's own distributions, which it must reproduce")
    held_out: HeldOut | None = Field(None, description="what to evaluate on while training")
    export_folder: Path = Field(description="where the trained model is written as a Hugging Face folder")
    chat_template: str | None = Field(None, description="chat template (Jinja) of the exported model, if not the starting model's")
    lineage: dict[str, Any] = Field(description="what the model was made from, for its card")
    config: TrainingConfig

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.held_out is not None and self.corpus_folder is None:
            raise ValueError("held_out needs corpus_folder, which has the documents' domains")
        return self

    @classmethod
    def read(cls, run_folder: Path) -> Self:
        """Read `<run_folder>/job.json`, to compare it: a workspace may have been moved since it was written.

        Raises:
            DataError: it is missing, or is not a job.
        """
        path = run_folder / "job.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(f"{path} cannot be read as a training job: {error}") from error

    @classmethod
    def load(cls, run_folder: Path) -> Self:
        """Read `<run_folder>/job.json`, to run it.

        Raises:
            DataError: it is missing or is not a job, or it would write outside the workspace of this run folder.
        """
        path, job = run_folder / "job.json", cls.read(run_folder)
        place, exported = run_folder.resolve(), job.export_folder.resolve()
        if job.run_folder.resolve() != place or exported.parent not in (place, place.parent.parent / "exports"):
            raise DataError(
                f"{path} is the job of another folder: it writes to {job.run_folder} and {job.export_folder}. "
                "Write it again with: fuseline train RECIPE --prepare."
            )
        return job

    def save(self) -> None:
        """Write `job.json` into the run folder; create the folder if it is missing."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        durable.write_json(self.run_folder / "job.json", self.model_dump(mode="json"))

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the trained weights. A checkpoint with a different identity is never resumed."""
        return json.loads(
            json.dumps(
                {
                    "model": self.model_fingerprint,
                    # Without fusion only the tokens matter, not the fused targets.
                    "targets": self.targets_fingerprint if self.config.uses_targets else self.tokens_fingerprint,
                    "parts": self.parts,
                    "config": self.config.determines,
                }
            )
        )
