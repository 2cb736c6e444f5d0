"""Bad input is refused in PyTorch's own words."""

import pytest
import torch
import torch.nn.functional as F
from support_kernels import device
from support_ops import Calls
from torch import nn

from fastres import ops
from fastres.ops import Conv, Layer, Norm, Statistics, residual_block, symmetric
from fastres.ops.layers import nhwc_weight, nhwc_weights, output_hw


def layer(**norm):
    return Layer(
        torch.randn(4, 3, 3, 3), Norm(**{"gamma": torch.rand(4), "beta": torch.rand(4), **norm}), 1, symmetric(1)
    )


@pytest.mark.parametrize(
    "x, message",
    [
        (
            torch.randn(2, 8, 8, 3).double(),
            r"Input type \(torch.float64\) and weight type \(torch.float32\) should be the",
        ),
        (torch.ones(2, 8, 8, 3, dtype=torch.int64), r"Input type \(torch.int64\) should be floating point"),
        (torch.randn(2, 8, 8, 3, device="meta"), "Expected all tensors to be on the same device.* meta .* and cpu"),
        (torch.randn(2, 2, 8, 8, 3), r"expected 4D input \(got 5D input\)"),
        (torch.randn(8, 8, 3), r"expected 4D input \(got 3D input\)"),
        (torch.randn(2, 8, 8, 0), "got 0 channels instead"),
        (torch.randn(2, 8, 8, 3).to_sparse(), "expected input to be a dense tensor .* got torch.sparse_coo"),
    ],
    ids=["fp64", "int", "device", "5d", "3d", "no channels", "sparse"],
)
def test_bad_input(x, message):
    with pytest.raises(RuntimeError, match=message):
        residual_block(x, [layer()])


X = torch.randn(2, 8, 8, 3)


