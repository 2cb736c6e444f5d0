"""Stand-ins on a CPU for what only a GPU has, CUDA graphs and some implementations, so that dry runs run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from bench.stages import parts
from fastres.measure import peers, step
from fastres.ops import aten, select
from fastres.ops.library import LibraryConvolutions
from fastres.train import graph


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Every peer runs on a CPU: a graph's replay is the step itself, Triton's passes are ATen's."""
    with ExitStack() as stack:
        for target, name, new in (
            (graph, "side_stream", lambda device: object()),
            (graph, "aside", lambda stream: nullcontext()),
            (graph, "record", record),
            (step, "forced", forced),
            (parts, "forced", forced),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield


def record(call: Callable[[], Any], stream: object) -> tuple[Callable[[], None], Any]:
    """`graph.record` of a step that returns a tensor, or None: nothing runs before the replay."""
    result = torch.zeros(())

    def replay() -> None:
        found = call()
        if found is not None:
            result.copy_(found)

    return replay, result


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """`peers.forced`, but Triton's kernels are ATen's functions, also around the library's convolutions."""
    if implementation not in ("library", "triton"):
        with peers.forced(implementation):
            yield
        return
    chosen = select.Primitives({"library": _LIBRARY, "aten": aten} if implementation == "library" else {"aten": aten})
    original = select._primitives
    with (
        select.implementation("aten"),
        mock.patch.object(select, "_primitives", lambda name: chosen if name == "aten" else original(name)),
    ):
        yield


_LIBRARY = LibraryConvolutions(aten.moments, aten.bn_add_relu, aten.bn_backward_apply, aten.bn_sums)
