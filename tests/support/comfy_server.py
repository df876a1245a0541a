"""Starts a real ComfyUI from a checkout, with this pack and a probe pack, in a temporary folder.

The checkout is looked for at COMFYUI_PATH, then at comfy-cli's default place (~/comfy/ComfyUI);
its Python at COMFYUI_PYTHON, then in a virtual environment in or beside the checkout. Nothing in
the checkout is written: models, outputs and custom nodes live below ``--base-directory``.
COMFYUI_FRONTEND may name the ``static`` folder of another comfyui-frontend-package for the page.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
DEAD_WORKER = re.compile(r"Exception in thread [^\n]*prompt_worker")
"""What Python prints when the thread that runs prompts ends: nothing is ever run after it."""
FOLDERS = ("models", "custom_nodes", "input", "output", "temp", "user")


def find_checkout() -> Path | str:
    """Return the ComfyUI checkout, or a sentence that says what is missing."""
    named = os.environ.get("COMFYUI_PATH")
    place = Path(named) if named else Path.home() / "comfy" / "ComfyUI"
    if (place / "main.py").is_file():
        return place
    return f"no ComfyUI checkout at {place} (set COMFYUI_PATH to one)"


def told_by_comfyui(
    script: str, given: object, files: Path, checkout: Path | str, python: Path | str
) -> dict[str, Tensor]:
    """Run a script of this folder with a ComfyUI's modules; return the tensors that it leaves.

    It is told ``given`` as JSON. Jobs and results lie in ``files``.
    """
    jobs, out = files / "jobs.json", files / "out.safetensors"
    jobs.write_text(json.dumps(given))
    done = subprocess.run(
        [str(python), str(REPOSITORY / "tests" / "support" / script), str(jobs), str(out)],
        cwd=checkout, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(out)


def find_checkouts() -> dict[str, Path]:
    """Return the checkout by its name, with those beside it that are called ComfyUI-something."""
    first = find_checkout()
    if isinstance(first, str):
        return {}
    beside = first.parent.glob("ComfyUI-*")
    found = [first, *sorted(place for place in beside if place != first)]
    return {place.name: place for place in found if (place / "main.py").is_file()}


def checkout_with(file: str) -> Path | str:
    """Return the newest checkout that has a file, or a sentence that says that there is none."""
    found = [place for place in find_checkouts().values() if (place / file).is_file()]
    return found[-1] if found else f"no ComfyUI checkout with {file} (set COMFYUI_PATH to one)"


def find_python(checkout: Path) -> Path | str:
    """Return the Python that runs ``checkout``, or a sentence that says what is missing."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return Path(named)
    for folder in (checkout / ".venv", checkout / "venv", checkout.parent / "venv"):
        for name in ("bin/python", "Scripts/python.exe"):
            if (folder / name).is_file():
                return folder / name
    return f"no virtual environment in or beside {checkout} (set COMFYUI_PYTHON)"


