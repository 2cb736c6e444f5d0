"""Programs of torch.export: fused and eager, training and frozen, and the portable one without an operation of ours."""

import copy
import io

import pytest
import torch
from support_nets import SMALL, perturbed, twins

from fastres.export import FromPixels, portable, to_program
from fastres.nn import fold

NAMES = ["bottleneck", "notebook", "preact"]  # every kind of block, stem and head


def operations(program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["eager", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_a_program_computes_the_same_bits_for_any_batch(name, kind, training):
    model = dict(zip(("eager", "fused"), twins(name, torch.float32)))[kind].train(training)
    twin = copy.deepcopy(model)
    program = to_program(model, 20)
    assert any(name.startswith("fastres.") for name in operations(program)) == (kind == "fused")
    module = program.module()
    for batch in (3, 1, 5) if not training else (3, 5):
        x = torch.randn(batch, 3, 20, 20)
        assert torch.equal(module(x), twin(x))
    tracked = dict(module.named_buffers())
    for buffer, value in twin.named_buffers():
        assert torch.equal(tracked[buffer], value), buffer


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_a_portable_network_equals_eager_in_plain_operations(name):
    model = perturbed(SMALL[name]()).eval()
    plain, x = portable(model), torch.randn(2, 3, 21, 18)
    torch.testing.assert_close(plain(x), model(x))
    torch.testing.assert_close(portable(fold(model))(x), model(x))
    torch._dynamo.reset()
    program = torch.export.export(plain, (x,))
    assert all(name.startswith("aten.") for name in operations(program))


@torch.no_grad()
def test_a_folded_network_stays_as_it_was():
    folded = fold(SMALL["preact"]().eval())
    kinds = [type(module) for module in folded.modules()]
    portable(folded)
    assert [type(module) for module in folded.modules()] == kinds


def test_a_saved_program_is_read_back():
    plain, buffer = portable(SMALL["basic"]()), io.BytesIO()
    torch.export.save(to_program(plain, 16), buffer)
    buffer.seek(0)
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(torch.export.load(buffer).module()(x), plain(x))


@torch.no_grad()
def test_pixels_are_normalised_inside():
    model = portable(perturbed(SMALL["basic"]()))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    expected = model((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    torch.testing.assert_close(FromPixels(model, mean, std)(pixels), expected)
