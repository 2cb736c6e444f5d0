"""Gradients of the fused operations that can be differentiated again.

Where a backward pass is itself recorded (``create_graph=True``: gradient penalties, Hessian-vector products, MAML), or
runs under a transform of `torch.func`, its operation is computed again by `fastres.ops.plain` from what the forward
pass was given, and PyTorch differentiates that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastres.ops import plain
from fastres.ops.layers import Conv, Identity, Layer, Norm, Pad, dilation_of, pad_of
from fastres.ops.operation import no_autocast

Gradients = list[Tensor | None]


class Given:
    """The parameters that a forward pass was given, to differentiate its gradients by.

    They are no saved tensors: which of those may change before backward is PyTorch's to say, and it says so for first
    gradients already.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        self._tensors = list(tensors)
        self._versions = [_version(t) for t in tensors]

    def tensors(self) -> list[Tensor | None]:
        """The same ones.

        Raises:
            RuntimeError: where one was changed since.
        """
        for tensor, version in zip(self._tensors, self._versions):
            if version != _version(tensor):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{list(tensor.shape) if tensor is not None else None} is at version {_version(tensor)}; expected "
                    f"version {version} instead"
                )
        return self._tensors


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def given(tensors: Sequence[Tensor | None]) -> Given | None:
    """What `gradients` will need; None in compiled code, which has no second gradients."""
    return None if torch.compiler.is_compiling() else Given(tensors)


def is_differentiated(dout: Tensor) -> bool:
    """Whether the gradients that a backward pass makes of dout are to be differentiated, batched or dualised
    themselves.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or plain.is_transformed() or torch._C._functorch.is_legacy_batchedtensor(dout)


def gradients(
    form: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], dout: Tensor, group: str | None
) -> Gradients:
    """Gradients of ``form(*inputs)`` where needed, differentiable in turn; the result is computed again.

    Args:
        form: the operation, in the functions of `fastres.ops.plain`.
        inputs: what the forward pass was given.
        group: of its synchronised BatchNorms.

    Raises:
        RuntimeError: where statistics are those of several ranks.
    """
    plain.check_alone(group)
    again = torch.is_grad_enabled()
    with torch.enable_grad(), no_autocast(dout.device.type):
        # aliases, so that what one input is made of another one of them counts for the second gradients alone
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [alias for alias, need in zip(aliases, needs) if need and alias is not None]
        found = iter(torch.autograd.grad(form(*aliases), wanted, dout, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needs]


def norm_of(vectors: Sequence[Any], eps: float) -> Norm:
    """The BatchNorm of gamma, beta, running mean and running variance; alone, as `gradients` refuses others."""
    gamma, beta, running_mean, running_var = vectors
    return Norm(gamma, beta, running_mean, running_var, eps)


def windows_of(geometry: dict[str, Any]) -> list[tuple[int, Pad, int]]:
    """Stride, padding and dilation of each layer."""
    strides, pads, dilations = geometry["strides"], geometry["pads"], geometry["dilations"]
    return [(stride, pad_of(pads, i), dilation_of(dilations, i)) for i, stride in enumerate(strides)]


def residual_chain(
    given: Given,
    x: Tensor,
    result: Tensor | None,
    dout: Tensor,
    needs: Sequence[bool],
    has_added: bool,
    **geometry: Any,
) -> Gradients:
    """Gradients of x, of the shortcut tensor and of the parameters of `fastres.ops.residual.residual_forward`.

    Args:
        result: of the first block; None where it has no ReLU.
        has_added: whether there is a shortcut tensor. It was not kept, as only its gradient counts.
        geometry: depths, strides, pads, dilations, steps, eps, identity, projection, relu and group.
    """
    depths, steps, eps = geometry["depths"], geometry["steps"], geometry["eps"]
    windows = windows_of(geometry)

    def form(x: Tensor, added: Tensor | None, *parameters: Any) -> Tensor:
        layers = [
            Layer(parameters[5 * i], norm_of(parameters[5 * i + 1 : 5 * i + 5], eps[i]), *window)
            for i, window in enumerate(windows)
        ]
        starts = [0, *accumulate(depths)]
        blocks = [layers[first:last] for first, last in zip(starts, starts[1:])]
        widths = [x.shape[3], *(block[-1].weight.shape[0] for block in blocks)]
        identities = [Identity(step, out - into) for step, into, out in zip(steps, widths, widths[1:])]
        shortcut = identities[0] if geometry["identity"] else layers[-1] if geometry["projection"] else added
        return plain.residual_chain(
            x, blocks, shortcut, geometry["relu"], identities[1:], result if has_added else None
        )[0]

    added = None
    if has_added:
        added = x.new_zeros((dout if result is None else result).shape, requires_grad=True)
    return gradients(form, [x, added, *given.tensors()], needs, dout, geometry["group"])


def preact_block(given: Given, x: Tensor, dout: Tensor, needs: Sequence[bool], **geometry: Any) -> Gradients:
    """Gradients of x and of the parameters of `fastres.ops.preact.preact_forward`.

    Args:
        geometry: strides, pads, dilations, eps, identity, projection and group.
    """
    eps, windows = geometry["eps"], windows_of(geometry)

    def form(x: Tensor, *parameters: Any) -> Tensor:
        weights = parameters[4 * len(eps) :]
        layers = [
            Layer(weights[i], norm_of(parameters[4 * i : 4 * i + 4], eps[i]), *windows[i]) for i in range(len(eps))
        ]
        shortcut: Tensor | Conv | None = x if geometry["identity"] else None
        if geometry["projection"]:
            shortcut = Conv(weights[-1], *windows[-1])
        return plain.preact_block(x, layers, shortcut)[0]

    return gradients(form, [x, *given.tensors()], needs, dout, geometry["group"])


def stem(given: Given, x: Tensor, dout: Tensor, needs: Sequence[bool], group: str | None, **geometry: Any) -> Gradients:
    """Gradients of x, the weight and BatchNorm's parameters.

    Args:
        geometry: stride, pad, dilation and eps; pool_kernel, pool_stride and pool_pad.
    """

    def form(x: Tensor, weight: Tensor, *norm: Any) -> Tensor:
        window = geometry["stride"], geometry["pad"], geometry["dilation"]
        layer = Layer(weight, norm_of(norm, geometry["eps"]), *window)
        return plain.stem(x, layer, geometry["pool_kernel"], geometry["pool_stride"], geometry["pool_pad"])[0]

    return gradients(form, [x, *given.tensors()], needs, dout, group)


def bn_relu(given: Given, x: Tensor, dout: Tensor, needs: Sequence[bool], eps: float, group: str | None) -> Gradients:
    """Gradients of x and of BatchNorm's parameters."""
    return gradients(
        lambda x, *norm: plain.bn_relu(x, norm_of(norm, eps))[0], [x, *given.tensors()], needs, dout, group
    )
