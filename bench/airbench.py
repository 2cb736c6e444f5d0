"""Networks and recipes of the class of cifar10-airbench's first two: baselines of the presets `speed94` and `speed95`.

Written from their published description alone: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
arXiv:2404.00498, sections 2 to 4 and the listing of its hyper-parameters. They run in bf16 under torch.compile, on the
project's batches, which are on the device already, so that the recipe is compared and no data loader.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.plain import CPU
from fastres.data import Augment, Batches, Dataset
from fastres.train.evaluate import Scores, evaluate
from fastres.train.views import Views
from fastres.train.whiten import patch_covariance, sample_images, whitening_filters

BATCH = 1024
MOMENTUM, DECAY, BIAS_FACTOR = 0.85, 0.0153, 64.0  # the second for 1024 images
PEAK, START, END = 0.23, 0.2, 0.07  # of the triangular schedule: where it is, and the factors of the rate beside it
SMOOTHING, TRANSLATION, LOGITS = 0.2, 2, 1 / 9
AVERAGE_EVERY = 5  # steps between those of the average that the network is set back to
WHITENING_BIAS_EPOCHS = 3  # for which the first layer's bias is trained


@dataclass(frozen=True)
class Recipe:
    """What differs between the two: widths of the groups, epochs, SGD's rate for 1024 images; what is published of it:
    accuracy over six views on the original pixels, operations.
    """

    widths: tuple[int, ...]
    epochs: float
    rate: float
    accuracy: float = 0.0
    operations: float = 0.0


AIRBENCH94 = Recipe((64, 256, 256), 9.9, 11.5, 0.9401, 3.6e14)
AIRBENCH95 = Recipe((128, 384, 384), 15.0, 0.87 * 11.5, 0.9501, 1.4e15)


class Group(nn.Module):
    """Two 3x3 convolutions with BatchNorm and GELU, a 2x2 max-pool behind the first convolution.

    [N, inputs, H, W] to [N, outputs, H/2, W/2].
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
        self.norm1 = nn.BatchNorm2d(outputs, eps=1e-12, momentum=0.4)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding="same", bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, eps=1e-12, momentum=0.4)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])  # the first outputs are the inputs themselves
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Airbench(nn.Module):
    """Whitening layer, three groups, max-pool, linear: logits [N, num_classes] of [N, 3, 32, 32]."""

    def __init__(self, num_classes: int = 10, widths: tuple[int, ...] = AIRBENCH94.widths):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.groups = nn.Sequential(*(Group(*pair) for pair in zip((24, *widths), widths)))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        x = self.groups(F.gelu(self.whiten(x)))
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1)) * LOGITS


def operations(recipe: Recipe, images: int = 50_000) -> int:
    """Of the convolutions and the last layer of a whole run, forward and twice that backward."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        Airbench(widths=recipe.widths)(torch.empty(1, 3, 32, 32))
    return round(3 * counter.get_total_flops() * images * recipe.epochs)


def build(dataset: Dataset, seed: int, widths: tuple[int, ...]) -> Airbench:
    """The network with its initial weights and whitening filters, in channels-last."""
    torch.manual_seed(seed)
    model = Airbench(len(dataset.classes), widths)
    filters = whitening_filters(patch_covariance(sample_images(dataset), 2), 12).view(12, 3, 2, 2).float()
    model.whiten.weight.data.copy_(torch.cat([filters, -filters]))
    return model.to(memory_format=torch.channels_last)


def optimizer_of(model: Airbench, rate: float) -> torch.optim.SGD:
    """Nesterov SGD at its peak rates for `rate` a 1024 images, whose decay is the same for all whatever their rate."""
    scale = 1024 * (1 + 1 / (1 - MOMENTUM))  # the rate is of the sum of losses, and of steps without momentum
    rate, decay = rate / scale, DECAY * BATCH / scale
    biases = [p for name, p in model.named_parameters() if "norm" in name and p.requires_grad]
    taken = {id(p) for p in biases}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": biases, "lr": rate * BIAS_FACTOR, "weight_decay": decay / (rate * BIAS_FACTOR)},
        {"params": others, "lr": rate, "weight_decay": decay / rate},
    ]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)


def rate_factor(step: int, steps: int) -> float:
    """Factor of the peak rate: up in a line from `START` to 1, down in one to `END`."""
    peak = int(PEAK * steps)
    if step < peak:
        return START + (1 - START) * step / peak
    return 1 + (END - 1) * (step - peak) / (steps - peak)


class Lookahead:
    """An average of the weights that the network is set back to every few steps (Zhang et al. 2019)."""

    def __init__(self, model: nn.Module):
        self.weights = [value for value in model.state_dict().values() if value.is_floating_point()]
        self.slow = [value.clone() for value in self.weights]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """``slow = decay * slow + (1 - decay) * weights``, and the weights are that."""
        torch._foreach_lerp_(self.slow, self.weights, 1 - decay)
        torch._foreach_copy_(self.weights, self.slow)


def rows(
    recipe: Recipe,
    dataset: Dataset,
    seed: int,
    target: float,
    limit: float,
    *,
    compiled: bool = True,
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    """Train to the end, or until the target or the limit is reached, as `bench.plain.train` does; a row an epoch, with
    ``tta_accuracy``, the accuracy over six views.
    """
    model = build(dataset, seed, recipe.widths).to(device)
    optimizer, average = optimizer_of(model, recipe.rate), Lookahead(model)
    network = torch.compile(model) if compiled else model
    common: dict[str, Any] = dict(mean=dataset.mean, std=dataset.std, seed=seed, device=device)
    train = Batches(dataset.train, BATCH, train=True, augment=Augment(TRANSLATION, "alternating"), **common)
    test = Batches(dataset.test, min(500, len(dataset.test)), train=False, augment=Augment(0, "none"), **common)
    steps, step, seconds = max(1, int(recipe.epochs * len(train))), 0, 0.0
    found: list[dict[str, Any]] = []
    while step < steps:
        model.train()
        epoch, loss_sum, first, start = len(found), 0.0, step, time.perf_counter()
        if epoch == WHITENING_BIAS_EPOCHS:
            model.whiten.bias.requires_grad_(False)  # type: ignore[union-attr]
            model.whiten.bias.grad = None  # type: ignore[union-attr]
        for images, labels in train.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_factor(step, steps)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING, reduction="sum")
            loss.backward()
            optimizer.step()
            loss_sum, step = loss_sum + loss.item() / len(labels), step + 1
            if step == steps:
                average.update(1.0)
            elif step % AVERAGE_EVERY == 0:
                average.update(0.95**AVERAGE_EVERY * (step / steps) ** 3)
            if step == steps or seconds + time.perf_counter() - start > limit:
                break
        seconds += time.perf_counter() - start
        scores: Scores = evaluate(model, test, torch.bfloat16, Views(1))
        found.append(
            {
                "epoch": epoch + 1,
                "step": step,
                "train_loss": loss_sum / (step - first),
                "val_accuracy": scores.accuracy,
                "tta_accuracy": scores.tta_accuracy,
                "train_seconds": seconds,
            }
        )
        if scores.accuracy >= target or seconds > limit:
            break
    return found
