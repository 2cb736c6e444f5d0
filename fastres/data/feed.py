"""Images that worker processes decode ahead of the training, by PyTorch's DataLoader, in an order that is given."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fastres.atomic import warn_once
from fastres.data.dataset import DataError, Split
from fastres.data.decode import Fault, reason, unreadable
from fastres.data.files import FileSplit
from fastres.data.views import Views

PIECE = 4 << 20  # bytes of images that a worker hands over at a time
AHEAD = 2  # batches that are ready before they are wanted
MOST_WORKERS = 16
PR_SET_PDEATHSIG = 1  # of Linux' prctl
SHARED = "/dev/shm"  # what workers hand images over in; small in containers


def default_workers(device: torch.device) -> int:
    """Processes that decode for a rank: a GPU leaves it the machine's cores; on a CPU training needs them itself."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    cores = len(os.sched_getaffinity(0)) // ranks
    return max(1, min(MOST_WORKERS, cores if device.type == "cuda" else cores // 4))


class Feed:
    """The images of a split as uint8 batches on a device, decoded ahead by worker processes.

    An image depends on its number and the epoch alone, so that neither the number of workers nor where an epoch was
    begun changes a bit. Workers are forked: they share the split's memory and never touch a GPU.

    Args:
        split: images in memory or in files.
        workers: processes; 0: images are made when they are wanted, by this one.
        batch: images that are wanted at a time, about.
        views: what is shown of the images, if not they themselves.
        persistent: whether the workers wait for the next epoch, or end.

    ``waited``: seconds for which images were not ready when they were wanted.
    """

    def __init__(
        self,
        split: Split | FileSplit,
        device: torch.device,
        workers: int,
        batch: int,
        persistent: bool = True,
        views: Views | None = None,
    ):
        self.split, self.device, self.waited, self._views = split, device, 0.0, views
        height, width = views.size if views is not None else split.size
        image = height * width * 3
        self._piece = max(1, min(256, PIECE // image, batch))
        self._plan: list[list[int]] = []
        self._options: dict = {}
        self.workers = workers
        if workers:
            ahead = max(2, math.ceil(AHEAD * batch / self._piece / workers))
            self.workers = _that_fit(workers, ahead * self._piece * image)
            self._options = dict(prefetch_factor=ahead, persistent_workers=persistent, multiprocessing_context="fork")
        self._loader: DataLoader | None = None

    def batches(self, parts: Sequence[Tensor], epoch: int) -> Iterator[Tensor]:
        """For each of ``parts``, numbers of images int64 [B], the images as they are seen in an epoch: uint8
        [B, 3, H, W] in channels_last memory format on the device.

        Raises:
            DataError: for files that can no longer be read, or a worker that was killed.
        """
        self._plan[:] = [[epoch, *piece.tolist()] for part in parts for piece in part.split(self._piece)]
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # workers touch no lock of other threads
            warnings.filterwarnings("ignore", ".*worker processes", UserWarning)  # so many were asked for
            if self._loader is None:
                self._loader = DataLoader(
                    _Items(self.split, self._views), batch_sampler=_Plan(self._plan), collate_fn=_as_it_is,
                    generator=torch.Generator(),  # else it would draw a seed from the process' own
                    num_workers=self.workers, pin_memory=self.device.type == "cuda",
                    worker_init_fn=partial(_begin, os.getpid()), **self._options,
                )  # fmt: skip
            pieces = iter(self._loader)
        for part in parts:
            ready = [self._next(pieces) for _ in part.split(self._piece)]
            rows = torch.cat([piece.to(self.device, non_blocking=True) for piece in ready])
            self.waited += time.perf_counter() - start
            yield rows.permute(0, 3, 1, 2)
            start = time.perf_counter()

    def _next(self, pieces: Iterator) -> Tensor:
        try:
            images, faults = next(pieces)
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that decodes images was killed, by whom PyTorch does not say: where memory was short, lower "
                "--workers"
            ) from error
        if faults:
            raise unreadable([Fault(*fault) for fault in faults])
        return images

    def close(self) -> None:
        """End the workers; an epoch that begins later has new ones."""
        self._loader = None


class _Plan:
    """The lists of numbers that are wanted next; the loader asks anew in each epoch."""

    def __init__(self, plan: list[list[int]]):
        self._plan = plan

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(self._plan))

    def __len__(self) -> int:
        return len(self._plan)


class _Items(TorchDataset):
    """The work of a worker: uint8 [n, H, W, 3] for an epoch and n numbers, and the files that could not be read."""

    def __init__(self, split: Split | FileSplit, views: Views | None):
        self._split, self._views = split, views

    def __getitems__(self, key: list[int]) -> tuple[Tensor, list[tuple[str, str]]]:
        epoch, *numbers = key
        split, views = self._split, self._views
        if isinstance(split, Split) and views is None:
            return split.sample(torch.tensor(numbers)).permute(0, 2, 3, 1), []
        size = split.size if views is None else views.size
        images, faults = np.empty((len(numbers), *size, 3), np.uint8), []
        for slot, number in enumerate(numbers):
            try:
                images[slot] = split.square(number) if views is None else views(number, epoch)
            except Exception as error:  # Pillow's decoders raise many types on damaged files
                if isinstance(split, Split):
                    raise
                faults.append((split.files.where(number), reason(error)))
        return torch.from_numpy(images), faults


def _as_it_is(piece: Any) -> Any:
    return piece


def _begin(parent: int, worker: int) -> None:
    """A worker leaves signals to the process that it works for, as a terminal or a batch system sends them to all. Of
    SIGTERM it heeds that process' own alone, and it ends with it, so that no connection of a killed rank stays open.
    Pillow's warnings were given when all images were decoded first.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(0)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_heed_parent, args=(parent,), daemon=True).start()
    warnings.simplefilter("ignore")


def _heed_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _that_fit(workers: int, each: int) -> int:
    """As many workers as shared memory has room for, each for so many bytes; at least one."""
    try:
        free = shutil.disk_usage(SHARED).free
    except OSError:
        return workers
    fit = max(1, min(workers, int(free / 1.5) // max(each, 1)))
    if fit < workers:
        warn_once(
            f"{SHARED} has {free >> 20} MiB free, enough for {fit} of {workers} decoding processes: make it larger "
            "(docker: --shm-size)"
        )
    return fit
