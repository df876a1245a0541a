"""The server: who may ask, what is refused before it is read, and that no accepted job is lost."""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.clips import read
from support.tiny_models import make_folder, open_wan

pytest.importorskip("fastapi", reason="pip install 'wanfit[serve]': the server (wanfit serve)")
pytest.importorskip("uvicorn", reason="pip install 'wanfit[serve]': the server (wanfit serve)")

from support.http_server import Client, Idle, Started, form, serving, wait_for

from wan_core import GenerationConfig
from wan_core.errors import InvalidRequest, OutputError, WorkerFailed
from wan_core.journal import saved_renders
from wan_core.render.video import VideoWriter, read_video
from wan_core.serve.carry import Outcome
from wan_core.serve.fields import Upload, read_job
from wan_core.serve.http import Guard, shown
from wan_core.serve.jobs import BatchJob
from wan_core.serve.queue import Queue, new_id
from wan_core.serve.server import ServerOptions, check_token, read_token, serve
from wan_core.serve.uploads import look_at

TINY = {"num_frames": 5, "width": 32, "height": 32, "num_inference_steps": 2}
TOKEN = "a-token-of-some-length"
PNG = BytesIO()
Image.new("RGB", (32, 32), "red").save(PNG, "PNG")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("served") / "tiny", "wan2.1-t2v")


@pytest.fixture(scope="module")
def idle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Any]]:
    """A server that accepts and refuses, and renders nothing."""
    folder = tmp_path_factory.mktemp("idle")
    loras = folder / "loras"
    loras.mkdir()
    with serving(
        model, folder / "videos", token=TOKEN, crew=Idle(), most_bytes=2**20, lora_folder=loras
    ) as found:
        yield found


def test_a_prompt_becomes_the_clip_that_one_render_makes(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "videos") as (client, desk):
        status, video = client.create(prompt="a cat", seed=3, **TINY)
        assert status == 200 and video["object"] == "video", video
        assert video["status"] in ("queued", "in_progress") and video["size"] == "32x32"
        done = client.settled(video["id"])
        assert done["status"] == "completed" and done["progress"] == 100, done
        assert done["model"] == "tiny" and done["prompt"] == "a cat" and done["error"] is None
        assert done["inference_time_s"] > 0 and "denoise" in done["stage_durations"]
        status, clip = client.ask("GET", f"/v1/videos/{video['id']}/content")
        assert status == 200
        (tmp_path / "served.mp4").write_bytes(clip)
        part = client.ask("GET", f"/v1/videos/{video['id']}/content", None, {"Range": "bytes=4-7"})
        assert part == (206, b"ftyp")
        other = client.ask("GET", f"/v1/videos/{video['id']}/content?variant=thumbnail")
        assert other[0] == 400 and other[1]["error"]["param"] == "variant", other
        metrics = client.ask("GET", "/metrics")[1].decode()
        assert (
            'wanfit_tries_total{result="completed"} 1\n' in metrics and "wanfit_up 1\n" in metrics
        )
        folder = desk.queue.folder_of(video["id"])
        assert [path.name for path in folder.iterdir()] == ["clip.mp4"]
        assert client.ask("DELETE", f"/v1/videos/{video['id']}")[1]["deleted"] is True
        assert client.ask("GET", f"/v1/videos/{video['id']}")[0] == 404 and not folder.exists()
    config = GenerationConfig(prompt="a cat", seed=3, output_path=tmp_path / "a.mp4", **TINY)
    open_wan(model).generate(config).raise_for_error()
    assert (read(tmp_path / "a.mp4")[0] == read(tmp_path / "served.mp4")[0]).all()


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"pormpt": "x"}, "pormpt", "did you mean 'prompt'"),
    ({"output": "/etc/x.mp4"}, "output", "chooses the place"),
    ({"image_reference": "{}"}, "image_reference", "nothing is fetched"),
    ({"prompt": " "}, "prompt", "say what is to be seen"),
    ({"prompt": "x" * 70_000}, "prompt", "65,536 are read"),
    ({"width": "wide"}, "width", "a whole number is needed"),
    ({"width": "1e9"}, "width", "a whole number is needed"),
    ({"width": 33_000_000}, "width", "width"),
    ({"priority": "high"}, "priority", "a number is needed"),
    ({"flow_shift": "nan"}, "flow_shift", "a number is needed"),
    ({"size": "32 by 32"}, "size", "WIDTHxHEIGHT"),
    ({"size": f"{'9' * 5000}x32"}, "size", "WIDTHxHEIGHT"),
    ({"seed": "1" + "0" * 400}, "seed", "below 1e20"),
    ({"seed": "9" * 5000}, "seed", "a whole number is needed"),
    ({"seconds": "1e308"}, "seconds", "fewer than 1e20 frames"),
    ({"seconds": "inf"}, "seconds", "above 0"),
    ({"seconds": "nan"}, "seconds", "above 0"),
    ({"lora": '{"name": "x", "scale": 1' + "0" * 400 + "}"}, "lora", "wrong scale"),
    ({"extra_params": '{"enable_optimizations": "x"}'}, "enable_optimizations", "True or False"),
    ({"size": "48x32", "width": 32}, "size", "give one of them"),
    ({"seconds": "-1"}, "seconds", "above 0"),
    ({"seconds": "1_0"}, "seconds", "above 0"),
    ({"num_frames": "5_0"}, "num_frames", "a whole number is needed"),
    ({"flow_shift": "\uff15"}, "flow_shift", "a number is needed"),
    ({"seconds": "4", "num_frames": 5}, "seconds", "give one of them"),
    ({"model": "other"}, "model", "'tiny' only"),
    ({"guidance_scale_2": 3}, "guidance_scale_2", "one transformer"),
    ({"boundary_ratio": 7}, "boundary_ratio", "boundary"),
    ({"extra_params": "{"}, "extra_params", "is not JSON"),
    ({"extra_params": '{"image": "/etc/passwd"}'}, "extra_params", "has no 'image'"),
    ({"extra_params": '{"output_path": "/x.mp4"}'}, "extra_params", "has no 'output_path'"),
    ({"extra_params": '{"control": {"video": "/x"}}'}, "extra_params", "has no 'video'"),
    ({"lora": '{"name": "../../x.safetensors"}'}, "lora", "is refused"),
    ({"lora": '{"name": "/x.safetensors"}'}, "lora", "is refused"),
    ({"lora": '{"path": "/x.safetensors"}'}, "lora", "lora must be"),
    ({"input_reference": "/etc/passwd"}, "input_reference", "send the file itself"),
]  # fmt: skip


