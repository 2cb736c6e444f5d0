"""A job of SLURM is started again where a signal of SLURM's ended its run."""

import json
import os
import signal

import pytest

from fastres.cli import main
from fastres.train import Trainer

RUN = (
    "train --model resnet8 --data synthetic --limit-train 64 --limit-test 20 --batch-size 16 --image-size 16 --epochs 2"
)
RUN += " --device cpu --precision fp32 --backend eager --requeue"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A stand-in for scontrol, which notes what it is asked; what it says of a job is in ``state``."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "state").write_text("JobId=7 JobState=RUNNING Reason=None")
    noted = tmp_path / "calls"
    program = tmp_path / "bin" / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {noted}\nif [ $1 = show ]; then cat {tmp_path}/state; exit; fi\n'
        f"[ -e {tmp_path}/broken ] && echo 'Requested operation not supported' >&2 && exit 1\nexit 0\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return lambda: noted.read_text().splitlines() if noted.exists() else []


def stopped(monkeypatch, number: int, argv: list[str]) -> int:
    """The exit status of a run that gets a signal in its third step."""
    real = Trainer.train_step

    def step(self, *batch):
        real(self, *batch)
        if self.step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        return main(argv)


def test_a_job_goes_on_where_it_was_stopped(tmp_path, calls, monkeypatch, capsys):
    argv = [*RUN.split(), "--out", str(tmp_path / "run")]
    assert stopped(monkeypatch, signal.SIGUSR1, argv) == 128 + signal.SIGUSR1
    assert calls() == ["show job 7", "requeue 7"]
    err = capsys.readouterr().err
    assert "stopped by SIGUSR1 after step 3 of 8" in err and "job 7 is requeued" in err and err.count("\n") == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(argv) == 0 and len(calls()) == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]


@pytest.mark.parametrize(
    "number, state, asked, words",
    [
        (signal.SIGINT, "RUNNING", [], "go on with"),
        (signal.SIGTERM, "CANCELLED", ["show job 7"], "job 7 was cancelled and is not requeued"),
        (
            signal.SIGTERM,
            "broken",
            ["show job 7", "requeue 7"],
            "could not be requeued (Requested operation not supported)",
        ),
    ],
)
def test_jobs_that_do_not_start_again(tmp_path, calls, monkeypatch, capsys, number, state, asked, words):
    (tmp_path / "state").write_text(f"JobState={state}")
    if state == "broken":
        (tmp_path / "broken").touch()
    assert stopped(monkeypatch, number, [*RUN.split(), "--out", str(tmp_path / "run")]) == 128 + number
    err = capsys.readouterr().err
    assert calls() == asked and words in err and err.count("\n") == 1


def test_where_it_would_do_nothing(tmp_path, calls, monkeypatch, capsys):
    assert main(RUN.split()) == 2
    assert "--requeue needs --out FOLDER" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert main([*RUN.split(), "--out", str(tmp_path / "run")]) == 2
    assert "--requeue does nothing outside of a job of SLURM" in capsys.readouterr().err


def test_a_sweep_is_requeued_as_a_whole(tmp_path, calls, monkeypatch, capsys):
    argv = ["sweep", *RUN.split()[1:], "--seeds", "1", "--out", str(tmp_path / "runs")]
    assert stopped(monkeypatch, signal.SIGUSR1, argv) == 128 + signal.SIGUSR1
    assert calls() == ["show job 7", "requeue 7"] and "job 7 is requeued" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(argv) == 0 and len(calls()) == 2
