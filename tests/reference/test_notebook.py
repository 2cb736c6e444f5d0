"""The notebook's network: its printed shapes, TensorFlow's padding, slim's BatchNorm."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.reference.notebook import NotebookResNet, SameConv2d, SameMaxPool2d, Subsample, same_padding

SIZES = [(size, kernel, stride) for size in (1, 2, 5, 8, 11, 96) for kernel in (1, 2, 3, 5) for stride in (1, 2, 3)]


def tensorflow_total(size: int, kernel: int, stride: int) -> int:
    """Padding of one axis in the form that TensorFlow's documentation gives for `tf.nn` padding 'SAME'."""
    rest = size % stride
    return max(kernel - (rest if rest else stride), 0)


@pytest.mark.parametrize("size, kernel, stride", SIZES)
def test_padding_is_tensorflows(size, kernel, stride):
    before, after = same_padding(size, kernel, stride)
    assert before + after == tensorflow_total(size, kernel, stride)
    assert after - before in (0, 1)


@pytest.mark.parametrize(
    "size, kernel, stride, expected", [(96, 5, 2, (1, 2)), (48, 3, 2, (0, 1)), (24, 3, 1, (1, 1)), (96, 1, 2, (0, 0))]
)
def test_padding_of_the_notebooks_layers(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected


def windows(x: torch.Tensor, kernel: int, stride: int):
    """(row, column, the pixels of the window that lie in the image and their place in it) of each output pixel."""
    height, width = x.shape[2:]
    top, left = tensorflow_total(height, kernel, stride) // 2, tensorflow_total(width, kernel, stride) // 2
    for i in range(math.ceil(height / stride)):
        for j in range(math.ceil(width / stride)):
            first_row, first_column = i * stride - top, j * stride - left
            rows = slice(max(first_row, 0), min(first_row + kernel, height))
            columns = slice(max(first_column, 0), min(first_column + kernel, width))
            place = (
                slice(rows.start - first_row, rows.stop - first_row),
                slice(columns.start - first_column, columns.stop - first_column),
            )
            yield i, j, x[:, :, rows, columns], place


@pytest.mark.parametrize("height, width, kernel, stride", [(8, 7, 5, 2), (6, 9, 3, 2), (5, 4, 3, 1), (7, 8, 2, 3)])
def test_convolution_and_pool_pixel_by_pixel(height, width, kernel, stride):
    torch.manual_seed(0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64) - 5  # a padded 0 would win the maximum
    conv = SameConv2d(3, 4, kernel, stride).double()
    convolved, pooled = conv(x), SameMaxPool2d(kernel, stride)(x)
    assert convolved.shape[2:] == pooled.shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))
    for i, j, pixels, place in windows(x, kernel, stride):
        expected = torch.einsum("nchw,ochw->no", pixels, conv.weight[(slice(None), slice(None), *place)])
        torch.testing.assert_close(convolved[:, :, i, j], expected)
        assert torch.equal(pooled[:, :, i, j], pixels.amax((2, 3)))


def test_identity_shortcut_keeps_every_second_pixel():
    x = torch.arange(2 * 3 * 5 * 6.0).view(2, 3, 5, 6)
    assert torch.equal(Subsample(2)(x), x[:, :, 0::2, 0::2])


def test_printed_shapes():
    model, shapes = NotebookResNet().eval(), {}

    def note(name):
        return lambda module, inputs, out: shapes.update({name: tuple(out.shape[1:])})

    for name in ("conv1", "maxpool", "layer1.1", "layer2.1", "fc"):
        model.get_submodule(name).register_forward_hook(note(name))
    model(torch.zeros(1, 3, 96, 96))
    assert shapes == {
        "conv1": (32, 48, 48),
        "maxpool": (32, 24, 24),
        "layer1.1": (128, 24, 24),
        "layer2.1": (512, 12, 12),
        "fc": (10,),
    }


def test_shortcuts_are_projections_where_widths_differ():
    model = NotebookResNet()
    kinds = [type(block.downsample) for block in [*model.layer1, *model.layer2]]
    assert kinds == [nn.Sequential, type(None), nn.Sequential, Subsample]
    strides = [block.conv2.stride for block in [*model.layer1, *model.layer2]]
    assert strides == [(1, 1), (1, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize("gamma", [False, True])
def test_batch_norm_is_slims(gamma):
    norms = [m for m in NotebookResNet(gamma=gamma).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 15  # stem, four times three, two projections
    for norm in norms:
        assert norm.eps == 1e-3 and norm.momentum == pytest.approx(1 - 0.999)
        assert (norm.weight is not None) == gamma and norm.bias is not None


def test_number_of_parameters():
    def block(inputs, outputs, projection):
        width = outputs // 4
        kernels = inputs * width + 9 * width * width + width * outputs + projection * inputs * outputs
        return kernels + 2 * width + outputs + projection * outputs  # a beta a channel and no gamma

    blocks = block(32, 128, 1) + block(128, 128, 0) + block(128, 512, 1) + block(512, 512, 0)
    expected = 3 * 25 * 32 + 32 + blocks + 512 * 10 + 10
    assert sum(p.numel() for p in NotebookResNet().parameters()) == expected


def test_relu_of_the_logits_is_an_option_that_is_off():
    torch.manual_seed(0)
    model = NotebookResNet().eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = model(x)
        model.relu_logits = True
        assert (logits < 0).any() and torch.equal(model(x), F.relu(logits))
    assert NotebookResNet(relu_logits=True).relu_logits
