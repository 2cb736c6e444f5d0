"""Fused networks with ``nn.SyncBatchNorm`` over several processes equal one process on the joined batch."""

import os

import pytest
import support_process
import support_sync
import torch
import torch.multiprocessing as mp
from torch import nn

from fastres.nn import fuse
from fastres.reference.cifar import CifarResNet


@pytest.mark.parametrize("batches", [[2, 1], [1, 2, 1]], ids=str)
def test_the_joined_batch(tmp_path, batches):
    """Results, gradients and running statistics, with another number of images on every rank."""
    mp.spawn(support_sync.run, (len(batches), str(tmp_path / "meeting"), batches), nprocs=len(batches))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled")
def test_processes_of_tests_have_the_repaired_interpreter():
    mp.spawn(support_process.check_interpreter)


def test_alone_it_is_a_batch_norm():
    """Without a process group ``nn.SyncBatchNorm`` is a plain one, whether it came before or after `fuse`."""
    torch.manual_seed(0)
    eager, x = CifarResNet(8, width=8).double(), torch.randn(2, 3, 9, 9).double()
    expected = eager(x)
    before = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(eager))
    torch.testing.assert_close(before(x), expected, rtol=1e-9, atol=1e-9)
