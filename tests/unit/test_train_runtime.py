"""What is replaced on CPU ranks exists in the installed torch and Megatron-core, and comes back afterwards."""

import pytest
import torch
from fuseline.store.errors import FuselineError
from fuseline.train import megatron
from fuseline.train.checkpoint import _InThisProcess
from fuseline.train.runtime import cpu_replacements, without_cuda


def test_every_replaced_name_exists():
    for owner, name, _ in cpu_replacements():
        assert callable(getattr(owner, name)), name
    assert hasattr(megatron.filesystem_async, "_results_queue")
    assert hasattr(megatron.filesystem_async.FileSystemWriterAsync, "write_preloaded_data")
    assert hasattr(megatron.TorchDistSaveShardedStrategy, _InThisProcess._get_save_and_finalize_callbacks.__name__)


def test_cuda_means_the_cpu_only_inside():
    originals = [getattr(owner, name) for owner, name, _ in cpu_replacements()]
    with without_cuda():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).cuda().device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert [getattr(owner, name) for owner, name, _ in cpu_replacements()] == originals
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_another_version_of_megatron_core_is_refused(monkeypatch):
    megatron.require_version()
    monkeypatch.setattr(megatron, "VERSION", "0.17.0")
    with pytest.raises(FuselineError, match=r"megatron-core \(0\.16\.1\) must be 0\.17\.0: run pip install"):
        megatron.require_version()
