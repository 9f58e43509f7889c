"""SQL over stored distributions, against DuckDB reading the same rows from Parquet, on a synthetic store.

python benchmarks/sql.py FOLDER [--positions 20_000_000]

The store (one model, k = 10, documents of about 1,000 tokens, parts of 1M) and its Parquet twin are made in FOLDER, if they are not there.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
from fuseline.store import catalog
from fuseline.store.corpus_plan import write_plan
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.workspace import Workspace
from timer import timed

K, VOCAB_SIZE, PART_TOKENS, DOMAINS = 10, 49_152, 1_000_000, ("code", "patents", "philosophy", "web")
QUERIES = {
    "one document, every column": "SELECT * FROM positions WHERE model = 'synthetic' AND doc_id = {doc_id}",
    "one document, by rank": ("SELECT position, rank, token_id, logprob FROM distributions WHERE doc_id = {doc_id}"),
    "mean entropy over 1M tokens": "SELECT avg(entropy) FROM positions WHERE part = 3",
    "mean entropy by domain, all positions": "SELECT domain, avg(entropy) FROM positions GROUP BY domain",
    "positions that surprise, all": "SELECT count(*) FROM positions WHERE gold_logprob < -9 AND domain IN ('code', 'web')",
    "mean log-probability by rank, all rows": "SELECT rank, avg(logprob) FROM distributions GROUP BY rank",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--positions", type=int, default=20_000_000)
    arguments = parser.parse_args()
    root, n_parts = arguments.folder / "workspace", arguments.positions // PART_TOKENS
    if not (root / "catalog.duckdb").exists():
        build(root, parquet=arguments.folder / "parquet", n_parts=n_parts)
    n_documents = Workspace.open(root).sql("SELECT count(*) AS n FROM documents")["n"].item()
    print(f"{n_parts}M positions × {K}; DuckDB {duckdb.__version__}")
    print(f"{'query':50} {'store':>10} {'memory':>9} {'Parquet':>10} {'ratio':>6}   read")
    for title, query in QUERIES.items():
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as ours, context.Pool(1) as theirs:  # a process each, for its memory
            doc_ids = np.random.default_rng(7).integers(0, n_documents, 15).tolist()
            seconds, peak, read = ours.apply(measure, (ask_store, root, query, doc_ids))
            parquet_seconds, _, _ = theirs.apply(measure, (ask_parquet, arguments.folder / "parquet", query, doc_ids))
        ratio = seconds / parquet_seconds
        print(f"{title:50} {seconds * 1e3:7.1f} ms {peak / 1e9:6.2f} GB {parquet_seconds * 1e3:7.1f} ms {ratio:6.2f}   {read}")


def measure(
    ask: Callable[[Path, str, list[int]], tuple[list[float], str]], folder: Path, query: str, doc_ids: list[int]
) -> tuple[float, int, str]:
    """Median seconds of a warm query, peak resident bytes of the process, and what was read."""
    seconds, read = ask(folder, query, doc_ids)
    return statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, read


def ask_store(root: Path, query: str, doc_ids: list[int]) -> tuple[list[float], str]:
    """Seconds of the query over an open connection, for several documents at random where it is of one; the first one is not counted."""
    workspace = Workspace.open(root)
    with workspace.database.connect():
        seconds = _repeat(workspace.sql, query, doc_ids)
    stats = workspace.database.stats
    return seconds, f"{stats.chunks} chunks, {stats.stored_bytes / 1e6:.2f} MB"


def ask_parquet(folder: Path, query: str, doc_ids: list[int]) -> tuple[list[float], str]:
    """The same of the Parquet twin."""
    connection = duckdb.connect()
    for table in ("positions", "distributions"):
        connection.execute(f"CREATE VIEW {table} AS SELECT * FROM read_parquet('{folder}/{table}-*.parquet')")
    return _repeat(lambda text: connection.sql(text).pl(), query, doc_ids), ""


def _repeat(ask: Callable[[str], object], query: str, doc_ids: list[int]) -> list[float]:
    seconds = []
    for doc_id in doc_ids if "{doc_id}" in query else doc_ids[:4]:
        text = query.format(doc_id=doc_id)
        seconds.append(timed(lambda text=text: ask(text)).wall)
    return seconds[1:]


def build(root: Path, *, parquet: Path, n_parts: int) -> None:
    """The synthetic workspace, and its rows as Parquet (zstd; sorted by document, so that row groups can be skipped)."""
    workspace, rng = Workspace.create(root), np.random.default_rng(0)
    parquet.mkdir(parents=True, exist_ok=True)
    lengths = [np.maximum(rng.normal(1000, 300, PART_TOKENS // 1000), 50).astype(np.int64) for _ in range(n_parts)]
    documents = _write_corpus(workspace, lengths=lengths, rng=rng)
    _write_tokenizer(workspace.folder("tokenizers", "digest"))
    identity = {"tokenizer": "digest", "top_k": K, "codec": "f16"}
    dataset = workspace.dataset("distributions", "synthetic", identity=identity, description={"model": "synthetic", "corpus": "corpus"})
    for part in range(n_parts):
        arrays = _arrays(rng, lengths_S=lengths[part], doc_id_S=documents.filter(pl.col("part") == part)["doc_id"].to_numpy())
        n = len(arrays["token_ids_T"])
        dataset.commit(part, content=PartContent(data=arrays, counts={"tokens": n}, attributes={"quarantined": []}), seconds=1)
        _write_parquet(parquet, arrays=arrays, documents=documents, part=part)
        print(f"part {part + 1}/{n_parts}", flush=True)
    catalog.fold(workspace)


def _write_corpus(workspace: Workspace, *, lengths: list[np.ndarray], rng: np.random.Generator) -> pl.DataFrame:
    n = sum(map(len, lengths))
    part_D = np.repeat(np.arange(len(lengths)), [len(of_part) for of_part in lengths])
    documents = pl.DataFrame(
        {"source_split": "train", "row": range(n), "split": "train", "domain": rng.choice(DOMAINS, n), "sha256": "", "n_bytes": 4000,
         "doc_id": range(n), "part": part_D},
    )  # fmt: skip
    dataset = Dataset.create(workspace.folder("corpus", "corpus"), identity={"segmented_for": []}, description={})
    parts = [{"split": "train", "documents": len(of_part)} for of_part in lengths]
    summary = {"documents": n, "duplicates": 0, "empty": 0, "text_bytes": 4000 * n, "parts": parts}
    write_plan(dataset.folder, documents=documents, summary=summary)
    return documents


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "settings.json").write_text(json.dumps({"roles": {"bos": None, "eos": None}, "prepends_bos": False}))
    table = {"token_id": range(VOCAB_SIZE), "bytes": [f" t{token_id}".encode() for token_id in range(VOCAB_SIZE)], "is_special": False}
    pl.DataFrame(table).write_parquet(folder / "token_bytes.parquet")


def _arrays(rng: np.random.Generator, *, lengths_S: np.ndarray, doc_id_S: np.ndarray) -> dict[str, np.ndarray]:
    n, n_segments = int(lengths_S.sum()), len(lengths_S)
    ids_TK = np.minimum(rng.zipf(1.2, (n, K)), VOCAB_SIZE - 1).astype(np.uint16)
    probs_TK = np.sort(rng.dirichlet(np.full(K + 1, 0.3), n).astype(np.float32), axis=1)[:, ::-1]
    with np.errstate(divide="ignore"):
        logprobs_TK = np.maximum(np.log(probs_TK), -20).astype(np.float16)
    offsets = np.concatenate([[0], np.cumsum(lengths_S)])
    gold_T = logprobs_TK[np.arange(n), rng.integers(0, K, n)]
    gold_T[offsets[1:] - 1] = np.nan
    return {
        "token_ids_T": ids_TK[:, 0].copy(),
        "topk_ids_TK": ids_TK,
        "topk_logprobs_TK": logprobs_TK[:, :K].copy(),
        "tail_logprob_T": logprobs_TK[:, K].copy(),
        "gold_logprob_T": gold_T,
        "entropy_T": -(probs_TK * logprobs_TK).sum(axis=1).astype(np.float16),
        "segment_offsets": offsets,
        "doc_id_S": doc_id_S.astype(np.int64),
        "segment_S": np.zeros(n_segments, np.int64),
        **{name: np.ones(n_segments, np.uint32) for name in ("n_bytes_S", "n_scored_S", "scored_bytes_S")},
        "nll_S": np.ones(n_segments),
    }


def _write_parquet(folder: Path, *, arrays: dict[str, np.ndarray], documents: pl.DataFrame, part: int) -> None:
    lengths_S = np.diff(arrays["segment_offsets"])
    n, doc_id_T = int(lengths_S.sum()), np.repeat(arrays["doc_id_S"], lengths_S)
    position_T = np.arange(n) - np.repeat(arrays["segment_offsets"][:-1], lengths_S)
    domain_T = documents["domain"].cast(pl.Categorical).gather(doc_id_T)
    token_T = pl.Series(arrays["token_ids_T"]).cast(pl.UInt32)
    floats = {name: arrays[f"{name}_T"].astype(np.float32) for name in ("gold_logprob", "tail_logprob", "entropy")}
    shared = {"model": pl.repeat("synthetic", n, eager=True), "domain": domain_T, "part": np.full(n, part, np.int32), "doc_id": doc_id_T}
    wide = shared | {"position": position_T.astype(np.int32), "token_id": token_T, "token": " t" + token_T.cast(pl.String), **floats}
    wide |= {
        "topk_ids": pl.Series(arrays["topk_ids_TK"].astype(np.uint32)),
        "topk_logprobs": pl.Series(arrays["topk_logprobs_TK"].astype(np.float32)),
    }
    pl.DataFrame(wide).write_parquet(folder / f"positions-{part:05d}.parquet", compression="zstd", row_group_size=122_880)
    long = {
        "doc_id": np.repeat(doc_id_T, K),
        "position": np.repeat(position_T, K).astype(np.int32),
        "rank": np.tile(np.arange(K, dtype=np.uint16), n),
        "token_id": arrays["topk_ids_TK"].ravel().astype(np.uint32),
        "logprob": arrays["topk_logprobs_TK"].ravel().astype(np.float32),
    }
    pl.DataFrame(long).write_parquet(folder / f"distributions-{part:05d}.parquet", compression="zstd", row_group_size=122_880)


if __name__ == "__main__":
    main()