@pytest.mark.parametrize(
    "x, weight, options",
    [
        (torch.randn(2, 5, 8, 8), torch.randn(4, 3, 3, 3), {}),
        (torch.randn(2, 3, 1, 0), torch.randn(4, 3, 3, 3), {}),
        (torch.randn(2, 3, 8, 8), torch.randn(0, 3, 3, 3), {}),
        (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), dict(stride=0)),
        (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), dict(padding=-1)),
        (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), dict(dilation=0)),
        (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), dict(dilation=5)),
    ],
    ids=["channels", "empty", "no outputs", "stride", "padding", "dilation", "taps too far apart"],
)
def test_the_message_is_conv2ds_own(x, weight, options):
    with pytest.raises(RuntimeError) as theirs:
        F.conv2d(x, weight, **{"padding": 1, **options})
    geometry = options.get("stride", 1), symmetric(options.get("padding", 1)), options.get("dilation", 1)
    with pytest.raises(RuntimeError) as ours:
        residual_block(x.permute(0, 2, 3, 1), [Layer(weight, Norm(None, None), *geometry)])
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.randn(4, 3, 3), r"expected 4D weight \(got 3D weight\)"),
        (torch.randn(4, 3, 3, 3).to_sparse(), "expected weight to be a dense tensor"),
        (torch.randn(4, 3, 3, 3, device="meta"), "same device.* cpu .* and meta"),
        (torch.randn(4, 3, 3, 3).bfloat16(), r"Input type \(torch.float32\) and weight type \(torch.bfloat16\)"),
        (torch.randn(4, 3, 0, 3), "expected weight to be at least 1 at dimension 2"),
    ],
    ids=["3d", "sparse", "device", "bf16", "no taps"],
)
def test_bad_weight(weight, message):
    for call in (
        lambda: residual_block(X, [layer()._replace(weight=weight)]),
        lambda: residual_block(X, [layer()], layer()._replace(weight=weight)),
        lambda: ops.preact_block(X, [Layer(weight, Norm(None, None))]),
        lambda: ops.stem(X, layer()._replace(weight=weight), 2, 2, symmetric(0)),
        lambda: ops.conv_bias_act(X, Conv(weight), torch.rand(4)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(gamma=torch.rand(5)), "weight should contain 4 elements not 5"),
        (dict(beta=torch.rand(3)), "bias should contain 4 elements not 3"),
        (dict(gamma=torch.rand(4, device="meta")), r"same device.* meta \(weight\)"),
        (dict(running_mean=torch.rand(4)), "running_var must be defined in evaluation mode"),
        (dict(running_var=torch.rand(4)), "running_mean must be defined in evaluation mode"),
        (dict(running_mean=torch.rand(4), running_var=torch.rand(4, device="meta")), r"meta \(running_var\)"),
    ],
    ids=["gamma", "beta", "device", "no variance", "no mean", "device of variance"],
)
def test_bad_norm(wrong, message):
    made = layer(**wrong)
    for call in (
        lambda: residual_block(X, [made]),
        lambda: residual_block(X, [layer()], made),
        lambda: ops.preact_block(torch.randn(2, 8, 8, 4), [Layer(torch.randn(4, 4, 1, 1), made.norm)]),
        lambda: ops.stem(X, made, 2, 2, symmetric(0)),
        lambda: ops.bn_relu(torch.randn(2, 8, 8, 4), made.norm),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


RESULT = torch.randn(2, 8, 8, 4)


@pytest.mark.parametrize(
    "added, message",
    [
        (RESULT.double(), r"Input type \(torch.float32\) and shortcut type \(torch.float64\) should be the same"),
        (RESULT.long(), r"Input type \(torch.int64\) should be floating point"),
        (RESULT.to("meta"), r"same device.* meta \(shortcut\)"),
        (RESULT[None], r"expected 4D input \(got 5D input\)"),
        (
            RESULT[:, :1],
            r"size of the shortcut \[2, 4, 1, 8\] must match the size of the block's result \[2, 4, 8, 8\]",
        ),
    ],
    ids=["fp64", "int", "device", "5d", "size"],
)
def test_bad_shortcut(added, message):
    with pytest.raises(RuntimeError, match=message):
        residual_block(X, [layer()], added)
    with pytest.raises(RuntimeError, match=message):
        ops.conv_bias_act(X, Conv(layer().weight, 1, symmetric(1)), torch.rand(4), added)


def test_a_preactivation_shortcut_is_its_input():
    with pytest.raises(ValueError, match="is x itself, a Conv or None"):
        ops.preact_block(X, [Layer(torch.randn(3, 3, 1, 1), Norm(None, None))], X.clone())


def test_no_layers():
    for call in (residual_block, ops.preact_block):
        with pytest.raises(ValueError, match="at least one layer"):
            call(X, [])


def test_bad_bias_in_conv2ds_words():
    weight = torch.randn(4, 3, 3, 3)
    for bias in (torch.rand(5), torch.rand(4, 1)):
        with pytest.raises(RuntimeError) as theirs:
            F.conv2d(X.permute(0, 3, 1, 2), weight, bias)
        with pytest.raises(RuntimeError) as ours:
            ops.conv_bias_act(X, Conv(weight), bias)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(RuntimeError, match=r"same device.* meta \(bias\)"):
        ops.conv_bias_act(X, Conv(weight), torch.rand(4, device="meta"))


@pytest.mark.parametrize(
    "coef, message",
    [
        (torch.rand(5, 4), r"coef should be of size \[5, 3\], but got size \[5, 4\]"),
        (torch.rand(5, 3, device="meta"), r"same device.* meta \(coef\)"),
    ],
    ids=["size", "device"],
)
def test_bad_statistics_handed_over(coef, message):
    for call in (
        lambda: ops.bn_relu(X, Norm(None, None), coef),
        lambda: ops.preact_block(X, [Layer(torch.randn(3, 3, 1, 1), Norm(None, None))], X, coef),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_running_statistics_of_another_size():
    used = Statistics(torch.rand(5, 4), 24)
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 5"):
        ops.update_running([torch.rand(5)], [torch.rand(5)], [used], [0.1])
    with pytest.raises(RuntimeError, match="running_var should contain 4 elements not 3"):
        ops.update_running([torch.rand(4)], [torch.rand(3)], [used], [0.1])
    with pytest.raises(RuntimeError, match=r"same device.* meta \(running_var\)"):
        ops.update_running([torch.rand(4)], [torch.rand(4, device="meta")], [used], [0.1])


def test_bad_pool_in_max_pool2ds_words():
    images = torch.randn(2, 4, 8, 8)
    for kernel, stride, pad in ((3, 0, 1), (3, 1, 2)):
        with pytest.raises(RuntimeError) as theirs:
            F.max_pool2d(images, kernel, stride, pad)
        with pytest.raises(RuntimeError) as ours:
            ops.stem(X, layer(), kernel, stride, symmetric(pad))
        assert str(ours.value).split(", but got")[0] == str(theirs.value).split(", but got")[0]


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.randn(2, 0, 8, 3), r"non-zero size for non-batch dimensions, but input has sizes \[2, 3, 0, 8\]"),
        (torch.randn(2, 8, 8, 0), "got 0 channels instead"),
        (torch.randn(2, 2, 8, 8, 3), r"expected 4D input \(got 5D input\)"),
        (torch.ones(2, 8, 8, 3).long(), r"Input type \(torch.int64\) should be floating point"),
    ],
    ids=["no pixels", "no channels", "5d", "int"],
)
def test_bad_input_of_the_average_pool(x, message):
    with pytest.raises(RuntimeError, match=message):
        ops.global_avg_pool(x)


