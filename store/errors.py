"""The errors a user can cause. The command line prints their text without a traceback and exits with `exit_code`."""


class FuselineError(Exception):
    """Something the user can mend. The text names the document, file or field and says what to do; `remedy` is the latter, where apart."""

    exit_code = 1

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".rstrip())
        self.problem, self.remedy = problem, remedy


class UsageError(FuselineError, ValueError):
    """A wrong option, argument or recipe: nothing was started."""

    exit_code = 2


class DataError(FuselineError, ValueError):
    """The input (a corpus, a model folder, a tokenizer) cannot be used as it is."""


class FingerprintMismatch(FuselineError, ValueError):
    """What the workspace holds was made from other inputs than those asked for now."""


class DamagedPart(FuselineError, OSError):
    """A committed part, or a file of it, is missing or does not match its manifest."""


class NewerPart(DamagedPart):
    """A part that a newer fuseline has written: whole, but not for this one."""


class WorkspaceBusy(FuselineError, RuntimeError):
    """Another process is the coordinator of this workspace."""


def reason_of(error: Exception) -> str:
    """What an error says; of one of the system without the path, which stands beside it; of a missing key that it is missing."""
    if isinstance(error, FuselineError):  # what to do stands beside it too
        return error.problem.rstrip(".")
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
