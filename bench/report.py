"""Results as Markdown tables and pictures: ``python -m bench.report [FOLDER ...]``, or ``--readme``.

Reads campaign folders (see `bench.campaign`) and the single results beside them. Every table says the device that it
was measured on, or that its figures are counted or predicted. ``--readme`` fills in the sections of README.md between
``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``; a section with no result to show stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import cpu, growth, roofline
from bench.record import RESULTS, ROOT
from bench.tables import markdown
from fastres.atomic import atomic_write

Record = dict[str, Any]


def machine_line(record: Record) -> str:
    """Where and with what a record was measured."""
    where = record["device"]
    if where == "cpu":
        where = f"CPU ({record['cpu']}, {record['threads']} threads)"
    versions = record["versions"]
    return f"{where}, PyTorch {versions['torch']}, {record['date'][:10]}, commit {record['commit']}"


def busy(load: float | None, threads: int) -> str:
    """A warning where other processes took the cores that were measured on."""
    if load is None or load <= threads:
        return ""
    return (
        f" Other processes kept the machine busy (load average {load:.0f} for {threads} threads): rates "
        "are too low, and differences within the quartiles mean nothing."
    )


def number(value: float) -> str:
    """Four significant digits, without an exponent where they are before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def picture(path: Path, text: str) -> str:
    """A Markdown picture for README.md; empty where there is none."""
    if not path.exists():
        return ""
    shown = path.resolve()
    return f"\n\n![{text}]({shown.relative_to(ROOT) if ROOT in shown.parents else shown})"


def measured_cases(record: Record) -> dict[str, Record]:
    """The cases that have figures."""
    return {name: case for name, case in record["cases"].items() if "error" not in case}


def ceilings(folder: Path) -> dict[str, float]:
    """GB/s of a copy and TFLOP/s of a matrix product by dtype, as measured; what there is of it."""
    record = read(folder / "environment.json")
    cases = measured_cases(record) if record else {}
    found = {name.removeprefix("matmul "): case["tflops"] for name, case in cases.items() if "tflops" in case}
    return found | ({"copy": cases["copy"]["gb_per_second"]} if "copy" in cases else {})


def environment(folder: Path) -> str | None:
    """Measured ceilings."""
    record = read(folder / "environment.json")
    found = ceilings(folder)
    if not found:
        return None
    rows = [["large copy, bytes read and written", f"{found['copy']:.4g} GB/s"]] if "copy" in found else []
    rows += [
        [f"large matrix product, {name}", f"{rate:.3g} TFLOP/s"]
        for name, rate in found.items()
        if name != "copy"
    ]
    load = measured_cases(record).get("machine", {}).get("load_average")
    where = f"Measured ceilings: {machine_line(record)}.{busy(load, record['threads'])}"
    return f"{where}\n\n{markdown(('ceiling', 'measured'), rows)}"


def models(folder: Path, counted: dict[str, dict[str, float]] | None = None) -> str | None:
    """A table a network: peers, their times and rates.

    Args:
        counted: bytes an image of whole steps by network and peer, see `bytes_an_image`.
    """
    record = read(folder / "models.json")
    if not record:
        return None
    limits, parts = ceilings(folder), []
    for case in measured_cases(record).values():
        columns = [
            "peer",
            "ms a step",
            "quartiles",
            "images/s",
            "TFLOP/s",
            "of the measured ceiling",
            "GB/s",
            "speed",
        ]
        key = f"{case['model']} {case['image_size']}"
        known = (counted or {}).get(key, {}) if record["device"] != "cpu" else {}  # a CPU runs other kernels
        if not known:
            columns.remove("GB/s")
        rows, base = [], case["peers"].get("eager", {}).get("seconds", {}).get("median")
        for peer, figures in case["peers"].items():
            if "error" in figures:
                rows.append(
                    [
                        peer,
                        figures["error"][:60].replace("|", "/").replace("\n", " "),
                        *[""] * (len(columns) - 2),
                    ]
                )
                continue
            seconds = figures["seconds"]
            limit = limits.get(case["dtype"])
            row = [
                peer,
                number(1e3 * seconds["median"]),
                f"{number(1e3 * seconds['low'])} to {number(1e3 * seconds['high'])}",
                number(figures["images_per_second"]),
                f"{figures['tflops']:.3g}",
                f"{figures['tflops'] / limit:.0%}" if limit else "",
            ]
            if known:
                row.append(
                    f"{known[peer] * case['batch'] / seconds['median'] / 1e9:.4g}" if peer in known else ""
                )
            rows.append([*row, f"{base / seconds['median']:.2f}x" if base else ""])
        title = f"{case['model']}, batch {case['batch']}, {case['image_size']}x{case['image_size']}, {case['dtype']}"
        note = (
            "" if not known else " GB/s: bytes counted for the step (a static count) over the measured time."
        )
        parts.append(f"**{title}**, one training step.{note}\n\n{markdown(columns, rows)}")
    if not parts:
        return None
    pictures = picture(folder / "models.png", "Speeds of the peers") + picture(
        folder / "batches.png", "images/s by batch"
    )
    environment = read(folder / "environment.json")
    load = measured_cases(environment).get("machine", {}).get("load_average") if environment else None
    where = f"Measured on {machine_line(record)}.{busy(load, record['threads'])}"
    return f"{where}\n\n" + "\n\n".join(parts) + pictures


