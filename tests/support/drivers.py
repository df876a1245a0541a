"""A program of its own that makes a clip on workers: what tests kill, and look at what is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from support.tiny_models import open_wan
from wan_core import GenerationConfig
from wan_core.journal import resume
from wan_core.workers import gang, worker_pool
path, journal, together, units_kept = Path(sys.argv[3]), *sys.argv[4:]
if int(units_kept):
    resume.MAX_SHARE = float("inf")  # small units are not worth the time otherwise
begins = gang.Gang.begins
def counted(*given, **more):
    print("unit", flush=True)
    begins(*given, **more)
gang.Gang.begins = counted
pool = worker_pool(("cpu", "cpu"), int(together))
while not all(one.idle for one in pool._gangs):
    pool._pump(0.05)
print(*pool.pids, flush=True)
told = lambda step, *_: print("step", step, flush=True)
open_wan(path, devices=2).generate(GenerationConfig(
    **JOB, resume="auto", journal_folder=journal, progress_callback=told)).raise_for_error()
"""


class Driver:
    """A program that makes a clip on two workers, and a journal of it; they are ready.

    ``said`` are the lines that were read: "unit" where one is given to a worker, "step 2" after
    a step. ``pids`` are the workers' processes.
    """

    def __init__(
        self, path: Path, job: dict[str, Any], journal: Path, *, together: int = 1,
        units_kept: bool = False,
    ) -> None:  # fmt: skip
        places = [str(ROOT), str(ROOT / "tests"), str(path), str(journal)]
        numbers = [str(together), str(int(units_kept))]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.replace("JOB", repr(job)), *places, *numbers],
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        self.said: list[str] = []
        self.pids = [int(word) for word in self._line().split()]
        assert len(self.pids) == 2, self.pids

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def hear(self, wanted: str) -> bool:
        """Read on until a line is said; False where the program has ended before."""
        while line := self._line():
            self.said.append(line)
            if line == wanted:
                return True
        return False

    def kill(self) -> None:
        """End it as the system does; hear what it had said, and see its workers end too."""
        self._process.kill()
        assert self._process.stdout is not None
        self.said += self._process.stdout.read().splitlines()
        self._process.wait()
        await_end(self.pids)


def await_end(pids: Iterable[int], seconds: float = 60.0) -> None:
    """Wait until none of some processes is alive."""
    until, left = time.monotonic() + seconds, set(pids)
    while left := {pid for pid in left if alive(pid)}:
        assert time.monotonic() < until, f"still alive after {seconds} s: {left}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process is there and not just waiting to be buried."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
