"""An in-order model of one multiprocessor that runs machine code.

Each of the four quarters issues an instruction a clock, of the warp that issued least recently among those that may. A
warp may when the stall count of its last instruction has passed, the scoreboards that the instruction waits for are
free, and its pipe takes it. Loads and stores queue for the shared memory's port and for this multiprocessor's share of
the L2 and of the memory, a wgmma for the tensor cores and for the port once the four warps of its group have issued it.
What is not there: caches of instructions and constants, rows of the memory that are opened; the L1 (Triton's cp.async
goes round it) but for windows, of whose loads it serves a given share. Forward branches with a predicate are not taken
unless only they lead to the main loop, which runs ``trips`` times; any other loop runs once. Asynchronous copies run
some trips ahead of the products; behind what the last trip needs they copy nothing, and fill with zeros.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.machine.assembly import NO_SCOREBOARD, Instruction
from bench.machine.banks import BANKS, WORD, port_cycles
from bench.machine.chips import Chip
from bench.machine.loops import copies, jumps, main_loop
from bench.machine.pipes import (
    GLOBAL,
    QUARTERS,
    SHARED,
    WARPGROUP,
    moved,
    pipe,
    tensor_cycles,
    wgmma_bytes,
)

SCOREBOARDS = 6
# Cycles from issue on [A]: until an address has reached its memory, an operand of no other kind has been read, a
# transcendental or a uniform result is there, a shuffle's, a warp goes on behind a taken branch or another program
# begins.
GLOBAL_ISSUE, SHARED_ISSUE, OTHER, TRANSCENDENTAL, UNIFORM, SHUFFLE, BRANCH, REPLACED = 20, 4, 12, 24, 25, 22, 4, 200
MMA_SYNC_LATENCY, MMA_SYNC_READ = 33, 10
WGMMA_READ = 16  # cycles after which a wgmma has taken the operands that are in registers
STAGGER = 300  # between the begins of the first programs


class _Step(NamedTuple):
    """An instruction, decoded once."""

    name: str
    stall: int
    write: int
    read: int
    waits: tuple[int, ...]
    pipe: str
    occupied: int
    bytes: int  # of the shared memory what its port could pass meanwhile
    tensor: float
    operand_bytes: int  # of a wgmma
    threshold: int | None  # groups that a wait leaves unfinished; None: no wait
    commits: bool
    jump: int | None  # where it goes, if not to the next one
    ends: bool
    never: bool


def _decode(one: Instruction, jump: int | None, conflicts: int | None, chip: Chip) -> _Step:
    name, occupied = pipe(one)
    asynchronous = (one.name == "DEPBAR" and "SB0" in one.operands) or (
        one.name == "WARPGROUP" and "DEPBAR" in one.mnemonic
    )
    return _Step(
        one.name,
        max(one.stall, 1),
        one.write,
        one.read,
        tuple(board for board in range(SCOREBOARDS) if one.wait >> board & 1),
        name,
        occupied,
        max(moved(one), BANKS * WORD * (conflicts or 0)) if one.name in SHARED | GLOBAL else 0,
        tensor_cycles(one, chip) if one.name in ("HGMMA", "HMMA") else 0.0,
        wgmma_bytes(one) if one.name == "HGMMA" else 0,
        int(one.operands.split(",")[1], 16) if asynchronous else None,
        "gsb" in one.operands,
        jump,
        one.name == "EXIT" and not one.guard,
        one.never,
    )


@dataclass(eq=False)
class _Wgmma:
    """A wgmma that the warps of a group issue one after the other."""

    arrived: int = 0
    done: float | None = None
    waiting: list[_Warp] = field(default_factory=list)
    readers: list[tuple[_Warp, int]] = field(default_factory=list)


@dataclass(eq=False)
class _Program:
    warps: int
    start: float
    left: int
    groups: list[dict[int, _Wgmma]]
    at_barrier: list[_Warp] = field(default_factory=list)


@dataclass(eq=False)
class _Warp:
    program: _Program
    index: int
    ready: float
    pc: int = 0
    trip: int = 0
    last: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * SCOREBOARDS)
    copies: list[float] = field(default_factory=list)  # ends of the committed groups of cp.async
    copying: float = 0.0
    copied: int = 0  # copies so far
    products: list[_Wgmma] = field(default_factory=list)  # committed groups of wgmma
    issued: int = 0  # wgmmas
    stores: float = 0.0  # end of the last store to shared memory


class Run(NamedTuple):
    """What a simulation found; cycles."""

    ends: list[float]  # of the programs, in order
    lives: list[float]  # of each program, begin to end
    busy: dict[str, float]  # of each pipe, of the issue slots and of each memory


class Multiprocessor:
    """One multiprocessor that runs ``programs`` programs, ``resident`` at once.

    Args:
        code: the kernel.
        warps: of a program.
        trips: of the main loop.
        far: share of the bytes between L2 and multiprocessor that come from the memory.
        memory: bytes a clock of the memory's, this multiprocessor's share.
        again: share of the loads that the L1 serves, since the program has loaded the same before.
    """

    def __init__(self, code: Sequence[Instruction], warps: int, resident: int, programs: int, trips: int, far: float,
                 memory: float, chip: Chip, again: float = 0.0):  # fmt: skip
        self._code = [_decode(*each, chip) for each in zip(code, jumps(code), port_cycles(code))]
        self._loop = main_loop(code)
        self._warps, self._resident, self._programs, self._trips = warps, resident, programs, trips
        self._copies = copies(code, trips)
        self._far, self._memory, self._chip = far, memory, chip
        self._again, self._due = again, 0.0
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._shared_free = self._l2_free = self._memory_free = self._tensor_free = 0.0
        self._mma_free = [0.0] * QUARTERS
        self._pipes: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(QUARTERS)]
        self._queues: list[list[tuple[float, int, _Warp]]] = [[] for _ in range(QUARTERS)]
        self._pushed = self._started = 0
        self._ends: list[tuple[float, float]] = []

    def run(self) -> Run:
        """Run them all."""
        for slot in range(min(self._resident, self._programs)):
            self._start(slot * STAGGER)
        slots = [0.0] * QUARTERS
        while True:
            quarter, now = -1, float("inf")
            for one, queue in enumerate(self._queues):
                if queue and (when := max(queue[0][0], slots[one])) < now:
                    quarter, now = one, when
            if quarter < 0:
                break
            warp = self._oldest(self._queues[quarter], now)
            step = self._code[warp.pc]
            until = self._free(warp, step, quarter, now)
            if until is None:  # a wgmma that is not complete wakes it
                continue
            if until > now:
                warp.ready = until
                self._push(warp)
                continue
            slots[quarter] = now + 1
            self._issue(warp, step, quarter, now)
        ends = sorted(self._ends)
        return Run([end for end, _ in ends], [end - begin for end, begin in ends], dict(self._busy))

    def _start(self, at: float) -> None:
        groups: list[dict[int, _Wgmma]] = [{} for _ in range(max(1, self._warps // WARPGROUP))]
        program = _Program(self._warps, at, self._warps, groups)
        self._started += 1
        for index in range(self._warps):
            self._push(_Warp(program, index, at))

    def _push(self, warp: _Warp) -> None:
        self._pushed += 1
        heapq.heappush(self._queues[warp.index % QUARTERS], (warp.ready, self._pushed, warp))

    @staticmethod
    def _oldest(queue: list[tuple[float, int, _Warp]], now: float) -> _Warp:
        candidates = [heapq.heappop(queue)]
        while queue and queue[0][0] <= now:
            candidates.append(heapq.heappop(queue))
        chosen = min(candidates, key=lambda one: (one[2].last, one[1]))
        for one in candidates:
            if one is not chosen:
                heapq.heappush(queue, one)
        return chosen[2]

    def _free(self, warp: _Warp, step: _Step, quarter: int, now: float) -> float | None:
        """When the warp may issue this instruction, as far as it is known; None: another warp decides it."""
        until = now
        for board in step.waits:
            until = max(until, warp.boards[board])
        if step.threshold is not None:
            if step.name == "DEPBAR":
                until = max([until, *warp.copies[-1 - step.threshold : len(warp.copies) - step.threshold]])
            else:
                for product in warp.products[: len(warp.products) - step.threshold]:
                    if product.done is None:
                        product.waiting.append(warp)
                        return None
                    until = max(until, product.done)
        if step.pipe:
            until = max(until, self._pipes[quarter][self._lane(step, quarter)])
        return until

    def _lane(self, step: _Step, quarter: int) -> str:
        if step.pipe == "imad":
            return "fma0"
        if step.pipe != "fma":
            return step.pipe
        pipes = self._pipes[quarter]
        return min((f"fma{number}" for number in range(self._chip.fma_pipes)), key=pipes.__getitem__)

    def _issue(self, warp: _Warp, step: _Step, quarter: int, now: float) -> None:
        if step.pipe:
            lane = self._lane(step, quarter)
            self._pipes[quarter][lane] = now + step.occupied
            self._busy[lane] += step.occupied / QUARTERS
        self._busy["issue"] += 1 / QUARTERS
        warp.last = now
        following = now + step.stall
        if step.name == "BAR":
            self._arrive(warp, now, following)
            return
        written, read, following = self._execute(warp, step, quarter, now, following)
        if step.write != NO_SCOREBOARD:
            warp.boards[step.write] = max(warp.boards[step.write], written)
        if step.read != NO_SCOREBOARD and step.name != "HGMMA":
            warp.boards[step.read] = max(warp.boards[step.read], read)
        if step.ends:
            self._exit(warp.program, now)
            return
        following_pc = warp.pc + 1 if step.jump is None else step.jump
        if self._loop is not None and warp.pc == self._loop.last:
            warp.trip += 1
            if warp.trip < self._trips:
                following_pc, following = self._loop.first, following + BRANCH
        warp.pc, warp.ready = following_pc, following
        self._push(warp)

    def _execute(
        self, warp: _Warp, step: _Step, quarter: int, now: float, following: float
    ) -> tuple[float, float, float]:
        """Cycles at which the result is there, the operands are read, and the warp goes on."""
        chip, name = self._chip, step.name
        written = read = now + OTHER
        if name in SHARED:
            if not step.never:
                end = self._through_port(now + SHARED_ISSUE, step.bytes)
                if name in ("LDS", "LDSM"):
                    written, read = end + chip.shared_latency - SHARED_ISSUE, now + 2 * SHARED_ISSUE
                else:
                    written = read = warp.stores = end
        elif name in GLOBAL:
            if not step.never:
                read = now + GLOBAL_ISSUE
                asynchronous = name == "LDGSTS"
                warp.copied += asynchronous
                if asynchronous and warp.copied > self._copies:
                    written = read
                elif name == "LDG" and self._served():
                    written = self._through_port(read, step.bytes) + chip.shared_latency
                else:
                    written = self._from_memory(read, step.bytes, name in ("STG", "STL"))
                if asynchronous:
                    self._through_port(read, step.bytes)
                    warp.copying = max(warp.copying, written + SHARED_ISSUE)
        elif name == "LDGDEPBAR":
            warp.copies.append(max([warp.copying, *warp.copies[-1:]]))
            warp.copying = 0.0
        elif name == "SHFL":
            written, read = self._through_port(now + 2, 128) + SHUFFLE, now + 2 * SHARED_ISSUE
        elif name == "HMMA":
            begin = max(self._mma_free[quarter], now)
            self._mma_free[quarter] = begin + step.tensor
            self._busy["tensor"] += step.tensor / QUARTERS
            written, read, following = begin + MMA_SYNC_LATENCY, begin + MMA_SYNC_READ, max(following, begin)
        elif name == "HGMMA":
            self._wgmma(warp, step, now)
        elif name == "MEMBAR":
            following = max(following, warp.stores) + chip.fence
        elif name == "FENCE":
            following += chip.fence
        elif step.pipe == "transcendental":
            written = now + TRANSCENDENTAL
        elif name in ("S2R", "LDC") or step.pipe == "uniform":
            written = now + UNIFORM
        return written, read, following

    def _through_port(self, at: float, count: int) -> float:
        cycles = count / self._chip.shared_bytes
        self._shared_free = max(self._shared_free, at) + cycles
        self._busy["shared memory"] += cycles
        return self._shared_free

    def _served(self) -> bool:
        """Whether the L1 has what is loaded now: as often as its share says, the first loads not."""
        self._due += self._again
        served = self._due >= 1
        self._due -= served
        return served

    def _from_memory(self, at: float, count: int, store: bool) -> float:
        chip = self._chip
        self._l2_free = max(self._l2_free, at) + count / chip.l2
        self._busy["L2"] += count / chip.l2
        done = self._l2_free + (0 if store else chip.l2_latency)
        if far := count * self._far:
            self._memory_free = max(self._memory_free, at) + far / self._memory
            self._busy["memory"] += far / self._memory
            done = max(done, self._memory_free + (0 if store else chip.memory_latency))
        return done

    def _wgmma(self, warp: _Warp, step: _Step, now: float) -> None:
        group = warp.program.groups[warp.index // WARPGROUP]
        product = group.setdefault(warp.issued, _Wgmma())
        product.arrived += 1
        product.readers.append((warp, step.read))
        if step.commits:
            warp.products.append(product)
            del warp.products[:-16]
        if product.arrived == min(WARPGROUP, self._warps):
            begin = max(self._tensor_free, now)
            operands = self._through_port(begin - min(WGMMA_READ, step.tensor / 4), step.operand_bytes)
            self._tensor_free = max(begin + step.tensor, operands)
            self._busy["tensor"] += step.tensor
            product.done = self._tensor_free + self._chip.tensor_latency
            for reader, board in product.readers:
                if board != NO_SCOREBOARD:
                    reader.boards[board] = max(reader.boards[board], begin + min(step.tensor, WGMMA_READ))
            for waiting in product.waiting:
                waiting.ready = max(waiting.ready, product.done)
                self._push(waiting)
            del group[warp.issued]
        warp.issued += 1

    def _arrive(self, warp: _Warp, now: float, following: float) -> None:
        at_barrier = warp.program.at_barrier
        at_barrier.append(warp)
        warp.ready, warp.pc = following, warp.pc + 1
        if len(at_barrier) == warp.program.left:
            for one in at_barrier:
                one.ready = max(one.ready, now + self._chip.barrier)
                self._push(one)
            at_barrier.clear()

    def _exit(self, program: _Program, now: float) -> None:
        program.left -= 1
        if not program.left:
            self._ends.append((now, program.start))
            if self._started < self._programs:
                self._start(now + REPLACED)
