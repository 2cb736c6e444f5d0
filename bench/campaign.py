"""The whole measurement of a machine, in stages or slices that can be interrupted: ``bench/campaign.sh``.

    bench/campaign.sh                                    every stage, JSON under bench/results/<device>-<date>/
    bench/campaign.sh --stages environment models       only these
    bench/campaign.sh --slice 3                         what one command of eight minutes measures, see `bench.slices`
    bench/campaign.sh --dry-run --out /tmp/dry          every stage at tiny sizes, on a CPU too

Each stage is a process of its own with a limit of time, and one file ``<stage>.json`` in the folder, written anew
after every case. A stage whose file says that it is complete is skipped; one that was cut off goes on where it
stopped; a case that ended its process twice is left out. What fails leaves its error in the file and stops nothing
else.

A slice goes on from what earlier ones left: in ``build/campaign/`` on the same machine, or in files that were brought
back and put under ``bench/results/<device>-<date>/`` or named by ``--resume``. Those hold the results, the timed
choices and the compiled kernels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch

from bench import archive
from bench.merge import folder_name, load, merge_folders
from bench.record import RESULTS, ROOT, circumstances, commit, write_results
from bench.slices import SLICES, STAGES, Part
from bench.workloads import Setting
from fastres.errors import FastresError
from fastres.train import machine

SECONDS = 470  # of a stage, or a slice
PACKING = 40  # seconds kept for the archive of compiled kernels
FAIR = 0.5  # share of a stage's seconds: a case that is cut off after less may try again
RESTART = 3  # exit status of a stage whose device no longer answers: the rest needs a fresh process
RESTARTS = 8
LEAST = 10  # seconds that a stage is worth beginning with
ATTEMPTS = 2  # of a case that takes its process down
CACHES = {"FASTRES_CACHE": "choices", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
WORK = ROOT / "build" / "campaign"
COMPILING = {"precompile", "autotune"}  # stages that fill Triton's cache


def run_stage(
    path: Path,
    cases: Callable[[], dict[str, Callable[[], dict[str, Any]]]],
    seconds: float,
    alive: Callable[[], bool],
    part: Part | None = None,
) -> int:
    """Measure the cases that the file has not yet.

    Args:
        path: the stage's file.
        cases: makes the measurements.
        seconds: after which no further case is begun.
        alive: whether the device still answers.
        part: the cases to measure; None: all.

    Returns:
        0, or `RESTART`.
    """
    begin = time.monotonic()
    record = read(path) | {"complete": False, "stopped": None}
    attempts: dict[str, int] = record["attempts"]
    found = cases()
    for name, measure in found.items():
        if name in record["cases"] or not (part is None or part.has(name)):
            continue
        if attempts.get(name, 0) >= ATTEMPTS:
            record["cases"][name] = {"error": f"the process ended {ATTEMPTS} times in this case"}
            continue
        if time.monotonic() - begin > seconds:
            record["stopped"] = f"{seconds:.0f} s were over before case {name!r}: run again to go on"
            write_results(path, record)
            return 0
        attempts[name] = attempts.get(name, 0) + 1
        record["running"] = {"case": name, "fair": time.monotonic() - begin < (1 - FAIR) * seconds}
        write_results(path, record)
        print(f"  {name}", flush=True)
        start = time.monotonic()
        try:
            result = measure()
        except Exception as error:  # whatever a case raises is its result
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
            print(f"    {result['error']}", flush=True)
        record["cases"][name] = {**result, "wall_seconds": round(time.monotonic() - start, 2)}
        del attempts[name], record["running"]
        if not alive():
            write_results(path, record)
            return RESTART
    record["complete"] = found.keys() <= record["cases"].keys()
    write_results(path, record)
    return 0


def read(path: Path) -> dict[str, Any]:
    """A stage's record so far, without the circumstances, which are written anew; an empty one if there is no file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    facts = circumstances()
    kept = {key: value for key, value in found.items() if key not in facts}
    return {"stage": path.stem, "complete": False, "stopped": None, "cases": {}, "attempts": {}} | kept


