"""No test of data sets touches the network or the user's cache."""

import pytest

from fastres.data import download


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "reachable", lambda url, seconds: False)
    monkeypatch.delenv("FASTRES_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
