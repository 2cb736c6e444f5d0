"""`bench.host`: kernels of a small network through a driver that does nothing, by both launchers."""

from __future__ import annotations

import json
import shutil

import pytest

from bench import host
from bench.report import measured

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def test_both_launchers_make_every_launch(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    host.main(["--networks", "resnet20", "--steps", "3", "--out", str(tmp_path / "host-triton1.json")])
    found = json.loads((tmp_path / "host-triton1.json").read_text())["networks"]["resnet20"]
    by_triton, by_driver = (found[name] for name in host.LAUNCHERS)
    assert by_triton["launches"] == by_driver["launches"] > 30 and by_driver["calls"] < by_driver["launches"] / 4
    assert by_triton["low"] <= by_triton["ms"] <= by_triton["high"] and by_driver["ms"] < by_driver["host_ms"]
    assert "| resnet20 | " in capsys.readouterr().out and "| resnet20 | " in measured.host_section(tmp_path)
