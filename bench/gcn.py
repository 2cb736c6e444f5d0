"""What a kernel compiled for an AMD GPU needs: registers, spills, shared memory, matrix-core instructions.

Read from the assembly that Triton's compiler writes, whose metadata the loader reads too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.sass import Resources, tensor_core_dots

_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?(\w+)")
_STORE = re.compile(r"\b(?:global|buffer|flat)_store_(\w+)")
_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}


def resources(kernels: Sequence[Any]) -> list[Resources]:
    """Read them from kernels that `triton.compile` made for a HIP target.

    Raises:
        RuntimeError: where the assembly does not tell.
    """
    return [_resources(kernel) for kernel in kernels]


def _resources(kernel: Any) -> Resources:
    text = kernel.asm["amdgcn"]
    found = Counter(re.findall(r"\bv_(s?mfmac?)_", text))
    stack, spills = (_metadata(name, text) for name in ("private_segment_fixed_size", "vgpr_spill_count"))
    return Resources(
        registers=_metadata("vgpr_count", text),
        stack=stack,
        # The compiler also counts what it moves to accumulation registers, and scalars that it keeps in vectors'.
        spills=spills if stack else 0,
        shared=kernel.metadata.shared,
        wide_loads=_wide_share(_LOAD, text),
        wide_stores=_wide_share(_STORE, text),
        tensor_cores={name.upper(): count for name, count in found.items()},
        dots=tensor_core_dots(kernel.asm["ttir"]),
    )


def _metadata(name: str, text: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise RuntimeError(f"the assembly tells no {name}")
    return int(found[1])


def _wide_share(kind: re.Pattern, text: str) -> float | None:
    sizes = [next((size for name, size in _BYTES.items() if found.startswith(name)), 4) for found in kind.findall(text)]
    return sum(size for size in sizes if size >= 16) / sum(sizes) if sizes else None