@pytest.mark.parametrize("mode", ["aten", "triton"])
def test_vectors_may_have_gaps_and_dimensions(mode):
    """Kernels read them without strides: the operations hand over copies."""
    spaced = torch.rand(4, 8, device=device())[:, ::2]
    gamma, beta, mean, var = spaced[0].view(4, 1), spaced[1, :1].expand(4), spaced[2], spaced[3]
    x, weight = X.to(device()), torch.randn(4, 3, 3, 3, device=device())
    running, expected = torch.zeros(2, 8, device=device()), torch.zeros(2, 8, device=device())
    with ops.implementation(mode):
        out, used = residual_block(x, [Layer(weight, Norm(gamma, beta, mean, var))])
        trained, used = residual_block(x, [Layer(weight, Norm(gamma, beta))])
        biased = ops.conv_bias_act(x, Conv(weight), mean, relu=False)
        ops.update_running([running[0, ::2]], [running[1, ::2]], used, [1.0])
    y = F.conv2d(x.permute(0, 3, 1, 2), weight)
    flat = gamma.flatten()
    F.batch_norm(y, expected[0, ::2], expected[1, ::2], training=True, momentum=1.0)
    for actual, theirs in (
        (out, F.relu(F.batch_norm(y, mean, var, flat, beta))),
        (trained, F.relu(F.batch_norm(y, None, None, flat, beta, training=True))),
        (biased, y + mean[:, None, None]),
    ):
        torch.testing.assert_close(actual.permute(0, 3, 1, 2), theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(running, expected, rtol=1e-2, atol=1e-2)


def test_the_batch_size_message_is_batch_norms_own():
    bn = nn.BatchNorm2d(4)
    with pytest.raises(ValueError) as theirs:
        bn(torch.randn(1, 4, 1, 1))
    with pytest.raises(ValueError) as ours:
        residual_block(torch.randn(1, 1, 1, 3), [layer()])
    assert str(ours.value) == str(theirs.value)


def test_an_empty_batch_is_fine_where_no_statistics_are_needed():
    out, _ = residual_block(torch.randn(0, 8, 8, 3), [layer(running_mean=torch.rand(4), running_var=torch.rand(4))])
    assert out.shape == (0, 8, 8, 4)


def test_channels_last_weights_are_read_in_place():
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    assert nhwc_weight(weight, torch.float32).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_cast_together(dtype):
    """Whatever their dtypes and layouts, as one by one: [Cout, KH, KW, Cin], contiguous."""
    shapes = (4, 3, 3, 3), (8, 4, 1, 1), (5, 1, 2, 1)
    weights = [torch.randn(shape).to(kind) for shape in shapes for kind in (torch.float32, torch.bfloat16)]
    weights += [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    with Calls() as calls:
        together = nhwc_weights(weights, dtype)
    assert calls.found["_foreach_copy_"] == 1 and not calls.found["_to_copy"]
    for ours, weight in zip(together, weights, strict=True):
        alone = nhwc_weight(weight, dtype)
        assert ours.dtype == dtype and ours.is_contiguous() and torch.equal(ours, alone)
    assert nhwc_weights([], dtype) == []


def test_no_gradients_of_coefficients_are_filled_in():
    """Autograd would make zeros of each BatchNorm's, which nothing reads."""
    x = torch.randn(2, 8, 8, 3, requires_grad=True)
    out, _ = residual_block(x, [layer()])
    with Calls() as calls:
        out.backward(torch.ones_like(out))
    assert x.grad is not None and not {"zeros", "zeros_like"} & calls.found.keys()


def test_a_result_whose_gradient_is_undefined_passes_none_on():
    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, dout):
            return None

    x = torch.randn(2, 8, 8, 3, requires_grad=True)
    made = layer()
    Ends.apply(residual_block(x, [made])[0]).backward()
    assert x.grad is None and made.weight.grad is None


def test_output_sizes_are_convolutions():
    for pad in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 2)):
        x = torch.zeros(1, 1, 9 + pad[0] + pad[2], 6 + pad[1] + pad[3])
        expected = nn.functional.conv2d(x, torch.zeros(1, 1, 3, 2), stride=2).shape[2:]
        assert output_hw((9, 6), (3, 2), 2, pad) == tuple(expected)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters():
    x = torch.randn(2, 8, 8, 3, requires_grad=True)
    made = layer()
    made.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = residual_block(x, [made])
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and made.weight.grad.dtype == torch.float32
    low = made._replace(weight=made.weight.detach().bfloat16())
    with ops.implementation("aten"):
        torch.testing.assert_close(residual_block(x.detach().bfloat16(), [low])[0], out)