def memory(folder: Path) -> str | None:
    """Peak memory by network and peer."""
    record = read(folder / "memory.json")
    if not record or not measured_cases(record):
        return None
    networks: dict[str, dict[str, Record]] = {}
    for case in measured_cases(record).values():
        networks.setdefault(f"{case['workload']}, batch {case['batch']}", {})[case["peer"]] = case
    peers = list(dict.fromkeys(peer for found in networks.values() for peer in found))
    rows = []
    for name, found in networks.items():
        rows.append(
            [
                name,
                *(f"{found[p]['peak_mib'] - found[p]['idle_mib']:.0f}" if p in found else "" for p in peers),
            ]
        )
    return (
        f"Memory that a training step adds, MiB, measured on {machine_line(record)}.\n\n"
        f"{markdown(['network', *peers], rows)}"
    )


def parts(folder: Path) -> str | None:
    """Stages and blocks by peer, then operations by implementation."""
    record = read(folder / "parts.json")
    if not record:
        return None
    cases = measured_cases(record)
    blocks = [case for case in cases.values() if "peers" in case]
    text: list[str] = []
    if blocks:
        peers = list(dict.fromkeys(peer for case in blocks for peer in case["peers"]))
        rows = [
            [
                f"{case['network']} {case['part']}, {case['blocks']} blocks, batch {case['batch']}",
                *(_ms(case["peers"].get(p)) for p in peers),
            ]
            for case in blocks
        ]
        text.append(
            f"Forward and backward of a stage or its first block, ms.\n\n{markdown(['part', *peers], rows)}"
        )
    calls = {name: case for name, case in cases.items() if "calls" in case}
    for name, case in calls.items():
        which = list(dict.fromkeys(c for call in case["calls"].values() for c in call["candidates"]))
        rows = [
            [op, f"{call['bytes'] / 1e6:.3g}", *(_rate(call["candidates"].get(c)) for c in which)]
            for op, call in case["calls"].items()
        ]
        columns = ["operation", "MB, each tensor once", *(f"{c}: ms, GB/s" for c in which)]
        text.append(f"{name}, batch {case['batch']}.\n\n{markdown(columns, rows)}")
    if not text:
        return None
    roof = picture(folder / "roofline.png", "Operations under the measured roof")
    return f"Measured on {machine_line(record)}.\n\n" + "\n\n".join(text) + roof


def step(folder: Path) -> str | None:
    """Launches, the sum of the kernels' times beside the step's, and the first kernels."""
    record = read(folder / "step.json")
    if not record or not measured_cases(record):
        return None
    cases = measured_cases(record).values()
    what = "operations" if record["device"] == "cpu" else "kernels"
    rows = [
        [
            f"{case['workload']}, batch {case['batch']}",
            case["peer"],
            str(case["kernels"]["launches"]),
            f"{1e3 * case['step']['median']:.4g}",
            f"{1e3 * case['kernels']['seconds']:.4g}",
            f"{1e3 * case['host_seconds']:.4g}",
            ", ".join(
                f"{top['name'][:40].replace('|', '/')} {1e3 * top['seconds']:.3g}"
                for top in case["kernels"]["top"][:3]
            ),
        ]
        for case in cases
    ]
    columns = (
        "network",
        "peer",
        f"{what} a step",
        "ms a step",
        f"ms of all {what}",
        "ms of the host",
        "first three, ms",
    )
    return f"Profiler's trace of a step on {machine_line(record)}.\n\n{markdown(columns, rows)}"


