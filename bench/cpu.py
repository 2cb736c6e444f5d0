"""Training and inference on a CPU against every peer at its best, and against the convolutions alone: ``python -m bench.cpu``.

Peers are eager PyTorch in both layouts and torch.compile, in fp32 and bf16, each with the C library's allocator as it comes
and with `fastres.train.machine.keep_freed_memory`. All that share an allocator run in one process, in turn; peak memory is
taken in a process of its own. The limit is the time of PyTorch's own convolutions on the network's shapes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.depth import in_own_process
from bench.record import RESULTS, write_results
from bench.tables import markdown
from fastres.measure import Timing, Workload, interleaved
from fastres.measure.peers import PEERS
from fastres.measure.step import Step, peak_memory
from fastres.nn.fold import fold
from fastres.train import machine

WORKLOADS = {
    "resnet50": Workload("resnet50", 64, 32, {"stem": "cifar"}),
    "notebook": Workload("notebook", 64, 96),
    "resnet20": Workload("resnet20", 128, 32),
}
TRAINING_PEERS = ("eager NCHW", "eager", "compile")
OURS = ("fused", "fused fewer")
INFERENCE_PEERS = ("eager NCHW", "eager", "compile", "compile frozen")
CPU = torch.device("cpu")


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one workload; seconds are medians of a call."""
    workload, found = WORKLOADS[name], {"workload": name, "training": {}, "inference": {}, "peak_mib": {}}
    for kept in (False, True):
        for kind, function in (("training", _training), ("inference", _inference)):
            print(f"{name}: {kind}, {'kept memory' if kept else 'allocator as it comes'}", flush=True)
            found[kind] |= in_own_process(function, workload, kept, args.precisions, args.rounds, args.threads)
    for precision in args.precisions:
        for peer in (*TRAINING_PEERS[:2], *OURS):
            memory = in_own_process(_memory, workload, peer, precision, args.threads)
            found["peak_mib"][f"{peer}, {precision}"] = memory["peak_mib"] - memory["idle_mib"]
    found["convolutions"] = {
        precision: in_own_process(_convolutions, workload, precision, args.threads) for precision in args.precisions
    }
    return found


