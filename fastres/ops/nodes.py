"""The steps that every fused operation is made of: open a shortcut, convolve, normalise, end a block, pool.

Nothing normalised is ever stored. An activation that need not exist is a `Value`, made by its reader; a gradient that
need not exist is a `Gradient`. Each node has its forward and its backward side by side, and its plain form in PyTorch's
own functions, which is what it means. `fastres.ops.schedule` walks over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.geometry import Pad, is_pointwise
from fastres.kernels.types import ACTIVATIONS, Moments
from fastres.ops.backends.protocol import Activation, Convolution, Gradient, Normalised, Shortcut, Window
from fastres.ops.batch_norm import Vectors, backward_coefficients, coefficients

if TYPE_CHECKING:
    from fastres.ops.plain import Plain
    from fastres.ops.schedule import Backward, Forward

# The channels of a convolution that may end the block before: with more, several programs would each read all of it.
JOINED_CHANNELS = 128


class Output:
    """What a convolution wrote: kept, or computed again when it is first asked for, until it is dropped."""

    __slots__ = ("_recompute", "_tensor")

    def __init__(self, tensor: Tensor | None, recompute: Callable[[], Tensor] | None = None):
        self._tensor, self._recompute = tensor, recompute

    @property
    def tensor(self) -> Tensor:
        """[N, H, W, C]."""
        if self._tensor is None:
            assert self._recompute is not None
            self._tensor = self._recompute()
        return self._tensor

    def drop(self) -> None:
        """Free the memory of what can be computed again."""
        if self._recompute is not None:
            self._tensor = None


class Value:
    """An activation that need not exist: y, ``act(bn(y))`` with coefficients, ``act(bn(y) + shortcut)`` at an end.

    Attributes:
        output: y.
        coef: [5, C] of bn.
        act: the activation behind bn.
        moments: of y, where the kernel that wrote y reduced them.
        known: [5, C] that begins with y's mean and biased variance, where the caller knew them.
        ends: whether this is the end of a block, which its first reader stores.
        opened: the shortcut that an end adds.
        stored: an end in memory.
    """

    __slots__ = ("act", "coef", "ends", "known", "moments", "opened", "output", "stored")

    def __init__(
        self,
        output: Output,
        coef: Tensor | None = None,
        moments: Moments | None = None,
        known: Tensor | None = None,
        ends: bool = False,
        opened: Opened | None = None,
        act: str = "relu",
    ):
        self.output, self.coef, self.moments, self.known = output, coef, moments, known
        self.ends, self.opened, self.act = ends, opened, act
        self.stored: Tensor | None = None

    @property
    def normalised(self) -> Normalised:
        """bn(y)."""
        assert self.coef is not None
        return Normalised(self.output.tensor, self.coef, self.act)

    @property
    def has_projection(self) -> bool:
        """Whether an end adds a shortcut with a BatchNorm of its own."""
        return self.opened is not None and self.opened.coef is not None

    @property
    def shortcut(self) -> Shortcut | None:
        """What an end adds."""
        if self.opened is None:
            return None
        return Shortcut(self.opened.tensor, self.opened.coef, self.opened.stride)

    @property
    def read(self) -> Activation:
        """What a convolution is told that reads it."""
        return Activation(self.output.tensor, self.coef, self.act) if self.stored is None else Activation(self.stored)


class Opened(NamedTuple):
    """A shortcut that waits for the end of its block."""

    value: Value
    stride: int
    step: Step | None = None  # of the node that opened it, in a walk back

    @property
    def tensor(self) -> Tensor:
        """What the shortcut is in memory."""
        return self.value.output.tensor if self.value.stored is None else self.value.stored

    @property
    def coef(self) -> Tensor | None:
        """Of the BatchNorm that the shortcut has of its own."""
        return None if self.value.ends else self.value.coef

    @property
    def normalised(self) -> Normalised:
        """A shortcut with a BatchNorm of its own."""
        return self.value.normalised


class Tail(NamedTuple):
    """The gradient that a node hands to the one before it."""

    gradient: Gradient
    sums: Tensor | None = None  # [T, 2, C] of dz for the BatchNorm before, where it went through that one's ReLU
    owned: bool = True  # whether dz may be overwritten


class Step(NamedTuple):
    """A node in the walk back: what it read, what it made, its convolution, or its place among the BatchNorms."""

    node: Node
    input: Value
    value: Value
    conv: Convolution | None = None
    place: int = 0  # among the convolutions or among the BatchNorms
    branch: Sequence[Step] = ()
    tensor: Tensor | None = None  # a pool's winning taps

    @property
    def convolution(self) -> Convolution:
        """Of a `Conv`."""
        assert self.conv is not None
        return self.conv


class Node:
    """One step."""

    code: ClassVar[str]  # its letter in a plan's code

    def encode(self, integers: list[int], numbers: list[float]) -> str:
        """Its letter and its flags as digits; its numbers are appended to the lists. See `fastres.ops.plan.decode`."""
        return self.code

    def forward(self, run: Forward, value: Value) -> Value:
        """What it makes of a value."""
        raise NotImplementedError

    def restore(self, run: Backward, value: Value) -> Value:
        """The like of `forward` from what was kept; `Backward` is told the step."""
        raise NotImplementedError

    def backward(self, run: Backward, step: Step, tail: Tail, joined: Shortcut | None) -> Tail:
        """The gradient of its input from that of its result and from that of the shortcut that opens before it."""
        raise NotImplementedError

    def plain(self, run: Plain, y: Tensor) -> Tensor:
        """Its result in PyTorch's own functions, [N, C, H, W] in and out, but for the activation of a BatchNorm."""
        raise NotImplementedError


