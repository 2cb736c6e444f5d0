"""Residual blocks: forward and every gradient against fp64, in all their shapes."""

from collections.abc import Sequence

import pytest
import torch
from support_fused import (
    assert_as_good_as_eager,
    cast,
    eager_conv,
    eager_norm,
    eager_residual,
    leaves,
    random_layer,
    random_norm,
    relative_error,
    with_grads,
)
from support_ops import opcheck
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastres.ops import Identity, Layer, residual_block, residual_chain
from fastres.ops.nodes import JOINED_CHANNELS
from fastres.ops.select import backend_for

SAME = (0, 0, 1, 1)
LOW = [torch.float32, torch.float16, torch.bfloat16]


def result(x, layers, shortcut, relu=True, recompute=False):
    return residual_block(x, layers, shortcut, relu, recompute)[0]


def image(n, height, width, channels):
    return torch.randn(n, height, width, channels, dtype=torch.float64)


def bottleneck(shortcut: str, stride: int = 1, **norm):
    """x, layers and shortcut of a bottleneck from 20 channels through 6 and 10, odd sizes throughout."""
    x = image(2, 7, 9, 20)
    outputs = 20 if shortcut in ("identity", "subsampled") else 36
    layers = [
        random_layer(20, 6, 1, **norm),
        random_layer(6, 10, 3, stride, **norm),
        random_layer(10, outputs, 1, **norm),
    ]
    hw = (-(-7 // stride), -(-9 // stride))
    added = {
        "identity": None,
        "none": None,
        "subsampled": Identity(stride),
        "padded": Identity(stride, 16),
        "projection": random_layer(20, outputs, 1, stride, **norm),
        "tensor": image(2, *hw, outputs),
    }[shortcut]
    return x, layers, added


def both(shortcut: str):
    """Fused and eager form of the same arguments; the identity is x itself."""
    if shortcut == "identity":
        return lambda x, la, _: result(x, la, x), lambda x, la, _: eager_residual(x, la, x)
    return result, eager_residual


@pytest.mark.parametrize(
    "shortcut, stride",
    [
        *(
            ("identity", 1),
            ("projection", 1),
            ("projection", 2),
            ("tensor", 1),
            ("tensor", 2),
            ("none", 1),
            ("none", 2),
        ),
        *(("subsampled", 1), ("subsampled", 2), ("subsampled", 3), ("padded", 1), ("padded", 2)),
    ],
)
def test_bottleneck_equals_fp64_eager(shortcut, stride):
    assert_as_good_as_eager(*both(shortcut), bottleneck(shortcut, stride), torch.float64)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_bottleneck_errs_no_more_than_eager(shortcut, dtype):
    x = torch.randn(4, 14, 14, 64, dtype=torch.float64)
    layers = [random_layer(64, 16, 1), random_layer(16, 16, 3), random_layer(16, 64, 1)]
    added = random_layer(64, 64, 1) if shortcut == "projection" else None
    assert_as_good_as_eager(*both(shortcut), (x, layers, added), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_basic_block_errs_no_more_than_eager(dtype):
    layers = [random_layer(24, 24, 3), random_layer(24, 24, 3)]
    assert_as_good_as_eager(*both("identity"), (image(3, 13, 10, 24), layers, None), dtype)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        dict(inputs=3, outputs=5, kernel=3),
        dict(inputs=3, outputs=8, kernel=5, stride=2, pad=(1, 1, 2, 2)),
        dict(inputs=7, outputs=1, kernel=1),
        dict(inputs=4, outputs=6, kernel=3, stride=2, pad=SAME),
        dict(inputs=4, outputs=6, kernel=3, gamma=False),
        dict(inputs=4, outputs=6, kernel=3, frozen=True),
        dict(inputs=4, outputs=6, kernel=3, frozen=True, gamma=False),
    ],
    ids=str,
)
def test_one_layer_equals_fp64_eager(layer, relu):
    assert_as_good_as_eager(
        lambda x, la: result(x, la, None, relu),
        lambda x, la: eager_residual(x, la, None, relu),
        (image(2, 8, 7, layer["inputs"]), [random_layer(**layer)]),
        torch.float64,
    )


@pytest.mark.parametrize("norm", [dict(gamma=False), dict(frozen=True), dict(frozen=True, gamma=False)], ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_norms_of_other_kinds(shortcut, norm):
    assert_as_good_as_eager(*both(shortcut), bottleneck(shortcut, **norm), torch.float64)


def test_one_frozen_norm_among_trained_ones():
    x, layers, _ = bottleneck("identity")
    layers[1] = random_layer(6, 10, 3, frozen=True)
    assert_as_good_as_eager(*both("identity"), (x, layers, None), torch.float64)


def test_a_batch_of_one_image():
    x, layers, _ = bottleneck("identity")
    assert_as_good_as_eager(*both("identity"), (x[:1], layers, None), torch.float64)


@pytest.mark.parametrize("shortcut", ["identity", "projection", "tensor"])
def test_recomputing_gives_the_same_bits(shortcut):
    arguments = [cast(a, torch.float32) for a in bottleneck(shortcut)]
    if shortcut == "identity":
        arguments[2] = arguments[0]
    outs = [result(*arguments, recompute=recompute) for recompute in (False, True)]
    dout = torch.randn_like(outs[0])
    wanted = leaves(*arguments[:2]) if shortcut == "identity" else leaves(*arguments)
    kept, recomputed = (torch.autograd.grad(out, wanted, dout) for out in outs)
    assert all(map(torch.equal, kept, recomputed))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_recomputing_casts_the_weights_again(memory_format):
    """Under autocast: no copy of them is kept, the bits are those of one that is, and a changed one is an error."""
    x, layers, _ = (cast(one, torch.float32) for one in bottleneck("identity"))
    weights = [one.weight.detach().to(memory_format=memory_format).requires_grad_() for one in layers]
    layers = [one._replace(weight=weight) for one, weight in zip(layers, weights)]
    grads, kept = [], []
    for recompute in (False, True):
        kept.append([])
        with (
            torch.autocast(x.device.type, torch.bfloat16),
            saved_tensors_hooks(lambda tensor, kept=kept[-1]: kept.append(tensor) or tensor, lambda tensor: tensor),
        ):
            out = result(x, layers, x, recompute=recompute)
        grads.append(torch.autograd.grad(out.float().square().sum(), weights, retain_graph=True))
    assert all(map(torch.equal, *grads))
    places = [{tensor.untyped_storage().data_ptr() for tensor in of_one} for of_one in kept]
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    rounded = backend_for(x.bfloat16()).rounds_weights(torch.bfloat16) and memory_format == torch.channels_last
    assert own <= places[1] and own & places[0] == (own if rounded else set())
    assert len(places[0]) - len(places[1]) == 1  # and the last convolution's output
    with torch.autocast(x.device.type, torch.bfloat16):
        out = result(x, layers, x, recompute=True)
    with torch.no_grad():
        weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.float().sum(), weights)


def test_statistics_are_those_of_each_convolution():
    x, layers, projection = bottleneck("projection", 2)
    _, statistics = residual_block(x, layers, projection)
    y, below = x.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    for layer, used in zip([*layers, projection], statistics):
        y = eager_conv(x.permute(0, 3, 1, 2) if layer is projection else below, layer)
        assert used.count == y.numel() // y.shape[1]
        torch.testing.assert_close(used.coef[0], y.mean((0, 2, 3)))
        torch.testing.assert_close(used.coef[1], y.var((0, 2, 3), correction=0))
        below = torch.relu(eager_norm(y, layer.norm))


def chain(kind: str, shortcut: str, length: int = 3, **norm):
    """x, the blocks of a chain and the shortcut of its first block."""
    x, first, added = bottleneck(shortcut, 2 if shortcut in ("projection", "tensor") else 1, **norm)
    c = 20 if shortcut == "identity" else 36
    if kind == "bottleneck":
        more = [[random_layer(c, 6, 1, **norm), random_layer(6, 10, 3, **norm), random_layer(10, c, 1, **norm)]]
    else:
        more = [[random_layer(c, 8, 3, **norm), random_layer(8, c, 3, **norm)]]
    return x, [first, *(more * (length - 1))], added


def eager_chain(x, blocks, shortcut, relu=True):
    for index, layers in enumerate(blocks):
        last = index == len(blocks) - 1
        x = eager_residual(x, layers, shortcut if index == 0 else x, relu or not last)
    return x


def both_chains(shortcut: str, **options):
    """As `both`."""
    fused = lambda x, blocks, added: residual_chain(x, blocks, added, **options)[0]  # noqa: E731
    if shortcut == "identity":
        return lambda x, b, _: residual_chain(x, b, x, **options)[0], lambda x, b, _: eager_chain(x, b, x)
    return fused, eager_chain


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_chain_whose_first_block_has_no_shortcut(dtype):
    """fp64 goes to ATen whatever is chosen, so this is what the other implementations see of it."""
    blocks = [random_layer(8, 8, 1), random_layer(8, 8, 3)], [random_layer(8, 6, 1), random_layer(6, 8, 1)]
    x = image(3, 5, 4, 8).to(dtype).double()
    exact = eager_chain(x, blocks, None)
    ours = residual_chain(cast(x, dtype), [cast(layers, dtype) for layers in blocks], None)[0]
    assert relative_error(ours, exact) < {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("shortcut", ["identity", "projection", "tensor", "none"])
def test_chain_equals_fp64_eager(shortcut, kind, recompute):
    assert_as_good_as_eager(*both_chains(shortcut, recompute=recompute), chain(kind, shortcut), torch.float64)


@pytest.mark.parametrize("norm", [dict(gamma=False), dict(frozen=True)], ids=str)
def test_norms_of_other_kinds_in_a_chain(norm):
    assert_as_good_as_eager(*both_chains("projection"), chain("bottleneck", "projection", **norm), torch.float64)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_chain_equals_its_blocks_one_by_one(shortcut, dtype):
    """To the bit, but for what a tensor's place in memory does to a product; so a block's errors are a chain's."""

    def one_by_one(x, blocks, added):
        for index, layers in enumerate(blocks):
            x = result(x, layers, (added or x) if index == 0 else x)
        return x

    arguments = chain("bottleneck", shortcut)
    at_once = both_chains(shortcut)[0]
    dout = torch.randn_like(at_once(*arguments))
    for one, other in zip(with_grads(at_once, arguments, dtype, dout), with_grads(one_by_one, arguments, dtype, dout)):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shortcut", ["identity", "projection", "subsampled"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_chain_that_narrows_on_its_way(kernel, shortcut, recompute):
    """Blocks behind the first that subsample and widen; one that could end the block before in its own convolution."""
    x, first, added = bottleneck(shortcut, 1 if shortcut == "identity" else 2)
    c = 20 if shortcut in ("identity", "subsampled") else 36
    blocks = [
        first,
        [random_layer(c, 6, kernel), random_layer(6, c + 5, 3, 2)],
        [random_layer(c + 5, 6, kernel), random_layer(6, c + 5, 3)],
        [random_layer(c + 5, 6, kernel, 2), random_layer(6, c + 5, 1)],
    ]
    shortcuts = [Identity(2, 5), Identity(), Identity(2)]

    def fused(x, blocks, added):
        return residual_chain(x, blocks, x if added is None else added, recompute=recompute, shortcuts=shortcuts)[0]

    def eager(x, blocks, added):
        for layers, shortcut in zip(blocks, [x if added is None else added, *shortcuts]):
            x = eager_residual(x, layers, shortcut)
        return x

    assert_as_good_as_eager(fused, eager, (x, blocks, added), torch.float64)


def projecting(act: str = "relu") -> tuple:
    """Arguments of a chain whose blocks have shortcuts of all kinds, two projected ones in a row."""
    blocks = [
        [random_layer(12, 6, 1, act=act), random_layer(6, 16, 3, act=act)],
        [random_layer(16, 6, 1, act=act), random_layer(6, 6, 3, 2, act=act), random_layer(6, 20, 1, act=act)],
        [random_layer(20, 20, 3, act=act)],
        [random_layer(20, 6, 3, 2, act=act), random_layer(6, 18, 1, act=act)],
        [random_layer(18, 10, 3, act=act)],
    ]
    projections = [random_layer(16, 20, 1, 2), random_layer(20, 18, 1, 2), random_layer(18, 10, 3)]
    return image(3, 9, 8, 12), blocks, projections


def projecting_shortcuts(projections: Sequence[Layer]) -> list[Identity | Layer]:
    return [projections[0], Identity(), *projections[1:]]


def eager_projecting(x: Tensor, blocks: Sequence, projections: Sequence[Layer]) -> Tensor:
    for layers, shortcut in zip(blocks, [None, *projecting_shortcuts(projections)]):
        x = eager_residual(x, layers, x if isinstance(shortcut, Identity) else shortcut)
    return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_chain_that_projects_on_its_way(dtype, act, recompute):
    def fused(x, blocks, projections):
        return residual_chain(x, blocks, None, recompute=recompute, shortcuts=projecting_shortcuts(projections))[0]

    assert_as_good_as_eager(fused, eager_projecting, projecting(act), dtype)


def test_statistics_of_projections_on_the_way_come_last():
    x, blocks, projections = projecting()
    shortcuts = [None, *projecting_shortcuts(projections)]
    out, ours = residual_chain(x, blocks, None, shortcuts=shortcuts[1:])
    own, projected = [], []
    for layers, shortcut in zip(blocks, shortcuts):
        x, used = residual_block(x, layers, shortcut)
        own += used[: len(layers)]
        projected += used[len(layers) :]
    assert len(projected) == 3
    torch.testing.assert_close(out, x)
    for one, other in zip(ours, own + projected, strict=True):
        assert one.count == other.count
        torch.testing.assert_close(one.coef, other.coef)


def test_a_projection_on_the_way_that_fits_nothing():
    x, blocks, projections = projecting()
    with pytest.raises(RuntimeError, match="size of the shortcut"):
        residual_chain(x, blocks[:2], None, shortcuts=[projections[0]._replace(stride=1)])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_padded_shortcut_errs_no_more_than_eager(dtype):
    layers = [random_layer(24, 40, 3, 2), random_layer(40, 40, 3)]
    assert_as_good_as_eager(*both("padded"), (image(3, 13, 10, 24), layers, Identity(2, 16)), dtype)


def test_gradcheck_of_a_padded_shortcut():
    x = image(1, 5, 4, 2).requires_grad_()
    layers = [cast(la, torch.float64) for la in (random_layer(2, 3, 3, 2), random_layer(3, 3, 1))]
    assert torch.autograd.gradcheck(lambda x: residual_block(x, layers, Identity(2, 1))[0], x)


def test_identities_that_fit_nothing():
    x, layers, _ = bottleneck("subsampled", 2)
    for bad in (Identity(3), Identity(2, 1), Identity()):
        with pytest.raises(RuntimeError, match="size of the shortcut"):
            residual_block(x, layers, bad)
    for bad, message in ((Identity(0), "non-positive stride"), (Identity(2, -1), "negative padding")):
        with pytest.raises(RuntimeError, match=message):
            residual_block(x, layers, bad)
    with pytest.raises(ValueError, match="1 shortcuts for 0 blocks behind the first"):
        residual_chain(x, [layers], Identity(2), shortcuts=[Identity()])


def test_wide_bottlenecks_are_not_joined_in_forward():
    """More channels than one program takes: the end of a block is a pass of its own."""
    x = image(1, 3, 2, 8)
    blocks = [[random_layer(8, JOINED_CHANNELS + 1, 1), random_layer(JOINED_CHANNELS + 1, 8, 1)]] * 2
    assert_as_good_as_eager(*both_chains("identity"), (x, blocks, None), torch.float64)


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_statistics_of_a_chain_are_those_of_its_blocks(shortcut):
    x, blocks, added = chain("bottleneck", shortcut)
    added = x if shortcut == "identity" else added
    out, ours = residual_chain(x, blocks, added)
    a, theirs, projected = x, [], []
    for index, layers in enumerate(blocks):
        a, used = residual_block(a, layers, added if index == 0 else a)
        theirs += used[: len(layers)]
        projected += used[len(layers) :]
    torch.testing.assert_close(out, a)
    for one, other in zip(ours, theirs + projected, strict=True):
        assert one.count == other.count
        torch.testing.assert_close(one.coef, other.coef)


def test_a_later_block_must_keep_the_size():
    x, layers, _ = bottleneck("identity")
    with pytest.raises(RuntimeError, match=r"size of the shortcut \[2, 20, 7, 9\] must match .* \[2, 20, 4, 5\]"):
        residual_chain(x, [layers, [layers[0], layers[1]._replace(stride=2), layers[2]]], x)


@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck_of_a_chain(recompute):
    x, blocks, projection = cast(list(chain("bottleneck", "projection", 2)), torch.float64)
    opcheck(lambda: residual_chain(x, blocks, projection, recompute=recompute)[0])


def test_gradcheck():
    x = image(2, 3, 4, 3).requires_grad_()
    layers = [
        cast(la, torch.float64) for la in (random_layer(3, 2, 1), random_layer(2, 2, 3, 2), random_layer(2, 4, 1))
    ]
    projection = cast(random_layer(3, 4, 1, 2), torch.float64)
    flat = leaves(layers, projection)

    def function(x, *flat):
        flat = iter(flat)
        rebuilt = [
            Layer(next(flat), la.norm._replace(gamma=next(flat), beta=next(flat)), la.stride, la.pad)
            for la in (*layers, projection)
        ]
        return residual_block(x, rebuilt[:3], rebuilt[3])[0]

    assert torch.autograd.gradcheck(function, (x, *flat))


def test_only_the_needed_gradients():
    x, layers, projection = bottleneck("projection")
    weight = layers[1].weight.requires_grad_()
    (alone,) = torch.autograd.grad(residual_block(x, layers, projection)[0].square().sum(), weight)
    everything = cast([x, layers, projection], torch.float64)
    out = residual_block(*everything)[0]
    (among_all,) = torch.autograd.grad(out.square().sum(), everything[1][1].weight)
    torch.testing.assert_close(alone, among_all)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shortcut", ["identity", "projection", "tensor", "padded"])
def test_opcheck(shortcut, recompute):
    x, layers, added = bottleneck(shortcut, 1 if shortcut == "identity" else 2)
    x, layers = cast([x, layers], torch.float64)
    added = x if shortcut == "identity" else added if shortcut == "padded" else cast(added, torch.float64)
    opcheck(lambda: residual_block(x, layers, added, recompute=recompute)[0])


def test_shortcut_of_another_size():
    x, layers, _ = bottleneck("none")
    with pytest.raises(RuntimeError, match=r"size of the shortcut \[2, 20, 7, 9\] must match .* \[2, 36, 7, 9\]"):
        residual_block(x, layers, x)


def test_one_value_per_channel():
    layer = Layer(torch.randn(4, 3, 3, 3), random_norm(4))
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size torch"):
        residual_block(torch.randn(1, 3, 3, 3), [layer])
