"""Faults done to runs on purpose: kill -9 at random moments and before file operations, full disk, two runs in one
folder, clock jumps, folders that are no run's or another's, lost ranks, a rank with other data.

Each function tries one fault and returns a row: how often it was tried, and how it ended.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from fastres.errors import FastresError
from fastres.train import Trainer
from fastres.train.checkpoint import load_checkpoint
from fastres.train.distributed import Onlooker, Ranks
from fastres.train.run_folder import RunFolder
from faults import hostile, lost_ranks
from faults.child import Child, fit, make_trainer, same_run, stopped_run, table_row, whole_files

FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod", "os.listdir", "os.scandir"}
NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 1 << 14, 1 << 18  # sched.h, mount.h
PAGE = resource.getpagesize()


def kills(folder: Path, times: int, seed: int = 0) -> dict[str, Any]:
    """Kill runs at random moments and resume them until so many kills hit; each must end as one that was left alone."""
    draw = random.Random(seed)
    outcomes: list[str] = []
    Child(os.getpid).end()  # the first one waits for imports
    begin = time.monotonic()
    Child(partial(fit, folder / "whole")).end()
    seconds = time.monotonic() - begin
    whole = load_checkpoint(folder / "whole" / "last.pt")
    while len(outcomes) < times:
        run, text = folder / f"killed-{len(outcomes)}", ""
        status: int | None = -signal.SIGKILL
        while status == -signal.SIGKILL:
            child = Child(partial(fit, run))
            if len(outcomes) < times:
                time.sleep(draw.uniform(0, seconds))
                child.kill()
            status, text = child.end()
            if status == -signal.SIGKILL:
                outcomes.append(whole_files(run))
        if status != 0:
            outcomes.append(f"wrong: status {status}: {text.strip()[-400:]}")
        elif not same_run(load_checkpoint(run / "last.pt"), whole):
            outcomes.append("wrong: a resumed run ended otherwise than the one that was left alone")
        elif left := [file.name for file in run.glob(".*.tmp")]:
            outcomes.append(f"wrong: {left[0]} was left behind")
    return table_row("kill -9 of a run", outcomes)


def limited(run: Path, limit: int) -> None:
    """`fit` where no file may grow beyond a limit in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    fit(run)


