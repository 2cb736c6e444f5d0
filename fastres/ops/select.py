"""Which implementation runs a primitive: Triton, the library's convolution with Triton passes, C++ passes, or ATen.

``FASTRES_IMPL`` or `implementation` decide:

``auto``    on a GPU Triton, where the library's convolution is a candidate timed once per shape (``FASTRES_TIMED=0``:
            Triton untimed); on a CPU ATen, or Triton in its interpreter with ``TRITON_INTERPRET=1``.
``triton``  Triton everywhere; an error for CPU tensors without ``TRITON_INTERPRET=1``.
``cpp``     the compiled passes of `fastres.ops.cpu` for CPU tensors, ATen for others; an error without a compiler.
``aten``    ATen everywhere.

fp64 and empty tensors always go to ATen, and on a CPU fp16 too: the kernels have neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastres.ops import aten, cpu
from fastres.ops.library import LibraryConvolutions
from fastres.ops.timing import TimedChoices, choices_path, machine_key

MODES = ("auto", "triton", "cpp", "aten")
RANKS = 3  # tile configurations of a convolution that are timed, see `fastres.kernels.configs`
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_RANKED = ("conv", "conv_bias_act", "bn_add_relu_conv", "conv_dgrad", "conv_wgrad")
_forced: str | None = None
_selection: dict[str, str] = {}
_sole: dict[str, list[str]] = {}


@contextmanager
def implementation(mode: str) -> Iterator[None]:
    """Run what is inside with ``"triton"``, ``"cpp"``, ``"aten"`` or ``"auto"``; for the whole process, as backward has
    threads.

    Raises:
        ValueError: for another mode.
    """
    global _forced
    before, _forced = _forced, _checked(mode, "implementation")
    try:
        yield
    finally:
        _forced = before


def selection() -> dict[str, str]:
    """What ran so far: ``"op(shapes, ...)"`` to the implementation that was chosen by time; ``"op"`` to those that ran
    it where there was nothing to choose."""
    return {op: ", ".join(names) for op, names in _sole.items()} | _selection


def primitives(x: Tensor) -> Primitives:
    """The primitives that serve tensors like x."""
    mode = _forced or _checked(os.environ.get("FASTRES_IMPL", "auto"), "FASTRES_IMPL")
    if mode == "aten" or x.dtype not in _TRITON_DTYPES or not x.numel():
        return _primitives("aten")
    if mode == "cpp":
        return _primitives(_on_cpu(x, required=True))
    if x.device.type == "cuda":
        timed = mode == "auto" and os.environ.get("FASTRES_TIMED", "1") != "0"
        return _timed_primitives(x.device) if timed else _triton_primitives(x.device)
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return _primitives("triton")
    if mode == "triton":
        raise RuntimeError(
            f"implementation 'triton' cannot run on a {x.device.type} tensor: set TRITON_INTERPRET=1 or choose 'aten'"
        )
    return _primitives(_on_cpu(x))


def is_cpp(x: Tensor) -> bool:
    """Whether the compiled passes serve tensors like x."""
    return primitives(x) is _primitives("cpp")


def _on_cpu(x: Tensor, required: bool = False) -> str:
    """``"cpp"`` where it takes tensors like x and could be compiled, else ``"aten"``."""
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES:
        return "aten"
    reason = cpu.unavailable()
    if reason and required:
        raise RuntimeError(f"implementation 'cpp' needs its passes compiled: {reason}")
    return "aten" if reason else "cpp"


class Primitives:
    """The primitives as attributes; each call goes to the candidate chosen for its shapes.

    Args:
        candidates: namespaces of primitives by name, the preferred one first. One that lacks a primitive is no
            candidate for it.
        choices: how to choose among several; None takes the first.
        device: the CUDA device of the tensors, which each call makes the current one: Triton launches and events go to
            that, wherever the tensors are. None: no CUDA device.
    """

    def __init__(
        self, candidates: dict[str, Any], choices: TimedChoices | None = None, device: torch.device | None = None
    ):
        self._candidates, self._choices, self._device = candidates, choices, device
        self._chosen: dict[tuple, Callable] = {}

    def __getattr__(self, op: str) -> Callable:
        able = {name: getattr(space, op) for name, space in self._candidates.items() if hasattr(space, op)}
        if not able:
            raise AttributeError(f"none of {', '.join(self._candidates)} has the primitive {op!r}")
        call: Callable
        if self._choices is not None and len(able) > 1:
            call = partial(self._call, op, able)
        else:  # the same for all shapes: nothing to look up
            name, call = next(iter(able.items()))
            names = _sole.setdefault(op, [])
            if name not in names:
                names.append(name)
        if self._device is not None:
            call = _on_device(self._device, call)
        setattr(self, op, call)
        return call

    def _call(self, op: str, able: dict[str, Callable], *args: Any, **options: Any) -> Any:
        key = (op, _signature(args), _signature(tuple(options.items())))
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._choose(able, key, args, options)
        return chosen(*args, **options)

    def _choose(self, able: dict[str, Callable], key: tuple, args: tuple, options: dict[str, Any]) -> Callable:
        assert self._choices is not None
        text = _text(key)
        if torch.cuda.is_current_stream_capturing():  # a graph cannot hold the timing; an eager call may still decide
            return able[self._choices.known(text, able) or next(iter(able))]
        name = self._choices.choose(text, {n: partial(call, *args, **options) for n, call in able.items()})
        self._chosen[key] = able[name]
        _selection[text] = name
        return able[name]


@cache
def _primitives(name: str) -> Primitives:
    spaces: dict[str, Callable[[], Any]] = {"aten": lambda: aten, "cpp": cpu.primitives, "triton": _triton}
    return Primitives({name: spaces[name]()})


@cache
def _triton_primitives(device: torch.device) -> Primitives:
    return Primitives({"triton": _triton()}, device=device)


@cache
def _timed_primitives(device: torch.device) -> Primitives:
    triton = _triton()
    library = LibraryConvolutions(triton.moments, triton.bn_add_relu, triton.bn_backward_apply, aten.bn_sums)
    mixed = SimpleNamespace(conv_backward=partial(_dgrad_and_wgrad, triton.conv_dgrad, library.conv_wgrad))
    candidates = {"triton": triton, "library": library, "triton dgrad, library wgrad": mixed}
    for rank in range(1, RANKS):
        candidates[f"triton, tiles {rank + 1}"] = _other_tiles(rank)
    return Primitives(candidates, TimedChoices(choices_path(), machine_key(device)), device)


def _on_device(device: torch.device, call: Callable) -> Callable:
    """The call with ``device`` as the current CUDA device; where it is that already, this costs one look."""

    def guarded(*args: Any, **options: Any) -> Any:
        if torch.cuda.current_device() == device.index:
            return call(*args, **options)
        with torch.cuda.device(device):
            return call(*args, **options)

    return guarded


@cache
def _triton() -> SimpleNamespace:
    """The Triton launchers, and the one primitive that they make up of two."""
    from fastres import kernels

    return _with_joint_backward({name: getattr(kernels, name) for name in kernels.__all__})


def _other_tiles(rank: int) -> SimpleNamespace:
    """The convolution launchers with another of their tile configurations."""
    triton = _triton()
    return _with_joint_backward({name: partial(getattr(triton, name), rank=rank) for name in _RANKED})


def _with_joint_backward(launchers: dict[str, Callable]) -> SimpleNamespace:
    return SimpleNamespace(
        **launchers, conv_backward=partial(_dgrad_and_wgrad, launchers["conv_dgrad"], launchers["conv_wgrad"])
    )


def _dgrad_and_wgrad(
    dgrad: Callable,
    wgrad: Callable,
    dz: Tensor,
    y: Tensor | None,
    abc: Tensor | None,
    x: Tensor,
    coef: Tensor | None,
    w: Tensor,
    stride: int,
    pad: tuple[int, int, int, int],
    residual: Tensor | None = None,
    need_dx: bool = True,
    need_dw: bool = True,
    end: tuple[Tensor, Tensor] | None = None,
    residual_stride: int = 1,
    spare: bool = False,
    dilation: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`conv_backward` of two kernels that each compute dy as they read it.

    They leave a ``spare`` residual alone: to be timed they are called again.
    """
    dx = sums = dw = None
    if need_dx:
        below, mask = ((x, coef), None) if coef is not None else (end, None if end is None else x)
        given = dz, y, abc, w, stride, pad, tuple(x.shape[1:3]), below, residual, mask, residual_stride
        dx, sums = dgrad(*given, dilation=dilation)
    if need_dw:
        dw = wgrad(dz, y, abc, x, coef, stride, pad, tuple(w.shape[1:3]), dilation=dilation)
    return dx, sums, dw


def _signature(values: tuple) -> tuple:
    """What a choice depends on: shapes and dtypes of tensors, whether optional ones are there, plain numbers."""
    return tuple(
        (v.shape, v.dtype) if isinstance(v, Tensor) else _signature(v) if isinstance(v, tuple) else v for v in values
    )


def _text(key: tuple) -> str:
    def text(value: Any) -> str:
        if isinstance(value, torch.Size):
            return "x".join(map(str, value))
        if isinstance(value, tuple):
            return f"({', '.join(map(text, value))})"
        return str(value).removeprefix("torch.")

    op, args, options = key
    return f"{op}({', '.join(map(text, args + options))})"


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} is {mode!r}: choose {', '.join(MODES)}")
    return mode
