"""What surrounds a call changes nothing of it: default dtype and device, autocast, inference and deterministic mode."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support_ops import CASES, DIFFERENTIABLE, arguments, gradients
from support_triton import on_triton
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import ops
from fastres.ops import Conv, cpu
from fastres.ops.cpu import native, passes

ROOT = Path(__file__).parents[2]
FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "arange", "eye", "linspace", "rand", "randn", "as_tensor"}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp16": lambda: default_dtype(torch.float16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "deterministic": deterministic,
}


def run(name, dtype, forward, backward):
    """Result and gradients; each pass within its own surroundings."""
    values = arguments(name, dtype)
    with forward():
        out = CASES[name].fused(*values)
    with backward():
        return [out, *(gradients(out, values) if name in DIFFERENTIABLE else [])]


@contextmanager
def nothing():
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("name", CASES)
def test_defaults_do_not_matter(name, around, dtype):
    expected = run(name, dtype, nothing, nothing)
    context = SURROUNDINGS[around]
    assert all(map(torch.equal, run(name, dtype, context, context), expected))
    assert all(map(torch.equal, run(name, dtype, nothing, nothing), expected))


@pytest.mark.parametrize("around", ["fp64", "bf16"])
def test_defaults_do_not_matter_to_kernels(around):
    with on_triton():
        expected = run("basic", torch.float32, nothing, nothing)
        context = SURROUNDINGS[around]
        assert all(map(torch.equal, run("basic", torch.float32, context, context), expected))


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_does_not_see_autocast(name, dtype):
    expected = run(name, dtype, nothing, nothing)
    assert all(map(torch.equal, run(name, dtype, nothing, autocast), expected))
    expected = run(name, dtype, autocast, nothing)
    assert all(map(torch.equal, run(name, dtype, autocast, autocast), expected))


@pytest.mark.parametrize("name", CASES)
def test_inference_first_and_training_afterwards(name):
    expected = run(name, torch.float32, nothing, nothing)
    with torch.inference_mode():
        CASES[name].fused(*arguments(name, torch.float32))
    assert all(map(torch.equal, run(name, torch.float32, nothing, nothing), expected))


def test_a_packed_convolution_sees_neither():
    x, conv, bias, added = arguments("conv_bias_act", torch.float32)
    expected = ops.conv_bias_act(x, conv, bias, added)
    for around in SURROUNDINGS.values():
        packed = cpu.PackedConv()
        with torch.no_grad(), around():
            for _ in range(2):
                assert torch.allclose(ops.conv_bias_act(x, conv, bias, added, packed=packed), expected, atol=1e-5)
    low = x.to(torch.bfloat16), Conv(conv.weight.to(torch.bfloat16), *conv[1:]), bias, added.to(torch.bfloat16)
    with torch.no_grad(), autocast():
        assert torch.equal(
            ops.conv_bias_act(x, conv, bias, added, packed=cpu.PackedConv()),
            ops.conv_bias_act(*low, packed=cpu.PackedConv()),
        )


# -- memory ------------------------------------------------------------------------------------------------------------


def test_no_tensor_is_made_in_the_default_dtype_or_on_the_default_device():
    """In operations one is made by `fastres.kernels.buffers`, out of another tensor, or with both of them named."""
    for path in [*(ROOT / "fastres" / "ops").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                bare = isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES
                named = {keyword.arg for keyword in node.keywords} >= {"dtype", "device"}
                assert not bare or named, f"{path.name}:{node.lineno}"


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
class TestPointers:
    def test_what_a_pass_cannot_take(self):
        good = torch.zeros(4, 6, dtype=torch.float32)
        assert native.pointer(good, torch.float32, 24) == good.data_ptr()
        assert native.pointer(None, torch.float32, 24) is None
        for bad in (
            good.double(),
            good.t(),
            good[:3],
            good[:1].expand(4, 6),
            good.to("meta"),
            torch.empty(0, dtype=torch.float32),
        ):
            with pytest.raises(RuntimeError, match="contiguous torch.float32 tensor of at least 24 elements"):
                native.pointer(bad, torch.float32, 24)

    @pytest.mark.parametrize("wrong", ["dtype", "strides", "size"])
    def test_every_pass_looks(self, wrong):
        """Each primitive refuses coefficients, and activations, that are not what it reads."""
        spoil = {
            "dtype": lambda t: t.double(),
            "strides": lambda t: t.repeat_interleave(2, -1)[..., ::2],
            "size": lambda t: t[..., :1].contiguous(),
        }[wrong]
        y, coef, abc = (torch.randn(*shape, dtype=torch.float32) for shape in [(2, 3, 4, 8), (5, 8), (3, 8)])
        moments, sums = passes.moments(y), passes.bn_sums(y, y, coef)
        out, index = passes.bn_relu_max_pool(y, coef, 2, 2, (0, 0, 0, 0))
        calls = [
            lambda: passes.store_moments(y, spoil(y), None, moments),
            lambda: passes.store_moments(y, None, None, moments._replace(mean=spoil(moments.mean))),
            lambda: passes.finalize(moments._replace(m2=spoil(moments.m2)), None, None, 1e-5),
            lambda: passes.bn_add_relu(y, spoil(coef)),
            lambda: passes.store_bn_add_relu(y, coef, spoil(y), None, "relu", torch.empty_like(y)),
            lambda: passes.bn_add_relu_backward(y, y, spoil(y), coef),
            lambda: passes.bn_add_relu_backward(y, y, y, spoil(coef)),
            lambda: passes.bn_backward_apply(y, y, spoil(abc)),
            lambda: passes.bn_backward_coef(sums, spoil(coef), 24, True),
            lambda: passes.bn_relu_max_pool(y, spoil(coef), 2, 2, (0, 0, 0, 0)),
            lambda: passes.bn_relu_max_pool_backward(out, spoil(index), y, coef, 2, 2, (0, 0, 0, 0)),
            lambda: passes.patches(y, spoil(coef), y, 1, 1, (0, 0, 0, 0)),
        ]
        for number, call in enumerate(calls):
            with pytest.raises(RuntimeError, match="a compiled pass takes a contiguous"):
                call()
                raise AssertionError(f"call {number} went through")


def test_a_profiler_and_a_mode_see_the_operations():
    """Where nothing watches only their bodies run."""
    seen = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    values = arguments("basic", torch.float32)
    with Seen():
        CASES["basic"].fused(*values).sum().backward()
    with torch.autograd.profiler.profile() as profile:
        CASES["basic"].fused(*values).sum().backward()
    names = {"fastres::fused_forward", "fastres::fused_backward"}
    assert names <= seen and names <= {event.name for event in profile.function_events}