def _prepare(kept: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    if kept:
        machine.keep_freed_memory()


def _training(
    workload: Workload, kept: bool, precisions: list[str], rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Of the peers, and with kept memory ours: as that is part of `fastres train`."""
    _prepare(kept, threads)
    peers = (*TRAINING_PEERS, *OURS) if kept else TRAINING_PEERS
    steps = {
        _label(peer, precision, kept): Step(workload, peer, CPU, machine.DTYPES[precision])
        for precision in precisions
        for peer in peers
    }
    return _timed(steps, rounds)


def _inference(
    workload: Workload, kept: bool, precisions: list[str], rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    _prepare(kept, threads)
    calls: dict[str, Callable[[], Any]] = {}
    for precision in precisions:
        dtype = machine.DTYPES[precision]
        for peer in INFERENCE_PEERS:
            calls[_label(peer, precision, kept)] = Inference(workload, peer, dtype)
        if kept:
            calls[_label("folded", precision, kept)] = Inference(workload, "folded", dtype)
    return _timed(calls, rounds)


class Inference:
    """A forward pass in evaluation mode, without gradients.

    Args:
        peer: one of `INFERENCE_PEERS`, ``"compile frozen"`` being torch.compile with weights folded as constants, or
            ``"folded"``.
        dtype: the peers run under autocast to it; folded and frozen networks are converted to it once.
    """

    def __init__(self, workload: Workload, peer: str, dtype: torch.dtype):
        channels_last = peer != "eager NCHW"
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model: nn.Module = workload.build().eval()
        if peer == "folded":
            model = fold(model)
        self.images, _ = workload.inputs(CPU, channels_last)
        self.frozen, self.autocast = peer == "compile frozen", dtype
        if peer in ("compile frozen", "folded"):
            model, self.images, self.autocast = model.to(dtype), self.images.to(dtype), torch.float32
        model = model.to(memory_format=layout)
        self.model = torch.compile(model, dynamic=False) if "compile" in peer else model

    def __call__(self) -> Tensor:
        """The logits."""
        import torch._inductor.config as inductor

        with torch.no_grad(), machine.autocast(CPU, self.autocast):
            if not self.frozen:
                return self.model(self.images)
            with inductor.patch(freezing=True):
                return self.model(self.images)


def _timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    found = interleaved(calls, CPU, warmup=2, rounds=rounds)
    return {
        label: time._asdict() if isinstance(time, Timing) else {"error": f"{type(time).__name__}: {time}"[:200]}
        for label, time in found.items()
    }


def _memory(workload: Workload, peer: str, precision: str, threads: int) -> dict[str, float]:
    _prepare(PEERS[peer].fused, threads)
    return peak_memory(workload, peer, CPU, machine.DTYPES[precision])


def _convolutions(workload: Workload, precision: str, threads: int) -> dict[str, float]:
    """Seconds of all convolutions of a step by PyTorch's own, best layout: forward, and the gradients that are needed."""
    _prepare(True, threads)
    dtype, layers = machine.DTYPES[precision], []
    model = workload.build()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda conv, inputs: layers.append((conv, inputs[0].shape)))
    with torch.no_grad():
        model(workload.inputs(CPU)[0])
    seconds, timed = {"forward": 0.0, "backward": 0.0}, {}
    for index, (conv, shape) in enumerate(layers):
        padding = conv.padding if not isinstance(conv.padding, str) else (0, 0)
        key = (shape, conv.weight.shape, conv.stride, padding, index > 0)
        if key not in timed:
            timed[key] = _convolution(*key, dtype)
        for part, value in zip(seconds, timed[key]):
            seconds[part] += value
    return seconds


def _convolution(
    shape: torch.Size, weight_shape: torch.Size, stride: tuple, padding: tuple, need_dx: bool, dtype: torch.dtype
) -> tuple[float, float]:
    x, w = (torch.randn(s, dtype=dtype).to(memory_format=torch.channels_last) for s in (shape, weight_shape))
    forward = partial(torch.nn.functional.conv2d, x, w, None, stride, padding)
    dy = torch.randn_like(forward())
    geometry = list(stride), list(padding), [1, 1], False, [0, 0], 1
    backward = partial(torch.ops.aten.convolution_backward, dy, x, w, None, *geometry, [need_dx, True, False])
    found = interleaved({"forward": forward, "backward": backward}, CPU, warmup=2, rounds=5)
    return found["forward"].median, found["backward"].median


def _label(peer: str, precision: str, kept: bool) -> str:
    return f"{peer}, {precision}, {'kept' if kept else 'default'} memory"


def summary(one: dict[str, Any]) -> dict[str, Any]:
    """Ours against the best peer: rates, ratios and the fraction of the convolutions' own speed."""
    batch, found = WORKLOADS[one["workload"]].batch, {}
    convolutions = {p: s["forward"] + s["backward"] for p, s in one["convolutions"].items()}
    limits = {
        "training": min(convolutions.values()),
        "inference": min(s["forward"] for s in one["convolutions"].values()),
    }
    for kind, ours in (("training", OURS), ("inference", ("folded",))):
        rates = {label: batch / time["median"] for label, time in one[kind].items() if "median" in time}
        mine = {label: rate for label, rate in rates.items() if label.startswith(ours)}
        default = {label: rate for label, rate in rates.items() if label.endswith("default memory")}
        kept = {label: rate for label, rate in rates.items() if label not in mine and label not in default}
        best = max(mine, key=mine.get)
        peers = {"peer": max(default, key=default.get), "peer with kept memory": max(kept, key=kept.get)}
        found[kind] = {
            "best": best,
            "images_per_second": mine[best],
            **{name: {"name": label, "ratio": mine[best] / rates[label]} for name, label in peers.items()},
            "of_the_convolutions": mine[best] / (batch / limits[kind]),
        }
    peak = one["peak_mib"]
    lowest = min(value for label, value in peak.items() if not label.startswith(OURS))
    found["peak_memory_ratio"] = {label: peak[label] / lowest for label in peak if label.startswith(OURS)}
    return found


COLUMNS = ("", "images/s", "of the best peer", "of it with kept memory", "of the convolutions alone")


def table(found: list[dict[str, Any]]) -> str:
    """Two rows a workload, and its memory."""
    rows = []
    for one in found:
        facts = summary(one)
        for kind in ("training", "inference"):
            f = facts[kind]
            ratios = [f"{f[p]['ratio']:.2f} ({f[p]['name'].rpartition(', ')[0]})" for p in ("peer", "peer with kept memory")]
            name = f"{one['workload']}, {kind}: {f['best'].rpartition(', ')[0]}"
            rows.append([name, f"{f['images_per_second']:.1f}", *ratios, f"{f['of_the_convolutions']:.2f}"])
    least = [min(v for k, v in one["peak_mib"].items() if not k.startswith(OURS)) for one in found]
    memory = [
        [f"{one['workload']}: {label}", f"{value:.0f}", f"{value / peers:.2f}"]
        for one, peers in zip(found, least)
        for label, value in one["peak_mib"].items()
    ]
    return f"{markdown(COLUMNS, rows)}\n\n{markdown(('', 'MiB that a step adds', 'of the best peer'), memory)}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["resnet50", "notebook"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, write the results."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    load, found = os.getloadavg()[0], []
    for name in args.workloads:
        found.append(measure(name, args))
        found[-1]["summary"] = summary(found[-1])
        write_results(args.out, {"settings": settings, "load_average": load, "workloads": found})
    print(table(found))


if __name__ == "__main__":
    main()
