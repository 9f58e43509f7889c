"""A small workspace of every kind of dataset that fits together, made without running a model."""

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
from fuseline.store import catalog
from fuseline.store.corpus_plan import write_plan
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.workspace import Workspace

TEXTS = ["one text", "Two\ntexts, of two segments", "drei"]


def small_workspace(root: Path, *, tokenizer_folder: Path) -> Workspace:
    """A corpus of two parts, two models' distributions (one in q8), an alignment, a vocabulary map and targets; and the catalog."""
    workspace = Workspace.create(root)
    tokenizer = Tokenizer.from_model_folder(tokenizer_folder)
    tokenizer.save(workspace.folder("tokenizers", tokenizer.digest))
    corpus = workspace.dataset("corpus", "corpus", identity={"context_length": 64, "segmented_for": [tokenizer.digest]})
    table = _corpus_table()
    documents = table.group_by("doc_id", maintain_order=True).agg(
        pl.first("split", "domain", "sha256"), n_bytes=pl.col("text").str.len_bytes().sum().cast(pl.Int64)
    )
    documents = documents.with_columns(part=pl.Series([0, 0, 1], dtype=pl.Int32), source_split=pl.lit("train"), row=pl.col("doc_id"))
    parts = [{"split": "train", "documents": 2, "text_bytes": 34}, {"split": "train", "documents": 1, "text_bytes": 4}]
    summary = {"documents": 3, "duplicates": 0, "empty": 0, "text_bytes": 38, "parts": parts}
    write_plan(corpus.folder, documents=documents, summary=summary)
    for part, rows in enumerate([table.filter(pl.col("doc_id") < 2), table.filter(pl.col("doc_id") == 2)]):
        counts = {"documents": rows["doc_id"].n_unique(), "segments": len(rows), "text_bytes": 1}
        corpus.commit(part, content=PartContent(data=rows, counts=counts), seconds=1)
    target = _distributions(workspace, "target", corpus=corpus, tokenizer=tokenizer, codec="f16")
    source = _distributions(workspace, "source", corpus=corpus, tokenizer=tokenizer, codec="q8")
    facts = {"corpus": "corpus"}
    alignment = workspace.dataset(
        "alignments", "source--target", identity={"source": source.fingerprint, "target": target.fingerprint}, description=facts
    )
    vocab_map = workspace.dataset("vocab_maps", "source--target", identity={"source": tokenizer.digest, "target": tokenizer.digest})
    rules = pl.DataFrame({"source_id": [0, 1], "target_id": [0, None], "rule": ["exact", "none"]})
    vocab_map.commit(0, content=PartContent(data=rules, counts={"mapped": 1}), seconds=0)
    sources = [[target.fingerprint], [source.fingerprint, alignment.fingerprint, vocab_map.fingerprint]]
    targets = workspace.dataset("targets", "fused", identity={"sources": sources}, description=facts)
    for part in (0, 1):
        doc_id_S, segment_S, offsets, token_ids_T, topk_ids_TK, topk_logprobs_TK = target.read(
            part, "doc_id_S", "segment_S", "segment_offsets", "token_ids_T", "topk_ids_TK", "topk_logprobs_TK"
        )
        n_tokens, n_segments = len(token_ids_T), len(doc_id_S)
        counts = {"tokens": n_tokens, "segments": n_segments}
        keys = {"doc_id_S": doc_id_S, "segment_S": segment_S}
        arrays = keys | {
            "source_position_T": np.arange(n_tokens, dtype=np.int32),
            "n_positions_S": np.diff(offsets).astype(np.uint32),
            "n_aligned_S": np.diff(offsets).astype(np.uint32),
        }
        alignment.commit(part, content=PartContent(data=arrays, counts=counts), seconds=0)
        arrays = keys | {
            "segment_offsets": offsets,
            "token_ids_T": token_ids_T,
            "topk_ids_TK": topk_ids_TK,
            "topk_logprobs_TK": topk_logprobs_TK,
            "source_T": np.zeros(n_tokens, np.uint8),
            "source_S": np.zeros(n_segments, np.uint8),
            "lost_mass_S": np.zeros(n_segments, np.float32),
            **_contributions(offsets),
        }
        targets.commit(part, content=PartContent(data=arrays, counts=counts, attributes={"sources": ["target", "source"]}), seconds=0)
    catalog.fold(workspace)
    return workspace


