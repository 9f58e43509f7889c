"""Forward passes: a model's distribution of the next token, at every position of many segments.

Only k numbers per token leave the device. Logits are reduced in float32, in (tokens, vocabulary) blocks within a budget: vocabularies of
262,144 exist, and the logits of one batch would take gigabytes.

Axes: N tokens of one batch, T tokens of all segments, V vocabulary, K entries, H hidden size, B segments of a batch, L padded length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..store.described import described_model
from ..store.errors import DataError
from ..store.machine import use_threads
from ..store.shown import in_short
from ..store.transformers_folder import for_transformers, quiet
from ..store.weights import refuse_adapter

_HEAD_BYTES = 256 << 20  # logits of one matrix product with the output embedding
_REDUCE_BYTES = 8 << 20  # float32 logits reduced at a time: about a CPU's cache (on a GPU the head's whole block)
_TOP_K_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokenDistributions:
    """For every position j, the model's distribution of token j + 1. Natural logarithms under the full softmax."""

    topk_ids_TK: NDArray[np.int64]  # by falling probability
    topk_logprobs_TK: NDArray[np.float32]
    gold_logprob_T: NDArray[np.float32]  # of the next token; NaN at a segment's last position
    tail_logprob_T: NDArray[np.float32]  # log of the mass outside the top k; -inf if it rounds to 0
    entropy_T: NDArray[np.float32]  # nats


