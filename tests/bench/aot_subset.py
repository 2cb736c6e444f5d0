"""Run by `test_aot` in a process without ``TRITON_INTERPRET``: compiles the largest variant of each kernel.

Prints JSON: rows of `bench.aot.as_record`, those of a dilated block, what the recorder made of a probe's arguments, and
the keys in Triton's cache ahead of time and just in time.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torchvision
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import aot, launches
from bench.aot import Row, as_record, compile_all, modelled
from bench.aot_plan import Task, launches_of, number_of, planned
from bench.launches import WAYS, Launch, Specialisation, recorded
from bench.machine.chips import CHIPS
from bench.machine.product import TUNED, Tile, product
from bench.sass import SHARED_LIMIT
from fastres import kernels
from fastres.kernels.resources import shared_memory_of
from fastres.nn import fuse

HOPPER = GPUTarget("cuda", 90, 32)
ARCHITECTURES = 80, 89, 90, 100  # the largest of all kernels; of the others some, see `others`
OTHERS = 75, 86, 120, "gfx942"
SEVERAL_TILES = "conv_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel"
MODELLED = 80, 90  # the others would double the time


@triton.jit
def probe_kernel(x_ptr, maybe_ptr, one, sixteen, seventeen, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), one + sixteen + seventeen)


@triton.jit
def named_kernel(x_ptr, count, MODE: tl.constexpr, DIVISIBLE: tl.constexpr):
    value = 1.0 if MODE == "one" else 2.0
    tl.store(x_ptr + count, value)


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


def record(row: Row) -> dict[str, Any]:
    """`as_record`, and all that is compiled in."""
    one = row.specialisation
    constants = {name: value for name, value in one.constants.items() if value is not None}
    return {**as_record(row), "kernel": one.kernel, "tensors": one.pointers, "constants": constants,
            "options": dict(one.options)}  # fmt: skip


def others() -> list[Row]:
    """Each kernel of a bottleneck in fp16, forward and backward, in the variant that has the most tensors."""
    rows: list[Row] = []
    for arch in OTHERS:
        block = fuse(torchvision.models.resnet.Bottleneck(256, 64)).half()
        with shared_memory_of(SHARED_LIMIT[arch], number_of(arch)), recorded() as launches:
            block(torch.empty(128, 256, 28, 28, dtype=torch.float16).requires_grad_()).sum().backward()
        found = sorted((launch.specialisation for launch in launches), key=_demand)
        rows += compile_all((one, arch) for one in {one.kernel: one for one in found}.values())
    return rows


def plan() -> list[list]:
    """Architecture, precision, whether it is taken first, and kernel, of what would be compiled of the smallest
    network."""
    tasks = planned(["resnet8"], ["fp16", "bf16"], [80, 75, "gfx942", 86, 89], [0, 1])
    return [[task.arch, task.precision, task.first, task.specialisation.kernel] for task in tasks]


def continued() -> list[dict]:
    """Results of a run that may compile nothing, of one that ends, and of one that may compile nothing again."""
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        asked = ["--network", "resnet8", "--precision", "bf16", "--arch", "80", "gfx942", "--rank", "0", "--no-model",
                 "--kernel", "finalize", "global", "--processes", "1", "--json", f"{folder}/aot.json"]  # fmt: skip
        for minutes in (["--minutes", "0"], [], ["--minutes", "0"]):
            code = aot.main([*asked, *minutes])
            found.append({**json.loads(Path(folder, "aot.json").read_text()), "code": code})
    return found


def dilated(shared: int, arch: int) -> list[Specialisation]:
    """Launches of the 3x3 convolution in a bottleneck of dilation 2, forward and backward, in bf16; see
    `specialisations`.

    Moreover the weight gradients that make both operands in tiles of 128x64 and 64x128, which spill with 128 registers.
    """
    block = fuse(torchvision.models.resnet.Bottleneck(1024, 256, dilation=2)).bfloat16()
    with shared_memory_of(shared, arch), recorded() as launches:
        block(torch.empty(16, 1024, 28, 28, dtype=torch.bfloat16).requires_grad_()).sum().backward()
        for inputs, outputs in ((64, 128), (128, 64)):
            x, dz = (torch.empty(16, 28, 28, channels, dtype=torch.bfloat16) for channels in (inputs, outputs))
            vectors = torch.empty(3, outputs), x, torch.empty(5, inputs)
            kernels.conv_wgrad(dz, dz, *vectors, 1, (2, 2, 2, 2), (3, 3), dilation=2)
    found = {launch.specialisation for launch in launches}
    return sorted((one for one in found if one.constants.get("DILATION") == 2), key=str)


@contextmanager
def hopper() -> Iterator[None]:
    """Triton takes an H100 for the current device, on which nothing can be launched."""
    before = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: HOPPER
        )
    )
    try:
        yield
    finally:
        driver._active = before


def keys() -> dict[str, list[str]]:
    """Of every launch of some networks' steps the kernel and both keys: recorded, and of what Triton's own JIT
    compiles.
    """
    found: dict[str, list[str]] = {}
    specialise, run = launches._specialise, launches.JITFunction.run
    asked: list[Any] = []

    def both(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        run(function, *args, grid=(1,), warmup=True, **kwargs)
        one, bound = specialise(function, args, kwargs)
        source, options = asked.pop()
        found[str(one)] = [one.kernel, one.cache_key(HOPPER), launches.cache_key(source, HOPPER, options)]
        function.device_caches.clear()  # compiled again for the next launch
        return one, bound

    def compile_nothing(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> SimpleNamespace:
        asked.append((source, options))
        return SimpleNamespace()

    with hopper(), mock.patch.object(triton.compiler, "compile", compile_nothing):
        with mock.patch.object(launches, "_specialise", both):
            launches_of("notebook", "bf16", ranks=[0, 1])
            with recorded():
                x = torch.empty(64)
                for mode in ("one", "D", "two"):
                    named_kernel[(1,)](x, 16, MODE=mode, DIVISIBLE=True, num_warps=2)
    return found


def hits() -> list[bool]:
    """Whether Triton's JIT finds in its cache what was compiled ahead of time, a string among the constexprs or not."""
    seen: list[bool] = []
    x = torch.empty(64)
    with recorded() as made:
        named_kernel[(1,)](x, 16, MODE="one", DIVISIBLE=True)
        probe_kernel[(1,)](x, None, 1, 16, 17, BLOCK=32, num_warps=2)
    listener = lambda *, cache_hit, **_: seen.append(cache_hit)  # noqa: E731
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        mock.patch.object(triton.knobs.compilation, "listener", listener),
        hopper(),
    ):
        triton.knobs.cache.dir = folder
        for launch in made:
            launch.specialisation.compile(HOPPER)
        named_kernel.run(x, 16, MODE="one", DIVISIBLE=True, grid=(1,), warmup=True)
        probe_kernel.run(x, None, 1, 16, 17, BLOCK=32, num_warps=2, grid=(1,), warmup=True)
        named_kernel.run(x, 16, MODE="other", DIVISIBLE=True, grid=(1,), warmup=True)
    return seen


