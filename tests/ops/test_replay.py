"""Walks of a GPU made again as lists of launches: the same bits, memory and operations between them.

Without a GPU the kernels are interpreted and the vendor's part is ATen's; both take the addresses that a GPU would.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from support_fused import cast, random_layer, random_norm
from support_kernels import INTERPRETED, assert_same_bits, device
from support_launches import driver_stand_in, on_stand_in
from support_triton import fp32_products

from fastres import ops
from fastres.kernels.launch import launch, spoil
from fastres.ops.backends import replay, timed
from fastres.ops.backends.aten import Aten
from fastres.ops.backends.launches import ENVIRONMENT, ByDriver, ByTriton
from fastres.ops.backends.protocol import Activation, Convolution, Gradient
from fastres.ops.backends.replay import Programs, Recording
from fastres.ops.backends.triton import Triton, Vendor

BF16 = torch.bfloat16


class Remembered(Aten):
    """ATen, remembering its walks."""

    def __init__(self):
        self.programs = Programs()

    def repeated(self, key, inputs, walk):
        return self.programs.repeated(key, inputs, walk)


@pytest.fixture(params=["triton", "driver", "vendor", "aten"])
def backend(request, monkeypatch):
    """Of repeated walks: launches by Triton, by the driver, those with ATen's convolutions between, ATen's alone."""
    by_driver = request.param in ("driver", "vendor")
    monkeypatch.setenv(ENVIRONMENT, "driver" if by_driver else "triton")
    with on_stand_in(), fp32_products(), driver_stand_in() if by_driver and INTERPRETED else nullcontext():
        made = {"aten": Remembered, "vendor": Vendor}.get(request.param, Triton)()
        with ops.implementation(made):
            yield made


def drawn(shortcut: str, width: int = 8, images: int = 2):
    """x and the layers of a block, fp64."""
    with device():
        x = torch.randn(images, 6, 6, 16, dtype=torch.float64)
        layers = [random_layer(16, width, 1), random_layer(width, width, 3), random_layer(width, 16, 1)]
        return x, layers, random_layer(16, 16, 1) if shortcut == "projection" else None


def step(made, dtype=torch.float32, factor=1.0):
    """Results and gradients of a block."""
    x, layers, added = (cast(one, dtype) for one in made)
    x = (factor * x).detach().requires_grad_()
    out, used = ops.residual_block(x, layers, x if added is None else added)
    weights = [layer.weight for layer in layers]
    grads = torch.autograd.grad(out.float().square().sum(), [x, *weights, layers[0].norm.gamma])
    return [out.detach(), *(one.coef for one in used), *grads]


def programs(backend) -> list[replay.Program]:
    return [one for one in backend.programs.known if isinstance(one, replay.Program)]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_a_repetition_has_the_bits_of_a_walk(backend, shortcut, dtype):
    torch.manual_seed(0)
    made = drawn(shortcut)
    walks = {factor: step(made, dtype, factor) for factor in (1.0, -0.5)}  # the second is noted
    assert len(programs(backend)) == 2  # forward and backward
    for factor in (1.0, -0.5, 1.0):
        assert_same_bits(step(made, dtype, factor), walks[factor])
    assert not any(known is False for known in backend.programs.known)
    by_driver = os.environ[ENVIRONMENT] == "driver"
    assert {type(one._launch) for one in programs(backend)} == {ByDriver if by_driver else ByTriton}


def test_a_repetition_walks_no_more(backend, monkeypatch):
    torch.manual_seed(0)
    made = drawn("identity")
    results = [step(made) for _ in range(2)]
    monkeypatch.setattr(type(backend), "conv", lambda *_, **__: pytest.fail("walked"))
    assert_same_bits(step(made), results[0])


def test_other_shapes_and_dtypes_walk_for_themselves(backend):
    torch.manual_seed(0)
    for images in (1, 2, 3):
        for dtype in (torch.float32, BF16):
            made = drawn("identity", images=images)
            for _ in range(2):
                step(made, dtype)
    assert len(programs(backend)) == 12


@pytest.mark.parametrize("small", [0, 2**20])
def test_memory_goes_as_it_comes(backend, monkeypatch, small):
    """What no result is has gone after a repetition, and results share nothing with one another or with the next."""
    monkeypatch.setattr(replay, "SMALL", small)
    torch.manual_seed(0)
    made, alive = drawn("projection"), weakref.WeakSet()
    for _ in range(2):
        step(made)
    empty, pieces = torch.empty_strided, []

    def counted(*args, **options):
        tensor = empty(*args, **options)
        alive.add(tensor)
        pieces.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty_strided", counted)
    first = step(made)
    again = step(made)
    gc.collect()
    places = [t.untyped_storage().data_ptr() for t in (*first, *again)]
    assert len(set(places)) == len(places) and (pieces or isinstance(backend, Aten))
    assert {t.untyped_storage().data_ptr() for t in alive} <= set(places)


def test_the_least_recent_go_first(backend, monkeypatch):
    monkeypatch.setattr(replay, "MOST_PROGRAMS", 2)
    torch.manual_seed(0)
    norm = cast(random_norm(8), torch.float32)
    for images in range(1, 5):
        for _ in range(3):
            with torch.no_grad():
                ops.bn_relu(torch.randn(images, 3, 4, 8, device=device()), norm)
    assert len(backend.programs._known) == 2


def repeated(walk, *inputs, times=3):
    """The results of walks of one kind, and what is known of it."""
    known = Programs()
    with on_stand_in():
        results = [known.repeated("key", inputs, walk) for _ in range(times)]
    return results, next(iter(known._known.values()))


@pytest.mark.parametrize(
    "walk",
    [
        lambda x: [x + 1, x * 2],
        lambda x: [x.clone().mul_(2)],
        lambda x: [x[1:].contiguous(), x.float().bfloat16()],
        lambda x: list(torch.empty_like(x).copy_(x).split([1, 2])),
        lambda x: [torch.cat([x, x]).view(torch.int16)],
        lambda x: [x, x.t()],
        lambda x: list(torch.max(x.float(), 1)),
        lambda x: [torch.ops.aten.native_batch_norm(x[None].float(), None, None, None, None, True, 0.1, 1e-5)[0]],
        lambda x: [torch.empty(0, device=x.device), x.sum()],
    ],
)
def test_operations_of_pytorch_are_called_again(walk):
    x = torch.arange(12.0, device=device()).view(3, 4).bfloat16()
    results, known = repeated(lambda: walk(x), x)
    assert isinstance(known, replay.Program)
    assert_same_bits(results[0], results[2])
    assert [t.stride() for t in results[0]] == [t.stride() for t in results[2]]
    with on_stand_in():
        assert_same_bits(known.run([x + 3]), walk(x + 3))


def test_a_constant_is_kept():
    x = torch.ones(3, device=device())

    def walk(kept=[]):  # noqa: B006  made by the first walk
        kept or kept.append(torch.arange(3.0, device=device()))
        return [x + kept[0]]

    results, known = repeated(walk, x)
    assert isinstance(known, replay.Program) and torch.equal(results[2][0], torch.arange(1.0, 4.0, device=device()))


def test_a_constant_can_be_a_result():
    x, kept = torch.ones(3, device=device()), torch.arange(3.0, device=device())
    results, known = repeated(lambda: [kept, x + 1], x)
    assert isinstance(known, replay.Program) and torch.equal(results[2][0], kept)


@pytest.mark.parametrize("walk", [lambda x: [x * x.sum().item()], lambda x: (spoil("said so"), [x + 1])[1]])
def test_what_no_list_can_do_stays_a_walk(walk):
    x = torch.ones(3, device=device())
    results, known = repeated(lambda: walk(x), x)
    assert known is False
    assert_same_bits(results[0], results[2])


def test_inputs_that_share_memory_are_walked():
    x = torch.ones(4, device=device())
    walks = []
    _, known = repeated(lambda: walks.append(1) or [x + 1], x, x[:2])
    assert known is True and len(walks) == 3


def test_launches_are_told_in_the_kernels_order():
    kernel, told = mock.MagicMock(), Recording([])
    kernel.arg_names = ["a", "b", "N", "BLOCK"]
    launch(kernel, (2,), 1, 2, N=3, BLOCK=4, num_warps=8)
    with told:
        launch(kernel, (5, 6), 1, b=None, BLOCK=4, N=3, num_warps=8)
    (one,) = told.steps
    assert one.grid == (5, 6, 1) and one.arguments == [1, None, 3, 4] and not one.pointers
    assert kernel.__getitem__.return_value.call_count == 2


AHEAD = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from fastres import kernels
from fastres.kernels.launch import compiled_ahead

made = []
class Device:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    launcher_cls = staticmethod(lambda source, metadata: made.append(source.fn.__name__))
driver.set_active(Device())
x, w = torch.randn(2, 4, 4, 64).bfloat16(), torch.randn(64, 1, 1, 64).bfloat16()
for _ in range(2):  # another call compiles nothing more
    with compiled_ahead():
        y, moments = kernels.conv(x, w, 1, (0, 0, 0, 0))
        kernels.conv(x, w, 1, (0, 0, 0, 0))
        kernels.finalize(moments, None, None, 1e-5)
print(json.dumps(sorted(made)))
"""


