"""Networks for inference: BatchNorm folded into the convolutions, shortcut and ReLU in their epilogues."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastres.nn.bypass import act_of, logger, pool_reason, unsupported, watched
from fastres.nn.fuse import unfuse
from fastres.nn.networks import STEM, opened_reason, parts_of
from fastres.nn.norm import geometry_of, norm_of, to_nchw, to_nhwc
from fastres.nn.report import Report, survey
from fastres.nn.roles import has_hooks, window_of
from fastres.nn.structure import (
    Block,
    is_block,
    is_network,
    projection_behind,
    projection_of,
    structure_of,
    tell,
)
from fastres.ops import Conv, bn_relu, conv_bias_act, repeat_block, repeat_conv_bias_act, repeat_max_pool
from fastres.ops.cpu import FoldedLayer, FoldedLayers, PackedBlock, PackedConv
from fastres.ops.plain import activated

if TYPE_CHECKING:
    from typing_extensions import Self


class _Inference(nn.Module):
    def train(self, mode: bool = True) -> Self:
        """Raises RuntimeError for ``mode`` True: there is no BatchNorm left to train."""
        if mode:
            raise RuntimeError("a folded network is for inference only: train the network that it was folded from")
        return super().train(mode)


class FoldedConv(_Inference):
    """``relu(conv(x) + bias (+ residual))`` of a convolution and the BatchNorm behind it.

    Differentiable in x and residual, then by PyTorch's own convolution. On a CPU the weight is kept in oneDNN's layout
    too. That a weight or bias was changed is noticed, but for writes that PyTorch does not see: through ``.data`` in
    place, NumPy, or another process that shares the memory; call `repack` after those.

    Args:
        conv: the convolution.
        bn: with running statistics; None: bias 0.
        act: the activation that follows, of `fastres.kernels.types.ACTIVATIONS`; None: none. GELU is a pass of its own.

    Raises:
        ValueError: for a convolution that the fused operations do not know, or a BatchNorm without running statistics.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: Any, bn: Any, act: str | None):
        super().__init__()
        if reason := unsupported(conv, bn, rectified=act == "relu"):
            raise ValueError(f"cannot fold: {reason}")
        with torch.no_grad():
            weight = conv.weight.detach()
            if bn is None:
                bias = torch.zeros(len(weight), device=weight.device)
            else:
                if bn.running_mean is None:
                    raise ValueError("cannot fold a BatchNorm without running statistics")
                scale = torch.rsqrt(bn.running_var.double() + bn.eps)
                scale = scale if bn.weight is None else scale * bn.weight.detach()
                bias = -bn.running_mean * scale
                bias = bias if bn.bias is None else bias + bn.bias.detach()
                weight = weight * scale[:, None, None, None]
            dtype = conv.weight.dtype
        self.geometry = geometry_of(conv)
        self.register_buffer("weight", weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(torch.promote_types(dtype, torch.float32)))
        self.act = act
        self.packed = PackedConv()
        self.training = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, C, H, W] and residual [N, C', H', W'] to channels-last [N, C', H', W']."""
        y = self._linear_or_relu(x, residual)
        return F.gelu(y) if self.act == "gelu" else y

    def _linear_or_relu(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if type(x) is Tensor and not _is_differentiated(x, residual):
            y = repeat_conv_bias_act(x, self.weight, self.bias, residual, self.act == "relu", self.packed)
            if y is not None:
                return y
        if watched(x) or _is_differentiated(x, residual):
            return self._plain(x, residual)
        nhwc = to_nhwc(x)
        conv = Conv(self.weight, self.geometry.stride, self.geometry.pad(nhwc.shape[1:3]), self.geometry.dilation)
        added = None if residual is None else to_nhwc(residual)
        return to_nchw(conv_bias_act(nhwc, conv, self.bias, added, self.act == "relu", self.packed))

    def plain(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same as the forward in PyTorch's own operations."""
        y = self._plain(x, residual)
        return F.gelu(y) if self.act == "gelu" else y

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        geometry = self.geometry
        padding = () if geometry.declared is not None or isinstance(geometry.padding, str) else geometry.padding
        if not padding:
            top, left, bottom, right = geometry.pad((x.shape[2], x.shape[3]))
            padding = (top, left)
            if padding != (bottom, right):
                x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        y = F.conv2d(x, self.weight, self.bias.to(x.dtype), geometry.stride, padding, geometry.dilation)
        y = y if residual is None else y + residual
        return torch.relu(y) if self.act == "relu" else y

    def repack(self) -> None:
        """Forget what was made of the weight and the bias."""
        self.packed.clear()


