"""CUDA graphs of whole steps: warm-up and recording on one stream, so that they share its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from fastres.ops.graphs import as_one_graph

T = TypeVar("T")
WARMUP = 3  # steps without a graph: kernels are chosen and the optimizer makes its state


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for all steps that a graph will hold: every stream has a pool of memory of its own."""
    return torch.cuda.Stream(device)


@contextmanager
def aside(stream: torch.cuda.Stream) -> Iterator[None]:
    """What is inside runs on the stream, as recording does, so that no state belongs to the default stream."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream), as_one_graph():
        yield
    current.wait_stream(stream)


def record(step: Callable[[], T], stream: torch.cuda.Stream) -> tuple[Callable[[], None], T]:
    """A step as one CUDA graph, recorded but not yet run: its replay, and its result, which each replay writes anew.

    The stream, of the current device, is given as PyTorch's own for recording may be of another device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), as_one_graph():
        result = step()
    return graph.replay, result
