"""The memory of large tensors: contents stay, little is held, and pages are given out again without being cleared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support_sanitizers import compiled, run

from fastres.ops.cpu import build, pages

SETUP = """
import os, resource, torch
from fastres.ops.cpu import pages
reason = pages.use()
if reason:
    print("unavailable", reason)
    raise SystemExit
MIB = 2**20
def made(mib, value=1.0):
    return torch.full((int(mib * MIB) // 4,), value)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
"""


def result(script: str) -> str:
    """What a process of its own prints, as PyTorch's allocator is replaced in all of it."""
    done = subprocess.run([sys.executable, "-c", SETUP + script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    if done.stdout.startswith("unavailable"):
        pytest.skip(done.stdout)
    return done.stdout.strip()


def test_random_buffers_under_sanitizers(tmp_path):
    program = compiled(tmp_path, Path(__file__).with_name("pages_stress.cpp"))
    if program is None:
        pytest.skip("no compiler with sanitizers")
    done = run(program)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-2000:]


def test_what_is_freed_serves_every_size_without_new_pages():
    """24 tensors of 3 MiB, then 7 of 10: of each turn but the first the pages are there."""
    found = result(
        "for turn in range(5):\n"
        "    before = faults()\n"
        "    small = [made(3) for _ in range(24)]; del small\n"
        "    large = [made(10) for _ in range(7)]; del large\n"
        "    print(faults() - before, end=' ')\n"
        "print(pages.held().free // MIB, pages.held().in_use)\n"
        "pages.release(); print(*pages.held())"
    )
    turns, after = found.splitlines()
    first, *others, free, in_use = map(int, turns.split())
    assert first > 72 * 256 / 2 and max(others) < first / 20  # 256 pages a MiB
    assert free == 72 and in_use == 0 and after == "0 0"


def test_small_tensors_stay_the_c_librarys_and_contents_stay():
    found = result(
        "small, before = made(0.9), pages.held().in_use\n"
        "kept = {n: made(n, n) for n in range(1, 40)}\n"
        "for turn in range(3):\n"
        "    for n in range(1 + turn, 40, 3): del kept[n]\n"
        "    for n in range(1 + turn, 40, 3): kept[n] = made(n + 0.3, n)\n"
        "print(before, all(bool((t == n).all()) for n, t in kept.items()), bool((small == 1).all()))\n"
        "grown = made(2).resize_(4 * MIB); grown.zero_(); print(float(grown.sum()))"
    )
    assert found == "0 True True\n0.0"


def test_operations_that_free_by_the_address_and_the_profiler():
    found = result(
        "from torch.profiler import profile, ProfilerActivity\n"
        "layer = torch.nn.Linear(1024, 1024).bfloat16(); x = torch.randn(1024, 1024, dtype=torch.bfloat16)\n"
        "for _ in range(3): layer(x).float().sum().backward()\n"
        "with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: x = made(5); del x\n"
        "sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']\n"
        "print(max(sizes) == 5 * MIB == -min(sizes), layer.weight.grad.isfinite().all().item())"
    )
    assert found.splitlines()[-1] == "True True"


def test_a_child_of_a_fork_allocates():
    """While other threads of the parent do."""
    found = result(
        "import threading\n"
        "on, few = made(1).sum() > 0, torch.ones(9)  # PyTorch's OpenMP and first calls have locks of their own\n"
        "def churn():\n"
        "    while on: torch.empty(MIB)\n"
        "threads = [threading.Thread(target=churn) for _ in range(2)]\n"
        "for one in threads: one.start()\n"
        "codes = []\n"
        "for _ in range(20):\n"
        "    child = os.fork()\n"
        "    if not child: os._exit(torch.empty(MIB)[:9].copy_(few).sum().item() != 9.0)\n"
        "    codes.append(os.waitpid(child, 0)[1])\n"
        "on = False\n"
        "for one in threads: one.join()\n"
        "print(set(codes))"
    )
    assert found == "{0}"


def test_without_a_compiler_all_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(pages, "_loaded", pages._loaded.__wrapped__)  # another test may have loaded it
    assert "no C++ compiler" in pages.use.__wrapped__()
    assert pages.held() == (0, 0)
    pages.release()
    assert not os.listdir(tmp_path) and build.PAGES.files[0].is_file()
