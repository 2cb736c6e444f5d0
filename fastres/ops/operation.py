"""How an operation's body is registered: torch.compile keeps it whole, and what it computes depends on its arguments
alone.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Body = TypeVar("Body", bound=Callable)


def operation(name: str) -> Callable[[Callable], Any]:
    """Decorator: register a body that changes none of its arguments as the custom operation ``fastres::name``."""

    def register(body: Callable) -> Any:
        registered: Any = torch.library.custom_op(f"fastres::{name}", mutates_args=())(body)
        registered.body = body
        return registered

    return register


def is_watched() -> bool:
    """Whether something wants to see PyTorch's operations: a compiler, a transform, a trace, a mode, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def direct(registered: Any, x: Tensor) -> Callable:
    """What to call for a registered operation on tensors like x: where nothing watches its body, which costs less.

    For callers within an autograd Function, which PyTorch does not differentiate further.
    """
    plain = type(x) is Tensor and (x.is_cpu or x.is_cuda) and not is_watched()
    return getattr(registered, "body", registered) if plain else registered


def isolated(x: Tensor) -> AbstractContextManager:
    """In this context an operation on x depends on its arguments alone.

    Autocast is off: a backward pass runs under the autocast state of whoever asked for gradients, and a convolution
    that is computed again there would come out in another dtype than the tensors around it. Where x is on a GPU, that
    is the current one: Triton launches to it.
    """
    device = x.device
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return no_autocast(device.type)
    contexts = ExitStack()
    contexts.enter_context(torch.cuda.device(device))
    contexts.enter_context(no_autocast(device.type))
    return contexts


def without_autocast(body: Body) -> Body:
    """The body, in the dtypes of its arguments whatever autocast its caller is in."""

    @wraps(body)
    def run(*args: Any, **options: Any) -> Any:
        device = device_type(args)
        if not has_autocast(device):
            return body(*args, **options)
        with no_autocast(device):
            return body(*args, **options)

    return run  # type: ignore[return-value]


def no_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off; nothing where it is off."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def has_autocast(device_type: str) -> bool:
    """Whether autocast is on for the device; never for 'meta', which PyTorch has none for."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def device_type(arguments: Iterable[Any]) -> str:
    """Of the first tensor among the arguments."""
    return next((a.device.type for a in arguments if isinstance(a, Tensor)), "cpu")
