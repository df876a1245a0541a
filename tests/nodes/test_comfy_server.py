"""The helper that starts ComfyUI for tests says at once why a test cannot go on."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.comfy_server import ComfyServer


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every POST with 500 and what aiohttp says then."""

    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"500 Internal Server Error\n\nServer got itself in trouble")

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ComfyServer]:
    """A ComfyUI that is nothing but a process that sleeps, and a log."""
    made = ComfyServer(tmp_path, tmp_path, Path(sys.executable))
    made._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    made._log = made.log_path.open("w")
    made._log_seen = 0
    yield made
    made.stop()


def write(server: ComfyServer, text: str) -> None:
    with server.log_path.open("a") as log:
        log.write(text)


def test_a_dead_prompt_worker_ends_the_wait(server: ComfyServer) -> None:
    write(server, "got prompt\nException in callback\nTypeError: a plugin's own\n")
    with pytest.raises(TimeoutError, match="got prompt"):
        server.wait_until(lambda: False, 0.1)
    write(server, "Exception in thread Thread-1 (prompt_worker):\nTraceback ...\nTypeError: gone\n")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="prompt worker has ended(.|\n)*TypeError: gone"):
        server.wait_until(lambda: False, 60)
    assert time.monotonic() - began < 30


def test_a_process_that_ended_ends_the_wait(server: ComfyServer) -> None:
    write(server, "the last words")
    server._process.kill()
    server._process.wait()
    with pytest.raises(RuntimeError, match="ended with -9; its log:\nthe last words"):
        server.wait_until(lambda: False, 30)


def test_a_refusal_that_is_not_json_is_shown_with_the_log(server: ComfyServer) -> None:
    write(server, "Traceback: IndexError in free_memory")
    refusing = http.server.HTTPServer(("127.0.0.1", server.port), Refusing)
    thread = threading.Thread(target=refusing.handle_request)
    thread.start()
    with pytest.raises(RuntimeError, match="got itself in trouble(.|\n)*IndexError in free_memory"):
        server.post("/wanfit_probe/free_memory")
    thread.join(5)
    refusing.server_close()
