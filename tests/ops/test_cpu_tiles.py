"""Our own convolutions in bf16: against fp64 with guard bands in each form of tiles, units, threads, NaN, infinities.

The plain form has the geometry of the AMX form, so that its packing, tails and epilogues are tested on every machine.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support_conv import BACKWARDS, Problem, exact, problems, taken_tiles
from support_flat import aten
from support_fused import relative_error
from support_kernels import assert_as_good, few_examples, guarded

from fastres.ops import cpu
from fastres.ops.backends.aten import Aten
from fastres.ops.backends.protocol import Activation, Convolution, Gradient
from fastres.ops.cpu import tiles

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
BF16 = torch.bfloat16
CHANNELS = st.sampled_from([1, 3, 16, 24, 32, 40, 64, 100])
# several units of images, of rows and of single pixels; widths that tiles take directly, in parts and gathered; strides
SIZES = [
    (9, (12, 10), 64, 40, 3, 1, (1, 1, 1, 1)),
    (2, (32, 32), 96, 33, 3, 1, (1, 1, 1, 1)),
    (3, (48, 47), 20, 24, 5, 2, (2, 1, 2, 2)),
    (5, (14, 28), 32, 16, 3, 2, (0, 0, 1, 1)),
    (3, (7, 7), 130, 70, 3, 1, (1, 1, 1, 1)),
    (4, (20, 19), 40, 72, 1, 1, (0, 0, 0, 0)),
    (3, (20, 19), 72, 40, 1, 2, (0, 0, 0, 0)),
    (5, (21, 20), 24, 72, 1, 1, (0, 0, 0, 0)),
    (1, (4, 4), 512, 64, 3, 1, (1, 1, 1, 1)),
    (9, (20, 32), 16, 16, 3, 1, (1, 1, 1, 1)),
    (5, (7, 14), 32, 12, 3, 1, (1, 1, 1, 1)),
]
# those, and outputs of whole vectors, which are finished in registers; stems, whose few channels make one run of a row
FOLDED_SIZES = SIZES[2:] + [
    (2, (21, 33), 3, 48, 7, 2, (3, 3, 3, 3)),
    (3, (13, 9), 1, 16, 5, 2, (2, 1, 2, 2)),
    (2, (10, 7), 4, 32, 3, 1, (1, 1, 1, 1)),
    (3, (5, 7), 16, 64, 3, 1, (1, 1, 1, 1)),
    (3, (9, 11), 64, 96, 1, 1, (0, 0, 0, 0)),
    (1, (17, 31), 40, 16, 1, 1, (0, 0, 0, 0)),
]


@pytest.fixture(params=list(tiles.FORMS))
def form(request):
    """Each form of tiles that the CPU has."""
    with taken_tiles(request.param):
        yield


def geometry(problem):
    return problem.stride, problem.pad, problem.dilation


def sizes(problem):
    x, w = problem.x(), problem.w()
    return tiles.sizes(tuple(x.shape), tuple(w.shape), *geometry(problem))


def assert_good_outputs(problem, normalised, added):
    x, w, coef = problem.x(), problem.w(), problem.coef() if normalised else None
    residual = problem.y(5) if added else None
    given = x, w, problem.stride, problem.pad, coef, residual
    y, moments = guarded(tiles.conv, x, w, *geometry(problem), coef, residual)
    eager, exactly = (aten.conv(*args, dilation=problem.dilation)[0] for args in (given, exact(given)))
    assert_as_good(y, eager, exactly)
    statistics = aten.finalize(moments, None, None, 1e-5)
    stored = aten.finalize(aten.moments(y.double()), None, None, 1e-5)
    assert relative_error(statistics[:2], stored[:2]) < 2e-6


def assert_good_data_grad(problem, backward, mask, added):
    x, w, coef, dz = problem.x(), problem.w(), problem.coef(), problem.y(7)
    y, abc = problem.batch_norm_backward(backward, 9)
    residual = problem.x(11) if added else None
    out = problem.x(13)
    end, below_coef = ((out, coef), None) if mask == "end" else (None, coef if mask == "below" else None)
    given = dz, y, abc, x, below_coef, w, problem.stride, problem.pad, residual
    options = {"need_dw": False, "dilation": problem.dilation}
    eager, exactly = (
        aten.conv_backward(*args, end=end if args is given else exact(end), **options)[:2]
        for args in (given, exact(given))
    )
    masked = {"none": (None, None, None), "end": (x, None, (out, coef)), "below": (x, coef, (x, coef))}[mask]
    dx, sums = guarded(tiles.data_grad, dz, y, abc, w, sizes(problem), residual, *masked[:2], below=masked[2])
    assert_as_good(dx, eager[0], exactly[0])
    assert (sums is None) == (mask == "none")
    if sums is not None:
        stored = aten.bn_sums(dx.double(), masked[2][0].double(), coef.double()).sum(0)
        assert relative_error(sums.sum(0), stored) < 2e-5


def assert_good_weight_grad(problem, backward, normalised):
    x, coef, dz = problem.x(), problem.coef() if normalised else None, problem.y(7)
    y, abc = problem.batch_norm_backward(backward, 9)
    dw = guarded(tiles.weight_grad, x, coef, dz, y, abc, sizes(problem))
    kernel = (problem.kernel,) * 2
    given = dz, y, abc, x, coef, problem.stride, problem.pad, kernel
    eager, exactly = (aten.conv_wgrad(*args, dilation=problem.dilation) for args in (given, exact(given)))
    assert_as_good(dw, eager, exactly, rounding=BF16)


@pytest.mark.usefixtures("form")
class TestDrawn:
    @few_examples
    @given(problems(), CHANNELS, CHANNELS, st.booleans(), st.booleans())
    def test_outputs(self, problem, inputs, outputs, normalised, added):
        assert_good_outputs(problem._replace(dtype=BF16, inputs=inputs, outputs=outputs), normalised, added)

    @few_examples
    @given(
        problems(),
        CHANNELS,
        CHANNELS,
        st.sampled_from(BACKWARDS),
        st.sampled_from(["none", "below", "end"]),
        st.booleans(),
    )
    def test_data_gradient(self, problem, inputs, outputs, backward, mask, added):
        assert_good_data_grad(problem._replace(dtype=BF16, inputs=inputs, outputs=outputs), backward, mask, added)

    @few_examples
    @given(problems(), CHANNELS, CHANNELS, st.sampled_from(BACKWARDS), st.booleans())
    def test_weight_gradient(self, problem, inputs, outputs, backward, normalised):
        assert_good_weight_grad(problem._replace(dtype=BF16, inputs=inputs, outputs=outputs), backward, normalised)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("of", SIZES, ids=str)
def test_units(of):
    problem = Problem(*of, dtype=BF16, seed=1, rank=0)
    assert_good_outputs(problem, True, True)
    assert_good_data_grad(problem, "trained", "below", True)
    assert_good_weight_grad(problem, "trained", True)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("of", SIZES, ids=str)
def test_gelu(of):
    problem, p = Problem(*of, dtype=BF16, seed=1, rank=0), Aten()
    x, w, coef, dz = problem.x(), problem.w(), problem.coef(), problem.y(7)
    y, abc = problem.batch_norm_backward("trained", 9)
    out, _ = guarded(tiles.conv, x, w, *geometry(problem), coef, act="gelu")
    dx, sums = guarded(tiles.data_grad, dz, y, abc, w, sizes(problem), None, x, coef, act="gelu", below=(x, coef))
    dw = guarded(tiles.weight_grad, x, coef, dz, y, abc, sizes(problem), "gelu")

    def oracle(dz, y, abc, x, coef, w):
        read, conv = Activation(x, coef, "gelu"), Convolution(w, *geometry(problem))
        dx, sums, dw = p.conv_backward(Gradient(dz, y, abc), read, conv)
        return p.conv(read, conv)[0], dx, dw, sums.sum(0)

    given = dz, y, abc, x, coef, w
    for ours, eager, exactly in zip((out, dx, dw), oracle(*given), oracle(*exact(given))):
        assert_as_good(ours, eager, exactly, rounding=BF16)
    stored = aten.bn_sums(dx.double(), x.double(), coef.double()).sum(0)
    assert relative_error(sums.sum(0), stored) < 2e-5


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shortcut, normalised", [(False, False), (True, False), (True, True)])
def test_joined_with_the_end_of_a_block(shortcut, normalised):
    """``out`` has the same bits as by the pass."""
    problem = Problem(5, (9, 11), 40, 24, 1, 1, (0, 0, 0, 0), BF16, 1, 0)
    y, w, coef, other = problem.x(), problem.w(), problem.coef(), problem._replace(seed=30).coef()
    added, added_coef = problem.x(5) if shortcut else None, other if normalised else None
    out = torch.full_like(y, torch.nan)
    got, _ = tiles.conv(y, w, 1, problem.pad, 1, coef, None, True, shortcut=added, shortcut_coef=added_coef, out=out)
    assert torch.equal(out, cpu.passes.bn_add_relu(y, coef, added, added_coef))
    assert torch.equal(got, tiles.conv(out, w, 1, problem.pad)[0])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("of", FOLDED_SIZES, ids=str)
def test_folded(of, relu, added):
    problem = Problem(*of, dtype=BF16, seed=1, rank=0)
    x, w, residual = problem.x(), problem.w(), problem.y(5) if added else None
    bias = torch.randn(problem.outputs)
    problem_sizes = sizes(problem)
    got = guarded(tiles.folded_conv, x, tiles.packed(w, problem_sizes), problem_sizes, bias, residual, relu)
    given = x, w, bias, problem.stride, problem.pad, residual, relu
    assert_as_good(got, aten.conv_bias_act(*given), aten.conv_bias_act(*exact(given)))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("of", [SIZES[0], SIZES[3], SIZES[5], SIZES[7], SIZES[8]], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(of):
    """But for the weight gradient's order of additions, which does with PyTorch's too."""
    problem, before, results = Problem(*of, dtype=BF16, seed=1, rank=0), torch.get_num_threads(), []
    x, w, coef, dz, y, abc = problem.x(), problem.w(), problem.coef(), problem.y(7), problem.y(8), problem.abc()
    try:
        for threads in (1, 2, 5, 11):
            torch.set_num_threads(threads)
            out, moments = tiles.conv(x, w, *geometry(problem), coef)
            dx, sums = tiles.data_grad(dz, y, abc, w, sizes(problem), None, x, coef, below=(x, coef))
            results.append([out, *moments, dx, sums])
            assert (
                relative_error(
                    tiles.weight_grad(x, coef, dz, y, abc, sizes(problem)),
                    tiles.weight_grad(x, coef, dz, y, abc, sizes(problem)).double(),
                )
                == 0
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (2, (10, 7), 3, 20, 5, 2, (2, 2, 2, 2))], ids=str)
def test_weights_in_fp32_are_packed_as_their_casts(size, transposed):
    problem = Problem(*size, BF16, 1, 3)
    w = torch.randn(problem.w().shape, generator=torch.Generator().manual_seed(1)) * 3
    ties = torch.tensor([float("inf"), -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])
    w.view(-1)[: 7 * len(ties) : 7] = ties
    single, cast = (guarded(tiles.packed, one, sizes(problem), transposed) for one in (w, w.to(BF16)))
    assert torch.equal(single, cast)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("width, inputs, outputs", [(5, 20, 10), (16, 20, 10), (8, 3, 32), (7, 36, 48)])
def test_nan_and_infinity_go_where_pytorch_lets_them(value, width, inputs, outputs):
    problem = Problem(2, (6, width), inputs, outputs, 3, 1, (1, 1, 1, 1), BF16, 1, 0)
    x, w, bias = problem.x(), problem.w(), torch.zeros(outputs)
    x[1, 2, 3, -1] = value
    y = F.conv2d(x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1)
    ours, _ = tiles.conv(x, w, *geometry(problem))
    assert torch.equal(ours.isfinite(), y.isfinite()) and torch.equal(ours.isnan(), y.isnan())
    packed = tiles.packed(w, sizes(problem))
    folded = tiles.folded_conv(x, packed, sizes(problem), bias)
    assert torch.equal(folded.isnan(), y.relu().isnan()) and torch.equal(folded.isinf(), y.relu().isinf())
    identity = torch.tensor([0.0, 1, 1, 1, 0])[:, None].repeat(1, inputs)
    rectified = F.conv2d(x.relu().permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1)
    assert torch.equal(tiles.conv(x, w, *geometry(problem), identity)[0].isfinite(), rectified.isfinite())
    # dz of a pixel reaches what its window reads, and only there
    dz = problem.y(7)
    dz[0, 0, 0, -1] = value
    dx, _ = tiles.data_grad(dz, None, None, w, sizes(problem))
    broken = (~dx.isfinite()).any(-1)
    assert broken[0, :2, :2].all() and broken.sum() == 4


@pytest.mark.usefixtures("form")
def test_statistics_of_a_large_mean_and_of_one_value():
    """Mean 1000 standard deviations away; a channel of one value has no variance at all."""
    x = torch.cat([torch.randn(4, 16, 16, 31), torch.ones(4, 16, 16, 1)], 3).to(BF16)
    w = torch.zeros(33, 1, 1, 32, dtype=BF16)
    w[:31, 0, 0, :31] = torch.eye(31)
    w[:, 0, 0, 31] = 1000
    y, moments = tiles.conv(x * torch.tensor([8.0] * 31 + [1]).to(BF16), w, 1, (0, 0, 0, 0))
    statistics, stored = aten.finalize(moments, None, None, 0.0), y.double().flatten(0, 2)
    assert (statistics[0] - stored.mean(0)).abs().max() < 1e-3
    assert (statistics[1, :31] / stored.var(0, correction=0)[:31] - 1).abs().max() < 1e-3
    assert (statistics[1, 31:] == 0).all() and (y[..., 31:] == 1000).all()


def test_the_environment_chooses_the_form(monkeypatch):
    tiles.form.cache_clear()
    try:
        for name, number in (("plain", 0), ("none", None)):
            monkeypatch.setenv("FASTRES_TILES", name)
            assert tiles.form() == number and tiles.takes(BF16) == (number is not None)
            tiles.form.cache_clear()
        assert not tiles.takes(torch.float32)
        monkeypatch.setenv("FASTRES_TILES", "neon")
        with pytest.raises(ValueError, match="FASTRES_TILES is 'neon': choose plain"):
            tiles.form()
    finally:
        tiles.form.cache_clear()
