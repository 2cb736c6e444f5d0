"""fastres: ResNets whose blocks are fused Triton kernels, with their eager PyTorch reference and a training loop.

`fuse`, `unfuse`, `fold` and `create_model` are what most programs need. They are imported at first use, so that
``import fastres`` alone takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastres.models import create_model
    from fastres.nn.fold import fold
    from fastres.nn.fuse import fuse, unfuse

__version__ = "0.1.0"
__all__ = ["create_model", "fold", "fuse", "unfuse"]

_HOMES = {"create_model": "fastres.models", "fold": "fastres.nn", "fuse": "fastres.nn", "unfuse": "fastres.nn"}


def __getattr__(name: str) -> Any:
    """Import a public function at first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
