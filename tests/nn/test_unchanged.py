"""Decisions about modules are kept exactly as long as nothing of the modules changes."""

import copy
import gc
import random
import weakref

import pytest
import torch
from support_nets import SMALL, assert_same, perturbed, train_step
from torch import nn

from fastres.nn import blocks, fuse, unchanged
from fastres.nn.structure import Block, register_block
from fastres.nn.unchanged import Snapshot, Unnotable, while_unchanged
from fastres.reference.cifar import CifarResNet
from fastres.reference.preact import PreActResNet
from fastres.reference.resnet import BasicBlock

X = torch.randn(2, 16, 6, 6)


def block() -> nn.Module:
    return fuse(perturbed(BasicBlock(16, 16)))


def swap(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def enlarge(module: nn.Module) -> None:
    module.conv1.weight.data = torch.randn(16, 16, 5, 5)
    module.conv1.padding = (2, 2)


CHANGES = {
    "a setting": lambda m: setattr(m.bn1, "eps", 0.5),
    "the mode of one": lambda m: m.bn2.eval(),
    "the same setting, another object": lambda m: setattr(m.bn1, "eps", float("1e-5")),
    "another parameter": lambda m: swap(m.conv1),
    "another buffer": lambda m: setattr(m.bn1, "running_mean", torch.ones(16)),
    "a hook": lambda m: m.conv2.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda m: m.relu.register_full_backward_hook(lambda *_: None),
    "a method of an instance": lambda m: setattr(m.conv1, "forward", m.conv1.forward),
    "another class": lambda m: setattr(m.conv1, "__class__", type("Conv", (nn.Conv2d,), {})),
    "another module": lambda m: setattr(m, "relu", nn.ReLU()),
    "a module more": lambda m: m.add_module("more", nn.Identity()),
    "one less": lambda m: delattr(m, "relu"),
    "the dtype": lambda m: m.double(),
    "the dtype of one vector": lambda m: setattr(m.bn1.weight, "data", m.bn1.weight.data.double()),
    "the size": enlarge,
    "fewer elements in the same memory": lambda m: setattr(m.conv1.weight, "data", m.conv1.weight.data[:8]),
    "gaps": lambda m: setattr(m.bn1.weight, "data", torch.ones(16, 2)[:, 0]),
    "recomputation": lambda m: setattr(m, "recompute", True),
}
SAME = {
    "other elements": lambda m: m.conv1.weight.data.mul_(2),
    "a step of training": lambda m: m(X).sum().backward(),
    "a state of the same form": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "a hook on the state": lambda m: m.register_state_dict_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    module = block()
    snapshot = Snapshot([module])
    assert snapshot.holds([module]) and snapshot.holds([module])
    CHANGES[change](module)
    assert not snapshot.holds([module])


@pytest.mark.parametrize("action", SAME)
def test_what_is_no_change(action):
    module = block()
    snapshot = Snapshot([module])
    SAME[action](module)
    assert snapshot.holds([module])


def test_a_class_and_a_declaration_that_change_are_seen(monkeypatch):
    module, asked = block(), []
    for count in (1, 1):
        while_unchanged([module], "test", lambda roots: asked.append(1))
        assert len(asked) == count
    with monkeypatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x)
        while_unchanged([module], "test", lambda roots: asked.append(1))
    register_block(type("Own", (nn.Module,), {"forward": lambda self, x: x}), lambda module: Block([]))
    while_unchanged([module], "test", lambda roots: asked.append(1))
    assert len(asked) == 3


def test_other_modules_are_others():
    first, second = block(), block()
    snapshot = Snapshot([first])
    assert not snapshot.holds([second]) and not snapshot.holds([copy.deepcopy(first)])
    assert not Snapshot([first, second]).holds([second, first])


@pytest.mark.parametrize(
    "value",
    [[nn.ReLU()], (nn.ReLU(),), {"settings": object()}, lambda value=X: value, weakref.ref(X), object()],
    ids=["modules in a list", "a module in a tuple", "an object in a dict", "a function", "a reference", "an object"],
)
def test_what_comparing_objects_does_not_tell(value):
    """Its inside may change, or it keeps modules alive; a function without a closure does neither."""
    module = block()
    module.conv1.extra = value
    if callable(value) and not isinstance(value, weakref.ref):
        assert Snapshot([module]).holds([module])
        captured = X.clone()
        module.conv1.extra = lambda: captured
    with pytest.raises(Unnotable):
        Snapshot([module])
    asked = []
    for _ in range(3):
        while_unchanged([module], "test", lambda roots: asked.append(1))
    assert len(asked) == 3


def test_one_in_another_is_no_snapshot():
    outer = nn.Sequential(inner := block())
    with pytest.raises(Unnotable):
        Snapshot([outer, inner])


def test_nothing_is_kept_of_what_changes_at_every_forward(monkeypatch):
    module, taken = block(), []
    monkeypatch.setattr(unchanged, "Snapshot", lambda roots: taken.append(1) or Snapshot(roots))
    for step in range(3 * unchanged.MOST_MISSES):
        module.conv1.step = float(step)
        while_unchanged([module], "test", lambda roots: None)
    assert len(taken) == unchanged.MOST_MISSES


def test_models_go_without_a_collection_of_cycles():
    module = block()
    for _ in range(3):
        module(X).sum().backward()
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(module), weakref.ref(module.conv1), weakref.ref(module.conv1.weight)]
        del module
        assert [one() for one in gone] == [None, None, None]
    finally:
        gc.enable()


