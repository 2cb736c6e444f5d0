"""What the report says of a wrapped forward is what happens in it: whether the fused one runs."""

import copy
import functools
import types

import pytest
import torch
from support_nets import SMALL
from torch import nn

from fastres.nn import blocks, fuse, networks, report


class Wrapper:
    """A wrapper with a state, as accelerate's that converts what a forward returns."""

    def __init__(self, function):
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args):
        return self.function(*args)


def as_accelerate(module):
    def converted(*args):
        return kept(*args)

    kept = Wrapper(torch.autocast("cpu", torch.bfloat16, enabled=False)(module.forward.__func__))
    converted.__wrapped__ = kept
    module.forward = types.MethodType(converted, module)


def as_its_hooks(module):
    def hooked(module, *args):
        return module._old_forward(*args)

    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(hooked, module), module._old_forward)


def in_a_script(module):
    names = {"old": module.forward}  # both are globals there
    exec("def new(x):\n    return old(x)", names)
    module.forward = names["new"]


def with_a_default(module):
    module.forward = lambda x, old=module.forward: old(x)


def by_its_class(module):
    module.forward = lambda x: type(module).forward(module, x)


def twice(module):
    as_accelerate(module)
    module.forward = torch.no_grad()(module.forward)


def compiled(module):
    module.forward = torch.compile(module.forward, backend="eager")


def by_the_eager_class(module):
    eager = type(module)._eager

    @functools.wraps(module.forward)  # which only notes it
    def forward(x):
        return eager.forward(module, x)

    module.forward = forward


def of_another_module(module):
    """As in a copy, whose functions are those of the original."""
    other = copy.deepcopy(module)
    module.forward = lambda x, old=other.forward: old(x) * 1.0


LEADS = {f.__name__: f for f in (as_accelerate, as_its_hooks, in_a_script, with_a_default, by_its_class, twice)}
OTHERS = {f.__name__: f for f in (by_the_eager_class, of_another_module)}


def made():
    model = fuse(SMALL["basic"]())
    return model, {"network": model, "block": model.layer2[1]}


@pytest.mark.parametrize("part", ["network", "block"])
@pytest.mark.parametrize("name", [*LEADS, *OTHERS])
def test_it_says_left_where_the_fused_forward_does_not_run(name, part, monkeypatch):
    model, parts = made()
    module = parts[part]
    before = str(report(model))
    {**LEADS, **OTHERS}[name](module)
    ran = []
    for file, function in ((networks, "tell"), (blocks, "structure_of")):
        own = getattr(file, function)
        monkeypatch.setattr(file, function, lambda m, *a, own=own, **k: (ran.append(m), own(m, *a, **k))[1])
    apart = lambda members: [blocks.Link(place, []) for place in range(len(members))]  # noqa: E731
    own = blocks.chains
    monkeypatch.setattr(
        blocks, "chains", lambda members, running=False: own(members, True) if running else apart(members)
    )
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    assert (module in ran) == (name in LEADS)
    now = report(model)
    if name in LEADS:
        assert str(now) == before and str(report(fuse(model))) == before
    else:
        assert list(now.left.values()) == [f"a {type(module).__name__} has an instance's forward"]


def test_modules_around_a_fused_network_change_nothing():
    model, _ = made()
    plain = report(model)
    around = {"parallel": nn.DataParallel(model), "compiled": torch.compile(model, backend="eager")}
    model.compile(backend="eager")
    for name, outer in {**around, "in place": model}.items():
        found = report(outer)
        assert (found.fused_blocks, found.stems, found.heads, found.left) == (
            plain.fused_blocks, plain.stems, plain.heads, {},
        ), name  # fmt: skip


def test_a_compiled_forward_counts_as_its_own():
    model, parts = made()
    for module in parts.values():
        compiled(module)
    assert not report(model).left


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_network_that_accelerate_prepared(precision):
    accelerate = pytest.importorskip("accelerate")
    model, _ = made()
    before = str(report(model))
    accelerate.state.AcceleratorState._reset_state(True)  # a process has one, of one precision
    try:
        prepared = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(model)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    assert str(report(prepared)) == before and ("forward" in vars(model)) == (precision != "no")


def test_a_forward_that_was_wrapped_before_fuse_is_left_and_its_blocks_are_not():
    model = SMALL["basic"]()
    as_accelerate(model)
    found = report(fuse(model))
    assert found.fused_blocks == 3 and found.left == {"ResNet": "a ResNet has an instance's forward"}
