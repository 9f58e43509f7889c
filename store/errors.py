"""The errors that a user can cause. The command line prints their text without a traceback and exits with `exit_code`."""


class FuselineError(Exception):
    """An error that the user can fix. The text names the document, file or field and what to do; `remedy` is the latter, if separate."""

    exit_code = 1

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".rstrip())
        self.problem, self.remedy = problem, remedy


class UsageError(FuselineError, ValueError):
    """A wrong option, argument or recipe. Nothing was started."""

    exit_code = 2


class DataError(FuselineError, ValueError):
    """The input (a corpus, a model folder, a tokenizer) cannot be used as it is."""


class FingerprintMismatch(FuselineError, ValueError):
    """The workspace holds data that was made from different inputs than requested now."""


class DamagedPart(FuselineError, OSError):
    """A committed part, or a file of it, is missing or does not match its manifest."""


class NewerPart(DamagedPart):
    """A part that a newer fuseline has written. It is intact, but this version cannot read it."""


class WorkspaceBusy(FuselineError, RuntimeError):
    """Another process is the coordinator of this workspace."""


def reason_of(error: Exception) -> str:
    """The text of an error: of a system error without the path, which the message already has; of a KeyError that the key is missing."""
    if isinstance(error, FuselineError):  # the message already says what to do
        return error.problem.rstrip(".")
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
