"""Training with several ranks: the same as with one, whole after a death, and none of it lost in between."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import support_process
import support_ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support_train import tiny_config, tiny_dataset, tiny_split, tiny_trainer

from fastres.arguments import make_parser
from fastres.commands.train import plan
from fastres.data import Augment, Batches, DataError
from fastres.errors import FastresError
from fastres.train import Trainer, distributed
from fastres.train.distributed import LostRank, Onlooker, Ranks, rank_device
from fastres.train.launch import Launch, agent
from fastres.train.run_folder import RunFolder

OPTIONS = dict(model="resnet8", backend="fused", sync_bn=True, crop_pad=1, flip="random", accumulate=2, ema=0.5)


def batches(rank: int, ranks: int, train: bool = True, **options) -> Batches:
    return Batches(
        tiny_split(50 if train else 47, 0), 9, (110.0,) * 3, (60.0,) * 3, Augment(2, "random", cutout=4), train, seed=3,
        share=(rank, ranks), **options,
    )  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_parts_of_all_ranks_are_the_batches(train, ranks):
    """Image for image and augmentation for augmentation, the uneven last batch of two or five images too."""
    whole = list(batches(0, 1, train, drop_last=False).epoch(1))
    parts = [list(batches(rank, ranks, train, drop_last=False).epoch(1)) for rank in range(ranks)]
    assert [len(labels) for _, labels in whole] == [9] * 5 + [5 if train else 2]
    for step, (images, labels) in enumerate(whole):
        at_step = [part[step] for part in parts if step < len(part)]
        sizes = [len(own) for _, own in at_step] + [0] * (ranks - len(at_step))
        assert max(sizes) - min(sizes) <= 1
        for rank, (own_images, own_labels) in enumerate(at_step):
            assert torch.equal(own_images, images[rank::ranks]) and torch.equal(own_labels, labels[rank::ranks])


def spawn(ranks: int, folder, stop_at=None, **changes) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(support_ranks.train, (ranks, port, folder, stop_at, {**OPTIONS, **changes}), nprocs=ranks)


def last(folder) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same_run(folder, other, tolerance: float) -> None:
    for name, value in last(other)["weights"].items():
        torch.testing.assert_close(last(folder)["weights"][name], value, rtol=tolerance, atol=tolerance, msg=name)
    ours, theirs = ([json.loads(line) for line in open(f / "metrics.jsonl")] for f in (folder, other))
    for row, expected in zip(ours, theirs, strict=True):
        for name in ("step", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    views, expected_views = (rows[-1]["tta_accuracy"] for rows in (ours, theirs))
    assert views == (expected_views and pytest.approx(expected_views, abs=tolerance))


def test_ranks_train_what_one_process_trains(tmp_path):
    """Stopped in mid-epoch with two ranks and resumed with four: losses, accuracies, weights, running statistics."""
    one = tiny_trainer(tmp_path / "one", lr=0.01, tta=True, **OPTIONS)
    one.fit()
    spawn(2, tmp_path / "many", stop_at=3, lr=0.01, tta=True)
    assert last(tmp_path / "many")["tally"][2] == 3 * 16
    spawn(4, tmp_path / "many", lr=0.01, tta=True)
    assert_same_run(tmp_path / "many", tmp_path / "one", 2e-3)
    assert (tmp_path / "many" / "best.pt").exists()


def test_two_ranks_resume_bit_for_bit(tmp_path):
    """As the README says; more ranks, and running statistics that are not synchronised, round otherwise."""
    spawn(2, tmp_path / "whole", lr=0.01)
    spawn(2, tmp_path / "part", stop_at=3, lr=0.01)
    spawn(2, tmp_path / "part", lr=0.01)
    ours, theirs = last(tmp_path / "part"), last(tmp_path / "whole")
    for part in ("weights", "average"):
        values, expected = (found[part].get("weights", found[part]) for found in (ours, theirs))
        assert [name for name in expected if not torch.equal(values[name], expected[name])] == []
    assert ours["history"][-1]["val_loss"] == theirs["history"][-1]["val_loss"]


@pytest.mark.parametrize(
    "changes, count, message",
    [
        ({"batch_size": 16}, 3, "multiple of 3"),
        ({"batch_size": 16, "accumulate": 4}, 8, "multiple of 32"),
        ({"batch_size": 4}, 4, "one image"),
        ({"sync_bn": True, "backend": "eager"}, 2, "--backend fused"),
    ],
)
def test_options_that_ranks_cannot_have(tmp_path, changes, count, message):
    with pytest.raises(FastresError, match=message):
        Trainer(tiny_config(**changes), tiny_dataset(), Onlooker(tmp_path), ranks=Ranks(1, count, 1))


def test_more_ranks_than_images():
    with pytest.raises(DataError, match="2 images leaves some of 3 ranks without one"):
        Batches(tiny_split(11, 0), 9, (0.0,) * 3, (1.0,) * 3, drop_last=False, share=(0, 3))


def test_ranks_meet_apart_from_an_earlier_starts(monkeypatch):
    """Whatever an earlier start has left: the port of a process that ended, that of another one, rank 0's own later."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    shared, other = dist.HashStore(), dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = free.getsockname()[1]
    found = {}

    def meet(rank):
        found[rank] = distributed._own_store(rank, shared)

    shared.set(distributed._ADDRESS, f"{dead} some-token")
    late = [threading.Thread(target=meet, args=(rank,)) for rank in (1, 2)]
    for thread in late:
        thread.start()
    time.sleep(1)
    shared.set(distributed._ADDRESS, f"{other.port} some-token")
    time.sleep(1)
    assert not found
    meet(0)
    for thread in late:
        thread.join(60)
    found[1].set("from 1", "a")
    assert found[0].get("from 1") == found[2].get("from 1") == b"a" and not other.check(["from 1"])


