"""What bytes and operations of training steps would take on GPUs that are not at hand: ``python -m bench.roofline``.

The bytes of every launch of the eager, the compiled (Inductor) and the fused step are those that `bench.traffic`
counted, the operations those of the convolutions; a launch takes ``max(bytes / bandwidth, flops / rate) + launch``.
Bandwidth and rate are the data sheets', times a share that large copies and matrix products are assumed to reach. These
are lower bounds, not measurements: no kernel reaches its roof; `bench.machine` predicts what they take. Stem and blocks
are counted; average pool, last layer, loss and optimizer, which are the same in all, are not. Where a folder of
campaign results exists for one of the GPUs, the same model with the ceilings measured there stands beside the times
measured there.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.blocks import Part, parts_of
from bench.record import RESULTS, write_results
from bench.report.common import networks
from bench.tables import markdown


class Machine(NamedTuple):
    """Ceilings of a GPU."""

    bandwidth: float  # bytes a second
    rate: float  # bf16 operations a second, dense
    launch: float  # seconds between the end of a kernel and the begin of the next


# NVIDIA's data sheets, SXM modules.
DATA_SHEETS = {"A100": (2.039e12, 312e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
BANDWIDTH_SHARE, RATE_SHARE, LAUNCH = 0.9, 0.75, 3e-6  # assumed
KINDS = {"eager": "eager", "compiled": "compile", "fused": "fused"}  # counted kind: variant that is measured


class Launch(NamedTuple):
    """One kernel."""

    kernel: str
    bytes: int
    flops: int
    times: float = 1.0  # that it is made; a share, or less than 0, where counted blocks stand for more of them

    def seconds(self, machine: Machine) -> float:
        """Predicted time."""
        return max(self.bytes / machine.bandwidth, self.flops / machine.rate) + machine.launch


def assumed(name: str, bandwidth_share: float, rate_share: float, launch: float) -> Machine:
    """The ceilings that a data sheet's figures are taken to mean."""
    bandwidth, rate = DATA_SHEETS[name]
    return Machine(bandwidth * bandwidth_share, rate * rate_share, launch)


