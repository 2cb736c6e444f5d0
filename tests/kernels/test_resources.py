"""A convolution takes tiles that fit its device, whether that is known before the launch or by a refusal."""

import sys
import warnings

import pytest
import torch
from support_flat import aten
from support_fused import relative_error
from triton.runtime.errors import OutOfResources

from fastres import kernels
from fastres.kernels import resources
from fastres.kernels.configs import OTHER, Config, has_tensor_cores, taken
from fastres.kernels.resources import Demand, fitting, shared_memory, shared_memory_of

SAME = (1, 1, 1, 1)
KIB = 1024


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch):
    monkeypatch.setattr(resources, "_refused", set())


class Refusing:
    """A kernel whose launches with tiles of more than ``most`` rows and columns together fail as Triton's do."""

    def __init__(self, kernel, most, error=None):
        self.kernel, self.most, self.tried, self.configs = kernel, most, [], []
        self.error = error or OutOfResources(116_224, 101_376, "shared memory")

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.tried.append((options["BLOCK_M"], options["BLOCK_N"]))
            names = ("BLOCK_K", "num_warps", "num_stages", "maxnreg")
            self.configs.append((*self.tried[-1], *(options[name] for name in names)))
            if sum(self.tried[-1]) > self.most:
                raise self.error
            return self.kernel[grid](*args, **options)

        return launch


def forward(x, w, dz):
    return kernels.conv(x, w, 1, SAME, moments=False)[0], aten.conv(x.double(), w.double(), 1, SAME, moments=False)[0]


def input_gradient(x, w, dz):
    (dx, _), (exact, _) = (
        space.conv_dgrad(dz.to(t), None, None, w.to(t), 1, SAME, x.shape[1:3])
        for space, t in ((kernels, dz.dtype), (aten, torch.float64))
    )
    return dx, exact


def weight_gradient(x, w, dz):
    return tuple(
        space.conv_wgrad(dz.to(t), None, None, x.to(t), None, 1, SAME, (3, 3))
        for space, t in ((kernels, dz.dtype), (aten, torch.float64))
    )


LAUNCHERS = {"conv": forward, "dgrad": input_gradient, "wgrad": weight_gradient}


@pytest.fixture(params=LAUNCHERS)
def refusing(request, monkeypatch):
    """Make the launcher's kernel refuse; returns it with a call of the launcher: its result and the exact one."""
    call, module = LAUNCHERS[request.param], sys.modules[f"fastres.kernels.{request.param}"]
    name = f"conv{'' if request.param == 'conv' else '_' + request.param}_kernel"
    torch.manual_seed(0)
    tensors = [torch.randn(*shape).half() for shape in ((4, 4, 4, 128), (128, 3, 3, 128), (4, 4, 4, 128))]

    def make(most, error=None):
        kernel = Refusing(getattr(module, name), most, error)
        monkeypatch.setattr(module, name, kernel)
        return kernel, lambda: call(*tensors)

    return make


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(116_224, 101_376, "shared memory"),
        OutOfResources(640, 512, "tensor memory"),
        OutOfResources(512, 256, "threads"),
        RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    ],
    ids=str,
)
def test_a_refused_launch_takes_the_next_configuration_for_good(refusing, monkeypatch, error):
    monkeypatch.setattr("fastres.kernels.configs.PROGRAMS", 1)  # so that the largest tiles come first
    kernel, call = refusing(192, error)
    with pytest.warns(UserWarning, match=r"kernel in float16 with tiles of 128x128x64 does not fit cpu .* other tiles"):
        with taken() as tiles:
            result, exact = call()
    assert relative_error(result, exact) < 2e-3
    *refused, took = kernel.tried
    assert refused[0] == (128, 128) and took[0] * took[1] < 128 * 128
    assert [(tile.block_m, tile.block_n) for tile in tiles] == [took]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert kernel.tried[len(refused) + 1 :] == [took]


def test_where_nothing_fits_the_launch_says_so(refusing):
    kernel, call = refusing(0)
    with pytest.warns(UserWarning, match="does not fit"), pytest.raises(OutOfResources, match="Required: 116224"):
        call()
    assert len(kernel.configs) == len(set(kernel.configs)) + 1  # the first one again, to raise


def test_other_errors_are_raised_at_once(refusing):
    kernel, call = refusing(0, RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        call()
    assert len(kernel.tried) == 1


def demand(**changes):
    """Of a 3x3 input gradient with BatchNorm's backward in its prologue."""
    given = dict(
        kernel="conv_dgrad_kernel", device=torch.device("cpu"), dtype=torch.bfloat16, rows=2, columns=1, vectors=3,
        made_rows=True, made_columns=False, depth=9 * 256,
    )  # fmt: skip
    return Demand(**{**given, **changes})


@pytest.mark.parametrize(
    "changes, size",
    [
        ({}, 116_224),
        ({"rows": 1, "vectors": 1}, 82_432),
        ({"rows": 1, "vectors": 0, "made_rows": False}, 65_536),
        ({"vectors": 0, "made_columns": True}, 131_072),
    ],
)
def test_shared_memory_is_what_the_compiler_takes(changes, size):
    """Of 128x128 tiles on sm_80, by Triton 3.8: dgrad, dgrad behind a frozen BatchNorm, alone, wgrad with its
    prologues.
    """
    config = Config(128, 128, 64, 8, 3, 255)
    assert shared_memory(config, demand(**changes)) == size


def test_what_does_not_fit_is_not_tried(refusing, monkeypatch):
    monkeypatch.setattr("fastres.kernels.configs.PROGRAMS", 1)
    kernel, call = refusing(256)
    with shared_memory_of(60 * KIB):
        call()
    assert kernel.tried[0] != (128, 128)
    call()
    assert kernel.tried[1] == (128, 128)


def test_an_amd_gpu_is_of_another_kind(monkeypatch):
    """And has matrix cores; it would have called itself a Hopper of its own version number."""
    assert resources.architecture(torch.device("cpu")) == 90
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert resources.architecture(torch.device("cuda", 0)) == OTHER and has_tensor_cores(OTHER)
    assert [has_tensor_cores(arch) for arch in (75, 80, 90, 120)] == [False, True, True, True]


def test_the_limit_is_that_of_the_tensors_device(monkeypatch):
    limits = {0: 227 * KIB, 1: 99 * KIB}
    asked = []

    def properties(device):
        asked.append(device)
        return type("Properties", (), {"shared_memory_per_block_optin": limits[device.index]})

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    resources._limit.cache_clear()
    configs = [Config(128, 128, 64, 8, 3, 255), Config(128, 64, 32, 4, 3, 168), Config(64, 64, 64, 4, 3, 128)]
    for index, fits in ((0, [True, True, True]), (1, [False, True, True])):
        on = demand(device=torch.device("cuda", index))
        assert [fitting(on)(config) for config in configs] == fits
        fitting(on)
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1)]  # each once
    resources._limit.cache_clear()