def test_a_rank_0_that_never_comes(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(distributed, "_PATIENCE", timedelta(seconds=1))
    other, shared = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), dist.HashStore()
    shared.set(distributed._ADDRESS, f"{other.port} some-token")
    with pytest.raises(RuntimeError, match=f"rank 0 was not at 127.0.0.1:{other.port} for 0:00:01"):
        distributed._own_store(1, shared)


def test_a_lost_rank_names_the_folder(tmp_path):
    ranks = Ranks(1, 3)
    with pytest.raises(LostRank, match=f"rank 1 of 3 lost .* --resume {tmp_path}`$"), ranks.going_on(tmp_path):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")
    with pytest.raises(RuntimeError, match="^out of luck$"), ranks.going_on(tmp_path):
        raise RuntimeError("out of luck")
    with pytest.raises(FastresError, match="^no data about NCCL$"), ranks.going_on(tmp_path):
        raise FastresError("no data about NCCL")


FIRST = Launch(("agent 1", "agent 2"), "cluster 7")


@pytest.mark.parametrize(
    "now, begun",
    [
        (Launch(), False),
        (Launch(("agent 2", "agent 3")), True),  # another machine joined in place of the first one
        (Launch(("agent 3",)), False),  # another call of torchrun, whatever its --rdzv-id
        (Launch((), "cluster 7", requeued=True), True),
        (Launch((), "cluster 7"), False),  # another command of the same job
        (Launch((), "cluster 8", requeued=True), False),
    ],
)
def test_a_launch_goes_on_with_its_own_run_alone(tmp_path, now, begun):
    arguments = make_parser().parse_args(["train", "--out", str(tmp_path), "--model", "resnet8"])
    asked = plan(arguments, Ranks(launch=FIRST))
    assert not asked.begun
    folder = RunFolder(tmp_path)
    folder.write_config(asked.config, {"launch": FIRST.facts()})
    folder.close()
    for _ in range(2):  # a refusal stays one
        again = plan(arguments, Ranks(launch=now))
        assert again.begun is begun
        if not begun:
            with pytest.raises(FastresError, match="already holds a run"):
                again.folder()
    other = make_parser().parse_args(["train", "--out", str(tmp_path), "--model", "resnet8", "--lr", "7"])
    if begun:
        with pytest.raises(FastresError, match=r"holds a run with lr 0.4, not 7.0: choose another --out"):
            plan(other, Ranks(launch=now))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("resnet8", "resnet9"))
    assert not plan(arguments, Ranks(launch=now)).begun


