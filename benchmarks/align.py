"""Aligning and fusing one part against reading its arrays, in one run, through the stages; on text tiled to the size of a real part.

    python benchmarks/align.py WORKSPACE SOURCE TARGET [--tokens 1000000] [--top-k 10]

SOURCE and TARGET name distributions of the workspace.
"""

import argparse
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from fuseline.align.alignments import AlignmentsStage
from fuseline.align.config import AlignmentConfig, FusionConfig
from fuseline.align.fusion import FusionStage
from fuseline.align.maps import VocabularyMapStage
from fuseline.align.sources import FusionSource
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.workspace import Workspace
from timer import timed

_NAMES = (
    "token_ids_T", "segment_offsets", "doc_id_S", "segment_S", "n_bytes_S", "nll_S", "n_scored_S", "scored_bytes_S", "entropy_T",
    "topk_ids_TK", "topk_logprobs_TK", "tail_logprob_T", "gold_logprob_T",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--top-k", type=int, default=10)
    arguments = parser.parse_args()
    workspace = Workspace.open(arguments.workspace)
    stored = [Dataset.open(workspace.folder("distributions", name)) for name in (arguments.source, arguments.target)]
    folders = [workspace.folder("tokenizers", dataset.identity["tokenizer"]) for dataset in stored]
    with tempfile.TemporaryDirectory() as folder:
        source, target = (
            large_part(dataset, n_tokens=arguments.tokens, top_k=arguments.top_k, like=stored[1], folder=Path(folder) / str(index))
            for index, dataset in enumerate(stored)
        )
        measure(source, target, folders=folders, top_k=arguments.top_k, folder=Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process {peak:.2f} GB")


def measure(source: Dataset, target: Dataset, *, folders: list[Path], top_k: int, folder: Path) -> None:
    """Print how long each stage takes on part 0, against reading both models' arrays of it."""
    n = target.manifest(0).counts["tokens"]
    reading = seconds(lambda: [dataset.read(0, *_NAMES) for dataset in (source, target)])
    print(f"{n:,} target tokens, k = {top_k}; reading both models' arrays {n / reading:,.0f} tokens/s")
    tokenizers = [Tokenizer.load(path) for path in folders]
    maps = Dataset.create(folder / "maps", identity={})
    stage = VocabularyMapStage(maps, source=tokenizers[0], target=tokenizers[1], rule="prefix")
    maps.commit(0, content=stage.compute(0), seconds=0)
    for rule in ("span", "cover"):
        alignments = AlignmentsStage(
            Dataset.create(folder / rule, identity={}), source=source, target=target, positions=rule,
            source_tokenizer_folder=folders[0], target_tokenizer_folder=folders[1],
        )  # fmt: skip
        aligning = seconds(lambda stage=alignments: stage.compute(0))
        alignments.dataset.commit(0, content=alignments.compute(0), seconds=0)
        fusion = FusionStage(
            source,
            sources=[
                FusionSource(name="target", distributions=target),
                FusionSource(name="source", distributions=source, alignment=alignments.dataset, vocabulary_map=maps),
            ],
            alignment=AlignmentConfig(positions=rule), fusion=FusionConfig(), top_k=top_k,
        )  # fmt: skip
        fusing = seconds(lambda stage=fusion: stage.compute(0))
        print(
            f"{rule}: aligning {n / aligning:,.0f} tokens/s, fusing {n / fusing:,.0f} tokens/s; "
            f"both take {(aligning + fusing) / reading:.1f} times as long as reading"
        )


def seconds(work: Callable[[], object]) -> float:
    """Median of seven, of the processor's time (other work may run on the machine), after one that compiles."""
    work()
    return median(timed(work).processor for _ in range(7))


def large_part(dataset: Dataset, *, n_tokens: int, top_k: int, like: Dataset, folder: Path) -> Dataset:
    """The first part of a dataset, repeated until `like`'s, repeated as often, has so many tokens."""
    part = dataset.parts()[0]
    copies = -(-n_tokens // like.manifest(part).counts["tokens"])
    arrays = tiled(dict(zip(_NAMES, dataset.read(part, *_NAMES), strict=True)), copies=copies)
    arrays |= {name: arrays[name][:, :top_k] for name in ("topk_ids_TK", "topk_logprobs_TK")}
    made = Dataset.create(folder / "distributions", identity=dataset.identity)
    counts = {"tokens": len(arrays["token_ids_T"]), "segments": len(arrays["doc_id_S"])}
    made.commit(0, content=PartContent(data=arrays, counts=counts), seconds=0)
    return made


def tiled(side: dict[str, np.ndarray], *, copies: int) -> dict[str, np.ndarray]:
    """The part repeated, with document ids that go on rising."""
    step, n_tokens = int(side["doc_id_S"].max()) + 1, len(side["token_ids_T"])
    found = {name: np.concatenate([array] * copies) for name, array in side.items() if name != "segment_offsets"}
    found["doc_id_S"] = found["doc_id_S"] + np.repeat(np.arange(copies) * step, len(side["doc_id_S"]))
    starts = (np.arange(copies)[:, None] * n_tokens + side["segment_offsets"][None, :-1]).ravel()
    return found | {"segment_offsets": np.append(starts, copies * n_tokens)}


if __name__ == "__main__":
    main()
