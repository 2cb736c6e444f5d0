"""Predicted data-parallel training on 8 to 1024 GPUs: ``python -m bench.scaling``, which fills in docs/distributed.md.

A step takes the roofline's time of the fused step (`bench.roofline`), shared out as launches, which do not shrink with
the batch, and the rest, which does; and what of the exchange backward does not hide. Nothing here is measured.

An all-reduce of S bytes runs in a ring inside a node and, each GPU with its share of S over its own network card, in
a ring between nodes: ``2(g-1)/g S / link + 2(n-1)/n S/g / card``, and a latency that grows with the logarithm of the
number of nodes. Gradients are exchanged while backward runs, except the last bucket; BatchNorm's statistics never, as
the next layer waits for them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.record import RESULTS, write_results
from bench.tables import fill, markdown
from fastres.models import create_model

GPUS = (8, 16, 64, 256, 1024)
# Networks, and the largest batch of all GPUs that is taken to cost no accuracy: Goyal et al. 2017 for ImageNet; of
# ResNet-110 on CIFAR-10 an assumption, 16 times the batch of He et al. 2015.
LIMITS = {"resnet18": 8192, "resnet50": 8192, "resnet110": 2048}
CLASSES = {"resnet18": 1000, "resnet50": 1000, "resnet110": 10}


class Cluster(NamedTuple):
    """Assumed: nodes of 8 H100 on NVLink, a 400 Gbit/s card a GPU, both at 80% of their data sheets."""

    node: int = 8  # GPUs
    link: float = 0.8 * 450e9  # bytes a second and direction, of a GPU inside its node
    card: float = 0.8 * 50e9  # bytes a second and direction, of a GPU to other nodes
    latency: float = 12e-6  # seconds, of an all-reduce inside a node
    hop: float = 5e-6  # seconds, of a step between nodes


class Network(NamedTuple):
    """What is exchanged a step, and the step that hides it."""

    gradients: int  # bytes, fp32
    statistics: list[tuple[int, int]]  # bytes of each BatchNorm, forward and backward
    seconds: float  # of a step at ``batch`` images
    launches: float  # seconds of it that do not depend on the batch
    batch: int


BUCKET = 25 * 2**20  # bytes, PyTorch's default
BACKWARD = 2 / 3  # share of a step, assumed: two of three convolutions a layer


def volume(name: str) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of the gradients, and of every BatchNorm's statistics as `fastres.ops.batch_norm` sends them."""
    with torch.device("meta"):
        model = create_model(name, num_classes=CLASSES[name])
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return 4 * sum(p.numel() for p in model.parameters()), [(8 * (2 * c + 1), 8 * 2 * c) for c in channels]


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of an all-reduce of ``size`` bytes."""
    inside, nodes = min(gpus, cluster.node), max(1, gpus // cluster.node)
    seconds = cluster.latency + 2 * (inside - 1) / inside * size / cluster.link
    if nodes > 1:
        seconds += 2 * math.log2(nodes) * cluster.hop + 2 * (nodes - 1) / nodes * size / inside / cluster.card
    return seconds


def step(network: Network, gpus: int, images: int, cluster: Cluster) -> dict[str, float]:
    """Seconds of a step of ``images`` a GPU, of what of its exchange is not hidden, and the share of linear scaling."""
    compute = network.launches + (network.seconds - network.launches) * images / network.batch
    last = min(network.gradients, BUCKET)
    rest, buckets = network.gradients - last, math.ceil((network.gradients - last) / BUCKET)
    hidden = buckets * all_reduce(rest / buckets, gpus, cluster) if buckets else 0.0
    exposed = all_reduce(last, gpus, cluster) + max(0.0, hidden - BACKWARD * compute)
    synchronised = sum(all_reduce(size, gpus, cluster) for pair in network.statistics for size in pair)
    return {
        "gpus": gpus,
        "images": images,
        "compute": compute,
        "gradients": exposed,
        "statistics": synchronised,
        "efficiency": compute / (compute + exposed),
        "efficiency_synchronised": compute / (compute + exposed + synchronised),
        "images_per_second": gpus * images / (compute + exposed),
    }


def predict(name: str, roofline: dict[str, Any], cluster: Cluster) -> dict[str, Any]:
    """Volumes, and steps at the roofline's batch a GPU and at the limit of the batch of all GPUs."""
    predicted, machine = roofline["predictions"][name]["H100"]["fused"], roofline["machines"]["H100"]
    gradients, statistics = volume(name)
    launches = predicted["launches"] * machine["launch"]
    network = Network(gradients, statistics, predicted["seconds"], launches, roofline["batches"][name])
    return {
        "gradients_bytes": gradients,
        "statistics_bytes": sum(map(sum, statistics)),
        "statistics_exchanges": 2 * len(statistics),
        "limit": LIMITS[name],
        "same_batch_a_gpu": [step(network, gpus, network.batch, cluster) for gpus in GPUS],
        "limited_batch": [
            step(network, gpus, LIMITS[name] // gpus, cluster) for gpus in GPUS if LIMITS[name] // gpus <= network.batch
        ],
    }


def volumes(predictions: dict[str, Any]) -> str:
    """What each network exchanges a step, as a table."""
    rows = [
        [
            name, f"{found['gradients_bytes'] / 1e6:.2f}", str(found["statistics_exchanges"]),
            f"{found['statistics_bytes'] / 1e3:.0f}",
        ]
        for name, found in predictions.items()
    ]  # fmt: skip
    return markdown(["a step of", "gradients, MB", "exchanges of `--sync-bn`", "together, kB"], rows)


def steps(predictions: dict[str, Any]) -> str:
    """Every step as a row."""
    head = ["network", "GPUs", "images a GPU", "batch", "compute ms", "gradients ms", "statistics ms", "images/s"]
    rows = [
        [
            name, str(row["gpus"]), str(row["images"]), str(row["gpus"] * row["images"]), f"{1e3 * row['compute']:.2f}",
            f"{1e3 * row['gradients']:.2f}", f"{1e3 * row['statistics']:.2f}", f"{row['images_per_second']:,.0f}",
            f"{row['efficiency']:.0%}", f"{row['efficiency_synchronised']:.0%}",
        ]
        for name, found in predictions.items()
        for row in (*found["same_batch_a_gpu"], *found["limited_batch"])
    ]  # fmt: skip
    return markdown([*head, "efficiency", "with synchronised BatchNorm"], rows)


def main(argv: list[str] | None = None) -> None:
    """Predict, print the tables and write them to the page and ``scaling.json``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--roofline", type=Path, default=RESULTS / "roofline.json", help="what bench.roofline wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--page", type=Path, default=RESULTS.parents[1] / "docs" / "distributed.md")
    args = parser.parse_args(argv)
    cluster, roofline = Cluster(), json.loads(args.roofline.read_text())
    predictions = {name: predict(name, roofline, cluster) for name in LIMITS}
    write_results(args.out, {"kind": "prediction", "assumed": cluster._asdict(), "predictions": predictions})
    parts = {"volume": volumes(predictions), "steps": steps(predictions)}
    print("\n\n".join(parts.values()))
    args.page.write_text(fill(args.page.read_text(), parts))


if __name__ == "__main__":
    main()
