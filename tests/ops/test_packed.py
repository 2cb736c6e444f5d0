"""Inference convolutions whose weights stay in oneDNN's layout."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support_fused import FLOOR, random_weight, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres.nn import repack
from fastres.nn.fold import FoldedConv
from fastres.ops import Conv, conv_bias_act, cpu, implementation, repeat_conv_bias_act
from fastres.ops.cpu import PackedConv, onednn, packed

pytestmark = pytest.mark.skipif(
    not packed.AVAILABLE or cpu.unavailable() is not None, reason="no oneDNN or no compiler"
)


@pytest.fixture(autouse=True)
def cpp():
    with implementation("cpp"):
        yield


def packed_calls(monkeypatch) -> list:
    """The weights that are packed from now on."""
    reorder, calls = onednn.mkldnn._reorder_convolution_weight, []
    monkeypatch.setattr(onednn.mkldnn, "_reorder_convolution_weight", lambda w, *a: calls.append(w) or reorder(w, *a))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kernel, stride, pad", [(1, 1, (0,) * 4), (1, 2, (0,) * 4), (3, 1, (1,) * 4), (3, 2, (0, 0, 1, 1))]
)
def test_give_what_plain_ones_give(kernel, stride, pad, dtype):
    weight, bias, kept = random_weight(16, 24, kernel).to(dtype), torch.randn(24), PackedConv()
    for n, size in ((2, 8), (1, 8), (2, 8), (2, 11)):
        x = torch.randn(n, size, size - 1, 16).to(dtype)
        added = torch.randn_like(conv_bias_act(x, Conv(weight, stride, pad), bias))
        for residual, relu in ((None, True), (added, True), (added, False)):
            wide = None if residual is None else residual.double()
            exact = conv_bias_act(x.double(), Conv(weight.double(), stride, pad), bias, wide, relu)
            ours = conv_bias_act(x, Conv(weight, stride, pad), bias, residual, relu, kept)
            assert relative_error(ours, exact) <= FLOOR[dtype]


def test_are_made_once_and_again_where_the_weight_has_changed(monkeypatch):
    conv, x, bias, kept = Conv(random_weight(8, 8, 1).float()), torch.randn(1, 4, 4, 8), torch.zeros(8), PackedConv()
    calls = packed_calls(monkeypatch)
    for _ in range(3):
        first = conv_bias_act(x, conv, bias, None, False, kept)
    assert len(calls) == 1
    conv.weight.mul_(2)
    torch.testing.assert_close(conv_bias_act(x, conv, bias, None, False, kept), 2 * first)
    other = conv._replace(weight=-conv.weight)
    torch.testing.assert_close(conv_bias_act(x, other, bias, None, False, kept), -2 * first)
    assert len(calls) == 3
    for stride, pad in ((2, (0,) * 4), (1, (1,) * 4)):
        moved = other._replace(stride=stride, pad=pad)
        torch.testing.assert_close(
            conv_bias_act(x, moved, bias, None, False, kept), conv_bias_act(x, moved, bias, None, False)
        )
    assert copy.deepcopy(kept)._ready is pickle.loads(pickle.dumps(kept))._ready is None


@pytest.mark.parametrize("stride, pad", [(1, (1,) * 4), (2, (0, 0, 1, 1))])
def test_a_repeated_call_is_not_looked_at_twice(monkeypatch, stride, pad):
    conv, bias, kept = Conv(random_weight(8, 8, 3).float(), stride, pad), torch.randn(8), PackedConv()
    x = torch.randn(2, 6, 6, 8)
    first = conv_bias_act(x, conv, bias, packed=kept)
    monkeypatch.setattr(sys.modules["fastres.ops.conv_bias_act"], "conv_shape", None)
    image = x.permute(0, 3, 1, 2)
    repeated = repeat_conv_bias_act(image, conv.weight, bias, None, True, kept)
    torch.testing.assert_close(repeated.permute(0, 2, 3, 1), first, rtol=0, atol=0)
    assert repeated.is_contiguous(memory_format=torch.channels_last)
    others = {
        "batch": (image[:1], None, True),
        "layout": (image.contiguous(), None, True),
        "dtype": (image.bfloat16(), None, True),
        "residual": (image, torch.zeros_like(repeated), True),
        "relu": (image, None, False),
    }
    for what, (x, residual, relu) in others.items():
        assert repeat_conv_bias_act(x, conv.weight, bias, residual, relu, kept) is None, what
    with torch.autocast("cpu", torch.bfloat16):
        assert repeat_conv_bias_act(image, conv.weight, bias, None, True, kept) is None
    with implementation("aten"):
        assert repeat_conv_bias_act(image, conv.weight, bias, None, True, kept) is None
    bias.add_(1)
    assert repeat_conv_bias_act(image, conv.weight, bias, None, True, kept) is None


def test_a_folded_convolution_refuses_the_second_time_what_it_refuses_the_first():
    conv = FoldedConv(torch.nn.Conv2d(8, 8, 1, bias=False), None, act=None)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    for _ in range(2):
        assert conv(x, x).shape == x.shape
    with pytest.raises(RuntimeError, match="size of the shortcut"):
        conv(x, x[:1])
    with pytest.raises(RuntimeError, match="to have 8 channels"):
        conv(x[:, :4])
    conv.weight.zero_()
    torch.testing.assert_close(conv(x, x), x)


def test_threads_share_a_folded_convolution():
    conv = FoldedConv(torch.nn.Conv2d(8, 8, 3, padding=1, bias=False), None, act="relu")
    images = [torch.randn(n, 8, 5, 5).to(memory_format=torch.channels_last) for n in (1, 2, 3, 4)]
    expected = [conv(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            for ours, theirs in zip(pool.map(conv, images), expected):
                torch.testing.assert_close(ours, theirs)


def test_keep_nan():
    x = torch.full((1, 2, 2, 8), float("nan"))
    conv = Conv(random_weight(8, 8, 1).float())
    assert conv_bias_act(x, conv, torch.zeros(8), packed=PackedConv()).isnan().all()


def test_are_cast_under_autocast():
    conv, x = Conv(random_weight(8, 8, 1).float()), torch.randn(1, 4, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (conv_bias_act(x, conv, torch.zeros(8), packed=p) for p in (PackedConv(), None))
    assert ours.dtype == torch.bfloat16 and relative_error(ours, plain.double()) <= FLOOR[torch.bfloat16]


def test_fakes_take_the_operation_and_leave_no_fake_behind():
    conv, x, bias, kept = Conv(random_weight(8, 8, 1).float()), torch.randn(2, 4, 4, 8), torch.zeros(8), PackedConv()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert conv_bias_act(torch.empty(2, 4, 4, 8), conv, bias, packed=kept).shape == (2, 4, 4, 8)
    assert kept._ready is None
    plain = conv_bias_act(x, conv, bias)
    torch.testing.assert_close(conv_bias_act(x, conv, bias, packed=kept), plain)


def test_a_cpu_without_avx512_has_bf16_too(monkeypatch):
    """There oneDNN's call refuses bf16, which goes to PyTorch's own convolution."""

    def refuse(*_):
        raise RuntimeError("the bf16 path needs AVX-512")

    onednn.takes.cache_clear()
    monkeypatch.setattr(onednn.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(onednn, "conv_bias_act", refuse)
    try:
        x, weight, bias = torch.randn(2, 5, 4, 8), random_weight(8, 8, 3), torch.randn(8)
        conv, added = Conv(weight.bfloat16(), 1, (1,) * 4), torch.randn(2, 5, 4, 8)
        exact = conv_bias_act(
            x.bfloat16().double(), conv._replace(weight=conv.weight.double()), bias, added.bfloat16().double()
        )
        for kept in (None, PackedConv()):
            ours = conv_bias_act(x.bfloat16(), conv, bias, added.bfloat16(), packed=kept)
            assert relative_error(ours, exact) < FLOOR[torch.bfloat16]
        with pytest.raises(RuntimeError, match="AVX-512"):
            conv_bias_act(x, conv._replace(weight=weight.float()), bias, added)
    finally:
        onednn.takes.cache_clear()


def test_weights_that_are_set_anew_are_noticed_and_others_after_repack():
    conv = FoldedConv(torch.nn.Conv2d(8, 8, 1, bias=False), None, act=None)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    first = conv(x)
    for change in (
        lambda: setattr(conv.weight, "data", conv.weight.data * 2),
        lambda: setattr(conv.weight, "data", conv.weight.data.clone().mul_(2)),
        lambda: conv.weight.mul_(2),
        lambda: conv.load_state_dict({"weight": conv.weight * 2, "bias": conv.bias}),
    ):
        change()
        first = first * 2
        for _ in range(2):
            torch.testing.assert_close(conv(x), first)
    conv.bias.data = conv.bias + 1
    torch.testing.assert_close(conv(x), first + 1)
    conv.weight.numpy()[:] *= 2  # which no version counts
    conv.bias.data.zero_()
    repack(torch.nn.Sequential(conv))
    torch.testing.assert_close(conv(x), first * 2)


def test_a_folded_convolution_is_differentiable_in_the_image_and_the_shortcut():
    for stride in (1, 2):
        conv = FoldedConv(torch.nn.Conv2d(8, 8, 3, stride, 1, bias=False), None, act="relu")
        x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
        residual = torch.randn_like(conv(x))
        for _ in range(2):  # ready for a call like this one, too
            conv(x, residual)
        for needs in ((x,), (residual,), (x, residual)):
            inputs = [t.clone().requires_grad_(any(t is need for need in needs)) for t in (x, residual)]
            exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
            y = torch.nn.functional.conv2d(exact[0], conv.weight.double(), conv.bias.double(), stride, 1) + exact[1]
            y.relu().square().sum().backward()
            conv(*inputs).square().sum().backward()
            for ours, theirs in zip(inputs, exact):
                assert (ours.grad is None) == (theirs.grad is None)
                if theirs.grad is not None:
                    assert relative_error(ours.grad, theirs.grad) <= FLOOR[torch.float32]
        ours = torch.func.grad(lambda x, conv=conv: conv(x).sum())(x)
        z = x.clone().requires_grad_()
        conv(z).sum().backward()
        torch.testing.assert_close(ours, z.grad)
