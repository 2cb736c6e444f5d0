"""Sections of what a GPU took: steps against torch.compile, and launches beside the model's."""

from __future__ import annotations

from pathlib import Path

from bench import seeds
from bench.host import table as host_table
from bench.machine import compare
from bench.report.common import Record, machine_line, measured_cases, median, networks, read
from bench.tables import markdown

# The ways to run a step that a network's best is taken of.
LIBRARY = ("compile", "compile graphs", "compile max-autotune")
OURS = ("fused Triton", "fused", "fused graph", "fused graph PDL")
SHOWN = ("eager", *LIBRARY[:2], *OURS[:3])
OPTIONAL = OURS[3:]  # shown where one network has them


def best(case: Record, variants: tuple[str, ...]) -> float | None:
    """Seconds of a step by the fastest of the variants; None: none was measured."""
    return min(filter(None, (median(case, name) for name in variants)), default=None)


def steps_section(folder: Path) -> str | None:
    """Milliseconds of a training step by variant, and the best of torch.compile's over the best of ours."""
    record = read(folder / "models.json")
    if not record or record["device"] == "cpu":
        return None
    cases = [case for name, case in networks(record).items() if ", batch " not in name]
    shown = [*SHOWN, *(variant for variant in OPTIONAL if any(median(case, variant) for case in cases))]
    rows = []
    for case in cases:
        times = [median(case, variant) for variant in shown]
        ours, library, eager = best(case, OURS), best(case, LIBRARY), median(case, "eager")
        ratios = [f"{other / ours:.2f}x" if other and ours else "" for other in (library, eager)]
        title = f"{case['model']}, batch {case['batch']}, {case['image_size']} pixels"
        rows.append([title, *(f"{1e3 * one:.2f}" if one else "" for one in times), *ratios])
    columns = ["ms a training step", *shown, "best of torch.compile / best fused", "eager / best fused"]
    return f"Measured on {machine_line(record)}, bf16.\n\n{markdown(columns, rows)}" if rows else None


def seconds_sentence(results: Path) -> str | None:
    """Seconds that the presets for speed train for on a GPU: the median over their seeds."""
    found = []
    for path in sorted(results.glob("seeds-*.json")):
        record = read(path)
        if record and record["device"] != "cpu":
            text = f"{seeds.label(record)} in {seeds.median_seconds(record):.1f} s"
            found.append((text, machine_line(record)))
    if not found:
        return None
    return f"On one {found[0][1]}: {', '.join(text for text, _ in found)} of training, one CUDA graph a step."


def launches_section(path: Path) -> str | None:
    """The launches of a step as a GPU took them beside the model's times, by kernel."""
    record = read(path)
    if not record:
        return None
    text = []
    for name, found in record["networks"].items():
        total = found["total"]
        ratio = f"{total['measured'] / total['model']:.2f} of the model's time"
        rows = map(compare.kind_cells, [*found["kinds"], total])
        title = f"**{name.partition(' | ')[0]}**, {found['batch']} images, {total['launches']} launches: {ratio}"
        text.append(f"{title}\n\n{markdown(compare.KINDS, rows)}")
    return f"Measured on {machine_line(record['measured'])}, Triton alone.\n\n" + "\n\n".join(text)


def headline(folder: Path) -> str | None:
    """A training step of ResNet-50 against torch.compile and eager PyTorch in a sentence."""
    record = read(folder / "models.json")
    case = networks(record).get("resnet50 224") if record and measured_cases(record) else None
    if record is None or case is None or record["device"] == "cpu":
        return None
    ours, library, eager = best(case, OURS), best(case, LIBRARY), median(case, "eager")
    if not ours or not library or not eager:
        return None
    return (
        f"**Measured on {record['device']} (PyTorch {record['versions']['torch']}, {record['date'][:10]}): a training "
        f"step of ResNet-50 on {case['batch']} images of {case['image_size']} pixels in bf16 takes {1e3 * ours:.1f} "
        f"ms, {library / ours:.2f} times as fast as torch.compile's fastest, {eager / ours:.2f} times as fast as eager "
        "PyTorch.**"
    )


def host_section(results: Path) -> str | None:
    """What the host does for a step's launches, by each Triton's launcher and by the driver directly."""
    text = []
    for path in sorted(results.glob("host-triton*.json")):
        record = read(path)
        if record:
            version = record["versions"]["triton"]
            text.append(f"Triton {version}, measured on {machine_line(record)}.\n\n{host_table(record['networks'])}")
    return "\n\n".join(text) or None
