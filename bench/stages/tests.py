"""The test suite on this machine, a folder of ``tests/`` at a time, those for a GPU first."""

from __future__ import annotations

import importlib.util
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

FAILURES_KEPT, MESSAGE_KEPT = 40, 300


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    if setting.dry:
        return {"tests/bench/test_record.py": partial(run, ["tests/bench/test_record.py"], setting.seconds)}
    folders = ["kernels", "ops", "nn", "models", "train", "reference", "data", "bench", "."]
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    if setting.device.type == "cuda":
        found["gpu"] = partial(run, ["tests", "-m", "gpu"], setting.seconds)
    for folder in folders:
        paths = ["tests/test_cli.py"] if folder == "." else [f"tests/{folder}"]
        if (ROOT / paths[0]).exists():
            found[paths[0]] = partial(run, [*paths, "-m", "not gpu"], setting.seconds)
    return found


def run(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Counts of a pytest run in its own process, and the failures' names and messages."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("pytest_benchmark"):
            options.append("--benchmark-disable")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-o",
            f"addopts={' '.join(options)}",
            f"--junitxml={report}",
        ]
        try:
            done = subprocess.run(
                [*command, *arguments], cwd=ROOT, timeout=max(1, seconds - 10), capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"pytest {' '.join(arguments)} took more than {seconds - 10:.0f} s") from None
        if not report.exists():
            raise RuntimeError(
                f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-MESSAGE_KEPT:]}"
            )
        return {"exit_status": done.returncode, **read(report)}


def read(report: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit report."""
    suites = list(ElementTree.parse(report).iter("testsuite"))
    counts = {
        kind: sum(int(suite.get(kind, 0)) for suite in suites)
        for kind in ("tests", "failures", "errors", "skipped")
    }
    failures = [
        {
            "test": f"{case.get('classname')}::{case.get('name')}",
            "message": (bad.get("message") or "")[:MESSAGE_KEPT],
        }
        for suite in suites
        for case in suite.iter("testcase")
        for bad in (*case.findall("failure"), *case.findall("error"))
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {**counts, "passed": passed, "failed": failures[:FAILURES_KEPT]}