class CausalModel:
    """A causal language model on the available device: CUDA if there is one, else the CPU."""

    def __init__(self, folder: Path, *, dtype: str, arithmetic: str, trust_remote_code: bool) -> None:
        """Load the model.

        Args:
            folder: in the Hugging Face format.
            dtype: number format to which the weights are rounded.
            arithmetic: number format of the stored weights and of all computation: `dtype`, or float32.
            trust_remote_code: whether code in the folder may be run.

        Raises:
            DataError: transformers cannot load it, or weights are missing.
        """
        import transformers

        use_threads()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        refuse_adapter(folder)  # transformers also loads it if peft is installed
        try:
            with for_transformers(folder) as readable, quiet():
                if not trust_remote_code:  # else the model's own code describes it
                    described_model(folder, readable=readable)
                found: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    readable,
                    dtype=getattr(torch, arithmetic),
                    trust_remote_code=trust_remote_code,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except DataError:
            raise
        except Exception as error:  # transformers and the model's own code raise any exception
            raise DataError(f"The model {folder} cannot be loaded: {type(error).__name__}: {in_short(error)}") from error
        model, loaded = found
        if loaded["missing_keys"]:  # transformers warns and fills them with random numbers
            raise DataError(f"The model {folder} lacks weights: {', '.join(sorted(loaded['missing_keys']))}. Download it again.")
        if arithmetic != dtype:
            _round(model, dtype=getattr(torch, dtype))
        self.model: Any = model.to(self.device).eval()
        # More tokens at once do not speed up a CPU; measured with SmolLM2-135M.
        self.batch_tokens = 32_768 if self.device.type == "cuda" else 4_096

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @cached_property
    def _head(self) -> torch.nn.Module | None:
        """The output embedding, if logits are only its product with the last hidden states; some models scale or cap their logits."""
        head = self.model.get_output_embeddings()
        if head is None:
            return None
        probe = torch.arange(8, device=self.device)[None]
        with torch.inference_mode():
            hidden_BLH = self.model.base_model(input_ids=probe, use_cache=False).last_hidden_state
            logits_BLV = self.model(input_ids=probe, use_cache=False).logits
            return head if torch.equal(head(hidden_BLH), logits_BLV) else None

    def distributions(self, segments: Sequence[NDArray[Any]], *, top_k: int) -> NextTokenDistributions:
        """Distributions at every position of the segments, in order.

        Args:
            segments: token ids of each segment.
            top_k: number of entries K; 0 for only gold log-probabilities and entropies.
        """
        lengths = np.fromiter(map(len, segments), np.int64, len(segments))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        n_tokens = int(starts[-1])
        found = NextTokenDistributions(
            topk_ids_TK=np.zeros((n_tokens, top_k), np.int64),
            topk_logprobs_TK=np.zeros((n_tokens, top_k), np.float32),
            gold_logprob_T=np.zeros(n_tokens, np.float32),
            tail_logprob_T=np.zeros(n_tokens, np.float32),
            entropy_T=np.zeros(n_tokens, np.float32),
        )
        for batch in batches(lengths, batch_tokens=self.batch_tokens):
            reduced = self._batch([segments[s] for s in batch], top_k=top_k)
            places_N = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in batch])
            for name, value in reduced.items():
                getattr(found, name)[places_N] = value
        found.gold_logprob_T[starts[1:][lengths > 0] - 1] = np.nan
        return found

    @torch.inference_mode()
    def _batch(self, segments: list[NDArray[Any]], *, top_k: int) -> dict[str, NDArray[Any]]:
        longest = max(map(len, segments))
        # Padding is on the right, where causal attention never sees it, so no attention mask is needed.
        ids_BL = np.zeros((len(segments), longest), np.int64)
        real_BL = np.zeros((len(segments), longest), np.bool_)
        for row, segment in enumerate(segments):
            ids_BL[row, : len(segment)] = segment
            real_BL[row, : len(segment)] = True
        input_ids_BL = torch.from_numpy(ids_BL).to(self.device)
        keep_BL = torch.from_numpy(real_BL).to(self.device)
        gold_N = input_ids_BL.roll(-1, dims=1)[keep_BL]
        if self._head is None:
            return _to_numpy(
                [reduce_logits(self.model(input_ids=input_ids_BL, use_cache=False).logits[keep_BL], gold_N=gold_N, top_k=top_k)]
            )
        hidden_NH = self.model.base_model(input_ids=input_ids_BL, use_cache=False).last_hidden_state[keep_BL]
        rows = max(1, _HEAD_BYTES // (self.vocab_size * hidden_NH.element_size()))
        blocks = zip(hidden_NH.split(rows), gold_N.split(rows), strict=True)
        return _to_numpy([reduce_logits(self._head(hidden), gold_N=gold, top_k=top_k) for hidden, gold in blocks])


@torch.no_grad()
def _round(model: torch.nn.Module, *, dtype: torch.dtype) -> None:
    """Round the weights in place; one tensor at a time is in memory twice."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def batches(lengths: NDArray[np.int64], *, batch_tokens: int) -> Iterator[list[int]]:
    """Group segments of similar length, longest first, so that a padded batch has at most `batch_tokens` tokens (or one segment).

    The grouping depends only on the lengths, so a part always has the same batches, with the same rounding.
    """
    batch: list[int] = []
    for s in np.argsort(-lengths, kind="stable").tolist():
        if lengths[s] == 0:
            continue
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(s)
    if batch:
        yield batch


def reduce_logits(logits_NV: torch.Tensor, *, gold_N: torch.Tensor, top_k: int) -> dict[str, torch.Tensor]:
    """Reduce logits of any float type, in float32, to the fields of `NextTokenDistributions` for these positions."""
    rows = len(logits_NV) if logits_NV.is_cuda else max(1, _REDUCE_BYTES // (4 * logits_NV.shape[1]))
    blocks = zip(logits_NV.split(rows), gold_N.split(rows), strict=True)
    reduced = [_reduce_block(logits, gold_N=gold, top_k=top_k) for logits, gold in blocks]
    return {name: torch.cat([block[name] for block in reduced]) for name in reduced[0]}


def _reduce_block(logits_NV: torch.Tensor, *, gold_N: torch.Tensor, top_k: int) -> dict[str, torch.Tensor]:
    logits_NV = logits_NV.float()
    top_values_NK, top_ids_NK = exact_top_k(logits_NV, k=max(top_k, 1))
    largest_N1 = top_values_NK[:, :1]
    weights_NV = (logits_NV - largest_N1).exp_()
    sum_N = weights_NV.sum(-1)
    logsumexp_N = largest_N1[:, 0] + sum_N.log()
    expected_N = torch.linalg.vecdot(weights_NV, logits_NV) / sum_N
    if not expected_N.isfinite().all():  # logits of -inf, which some models give to columns without a token, contribute nothing
        expected_N = torch.linalg.vecdot(weights_NV, logits_NV.clamp(min=torch.finfo(torch.float32).min)) / sum_N
    top_logprobs_NK = (top_values_NK - logsumexp_N[:, None])[:, :top_k]
    return {
        "topk_ids_TK": top_ids_NK[:, :top_k],
        "topk_logprobs_TK": top_logprobs_NK,
        "gold_logprob_T": logits_NV.gather(1, gold_N[:, None])[:, 0] - logsumexp_N,
        "tail_logprob_T": torch.log1p(-top_logprobs_NK.exp().sum(-1).clamp_(max=1)),
        "entropy_T": logsumexp_N - expected_N,
    }


def exact_top_k(values_NV: torch.Tensor, *, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row and their indices, like `torch.topk`, but several times as fast on a CPU for a large V.

    The k largest values are in the k blocks with the largest maxima, so only k blocks of each row are searched.
    """
    n_blocks = values_NV.shape[1] // _TOP_K_BLOCK
    if values_NV.is_cuda or n_blocks <= 4 * k:
        return values_NV.topk(k, dim=-1)
    whole = n_blocks * _TOP_K_BLOCK
    blocks_NBW = values_NV[:, :whole].unflatten(1, (n_blocks, _TOP_K_BLOCK))
    best_NK = blocks_NBW.amax(-1).topk(k, dim=-1).indices
    candidates = blocks_NBW.gather(1, best_NK[:, :, None].expand(-1, -1, _TOP_K_BLOCK)).flatten(1)
    places = (best_NK[:, :, None] * _TOP_K_BLOCK + torch.arange(_TOP_K_BLOCK, device=values_NV.device)).flatten(1)
    if whole < values_NV.shape[1]:
        rest = torch.arange(whole, values_NV.shape[1], device=values_NV.device).expand(len(values_NV), -1)
        candidates, places = torch.cat([candidates, values_NV[:, whole:]], 1), torch.cat([places, rest], 1)
    top = candidates.topk(k, dim=-1)
    return top.values, places.gather(1, top.indices)


def _to_numpy(blocks: list[dict[str, torch.Tensor]]) -> dict[str, NDArray[Any]]:
    return {name: torch.cat([block[name] for block in blocks]).cpu().numpy() for name in blocks[0]}
