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


def chosen(precision, scaler):
    """The trainer's options. On a CPU it takes bf16-mixed for 16-mixed, so its plugin for that is made here."""
    if precision != "16-mixed":
        return dict(precision=precision)
    scaler = scaler or torch.amp.GradScaler("cpu")
    return dict(plugins=[lightning.pytorch.plugins.MixedPrecision(precision, "cpu", scaler)])


def trained(model, precision, scaler=None):
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
        **chosen(precision, scaler),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, torch.utils.data.DataLoader(data, batch_size=None))
    assert all(parameter.isfinite().all() for parameter in task.parameters())
    return torch.tensor(task.losses, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed", "64-true"])
def test_every_precision_trains(precision):
    eager, fused = trained(unfuse(network(precision)), precision), trained(network(precision), precision)
    tolerance = {"32-true": 1e-5, "64-true": 1e-10, "16-true": 5e-3, "16-mixed": 5e-3}.get(precision, 0.05)
    assert torch.allclose(fused, eager, rtol=0, atol=tolerance)


def moved(model, precision, scaler=None):
    """How far three steps moved the parameters, all of them in a row, fp64."""
    before = [parameter.detach().double() for parameter in model.parameters()]
    trained(model, precision, scaler)
    return torch.cat([(a.detach().double() - b).flatten() for a, b in zip(model.parameters(), before)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale, skipped", [(2.0**10, 0), (2.0**40, 3)], ids=["taken", "overflow"])
def test_a_gradient_scaler_takes_and_skips_the_steps_that_it_does_without_fusion(scale, skipped):
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    eager = moved(unfuse(network("16-mixed")), "16-mixed", scalers[0])
    fused = moved(network("16-mixed"), "16-mixed", scalers[1])
    assert [scaler.get_scale() for scaler in scalers] == [scale / 2**skipped] * 2
    if skipped:
        assert not fused.any() and not eager.any()
    else:
        exact = moved(unfuse(network("64-true")), "64-true")
        assert (fused - exact).norm() <= 2 * (eager - exact).norm() < 0.1 * exact.norm()