def products() -> dict[str, float]:
    """The model's TFLOP/s of plain products on an H100, 8192 rows, columns and channels: in the best tiles, in small
    ones.
    """
    candidates, size = {"large": TUNED, "small": (Tile(64, 64, 64, 4, 3),)}, 8192
    seconds = {
        name: product(size, size, size, 6 * size**2, tiles, 90, CHIPS[90]).seconds for name, tiles in candidates.items()
    }
    return {name: 2 * size**3 / each / 1e12 for name, each in seconds.items()}


def main() -> None:
    """The largest variant of each kernel, with and without a shortcut; of the 3x3 convolutions that of 256 channels.

    Moreover the variants that spill where they have 128 registers, and on devices of little shared memory the largest
    of each convolution.
    """
    network, least = ("resnet50 ImageNet", "bf16"), min(SHARED_LIMIT[arch] for arch in ARCHITECTURES)
    rows, made = [], {}
    for arch in ARCHITECTURES:
        limit = SHARED_LIMIT[arch]
        if limit == least:
            continue
        of_arch = launches_of(*network, ranks=[0, *WAYS], shared=limit, arch=arch)
        made |= {(arch, one): launch for one, launch in of_arch.items()}
        strided = filter(_is_strided_and_frozen, of_arch)
        chosen = {
            (one.kernel, "shortcut_ptr" in one.pointers, of_arch[one].rank): one for one in sorted(of_arch, key=_demand)
        }
        joined = filter(_stores_beside_a_strided_residual, of_arch)
        widest = [max(found, key=lambda one: one.constants["CIN"]) for found in (strided, joined)]
        needy = {*filter(_is_stems_gradient, of_arch), *widest}
        rows += compile_all((one, arch) for one in {*chosen.values(), *needy})
    for arch in ARCHITECTURES:
        if SHARED_LIMIT[arch] == least:
            fitting = launches_of(*network, ranks=[0], shared=least, arch=arch)
            chosen = {one.kernel: one for one in sorted(fitting, key=_demand) if one.kernel in SEVERAL_TILES}
            rows += compile_all((one, arch) for one in chosen.values())
    apart = [*compile_all((one, arch) for arch in ARCHITECTURES for one in dilated(SHARED_LIMIT[arch], arch))]
    rows = [modelled(row, _task(row, made)) if _is_modelled(row, made) else row for row in rows]
    parts = ("rows", rows), ("dilated", apart), ("others", others())
    records = {name: [record(row) for row in of] for name, of in parts}
    print(json.dumps({"probe": probe(), "products": products(), **records, "plan": plan(),
                      "continued": continued(), "keys": [*keys().values()], "hits": hits()}))  # fmt: skip


def _is_modelled(row: Row, made: dict[tuple[int, Specialisation], Launch]) -> bool:
    launch = made.get((row.arch, row.specialisation))
    return row.arch in MODELLED and launch is not None and launch.rank == 0


def _task(row: Row, made: dict[tuple[int, Specialisation], Launch]) -> Task:
    return Task(row.specialisation, row.arch, "bf16", made[row.arch, row.specialisation])


def _is_stems_gradient(one: Specialisation) -> bool:
    return one.kernel == "conv_wgrad_kernel" and one.constants["KH"] == 7


def _is_strided_and_frozen(one: Specialisation) -> bool:
    """Data gradient through a 3x3 convolution of stride 2 behind a BatchNorm of constant statistics, to one below."""
    constants, tensors = one.constants, one.pointers
    window = one.kernel == "conv_dgrad_kernel" and (constants["KH"], constants["STRIDE"]) == (3, 2)
    return window and "abc_ptr" in tensors and "y_ptr" not in tensors and "sums_ptr" in tensors


def _stores_beside_a_strided_residual(one: Specialisation) -> bool:
    """Data gradient that stores what it computes and adds a residual of every second pixel."""
    return "dy_ptr" in one.pointers and bool(one.constants.get("RESIDUAL_STRIDE"))


def _demand(one: Specialisation) -> tuple:
    middle = [one.constants.get(name) for name in ("CIN", "COUT", "KH", "STRIDE")] == [256, 256, 3, 1]
    return middle, len(one.pointers), one.constants.get("C", 0), str(one)


if __name__ == "__main__":
    main()
