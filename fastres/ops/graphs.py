"""Whether what runs will be replayed as one CUDA graph: then the host's time between launches does not count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0  # for the whole process, as backward has threads of its own


@contextmanager
def as_one_graph() -> Iterator[None]:
    """Inside is the warm-up or the recording of a CUDA graph: operations take what is fastest on the GPU alone.

    Without it they also count what the host needs to launch it. Warm-up and recording must both be inside, or both not:
    a library's first call may not be recorded.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_one_graph() -> bool:
    """Whether this is inside `as_one_graph`."""
    return _depth > 0
