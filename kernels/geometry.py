"""Sizes of convolutions and pools over NHWC tensors."""

from collections.abc import Sequence

Pad = tuple[int, int, int, int]  # top, left, bottom, right


def extent(kernel: int, dilation: int) -> int:
    """Pixels from the first to the last that a kernel reads along an axis, its taps ``dilation`` pixels apart."""
    return (kernel - 1) * dilation + 1


def output_hw(
    hw: Sequence[int], kernel: Sequence[int], stride: int, pad: Sequence[int], dilation: int = 1
) -> tuple[int, int]:
    """Height and width that a convolution or pool makes of ``hw``."""
    top, left, bottom, right = pad
    height, width = extent(kernel[0], dilation), extent(kernel[1], dilation)
    return (hw[0] + top + bottom - height) // stride + 1, (hw[1] + left + right - width) // stride + 1


def is_pointwise(kernel: Sequence[int], pad: Sequence[int]) -> bool:
    """Whether a convolution reads single pixels, each of its input where it has no stride."""
    return tuple(kernel) == (1, 1) and not any(pad)


def is_centred(
    kernel: Sequence[int], pad: Sequence[int], dilation: int, stride: int, hw: Sequence[int], out_hw: Sequence[int]
) -> bool:
    """Whether a convolution has a tap by which it reads every ``stride``-th pixel from the first on, one for each pixel
    of its result: so has one with the usual padding, and one of single pixels."""
    taps = (size * dilation for size in kernel)
    has_tap = all(side % dilation == 0 and side < most for side, most in zip(pad[:2], taps))
    return has_tap and all((out - 1) * stride < size for out, size in zip(out_hw, hw))


LARGEST_POOL = 16  # a side's taps: a byte tells which of them all has won


def check_pool(kernel: int) -> None:
    """Refuse a max-pool's window that is too large.

    Raises:
        ValueError: for more than `LARGEST_POOL` taps a side.
    """
    if kernel > LARGEST_POOL:
        raise ValueError(f"kernel of the max-pool is {kernel}: at most {LARGEST_POOL}")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of 2 that holds ``size``, within [least, most], themselves powers of 2."""
    return min(most, max(least, 1 << (size - 1).bit_length()))
