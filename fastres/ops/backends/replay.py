"""A GPU's walks as lists of launches: noted once, then made again without what is between them.

A launch through Triton costs the host ten times what the driver needs for it: the nodes of a plan, the tables of tiles,
memory for every result, a look at every argument. All of that depends on nothing but the walk's key and its inputs'
shapes, dtypes and alignment. So the second walk of a kind is noted, and those that follow make the same launches in the
same order, so with the same bits, with addresses filled in. Small memory that ends with the walk is one piece; what is
larger comes and goes as it did, so that the step takes as much memory as before. PyTorch's own operations between
launches, such as the vendor's convolutions, are called again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from triton import knobs

from fastres.kernels import buffers
from fastres.kernels.dependent import is_programmatic
from fastres.kernels.launch import compiled_ahead, observed_by
from fastres.ops.arena import Span, layout
from fastres.ops.backends.launches import Launch, Place, launcher
from fastres.ops.graphs import is_one_graph
from fastres.ops.recent import Recent

# Programs and notes of walks that are kept; bytes below which memory is a part of one piece; alignment in that.
MOST_PROGRAMS, SMALL, ALIGNMENT = 256, 2**20, 256
VECTOR = 16  # bytes: Triton compiles a kernel anew for addresses that are no multiple
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
# What an operation's arguments can be that are the same every time, and tensors.
_PLAIN = (Tensor, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Form(NamedTuple):
    """How a tensor lies in its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)


@dataclass(frozen=True)  # no tuple, which PyTorch's trees would take apart
class View:
    """A tensor in memory that is known by its place; ``whole``: the very one that the memory came as."""

    place: Place
    form: Form
    whole: bool


class Operation(NamedTuple):
    """An operation of PyTorch: tensors among the arguments are `View`, on their own or in a list."""

    function: Callable
    args: list[Any]
    options: dict[str, Any]
    made: list[tuple[int, int]]  # place among the results, and number, of each that is new memory

    @property
    def views(self) -> list[View]:
        """The tensors that it reads."""
        return [one for one in tree_flatten((self.args, self.options))[0] if isinstance(one, View)]


class Recording(TorchDispatchMode):
    """Notes what a walk launches and which memory that is given, while it is entered.

    Memory that was there before and is no input is a constant, which the recording holds.

    Args:
        inputs: contiguous tensors, None among them, of which no two share memory.

    Attributes:
        reason: why the walk cannot be made again; empty: it can.
        steps: launches and operations in order.
        forms: of each piece of memory that the walk made, behind the inputs', as it was made.
        allocated: the numbers of those that no operation computed.
        constants: by number.
    """

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.reason = ""
        self.steps: list[Launch | Operation] = []
        self.forms: dict[int, Form] = {}
        self._given = {number: Form.of(tensor) for number, tensor in enumerate(inputs) if tensor is not None}
        self.allocated: set[int] = set()
        self.constants: dict[int, Tensor] = {}
        self._count = len(inputs)
        self._numbers: dict[int, tuple[int, int]] = {}  # by storage: its number, and the address of its first tensor
        self._storages: list[StorageWeakRef] = []  # no other storage takes the place of one that has gone
        for number, tensor in enumerate(inputs):
            if tensor is not None:
                self._number(tensor, number)
        self._observed = observed_by(self)

    def __enter__(self) -> Recording:
        self._observed.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._observed.__exit__(*error)

    def spoiled(self, reason: str) -> None:
        """See `fastres.kernels.launch.Observer`."""
        self.reason = self.reason or reason

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> None:
        """See `fastres.kernels.launch.Observer`."""
        pointers = [(i, self.place(value)) for i, value in enumerate(arguments) if isinstance(value, Tensor)]
        plain = [None if isinstance(value, Tensor) else value for value in arguments]
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(Launch(compiled, (x, y, z), plain, pointers))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        views = tree_map_only(Tensor, self.view, (args, options))
        result = func(*args, **options)
        results = tree_flatten(result)[0]
        given = tree_flatten((args, options))[0]
        plain = all(isinstance(value, _PLAIN) for value in given)
        if func.namespace != "aten" or not plain or not all(r is None or isinstance(r, Tensor) for r in results):
            self.spoiled(f"{func} is called")
            return result
        known = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}
        there = [(place, one) for place, one in enumerate(results) if one is not None]
        made = [(place, self._made(one)) for place, one in there if one.untyped_storage()._cdata not in known]
        if func._schema.name in _ALLOCATIONS:
            self.allocated.update(number for _, number in made)
        elif func._schema.is_mutable or made:
            self.steps.append(Operation(func, list(views[0]), views[1], made))
        return result

    def _made(self, tensor: Tensor) -> int:
        number = self._count
        self._count += 1
        self.forms[number] = Form.of(tensor)
        self._number(tensor, number)
        return number

    def _number(self, tensor: Tensor, number: int) -> None:
        storage = tensor.untyped_storage()
        self._numbers[storage._cdata] = number, tensor.data_ptr()
        self._storages.append(StorageWeakRef(storage))

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor's memory begins."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self._numbers:
            self.constants[self._made(tensor)] = tensor
        number, begin = self._numbers[storage]
        return Place(number, tensor.data_ptr() - begin)

    def view(self, tensor: Tensor) -> View:
        """The tensor by its place."""
        place, form = self.place(tensor), Form.of(tensor)
        as_it_came = self.forms.get(place.number) or self._given[place.number]
        return View(place, form, place.offset == 0 and form == as_it_came)


