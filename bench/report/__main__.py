"""The command line: see `bench.report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import cpu, report
from bench.record import RESULTS, ROOT
from bench.report import counted, headline, measured, predicted, single, training
from bench.report.campaign import CAMPAIGN, memory_section, models_section, speeds_section
from bench.report.common import read
from bench.report.plots import plots
from bench.tables import fill
from fastres.atomic import atomic_write

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def newest_campaign(results: Path, on_cpu: bool = False) -> Path | None:
    """The folder of the last campaign: one on a GPU before any on a CPU; or of the last ``on_cpu``."""
    folders = sorted(file.parent for file in results.glob("*/environment.json"))
    if on_cpu:
        folders = [folder for folder in folders if not _is_on_gpu(folder)]
    return max(folders, key=lambda folder: (_is_on_gpu(folder), folder.name[-8:]), default=None)


def _is_on_gpu(folder: Path) -> bool:
    return (read(folder / "environment.json") or {}).get("device") != "cpu"


def sections(results: Path, folder: Path | None) -> dict[str, str]:
    """Markdown by section, those that there are results for."""
    roofline = results / "roofline.json"
    found = {
        "headline": headline.sentence(results),
        "machine-launches": measured.launches_section(results / "launches-h100.json"),
        "host": measured.host_section(results),
        "gpu-seconds": measured.seconds_sentence(results),
        "aot": counted.machine_code_section(results),
        "aot-architectures": counted.architectures_section(results),
        "traffic": counted.traffic_section(results),
        "traffic-networks": counted.network_traffic_section(results),
        "roofline": counted.roofline_section(roofline),
        "machine": predicted.steps_section(results),
        "machine-runs": predicted.runs_section(results),
        "machine-runs-line": predicted.runs_sentence(results),
        "machine-kernels": predicted.kernels_section(results),
        "machine-slow": predicted.slow_section(results),
        "machine-redesign": predicted.redesign_section(results),
        "machine-test": predicted.sharpest_section(results),
        "growth": single.growth_section(results / "growth-cpu.json"),
        "cpu": single.cpu_section(results),
        "cpu-speeds": single.cpu_section(results, cpu.few_speeds),
        "levers": single.cpu_ablation_section(results / "levers-cpu.json"),
        "faults": single.faults_section(results / "faults.json"),
        "rate": training.rates_section(results / "rate-cpu.json"),
        "runs": training.runs_section(results / "accuracy-cpu.json"),
        "loop": training.loop_section(results / "loop-cpu.json"),
        "time-to-accuracy": training.time_to_accuracy_section(results),
        "equivalence": training.equivalence_section(results),
        "seeds": training.seeds_section(results),
        "speed94-runs": training.runs_section(results / "speed94-runs-cpu.json"),
        "ablation": training.ablation_section(results),
        "parity": training.parity_section(results / "parity-cpu.json"),
    }
    if folder is not None:
        found |= {name: make(folder) for name, make in CAMPAIGN.items()}
        found["models"] = models_section(folder, counted.bytes_an_image(results))
        found |= {"gpu-steps": measured.steps_section(folder), "gpu-headline": measured.headline(folder)}
    if (on_cpu := newest_campaign(results, on_cpu=True)) is not None:
        found |= {"speeds-cpu": speeds_section(on_cpu), "memory-cpu": memory_section(on_cpu)}
        found["models-cpu"] = models_section(on_cpu)
    return {name: text for name, text in found.items() if text}


def relative(found: dict[str, str], page: Path) -> dict[str, str]:
    """The sections with their pictures' paths, which start at the checkout, as they are seen from the page."""
    up = "../" * len(page.relative_to(ROOT).parents[:-1])
    return {name: text.replace("](bench/", f"]({up}bench/") for name, text in found.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=report.__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="campaigns [the newest under bench/results]")
    parser.add_argument("--fill", action="store_true", help="fill in README.md and docs/*.md instead of printing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw the pictures; print the sections or put them into the pages."""
    args = parse(argv)
    newest = newest_campaign(RESULTS)
    folders = args.folders or ([newest] if newest else [])
    for folder in folders:
        plots(folder)
    if args.fill:
        found = sections(RESULTS, folders[-1] if folders else None)
        for page in PAGES:
            text = fill(page.read_text(), relative(found, page))
            with atomic_write(page) as file:
                file.write(text.encode())
        return
    for folder in folders or [None]:
        for name, text in sections(RESULTS, folder).items():
            print(f"## {name}\n\n{text}\n")


if __name__ == "__main__":
    main()
