"""Tensors dealt to any number of ranks and put together again are the same, no rank reads what is not its own, and files hold what was
written."""

import math
from contextlib import ExitStack

import pytest
import torch
from fuseline.store.errors import DataError
from fuseline.train import weight_files
from fuseline.train.layouts import COLUMNS, GATE_UP, QKV, REPLICATED, ROWS, STACKED_QKV, VOCABULARY, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

LAYOUTS = {
    "rows": ROWS,
    "columns": COLUMNS,
    "vocabulary": VOCABULARY,
    "gate and up": GATE_UP,
    "qkv": QKV,
    "stacked qkv": STACKED_QKV,
    "replicated": REPLICATED,
}


class Counted:
    """A source that counts the numbers that are read of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.n_read = tensor, tensor.shape, 0

    def __getitem__(self, index) -> torch.Tensor:
        found = self.tensor[index]
        self.n_read += found.numel()
        return found


@st.composite
def dealt_tensors(draw):
    """A layout's name, full tensors, the sizes they have them from, and a number of ranks."""
    name, ranks = draw(st.sampled_from(sorted(LAYOUTS))), draw(st.integers(1, 4))
    n_kv_heads = ranks * draw(st.integers(1, 3))
    sizes = Sizes(
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 40)),
    )
    q, kv, inner = sizes.n_heads * sizes.head_dim, n_kv_heads * sizes.head_dim, ranks * draw(st.integers(1, 4))
    rows = {"vocabulary": [sizes.vocab_size], "gate and up": [inner, inner], "qkv": [q, kv, kv], "stacked qkv": [q + 2 * kv]}
    shapes = [(n, ranks * 2) for n in rows.get(name, [inner])]
    if name not in {"vocabulary", "columns"} and draw(st.booleans()):
        shapes = [shape[:1] for shape in shapes]  # biases
    tensors = [torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) for shape in shapes]
    return name, tensors, sizes, ranks


@given(dealt=dealt_tensors())
@settings(max_examples=200, deadline=None)
def test_join_undoes_split_and_a_rank_reads_its_own(dealt):
    name, tensors, sizes, ranks = dealt
    layout, sources = LAYOUTS[name], [Counted(tensor) for tensor in tensors]
    joined = layout.join([layout.split(sources, sizes, ranks, rank) for rank in range(ranks)], sizes)
    assert len(joined) == len(tensors)
    assert all(map(torch.equal, joined, tensors))
    readers = ranks if name == "replicated" else 1
    assert [source.n_read for source in sources] == [readers * tensor.numel() for tensor in tensors]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return (tmp_path_factory.mktemp("weights") for _ in iter(int, 1))


SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=8)


@given(shapes=SHAPES, dtype=st.sampled_from([torch.float32, torch.bfloat16]), file_bytes=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_written_weights_are_read_back_bit_for_bit(folders, shapes, dtype, file_bytes):
    folder = next(folders)
    tensors = {f"layers.{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_files, "FILE_BYTES", file_bytes)
        sizes = {name: tensor.shape for name, tensor in tensors.items()}
        weight_files.write_weights(iter(tensors.items()), shapes=sizes, dtypes=dict.fromkeys(sizes, dtype), folder=folder)
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= file_bytes
    with ExitStack() as stack:
        files = weight_files.WeightFiles(folder, stack=stack)
        assert all(torch.equal(files[name][:1], tensor[:1]) for name, tensor in tensors.items())
        with pytest.raises(DataError, match="has no tensor other"):
            files["other"]
