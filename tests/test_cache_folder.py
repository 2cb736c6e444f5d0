"""The one cache folder: where it is, who may write there, what it shows and clears."""

import os
import tempfile
from pathlib import Path

import pytest

from fastres import cache, cli


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No folder is named, the home is an empty one, and nothing is remembered."""
    for name in ("FASTRES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    forget()
    yield
    forget()


def forget():
    for known in (cache._first_writable, cache._temporary):
        known.cache_clear()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_order_of_places(monkeypatch, tmp_path):
    home = tmp_path / "home" / ".cache" / "fastres"
    assert cache.cache_folder() == home and not home.exists()
    assert cache.private_folder() == home and mode(home) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "fastres"
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "named"))
    assert cache.cache_folder() == cache.private_folder() == tmp_path / "named" and mode(tmp_path / "named") == 0o700


@pytest.mark.parametrize("home", ["/nonexistent", "", None])
def test_a_user_without_a_home(monkeypatch, tmp_path, home):
    if home is None:  # nor does the system know the user
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    else:
        monkeypatch.setenv("HOME", home)
    folder = cache.cache_folder()
    assert folder == tmp_path / "temporary" / f"fastres-{os.geteuid()}" and mode(folder) == 0o700
    forget()
    assert cache.cache_folder() == folder  # a later process finds it again
    forget()
    folder.chmod(0o777)  # as somebody else may have made it
    other = cache.cache_folder()
    assert other != folder and other.parent == folder.parent and mode(other) == 0o700


def test_a_place_that_cannot_be_written_is_said_once(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert cache.cache_folder() == tmp_path / "home" / ".cache" / "fastres"
    assert len(caplog.records) == 1 and "is no folder): set FASTRES_CACHE" in caplog.text


def test_code_is_not_kept_where_others_can_write(monkeypatch, tmp_path, caplog):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("FASTRES_CACHE", str(shared))
    assert cache.cache_folder() == shared
    assert cache.private_folder() == tmp_path / "home" / ".cache" / "fastres"
    assert mode(shared) == 0o777 and "other users can write" in caplog.text
    own = tmp_path / "home" / ".cache" / "fastres"
    own.chmod(0o775)  # as an earlier version left it
    assert cache.private_folder() == own and mode(own) == 0o755
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not cache.is_private(own) or own.stat().st_uid == 0


def test_the_command(monkeypatch, tmp_path, capsys):
    folder = cache.private_folder()
    for name in ("a.npz", "passes-0.so", "choices.json", "mine.txt", ".a.npz.abcd1234.tmp"):
        (folder / name).write_bytes(b"x" * 2**20)
    (folder / "build-x").mkdir()
    assert cli.main(["cache"]) == 0
    out = capsys.readouterr().out
    assert "1.0 MiB  decoded images" in out and f"3.0 MiB  {folder}" in out and "mine" not in out
    assert cli.main(["cache", "--clear"]) == 0
    assert "removed 5 files" in capsys.readouterr().out and os.listdir(folder) == ["mine.txt"]


def test_leftovers_of_kills_go():
    folder = cache.private_folder()
    old, new = folder / ".a.npz.abcd1234.tmp", folder / ".a.npz.abcd1235.tmp"
    for path in (old, new):
        path.touch()
    for name in ("build-old", "build-new"):
        (folder / name).mkdir()
    for path in (old, folder / "build-old"):
        os.utime(path, (1, 1))
    cache.remove_leftovers(folder)
    assert sorted(os.listdir(folder)) == [new.name, "build-new"]
