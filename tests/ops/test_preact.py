"""Pre-activation blocks: forward and every gradient against fp64, and the statistics handed on."""

import pytest
import torch
from support_fused import (
    assert_as_good_as_eager,
    cast,
    eager_preact,
    leaves,
    random_norm,
    random_weight,
    relu,
    relu_apart,
)
from support_ops import opcheck

from fastres.ops import Conv, Identity, Layer, preact_block, preact_chain


def block(shortcut: str, stride: int = 1, channels: int = 20, **norm):
    """x, layers and shortcut of a bottleneck through 6 and 10 channels."""
    x = torch.randn(2, 7, 9, channels, dtype=torch.float64)
    outputs = channels if shortcut == "identity" else 36
    layers = [
        Layer(random_weight(channels, 6, 1), random_norm(channels, **norm)),
        Layer(random_weight(6, 10, 3), random_norm(6, **norm), stride, (1, 1, 1, 1)),
        Layer(random_weight(10, outputs, 1), random_norm(10, **norm)),
    ]
    return x, layers, Conv(random_weight(channels, outputs, 1), stride) if shortcut == "projection" else None


def both(shortcut: str):
    """Fused and eager form of the same arguments; the identity is x itself."""
    if shortcut == "identity":
        return lambda x, la, _: preact_block(x, la, x)[0], lambda x, la, _: eager_preact(x, la, x)
    return lambda x, la, s: preact_block(x, la, s)[0], eager_preact


@pytest.mark.parametrize("shortcut, stride", [("identity", 1), ("projection", 1), ("projection", 2), ("none", 2)])
def test_equals_fp64_eager(shortcut, stride):
    assert_as_good_as_eager(*both(shortcut), block(shortcut, stride), torch.float64)


@pytest.mark.parametrize("norm", [dict(gamma=False), dict(frozen=True), dict(frozen=True, gamma=False)], ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_norms_of_other_kinds(shortcut, norm):
    assert_as_good_as_eager(*both(shortcut), block(shortcut, **norm), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_errs_no_more_than_eager(shortcut, dtype):
    assert_as_good_as_eager(*both(shortcut), block(shortcut, channels=64), dtype)


def test_statistics_handed_on_are_those_of_the_result():
    x, layers, _ = block("identity")
    out, coef, statistics = preact_block(x, layers, x, next_coef=True)
    torch.testing.assert_close(coef[0], out.mean((0, 1, 2)))
    torch.testing.assert_close(coef[1], out.var((0, 1, 2), correction=0))
    handed = preact_block(out, layers, out, coef)[0]
    torch.testing.assert_close(handed, preact_block(out, layers, out)[0])
    assert [used.count for used in statistics] == [126, 126, 126]
    torch.testing.assert_close(statistics[0].coef[0], x.mean((0, 1, 2)))


def chain(first: str, *kinds: dict, projected: int | None = None):
    """x, blocks and shortcuts: a first block as `block` makes it, then one with an identity a kind of BatchNorms; that
    of the number ``projected`` has a strided projection.
    """
    x, layers, projection = block(first, 2 if first == "projection" else 1)
    channels = layers[-1].weight.shape[0]
    blocks, shortcuts = [layers], [projection if first == "projection" else Identity() if first == "identity" else None]
    for number, kind in enumerate(kinds):
        stride, outputs = (2, channels + 5) if number == projected else (1, channels)
        wide = Layer(random_weight(channels, 10, 3), random_norm(channels, **kind), stride, (1, 1, 1, 1))
        blocks.append([wide, Layer(random_weight(10, outputs, 1), random_norm(10, **kind))])
        shortcuts.append(Identity() if stride == 1 else Conv(random_weight(channels, outputs, 1), stride))
        channels = outputs
    return x, blocks, shortcuts


def eager_chain(x, blocks, shortcuts, relu=relu):
    for layers, shortcut in zip(blocks, shortcuts):
        x = eager_preact(x, layers, x if isinstance(shortcut, Identity) else shortcut, relu=relu)
    return x


def without_values_near_zero(x, blocks, shortcuts):
    """In a chain many masks would change by rounding."""
    eager_chain(x, blocks, shortcuts, relu_apart)


def fused_chain(x, blocks, shortcuts):
    return preact_chain(x, blocks, shortcuts)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projected", [None, 0, 1])
@pytest.mark.parametrize("first", ["identity", "projection", "none"])
def test_chain(first, projected, dtype):
    arguments = chain(first, {}, {"gamma": False}, projected=projected)
    assert_as_good_as_eager(fused_chain, eager_chain, arguments, dtype, without_values_near_zero)


@pytest.mark.parametrize("kinds", [({"frozen": True}, {}), ({}, {"frozen": True})], ids=str)
@pytest.mark.parametrize("projected", [None, 1])
def test_chain_of_frozen_and_other_blocks(kinds, projected):
    assert_as_good_as_eager(fused_chain, eager_chain, chain("projection", *kinds, projected=projected), torch.float64)


def test_chain_is_its_blocks_one_after_the_other():
    x, blocks, shortcuts = chain("projection", {}, {})
    out, coef, statistics = preact_chain(x, blocks, shortcuts, next_coef=True)
    y, known, used = x, None, []
    for layers, shortcut in zip(blocks, shortcuts):
        y, known, more = preact_block(y, layers, y if isinstance(shortcut, Identity) else shortcut, known, True)
        used += more
    torch.testing.assert_close(out, y)
    torch.testing.assert_close(coef, known)
    for ours, exact in zip(statistics, used, strict=True):
        assert ours.count == exact.count
        torch.testing.assert_close(ours.coef, exact.coef)


def test_chain_that_means_nothing():
    x, blocks, shortcuts = chain("identity", {})
    with pytest.raises(ValueError, match="1 shortcuts for 2 pre-activation blocks"):
        preact_chain(x, blocks, shortcuts[:1])
    with pytest.raises(ValueError, match="has no stride and adds no channels"):
        preact_chain(x, blocks, [Identity(2), Identity()])
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="at least one layer"):
            preact_chain(x, nothing, [])


def test_gradcheck():
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    layers = [
        Layer(random_weight(3, 2, 1), random_norm(3)),
        Layer(random_weight(2, 4, 3), random_norm(2), 2, (1, 1, 1, 1)),
    ]
    layers, projection = cast(layers, torch.float64), cast(Conv(random_weight(3, 4, 1), 2), torch.float64)

    def function(x, *flat):
        flat = iter(flat)
        rebuilt = [
            Layer(next(flat), la.norm._replace(gamma=next(flat), beta=next(flat)), la.stride, la.pad) for la in layers
        ]
        return preact_block(x, rebuilt, projection._replace(weight=next(flat)))[0]

    assert torch.autograd.gradcheck(function, (x, *leaves(layers, projection)))


@pytest.mark.parametrize("next_coef", [True, False])
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_opcheck(shortcut, next_coef):
    x, layers, added = block(shortcut)
    x, layers, added = cast([x, layers, added], torch.float64)
    coef = torch.ones(5, 20, dtype=torch.float64) if next_coef else None
    opcheck(lambda: preact_block(x, layers, x if added is None else added, coef, next_coef)[0])


def test_shortcut_of_another_size():
    x, layers, _ = block("none", 2)
    with pytest.raises(RuntimeError, match=r"size of the shortcut \[2, 20, 7, 9\] must match .* \[2, 36, 4, 5\]"):
        preact_block(x, layers, x)
