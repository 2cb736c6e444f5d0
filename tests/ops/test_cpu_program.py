"""Walks as programs: the bits of the walk for networks and plans, memory and calls of their own, what stays a walk."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support_conv import taken_tiles
from support_fused import cast, leaves, random_layer, random_norm, random_weight
from support_kernels import Guards, assert_same_bits
from support_nets import SMALL, perturbed
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import ops
from fastres.kernels import buffers
from fastres.nn import fuse
from fastres.ops import Conv, Identity, Layer, cpu
from fastres.ops.arena import Span, layout
from fastres.ops.backends.cpp import Cpp
from fastres.ops.backends.protocol import Backend
from fastres.ops.cpu import native, program, tape, tiles
from fastres.ops.cpu.program import Program

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
BF16 = torch.bfloat16
THREE = (1, 1, 1, 1)


class Walking(Cpp):
    """The same without programs."""

    repeated = Backend.repeated


@pytest.fixture(params=list(tiles.FORMS))
def form(request):
    with taken_tiles(request.param):
        yield


@pytest.fixture
def plain(monkeypatch):
    """Tiles that every machine has."""
    monkeypatch.setattr(tiles, "form", lambda: 0)


def programs(backend):
    """How many walks became programs, and how many stay walks."""
    known = list(backend.programs._known.values())
    return sum(isinstance(one, Program) for one in known), known.count(False)


def residual(shortcut, recompute=False):
    """A chain of three blocks, the second with a strided and narrower identity or with a projection."""
    layers = [
        [random_layer(12, 16, 1), random_layer(16, 16, 3)],
        [random_layer(16, 20, 3, 2)],
        [random_layer(20, 20, 1)],
    ]
    first = random_layer(12, 16, 1) if shortcut == "projection" else None
    second = random_layer(16, 20, 1, 2) if shortcut == "projection behind" else Identity(2, 4)

    def call(x, values):
        return ops.residual_chain(x, values[:3], values[3], True, recompute, [values[4], Identity()])

    return (2, 6, 5, 12), [*layers, first, second], call


def preact(shortcut):
    """A chain of two blocks."""
    layers = [
        [Layer(random_weight(12, 10, 1), random_norm(12)), Layer(random_weight(10, 16, 3), random_norm(10), 2, THREE)],
        [Layer(random_weight(16, 16, 3), random_norm(16, gamma=False), 1, THREE)],
    ]
    first = Conv(random_weight(12, 16, 1), 2) if shortcut == "projection" else None

    def call(x, values):
        out, coef, used = ops.preact_chain(x, values[:2], [values[2], Identity()], next_coef=True)
        return ops.bn_relu(out, values[3], coef)[0], used

    return (2, 6, 5, 12), [*layers, first, random_norm(16, frozen=shortcut == "none")], call


def stem(frozen):
    layer = random_layer(16, 12, 3, 1, frozen=frozen)
    return (2, 7, 9, 16), [layer], lambda x, values: ops.stem(x, values[0], 3, 2, THREE)


PLANS = {
    "chain": lambda: residual("projection"),
    "chain, recompute": lambda: residual("projection", True),
    "chain without a shortcut": lambda: residual("none"),
    "chain that projects behind": lambda: residual("projection behind"),
    "chain that projects behind, recompute": lambda: residual("projection behind", True),
    "pre-activation": lambda: preact("projection"),
    "pre-activation, frozen": lambda: preact("none"),
    "stem": lambda: stem(False),
    "stem, frozen": lambda: stem(True),
}


def step(made, dtype=BF16, seed=0):
    """Everything that a plan gives for inputs of that seed: result, coefficients, gradients."""
    shape, values, call = made
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    values = cast(values, dtype)
    out, used = call(x, values)
    dout = torch.randn(out.shape, generator=generator).to(dtype)
    wanted = [x, *leaves(values)]
    used = used if isinstance(used, list) else [used]
    return [out, *(one.coef for one in used), *torch.autograd.grad(out, wanted, dout)]


@pytest.mark.parametrize("name", PLANS)
def test_the_bits_of_the_walk(name, form):
    """The first step is a walk, the second recorded, the others programs."""
    made, backend, walking = PLANS[name](), Cpp(), Walking()
    for seed in range(4):
        with ops.implementation(backend):
            ours = step(made, seed=seed)
        with ops.implementation(walking):
            assert_same_bits(ours, step(made, seed=seed))
    recorded, walks = programs(backend)
    assert recorded >= 2 and not walks


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck", "notebook", "preact", "speed"])
def test_networks_have_the_bits_of_the_walk(name, recompute, monkeypatch):
    results = {}
    for backend in (Cpp(), Walking()):
        torch.manual_seed(0)
        model = fuse(perturbed(SMALL[name]()), recompute).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        losses = []
        with ops.implementation(backend):
            for seed in range(4):
                images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
                with torch.autocast("cpu", BF16):
                    loss = model(images.to(memory_format=torch.channels_last)).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        results[backend] = [*losses, *model.parameters(), *model.buffers()]
        if isinstance(backend, Cpp) and tiles.form() is not None and not isinstance(backend, Walking):
            assert programs(backend)[0] > 1
    assert_same_bits(*results.values())


def test_fp32_stays_a_walk(plain):
    """Its convolutions are PyTorch's."""
    made, backend = residual("projection"), Cpp()
    with ops.implementation(backend):
        results = [step(made, torch.float32, seed=0) for _ in range(3)]
    assert programs(backend) == (0, 2)
    assert_same_bits(results[0], results[2])


