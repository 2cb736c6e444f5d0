"""The one sentence of figures that the README begins with."""

from __future__ import annotations

from pathlib import Path

from bench import cpu
from bench.report.common import read

NETWORK = "resnet50"  # with the stem for CIFAR, see `bench.cpu.WORKLOADS`


def sentence(results: Path) -> str | None:
    """A fused training step on a CPU against the best baseline, by `bench.cpu`, and the bytes it moves, counted."""
    records = [record for path in results.glob("cpu-*.json") if (record := read(path))]
    record = max(records, key=lambda record: record["date"], default=None)
    measured = next((one for one in record["workloads"] if one["workload"] == NETWORK), None) if record else None
    if record is None or measured is None:
        return None
    training = cpu.summary(measured)["training"]
    one, precision = cpu.WORKLOADS[NETWORK], training["best"].split(", ")[1]
    same, default = training["baseline with kept memory"]["ratio"], training["baseline"]["ratio"]
    return (
        f"**Measured on a CPU ({record['cpu']}, {record['threads']} threads, PyTorch {record['versions']['torch']}, "
        f"{record['date'][:10]}): a training step of ResNet-50 on {one.batch} images of {one.image_size} pixels in "
        f"{precision} runs {same:.2f} times as fast as the fastest of eager PyTorch and torch.compile with the same "
        f"allocator settings, {default:.2f} times as with the default ones{_bytes(results)}.**"
    )


def _bytes(results: Path) -> str:
    """Its share of eager PyTorch's bytes by `bench.traffic`, where they were counted."""
    record = read(results / f"traffic-{NETWORK}-cifar.json")
    if not record:
        return ""
    stages = [stage["moved"] for counted in record["networks"].values() for _, stage in counted["stages"]]
    fused, eager = (sum(moved[kind] for moved in stages) for kind in ("fused", "eager"))
    return f"; its Triton form moves {fused / eager:.2f} of eager PyTorch's bytes (a static count)"
