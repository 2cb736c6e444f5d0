"""Stand-ins on a CPU for what only a GPU has, CUDA graphs and some implementations, so that dry runs run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from bench.stages import parts
from fastres.measure import step
from fastres.ops import implementation
from fastres.train import graph


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Every variant runs on a CPU: a graph's replay is the step itself, Triton's passes are ATen's."""
    with ExitStack() as stack:
        for target, name, new in (
            (graph, "side_stream", lambda device: object()),
            (graph, "aside", lambda stream: nullcontext()),
            (graph, "record", record),
            (step, "implementation", on_cpu),
            (parts, "implementation", on_cpu),
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


def on_cpu(mode: str) -> AbstractContextManager[None]:
    """`fastres.ops.implementation`, but Triton's kernels are ATen's functions."""
    return implementation("aten" if mode == "triton" else mode)
