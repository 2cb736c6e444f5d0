"""What was kept of late."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

T = TypeVar("T")


class Recent(OrderedDict[Hashable, T]):
    """Values by key, of which any thread keeps further ones and the oldest go."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def keep(self, key: Hashable, value: T, most: int) -> None:
        """Keep a value, and of all of them the ``most`` newest."""
        with self._lock:
            self[key] = value
            self.move_to_end(key)
            while len(self) > most:
                self.popitem(last=False)
