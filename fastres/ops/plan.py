"""A fused operation as a list of nodes, and its form as an argument of a custom operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from fastres.kernels.geometry import output_hw
from fastres.kernels.types import ACTIVATIONS
from fastres.ops.nodes import Conv, Describe, End, Node, Norm, Open, Pool, in_order

Shape = tuple[int, ...]


class Code(NamedTuple):
    """A plan in types that a custom operation takes; what torch.compile may not know is in the lists of numbers."""

    structure: str  # a letter a node, its flags as digits, a branch in parentheses; then the process group
    integers: list[int]
    numbers: list[float]

    @property
    def key(self) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
        """The same, with a hash where the numbers have one."""
        return self.structure, tuple(self.integers), tuple(self.numbers)

    @property
    def nodes(self) -> str:
        """The structure without the process group."""
        return self.structure.partition("|")[0]

    @property
    def counts(self) -> tuple[int, int]:
        """How many convolutions there are, and how many coefficients [5, C] the walk forward makes."""
        nodes = self.nodes
        return nodes.count(Conv.code), nodes.count(Norm.code) + nodes.count(Describe.code)

    @property
    def parameters(self) -> str:
        """A letter for each parameter in order: a convolution's weight, gamma, beta, running mean and variance."""
        return "".join(["w" if node == Conv.code else "gbmv" for node in self.nodes if node in "cn"])


@dataclass(frozen=True)
class Plan:
    """What a fused operation computes.

    Attributes:
        nodes: in order.
        group: name of the process group whose ranks take the batch statistics together.
        recompute: whether outputs that are not kept are computed again in backward.
    """

    nodes: tuple[Node, ...]
    group: str | None = None
    recompute: bool = False

    def encode(self) -> Code:
        """See `decode`."""
        integers: list[int] = []
        numbers: list[float] = []
        structure = "".join([node.encode(integers, numbers) for node in self.nodes])
        return Code(f"{structure}{int(self.recompute)}|{self.group or ''}", integers, numbers)

    @cached_property
    def code(self) -> Code:
        """That of `encode`, made once."""
        return self.encode()

    def convolutions(self, x: Shape, weights: Sequence[Shape]) -> Iterator[tuple[Shape, Shape, Shape]]:
        """Shapes of the input [N, H, W, C], the weight [Cout, KH, KW, Cin] and the output of each convolution.

        Args:
            x: shape of the operation's input.
            weights: of each convolution, in the order in which they run.
        """
        left = iter(weights)

        def walk(nodes: Sequence[Node], shape: Shape) -> Iterator[tuple[Shape, Shape, Shape]]:
            for node in nodes:
                if isinstance(node, Open):
                    yield from walk(node.branch, shape)
                elif isinstance(node, Conv):
                    before, weight = shape, next(left)
                    hw = output_hw((shape[1], shape[2]), (weight[1], weight[2]), node.stride, node.pad, node.dilation)
                    shape = (shape[0], *hw, weight[0])
                    yield before, weight, shape
                elif isinstance(node, Pool):
                    hw = output_hw((shape[1], shape[2]), (node.kernel, node.kernel), node.stride, node.pad)
                    shape = (shape[0], *hw, shape[3])

        return walk(self.nodes, x)

    @property
    def norms(self) -> list[Norm]:
        """The BatchNorms in the order in which they run."""
        return [node for node in in_order(self.nodes) if isinstance(node, Norm)]

    @property
    def readers_of_x(self) -> set[int]:
        """The places, among the convolutions, of those that read the plan's input itself."""
        found: set[int] = set()
        place = 0
        for node in self.nodes:
            if isinstance(node, Open):
                found.update([place] if node.branch else [])
                place += len(node.branch) // 2
            else:
                return found | ({place} if isinstance(node, Conv) else set())
        return found

    @property
    def first_end(self) -> int | None:
        """The place of the first block's result among what is kept; None where it is the plan's own result."""
        place, ends = 0, 0
        for node in in_order(self.nodes):
            if isinstance(node, Conv) and node.kept and not ends:
                place += 1
            ends += isinstance(node, End)
        return place if ends > 1 else None


def decode(code: Code) -> Plan:
    """The plan of which `Plan.encode` made the code."""
    try:
        return _decoded(*code.key)
    except TypeError:  # torch.compile's numbers have no hash
        return _decoded.__wrapped__(*code.key)


@lru_cache(maxsize=4096)
def _decoded(structure: str, integers: tuple[int, ...], numbers: tuple[float, ...]) -> Plan:
    nodes, _, group = structure.partition("|")
    letters, whole, real = iter(nodes[:-1]), iter(integers), iter(numbers)
    return Plan(tuple(_nodes(letters, whole, real)), group or None, nodes[-1] == "1")


def _nodes(letters: Iterator[str], whole: Iterator[int], real: Iterator[float]) -> Iterator[Node]:
    def flag() -> bool:
        return next(letters) == "1"

    for letter in letters:
        if letter == ")":
            return
        if letter == Conv.code:
            stride, pad, dilation = next(whole), _four(whole), next(whole)
            yield Conv(stride, pad, dilation, flag(), flag(), flag())
        elif letter == Norm.code:
            yield Norm(next(real), flag(), ACTIVATIONS[int(next(letters))])
        elif letter == Open.code:
            stride, given, _ = next(whole), flag(), next(letters)
            yield Open(stride, given, tuple(_nodes(letters, whole, real)))
        elif letter == End.code:
            yield End(flag(), flag())
        elif letter == Pool.code:
            yield Pool(next(whole), next(whole), _four(whole))
        else:
            yield Describe()


def _four(whole: Iterator[int]) -> tuple[int, int, int, int]:
    return next(whole), next(whole), next(whole), next(whole)
