"""Training and inference on a CPU against every baseline at its best, and against the convolutions alone: ``python -m
bench.cpu``.

Peers are eager PyTorch in both layouts and torch.compile (but for the deepest networks), in fp32 and bf16, each with
the C library's allocator as it comes and with `fastres.train.machine.keep_freed_memory`; for the least memory also
with `return_freed_memory`. Ours have their memory as `fastres train` does (`fastres.ops.cpu.pages`). Each runs in a
process of its own, as the state of the allocator is part of what is measured; the processes take turns. There are two
limits: the time of PyTorch's own convolutions on the network's shapes, and that of their arithmetic at the rate of a
large matrix product. What decides the rates are the processor's instructions for bf16, so there is a result file for
each kind of them. Training is measured at a workload's batch, inference at several: one image costs other than many.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.depth import in_own_process
from bench.layer_calls import bare_backward
from bench.record import RESULTS, circumstances, write_results
from bench.tables import markdown
from fastres.measure import Timing, Workload, all_of, interleaved
from fastres.measure.step import Step, peak_memory
from fastres.nn.fold import fold
from fastres.train import machine

WORKLOADS = {
    "resnet50": Workload("resnet50", 64, 32, {"stem": "cifar"}),
    "notebook": Workload("notebook", 64, 96),
    "resnet18": Workload("resnet18", 64, 32, {"stem": "cifar"}),
    "resnet50-224": Workload("resnet50", 8, 224),
    "resnet20": Workload("resnet20", 128, 32),
    "resnet50-batch16": Workload("resnet50", 16, 32, {"stem": "cifar"}),
    "resnet50-batch1": Workload("resnet50", 1, 32, {"stem": "cifar"}),
    "resnet110": Workload("resnet110", 32, 32),
    "resnet110-batch8": Workload("resnet110", 8, 32),
    "preact1001-batch2": Workload("preact_resnet1001", 2, 32),
}
# torch.compile unrolls a network: these take it a quarter of an hour and more.
TOO_DEEP_TO_COMPILE = {"resnet110", "resnet110-batch8", "preact1001-batch2"}
# Instructions for bf16, the fastest first: the flag in /proc/cpuinfo, the name.
INSTRUCTIONS = {
    "amx_bf16": "AMX-BF16",
    "avx512_bf16": "AVX512-BF16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "bf16": "ARM BF16",
}
TRAINING_BASELINES = ("eager NCHW", "eager", "compile")
OURS = ("fused", "fused recompute")
CPU = torch.device("cpu")
ALLOCATORS: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "kept": machine.keep_freed_memory,
    "returned": machine.return_freed_memory,
    "paged": lambda: machine.treat_freed_memory(CPU, False),
}
OUR_ALLOCATORS = ("paged",)
INFERENCE_BASELINES = ("eager NCHW", "eager", "compile", "compile frozen")
PRODUCT = 3072  # rows and columns
TURN = 0.2  # seconds at least: a shorter turn is of cold caches and of threads that wake up, not of the network


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The fastest instructions for bf16 that this CPU has."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), platform.machine())


def results_of(kind: str, results: Path = RESULTS) -> Path:
    """The result file of a kind of `instructions`."""
    return results / f"cpu-{kind.lower().replace(' ', '-')}.json"


def measure(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything about one workload, part after part; seconds are medians of a call.

    A part keeps its commit, and the products' rate of its own time, which differs by how quiet the machine is.
    """
    workload, threads = WORKLOADS[name], args.threads
    products = {precision: in_own_process(_products, precision, threads) for precision in args.precisions}
    now = {"commit": circumstances()["commit"], "products": products}
    if "training" in args.kinds:
        print(f"{name}: training", flush=True)
        training = _in_turn("training", workload, _runs(name, TRAINING_BASELINES, OURS, args), args.rounds, threads)
        peak_mib = {}
        for precision in args.precisions:
            for variant in (*TRAINING_BASELINES[:2], *OURS):
                for allocator in OUR_ALLOCATORS if variant in OURS else ("default", "kept", "returned"):
                    memory = in_own_process(_memory, workload, variant, precision, allocator, threads)
                    peak_mib[_label(variant, precision, allocator)] = memory["peak_mib"] - memory["idle_mib"]
        yield {
            "workload": name,
            **now,
            "training": training,
            "peak_mib": peak_mib,
            "convolutions": {p: in_own_process(_convolutions, workload, p, threads) for p in args.precisions},
        }
    for batch in args.batches if "inference" in args.kinds else ():
        print(f"{name}: inference, batch {batch}", flush=True)
        runs, one = _runs(name, INFERENCE_BASELINES, ("folded",), args), replace(workload, batch=batch)
        times = _in_turn("inference", one, runs, args.rounds, threads)
        limits = {p: in_own_process(_convolutions, one, p, threads, False) for p in args.precisions}
        yield {"workload": name, "inference": {str(batch): {**now, "times": times, "convolutions": limits}}}


