"""The stem as one operation: convolution, BatchNorm, ReLU and max-pool.

The normalised, rectified image in front of the pool, the largest activation of a ResNet, never exists: the pool reads
the convolution's output. For backward the image, that output and a byte an output (the winning tap) are kept.
"""

from torch import Tensor

from fastres.kernels.geometry import check_pool
from fastres.ops.fused import fused
from fastres.ops.layers import (
    Layer,
    Pad,
    Statistics,
    check_input,
    group_of,
    layer_shape,
    norm_vectors,
    output_hw,
    pixels,
)
from fastres.ops.nodes import Conv, Norm, Pool
from fastres.ops.plan import Plan


def stem(x: Tensor, layer: Layer, kernel: int, stride: int, pad: Pad) -> tuple[Tensor, Statistics]:
    """``max_pool(relu(bn(conv(x))))``, differentiable, with the BatchNorm's `Statistics`; GELU comes behind the pool.

    Args:
        x: [N, H, W, C].
        kernel, stride, pad: of the pool; padded pixels never win.

    Raises:
        RuntimeError, ValueError: as `torch.nn.functional.conv2d`, `batch_norm` and `max_pool2d` raise them.
        ValueError: for a kernel of more than `fastres.kernels.geometry.LARGEST_POOL`.
    """
    check_input(x, [layer.weight])
    shape = layer_shape(tuple(x.shape), layer)
    if stride < 1:
        raise RuntimeError("stride should not be zero")
    check_pool(kernel)
    if min(pad) < 0 or 2 * max(pad) > kernel:
        raise RuntimeError(
            f"pad should be at most half of effective kernel size, but got pad={pad}, kernel_size={kernel}"
        )
    if min(output_hw(shape[1:3], (kernel, kernel), stride, pad)) < 1:
        raise RuntimeError(f"Given input size: ({shape[3]}x{shape[1]}x{shape[2]}). Output size is too small")
    training = layer.norm.running_mean is None
    conv = Conv(layer.stride, layer.pad, layer.dilation, moments=training)
    plan = Plan(
        (conv, Norm(layer.norm.eps, training, layer.norm.act), Pool(kernel, stride, pad)), group_of([layer.norm])
    )
    out, coefs = fused(plan, x, [layer.weight, *norm_vectors(layer.norm)])
    return out, Statistics(coefs[0], pixels(shape))
