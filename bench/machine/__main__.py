"""The command line: see `bench.machine`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench import machine, roofline
from bench.counted import NETWORKS
from bench.launches import WAYS
from bench.machine.chips import CHIPS, LAUNCH, Chip, variants
from bench.machine.fused import Compiler, Timed, by_kind, is_convolution, quickest, timed, with_library
from bench.machine.networks import SHOWN, step
from bench.machine.peers import ENDS, convolution_seconds, convolutions, others_seconds, streaming_seconds
from bench.machine.tables import convolution_row, summary
from bench.record import RESULTS, write_results
from fastres.ops.backends.timed import RANKS

Steps = dict[str, float]


def predicted(
    network: str, arch: int, counted: dict[str, Any], ranks: int = RANKS, sensitivity: bool = True
) -> dict[str, Any]:
    """Everything that the result file has of a network.

    Args:
        network: key of `NETWORKS`. counted: what `bench.traffic` found of it.
        ranks: how many of the launchers' configurations are candidates.
        sensitivity: also with the assumptions of `variants`.
    """
    began, programs, chip = time.perf_counter(), Compiler(arch), CHIPS[arch]
    recorded = [step(network, rank, arch) for rank in range(ranks)]
    of_rank = []
    for rank, launches in enumerate(recorded):
        of_rank.append(timed(launches, programs, chip))
        _say(f"{network}, configurations {rank}: {1e3 * sum(one.seconds for one in of_rank[-1]):.2f} ms", began)
    best = quickest(of_rank)
    ways = [step(network, way, arch) for way in WAYS]
    steps = {}
    for name, variant in (variants(chip) if sensitivity else {"assumed": chip}).items():
        first, others = timed(recorded[0], programs, variant), [timed(way, programs, variant) for way in ways]
        quick = timed([one.launch for one in best], programs, variant)
        steps[name] = _steps(network, arch, counted, first, quick, others, variant)
        _say(f"{network}, {name}", began)
    return {
        "kind": "prediction of a model",
        "network": network,
        "batch": NETWORKS[network].batch,
        "dtype": "bfloat16",
        "arch": arch,
        "chip": chip._asdict(),
        "ranks": ranks,
        "ways": [way.value for way in WAYS.values()],
        "steps": steps,
        "bytes": sum(
            max(one.work.bytes / chip.bandwidth, one.work.operations / chip.peak) + LAUNCH for one in of_rank[0]
        ),
        "kinds": by_kind(of_rank[0], chip),
        "convolutions": _distinct(of_rank[0], programs, chip),
    }


def _steps(
    network: str,
    arch: int,
    counted: dict[str, Any],
    first: list[Timed],
    best: list[Timed],
    ways: list[list[Timed]],
    chip: Chip,
) -> Steps:
    """Seconds of a step of every kind, of peers with the library at both ends of its range."""
    others = others_seconds(counted, chip)
    found = {
        "Triton": sum(one.seconds for one in first) + others,
        "Triton tiles": sum(one.seconds for one in best) + others,
    }
    peers = roofline.steps_of(counted)
    sizes = convolutions(*NETWORKS[network])
    for end in ENDS:
        found[f"fused {end}"] = with_library(best, end, arch, chip, ways)[0] + others
        products = convolution_seconds(sizes, end, arch, chip)
        for kind in ("eager", "compiled"):
            found[f"{kind} {end}"] = streaming_seconds(peers[kind], chip) + products
    return found


def _distinct(step: list[Timed], programs: Compiler, chip: Chip) -> list[dict[str, Any]]:
    """The step's convolutions, like ones once, the longest together first."""
    found: dict[tuple, list[Timed]] = {}
    for one in step:
        if is_convolution(one):
            found.setdefault((one.launch.specialisation, one.work), []).append(one)
    rows = [convolution_row(same, programs(same[0].launch.specialisation), chip) for same in found.values()]
    return sorted(rows, key=lambda row: -row["launches"] * row["seconds"])


def _say(what: str, began: float) -> None:
    print(f"{what} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)


def counted_network(network: str, results: Path = RESULTS) -> dict[str, Any]:
    """What `bench.traffic` counted of a network.

    Raises:
        FileNotFoundError: where it has not.
    """
    for path in sorted(results.glob("traffic*.json")):
        record = json.loads(path.read_text())
        found = record["networks"].get(network)
        if found and found["batch"] == NETWORKS[network].batch:
            return found
    command = f'python -m bench.traffic --network "{network}" --json {results}/traffic-{network.replace(" ", "-")}.json'
    raise FileNotFoundError(f"count its bytes first: {command}")


def result_path(network: str, arch: int, results: Path = RESULTS) -> Path:
    """Where a network's predictions are kept."""
    return results / f"machine-{network.replace(' ', '-').lower()}-sm{arch}.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.machine", description=(machine.__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(SHOWN), help=f"({', '.join(SHOWN)})")
    parser.add_argument("--arch", type=int, choices=CHIPS, default=90, help="(90)")
    parser.add_argument("--ranks", type=int, default=RANKS, help="configurations of the launchers that are candidates")
    parser.add_argument("--sensitivity", action="store_true", help="also under other assumptions: three times the work")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the traffic's results and of these")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Predict, print, write the results."""
    args = parse(argv)
    for network in args.network:
        found = predicted(network, args.arch, counted_network(network, args.results), args.ranks, args.sensitivity)
        print(summary(found))
        write_results(result_path(network, args.arch, args.results), found)


if __name__ == "__main__":
    main()
