"""A corpus: documents from `datasets`, hashed, freed of duplicates, shuffled into parts, cut into segments.

The plan comes first (`corpus/<name>/documents.parquet`): which documents are kept, in which order, in which part. The order is random and
seeded, so whoever reads parts one after another reads shuffled text. Each part is then a function of the plan:

    part-00042.parquet      one row per segment: doc_id, segment, domain, split, sha256 (of the document), text

A part holds documents of one split only.

With `[corpus.chat]` a document is a conversation, and its text what a chat template makes of it; the parts then also have the ranges of
`chat.marked_text`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..store.corpus_plan import read_documents, read_plan, write_plan
from ..store.dataset import Dataset, PartContent
from ..store.errors import DataError
from ..store.tokenizer import Tokenizer
from .chat.config import ChatConfig
from .chat.marked_text import MarkedText, columns_of
from .chat.reader import ConversationsReader
from .chat.readings import CorpusTemplate
from .chat.segment import segment_conversations
from .digests import file_digest
from .documents import ChatDocuments, Documents, TextDocuments
from .segment import segment_documents
from .sources import data_files, load_splits

_TOLD = 100  # reasons of refused conversations that the plan keeps


class CorpusConfig(BaseModel):
    """The `[corpus]` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field("corpus", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the data set in the workspace")
    path: str = Field(description="dataset id on the Hugging Face hub, or a file or folder of parquet, jsonl, csv or txt files")
    revision: str | None = Field(None, description="commit, tag or branch of a hub dataset")
    chat: ChatConfig | None = Field(None, description="the documents are conversations")
    text_column: str = Field("text", description="column that holds the text; without [corpus.chat]")
    domain_column: str | None = Field(None, description="column that holds each document's domain; without it all are of one domain")
    split_column: str | None = Field(None, description="column that holds each document's split, for files that mix them")
    held_out_fraction: float = Field(0.0, ge=0, lt=1, description="share of the train documents to move to the split `test`, by their hash")
    max_train_bytes: int | None = Field(None, gt=0, description="use only about so many bytes of the train split")
    keep_duplicates: bool = Field(False, description="keep documents with the same text more than once")
    context_length: int = Field(2048, ge=16, description="most tokens of a segment, for every model's tokenizer")
    part_bytes: int = Field(4 << 20, ge=1024, description="bytes of text of a part, the unit of work and of commit")
    seed: int = Field(0, ge=0, description="seed of the order of documents")
    expected_documents: int | None = Field(None, gt=0, description="for --dry-run where the corpus is not at hand: documents to train on")
    expected_bytes: int | None = Field(None, gt=0, description="for --dry-run where the corpus is not at hand: bytes to train on")
    expected_held_out_bytes: int | None = Field(
        None, gt=0, description="for --dry-run where the corpus is not at hand: bytes to evaluate on"
    )

    @model_validator(mode="after")
    def _text_or_chat(self) -> "CorpusConfig":
        if self.chat is not None and "text_column" in self.model_fields_set:
            raise ValueError(f"text_column ({self.text_column!r}) must not be given with [corpus.chat]: name the column in chat.column")
        return self

    @model_validator(mode="after")
    def _held_out_needs_no_split(self) -> "CorpusConfig":
        if self.held_out_fraction and self.split_column:
            raise ValueError(
                f"held_out_fraction ({self.held_out_fraction}) must be 0 where split_column ({self.split_column!r}) says the split"
            )
        return self


def corpus_identity(
    config: CorpusConfig, *, source: Path, tokenizers: list[Tokenizer], chat: CorpusTemplate | None = None
) -> dict[str, Any]:
    """What determines the corpus: its files' content, the choices of the recipe, and the tokenizers its segments fit.

    Of conversations also the template that they are written in.
    """
    content: dict[str, Any]
    if source.parent.name == "snapshots":  # a hub snapshot is named by its commit
        content = {"hub": config.path, "commit": source.name}
    else:
        # A folder's README.md may say which file is which split.
        files = [*data_files(source), *source.glob("README.md")]
        content = {"files": {path.relative_to(source).as_posix(): file_digest(path) for path in files}}
    written = {"chat_template": chat.template.identity, "chat_tokenizer": chat.tokenizer} if chat else {}
    return {**corpus_choices(config), **content, **written, "segmented_for": sorted(tokenizer.digest for tokenizer in tokenizers)}


def corpus_choices(config: CorpusConfig) -> dict[str, Any]:
    """What of a corpus's identity the recipe alone determines."""
    free = {"name", "path", "revision", "expected_documents", "expected_bytes", "expected_held_out_bytes"}
    chosen = {"stage": "corpus/1", **config.model_dump(exclude=free | {"chat"})}
    if config.chat is not None:
        del chosen["text_column"]
        chosen["chat"] = config.chat.model_dump(include={"format", "column"})
    return chosen


class CorpusStage:
    """Makes the parts of one corpus. Pickles as its arguments; the data set and the tokenizers are loaded where it runs."""

    def __init__(
        self, dataset: Dataset, *, config: CorpusConfig, source: Path, tokenizer_folders: list[Path], chat: CorpusTemplate | None = None
    ) -> None:
        """`chat` is needed where `config.chat` is there."""
        self.dataset, self.config, self.source, self.tokenizer_folders, self.chat = dataset, config, source, tokenizer_folders, chat

    def __reduce__(self) -> tuple[Any, ...]:
        return _corpus_stage, (self.dataset, self.config, self.source, self.tokenizer_folders, self.chat)

    @cached_property
    def splits(self) -> dict[str, Any]:
        """The source, split by split."""
        return load_splits(self.source)

    @cached_property
    def tokenizers(self) -> list[Tokenizer]:
        """The tokenizers whose context every segment must fit."""
        return [Tokenizer.load(folder) for folder in self.tokenizer_folders]

    @cached_property
    def _readers(self) -> list[ConversationsReader]:
        assert self.chat is not None
        return [reader for tokenizer in self.tokenizers for reader in self.chat.readers(tokenizer)]

    @cached_property
    def plan(self) -> "CorpusPlan":
        """Which documents are kept, and in which part."""
        return CorpusPlan.load(self.dataset) or self._make_plan()

    def parts(self) -> list[int]:
        """Indices of all parts that the corpus has."""
        return list(range(len(self.plan.parts)))

    def compute(self, part: int) -> PartContent:
        """Read, cut and number the documents of one part."""
        documents = self.plan.documents.filter(pl.col("part") == part)
        texts = self._texts(documents)
        segmented, marks = self._segmented(texts)
        table = (
            documents.select("doc_id", "domain", "split", "sha256")
            .with_columns(text=pl.Series(segmented, dtype=pl.List(pl.String)), segment=pl.Series([list(range(len(s))) for s in segmented]))
            .explode("segment", "text")
            .select("doc_id", pl.col("segment").cast(pl.UInt32), "domain", "split", "sha256", "text")
            .with_columns(**marks)
        )
        return PartContent(
            data=table, counts={"documents": len(documents), "segments": len(table), "text_bytes": int(documents["n_bytes"].sum())}
        )

    def _segmented(self, texts: list[MarkedText]) -> tuple[list[list[str]], dict[str, pl.Series]]:
        """The segments of each document, and the columns that say what is what in those of conversations."""
        context_length = self.config.context_length
        if self.chat is None:
            plain = [each.text for each in texts]
            return segment_documents(plain, tokenizers=self.tokenizers, context_length=context_length), {}
        segmented = segment_conversations(texts, readers=self._readers, context_length=context_length)
        return [[each.text for each in segments] for segments in segmented], columns_of(
            [each for segments in segmented for each in segments]
        )

    def _texts(self, documents: pl.DataFrame) -> list[MarkedText]:
        texts = [MarkedText(text="")] * len(documents)
        for (split,), rows in documents.with_row_index().group_by("source_split"):
            selected = self.splits[str(split)].select(rows["row"].to_list())
            read = _documents(self.config, chat=self.chat, features=selected.features, where=str(self.source))
            batch = selected.select_columns(list(read.columns)).with_format(read.format)[:]
            found, _ = read.read(batch, where=f"{self.source}, split {split}", first_row=0)
            for index, text in zip(rows["index"].to_list(), found, strict=True):
                texts[index] = text
        for doc_id, marked, digest in zip(documents["doc_id"], texts, documents["sha256"], strict=True):
            if hashlib.sha256(marked.text.encode()).hexdigest() != digest:
                raise DataError(
                    f"Document {doc_id} changed since the corpus was planned. Restore {self.source}, or use another --workspace."
                )
        return texts

    def _make_plan(self) -> "CorpusPlan":
        chosen = choose_documents(self.config, source=self.source, splits=self.splits, chat=self.chat)
        return CorpusPlan.commit(self.dataset, chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenDocuments:
    """The documents that a corpus keeps, in order: doc_id, split, domain, sha256, n_bytes, part; and their source_split and row."""

    documents: pl.DataFrame
    n_duplicates: int
    n_empty: int
    refused: list[str]  # conversations that the chat template does not write: where they are, and why


def choose_documents(config: CorpusConfig, *, source: Path, splits: dict[str, Any], chat: CorpusTemplate | None = None) -> ChosenDocuments:
    """Hash all documents, drop empty ones and duplicates, order the rest at random, and fill parts with them.

    Raises:
        DataError: there is no text at all, a column is missing, or a document is not valid Unicode.
    """
    columns = ("source_split", "row", "split", "domain", "sha256", "n_bytes")
    types = (pl.String, pl.Int64, pl.String, pl.String, pl.String, pl.Int64)
    refused: list[str] = []
    rows = pl.DataFrame(
        list(_source_documents(config, source=source, splits=splits, chat=chat, refused=refused)),
        schema=dict(zip(columns, types, strict=True)),
        orient="row",
    )
    kept = rows.filter(pl.col("n_bytes") > 0)
    n_empty = len(rows) - len(kept) - len(refused)
    if not config.keep_duplicates:
        # The held-out copy stays: text that is evaluated on must not be trained on.
        kept = kept.sort(pl.col("split") == "train", maintain_order=True).unique("sha256", keep="first", maintain_order=True)
    n_duplicates = len(rows) - n_empty - len(refused) - len(kept)
    if not len(kept):
        also = f", or refused, the first ({refused[0]})" if refused else ""
        raise DataError(f"The corpus {source} has no text: {len(rows)} documents, all empty or white space{also}.")
    in_order = sorted(kept["split"].unique().to_list(), key=lambda split: (split != "train", split))
    ordered = pl.concat(_ordered(kept.filter(pl.col("split") == split), config=config, split=split) for split in in_order)
    documents = ordered.with_columns(doc_id=pl.int_range(len(ordered), dtype=pl.Int64), part=_part_numbers(ordered, config.part_bytes))
    return ChosenDocuments(documents=documents, n_duplicates=n_duplicates, n_empty=n_empty, refused=refused)


def _ordered(documents: pl.DataFrame, *, config: CorpusConfig, split: str) -> pl.DataFrame:
    """The documents of one split in seeded random order, cut to what the recipe wants of them."""
    chosen = documents.sort("source_split", "row")
    chosen = chosen[np.random.default_rng([config.seed, len(chosen)]).permutation(len(chosen))]
    if split == "train" and config.max_train_bytes is not None:
        chosen = chosen.filter(pl.col("n_bytes").cum_sum() - pl.col("n_bytes") < config.max_train_bytes)
    return chosen


def _source_documents(
    config: CorpusConfig, *, source: Path, splits: dict[str, Any], chat: CorpusTemplate | None, refused: list[str]
) -> Iterator[tuple[str, int, str, str, str, int]]:
    """(source split, row, split, domain, sha256, bytes) of every document; 0 bytes where there is nothing but white space.

    Of documents that are refused, too, which `refused` then lists.
    """
    for source_split, rows in splits.items():
        read = _documents(config, chat=chat, features=rows.features, where=str(source))
        columns = [column for column in (*read.columns, config.domain_column, config.split_column) if column]
        for column in columns:
            if column not in rows.column_names:
                raise DataError(f"The corpus {source} has no column {column!r}; it has: {', '.join(rows.column_names)}.")
        row = 0
        for batch in rows.select_columns(list(dict.fromkeys(columns))).with_format(read.format).iter(batch_size=1000):
            texts, reasons = read.read(batch, where=f"{source}, split {source_split}", first_row=row)
            refused += [f"{source_split} row {number}: {reason}" for number, reason in reasons.items()]
            domains = _values(batch, config.domain_column) if config.domain_column else ["all"] * len(texts)
            named_splits = _values(batch, config.split_column) if config.split_column else [source_split] * len(texts)
            for marked, domain, split in zip(texts, domains, named_splits, strict=True):
                if split is None:
                    raise DataError(f"{source}, split {source_split}, row {row}: {config.split_column} says no split. Mend this row.")
                text = marked.text.encode()
                digest = hashlib.sha256(text).hexdigest()
                held_out = split == "train" and int(digest[:13], 16) < config.held_out_fraction * 16**13
                yield source_split, row, "test" if held_out else str(split), str(domain), digest, len(text) if text.strip() else 0
                row += 1


def _values(batch: Any, column: str) -> list[Any]:
    values = batch[column]
    return values if isinstance(values, list) else values.to_pylist()


def _documents(config: CorpusConfig, *, chat: CorpusTemplate | None, features: Mapping[str, Any], where: str) -> Documents:
    if config.chat is None:
        return TextDocuments(config.text_column, features=features, where=where)
    assert chat is not None
    return ChatDocuments(config.chat, template=chat.template, columns=list(features), where=where)


def _corpus_stage(
    dataset: Dataset, config: CorpusConfig, source: Path, tokenizer_folders: list[Path], chat: CorpusTemplate | None
) -> CorpusStage:
    return CorpusStage(dataset, config=config, source=source, tokenizer_folders=tokenizer_folders, chat=chat)


class CorpusPlan:
    """The documents of a corpus and the parts they are in."""

    def __init__(self, documents: pl.DataFrame, summary: dict[str, Any]) -> None:
        self.documents, self.summary = documents, summary

    @property
    def parts(self) -> list[dict[str, Any]]:
        """For each part its split and its numbers of documents and bytes."""
        return self.summary["parts"]

    @classmethod
    def load(cls, dataset: Dataset) -> "CorpusPlan | None":
        """The committed plan of a corpus, or None."""
        summary = read_plan(dataset.folder)
        return None if summary is None else cls(read_documents(dataset.folder, summary=summary), summary)

    @classmethod
    def commit(cls, dataset: Dataset, chosen: ChosenDocuments) -> "CorpusPlan":
        """Write the plan."""
        documents = chosen.documents
        summary = {
            "documents": len(documents),
            "duplicates": chosen.n_duplicates,
            "empty": chosen.n_empty,
            **({"refused": len(chosen.refused), "why_refused": chosen.refused[:_TOLD]} if chosen.refused else {}),
            "text_bytes": int(documents["n_bytes"].sum()),
            "parts": parts_of(documents),
        }
        write_plan(dataset.folder, documents=documents, summary=summary)
        return cls(documents, summary)


def parts_of(documents: pl.DataFrame) -> list[dict[str, Any]]:
    """Of each part its split, and its numbers of documents and of bytes of text."""
    per_part = documents.group_by("part").agg(pl.first("split"), documents=pl.len(), text_bytes=pl.sum("n_bytes"))
    return per_part.sort("part").drop("part").to_dicts()


def _part_numbers(documents: pl.DataFrame, part_bytes: int) -> pl.Series:
    """Consecutive documents of one split fill a part until it has `part_bytes` of text."""
    numbers, part, filled, current = [], -1, 0, None
    for split, n_bytes in zip(documents["split"], documents["n_bytes"], strict=True):
        if split != current or filled >= part_bytes:
            part, filled, current = part + 1, 0, split
        filled += n_bytes
        numbers.append(part)
    return pl.Series(numbers, dtype=pl.Int32)
