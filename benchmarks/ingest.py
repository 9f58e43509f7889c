"""Capturing distributions against the bare forward pass of the same model on the same batches, in one run, pair by pair.

python benchmarks/ingest.py MODEL_FOLDER CORPUS.parquet [--tokens 8000] [--pairs 5]
"""

import argparse
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
import torch
from fuseline.ingest.forward import CausalModel, batches
from fuseline.store.tokenizer import Tokenizer
from timer import timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=10)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_model_folder(arguments.model)
    texts = [text[:2000] for text in pl.read_parquet(arguments.corpus)["text"]]
    segments, total = [], 0
    for ids in tokenizer.encode(texts):
        if total < arguments.tokens:
            segments.append(np.array(ids))
            total += len(ids)
    model = CausalModel(arguments.model, dtype="bfloat16", arithmetic="bfloat16", trust_remote_code=False)
    bare(model, segments[:2])
    model.distributions(segments[:2], top_k=arguments.top_k)
    ratios, rates = [], []
    for _ in range(arguments.pairs):
        seconds_bare = timed(lambda: bare(model, segments)).wall
        seconds_capture = timed(lambda: model.distributions(segments, top_k=arguments.top_k)).wall
        ratios.append(seconds_bare / seconds_capture)
        rates.append(total / seconds_capture)
    print(f"{arguments.model.name}: {total} tokens, {median(rates):.0f} tokens/s, {median(ratios):.2f} of the bare pass's rate")
    print(f"pairs: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


@torch.inference_mode()
def bare(model: CausalModel, segments: list[np.ndarray]) -> None:
    """Logits of the same padded batches, thrown away."""
    for batch in batches(np.array([len(segment) for segment in segments]), batch_tokens=model.batch_tokens):
        longest = max(len(segments[s]) for s in batch)
        ids_BL = torch.zeros(len(batch), longest, dtype=torch.long, device=model.device)
        for row, s in enumerate(batch):
            ids_BL[row, : len(segments[s])] = torch.from_numpy(segments[s])
        model.model(input_ids=ids_BL, use_cache=False)


if __name__ == "__main__":
    main()
