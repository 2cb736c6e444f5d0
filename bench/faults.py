"""Faults on purpose: kill -9 at random moments, full disk, read-only folder, two runs in one, clock jumps, damaged files.

    python -m bench.faults --kills 200 --damages 500

A row of the printed table counts how often a fault was tried and how it ended: refused with a message of one line that
names the file, harmless (the same data, the same run), or wrong, of which there should be none. Runs are of a small
network on drawn images, each in a process of its own that is forked from this one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.tensorboard  # noqa: F401  slow to import, so not in every forked process

from bench import damage
from bench.record import RESULTS, write_results
from bench.tables import markdown
from fastres.data.dataset import make_dataset
from fastres.data.synthetic import CLASSES, synthetic_split
from fastres.errors import FastresError
from fastres.train import TrainConfig, Trainer
from fastres.train.checkpoint import load_checkpoint
from fastres.train.run_folder import RunFolder, saved_config

EPOCHS = 6
NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 1 << 14, 1 << 18  # sched.h, mount.h
PAGE = resource.getpagesize()
PATIENCE = 300  # seconds after which a process that hangs is ended, which counts as wrong
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["bench.faults"])
OUTCOMES = ("refused", "harmless", "wrong")


def fit(folder: Path, resume: bool = True) -> None:
    """Train ResNet-20 on 48 drawn images of 8x8 to the end, going on where the folder's run stopped."""
    config = TrainConfig().replace(
        model="resnet20", image_size=8, epochs=EPOCHS, batch_size=16, device="cpu", precision="fp32"
    )
    split = synthetic_split(48)
    dataset = make_dataset(split, split, CLASSES, "drawn shapes")
    run = RunFolder(folder, resume=resume)
    try:
        trainer = Trainer(config, dataset, run, say=lambda line: None)
        if run.last.exists():
            trainer.resume()
        run.write_config(config, {})
        trainer.fit()
    finally:
        run.close()


class Child:
    """A process that does some work; an error of the user's ends it with 2 and one line, as the command line's.

    It is forked from one that has only imported modules: after a backward, autograd refuses to run in a fork.

    Args:
        work: a function of a module, or a `partial` of one.
    """

    def __init__(self, work: Callable[[], Any]):
        self._output, there = _PROCESSES.Pipe(duplex=False)
        self.process = _PROCESSES.Process(target=_do, args=(work, there))
        self.process.start()
        there.close()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def end(self) -> tuple[int | None, str]:
        """Its exit status, negative for the signal that ended it, and what it printed."""
        text = ""
        with contextlib.suppress(EOFError):
            text = self._output.recv()
        self.process.join()
        return self.process.exitcode, text

    def outcome(self, *words: str) -> str:
        """``harmless`` where it ended well, ``refused`` where it complained in one line that has the words."""
        status, text = self.end()
        if status == 0:
            return "harmless"
        if status == 2 and text.count("\n") == 1 and all(word in text for word in words):
            return "refused"
        return f"wrong: status {status}: {text.strip()[-400:]}"


def _do(work: Callable[[], Any], output: Connection) -> None:
    signal.alarm(PATIENCE)
    torch.set_num_threads(1)
    status, text = 1, io.StringIO()  # not a file: its size may be limited
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            work()
            status = 0
        except FastresError as error:
            print(f"fastres: error: {error}")
            status = 2
        except Exception:
            traceback.print_exc()
    output.send(text.getvalue())
    os._exit(status)


def table_row(fault: str, outcomes: list[str]) -> dict[str, Any]:
    """How often each outcome was, and why it was wrong."""
    kinds = [outcome.split(":")[0] for outcome in outcomes]
    reasons = sorted({outcome for outcome in outcomes if outcome.startswith("wrong")})
    counts = {kind: kinds.count(kind) for kind in OUTCOMES}
    return {"fault": fault, "tried": len(outcomes), **counts, "reasons": reasons[:20]}


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


def whole_files(run: Path) -> str:
    """Whether every file that a run left can be read."""
    try:
        for name in ("last.pt", "best.pt"):
            if (run / name).exists():
                load_checkpoint(run / name)
        if (run / "config.json").exists():
            saved_config(run)
        if (run / "metrics.jsonl").exists():
            assert (run / "metrics.jsonl").read_text().endswith("}\n"), "metrics.jsonl ends in half a row"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    return "harmless"


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two checkpoints have the same weights, optimizer state and accuracies, bit for bit."""

    def facts(content: dict[str, Any]) -> list[Any]:
        rows = [(row["epoch"], row["train_loss"], row["val_accuracy"]) for row in content["history"]]
        return [content["weights"], content["optimizer"]["state"], rows]

    return damage.same(facts(one), facts(other))


def stopped_run(folder: Path) -> Path:
    """The folder of a run that was killed behind its first epoch."""
    child = Child(partial(fit, folder))
    while not (folder / "metrics.jsonl").exists():
        if not child.process.is_alive():
            raise RuntimeError(f"a run ended before its first epoch: {child.end()}")
        time.sleep(0.005)
    child.kill()
    child.end()
    return folder


def limited(run: Path, limit: int) -> None:
    """`fit` where no file may grow beyond a limit in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    fit(run)


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


def in_small_room(run: Path, room: Path, size: int) -> None:
    """`fit` a copy of the run where all files together have ``size`` bytes; afterwards they are whole, or it raises."""
    mount_small(room, size)
    copy = Path(shutil.copytree(run, room / "run"))
    try:
        fit(copy)
    finally:
        if (found := whole_files(copy)) != "harmless":
            raise RuntimeError(found)


def full_file_system(folder: Path, steps: int = 8) -> dict[str, Any] | None:
    """Resume a run on file systems from as large as it is to three times that; None where none can be mounted."""
    run, room = stopped_run(folder / "small"), folder / "room"
    room.mkdir()
    if Child(partial(mount_small, room, 2**20)).end()[0] != 0:
        return None
    taken = 2**16 + sum(-(-file.stat().st_size // PAGE) * PAGE for file in run.rglob("*"))
    sizes = [int(taken * (1 + 2 * step / steps)) for step in range(steps)]
    outcomes = [Child(partial(in_small_room, run, room, size)).outcome("cannot write", str(room)) for size in sizes]
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


def damages(folder: Path, times: int, seed: int = 0) -> list[dict[str, Any]]:
    """Flip, cut, drop and repeat bytes of every kind of file that is read."""
    return [
        table_row(f"damaged {kind}", try_kind(folder / kind.replace(" ", "-"), times, seed))
        for kind, try_kind in damage.KINDS.items()
    ]


def main() -> None:
    """Try all faults, print the table and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="random moments [200]")
    parser.add_argument("--damages", type=int, default=500, help="of each kind of file [500]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        rows = [kills(folder, args.kills, args.seed), size_limit(folder), read_only(folder), two_runs(folder)]
        if (row := full_file_system(folder)) is not None:
            rows.append(row)
        rows += [clock_jumps(folder, seed=args.seed), *damages(folder, args.damages, args.seed)]
    columns = ("fault", "tried", *OUTCOMES)
    print(markdown(columns, [[str(row[column]) for column in columns] for row in rows]))
    for row in rows:
        for reason in row["reasons"]:
            print(f"{row['fault']}: {reason}")
    write_results(args.out, {"seed": args.seed, "faults": rows})


if __name__ == "__main__":
    main()