def drive(args: argparse.Namespace) -> int:
    """Run the stages or the slice that is not complete; 1 if anything of it is not done afterwards or has errors."""
    end = time.monotonic() + args.seconds
    environment = surroundings(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = SLICES[args.slice].parts if args.slice else [Part(stage) for stage in args.stages]
    sources = resumed(args)
    merge_folders(sources, args.out, {part.stage for part in parts} | {"autotune"})
    cache = Path(environment["TRITON_CACHE_DIR"])
    if added := archive.unpack([path for folder in sources for path in archive.of(folder)], cache):
        print(f"{added} files of compiled kernels taken over", flush=True)
    if args.slice:
        print(f"slice {args.slice} of {len(SLICES)}: {SLICES[args.slice].what}", flush=True)
        if any(part.stage in COMPILING for part in parts):
            end -= PACKING
    clean = True
    for part in parts:
        seconds = end - time.monotonic() if args.slice else args.seconds
        clean = _run_part(part, args, seconds, environment) and clean
        if (mirror := _mirror(args)) is not None:
            merge_folders([args.out], mirror, [part.stage])
    if args.slice and any(part.stage in COMPILING for part in parts):
        for folder in filter(None, (args.out, _mirror(args))):
            print(f"compiled kernels: {archive.pack(cache, folder)}", flush=True)
    print(f"results: {args.out}", flush=True)
    if args.slice:
        following = f"--slice {args.slice + 1}" if args.slice < len(SLICES) else "python -m bench.report --fill"
        print(f"done: next is {following}" if clean else f"not done, or with errors: --slice {args.slice} goes on")
    return 0 if clean else 1


def _run_part(part: Part, args: argparse.Namespace, seconds: float, environment: dict[str, str]) -> bool:
    """Run a stage's cases; whether all of them are there, without an error."""
    stage, path = part.stage, args.out / f"{part.stage}.json"
    if path.exists() and read(path)["complete"]:
        print(f"{stage}: complete already", flush=True)
    elif seconds < LEAST:
        print(f"{stage}: no time left", flush=True)
        return False
    else:
        print(f"{stage}:", flush=True)
        _supervise(part, path, args, seconds, environment)
    record = read(path)
    errors = sum("error" in case for name, case in record["cases"].items() if part.has(name))
    state = record["stopped"] or ("complete" if record["complete"] else "complete so far")
    print(f"{stage}: {len(record['cases'])} cases, {errors} errors; {state}", flush=True)
    return record["stopped"] is None and not errors


def surroundings(device: str) -> dict[str, str]:
    """Environment of the stages' processes: the checkout, the caches, and of several GPUs only the one to measure.

    Raises:
        FastresError: for a device that there is not.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    for variable, folder in CACHES.items():
        environment.setdefault(variable, str(WORK / folder))
    picked = machine.pick_device(device)
    if picked.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif picked.index is not None:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = visible[picked.index] if visible else str(picked.index)
    return environment


def resumed(args: argparse.Namespace) -> list[Path]:
    """Folders of results that a slice goes on from.

    Those that are named, else those of this device and this commit of today or yesterday.
    """
    if args.resume:
        return args.resume
    if not args.slice or args.dry_run:
        return []
    days = (date.today() - timedelta(days=1), date.today())
    names = [folder_name(device_name(args.device), day.isoformat()) for day in days]
    folders = [root / name for root in (RESULTS, WORK / "results") for name in names]
    return [folder for folder in folders if _commits(folder) == {commit()}]


def _commits(folder: Path) -> set[str | None]:
    """The commits that a folder's results are of."""
    return {record["commit"] for stage in STAGES if (record := load(folder / f"{stage}.json")) is not None}


def _mirror(args: argparse.Namespace) -> Path | None:
    """Where a slice keeps its results for the next one on this machine, whatever becomes of its own folder."""
    if not args.slice or args.dry_run:
        return None
    return WORK / "results" / folder_name(device_name(args.device), date.today().isoformat())


def device_name(device: str) -> str:
    """The GPU's name, or ``cpu``."""
    picked = machine.pick_device(device)
    return torch.cuda.get_device_name(picked) if picked.type == "cuda" else "cpu"


def _supervise(part: Part, path: Path, args: argparse.Namespace, seconds: float, environment: dict[str, str]) -> None:
    """Start a stage's process until it ends in order, or its time or its restarts are used up."""
    end = time.monotonic() + seconds
    for _ in range(RESTARTS):
        left = end - time.monotonic()
        if left < 1:
            _note(path, f"{seconds:.0f} s were over")
            return
        command = [sys.executable, "-m", "bench.campaign", "--run", part.stage, "--cases", *part.cases]
        command += ["--out", str(args.out), "--data", args.data, "--seconds", f"{left:.0f}"]
        command += ["--dry-run"] * args.dry_run
        status, tail, killed = _stream(command, environment, left)
        if killed:
            _note(path, f"killed after {seconds:.0f} s")
            return
        if status == 0:
            return
        if status != RESTART:
            _note(path, f"the process ended with {status}: {tail}")
    _note(path, f"given up after {RESTARTS} processes: {read(path)['stopped']}")


def _note(path: Path, reason: str) -> None:
    record = read(path) | {"stopped": reason}
    running = record.pop("running", {"fair": True})
    if reason.startswith("killed") and not running["fair"]:  # it was cut off for having begun late
        record["attempts"].pop(running["case"], None)
    write_results(path, record)


def _stream(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str, bool]:
    """Run a command and print what it prints; its status, last lines, and whether its time ran out."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        lines: deque[str] = deque(maxlen=8)
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.strip())
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, " / ".join(lines)[-600:], killed.is_set()


def run_one(args: argparse.Namespace) -> int:
    """The process of one stage."""
    device = machine.pick_device("auto")
    if device.type == "cpu":
        machine.keep_freed_memory()
    else:
        device = torch.device("cuda", 0)  # `surroundings` shows no other
    if args.dry_run:
        torch.set_num_threads(1)
    dtype = machine.pick_dtype("auto", device)
    setting = Setting(device, dtype, args.dry_run, args.data, args.out, args.seconds)
    importlib.import_module("bench.stages.autotune").restore(setting, args.out / "autotune.json")
    stage = importlib.import_module(f"bench.stages.{args.run}")
    stand_in = (
        importlib.import_module("bench.stand_ins").on_a_cpu if args.dry_run and device.type == "cpu" else nullcontext
    )
    with stand_in():
        # A case takes a while: the last one must not be killed for having begun too late.
        return run_stage(
            args.out / f"{args.run}.json",
            lambda: stage.cases(setting),
            0.8 * args.seconds,
            _answers,
            Part(args.run, tuple(args.cases)),
        )


def _answers() -> bool:
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # an illegal address, say: no call to this device succeeds in this process any more
        return False
    return True


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="bench/campaign.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FOLDER", help="[$OUT, or bench/results/<device>-<date>]"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}"
    )
    parser.add_argument("--slice", type=int, choices=SLICES, help="what a command of eight minutes measures")
    parser.add_argument(
        "--resume", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="go on from results there [a slice: of this device and commit, of today or yesterday, under bench/results "
        "or build]",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", metavar="STR", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--data", default="synthetic", help="of `fastres train`, for the time to accuracy [synthetic]")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit of a stage, or of a slice [{SECONDS}]")
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if missing := [str(folder) for folder in args.resume if not folder.is_dir()]:
        parser.error(f"--resume {missing[0]}: there is no such folder")
    return args


def out_folder(args: argparse.Namespace) -> Path:
    """``--out``, or ``$OUT``, or ``bench/results/<device>-<date>``."""
    if args.out or os.environ.get("OUT"):
        return args.out or Path(os.environ["OUT"])
    return RESULTS / folder_name(device_name(args.device), date.today().isoformat())


def main(argv: list[str] | None = None) -> int:
    """Run the campaign, or one stage of it."""
    args = parse(argv)
    if args.run:
        return run_one(args)
    try:
        args.out = out_folder(args)
        return drive(args)
    except FastresError as error:
        print(f"bench/campaign.sh: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
