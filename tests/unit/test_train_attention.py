"""On a GPU, one call for all packed segments gives what a call per segment gives. (On CPUs, test_convert compares the latter with
transformers.)"""

import dataclasses

import pytest
import torch
from fuseline.train.architecture import Architecture, Attention, Norm
from fuseline.train.attention import SegmentAttention, Segments
from fuseline.train.megatron import TransformerConfig
from fuseline.train.rotary import Rope
from fuseline.train.runtime import Runtime

LENGTHS = [300, 1, 77, 130]
ROPE = Rope(theta=1e4, channels=64)


def runtime(device: str) -> Runtime:
    return Runtime(
        device=torch.device(device),
        dtype=torch.bfloat16,
        rank=0,
        tensor_parallel=1,
        tensor_rank=0,
        sequence_parallel=False,
        data_parallel=1,
        data_rank=0,
    )


def architecture(attention: Attention) -> Architecture:
    return Architecture(
        model_type="any",
        layers=(attention,),
        hidden_size=256,
        ffn_size=256,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        vocab_size=8,
        max_length=512,
        norm=Norm(kind="rms", eps=1e-6),
        activation="silu",
        gated=True,
        attention_scale=0.1,
        tied_embeddings=True,
        rules={},
    )


def core(attention: Attention, *, place: Runtime) -> SegmentAttention:
    config = TransformerConfig(num_layers=1, hidden_size=256, num_attention_heads=4, cuda_graph_scope=[])
    return SegmentAttention(config, 1, None, "self", architecture=architecture(attention), runtime=place)


@pytest.mark.parametrize("change", [{"device": torch.device("cpu")}, {"dtype": torch.float32}, {}])
def test_the_kernel_is_not_chosen_where_it_does_not_work(change):
    place = dataclasses.replace(runtime("cuda"), **change)
    assert place.has_flash_attention(64 if change else 63) is False
    assert place.has_flash_attention(64 if change else 264) is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 32])
def test_all_segments_at_once_are_as_one_by_one(window):
    place = runtime("cuda")
    segments = Segments.of(LENGTHS, inverse_frequencies={ROPE: ROPE.inverse_frequencies().cuda()}, runtime=place)
    results = []
    for at_once in (True, False):
        attend = core(Attention(rope=ROPE, window=window), place=place)
        assert attend.at_once
        attend.at_once = at_once
        torch.manual_seed(0)
        qkv = [torch.randn(sum(LENGTHS), heads, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
        output = attend(*qkv, None, packed_seq_params=segments)
        output.float().square().sum().backward()
        results.append([output, *(x.grad for x in qkv)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