def test_all_that_a_walk_launches_is_compiled_ahead(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AHEAD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == ["conv_resident_kernel", "finalize_kernel"]


def test_ahead_all_candidates_are_called_and_none_is_chosen(monkeypatch):
    calls, choices = [], mock.Mock()
    choices.known.return_value = None

    class Candidate:
        def __init__(self, name, fails=False):
            self.name, self.fails = name, fails

        def conv_wgrad(self, *arguments):
            calls.append(self.name)
            if self.fails:
                raise RuntimeError
            return self.name

    library = Vendor()
    monkeypatch.setattr(library, "conv_wgrad", lambda *_: calls.append("vendor"))
    choose = timed.Timed(choices, [Candidate("first"), Candidate("broken", fails=True), library, Candidate("last")])
    monkeypatch.setattr(timed, "is_ahead", lambda: True)
    x = torch.ones(1, 2, 2, 4)
    assert choose.conv_wgrad(Gradient(x), Activation(x), Convolution(torch.ones(4, 1, 1, 4))) == "last"
    assert calls == ["first", "broken", "last"] and not choices.choose.called and not choose.chosen
    choices.known.return_value = "vendor"  # from an earlier run
    choose.conv_wgrad(Gradient(x), Activation(x), Convolution(torch.ones(4, 1, 1, 4)))
    assert calls[3:] == ["vendor"]
