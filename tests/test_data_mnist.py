"""MNIST's files: found, downloaded, checked; and what is said when that fails. No test needs a network."""

import gzip
import hashlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from indrnn.config.schema import MNISTConfig
from indrnn.data import download, make_task
from indrnn.errors import UserError
from parts import mnist as mnist_data

CPU = torch.device("cpu")
TRAIN_IMAGES = "train-images-idx3-ubyte"
REAL_ROOT = os.environ.get("INDRNN_DATA", "")
NOBODY_LISTENS = "http://127.0.0.1:9/mnist/"
N_TRAIN, N_TEST = 200, 40


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small MNIST of its own, whose hashes the package takes for the true ones; no mirror answers."""
    rng = np.random.default_rng(0)
    contents = {}
    for part, n in (("train", N_TRAIN), ("t10k", N_TEST)):
        contents[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        contents[f"{part}-labels-idx1-ubyte"] = idx(np.arange(n, dtype=np.uint8) % 10)
    for name, content in contents.items():
        monkeypatch.setitem(download.SHA256, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [NOBODY_LISTENS])
    # A server of these tests answers, however busy the machine is.
    monkeypatch.setattr(download, "TIMEOUT", 3600.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return contents


def place(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def config(root: Path, **keys) -> MNISTConfig:
    return mnist_data(root=str(root), **{"validation_size": 50, **keys})


Answer = Callable[[BaseHTTPRequestHandler, str], None]


@contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server on this machine: its URL, and the names it has been asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            asked.append(name)
            answer(self, name)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/mnist", asked
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes, *, length: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def serve(files: dict[str, bytes]) -> Answer:
    """As the public mirrors do: only the packed files."""

    def answer(handler: BaseHTTPRequestHandler, name: str) -> None:
        if name.endswith(".gz") and name[:-3] in files:
            send(handler, gzip.compress(files[name[:-3]]))
        else:
            handler.send_error(404)

    return answer


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def assert_raw_files(root: Path, files: dict[str, bytes]) -> None:
    raw = root / "MNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == files


# What is there is used


def test_files_in_torchvisions_layout_need_no_network(tmp_path, files):
    place(tmp_path / "MNIST" / "raw", files)
    task = make_task(config(tmp_path)).load(CPU)
    assert (task.train.size, task.validation.size, task.test.size) == (N_TRAIN - 50, 50, N_TEST)
    assert task.provenance["sha256"] == download.SHA256
    assert {k: task.provenance["split"][k] for k in ("seed", "train", "validation", "test")} == {
        "seed": 0,
        "train": N_TRAIN - 50,
        "validation": 50,
        "test": N_TEST,
    }


def test_packed_files_are_read_where_they_lie(tmp_path, files):
    raw = place(tmp_path / "MNIST" / "raw", {f"{name}.gz": gzip.compress(data) for name, data in files.items()})
    before = sorted(raw.iterdir())
    assert make_task(config(tmp_path)).load(CPU).test.size == N_TEST
    assert sorted(raw.iterdir()) == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_folder_that_cannot_be_written_will_do_when_the_files_are_there(tmp_path, files):
    raw = place(tmp_path / "MNIST" / "raw", files)
    raw.chmod(0o555)
    try:
        assert make_task(config(tmp_path)).load(CPU).train.size == N_TRAIN - 50
    finally:
        raw.chmod(0o755)


def test_batches_show_the_files_pixels_scaled_and_their_labels(tmp_path, files):
    place(tmp_path / "MNIST" / "raw", files)
    task = make_task(config(tmp_path)).load(CPU)
    pixels = np.frombuffer(files["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(N_TEST, 784)
    rows = torch.tensor([39, 0, 7, 7])
    x, y = task.test.batch(rows)
    assert x.shape == (4, 784, 1)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    np.testing.assert_allclose(x[..., 0], 2.0 * pixels[rows] / 255 - 1, atol=1e-7)
    assert y.tolist() == [9, 0, 7, 7]


def test_train_and_validation_are_the_training_files_images_each_once(tmp_path, files):
    place(tmp_path / "MNIST" / "raw", files)
    task = make_task(config(tmp_path)).load(CPU)
    parts = [split.batch(torch.arange(split.size)) for split in (task.train, task.validation)]
    x = torch.cat([part[0] for part in parts])[..., 0].mul(127.5).add(127.5).round().to(torch.uint8).numpy()
    y = torch.cat([part[1] for part in parts]).numpy()
    pixels = np.frombuffer(files[TRAIN_IMAGES][16:], np.uint8).reshape(N_TRAIN, 784)
    expected = sorted((pixels[i].tobytes(), i % 10) for i in range(N_TRAIN))
    assert sorted((row.tobytes(), int(label)) for row, label in zip(x, y, strict=True)) == expected


@pytest.mark.parametrize("permutation", ["seed92916", "bitrev"])
def test_a_permutation_shows_pixel_p_t_at_step_t_in_every_split(tmp_path, files, permutation):
    from indrnn.data.permutations import load_permutation

    place(tmp_path / "MNIST" / "raw", files)
    plain = make_task(config(tmp_path)).load(CPU)
    permuted = make_task(config(tmp_path, name="mnist_permuted", permutation=permutation)).load(CPU)
    p = load_permutation(permutation)
    rows = torch.arange(20)
    for part in ("train", "validation", "test"):
        x, y = getattr(plain, part).batch(rows)
        px, py = getattr(permuted, part).batch(rows)
        assert torch.equal(px, x[:, p])
        assert torch.equal(py, y)
    assert permuted.provenance["permutation"] == permutation
    assert len(permuted.provenance["permutation_sha256"]) == 64
    assert plain.provenance["permutation"] is None
    assert plain.provenance["permutation_sha256"] is None


def test_the_test_set_is_loaded_at_first_use_only(tmp_path, files):
    raw = place(tmp_path / "MNIST" / "raw", files)
    task = make_task(config(tmp_path)).load(CPU)
    (raw / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte is missing"):
        _ = task.test
    place(raw, files)
    assert task.test is task.test


# Damaged files


@pytest.mark.parametrize("name", list(download.SHA256))
@pytest.mark.parametrize("damage", ["altered", "truncated", "empty"])
def test_a_damaged_file_is_named(tmp_path, files, name, damage):
    raw = place(tmp_path / "MNIST" / "raw", files)
    content = bytearray(files[name])
    content[-1] ^= 1
    damaged = {"altered": bytes(content), "truncated": files[name][:-7], "empty": b""}[damage]
    (raw / name).write_bytes(damaged)
    with pytest.raises(UserError) as error:
        make_task(config(tmp_path)).load(CPU)
    assert str(raw / name) in message(error)
    assert "delete it" in message(error)
    assert (raw / name).read_bytes() == damaged, "the user's file is not touched"


@pytest.mark.parametrize(
    "content",
    [b"<html>sorry</html>", gzip.compress(b"1234")[:-3], gzip.compress(b"1234")],
    ids=["a page", "cut short", "another file"],  # without, the name would hold the time that gzip writes
)
def test_a_damaged_packed_file_is_named(tmp_path, files, content):
    packed = {f"{name}.gz": gzip.compress(data) for name, data in files.items()}
    raw = place(tmp_path / "MNIST" / "raw", packed | {f"{TRAIN_IMAGES}.gz": content})
    with pytest.raises(UserError) as error:
        make_task(config(tmp_path)).load(CPU)
    assert str(raw / f"{TRAIN_IMAGES}.gz") in message(error)


# Downloads


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("as_url", [True, False])
def test_a_local_folder_as_mirror(tmp_path, files, packed, as_url):
    contents = {f"{name}.gz": gzip.compress(data) for name, data in files.items()} if packed else files
    folder = place(tmp_path / "a mirror", contents)
    make_task(config(tmp_path / "root", mirror=folder.as_uri() if as_url else str(folder))).load(CPU)
    assert_raw_files(tmp_path / "root", files)


def test_a_web_server_as_mirror_is_asked_for_what_is_missing(tmp_path, files):
    have = {name: data for name, data in files.items() if "labels" in name}
    place(tmp_path / "MNIST" / "raw", have)
    with server(serve(files)) as (url, asked):
        make_task(config(tmp_path, mirror=url)).load(CPU)
    assert sorted(set(asked)) == ["t10k-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz"]
    assert_raw_files(tmp_path, files)


def test_a_web_server_with_unpacked_files(tmp_path, files):
    def answer(handler: BaseHTTPRequestHandler, name: str) -> None:
        if name in files:
            send(handler, files[name])
        else:
            handler.send_error(404)

    with server(answer) as (url, _):
        make_task(config(tmp_path, mirror=url)).load(CPU)
    assert_raw_files(tmp_path, files)


def test_torchvision_names_the_same_files():
    assert sorted(name for name, _ in torchvision.datasets.MNIST.resources) == sorted(
        f"{name}.gz" for name in download.SHA256
    )


def bad_gateway(handler: BaseHTTPRequestHandler, name: str) -> None:
    handler.send_error(503)


def truncates(handler: BaseHTTPRequestHandler, name: str) -> None:
    send(handler, b"\x1f\x8b\x08" + b"0" * 50, length=1000)


def garbage(handler: BaseHTTPRequestHandler, name: str) -> None:
    send(handler, b"<html>\nPlease log in\n</html>")


def wrong_file(handler: BaseHTTPRequestHandler, name: str) -> None:
    send(handler, gzip.compress(b"a valid gzip file of something else"))


def hangs_up(handler: BaseHTTPRequestHandler, name: str) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


BAD_SERVERS = {
    "503": (bad_gateway, "503"),
    "truncates": (truncates, ""),
    "garbage": (garbage, "not a whole gzip file"),
    "wrong file": (wrong_file, "SHA-256"),
    "hangs up": (hangs_up, ""),
}


@pytest.mark.parametrize("kind", BAD_SERVERS)
def test_a_bad_mirror_is_named_with_its_fault_and_leaves_nothing_behind(tmp_path, files, kind):
    answer, fault = BAD_SERVERS[kind]
    with server(answer) as (url, _), pytest.raises(UserError) as error:
        make_task(config(tmp_path, mirror=url)).load(CPU)
    for part in (url, fault, str(tmp_path / "MNIST" / "raw"), "data.mirror=", "data=mnist5k"):
        assert part in message(error)
    assert_raw_files(tmp_path, {})


@pytest.mark.parametrize("kind", BAD_SERVERS)
def test_after_a_bad_mirror_the_next_is_asked(tmp_path, files, monkeypatch, caplog, kind):
    with server(BAD_SERVERS[kind][0]) as (bad, asked_bad), server(serve(files)) as (good, asked_good):
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{good}/"])
        make_task(config(tmp_path, mirror=bad)).load(CPU)
    assert_raw_files(tmp_path, files)
    assert len(set(asked_good)) == 4
    # The mirror that failed is not tried again for each file; that it failed is not kept quiet.
    assert set(asked_bad) == {"train-labels-idx1-ubyte.gz"}
    assert bad in caplog.text


def refused(tmp_path: Path, mirror: str | None) -> str:
    with pytest.raises(UserError) as error:
        make_task(config(tmp_path, mirror=mirror)).load(CPU)
    assert_raw_files(tmp_path, {})
    return message(error)


def test_no_network_and_no_files_is_told_with_three_ways_out(tmp_path, files, caplog):
    text = refused(tmp_path, None)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warnings, "one message, no warnings before it"
    for way_out in (str(tmp_path / "MNIST" / "raw"), "data.mirror=", "data=mnist5k", NOBODY_LISTENS):
        assert way_out in text


@pytest.mark.parametrize("after", [0, 100])
def test_a_server_that_stops_answering_is_left(tmp_path, files, monkeypatch, after):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    done = threading.Event()

    def hangs(handler: BaseHTTPRequestHandler, name: str) -> None:
        if after:
            send(handler, b"0" * after, length=1000)
        done.wait(3600)

    with server(hangs) as (url, _):
        text = refused(tmp_path, url)
        done.set()
    assert "timed out" in text


@pytest.mark.parametrize("mirror", ["no/such/folder", "file:///no/such/folder", "ftp://mirror.example/mnist", "s3://x"])
def test_a_mirror_that_cannot_be_one_is_refused(tmp_path, files, mirror):
    with pytest.raises(UserError, match=r"data\.mirror=") as error:
        make_task(config(tmp_path, mirror=mirror)).load(CPU)
    assert mirror in message(error)


def test_a_mirror_folder_without_the_files_is_told(tmp_path, files):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="could not be downloaded") as error:
        make_task(config(tmp_path / "root", mirror=str(tmp_path / "empty"))).load(CPU)
    assert str(tmp_path / "empty") in message(error)


def test_a_root_that_cannot_be_written_is_told(tmp_path, files):
    (tmp_path / "root").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write MNIST") as error:
        make_task(config(tmp_path / "root", mirror=str(place(tmp_path / "mirror", files)))).load(CPU)
    assert "data.root=" in message(error)


def test_a_full_disk_leaves_no_half_file(tmp_path, files, monkeypatch):
    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left on device") as error:
        make_task(config(tmp_path / "root", mirror=str(place(tmp_path / "mirror", files)))).load(CPU)
    message(error)
    assert_raw_files(tmp_path / "root", {})


def test_a_validation_split_of_everything_is_refused():
    with pytest.raises(UserError, match=r"data\.validation_size=60000 leave no image"):
        make_task(mnist_data(validation_size=60_000))


# The real files


@pytest.mark.skipif(not (Path(REAL_ROOT) / "MNIST" / "raw").is_dir(), reason="INDRNN_DATA names no folder with MNIST")
class TestRealMNIST:
    @pytest.mark.parametrize(("held_out", "left"), [(5000, 55_000), (3000, 57_000)])
    def test_both_splits_are_exact_and_stratified(self, held_out, left):
        task = make_task(mnist_data(root=REAL_ROOT, validation_size=held_out)).load(CPU)
        assert (task.train.size, task.validation.size, task.test.size) == (left, held_out, 10_000)
        counts = [torch.bincount(s.batch(torch.arange(s.size))[1]) for s in (task.train, task.validation)]
        share = (counts[0] + counts[1]) * held_out / 60_000
        assert ((counts[1] - share).abs() < 1).all()

    def test_agrees_with_torchvision(self):
        from torchvision.datasets import MNIST

        theirs = MNIST(REAL_ROOT, train=False)
        x, y = make_task(mnist_data(root=REAL_ROOT)).load(CPU).test.batch(torch.arange(10_000))
        assert torch.equal(y, theirs.targets)
        torch.testing.assert_close(x, 2 * theirs.data.reshape(10_000, 784, 1).float() / 255 - 1, atol=1e-7, rtol=0)
        assert x.min() == -1
        assert x.max() == 1