def test_what_is_wrong_is_named_and_leaves_nothing(idle: tuple[Client, Any]) -> None:
    client, desk = idle
    for fields, param, why in BAD:
        status, told = client.create(**{"prompt": "x", **TINY, **fields})
        assert status == 400 and told["error"]["param"] == param, (fields, told)
        assert why in told["error"]["message"], (fields, told)
    for body, kind, why in (
        (b"{", "application/json", "is not JSON"), (b"[]", "application/json", "JSON object"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 400 + b"}", "application/json", "below 1e20"),
        (b"x", "text/plain", "text/plain"), (b"x", "multipart/form-data", "no boundary"),
        (b"x", "multipart/form-data; boundary=b", "broken"),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx',
         "multipart/form-data; boundary=b", "ends too early"),
        (b"x", "multipart/form-data; boundary=" + "b" * 300, "is broken"),
    ):  # fmt: skip
        status, told = client.ask("POST", "/v1/videos", body, {"Content-Type": kind})
        assert status == 400 and why in told["error"]["message"], told
    for limit in ("9" * 5000, "0", "%C2%B2", "x"):
        status, told = client.ask("GET", f"/v1/videos?limit={limit}")
        assert status == 400 and told["error"]["param"] == "limit", limit
    assert sum(desk.queue.by_status().values()) == 0
    assert [
        path for path in desk.uploads.parent.rglob("*") if path.suffix in (".part", ".mp4")
    ] == []
    assert not list(desk.uploads.parent.glob("jobs/*"))


def test_ids_are_looked_up_and_never_become_paths(idle: tuple[Client, Any]) -> None:
    client, _ = idle
    good = new_id()
    for id in (good, "../../queue.sqlite3", "..%2f..%2fqueue.sqlite3", "%2e%2e", f"{good}%00",
               f"{good}/../../queue.sqlite3", "' OR 1=1 --".replace(" ", "%20")):  # fmt: skip
        for method, path in (("GET", id), ("GET", f"{id}/content"), ("DELETE", id)):
            status, _ = client.ask(method, f"/v1/videos/{path}")
            assert status == 404, (method, path)