class ComfyServer:
    """One running ComfyUI, in CPU mode unless told otherwise; use as a context manager."""

    def __init__(
        self, base: Path, checkout: Path, python: Path, *options: str, cpu: bool = True
    ) -> None:
        self.base, self.checkout, self.python = base, checkout, python
        self.options = (*(("--cpu",) if cpu else ()), *options)
        if front_end := os.environ.get("COMFYUI_FRONTEND"):
            self.options += ("--front-end-root", front_end)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "comfyui.log"
        for name in FOLDERS:
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "wanfit").symlink_to(REPOSITORY, target_is_directory=True)
        probe_pack = REPOSITORY / "tests" / "support" / "comfy_probe"
        (base / "custom_nodes" / "probe").symlink_to(probe_pack, target_is_directory=True)
        # As from ComfyUI's second start on: byte code lies there, also where none may be written.
        for package in ("nodes", "wan_core"):
            compileall.compile_dir(REPOSITORY / package, quiet=1)

    def __enter__(self) -> ComfyServer:
        self.start()
        try:
            self.await_start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Start the process and end it afterwards: its user does other things until it answers."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def start(self) -> None:
        """Start the process; ``await_start`` waits until it answers."""
        command = [str(self.python), "main.py", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-api-nodes", *self.options]
        command += ["--database-url", "sqlite:///:memory:"]
        # One thread: more would spin on the cores that other tests run on.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._log = self.log_path.open("w")
        self._log_seen = 0
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            command, cwd=self.checkout, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )

    def await_start(self, seconds: float = 120) -> None:
        """Wait until ComfyUI answers."""
        self.wait_until(self._answers, seconds, pause=0.1)
        self.start_seconds = time.monotonic() - self._began

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended at once:\n{self.log()[-3000:]}")
        try:
            self.get("/system_stats")
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End ComfyUI as the system does when memory is short: nothing can be tidied up."""
        self._process.kill()
        assert self._process.wait(30) == -signal.SIGKILL
        self._log.close()

    def stop(self) -> None:
        """End ComfyUI; does nothing when it has ended."""
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def log(self) -> str:
        """Return what ComfyUI has printed so far."""
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> Any:
        """GET a JSON answer."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any = None) -> Any:
        """POST JSON; the answer is JSON or None; an error status gives {"status", "error"}."""
        data = json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            return {"status": error.code, **self._refusal(path, error.code, error.read())}
        return json.loads(text) if text.strip() else None

    def _refusal(self, path: str, status: int, text: bytes) -> dict[str, Any]:
        """Return the JSON of a refusal; fail on one that is not JSON, and show why."""
        try:
            return dict(json.loads(text or b"{}"))
        except ValueError:
            body = text.decode(errors="replace")[:1000]
        raise RuntimeError(
            f"POST {path} was answered with {status}: {body}\nComfyUI's log:\n{self.log()[-3000:]}"
        )

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format prompt and return its id; fails on a refused prompt."""
        answer = self.post("/prompt", {"prompt": prompt})
        assert "prompt_id" in answer, json.dumps(answer, indent=1)[:4000]
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, seconds: float = 240) -> dict[str, Any]:
        """Return the history entry of a prompt once it has ended, well or not."""
        return dict(
            self.wait_until(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), seconds)
        )

    def wait_until(
        self, condition: Callable[[], Any], seconds: float = 60, pause: float = 0.02
    ) -> Any:
        """Ask until the answer is true, and return it.

        Raises at once where waiting is in vain: ComfyUI has ended, or its prompt worker has.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if answer := condition():
                return answer
            self._look_alive()
            time.sleep(pause)
        raise TimeoutError(f"waited {seconds} s in vain; ComfyUI's log:\n{self.log()[-3000:]}")

    def _look_alive(self) -> None:
        ended = self._process.poll()
        if ended is not None:
            raise RuntimeError(f"ComfyUI ended with {ended}; its log:\n{self.log()[-3000:]}")
        size = self.log_path.stat().st_size
        if size == self._log_seen:
            return
        log, self._log_seen = self.log(), size
        if found := DEAD_WORKER.search(log):
            raise RuntimeError(
                f"ComfyUI's prompt worker has ended:\n{log[found.start() : found.start() + 6000]}"
            )

    def run(self, prompt: dict[str, Any], seconds: float = 240) -> dict[str, Any]:
        """Run a prompt that must succeed and return its outputs by node id."""
        entry = self.wait(self.queue(prompt), seconds)
        assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[:6000]
        return dict(entry["outputs"])

    def state(self) -> dict[str, Any]:
        """Return what the probe pack sees inside ComfyUI."""
        return dict(self.get("/wanfit_probe/state"))

    def free(self, what: str = "free_memory") -> None:
        """POST /free and wait until the weights are gone (done between prompts).

        "free_memory" unloads models too. Both flags at once can lose the second one: the worker
        may wake between them and then sleeps until the next prompt. One that is just about to sleep
        does not hear of the flag at all, so it is told again.
        """
        for _ in range(12):
            self.post("/free", {what: True})
            with contextlib.suppress(TimeoutError):
                self.wait_until(self._freed, 5)
                return
        self.wait_until(self._freed, 5)

    def _freed(self) -> bool:
        # ComfyUI's worker takes the flags, then frees, then takes the next prompt. Without
        # weights the flags alone tell that the next prompt comes after this.
        state = self.state()
        return not state["flags"] and not state["weight_bytes"]

    def import_seconds(self, pack: str) -> float | None:
        """Return what ComfyUI's log says the import of a pack took."""
        found = re.search(rf"([\d.]+) seconds( \(IMPORT FAILED\))?: \S*/{pack}\n", self.log())
        if found is None or found[2]:
            return None
        return float(found[1])