def operation(folder: Path, number: int | None) -> None:
    """`fit` of two epochs that ends by SIGKILL before its ``number``-th file operation there; None: prints how many."""
    done, place = [0], str(folder)

    def count(event: str, args: tuple) -> None:
        if event in FILE_EVENTS and any(isinstance(arg, (str, Path)) and str(arg).startswith(place) for arg in args):
            done[0] += 1
            if done[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    fit(folder, epochs=2)
    if number is None:
        print(done[0])


def operations(folder: Path, most: int | None = None) -> dict[str, Any]:
    """Kill a run before each of its file operations and resume it; it must end as one that was left alone.

    Args:
        most: try so many of them, evenly spread; None: all.
    """
    _, text = Child(partial(operation, folder / "whole", None)).end()
    whole, total, outcomes = load_checkpoint(folder / "whole" / "last.pt"), int(text.split()[-1]), []
    step = 1.0 if most is None else max(1.0, total / most)
    for number in dict.fromkeys(int(1 + step * index) for index in range(int(total / step))):
        run = folder / f"before-{number}"
        status, text = Child(partial(operation, run, number)).end()
        if status != -signal.SIGKILL:
            outcomes.append(f"wrong: operation {number} ended with {status}: {text.strip()[-300:]}")
            continue
        found = whole_files(run)
        status, text = Child(partial(fit, run, epochs=2)).end()
        if status != 0:
            found = f"wrong: operation {number}: status {status}: {text.strip()[-300:]}"
        elif not same_run(load_checkpoint(run / "last.pt"), whole):
            found = f"wrong: operation {number}: the resumed run ended otherwise"
        elif steps_shown(run) != steps_shown(folder / "whole"):
            found = f"wrong: operation {number}: TensorBoard lacks an epoch"
        elif left := [file.name for file in run.glob(".*.tmp")]:
            found = f"wrong: operation {number}: {left[0]} was left behind"
        outcomes.append(found)
        shutil.rmtree(run)
    return table_row("kill -9 before a file operation", outcomes)


def steps_shown(run: Path) -> list[int]:
    """The steps of the epochs that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(run)).Reload().Scalars("accuracy/val")]


def hostile_folders(folder: Path) -> dict[str, Any]:
    """Start and resume where one must not; what lies there stays as it is."""
    outcomes, mine = [], folder / "mine"
    mine.write_text("precious")
    for name in ("run", "other"):
        Child(partial(fit, folder / name, epochs=1)).end()
    for number, make in enumerate(hostile.STRANGE.values()):
        place = folder / f"strange-{number}"
        place.mkdir()
        make(place, folder / "other", mine)
        outcomes.append(refused(place, mine, resume=False))
    for number, make in enumerate(hostile.CHANGED.values()):
        place = shutil.copytree(folder / "run", folder / f"changed-{number}")
        make(place, folder / "other", mine)
        outcomes.append(refused(place, mine, resume=True))
    outcomes.append(
        Child(partial(fit, folder / "run", epochs=2, other=True)).outcome("was trained on", "give the former")
    )
    return table_row("hostile folder", outcomes)


def refused(place: Path, mine: Path, resume: bool) -> str:
    """Whether a run refuses a folder, twice, and leaves it as it is."""
    before = hostile.state(place)
    for _ in range(2):  # a refusal must not become an acceptance on the next try
        found = Child(partial(fit, place, resume=resume, epochs=2)).outcome(str(place))
        if found != "refused":
            return f"wrong: {place.name}: {found}"
    if hostile.state(place) != before or mine.read_text() != "precious":
        return f"wrong: {place.name} was changed"
    return "refused"


def rank_of(number: int, port: int, folder: Path, phase: str | None, other: bool) -> None:
    """A rank of a job; with ``other`` the last one has another label."""

    def make(run: RunFolder | Onlooker, ranks: Ranks) -> Trainer:
        trainer = make_trainer(run, ranks, epochs=2, other=other and number == lost_ranks.RANKS - 1)
        if differing := ranks.others_than_first(trainer.dataset.digest):
            raise FastresError(f"rank {differing[0]} has other images or labels in {folder}")
        return trainer

    lost_ranks.rank(number, port, folder, make, phase)


def job(folder: Path, phase: str | None, other: bool = False) -> list[tuple[int | None, str]]:
    """Exit status and words of each rank."""
    port = lost_ranks.free_port()
    ranks = range(lost_ranks.RANKS)
    return [child.end() for child in [Child(partial(rank_of, number, port, folder, phase, other)) for number in ranks]]


def lost(folder: Path, phases: Sequence[str] = lost_ranks.PHASES) -> dict[str, Any]:
    """Two of three ranks end in each phase: the third says so, and the job goes on from whole files."""
    outcomes = []
    for number, phase in enumerate(phases):
        run = folder / f"lost-{number}"
        status, text = job(run, phase)[0]
        told = status == 2 and text.count("\n") == 1 and ("lost contact" in text or "cannot meet" in text)
        outcomes.append("refused" if told else f"wrong: {phase}: status {status}: {text.strip()[-300:]}")
        outcomes.append(whole_files(run) if run.exists() else "harmless")
        ended = job(run, None)
        whole = all(status == 0 for status, _ in ended) and len(load_checkpoint(run / "last.pt")["history"]) == 2
        outcomes.append("harmless" if whole else f"wrong: {phase}: resumed: {ended}"[:400])
    return table_row("two of three ranks lost", outcomes)


def other_data(folder: Path) -> dict[str, Any]:
    """A rank with another label than the others: all refuse, also when tried again."""
    ended = [end for number in range(2) for end in job(folder / f"other-{number}", None, other=True)]
    return table_row(
        "other data on one rank",
        [
            "refused" if status == 2 and "other images or labels" in text else f"wrong: {status}: {text}"
            for status, text in ended
        ],
    )


def size_limit(folder: Path, steps: int = 8) -> dict[str, Any]:
    """Resume a run whose files may not grow beyond a limit, from nothing to all that it needs."""
    run, outcomes = stopped_run(folder / "full"), []
    before = (run / "last.pt").read_bytes()
    for limit in [0, 100, *(int(1.2 * len(before) * step / steps) for step in range(1, steps + 1))]:
        (run / "last.pt").write_bytes(before)
        outcomes += [Child(partial(limited, run, limit)).outcome("cannot write", str(run)), whole_files(run)]
    return table_row("file-size limit", outcomes)


def mount_small(folder: Path, size: int) -> None:
    """Mount an empty file system of ``size`` bytes over the folder, for this process alone.

    Raises:
        OSError: where the kernel does not let this user.
    """
    libc, ids = ctypes.CDLL(None, use_errno=True), {"uid": os.getuid(), "gid": os.getgid()}
    new_namespaces = CLONE_NEWNS if os.getuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER
    _checked(libc.unshare(new_namespaces))
    if new_namespaces & CLONE_NEWUSER:
        Path("/proc/self/setgroups").write_text("deny")
        for name, number in ids.items():
            Path(f"/proc/self/{name}_map").write_text(f"0 {number} 1")
    _checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    _checked(libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()))


def _checked(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def in_small_file_system(run: Path, place: Path, size: int) -> None:
    """`fit` a copy of the run where all files together have ``size`` bytes; afterwards they are whole, or it raises."""
    mount_small(place, size)
    copy = Path(shutil.copytree(run, place / "run"))
    try:
        fit(copy)
    finally:
        if (found := whole_files(copy)) != "harmless":
            raise RuntimeError(found)


def full_file_system(folder: Path, steps: int = 8) -> dict[str, Any] | None:
    """Resume a run on file systems from as large as it is to three times that; None where none can be mounted."""
    run, place = stopped_run(folder / "small"), folder / "place"
    place.mkdir()
    if Child(partial(mount_small, place, 2**20)).end()[0] != 0:
        return None
    taken = 2**16 + sum(-(-file.stat().st_size // PAGE) * PAGE for file in run.rglob("*"))
    sizes = [int(taken * (1 + 2 * step / steps)) for step in range(steps)]
    outcomes = [
        Child(partial(in_small_file_system, run, place, size)).outcome("cannot write", str(place)) for size in sizes
    ]
    return table_row("full file system", outcomes)


def without_rights(run: Path) -> None:
    """`fit` as a user who may not write what is not theirs."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    fit(run)


def read_only(folder: Path) -> dict[str, Any]:
    """Start, resume and go on with a run in a folder that cannot be written."""
    run, locked = stopped_run(folder / "read-only"), folder / "locked"
    locked.mkdir()
    outcomes = []
    for path, mode in ((locked, 0o555), (run, 0o555), (run, 0o000)):
        path.chmod(mode)
        target = locked / "run" if path is locked else run
        outcomes.append(Child(partial(without_rights, target)).outcome("cannot write", str(path)))
        path.chmod(0o755)
    return table_row("read-only folder", [*outcomes, whole_files(run)])


def two_runs(folder: Path, times: int = 5) -> dict[str, Any]:
    """Runs that start at once in one folder: one trains, the others are told."""
    outcomes = []
    for number in range(times):
        run = folder / f"shared-{number}"
        children = [Child(partial(fit, run, resume=False)) for _ in range(3)]
        ended = sorted(child.outcome(str(run), "choose another --out") for child in children)
        outcomes += ended if ended == ["harmless", "refused", "refused"] else [f"wrong: {ended}"]
        outcomes.append(whole_files(run))
    return table_row("two runs in one folder", outcomes)


def jumping(run: Path, seed: int) -> None:
    """`fit` with a wall clock that tells another year at each look."""
    draw = random.Random(seed)
    with mock.patch("time.time", lambda: draw.uniform(0, 4e9)):
        fit(run)


def clock_jumps(folder: Path, stamps: Sequence[int] = (0, 4102444800), seed: int = 0) -> dict[str, Any]:
    """Runs whose wall clock jumps by years at each look, of files from 1970 and 2100; they must end as any other."""
    outcomes = []
    Child(partial(fit, folder / "steady")).end()
    steady = load_checkpoint(folder / "steady" / "last.pt")
    for stamp in stamps:
        run = stopped_run(folder / f"jumps-{stamp}")
        for file in run.iterdir():
            os.utime(file, (stamp, stamp))

        outcomes.append(Child(partial(jumping, run, seed)).outcome(str(run)))
        history = load_checkpoint(run / "last.pt")["history"]
        if not all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in history):
            outcomes.append("wrong: a time in the metrics is not positive")
        if not same_run(load_checkpoint(run / "last.pt"), steady):
            outcomes.append("wrong: the run ended otherwise than one with a steady clock")
    return table_row("clock jumps", outcomes)
