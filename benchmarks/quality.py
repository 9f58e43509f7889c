"""How much of a source's knowledge arrives in the target's vocabulary: bits per byte of the text, by position map, vocabulary map and k.

    python benchmarks/quality.py WORKSPACE SOURCE TARGET

SOURCE and TARGET name distributions of the workspace, stored with the largest k asked for. A projection leaves some mass open (the tail,
what the map lost, positions where the source does not speak); that mass goes to the target's own, so that every row is a proper
distribution over the target's vocabulary: P = projection + open mass × target. `mixture` is half P, half the target.

With the gold anchor, and so with `cover`, the text's own probability is stored: these figures then say that nothing of it is lost or
counted twice, not whether the other entries lie right. That is what `overlap` is for: how much both models share of what they expect
instead of the text, Σ min(P(w), Q(w)) over all tokens w but the text's, of both top-k without it, each scaled to 1; at the positions that
`span` has, and `inside`, at the others.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from fuseline.align.alignments import AlignmentsStage
from fuseline.align.maps import VocabularyMapStage
from fuseline.align.matches import TokenMatchesStage
from fuseline.align.projection import Projection, SourcePart, project
from fuseline.align.sources import FusionSource, gold_ids, probabilities
from fuseline.pipeline.executors.work import Stage
from fuseline.store.dataset import Dataset
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.workspace import Workspace

_ROUNDING = 1e-4  # of a row of entries in float16: with less left open, nothing can be said of the rest
VARIANTS = [(positions, rule) for positions in ("span", "dtw") for rule in ("exact", "mined", "stat", "prefix")] + [("cover", "prefix")]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's distributions of a workspace."""

    dataset: Dataset
    tokenizer_folder: Path

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_folder)

    @classmethod
    def named(cls, workspace: Workspace, name: str) -> "Side":
        dataset = Dataset.open(workspace.folder("distributions", name))
        return cls(dataset=dataset, tokenizer_folder=workspace.folder("tokenizers", dataset.identity["tokenizer"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--top-k", type=int, nargs="+", default=[10, 32])
    arguments = parser.parse_args()
    workspace = Workspace.open(arguments.workspace)
    source, target = (Side.named(workspace, name) for name in (arguments.source, arguments.target))
    domains = dict(workspace.sql("SELECT doc_id, domain FROM documents").iter_rows())
    rows = list(measure(source, target, domains=domains, top_ks=arguments.top_k))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=4):
        print(pl.DataFrame(rows))


def measure(source: Side, target: Side, *, domains: dict[int, str], top_ks: list[int]) -> Iterator[dict[str, object]]:
    """A row per variant."""
    part = target.dataset.parts()[0]
    text = Text(target, part=part, domains=domains)
    for name, alone in (("target alone", text), ("source alone", Text(source, part=part, domains=domains))):
        yield {"positions": "", "map": name, "k": None, "anchor": None, **alone.bits_per_byte(alone.own_gold_T, prefix="source")}
    is_shared_T = np.zeros(0, np.bool_)
    for positions, rule in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            whole = aligned(source, target, part=part, positions=positions, rule=rule, folder=Path(folder))
        if positions == "span":
            is_shared_T = whole.position_T >= 0
        for k in top_ks:
            for anchor in {"cover": (True,), "span": (False, True), "dtw": (False,)}[positions]:
                first = {name: np.ascontiguousarray(getattr(whole, name)[:, :k]) for name in ("topk_ids_UK", "topk_probs_UK")}
                side = replace(whole, **first)
                projection = project(side, gold_ids_T=text.gold_ids_T, gold_anchor=anchor)
                here_T = projection_is_anchored(side, gold_ids_T=text.gold_ids_T) & anchor
                found_T = np.where(projection.is_aligned_T, np.nan_to_num(np.exp(projection.gold_logprob_T.astype(np.float64))), 0)
                open_T = (
                    np.where(projection.is_aligned_T, np.maximum(1 - projection.mapped_T - projection.merged_T, _ROUNDING), 1) * ~here_T
                )
                alone_T = found_T + open_T * text.own_gold_T
                yield {
                    "positions": positions, "map": rule, "k": k, "anchor": anchor,
                    **text.bits_per_byte(alone_T, prefix="source"), **text.bits_per_byte((alone_T + text.own_gold_T) / 2, prefix="mixture"),
                    "overlap": overlap(projection, text, k=k, where_T=text.is_scored_T & is_shared_T),
                    "inside": overlap(projection, text, k=k, where_T=text.is_scored_T & ~is_shared_T & projection.is_aligned_T),
                    "aligned": float(projection.is_aligned_T[text.is_scored_T].mean()),
                    "lost": float(projection.lost_T[text.is_scored_T].mean()),
                }  # fmt: skip


def projection_is_anchored(side: SourcePart, *, gold_ids_T: np.ndarray) -> np.ndarray:
    """Where the anchor knows the source's probability of the token that follows: nothing open is its."""
    next_T = np.append(side.position_T[1:], -1)
    is_there_T = (gold_ids_T >= 0) & (side.position_T >= 0) & (next_T >= 0)
    return is_there_T if side.ahead_T is not None else is_there_T & (next_T > side.position_T)


def overlap(projection: Projection, text: "Text", *, k: int, where_T: np.ndarray) -> float | None:
    """Mean over some positions of the mass that the projection and the target's own distribution share, beside the token that follows."""
    if not where_T.any():
        return None
    gold_T = text.gold_ids_T[where_T][:, None]
    ids_TC, own_ids_TK = projection.ids_TC[where_T], text.topk_ids_TK[where_T, :k].astype(np.int64)
    is_entry_TC = np.arange(ids_TC.shape[1]) < projection.n_T[where_T][:, None]
    probs_TC = np.where(is_entry_TC & (ids_TC != gold_T), projection.probs_TC[where_T], 0)
    own_probs_TK = np.where(own_ids_TK != gold_T, text.topk_probs_TK[where_T, :k], 0)
    gold_prob_T = np.where(is_entry_TC & (ids_TC == gold_T), projection.probs_TC[where_T], 0).sum(axis=1)
    probs_TC = probs_TC / np.maximum(1 - gold_prob_T, 1e-3)[:, None]
    own_probs_TK = own_probs_TK / np.maximum(1 - text.own_gold_T[where_T], 1e-3)[:, None]
    same_TCK = (ids_TC[:, :, None] == own_ids_TK[:, None, :]) & is_entry_TC[:, :, None]
    return float(np.where(same_TCK, np.minimum(probs_TC[:, :, None], own_probs_TK[:, None, :]), 0).sum(axis=(1, 2)).mean())


class Text:
    """The text in one model's tokens, and what that model gives it."""

    def __init__(self, side: Side, *, part: int, domains: dict[int, str]) -> None:
        token_ids_T, offsets, doc_id_S, gold_T, self._scored_bytes_S, self.topk_ids_TK, topk_logprobs_TK = side.dataset.read(
            part, "token_ids_T", "segment_offsets", "doc_id_S", "gold_logprob_T", "scored_bytes_S", "topk_ids_TK", "topk_logprobs_TK"
        )
        self.gold_ids_T, self.topk_probs_TK = gold_ids(token_ids_T, offsets=offsets), probabilities(topk_logprobs_TK)
        self.is_scored_T = ~np.isnan(gold_T)
        if side.tokenizer.prepends_bos:  # which predicts a text's first token: without it, nothing does
            self.is_scored_T[offsets[:-1]] = False
        self.own_gold_T = np.exp(np.nan_to_num(gold_T.astype(np.float64)))
        self._domain_S = np.array([domains[doc] for doc in doc_id_S.tolist()])
        self._domain_T = np.repeat(self._domain_S, np.diff(offsets))

    def bits_per_byte(self, probs_T: np.ndarray, *, prefix: str) -> dict[str, float]:
        """Of each domain: bits of the tokens that follow, over the bytes of the text."""
        with np.errstate(divide="ignore"):
            bits_T = np.where(self.is_scored_T, -np.log2(probs_T), 0)
        return {
            f"{prefix} {domain}": float(bits_T[self._domain_T == domain].sum() / self._scored_bytes_S[self._domain_S == domain].sum())
            for domain in sorted(set(self._domain_S))
        }


def aligned(source: Side, target: Side, *, part: int, positions: str, rule: str, folder: Path) -> SourcePart:
    """The source's part beside the target's, as the stages make it; `folder` is for what they store in between."""
    sides = {
        "source": source.dataset, "target": target.dataset, "positions": positions,
        "source_tokenizer_folder": source.tokenizer_folder, "target_tokenizer_folder": target.tokenizer_folder,
    }  # fmt: skip

    def committed(name: str, stage: Stage, *, part: int = part) -> Dataset:
        dataset = Dataset.create(folder / name, identity={})
        dataset.commit(part, content=stage.compute(part), seconds=0)
        return dataset

    matches = committed("matches", TokenMatchesStage(source.dataset, **sides)) if rule == "stat" else None
    maps = VocabularyMapStage(source.dataset, source=source.tokenizer, target=target.tokenizer, rule=rule, matches=matches, parts=[part])
    stored = committed("map", maps, part=0)
    match = {"match": "mined", "vocabulary_map": stored} if positions == "dtw" else {}
    alignment = committed("alignment", AlignmentsStage(source.dataset, **match, **sides))
    return FusionSource(name="source", distributions=source.dataset, alignment=alignment, vocabulary_map=stored).read(part)


if __name__ == "__main__":
    main()
