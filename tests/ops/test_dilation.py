"""Dilated convolutions in every operation: results, every gradient and statistics against fp64, over drawn shapes."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support_fused import (
    FLOOR,
    assert_as_good_as_eager,
    cast,
    eager_conv,
    eager_preact,
    eager_residual,
    eager_stem,
    leaves,
    random_layer,
    random_norm,
    random_weight,
    relative_error,
    relu_apart,
)
from support_ops import opcheck
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.nn.norm import conv_of
from fastres.ops import (
    Conv,
    Identity,
    Layer,
    conv_bias_act,
    preact_block,
    residual_block,
    residual_chain,
    stem,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# a function's fixtures hold no state that one example leaves to the next
drawn = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def geometries(draw: st.DrawFn) -> dict:
    """Images, channels, stride, dilation and dtype of a block; the seed of its values is set."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return dict(
        size=(draw(st.integers(1, 3)), draw(st.integers(5, 11)), draw(st.integers(5, 11))),
        widths=[draw(st.sampled_from([3, 8, 16, 20, 40])) for _ in range(2)],
        stride=draw(st.sampled_from([1, 1, 2, 3])),
        dilation=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(DTYPES)),
    )


def bottleneck(size, widths, stride, dilation, frozen=False):
    """x, layers and a projection."""
    inputs, inner = widths
    x = torch.randn(*size, inputs, dtype=torch.float64)
    layers = [
        random_layer(inputs, inner, 1, frozen=frozen),
        random_layer(inner, inner, 3, stride, dilation=dilation, frozen=frozen),
        random_layer(inner, 24, 1, frozen=frozen),
    ]
    return x, layers, random_layer(inputs, 24, 1, stride, frozen=frozen)


@drawn
@given(geometries(), st.booleans(), st.booleans())
def test_bottleneck(geometry, recompute, frozen):
    dtype = geometry.pop("dtype")
    assert_as_good_as_eager(
        lambda x, layers, added: residual_block(x, layers, added, recompute=recompute)[0],
        eager_residual,
        bottleneck(**geometry, frozen=frozen),
        dtype,
        partial(eager_residual, relu=relu_apart),
    )


@drawn
@given(geometries(), st.integers(1, 4), st.sampled_from([2, 3]))
def test_chain_of_basic_blocks_with_dilated_projection(geometry, other, kernel):
    """A projection of more than one tap is dilated too, and so is the block behind it, by another number."""
    dtype, stride, dilation = geometry.pop("dtype"), geometry["stride"], geometry["dilation"]
    inputs, width = geometry["widths"]
    x = torch.randn(*geometry["size"], inputs, dtype=torch.float64)
    far = dict(stride=stride, dilation=dilation)
    pad = (0, 0, dilation, dilation) if kernel == 2 else None  # an output a pixel, before the stride
    first = [random_layer(inputs, width, 3, **far), random_layer(width, width, 3, dilation=dilation)]
    second = [random_layer(width, width, 3, dilation=other), random_layer(width, width, 3)]
    projection = random_layer(inputs, width, kernel, pad=pad, **far)

    def eager(x, first, second, projection, **options):
        return eager_residual(eager_residual(x, first, projection, **options), second, Identity(), **options)

    assert_as_good_as_eager(
        lambda x, first, second, projection: residual_chain(x, [first, second], projection)[0],
        eager,
        (x, first, second, projection),
        dtype,
        partial(eager, relu=relu_apart),
    )


@drawn
@given(geometries(), st.booleans())
def test_preact_block(geometry, frozen):
    (inputs, width), stride, dilation = geometry["widths"], geometry["stride"], geometry["dilation"]
    x = torch.randn(*geometry["size"], inputs, dtype=torch.float64)
    middle = random_weight(width, width, 3), random_norm(width, frozen=frozen), stride, (dilation,) * 4, dilation
    layers = [
        Layer(random_weight(inputs, width, 1), random_norm(inputs, frozen=frozen)),
        Layer(*middle),
        Layer(random_weight(width, 24, 1), random_norm(width, frozen=frozen)),
    ]
    shortcut = Conv(random_weight(inputs, 24, 3), stride, (dilation,) * 4, dilation)
    assert_as_good_as_eager(
        lambda *arguments: preact_block(*arguments)[0],
        eager_preact,
        (x, layers, shortcut),
        geometry["dtype"],
        partial(eager_preact, relu=relu_apart),
    )