def _contributions(offsets: np.ndarray) -> dict[str, np.ndarray]:
    """What two sources bring: the first has all the weight, the second loses half of its mass on the way."""
    n_positions_S = np.diff(offsets)
    values = {"weight_SN": [1, 0], "share_SN": [1, 0], "mapped_SN": [1, 0.5], "merged_SN": [0, 0], "lost_SN": [0, 0.5]}
    values |= {"tail_SN": [0, 0], "agreement_SN": [1, 0.25]}
    arrays = {name: np.tile(np.array(row, np.float32), (len(n_positions_S), 1)) for name, row in values.items()}
    arrays |= {name: np.full((len(n_positions_S), 2), np.nan, np.float32) for name in ("cost_SN", "nll_SN", "gold_nll_SN")}
    counts = {"n_spoken_SN": np.stack([n_positions_S, n_positions_S], axis=1), "n_gold_SN": np.zeros((len(n_positions_S), 2))}
    return arrays | {name: array.astype(np.uint32) for name, array in counts.items()}


def _corpus_table() -> pl.DataFrame:
    rows = []
    for doc_id, text in enumerate(TEXTS):
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        pieces = [text[:5], text[5:]] if doc_id == 1 else [text]
        rows += [(doc_id, segment, "all", "train", sha256, piece) for segment, piece in enumerate(pieces)]
    schema = {"doc_id": pl.Int64, "segment": pl.UInt32, "domain": pl.String, "split": pl.String, "sha256": pl.String, "text": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def distributions_content(tokenizer: Tokenizer, *, corpus: Dataset, part: int, seed: int, codec: str) -> PartContent:
    """Random distributions over a corpus part."""
    table = corpus.table(part)
    encoded = tokenizer.encode_segments(table["text"].to_list())
    n_tokens, n_segments = len(encoded.token_ids_T), len(table)
    random = np.random.default_rng([seed, part])
    logprobs_TK = -np.sort(random.gamma(1, 2, (n_tokens, 3)), axis=1).astype(np.float32)
    arrays = {
        "doc_id_S": table["doc_id"].to_numpy(),
        "segment_S": table["segment"].to_numpy(),
        "n_bytes_S": encoded.n_bytes_S.astype(np.uint32),
        "n_scored_S": np.ones(n_segments, np.uint32),
        "scored_bytes_S": np.ones(n_segments, np.uint32),
        "nll_S": random.random(n_segments),
        "segment_offsets": encoded.segment_offsets,
        "token_ids_T": encoded.token_ids_T,
        "topk_ids_TK": random.integers(0, tokenizer.vocab_size, (n_tokens, 3)).astype(np.uint16),
        "topk_logprobs_TK": logprobs_TK,
    }
    counts = {"documents": table["doc_id"].n_unique(), "segments": n_segments, "tokens": n_tokens, "quarantined": 0}
    return PartContent(data=arrays, counts=counts, attributes={"quarantined": []}, encodings={"topk_logprobs_TK": codec})


def _distributions(workspace: Workspace, name: str, *, corpus: Dataset, tokenizer: Tokenizer, codec: str) -> Dataset:
    dataset = workspace.dataset(
        "distributions",
        name,
        identity={"corpus": corpus.fingerprint, "tokenizer": tokenizer.digest, "codec": codec},
        description={"model": name, "corpus": "corpus", "vocab_size": tokenizer.vocab_size},
    )
    for part in (0, 1):
        content = distributions_content(tokenizer, corpus=corpus, part=part, seed=len(name), codec=codec)
        dataset.commit(part, content=content, seconds=1)
    return dataset
