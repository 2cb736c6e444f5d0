"""Which backend runs a fused operation. ``FASTRES_IMPL`` or `implementation` decide:

``auto``    on a GPU Triton and the vendor's convolutions, each timed once per shape (``FASTRES_TIMED=0``: Triton
            untimed) and chosen with or without the host's time (`fastres.ops.graphs`), or ``vendor`` where Triton has
            no tensor cores (Turing); on a CPU the compiled passes, ATen where they cannot be had, or Triton in its
            interpreter with ``TRITON_INTERPRET=1``.
``triton``  Triton everywhere; an error for CPU tensors without ``TRITON_INTERPRET=1``.
``vendor``  on a GPU the vendor's convolutions (cuDNN) between Triton's passes; on a CPU ATen.
``cpp``     the compiled passes of `fastres.ops.cpu` for CPU tensors, ATen for others; an error without a compiler.
``aten``    ATen everywhere.

fp64 and empty tensors always go to ATen, and on a CPU fp16 too: the kernels have neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from fastres.ops import cpu
from fastres.ops.backends.aten import Aten
from fastres.ops.backends.protocol import Backend
from fastres.ops.timing import TimedChoices, choices_path, machine_key

MODES = ("auto", "triton", "vendor", "cpp", "aten")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_forced: str | Backend | None = None
_used: dict[Backend, None] = {}  # in the order of their first use


@contextmanager
def implementation(mode: str | Backend) -> Iterator[None]:
    """Run what is inside with one of `MODES`, or with a backend; for the whole process, as backward has threads of its
    own.

    Raises:
        ValueError: for another mode.
    """
    global _forced
    before, _forced = _forced, _checked(mode, "implementation") if isinstance(mode, str) else mode
    try:
        yield
    finally:
        _forced = before


def current_mode() -> str | Backend:
    """What `implementation` or the environment asks for."""
    return _forced or _checked(os.environ.get("FASTRES_IMPL", "auto"), "FASTRES_IMPL")


def selection() -> dict[str, str]:
    """What ran so far: ``"conv(shapes, ...)"`` to the implementation that was chosen by time; ``"backends"`` to all."""
    found = {"backends": ", ".join(dict.fromkeys(backend.name for backend in _used))} if _used else {}
    for backend in _used:
        found |= getattr(backend, "chosen", {})
    return found


def backend_for(x: Tensor) -> Backend:
    """The backend that serves tensors like x."""
    backend = _backend_for(x)
    _used.setdefault(backend)
    return backend


def is_cpp(x: Tensor) -> bool:
    """Whether the compiled passes serve tensors like x."""
    return _backend_for(x).name == "cpp"


def _backend_for(x: Tensor) -> Backend:
    mode = current_mode()
    if mode == "aten" or x.dtype not in _TRITON_DTYPES or not x.numel():
        return _backend("aten")
    if not isinstance(mode, str):
        return mode
    if mode == "cpp":
        return _on_cpu(x, required=True)
    if x.device.type == "cuda":
        if mode == "vendor" or mode == "auto" and not _triton_has_tensor_cores(x.device):
            return _backend("vendor")
        return (
            _timed(x.device) if mode == "auto" and os.environ.get("FASTRES_TIMED", "1") != "0" else _backend("triton")
        )
    if mode == "vendor":
        return _backend("aten")
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return _backend("triton")
    if mode == "triton":
        raise RuntimeError(
            f"implementation 'triton' cannot run on a {x.device.type} tensor: set TRITON_INTERPRET=1 or choose 'aten'"
        )
    return _on_cpu(x)


def _on_cpu(x: Tensor, required: bool = False) -> Backend:
    """The compiled passes where they take tensors like x and could be compiled, else ATen."""
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES:
        return _backend("aten")
    reason = cpu.unavailable()
    if reason and required:
        raise RuntimeError(f"implementation 'cpp' needs its passes compiled: {reason}")
    return _backend("aten" if reason else "cpp")


@cache
def _backend(name: str) -> Backend:
    if name == "aten":
        return Aten()
    if name == "cpp":
        from fastres.ops.backends.cpp import Cpp  # compiles the passes

        return Cpp()
    from fastres.ops.backends.triton import Triton, Vendor  # Triton is not everywhere

    return Vendor() if name == "vendor" else Triton()


def _triton_has_tensor_cores(device: torch.device) -> bool:
    from fastres.kernels.configs import has_tensor_cores
    from fastres.kernels.resources import architecture  # Triton is not everywhere

    return has_tensor_cores(architecture(device))


@cache
def _timed(device: torch.device) -> Backend:
    from fastres.ops.backends.host import host_milliseconds
    from fastres.ops.backends.timed import Timed

    return Timed(TimedChoices(choices_path(), machine_key(device), host=host_milliseconds))


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} is {mode!r}: choose {', '.join(MODES)}")
    return mode
