"""BatchNorm and ReLU of a tensor that no convolution made just now: the head of the pre-activation networks."""

from torch import Tensor

from fastres.ops.fused import fused
from fastres.ops.layers import (
    Norm,
    Statistics,
    check_activations,
    check_coef,
    check_norm,
    group_of,
    norm_vectors,
    pixels,
)
from fastres.ops.nodes import End
from fastres.ops.nodes import Norm as NormNode
from fastres.ops.plan import Plan


def bn_relu(x: Tensor, norm: Norm, coef: Tensor | None = None) -> tuple[Tensor, Statistics]:
    """``act(bn(x))`` of x [N, H, W, C] by the norm's activation, differentiable, with the BatchNorm's `Statistics`.

    Args:
        coef: [5, C] that begins with x's mean and biased variance, this rank's own; None: they are reduced from x
            where needed.

    Raises:
        RuntimeError, ValueError: as `torch.nn.functional.batch_norm` raises them.
    """
    check_activations(x)
    check_norm(norm, tuple(x.shape), x.device)
    if coef is not None:
        check_coef(coef, x.shape[3], x.device)
    plan = Plan((NormNode(norm.eps, norm.running_mean is None, norm.act), End(adds=False)), group_of([norm]))
    out, coefs = fused(plan, x, norm_vectors(norm), known=coef)
    return out, Statistics(coefs[0], pixels(tuple(x.shape)))
