"""Data-parallel training under ``torchrun``: which rank this process is, and all that the ranks tell one another."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastres.errors import FastresError
from fastres.train.launch import Launch, agent, slurm_job
from fastres.train.signals import StopRequest

T = TypeVar("T")
# PyTorch's wrapper would send rank 0's running statistics before every step; its option has two names.
_OPTIONS = signature(DistributedDataParallel).parameters
_ADDRESS = "fastres: rank 0's store"  # key of torchrun's store
_PATIENCE = timedelta(minutes=10)  # for rank 0 to come
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


class LostRank(FastresError):
    """Another rank of the job ended, so that this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one network together; by default this one alone.

    All ranks call the methods that exchange something, in the same order.

    Args:
        rank, count: this process and how many there are.
        local_rank: this process on its own machine.
        launch: what started them all.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    launch: Launch = Launch()

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns on rank 0, the only one that calls it; a plain value or tensors on the CPU."""
        values = [make() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return cast(T, values[0])

    def local_first(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns, on each machine's first rank before the others: they find its cache filled."""
        if self.local_rank == 0:
            made = make()
            self._wait()
            return made
        self._wait()
        return make()

    def _wait(self) -> None:
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        return mine if self.count == 1 else bool(self.total(torch.tensor(int(mine))))

    def others_than_first(self, value: str) -> list[int]:
        """The ranks whose value is not rank 0's."""
        differs = torch.zeros(self.count, dtype=torch.int64)
        differs[self.rank] = self.of_first(lambda: value) != value
        return self.total(differs).nonzero().flatten().tolist()

    def wrap(self, network: nn.Module, sync_bn: bool) -> nn.Module:
        """The network with rank 0's weights, and gradients that are averaged over the ranks as backward makes them.

        Args:
            sync_bn: whether its BatchNorms become ``nn.SyncBatchNorm``, in place.
        """
        if self.count == 1:
            return network
        options: dict[str, Any] = {"gradient_as_bucket_view": True, _BUFFERS: False}
        wrapped = DistributedDataParallel(network, **options)
        if sync_bn:  # not before: on CPUs PyTorch's wrapper refuses it, though the fused operations have it there
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return wrapped

    def without_exchange(self, network: nn.Module) -> Any:
        """Context in which a `wrap`-ped network only accumulates gradients."""
        return nullcontext() if self.count == 1 else cast(DistributedDataParallel, network).no_sync()

    @torch.no_grad()
    def average_buffers(self, network: nn.Module) -> None:
        """Give all ranks the mean of their running statistics."""
        buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        if self.count > 1 and buffers:
            mean = self.total(torch.cat([buffer.flatten() for buffer in buffers])) / self.count
            for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    @contextmanager
    def going_on(self, folder: Path) -> Iterator[None]:
        """Context in which a `LostRank` names the run's folder."""
        try:
            yield
        except RuntimeError as error:
            self.raise_lost(error, str(folder))

    def raise_lost(self, error: RuntimeError, folder: str = "FOLDER") -> NoReturn:
        """Raise `LostRank` in place of an error of an exchange, else the error itself."""
        if self.count == 1 or not _is_of_exchange(error):
            raise error
        raise LostRank(
            f"rank {self.rank} of {self.count} lost contact with the others: one of them has ended. The last "
            f"checkpoint is whole: go on with `torchrun ... -m fastres.cli train --resume {folder}`"
        ) from error

    def stop_request(self, at_once: Callable[[int], None]) -> StopRequest:
        """A `StopRequest` whose ``signum`` and ``save`` are the same on all ranks."""
        return StopRequest(at_once) if self.count == 1 else _JointStopRequest(at_once)


ALONE = Ranks()


