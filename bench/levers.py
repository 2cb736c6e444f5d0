"""What each lever of the CPU's implementation is worth: ``python -m bench.levers``.

A fused training step with all of them, and again with one taken away, in turn in one process, as the difference of two
steps is what is asked for; eager PyTorch's step beside them. Then the network's convolutions, forward, in each layout
that PyTorch has for them and with weights that are packed beforehand or at every call.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cpu import CPU, WORKLOADS, convolutions_of
from bench.record import RESULTS, write_results
from bench.tables import markdown
from fastres import ops
from fastres.measure import Workload, all_of, interleaved
from fastres.measure.step import Step
from fastres.nn import blocks
from fastres.ops import cpu
from fastres.ops.backends.cpp import Cpp
from fastres.ops.backends.protocol import Backend
from fastres.ops.cpu import convolutions, onednn, tiles
from fastres.train import machine


def levers() -> dict[str, Callable[[], Any]]:
    """Contexts that each take one lever away, by what is left then."""
    return {
        "all": contextlib.nullcontext,
        "ATen's passes": partial(ops.implementation, "aten"),
        "PyTorch's convolutions of whole batches": _whole_batches,
        "PyTorch's convolutions": partial(mock.patch.object, tiles, "form", lambda: None),
        "PyTorch's weight gradients": _pytorchs_weight_gradients,
        "walks, no programs": _walks,
        "blocks one by one": partial(mock.patch.object, blocks, "LONGEST", 1),
        "no gradient in another's memory": _apart,
    }


@contextlib.contextmanager
def _whole_batches() -> Iterator[None]:
    with mock.patch.object(tiles, "form", lambda: None), mock.patch.object(convolutions, "PART_BYTES", 2**60):
        yield


def _walks() -> contextlib.AbstractContextManager:
    """No walk is repeated as a program, which would do what it was recorded with."""
    return mock.patch.object(Cpp, "repeated", Backend.repeated)


@contextlib.contextmanager
def _pytorchs_weight_gradients() -> Iterator[None]:
    with _walks(), mock.patch.object(tiles, "takes_weight_grad", lambda *_: False):
        yield


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Every gradient in memory of its own."""
    backward, end = Cpp.conv_backward, Cpp.bn_add_relu_backward

    def conv_backward(self: Cpp, gradient: Any, activation: Any, conv: Any, joined: Any = None, *others: Any) -> Any:
        joined = None if joined is None else joined._replace(tensor=joined.tensor.clone())
        return backward(self, gradient, activation, conv, joined, *others)

    def bn_add_relu_backward(self: Cpp, *arguments: Any) -> Any:
        return end(self, *arguments[:4])

    with (
        _walks(),
        mock.patch.object(Cpp, "conv_backward", conv_backward),
        mock.patch.object(Cpp, "bn_add_relu_backward", bn_add_relu_backward),
    ):
        yield


def steps(workload: Workload, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The training steps that are compared."""
    fused = Step(workload, "fused", CPU, dtype)

    def without(context: Callable[[], Any]) -> Tensor:
        with context():
            return fused._run()  # not called, as that chooses an implementation itself

    calls: dict[str, Callable[[], Tensor]] = {name: partial(without, context) for name, context in levers().items()}
    return {**calls, "eager": Step(workload, "eager", CPU, dtype)}


def convolution_calls(workload: Workload, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """All convolutions of a forward pass, one after the other, by layout of the activations and of the weights."""
    calls: dict[str, list[Callable[[], Any]]] = {}
    for conv, shape, padding, _ in convolutions_of(workload):
        plain = torch.randn(shape, dtype=dtype), conv.weight.detach().to(dtype)
        last = tuple(t.to(memory_format=torch.channels_last) for t in plain)
        stride, pad = conv.stride[0], list(padding)
        geometry = [stride] * 2, pad
        for layout, (x, w) in (("NCHW", plain), ("NHWC", last)):
            calls.setdefault(layout, []).append(partial(F.conv2d, x, w, None, *geometry))
        blocked = plain[0].to_mkldnn(), cpu.packed_weight(plain[1], plain[0], stride, pad)
        calls.setdefault("blocked, weights packed", []).append(partial(F.conv2d, *blocked, None, *geometry))
        packed = cpu.packed_weight(last[1], last[0], stride, pad)
        pointwise = onednn.mkldnn._convolution_pointwise
        calls.setdefault("NHWC, weights packed", []).append(
            partial(pointwise, last[0], packed, None, pad, [stride] * 2, [1, 1], 1, "none", [], "")
        )
    return {name: partial(_run_all, found) for name, found in calls.items()}


def _run_all(calls: list[Callable[[], Any]]) -> None:
    with torch.no_grad():
        for call in calls:
            call()


def table(found: list[dict[str, Any]]) -> str:
    """Steps and convolutions of each workload in milliseconds, and how many times as long as with all levers or in
    NHWC.
    """
    lines = []
    for one in found:
        for kind, first in (("steps", "all"), ("convolutions", "NHWC")):
            for name, time in one[kind].items():
                factor = time["median"] / one[kind][first]["median"]
                what = f"step, {name}" if kind == "steps" else f"convolutions forward, {name}"
                lines.append([f"{one['workload']}: {what}", f"{1e3 * time['median']:.1f}", f"{factor:.2f}"])
    return markdown(["", "ms", "times as long"], lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.levers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["resnet50", "notebook"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "levers-cpu.json", help="result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the results."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    machine.keep_freed_memory()
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    dtype, load, found = machine.DTYPES[args.precision], os.getloadavg()[0], []
    for name in args.workloads:
        workload = WORKLOADS[name]
        kinds: dict[str, dict[str, Callable[[], Any]]] = {
            "steps": steps(workload, dtype),
            "convolutions": convolution_calls(workload, dtype),
        }
        times = {
            kind: {n: t._asdict() for n, t in all_of(interleaved(calls, CPU, warmup=1, rounds=args.rounds)).items()}
            for kind, calls in kinds.items()
        }
        found.append({"workload": name, **times})
        write_results(args.out, {"settings": settings, "load_average": load, "workloads": found})
    print(table(found))


if __name__ == "__main__":
    main()