def tests(folder: Path) -> str | None:
    """Counts of the test suite."""
    record = read(folder / "tests.json")
    if not record or not measured_cases(record):
        return None
    cases = measured_cases(record)
    rows = [
        [name, str(case["passed"]), str(case["failures"] + case["errors"]), str(case["skipped"])]
        for name, case in cases.items()
    ]
    return f"Tests on {machine_line(record)}.\n\n{markdown(('tests', 'passed', 'failed', 'skipped'), rows)}"


def accuracy(folder: Path) -> str | None:
    """Accuracy and seconds at the end of each run of the preset ``fast``."""
    record = read(folder / "accuracy.json")
    if not record or not measured_cases(record):
        return None
    rows = []
    for case in measured_cases(record).values():
        last, best = case["epochs"][-1], max(case["epochs"], key=lambda row: row["val_accuracy"])
        rows.append(
            [
                case["backend"],
                str(case["seed"]),
                case["data"],
                str(last["epoch"]),
                f"{best['val_accuracy']:.2%}",
            ]
            + [f"{last['seconds']:.1f}", f"{last['images_per_second']:.0f}"]
        )
    columns = ("backend", "seed", "data", "epochs", "best accuracy", "seconds", "images/s")
    return f"`fastres train --preset fast` on {machine_line(record)}.\n\n{markdown(columns, rows)}"


def predictions(path: Path) -> str | None:
    """The roofline's table."""
    record = read(path)
    if not record:
        return None
    assumed = "; ".join(
        f"{name} {one['bandwidth'] / 1e12:.2f} TB/s and {one['rate'] / 1e12:.0f} TFLOP/s"
        for name, one in record["machines"].items()
    )
    name, machine = next(iter(record["machines"].items()))
    bandwidth, rate = roofline.DATA_SHEETS[name]
    shares = f"{machine['bandwidth'] / bandwidth:.0%} and {machine['rate'] / rate:.0%} of the data sheets', assumed"
    return (
        f"**Predictions, not measurements**: no GPU was used. Batch {record['batch']}, {record['dtype']}; counted "
        f"bytes and operations of every launch under a roof of {assumed} ({shares}), "
        f"{1e6 * machine['launch']:.0f} us a launch.\n\n"
        f"{markdown(roofline.COLUMNS, roofline.rows(record['predictions']))}"
        + picture(path.with_suffix(".png"), "Roofline, predictions")
    )


def traffic(results: Path) -> str | None:
    """Counted bytes of a step by stage, and of whole networks."""
    text = []
    for file in sorted(results.glob("traffic*.json")):
        record = read(file)
        for network, counted in record["networks"].items():
            wholes = [whole for _, whole in counted["stages"]]
            total = {
                kind: {name: sum(whole[kind][name] for whole in wholes) for name in wholes[0][kind]}
                for kind in ("moved", "saved")
            }
            rows = [
                [whole["part"], str(whole["blocks"]), "x".join(map(str, whole["input"])), *_bytes(whole)]
                for whole in wholes
            ]
            rows.append(["all", str(sum(whole["blocks"] for whole in wholes)), "", *_bytes(total)])
            title = f"{network}, {record['batch']} images of {counted['image']}x{counted['image']}, {record['dtype']}"
            where = f"**{title}**, static count, commit {record['commit']}."
            text.append(f"{where}\n\n{markdown(TRAFFIC_COLUMNS, rows)}")
    return "\n\n".join(text) or None


TRAFFIC_COLUMNS = ("first block", "blocks", "input CxHxW", "eager MB", "compiled MB", "fused MB", "fused / eager",
                   "fused / compiled", "kept: fused / eager", "memory mode / eager")  # fmt: skip


def _bytes(counted: Record) -> list[str]:
    moved, saved = counted["moved"], counted["saved"]
    return [
        *(f"{moved[kind] / 1e6:.0f}" for kind in roofline.KINDS),
        f"{moved['fused'] / moved['eager']:.2f}",
        f"{moved['fused'] / moved['compiled']:.2f}",
        *(f"{saved[mode] / saved['eager']:.2f}" if saved["eager"] else "" for mode in ("fused", "fewer")),
    ]


