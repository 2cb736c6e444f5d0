"""Bad input is refused in PyTorch's own words."""

import pytest
import torch
from torch import nn

from fastres import ops
from fastres.ops import Layer, Norm, residual_block, symmetric
from fastres.ops.layers import nhwc_weight, output_hw


def layer(**norm):
    return Layer(torch.randn(4, 3, 3, 3), Norm(torch.rand(4), torch.rand(4), **norm), 1, symmetric(1))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.randn(2, 8, 8, 3).double(), r"Input type \(torch.float64\) and weight type \(torch.float32\) should be the"),
        (torch.ones(2, 8, 8, 3, dtype=torch.int64), r"Input type \(torch.int64\) should be floating point"),
        (torch.randn(2, 8, 8, 3, device="meta"), "Expected all tensors to be on the same device.* meta .* and cpu"),
        (torch.randn(2, 2, 8, 8, 3), r"expected 4D input \(got 5D input\)"),
        (torch.randn(8, 8, 3), r"expected 4D input \(got 3D input\)"),
        (torch.randn(2, 8, 8, 0), "got 0 channels instead"),
    ],
    ids=["fp64", "int", "device", "5d", "3d", "no channels"],
)
def test_bad_input(x, message):
    with pytest.raises(RuntimeError, match=message):
        residual_block(x, [layer()])


@pytest.mark.parametrize("x", [torch.randn(2, 5, 8, 8), torch.randn(2, 3, 1, 0)], ids=["channels", "empty"])
def test_the_message_is_conv2ds_own(x):
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    with pytest.raises(RuntimeError) as theirs:
        conv(x)
    with pytest.raises(RuntimeError) as ours:
        residual_block(x.permute(0, 2, 3, 1), [Layer(conv.weight, layer().norm, 1, symmetric(1))])
    assert str(ours.value) == str(theirs.value)


def test_wrong_number_of_parameters():
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 5"):
        residual_block(torch.randn(2, 8, 8, 3), [layer(running_mean=torch.rand(5), running_var=torch.rand(5))])


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
