"""Which launch started this process: a run may be gone on with unasked only by the launch that began it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A call of ``torchrun``, whose restarts and changes of machines belong to it, and a job of SLURM, which may be
    requeued.

    Args:
        agents: ``torchrun``'s own processes on all machines; as machines join and leave, some of them stay.
        slurm: the job's cluster and number; None: there is none.
        requeued: whether SLURM has started the job before.
    """

    agents: tuple[str, ...] = ()
    slurm: str | None = None
    requeued: bool = False

    def facts(self) -> dict[str, Any]:
        """What a run that it begins, or goes on with, remembers of it."""
        return {"agents": list(self.agents), "slurm": self.slurm}

    def began(self, facts: Any) -> bool:
        """Whether a run that remembers these `facts` is this launch's own.

        A job that was not requeued has begun nothing before, whatever other commands of its script did.
        """
        if not isinstance(facts, dict):
            return False
        agents = facts.get("agents")
        if isinstance(agents, list) and any(agent in agents for agent in self.agents):
            return True
        return self.requeued and self.slurm is not None and facts.get("slurm") == self.slurm


def slurm_job() -> tuple[str | None, bool]:
    """The job of SLURM that this process is of, and whether it was requeued."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    name = f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job}".strip() if job else None
    return name, restarts.isdecimal() and int(restarts) > 0


def agent() -> str | None:
    """The ``torchrun`` process that started this one, told apart from all that ever ran; None: there is none.

    The id that ``torchrun --rdzv-id`` was given would not do: another launch may have the same.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job is None:
        return None
    number = os.getppid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[19]  # field 22 of proc(5)
    except (OSError, IndexError):
        boot, started = os.uname().nodename, ""
    return f"{job} {boot} {number} {started}".strip()