def _runs(
    name: str, baselines: tuple[str, ...], ours: tuple[str, ...], args: argparse.Namespace
) -> list[tuple[str, str, str]]:
    """Variants with their precisions and allocators."""
    return [
        (variant, precision, allocator)
        for precision in args.precisions
        for variant in (*baselines, *ours)
        if "compile" not in variant or name not in TOO_DEEP_TO_COMPILE
        for allocator in (OUR_ALLOCATORS if variant in (*OURS, "folded") else ("default", "kept"))
    ]


def joined(before: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A workload's results with a part that was measured now; of inference other batches are kept."""
    inference = {**by_batch(before), **part.get("inference", {})}
    return {**before, **part, **({"inference": inference} if inference else {})}


def by_batch(one: dict[str, Any]) -> dict[str, Any]:
    """A workload's times and limits of inference by batch.

    Results of before have one batch, the workload's, or one commit and one products' rate for all of a workload.
    """
    inference = one.get("inference", {})
    if not all(batch.isdigit() for batch in inference):
        inference = {str(WORKLOADS[one["workload"]].batch): {"times": inference, "convolutions": one["convolutions"]}}
    shared = {key: one[key] for key in ("commit", "products") if key in one}
    return {batch: {**shared, **inference[batch]} for batch in sorted(inference, key=int)}


def _in_turn(
    kind: str, workload: Workload, runs: list[tuple[str, str, str]], rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Times of each run's calls, a process a run, one of them computing at a time."""
    context, workers = multiprocessing.get_context("spawn"), {}
    repeats: dict[str, int] = {}

    def turn(label: str, pipe: Connection) -> None:
        repeats[label] = _turn(pipe)

    try:
        for run in runs:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, kind, workload, *run, threads), daemon=True)
            process.start()
            theirs.close()
            workers[run] = process, ours
            with contextlib.suppress(RuntimeError):  # one at a time warms up; an error comes again below
                turn(_label(*run), ours)
        calls = {_label(*run): partial(turn, _label(*run), pipe) for run, (_, pipe) in workers.items()}
        found = interleaved(calls, CPU, warmup=1, rounds=rounds)
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.join()
    return {
        label: timing.of_each(repeats[label])._asdict()
        if isinstance(timing, Timing)
        else {"error": f"{type(timing).__name__}: {timing}"[:200]}
        for label, timing in found.items()
    }


def _turn(pipe: Connection) -> int:
    """Have the process at the other end make its calls, and wait for them; how many there are."""
    pipe.send(True)
    answer = pipe.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _work(
    pipe: Connection, kind: str, workload: Workload, variant: str, precision: str, allocator: str, threads: int
) -> None:
    """Make calls for `TURN` seconds for each message, behind a warm-up for the first one, until the pipe is closed;
    answer with how many, or with what they raised.
    """
    _prepare(allocator, threads)
    dtype, call, repeats = machine.DTYPES[precision], None, 1
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            if call is None:
                call = (
                    Step(workload, variant, CPU, dtype) if kind == "training" else Inference(workload, variant, dtype)
                )
                call()
                repeats = _repeats(call)
            for _ in range(repeats):
                call()
            pipe.send(repeats)
        except Exception as error:  # whatever one of them raises, the others are measured
            pipe.send(f"{type(error).__name__}: {error}")


