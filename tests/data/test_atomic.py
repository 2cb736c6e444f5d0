import os
import stat

import pytest

from fastres.atomic import atomic_write


def test_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"former")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"former"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_an_exception_leaves_the_former_file_and_no_rubbish(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"former")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["file"]


def test_is_readable_as_any_new_file_is(tmp_path):
    former = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file"):
            pass
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        with atomic_write(tmp_path / "no" / "file"):
            pass
