"""Small networks of every kind, and a step of training, for the tests of fused modules and networks."""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import Tensor, nn

from fastres.nn import fuse
from fastres.reference.cifar import CifarResNet
from fastres.reference.notebook import NotebookResNet
from fastres.reference.preact import PreActResNet
from fastres.reference.resnet import BasicBlock, Bottleneck, ResNet
from fastres.reference.speed import SpeedResNet

SMALL = {
    "cifar": lambda: CifarResNet(14, width=8),
    "cifar-plain": lambda: CifarResNet(8, width=8, residual=False),
    "basic": lambda: ResNet(BasicBlock, (1, 2), stem="cifar"),
    "bottleneck": lambda: ResNet(Bottleneck, (2, 1), stem="imagenet"),
    "notebook": NotebookResNet,
    "notebook-gamma": lambda: NotebookResNet(gamma=True, relu_logits=True),
    "preact": lambda: PreActResNet(20),
    "preact-plain": lambda: PreActResNet(11, residual=False),
    "speed": lambda: SpeedResNet(widths=(8, 12, 16), stem=10),
    "torchvision": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10
    ),
    "torchvision-dilated": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        [1, 1, 1, 2],
        num_classes=10,
        width_per_group=16,
        replace_stride_with_dilation=[False, True, True],
    ),
}


def perturbed(model: nn.Module) -> nn.Module:
    """Random BatchNorm parameters and statistics: ones and zeros would hide a mistake in their place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for parameter, low in ((module.weight, 0.5), (module.bias, -0.1)):
                if parameter is not None:
                    nn.init.uniform_(parameter, low, low + 0.5)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def twins(name: str, dtype: torch.dtype = torch.float64, **fuse_options) -> tuple[nn.Module, nn.Module]:
    """The eager network and a fused copy."""
    eager = perturbed(SMALL[name]()).to(dtype)
    return eager, fuse(copy.deepcopy(eager), **fuse_options)


def train_step(model: nn.Module, x: Tensor, call=None) -> dict[str, Tensor]:
    """One forward and backward: logits, gradients, and buffers after it, by name."""
    model.zero_grad()
    logits = model(x) if call is None else call(x)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
    (logits * weights).sum().backward()
    grads = {f"grad of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads, **{name: b.clone() for name, b in model.named_buffers()}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal names; values within ``tolerance`` of the largest expected one of the same tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * max(value.abs().max().item(), 1e-3), f"{name}: {error:.2e}"
