"""Builds a small workspace of random arrays through the store itself, and all rows that SQL must find in it, one by one."""

import json
from pathlib import Path

import numpy as np
import polars as pl
from fuseline.store import catalog
from fuseline.store.corpus_plan import write_plan
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.targets import ONE_HOT, SEVERAL
from fuseline.store.workspace import Workspace

DOMAINS = ["code", "law", "position"]  # one of them is also the name of a column
VOCAB_SIZE = {"alpha": 40, "beta": 70_000}
TOP_K = {"alpha": 3, "beta": 2}
Row = dict[str, object]


def build_store(root: Path, *, seed: int = 0, segment_tokens: int = 12) -> dict[str, pl.DataFrame]:
    """Two corpora, two models (one leaves documents out), held-out likelihoods, an alignment and fused targets.

    Returns the rows of `positions`, `distributions`, `alignments`, `targets`, in order, made with plain loops.
    """
    rng = np.random.default_rng(seed)
    workspace = Workspace.create(root)
    for model, size in VOCAB_SIZE.items():
        _write_tokenizer(workspace.folder("tokenizers", model), size=size)
    rows: dict[str, list[Row]] = {name: [] for name in ("positions", "distributions", "alignments", "targets")}
    places = {name: _write_corpus(workspace, name, rng=rng, n_parts=n_parts) for name, n_parts in (("first", 4), ("second", 2))}
    for corpus, documents in places.items():
        train, test = (documents.filter(split=split) for split in ("train", "test"))
        own = _write_forward(workspace, "alpha", corpus, train, rng=rng, rows=rows, segment_tokens=segment_tokens)
        source = _write_forward(workspace, "beta", corpus, train, rng=rng, rows=rows, segment_tokens=segment_tokens)
        _write_forward(workspace, "alpha", corpus, test, rng=rng, rows=rows, segment_tokens=segment_tokens, kind="evaluations")
        _write_alignment(workspace, corpus, source=source, target=own, documents=train, rng=rng, rows=rows)
        _write_targets(workspace, corpus, own=own, documents=train, rng=rng, rows=rows)
    _write_twin(workspace, rows=rows)
    catalog.fold(workspace)
    order = {"positions": ["kind"], "distributions": ["kind"], "alignments": [], "targets": []}
    frames = {name: pl.DataFrame(found, infer_schema_length=None) for name, found in rows.items()}
    return {name: frame.drop(order[name]) for name, frame in frames.items()}


def _write_twin(workspace: Workspace, *, rows: dict[str, list[Row]]) -> None:
    """The same distributions under another name, as after a model was renamed: their fingerprint is the same."""
    first = Dataset.open(workspace.folder("distributions", "alpha-second"))
    twin = workspace.dataset("distributions", "twin-second", identity=first.identity, description={**first.description, "model": "twin"})
    for part in first.parts():
        opened = first.arrays(part)
        content = PartContent(data={name: opened.read(name) for name in opened.names}, counts={}, attributes=opened.attributes)
        twin.commit(part, content=content, seconds=1)
    for table in ("positions", "distributions"):
        of_first = [row for row in rows[table] if (row["model"], row["corpus"], row["split"]) == ("alpha", "second", "train")]
        rows[table] += [row | {"model": "twin"} for row in of_first]


def text_of(model: str, token_id: int) -> str:
    """What a token of the made-up tokenizers stands for."""
    return "<s>" if token_id == 0 else "\\xe2" if token_id == 1 else f" {model[0]}{token_id}"


def _write_tokenizer(folder: Path, *, size: int) -> None:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 0, "content": "<s>"}], "model": {"vocab": {}}}))
    (folder / "settings.json").write_text(json.dumps({"roles": {"bos": 0, "eos": None}, "prepends_bos": True}))
    data = [b"", b"\xe2", *(text_of(folder.name, token_id).encode() for token_id in range(2, size))]
    table = {"token_id": range(size), "bytes": data, "is_special": [True] + [False] * (size - 1)}
    pl.DataFrame(table).write_parquet(folder / "token_bytes.parquet")


