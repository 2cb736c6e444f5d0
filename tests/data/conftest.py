"""No test of the data room touches the network or the user's cache."""

import pytest

from fastres.data import cifar


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "reachable", lambda url, seconds: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
