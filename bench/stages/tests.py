"""The test suite on this machine, a folder of ``tests/`` at a time, those for a GPU first."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.record import ROOT
from bench.workloads import Setting

FAILURES_KEPT, MESSAGE_KEPT, TRACEBACK_KEPT = 40, 300, 1500
GPU_WORKERS = 4  # their tests take gigabytes of a GPU's memory, and each compiles
TO_REPORT, TO_END = 20, 5  # seconds
INTERRUPTED = 2  # pytest's exit status


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    if setting.dry:
        return {"gpu": partial(run, setting, ["tests/bench/test_record.py"], 2)}
    folders = ["kernels", "ops", "nn", "models", "train", "reference", "data", "bench", "."]
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    if setting.device.type == "cuda":
        found["gpu"] = partial(run, setting, ["tests", "-m", "gpu"], GPU_WORKERS)
    for folder in folders:
        paths = ["tests/test_cli.py"] if folder == "." else [f"tests/{folder}"]
        if (ROOT / paths[0]).exists():
            found[paths[0]] = partial(run, setting, [*paths, "-m", "not gpu"], os.cpu_count() or 1)
    return found


def run(setting: Setting, arguments: list[str], workers: int) -> dict[str, Any]:
    """Counts of a pytest run in its own process, and the failures' names and messages.

    What the time does not suffice for is interrupted, and ``cut_off`` then true: the counts are of what was run.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-o", f"addopts={' '.join(_options(workers))}"]
        process = subprocess.Popen(
            [*command, f"--junitxml={report}", *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=max(1, setting.left - TO_REPORT - TO_END))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then reports on what it has run
            try:
                output, _ = process.communicate(timeout=TO_REPORT)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
        if not report.exists():
            raise RuntimeError(f"pytest ended with {process.returncode}: {output[-MESSAGE_KEPT:]}")
        cut_off = process.returncode in (INTERRUPTED, -signal.SIGINT)
        return {"exit_status": process.returncode, "cut_off": cut_off, "workers": workers, **read(report)}


def _options(workers: int) -> list[str]:
    """Of pytest: what is not installed is left out."""
    options = ["--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_benchmark"):
        options.append("--benchmark-disable")
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(workers)]
    return options


def read(report: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit report."""
    suites = list(ElementTree.parse(report).iter("testsuite"))
    counts = {
        kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in ("tests", "failures", "errors", "skipped")
    }
    failures = [
        {
            "test": f"{case.get('classname')}::{case.get('name')}",
            "message": (bad.get("message") or "")[:MESSAGE_KEPT],
            "traceback": (bad.text or "")[-TRACEBACK_KEPT:],
        }
        for suite in suites
        for case in suite.iter("testcase")
        for bad in (*case.findall("failure"), *case.findall("error"))
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {**counts, "passed": passed, "failed": failures[:FAILURES_KEPT]}