class _Stage(NamedTuple):
    """Launches that follow one another, or an operation, between which no memory comes."""

    needs: list[tuple[int, Form]]  # memory to be had before it
    operation: Operation | None
    launches: tuple[int, int]  # where there is no operation: from the first one on, before the second
    frees: list[int]  # memory to be let go after it


class Program:
    """The launches of a walk.

    Args:
        recording: of a walk that can be made again. inputs, results: of it.

    Attributes:
        stages: what is done, in order.
    """

    def __init__(self, recording: Recording, inputs: Sequence[Tensor | None], results: Sequence[Tensor]):
        self._results = [recording.view(result) for result in results]
        self._constants, self._inputs = recording.constants, len(inputs)
        forms, kept = recording.forms, {view.place.number for view in self._results}
        self._count = self._inputs + len(forms)
        spans = _spans(recording.steps)
        of_operations = {number for step in recording.steps if isinstance(step, Operation) for number in _read(step)}
        inner = recording.allocated.intersection(spans) - kept - of_operations
        small = {number: Span(*spans[number], size) for number in inner if (size := _bytes(forms[number])) < SMALL}
        self._arena, self._offsets = layout(small, ALIGNMENT)
        needs: list[list[tuple[int, Form]]] = [[] for _ in recording.steps]
        frees: list[list[int]] = [[] for _ in recording.steps]
        for number, (first, last) in spans.items():
            if number >= self._inputs and number not in small and number not in recording.constants:
                if number in recording.allocated:
                    needs[first].append((number, forms[number]))
                if number not in kept:
                    frees[last].append(number)
        self.stages = _stages(recording.steps, needs, frees)
        self._launch = launcher([step for step in recording.steps if isinstance(step, Launch)])
        self._unused = [(number, forms[number]) for number in recording.allocated & kept - spans.keys()]

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """The walk's results for other inputs of the same forms and alignment."""
        like = next(t for t in inputs if t is not None)
        device, stream, empty = like.device, _stream(like.device), torch.empty_strided
        tensors: list[Tensor | None] = [*inputs, *[None] * (self._count - self._inputs)]
        bases = (ctypes.c_uint64 * self._count)(*[0 if t is None else t.data_ptr() for t in inputs])
        for number, constant in self._constants.items():
            tensors[number], bases[number] = constant, constant.data_ptr()
        arena = buffers.empty(like, self._arena, dtype=torch.uint8)
        begin = arena.data_ptr()
        for number, offset in self._offsets.items():
            bases[number] = begin + offset
        for needs, operation, launches, frees in self.stages:
            for number, form in needs:
                tensor = empty(form.shape, form.stride, dtype=form.dtype, device=device)
                tensors[number], bases[number] = tensor, tensor.data_ptr()
            if operation is None:
                self._launch(*launches, bases, stream, device.index or 0)
            else:
                _call(operation, tensors, bases)
            for number in frees:
                tensors[number] = None
        for number, form in self._unused:
            tensors[number] = empty(form.shape, form.stride, dtype=form.dtype, device=device)
        return [_tensor(view, tensors) for view in self._results]


def _stages(
    steps: Sequence[Launch | Operation], needs: Sequence[list[tuple[int, Form]]], frees: Sequence[list[int]]
) -> list[_Stage]:
    """The steps in few stages, with memory coming and going in the same order."""
    stages: list[_Stage] = []
    launched = 0
    for step, needed, freed in zip(steps, needs, frees):
        if isinstance(step, Operation):
            stages.append(_Stage(needed, step, (launched, launched), freed))
            continue
        launched += 1
        if stages and stages[-1].operation is None and not (needed and stages[-1].frees):
            before = stages.pop()
            range_, all_freed = (before.launches[0], launched), [*before.frees, *freed]
            stages.append(_Stage([*before.needs, *needed], None, range_, all_freed))
        else:
            stages.append(_Stage(needed, None, (launched - 1, launched), freed))
    return stages


