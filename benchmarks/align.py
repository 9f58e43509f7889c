"""Aligning and fusing one part against reading its arrays, in one run; on text tiled to the size of a real part.

    python benchmarks/align.py WORKSPACE SOURCE TARGET [--tokens 1000000]

SOURCE and TARGET name distributions of the workspace.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from fuseline.align.positions import match_segments, span_positions
from fuseline.align.projection import SourcePart, VocabularyMap, mix, project
from fuseline.align.vocabulary import target_ids, vocabulary_map
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.workspace import Workspace

_NAMES = (
    "token_ids_T", "segment_offsets", "doc_id_S", "segment_S", "n_bytes_S", "topk_ids_TK", "topk_logprobs_TK", "gold_logprob_T",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    arguments = parser.parse_args()
    workspace = Workspace.open(arguments.workspace)
    datasets = [Dataset.open(workspace.folder("distributions", name)) for name in (arguments.source, arguments.target)]
    tokenizers = [Tokenizer.load(workspace.folder("tokenizers", dataset.identity["tokenizer"])) for dataset in datasets]
    part = datasets[1].parts()[0]
    arrays = [dict(zip(_NAMES, dataset.read(part, *_NAMES), strict=True)) for dataset in datasets]
    copies = -(-arguments.tokens // len(arrays[1]["token_ids_T"]))
    source, target = (tiled(part_arrays, copies=copies) for part_arrays in arrays)
    n = len(target["token_ids_T"])

    def positions() -> np.ndarray:
        ends = [
            tokenizer.byte_ends(side["token_ids_T"], segment_offsets=side["segment_offsets"], n_bytes_S=side["n_bytes_S"])
            for tokenizer, side in zip(tokenizers, (source, target), strict=True)
        ]
        return span_positions(
            source_ends_T=ends[0],
            source_offsets=source["segment_offsets"],
            target_ends_T=ends[1],
            target_offsets=target["segment_offsets"],
            source_segment_of_S=match_segments(
                source_doc_id_S=source["doc_id_S"],
                source_segment_S=source["segment_S"],
                target_doc_id_S=target["doc_id_S"],
                target_segment_S=target["segment_S"],
            ),
            n_bytes_S=target["n_bytes_S"],
        )

    position_T = positions()
    map_V = target_ids(vocabulary_map(tokenizers[0], target=tokenizers[1], rule="prefix"))
    gold_T = np.append(target["token_ids_T"][1:], 0).astype(np.int64)
    k = source["topk_ids_TK"].shape[1]

    def fuse() -> None:
        side = SourcePart(
            topk_ids_UK=source["topk_ids_TK"],
            topk_probs_UK=np.exp(source["topk_logprobs_TK"].astype(np.float32)),
            gold_ids_U=np.append(source["token_ids_T"][1:], 0).astype(np.int64),
            gold_logprob_U=source["gold_logprob_T"].astype(np.float64),
            vocabulary=VocabularyMap.of_tokens(map_V),
            position_T=position_T,
        )
        projection = project(side, gold_ids_T=gold_T, gold_anchor=True)
        mix([projection], weights_NT=np.ones((1, n)), top_k=k, gold_ids_T=gold_T)

    fuse()  # compiles
    aligning, fusing = (median(timed(work) for _ in range(3)) / n for work in (positions, fuse))
    print(f"{n} target tokens: span positions {1 / aligning:,.0f} tokens/s, projection and fusion {1 / fusing:,.0f} tokens/s")
    reading = seconds_to_read(source, target) / n
    print(f"aligning and fusing takes {(aligning + fusing) / reading:.1f} times as long as reading both models' arrays of the part")


def seconds_to_read(*sides: dict[str, np.ndarray]) -> float:
    """Seconds to read the parts of all models, as the store keeps them."""
    with tempfile.TemporaryDirectory() as folder:
        datasets = []
        for index, side in enumerate(sides):
            datasets.append(Dataset.create(Path(folder) / "distributions" / str(index), identity={}))
            datasets[-1].commit(0, content=PartContent(data=side, counts={}), seconds=0)
        return median(timed(lambda: [dataset.read(0, *_NAMES) for dataset in datasets]) for _ in range(3))


def tiled(side: dict[str, np.ndarray], *, copies: int) -> dict[str, np.ndarray]:
    """The part repeated, with document ids that go on rising."""
    step, n_tokens = int(side["doc_id_S"].max()) + 1, len(side["token_ids_T"])
    found = {name: np.concatenate([array] * copies) for name, array in side.items() if name != "segment_offsets"}
    found["doc_id_S"] = found["doc_id_S"] + np.repeat(np.arange(copies) * step, len(side["doc_id_S"]))
    starts = (np.arange(copies)[:, None] * n_tokens + side["segment_offsets"][None, :-1]).ravel()
    return found | {"segment_offsets": np.append(starts, copies * n_tokens)}


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
