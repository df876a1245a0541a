"""How much a server keeps, how many may ask, and how slowly: each bound has its own answer."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.clips import read
from support.tiny_models import make_folder, open_wan

pytest.importorskip("fastapi", reason="pip install 'wanfit[serve]': the server (wanfit serve)")
pytest.importorskip("uvicorn", reason="pip install 'wanfit[serve]': the server (wanfit serve)")

from support.http_server import Client, Idle, Started, serving, wait_for

from wan_core import GenerationConfig
from wan_core.errors import InvalidRequest, MissingFile
from wan_core.serve import Outcome, ServerOptions, serve
from wan_core.serve.desk import FolderFull, Shelf

TINY = {"num_frames": 5, "width": 32, "height": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bounds") / "tiny", "wan2.1-t2v")


def test_a_folder_that_is_full_takes_no_job_and_begins_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_core.serve.desk._KEPT_SECONDS", 0.0)
    crew = Idle()
    with serving(model, tmp_path, crew=crew, most_kept=2**40) as (client, desk):
        first, second = (client.create(prompt="x", **TINY)[1]["id"] for _ in range(2))
        wait_for(lambda: crew.taken == [1])
        folder = desk.queue.folder_of(first)
        folder.mkdir(parents=True)
        before = desk.shelf.kept()
        (folder / "clip.mp4").write_bytes(bytes(3_000_000))
        wait_for(lambda: desk.shelf.kept() >= before + 3_000_000)
        desk.shelf.most = before + 2_000_000
        status, told = client.create(prompt="x", **TINY)
        assert status == 507 and told["error"]["type"] == "FolderFull", told
        assert "--folder-gb" in told["error"]["message"]
        status, told = client.ask("GET", "/health")
        assert status == 200 and told["status"] == "full"  # not one to be started again
        crew.ends.append(Outcome(size=3_000_000))
        client.settled(first)
        time.sleep(0.3)
        assert crew.taken == [1] and client.ask("GET", f"/v1/videos/{second}")[1]["status"] == (
            "queued"
        )
        assert client.ask("DELETE", f"/v1/videos/{first}")[0] == 200
        wait_for(lambda: crew.taken == [1, 2])
        assert client.create(prompt="x", **TINY)[0] == 200
        assert client.ask("GET", "/health")[1]["status"] == "ok"
        assert "wanfit_folder_bytes " in client.ask("GET", "/metrics")[1].decode()


UPLOAD = b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="x.png"\r\n\r\n'


def uploading(client: Client, declared: int | None, sent: int) -> socket.socket:
    """Begin a request with an upload, and leave it there: ``declared`` bytes are to come."""
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=60)
    length = "Transfer-Encoding: chunked" if declared is None else f"Content-Length: {declared}"
    head = f"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n{length}\r\n"
    connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode())
    body = UPLOAD + bytes(sent)
    connection.sendall(b"%x\r\n%s\r\n" % (len(body), body) if declared is None else body)
    return connection


def test_jobs_that_lie_on_another_disk_count_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "disk" / "jobs" / "a").mkdir(parents=True)
    (tmp_path / "disk" / "jobs" / "a" / "clip.mp4").write_bytes(bytes(2**20))
    (tmp_path / "videos").mkdir()
    try:
        (tmp_path / "videos" / "jobs").symlink_to(tmp_path / "disk" / "jobs")
    except OSError:
        pytest.skip("links may not be made here")
    assert 2**20 <= Shelf(tmp_path / "videos", None).kept() < 2**20 + 4096


def test_uploads_on_their_way_count_in_the_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With their whole length where they tell it, and no more once their client is gone."""
    monkeypatch.setattr("wan_core.serve.desk._KEPT_SECONDS", 0.0)
    with serving(model, tmp_path, crew=Idle(), most_kept=2**40) as (client, desk):
        shelf = desk.shelf
        before = shelf.kept()
        shelf.most = before + 3_000_000
        first = uploading(client, 2_000_000, 1000)
        wait_for(lambda: shelf._coming == 2_000_000)
        refused = uploading(client, 1_500_000, 1000)  # each alone would have room
        assert b" 507 " in refused.recv(4096).split(b"\r\n")[0]
        refused.close()
        longer = uploading(client, None, 900_000)
        wait_for(lambda: 2_900_000 <= shelf._coming <= 2_902_000)
        longer.sendall(b"%x\r\n%s\r\n" % (200_000, bytes(200_000)))  # it told no length
        assert b" 507 " in longer.recv(4096).split(b"\r\n")[0]
        longer.close()
        wait_for(lambda: shelf._coming == 2_000_000)
        # What is not whole is counted once, and jobs may begin meanwhile.
        wait_for(lambda: shelf.kept() - before < 500_000 and shelf.has_room())
        first.close()
        wait_for(lambda: shelf._coming == 0)
        wait_for(lambda: not list(desk.uploads.iterdir()))
        shelf.most = shelf.kept() + 1_800_000
        with desk.coming(1_000_000) as coming:
            coming.kept = 999_000  # its job was accepted
        with pytest.raises(FolderFull):  # it is not counted yet, and yet it counts
            shelf.expect(1_000_000)
    assert "Traceback" not in capfd.readouterr().err  # a client that goes is no fault