def convolution_flops(part: Part, batch: int) -> list[tuple[int, bool]]:
    """Operations of each convolution's forward, in order, and whether its input needs a gradient."""
    found: list[tuple[int, bool]] = []
    modules = copy.deepcopy(part.modules).to("meta")
    x = torch.empty(1, *part.shape, device="meta")
    needed = part.images(1, torch.float32).requires_grad

    def note(conv: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        found.append((2 * conv.weight[0].numel() * output.numel() * batch, needed or inputs[0] is not x))

    for module in modules.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        modules(x)
    return found


def with_flops(kernels: list[dict[str, Any]], convolutions: list[tuple[int, bool]]) -> list[Launch]:
    """Give each counted kernel the operations of its convolution: forward in order, backward in reverse order.

    Raises:
        ValueError: where there are other convolutions among the kernels than the part has.
    """
    backward = convolutions[::-1]
    waiting = {
        "forward": deque(flops for flops, _ in convolutions),
        "dgrad": deque(flops for flops, needed in backward if needed),
        "wgrad": deque(flops for flops, _ in backward),
        "both": deque(flops * (1 + needed) for flops, needed in backward),
    }
    launches = []
    for kernel in kernels:
        kind, flops = _kind(kernel["kernel"]), 0
        if kind is not None:
            if not waiting[kind]:
                raise ValueError(f"{kernel['kernel']}: more {kind} convolutions than the part has")
            flops = waiting[kind].popleft()
        launches.append(Launch(kernel["kernel"], kernel["loaded"] + kernel["stored"], flops))
    complete = not waiting["forward"] and (not waiting["both"] or not (waiting["dgrad"] or waiting["wgrad"]))
    if not complete:
        raise ValueError("fewer convolutions among the kernels than the part has")
    return launches


def _kind(kernel: str) -> str | None:
    for half in ("dgrad", "wgrad"):
        if half in kernel:
            return half
    if "convolution_backward" in kernel:
        return "both"
    return "forward" if "convolution" in kernel else None


def fused_step(counted: dict[str, Any], convolutions: list[tuple[int, bool]]) -> list[Launch]:
    """A fused step's kernels: Triton's, which tell their operations, and the library's, which may be the convolutions.

    Raises:
        ValueError: where the operations are not those of the part's convolutions.
    """
    step = [Launch(one["kernel"], one["loaded"] + one["stored"], one["flops"]) for one in counted["launches"]]
    library = any(_kind(kernel["kernel"]) for kernel in counted["other"])
    step += with_flops(counted["other"], convolutions if library else [])
    expected = sum(flops * (2 + needed) for flops, needed in convolutions)
    if sum(launch.flops for launch in step) != expected:
        raise ValueError(f"the fused step's kernels have other operations than the {expected} of its convolutions")
    return step


def steps_of(network: dict[str, Any]) -> dict[str, list[Launch]]:
    """Launches of a counted network's step by kind: of its stem and whole stages.

    Where some blocks of a stage were counted for all, n of m, their launches beyond the first block's are made
    (m - 1) / (n - 1) times.
    """
    parts = {part.name: part for part in parts_of(network["model"], network["image"], **network["options"])}
    steps: dict[str, list[Launch]] = {kind: [] for kind in KINDS}
    for first, whole in network["stages"]:
        part, counted = parts[whole["part"]], whole["counted"]
        times = 1.0 if counted == whole["blocks"] else (whole["blocks"] - 1) / (counted - 1)
        for one, blocks, share in ((whole, counted, times), (first, 1, 1 - times)):
            if share:
                convolutions = convolution_flops(part.first(blocks), network["batch"])
                found = {kind: with_flops(one[kind], convolutions) for kind in ("eager", "compiled")}
                found["fused"] = fused_step(one, convolutions)
                for kind in KINDS:
                    steps[kind] += [launch._replace(times=share) for launch in found[kind]]
    return steps


def predict(step: list[Launch], machine: Machine) -> dict[str, float]:
    """Seconds of a step, its launches, bytes and operations, and the share of the time that bandwidth decides."""
    seconds = sum(launch.times * launch.seconds(machine) for launch in step)
    bound = [launch for launch in step if launch.bytes / machine.bandwidth > launch.flops / machine.rate]
    return {
        "seconds": seconds,
        "launches": round(sum(launch.times for launch in step)),
        "bytes": round(sum(launch.times * launch.bytes for launch in step)),
        "flops": round(sum(launch.times * launch.flops for launch in step)),
        "bandwidth_bound": sum(launch.times * launch.bytes for launch in bound) / machine.bandwidth / seconds,
    }


def comparisons(results: Path, traffic: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured steps of campaigns on a GPU beside the model with the ceilings measured there.

    The counted batch's prediction is taken in proportion to the measured batch.
    """
    found = []
    for file in sorted(results.glob("*/models.json")):
        models, ceilings = json.loads(file.read_text()), file.with_name("environment.json")
        if models["device"] == "cpu" or not ceilings.exists():
            continue
        cases = json.loads(ceilings.read_text())["cases"]
        if "gb_per_second" not in cases.get("copy", {}) or "tflops" not in cases.get("matmul bfloat16", {}):
            continue
        machine = Machine(cases["copy"]["gb_per_second"] * 1e9, cases["matmul bfloat16"]["tflops"] * 1e12, LAUNCH)
        for case in networks(models).values():
            same = (n for n in traffic["networks"].values() if (n["model"], n["image"]) == _model_of(case))
            if (counted := next(same, None)) is None:
                continue
            steps = steps_of(counted)
            for kind, variant in KINDS.items():
                figures = case["variants"].get(variant, {})
                if "seconds" in figures:
                    predicted = predict(steps[kind], machine)["seconds"] * case["batch"] / counted["batch"]
                    where = {
                        "device": models["device"],
                        "network": case["model"],
                        "batch": case["batch"],
                        "variant": variant,
                    }
                    found.append({**where, "predicted": predicted, "measured": figures["seconds"]["median"]})
    return found


def _model_of(case: dict[str, Any]) -> tuple[str | None, int | None]:
    return case.get("model"), case.get("image_size")


def read_traffic(files: list[Path]) -> dict[str, Any]:
    """Results of `bench.traffic`, merged.

    Raises:
        ValueError: for files of different dtypes, or none.
    """
    found = [json.loads(file.read_text()) for file in files]
    if len({one["dtype"] for one in found}) != 1:
        raise ValueError("give results of `python -m bench.traffic --json FILE`, all of one dtype")
    networks = {name: counted for one in found for name, counted in one["networks"].items()}
    return {"dtype": found[0]["dtype"], "networks": networks}


def rows(predictions: dict[str, dict[str, dict[str, dict[str, float]]]], batches: dict[str, int]) -> list[list[str]]:
    """A row of the table for each network and GPU."""
    lines = []
    for network, gpus in predictions.items():
        for gpu, kinds in gpus.items():
            seconds = {kind: figures["seconds"] for kind, figures in kinds.items()}
            lines.append(
                [f"{network}, {batches[network]} images", gpu, *(f"{1e3 * value:.2f}" for value in seconds.values())]
                + [f"{kinds[kind]['bandwidth_bound']:.0%}" for kind in KINDS]
            )
    return lines


COLUMNS = ("network", "GPU", "eager ms", "compiled ms", "fused ms", "bandwidth-bound: eager", "compiled", "fused")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--traffic", nargs="+", type=Path, help="results of bench.traffic [bench/results/traffic*.json]"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that campaigns' folders are in")
    parser.add_argument("--bandwidth-share", type=float, default=BANDWIDTH_SHARE, help="of the data sheet's [0.9]")
    parser.add_argument("--rate-share", type=float, default=RATE_SHARE, help="of the data sheet's [0.75]")
    parser.add_argument("--launch", type=float, default=LAUNCH, help="seconds a launch [3e-6]")
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline.json", help="result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Predict, compare, print, write the result."""
    args = parse(argv)
    traffic = read_traffic(args.traffic or sorted(RESULTS.glob("traffic*.json")))
    machines = {name: assumed(name, args.bandwidth_share, args.rate_share, args.launch) for name in DATA_SHEETS}
    predictions: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    batches = {network: counted["batch"] for network, counted in traffic["networks"].items()}
    for network, counted in traffic["networks"].items():
        steps = steps_of(counted)
        predictions[network] = {
            name: {kind: predict(step, machine) for kind, step in steps.items()} for name, machine in machines.items()
        }
    compared = comparisons(args.results, traffic)
    print(f"Predictions, {traffic['dtype']}\n\n{markdown(COLUMNS, rows(predictions, batches))}")
    for one in compared:
        print(
            f"{one['device']}, {one['network']}, batch {one['batch']}, {one['variant']}: "
            f"measured {1e3 * one['measured']:.2f} "
            f"ms, {one['measured'] / one['predicted']:.2f} times the prediction"
        )
    write_results(
        args.out,
        {
            "kind": "prediction",
            "batches": batches,
            "dtype": traffic["dtype"],
            "machines": {name: machine._asdict() for name, machine in machines.items()},
            "predictions": predictions,
            "compared": compared,
        },
    )


if __name__ == "__main__":
    main()