def ahead_of_time(results: Path) -> str | None:
    """What the compiled kernels need, by kernel and architecture; read from machine code, nothing ran."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for file in sorted(results.glob("aot*.json")):
        for row in read(file)["rows"]:
            if "registers" in row:
                groups.setdefault((row["kernel"].removesuffix("_kernel"), row["arch"]), []).append(row)
    rows = []
    for (kernel, arch), found in sorted(groups.items()):
        registers = [row["registers"] for row in found]
        cores = sorted({core for row in found for core, count in row["tensor_cores"].items() if count})
        rows.append(
            [kernel, f"sm_{arch}", str(len(found)), f"{min(registers)} to {max(registers)}"]
            + [str(sum(row["spills"] for row in found)), f"{max(row['shared'] for row in found) / 1000:.0f}"]
            + [", ".join(cores), str(sum(bool(row["faults"]) for row in found))]
        )
    return markdown(AOT_COLUMNS, rows) if rows else None


AOT_COLUMNS = ("kernel", "architecture", "specialisations", "registers", "spills", "shared memory, KB at most",
               "tensor cores", "not to be shipped")  # fmt: skip


def growth_table(path: Path) -> str | None:
    """Growth with batch, depth and resolution."""
    record = read(path)
    if not record:
        return None
    return (
        f"One training step, {record['dtype']}, measured on {machine_line(record)}."
        f"{busy(record['load_average'], record['threads'])}\n\n"
        f"{markdown(growth.COLUMNS, growth.rows(record['points']))}"
        + picture(path.with_suffix(".png"), "images/s and memory against batch, depth and resolution")
    )


def on_a_cpu(path: Path) -> str | None:
    """Training and inference on a CPU against every peer."""
    record = read(path)
    if not record:
        return None
    return (
        f"Measured on {machine_line(record)}.{busy(record['load_average'], record['threads'])}\n\n"
        f"{cpu.table(record['workloads'])}"
    )


def bytes_an_image(results: Path) -> dict[str, dict[str, float]]:
    """Counted bytes of a step, of one image, by ``"model size"`` and peer, from `bench.traffic`'s results."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted(results.glob("traffic*.json")):
        record = json.loads(file.read_text())
        for counted in record["networks"].values():
            sums = {
                peer: sum(whole["moved"][kind] for _, whole in counted["stages"]) / record["batch"]
                for kind, peer in roofline.KINDS.items()
            }
            found[f"{counted['model']} {counted['image']}"] = sums
    return found


def read(path: Path) -> Record | None:
    """A result file; None: there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def _ms(figures: Record | None) -> str:
    if figures is None:
        return ""
    return f"{1e3 * figures['seconds']['median']:.4g}" if "seconds" in figures else "failed"


def _rate(figures: Record | None) -> str:
    if figures is None or "seconds" not in figures:
        return _ms(figures)
    return f"{_ms(figures)}, {figures['gb_per_second']:.3g}" if "gb_per_second" in figures else _ms(figures)


def plots(folder: Path) -> list[Path]:
    """Pictures of a campaign's networks, as far as it has them: speeds as bars, images/s against the batch."""
    record = read(folder / "models.json")
    cases = measured_cases(record) if record else {}
    written = []
    single = {
        name: case for name, case in cases.items() if ", batch " not in name and "eager" in case["peers"]
    }
    if single:
        written.append(
            _draw(folder / "models.png", lambda figure: _bars(figure, single, machine_line(record)))
        )
    sweeps = {name: case for name, case in cases.items() if ", batch " in name}
    if sweeps:
        written.append(
            _draw(folder / "batches.png", lambda figure: _sweep(figure, sweeps, machine_line(record)))
        )
    limits = ceilings(folder)
    operations = read(folder / "parts.json")
    if operations and "copy" in limits:
        points = _points(measured_cases(operations))
        if points:
            line = machine_line(operations)
            written.append(_draw(folder / "roofline.png", lambda figure: _roof(figure, points, limits, line)))
    return written


def _draw(path: Path, draw: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    draw(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path


def _bars(figure: Any, cases: dict[str, Record], title: str) -> None:
    axes = figure.subplots()
    peers = list(dict.fromkeys(peer for case in cases.values() for peer in case["peers"]))
    width = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        at, speed = [], []
        for index, case in enumerate(cases.values()):
            figures = case["peers"].get(peer, {})
            if "seconds" in figures and "seconds" in case["peers"]["eager"]:
                at.append(index + place * width)
                speed.append(case["peers"]["eager"]["seconds"]["median"] / figures["seconds"]["median"])
        axes.bar(at, speed, width, label=peer)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(cases))])
    axes.set_xticklabels([f"{name}\nbatch {case['batch']}" for name, case in cases.items()], fontsize=7)
    axes.set(ylabel="speed, eager channels-last = 1")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7)


