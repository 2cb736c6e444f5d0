"""Every fused operation on the Triton kernels: results, gradients and statistics against fp64, over drawn shapes.

Interpreted where there is no GPU. All that a kernel makes starts as NaN between guard bands.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, note, seed, settings
from hypothesis import strategies as st
from support_fused import (
    assert_as_good_as_eager,
    cast,
    eager_bn_relu,
    eager_conv,
    eager_preact,
    eager_residual,
    eager_stem,
    leaves,
    new_statistics,
    random_layer,
    random_norm,
    random_weight,
    relu_apart,
)
from support_kernels import (
    DTYPES,
    assert_as_good,
    assert_same_bits,
    device,
    dtypes,
    few_examples,
    seeds,
)
from support_ops import opcheck
from support_triton import on_triton
from torch import Tensor

from fastres import ops
from fastres.kernels import buffers
from fastres.ops import Conv, Identity, Layer, Norm, Statistics
from fastres.reference.notebook import same_padding

UNFENCED = buffers.empty
BOTTLENECK, BASIC = (1, 3, 1), (3, 3)
KINDS = [{}, {}, dict(gamma=False), dict(frozen=True), dict(frozen=True, gamma=False)]


@pytest.fixture(autouse=True)
def triton(implementation):
    with on_triton():
        yield


# -- drawn blocks
# -------------------------------------------------------------------------------------------------------


def for_each(name: str, cases: st.SearchStrategy, check: Callable, count: int = 4) -> None:
    """Run ``check`` on ``count`` drawn cases, others for every name, the same ones every time."""

    @seed(zlib.crc32(name.encode()))
    @settings(few_examples, max_examples=count, phases=[Phase.generate])
    @given(cases)
    def run(case):
        check(*case)

    run()


def images() -> st.SearchStrategy[tuple[int, int, int]]:
    """N, H, W: odd and even, one image or two; more pixels than BatchNorm's gradient cancels out in."""
    sizes = st.tuples(st.sampled_from([2, 1]), st.integers(3, 7), st.integers(3, 9))
    return sizes.filter(lambda s: 24 <= s[0] * s[1] * s[2] <= 98)


def channels() -> st.SearchStrategy[int]:
    """Fewer than a tile and no multiple of one, or all of it."""
    return st.sampled_from([20, 3, 8, 16, 24])


def kinds() -> st.SearchStrategy[dict[str, bool]]:
    """BatchNorms, see `random_norm`."""
    return st.sampled_from(KINDS)


def dilations() -> st.SearchStrategy[int]:
    """Pixels from one tap to the next."""
    return st.sampled_from([1, 1, 2, 3, 4])


