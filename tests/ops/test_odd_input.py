"""Empty batches, meta and fake tensors, strange gradients and settings: as eager PyTorch does, or an error in its
words.
"""

import pytest
import torch
import torch.nn.functional as F
from support_fused import leaves, random_layer, random_norm
from support_ops import CASES, DIFFERENTIABLE, arguments, gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fastres import ops

DTYPES = [torch.float32, torch.bfloat16]


def changed(value, change):
    """The nest of arguments with ``change`` done to each tensor; those that needed gradients do so again."""
    if isinstance(value, Tensor):
        return change(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, list):
        return [changed(part, change) for part in value]
    return type(value)(*(changed(part, change) for part in value)) if hasattr(value, "_fields") else value


@pytest.mark.parametrize("name", CASES)
def test_no_image(name):
    """Forward and backward: results without images, gradients of zeros."""
    values = arguments(name, torch.float32)
    for index in (0, 2, 3):  # the image and the shortcut
        if index < len(values) and isinstance(values[index], Tensor) and values[index].dim() == 4:
            values[index] = values[index][:0].detach().requires_grad_()
    ours, theirs = CASES[name].fused(*values), CASES[name].eager(*values)
    assert ours.shape == theirs.shape and ours.shape[0] == 0
    for a, b in zip(gradients(ours, values), gradients(theirs, values), strict=True):
        assert torch.equal(a, b)


def test_no_image_moves_no_statistics():
    layers = [
        layer._replace(weight=layer.weight.float(), norm=ops.Norm(None, None)) for layer in [random_layer(3, 4, 3)]
    ]
    _, used = ops.residual_block(torch.randn(0, 5, 4, 3), layers)
    mean, var = torch.randn(4), torch.rand(4)
    before = mean.clone(), var.clone()
    for momentum in (0.1, torch.tensor(0.5)):
        ops.update_running([mean], [var], used, [momentum])
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
    _, filled = ops.residual_block(torch.randn(2, 5, 4, 3), layers)
    ops.update_running([mean, mean.clone()], [var, var.clone()], [*used, *filled], [0.1, 0.1])
    assert torch.equal(mean, before[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_saved_tensors_come_back_with_gaps(name, dtype):
    def with_gaps(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    values = arguments(name, dtype)
    expected = gradients(CASES[name].fused(*values), values)
    with saved_tensors_hooks(with_gaps, lambda tensor: tensor):
        out = CASES[name].fused(*values)
    assert all(map(torch.equal, gradients(out, values), expected))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_any_gradient_of_the_result(name, create_graph):
    values = arguments(name, torch.float32)
    out = CASES[name].fused(*values)

    def of(dout):
        return torch.autograd.grad(out, leaves(*values), dout, retain_graph=True, create_graph=create_graph)

    expected = of(torch.full(out.shape, 0.5))
    for dout in (
        torch.tensor(0.5).expand(out.shape),
        torch.full(out.shape[::-1], 0.5).permute(*reversed(range(out.dim()))),
        torch.full(out.shape, 0.5).to_sparse(),
    ):
        for a, b in zip(of(dout), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_on_meta(name):
    values = changed(arguments(name, torch.float32), lambda t: t.to("meta"))
    ours, theirs = CASES[name].fused(*values), CASES[name].eager(*values)
    assert ours.device.type == "meta" and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if name in DIFFERENTIABLE:
        for a, b in zip(*(torch.autograd.grad(t.sum(), leaves(*values)) for t in (ours, theirs)), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors(name):
    with FakeTensorMode():
        values = arguments(name, torch.float32)
        out = CASES[name].fused(*values)
        assert type(out).__name__ == "FakeTensor"
        torch.autograd.grad(out.sum(), leaves(*values))


@pytest.mark.parametrize("name", CASES)
def test_a_subclass_is_handed_on(name):
    class Marked(Tensor):
        pass

    values = arguments(name, torch.float32)
    expected = CASES[name].fused(*values)
    values[0] = values[0].detach().as_subclass(Marked)
    out = CASES[name].fused(*values)
    assert type(out) is type(CASES[name].eager(*values)) is Marked
    torch.testing.assert_close(out.as_subclass(Tensor), expected)


@pytest.mark.parametrize("eps", [0.0, -1.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_eps(eps, frozen):
    """Refused as PyTorch refuses it; 0 is right with running statistics, which PyTorch 2.11 refuses too."""
    x, norm = torch.randn(2, 5, 4, 3), random_norm(3, frozen=frozen)
    norm = ops.Norm(*(None if t is None else t.float() for t in norm[:4]), eps=eps)
    if frozen and eps == 0:
        exact = (x - norm.running_mean) / norm.running_var.sqrt() * norm.gamma + norm.beta
        x.requires_grad_()
        out, _ = ops.bn_relu(x, norm)
        torch.testing.assert_close(out, exact.relu())
        torch.autograd.grad(torch.autograd.grad(out.square().sum(), x, create_graph=True)[0].sum(), x)
        return
    with pytest.raises(ValueError, match="batch_norm eps must be"):
        F.batch_norm(x.permute(0, 3, 1, 2), *norm[2:4], *norm[:2], not frozen, 0.1, eps)
    with pytest.raises(ValueError, match="batch_norm eps must be"):
        ops.bn_relu(x, norm)
    with pytest.raises(ValueError, match="batch_norm eps must be"):
        ops.residual_block(x, [random_layer(3, 3, 1)._replace(weight=torch.randn(3, 3, 1, 1), norm=norm)])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_no_floating_point(dtype):
    x, norm = torch.ones(2, 5, 4, 3, dtype=dtype), ops.Norm(None, None)
    layer = ops.Layer(torch.randn(3, 3, 1, 1), norm)
    for call in (
        lambda: ops.bn_relu(x, norm),
        lambda: ops.global_avg_pool(x),
        lambda: ops.residual_block(x, [layer]),
        lambda: ops.preact_block(x, [layer]),
        lambda: ops.stem(x, layer, 3, 2, (1, 1, 1, 1)),
        lambda: ops.conv_bias_act(x, ops.Conv(layer.weight), torch.zeros(3)),
    ):
        with pytest.raises(RuntimeError, match="should be floating point"):
            call()
