"""Where and in which precision a run computes: device choice, autocast dtype, determinism, peak memory."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from fastres.atomic import warn_once
from fastres.data.dataset import first_line
from fastres.errors import FastresError
from fastres.models import model_names
from fastres.ops import cpu
from fastres.ops.cpu import pages
from fastres.train.config import TrainConfig

_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device or else the CPU.

    Raises:
        FastresError: for a device that PyTorch does not know or that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FastresError(f"--device {name!r} is unknown: choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise FastresError(f"--device {name!r} is not supported: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastresError(
            f"--device {name} asks for a CUDA device, but PyTorch sees {torch.cuda.device_count()} here: "
            "use --device cpu, or check the driver and that PyTorch has CUDA"
        )
    return device


def use_device(device: torch.device) -> None:
    """Make a CUDA device the process's current one, to which new streams, graphs and NCCL belong."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def on_device(device: torch.device) -> AbstractContextManager:
    """Context in which a CUDA device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products have hardware of their own: tensor cores from sm_80, AMX or AVX512-BF16 on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open("/proc/cpuinfo") as lines:
            flags = lines.read()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions compute in."""
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return DTYPES[precision]


def pick_backend(name: str, device: torch.device) -> str:
    """``auto`` is ``fused``, but ``eager`` on a CPU where the compiled passes of `fastres.ops.cpu` cannot be had.

    Why they cannot is said once.
    """
    if name != "auto":
        return name
    reason = cpu.unavailable() if device.type == "cpu" else None
    if reason and os.environ.get("RANK", "0") == "0":
        warn_once(f"blocks are plain eager PyTorch, as there are no compiled passes: {reason}")
    return "eager" if reason else "fused"


def building_note(device: torch.device, backend: str) -> str | None:
    """A line for the first run on a GPU, whose Triton kernels are built in its first steps; None: some are built
    already, or there are none. Of the CPU's compiled passes `fastres.ops.cpu` says it.
    """
    if device.type != "cuda" or backend != "fused":
        return None
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser()
    try:
        if next(folder.iterdir(), None) is not None:
            return None
    except OSError:
        pass
    return f"building the kernels in the first steps, once, which takes minutes; they are kept in {folder}"


def settled(
    config: TrainConfig, device: torch.device, of_first: Callable[[Callable[[], dict]], dict] = lambda make: make()
) -> TrainConfig:
    """The configuration with the machine's choices in place of ``auto``, which a run keeps wherever it goes on.

    Args:
        of_first: makes the choice of rank 0 all ranks'.
    """

    def choose() -> dict[str, str]:
        precision = {dtype: name for name, dtype in DTYPES.items()}[pick_dtype(config.precision, device)]
        return {"precision": precision, "backend": pick_backend(config.backend, device)}

    return config.replace(**of_first(choose)) if "auto" in (config.precision, config.backend) else config


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``; float32 means off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_compile(device: torch.device) -> None:
    """Compile and run something tiny, so that a missing compiler is known before the work starts.

    Raises:
        FastresError: when torch.compile cannot compile for the device.
    """
    try:
        torch.compile(torch.sin)(torch.ones(4, device=device))
    except Exception as error:  # Dynamo, Inductor, Triton and the compilers each have their own types
        raise FastresError(
            f"torch.compile does not work on {device} here ({first_line(error)}): leave out --compile, or install "
            f"{'a C++ compiler' if device.type == 'cpu' else 'Triton and a C compiler'}"
        ) from error


def takes_graph(config: TrainConfig, device: torch.device, dtype: torch.dtype, ranks: int) -> bool:
    """Whether each training step is one CUDA graph.

    Unless the configuration says so it is where that is known to be right: a network that nothing else compiles or
    computes in pieces, whose steps are all alike, on one GPU. Between launches a GPU would else wait for the host.

    Raises:
        FastresError: where it is wanted and cannot be: without a GPU, with several ranks, or in fp16, whose gradient
            scaler decides on the host whether to skip a step.
    """
    wanted = config.cuda_graph
    if wanted is None:
        alone = device.type == "cuda" and dtype != torch.float16 and ranks == 1
        return alone and config.model in model_names() and not config.compile and not config.checkpoint_every
    if wanted and device.type != "cuda":
        raise FastresError(f"--cuda-graph needs a CUDA device, not {device}: leave it out")
    if wanted and dtype == torch.float16:
        raise FastresError("--cuda-graph cannot hold fp16's loss scaling: add --precision bf16 or fp32")
    if wanted and ranks > 1:
        raise FastresError("--cuda-graph cannot hold the exchange between ranks: leave it out")
    return wanted


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Which algorithms run inside: with ``deterministic`` only such, and an operation that has none raises, on every
    device.

    Else cuDNN takes the fastest of its algorithms, timed at the first call of a shape: another run may take others,
    which round otherwise; but where the process asks for deterministic ones itself that stays. Afterwards all is as
    before.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark, named = torch.backends.cudnn.benchmark, _CUBLAS_WORKSPACE in os.environ
    if deterministic:
        os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not (deterministic or enabled)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if deterministic:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            if not named:
                del os.environ[_CUBLAS_WORKSPACE]


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Networks that are made inside are in fp32 on the CPU and have the seed's weights.

    The process' random numbers go on afterwards as if nothing had been drawn, and its default dtype and device stay.
    """
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed: the next step needs the same buffers again.

    By default a large buffer goes back to the system when it is freed, and its pages are cleared anew at the next
    step; a training step on a CPU then spends up to a quarter of its time in page faults. For the whole process.

    Returns:
        Whether the allocator took it: False where the C library is not glibc.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    return _mallopt(trim_threshold, -1) and _mallopt(mmap_max, 0)


def return_freed_memory() -> bool:
    """Tell glibc's allocator to give every large buffer back to the system when it is freed, for the least memory.

    By default it raises the size from which it does so as buffers are freed, up to 32 MiB; what is smaller leaves
    holes. For the whole process.

    Returns:
        As `keep_freed_memory`.
    """
    mmap_threshold = -3  # malloc.h: M_MMAP_THRESHOLD
    return _mallopt(mmap_threshold, 2**20)


def treat_freed_memory(device: torch.device, recompute: bool) -> None:
    """On a CPU keep what is freed for the next step, large tensors' memory page by page (`fastres.ops.cpu.pages`).

    Where that cannot be had, the C library keeps it, or with ``recompute``, the blocks' memory mode, returns it: sizes
    that follow one another leave holes there. An allocator that the process was started with (``LD_PRELOAD``) stays.
    """
    if device.type != "cpu" or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return
    recycles = pages.use() is None
    (return_freed_memory if recompute and not recycles else keep_freed_memory)()


def _mallopt(parameter: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (AttributeError, OSError, TypeError):
        return False


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far in MiB: allocated tensors on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