def test_the_launch_of_a_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "same")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with distributed.joined() as ranks:
        assert ranks.launch.slurm == "12" and ranks.launch.requeued and len(ranks.launch.agents) == 1
        assert ranks.launch.began(json.loads(json.dumps(ranks.launch.facts())))
    here = agent()
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert here.startswith("same ") and agent().startswith("same ") and here != agent()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert agent() is None


def test_a_rank_with_other_data_is_named(tmp_path):
    """All ranks refuse, before a step."""
    code = (
        "import os, sys\nfrom fastres import cli, data\nload = data.load\n"
        "def spoilt(*args, **kwargs):\n"
        "    found = load(*args, **kwargs)\n"
        "    found.train.labels[0] ^= int(os.environ['RANK'])\n"
        "    return data.Dataset(**{**vars(found), 'digest': ''})\n"
        "data.load = spoilt\nsys.exit(cli.main(sys.argv[1:]))"
    )
    (tmp_path / "spoilt.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "--max-restarts",
        "1",
    ]
    command += [str(tmp_path / "spoilt.py"), "train", "--out", str(tmp_path / "run"), "--data", "synthetic"]
    command += "--device cpu --image-size 16 --batch-size 12 --epochs 1 --model resnet8 --precision fp32".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=support_process.LIMIT)
    assert done.returncode != 0
    assert (
        done.stderr.count("fastres: error: rank 1 has other images or labels than rank 0, here 'synthetic shapes") == 4
    )
    assert not (tmp_path / "run").exists()


def test_devices_of_ranks(monkeypatch):
    ranks = Ranks(3, 4, 1)
    assert rank_device("cuda", ranks) == "cuda:1" and rank_device("cpu", ranks) == "cpu"
    assert rank_device("cuda:2", Ranks()) == "cuda:2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rank_device("auto", ranks) == "cpu"
    with pytest.raises(FastresError, match="one GPU for 4 ranks"):
        rank_device("cuda:2", ranks)


def test_a_killed_rank_and_elastic_restart(tmp_path):
    """The survivor says what happened, the job goes on from the last checkpoint, and SIGTERM then stops all ranks."""
    folder, output = tmp_path / "run", tmp_path / "output"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--standalone", "-m", "fastres.cli", "train", "--out", str(folder), "--data", "synthetic"]
    command += "--device cpu --limit-train 96 --limit-test 31 --image-size 16 --batch-size 12 --epochs 9999".split()
    command += "--model resnet8 --precision fp32 --no-tta".split()
    with open(output, "w") as file:
        job = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_until(lambda: (folder / "metrics.jsonl").exists() and epochs(folder) >= 2, job)
        os.kill(worker_of(job.pid), signal.SIGKILL)
        wait_until(lambda: output.read_text().count("2 ranks |") == 2, job)
        begun = epochs(folder)
        wait_until(lambda: epochs(folder) > begun, job)
        job.send_signal(signal.SIGTERM)
        job.wait(support_process.LIMIT)
    finally:
        job.kill()
    text = output.read_text()
    assert re.search(rf"rank [01] of 2 lost contact with the others: .* --resume {re.escape(str(folder))}`\n", text)
    assert [row["epoch"] for row in map(json.loads, open(folder / "metrics.jsonl"))] == list(
        range(1, epochs(folder) + 1)
    )
    assert re.search(r"stopped by SIGTERM after step (\d+)", text)
    assert int(re.search(r"stopped by SIGTERM after step (\d+)", text)[1]) == last(folder)["step"]


def epochs(folder) -> int:
    return len(open(folder / "metrics.jsonl").readlines())


def worker_of(pid: int) -> int:
    """The last process that ``pid`` started."""
    return int(open(f"/proc/{pid}/task/{pid}/children").read().split()[-1])


def wait_until(condition, job, seconds: float = support_process.LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
