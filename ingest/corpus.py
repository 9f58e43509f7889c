"""A corpus: documents of files or of a hub dataset, hashed, deduplicated, shuffled into parts and cut into segments.

The plan is made first (`corpus/<name>/documents.parquet`): which documents are kept, in which order, in which part. The order is random
and seeded, so reading the parts one after another gives shuffled text. Each part is then a function of the plan:

    part-00042.parquet      one row per segment: doc_id, segment, domain, split, sha256 (of the document), text

A part holds documents of only one split.

With `[corpus.chat]` a document is a conversation, and its text the output of a chat template; the parts then also have the ranges of
`chat.marked_text`.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from ..store.corpus_plan import read_documents, read_plan, write_plan
from ..store.dataset import Dataset, PartContent
from ..store.errors import DataError
from ..store.tokenizer import Tokenizer
from .chat.marked_text import MarkedText, columns_of
from .chat.reader import ConversationsReader
from .chat.readings import CorpusTemplate
from .chat.segment import segment_conversations
from .choose import ChosenDocuments, choose_documents, parts_of
from .corpus_config import CorpusConfig, corpus_choices
from .data_files import DataFiles, open_data_files
from .segment import segment_documents
from .texts_file import ReadTexts, remove_texts, writing_texts

READER = 2  # version of the file readers; 1 was `datasets` (`earlier_corpus`)
_SHOWN = 100  # reasons of refused conversations that the plan keeps


def data_files_of(config: CorpusConfig, *, base: Path, download: bool = True) -> DataFiles:
    """Where the documents of a corpus are; see `data_files.open_data_files`."""
    keys = {key: getattr(config, key) for key in ("splits", "revision", "configuration")}
    return open_data_files(config.path, base=base, download=download, **keys)


def corpus_identity(
    config: CorpusConfig, *, data_files: DataFiles, tokenizers: list[Tokenizer], chat: CorpusTemplate | None = None
) -> dict[str, Any]:
    """What determines the corpus: the content of its files, the recipe's settings, and the tokenizers that its segments fit.

    For conversations, also their chat template.
    """
    written = {"chat_template": chat.template.identity, "chat_tokenizer": chat.tokenizer} if chat else {}
    segmented_for = sorted(tokenizer.digest for tokenizer in tokenizers)
    return {**corpus_choices(config), **data_files.identity(), **written, "segmented_for": segmented_for}


class CorpusStage:
    """Makes the parts of one corpus. It pickles as its arguments; the process that runs it loads the data set and the tokenizers."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        config: CorpusConfig,
        data_files: DataFiles,
        tokenizer_folders: list[Path],
        chat: CorpusTemplate | None = None,
    ) -> None:
        """`chat` is required if `config.chat` is set."""
        self.dataset, self.config, self.data_files, self.tokenizer_folders, self.chat = dataset, config, data_files, tokenizer_folders, chat

    def __reduce__(self) -> tuple[Any, ...]:
        return _corpus_stage, (self.dataset, self.config, self.data_files, self.tokenizer_folders, self.chat)

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
        """The documents that are kept, and their parts."""
        return CorpusPlan.load(self.dataset) or self._make_plan()

    def parts(self) -> list[int]:
        """Indices of all parts of the corpus."""
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
        """The segments of each document; for conversations, also the columns with their ranges."""
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
        read = self._read_texts
        for (split,), rows in documents.with_row_index().group_by("source_split"):
            try:
                found = read.take(rows["row"].to_list(), source_split=str(split))
            except IndexError:
                raise self._changed(rows["doc_id"][0]) from None
            for index, text in zip(rows["index"].to_list(), found, strict=True):
                texts[index] = text
        for doc_id, marked, digest in zip(documents["doc_id"], texts, documents["sha256"], strict=True):
            if hashlib.sha256(marked.text.encode()).hexdigest() != digest:
                raise self._changed(doc_id)
        return texts

    def _changed(self, doc_id: int) -> DataError:
        problem = f"Document {doc_id} changed since the corpus was planned."
        if self.plan.summary.get("reader", 1) < READER:
            problem = f"Document {doc_id} has moved since the corpus was planned: an earlier version read the files in another order."
        return DataError(f"{problem} Restore {self.data_files.where}, or use another --workspace.")

    @cached_property
    def _read_texts(self) -> ReadTexts:
        found = self._open_texts()
        if found is None:
            self.read_data_files()
            found = self._open_texts()
        assert found is not None
        return found

    def _open_texts(self) -> ReadTexts | None:
        return ReadTexts.open(self.dataset.folder)

    def read_data_files(self) -> ChosenDocuments:
        """Read all files, and keep its texts until the parts are made.

        Raises:
            DataError: see `choose_documents`.
        """
        with writing_texts(self.dataset.folder) as texts:
            return choose_documents(self.config, data_files=self.data_files, chat=self.chat, texts=texts)

    def prepare(self) -> None:
        """Make the texts available before several workers need them."""
        if self._open_texts() is None:
            self.read_data_files()

    def finish(self) -> None:
        """Remove the texts after all parts are made."""
        remove_texts(self.dataset.folder)

    def _make_plan(self) -> "CorpusPlan":
        return CorpusPlan.commit(self.dataset, self.read_data_files())


def _corpus_stage(
    dataset: Dataset, config: CorpusConfig, data_files: DataFiles, tokenizer_folders: list[Path], chat: CorpusTemplate | None
) -> CorpusStage:
    return CorpusStage(dataset, config=config, data_files=data_files, tokenizer_folders=tokenizer_folders, chat=chat)


class CorpusPlan:
    """The documents of a corpus and their parts."""

    def __init__(self, documents: pl.DataFrame, summary: dict[str, Any]) -> None:
        self.documents, self.summary = documents, summary

    @property
    def parts(self) -> list[dict[str, Any]]:
        """For each part its split and its numbers of documents and bytes."""
        return self.summary["parts"]

    @classmethod
    def load(cls, dataset: Dataset) -> "CorpusPlan | None":
        """The committed plan of a corpus, or None if there is none."""
        summary = read_plan(dataset.folder)
        return None if summary is None else cls(read_documents(dataset.folder, summary=summary), summary)

    @classmethod
    def commit(cls, dataset: Dataset, chosen: ChosenDocuments) -> "CorpusPlan":
        """Write the plan."""
        documents = chosen.documents
        summary = {
            "reader": READER,
            "documents": len(documents),
            "duplicates": chosen.n_duplicates,
            "empty": chosen.n_empty,
            **({"refused": len(chosen.refused), "why_refused": chosen.refused[:_SHOWN]} if chosen.refused else {}),
            "text_bytes": int(documents["n_bytes"].sum()),
            "parts": parts_of(documents),
        }
        write_plan(dataset.folder, documents=documents, summary=summary)
        return cls(documents, summary)
