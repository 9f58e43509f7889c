"""The errors a user can cause. The command line prints their text without a traceback and exits with `exit_code`."""


class FuselineError(Exception):
    """Something the user can mend. The text names the document, file or field and says what to do."""

    exit_code = 1


class UsageError(FuselineError, ValueError):
    """A wrong option, argument or recipe: nothing was started."""

    exit_code = 2


class DataError(FuselineError, ValueError):
    """The input (a corpus, a model folder, a tokenizer) cannot be used as it is."""


class FingerprintMismatch(FuselineError, ValueError):
    """What the workspace holds was made from other inputs than those asked for now."""


class DamagedPart(FuselineError, OSError):
    """A committed part, or a file of it, is missing or does not match its manifest."""


class WorkspaceBusy(FuselineError, RuntimeError):
    """Another process is the coordinator of this workspace."""