class Reader:
    """A walk's parameters, in the order of the nodes: a convolution's weight, the four `Vectors` of a BatchNorm."""

    def __init__(self, parameters: Sequence[Tensor | None]):
        self._parameters = iter(parameters)

    def weight(self) -> Tensor:
        """The next convolution's."""
        weight = next(self._parameters)
        assert weight is not None
        return weight

    def vectors(self) -> Vectors:
        """The next BatchNorm's."""
        left = self._parameters
        return Vectors(next(left), next(left), next(left), next(left))


@dataclass(frozen=True)
class Conv(Node):
    """A convolution of what its reader makes; its statistics are reduced as it is written."""

    stride: int = 1
    pad: Pad = (0, 0, 0, 0)
    dilation: int = 1
    moments: bool = True  # whether a BatchNorm wants the statistics
    adds: bool = False  # whether the shortcut is added here (pre-activation)
    kept: bool = True  # whether backward is given the output; else it is computed again where backward needs it

    code = "c"

    def encode(self, integers: list[int], numbers: list[float]) -> str:
        integers += (self.stride, *self.pad, self.dilation)
        return "c" + "01"[self.moments] + "01"[self.adds] + "01"[self.kept]

    def forward(self, run: Forward, value: Value) -> Value:
        """Reads the end of a block as it is made, where it can."""
        conv = Convolution(run.weight(), self.stride, self.pad, self.dilation)
        shortcut = value.shortcut
        if value.ends and value.stored is None and _joins(conv, value, shortcut):
            value.stored, y, moments = run.p.bn_add_relu_conv(value.normalised, shortcut, conv.weight, self.moments)
            run.keep(value.stored)
        else:
            run.store(value)
            added = run.shortcuts.pop().tensor if self.adds else None
            y, moments = run.p.conv(value.read, conv, added, self.moments)
        if self.kept:
            run.keep(y)
        return Value(Output(y), moments=moments)

    def restore(self, run: Backward, value: Value) -> Value:
        conv = Convolution(run.weight(), self.stride, self.pad, self.dilation)
        run.restore_end(value)
        if self.adds:
            run.shortcuts.pop()
        if self.kept:
            output = Output(run.saved())
        else:
            p = run.p
            output = Output(None, lambda: p.conv(value.read, conv, None, False)[0])
        made = Value(output)
        run.steps.append(Step(self, value, made, conv, run.next_place(conv=True)))
        return made

    def backward(self, run: Backward, step: Step, tail: Tail, joined: Shortcut | None) -> Tail:
        """The gradient goes on through the end of the block that it read."""
        value, place, gradient = step.input, step.place, tail.gradient
        if self.adds:
            if gradient.abc is not None:  # the shortcut's gradient too, which is to be there
                gradient = Gradient(run.p.bn_backward_apply(gradient))
            run.joined.append(Tail(gradient))  # a branch waits: its gradient takes memory, and this one is there
        # an end with a projection has two BatchNorms whose sums are needed, and GELU's gradient is not of its result:
        # they have a pass of their own
        end = value.normalised if value.ends and not value.has_projection and value.act == "relu" else None
        need_dx = run.is_needed(value)
        dx, sums, run.dws[place] = run.p.conv_backward(
            gradient, value.read, step.convolution, joined, end, need_dx, run.need_weights[place]
        )
        step.value.output.drop()
        return tail if dx is None else Tail(Gradient(dx), sums)  # where it is not needed nothing comes before

    def backward_of_shortcut(self, run: Backward, step: Step, gradient: Gradient) -> Shortcut | None:
        """Its gradient at what a shortcut reads, through no ReLU.

        A strided 1x1 convolution reads every stride-th pixel: the result has those alone, as the others' is zero.
        """
        read, conv, place = step.input.read, step.convolution, step.place
        need_dx, need_dw = run.is_needed(step.input), run.need_weights[place]
        pointwise = is_pointwise(conv.weight.shape[1:3], conv.pad)
        stride = conv.stride if pointwise else 1
        if stride == 1 and read.coef is None:
            dx, _, run.dws[place] = run.p.conv_backward(gradient, read, conv, None, None, need_dx, need_dw)
        else:
            dx = None
            if need_dx:
                like = gradient.dz if pointwise else read.y
                conv_of_read = conv._replace(stride=conv.stride // stride)
                dx = run.p.conv_dgrad(gradient, conv_of_read, (like.shape[1], like.shape[2]))
            if need_dw:
                run.dws[place] = run.p.conv_wgrad(gradient, read, conv)
        step.value.output.drop()
        return None if dx is None else Shortcut(dx, stride=stride)

    def plain(self, run: Plain, y: Tensor) -> Tensor:
        top, left, bottom, right = self.pad
        weight, padding = run.weight().to(y.dtype), (top, left)
        if padding != (bottom, right):
            y, padding = F.pad(y, (left, right, top, bottom)), (0, 0)
        out = F.conv2d(y, weight, None, self.stride, padding, self.dilation)
        return out + run.shortcuts.pop() if self.adds else out


@dataclass(frozen=True)
class Norm(Node):
    """A BatchNorm: its coefficients. Whoever reads its value applies them, and the activation behind it."""

    eps: float = 1e-5
    training: bool = True  # whether the statistics are the batch's
    act: str = "relu"  # behind it, or behind the addition of a shortcut to it

    code = "n"

    def encode(self, integers: list[int], numbers: list[float]) -> str:
        numbers.append(self.eps)
        return "n" + "01"[self.training] + str(ACTIVATIONS.index(self.act))

    def forward(self, run: Forward, value: Value) -> Value:
        y, vectors = value.output.tensor, run.vectors()
        coef = coefficients(run.p, y, vectors, self.eps, value.moments, value.known, run.group)
        run.coefs.append(coef)
        return Value(value.output, coef, act=self.act)

    def restore(self, run: Backward, value: Value) -> Value:
        made = Value(value.output, run.coef(), act=self.act)
        run.steps.append(Step(self, value, made, None, run.next_place(conv=False)))
        return made

    def backward(self, run: Backward, step: Step, tail: Tail, joined: Shortcut | None) -> Tail:
        """Dy need not exist unless a shortcut's gradient joins it."""
        dz, sums, coef = tail.gradient.dz, tail.sums, step.value.coef
        assert sums is not None and coef is not None
        y, pixels = step.value.output.tensor if self.training else None, dz.shape[0] * dz.shape[1] * dz.shape[2]
        abc, dgamma, dbeta = backward_coefficients(run.p, sums, coef, pixels, self.training, run.group)
        run.norm_grads[2 * step.place], run.norm_grads[2 * step.place + 1] = dgamma, dbeta
        gradient = Gradient(dz, y, abc)
        if joined is not None and run.is_needed(step.input):
            gradient = Gradient(run.p.bn_backward_apply(gradient, joined.tensor))
        return Tail(gradient)

    def plain(self, run: Plain, y: Tensor) -> Tensor:
        run.act = self.act
        return run.normalise(y, run.vectors(), self.eps)


@dataclass(frozen=True)
class Open(Node):
    """A block begins: what its shortcut reads, and the convolution (with its BatchNorm) that the shortcut may be."""

    stride: int = 1  # the shortcut takes every stride-th pixel
    given: bool = False  # whether the shortcut is a tensor of its own
    branch: tuple[Node, ...] = ()

    code = "o"

    def encode(self, integers: list[int], numbers: list[float]) -> str:
        integers.append(self.stride)
        branch = "".join([node.encode(integers, numbers) for node in self.branch])
        return "o" + "01"[self.given] + "(" + branch + ")"

    def forward(self, run: Forward, value: Value) -> Value:
        shortcut = Value(Output(run.added)) if self.given else value
        for node in self.branch:
            shortcut = node.forward(run, shortcut)
        run.shortcuts.append(Opened(shortcut, self.stride))
        return value

    def restore(self, run: Backward, value: Value) -> Value:
        """The branch's steps are this one's."""
        steps, run.steps = run.steps, []
        shortcut = Value(Output(None)) if self.given else value
        for node in self.branch:
            shortcut = node.restore(run, shortcut)
        steps.append(Step(self, value, value, branch=run.steps))
        run.steps = steps
        run.shortcuts.append(Opened(shortcut, self.stride, steps[-1]))
        return value

    def plain(self, run: Plain, y: Tensor) -> Tensor:
        shortcut = y
        if self.given:
            assert run.added is not None
            shortcut = run.added
        for node in self.branch:
            shortcut = node.plain(run, shortcut)
        run.shortcuts.append(shortcut[:, :, :: self.stride, :: self.stride])
        return y


def shortcut_gradient(run: Backward, opens: Step | None, tail: Tail) -> Shortcut | None:
    """The gradient of a shortcut at what it reads, from that of its result; None where that is a tensor of its own."""
    assert opens is not None and isinstance(opens.node, Open)
    if opens.node.given:
        run.dadded = tail.gradient.dz
        return None
    if not opens.branch:
        return Shortcut(tail.gradient.dz, stride=opens.node.stride)
    *others, last = reversed(opens.branch)
    for step in others:
        tail = step.node.backward(run, step, tail, None)
    assert isinstance(last.node, Conv)
    return last.node.backward_of_shortcut(run, last, tail.gradient)


@dataclass(frozen=True)
class End(Node):
    """A residual block ends: ``act(bn(y) + shortcut)``, stored by its first reader."""

    adds: bool = True  # whether there is a shortcut
    relu: bool = True  # whether there is an activation

    code = "e"

    def encode(self, integers: list[int], numbers: list[float]) -> str:
        return "e" + "01"[self.adds] + "01"[self.relu]

    def forward(self, run: Forward, value: Value) -> Value:
        opened = run.shortcuts.pop() if self.adds else None
        return Value(value.output, value.coef, ends=True, opened=opened, act=value.act)

    def restore(self, run: Backward, value: Value) -> Value:
        opened = run.shortcuts.pop() if self.adds else None
        made = Value(value.output, value.coef, ends=True, opened=opened, act=value.act)
        run.steps.append(Step(self, value, made))
        return made

    def backward(self, run: Backward, step: Step, tail: Tail, joined: Shortcut | None) -> Tail:
        """Dz of the sum is the gradient of the shortcut too, whose own backward comes first."""
        value, dout = step.value, tail.gradient.dz
        out = value.stored if self.relu else None
        if tail.sums is not None:  # the reader's data gradient went through the ReLU
            dz, sums, shortcut_sums = dout, tail.sums, None
        elif run.recompute and value.has_projection and value.act == "relu":
            # the two outputs that are computed again are never there at once
            assert value.opened is not None
            sums = None
            dz, shortcut_sums, _ = run.p.bn_add_relu_backward(dout, out, value.opened.normalised, None, tail.owned)
        else:
            read = value.has_projection or (out is not None and value.act != "relu")
            shortcut = value.shortcut if read else None
            dz, sums, shortcut_sums = run.p.bn_add_relu_backward(dout, out, value.normalised, shortcut, tail.owned)
        if value.opened is not None:
            run.joined.append(shortcut_gradient(run, value.opened.step, Tail(Gradient(dz), shortcut_sums)))
        if sums is None:
            dz, sums, _ = run.p.bn_add_relu_backward(dz, None, value.normalised, None, True)
        return Tail(Gradient(dz), sums)

    def plain(self, run: Plain, y: Tensor) -> Tensor:
        if self.adds:
            shortcut = run.shortcuts.pop()
            y = y + F.pad(shortcut, (0, 0, 0, 0, 0, y.shape[1] - shortcut.shape[1]))
        return run.end(y, self.relu)


@dataclass(frozen=True)
class Pool(Node):
    """A max-pool of ``act(bn(y))``, which never exists; GELU, which is not monotone, comes behind the max-pool."""

    kernel: int = 3
    stride: int = 2
    pad: Pad = (1, 1, 1, 1)

    code = "p"

    def encode(self, integers: list[int], numbers: list[float]) -> str:
        integers += (self.kernel, self.stride, *self.pad)
        return "p"

    def forward(self, run: Forward, value: Value) -> Value:
        out, index = run.p.bn_relu_max_pool(value.normalised, Window(self.kernel, self.stride, self.pad))
        run.keep(index)
        return Value(Output(out))

    def restore(self, run: Backward, value: Value) -> Value:
        made = Value(Output(None))
        run.steps.append(Step(self, value, made, tensor=run.saved()))
        return made

    def backward(self, run: Backward, step: Step, tail: Tail, joined: Shortcut | None) -> Tail:
        window = Window(self.kernel, self.stride, self.pad)
        assert step.tensor is not None
        dz, sums = run.p.bn_relu_max_pool_backward(tail.gradient.dz, step.tensor, step.input.normalised, window)
        return Tail(Gradient(dz), sums)

    def plain(self, run: Plain, y: Tensor) -> Tensor:
        top, left, bottom, right = self.pad
        if (top, left) == (bottom, right) == (top, top):
            return run.activate(F.max_pool2d(y, self.kernel, self.stride, top))
        y = F.pad(y, (left, right, top, bottom), value=-float("inf"))
        return run.activate(F.max_pool2d(y, self.kernel, self.stride))


@dataclass(frozen=True)
class Describe(Node):
    """The mean and the biased variance of a result, for the BatchNorm that reads it next; not differentiable."""

    code = "d"

    def forward(self, run: Forward, value: Value) -> Value:
        assert value.moments is not None
        run.coefs.append(run.p.finalize(value.moments, None, None, 0.0))
        return value

    def restore(self, run: Backward, value: Value) -> Value:
        return value

    def plain(self, run: Plain, y: Tensor) -> Tensor:
        run.describe(y)
        return y


def _joins(conv: Convolution, value: Value, shortcut: Shortcut | None) -> bool:
    """Whether the convolution can end the block before as it reads it."""
    dense = shortcut is None or shortcut.tensor.shape == value.output.tensor.shape
    weight = conv.weight
    pointwise = conv.stride == 1 and is_pointwise((weight.shape[1], weight.shape[2]), conv.pad)
    return dense and pointwise and weight.shape[0] <= JOINED_CHANNELS and value.act == "relu"


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """All nodes in the order in which they run, those of a branch before the one that opens it."""
    found: list[Node] = []
    for node in nodes:
        if isinstance(node, Open):
            found.extend(in_order(node.branch))
        found.append(node)
    return found
