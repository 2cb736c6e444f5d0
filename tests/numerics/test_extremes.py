"""Values at the ends of the range: scales of 1e-30 to 1e30, channels without variance, infinities, NaN.

Fused operations are finite exactly where eager PyTorch is, so nothing becomes NaN in silence and nothing hides one; and
what is finite errs as little as eager's. The cases are drawn, on ATen, the passes compiled for CPUs and the Triton
kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from support_fused import (
    FLOOR,
    cast,
    eager_bn_relu,
    eager_preact,
    eager_residual,
    eager_stem,
    new_statistics,
    random_layer,
    random_norm,
    relative_error,
    rounded,
    with_grads,
)
from support_kernels import device, few_examples
from support_triton import on_triton
from torch import Tensor

from fastres import ops
from fastres.ops import Conv, Layer, Norm, cpu

COUNTS = {"aten": 60, "cpp": 60, "triton": 5}
# Beyond this a relative error of eager's own says nothing but that the value is lost to cancellation or rounding.
LOST = 0.1


@pytest.fixture(params=COUNTS)
def backend(request):
    """The implementation, which says how many cases are drawn for it."""
    if request.param == "cpp" and (reason := cpu.unavailable()):
        pytest.skip(reason)
    with on_triton() if request.param == "triton" else ops.implementation(request.param):
        yield request.param


# -- drawn extremes ----------------------------------------------------------------------------------------------------


class Extreme:
    """What is drawn: the scales of x and of the weights, channels of one value, values that are not finite."""

    def __init__(self, dtype, x, weights, constant, wrong, where, frozen, seed):
        self.dtype, self.x_scale, self.weight_scale = dtype, x, weights
        self.constant, self.wrong, self.where, self.frozen, self.seed = constant, wrong, where, frozen, seed

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())

    @property
    def wrong_gradient(self) -> bool:
        """Whether it is the gradient that is not finite."""
        return self.wrong is not None and self.where == "dout"

    def image(self, *shape: int) -> Tensor:
        """fp64 [N, H, W, C] of the drawn scale."""
        x = torch.randn(shape, dtype=torch.float64) * self.x_scale
        if self.constant:
            x[..., 0] = self.x_scale
        if self.wrong is not None and self.where == "x":
            x[-1, shape[1] // 2, shape[2] // 3, -1] = self.wrong
        return x

    def layer(self, inputs: int, outputs: int, kernel: int, stride: int = 1, first: bool = True) -> Layer:
        """A layer of the drawn scale; running statistics, where it has them, are those of such a layer."""
        layer = random_layer(inputs, outputs, kernel, stride)
        scale = self.weight_scale * (self.x_scale if first else 1)
        norm = self.norm(outputs, scale)
        weight = layer.weight * self.weight_scale
        if self.constant:
            weight[0] = 0
        return layer._replace(weight=weight, norm=norm)

    def norm(self, channels: int, scale: float) -> Norm:
        """A BatchNorm of values of this scale."""
        norm = random_norm(channels, frozen=self.frozen, shift=0.5)
        if self.frozen:
            norm = norm._replace(running_mean=norm.running_mean * scale, running_var=norm.running_var * scale**2)
        return norm


def extremes(draw_frozen: bool = True) -> st.SearchStrategy[Extreme]:
    """Any of them, in a dtype that can hold the scales."""
    exponents = st.sampled_from([-30, -10, -3, 0, 0, 3, 10, 30])
    drawn = st.builds(
        Extreme,
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        x=exponents.map(lambda e: 10.0**e),
        weights=exponents.map(lambda e: 10.0**e),
        constant=st.booleans(),
        wrong=st.sampled_from([None, math.inf, -math.inf, math.nan]),
        where=st.sampled_from(["x", "dout"]),
        frozen=st.booleans() if draw_frozen else st.just(False),
        seed=st.integers(0, 2**16),
    )
    return drawn.filter(_can_hold)


def _can_hold(case: Extreme) -> bool:
    """Whether activations are finite in the dtype and, where more is asked of them, their squares are in fp32."""
    product = case.x_scale * case.weight_scale
    if case.dtype == torch.float16 and max(product, case.x_scale, case.weight_scale) > 1e3:
        return False
    return max(product, case.x_scale) <= (1e16 if case.frozen or case.wrong_gradient else 1e33)


# -- the comparison ----------------------------------------------------------------------------------------------------


@contextmanager
def another_rounding() -> Iterator[None]:
    """PyTorch's own CPU convolutions in place of oneDNN's: they add up in another order.

    Where a result is cancellation's rest, as the sum over a constant channel's gradient is, its error is luck, and
    differs by the machine: eager's bar is the larger of two draws of it.
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of what it sets beside
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def assert_same_places(
    ours: Tensor, eager: Tensor, again: Tensor, exact: Tensor, granted: float, name: str, whole: bool = False
) -> None:
    """Finite at the same places, and there as near to fp64 as eager is.

    Args:
        again: eager's result in `another_rounding`.
        granted: relative error that is always granted.
        whole: only whether anything is not finite must be the same.
    """
    wrong = ours.isfinite() != eager.isfinite()
    if whole:
        wrong = wrong.new_tensor(bool(ours.isfinite().all()) != bool(eager.isfinite().all()))
    assert not wrong.any(), (
        f"{name} {tuple(ours.shape)}: {int((wrong & eager.isfinite()).sum())} values not finite where eager's are, "
        f"{int((wrong & ours.isfinite()).sum())} finite where eager's are not"
    )
    finite = eager.isfinite() & exact.isfinite() & ours.isfinite()
    if finite.any() and granted < LOST:
        error, eagers = (relative_error(t[finite], exact[finite]) for t in (ours, eager))
        if again[finite].isfinite().all():
            eagers = max(eagers, relative_error(again[finite], exact[finite]))
        bound = max(5 * eagers, granted) if eagers < LOST else 10 * eagers
        assert error <= bound, f"{name} {tuple(ours.shape)}: error {error:.2e} over {bound:.2e}"


