"""``pytest bench`` measures: benchmarks are on, in one process, whatever the test suite's own options are."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Undo the test suite's ``-n 2 --benchmark-disable`` where nothing but benchmarks is asked for."""
    paths = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    if all(path == HERE or HERE in path.parents for path in paths):
        config.option.benchmark_disable = False
        config.option.numprocesses = None
        config.option.tx, config.option.dist = [], "no"


@pytest.fixture(scope="session")
def setting():
    """The machine that is measured, as the campaign sees it; networks are those for a GPU or a CPU."""
    from bench.workloads import Setting
    from fastres.train import machine

    device = machine.pick_device("auto")
    if device.type == "cpu":
        machine.keep_freed_memory()
    return Setting(device, machine.pick_dtype("auto", device), False, "synthetic", HERE, 0.0)


@pytest.fixture
def measured(benchmark, setting):
    """``measured(call)``: benchmark a call, waiting for the device, its machine noted in the result."""
    from fastres.measure import synchronize
    from fastres.measure.command import device_name

    def measure(call, **facts):
        def run():
            call()
            synchronize(setting.device)

        benchmark.extra_info.update(device=device_name(setting.device), dtype=str(setting.dtype), **facts)
        benchmark.pedantic(run, warmup_rounds=setting.warmup, rounds=setting.rounds)

    return measure
