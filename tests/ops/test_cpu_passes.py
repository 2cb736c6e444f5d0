"""The compiled passes where the operations' tests do not look: against the ATen primitives, threads, parts, NaN."""

import pytest
import torch
import torch.nn.functional as F
from support_flat import Flat, aten
from support_fused import FLOOR, relative_error
from support_kernels import guarded

from fastres.ops import cpu
from fastres.ops.backends.cpp import Cpp
from fastres.ops.cpu import convolutions, passes, tiles

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(3, 7, 5, 33), (1, 1, 2, 8), (2, 40, 41, 16), (5, 3, 3, 600)]


def coef(channels):
    """Coefficients of a BatchNorm of values of mean 0.3 and variance 2."""
    mean, var = torch.full((channels,), 0.3) + torch.randn(channels) * 0.1, torch.rand(channels) + 1.5
    return aten.running_coef(mean, var, torch.rand(channels) + 0.5, torch.randn(channels), 1e-5)


def both(name, *arguments, **options):
    """A primitive's results in C++ and in ATen of fp64 copies; partial sums added up."""
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    results = getattr(passes, name)(*arguments, **options), getattr(aten, name)(*exact, **options)
    return zip(*(r if isinstance(r, tuple) else (r,) for r in results))


def assert_close(pairs, dtype):
    for ours, exact in pairs:
        if exact is None:
            assert ours is None
        elif ours.dim() == 3:  # [T, 2, C]
            assert relative_error(ours.sum(0), exact.sum(0)) < 2e-6
        elif ours.dtype == torch.uint8:
            assert torch.equal(ours, exact)
        else:
            assert ours.dtype in (dtype, torch.float32)
            assert relative_error(ours, exact) < FLOOR[ours.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstFp64:
    def test_statistics(self, shape, dtype):
        y, gamma, beta = torch.randn(shape, dtype=dtype) + 3, torch.rand(shape[3]), torch.randn(shape[3])
        ours = passes.finalize(passes.moments(y), gamma, beta, 1e-5)
        assert relative_error(ours, aten.finalize(aten.moments(y.double()), gamma, beta, 1e-5)) < 2e-6

    def test_coefficients_of_given_statistics(self, shape, dtype):
        mean, var, gamma, beta = (
            torch.randn(shape[3]),
            torch.rand(shape[3]),
            torch.rand(shape[3]),
            torch.randn(shape[3]),
        )
        for given in ((gamma, beta), (None, None)):
            assert_close(both("running_coef", mean.to(dtype), var.to(dtype), *given, 1e-5), torch.float32)

    @pytest.mark.parametrize("relu", [True, False])
    def test_normalise(self, shape, dtype, relu):
        y, shortcut = torch.randn(2, *shape, dtype=dtype)
        first, second = coef(shape[3]), coef(shape[3])
        assert_close(both("bn_add_relu", y, first, relu=relu), dtype)
        assert_close(both("bn_add_relu", y, first, shortcut, None, relu), dtype)
        assert_close(both("bn_add_relu", y, first, shortcut, second, relu), dtype)

    @pytest.mark.parametrize("relu", [True, False])
    def test_strided_and_narrower_shortcut(self, shape, dtype, relu):
        y, (n, h, w, c) = torch.randn(shape, dtype=dtype), shape
        shortcut = torch.randn(n, 2 * h, 2 * w - 1, (c + 1) // 2, dtype=dtype)
        assert_close(both("bn_add_relu", y, coef(c), shortcut, None, relu, 2), dtype)

    def test_gradient_of_a_strided_and_narrower_shortcut(self, shape, dtype):
        n, h, w, c = shape
        dx, gradient = torch.randn(n, 3 * h, 3 * w - 2, (c + 1) // 2, dtype=dtype), torch.randn(shape, dtype=dtype)
        expected = dx.clone()
        expected[:, ::3, ::3] += gradient[..., : dx.shape[3]]
        passes.add_gradient(dx, gradient, 3)
        assert torch.equal(dx, expected)
        with pytest.raises(RuntimeError, match="not that of pixels 2 apart"):
            passes.add_gradient(torch.empty(n, 5 * h, w, c, dtype=dtype), gradient, 2)

    def test_backward(self, shape, dtype):
        dout, y, shortcut = torch.randn(3, *shape, dtype=dtype)
        out = torch.randn(shape, dtype=dtype).relu()
        first, second = coef(shape[3]), coef(shape[3])
        assert_close(both("bn_add_relu_backward", dout, out, y, first), dtype)
        assert_close(both("bn_add_relu_backward", dout, None, y, first), dtype)
        assert_close(both("bn_add_relu_backward", dout, out, y, first, shortcut, second), dtype)
        assert_close(both("bn_sums", dout, y, first), dtype)
        apart = passes.bn_add_relu_backward(dout, out, y, first, shortcut, second)
        for backend in (passes, aten):
            ours = dout.clone()
            dz, *sums = backend.bn_add_relu_backward(ours, out, y, first, shortcut, second, in_place=True)
            assert dz is ours and torch.equal(dz, apart[0])
            if backend is passes:
                assert all(map(torch.equal, sums, apart[1:]))

    @pytest.mark.parametrize("training", [True, False])
    def test_backward_apply(self, shape, dtype, training):
        dz, y, residual = torch.randn(3, *shape, dtype=dtype)
        statistics, count = coef(shape[3]), y.numel() // shape[3]
        sums = passes.bn_sums(dz, y, statistics)
        pairs = list(both("bn_backward_coef", sums, statistics, count, training))
        assert_close(pairs, dtype)
        assert_close(both("bn_backward_apply", dz, y, pairs[0][0]), dtype)
        assert_close(both("bn_backward_apply", dz, y, pairs[0][0], residual), dtype)
        assert_close(both("bn_backward_apply", dz, None, pairs[0][0]), dtype)
        assert_close(both("bn_backward_apply", dz, None, pairs[0][0], residual), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kernel, stride, pad",
    [(3, 2, (1, 1, 1, 1)), (3, 2, (0, 0, 1, 1)), (2, 2, (0,) * 4), (3, 3, (0,) * 4), (3, 1, (1,) * 4)],
)
def test_max_pool(kernel, stride, pad, dtype):
    y, statistics = torch.randn(2, 9, 8, 17, dtype=dtype), coef(17)
    out, index = passes.bn_relu_max_pool(y, statistics, kernel, stride, pad)
    expected, expected_index = aten.bn_relu_max_pool(y, statistics, kernel, stride, pad)
    torch.testing.assert_close(out, expected)
    assert (index == expected_index).float().mean() > (1 if dtype == torch.float32 else 0.9) - 1e-6  # ties in bf16
    dout = torch.randn_like(out)
    dz, sums = passes.bn_relu_max_pool_backward(dout, index, y, statistics, kernel, stride, pad)
    exact, _ = aten.bn_relu_max_pool_backward(
        dout.double(), index, y.double(), statistics.double(), kernel, stride, pad
    )
    assert relative_error(dz, exact) < FLOOR[dtype]
    exact_sums = aten.bn_sums(dz.double(), y.double(), statistics.double())
    assert relative_error(sums.sum(0), exact_sums.sum(0)) < 2e-6


def test_a_max_pool_whose_winners_a_byte_does_not_hold_is_refused():
    with pytest.raises(ValueError, match="kernel of the max-pool is 17: at most 16"):
        passes.bn_relu_max_pool(torch.randn(1, 20, 20, 8), coef(8), 17, 2, (8, 8, 8, 8))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    "kernel, stride, pad", [(3, 2, (1, 1, 1, 1)), (3, 2, (0, 0, 1, 1)), (1, 2, (0,) * 4), (5, 3, (2,) * 4)]
)
def test_patches_are_unfold(kernel, stride, pad, normalised):
    x, statistics = torch.randn(2, 9, 8, 17), coef(17) if normalised else None
    a = x if statistics is None else aten.bn_add_relu(x, statistics)
    padded = F.pad(a, (0, 0, pad[1], pad[3], pad[0], pad[2])).permute(0, 3, 1, 2)
    columns = F.unfold(padded, kernel, stride=stride).view(2, 17, kernel * kernel, -1).permute(0, 3, 2, 1)
    like = F.conv2d(padded, torch.ones(1, 17, kernel, kernel), stride=stride).permute(0, 2, 3, 1)
    ours = passes.patches(x, statistics, like, kernel, stride, pad)
    torch.testing.assert_close(ours, columns.reshape(-1, kernel * kernel * 17))


def test_results_do_not_depend_on_the_number_of_threads():
    y, dz = torch.randn(2, 4, 33, 31, 24)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            statistics = passes.finalize(passes.moments(y), None, None, 1e-5)
            results.append([statistics, *passes.bn_add_relu_backward(dz, y, y, statistics)[:2]])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_go_through(dtype):
    y = torch.randn(1, 4, 4, 8, dtype=dtype)
    y[0, 1, 1, 2], y[0, 2, 2, 3], y[0, 3, 3, 4] = float("nan"), float("inf"), -float("inf")
    identity = torch.tensor([0.0, 1, 1, 1, 0])[:, None].repeat(1, 8)
    out = passes.bn_add_relu(y, identity)
    torch.testing.assert_close(out, y.relu(), equal_nan=True, rtol=0, atol=0)
    pooled, _ = passes.bn_relu_max_pool(y, identity, 3, 1, (1, 1, 1, 1))
    expected = F.max_pool2d(y.relu().permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(pooled, expected, equal_nan=True, rtol=0, atol=0)
    dz, _, _ = passes.bn_add_relu_backward(torch.ones_like(y), out, y, identity)
    torch.testing.assert_close(dz, torch.ops.aten.threshold_backward(torch.ones_like(y), out, 0), rtol=0, atol=0)


def test_statistics_of_a_large_mean():
    """Mean 1000 standard deviations away: sums of squares would leave nothing of the variance."""
    y = torch.randn(8, 56, 56, 64) + 1000
    statistics = passes.finalize(passes.moments(y), None, None, 0.0)
    exact = y.double().flatten(0, 2)
    assert (statistics[0] - exact.mean(0)).abs().max() < 1e-3
    assert (statistics[1] / exact.var(0, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel, stride, outputs", [(1, 1, 24), (1, 2, 24), (3, 1, 24), (3, 2, 24), (3, 2, 256)])
def test_parts_of_the_batch_are_the_whole(kernel, stride, outputs, dtype, monkeypatch):
    """Seven images in parts of two: the last part is of one."""
    monkeypatch.setattr(tiles, "form", lambda: None)
    p, pad = Flat(Cpp()), (kernel // 2,) * 4
    x, w = torch.randn(7, 9, 8, 16, dtype=dtype), torch.randn(outputs, kernel, kernel, 16, dtype=dtype) / 8
    statistics = coef(16)
    y = p.conv(x, w, stride, pad, statistics)[0]
    dz, residual, abc = torch.randn_like(y), torch.randn_like(x), torch.rand(3, outputs)

    def results():
        out, moments = p.conv(x, w, stride, pad, statistics)
        sums = p.conv_backward(dz, y, abc, x, statistics, w, stride, pad, residual.clone())
        plain = p.conv_backward(dz, y, abc, x, None, w, stride, pad)
        return [out, p.finalize(moments, None, None, 1e-5), sums[0], sums[1].sum(0), sums[2], plain[0], plain[2]]

    whole = results()
    both_bytes = (x[0].numel() + y[0].numel()) * x.element_size()
    monkeypatch.setattr(convolutions, "PART_BYTES", 2 * both_bytes)
    monkeypatch.setattr(convolutions, "WEIGHTS_SHARE", 0)
    assert len(convolutions._parts(x, y, w)) == 4
    for one, other in zip(results(), whole):
        assert relative_error(one, other.double()) < FLOOR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel, through_relu", [(1, True), (3, True), (1, False), (3, False)])
@pytest.mark.parametrize("form", [None, 0], ids=["PyTorch's convolutions", "tiles"])
def test_the_gradient_takes_the_joined_ones_memory(kernel, through_relu, dtype, form, monkeypatch):
    """Also where the residual is the gradient that comes in, as in a block of one convolution."""
    monkeypatch.setattr(tiles, "form", lambda: form)
    p, pad = Flat(Cpp()), (kernel // 2,) * 4
    x, dz, w = (
        torch.randn(7, 9, 8, 16, dtype=dtype),
        torch.randn(7, 9, 8, 16, dtype=dtype),
        torch.randn(16, kernel, kernel, 16),
    )
    arguments = x, coef(16) if through_relu else None, w.to(dtype), 1, pad
    monkeypatch.setattr(convolutions, "PART_BYTES", 4 * x[0].numel() * x.element_size())
    monkeypatch.setattr(convolutions, "WEIGHTS_SHARE", 0)
    assert len(convolutions._parts(x, dz, w)) == 4
    for same in (False, True):
        for abc in (None, torch.rand(3, 16)):
            given, residual = dz.clone(), torch.randn_like(x)
            residual = given if same else residual
            apart = p.conv_backward(given.clone(), x, abc, *arguments, residual.clone())
            dx, sums, dw = p.conv_backward(given, x, abc, *arguments, residual)
            assert dx.data_ptr() == residual.data_ptr()
            assert torch.equal(dx, apart[0]) and torch.equal(dw, apart[2])
            assert sums is apart[1] is None or torch.equal(sums, apart[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel, stride, pad", [(3, 2, (1, 1, 1, 1)), (2, 2, (0, 0, 0, 0)), (3, 1, (0, 2, 1, 0))])
def test_max_pool_is_pytorchs(kernel, stride, pad, dtype):
    """NaN of either sign, infinities and windows of negative numbers too, in whole vectors of channels and what is left
    over."""
    x = torch.randn(2, 9, 7, 35).to(dtype)
    x[0, 3, 3, ::2], x[1, 4, 4, ::3], x[1, :, :, 5] = torch.nan, torch.inf, -torch.inf
    x[1, 6, 2, ::4] = torch.tensor(torch.nan).neg()
    x[..., 6:9] = -x[..., 6:9].abs()
    top, left, bottom, right = pad
    padded = F.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom), value=-torch.inf)
    expected = F.max_pool2d(padded, kernel, stride).permute(0, 2, 3, 1)
    assert torch.equal(guarded(passes.max_pool, x, kernel, stride, pad).nan_to_num(7e4), expected.nan_to_num(7e4))