def _repeats(call: Callable[[], Any]) -> int:
    """How many calls take `TURN` seconds."""
    call()
    began = time.perf_counter()
    call()
    return max(1, math.ceil(TURN / (time.perf_counter() - began)))


def _prepare(allocator: str, threads: int) -> None:
    torch.set_num_threads(threads)
    ALLOCATORS[allocator]()


class Inference:
    """A forward pass in evaluation mode, without gradients.

    Args:
        variant: one of `INFERENCE_BASELINES`, ``"compile frozen"`` being torch.compile with weights folded as
            constants, or ``"folded"``.
        dtype: the baselines run under autocast to it; folded and frozen networks are converted to it once.
    """

    def __init__(self, workload: Workload, variant: str, dtype: torch.dtype):
        channels_last = variant != "eager NCHW"
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model: nn.Module = workload.build().eval()
        if variant == "folded":
            model = fold(model)
        self.images, _ = workload.inputs(CPU, channels_last)
        self.frozen, self.autocast = variant == "compile frozen", dtype
        if variant in ("compile frozen", "folded"):
            model, self.images, self.autocast = model.to(dtype), self.images.to(dtype), torch.float32
        model = model.to(memory_format=layout)  # type: ignore[call-overload]
        self.model = torch.compile(model, dynamic=False) if "compile" in variant else model

    def __call__(self) -> Tensor:
        """The logits."""
        import torch._inductor.config as inductor

        with torch.no_grad(), machine.autocast(CPU, self.autocast):
            if not self.frozen:
                return self.model(self.images)
            with inductor.patch(freezing=True):
                return self.model(self.images)


def _memory(workload: Workload, variant: str, precision: str, allocator: str, threads: int) -> dict[str, float]:
    _prepare(allocator, threads)
    return peak_memory(workload, variant, CPU, machine.DTYPES[precision])


def _products(precision: str, threads: int) -> float:
    """FLOP/s of a product of square matrices that no cache keeps."""
    _prepare("kept", threads)
    a, b = torch.randn(2, PRODUCT, PRODUCT, dtype=machine.DTYPES[precision])
    found = all_of(interleaved({"product": partial(torch.mm, a, b)}, CPU, warmup=2, rounds=5))
    return 2 * PRODUCT**3 / found["product"].median


def convolutions_of(workload: Workload) -> list[tuple[nn.Conv2d, torch.Size, tuple[int, int], int]]:
    """Every convolution of a forward pass in order: itself, its input's shape, its padding in numbers, its output's
    pixels.
    """
    found: list[tuple[nn.Conv2d, torch.Size, tuple[int, int], int]] = []

    def note(conv: nn.Conv2d, inputs: tuple[Tensor], y: Tensor) -> None:
        padding = (0, 0) if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1])
        found.append((conv, inputs[0].shape, padding, y.shape[2] * y.shape[3]))

    model = workload.build().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(workload.inputs(CPU)[0])
    return found


def _convolutions(workload: Workload, precision: str, threads: int, backward: bool = True) -> dict[str, float]:
    """All convolutions of a step, forward, and the gradients that are needed unless ``backward`` is False: seconds by
    PyTorch's own in channels-last, and FLOPs, products with padding included.
    """
    _prepare("kept", threads)
    dtype = machine.DTYPES[precision]
    seconds, timed, flops = {"forward": 0.0, "backward": 0.0}, {}, {"forward": 0.0, "backward": 0.0}
    for index, (conv, shape, padding, pixels) in enumerate(convolutions_of(workload)):
        key = (shape, conv.weight.shape, conv.stride, padding, index > 0)
        if key not in timed:
            timed[key] = _convolution(*key, dtype, backward)
        for part, value in zip(seconds, timed[key]):
            seconds[part] += value
        forward = 2.0 * conv.weight.numel() * shape[0] * pixels
        flops["forward"] += forward
        flops["backward"] += forward * (2 if index > 0 else 1) * backward
    return {**seconds, **{f"{part}_flops": value for part, value in flops.items()}}