def test_a_token_is_needed_and_must_be_right(idle: tuple[Client, Any]) -> None:
    client, _ = idle
    body, kind = form({"prompt": "x", **TINY})
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {TOKEN}x"},
                  {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer "}):  # fmt: skip
        bare = Client(client.port)
        for method, path in (("GET", "/v1/videos"), ("GET", "/metrics"), ("POST", "/v1/videos"),
                             ("DELETE", f"/v1/videos/{new_id()}"), ("GET", "/none")):  # fmt: skip
            status, told = bare.ask(method, path, body, {"Content-Type": kind, **given})
            assert status == 401 and "token" in told["error"]["message"], (given, path)
        assert bare.ask("GET", "/health", None, given)[0] == 200  # tells nothing of any job
    assert client.ask("GET", "/v1/videos")[0] == 200
    # A page of another site is refused even with it.
    assert client.ask("GET", "/v1/videos", None, {"Origin": "https://evil.example"})[0] == 403
    own = {"Origin": f"http://127.0.0.1:{client.port}"}
    assert client.ask("GET", "/v1/videos", None, own)[0] == 200


@pytest.mark.parametrize(("host", "passes"), [
    ("localhost:8091", True), ("127.0.0.1", True), ("[::1]:8091", True),
    ("evil.example", False), ("evil.example:8091", False), ("127.0.0.1.evil.example:80", False),
    ("", False),
])  # fmt: skip
def test_without_a_token_only_this_machine_is_answered(host: str, passes: bool) -> None:
    guard = Guard(None, None)
    assert (guard._refused("/v1/videos", {b"host": host.encode()}) is None) is passes


def test_without_a_token_the_address_it_listens_on_is_answered() -> None:
    guard = Guard(None, None, "127.8.8.8")
    for host, passes in (("127.8.8.8:8091", True), ("localhost", True), ("127.8.8.9:80", False)):
        assert (guard._refused("/v1/videos", {b"host": host.encode()}) is None) is passes


def test_nobody_listens_to_others_without_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(InvalidRequest, match="a token is needed"):
            check_token(host, None)
        check_token(host, TOKEN)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_token(host, None)
    with pytest.raises(InvalidRequest, match="16 or more"):
        check_token("0.0.0.0", "short")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(str(tmp_path / "token")) == TOKEN
    for encoding in ("utf-8-sig", "utf-16"):  # as Windows' editors save it
        (tmp_path / "token").write_text(f"{TOKEN}\r\n", encoding)
        assert read_token(str(tmp_path / "token")) == TOKEN
    monkeypatch.setenv("WANFIT_TOKEN", f" {TOKEN}\n")  # no client could send it so
    assert read_token(None) == TOKEN
    with pytest.raises(InvalidRequest, match="on one line"):
        check_token("127.0.0.1", f"{TOKEN}\n{TOKEN}")


def test_a_body_that_is_too_large_is_refused_before_it_is_read(idle: tuple[Client, Any]) -> None:
    """2 GB that are announced, of which not one byte is sent."""
    client, desk = idle
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        head = (
            f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 2000000000\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]
    body = json.dumps({"prompt": "x" * 2**20})
    status, told = client.ask("POST", "/v1/videos", body, {"Content-Type": "application/json"})
    assert status == 413 and "JSON is larger than 1 MiB" in told["error"]["message"]
    # One byte more than a file may have, in a request that is not too large as a whole.
    status, told = client.create(("x.png", bytes(2**20 + 1)), prompt="x", **TINY)
    assert status == 413 and told["error"]["type"] == "TooLarge"
    assert not list(desk.uploads.iterdir())


def test_a_body_without_a_length_is_left_off_where_it_gets_too_large(
    idle: tuple[Client, Any],
) -> None:
    client, desk = idle
    sent = 0
    most = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent, most
        yield b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="x"\r\n\r\n'
        while sent < 2**31:
            sent += 2**16
            most = max([most, *(path.stat().st_size for path in desk.uploads.iterdir())])
            yield bytes(2**16)

    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    head = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "multipart/form-data; boundary=b"}
    status = 0
    try:
        connection.request("POST", "/v1/videos", chunks(), head, encode_chunked=True)
        status = connection.getresponse().status
    except OSError:
        pass  # it has hung up while we were still sending
    assert status in (0, 413) and sent < 2**26, f"{sent:,} bytes were taken"
    assert most <= 2**20
    wait_for(lambda: not list(desk.uploads.iterdir()))  # no part of an upload is left


