"""A job of SLURM that ends before its run does is started again by `scontrol`, where that is asked for."""

from __future__ import annotations

import os
import re
import signal
import subprocess

from fastres.errors import FastresError

# What SLURM sends: SIGTERM before it takes machines away or ends a job, what `--signal` names before the time limit,
# the limit of processor time. A terminal's Ctrl-C and hang-up are a user's.
SIGNALS = frozenset(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name)
)
_SECONDS = 30


def check_requeue(out: str | None) -> None:
    """Refuse the option where nothing would come of it.

    Args:
        out: the run's folder, as it was named; None: a new one at each start.

    Raises:
        FastresError: outside of SLURM, or where the job that starts again could not find its run.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise FastresError("--requeue does nothing outside of a job of SLURM: start with sbatch, or leave it out")
    if out is None:
        raise FastresError("--requeue needs --out FOLDER: the job that starts again finds its checkpoint there")


def requeue(signum: int) -> str | None:
    """Put this process' job back into the queue, if a signal of SLURM's ended it; in a few words what came of it.

    A job that somebody has cancelled stays so.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or signum not in SIGNALS:
        return None
    try:
        state = re.search(r"\bJobState=(\w+)", _scontrol("show", "job", job))
        if state and state[1] == "CANCELLED":
            return f"job {job} was cancelled and is not requeued"
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        return f"job {job} could not be requeued ({' '.join(words.split())}): submit it again, it goes on"
    return f"job {job} is requeued and goes on"


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout
