"""What is compiled before its first use: every candidate's kernels, in training, memory mode and inference."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.precompile import evaluated, jobs, networks
from bench.record import ROOT
from bench.workloads import GPU, Setting

SCRIPT = """
import json, torch
from bench.precompile import jobs, launched
from bench.workloads import DRY
(work,) = DRY.values()
found = {}
for job in jobs(work, torch.bfloat16, evaluation=(3,)):
    kind = f"{job.rank} {job.recompute}" if job.training else f"{job.rank} inference"
    found[kind] = sorted({one.kernel for one in launched(job)})
print(json.dumps(found))
"""

SMOOTH = """
import json, torch
from bench.precompile import Job, launched
from fastres.measure import Workload
job = Job(Workload("speed94", 4, 32), torch.bfloat16, False, 0, arch=90)
kernels = ("conv_kernel", "conv_dgrad_kernel")
found = [one for one in launched(job) if one.constants.get("GELU") and one.kernel in kernels]
limits = [[one.kernel, one.constants["CIN"], dict(one.options)["maxnreg"]] for one in found]
library = Job(Workload("speed94", 4, 32), torch.bfloat16, False, None, arch=75)
print(json.dumps([limits, sorted({one.kernel for one in launched(library)})]))
"""


def test_kernels_with_gelu_have_registers_for_it():
    """By Triton 3.8 for sm_90: with 168 the wide data gradients spilled 16 bytes; windows read GELU from a pass."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SMOOTH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, library = json.loads(done.stdout)
    limits = {(kernel, channels): limit for kernel, channels, limit in found}
    assert not [kernel for kernel, _ in limits if kernel == "conv_kernel"]
    assert limits["conv_dgrad_kernel", 64] >= 168 and limits["conv_dgrad_kernel", 128] == 255
    assert "bn_add_relu_kernel" in library and "conv_kernel" not in library  # around the library's convolutions


@pytest.fixture(scope="module")
def kernels():
    """By rank and mode, recorded in a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_candidate_is_recorded(kernels):
    assert {kind.split()[0] for kind in kernels} == {
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "None",
    }  # tiles, ways, the library
    assert {kind.split()[1] for kind in kernels} == {"False", "True", "inference"}
    for kind, found in kernels.items():
        library = kind.startswith("None")
        assert ("conv_kernel" in found) != library, kind
        assert ("moments_kernel" in found) == (library and "inference" not in kind), kind
        assert ("conv_dgrad_kernel" in found) == (not library and "inference" not in kind), kind
        assert ("running_coef_kernel" in found) == ("inference" in kind), kind
        assert "bn_add_relu_kernel" in found, kind


def test_all_networks_of_the_campaign_are_compiled_the_first_ones_first(tmp_path):
    setting = Setting(torch.device("cuda"), torch.bfloat16, False, "synthetic", tmp_path, 1.0)
    found = networks(setting)
    assert list(found)[: len(GPU)] == list(GPU) and {"speed", *setting.sweeps()} < found.keys()
    batches = {job.workload.batch for job in found["speed"] if not job.training}
    assert batches == set(evaluated()) == {500}
    deep = jobs(GPU["resnet110"], torch.bfloat16)
    assert {job.workload.model for job in deep} == {"resnet20"} and deep[0].workload.batch == GPU["resnet110"].batch


def test_the_last_validation_batch_counts_too():
    assert set(evaluated(1100)) == {500, 100} and evaluated(300) == (300,)
