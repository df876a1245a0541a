"""One worker's process, from the driver's side: started anew, never forked, and ended for certain.

It runs this package with this interpreter and nothing else. The environment shows it one card.
Threads write to it and read from it, so that a worker that hangs never holds up the driver. What it
prints on its stderr goes to the driver's; the end of it is kept, to tell what it died of.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ..config import child_environment
from ..errors import tells_host_oom, tells_oom
from .messages import Message, read_message, write_message

_ROOT = Path(__file__).resolve().parents[2]
# By path, not by the package's name: inside ComfyUI that is the pack's.
_START = "import sys; sys.path.insert(0, sys.argv[1]); from wan_core.workers import child; "
_START += "child.main()"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_USUALLY = {"NCCL_NVLS_ENABLE": "0", "TORCH_NCCL_HIGH_PRIORITY": "1"}
"""Unless said otherwise: no multicast of NVLink. What gangs exchange is sent from one to one, and
NCCL would hold memory of every card for it. Exchanges that run beside products are begun before the
rest of them."""
_BEFORE_2_8 = {"TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}
"""What is sent may be used again when it was waited for: torch before 2.8 would else hold it until
the card, which is blocks behind, has sent it. Later ones do so by themselves, and warn of this."""
_END_SECONDS = 5.0
_MOST_WORDS, _MOST_SHOWN, _WORDS_SECONDS = 8192, 300, 1.0
"""Bytes of a worker's last words that are kept, characters that are shown, and how long they are
waited for."""
_CRASHES = ("SIGSEGV", "SIGILL", "SIGFPE", "SIGBUS", "SIGABRT")
_FAULTS = ("illegal memory access", "device-side assert", "illegal instruction",
           "misaligned address", "unspecified launch failure")  # fmt: skip
"""What CUDA says of a kernel that went wrong; no other kernel can run in that process then."""


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended: its exit code, and the last of what it printed on its stderr."""

    code: int | None = None
    """Below 0: the number of a signal. None where that is not known."""
    words: str = ""

    @property
    def out_of_memory(self) -> bool:
        """Whether its last words say that memory ran out."""
        return tells_oom(self.words)

    @property
    def out_of_ram(self) -> bool:
        """Whether that memory was the computer's own."""
        return self.out_of_memory and tells_host_oom(self.words)

    @property
    def crashed(self) -> bool:
        """Whether code went wrong in it that would take any process along."""
        if any(fault in self.words for fault in _FAULTS):
            return True
        if self.code is None:
            return False
        if self.code < 0:
            return _signal_name(self.code) in _CRASHES
        return self.code >= 0xC0000000  # Windows' exceptions

    def __str__(self) -> str:
        """Return it in words; empty where nothing is known."""
        how = "" if self.code is None else f"exit code {self.code}"
        if self.code is not None and self.code < 0:
            how = f"ended by {_signal_name(self.code)}"
        return ": ".join(filter(None, (how, _error_in(self.words))))


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _error_in(words: str) -> str:
    """Return the line that names an error, the last of them; else the last line."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [""])[-1][:_MOST_SHOWN]


class WorkerProcess:
    """A process that computes on one device. ``told`` is called with each of its messages.

    ``told`` is called from another thread, with (this process, message), and with None for the
    message when the process has ended or says what cannot be understood.
    """

    def __init__(
        self, device: str, told: Callable[[WorkerProcess, Message | None], object]
    ) -> None:
        self.device = device
        self._told = told
        self._outbox: queue.Queue[tuple[Mapping[str, Any], Mapping[str, Tensor]] | None] = (
            queue.Queue()
        )
        own = device if device == "cpu" else "cuda:0"
        threads = str(torch.get_num_threads())
        arguments = [sys.executable, "-P", "-c", _START, str(_ROOT), own, threads]
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(device, os.environ),
            cwd=_ROOT,  # the driver's folder may be gone, and libraries then do not load
        )
        self._words = b""
        self._heard = threading.Thread(target=self._pass_on, name=f"wanfit-{device}", daemon=True)
        self._heard.start()
        for work in (self._write, self._read):
            threading.Thread(target=work, name=f"wanfit-{device}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Return the number of the process."""
        return self._process.pid

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Send a message; never waits."""
        self._outbox.put((header, tensors or {}))

    def _write(self) -> None:
        stream = cast(BinaryIO, self._process.stdin)
        # A broken pipe: the process has ended, which the reading thread tells.
        with contextlib.suppress(OSError, ValueError):
            while (message := self._outbox.get()) is not None:
                write_message(stream, *message)
            stream.close()

    def _read(self) -> None:
        stream = cast(BinaryIO, self._process.stdout)
        message: Message | None = None
        while True:
            try:
                message = read_message(stream)
            except Exception:  # noqa: BLE001 - whatever it says, it is not one of ours any more
                message = None
            self._told(self, message)
            if message is None:
                return

    def _pass_on(self) -> None:
        """Hand on what the process prints, and keep the end of it."""
        stream = cast(BufferedReader, self._process.stderr)
        with contextlib.suppress(OSError, ValueError):
            while data := stream.read1(65536):
                self._words = (self._words + data)[-_MOST_WORDS:]
                with contextlib.suppress(OSError):  # a program without a stderr
                    while data:
                        data = data[os.write(2, data) :]

    def end(self) -> End:
        """Return how the process, which has ended or is about to, did so; waits a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_WORDS_SECONDS)
        self._heard.join(_WORDS_SECONDS)
        return End(self._process.poll(), self._words.decode("utf-8", "replace"))

    def kill(self) -> None:
        """End the process at once and wait until it is gone."""
        self._outbox.put(None)
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)

    def stop(self) -> None:
        """Ask the process to end; kill it where it does not within seconds."""
        self.send({"type": "stop"})
        self._outbox.put(None)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


def environment(device: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker: the driver's, with one card in sight.

    ``device`` is the driver's name of it, counted among the cards that the driver sees. Raises
    OSError where the variable that says which these are has been changed, and does not name it.
    """
    given = child_environment(given)
    # What the processes of a gang listen on is not to be reached from elsewhere.
    if sys.platform == "linux":
        old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8)
        given = {**_USUALLY, **(_BEFORE_2_8 if old else {}), **given, **_LOOPBACK}
    if device == "cpu":
        return dict(given)
    index = int(device.partition(":")[2] or 0)
    names = ("HIP_VISIBLE_DEVICES", _VISIBLE) if torch.version.hip is not None else (_VISIBLE,)
    # Where two are set, the first limits what the second counts.
    name = next((one for one in names if given.get(one)), names[-1])
    seen = given.get(name, "")
    cards = seen.split(",") if seen else [str(n) for n in range(index + 1)]
    if index >= len(cards):
        raise OSError(f"{name} is {seen!r}, without a card {index}: torch was started with another")
    return {**given, name: cards[index].strip()}