def test_passes_alone_are_programs_in_fp32():
    backend, x, norm = Cpp(), torch.randn(2, 3, 4, 8), cast(random_norm(8), torch.float32)
    with ops.implementation(backend):
        results = [ops.bn_relu(x, norm)[0] for _ in range(3)]
    assert programs(backend) == (1, 0)
    assert_same_bits(results[0], results[2])


def test_sizes_and_threads_have_programs_of_their_own(plain):
    backend, before, made = Cpp(), torch.get_num_threads(), stem(False)
    try:
        with ops.implementation(backend):
            for threads in (1, 2, 1, 2):
                torch.set_num_threads(threads)
                step(made)
            assert programs(backend)[0] == 4
            step(((3, 7, 9, 16), *made[1:]))
            assert programs(backend)[0] == 4
    finally:
        torch.set_num_threads(before)


def test_weights_that_blocks_share(plain):
    """An address does not tell which of two equal inputs is meant: such a walk makes no program, but takes one."""
    layer, other = cast([random_layer(8, 8, 3), random_layer(8, 8, 3)], BF16)
    x, backend = torch.randn(2, 4, 4, 8).to(BF16), Cpp()

    def run(*layers):
        return ops.residual_chain(x, [[one] for one in layers], x)[0]

    with ops.implementation(Walking()):
        shared, apart = run(layer, layer), run(layer, other)
    with ops.implementation(backend):
        for _ in range(3):
            assert_same_bits(run(layer, layer), shared)
        assert programs(backend) == (0, 0)
        for _ in range(2):
            assert_same_bits(run(layer, other), apart)
        assert programs(backend) == (1, 0)
        assert_same_bits(run(layer, layer), shared)


def test_threads_run_a_program_at_once(plain):
    made, backend = residual("projection"), Cpp()
    with ops.implementation(backend):
        expected = [step(made, seed=seed) for seed in range(6)]
        assert programs(backend)[0] == 2
        with ThreadPoolExecutor(3) as pool:
            for ours, exact in zip(pool.map(lambda seed: step(made, seed=seed), range(6)), expected):
                assert_same_bits(ours, exact)


def test_what_is_kept_is_not_overwritten_by_the_next_call(plain):
    made, backend = residual("projection"), Cpp()
    shape, values, call = made
    values = cast(values, BF16)
    xs = [torch.randn(shape).to(BF16).requires_grad_() for _ in range(4)]
    with ops.implementation(backend):
        for x in xs[:2]:
            call(x, values)[0].sum().backward()
        outs = [call(x, values)[0] for x in xs]
        ours = [torch.autograd.grad(out.float().square().sum(), x)[0] for out, x in zip(outs, xs)]
    with ops.implementation(Walking()):
        exact = [torch.autograd.grad(call(x, values)[0].float().square().sum(), x)[0] for x in xs]
    assert_same_bits(ours, exact)


def test_a_saved_tensor_that_is_changed_is_noticed(plain):
    shape, values, call = residual("projection")
    values, backend = cast(values, BF16), Cpp()
    with ops.implementation(backend):
        for _ in range(3):
            x = torch.randn(shape).to(BF16).requires_grad_()
            out = call(x, values)[0]
        out.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_second_gradients_of_what_a_program_made(plain):
    shape, values, call = residual("none")
    values, results = cast(values, BF16), []
    x = torch.randn(shape).to(BF16).requires_grad_()
    for backend in (Cpp(), Walking()):
        with ops.implementation(backend):
            for _ in range(3):
                out = call(x, values)[0]
                (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
                (second,) = torch.autograd.grad(dx.float().square().sum(), x)
        results.append([out, second])
    assert_same_bits(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, plain):
    shape, values, call = preact("projection")
    values, backend = cast(values, BF16), Cpp()
    with mode():
        x = torch.randn(shape).to(BF16)
        with ops.implementation(Walking()):
            exact = call(x, values)[0]
        with ops.implementation(backend):
            for _ in range(3):
                assert_same_bits(call(x, values)[0], exact)
    assert programs(backend)[0] == 2


def test_under_torch_compile(plain):
    shape, values, call = residual("projection")
    values, backend = cast(values, BF16), Cpp()
    compiled = torch.compile(lambda x: call(x, values)[0], backend="aot_eager", fullgraph=True)
    with ops.implementation(backend):
        for seed in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)
            ours = x.clone().requires_grad_(), x.clone().requires_grad_()
            outs = compiled(ours[0]), call(ours[1], values)[0]
            for out in outs:
                out.sum().backward()
            assert_same_bits(outs[0], outs[1])
            assert_same_bits(ours[0].grad, ours[1].grad)
    assert programs(backend)[0] == 2