@st.composite
def residuals(draw: st.DrawFn, kernels: Sequence[int], shortcut: str) -> tuple:
    """dtype, options and (x, layers, shortcut tensor or layer) of a residual block, perhaps of a dilated one."""
    (n, height, width), widths = draw(images()), [draw(channels()) for _ in range(len(kernels) + 1)]
    stride, kind = 1 if shortcut == "identity" else draw(st.sampled_from([2, 1])), draw(kinds())
    if shortcut == "identity":
        widths[-1] = widths[0]
    if shortcut == "subsampled":
        widths[-1], stride = widths[0] + draw(st.sampled_from([0, 0, 8])), 2
    options = dict(relu=draw(st.sampled_from([True, True, False])), recompute=draw(st.booleans()))
    dtype, value_seed, tensorflow = draw(dtypes()), draw(seeds()), draw(st.booleans())
    dilation = 1 if tensorflow else draw(dilations())
    note(f"{n}x{height}x{width} {widths} kernels {kernels} stride {stride} {shortcut} {kind} {options} {dtype}")
    note(f"dilation {dilation}")
    torch.manual_seed(value_seed)
    strided = kernels.index(max(kernels))
    with device():
        x = torch.randn(n, height, width, widths[0], dtype=torch.float64)
        layers = []
        for i, kernel in enumerate(kernels):
            pad = None
            if i == strided and tensorflow:
                rows, columns = same_padding(height, kernel, stride), same_padding(width, kernel, stride)
                pad = (rows[0], columns[0], rows[1], columns[1])
            geometry = (stride, pad, dilation) if i == strided else ()
            layers.append(random_layer(*widths[i : i + 2], kernel, *geometry, **kind))
        out = n, -(-height // stride), -(-width // stride), widths[-1]
        added = {
            "tensor": lambda: torch.randn(out, dtype=torch.float64),
            "projection": lambda: random_layer(widths[0], widths[-1], 1, stride, **kind),
            "subsampled": lambda: Identity(stride, widths[-1] - widths[0]),
        }.get(shortcut, lambda: None)()
    return dtype, options, (x, layers, added)


def residual(x, layers, added, identity: bool = False, **options) -> tuple[Tensor, list[Tensor]]:
    """`residual_block` and what running statistics become that take in the batch's wholly."""
    out, statistics = ops.residual_block(x, layers, x if identity else added, **options)
    every = [*layers, added] if isinstance(added, Layer) else layers
    return out, moved([layer.norm for layer in every], statistics)


def moved(norms: Sequence[Norm], statistics: Sequence[Statistics]) -> list[Tensor]:
    """New running statistics moved by those of the BatchNorms that are not frozen."""
    found = []
    for norm, used in zip(norms, statistics):
        if norm.running_mean is None:
            running = new_statistics(used.coef.shape[1], used.coef)
            ops.update_running(*([t] for t in running), [used], [1.0])
            found += running
    return found


def with_statistics(eager: Callable) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """The eager twin and the statistics that its BatchNorms track."""

    def call(*arguments):
        tracked = []
        return eager(*arguments, tracked=tracked), tracked

    return call


@pytest.mark.parametrize("shortcut", ["identity", "projection", "tensor", "none", "subsampled"])
@pytest.mark.parametrize("kernels", [BOTTLENECK, BASIC], ids=["bottleneck", "basic"])
def test_residual_block(kernels, shortcut):
    for_each(f"{kernels} {shortcut}", residuals(kernels, shortcut), partial(check_residual, shortcut == "identity"))


@st.composite
def chains(draw: st.DrawFn, kernels: Sequence[int], shortcut: str) -> tuple:
    """dtype, what to keep, and (x, blocks, shortcut layer) of a block as `residuals` draws it and others behind it."""
    dtype, options, (x, layers, added) = draw(residuals(kernels, shortcut))
    kind, outputs, inner = draw(kinds()), len(layers[-1].weight), draw(channels())
    widths, blocks = [outputs, *[inner] * (len(kernels) - 1), outputs], [layers]
    with device():
        for _ in range(draw(st.sampled_from([2, 1]))):
            blocks.append([random_layer(*widths[i : i + 2], kernel, **kind) for i, kernel in enumerate(kernels)])
    note(f"then {len(blocks) - 1} blocks of widths {widths} {kind}")
    return dtype, options["recompute"], (x, blocks, added)


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("kernels", [BOTTLENECK, BASIC], ids=["bottleneck", "basic"])
def test_chain(kernels, shortcut):
    """Blocks at once: the next one's first convolution ends the block before, its gradient begins that backward."""

    def check(dtype, recompute, arguments):
        def fused(x, blocks, added):
            out, statistics = ops.residual_chain(x, blocks, added or x, recompute=recompute)
            every = [*(layer for layers in blocks for layer in layers), *([added] if added else [])]
            return out, moved([layer.norm for layer in every], statistics)

        def eager(x, blocks, added, tracked=None, **extra):
            per_block = []
            for index, layers in enumerate(blocks):
                per_block.append([])
                x = eager_residual(x, layers, (added or x) if index == 0 else x, tracked=per_block[-1], **extra)
            if tracked is not None:  # the projection's come last
                first = 2 * sum(layer.norm.running_mean is None for layer in blocks[0])
                tracked += per_block[0][:first] + sum(per_block[1:], []) + per_block[0][first:]
            return x

        prepare = partial(eager, relu=relu_apart)
        assert_as_good_as_eager(fused, with_statistics(eager), arguments, dtype, prepare)

    for_each(f"chain {kernels} {shortcut}", chains(kernels, shortcut), check, 3)


@st.composite
def projecting_chains(draw: st.DrawFn, kernels: Sequence[int]) -> tuple:
    """dtype, what to keep, and (x, blocks, projections) of a block as `residuals` draws it and two that are projected,
    perhaps with a stride."""
    dtype, options, (x, layers, _) = draw(residuals(kernels, "none"))
    blocks, projections, outputs = [layers], [], len(layers[-1].weight)
    with device():
        for _ in range(2):
            kind, stride = draw(kinds()), draw(st.integers(1, 2))
            widths = [outputs, *[draw(channels()) for _ in kernels]]
            strides = [stride] + [1] * (len(kernels) - 1)
            pairs = zip(widths, widths[1:], kernels, strides)
            blocks.append([random_layer(*sizes, **kind) for sizes in pairs])
            outputs = widths[-1]
            projections.append(random_layer(widths[0], outputs, 1, stride, **kind))
    note(f"then blocks of {[[tuple(layer.weight.shape) for layer in block] for block in blocks[1:]]}")
    return dtype, options["recompute"], (x, blocks, projections)


@pytest.mark.parametrize("kernels", [BOTTLENECK, BASIC], ids=["bottleneck", "basic"])
def test_a_chain_that_projects_on_its_way(kernels):
    """The gradient of a strided projection is added where that of the block before goes through its ReLU."""

    def check(dtype, recompute, arguments):
        def fused(x, blocks, projections):
            return ops.residual_chain(x, blocks, None, recompute=recompute, shortcuts=projections)[0]

        def eager(x, blocks, projections, **extra):
            for layers, projection in zip(blocks, [None, *projections]):
                x = eager_residual(x, layers, projection, **extra)
            return x

        assert_as_good_as_eager(fused, eager, arguments, dtype, partial(eager, relu=relu_apart))

    for_each(f"projecting chain {kernels}", projecting_chains(kernels), check, 3)


@pytest.mark.parametrize("kernel, shortcut", [(1, "none"), (3, "none"), (3, "projection"), (5, "none")])
def test_one_layer(kernel, shortcut):
    for_each(f"{kernel} {shortcut}", residuals((kernel,), shortcut), partial(check_residual, False))


def check_residual(identity: bool, dtype: torch.dtype, options: dict, arguments: tuple) -> None:
    def eager(x, layers, added, **extra):
        return eager_residual(x, layers, x if identity else added, options["relu"], **extra)

    assert_as_good_as_eager(
        partial(residual, identity=identity, **options),
        with_statistics(eager),
        arguments,
        dtype,
        partial(eager, relu=relu_apart),
    )


@st.composite
def preacts(draw: st.DrawFn, shortcut: str) -> tuple:
    """dtype and (x, layers, shortcut convolution) of a pre-activation bottleneck."""
    (n, height, width), widths = draw(images()), [draw(channels()) for _ in range(4)]
    stride, kind = 1 if shortcut == "identity" else draw(st.sampled_from([2, 1])), draw(kinds())
    if shortcut == "identity":
        widths[3] = widths[0]
    dtype, value_seed, dilation = draw(dtypes()), draw(seeds()), draw(dilations())
    note(f"{n}x{height}x{width} {widths} stride {stride} dilation {dilation} {shortcut} {kind} {dtype}")
    torch.manual_seed(value_seed)
    with device():
        x = torch.randn(n, height, width, widths[0], dtype=torch.float64)
        layers = [
            Layer(random_weight(*widths[i : i + 2], kernel), random_norm(widths[i], **kind), step, (pad,) * 4, dilation)
            for i, (kernel, step, pad) in enumerate([(1, 1, 0), (3, stride, dilation), (1, 1, 0)])
        ]
        added = Conv(random_weight(widths[0], widths[3], 1), stride) if shortcut == "projection" else None
    return dtype, (x, layers, added)


@pytest.mark.parametrize("shortcut", ["identity", "projection", "none"])
def test_preact_block(shortcut):
    identity = shortcut == "identity"

    def fused(x, layers, added):
        out, coef, statistics = ops.preact_block(x, layers, x if identity else added, next_coef=True)
        of_result = Statistics(coef, out.numel() // out.shape[3])
        return out, moved([*(la.norm for la in layers), Norm(None, None)], [*statistics, of_result])

    def eager(x, layers, added, **extra):
        return eager_preact(x, layers, x if identity else added, **extra)

    def eager_with_statistics(x, layers, added):
        tracked = []
        out = eager(x, layers, added, tracked=tracked)
        mean, var = out.detach().double().flatten(0, 2).mean(0), out.detach().double().flatten(0, 2).var(0)
        return out, [*tracked, mean, var]

    def check(dtype, arguments):
        assert_as_good_as_eager(fused, eager_with_statistics, arguments, dtype, partial(eager, relu=relu_apart))

    for_each(shortcut, preacts(shortcut), check)


# -- the other operations
# -----------------------------------------------------------------------------------------------


@st.composite
def stems(draw: st.DrawFn) -> tuple:
    """dtype, pool and (x, layer) of a stem.

    Small integers are exact in every dtype, sums of their products too: else roundings would choose other winners.
    """
    (n, height, width), (inputs, outputs) = draw(images()), (draw(channels()) for _ in range(2))
    kernel, stride, kind = draw(st.sampled_from([5, 3, 1])), draw(st.sampled_from([1, 2])), draw(kinds())
    pool = draw(st.sampled_from([(3, 2, (1, 1, 1, 1)), (3, 2, (0, 0, 1, 1)), (2, 3, (0, 0, 0, 0))]))
    dtype, value_seed, dilation = draw(dtypes()), draw(seeds()), draw(dilations())
    note(f"dilation {dilation}")
    note(f"{n}x{height}x{width} {inputs} to {outputs} kernel {kernel} stride {stride} pool {pool} {kind} {dtype}")
    torch.manual_seed(value_seed)
    with device():
        x = torch.randint(-1, 2, (n, height, width, inputs)).double()
        weight = torch.randint(-1, 2, (outputs, inputs, kernel, kernel)).double()
        layer = Layer(weight, random_norm(outputs, **kind), stride, (kernel // 2 * dilation,) * 4, dilation)
    return dtype, pool, (x, layer)


def test_stem():
    def check(dtype, pool, arguments):
        def fused(x, layer):
            out, statistics = ops.stem(x, layer, *pool)
            return out, moved([layer.norm], [statistics])

        def eager(x, layer, **extra):
            return eager_stem(x, layer, *pool, **extra)

        assert_as_good_as_eager(fused, with_statistics(eager), arguments, dtype, partial(eager, relu=relu_apart))

    for_each("stem", stems(), check, 6)


@st.composite
def norms(draw: st.DrawFn) -> tuple:
    """dtype, whether statistics are handed over, and (x, norm) of a BatchNorm."""
    (n, height, width), count, kind = draw(images()), draw(channels()), draw(kinds())
    dtype, handed, value_seed = draw(dtypes()), draw(st.booleans()), draw(seeds())
    note(f"{n}x{height}x{width}x{count} {kind} {dtype}, statistics handed over: {handed}")
    torch.manual_seed(value_seed)
    with device():
        x = torch.randn(n, height, width, count, dtype=torch.float64) * 3 + 1
        return dtype, handed, (x, random_norm(count, **kind))


def test_bn_relu():
    def check(dtype, handed, arguments):
        def fused(x, norm):
            coef = None
            if handed:
                var, mean = torch.var_mean(x.detach().float().flatten(0, 2), 0, correction=0)
                coef = torch.stack([mean, var, *torch.full((3, len(mean)), torch.nan, device=x.device)])
            out, used = ops.bn_relu(x, norm, coef)
            return out, moved([norm], [used])

        prepare = partial(eager_bn_relu, relu=relu_apart)
        assert_as_good_as_eager(fused, with_statistics(eager_bn_relu), arguments, dtype, prepare)

    for_each("bn_relu", norms(), check, 10)


@st.composite
def smooth_layers(draw: st.DrawFn) -> tuple:
    """dtype, whether the last activation is there, and (x, layers) of convolutions with GELU, perhaps strided."""
    (n, height, width), dtype, value_seed = draw(images()), draw(dtypes()), draw(seeds())
    kernels, kind = draw(st.sampled_from([(3,), (1, 3), (3, 3), (1, 3, 1)])), draw(kinds())
    widths, stride, dilation = [draw(channels()) for _ in range(len(kernels) + 1)], draw(st.sampled_from([1, 2])), 1
    relu = draw(st.booleans())
    note(
        f"{n}x{height}x{width} {widths} kernels {kernels} stride {stride} {kind} {dtype}, activation at the end: {relu}"
    )
    torch.manual_seed(value_seed)
    with device():
        x = torch.randn(n, height, width, widths[0], dtype=torch.float64)
        layers = [
            random_layer(*widths[i : i + 2], kernel, stride if i == 0 else 1, dilation=dilation, act="gelu", **kind)
            for i, kernel in enumerate(kernels)
        ]
    return dtype, relu, (x, layers)


def test_gelu():
    def check(dtype, relu, arguments):
        def fused(x, layers):
            return ops.residual_block(x, layers, None, relu)[0]

        assert_as_good_as_eager(fused, lambda x, layers: eager_residual(x, layers, None, relu), arguments, dtype)

    for_each("gelu", smooth_layers(), check, 6)


def test_gelu_behind_the_stem_and_before_a_shortcut():
    def check(dtype, pool, arguments):
        x, layer = arguments
        layer = layer._replace(norm=layer.norm._replace(act="gelu"))
        # no whole numbers here: ties between what the pool compares are for the test of ReLU
        layer = layer._replace(weight=torch.randn_like(layer.weight))
        stem = partial(eager_stem, kernel=pool[0], stride=pool[1], pad=pool[2])
        assert_as_good_as_eager(lambda x, layer: ops.stem(x, layer, *pool)[0], stem, (x, layer), dtype)

    for_each("gelu in a stem", stems(), check, 2)

    def block(dtype, options, arguments):
        x, layers, shortcut = arguments
        layers = [layer._replace(norm=layer.norm._replace(act="gelu")) for layer in layers]
        given = x, layers, shortcut
        fused, eager = partial(ops.residual_block, **options), partial(eager_residual, relu_last=options["relu"])
        assert_as_good_as_eager(lambda *args: fused(*args)[0], eager, given, dtype)

    for_each("gelu in a block", residuals(BASIC, "projection"), block, 3)

    def identity(dtype, options, arguments):
        x, layers, _ = arguments
        layers = [layer._replace(norm=layer.norm._replace(act="gelu")) for layer in layers]
        assert_as_good_as_eager(
            lambda x, layers: ops.residual_block(x, layers, x, **options)[0],
            lambda x, layers: eager_residual(x, layers, x, options["relu"]),
            (x, layers),
            dtype,
        )

    for_each("gelu before an identity", residuals(BOTTLENECK, "identity"), identity, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_global_avg_pool(dtype):
    x = torch.randn(3, 7, 5, 20, dtype=torch.float64, device=device())
    assert_as_good_as_eager(ops.global_avg_pool, lambda x: x.mean((1, 2)), (x,), dtype)


def test_conv_bias_act():
    def check(dtype, options, arguments):
        x, (layer,), added = (cast(argument, dtype) for argument in arguments)
        conv, bias = Conv(layer.weight, *layer[2:]), layer.norm.beta

        def eager(x, weight, bias, added):
            y = eager_conv(x.permute(0, 3, 1, 2), conv._replace(weight=weight)).permute(0, 2, 3, 1) + bias.to(x.dtype)
            y = y if added is None else y + added
            return F.relu(y) if options["relu"] else y

        with torch.no_grad():
            ours = ops.conv_bias_act(x, conv, bias, added, options["relu"])
            theirs = eager(x, conv.weight, bias, added)
            exact = eager(*(t if t is None else t.double() for t in (x, conv.weight, bias, added)))
        assert_as_good(ours, theirs, exact)

    for kernel, shortcut in ((1, "none"), (3, "tensor"), (5, "tensor")):
        for_each(f"conv_bias_act {kernel}", residuals((kernel,), shortcut), check, 5)


# -- the same operations, differently called
# ----------------------------------------------------------------------------


def fixed(shortcut: str, dtype: torch.dtype = torch.float32) -> tuple:
    """(x, layers, shortcut tensor or layer) of a bottleneck, leaves."""
    with device():
        x = torch.randn(2, 7, 5, 20)
        layers = [random_layer(20, 8, 1), random_layer(8, 8, 3), random_layer(8, 20, 1)]
        added = {"projection": lambda: random_layer(20, 20, 1), "tensor": lambda: torch.randn(2, 7, 5, 20)}
        return tuple(cast(a, dtype) for a in (x, layers, added.get(shortcut, lambda: None)()))


def preact_of(x: Tensor, layers: list[Layer]) -> Tensor:
    """A pre-activation block that ends with the channels it began with; the layers' norms fit their inputs."""
    norms = [layers[-1].norm, layers[0].norm, layers[1].norm]
    layers = [layer._replace(norm=norm) for layer, norm in zip(layers, norms)]
    return ops.preact_block(x, layers, x)[0]


SAME_BITS = {
    "residual": lambda x, layers, _: ops.residual_block(x, layers, x)[0],
    "preact": lambda x, layers, _: preact_of(x, layers),
    "stem": lambda x, layers, _: ops.stem(x, layers[0], 3, 2, (1, 1, 1, 1))[0],
    "bn_relu": lambda x, layers, _: ops.bn_relu(x, layers[-1].norm)[0],
    "global_avg_pool": lambda x, layers, _: ops.global_avg_pool(x),
}


@pytest.mark.parametrize("name", SAME_BITS)
def test_the_same_bits_every_time(name):
    arguments = fixed("none", torch.bfloat16)

    def step():
        out = SAME_BITS[name](*arguments)
        dout = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return out, *torch.autograd.grad(out, leaves(*arguments), dout, allow_unused=True)

    assert_same_bits(step(), step())


def test_the_same_bits_every_time_without_gradients():
    x, layers, _ = fixed("none", torch.bfloat16)
    conv, bias = Conv(layers[0].weight), layers[0].norm.beta
    assert_same_bits(*(ops.conv_bias_act(x, conv, bias) for _ in range(2)))


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_autocast_errs_no_more_than_eager(shortcut):
    identity = shortcut == "identity"

    def in_bf16(function):
        def call(x, layers, added):
            with torch.autocast(device().type, torch.bfloat16):
                out = function(x, layers, x if identity else added)
            return out.to(x.dtype)

        return call

    def fused(*arguments):
        out, _ = ops.residual_block(*arguments)
        assert out.dtype == torch.bfloat16
        return out

    assert_as_good_as_eager(
        in_bf16(fused),
        in_bf16(eager_residual),
        fixed(shortcut),
        torch.float32,
        lambda x, layers, added: eager_residual(x, layers, x if identity else added, relu=relu_apart),
        rounding=torch.bfloat16,
    )


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_opcheck_in_the_interpreter(shortcut, monkeypatch):
    monkeypatch.setattr(buffers, "empty", UNFENCED)  # behind a fence tensors begin where the fake ones do not
    x, layers, added = fixed(shortcut)
    opcheck(lambda: ops.residual_block(x, layers, x if added is None else added)[0])