NETWORKS = {"residual": lambda: CifarResNet(14, width=8), "preact": lambda: PreActResNet(20)}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_decided_on_once_and_learns_on(network, monkeypatch):
    """In turn with other shapes, in training and not."""
    eager = perturbed(NETWORKS[network]()).double()
    fused, decided = fuse(copy.deepcopy(eager)), []
    monkeypatch.setattr(blocks, "chains", lambda *args, own=blocks.chains: decided.append(1) or own(*args))
    sizes = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 3, 16, 16), (2, 3, 12, 20))]
    for step in range(4):
        for model in (eager, fused):
            model.train(step != 2)
        x = sizes[step % 2]
        assert_same(train_step(fused, x), train_step(eager, x), 1e-8)
    assert len(decided) == 2  # a mode each


def test_a_parametrized_weight_is_computed_at_each_forward():
    """It is another tensor each time, so no operation is kept ready with it."""
    module, twin = block(), block()
    twin.load_state_dict(module.state_dict())
    for one in (module, twin):
        nn.utils.parametrizations.weight_norm(one.conv1)
    for _ in range(3):
        with torch.no_grad():
            for one in (module, twin):
                one.conv1.parametrizations.weight.original0.mul_(1.5)
        torch.testing.assert_close(module(X), type(twin)._eager.forward(twin, X), rtol=1e-4, atol=1e-4)


def chosen(model: nn.Module, kind: type, place: int) -> nn.Module:
    """One of the model's modules of a kind."""
    found = [module for module in model.modules() if isinstance(module, kind)]
    return found[place % len(found)]


def drawn(like: torch.Tensor, place: int) -> torch.Tensor:
    """Small numbers, the same for the same place."""
    return 0.1 * torch.randn(like.shape, generator=torch.Generator().manual_seed(place), dtype=like.dtype)


def hooked(model: nn.Module, place: int) -> None:
    """A hook more, or one less."""
    hooks = model.__dict__.setdefault("hooks", [])
    if place % 2 and hooks:
        hooks.pop().remove()
    else:
        norm = chosen(model, nn.BatchNorm2d, place)
        hooks.append(norm.register_forward_hook(lambda *call: call[-1] * 1.25))


def exchanged(conv: nn.Conv2d, place: int) -> None:
    conv.weight = nn.Parameter(drawn(conv.weight, place))


def shifted(model: nn.Module, assign: bool) -> None:
    """Another state, by other elements or other tensors."""
    state = {name: 0.99 * t if t.is_floating_point() else t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


ANY = {
    "eps": lambda m, i: setattr(chosen(m, nn.BatchNorm2d, i), "eps", (1e-5, 1e-3, 0.1)[i % 3]),
    "momentum": lambda m, i: setattr(chosen(m, nn.BatchNorm2d, i), "momentum", (0.1, 0.5, None)[i % 3]),
    "a norm's mode": lambda m, i: chosen(m, nn.BatchNorm2d, i).train(i % 2 == 0),
    "tracking": lambda m, i: setattr(chosen(m, nn.BatchNorm2d, i), "track_running_stats", i % 2 == 0),
    "no bias": lambda m, i: setattr(chosen(m, nn.BatchNorm2d, i), "bias", None),
    "frozen weight": lambda m, i: chosen(m, nn.Conv2d, i).weight.requires_grad_(i % 2 == 0),
    "weight": lambda m, i: exchanged(chosen(m, nn.Conv2d, i), i),
    "data": lambda m, i: setattr(chosen(m, nn.Conv2d, i).weight, "data", drawn(chosen(m, nn.Conv2d, i).weight, i)),
    "hook": hooked,
    "state": lambda m, i: shifted(m, False),
    "other tensors": lambda m, i: shifted(m, True),
    "mode": lambda m, i: m.train(i % 3 > 0),
}


@pytest.mark.parametrize("seed", range(12))
def test_any_changes_between_steps(seed):
    """In any order, on the eager network and on the fused one."""
    draw = random.Random(seed)
    name = draw.choice(["basic", "bottleneck", "cifar", "preact", "notebook"])
    eager = perturbed(SMALL[name]()).double()
    fused = fuse(copy.deepcopy(eager))
    for _ in range(10):
        change, place = ANY[draw.choice(list(ANY))], draw.randrange(100)
        if draw.random() < 0.6:
            change(eager, place), change(fused, place)
        x = torch.randn(draw.choice([(2, 3, 16, 16), (3, 3, 12, 20)]), dtype=torch.float64)
        assert_same(train_step(fused, x), train_step(eager, x), 1e-7)
