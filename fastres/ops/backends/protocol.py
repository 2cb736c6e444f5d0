"""The interface of a backend: the primitives that the fused operations are made of.

Activations are contiguous NHWC, weights ``[Cout, KH, KW, Cin]``. Statistics, coefficients and sums are fp32, or fp64
for fp64 activations. A BatchNorm's coefficients ``coef`` are [5, C]: mean, biased variance, rstd, scale and shift.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastres.kernels.geometry import Pad, is_centred, output_hw
from fastres.kernels.types import Moments

MEAN, VAR, RSTD, SCALE, SHIFT = range(5)


class Activation(NamedTuple):
    """``act(y*scale + shift)``, which a primitive computes while it reads y; y itself without ``coef``."""

    y: Tensor  # [N, H, W, C]
    coef: Tensor | None = None  # [5, C]
    act: str = "relu"  # one of `fastres.kernels.types.ACTIVATIONS`

    @property
    def normalised(self) -> Normalised:
        """The BatchNorm with its activation, where there is one."""
        assert self.coef is not None
        return Normalised(self.y, self.coef, self.act)


class Normalised(NamedTuple):
    """``y*scale + shift``, what a BatchNorm makes of y, which a primitive computes while it reads y."""

    y: Tensor  # [N, H, W, C]
    coef: Tensor  # [5, C]
    act: str = "relu"  # the activation behind it, where the primitive applies one


class Gradient(NamedTuple):
    """``A*dz + B*y + C``, which a primitive computes while it reads dz and y.

    Without y it is ``A*dz`` (B and C are 0, and 0 times a y that is not finite would be NaN), without ``abc`` dz.
    """

    dz: Tensor  # [N, H, W, C]
    y: Tensor | None = None  # [N, H, W, C]
    abc: Tensor | None = None  # [3, C]


class Shortcut(NamedTuple):
    """What is added to an activation, normalised by its own coefficients where it has some; or such a gradient.

    Every ``stride``-th pixel of an activation is added to as many of the first channels as it has. A gradient is added
    to every ``stride``-th pixel, as many of its first channels as there are.
    """

    tensor: Tensor
    coef: Tensor | None = None
    stride: int = 1


class Convolution(NamedTuple):
    """A convolution without bias."""

    weight: Tensor  # [Cout, KH, KW, Cin]
    stride: int = 1
    pad: Pad = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: int = 1

    def shape_of(self, x: Tensor) -> tuple[int, int, int, int]:
        """Shape [N, OH, OW, Cout] of the convolution of x [N, H, W, Cin]."""
        kernel = self.weight.shape[1], self.weight.shape[2]
        hw = output_hw((x.shape[1], x.shape[2]), kernel, self.stride, self.pad, self.dilation)
        return x.shape[0], *hw, self.weight.shape[0]

    def is_centred(self, x: Tensor) -> bool:
        """See `fastres.kernels.geometry.is_centred`, for x [N, H, W, Cin]."""
        kernel = self.weight.shape[1], self.weight.shape[2]
        return is_centred(kernel, self.pad, self.dilation, self.stride, x.shape[1:3], self.shape_of(x)[1:3])


class Window(NamedTuple):
    """A square pooling window."""

    kernel: int
    stride: int
    pad: Pad  # top, left, bottom, right


class Backend(Protocol):
    """One implementation of all primitives. No primitive changes its arguments unless it says so."""

    name: str

    # -- BatchNorm's vectors --

    def moments(self, y: Tensor) -> Moments:
        """Per-channel statistics of y [N, H, W, C] by tiles."""

    def finalize(self, moments: Moments, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        """The coefficients [5, C] of a BatchNorm by the merged tiles (Chan et al. 1979)."""

    def running_coef(
        self, running_mean: Tensor, running_var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> Tensor:
        """The coefficients [5, C] of a BatchNorm by the given statistics."""

    def bn_backward_coef(self, sums: Tensor, coef: Tensor, count: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and C [3, C] of BatchNorm's backward ``dy = A*dz + B*y + C``; the gradients of gamma and beta [C].

        Args:
            sums: [T, 2, C], by tiles, of dz and of ``dz * xhat``.
            count: pixels that the statistics were taken over.
            training: whether they are the batch's; else B and C are 0.
        """

    # -- passes over activations --

    def bn_add_relu(self, normalised: Normalised, shortcut: Shortcut | None = None, relu: bool = True) -> Tensor:
        """``act(y*scale + shift + shortcut)``, the end of a residual block; without ``relu`` the sum."""

    def bn_add_relu_backward(
        self,
        dout: Tensor,
        out: Tensor | None,
        normalised: Normalised,
        shortcut: Shortcut | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``dz = dout * (out > 0)`` and [T, 2, C] sums of the BatchNorm and of the shortcut's.

        The gradient of another activation than the ReLU is of the sum, which is computed again.

        Args:
            out: the block's result; None: it had no activation, and dz is a copy.
            shortcut: with its coefficients, if it has sums; without them it counts for what is computed again alone,
                and is of y's shape.
            in_place: whether dz takes dout's memory.
        """

    def bn_backward_apply(self, gradient: Gradient, residual: Tensor | None = None) -> Tensor:
        """``A*dz + B*y + C (+ residual)``, rounded once."""

    def bn_relu_max_pool(self, normalised: Normalised, window: Window) -> tuple[Tensor, Tensor]:
        """The max-pool of the rectified BatchNorm, and each result's winning tap, uint8, the first among equals.

        GELU, which is not monotone, comes behind the pool.
        """

    def bn_relu_max_pool_backward(
        self, dout: Tensor, index: Tensor, normalised: Normalised, window: Window
    ) -> tuple[Tensor, Tensor]:
        """The gradient at BatchNorm's output, through the pool and the ReLU, and BatchNorm's [T, 2, C] sums."""

    def global_avg_pool(self, x: Tensor) -> Tensor:
        """The mean over the pixels, [N, C] of [N, H, W, C]."""

    def global_avg_pool_backward(self, dout: Tensor, hw: tuple[int, int]) -> Tensor:
        """Each pixel's share of dout [N, C]: [N, H, W, C]."""

    # -- convolutions --

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        """Whether weights of convolutions in this dtype may come in fp32: they are rounded where they are read."""
        return False

    def conv(
        self, activation: Activation, conv: Convolution, residual: Tensor | None = None, moments: bool = True
    ) -> tuple[Tensor, Moments | None]:
        """``y = conv2d(activation) (+ residual)``, and with ``moments`` y's statistics."""

    def bn_add_relu_conv(
        self, normalised: Normalised, shortcut: Shortcut | None, weight: Tensor, moments: bool = True
    ) -> tuple[Tensor, Tensor, Moments | None]:
        """`bn_add_relu` and the 1x1 convolution of its result: (out, y, moments).

        Args:
            shortcut: of the activation's shape.
            weight: [Cout, 1, 1, Cin].
        """

    def conv_backward(
        self,
        gradient: Gradient,
        activation: Activation,
        conv: Convolution,
        joined: Shortcut | None = None,
        end: Normalised | None = None,
        need_dx: bool = True,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of a convolution: (dx, sums, dw).

        dx goes through the function of an activation that has coefficients. With ``end`` the activation is the stored
        end of a block, ``relu(end + shortcut)``, and dx goes through that ReLU. Either way the [T, 2, C] sums are of
        that BatchNorm. dw is fp32, or fp64.

        Args:
            joined: a gradient that is added to dx before the ReLU; dx may take its memory.
        """

    def conv_dgrad(self, gradient: Gradient, conv: Convolution, hw: tuple[int, int]) -> Tensor:
        """The gradient [N, *hw, Cin] at the convolution's input alone."""

    def conv_wgrad(self, gradient: Gradient, activation: Activation, conv: Convolution) -> Tensor:
        """The gradient of the weight alone; fp32, or fp64."""

    def conv_bias_act(
        self, x: Tensor, conv: Convolution, bias: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        """``relu(conv2d(x) + bias (+ residual))``, for inference."""

    # -- walks over the primitives --

    def repeated(
        self, key: Hashable, inputs: Sequence[Tensor | None], walk: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """The results of ``walk()``, which calls primitives; a backend may remember what a walk did and do that again.
        What a primitive in it left to a later one is filled in when it ends.

        Args:
            key: all that the walk depends on beside its inputs.
            inputs: all tensors that it reads.
            walk: makes every result anew.
        """
        return walk()

    # -- process groups --

    def all_reduce(self, tensor: Tensor, group: str) -> None:
        """Add up over the ranks of the process group of that name, in place."""
        import torch.distributed as dist  # not every build of PyTorch has it

        find = dist.distributed_c10d._resolve_process_group
        dist.all_reduce(tensor, group=find(group))  # type: ignore[arg-type]  # a name


def statistics_dtype(activations: torch.dtype) -> torch.dtype:
    """fp32, but fp64 for fp64 activations."""
    return torch.float64 if activations == torch.float64 else torch.float32
