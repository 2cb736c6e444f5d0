"""What a walk did, as a list of calls whose arguments are known by where they lie, not by their addresses."""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.ops.cpu.native import SIGNATURES, pointer, recorded_by

# Operations of PyTorch that make memory, that make views, and that may do either: then they compute.
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty"}
_VIEWS = {f"aten::{name}" for name in ("alias", "detach", "expand", "permute", "select", "slice", "split", "view")}
_VIEWS |= {f"aten::{name}" for name in ("split_with_sizes", "t", "transpose", "unbind", "unsqueeze")}
_PERHAPS_VIEWS = {f"aten::{name}" for name in ("contiguous", "flatten", "reshape", "to")}


class Place(NamedTuple):
    """Where an argument lies: ``offset`` bytes behind the begin of an input, or of memory that the walk made."""

    is_input: bool
    number: int  # among the inputs, or among what was made
    offset: int


class Call(NamedTuple):
    """One call: each argument is a `Place`, or the 8 bytes of a value as an integer."""

    name: str
    suffix: str
    arguments: list[Place | int]


def apart(inputs: Sequence[Tensor | None]) -> bool:
    """Whether no two contiguous tensors share memory, so that an address tells which of them is meant."""
    ranges = _ranges(inputs)
    return all(first + size <= second for (first, size, _), (second, *_) in zip(ranges, ranges[1:]))


def _ranges(inputs: Sequence[Tensor | None]) -> list[tuple[int, int, int]]:
    """Address, bytes and place of each, by address."""
    return sorted((t.data_ptr(), t.nbytes, i) for i, t in enumerate(inputs) if t is not None and t.nbytes)


class Tape(TorchDispatchMode):
    """Notes the calls, and the memory that they are given, while it is entered.

    The one operation of PyTorch that it knows as calls is to join vectors. Memory that is there already and no input is
    a constant, which the tape holds: the tables that calls of the same sizes share. A walk that does what a list of
    calls cannot do again goes on, in vain for the tape.

    Args:
        inputs: contiguous tensors on the CPU that are `apart`.

    Attributes:
        reason: why the walk cannot be done again: an operation of PyTorch that computes, or a call that writes to an
            input or to a constant.
        calls: in order.
        sizes: bytes of each piece of memory that was made.
        constants: what the calls' addresses need to stay alive.
    """

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.reason: str | None = None
        self.calls: list[Call] = []
        self.sizes: list[int] = []
        self.constants: list[Any] = []
        self._newest: dict[int, int] = {}  # by address: what was made there last
        self._places: dict[int, Place | None] = {}  # of the addresses taken, the last one's; None: a constant
        self._ranges = _ranges(inputs)

    def __enter__(self) -> Tape:
        self._recorded = recorded_by(self)
        self._recorded.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._recorded.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _ALLOCATIONS:
            self._made(result)
        elif name == "aten::cat" and all(t.dim() == 1 and t.dtype == result.dtype for t in args[0]):
            self._made(result)
            self._joined(args[0], result)
        elif not (name in _VIEWS or (name in _PERHAPS_VIEWS and _shares_memory(result, args[0]))):
            self.reason = self.reason or f"{func} is computed"
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._newest[storage.data_ptr()] = len(self.sizes)
        self.sizes.append(storage.nbytes())

    def _joined(self, vectors: Sequence[Tensor], result: Tensor) -> None:
        """Vectors one after the other, as copies."""
        for vector, part in zip(vectors, result.split([len(vector) for vector in vectors])):
            addresses = [pointer(tensor, result.dtype, part.numel()) for tensor in (vector, part)]
            self.called("copy", (*addresses, part.nbytes), "")

    def place(self, tensor: Tensor) -> Place | None:
        """Where a tensor's memory begins; None: neither in an input nor in what was made."""
        return self._place(tensor, tensor.data_ptr())

    def _place(self, tensor: Tensor, address: int) -> Place | None:
        before = bisect_right(self._ranges, address, key=lambda entry: entry[0]) - 1
        if before >= 0:
            first, size, number = self._ranges[before]
            if address < first + size:
                return Place(True, number, address - first)
        begin = tensor.untyped_storage().data_ptr()
        made = self._newest.get(begin)
        return None if made is None else Place(False, made, address - begin)

    def address_taken(self, tensor: Tensor, address: int) -> None:
        """See `fastres.ops.cpu.native.Recorder`."""
        place = self._places[address] = self._place(tensor, address)
        if place is None:
            self.constants.append(tensor)

    def called(self, name: str, arguments: Sequence[Any], suffix: str) -> None:
        """See `fastres.ops.cpu.native.Recorder`."""
        noted = [self._argument(name, kind, value) for kind, value in zip(SIGNATURES[name], arguments, strict=True)]
        for kind, argument in zip(SIGNATURES[name], noted):
            if kind == "o" and argument and (isinstance(argument, int) or argument.is_input):
                self.reason = self.reason or f"{name} writes to an input or to a constant"
        self.calls.append(Call(name, suffix, noted))

    def _argument(self, name: str, kind: str, value: Any) -> Place | int:
        if kind == "d":
            return struct.unpack("q", struct.pack("d", value))[0]
        if kind not in "po":
            return int(value)
        if value is None:
            return 0
        if isinstance(value, ctypes.Array):
            self.constants.append(value)
            return ctypes.addressof(value)
        if value not in self._places:
            self.reason = self.reason or f"{name} reads no tensor"
        return self._places.get(value) or value


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