def _write_corpus(workspace: Workspace, name: str, *, rng: np.random.Generator, n_parts: int) -> pl.DataFrame:
    """Documents in parts of which the last is held out."""
    parts = np.repeat(np.arange(n_parts), rng.integers(1, 7, n_parts))
    documents = pl.DataFrame(
        {
            "source_split": "train",
            "row": range(len(parts)),
            "split": ["test" if part == n_parts - 1 else "train" for part in parts],
            "domain": rng.choice(DOMAINS, len(parts)),
            "sha256": "",
            "n_bytes": 100,
            "doc_id": range(len(parts)),
            "part": parts,
        }
    )
    dataset = Dataset.create(workspace.folder("corpus", name), identity={"corpus": name, "segmented_for": []})
    parts_of = [{"split": group["split"][0], "documents": len(group)} for _, group in documents.group_by("part", maintain_order=True)]
    summary = {"documents": len(parts), "duplicates": 0, "empty": 0, "text_bytes": 100 * len(parts), "parts": parts_of}
    write_plan(dataset.folder, documents=documents, summary=summary)
    for part in range(n_parts):
        of_part = documents.filter(part=part).select("doc_id", "domain", "split", "sha256")
        table = of_part.with_columns(segment=pl.lit(0, pl.UInt32), text=pl.format("text {}", "doc_id"))
        dataset.commit(part, content=PartContent(data=table, counts={}), seconds=1)
    return documents


def _write_forward(
    workspace: Workspace, model: str, corpus: str, documents: pl.DataFrame, *, rng: np.random.Generator, rows: dict[str, list[Row]],
    segment_tokens: int, kind: str = "distributions",
) -> Dataset:  # fmt: skip
    k = TOP_K[model] if kind == "distributions" else 0
    identity = {"corpus": corpus, "tokenizer": model, "top_k": k, "codec": "f16"}
    dataset = workspace.dataset(kind, f"{model}-{corpus}", identity=identity, description={"model": model, "corpus": corpus})
    dtype = np.uint16 if VOCAB_SIZE[model] <= 65_536 else np.uint32
    for (part,), of_part in documents.sort("doc_id").group_by("part", maintain_order=True):
        keys = [(row, segment) for row in of_part.iter_rows(named=True) for segment in range(int(rng.integers(1, 4)))]
        if model == "beta":
            keys = [(row, segment) for row, segment in keys if row["doc_id"] % 4 != 1]  # left out
        lengths = rng.integers(1, segment_tokens, len(keys))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        n = int(offsets[-1])
        arrays = {
            "token_ids_T": rng.integers(0, VOCAB_SIZE[model], n).astype(dtype),
            "gold_logprob_T": -rng.exponential(4, n).astype(np.float16),
            "entropy_T": rng.exponential(2, n).astype(np.float16),
            "segment_offsets": offsets,
            "doc_id_S": np.array([row["doc_id"] for row, _ in keys], np.int64),
            "segment_S": np.array([segment for _, segment in keys], np.uint32),
            **{name: np.ones(len(keys), np.uint32) for name in ("n_bytes_S", "n_scored_S", "scored_bytes_S")},
            "nll_S": np.ones(len(keys)),
        }
        arrays["gold_logprob_T"][offsets[1:] - 1] = np.nan
        if model == "beta":  # as of conversations
            arrays["label_mask_T"] = rng.random(n) < 0.5
        if k:
            arrays["topk_ids_TK"] = rng.integers(0, VOCAB_SIZE[model], (n, k)).astype(dtype)
            arrays["topk_logprobs_TK"] = -np.sort(rng.exponential(3, (n, k))).astype(np.float16)
            arrays["tail_logprob_T"] = -rng.exponential(1, n).astype(np.float16)
        dataset.commit(int(part), content=PartContent(data=arrays, counts={"tokens": n}, attributes={"quarantined": []}), seconds=1)
        for s, (document, segment) in enumerate(keys):
            place = {"model": model, "corpus": corpus, "domain": document["domain"], "split": document["split"], "part": int(part),
                     "doc_id": document["doc_id"], "segment": segment}  # fmt: skip
            for t in range(offsets[s], offsets[s + 1]):
                _add_rows(
                    rows, place | {"position": t - int(offsets[s]), "kind": kind}, model=model, arrays=arrays, t=t, end=offsets[s + 1]
                )
    return dataset


