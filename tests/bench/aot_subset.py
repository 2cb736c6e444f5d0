"""Run by `test_aot` in a process without ``TRITON_INTERPRET``: compiles the largest variant of each kernel.

Prints JSON: rows of `bench.aot.as_record`, those of a dilated block, and what the recorder made of a probe's arguments.
"""

import json

import torch
import torchvision
import triton
import triton.language as tl

from bench.aot import ARCHITECTURES, as_record, compile_all, specialisations
from bench.launches import Specialisation, recorded
from bench.sass import SHARED_LIMIT
from fastres.kernels.resources import shared_memory_of
from fastres.nn import fuse


@triton.jit
def probe_kernel(x_ptr, maybe_ptr, one, sixteen, seventeen, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), one + sixteen + seventeen)


def probe() -> list[dict]:
    """What the recorder makes of arguments that Triton's JIT specialises."""
    x = torch.empty(64, dtype=torch.float16)
    with recorded() as launches:
        probe_kernel[lambda arguments: (arguments["sixteen"], 2)](x, None, 1, 16, 17, BLOCK=32, num_warps=2)
        probe_kernel[(1,)](x[1:], x, 2, 8, 32, BLOCK=32)
    return [
        {
            "grid": launch.grid,
            "signature": dict(launch.specialisation.signature),
            "constants": launch.specialisation.constants,
            "divisible": [path[0] for path, hint in launch.specialisation.attributes if "D" in hint],
            "options": dict(launch.specialisation.options),
        }
        for launch in launches
    ]


def dilated(shared: int) -> list[Specialisation]:
    """Launches of the 3x3 convolution in a bottleneck of dilation 2, forward and backward, in bf16; see `specialisations`."""
    block = fuse(torchvision.models.resnet.Bottleneck(1024, 256, dilation=2)).bfloat16()
    with shared_memory_of(shared), recorded() as launches:
        block(torch.empty(16, 1024, 28, 28, dtype=torch.bfloat16).requires_grad_()).sum().backward()
    found = {launch.specialisation for launch in launches}
    return sorted((one for one in found if one.constants.get("DILATION") == 2), key=str)


def main() -> None:
    """The largest variant of each kernel, with and without a shortcut; of the 3x3 convolutions that of 256 channels.

    Moreover the weight gradients of the 7x7 stem, and on devices of little shared memory the kernels that could not have
    their first tiles there, each once.
    """
    rows = []
    for limit in sorted({SHARED_LIMIT[arch] for arch in ARCHITECTURES}):
        archs = [arch for arch in ARCHITECTURES if SHARED_LIMIT[arch] == limit]
        found = specialisations("resnet50 ImageNet", "bf16", ranks=[0], shared=limit)
        stems = {one for one in found if one.kernel == "conv_wgrad_kernel" and one.constants["KH"] == 7}
        if limit == min(SHARED_LIMIT.values()):
            smaller = found - specialisations("resnet50 ImageNet", "bf16", ranks=[0])
            found, stems = smaller, set()
        chosen = {(one.kernel, "shortcut_ptr" in one.pointers): one for one in sorted(found, key=_demand)}
        rows += compile_all({*chosen.values(), *stems}, archs)
    apart = [row for arch in ARCHITECTURES for row in compile_all(dilated(SHARED_LIMIT[arch]), [arch])]
    records = {name: [as_record(row) for row in of] for name, of in (("rows", rows), ("dilated", apart))}
    print(json.dumps({"probe": probe(), **records}))


def _demand(one: Specialisation) -> tuple:
    middle = [one.constants.get(name) for name in ("CIN", "COUT", "KH", "STRIDE")] == [256, 256, 3, 1]
    return middle, len(one.pointers), one.constants.get("C", 0), str(one)


if __name__ == "__main__":
    main()
