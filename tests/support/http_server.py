"""A server under test: really listening, on a free port, with or without renders."""

from __future__ import annotations

import http.client
import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wan_core.serve.carry import Outcome
from wan_core.serve.crew import Crew, Hand, Here
from wan_core.serve.desk import Desk
from wan_core.serve.http import make_app
from wan_core.serve.jobs import BatchJob
from wan_core.serve.server import ServerOptions, _listen, listening_as, open_served


class Idle:
    """A crew that takes a job and keeps it, until it is told how the job ended."""

    def __init__(self) -> None:
        self.hand = Hand("idle")
        self.ends: list[Outcome] = []
        self.taken: list[int] = []

    def __call__(self, queue: Any) -> Idle:
        self.queue = queue
        return self

    def free(self, waiting: int) -> Sequence[Hand]:
        return () if self.hand.job is not None else (self.hand,)

    def begin(self, hand: Hand, job: BatchJob) -> None:
        hand.job = job
        self.taken.append(job.number)

    def wait(self, seconds: float) -> list[tuple[BatchJob, Outcome]]:
        job = self.hand.job
        assert job is not None
        if self.queue.stopped(job.number):
            self.ends.append(Outcome(error="stopped", kind="Stopped", stopped=True))
        if not self.ends:
            time.sleep(0.01)
            return []
        self.hand.job = None
        return [(job, self.ends.pop(0))]

    def close(self) -> None:
        self.hand.job = None


def wait_for(true: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def here(queue: Any) -> Crew:
    """A crew that is a thread of this process."""
    return Here(queue.progress, queue.stopped)


class Client:
    """Asks a server, one connection per request."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port, self.token = port, token
        self.told: dict[str, str] = {}

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Return status and body, as JSON where it is; ``told`` has the answer's headers."""
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
        self.told = dict(answer.headers)
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


class Started:
    """A server as a user starts it, in its own process, that can be killed and started again."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.command = [
            sys.executable, "-m", "wan_core", "serve", str(model), "--folder", str(folder),
            "--device", "cpu",
        ]  # fmt: skip
        self.port = 0
        self.start()

    def start(self) -> None:
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [*self.command, "--port", str(self.port)], cwd=root, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("http://"):
                self.port = int(line.split("/")[2].rpartition(":")[2])
                break
        # What it says later must not fill the pipe.
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


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
    server = uvicorn.Server(uvicorn.Config(make_app(desk, token), **listening_as()))
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
