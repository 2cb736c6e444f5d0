"""Whatever is done to a network before or after `fuse`, or before `fold`, its numbers are eager PyTorch's."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support_nets import assert_same, perturbed, train_step
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.models.resnet import BasicBlock

from fastres import ops
from fastres.export import portable
from fastres.nn import fold, fuse, report


class ScaledReLU(nn.ReLU):
    """Another activation under a known class."""

    def forward(self, x):
        return F.relu(x) * 1.5


class Standardised(nn.Conv2d):
    """Another convolution under a known class."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class ShiftedNorm(nn.BatchNorm2d):
    """Another BatchNorm under a known class."""

    def forward(self, x):
        return super().forward(x) + 0.1


class Adapted(nn.Module):
    """A convolution with a low-rank addition, as adapters for fine-tuning wrap it."""

    def __init__(self, conv):
        super().__init__()
        self.base = conv
        self.extra = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride, bias=False)

    def forward(self, x):
        return self.base(x) + 0.1 * self.extra(x)


def network():
    """torchvision's, of two stages: half the time of a test would go into the weights of the others."""
    torch.manual_seed(3)
    model = torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=5)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)
    return perturbed(model).double()


def block(model):
    return model.layer2[1]


def relus(model, cls):
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.__class__ = cls


def circular(conv):
    """The trick that makes images without seams."""
    conv._conv_forward = types.MethodType(
        lambda self, x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, self.stride), conv
    )


def reflected(conv):
    conv.forward = lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), conv.weight)


def without_tracking(model):
    block(model).bn1.running_mean = block(model).bn1.running_var = None
    block(model).bn1.num_batches_tracked = None


def spectral(model):
    torch.manual_seed(0)
    spectral_norm(block(model).conv1)


def adapt(model):
    torch.manual_seed(0)
    block(model).conv2 = Adapted(block(model).conv2).double()


def louder(module, method):
    """Put a class of one's own on top of the module's, whatever that is."""
    cls = type(module)
    original = getattr(cls, method)
    module.__class__ = type("Louder", (cls,), {method: lambda self, x: original(self, x) * 1.5})


def new(module, seed=0):
    torch.manual_seed(seed)
    return module().double()