class _JointStopRequest(StopRequest):
    """`poll` exchanges signals without a wait: it tells what all ranks knew at the call before."""

    REPEATED = 10.0  # seconds in which a second signal is torchrun's repetition of a terminal's Ctrl-C, and no order

    def __init__(self, at_once: Callable[[int], None]):
        super().__init__(at_once)
        self._noted = torch.zeros(2, dtype=torch.int64)  # signal, whether to save
        self._exchange: tuple[dist.Work, Tensor] | None = None
        self._first = 0.0

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._noted[0]:
            self._noted[0], self._first = number, time.monotonic()
        elif time.monotonic() - self._first > self.REPEATED:
            self._at_once(number)

    def poll(self, save: bool = False) -> None:
        """See the class."""
        if self._exchange is not None:
            work, known = self._exchange
            work.wait()
            self.signum, self.save = int(known[0]) or None, bool(known[1])
        self._noted[1] = save
        noted = self._noted.clone()
        self._exchange = dist.all_reduce(noted, dist.ReduceOp.MAX, async_op=True), noted


class Onlooker:
    """The run folder as all ranks but the first see it: they write nothing there."""

    def __init__(self, path: Path):
        self.path, self.last, self.best = path, path / "last.pt", path / "best.pt"

    def _nothing(self, *_: Any) -> Any:
        pass

    begun = load = save = save_best = best_epoch = restore_rows = close = _nothing
    write_config = write_metrics = write_events = _nothing
    write_picture = write_file = write_curves = _nothing


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started, joined over gloo and on GPUs NCCL; this process alone without it.

    Raises:
        FastresError: where the ranks cannot meet.
        LostRank: from inside the context, in place of PyTorch's error, where an exchange fails as a rank has ended.
    """
    count, own_agent = int(os.environ.get("WORLD_SIZE", 1)), agent()
    if count == 1:
        yield Ranks(launch=Launch((own_agent,) if own_agent else (), *slurm_job()))
        return
    rank = int(os.environ["RANK"])
    try:
        store, *_ = next(rendezvous("env://"))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=_own_store(rank, store),
            rank=rank,
            world_size=count,
        )
        agents: list[Any] = [None] * count
        dist.all_gather_object(agents, own_agent)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FastresError(f"rank {rank} of {count} cannot meet the others ({reason}): start with torchrun") from error
    launch = Launch(tuple(dict.fromkeys(filter(None, agents))), *slurm_job())
    ranks = Ranks(rank, count, int(os.environ.get("LOCAL_RANK", rank)), launch)
    try:
        yield ranks
    except RuntimeError as error:
        ranks.raise_lost(error)
    dist.destroy_process_group()  # after an error it might wait for ranks that have ended


def _own_store(rank: int, shared: dist.Store) -> dist.Store:
    """A store that no earlier start of the job has written to: rank 0's process serves it.

    ``torchrun`` keeps one store for all starts, with the addresses of ranks that have ended; those that take them for
    the others' wait without end. Its count of restarts cannot tell starts apart: each machine has its own, of its own
    failures, and another machine's joining does not count. What the former rank 0 left is known by its dead port.

    Args:
        shared: where rank 0 says where its store is.

    Raises:
        RuntimeError: where rank 0 does not come.
    """
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store, token = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False), uuid.uuid4().hex
        store.set(token, "")
        shared.set(_ADDRESS, f"{store.port} {token}")
        return store
    deadline = time.monotonic() + _PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        port, token = shared.get(_ADDRESS).decode().split()
        try:
            socket.create_connection(
                (host, int(port)), timeout=5
            ).close()  # PyTorch would print a dead port's stack trace
            store = dist.TCPStore(
                host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
            )
            if store.check([token]):
                store.set_timeout(dist.default_pg_timeout)
                return store
        except (OSError, dist.DistError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"rank 0 was not at {host}:{port} for {_PATIENCE}")


def rank_device(device: str, ranks: Ranks) -> str:
    """``--device`` for this rank: each one of a machine has a GPU of its own.

    Raises:
        FastresError: where one GPU is named for several ranks.
    """
    if ranks.count == 1 or device == "cpu":
        return device
    if device.startswith("cuda:"):
        raise FastresError(f"--device {device} is one GPU for {ranks.count} ranks: write --device cuda")
    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{ranks.local_rank}" if device in ("auto", "cuda") else device


def _is_of_exchange(error: Exception) -> bool:
    """Whether gloo, NCCL or the store raised it: gloo's errors have no type of their own."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset by peer"))
