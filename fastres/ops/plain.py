"""Every plan in PyTorch's own functions, which can be differentiated any number of times, batched and dualised.

What the fused operations have no form of their own for is computed by these, see `is_needed`. So are gradients that are
to be differentiated again, where a backward pass is itself recorded (``create_graph=True``: gradient penalties,
Hessian-vector products, MAML) or runs under a transform of `torch.func`: the operation is computed once more from what
the forward pass was given, and PyTorch differentiates that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastres.ops.backends.aten import coefficients_of
from fastres.ops.backends.protocol import statistics_dtype
from fastres.ops.backends.vendor import nchw, nhwc
from fastres.ops.batch_norm import Vectors
from fastres.ops.nodes import End, Node, Norm, Pool, Reader
from fastres.ops.operation import no_autocast, without_autocast
from fastres.ops.plan import Plan


def is_needed(*tensors: Tensor | None) -> bool:
    """Whether an operation on these is computed in PyTorch's own functions.

    So are empty batches, what `torch.func` transforms, forward-mode differentiation and subclasses that wrap tensors
    (such as DTensor), as PyTorch's own functions know what to do with them.
    """
    x = tensors[0]
    if x is not None and not x.numel():
        return True
    return is_transformed() or any(is_traceable_wrapper_subclass(t) for t in tensors if t is not None)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_differentiated(dout: Tensor) -> bool:
    """Whether gradients that are made of dout will be differentiated, batched or dualised themselves."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(dout)


def activated(y: Tensor, act: str) -> Tensor:
    """The activation of y, of `fastres.kernels.types.ACTIVATIONS`."""
    return F.gelu(y) if act == "gelu" else F.relu(y)


class Plain(Reader):
    """A walk over a plan's nodes.

    Args:
        parameters: see `Reader`; weights are [Cout, Cin, KH, KW].
        added: a tensor [N, C, H, W] that is the first block's shortcut.
        result: the first block's, where the values of ``added`` are not known; derivatives are as if they were.
        group: name of a process group.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor | None],
        added: Tensor | None = None,
        result: Tensor | None = None,
        group: str | None = None,
    ):
        super().__init__(parameters)
        self.added = added
        self.shortcuts: list[Tensor] = []
        self.coefs: list[Tensor] = []
        self.act = "relu"  # behind the last BatchNorm
        self._result, self._group = result, group

    def run(self, nodes: Sequence[Node], y: Tensor) -> Tensor:
        """The result of the nodes, [N, C, H, W] in and out."""
        for node, following in zip(nodes, [*nodes[1:], None]):
            y = node.plain(self, y)
            if isinstance(node, Norm) and not isinstance(following, (End, Pool, type(None))):
                y = self.activate(y)
        return y

    def activate(self, y: Tensor) -> Tensor:
        """The activation behind the last BatchNorm, of y."""
        return activated(y, self.act)

    def normalise(self, y: Tensor, vectors: Vectors, eps: float) -> Tensor:
        """The BatchNorm of y; its coefficients are noted."""
        if vectors.running_mean is None:
            check_alone(self._group)
        self.coefs.append(_coefficients(y, vectors, eps))
        dtype = statistics_dtype(y.dtype)
        gamma, beta, mean, var = (None if t is None else t.to(dtype) for t in vectors)
        if gamma is None and beta is not None and y.is_cuda:
            gamma = torch.ones_like(beta)  # without it PyTorch (2.11) has no gradient of beta for channels-last tensors
        # not functional.batch_norm, whose checks `check_norm` has done: PyTorch 2.11's refuse an eps of 0 everywhere
        return torch.batch_norm(y, gamma, beta, mean, var, mean is None, 0.0, eps, torch.backends.cudnn.enabled)

    def describe(self, y: Tensor) -> None:
        """Note the mean and the variance of y."""
        self.coefs.append(_coefficients(y, Vectors(None, None, None, None), 0.0))

    def end(self, y: Tensor, relu: bool) -> Tensor:
        """The end of a block of the sum y."""
        result, self._result = self._result, None
        if result is not None:
            return torch.where(result > 0, y + (result - y).detach(), 0)
        return self.activate(y) if relu else y


@without_autocast
def run(
    plan: Plan,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    added: Tensor | None = None,
    result: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """See `fastres.ops.fused.fused`; ``result`` of `Plain`, [N, H, W, C]."""
    added, result = (None if t is None else nchw(t) for t in (added, result))
    walk = Plain(parameters, added, result, plan.group)
    return nhwc(walk.run(plan.nodes, nchw(x))), walk.coefs


class Parameters:
    """What a forward pass was given, to differentiate its gradients by.

    They are no saved tensors: which of those may change before backward is PyTorch's to say, and it says so for first
    gradients already.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        self._tensors = list(tensors)
        self._versions = [_version(t) for t in tensors]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Parameters | None:
        """None in compiled code, which has no second gradients."""
        return None if torch.compiler.is_compiling() else cls(tensors)

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


def plan_gradients(
    plan: Plan,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    dout: Tensor,
    result: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of x, of the shortcut that is a tensor, and of the parameters; see `gradients`.

    Args:
        inputs: x, that shortcut, the parameters.
        result: the first block's, where the values of the shortcut are not known.
    """
    check_alone(plan.group if any(norm.training for norm in plan.norms) else None)

    def form(x: Tensor, added: Tensor | None, *parameters: Tensor | None) -> Tensor:
        return run(plan, x, parameters, added, result)[0]

    return gradients(form, inputs, needs, dout)


def gradients(
    form: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], dout: Tensor
) -> list[Tensor | None]:
    """Gradients of ``form(*inputs)`` where needed, differentiable in turn; the result is computed again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), no_autocast(dout.device.type):
        # aliases, so that what one input is made of another one of them counts for the second gradients alone
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [alias for alias, need in zip(aliases, needs) if need and alias is not None]
        out = form(*aliases)
        found = iter(torch.autograd.grad(out, wanted, dout, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


def check_alone(group: str | None) -> None:
    """Raises RuntimeError for a process group: no gradient of a gradient crosses ranks."""
    if group is not None:
        raise RuntimeError(
            "fused operations with BatchNorm synchronised over a process group have first derivatives only, and no "
            "torch.func transforms: run the network's eager form, fastres.nn.unfuse(model)"
        )


def _coefficients(y: Tensor, vectors: Vectors, eps: float) -> Tensor:
    """The coefficients [5, C] that y is normalised by; not differentiable."""
    y, dtype = y.detach(), statistics_dtype(y.dtype)
    gamma, beta, mean, var = (None if t is None else t.detach() for t in vectors)
    if mean is None or var is None:
        if y.numel():
            var, mean = torch.var_mean(y.to(dtype), (0, 2, 3), correction=0)
        else:  # nothing has no mean
            mean = var = y.new_zeros(y.shape[1], dtype=dtype)
    return coefficients_of(mean.double(), var.double(), gamma, beta, eps, dtype)
