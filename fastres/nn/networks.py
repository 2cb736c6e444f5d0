"""The fused forward of networks and of ``nn.Sequential``: steps in order, in which stem, chains of blocks and head
fuse.

What is fused is decided at each forward, part by part; every step that no part takes in is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastres.checkpointing import run_blocks
from fastres.nn.blocks import FusedBlock, in_chains
from fastres.nn.bypass import (
    act_of,
    activation_reason,
    average_reason,
    conv_reason,
    norm_reason,
    pool_reason,
    rectified_norm_reason,
    say_once,
    watched,
)
from fastres.nn.classes import Fused, form
from fastres.nn.norm import norm_of, to_nchw, to_nhwc, track
from fastres.nn.roles import ACTIVATIONS, AVERAGES, BIASED_CONVS, CONTAINERS, CONVS, GELUS, IDENTITIES, NORMS, POOLS
from fastres.nn.stem import fused_biased_conv, fused_stem
from fastres.nn.structure import Stages, Step, is_block, is_network, tell
from fastres.ops import bn_relu, global_avg_pool

STEM, BIASED, BLOCKS, NORM, AVERAGE, CALL = "stem", "biased", "blocks", "norm", "average", "call"


class Part(NamedTuple):
    """Steps that run as one, or are called.

    Attributes:
        kind: ``STEM`` (convolution, BatchNorm, activation, perhaps a pool, in this order), ``BIASED`` (convolution with
            bias, activation), ``BLOCKS``, ``NORM`` (BatchNorm and activation behind pre-activation blocks), ``AVERAGE``
            (global) or ``CALL``.
        reason: where steps are called that look like one of these: why.
        stages: of ``BLOCKS`` that are a `Stages` its checkpoint_every, or -1 where that is 0.
    """

    kind: str
    steps: list[Any]
    reason: str | None = None
    stages: int = 0


def parts_of(steps: Sequence[Step], blocks: Callable[[nn.Module], bool] | None = None) -> list[Part]:
    """Group the steps of a network.

    Args:
        blocks: whether a module is a fused block; None: by its class.
    """
    flat = _opened(steps)
    parts: list[Part] = []
    while flat:
        part, taken = _first_part(flat, parts, blocks or _is_fused_block)
        flat = flat[taken:]
        if part.kind == BLOCKS and parts and parts[-1].kind == BLOCKS and part.stages == parts[-1].stages == 0:
            parts[-1].steps.extend(part.steps)
        else:
            parts.append(part)
    return parts


def _opened(steps: Sequence[Any]) -> list[Any]:
    """The steps with those of every ``nn.Sequential`` among them that nothing waits for, and without those that are
    None.

    A BatchNorm with ReLU in it is followed by that.
    """
    flat: list[Any] = []
    for step in steps:
        if isinstance(step, nn.Sequential) and opened_reason(step) is None:
            flat.extend(_opened(list(step._modules.values())))
        elif step is not None:
            flat += [step] if rectified_norm_reason(step) else [step, step.act]
    return flat


def opened_containers(steps: Sequence[Step]) -> list[nn.Module]:
    """Every ``nn.Sequential`` among the steps whose modules stand for it."""
    found: list[nn.Module] = []
    for step in steps:
        if isinstance(step, nn.Sequential) and opened_reason(step) is None:
            found += [step, *opened_containers(list(step._modules.values()))]
    return found


def opened_reason(container: nn.Module) -> str | None:
    """Why an ``nn.Sequential`` must be called, though its modules may be bypassed."""
    if container._compiled_call_impl is not None:
        return "an nn.Sequential is compiled"
    return CONTAINERS.reason(container)


def _is_fused_block(module: nn.Module) -> bool:
    return isinstance(module, FusedBlock)


def _first_part(steps: list[Any], before: list[Part], is_fused: Callable[[nn.Module], bool]) -> tuple[Part, int]:
    """What the steps begin with, and how many of them that are."""
    step = steps[0]
    if isinstance(step, Stages):
        return Part(BLOCKS, list(step.blocks), None, max(step.checkpoint_every, 0) or -1), 1
    if not isinstance(step, nn.Module):
        return Part(CALL, [step]), 1
    if is_fused(step):
        return Part(BLOCKS, [step]), 1
    if AVERAGES.of(type(step)) is not None:
        reason = average_reason(step)
        return Part(CALL if reason else AVERAGE, [step], reason), 1
    if len(steps) > 2 and not is_block(type(step)) and _is_norm(steps[1]):
        if _is_activation(steps[2]):
            return _first_layers(steps)
        if len(steps) > 3 and POOLS.of(type(steps[2])) is not None and GELUS.of(type(steps[3])) is not None:
            return _first_pooled(steps)
    if len(steps) > 1 and _is_norm(step) and _is_activation(steps[1]) and before and before[-1].kind == BLOCKS:
        act = act_of(steps[1])
        reason = norm_reason(step, rectified=act == "relu") or activation_reason(steps[1], act)
        return (Part(CALL, [step], reason), 1) if reason else (Part(NORM, steps[:2]), 2)
    if len(steps) > 1 and BIASED_CONVS.of(type(step)) is not None and _is_activation(steps[1]):
        reason = conv_reason(step, bias=True) or activation_reason(steps[1], act_of(steps[1]))
        return (Part(CALL, [step], reason), 1) if reason else (Part(BIASED, steps[:2]), 2)
    if rectified_norm_reason(step) is None:
        return Part(CALL, [step]), 2  # it calls its ReLU itself
    if len(steps) > 1 and CONVS.of(type(step)) is not None and _has_activation(steps[1]):
        return Part(CALL, [step], conv_reason(step) or rectified_norm_reason(steps[1])), 1
    if before and before[-1].kind == BLOCKS and _has_activation(step):
        return Part(CALL, [step], rectified_norm_reason(step)), 1
    return Part(CALL, [step]), 1


def _first_layers(steps: list[Any]) -> tuple[Part, int]:
    """A convolution, a BatchNorm and an activation, and the pool behind them."""
    conv, norm, activation = steps[:3]
    act = act_of(activation)
    reason = conv_reason(conv) or norm_reason(norm, rectified=act == "relu") or activation_reason(activation, act)
    if reason:
        return Part(CALL, [conv], reason), 1
    taken = 3
    if act == "relu" and len(steps) > 3 and isinstance(steps[3], nn.Module):
        pool = steps[3]
        taken += pool_reason(pool) is None or (isinstance(pool, nn.Identity) and IDENTITIES.reason(pool) is None)
    return Part(STEM, steps[:taken]), taken


def _first_pooled(steps: list[Any]) -> tuple[Part, int]:
    """A convolution, a BatchNorm, a pool and GELU, which is not monotone and so in another place than ReLU may be."""
    conv, norm, pool, activation = steps[:4]
    reason = conv_reason(conv) or norm_reason(norm) or pool_reason(pool) or activation_reason(activation, "gelu")
    return (Part(CALL, [conv], reason), 1) if reason else (Part(STEM, [conv, norm, activation, pool]), 4)


def _is_norm(step: Any) -> bool:
    return isinstance(step, nn.Module) and (NORMS.of(type(step)) is not None or "Norm" in type(step).__name__)


def _has_activation(step: Any) -> bool:
    """Whether it is a normalisation with an activation in it, as timm's are."""
    return _is_norm(step) and IDENTITIES.of(type(getattr(step, "act", nn.Identity()))) is None


