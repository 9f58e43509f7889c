"""The `[executor]` of a recipe: where the parts of a stage run. It does not change stored data, and is in no fingerprint."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...store.shown import shown

# The executor sets these options of sbatch itself, to find its jobs and their logs again.
_OWN_OPTIONS = ("array", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "requeue", "signal")
# Options of sbatch that keys of `[executor.resources.<kind>]` set. If an option is set twice, sbatch ignores one of them.
_RESOURCE_OPTIONS = {
    "cpus-per-gpu": "cpus",
    "cpus-per-task": "cpus",
    "gpus": "gpus",
    "gpus-per-node": "gpus",
    "gpus-per-socket": "gpus",
    "gpus-per-task": "gpus",
    "mem": "memory_gb",
    "mem-per-cpu": "memory_gb",
    "mem-per-gpu": "memory_gb",
    "time": "minutes",
}


# Options of sbatch that a recipe may set: where and when a job runs, and which account pays. A recipe may be from a stranger, so only the
# user's environment sets which program runs, as which user, and in which environment.
_OPTIONS = (
    "account", "acctg-freq", "batch", "begin", "clusters", "comment", "constraint", "contiguous", "core-spec", "cores-per-socket",
    "cpu-freq", "deadline", "delay-boot", "dependency", "distribution", "exclude", "exclusive", "extra-node-info", "gpu-bind",
    "gpu-freq", "gres", "gres-flags", "hint", "hold", "kill-on-invalid-dep", "licenses", "mail-type", "mail-user", "mcs-label",
    "mem-bind", "mincpus", "network", "nice", "no-kill", "nodelist", "overcommit", "oversubscribe", "partition", "power",
    "prefer", "priority", "profile", "qos", "reservation", "sockets-per-node", "spread-job", "switches", "thread-spec",
    "threads-per-core", "time-min", "tmp", "tres-bind", "tres-per-task", "use-min-nodes", "wckey",
)  # fmt: skip


class Resources(BaseModel):
    """`[executor.resources.<kind>]`: what each worker of a stage gets from Slurm or Ray. Processes of `local` share the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    gpus: int = Field(0, ge=0, description="GPUs; with 0 forward passes run on CPU cores")
    cpus: int = Field(1, ge=1, description="CPU cores")
    memory_gb: float | None = Field(None, gt=0, description="memory in GB; if not set, the cluster decides")
    minutes: int = Field(60, ge=5, description="slurm: time after which a task is requeued to continue with its remaining parts")


class StageResources(BaseModel):
    """`[executor.resources]`: a table of resources for each kind of stage; a stage without a table gets one core."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    corpus: Resources = Field(Resources(), description="cutting documents into segments")
    distributions: Resources = Field(Resources(), description="forward passes")
    token_matches: Resources = Field(Resources(), description="counts of matched tokens, for the vocabulary map `stat`")
    vocab_maps: Resources = Field(Resources(), description="vocabulary maps")
    alignments: Resources = Field(Resources(), description="position maps")
    targets: Resources = Field(Resources(), description="fusion")
    ensembles: Resources = Field(Resources(), description="mixing the models' likelihoods")
    evaluations: Resources | None = Field(None, description="forward passes on the held-out text; if not set, the same as `distributions`")

    def of(self, kind: str) -> Resources:
        """The resources of a worker of a kind of stage."""
        found: Resources | None = getattr(self, kind, Resources())
        return self.distributions if found is None else found


class WrongKeys(ValueError):
    """Several keys of one section are wrong. `problems` has the problem of each."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(problems.values()))
        self.problems = problems


class ExecutorConfig(BaseModel):
    """The `[executor]` of a recipe: where the parts of a stage run. All executors make the same parts, bit for bit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["local", "slurm", "ray"] = Field(
        "local", description="processes on this machine, a Slurm job array, or actors on a Ray cluster"
    )
    workers: int | None = Field(
        None, ge=1, description="parts computed at the same time; if not set: one per GPU, or 1 without GPUs (local); 4 (slurm, ray)"
    )
    retries: int = Field(2, ge=0, description="how often a failed part is tried again before it is reported")
    resources: StageResources = Field(StageResources(), description="what each worker gets (slurm, ray)")
    slurm: dict[str, str | int | bool] = Field(
        {}, description='other options of sbatch by their long names: `partition = "gpu"`, `exclusive = true`'
    )

    @model_validator(mode="before")
    @classmethod
    def _names_no_cluster(cls, value: Any) -> Any:
        if (
            isinstance(value, dict) and "ray_address" in value
        ):  # the host at this address gets the stages as pickles, and answers with pickles
            raise ValueError("ray_address must not be in a recipe: remove it, and set RAY_ADDRESS in your environment")
        return value

    @field_validator("slurm", mode="before")
    @classmethod
    def _are_options(cls, value: Any) -> Any:
        problems = dict(_wrong_options(value)) if isinstance(value, dict) else {}
        if problems:
            raise WrongKeys(problems)
        return value


def _wrong_options(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The options of sbatch that a recipe must not set, each with its problem."""
    for name, option in options.items():
        said = name.replace("_", "-")
        if said in _OWN_OPTIONS:
            yield name, f"{name} is set by fuseline: remove it"
        elif key := _RESOURCE_OPTIONS.get(said):
            yield name, f"{name} is set from [executor.resources]: set {key} in [executor.resources.<stage>] instead"
        elif said not in _OPTIONS:
            yield name, f"{shown(name)} must not be in a recipe: remove it, and set SBATCH_… in your environment if sbatch has it"
        elif option is False or not isinstance(option, str | int):
            yield name, f"{name} ({shown(option)}) must be text, a number, or true; remove an option that you do not want"
        elif isinstance(option, str) and not option.isprintable():
            yield name, f"{name} ({shown(option)}) must not contain control characters"
