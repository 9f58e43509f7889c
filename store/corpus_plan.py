"""The plan of a corpus as it lies beside its parts: `plan.json`, and the table of documents whose checksum it holds."""

import hashlib
import json
from pathlib import Path
from typing import Any

import polars as pl

from . import durable
from .errors import DamagedPart
from .fingerprint import require_seal, sealed


def write_plan(folder: Path, *, documents: pl.DataFrame, summary: dict[str, Any]) -> None:
    """Write the plan: the table first, then the small file that makes it exist."""
    path = folder / "documents.parquet"
    durable.write_parquet(path, documents)
    durable.write_json(folder / "plan.json", sealed(summary | {"sha256": _sha256(path)}))


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What `write_plan` was given as summary; None where there is no plan yet.

    Raises:
        DamagedPart: it cannot be read, or is not what was written.
    """
    path = folder / "plan.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        require_seal(summary)
        [part["documents"] for part in summary["parts"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Remove it and run the recipe again: the same plan is then made."
        raise DamagedPart(f"{path} cannot be read ({error}).", remedy=remedy) from error
    return summary


def read_documents(folder: Path, *, summary: dict[str, Any]) -> pl.DataFrame:
    """The table of documents of a plan.

    Raises:
        DamagedPart: it is missing or not what was written.
    """
    path = folder / "documents.parquet"
    if not path.exists() or _sha256(path) != summary["sha256"]:
        remedy = f"Remove {folder / 'plan.json'}: the same plan is then made again."
        raise DamagedPart(f"{path} is missing or damaged.", remedy=remedy)
    return pl.read_parquet(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