def _add_rows(rows: dict[str, list[Row]], place: Row, *, model: str, arrays: dict[str, np.ndarray], t: int, end: int) -> None:
    token_id = int(arrays["token_ids_T"][t])
    row = place | {"token_id": token_id, "token": text_of(model, token_id)} | _gold(model, arrays, t=t, end=end)
    row["gold_logprob"] = float(arrays["gold_logprob_T"][t]) if t + 1 < end else None
    row["is_label"] = bool(arrays["label_mask_T"][t]) if "label_mask_T" in arrays else bool(t + 1 < end)
    has_topk = "topk_ids_TK" in arrays
    row["tail_logprob"] = float(arrays["tail_logprob_T"][t]) if has_topk else None
    row["entropy"] = float(arrays["entropy_T"][t])
    row |= _topk(model, arrays, t=t) if has_topk else dict.fromkeys(("topk_ids", "topk_tokens", "topk_logprobs"))
    rows["positions"].append(row)
    for rank in range(arrays["topk_ids_TK"].shape[1] if has_topk else 0):
        token_id = int(arrays["topk_ids_TK"][t, rank])
        entry = {
            "rank": rank,
            "token_id": token_id,
            "token": text_of(model, token_id),
            "logprob": float(arrays["topk_logprobs_TK"][t, rank]),
        }
        rows["distributions"].append(place | entry)


def _gold(model: str, arrays: dict[str, np.ndarray], *, t: int, end: int) -> Row:
    if t + 1 == end:
        return {"gold_id": None, "gold_token": None}
    gold_id = int(arrays["token_ids_T"][t + 1])
    return {"gold_id": gold_id, "gold_token": text_of(model, gold_id)}


def _topk(model: str, arrays: dict[str, np.ndarray], *, t: int) -> Row:
    ids = [int(i) for i, p in zip(arrays["topk_ids_TK"][t], arrays["topk_logprobs_TK"][t], strict=True) if np.isfinite(p)]
    logprobs = [float(p) for p in arrays["topk_logprobs_TK"][t] if np.isfinite(p)]
    return {"topk_ids": ids, "topk_tokens": [text_of(model, token_id) for token_id in ids], "topk_logprobs": logprobs}


def _fused_gold(arrays: dict[str, np.ndarray], *, t: int, end: int) -> float | None:
    if t + 1 == end:
        return None
    entries = zip(arrays["topk_ids_TK"][t], arrays["topk_logprobs_TK"][t], strict=True)
    return max((float(p) for i, p in entries if i == arrays["token_ids_T"][t + 1]), default=-np.inf)


def _write_alignment(
    workspace: Workspace, corpus: str, *, source: Dataset, target: Dataset, documents: pl.DataFrame, rng: np.random.Generator,
    rows: dict[str, list[Row]],
) -> None:  # fmt: skip
    identity = {"source": source.fingerprint, "target": target.fingerprint}
    dataset = workspace.dataset("alignments", f"beta-{corpus}--alpha-{corpus}", identity=identity, description={"corpus": corpus})
    facts = {row["doc_id"]: row for row in documents.iter_rows(named=True)}
    for part in target.parts():
        ids_T, offsets, doc_id_S, segment_S = target.read(part, "token_ids_T", "segment_offsets", "doc_id_S", "segment_S")
        source_ids_T, source_offsets, source_doc_id_S, source_segment_S = source.read(
            part, "token_ids_T", "segment_offsets", "doc_id_S", "segment_S"
        )
        place_of = {key: s for s, key in enumerate(zip(source_doc_id_S.tolist(), source_segment_S.tolist(), strict=True))}
        position_T, ahead_T = np.full(len(ids_T), -1, np.int32), np.zeros(len(ids_T), np.uint16)
        covers = bool(rng.integers(2))
        for s, key in enumerate(zip(doc_id_S.tolist(), segment_S.tolist(), strict=True)):
            for t in range(offsets[s], offsets[s + 1]):
                if key in place_of and rng.random() < 0.7:
                    first, stop = source_offsets[place_of[key] : place_of[key] + 2]
                    position_T[t] = rng.integers(first, stop)
                    ahead_T[t] = rng.integers(3) if covers else 0
                row = facts[key[0]]
                aligned = int(position_T[t])
                start = int(source_offsets[place_of[key]]) if key in place_of else 0
                rows["alignments"].append(
                    {"name": dataset.name,
                     "source": f"beta-{corpus}", "target": f"alpha-{corpus}", "corpus": corpus, "domain": row["domain"],
                     "split": row["split"], "part": part, "doc_id": key[0], "segment": key[1], "position": t - int(offsets[s]),
                     "token_id": int(ids_T[t]),
                     "token": text_of("alpha", int(ids_T[t])), "source_position": None if aligned < 0 else aligned - start,
                     "bytes_ahead": None if aligned < 0 else int(ahead_T[t]),
                     "source_token_id": None if aligned < 0 else int(source_ids_T[aligned]),
                     "source_token": None if aligned < 0 else text_of("beta", int(source_ids_T[aligned]))}
                )  # fmt: skip
        lengths = np.diff(offsets)
        arrays = {"source_position_T": position_T, "doc_id_S": doc_id_S, "segment_S": segment_S, "n_positions_S": lengths,
                  "n_aligned_S": np.add.reduceat(position_T >= 0, offsets[:-1]).astype(np.int64)}  # fmt: skip
        arrays |= {"ahead_T": ahead_T} if covers else {}
        dataset.commit(part, content=PartContent(data=arrays, counts={}), seconds=1)