def repack(model: nn.Module) -> nn.Module:
    """Let a folded network notice that its weights were changed behind PyTorch's back, see `FoldedConv`; returns it."""
    for module in model.modules():
        if isinstance(module, FoldedConv):
            module.repack()
    return model


def _is_differentiated(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the operation, which has no derivative, will not do."""
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


class FoldedPool(_Inference):
    """A max-pool behind a ReLU, on a CPU in one pass.

    Args:
        pool: one that the fused stem takes.
    """

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool = pool
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, H', W']."""
        if type(x) is not Tensor or x.dim() != 4 or has_hooks(self.pool) or watched(x) or _is_differentiated(x, None):
            return self.pool(x)
        window = window_of(self.pool, (x.shape[2], x.shape[3]))
        y = None if window is None else repeat_max_pool(x, *window)
        return self.pool(x) if y is None else y


class FoldedBlock(_Inference):
    """A residual block of folded convolutions; the last one adds the shortcut."""

    def __init__(self, block: Block):
        super().__init__()
        last = len(block.layers) - 1
        self.convs = nn.ModuleList(
            FoldedConv(conv, bn, block.act if block.relu or index < last else None)
            for index, (conv, bn) in enumerate(block.layers)
        )
        self.residual = block.residual
        shortcut: Any = block.shortcut
        if (projection := projection_of(shortcut)) is not None:
            shortcut = FoldedConv(*projection, act=None)
        elif (found := projection_behind(shortcut)) is not None:
            shortcut = nn.Sequential(*found[0], FoldedConv(*found[1], act=None))
        self.downsample = shortcut
        self.training = False
        self.packed = PackedBlock()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to channels-last [N, C', H', W']."""
        if (at_once := self._at_once(x)) is not None:
            return at_once
        y = _in_order(self.convs[:-1], x)
        if not self.residual:
            return self.convs[-1](y)
        return self.convs[-1](y, x if self.downsample is None else self.downsample(x))

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result where nothing waits for a convolution's own call; None: they are to be called."""
        if type(x) is not Tensor or watched(x) or _is_differentiated(x, None):
            return None
        convs = tuple(map(_layer_of, self.convs))
        shortcut = None if self.downsample is None else _layer_of(self.downsample)
        if None in convs or (shortcut is None) != (self.downsample is None):
            return None
        return repeat_block(x, FoldedLayers(convs, shortcut, self.residual), self.packed)  # type: ignore[arg-type]


def _layer_of(module: nn.Module) -> FoldedLayer | None:
    if type(module) is not FoldedConv or has_hooks(module) or "forward" in module.__dict__ or module.act == "gelu":
        return None
    return FoldedLayer(module.packed, module.weight, module.bias)


class FoldedPreActBottleneck(_Inference):
    """A pre-activation block: the BatchNorm in front stays a pass of its own, the others are folded."""

    def __init__(self, block: Block):
        super().__init__()
        self.bn, self.act = block.layers[0][1], block.act
        norms = [bn for _, bn in block.layers[1:]] + [None]
        self.convs = nn.ModuleList(
            FoldedConv(conv, bn, None if bn is None else block.act)
            for (conv, _), bn in zip(block.layers, norms, strict=True)
        )
        self.residual = block.residual
        self.downsample = None if block.shortcut is None else FoldedConv(block.shortcut, None, act=None)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to channels-last [N, C', H', W']."""
        a = self.enter(x)
        y = _in_order(self.convs[:-1], a)
        if not self.residual:
            return self.convs[-1](y)
        return self.convs[-1](y, x if self.downsample is None else self.downsample(a))

    def enter(self, x: Tensor) -> Tensor:
        """The activation of ``bn(x)``, as the operation that is fused."""
        if watched(x):
            return activated(self.bn(x), self.act)
        return to_nchw(bn_relu(to_nhwc(x), norm_of(self.bn, self.act))[0])


def fold(model: nn.Module) -> nn.Module:
    """A copy for inference, BatchNorms folded into the convolutions; its state_dict has names of its own.

    What `fuse` leaves eager stays eager here too, in evaluation mode; a line is logged that says what (logger
    ``fastres``).

    Args:
        model: as `fuse` takes it, fused or eager.

    Raises:
        ValueError: where there is nothing to fold, or a BatchNorm has no running statistics.
    """
    model = unfuse(_copy(model)).eval().requires_grad_(False)
    holder = nn.Module()
    holder.model = model  # so that a block given alone has a parent too
    found = survey(model, planned=True)
    if not found.found:
        why = f" ({found.reasons()})" if found.left else ""
        raise ValueError(
            f"{type(model).__name__} has nothing to fold{why}: fold takes torchvision's and fastres.reference's "
            "ResNets, and what fastres.nn.register_block knows"
        )
    found.fused_blocks = found.stems = found.heads = 0
    _fold_blocks(holder, found)
    for module in list(holder.modules()):
        if is_network(type(module)):
            _fold_stems(module, found)
    logger.log(logging.WARNING if found.left else logging.INFO, "%s", str(found).replace(": fused", ": folded", 1))
    return holder.model.eval()


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; weights that a hook computed (pruned ones, say) are copied as values, which deepcopy refuses."""
    computed = [
        value
        for module in model.modules()
        for value in (*vars(module).values(), *module._buffers.values())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def _fold_blocks(holder: nn.Module, found: Report) -> None:
    folded: dict[nn.Module, nn.Module] = {}
    for parent in list(holder.modules()):
        for name, child in parent._modules.items():
            if child is None or not is_block(type(child)):
                continue
            if child not in folded and not (has_hooks(child) or "forward" in child.__dict__):
                structure, _ = structure_of(child)
                if structure is not None:
                    folded[child] = (FoldedPreActBottleneck if structure.preactivation else FoldedBlock)(structure)
                    found.fused_blocks += 1
            parent._modules[name] = folded.get(child, child)


def _fold_stems(network: nn.Module, found: Report) -> None:
    steps, reason = tell(network)
    if reason is not None:
        return
    parts = parts_of(steps, lambda module: False)
    occurrences = [id(step) for part in parts for step in part.steps]
    places = _places(network)
    for part in parts:
        if part.kind != STEM:
            continue
        where = [places.get(id(step), []) for step in part.steps[:3]]
        if any(len(place) != 1 for place in where[:2]) or any(occurrences.count(id(s)) > 1 for s in part.steps[:2]):
            continue
        (conv_at, name), (norm_at, norm_name) = where[0][0], where[1][0]
        rectified = act_of(part.steps[2]) == "relu"  # GELU stays a module
        conv_at._modules[name] = FoldedConv(part.steps[0], part.steps[1], "relu" if rectified else None)
        norm_at._modules[norm_name] = nn.Identity()
        if rectified and len(where[2]) == 1 and occurrences.count(id(part.steps[2])) == 1:  # else ReLU twice is ReLU
            activation_at, activation_name = where[2][0]
            activation_at._modules[activation_name] = nn.Identity()
        for pool in part.steps[3:] if rectified else ():
            if len(places.get(id(pool), [])) == 1 and occurrences.count(id(pool)) == 1 and pool_reason(pool) is None:
                pool_at, pool_name = places[id(pool)][0]
                pool_at._modules[pool_name] = FoldedPool(pool)
        found.stems += 1


def _places(network: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where the steps of a network stand: in itself, or in the containers that it opens."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    parents = [network]
    while parents:
        parent = parents.pop()
        for name, child in parent._modules.items():
            if isinstance(child, nn.Sequential) and opened_reason(child) is None:
                parents.append(child)
            elif child is not None:
                places.setdefault(id(child), []).append((parent, name))
    return places


def _in_order(convs: Iterable[nn.Module], x: Tensor) -> Tensor:
    for conv in convs:
        x = conv(x)
    return x