def _convolution(
    shape: torch.Size,
    weight_shape: torch.Size,
    stride: tuple,
    padding: tuple,
    need_dx: bool,
    dtype: torch.dtype,
    with_backward: bool,
) -> tuple[float, float]:
    x, w = (torch.randn(s, dtype=dtype).to(memory_format=torch.channels_last) for s in (shape, weight_shape))
    forward = partial(torch.nn.functional.conv2d, x, w, None, stride, padding)
    if not with_backward:
        return all_of(interleaved({"forward": forward}, CPU, warmup=2, rounds=5))["forward"].median, 0.0
    dy = torch.randn_like(forward())
    backward = partial(bare_backward, dy, x, w, stride, padding, need_dx)
    found = all_of(interleaved({"forward": forward, "backward": backward}, CPU, warmup=2, rounds=5))
    return found["forward"].median, found["backward"].median


def _label(variant: str, precision: str, allocator: str) -> str:
    return f"{variant}, {precision}, {allocator} memory"


def summary(one: dict[str, Any]) -> dict[str, Any]:
    """Ours against the best baseline: rates, ratios and the fraction of the convolutions' own speed; of inference for
    each batch.
    """
    found: dict[str, Any] = {}
    if "training" in one:
        batch, both = WORKLOADS[one["workload"]].batch, ("forward", "backward")
        found["training"] = _facts(batch, one["training"], OURS, one, both)
    if measured := by_batch(one):
        found["inference"] = {
            batch: _facts(int(batch), m["times"], ("folded",), m, ("forward",)) for batch, m in measured.items()
        }
    ratios = _memory_ratios(one.get("peak_mib", {}))
    found["peak_memory_ratio"] = {label: ratio for label, ratio in ratios.items() if label.startswith(OURS)}
    return found


def _facts(
    batch: int,
    times: dict[str, dict[str, Any]],
    ours: tuple[str, ...],
    limits: dict[str, Any],
    parts: tuple[str, ...],
) -> dict[str, Any]:
    """`summary` of one kind of call; ``limits`` has its convolutions' times and the products' rate."""
    convolutions, products = limits["convolutions"], limits.get("products", {})  # which results of before have not
    rates = {label: batch / time["median"] for label, time in times.items() if "median" in time}
    mine = {label: rate for label, rate in rates.items() if label.startswith(ours)}
    default = {label: rate for label, rate in rates.items() if label.endswith("default memory")}
    kept = {label: rate for label, rate in rates.items() if label.endswith("kept memory") and label not in mine}
    best, *others = (max(one, key=one.__getitem__) for one in (mine, default, kept))
    limit = min(sum(seconds[part] for part in parts) for seconds in convolutions.values())
    facts = {
        "best": best,
        "images_per_second": mine[best],
        **{
            name: {"name": label, "ratio": mine[best] / rates[label]}
            for name, label in zip(("baseline", "baseline with kept memory"), others, strict=True)
        },
        "of_the_convolutions": mine[best] / (batch / limit),
    }
    flops = {p: sum(seconds[f"{part}_flops"] for part in parts) for p, seconds in convolutions.items() if p in products}
    if flops:
        facts["of_the_products"] = mine[best] / (batch / min(flops[p] / products[p] for p in flops))
    return facts


def _memory_ratios(peak: dict[str, float]) -> dict[str, float]:
    """Each peak in units of the baselines' lowest."""
    lowest = min((value for label, value in peak.items() if not label.startswith(OURS)), default=1.0)
    return {label: value / lowest for label, value in peak.items()}


