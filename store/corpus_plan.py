"""The plan of a corpus, stored beside its parts: `plan.json`, and the table of documents, whose checksum is in `plan.json`."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from . import durable
from .errors import DamagedPart, DataError, UsageError, reason_of
from .fingerprint import require_seal, sealed
from .json_files import is_count, open_file, read_object
from .shown import shown


def write_plan(folder: Path, *, documents: pl.DataFrame, summary: dict[str, Any]) -> None:
    """Write the plan: first the table, then `plan.json`, which commits it."""
    path = folder / "documents.parquet"
    durable.write_parquet(path, documents)
    durable.write_json(folder / "plan.json", sealed(summary | {"sha256": _sha256(path)}))


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The summary that `write_plan` stored; None if there is no plan yet.

    Raises:
        DamagedPart: it cannot be read, or has changed since it was written.
    """
    path = folder / "plan.json"
    try:
        summary = read_object(path)
        require_seal(summary)
        _check_plan(summary)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "Remove it and run the recipe again, which makes the same plan."
        raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=remedy) from error
    return summary


def _check_plan(summary: dict[str, Any]) -> None:
    """Raise ValueError or KeyError unless a plan has everything that its readers use."""
    for part in summary["parts"]:
        if not isinstance(part["split"], str) or not is_count(part["documents"]) or not is_count(part.get("text_bytes", 0)):
            raise ValueError(f"parts ({shown(part)}) must each have a split, documents and text_bytes")
    for name in ("documents", "duplicates", "empty", "refused", "text_bytes"):
        if not is_count(summary.get(name, 0)):
            raise ValueError(f"{name} ({shown(summary[name])}) must be a whole number from 0")
    if not isinstance(summary["sha256"], str):
        raise ValueError("sha256 must be a string")


def read_documents(folder: Path, *, summary: dict[str, Any]) -> pl.DataFrame:
    """A plan's table of documents.

    Raises:
        DamagedPart: it is missing, or has changed since it was written.
    """
    path = folder / "documents.parquet"
    try:
        if _sha256(path) == summary["sha256"]:
            return durable.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError):
        pass
    remedy = f"Remove {folder / 'plan.json'} and run the recipe again, which makes the same plan."
    raise DamagedPart(f"{path} is missing or damaged.", remedy=remedy)


@dataclass(frozen=True, slots=True)
class Domains:
    """The domains of a corpus and of each of its documents."""

    names: list[str]
    code_D: NDArray[np.int32]  # an index into `names` for each doc_id

    @classmethod
    def of(cls, corpus_folder: Path) -> Self:
        """Read them from the corpus's plan.

        Raises:
            DataError: there is no plan.
            DamagedPart: it cannot be read.
        """
        summary = read_plan(corpus_folder)
        if summary is None:
            raise DataError(f"{corpus_folder} has no plan.json with the documents' domains. Run `fuseline ingest corpus RECIPE` first.")
        domains = read_documents(corpus_folder, summary=summary).sort("doc_id")["domain"]
        names = domains.unique().sort()
        return cls(names.to_list(), domains.cast(pl.Enum(names)).to_physical().to_numpy().astype(np.int32))

    def codes(self, doc_ids: NDArray[Any]) -> NDArray[np.int32]:
        """The domain of each document, as an index into `names`."""
        return self.code_D[doc_ids]


def require_domains(asked: Iterable[str], *, field: str, known: Iterable[str | None]) -> None:
    """Raise UsageError if a field names a domain that the corpus does not have."""
    domains = sorted(domain for domain in known if domain is not None)
    unknown = sorted(set(asked) - set(domains))
    if unknown:
        raise UsageError(f"{field}: {', '.join(unknown)} must be domains of the corpus: {', '.join(domains)}.")


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
