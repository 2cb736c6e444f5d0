"""Data-parallel training of fused networks equals that of their eager twins, over two processes."""

import support_ddp
import torch.multiprocessing as mp


def test_distributed_data_parallel(tmp_path):
    """Gradients, parameters and statistics; with gradients as views of the buckets and with a static graph too."""
    ranks = 2
    mp.spawn(support_ddp.run, (ranks, str(tmp_path / "meeting"), ["cifar", "preact", "bottleneck"]), nprocs=ranks)