CHANGES = {
    "nothing": lambda m: None,
    "activation": lambda m: setattr(block(m), "relu", nn.GELU()),
    "network's activation": lambda m: setattr(m, "relu", nn.LeakyReLU(0.2)),
    "subclass of ReLU": lambda m: relus(m, ScaledReLU),
    "subclass of Conv2d": lambda m: setattr(block(m).conv1, "__class__", Standardised),
    "subclass of BatchNorm2d": lambda m: setattr(block(m).bn2, "__class__", ShiftedNorm),
    "conv.forward": lambda m: reflected(block(m).conv1),
    "conv._conv_forward": lambda m: circular(block(m).conv2),
    "bn.forward": lambda m: setattr(block(m).bn1, "forward", lambda x: x * 0.5),
    "relu.forward": lambda m: setattr(block(m).relu, "forward", torch.tanh),
    "class with a __call__": lambda m: louder(block(m).conv1, "__call__"),
    "class on top of a stage": lambda m: louder(m.layer2, "forward"),
    "class on top of a block": lambda m: louder(block(m), "forward"),
    "class on top of the network": lambda m: louder(m, "forward"),
    "block.forward": lambda m: setattr(block(m), "forward", lambda x: x),
    "network._forward_impl": lambda m: setattr(
        m, "_forward_impl", lambda x: 3 * torchvision.models.ResNet._forward_impl(m, x)
    ),
    "bias": lambda m: setattr(block(m), "conv2", new(lambda: nn.Conv2d(128, 128, 3, 1, 1))),
    "groups": lambda m: setattr(block(m), "conv1", new(lambda: nn.Conv2d(128, 128, 3, 1, 1, groups=4, bias=False))),
    "dilation": lambda m: setattr(block(m).conv1, "dilation", (2, 2)) or setattr(block(m).conv1, "padding", (2, 2)),
    "stem's stride": lambda m: setattr(m.conv1, "stride", (2, 1)),
    "padding mode": lambda m: setattr(
        block(m), "conv1", new(lambda: nn.Conv2d(128, 128, 3, 1, 1, padding_mode="circular", bias=False))
    ),
    "group norm": lambda m: setattr(block(m), "bn1", new(lambda: nn.GroupNorm(8, 128))),
    "instance norm": lambda m: setattr(block(m), "bn1", nn.InstanceNorm2d(128)),
    "no norm": lambda m: setattr(block(m), "bn1", nn.Identity()),
    "frozen norm": lambda m: setattr(block(m), "bn2", new(lambda: torchvision.ops.FrozenBatchNorm2d(128))),
    "eps and momentum": lambda m: (setattr(block(m).bn1, "eps", 0.5), setattr(block(m).bn1, "momentum", None)),
    "affine": lambda m: (setattr(block(m).bn1, "weight", None), setattr(block(m).bn1, "bias", None)),
    "one frozen": lambda m: block(m).requires_grad_(False),
    "max-pool": lambda m: setattr(m, "maxpool", nn.MaxPool2d(2, ceil_mode=True)),
    "large pool": lambda m: setattr(m, "maxpool", nn.MaxPool2d(17, 2, 8)),  # a byte does not tell its pixels apart
    "average pool": lambda m: setattr(m, "maxpool", nn.AvgPool2d(2)),
    "no pool": lambda m: setattr(m, "maxpool", nn.Identity()),
    "head's pool": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "feature maps": lambda m: (setattr(m, "avgpool", nn.Identity()), setattr(m, "fc", nn.Identity())),
    "shortcut": lambda m: setattr(m.layer2[0], "downsample", new(lambda: nn.Conv2d(64, 128, 1, 2))),
    "shortcut's norm": lambda m: setattr(m.layer2[0].downsample, "1", nn.Identity()),
    "adapter": adapt,
    "prune": lambda m: prune.l1_unstructured(block(m).conv1, "weight", 0.5),
    "old weight_norm": lambda m: weight_norm(block(m).conv1),
    "old spectral_norm": spectral,
    "parametrization": lambda m: parametrizations.weight_norm(block(m).conv1),
    "weight as attribute": lambda m: (
        delattr(block(m).conv1, "weight"),
        setattr(block(m).conv1, "weight", torch.linspace(-1, 1, 128 * 128 * 9).view(128, 128, 3, 3).double()),
    ),
    "shared weight": lambda m: setattr(block(m).conv2, "weight", block(m).conv1.weight),
    "shared norm": lambda m: setattr(block(m), "bn2", block(m).bn1),
    "shared relu": lambda m: [setattr(one, "relu", m.relu) for one in m.modules() if isinstance(one, BasicBlock)],
    "a block twice": lambda m: m.layer2.append(block(m)),
    "another block": lambda m: setattr(m, "layer3", nn.Sequential(new(lambda: nn.Conv2d(128, 128, 3, 2)))),
    "pre-hook on a convolution": lambda m: block(m).conv1.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "hook on a norm": lambda m: block(m).bn1.register_forward_hook(lambda *a: a[-1] * 2),
    "hook on a relu": lambda m: block(m).relu.register_forward_hook(lambda *a: a[-1] + 1),
    "hook on a shortcut": lambda m: m.layer2[0].downsample.register_forward_hook(lambda *a: a[-1] + 1),
    "hook inside a shortcut": lambda m: m.layer2[0].downsample[0].register_forward_hook(lambda *a: a[-1] + 1),
    "hook on a block": lambda m: block(m).register_forward_hook(lambda *a: a[-1] * 2),
    "hook on a stage": lambda m: m.layer2.register_forward_hook(lambda *a: a[-1] * 2),
    "hook on the first convolution": lambda m: m.conv1.register_forward_hook(lambda *a: a[-1] * 2),
    "hook on the network's relu": lambda m: m.relu.register_forward_hook(lambda *a: a[-1] + 1),
    "hook on the pool": lambda m: m.maxpool.register_forward_hook(lambda *a: a[-1] * 2),
    "hook on the last pool": lambda m: m.avgpool.register_forward_hook(lambda *a: a[-1] * 2),
    "backward hook on a relu": lambda m: block(m).relu.register_full_backward_hook(
        lambda _, grads, __: (grads[0] * 2,)
    ),
    "backward pre-hook on a norm": lambda m: block(m).bn1.register_full_backward_pre_hook(
        lambda _, grads: (grads[0] * 2,)
    ),
}
# what has no sense or no like in a network that is folded
NOT_FOLDED = {"backward hook on a relu", "backward pre-hook on a norm", "one frozen"}
X = (2, 3, 24, 20)


