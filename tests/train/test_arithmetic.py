"""The arithmetic of a run: against PyTorch's own counter, and what frozen layers, small images and Muon change."""

import pytest
import torch
from support_train import tiny_trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.models import create_model
from fastres.train.arithmetic import image_flops, muon_flops, run_flops


def on_meta(name):
    with torch.device("meta"):
        return create_model(name)


@pytest.mark.parametrize("name", ["speed", "speed94", "resnet18", "preact_resnet164"])
@pytest.mark.parametrize("frozen", [False, True])
def test_image_flops_are_those_that_pytorch_counts(name, frozen):
    model = on_meta(name)
    if frozen:
        next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.train()(torch.empty(2, 3, 32, 32, device="meta")).sum().backward()
    assert image_flops(model, 32) == counter.get_total_flops() // 2


def test_muon_flops_are_those_of_five_newton_schulz_steps():
    rows, columns = 8, 4 * 9
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3))  # only the kernel behind the first
    step = 2 * (rows * columns * rows + rows**3 + rows * rows * columns)
    assert muon_flops(model.to("meta")) == 5 * step


def test_a_run_counts_its_steps_its_images_and_their_sizes(tmp_path):
    run = tiny_trainer(tmp_path / "a", model="speed", steps=4)
    side, batch = run.image_size, run.config.batch_size
    model = on_meta("speed")
    model.fc = nn.Linear(128, len(run.dataset.classes), device="meta")
    full, small = image_flops(model, side), image_flops(model, 8)
    assert small < full
    assert run_flops(run) == 4 * batch * full
    halved = tiny_trainer(tmp_path / "b", model="speed", steps=4, progressive="8:0.5")
    assert run_flops(halved) == 2 * batch * (full + small)
    fixed = tiny_trainer(tmp_path / "c", model="speed", steps=4, whiten=True, optimizer="muon")
    first = model.conv1
    first.weight.requires_grad_(False)
    assert run_flops(fixed) == 4 * (batch * image_flops(model, side) + muon_flops(model))