def _sweep(figure: Any, cases: dict[str, Record], title: str) -> None:
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for case in cases.values():
        for peer, figures in case["peers"].items():
            if "seconds" in figures:
                lines.setdefault((case["model"], peer), []).append(
                    (case["batch"], figures["images_per_second"])
                )
    for (model, peer), points in lines.items():
        axes.loglog(*zip(*sorted(points)), "o-", label=f"{model}, {peer}")
    axes.set(xlabel="batch", ylabel="images/s")
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)


def _points(cases: dict[str, Record]) -> dict[str, list[tuple[float, float]]]:
    """(FLOP a byte, TFLOP/s) of every operation with products, by implementation."""
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases.values():
        for call in case.get("calls", {}).values():
            for which, figures in call["candidates"].items():
                if call["flops"] and "tflops" in figures:
                    points.setdefault(which, []).append((call["flops"] / call["bytes"], figures["tflops"]))
    return points


def _roof(
    figure: Any, points: dict[str, list[tuple[float, float]]], limits: dict[str, float], title: str
) -> None:
    axes = figure.subplots()
    every = [x for line in points.values() for x, _ in line]
    intensity = [min(every) / 2, max(every) * 2]
    intensity = [intensity[0] * (intensity[1] / intensity[0]) ** (step / 50) for step in range(51)]
    for dtype, rate in limits.items():
        if dtype != "copy":
            axes.loglog(
                intensity,
                [min(rate, x * limits["copy"] / 1e3) for x in intensity],
                label=f"measured roof, {dtype}",
            )
    for (which, line), marker in zip(points.items(), "os^vD"):
        axes.loglog(*zip(*line), marker, label=which)
    axes.set(xlabel="FLOP a byte, each tensor once", ylabel="TFLOP/s")
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)


CAMPAIGN: dict[str, Callable[[Path], str | None]] = {
    "environment": environment,
    "tests": tests,
    "models": models,
    "memory": memory,
    "parts": parts,
    "step": step,
    "accuracy": accuracy,
}


def newest_campaign(results: Path) -> Path | None:
    """The folder of the last campaign: one on a GPU before any on a CPU."""
    folders = sorted(file.parent for file in results.glob("*/environment.json"))
    return max(
        folders,
        key=lambda folder: (read(folder / "environment.json")["device"] != "cpu", folder.name[-8:]),
        default=None,
    )


def sections(results: Path, folder: Path | None) -> dict[str, str]:
    """Markdown by section, those that there are results for."""
    found = {
        "aot": ahead_of_time(results),
        "traffic": traffic(results),
        "roofline": predictions(results / "roofline.json"),
        "growth": growth_table(results / "growth-cpu.json"),
        "cpu": on_a_cpu(results / "cpu.json"),
    }
    if folder is not None:
        found |= {name: make(folder) for name, make in CAMPAIGN.items()}
        found["models"] = models(folder, bytes_an_image(results))
    return {name: text for name, text in found.items() if text}


def fill(text: str, found: dict[str, str]) -> str:
    """The text with its marked sections replaced."""

    def replaced(match: re.Match) -> str:
        name = match[1]
        return f"<!-- bench:{name} -->\n{found[name]}\n<!-- /bench:{name} -->" if name in found else match[0]

    return re.sub(r"<!-- bench:([\w-]+) -->.*?<!-- /bench:\1 -->", replaced, text, flags=re.DOTALL)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="campaigns [the newest under bench/results]")
    parser.add_argument("--readme", action="store_true", help="fill in README.md instead of printing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw the pictures; print the sections or put them into README.md."""
    args = parse(argv)
    newest = newest_campaign(RESULTS)
    folders = args.folders or ([newest] if newest else [])
    for folder in folders:
        plots(folder)
    if args.readme:
        path = ROOT / "README.md"
        text = fill(path.read_text(), sections(RESULTS, folders[-1] if folders else None))
        with atomic_write(path) as file:
            file.write(text.encode())
        return
    for folder in folders or [None]:
        for name, text in sections(RESULTS, folder).items():
            print(f"## {name}\n\n{text}\n")


if __name__ == "__main__":
    main()