def out_of_place(model):
    """As backward hooks on ReLU need it."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


@pytest.mark.parametrize("when", ["before", "after", "between steps"])
@pytest.mark.parametrize("name", CHANGES)
def test_fused_it_stays_the_same_network(name, when):
    eager, fused = out_of_place(network()), out_of_place(network())
    x = torch.randn(X, dtype=torch.float64)

    def steps(modes):
        for mode in modes:
            eager.train(mode), fused.train(mode)
            assert_same(train_step(fused, x), train_step(eager, x), 1e-8)

    if when != "before":
        fuse(fused)
    if when == "between steps":  # what was decided is kept, see fastres.nn.unchanged
        steps((True, False, True, False, True))
    CHANGES[name](eager), CHANGES[name](fused)
    if when == "before":
        fuse(fused)
    steps((True, False) if when != "between steps" else (True, True, False, False, True))


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in NOT_FOLDED])
@torch.no_grad()
def test_folded_it_stays_the_same_network(name):
    model = network().eval()
    CHANGES[name](model)
    x = torch.randn(X, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(fold(model)(x), expected)
    torch.testing.assert_close(portable(fuse(model))(x), expected)


@pytest.mark.parametrize("change", ["prune", "old weight_norm", "old spectral_norm"])
def test_folds_weights_that_a_hook_computed_in_training(change):
    model = network()
    CHANGES[change](model)
    x = torch.randn(X, dtype=torch.float64)
    model(x).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(fold(model)(x), model.eval()(x))


@pytest.mark.parametrize(
    "name", ["nothing", "activation", "hook on a norm", "hook on the network's relu", "head's pool"]
)
def test_on_the_compiled_passes(name):
    if reason := ops.cpu.unavailable():
        pytest.skip(reason)
    eager, fused = network().float(), fuse(network().float())
    CHANGES[name](eager), CHANGES[name](fused)
    x = torch.randn(X)
    with ops.implementation("cpp"):
        for mode in (True, False):
            ours, theirs = (train_step(model.train(mode), x) for model in (fused, eager))
            for key, value in theirs.items():  # a ReLU whose input rounds to the other side of zero is a large error
                error = (ours[key].double() - value.double()).norm() / value.double().norm().clamp_min(1e-3)
                assert error < (1e-4 if key == "logits" else 1e-1), key
        with torch.no_grad():
            torch.testing.assert_close(fold(eager)(x), eager(x), rtol=1e-3, atol=1e-4)


def test_only_the_part_that_is_concerned_runs_eagerly():
    model = fuse(network())
    assert not report(model).left
    block(model).bn1.register_forward_hook(lambda *_: None)
    model.relu.register_forward_hook(lambda *_: None)
    now = report(model)
    assert (now.fused_blocks, now.blocks, now.stems, now.heads) == (2, 3, 0, 1)
    assert now.left == {"ResNet": "a ReLU has hooks", "layer2.1": "a BatchNorm2d has hooks"}


def test_what_hinders_for_a_while_hinders_no_longer():
    model = network()
    handle = block(model).bn1.register_forward_hook(lambda *_: None)
    assert report(fuse(model)).left == {"layer2.1": "a BatchNorm2d has hooks"}
    handle.remove()
    assert not report(model).left


def test_a_wrapper_of_the_forward_leaves_a_network_fused(caplog):
    """As Hugging Face accelerate wraps it, for mixed precision."""
    model, x = network(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused = fuse(copy.deepcopy(model))
    for wrapped in (fused, block(fused)):
        forward = wrapped.forward
        wrapped.forward = lambda x, forward=forward: forward(x) * 1.0
    caplog.clear()
    assert_same(train_step(fused, x), train_step(model, x), 1e-9)
    assert not caplog.records


def test_it_is_said_once_for_each_module_and_reason(caplog):
    model = fuse(network())
    caplog.clear()
    block(model).relu = nn.SiLU()
    for _ in range(3):
        model(torch.randn(X, dtype=torch.float64))
    assert caplog.messages == ["BasicBlock runs its eager forward: SiLU is not nn.ReLU"]
    block(model).relu = nn.ReLU()
    m = copy.deepcopy(model)
    m.avgpool.register_forward_hook(lambda *_: None)
    m(torch.randn(X, dtype=torch.float64))
    assert caplog.messages[1:] == ["ResNet runs a part of its eager forward: an AdaptiveAvgPool2d has hooks"]


def test_hooks_on_all_modules_run():
    model, seen = fuse(network()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(torch.randn(X, dtype=torch.float64))
    finally:
        handle.remove()
    leaves = {module for module in model.modules() if not list(module.children())}
    assert leaves <= set(seen)
    seen.clear()
    model(torch.randn(X, dtype=torch.float64))
    assert not seen


def test_a_class_that_is_patched_later_is_seen(monkeypatch):
    model, x = fuse(network().eval()), torch.randn(X, dtype=torch.float64)
    before = model(x)
    own = BasicBlock.forward
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: 2 * own(self, x))
    expected = copy.deepcopy(network().eval())(x)
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(before, expected)


def test_a_normalising_parametrization_runs_once_a_forward():
    """Spectral normalisation moves its vectors each time that the weight is read."""
    models = [network(), network()]
    for model in models:
        torch.manual_seed(1)
        parametrizations.spectral_norm(block(model).conv1)
    eager, fused = models[0], fuse(models[1])
    x = torch.randn(X, dtype=torch.float64)
    for _ in range(2):
        assert_same(train_step(fused, x), train_step(eager, x), 1e-8)
