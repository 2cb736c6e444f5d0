"""The walk over a plan's nodes, forward and backward, on any backend.

Backward first walks forward once more over what was kept, without computing anything, so that each node finds the
values that it read; then the nodes run in reverse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.ops.backends.protocol import Backend, Gradient, Shortcut
from fastres.ops.nodes import End, Node, Open, Opened, Output, Reader, Step, Tail, Value, shortcut_gradient
from fastres.ops.plan import Plan


class Forward(Reader):
    """A walk forward.

    Args:
        p: the backend.
        parameters: see `Reader`; weights are [Cout, KH, KW, Cin].
        added: a tensor that is the first block's shortcut.
        recording: whether backward will need what is kept.

    Attributes:
        shortcuts: of the blocks that are open.
        kept: what backward needs beside the input, the result, the weights and the coefficients.
        coefs: of each BatchNorm, and of each `Describe`.
    """

    def __init__(
        self,
        p: Backend,
        group: str | None,
        parameters: Sequence[Tensor | None],
        added: Tensor | None = None,
        recording: bool = False,
    ):
        super().__init__(parameters)
        self.p, self.group, self.added = p, group, added
        self.shortcuts: list[Opened] = []
        self.kept: list[Tensor] = []
        self.coefs: list[Tensor] = []
        self._recording = recording

    def keep(self, tensor: Tensor) -> None:
        """For backward."""
        if self._recording:
            self.kept.append(tensor)

    def store(self, value: Value) -> None:
        """Write the end of a block that no kernel wrote yet."""
        if value.ends and value.stored is None:
            value.stored = self.p.bn_add_relu(value.normalised, value.shortcut)
            self.keep(value.stored)

    def run(self, nodes: Sequence[Node], x: Tensor, known: Tensor | None = None) -> Tensor:
        """The result of the nodes.

        Args:
            x: [N, H, W, C].
            known: see `Value`.
        """
        value = Value(Output(x), known=known)
        for node in nodes:
            value = node.forward(self, value)
        last = nodes[-1]
        if not isinstance(last, End):
            return value.output.tensor
        return self.p.bn_add_relu(value.normalised, value.shortcut, last.relu)


class Backward:
    """A walk backward.

    Args:
        p: the backend.
        plan: that of the walk forward.
        kept: what that one had: weights and coefficients in order, then what it kept.
        needs: whether gradients of the input, of the shortcut that is a tensor and of each weight are needed.

    Attributes:
        norm_grads: by the BatchNorm's place, twice: of gamma and of beta.
        dws: of each weight, None where not needed.
        dx, dadded: of the input and of the shortcut that is a tensor.
        steps: to be run in reverse.
        joined: gradients of shortcuts that wait for the beginning of their block; a `Tail` is still to go through its
            branch.
    """

    def __init__(
        self,
        p: Backend,
        plan: Plan,
        weights: Sequence[Tensor],
        coefs: Sequence[Tensor],
        kept: Sequence[Tensor],
        needs: Sequence[bool],
    ):
        self.p, self.group, self.recompute = p, plan.group, plan.recompute
        self.need_x, self._need_added, *self.need_weights = needs
        self.norm_grads: dict[int, Tensor] = {}
        self.dws: list[Tensor | None] = [None] * len(weights)
        self.dx: Tensor | None = None
        self.dadded: Tensor | None = None
        self.steps: list[Step] = []
        self.shortcuts: list[Opened] = []
        self.joined: list[Shortcut | Tail | None] = []
        self._nodes = plan.nodes
        self._weights, self._coefs, self._kept = iter(weights), iter(coefs), iter(kept)
        self._places = {True: -1, False: -1}

    def weight(self) -> Tensor:
        """The next convolution's."""
        return next(self._weights)

    def coef(self) -> Tensor:
        """The next BatchNorm's."""
        return next(self._coefs)

    def saved(self) -> Tensor:
        """What was kept next."""
        return next(self._kept)

    def next_place(self, conv: bool) -> int:
        """The place of the next convolution among those, or of the next BatchNorm."""
        self._places[conv] += 1
        return self._places[conv]

    def restore_end(self, value: Value) -> None:
        """The end of a block, where its first reader stored it."""
        if value.ends and value.stored is None:
            value.stored = self.saved()

    def is_needed(self, value: Value) -> bool:
        """Whether the gradient of a value is: of the input perhaps not."""
        return self.need_x or value is not self._x

    def run(self, x: Tensor, out: Tensor | None, dout: Tensor) -> None:
        """Fill in the gradients.

        Args:
            x: the input. out: the result, if a block ended there with a ReLU.
            dout: the gradient of the result.
        """
        self._x = value = Value(Output(x))
        for node in self._nodes:
            value = node.restore(self, value)
        if value.ends:
            value.stored = out
        tail = Tail(Gradient(dout), owned=False)
        while self.steps:
            step = self.steps.pop()
            opens = self.steps.pop() if self.steps and isinstance(self.steps[-1].node, Open) else None
            tail = step.node.backward(self, step, tail, None if opens is None else self._shortcut_gradient(opens))
        if self.need_x:
            gradient = tail.gradient
            self.dx = gradient.dz if gradient.abc is None else self.p.bn_backward_apply(gradient)

    def _shortcut_gradient(self, opens: Step) -> Shortcut | None:
        joined = self.joined.pop()
        return shortcut_gradient(self, opens, joined) if isinstance(joined, Tail) else joined

    def gradients(self) -> list[Tensor]:
        """Those of all gammas and betas in one vector, then those of the input, the shortcut and the weights needed."""
        found = [self.dx if self.need_x else None, self.dadded if self._need_added else None, *self.dws]
        norm_grads = [self.norm_grads[place] for place in range(len(self.norm_grads))]
        return [torch.cat(norm_grads), *(grad for grad in found if grad is not None)]
