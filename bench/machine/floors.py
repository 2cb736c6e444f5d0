"""The least share of what binds it that a kernel's first configuration is shipped with, by the model.

Nine tenths of what the kernels had when this was written, in bf16, as one version of Triton compiled them: one that
becomes slower is seen without a GPU. A kernel that becomes quicker raises its floor. By architecture; convolutions by
kernel, window and stride where it has several, channels read and made, other kernels by name. What is not named, and
what another Triton compiled, has no floor. A pass through GELU has none either: it computes more.
"""

from __future__ import annotations

import triton

from bench.launches import Specialisation

TRITON = "3.8."
FLOORS: dict[int, dict[tuple[str | int, ...], float]] = {
    80: {
        ("conv_kernel", 1, 1, 512, 128): 0.45,
        ("conv_kernel", 3, 1, 256, 256): 0.57,
        ("conv_dgrad_kernel", 1, 1, 1024, 512): 0.14,
        ("conv_dgrad_kernel", 3, 1, 256, 256): 0.43,
        ("conv_wgrad_kernel", 3, 1, 256, 256): 0.46,
        ("conv_wgrad_kernel", 7, 2, 3, 64): 0.12,
        ("bn_add_relu_kernel",): 0.80,
        ("bn_add_relu_backward_kernel",): 0.82,
    },
    90: {
        ("conv_kernel", 1, 1, 512, 128): 0.85,
        ("conv_kernel", 3, 1, 256, 256): 0.52,
        ("conv_dgrad_kernel", 1, 1, 1024, 512): 0.29,
        ("conv_dgrad_kernel", 3, 1, 256, 256): 0.46,
        ("conv_wgrad_kernel", 3, 1, 256, 256): 0.58,
        ("conv_wgrad_kernel", 7, 2, 3, 64): 0.135,
        ("conv_grads_kernel", 64, 256): 0.68,
        ("conv_grads_kernel", 256, 64): 0.56,
        ("conv_grads_kernel", 512, 128): 0.88,
        ("conv_grads_kernel", 1024, 256): 0.48,
        ("conv_resident_kernel", 64, 256): 0.77,
        ("conv_resident_kernel", 128, 512): 0.60,
        ("conv_resident_kernel", 256, 1024): 0.37,
        ("bn_add_relu_kernel",): 0.72,
        ("bn_add_relu_backward_kernel",): 0.45,
    },
}


def floor_of(one: Specialisation, arch: int) -> float | None:
    """The least share of a specialisation; None: there is none. fp32 has none."""
    if not (triton.__version__.startswith(TRITON) and {"bf16", "fp16"} & set(one.pointers.values())):
        return None
    if one.constants.get("THROUGH") == "gelu":
        return None
    sizes = (one.constants.get(name) for name in ("KH", "STRIDE", "CIN", "COUT"))
    return FLOORS.get(arch, {}).get((one.kernel, *(size for size in sizes if size is not None)))
