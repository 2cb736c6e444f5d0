"""The whole measurement of a machine, in stages that can be interrupted: ``bench/campaign.sh``.

    bench/campaign.sh                                    every stage, JSON under bench/results/<device>-<date>/
    bench/campaign.sh --stages environment models       only these
    bench/campaign.sh --dry-run --out /tmp/dry          every stage at tiny sizes, on a CPU too

Each stage is a process of its own with a limit of time, and one file ``<stage>.json`` in the folder, written anew
after every case. A stage whose file says that it is complete is skipped; one that was cut off goes on where it
stopped; a case that ended its process twice is left out. What fails leaves its error in the file and stops nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.record import RESULTS, ROOT, circumstances, write_results
from bench.workloads import Setting
from fastres.train import machine

STAGES = ("environment", "tests", "autotune", "parts", "models", "memory", "step", "accuracy")
SECONDS = 470  # of a stage
RESTART = 3  # exit status of a stage whose device no longer answers: the rest needs a fresh process
RESTARTS = 8
ATTEMPTS = 2  # of a case that takes its process down
CACHES = {"FASTRES_CACHE": "choices", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def run_stage(
    path: Path,
    cases: Callable[[], dict[str, Callable[[], dict[str, Any]]]],
    seconds: float,
    alive: Callable[[], bool],
) -> int:
    """Measure the cases that the file has not yet.

    Args:
        path: the stage's file.
        cases: makes the measurements.
        seconds: after which no further case is begun.
        alive: whether the device still answers.

    Returns:
        0, or `RESTART`.
    """
    begin = time.monotonic()
    record = read(path) | {"complete": False, "stopped": None}
    attempts: dict[str, int] = record["attempts"]
    for name, measure in cases().items():
        if name in record["cases"]:
            continue
        if attempts.get(name, 0) >= ATTEMPTS:
            record["cases"][name] = {"error": f"the process ended {ATTEMPTS} times in this case"}
            continue
        if time.monotonic() - begin > seconds:
            record["stopped"] = f"{seconds:.0f} s were over before case {name!r}: run again to go on"
            write_results(path, record)
            return 0
        attempts[name] = attempts.get(name, 0) + 1
        write_results(path, record)
        print(f"  {name}", flush=True)
        start = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # whatever a case raises is its result
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
            print(f"    {found['error']}", flush=True)
        record["cases"][name] = {**found, "wall_seconds": round(time.monotonic() - start, 2)}
        del attempts[name]
        if not alive():
            write_results(path, record)
            return RESTART
    record["complete"] = True
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
    """Run the stages that are not complete; 1 if any is not complete afterwards or has errors."""
    args.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for variable, folder in CACHES.items():
        environment.setdefault(variable, str(ROOT / "build" / "campaign" / folder))
    clean = True
    for stage in args.stages:
        path = args.out / f"{stage}.json"
        if path.exists() and read(path)["complete"]:
            print(f"{stage}: complete already", flush=True)
        else:
            print(f"{stage}:", flush=True)
            _supervise(stage, path, args, environment)
        record = read(path)
        errors = sum("error" in case for case in record["cases"].values())
        print(
            f"{stage}: {len(record['cases'])} cases, {errors} errors; {record['stopped'] or 'complete'}",
            flush=True,
        )
        clean = clean and record["complete"] and not errors
    print(f"results: {args.out}", flush=True)
    return 0 if clean else 1


def _supervise(stage: str, path: Path, args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Start a stage's process until it ends in order, or its time or its restarts are used up."""
    end = time.monotonic() + args.seconds
    for _ in range(RESTARTS):
        left = end - time.monotonic()
        if left < 1:
            _note(path, f"{args.seconds:.0f} s were over")
            return
        command = [
            sys.executable,
            "-m",
            "bench.campaign",
            "--run",
            stage,
            "--out",
            str(args.out),
            "--data",
            args.data,
        ]
        command += ["--seconds", f"{left:.0f}"] + ["--dry-run"] * args.dry_run
        status, tail, killed = _stream(command, environment, left)
        if killed:
            _note(path, f"killed after {args.seconds:.0f} s")
            return
        if status == 0:
            return
        if status != RESTART:
            _note(path, f"the process ended with {status}: {tail}")
    _note(path, f"given up after {RESTARTS} processes: {read(path)['stopped']}")


def _note(path: Path, reason: str) -> None:
    write_results(path, read(path) | {"stopped": reason})


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
    if args.dry_run:
        torch.set_num_threads(1)
    dtype = machine.pick_dtype("auto", device)
    setting = Setting(device, dtype, args.dry_run, args.data, args.out, args.seconds)
    importlib.import_module("bench.stages.autotune").restore(setting, args.out / "autotune.json")
    stage = importlib.import_module(f"bench.stages.{args.run}")
    # A case takes a while: the last one must not be killed for having begun too late.
    return run_stage(
        args.out / f"{args.run}.json", lambda: stage.cases(setting), 0.8 * args.seconds, _answers
    )


def _answers() -> bool:
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # an illegal address, say: no call to this device succeeds in this process any more
        return False
    return True


def default_folder() -> Path:
    """``bench/results/<device>-<date>``."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{date.today():%Y%m%d}"


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
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--data", default="synthetic", help="of `fastres train`, for the time to accuracy [synthetic]"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit of a stage [{SECONDS}]")
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out or Path(os.environ.get("OUT") or default_folder())
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the campaign, or one stage of it."""
    args = parse(argv)
    return run_one(args) if args.run else drive(args)


if __name__ == "__main__":
    sys.exit(main())
