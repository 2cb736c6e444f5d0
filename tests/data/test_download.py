import socket
import threading
import time

import pytest
from support_data import write_batches

from fastres.data import DataError, cifar
from fastres.data import download as module
from fastres.data.download import download, reachable  # the true one: conftest replaces the module's


def test_download_without_a_network_says_so(tmp_path):
    with pytest.raises(DataError, match="nothing there; www.cs.toronto.edu is out of reach: put cifar-10-batches-py"):
        download(tmp_path, "nothing there", print)


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("File not found or corrupted."),
        OSError(28, "No space left"),
        EOFError("ended\nearly"),
        None,
    ],
)
def test_a_broken_download_is_one_line(tmp_path, monkeypatch, fault):
    def fetch(url, root, filename, md5):
        assert (filename, md5) == ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
        write_batches(tmp_path / cifar.CIFAR10.folder)  # not the published files
        if fault:
            raise fault

    monkeypatch.setattr(module, "reachable", lambda url, seconds: True)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    said = []
    with pytest.raises(DataError, match=f"download of CIFAR-10 to {tmp_path} failed .*: try again") as error:
        download(tmp_path, "nothing there", said.append)
    assert "\n" not in str(error.value)
    assert said == ["nothing there: downloading it"]


def answer(connection):
    connection.accept()[0].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("behaviour", ["answers", "is silent", "refuses"])
def test_a_server_is_reachable_only_if_it_answers(behaviour, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
        if behaviour == "answers":
            threading.Thread(target=answer, args=(server,), daemon=True).start()
        elif behaviour == "refuses":
            server.close()
        start = time.perf_counter()
        assert reachable(url, 0.5) == (behaviour == "answers")
        assert time.perf_counter() - start < 2