def _is_activation(step: Any) -> bool:
    return isinstance(step, nn.Module) and (
        ACTIVATIONS.of(type(step)) is not None
        or GELUS.of(type(step)) is not None
        or type(step).__module__ == nn.ReLU.__module__
    )


def run_parts(parts: Sequence[Part], x: Tensor) -> Tensor:
    """Apply them in order."""
    coef = None  # what the last block knows of x's statistics
    for index, (kind, steps, _, stages) in enumerate(parts):
        if kind == BLOCKS:
            paired = index + 1 < len(parts) and parts[index + 1].kind == NORM
            x = run_blocks(steps, (x, None) if paired else x, max(stages, 0), in_chains)
            if paired:
                x, coef = x
        elif kind == STEM:
            x = fused_stem(x, steps[0], steps[1], steps[3] if len(steps) > 3 else None, act_of(steps[2]))
        elif kind == BIASED:
            x = fused_biased_conv(x, steps[0], act_of(steps[1]))
        elif kind == NORM:
            nhwc, statistics = bn_relu(to_nhwc(x), norm_of(steps[0], act_of(steps[1])), coef)
            track([steps[0]], [statistics])
            x = to_nchw(nhwc)
        elif kind == AVERAGE and x.dim() == 4:
            x = global_avg_pool(to_nhwc(x))[:, :, None, None]
        else:
            for step in steps:
                x = step(x)
    return x


@form(is_network)
class FusedNetwork(Fused):
    """The fused forward of a network, or of an ``nn.Sequential``."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes], or whatever the last step gives, of images [N, 3, H, W]."""
        if not isinstance(self, FusedNetwork):  # its fused class was taken off, and somebody kept this method
            return type(self).forward(self, x)
        steps = None
        if not watched(x):
            steps, reason = tell(self, running=True)
            if reason is not None:
                say_once(self, reason)
        if steps is None:
            return super().forward(x)
        parts = parts_of(steps)
        for part in parts:
            if part.reason is not None:
                say_once(self, part.reason, "a part of its eager forward")
        return run_parts(parts, x)
