"""Launches by the driver: what it is given, its errors, and who makes them otherwise. `test_replay` has whole walks."""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support_kernels import INTERPRETED
from support_launches import driver_stand_in, on_stand_in

from fastres import ops
from fastres.kernels.dependent import programmatic
from fastres.ops.backends import launches, replay
from fastres.ops.backends.host import LAUNCH, OPERATION, host_milliseconds
from fastres.ops.backends.launches import ByDriver, ByTriton, Launch, Place, launcher
from fastres.ops.backends.protocol import Activation, Convolution
from fastres.ops.backends.triton import Triton, Vendor

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the stand-in of the driver interprets kernels")


def compiled(**changed) -> SimpleNamespace:
    """As Triton's, of a kernel that takes one of each."""
    fields = dict(name="kernel", num_warps=8, num_ctas=1, shared=0, launch_pdl=False, profile_scratch_size=None)
    fields |= dict(target=SimpleNamespace(backend="cuda", warp_size=32), global_scratch_size=0) | changed
    kinds = ["*bf16", "constexpr", "i32", "i64", "fp32", "*fp32", "u1"]
    source = SimpleNamespace(signature=dict(zip("abcdefg", kinds)))
    return SimpleNamespace(metadata=SimpleNamespace(**fields), src=source, function=11, run=None, packed_metadata=None)


def one_of_each(**changed) -> Launch:
    return Launch(compiled(**changed), (3, 1, 1), [None, 1, -5, 2**40, 0.1, None, True], [(0, Place(2, 64))])


def test_arguments_are_packed_in_the_kernels_order():
    bits = int.from_bytes(struct.pack("<f", 0.1), "little")
    expected = [(2, 64), (-1, 2**32 - 5), (-1, 2**40), (-1, bits), (-1, 0), (-1, 1), (-1, 0), (-1, 0)]
    assert list(launches.packed(one_of_each())) == expected


@pytest.mark.parametrize(
    "changed",
    [
        dict(num_ctas=2),
        dict(launch_cooperative_grid=True),
        dict(global_scratch_size=128),
        dict(profile_scratch_size=1),
        dict(shared=2**18),
        dict(instrumentation_mode="gsan"),
        dict(target=SimpleNamespace(backend="hip", warp_size=64)),
    ],
    ids=str,
)
def test_what_is_special_is_left_to_triton(changed):
    with driver_stand_in():
        assert isinstance(launcher([one_of_each()]), ByDriver)
        assert isinstance(launcher([one_of_each(), one_of_each(**changed)]), ByTriton)


def test_types_that_nobody_packs_are_left_to_triton():
    for kind in ("bf16", "fp16", "nvTmaDesc", "tensordesc<fp16[16, 16]>", ("i32", "i32")):
        one = one_of_each()
        one.compiled.src.signature["c"] = kind
        with driver_stand_in():
            assert isinstance(launcher([one]), ByTriton)


@pytest.mark.parametrize("missing", ["driver", "_call"])
def test_without_a_driver_or_a_compiler_it_is_triton(monkeypatch, missing):
    with driver_stand_in():
        monkeypatch.setattr(launches, missing, lambda: None)
        assert isinstance(launcher([one_of_each()]), ByTriton)


def test_the_environment_chooses(monkeypatch):
    with driver_stand_in():
        monkeypatch.setenv(launches.ENVIRONMENT, "triton")
        assert isinstance(launcher([one_of_each()]), ByTriton)
        monkeypatch.setenv(launches.ENVIRONMENT, "cuda")
        with pytest.raises(ValueError, match="FASTRES_LAUNCHER=cuda: choose driver or triton"):
            launcher([one_of_each()])


def walked(times: int = 3) -> tuple[list[torch.Tensor], list[replay.Program]]:
    """A batch's statistics so many times, and the programs of it."""
    norm = ops.Norm(torch.ones(8), torch.zeros(8), None, None, 1e-5)
    x, backend = torch.arange(2 * 4 * 4 * 8.0).view(2, 4, 4, 8).sin(), Triton()
    with torch.no_grad(), ops.implementation(backend):
        results = [ops.bn_relu(x, norm)[0] for _ in range(times)]
    return results, [one for one in backend.programs.known if isinstance(one, replay.Program)]


def test_launches_that_follow_one_another_are_one_call(monkeypatch):
    calls = []
    call = ByDriver.__call__
    monkeypatch.setattr(ByDriver, "__call__", lambda self, *args: (calls.append(args[:2]), call(self, *args)))
    with on_stand_in(), driver_stand_in() as driver:
        results, (program,) = walked()
    assert calls == [(0, len(driver.launches))] and len(driver.launches) > 2
    assert len(program.stages) == 1 and torch.equal(results[0], results[2])


