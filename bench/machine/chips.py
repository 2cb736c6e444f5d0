"""The assumptions: rates, latencies and limits of the GPUs that are modelled, each with its source."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """A GPU, its rates of one multiprocessor (SM) and clock unless they say otherwise.

    Sources: [DS] the data sheet; [CC] CUDA C++ Programming Guide, technical specifications and arithmetic throughput by
    compute capability; [WP] NVIDIA's architecture white paper; [MB] published microbenchmarks of Ampere and Hopper,
    rounded; [H] fitted to the launches that an H100 was measured at (``bench/results/launches-h100.json``); [A]
    assumed here.
    """

    name: str
    sms: int  # [DS]
    clock: float  # Hz under load [A]: below the data sheet's boost, which a hot tensor core does not hold
    tensor: int  # dense bf16 operations [WP]
    mma_sync: float  # share of that rate that mma.sync (HMMA) reaches [MB]
    fma_pipes: int  # pipes of 16 lanes a quarter that take fp32 multiplications and additions [CC]
    l2: float  # bytes [MB], the H100's [H]: of the whole L2, over the multiprocessors
    bandwidth: float  # bytes a second of the whole memory: 90% of the data sheet's [A]
    registers: int = 65536  # [CC]
    shared: int = 228 * 1024  # bytes [CC]
    most_warps: int = 64  # [CC]
    most_programs: int = 32  # [CC]
    shared_bytes: int = 128  # bytes through the shared memory's port [CC]: 32 banks of 4
    l2_latency: int = 280  # cycles [MB]
    memory_latency: int = 900  # of a loaded memory [H]; 650 of an idle one [MB]
    shared_latency: int = 29  # [MB]
    barrier: int = 20  # from the last warp's arrival on [MB]
    fence: int = 25  # of the shared memory, before wgmma reads it [A]
    tensor_latency: int = 32  # of a wgmma beyond its rate, until the accumulators may be read [MB]

    @property
    def peak(self) -> float:
        """Operations a second on all tensor cores."""
        return self.tensor * self.sms * self.clock

    @property
    def memory(self) -> float:
        """Bytes a clock that each multiprocessor has of the memory where all of them load."""
        return self.bandwidth / self.sms / self.clock


# By compute capability. Latencies of all but the A100 are the H100's [A], and so is the GeForces' rate of the L2 [A].
# Of sm_100 only kernels without tcgen05 are modelled, see `bench.machine.pipes.unmodelled`.
CHIPS = {
    80: Chip(
        "A100", 108, 1.33e9, 2048, 1.0, 1, 47.0, 0.9 * 2.039e12, shared=164 * 1024, l2_latency=200, memory_latency=470
    ),
    90: Chip("H100", 132, 1.755e9, 4096, 0.62, 2, 50.0, 0.9 * 3.35e12),
    86: Chip(
        "RTX 3090", 82, 1.695e9, 512, 1.0, 2, 20.0, 0.9 * 0.936e12, shared=100 * 1024, most_warps=48, most_programs=16
    ),
    89: Chip(
        "RTX 4090", 128, 2.52e9, 512, 1.0, 2, 20.0, 0.9 * 1.008e12, shared=100 * 1024, most_warps=48, most_programs=24
    ),
    120: Chip(
        "RTX 5090", 170, 2.407e9, 512, 1.0, 2, 20.0, 0.9 * 1.792e12, shared=100 * 1024, most_warps=48, most_programs=24
    ),
    100: Chip("B200", 148, 1.75e9, 8192, 0.31, 2, 42.0, 0.9 * 8.0e12),
}
PROGRAM_SHARED = 1024  # bytes of shared memory that a program costs beside its own [CC], from sm_80 on
LAUNCH = 2e-6  # s between two kernels of a stream or a CUDA graph [A]
# Kernels that read little, and what the launch before them left in the L2 [H]: s of one that merges a few rows, of its
# further rows the share of the L2's rate that its programs have; s of a sum of parts, and of each step of its loop; the
# share of the whole L2's rate that sums of parts have.
SMALL, ROWS_SHARE, SUM, SUM_STEP, PARTS_SHARE = 3.2e-6, 0.5, 1.5e-6, 0.57e-6, 0.36
# Kernels of few programs that go through many pixels, which take so much longer than the model says [H]; nearly all of
# what they read comes from the memory, whose pages and turns the model does not have.
LONGER = {
    "conv_grads_kernel": 1.22,
    "conv_resident_kernel": 1.12,
    "conv_stem_kernel": 1.27,
    "conv_stem_wgrad_kernel": 1.24,
}


def variants(chip: Chip) -> dict[str, Chip]:
    """The chip with the assumptions that matter most for its pipes turned against the kernels, and in their favour."""
    return {
        "assumed": chip,
        "slower L2": chip._replace(l2=0.475 * chip.l2),  # 23.7 bytes of an H100: the lowest microbenchmark, 5.5 TB/s
        "faster on chip": chip._replace(l2=1.28 * chip.l2, shared_bytes=2 * chip.shared_bytes, barrier=1, fence=1),
    }