def test_what_an_upload_is_is_seen_in_it(
    idle: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, desk = idle
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n"
    for data, why in (
        (b"", "is empty"), (b"no picture", "no picture or video"),
        (playlist, "no picture or video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "no picture or video"),
        (b"\0\0\0\x18ftypisom" + bytes(64), "no video that can be read"),
        (PNG.getvalue()[:40], "no picture or video"),
    ):  # fmt: skip
        status, told = client.create(("../../x.png", data), prompt="x", **TINY)
        assert status == 400 and told["error"]["param"] == "input_reference", (data, told)
        assert why in told["error"]["message"], told
    monkeypatch.setattr("wan_core.serve.uploads.MOST_PICTURE", 32 * 32 - 1)
    status, told = client.create(("x.png", PNG.getvalue()), prompt="x", **TINY)
    assert status == 400 and "32x32 pixels" in told["error"]["message"]
    # A picture for a model that reads none, in the model's own words.
    monkeypatch.setattr("wan_core.serve.uploads.MOST_PICTURE", 32 * 32)
    status, told = client.create(("x.png", PNG.getvalue()), prompt="x", **TINY)
    assert status == 400 and told["error"]["param"] == "image", told
    assert not list(desk.uploads.iterdir()) and not list(desk.uploads.parent.glob("jobs/*"))


def test_a_picture_and_a_video_become_inputs(idle: tuple[Client, Any], tmp_path: Path) -> None:
    client, desk = idle
    desk.uploads.rmdir()  # by somebody who tidied up: it is empty between two uploads
    with VideoWriter(tmp_path / "v.mp4", fps=8, width=32, height=32) as writer:
        writer.write(torch.zeros(9, 32, 32, 3))
    extra = json.dumps({"control": {"denoise": 0.5}})
    data = (tmp_path / "v.mp4").read_bytes()
    status, video = client.create(("../v.exe", data), prompt="x", extra_params=extra, **TINY)
    assert status == 200, video
    folder = desk.queue.folder_of(video["id"])
    assert (folder / "input.mp4").read_bytes() == data and not list(desk.uploads.iterdir())
    row = desk.queue._file.execute("SELECT job FROM jobs WHERE id = ?", (video["id"],)).fetchone()
    assert json.loads(row[0])["control"] == {"denoise": 0.5, "video": str(folder / "input.mp4")}
    client.ask("DELETE", f"/v1/videos/{video['id']}")
    # Frames are decoded only where they are few enough: a small file may hold very many.
    for frames, param in ((2**19, "input_reference"), (0, "num_frames"), (-1, "num_frames")):
        told = client.create(("v", data), prompt="x", **{**TINY, "num_frames": frames})
        assert told[0] == 400 and told[1]["error"]["param"] == param, told
    assert (
        "pixels are read"
        in client.create(("v", data), prompt="x", **{**TINY, "num_frames": 2**19})[1]["error"][
            "message"
        ]
    )
    upload = Upload(path=tmp_path / "input.png", kind="image")
    made, _ = read_job({"prompt": "x"}, upload, desk.served, tmp_path / "clip.mp4")
    assert made.values["image"] == str(tmp_path / "input.png") and made.output.parent == tmp_path


def test_a_folder_of_jobs_on_another_disk_or_full(
    idle: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, desk = idle

    def refuse(code: int) -> Callable[..., Any]:
        def refused(*_: Any, **__: Any) -> Any:
            raise OSError(code, os.strerror(code))

        return refused

    monkeypatch.setattr(os, "rename", refuse(errno.EXDEV))  # as a link to another disk does
    path = desk.uploads / "x.part"
    path.write_bytes(PNG.getvalue())
    kept = look_at(path, desk.queue.folder_of("moved") / "input")
    assert kept.path.read_bytes() == PNG.getvalue() and not path.exists()
    desk.queue.remove_folder("moved")
    monkeypatch.setattr(shutil, "move", refuse(errno.ENOSPC))
    status, told = client.create(("x.png", PNG.getvalue()), prompt="x", **TINY)
    assert status == 507 and "No space left" in told["error"]["message"], told
    assert not list(desk.uploads.iterdir()) and not list(desk.uploads.parent.glob("jobs/*"))


def mjpeg(path: Path, *parts: tuple[int, int]) -> bytes:
    """Return an AVI whose header has the first part's size, of (frames, side) after each other."""
    import av

    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width = stream.height = parts[0][1]
        stream.pix_fmt = "yuvj420p"
        for frames, side in parts:
            picture = BytesIO()
            Image.new("RGB", (side, side), "red").save(picture, "JPEG")
            for _ in range(frames):
                packet = av.Packet(picture.getvalue())
                packet.stream, packet.is_keyframe = stream, True
                container.mux(packet)
    return path.read_bytes()


def test_a_video_that_grows_is_refused_at_the_first_larger_frame(
    idle: tuple[Client, Any], tmp_path: Path
) -> None:
    client, desk = idle
    data = mjpeg(tmp_path / "v.avi", (9, 32), (3, 256))
    assert read_video(tmp_path / "v.avi", "video", 9).shape == (9, 32, 32, 3)
    with pytest.raises(InvalidRequest, match="32x32 to 256x256 at frame 9"):
        read_video(tmp_path / "v.avi", "video")
    status, told = client.create(("v", data), prompt="x", **{**TINY, "num_frames": 9})
    assert status == 400 and "32x32 to 256x256" in told["error"]["message"], told
    assert not list(desk.uploads.iterdir()) and not list(desk.uploads.parent.glob("jobs/*"))


def test_a_picture_with_others_behind_it_is_a_jpeg(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "x", "MPO", save_all=True, append_images=[picture])
    with Image.open(tmp_path / "x") as opened:
        assert opened.format == "MPO"
    upload = look_at(tmp_path / "x", tmp_path / "job" / "input")
    assert upload.kind == "image" and upload.path == tmp_path / "job" / "input.jpg"


@pytest.mark.parametrize(("given", "low", "high"), [
    ({"guidance_scale": "2"}, 2.0, 2.0), ({"guidance_scale": 2, "guidance_scale_2": 3}, 2.0, 3.0),
    ({"guidance_scale_2": 3}, None, 3.0), ({}, None, None),
])  # fmt: skip
def test_of_two_experts_the_first_scale_is_the_low_one(
    idle: tuple[Client, Any], tmp_path: Path, given: dict[str, Any], low: Any, high: Any
) -> None:
    served = replace(idle[1].served, two_experts=True)
    values = read_job({"prompt": "x", **given}, None, served, tmp_path / "clip.mp4")[0].values
    assert (values.get("guidance_scale_2"), values.get("guidance_scale")) == (low, high)
    assert isinstance(values["seed"], int)  # drawn here: a job that goes on is the same job
    other = read_job({"prompt": "x", **given}, None, served, tmp_path / "clip.mp4")[0].values
    assert other["seed"] != values["seed"]


def test_a_job_that_never_fits_is_refused_and_the_queue_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Idle()
    with serving(model, tmp_path, crew=crew) as (client, desk):
        some = 2**31
        desk._machine = replace(desk._machine, device_free_bytes=some, ram_available_bytes=some)
        status, told = client.create(prompt="x", width=2048, height=2048, num_frames=161)
        assert status == 422 and told["error"]["type"] == "DoesNotFit", told
        said = told["error"]["message"]
        assert "MiB can be used" in said and "would fit" in said
        assert client.create(prompt="x", **TINY)[0] == 200


def test_deleting_failing_listing(model: Path, tmp_path: Path) -> None:
    crew = Idle()
    with serving(model, tmp_path, crew=crew) as (client, desk):
        ids = [client.create(prompt=f"{i}", **TINY)[1]["id"] for i in range(4)]
        wait_for(lambda: client.ask("GET", f"/v1/videos/{ids[0]}")[1]["status"] == "in_progress")
        desk.queue.progress(1, 40)
        assert client.ask("GET", f"/v1/videos/{ids[0]}")[1]["progress"] == 40
        assert client.ask("GET", f"/v1/videos/{ids[0]}/content")[0] == 409
        page = client.ask("GET", "/v1/videos?limit=2")[1]
        assert [one["id"] for one in page["data"]] == ids[:1:-1] and page["has_more"]
        rest = client.ask("GET", f"/v1/videos?after={page['last_id']}&limit=9")[1]
        assert [one["id"] for one in rest["data"]] == ids[1::-1] and not rest["has_more"]
        for query in ("limit=0", "limit=x", "order=up", "after=none"):
            assert client.ask("GET", f"/v1/videos?{query}")[0] == 400
        # In work: it stops, and is gone at once for its client.
        assert client.ask("DELETE", f"/v1/videos/{ids[0]}")[0] == 200
        assert client.ask("GET", f"/v1/videos/{ids[0]}")[0] == 404
        wait_for(lambda: client.ask("GET", f"/v1/videos/{ids[1]}")[1]["status"] == "in_progress")
        assert desk.queue.counts["deleted"] == 1
        # A try that failed is made again after the others; the second is the last.
        assert client.ask("DELETE", f"/v1/videos/{ids[3]}")[0] == 200
        crew.ends.append(Outcome(error="the disk was full", kind="OutputError"))
        wait_for(lambda: client.ask("GET", f"/v1/videos/{ids[2]}")[1]["status"] == "in_progress")
        crew.ends.append(Outcome(error="no such value", kind="InvalidRequest", final=True))
        assert client.settled(ids[2])["error"]["message"] == "no such value"
        crew.ends.append(Outcome(error="still full", kind="OutputError"))
        failed = client.settled(ids[1])
        assert failed["error"] == {"code": "OutputError", "message": "still full"}
        assert failed["tries"] == 2


def test_a_crew_that_falls_is_told_and_its_jobs_stay(model: Path, tmp_path: Path) -> None:
    def none(_: Any) -> Any:
        raise OSError("no crew today")

    with serving(model, tmp_path, crew=none) as (client, _):
        wait_for(lambda: client.ask("GET", "/health")[0] == 503)
        assert "no crew today" in client.ask("GET", "/health")[1]["error"]
        # What would never be made is not accepted.
        status, told = client.create(prompt="x", **TINY)
        assert status == 503 and "no crew today" in told["error"]["message"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_in_silence_is_told(model: Path, tmp_path: Path) -> None:
    def gone(_: Any) -> Any:
        raise SystemExit  # no Exception, and nothing is printed for it in a thread

    with serving(model, tmp_path, crew=gone) as (client, _):
        wait_for(lambda: client.ask("GET", "/health")[0] == 503)
        assert client.create(prompt="x", **TINY)[0] == 503


def test_a_write_that_the_disk_refuses_is_tried_again(model: Path, tmp_path: Path) -> None:
    crew = Idle()
    with serving(model, tmp_path, crew=crew) as (client, desk):
        id = client.create(prompt="x", **TINY)[1]["id"]
        wait_for(lambda: client.ask("GET", f"/v1/videos/{id}")[1]["status"] == "in_progress")
        desk.queue._file.execute("PRAGMA query_only = 1")
        crew.ends.append(Outcome(size=1))
        wait_for(lambda: client.ask("GET", "/health")[0] == 503)
        assert "Free some space" in client.ask("GET", "/health")[1]["error"]
        assert client.create(prompt="y", **TINY)[0] == 503
        assert client.ask("DELETE", f"/v1/videos/{id}")[0] == 507
        desk.queue._file.execute("PRAGMA query_only = 0")
        assert client.settled(id)["status"] == "completed"
        wait_for(lambda: client.ask("GET", "/health")[0] == 200)
        assert client.create(prompt="y", **TINY)[0] == 200


class Full:
    """A queue's file on a disk that is full as long as a folder is there."""

    def __init__(self, file: sqlite3.Connection, folder: Path) -> None:
        self.file, self.folder = file, folder

    def execute(self, text: str, *values: Any) -> Any:
        if text.lstrip().startswith("UPDATE") and self.folder.exists():
            raise sqlite3.OperationalError("database or disk is full")
        return self.file.execute(text, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_clip_can_be_deleted_from_a_full_disk(tmp_path: Path) -> None:
    """Its own files make the room; those of a job that is still to be made stay."""
    queue = Queue(tmp_path / "queue.sqlite3")
    ids = [new_id() for _ in range(2)]
    for id in ids:
        job = BatchJob(number=0, model=tmp_path, output=queue.folder_of(id) / "clip.mp4")
        queue.add(id, job, {"prompt": "x"})
        job.output.parent.mkdir(parents=True)
    made = queue.take("")
    assert made is not None
    queue.settle(made, Outcome(size=1))
    file, folders = queue._file, [queue.folder_of(id) for id in ids]
    queue._file = Full(file, folders[0])  # type: ignore[assignment]
    assert queue.delete(ids[0]) and queue.get(ids[0]) is None and not folders[0].exists()
    queue._file = Full(file, folders[1])  # type: ignore[assignment]
    with pytest.raises(OutputError, match="cannot be taken out: database or disk is full"):
        queue.delete(ids[1])
    assert folders[1].exists()
    queue.close()


def test_a_queue_whose_file_is_gone_takes_no_job_that_would_be_lost(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would go on with a file without a name, until the server ends."""
    crew = Idle()
    with serving(model, tmp_path, crew=crew) as (client, desk):
        path = desk.queue.path
        path.rename(tmp_path / "elsewhere")
        status, told = client.create(prompt="x", **TINY)
        assert status == 503 and "was removed or replaced" in told["error"]["message"]
        assert client.ask("GET", "/health")[0] == 503
        path.write_bytes(b"")
        assert client.create(prompt="x", **TINY)[0] == 503
        (tmp_path / "elsewhere").replace(path)
        assert client.ask("GET", "/health")[0] == 200
        assert client.create(prompt="x", **TINY)[0] == 200

        def broken(*_: Any) -> None:
            raise sqlite3.DatabaseError("database disk image is malformed")

        monkeypatch.setattr(desk.queue, "list", broken)
        status, told = client.ask("GET", "/v1/videos")
        assert status == 503 and "malformed" in told["error"]["message"]


def test_a_disk_that_stays_full_ends_the_crew_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_core.serve.queue.PATIENCE", 0.0)
    queue = Queue(tmp_path / "queue.sqlite3")
    queue.add(new_id(), job(tmp_path), {})
    queue._file.execute("PRAGMA query_only = 1")
    with pytest.raises(OutputError, match="Free some space"):
        queue.take("")
    queue.close()


def job(folder: Path, number: int = 0, **more: Any) -> BatchJob:
    return BatchJob(number=number, model=folder, output=folder / "x.mp4", **more)


def test_a_queue_takes_up_what_was_in_work(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    queue = Queue(path)
    ids = [new_id() for _ in range(3)]
    for i, id in enumerate(ids):
        queue.add(id, job(tmp_path, priority=float(i == 2)), {"prompt": str(i)})
    first = queue.take("")
    assert first is not None and first.number == 3  # of the highest priority
    second = queue.take("")
    assert second is not None and second.number == 1
    queue.delete(ids[0])
    with pytest.raises(OutputError, match="Another server"):
        Queue(path)
    queue.close()  # as a kill leaves it
    queue = Queue(path)
    assert queue.by_status() == {"queued": 2, "in_progress": 0, "completed": 0, "failed": 0}
    assert queue.get(ids[0]) is None
    again = queue.take("")
    assert again is not None and again.number == 3
    # A process that dies under a job is no try, but three of them are a reason.
    for _ in range(3):
        queue.settle(again, Outcome(lost=True, error="died", kind="Lost"))
        assert (row := queue.get(ids[2])) is not None
        again = queue.take("") or again
    assert row.status == "failed" and again.number == 2
    queue.end()
    queue.settle(again, Outcome(stopped=True, error="x"))
    assert queue.waiting() == 0 and queue.take("") is None
    queue.close()
    queue = Queue(path)
    assert queue.by_status()["queued"] == 1
    row = queue.get(ids[1])
    assert row is not None and row.tries == 0
    # It stopped in time: what is counted of deaths is as it was.
    assert [
        r[0] for r in queue._file.execute("SELECT restarts FROM jobs WHERE id = ?", (ids[1],))
    ] == [0]
    queue.close()
    (tmp_path / "other").write_text("no database, for certain" * 100)
    with pytest.raises(InvalidRequest, match="is not the queue"):
        Queue(tmp_path / "other")


DAMAGE: list[tuple[str, Any]] = [
    ("job", "{"), ("job", "[]"), ("job", "null"), ("job", "[" * 100_000), ("job", "{}"),
    ("job", ""), ("job", b"\xff\xfe{}"), ("values", {"prompt": "\ufffd"}), ("values", 3),
    ("optimization", [1]), ("loras", 5), ("output", None), ("model", 7), ("hands", 2),
    ("shown", "{"), ("shown", "[]"), ("outcome", "{"), ("outcome", b"\xff"),
]  # fmt: skip
"""A column of a row, or a field of the job in it, and what a failing disk or a hand left there."""


@pytest.mark.parametrize(("what", "left"), DAMAGE)
def test_a_row_that_cannot_be_read_is_set_aside_and_the_others_go_on(
    tmp_path: Path, what: str, left: Any
) -> None:
    """Another server's hand on the file, a bad sector: its client is told, nobody else is."""
    queue = Queue(tmp_path / "queue.sqlite3")
    ids = [new_id() for _ in range(2)]
    for id in ids:
        queue.add(id, job(tmp_path), {"prompt": id})
    of_job = what not in ("shown", "outcome")
    if of_job and what != "job":
        row = queue._file.execute("SELECT job FROM jobs").fetchone()
        what, left = "job", json.dumps({**json.loads(row[0]), what: left}, ensure_ascii=False)
    damage = f"UPDATE jobs SET {what} = CAST(? AS TEXT) WHERE id = ?", (left, ids[0])
    if of_job:
        queue._file.execute(*damage)
    taken = [one.number for one in iter(lambda: queue.take(""), None)]
    assert taken == ([2] if of_job else [1, 2])
    for number in taken:
        queue.settle(job(tmp_path, number), Outcome(error="x", kind="X", final=True))
    queue._file.execute(*damage)
    told = [shown(row) for row in queue.list(10, newest=False)]
    json.dumps(told, ensure_ascii=False).encode()
    assert [one["status"] for one in told] == ["failed", "failed"]
    codes = [one["error"]["code"] for one in told]
    assert codes == ["X" if what == "shown" else "Unreadable", "X"]
    assert queue.delete(ids[0]) and queue.by_status()["failed"] == 1
    queue.close()


def test_a_folder_that_was_moved_keeps_its_clips_and_its_jobs(tmp_path: Path) -> None:
    """Such as to a larger disk; or the same one named from where the next shell happens to be."""
    before, now = tmp_path / "before", tmp_path / "now"
    queue, id = Queue(before / "queue.sqlite3"), new_id()
    old = before / "jobs" / id
    values = {"prompt": "x", "image": str(old / "input.png"), "seed": 1}
    control = {"video": str(old / "input.mp4"), "strength": 1.0}
    made = BatchJob(
        number=0, model=tmp_path / "m", output=old / "clip.mp4", values=values, control=control
    )
    queue.add(id, made, {})
    queue.close()
    before.rename(now)
    queue = Queue(now / "queue.sqlite3")
    new = now / "jobs" / id
    moved, row = queue.take(""), queue.get(id)
    assert moved is not None and row is not None
    assert moved.output == row.output == new / "clip.mp4"
    assert moved.values == {"prompt": "x", "image": str(new / "input.png"), "seed": 1}
    assert moved.control == {"video": str(new / "input.mp4"), "strength": 1.0}
    queue.close()


def test_a_queue_named_from_where_one_is_has_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a machine of a cluster is elsewhere
    queue = Queue(Path("videos", "queue.sqlite3"))
    assert queue.folder_of("x") == tmp_path / "videos" / "jobs" / "x"
    queue.close()


@pytest.mark.parametrize("state", ["queued", "in_progress", "completed"])
def test_nobody_waits_for_the_files_of_a_job_that_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    queue = Queue(tmp_path / "queue.sqlite3")
    ids = [new_id() for _ in range(2)]
    for id in ids:
        queue.add(id, job(tmp_path), {})
    taken = None if state == "queued" else queue.take("")
    if taken is not None and state == "completed":
        queue.settle(taken, Outcome(size=1))
    begun, let_go = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> None:
        begun.set()
        let_go.wait(60)

    monkeypatch.setattr("wan_core.serve.queue.shutil.rmtree", slow)

    def remove() -> None:
        assert queue.delete(ids[0])
        if taken is not None and state == "in_progress":
            queue.settle(taken, Outcome(error="stopped", stopped=True))

    removing = threading.Thread(target=remove)
    removing.start()
    assert begun.wait(60)
    seen: list[Any] = []
    asking = threading.Thread(
        target=lambda: seen.extend((queue.get(ids[0]), queue.get(ids[1]), queue.waiting()))
    )
    asking.start()
    asking.join(30)
    waited = asking.is_alive()
    let_go.set()
    removing.join()
    assert not waited and seen[0] is None and seen[1] is not None and seen[2] == 1
    assert not queue.delete(ids[0])
    queue.close()


def killed(path: Path, percents: Sequence[int] = (), orderly: bool = False) -> str:
    """Take the next job, note how far it gets, and leave the file as a kill does; its state."""
    queue = Queue(path)
    taken = queue.take("")
    if taken is not None:
        for percent in percents:
            queue.progress(taken.number, percent)
    if orderly:
        queue.end()
    status = queue.list(1)[0].status
    queue.close()
    return status


@pytest.mark.parametrize("old", [False, True])
def test_a_job_that_kills_its_server_fails_at_the_third_death(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "queue.sqlite3"
    queue = Queue(path)
    id = new_id()
    queue.add(id, job(tmp_path), {})
    if old:  # as the first version of this file was
        for name in ("restarts", "reached"):
            queue._file.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
    queue.close()
    # An orderly end is no death; that it gets as far each time is no way out.
    assert [killed(path, (95, 98), orderly=i == 1) for i in range(4)] == ["in_progress"] * 4
    queue = Queue(path)
    row = queue.get(id)
    assert row is not None and row.status == "failed" and row.ended is not None
    assert "died 3 times" in row.outcome["error"] and queue.take("") is None
    queue.close()
    # It stays so, and the server goes on with others.
    assert killed(path) == "failed"


def test_a_job_that_gets_further_is_not_why_its_server_dies(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    queue = Queue(path)
    queue.add(new_id(), job(tmp_path), {})
    queue.close()
    for i in range(8):
        assert killed(path, (10 * i + 5, 10 * i + 9)) == "in_progress"


def test_a_server_that_is_killed_while_a_job_begins_does_not_blame_it_later(tmp_path: Path) -> None:
    """Twice before the first step was made, and then in the middle of the render."""
    path = tmp_path / "queue.sqlite3"
    queue = Queue(path)
    queue.add(new_id(), job(tmp_path), {})
    queue.close()
    for percents in ((), (), (31,), (32, 40)):
        assert killed(path, percents) == "in_progress"
    # But one that gets nowhere each time is the cause.
    assert [killed(path) for _ in range(2)] == ["in_progress", "failed"]


@pytest.mark.parametrize(("wrong", "kind", "why"), [
    ({"at_once": "many"}, InvalidRequest, "at_once is 'many'"),
    ({"cluster": "nowhere:1"}, WorkerFailed, "nobody there"),
])  # fmt: skip
def test_a_wrong_crew_is_told_before_anybody_is_listened_to(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any, kind: Any, why: str
) -> None:
    def connect(_: str) -> Any:
        raise WorkerFailed("nobody there")

    listened: list[Any] = []
    monkeypatch.setattr("wan_core.serve.cluster._connect", connect)
    monkeypatch.setattr("wan_core.serve.server._listen", lambda *at: listened.append(at))
    with pytest.raises(kind, match=why):
        serve(ServerOptions(model=model, folder=tmp_path / "videos", **wrong))
    assert not listened and not (tmp_path / "videos").exists()


def test_200_clients_at_once(model: Path, tmp_path: Path) -> None:
    """Each asks for one video and looks it up: all are accepted, each under its own id."""
    with serving(model, tmp_path, crew=Idle()) as (client, desk):
        found: list[str] = []
        errors: list[Any] = []
        begin = threading.Barrier(200)

        def ask(number: int) -> None:
            begin.wait()
            try:
                status, video = client.create(prompt=f"number {number}", **TINY)
                assert status == 200, video
                assert (
                    client.ask("GET", f"/v1/videos/{video['id']}")[1]["prompt"]
                    == f"number {number}"
                )
                found.append(video["id"])
            except Exception as err:  # noqa: BLE001 - shown by the main thread
                errors.append(err)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[:3]
        assert len(set(found)) == 200 and sum(desk.queue.by_status().values()) == 200


def test_json_is_taken_too(idle: tuple[Client, Any]) -> None:
    client, desk = idle
    body = json.dumps({"prompt": "x", **TINY, "fps": 8, "seconds": None,
                       "extra_params": {"scheduler": "euler"}})  # fmt: skip
    status, video = client.ask("POST", "/v1/videos", body, {"Content-Type": "application/json"})
    assert status == 200 and video["seconds"] == "0.625", video
    row = desk.queue.get(video["id"])
    assert row is not None and row.output == desk.queue.folder_of(video["id"]) / "clip.mp4"
    client.ask("DELETE", f"/v1/videos/{video['id']}")


def test_json_that_could_not_be_told_again_is_refused(idle: tuple[Client, Any]) -> None:
    """Half a character, in a name or in a value that is only told again, and a name given twice."""
    client, desk = idle
    before = len(desk.queue.list(100))
    head = {"Content-Type": "application/json"}
    for odd in ({"user": "a \ud83d b"}, {"us\ud83der": "x"}, {"extra_params": {"\udc00": 1}}):
        body = json.dumps({"prompt": "x", **TINY} | odd)
        status, told = client.ask("POST", "/v1/videos", body, head)
        assert status == 400 and "half of a character" in told["error"]["message"], told
    status, told = client.ask("POST", "/v1/videos", '{"prompt": "x", "prompt": "y"}', head)
    assert status == 400 and told["error"]["param"] == "prompt", told
    assert len(desk.queue.list(100)) == before


@pytest.mark.slow
def test_200_clients_and_restarts_lose_no_job(model: Path, tmp_path: Path) -> None:
    """Killed twice while 200 clients ask, and once in the middle of a render."""
    server = Started(model, tmp_path / "videos")
    client = Client(server.port)
    accepted: dict[str, str] = {}
    long = {**TINY, "num_inference_steps": 300}
    first = client.create(prompt="first", seed=7, **long)[1]["id"]

    def ask(number: int) -> None:
        for _ in range(600):
            try:
                status, video = client.create(prompt=f"number {number}", seed=number, **TINY)
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)  # it is down just now
                continue
            assert status == 200, video
            accepted[video["id"]] = f"number {number}"
            return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(200)]
    try:
        for thread in threads:
            thread.start()
        for least in (20, 100):
            wait_for(lambda least=least: len(accepted) >= least, 240)
            server.kill()
            server.start()
        for thread in threads:
            thread.join()
        assert len(accepted) == 200
        wait_for(lambda: client.ask("GET", f"/v1/videos/{first}")[1]["progress"] > 30, 240)
        # How often a step is saved depends on how long the disk took for the first.
        saved = saved_renders(tmp_path / "videos" / "jobs" / first / ".wanfit")[0].next_step or 0
        server.kill()
        server.start()
        for id, prompt in accepted.items():
            assert client.ask("GET", f"/v1/videos/{id}")[1]["prompt"] == prompt
        keep = list(accepted)[:5]
        for id in list(accepted)[5:]:
            assert client.ask("DELETE", f"/v1/videos/{id}")[0] == 200
        for id in (first, *keep):
            video = client.settled(id, 240)
            assert video["status"] == "completed" and video["tries"] == 1, video
        step = int(client.settled(first)["resumed"].split()[2])
        assert step >= saved >= 1, f"it began again at step {step}, and {saved} were saved"
        for id in (first, *keep):
            clip = client.ask("GET", f"/v1/videos/{id}/content")[1]
            (tmp_path / f"{id}.mp4").write_bytes(clip)
    finally:
        server.kill()
    asked: dict[str, Any] = {first: {"prompt": "first", "seed": 7, **long}}
    for id in keep:  # each under its own id
        asked[id] = {"prompt": accepted[id], "seed": int(accepted[id].split()[1]), **TINY}
    for id, values in asked.items():
        config = GenerationConfig(**values, output_path=tmp_path / "a.mp4")
        open_wan(model, precision="auto").generate(config).raise_for_error()
        assert (read(tmp_path / "a.mp4")[0] == read(tmp_path / f"{id}.mp4")[0]).all(), values