def _write_targets(
    workspace: Workspace, corpus: str, *, own: Dataset, documents: pl.DataFrame, rng: np.random.Generator, rows: dict[str, list[Row]]
) -> None:
    dataset = workspace.dataset(
        "targets", f"fused-{corpus}", identity={"sources": [[own.fingerprint]], "top_k": 4}, description={"corpus": corpus}
    )
    facts = {row["doc_id"]: row for row in documents.iter_rows(named=True)}
    names = ["alpha", "beta"]
    for part in own.parts():
        ids_T, offsets, doc_id_S, segment_S = own.read(part, "token_ids_T", "segment_offsets", "doc_id_S", "segment_S")
        n = len(ids_T)
        logprobs_TK = -np.sort(rng.exponential(3, (n, 4))).astype(np.float16)
        logprobs_TK[np.arange(4) >= rng.integers(0, 5, n)[:, None]] = -np.inf
        arrays = {
            "token_ids_T": ids_T, "segment_offsets": offsets, "doc_id_S": doc_id_S, "segment_S": segment_S,
            "topk_ids_TK": rng.integers(0, VOCAB_SIZE["alpha"], (n, 4)).astype(np.uint16), "topk_logprobs_TK": logprobs_TK,
            "tail_logprob_T": -rng.exponential(1, n).astype(np.float16),
            "source_T": rng.choice([0, 1, ONE_HOT, SEVERAL], n).astype(np.uint8),
            "source_S": np.zeros(len(doc_id_S), np.uint8), "lost_mass_S": np.zeros(len(doc_id_S), np.float32),
        }  # fmt: skip
        dataset.commit(
            part, content=PartContent(data=arrays, counts={"tokens": n}, attributes={"sources": names, "one_hot": "next token"}), seconds=1
        )
        for s, (doc_id, segment) in enumerate(zip(doc_id_S.tolist(), segment_S.tolist(), strict=True)):
            row = facts[doc_id]
            for t in range(offsets[s], offsets[s + 1]):
                rows["targets"].append(
                    {"name": f"fused-{corpus}", "corpus": corpus, "domain": row["domain"], "split": row["split"], "part": part,
                     "doc_id": doc_id, "segment": segment, "position": t - int(offsets[s]), "token_id": int(ids_T[t]),
                     "token": text_of("alpha", int(ids_T[t])), **_gold("alpha", arrays, t=t, end=offsets[s + 1]),
                     "gold_logprob": _fused_gold(arrays, t=t, end=offsets[s + 1]), "is_label": bool(t + 1 < offsets[s + 1]),
                     "source": {0: "alpha", 1: "beta", ONE_HOT: "next token", SEVERAL: None}[int(arrays["source_T"][t])],
                     "tail_logprob": float(arrays["tail_logprob_T"][t]), **_topk("alpha", arrays, t=t)}
                )  # fmt: skip
