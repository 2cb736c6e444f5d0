"""Every recipe takes its first steps."""

import dataclasses
import math

import pytest
import torch
from support_train import tiny_dataset

from fastres.train import PRESETS, Trainer, preset
from fastres.train.run_folder import RunFolder
from fastres.train.schedule import lr_factor, parse_milestones

SMALL = dict(batch_size=8, device="cpu", precision="fp32", backend="eager", cutout=0, crop_pad=1)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"preact1001"}))
def test_two_steps(name, tmp_path):
    config = preset(name).replace(**SMALL, steps=2)
    if name == "imagenet-resnet50":
        config = config.replace(image_size=32, workers=0)
    if config.image_size is None:
        config = dataclasses.replace(config, progressive=None)
    dataset = dataclasses.replace(tiny_dataset(), test=tiny_dataset().test.subset(torch.arange(8)))
    run = Trainer(config, dataset, RunFolder(tmp_path), say=lambda line: None)
    before = [p.detach().clone() for p in run.model.parameters()]
    (row,) = run.fit()
    assert row["step"] == 2 and math.isfinite(row["train_loss"])
    moved = [not torch.equal(p, q) for p, q in zip(before, run.model.parameters()) if q.requires_grad]
    assert sum(moved) > 0.9 * len(moved)


def test_the_thousand_layers_take_a_step(tmp_path):
    config = preset("preact1001").replace(**SMALL, steps=1).replace(batch_size=2)
    run = Trainer(config, tiny_dataset(), RunFolder(tmp_path), say=lambda line: None)
    images, labels = next(run.train_batches.epoch(0))
    run.train_step(images[:, :, :8, :8], labels)
    assert run.step == 1 and sum(1 for m in run.model.modules() if isinstance(m, torch.nn.Conv2d)) > 1000


@pytest.mark.parametrize("name", ["resnet110", "preact1001"])
def test_he_et_al(name):
    config = preset(name)
    assert (config.steps, config.batch_size, config.lr, config.weight_decay) == (64_000, 128, 0.1, 1e-4)
    assert (config.schedule, config.milestones, config.decay_factor) == ("step", "0.5,0.75", 0.1)
    assert not config.decoupled and not config.nesterov and config.warmup * config.steps == pytest.approx(400)


def test_torchvisions_recipe():
    config = preset("imagenet-resnet50")
    assert (config.epochs, config.batch_size, config.lr, config.momentum, config.weight_decay) == (
        90,
        256,
        0.1,
        0.9,
        1e-4,
    )
    assert (config.crop_scale, config.flip, config.image_size, config.center_share) == (0.08, "random", 224, 0.875)
    steps = 1281167 // 256
    rates = [
        lr_factor(
            config.schedule, step, 90 * steps, config.warmup, parse_milestones(config.milestones), config.decay_factor
        )
        for step in (0, 30 * steps - 1, 30 * steps, 60 * steps - 1, 60 * steps, 90 * steps - 1)
    ]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("name, model", [("resnet18-95", "resnet18"), ("resnet50-95", "resnet50")])
def test_cutout_recipe(name, model):
    config = preset(name)
    assert (config.model, config.epochs, config.cutout, config.weight_decay) == (model, 200, 16, 5e-4)
    assert [round(float(share) * 200) for share in config.milestones.split(",")] == [60, 120, 160]
    assert config.decay_factor == 0.2 and config.nesterov and not config.decoupled
