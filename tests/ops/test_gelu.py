"""GELU behind a BatchNorm in place of ReLU: every operation, forward and every gradient, against fp64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support_fused import (
    assert_as_good_as_eager,
    cast,
    eager_bn_relu,
    eager_preact,
    eager_residual,
    eager_stem,
    leaves,
    random_layer,
    random_norm,
)
from support_ops import opcheck

from fastres import ops
from fastres.ops import Identity, Layer, Norm, residual_block, residual_chain, stem

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
POOLS = [dict(kernel=2, stride=2, pad=(0, 0, 0, 0)), dict(kernel=3, stride=2, pad=(1, 1, 1, 1))]


def image(n, height, width, channels):
    return torch.randn(n, height, width, channels, dtype=torch.float64)


def layers_of(*widths, kernel=3, stride=1, **norm):
    pairs = list(zip(widths, widths[1:]))
    return [random_layer(*pair, kernel, 1 if i else stride, act="gelu", **norm) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("norm", [{}, dict(frozen=True), dict(gamma=False)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions_without_a_shortcut(dtype, norm, relu):
    assert_as_good_as_eager(
        lambda x, layers: residual_block(x, layers, None, relu)[0],
        lambda x, layers: eager_residual(x, layers, None, relu),
        (image(2, 9, 7, 20), layers_of(20, 24, 33, stride=2, **norm)),
        dtype,
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks(dtype, shortcut, recompute, relu):
    added = random_layer(16, 24, 1) if shortcut == "projection" else None

    def fused(x, layers, added):
        return residual_block(x, layers, x if added is None else added, relu, recompute)[0]

    def eager(x, layers, added):
        return eager_residual(x, layers, x if added is None else added, relu)

    outputs = 24 if shortcut == "projection" else 16
    arguments = image(3, 8, 9, 16), layers_of(16, 24, outputs), added
    assert_as_good_as_eager(fused, eager, arguments, dtype)


def test_a_shortcut_that_is_a_tensor():
    arguments = image(2, 6, 7, 16), layers_of(16, 16), image(2, 6, 7, 16)
    fused, eager = partial(residual_block, relu=False), partial(eager_residual, relu_last=False)
    assert_as_good_as_eager(lambda *given: fused(*given)[0], eager, arguments, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_chains(dtype):
    """The second block's first convolution, 1x1, could end the first block: here it reads it as it is stored."""
    blocks = [layers_of(16, 16), [random_layer(16, 8, 1, act="gelu"), random_layer(8, 16, 3, act="gelu")]]

    def eager(x, blocks):
        for layers in blocks:
            x = eager_residual(x, layers, x)
        return x

    arguments = image(3, 8, 9, 16), blocks
    assert_as_good_as_eager(lambda x, blocks: residual_chain(x, blocks, x)[0], eager, arguments, dtype)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_behind_a_pool(dtype, pool):
    arguments = image(2, 11, 10, 5), random_layer(5, 24, 3, act="gelu")
    assert_as_good_as_eager(lambda x, la: stem(x, la, **pool)[0], partial(eager_stem, **pool), arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_tensor_and_in_preactivation(dtype):
    arguments = image(2, 6, 5, 20), random_norm(20, act="gelu")
    assert_as_good_as_eager(lambda x, norm: ops.bn_relu(x, norm)[0], eager_bn_relu, arguments, dtype)
    layers = [random_layer(20, 16, 3), random_layer(16, 20, 3)]
    norms = [random_norm(count, act="gelu") for count in (20, 16)]
    layers = [layer._replace(norm=norm) for layer, norm in zip(layers, norms)]
    assert_as_good_as_eager(
        lambda x, layers: ops.preact_block(x, layers, x)[0],
        lambda x, layers: eager_preact(x, layers, x),
        (image(2, 6, 5, 20), layers),
        dtype,
    )


def test_first_and_second_derivatives():
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    first, second = cast(layers_of(2, 3, 2), torch.float64)

    def function(x, w1, g1, b1, w2, g2, b2):
        norms = [first.norm._replace(gamma=g1, beta=b1), second.norm._replace(gamma=g2, beta=b2)]
        made = [Layer(w, norm, 1, first.pad) for w, norm in zip((w1, w2), norms)]
        pooled = stem(x, made[0]._replace(weight=w1), 2, 2, (0, 0, 0, 0))[0]
        return residual_block(x, made, x)[0].sum() + residual_block(x, made, None)[0].sum() + pooled.sum()

    arguments = (x, *leaves(first, second))
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_opcheck():
    x, layers = cast([torch.randn(2, 8, 8, 6), layers_of(6, 8, 6)], torch.float32)
    opcheck(lambda: residual_block(x, layers, x)[0])
    opcheck(lambda: stem(x, layers[0], **POOLS[0])[0])


def test_where_it_is_not_known():
    x, (layer,) = cast([torch.randn(2, 4, 4, 6), layers_of(6, 6)], torch.float32)
    with pytest.raises(ValueError, match="act is 'gelu' behind the addition of a shortcut that is neither"):
        residual_block(x, [layer], torch.ones_like(x))
    with pytest.raises(ValueError, match="act is 'gelu' behind the addition"):
        residual_chain(x, [[layer], [layer._replace(stride=2)]], None, shortcuts=[Identity(2)])
    with pytest.raises(ValueError, match="'tanh' is no activation: choose relu, gelu"):
        residual_block(x, [layer._replace(norm=layer.norm._replace(act="tanh"))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes(dtype):
    """Values up to the largest are PyTorch's; NaN stays; infinity is not finite, but PyTorch's own vary."""
    values = torch.tensor([0.0, -0.0, 1e-30, 0.5, -0.5, 3, -3, 6, -6, 13, -13, 40, -40, 3e4, -3e4, 1e38, -1e38])
    x = torch.cat([values, torch.tensor([torch.nan, torch.inf])])[None, None, :, None].to(dtype).requires_grad_()
    zero = torch.zeros(1)
    out, _ = ops.bn_relu(x, Norm(None, None, zero, zero + 1, eps=0.0, act="gelu"))
    eager, count = F.gelu(x), len(values)
    for ours, theirs in ((out, eager), *zip(*(torch.autograd.grad(y.sum(), x) for y in (out, eager)))):
        ours, theirs = ours.flatten(), theirs.flatten()
        rtol = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(ours[:count], theirs[:count], rtol=rtol, atol=2e-6)
        assert ours[count].isnan()
    assert not out.flatten()[-1].isfinite()
