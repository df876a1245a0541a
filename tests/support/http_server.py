"""A server under test: really listening, on a free port, with or without renders."""

from __future__ import annotations

import http.client
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wan_core.serve.crew import Crew, Here
from wan_core.serve.desk import Desk
from wan_core.serve.http import make_app
from wan_core.serve.server import ServerOptions, _listen, open_served


def here(queue: Any) -> Crew:
    """A crew that is a thread of this process."""
    return Here(queue.progress, queue.stopped)


class Client:
    """Asks a server, one connection per request."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port, self.token = port, token

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Return status and body, as JSON where it is."""
        head = dict(headers or {})
        if self.token is not None:
            head.setdefault("Authorization", f"Bearer {self.token}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, head)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(data) if kind == "application/json" else data

    def create(self, file: tuple[str, bytes] | None = None, **fields: Any) -> tuple[int, Any]:
        """Ask for a video with a form."""
        body, kind = form(fields, file)
        return self.ask("POST", "/v1/videos", body, {"Content-Type": kind})

    def settled(self, id: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until a video is completed or failed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            _, video = self.ask("GET", f"/v1/videos/{id}")
            if video["status"] in ("completed", "failed"):
                return dict(video)
            time.sleep(0.05)
        raise AssertionError(f"{id} is {video['status']} after {seconds} s")


def form(fields: Mapping[str, Any], file: tuple[str, bytes] | None = None) -> tuple[bytes, str]:
    """Return a multipart body and its content type."""
    boundary = secrets.token_hex(8)
    parts = []
    for name, value in fields.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(f"{head}{value}\r\n".encode())
    if file is not None:
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="input_reference"; '
            f'filename="{file[0]}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        parts.append(head.encode() + file[1] + b"\r\n")
    return b"".join(
        (*parts, f"--{boundary}--\r\n".encode())
    ), f"multipart/form-data; boundary={boundary}"


@contextmanager
def serving(
    model: Path, folder: Path, *, token: str | None = None,
    crew: Callable[[Any], Crew] = here, **more: Any,
) -> Iterator[tuple[Client, Desk]]:  # fmt: skip
    """Run a server in a thread while the block lasts."""
    import uvicorn

    options = ServerOptions(
        model=model, folder=folder, optimization={"device": "cpu", "precision": "fp32"},
        lora_folder=more.pop("lora_folder", None),
    )  # fmt: skip
    desk = Desk(open_served(options), folder, crew, **more)
    listening = _listen("127.0.0.1", 0)
    config = uvicorn.Config(
        make_app(desk, token), log_level="warning", access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    desk.start()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Client(listening.getsockname()[1], token), desk
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        desk.stop()
        desk.queue.close()