def granted(case: Extreme, tracked: list[Tensor]) -> float:
    """Relative error that rounding explains: that of the dtype, and fp32's of ``y*scale + shift`` where they nearly
    cancel.

    Args:
        tracked: exact mean and variance of each BatchNorm.
    """
    far = [mean.abs() / (var + 1e-5).sqrt() for mean, var in zip(tracked[::2], tracked[1::2])]
    farthest = max((f[f.isfinite()].amax().item() for f in far if f.isfinite().any()), default=0)
    return 2 * FLOOR[case.dtype] + 2**-22 * farthest


def compare(case: Extreme, fused: Callable, eager: Callable, arguments: tuple) -> None:
    """Result, gradients and statistics of both."""
    arguments = rounded(arguments, case.dtype)
    out, tracked = eager(*arguments)
    dout = torch.randn_like(out)
    if case.wrong_gradient:
        dout.view(-1)[dout.numel() // 2] = case.wrong
    with_case = partial(with_grads, dout=dout)
    ours, theirs = (with_case(f, arguments, case.dtype) for f in (fused, eager))
    with another_rounding():
        again = with_case(eager, arguments, case.dtype)
    exact = with_case(eager, arguments, torch.float64)
    bar = granted(case, tracked)
    for index, four in enumerate(zip(ours, theirs, again, exact, strict=True)):
        # Whether a padding's zero meets an infinite gradient, and makes NaN of it, is the convolution's own affair;
        # and where a far constant's normalised value is lost in rounding, whether its ReLU lets a NaN through is luck.
        whole = index > 0 and (case.wrong_gradient or bar >= LOST)
        assert_same_places(*four, bar, f"tensor {index}", whole)


def for_drawn(backend: str, check: Callable, **options: bool) -> None:
    """Run ``check`` on as many drawn cases as the backend can bear, the same ones every time."""

    @settings(few_examples, max_examples=COUNTS[backend], phases=[Phase.generate])
    @given(extremes(**options))
    def run(case):
        note(repr(case))
        torch.manual_seed(case.seed)
        check(case)

    run()


def running(used, like: Tensor, frozen: bool) -> list[Tensor]:
    """Mean and unbiased variance of each layer, as BatchNorms that take them over whole have them."""
    found: list[Tensor] = []
    for one in [] if frozen else used:
        pair = new_statistics(one.coef.shape[1], like)
        ops.update_running(*([t] for t in pair), [one], [1.0])
        found += pair
    return found


def moved(value):
    """The tensors in a nest of tuples and lists, where kernels run."""
    if isinstance(value, Tensor):
        return value.to(device())
    if isinstance(value, list):
        return [moved(part) for part in value]
    return type(value)(*map(moved, value)) if isinstance(value, (Norm, Layer, Conv)) else value


# -- the operations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_residual_blocks(backend, shortcut):
    def check(case):
        x = case.image(2, 6, 5, 8)
        outputs = 8 if shortcut == "identity" else 12
        layers = [
            case.layer(8, 4, 1),
            case.layer(4, 6, 3, first=False),
            case.layer(6, outputs, 1, first=False),
        ]
        added = case.layer(8, outputs, 1) if shortcut == "projection" else None

        def fused(x, layers, added):
            out, used = ops.residual_block(x, layers, x if added is None else added)
            return out, running(used, x, case.frozen)

        def eager(x, layers, added):
            tracked: list[Tensor] = []
            return eager_residual(x, layers, x if added is None else added, tracked=tracked), tracked

        compare(case, fused, eager, moved([x, layers, added]))

    for_drawn(backend, check)


def test_preactivation_blocks(backend):
    def check(case):
        x = case.image(2, 6, 5, 8)
        layers = [
            case.layer(8, 4, 1, first=False),
            case.layer(4, 6, 3, first=False),
            case.layer(6, 8, 1, first=False),
        ]
        layers[0] = layers[0]._replace(norm=case.norm(8, case.x_scale))
        layers[1] = layers[1]._replace(norm=case.norm(4, case.weight_scale))
        layers[2] = layers[2]._replace(norm=case.norm(6, case.weight_scale))

        def fused(x, layers):
            out, _, used = ops.preact_block(x, layers, x)
            return out, running(used, x, case.frozen)

        def eager(x, layers):
            tracked: list[Tensor] = []
            return eager_preact(x, layers, x, tracked), tracked

        compare(case, fused, eager, moved([x, layers]))

    for_drawn(backend, check)


def test_stems(backend):
    def check(case):
        pool = 3, 2, (1, 1, 1, 1)

        def fused(x, layer):
            out, used = ops.stem(x, layer, *pool)
            return out, running([used], x, case.frozen)

        def eager(x, layer):
            tracked: list[Tensor] = []
            return eager_stem(x, layer, *pool, tracked), tracked

        compare(case, fused, eager, moved([case.image(2, 9, 8, 3), case.layer(3, 8, 3, 2)]))

    for_drawn(backend, check)


def test_batchnorm_and_relu(backend):
    def check(case):
        def fused(x, norm):
            out, used = ops.bn_relu(x, norm)
            return out, running([used], x, case.frozen)

        def eager(x, norm):
            tracked: list[Tensor] = []
            return eager_bn_relu(x, norm, tracked), tracked

        compare(case, fused, eager, moved([case.image(2, 6, 5, 8), case.norm(8, case.x_scale)]))

    for_drawn(backend, check)


@torch.no_grad()
def test_folded_convolutions(backend):
    def check(case):
        x, conv = case.image(2, 6, 5, 8), case.layer(8, 12, 3)
        bias, added = torch.randn(12) * case.x_scale * case.weight_scale, case.image(2, 6, 5, 12)

        def fused(x, layer, bias, added):
            return ops.conv_bias_act(x, Conv(layer.weight, layer.stride, layer.pad), bias, added)

        def eager(x, layer, bias, added):
            y = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, bias.to(x.dtype), padding=1)
            return torch.relu(y.permute(0, 2, 3, 1) + added)

        arguments = rounded(moved([x, conv, bias.double(), added]), case.dtype)
        exact = eager(*arguments)
        ours, theirs = (f(*(cast(a, case.dtype) for a in arguments)).double() for f in (fused, eager))
        with another_rounding():
            again = eager(*(cast(a, case.dtype) for a in arguments)).double()
        assert_same_places(ours, theirs, again, exact, 2 * FLOOR[case.dtype], "result")

    for_drawn(backend, check)