@drawn
@given(geometries())
def test_stem(geometry):
    """Small integers are exact in every dtype: else roundings would choose other winners."""
    stride, dilation = geometry["stride"], geometry["dilation"]
    inputs, outputs = geometry["widths"]
    x = torch.randint(-1, 2, (*geometry["size"], inputs)).double()
    weight = torch.randint(-1, 2, (outputs, inputs, 3, 3)).double()
    layer = Layer(weight, random_norm(outputs), stride, (dilation,) * 4, dilation)
    pool = 3, 2, (1, 1, 1, 1)
    assert_as_good_as_eager(
        lambda x, layer: stem(x, layer, *pool)[0],
        lambda x, layer: eager_stem(x, layer, *pool),
        (x, layer),
        geometry["dtype"],
        lambda x, layer: eager_stem(x, layer, *pool, relu=relu_apart),
    )


@drawn
@given(geometries(), st.booleans(), st.sampled_from([(1, 1), (0, 2)]))
def test_conv_bias_act(geometry, add, sides):
    dtype, dilation = geometry["dtype"], geometry["dilation"]
    inputs, outputs = geometry["widths"]
    x = torch.randn(*geometry["size"], inputs, dtype=torch.float64).to(dtype)
    pad = tuple(dilation * side for side in (*sides[:1] * 2, *sides[1:] * 2))
    conv = Conv(random_weight(inputs, outputs, 3).to(dtype), geometry["stride"], pad, dilation)
    bias = torch.randn(outputs)
    exact = eager_conv(x.double().permute(0, 3, 1, 2), conv._replace(weight=conv.weight.double()))
    exact = exact.permute(0, 2, 3, 1) + bias.double()
    residual = torch.randn_like(exact).to(dtype) if add else None
    exact = exact if residual is None else exact + residual.double()
    assert relative_error(conv_bias_act(x, conv, bias, residual), F.relu(exact)) <= FLOOR[dtype]


def test_second_derivatives_and_flops():
    """The plain forms, from which second derivatives come, and the counter know the dilation."""
    x, layers, projection = bottleneck((2, 6, 7), [3, 4], 2, 3)
    arguments = cast(x, torch.float64), cast(layers, torch.float64), cast(projection, torch.float64)
    preact = [Layer(random_weight(3, 4, 3), random_norm(3), 2, (3,) * 4, 3)]
    forms = [(lambda *values: residual_block(*values)[0], eager_residual, arguments)]
    forms.append(
        (lambda *values: preact_block(*values)[0], eager_preact, (arguments[0], cast(preact, torch.float64), None))
    )
    stemmed = arguments[0], cast(random_layer(3, 4, 3, 1, dilation=2), torch.float64)
    pool = 2, 2, (0,) * 4
    forms.append((lambda *values: stem(*values, *pool)[0], lambda *values: eager_stem(*values, *pool), stemmed))
    for fused, eager, values in forms:
        second = []
        for function in (fused, eager):
            first = torch.autograd.grad(function(*values).square().sum(), values[0], create_graph=True)[0]
            second.append(torch.autograd.grad(first.square().sum(), leaves(*values)))
        for ours, theirs in zip(*second):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    x = torch.randn(2, 9, 8, 3)
    layer = Layer(torch.randn(4, 3, 3, 3).requires_grad_(), cast(random_norm(4), torch.float32), 1, (0,) * 4, 3)
    totals = []
    for function in (lambda la: residual_block(x, [la])[0], lambda la: eager_conv(x.permute(0, 3, 1, 2), la)):
        with FlopCounterMode(display=False) as counter:
            function(layer).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1]


def test_opcheck():
    """The fake kernels know the dilation."""
    layer = cast(random_layer(3, 4, 3, pad=(0,) * 4, dilation=3), torch.float32)
    x = torch.randn(2, 9, 8, 3)
    opcheck(lambda: stem(x, layer, 2, 2, (0,) * 4)[0])
    opcheck(lambda: residual_block(x, [layer])[0])
    before = layer._replace(norm=cast(random_norm(3), torch.float32))
    opcheck(lambda: preact_block(x, [before])[0])


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("kernel", [1, 2, 3, (2, 5)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding(kernel, dilation):
    """``padding="same"`` of a dilated convolution, also where one side has a pixel more."""
    conv = nn.Conv2d(3, 4, kernel, padding="same", dilation=dilation, bias=False).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    ours = eager_conv(x, conv_of(conv, (9, 8)))
    torch.testing.assert_close(ours, conv(x), rtol=1e-12, atol=1e-12)
