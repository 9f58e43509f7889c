"""The `[corpus]` of a recipe."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .chat.config import ChatConfig


class CorpusConfig(BaseModel):
    """The `[corpus]` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field("corpus", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the data set in the workspace")
    path: str = Field(description="dataset id on the Hugging Face hub, or a file or folder of parquet, jsonl, csv or txt files")
    splits: dict[str, str | list[str]] | None = Field(
        None,
        description="the files or folders of each split, by their names below `path` (`*` matches any characters except `/`); by default "
        "all files are in the split `train`",
    )
    revision: str | None = Field(None, description="commit, tag or branch of a hub dataset")
    configuration: str | None = Field(None, description="configuration of a hub dataset that has several")
    chat: ChatConfig | None = Field(None, description="the documents are conversations")
    text_column: str = Field("text", description="column that holds the text; without [corpus.chat]")
    domain_column: str | None = Field(
        None, description="column that holds each document's domain; by default all documents have one domain"
    )
    split_column: str | None = Field(None, description="column that holds each document's split, for files that mix them")
    held_out_fraction: float = Field(0.0, ge=0, lt=1, description="share of the train documents to move to the split `test`, by their hash")
    max_train_bytes: int | None = Field(None, gt=0, description="use only about this many bytes of the train split")
    keep_duplicates: bool = Field(False, description="keep documents with the same text more than once")
    context_length: int = Field(2048, ge=16, description="most tokens of a segment, with every model's tokenizer")
    part_bytes: int = Field(4 << 20, ge=1024, description="bytes of text of a part, the unit of work and of commit")
    seed: int = Field(0, ge=0, description="seed of the order of documents")
    expected_documents: int | None = Field(None, gt=0, description="for --dry-run if the corpus is not available: documents to train on")
    expected_bytes: int | None = Field(None, gt=0, description="for --dry-run if the corpus is not available: bytes to train on")
    expected_held_out_bytes: int | None = Field(
        None, gt=0, description="for --dry-run if the corpus is not available: bytes to evaluate on"
    )

    @model_validator(mode="after")
    def _text_or_chat(self) -> "CorpusConfig":
        if self.chat is not None and "text_column" in self.model_fields_set:
            raise ValueError(f"text_column ({self.text_column!r}) must not be given with [corpus.chat]: name the column in chat.column")
        return self

    @model_validator(mode="after")
    def _one_word_on_splits(self) -> "CorpusConfig":
        if self.splits is not None and self.split_column:
            raise ValueError(f"split_column ({self.split_column!r}) must not be given with [corpus.splits]: remove one of them")
        return self

    @model_validator(mode="after")
    def _held_out_needs_no_split(self) -> "CorpusConfig":
        if self.held_out_fraction and self.split_column:
            raise ValueError(
                f"held_out_fraction ({self.held_out_fraction}) must be 0 if split_column ({self.split_column!r}) gives the split"
            )
        return self


def corpus_choices(config: CorpusConfig) -> dict[str, Any]:
    """The part of a corpus's identity that the recipe alone determines."""
    free = {"name", "path", "revision", "expected_documents", "expected_bytes", "expected_held_out_bytes"}
    unset = {key for key in ("splits", "configuration") if getattr(config, key) is None}  # keys that the first corpora did not have
    chosen = {"stage": "corpus/1", **config.model_dump(exclude=free | unset | {"chat"})}
    if config.chat is not None:
        del chosen["text_column"]
        chosen["chat"] = config.chat.model_dump(include={"format", "column"})
    return chosen
