"""What `bench.aot` compiles: the launches of the shipped networks on every architecture, the first choices first."""

from __future__ import annotations

import hashlib
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

import fastres
from bench import launches
from bench.launches import WAYS, Launch, Specialisation, recorded
from bench.sass import SHARED_LIMIT, Architecture
from fastres.atomic import atomic_write
from fastres.kernels.configs import OTHER, has_tensor_cores, has_warp_groups
from fastres.kernels.resources import shared_memory_of
from fastres.models import create_model
from fastres.models.fused import create_fused_model
from fastres.nn import fold
from fastres.ops.backends.timed import RANKS
from fastres.ops.timing import choices_path

ALL_RANKS = (*range(RANKS), *WAYS)
# Networks that have every kernel and every width between them, with the shape of a batch and the model's options.
NETWORKS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "resnet50 ImageNet": ("resnet50", (64, 3, 224, 224), {"num_classes": 1000}),
    "resnet50 CIFAR": ("resnet50", (128, 3, 32, 32), {"stem": "cifar"}),
    "resnet18 ImageNet": ("resnet18", (64, 3, 224, 224), {"num_classes": 1000}),
    "resnet18 CIFAR": ("resnet18", (128, 3, 32, 32), {"stem": "cifar"}),
    "resnet8": ("resnet8", (512, 3, 32, 32), {}),
    "resnet20": ("resnet20", (128, 3, 32, 32), {}),  # resnet110 has the same layers, only more of them
    "preact_resnet164": ("preact_resnet164", (128, 3, 32, 32), {}),  # and so has preact_resnet1001
    "notebook": ("notebook", (64, 3, 96, 96), {}),
    "speed": ("speed", (256, 3, 32, 32), {}),
    "speed94": ("speed94", (500, 3, 32, 32), {}),  # and speed96, with twice the channels
    "speed95": ("speed95", (500, 3, 32, 32), {}),
}
PRECISIONS = {  # name: dtype, and whether fp32 may be rounded to tf32
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
# Compile-time arguments that do not make a row of their own: numbers of channels; of padding whether there is any; of
# an image's size whether a division by it is a shift.
CHANNELS, PADDING, SIZES = {"C", "CIN", "COUT"}, {"TOP", "LEFT"}, {"H", "W", "OH", "OW", "SIZES"}


class Task(NamedTuple):
    """A specialisation to be compiled for an architecture, and a launch of it."""

    specialisation: Specialisation
    arch: Architecture
    precision: str  # key of `PRECISIONS`
    launch: Launch

    @property
    def first(self) -> bool:
        """Whether it is a configuration that is taken first."""
        return not self.launch.rank


def planned(
    networks: Iterable[str],
    precisions: Iterable[str],
    archs: Iterable[Architecture],
    ranks: Iterable[int],
    kernels: tuple[str, ...] = (),
    every_shape: bool = False,
) -> list[Task]:
    """All that is to be compiled: first configurations before others, precisions in order, convolutions
    before other kernels, all architectures together.

    An architecture without tensor cores for bf16 has fp16 in its place.

    Args:
        networks, precisions: keys of `NETWORKS` and `PRECISIONS`.
        archs: keys of `SHARED_LIMIT`.
        ranks: of the configurations that launchers offer, the first at 0, and of `bench.launches.WAYS`.
        kernels: how the names of the kernels begin; all without.
        every_shape: every number of channels and size of images, not `representatives` alone.
    """
    tasks: list[Task] = []
    places: dict[Specialisation, int] = {}
    networks, precisions, ranks = list(networks), list(precisions), list(ranks)
    for alike in _alike(archs):
        has_bf16 = has_tensor_cores(number_of(alike[0]))
        for precision in dict.fromkeys("fp16" if one == "bf16" and not has_bf16 else one for one in precisions):
            found: dict[Specialisation, Launch] = {}
            for network in networks:
                merge(found, _kept(network, precision, ranks, SHARED_LIMIT[alike[0]], number_of(alike[0])))
            if kernels:
                found = {one: found[one] for one in found if one.kernel.startswith(kernels)}
            chosen = list(found) if every_shape else representatives(found)
            for place, one in enumerate(chosen):
                tasks += [Task(one, arch, precision, found[one]) for arch in alike]
                places[one] = min(place, places.get(one, place))
    order = {precision: place for place, precision in enumerate(PRECISIONS)}

    def urgency(task: Task) -> tuple[bool, int, bool, int]:
        one = task.specialisation
        return not task.first, order[task.precision], not one.kernel.startswith("conv"), places[one]

    tasks.sort(key=urgency)
    found_first: dict[tuple[Specialisation, Architecture], Task] = {}
    for task in tasks:  # what several precisions launch counts once
        found_first.setdefault((task.specialisation, task.arch), task)
    return list(found_first.values())


def _kept(network: str, precision: str, ranks: list[int], shared: int, arch: int) -> dict[Specialisation, Launch]:
    """`launches_of`, or what an earlier run recorded with the same sources: ``aot/`` beside the timed choices."""
    path = choices_path().parent / "aot" / f"plan-{_digest(network, precision, ranks, shared, arch)}.pickle"
    try:
        return pickle.loads(path.read_bytes())
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError):
        found = launches_of(network, precision, ranks, shared, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(pickle.dumps(found))
    return found


def _digest(*arguments: object) -> str:
    text = hashlib.sha256(f"{arguments} torch {torch.__version__} triton {triton.__version__}".encode())
    package, kernels = (Path(module.__file__ or "").parent for module in (fastres, fastres.kernels))
    recorder = [Path(__file__), Path(launches.__file__)]
    for file in sorted({*package.rglob("*.py"), *kernels.glob("*.py"), *recorder}):
        text.update(file.read_bytes())
    return text.hexdigest()


def number_of(arch: Architecture) -> int:
    """The architecture as launchers choose by it, see `fastres.kernels.resources.architecture`."""
    return arch if isinstance(arch, int) else OTHER


def _alike(archs: Iterable[Architecture]) -> list[list[Architecture]]:
    """Those of the same shared memory and kind of tensor cores, which launch the same."""

    def kind(arch: Architecture) -> tuple[int, bool, bool, bool]:
        number = number_of(arch)
        return SHARED_LIMIT[arch], has_warp_groups(number), has_tensor_cores(number), number == OTHER

    return [list(alike) for _, alike in itertools.groupby(sorted(archs, key=kind), kind)]


def launches_of(
    network: str,
    precision: str,
    ranks: Iterable[int] = ALL_RANKS,
    shared: int | None = None,
    arch: int | None = None,
) -> dict[Specialisation, Launch]:
    """All that a training step (also with the memory mode, and with frozen BatchNorm) and inference launch, each with
    the launch of it at the lowest rank that has the most programs.

    Args:
        network, precision: keys of `NETWORKS` and `PRECISIONS`.
        shared: bytes of shared memory that a program can have on the device, by which configurations are chosen; None:
            any.
        arch: the device's architecture, by which they are chosen too; None: an H100's. On one without tensor cores the
            convolutions are the library's.
    """
    name, shape, options = NETWORKS[network]
    dtype, tf32 = PRECISIONS[precision]
    images = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    found: dict[Specialisation, Launch] = {}
    library = arch is not None and not has_tensor_cores(arch)
    with _convolutions_in_tf32(tf32), shared_memory_of(shared, arch):
        for rank in ranks:
            for run in _runs(name, options):
                with recorded(None if library else rank) as launches:
                    run(images, dtype)
                merge(found, {launch.specialisation: launch for launch in sorted(launches, key=_order, reverse=True)})
            if library:
                break
    return found


def merge(found: dict[Specialisation, Launch], more: dict[Specialisation, Launch]) -> None:
    """Add launches to those found; of one specialisation the first configuration, or else the most programs, stays."""
    for one, launch in more.items():
        found[one] = min(found.get(one, launch), launch, key=_order)


def _order(launch: Launch) -> tuple[int, int]:
    return launch.rank or 0, -launch.programs


def _runs(name: str, options: dict[str, Any]) -> Iterator[Callable[[Tensor, torch.dtype], None]]:
    for recompute in (False, True):
        yield _step(create_fused_model(name, recompute=recompute, **options))
    yield _step(create_fused_model(name, **options).eval())
    yield _inference(fold(create_model(name, **options)))


def _step(model: nn.Module) -> Callable[[Tensor, torch.dtype], None]:
    def run(images: Tensor, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(images)
        logits.float().sum().backward()

    return run


def _inference(model: nn.Module) -> Callable[[Tensor, torch.dtype], None]:
    def run(images: Tensor, dtype: torch.dtype) -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(images)

    return run


@contextmanager
def _convolutions_in_tf32(allowed: bool) -> Iterator[None]:
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def representatives(found: dict[Specialisation, Launch]) -> list[Specialisation]:
    """One of each class that differs in numbers of channels and in sizes of images only; in a stable order.

    Of a class it is one that is taken first, if there is any, and has the most channels.
    """
    classes: dict[tuple, Specialisation] = {}
    for one in sorted(found, key=lambda s: (s.kernel, not found[s].rank, channels(s), str(s))):
        classes[_class_of(one)] = one
    return list(classes.values())


def channels(one: Specialisation) -> tuple[int, ...]:
    """Numbers of channels that are compiled in."""
    return tuple(value for name, value in one.constants.items() if name in CHANNELS)


def _class_of(one: Specialisation) -> tuple:
    constants = {name: math.gcd(value, 64) if name in CHANNELS else value for name, value in one.constants.items()}
    for side in PADDING & constants.keys():
        constants[side] = constants[side] != 0
    for size in SIZES & constants.keys():
        value = constants[size]
        sides = value if isinstance(value, tuple) else () if value is None else (value,)
        constants[size] = tuple(side.bit_count() == 1 for side in sides)
    return one.kernel, tuple(one.pointers.items()), tuple(constants.items()), one.options