COLUMNS = (
    "",
    "images/s",
    "of the best baseline",
    "of it with kept memory",
    "of the convolutions alone",
    "of their arithmetic as products",
)


def few_speeds(found: list[dict[str, Any]]) -> str:
    """`speeds`, of inference the largest batch alone."""
    return speeds(found, all_batches=False)


def speeds(found: list[dict[str, Any]], all_batches: bool = True) -> str:
    """A row for a workload's training and one for each batch of its inference: ours against the best baselines and the
    limits.
    """
    rows = []
    for one in found:
        facts = summary(one)
        kinds = {"training": facts["training"]} if "training" in facts else {}
        inference = facts.get("inference", {})
        shown = list(inference) if all_batches else list(inference)[-1:]
        kinds |= {f"inference, batch {batch}": inference[batch] for batch in shown}
        for kind, f in kinds.items():
            ratios = [
                f"{f[p]['ratio']:.2f} ({f[p]['name'].rpartition(', ')[0]})"
                for p in ("baseline", "baseline with kept memory")
            ]
            name = f"{one['workload']}, {kind}: {f['best'].rpartition(', ')[0]}"
            limits = [f"{f[limit]:.2f}" if limit in f else "" for limit in ("of_the_convolutions", "of_the_products")]
            rows.append([name, f"{f['images_per_second']:.1f}", *ratios, *limits])
    return markdown(COLUMNS, rows)


def table(found: list[dict[str, Any]]) -> str:
    """`speeds`, the rate of a large product, and each workload's memory."""
    memory = [
        [f"{one['workload']}: {label}", f"{one['peak_mib'][label]:.0f}", f"{ratio:.2f}", _rate(one, label)]
        for one in found
        for label, ratio in _memory_ratios(one.get("peak_mib", {})).items()
    ]
    columns = ("", "MiB that a training step adds", "of the best baseline", "images/s")
    tables = [speeds(found), *([markdown(columns, memory)] if memory else [])]
    return "\n\n".join([*_rates(found), *tables])


def _rates(found: list[dict[str, Any]]) -> list[str]:
    """In a sentence how fast a large product is, in each precision, the median over what was measured."""
    rates: dict[str, list[float]] = {}
    for one in found:
        for part in (one, *by_batch(one).values()):
            for precision, rate in part.get("products", {}).items():
                rates.setdefault(precision, []).append(rate)
    texts = [f"{statistics.median(rate) / 1e12:.2f} TFLOP/s in {precision}" for precision, rate in rates.items()]
    return [f"One large matrix product runs at {' and '.join(texts)}."] if texts else []


def _rate(one: dict[str, Any], label: str) -> str:
    """Images/s of training, where it was measured."""
    seconds = one["training"].get(label, {})
    return f"{WORKLOADS[one['workload']].batch / seconds['median']:.1f}" if "median" in seconds else ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS)[:4])
    parser.add_argument("--kinds", nargs="+", choices=["training", "inference"], default=["training", "inference"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64], help="images of an inference call")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--add", action="store_true", help="keep what else the result file has")
    parser.add_argument("--out", type=Path, default=results_of(instructions()), help="result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, write the results."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "add")}
    before = json.loads(args.out.read_text()) if args.add and args.out.exists() else {"workloads": []}
    found = {one["workload"]: one for one in before["workloads"]}
    load = max(os.getloadavg()[0], before.get("load_average", 0.0))
    for name in args.workloads:
        found.setdefault(name, {})
        for part in measure(name, args):
            one = found[name] = joined(found[name], part)
            one["summary"] = summary(one)
            facts = {"instructions": instructions(), "settings": settings, "load_average": load}
            write_results(args.out, {**facts, "workloads": list(found.values())})
    print(f"{instructions()}\n\n{table(list(found.values()))}")


if __name__ == "__main__":
    main()
