"""The blocks of `fastres.reference` and torchvision with a fused forward: same constructors, children and state.

A block's ``nn.Conv2d`` and ``nn.BatchNorm2d`` children hold the parameters and the modes; they are not called, so their
hooks do not run (the block's own do).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from fastres.nn.norm import conv_of, group_of, layer_of, norm_of, to_nchw, to_nhwc, track, unsupported
from fastres.ops import Identity, Layer, preact_block, residual_chain
from fastres.ops.layers import output_hw
from fastres.reference import cifar, notebook, preact
from fastres.reference.resnet import BasicBlock as EagerBasicBlock
from fastres.reference.resnet import Bottleneck as EagerBottleneck
from fastres.reference.speed import Widen as EagerWiden

LONGEST = 8  # blocks in a chain


def fused_residual(
    x: Tensor,
    blocks: Sequence[Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]],
    shortcut: nn.Module | None = None,
    residual: bool = True,
    relu: bool = True,
    keep: str = "all",
    identities: Sequence[Identity] | None = None,
) -> Tensor:
    """``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut(x))`` and the update of the running statistics.

    Args:
        x: [N, C, H, W], channels-last unless a copy is wanted.
        blocks: convolutions with their BatchNorms, in order, of one block and of others behind it.
        shortcut: of the first block, None: x itself. A convolution and a BatchNorm in an ``nn.Sequential`` join the
            operation, and so does what `identity_of` knows; any other module is called.
        residual: whether it has a shortcut at all.
        relu, keep, identities: see `residual_chain`.
    """
    nhwc = to_nhwc(x)
    hw = tuple(nhwc.shape[1:3])
    chain: list[list[Layer]] = []
    for pairs in blocks:
        chain.append([])
        for conv, bn in pairs:
            layer = layer_of(conv, bn, hw)
            hw = output_hw(hw, conv.kernel_size, layer.stride, layer.pad)
            chain[-1].append(layer)
    norms = [bn for pairs in blocks for _, bn in pairs]
    added: Tensor | Layer | Identity | None = None
    if residual and identity_of(shortcut) is not None:
        added = identity_of(shortcut)
    elif residual and is_projection(shortcut):
        added = layer_of(*shortcut, tuple(nhwc.shape[1:3]))
        norms.append(shortcut[1])
    elif residual:
        added = to_nhwc(shortcut(x))
    out, statistics = residual_chain(nhwc, chain, added, relu, keep, identities)
    track(norms, statistics)
    return to_nchw(out)


def is_projection(shortcut: nn.Module) -> bool:
    """Whether it is a convolution and a BatchNorm that the fused operation can take in."""
    return isinstance(shortcut, nn.Sequential) and len(shortcut) == 2 and unsupported(*shortcut) is None


def identity_of(shortcut: nn.Module | None) -> Identity | None:
    """What a shortcut without parameters does, if the fused operation can do it; None as shortcut is x itself."""
    if shortcut is None:
        return Identity()
    if type(shortcut) is notebook.Subsample:
        return Identity(shortcut.stride)
    if type(shortcut) is cifar.PaddedShortcut:
        return Identity(shortcut.stride, shortcut.added)
    return None


def fused_chain(x: Tensor, blocks: Sequence[_FusedResidual]) -> Tensor:
    """The blocks in order as one operation; all but the first have identity shortcuts, see `chains`."""
    first, *others = blocks
    pairs = [block.pairs() for block in blocks]
    identities = [identity_of(block.downsample) for block in others]
    return fused_residual(x, pairs, first.downsample, has_shortcut(first), keep=first.keep, identities=identities)


def chains(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The blocks in order, grouped into what `fused_chain` can do at once.

    A block joins the one before if its shortcut is an `Identity`, both keep the same for backward, take statistics over
    the same ranks and no hook waits for either. Chains are at most `LONGEST` blocks, so that gradients come early enough
    to be exchanged meanwhile.
    """
    groups: list[list[nn.Module]] = []
    for block in blocks:
        if groups and len(groups[-1]) < LONGEST and _joins(groups[-1][-1], block):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def in_chains(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Apply blocks in order, chains of them at once."""
    for chain in chains(blocks):
        x = chain[0](x) if len(chain) == 1 else fused_chain(x, chain)
    return x


def _joins(before: nn.Module, block: nn.Module) -> bool:
    fused = isinstance(before, _FusedResidual) and isinstance(block, _FusedResidual)
    return (
        fused
        and before.keep == block.keep
        and group_of(before.bn1) == group_of(block.bn1)
        and identity_of(block.downsample) is not None
        and has_shortcut(block)
        and not has_hooks(before)
        and not has_hooks(block)
    )


def conv_numbers(block: nn.Module) -> list[int]:
    """Of ``conv1``, ``conv2`` and ``conv3`` those that a block has."""
    return [i for i in (1, 2, 3) if hasattr(block, f"conv{i}")]


def has_shortcut(block: nn.Module) -> bool:
    """Whether a block is residual; torchvision's always are."""
    return getattr(block, "residual", True)


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for the module's own call."""
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


class _FusedResidual(nn.Module):
    """Forward of a block with ``conv1``, ``bn1``, ..., ``downsample`` and perhaps ``residual``.

    Attributes:
        keep: what stays for backward, ``"all"`` or ``"fewer"``, see `residual_chain`.
    """

    keep = "all"

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Convolutions with their BatchNorms."""
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in conv_numbers(self)]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to channels-last [N, C', H', W']."""
        return fused_chain(x, [self])


class BasicBlock(_FusedResidual, EagerBasicBlock):
    """`fastres.reference.resnet.BasicBlock`, fused."""


class Bottleneck(_FusedResidual, EagerBottleneck):
    """`fastres.reference.resnet.Bottleneck`, fused."""


class NotebookBlock(_FusedResidual, notebook.NotebookBlock):
    """`fastres.reference.notebook.NotebookBlock`, fused."""


class Widen(_FusedResidual, EagerWiden):
    """`fastres.reference.speed.Widen`, fused."""


class TorchvisionBasicBlock(_FusedResidual, torchvision_resnet.BasicBlock):
    """``torchvision.models.resnet.BasicBlock``, fused."""


class TorchvisionBottleneck(_FusedResidual, torchvision_resnet.Bottleneck):
    """``torchvision.models.resnet.Bottleneck``, fused."""


class PreActBottleneck(preact.PreActBottleneck):
    """`fastres.reference.preact.PreActBottleneck`, fused.

    Its BatchNorm in front needs the statistics of x, which the block before has on chip as it writes x. So a pair
    (x, coef) in gives such a pair out; a tensor gives a tensor, at the price of one more pass over x.
    """

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Convolutions with the BatchNorms of their inputs."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]

    def forward(self, x: Tensor | tuple[Tensor, Tensor | None]) -> Tensor | tuple[Tensor, Tensor | None]:
        """[N, C, H, W] to channels-last [N, C', H', W'], or both with the `preact_block`'s coef."""
        chained = isinstance(x, tuple)
        x, coef = x if chained else (x, None)
        nhwc = to_nhwc(x)
        first, hw, layers = tuple(nhwc.shape[1:3]), tuple(nhwc.shape[1:3]), []
        for conv, bn in self.pairs():
            layers.append(layer_of(conv, bn, hw))
            hw = output_hw(hw, conv.kernel_size, layers[-1].stride, layers[-1].pad)
        shortcut = None
        if self.residual:
            shortcut = nhwc if self.downsample is None else conv_of(self.downsample, first)
        by_batch = norm_of(self.bn1).running_mean is None
        out, out_coef, statistics = preact_block(nhwc, layers, shortcut, coef, chained and by_batch)
        track([bn for _, bn in self.pairs()], statistics)
        return (to_nchw(out), out_coef) if chained else to_nchw(out)


class ConvBNReLU(nn.Module):
    """Convolution without bias, BatchNorm and, unless ``relu`` is False, ReLU.

    Args:
        inputs, outputs: channels of x [N, inputs, H, W] and of the result.
        kernel, stride: of the convolution.
        padding: on all sides; None: half the kernel.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int | None = None,
        relu: bool = True,
    ):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to channels-last [N, outputs, H', W']."""
        return fused_residual(x, [[(self.conv, self.bn)]], residual=False, relu=self.relu)