def _call(operation: Operation, tensors: list[Tensor | None], bases: ctypes.Array[ctypes.c_uint64]) -> None:
    args = [_filled(value, tensors) for value in operation.args]
    options = {name: _filled(value, tensors) for name, value in operation.options.items()}
    result = operation.function(*args, **options)
    for place, number in operation.made:
        made = result if isinstance(result, Tensor) else result[place]
        tensors[number], bases[number] = made, made.data_ptr()


def _filled(value: Any, tensors: Sequence[Tensor | None]) -> Any:
    """An argument with its tensors."""
    if isinstance(value, View):
        return _tensor(value, tensors)
    return [_filled(one, tensors) for one in value] if isinstance(value, list) else value


def _tensor(view: View, tensors: Sequence[Tensor | None]) -> Tensor:
    """A view of memory that is there."""
    (number, offset), form = view.place, view.form
    base = tensors[number]
    assert base is not None
    if view.whole:
        return base
    if base.dtype != form.dtype:
        flat = base.as_strided((_bytes(Form.of(base)) // base.itemsize,), (1,))
        base = flat.view(form.dtype)
    return base.as_strided(form.shape, form.stride, base.storage_offset() + offset // form.dtype.itemsize)


def _bytes(form: Form) -> int:
    """From a tensor's first element to its last."""
    if 0 in form.shape:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(form.shape, form.stride))) * form.dtype.itemsize


def _read(step: Operation) -> list[int]:
    """Numbers of the memory that an operation reads or makes."""
    return [*(view.place.number for view in step.views), *(number for _, number in step.made)]


def _spans(steps: Sequence[Launch | Operation]) -> dict[int, tuple[int, int]]:
    """First and last step that uses each piece of memory, inputs too."""
    spans: dict[int, tuple[int, int]] = {}
    for index, step in enumerate(steps):
        numbers = [place.number for _, place in step.pointers] if isinstance(step, Launch) else _read(step)
        for number in numbers:
            spans[number] = spans.get(number, (index, index))[0], index
    return spans


def _stream(device: torch.device) -> int:
    """The current stream, as the driver knows it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


class Programs:
    """The walks of late by key: how often they were seen, and their programs."""

    def __init__(self) -> None:
        self._known: Recent[Program | bool] = Recent()  # True: seen once; False: it stays a walk

    def repeated(
        self, key: Hashable, inputs: Sequence[Tensor | None], walk: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """See `fastres.ops.backends.protocol.Backend.repeated`."""
        if not _is_plain(inputs):
            return walk()
        whole = (key, *[None if t is None else (t.shape, t.dtype, t.data_ptr() % VECTOR) for t in inputs], *_settings())
        known = self._known.get(whole)
        if known is None:
            self._known.keep(whole, True, MOST_PROGRAMS)
            _compile(walk)
            return walk()
        if known is False:
            return walk()
        if known is not True:
            return known.run(inputs)
        if torch.cuda.is_current_stream_capturing() or not _are_apart(inputs):
            return walk()
        recording = Recording(inputs)
        with recording:
            results = walk()
        known = False if recording.reason else Program(recording, inputs, results)
        self._known.keep(whole, known, MOST_PROGRAMS)
        return results

    @property
    def known(self) -> list[Program | bool]:
        """What is known of each walk: its program, True where it was seen once, False where it stays a walk."""
        return list(self._known.values())

    def clear(self) -> None:
        """Forget them all."""
        self._known.clear()


def _compile(walk: Callable[[], list[Tensor]]) -> None:
    """Have all cores compile what a walk launches; where ranks exchange something in it each compiles as it goes."""
    if torch.cuda.is_current_stream_capturing() or (dist.is_available() and dist.is_initialized()):
        return
    with suppress(Exception), compiled_ahead():  # what is wrong shows in the walk itself
        walk()


def _is_plain(inputs: Sequence[Tensor | None]) -> bool:
    """Whether nothing but a GPU's memory is behind the tensors, and nobody watches what is launched."""
    return (
        all(t is None or (type(t) in (Tensor, nn.Parameter) and t.is_cuda and t.is_contiguous()) for t in inputs)
        and torch._C._len_torch_dispatch_stack() == 0
        and not knobs.runtime.launch_enter_hook.calls
        and not knobs.runtime.launch_exit_hook.calls
    )


def _settings() -> tuple[Hashable, ...]:
    """What a walk depends on beside its key and inputs: the device, how choices are made, how fp32 is multiplied, how
    kernels follow one another.
    """
    fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return torch.cuda.current_device(), is_one_graph(), fp32_precision, is_programmatic()


def _are_apart(inputs: Sequence[Tensor | None]) -> bool:
    """Whether no two tensors share memory, so that an address tells which of them is meant."""
    storages = [t.untyped_storage().data_ptr() for t in inputs if t is not None]
    return len(set(storages)) == len(storages)
