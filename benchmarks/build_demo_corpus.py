"""Make recipes/demo-corpus/demo.parquet: three domains of text that may ship with the project.

    python benchmarks/build_demo_corpus.py PHILOSOPHY.parquet PATENTS.parquet OUT.parquet

The two inputs have columns `text, domain, split`; code comes from the standard library of the Python that runs this (3.11). Prints the
modules taken, for the README. The same inputs give the same rows.
"""

import argparse
import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import polars as pl

SEED = 20240611
TRAIN_BYTES, TEST_BYTES = 100_000, 12_000  # per domain
TRAIN_TARGET, TEST_TARGET = (1_500, 6_500), (1_200, 2_800)  # bytes aimed at per document
LEAST, MOST = 1_000, 8_000
SHINGLE = 60  # characters; a train document that shares one with a test document is dropped

# What one of the demo's tokenizers cannot give back: control characters (SmolLM2 lacks some bytes) and ▁ (Gemma's space).
UNSAFE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f▁]|[\U00040000-\U0010ffff]")


def prose(path: Path, *, split: str, target: tuple[int, int], rng: random.Random) -> Iterator[str]:
    """One excerpt from the start of each document of the split, in random order, ending with a sentence or paragraph."""
    texts = pl.scan_parquet(path).filter(pl.col("split") == split).select("text").collect()["text"].to_list()
    for text in rng.sample(texts, len(texts)):
        limit = rng.randint(*target)
        head = text.encode()[:limit].decode(errors="ignore")
        if len(head) < len(text):
            ends = [match.end() for match in re.finditer(r"[.!?;][”’\")]*(?=\s)|\n(?=\s*\S)", head)]
            head = head[: ends[-1]] if ends else ""
        yield head.strip()


def modules() -> list[Path]:
    """Public modules of moderate size without a licence notice of their own."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(folder.glob("[a-z]*.py"))
        if 4_000 < path.stat().st_size < 80_000 and not re.search(r"copyright|licen[sc]e|\(c\)", path.read_text("utf-8"), re.I)
    ]


def code(paths: list[Path], *, target: tuple[int, int], per_module: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(module, excerpt): consecutive top-level statements of a module."""
    for path in paths:
        text = path.read_text("utf-8")
        lines = [line + "\n" for line in text.split("\n")]  # not splitlines(), which counts form feeds
        # A document starts where a statement starts, with its decorators; comments and blank lines go with what precedes them.
        starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1 for node in ast.parse(text).body]
        documents, limit, begin = [], rng.randint(*target), 0
        for start in [*starts[1:], len(lines)]:
            if len("".join(lines[begin:start]).encode()) >= limit or start == len(lines):
                documents.append("".join(lines[begin:start]).strip() + "\n")
                begin, limit = start, rng.randint(*target)
        fitting = [document for document in documents if LEAST <= len(document.encode()) <= MOST]
        for document in rng.sample(fitting, min(per_module, len(fitting))):
            yield path.stem, document


def take(documents: Iterator[str], *, budget: int, avoid: set[str]) -> list[str]:
    """Documents that fit, until the budget is reached: no duplicates, nothing shared with `avoid`."""
    taken: list[str] = []
    total = 0
    for document in documents:
        size = len(document.encode())
        if not LEAST <= size <= MOST or UNSAFE.search(document) or document in taken or total + size > budget + LEAST:
            continue
        if avoid.isdisjoint(shingles(document, step=1)):
            taken.append(document)
            total += size
        if total >= budget:
            break
    return taken


def shingles(text: str, *, step: int) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(0, len(text) - SHINGLE, step)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("philosophy", "patents", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        parser.error(f"the code domain must come from Python 3.11; this is {sys.version.split()[0]}")
    rows: list[dict[str, str]] = []

    def add(domain: str, *, test: Iterator[str], train: Iterator[str]) -> None:
        tests = take(test, budget=TEST_BYTES, avoid=set())
        seen = set().union(*(shingles(text, step=1) for text in tests))
        for split, texts in (("train", take(train, budget=TRAIN_BYTES, avoid=seen)), ("test", tests)):
            rows.extend({"text": text, "domain": domain, "split": split} for text in texts)
            sizes = [len(text.encode()) for text in texts]
            print(f"{domain} {split}: {len(sizes)} documents, {sum(sizes):,} bytes, {min(sizes):,} to {max(sizes):,}")

    for domain in ("philosophy", "patents"):
        rng = random.Random(f"{SEED} {domain}")
        path = getattr(arguments, domain)
        add(
            domain,
            test=prose(path, split="test", target=TEST_TARGET, rng=rng),
            train=prose(path, split="train", target=TRAIN_TARGET, rng=rng),
        )
    rng = random.Random(f"{SEED} code")
    paths = modules()
    rng.shuffle(paths)
    test_count = len(paths) // 4
    test = list(code(paths[:test_count], target=TEST_TARGET, per_module=1, rng=rng))
    train = list(code(paths[test_count:], target=TRAIN_TARGET, per_module=1, rng=rng))
    add("code", test=(text for _, text in test), train=(text for _, text in train))
    for split, candidates in (("train", train), ("test", test)):
        used = {row["text"] for row in rows if row["split"] == split}
        print(f"modules, {split}: {', '.join(sorted({module for module, text in candidates if text in used}))}")
    pl.DataFrame(rows).write_parquet(arguments.out, compression="zstd", compression_level=19)
    print(f"{arguments.out.name}: {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