def test_memory_between_guard_bands(plain, monkeypatch):
    """Also the one piece that a program's calls share, which holds NaN before."""
    made, backend, guards = residual("projection", True), Cpp(), Guards()
    with ops.implementation(backend):
        expected = [step(made) for _ in range(3)][-1]
        made_here = []

        def empty(like, *shape, dtype=None):
            made_here.append(shape)
            return guards.empty(like, *shape, dtype=dtype)

        monkeypatch.setattr(buffers, "empty", empty)
        ours = step(made)
    guards.check()
    assert len(made_here) > 10
    assert_same_bits(ours, expected)


def test_few_programs_are_kept(monkeypatch):
    monkeypatch.setattr(program, "MOST_PROGRAMS", 3)
    backend, norm = Cpp(), cast(random_norm(8), torch.float32)
    with ops.implementation(backend):
        for images in range(1, 9):
            for _ in range(3):
                ops.bn_relu(torch.randn(images, 3, 4, 8), norm)
    assert len(backend.programs._known) == 3


def test_what_needs_much_memory_stays_a_walk(plain, monkeypatch):
    monkeypatch.setattr(program, "MOST_BYTES", 512)
    made, backend = residual("projection"), Cpp()
    with ops.implementation(backend):
        results = [step(made) for _ in range(3)]
    assert programs(backend) == (0, 2)
    assert_same_bits(results[0], results[2])


def test_memory_is_shared_only_by_what_is_not_used_at_once():
    drawn = random.Random(0)
    for _ in range(50):
        spans = {}
        for index in range(30):
            first = drawn.randrange(20)
            spans[index] = Span(first, min(19, first + drawn.randrange(6)), drawn.randrange(1, 5000))
        total, offsets = layout(spans, 64)
        for a, b in itertools.combinations(spans, 2):
            at_once = spans[a].first <= spans[b].last and spans[b].first <= spans[a].last
            apart = offsets[a] + spans[a].size <= offsets[b] or offsets[b] + spans[b].size <= offsets[a]
            assert apart or not at_once
        most = max(sum(s.size for s in spans.values() if s.first <= now <= s.last) for now in range(20))
        assert most <= total <= 1.5 * most + 64 * len(spans) and all(begin % 64 == 0 for begin in offsets.values())


@pytest.mark.parametrize(
    "walk",
    [
        lambda x: [x + 1],
        lambda x: [x.contiguous().mul_(2)],
        lambda x: [x.float().bfloat16().clone()],
        lambda x: torch.cat([x, x]),
        lambda x: torch.cat([torch.empty(2, dtype=BF16), torch.empty(2)]),
        lambda x: cpu.passes.add_gradient(x, torch.empty_like(x), 1),
    ],
)
def test_a_tape_notices_what_no_call_does_again(walk):
    """The walk goes on: others may wait for what it does."""
    x = torch.ones(1, 2, 2, 8, dtype=BF16)
    with tape.Tape([x]) as recorded:
        walk(x)
    assert recorded.reason and native._thread.recorder is None
    with pytest.raises(program.Unrecordable, match="is computed|writes to an input"):
        Program(recorded, [], [x])


def test_a_walk_that_no_program_does_is_walked_once():
    backend, walked = Cpp(), []

    def walk():
        walked.append(1)
        return [torch.ones(3) + 1]

    for _ in range(4):
        assert torch.equal(backend.repeated("key", [torch.ones(1)], walk)[0], torch.full((3,), 2.0))
    assert len(walked) == 4 and programs(backend) == (0, 1)


def test_an_error_in_a_walk_is_raised(plain):
    backend = Cpp()

    def walk():
        raise ValueError("of the walk")

    for _ in range(3):
        with pytest.raises(ValueError, match="of the walk"):
            backend.repeated("key", [torch.ones(1)], walk)
    assert native._thread.recorder is None


def test_a_program_calls_nothing_of_pytorch_but_memory(plain):
    made, backend, seen = stem(True), Cpp(), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 7, 9, 16).to(BF16)
    values = cast(made[1], BF16)
    with ops.implementation(backend), torch.no_grad():
        for _ in range(3):
            made[2](x, values)
        (ready,) = [one for one in backend.programs._known.values() if isinstance(one, Program)]
        weight = values[0].weight.permute(0, 2, 3, 1).contiguous()
        with Seen():
            ready.run([x, None, None, weight, *values[0].norm[:4]])
    assert set(seen) == {"aten.new_empty.default"}