FROZEN = {
    "bn_relu": lambda x: ops.bn_relu(x, frozen(random_norm(8, frozen=True)))[0],
    "identity": lambda x: ops.residual_block(x, frozen_layers(4, 6, 8), x)[0],
    "projection": lambda x: ops.residual_block(x, frozen_layers(4, 6, 8), *frozen_layers(8))[0],
    "fewer": lambda x: ops.residual_block(x, frozen_layers(4, 6, 8), x, recompute=True)[0],
    "chain": lambda x: ops.residual_chain(x, [frozen_layers(4, 8), frozen_layers(6, 8)], x)[0],
    "preact": lambda x: ops.preact_block(x, frozen_layers(4, 6, 8, before=True), x)[0],
    "stem": lambda x: ops.stem(x, *frozen_layers(6), 3, 2, (1, 1, 1, 1))[0],
}


def frozen(part):
    """In fp32, where kernels run."""
    return moved(cast(part, torch.float32))


def frozen_layers(*outputs: int, before: bool = False) -> list[Layer]:
    """Layers with running statistics that follow one another, from 8 channels on; their BatchNorms stand ``before``
    them.
    """
    layers = []
    for inputs, channels in zip((8, *outputs), outputs):
        layer = random_layer(inputs, channels, 3, frozen=True)
        norm = random_norm(inputs, frozen=True) if before else layer.norm
        layers.append(frozen(layer._replace(norm=norm)))
    return layers


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_norms_gradient_does_not_read_what_it_normalised(backend, name, wrong):
    """It is A*dz, finite where y is not: in A*dz + B*y + C with B = 0 it would be NaN."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 8)
    x[1, 2, 3, 4] = wrong
    x = x.to(device()).requires_grad_()
    out = FROZEN[name](x)
    assert not out.isfinite().all() or wrong == -math.inf
    out.backward(torch.randn(out.shape).to(device()))
    assert x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_running_statistics_keep_what_is_not_finite_apart(backend, momentum, wrong):
    coef = torch.rand(5, 4).to(device())
    coef[0, 1] = coef[1, 2] = wrong
    mean, var = torch.zeros(4).to(device()), torch.ones(4).to(device())
    ops.update_running([mean], [var], [ops.Statistics(coef, 10)], [momentum])
    assert mean.isfinite().tolist() == [True, False, True, True]
    assert var.isfinite().tolist() == [True, True, False, True]
