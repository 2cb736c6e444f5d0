"""Memory of large tensors that is kept when they are freed and given out again page by page, see ``pages.h``."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

from fastres.ops.cpu.build import PAGES, load


class Held(NamedTuple):
    """Bytes of large tensors' memory."""

    in_use: int
    free: int


@cache
def _loaded() -> ctypes.CDLL | str:
    """The compiled allocator, or in one line why there is none: looked for once, as it asks the compiler."""
    return load(PAGES)


@cache
def use() -> str | None:
    """Have PyTorch take the memory of CPU tensors of 1 MiB and more from here, for the rest of the process.

    What is freed is kept, as the next step needs it again, and serves every size: never more is held than was once in
    use. Smaller tensors stay the C library's.

    Returns:
        In one line why it cannot be had (no compiler, no Linux), and all stays as it was; None: it is so.
    """
    library = _loaded()
    if isinstance(library, str):
        return library
    library.fastres_use_pages()
    return None


def held() -> Held:
    """What is held; nothing before `use`."""
    sizes = ctypes.c_int64(), ctypes.c_int64()
    library = _loaded()
    if isinstance(library, ctypes.CDLL):
        library.fastres_pages_held(*map(ctypes.byref, sizes))
    return Held(*(size.value for size in sizes))


def release() -> None:
    """Give back to the system what is free."""
    library = _loaded()
    if isinstance(library, ctypes.CDLL):
        library.fastres_release_pages()