@pytest.mark.skipif(sys.platform != "linux", reason="has a device that is always full")
def test_an_upload_that_the_disk_refuses_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it refused stays in the file's buffer, and is refused again where that is closed."""

    def full(path: Any, mode: str) -> Any:
        Path(path).touch()
        return open("/dev/full", "wb")

    monkeypatch.setattr("wan_core.serve.uploads.open", full, raising=False)
    with serving(model, tmp_path, crew=Idle()) as (client, desk):
        connection = uploading(client, None, 1000)
        wait_for(lambda: list(desk.uploads.iterdir()))
        connection.sendall(b"%x\r\n%s\r\n" % (20_000, bytes(20_000)))
        assert b" 507 " in connection.recv(4096).split(b"\r\n")[0]
        connection.close()
        wait_for(lambda: not list(desk.uploads.iterdir()))


def test_a_queue_that_is_full_says_when_to_ask_again(model: Path, tmp_path: Path) -> None:
    crew = Idle()
    with serving(model, tmp_path, crew=crew, most_waiting=2) as (client, desk):
        assert client.create(prompt="x", **TINY)[0] == 200
        wait_for(lambda: crew.taken == [1])
        assert [client.create(prompt="x", **TINY)[0] for _ in range(2)] == [200, 200]
        status, told = client.create(prompt="x", **TINY)
        assert status == 429 and told["error"]["type"] == "QueueFull", told
        assert client.told["retry-after"] == "60"  # nothing was measured yet
        assert not list(desk.uploads.iterdir())
        crew.ends.append(Outcome(size=1, seconds=7.2))
        wait_for(lambda: crew.taken == [1, 2])
        assert client.create(prompt="x", **TINY)[0] == 200
        assert client.create(prompt="x", **TINY)[0] == 429 and client.told["retry-after"] == "8"


def test_a_higher_priority_comes_first(model: Path, tmp_path: Path) -> None:
    crew = Idle()
    with serving(model, tmp_path, crew=crew) as (client, _):
        for priority in ({}, {}, {"priority": -1}, {"priority": "2.5"}, {"priority": 2.5}):
            status, video = client.create(prompt="x", **priority, **TINY)
            assert status == 200 and video["priority"] == float(priority.get("priority", 0))
            wait_for(lambda: crew.taken)
        for count in range(2, 6):
            crew.ends.append(Outcome(size=1))
            wait_for(lambda count=count: len(crew.taken) == count)
        assert crew.taken == [1, 4, 5, 2, 3]


def test_more_requests_than_are_answered_are_told_to_come_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model, tmp_path, crew=Idle()) as (client, _):
        monkeypatch.setattr("wan_core.serve.http.MOST_REQUESTS", 0)
        status, told = client.ask("GET", "/health")
        assert status == 503 and told["error"]["code"] == "too_many_requests"
        assert client.told["retry-after"] == "1"


HEAD = (
    b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000\r\n\r\n"
)


@pytest.mark.parametrize(("sent", "drip", "answer"), [
    (b"", b"", b""), (b"GET /he", b"", b""), (b"GET /he", b"a", b""),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he", b"a", b"HTTP/1.1 200"),
    (HEAD, b"", b"HTTP/1.1 408"), (HEAD, b" ", b"HTTP/1.1 408"),
], ids=("nothing", "part of a head", "a head in drops", "a second one in drops", "part of a body",
        "a body in drops"))  # fmt: skip
