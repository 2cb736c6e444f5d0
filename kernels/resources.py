"""Which configuration a device has room for: estimated before a launch, learnt from a launch that was refused."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import torch
from triton.runtime.errors import OutOfResources

from fastres.kernels.configs import OTHER, Config, taken, withdraw

T = TypeVar("T")


class Demand(NamedTuple):
    """What a convolution's launch asks of a multiprocessor beside its configuration.

    ``rows``, ``columns`` and ``vectors`` are the tiles [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K] and the fp32 [BLOCK_K]
    that a step of its loop loads; ``made_rows`` and ``made_columns`` tell which operand of the product is computed from
    them.
    """

    kernel: str
    device: torch.device
    dtype: torch.dtype
    rows: int
    columns: int
    vectors: int
    made_rows: bool
    made_columns: bool
    depth: int  # summed over; where a single step does it, nothing is pipelined


def shared_memory(config: Config, demand: Demand) -> int:
    """Bytes of shared memory that a program takes on sm_80, sm_86, sm_89 and sm_120, or a few more, never fewer.

    The pipeline holds the tiles of ``num_stages - 1`` steps, an operand that is computed goes through shared memory
    once more, and the result's tile is laid out anew for its stores: compared with what the compiler took
    (``bench/aot.py``). On sm_90 and sm_100, which have twice the memory, the pipeline holds another step.
    """
    sides = demand.rows * config.block_m + demand.columns * config.block_n * config.taps
    step = sides * config.block_k * demand.dtype.itemsize
    step += demand.vectors * config.block_k * 4
    steps = config.num_stages - 1 if demand.depth > config.block_k else 1
    made = (config.block_m if demand.made_rows else 0) + (config.block_n * config.taps if demand.made_columns else 0)
    result = config.block_m * config.block_n * 4
    return max(steps * step + made * config.block_k * demand.dtype.itemsize, result)


_told: ContextVar[tuple[int | None, int | None]] = ContextVar("told", default=(None, None))


@contextmanager
def shared_memory_of(size: int | None, arch: int | None = None) -> Iterator[None]:
    """Configurations are chosen inside as if every program could have ``size`` bytes of shared memory, on a GPU of the
    compute capability ``arch``, as 90; None: as ever."""
    token = _told.set((size, arch))
    try:
        yield
    finally:
        _told.reset(token)


def shared_memory_limit(device: torch.device) -> int | None:
    """Bytes of shared memory that a program can have on a device; None: any, as in the interpreter."""
    told, _ = _told.get()
    return told if told is not None or device.type != "cuda" else _limit(device)


def architecture(device: torch.device) -> int:
    """Compute capability, as 90 for 9.0; `OTHER` of an AMD GPU; of a device without one, as the interpreter's, that of
    an H100."""
    _, told = _told.get()
    if told is not None:
        return told
    if device.type != "cuda":
        return 90
    return OTHER if torch.version.hip else _capability(device)


@functools.cache
def _limit(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_refused: set[tuple[Demand, Config]] = set()
_latest: ContextVar[Demand] = ContextVar("latest")


def fitting(demand: Demand) -> Callable[[Config], bool]:
    """Whether the device has room for a launch in a configuration, as far as this is known before it."""
    _latest.set(demand)
    limit = shared_memory_limit(demand.device)

    def fits(config: Config) -> bool:
        return (demand, config) not in _refused and (limit is None or shared_memory(config, demand) <= limit)

    return fits


def falling_back(launcher: Callable[..., T]) -> Callable[..., T]:
    """The launcher, which takes the next configuration that is `fitting` where a launch is refused for want of a
    resource.

    Registers and tensor memory are known only once a kernel is compiled, and the compiler may take more shared memory
    than was estimated. What was refused is not tried again in this process.

    Raises:
        OutOfResources: where no configuration fits.
    """

    @functools.wraps(launcher)
    def launch(*args, **options):
        while True:
            with taken() as tiles:
                try:
                    return launcher(*args, **options)
                except (OutOfResources, RuntimeError) as error:
                    config = tiles[-1] if tiles else None
                    if not isinstance(config, Config) or not _is_refusal(error):
                        raise
                    if (_latest.get(), config) in _refused:
                        raise
                    _refuse(_latest.get(), config, error)
                    withdraw(config)

    return launch


def _is_refusal(error: Exception) -> bool:
    """Whether Triton refused a launch, or the driver did."""
    return isinstance(error, OutOfResources) or "too many resources requested for launch" in str(error)


def _refuse(demand: Demand, config: Config, error: Exception) -> None:
    """Remember it, and say so once a device, kernel, dtype and configuration."""
    said = any(known[:3] == demand[:3] and tile == config for known, tile in _refused)
    _refused.add((demand, config))
    if not said:
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
        dtype = str(demand.dtype).removeprefix("torch.")
        warnings.warn(
            f"{demand.kernel} in {dtype} with tiles of {tile} does not fit {demand.device} ({error}): it takes other "
            "tiles there from now on",
            stacklevel=4,
        )
