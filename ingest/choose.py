"""Chooses the documents that a corpus keeps, their order and their parts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ..store.errors import DataError
from .chat.readings import CorpusTemplate
from .corpus_config import CorpusConfig
from .data_files import DataFiles, Table
from .documents import ChatDocuments, Documents, TextDocuments
from .rows import Columns
from .texts_file import TextsWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenDocuments:
    """The documents that a corpus keeps, in order: doc_id, split, domain, sha256, n_bytes, part; and their source_split and row."""

    documents: pl.DataFrame
    n_duplicates: int
    n_empty: int
    refused: list[str]  # conversations that the chat template refuses: where they are, and why


def choose_documents(
    config: CorpusConfig, *, data_files: DataFiles, chat: CorpusTemplate | None = None, texts: TextsWriter | None = None
) -> ChosenDocuments:
    """Hash all documents, drop empty ones and duplicates, order the rest at random, and fill parts with them.

    Args:
        config: the recipe's.
        data_files: where the documents are.
        chat: the chat template of conversations.
        texts: receives every document that is read, in order.

    Raises:
        DataError: there is no text, a column is missing, a document is not valid Unicode, or a file changed in the meantime.
    """
    columns = ("source_split", "row", "split", "domain", "sha256", "n_bytes")
    types = (pl.String, pl.Int64, pl.String, pl.String, pl.String, pl.Int64)
    refused: list[str] = []
    rows = pl.DataFrame(
        list(_source_documents(config, data_files=data_files, chat=chat, refused=refused, texts=texts)),
        schema=dict(zip(columns, types, strict=True)),
        orient="row",
    )
    data_files.require_unchanged()
    kept = rows.filter(pl.col("n_bytes") > 0)
    n_empty = len(rows) - len(kept) - len(refused)
    if not config.keep_duplicates:
        # The held-out copy is kept: text for evaluation must not be trained on.
        kept = kept.sort(pl.col("split") == "train", maintain_order=True).unique("sha256", keep="first", maintain_order=True)
    n_duplicates = len(rows) - n_empty - len(refused) - len(kept)
    if not len(kept):
        also = f", or refused (the first: {refused[0]})" if refused else ""
        raise DataError(f"The corpus {data_files.where} has no text: {len(rows)} documents, all empty or white space{also}.")
    in_order = sorted(kept["split"].unique().to_list(), key=lambda split: (split != "train", split))
    ordered = pl.concat(_ordered(kept.filter(pl.col("split") == split), config=config, split=split) for split in in_order)
    documents = ordered.with_columns(doc_id=pl.int_range(len(ordered), dtype=pl.Int64), part=_part_numbers(ordered, config.part_bytes))
    return ChosenDocuments(documents=documents, n_duplicates=n_duplicates, n_empty=n_empty, refused=refused)


def _ordered(documents: pl.DataFrame, *, config: CorpusConfig, split: str) -> pl.DataFrame:
    """The documents of one split in seeded random order, cut to the number that the recipe asks for."""
    chosen = documents.sort("source_split", "row")
    chosen = chosen[np.random.default_rng([config.seed, len(chosen)]).permutation(len(chosen))]
    if split == "train" and config.max_train_bytes is not None:
        chosen = chosen.filter(pl.col("n_bytes").cum_sum() - pl.col("n_bytes") < config.max_train_bytes)
    return chosen


def _source_documents(
    config: CorpusConfig, *, data_files: DataFiles, chat: CorpusTemplate | None, refused: list[str], texts: TextsWriter | None
) -> Iterator[tuple[str, int, str, str, str, int]]:
    """(source split, row, split, domain, sha256, bytes) of every document; 0 bytes if it is only white space.

    Refused documents are included, and are listed in `refused`.
    """
    for source_split, tables in data_files.splits().items():
        row = 0
        for table in tables:
            documents = _documents(config, chat=chat, table=table)
            labels = [column for column in (config.domain_column, config.split_column) if column]
            columns = Columns(required=(*documents.required, *labels), optional=documents.optional, labels=labels)
            for rows in table.rows(columns):
                read, reasons = documents.read(rows)
                refused += [f"{rows.place(index)}: {reason}" for index, reason in reasons.items()]
                if texts is not None:
                    texts.add(read, source_split=source_split, has_marks=config.chat is not None)
                domains = rows.labels(config.domain_column) if config.domain_column else ["all"] * len(rows)
                splits = rows.labels(config.split_column) if config.split_column else [source_split] * len(rows)
                for index, (marked, domain, split) in enumerate(zip(read, domains, splits, strict=True)):
                    if not split:
                        raise DataError(f"{rows.place(index)}: {config.split_column} names no split. Correct this row.")
                    yield source_split, row, *_hashed(marked.text, domain=domain, split=split, config=config)
                    row += 1


def _hashed(text: str, *, domain: str, split: str, config: CorpusConfig) -> tuple[str, str, str, int]:
    """Split, domain, sha256 and bytes of a document."""
    data = text.encode()
    digest = hashlib.sha256(data).hexdigest()
    held_out = split == "train" and int(digest[:13], 16) < config.held_out_fraction * 16**13
    return "test" if held_out else split, domain, digest, len(data) if text.strip() else 0


def _documents(config: CorpusConfig, *, chat: CorpusTemplate | None, table: Table) -> Documents:
    if config.chat is None:
        return TextDocuments(config.text_column)
    assert chat is not None
    return ChatDocuments(config.chat, template=chat.template, columns=table.names, where=table.where)


def parts_of(documents: pl.DataFrame) -> list[dict[str, Any]]:
    """For each part, its split and its numbers of documents and bytes of text."""
    per_part = documents.group_by("part").agg(pl.first("split"), documents=pl.len(), text_bytes=pl.sum("n_bytes"))
    return per_part.sort("part").drop("part").to_dicts()


def _part_numbers(documents: pl.DataFrame, part_bytes: int) -> pl.Series:
    """Fill each part with consecutive documents of one split until it has `part_bytes` of text."""
    numbers, part, filled, current = [], -1, 0, None
    for split, n_bytes in zip(documents["split"], documents["n_bytes"], strict=True):
        if split != current or filled >= part_bytes:
            part, filled, current = part + 1, 0, split
        filled += n_bytes
        numbers.append(part)
    return pl.Series(numbers, dtype=pl.Int32)