def test_who_sends_next_to_nothing_is_hung_up_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes, drip: bytes,
    answer: bytes,
) -> None:  # fmt: skip
    monkeypatch.setattr("wan_core.serve.server.HEAD_SECONDS", 0.3)
    monkeypatch.setattr("wan_core.serve.uploads.PAUSE_SECONDS", 0.3)
    with (
        serving(model, tmp_path, crew=Idle()) as (client, desk),
        socket.create_connection(("127.0.0.1", client.port), timeout=0.05) as connection,
    ):
        connection.sendall(sent)
        told, ended, deadline = b"", False, time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            try:
                if drip:
                    connection.sendall(drip)
                got = connection.recv(4096)
                told, ended = told + got, not got
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended and told.startswith(answer), told
        assert not list(desk.uploads.iterdir())


def test_bounds_that_let_nothing_in_are_refused(tmp_path: Path) -> None:
    for wrong in ({"most_waiting": 0}, {"folder_gb": -1.0}, {"folder_gb": float("nan")},
                  {"upload_mb": 0.0}):  # fmt: skip
        with pytest.raises(InvalidRequest, match="a number above 0 is needed"):
            serve(ServerOptions(model=tmp_path, folder=tmp_path / "videos", **wrong))
    with pytest.raises(MissingFile, match="lora_folder .* is no folder"):
        serve(ServerOptions(model=tmp_path, folder=tmp_path, lora_folder=tmp_path / "none"))
    for name, value in (("tries", 0), ("port", 99_999), ("port", -1)):
        with pytest.raises(InvalidRequest, match=f"{name} is {value}"):
            serve(ServerOptions(model=tmp_path, folder=tmp_path / "v", **{name: value}))
    assert "secret" not in repr(ServerOptions(model=tmp_path, folder=tmp_path, token="secret"))


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarm to end it if it goes on")
def test_a_server_that_is_asked_to_end_before_its_first_request_ends(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before uvicorn listens to signals: the address is told, and a service manager stops it."""
    told: list[str] = []
    crew = Idle()
    monkeypatch.setattr("wan_core.serve.server._crew", lambda *_: crew)

    def tell(text: str) -> None:
        told.append(text)
        signal.raise_signal(signal.SIGTERM)

    def goes_on(*_: Any) -> None:
        raise AssertionError("it was not ended by SIGTERM")

    before = signal.signal(signal.SIGALRM, goes_on), signal.getsignal(signal.SIGTERM)
    signal.alarm(60)
    try:
        serve(ServerOptions(model=model, folder=tmp_path / "videos", port=0), tell)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
    assert len(told) == 1 and signal.getsignal(signal.SIGTERM) is before[1]


@pytest.mark.slow
def test_a_server_that_is_asked_to_end_does_so_and_goes_on(model: Path, tmp_path: Path) -> None:
    """In the middle of a render, as often as a kill would have failed the job: by SIGTERM, and as
    a terminal that is closed does."""
    job: dict[str, Any] = {**TINY, "num_inference_steps": 300}
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # under nohup; it is inherited
    hangup = signal.SIGTERM if ignored else signal.SIGHUP
    server = Started(model, tmp_path / "videos")
    client = Client(server.port)
    id = client.create(prompt="first", seed=7, **job)[1]["id"]
    try:
        for least in (2, 4, 6, 8):
            wait_for(
                lambda least=least: client.ask("GET", f"/v1/videos/{id}")[1]["progress"] >= least,
                120,
            )
            server.process.send_signal(hangup if least in (4, 8) else signal.SIGTERM)
            assert server.process.wait(60) == 0
            file = sqlite3.connect(tmp_path / "videos" / "queue.sqlite3")
            status, restarts, tries = file.execute(
                "SELECT status, restarts, tries FROM jobs"
            ).fetchone()
            file.close()
            assert (status, restarts, tries) == ("queued", 0, 0)
            server.start()
        video = client.settled(id, 120)
        assert video["status"] == "completed" and video["tries"] == 1, json.dumps(video)
        (tmp_path / "served.mp4").write_bytes(client.ask("GET", f"/v1/videos/{id}/content")[1])
    finally:
        server.kill()
    config = GenerationConfig(prompt="first", seed=7, output_path=tmp_path / "a.mp4", **job)
    open_wan(model, precision="auto").generate(config).raise_for_error()
    assert (read(tmp_path / "a.mp4")[0] == read(tmp_path / "served.mp4")[0]).all()
