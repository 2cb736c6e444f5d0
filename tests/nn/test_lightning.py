"""Fused networks in PyTorch Lightning: what it sets around a step (default dtype, autocast) is as without them."""


import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.nn import BasicBlock, ConvBNReLU, unfuse

lightning = pytest.importorskip("lightning")


def network(precision):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as Lightning recommends to make a network in bf16
    try:
        projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        blocks = ConvBNReLU(3, 8, 3), BasicBlock(8, 8), BasicBlock(8, 16, 2, projection)
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    finally:
        torch.set_default_dtype(before)


def trained(model, precision):
    """The losses of three steps."""

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch):
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    data = [(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)), torch.arange(4)) for i in range(3)]
    task = Task()
    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, torch.utils.data.DataLoader(data, batch_size=None))
    assert all(parameter.isfinite().all() for parameter in task.parameters())
    return torch.tensor(task.losses, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-true", "64-true"])
def test_every_precision_trains(precision):
    eager, fused = trained(unfuse(network(precision)), precision), trained(network(precision), precision)
    tolerance = {"32-true": 1e-5, "64-true": 1e-10, "16-true": 5e-3}.get(precision, 0.05)
    assert torch.allclose(fused, eager, rtol=0, atol=tolerance)
