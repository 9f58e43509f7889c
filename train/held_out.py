"""The likelihood of held-out text under the model during training, by domain: the same measure as in `fuseline eval`.

Axes: T tokens of a batch, S segments of a part, D domains.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from ..store.corpus_plan import Domains
from ..store.dataset import Dataset
from .batch import MicroBatch
from .config import TrainJob
from .loss import IGNORED
from .records import Record
from .runtime import Runtime


@dataclass(frozen=True, slots=True)
class _Segment:
    token_ids_T: NDArray[np.int64]
    is_scored_T: NDArray[np.bool_]  # whether the token after the position is scored
    scored_bytes: int
    domain: int


class HeldOutText:
    """A data-parallel rank's share of the held-out segments.

    They are the first segments of the split. Its documents are in random order, so a limited number of tokens is a fair sample.
    """

    def __init__(self, job: TrainJob, *, runtime: Runtime) -> None:
        """Read the segments' tokens; there are none without `job.held_out`.

        Raises:
            DataError: a part is missing.
        """
        self._runtime = runtime
        self._batch_tokens = job.config.micro_batch_size * job.config.sequence_length
        self._domains: list[str] = []
        self._segments: list[_Segment] = []
        if job.held_out is None:
            return
        assert job.corpus_folder is not None
        domains = Domains.of(job.corpus_folder)
        self._domains = domains.names
        dataset = Dataset.open(job.held_out.folder)
        segments = _segments(dataset, parts=job.held_out.parts, domains=domains, limit=job.config.evaluation_tokens)
        # By length, so that the ranks' shares, and the segments of a batch, have similar lengths.
        ordered = sorted(segments, key=lambda segment: len(segment.token_ids_T))
        self._segments = ordered[runtime.data_rank :: runtime.data_parallel]

    def evaluate(self, model: nn.Module, *, step: int) -> list[Record]:
        """The likelihood of each domain's text. Every rank must call it.

        Args:
            model: a FusionModel.
            step: its training step, for the records.

        Returns:
            For each domain with text: step, domain, nll (nats), n_scored (tokens), scored_bytes, bpb (bits per byte).
        """
        sums_D3 = torch.zeros(len(self._domains), 3, dtype=torch.float64)
        with torch.no_grad():
            for segments in self._batches():
                ce_T, _ = model(_batch(segments).to(self._runtime.device))
                for segment, ce_t in zip(segments, ce_T.cpu().split([len(segment.token_ids_T) for segment in segments]), strict=True):
                    sums_D3[segment.domain] += torch.tensor(
                        [float(ce_t.sum(dtype=torch.float64)), int(segment.is_scored_T.sum()), segment.scored_bytes], dtype=torch.float64
                    )
        sums_D3 = sums_D3.to(self._runtime.device)
        dist.all_reduce(sums_D3, group=self._runtime.data_group)
        found = []
        for domain, (nll, n_scored, n_bytes) in zip(self._domains, sums_D3.tolist(), strict=True):
            if n_bytes:
                counts = {"n_scored": round(n_scored), "scored_bytes": round(n_bytes)}
                found.append({"step": step, "domain": domain, "nll": nll, **counts, "bpb": bpb(nll, n_bytes)})
        return found

    def _batches(self) -> Iterator[list[_Segment]]:
        batch: list[_Segment] = []
        n_tokens = 0
        for segment in self._segments:
            if batch and n_tokens + len(segment.token_ids_T) > self._batch_tokens:
                yield batch
                batch, n_tokens = [], 0
            batch.append(segment)
            n_tokens += len(segment.token_ids_T)
        if batch:
            yield batch


def bpb(nll: float, n_bytes: float) -> float:
    """Bits per byte, from nats and bytes."""
    return nll / (math.log(2) * n_bytes)


def over_domains(records: list[Record]) -> float | None:
    """Bits per byte of all the text together; None without any."""
    return bpb(sum(record["nll"] for record in records), sum(record["scored_bytes"] for record in records)) if records else None


def _segments(dataset: Dataset, *, parts: list[int], domains: Domains, limit: int) -> Iterator[_Segment]:
    names = ("token_ids_T", "segment_offsets", "doc_id_S", "n_scored_S", "scored_bytes_S")
    n_tokens = 0
    for part in parts:
        token_ids_T, offsets, doc_id_S, n_scored_S, scored_bytes_S = dataset.read(part, *names)
        label_mask_T = dataset.arrays(part).read_if_there("label_mask_T")
        domain_S = domains.codes(doc_id_S)
        for s in range(len(doc_id_S)):
            if n_tokens >= limit:
                return
            if n_scored_S[s]:
                rows = slice(offsets[s], offsets[s + 1])
                ids_T = token_ids_T[rows].astype(np.int64)
                n_tokens += len(ids_T)
                is_scored_T = _last(int(n_scored_S[s]), n=len(ids_T)) if label_mask_T is None else label_mask_T[rows].astype(np.bool_)
                yield _Segment(ids_T, is_scored_T, int(scored_bytes_S[s]), int(domain_S[s]))


def _last(n_scored: int, *, n: int) -> NDArray[np.bool_]:
    """In plain text only the last tokens are scored, not a text's first token and its bos."""
    is_scored_T = np.zeros(n, np.bool_)
    is_scored_T[n - n_scored - 1 : n - 1] = True
    return is_scored_T


def _batch(segments: list[_Segment]) -> MicroBatch:
    labels = [np.where(segment.is_scored_T, np.append(segment.token_ids_T[1:], IGNORED), IGNORED) for segment in segments]
    return MicroBatch(
        token_ids_T=torch.from_numpy(np.concatenate([segment.token_ids_T for segment in segments])),
        lengths=[len(segment.token_ids_T) for segment in segments],
        labels_T=torch.from_numpy(np.concatenate(labels)),
        soft=None,
    )