@pytest.mark.parametrize("on", [False, True], ids=["in turn", "programmatic"])
def test_the_driver_is_told_which_kernels_wait_by_themselves(on):
    with on_stand_in(), driver_stand_in() as driver, programmatic(on):
        results, (program,) = walked()
    assert isinstance(program._launch, ByDriver) and torch.equal(results[0], results[2])
    assert len(driver.dependent) > 2 and set(driver.dependent) == {on}
    assert all(shared == 1024 for _, shared, _ in driver.launches)


def test_what_a_call_costs_the_host():
    """Its launches and PyTorch's operations, but neither views nor memory."""
    x, found = torch.ones(2, 4, 4, 8), {}
    with torch.no_grad(), on_stand_in():
        for name, backend in (("triton", Triton()), ("vendor", Vendor())):
            activation, conv = Activation(x), Convolution(torch.ones(8, 1, 1, 8))
            found[name] = host_milliseconds(lambda backend=backend, a=activation, c=conv: backend.conv(a, c))
    assert found["triton"] == pytest.approx(LAUNCH)
    assert found["vendor"] == pytest.approx(OPERATION + LAUNCH)  # its statistics are a launch
    assert host_milliseconds(lambda: torch.empty(3).view(3, 1)) == 0


def test_a_thread_without_a_context_gets_the_devices():
    with on_stand_in(), driver_stand_in() as driver:
        driver.context = 0
        walked(times=4)
    assert driver.contexts == ["device 0", "retain 7", "current 5"]


def test_an_error_names_the_kernel_and_the_drivers_number():
    with on_stand_in(), driver_stand_in() as driver:
        driver.error = 700
        with pytest.raises(RuntimeError, match=r"kernel \w+: CUDA error 700"):
            walked()


def test_an_empty_grid_is_not_launched():
    with driver_stand_in() as driver:
        made = launcher([one_of_each()._replace(grid=(0, 1, 1))])
        made(0, 1, (ctypes.c_uint64 * 3)(), 0, 0)
    assert not driver.launches


COMPILED = """
import ctypes
import json
from types import SimpleNamespace
from unittest import mock
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from fastres import ops
from fastres.ops.backends import launches, replay
from fastres.ops.backends.host import LAUNCH, OPERATION, host_milliseconds
from fastres.ops.backends.triton import Triton

class Launcher:
    def __init__(self, source, metadata): pass
    def __call__(self, *arguments): pass

class Device:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    launcher_cls = Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
        load_binary=lambda name, kernel, shared, device: (None, 4096, 0, 0, 1024),
    )

driver.set_active(Device())
recorded, init = [], launches.ByDriver.__init__
def noted(self, made, *rest):
    recorded.extend(made)
    init(self, made, *rest)
no_driver = (ctypes.c_void_p * len(launches.FUNCTIONS))()
parts = dict(_is_plain=lambda i: True, _stream=lambda d: 0, _settings=lambda: (), _compile=lambda w: None)
norms = [ops.Norm(torch.ones(64), torch.zeros(64)) for _ in range(2)]
weights = [torch.randn(64, 64, k, k).bfloat16().requires_grad_() for k in (1, 3)]
layers = [ops.Layer(w, norm, 1, (w.shape[2] // 2,) * 4) for w, norm in zip(weights, norms)]
x = torch.randn(2, 4, 4, 64).bfloat16().requires_grad_()
with (
    mock.patch.multiple(replay, **parts),
    mock.patch.multiple(launches, driver=lambda: no_driver),
    mock.patch.multiple(launches.ByDriver, __init__=noted, __call__=lambda *_: None),
    mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
    ops.implementation(Triton()),
):
    for _ in range(2):
        ops.residual_block(x, layers, x)[0].float().sum().backward()
print(json.dumps([
    [one.compiled.asm["ptx"], launches._signature(one), len(list(launches.packed(one)))] for one in recorded
]))
"""


def test_arguments_are_those_that_the_compiled_kernels_declare(tmp_path):
    """Kernels of a block, forward and backward, compiled for sm_90: number and sizes of what their PTX declares."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) > 10
    for ptx, signature, count in found:
        header = ptx.split(".entry")[1].split(")")[0]
        declared = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", header)]
        kinds = [kind for kind in signature if kind != "constexpr"]
        sizes = [8 if kind[0] == "*" else struct.calcsize(launches._FORMATS[kind]) for kind in kinds]
        assert declared == [*sizes, 8, 8] and count == len(declared)
