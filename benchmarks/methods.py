"""The ways to align, each against the textbook's dynamic time warping in plain Python on the same documents; and whole vocabulary maps.

    python benchmarks/methods.py SOURCE/tokenizer.json TARGET/tokenizer.json TEXT.parquet [--tokens 2048] [--documents 40] [--slow 2]

TEXT has a column `text`; documents are cut from it, of so many target tokens each. The textbook is the one of the tests (a full table, and
edit distances that are remembered) and takes seconds a document, so it reads only `--slow` of them. Maps are timed in a process of their
own, once compiled, for their peak memory. Medians of three, of the processor's time, since other work may run on the machine.
"""

import argparse
import multiprocessing
import resource
import sys
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
from fuseline.align.dtw import Side, Spellings, agreeing_positions, warp
from fuseline.align.edit_distance import nearest
from fuseline.align.positions import Ends, span_positions
from fuseline.align.reference import published_map
from fuseline.align.vocabulary import vocabulary_map
from fuseline.store.roles import ROLES
from fuseline.store.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.textbook import warping
from timer import timed, timer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--slow", type=int, default=2)
    arguments = parser.parse_args()
    source, target = read_tokenizer(arguments.source), read_tokenizer(arguments.target)
    texts = documents(arguments.text, tokenizer=target, n_tokens=arguments.tokens, n_documents=arguments.documents)
    positions(source, target=target, texts=texts, n_slow=arguments.slow)
    for rule in ("mined", "mined_published"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak, rows = pool.apply(whole_map, (arguments.source, arguments.target, rule))
        print(
            f"{rule}, {source.vocab_size:,} to {target.vocab_size:,} tokens: {seconds:.1f} s of one core, peak memory {peak:.2f} GB; {rows}"
        )


def positions(source: Tokenizer, *, target: Tokenizer, texts: list[str], n_slow: int) -> None:
    encoded = [tokenizer.encode_segments(texts) for tokenizer in (source, target)]
    sides = [Side(token_ids_T=one.token_ids_T, offsets=one.segment_offsets, bos_id=None) for one in encoded]
    n = len(sides[1].token_ids_T)
    segments = np.arange(len(texts))
    spellings = Spellings.of_tokenizers(source, target=target)

    def span() -> None:
        ends = [
            tokenizer.byte_ends(one.token_ids_T, segment_offsets=one.segment_offsets, n_bytes_S=one.n_bytes_S)
            for tokenizer, one in zip((source, target), encoded, strict=True)
        ]
        span_positions(
            Ends(
                source_ends_T=ends[0],
                source_offsets=encoded[0].segment_offsets,
                target_ends_T=ends[1],
                target_offsets=encoded[1].segment_offsets,
                source_segment_of_S=segments,
                n_bytes_S=encoded[1].n_bytes_S,
            )
        )

    def dtw() -> None:
        matches = warp(sides[0], target=sides[1], source_segment_of_S=segments, spellings=spellings)
        agreeing_positions(matches, source=sides[0], target=sides[1], spellings=spellings, match="em")

    names = [
        [tokenizer.pieces[token].replace(tokenizer.word_start, "") for token in one.token_ids_T]
        for tokenizer, one in zip((source, target), encoded, strict=True)
    ]
    starts = [one.segment_offsets for one in encoded]

    def textbook(document: int) -> None:
        warping(*(names[k][starts[k][document] : starts[k][document + 1]] for k in (0, 1)))

    dtw()  # compiles
    rates = {work.__name__: n / median(timed(work).processor for _ in range(3)) for work in (span, dtw)}
    slow = [timed(lambda document=document: textbook(document)).processor for document in range(n_slow)]
    rates["textbook"] = float((starts[1][n_slow] - starts[1][0]) / sum(slow))
    print(f"{n:,} target tokens in {len(texts)} documents, one core:")
    for name, rate in rates.items():
        print(f"{name:10} {rate:14,.0f} tokens/s {rate / rates['textbook']:12,.0f} times the textbook")


def documents(path: Path, *, tokenizer: Tokenizer, n_tokens: int, n_documents: int) -> list[str]:
    """Stretches of the text of about so many tokens each."""
    text, found, start = "\n".join(pl.read_parquet(path)["text"]), [], 0
    sample = text[:100_000]
    chars = int(n_tokens * len(sample) / len(tokenizer.encode([sample])[0]))
    while len(found) < n_documents:
        assert start + chars <= len(text), "too little text"
        found.append(text[start : start + chars])
        start += chars
    return found


def whole_map(source_path: Path, target_path: Path, rule: str) -> tuple[float, float, str]:
    source, target = read_tokenizer(source_path), read_tokenizer(target_path)
    nearest(["a"], candidates=["b"])  # compiles
    times = []
    for _ in range(3):
        with timer() as took:
            table = published_map(source, target=target) if rule == "mined_published" else vocabulary_map(source, target=target, rule=rule)
        times.append(took.processor)
    counts = ", ".join(f"{count:,} {name}" for name, count in table["rule"].value_counts(sort=True).rows())
    return median(times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, counts


def read_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path.read_text(encoding="utf-8"), roles=dict.fromkeys(ROLES), prepends_bos=False)


if __name__ == "__main__":
    main()
