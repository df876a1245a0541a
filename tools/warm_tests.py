"""Runs tests in forks of a process that has imported the large libraries already.

``python tools/warm_tests.py torch diffusers`` imports these, and reads a line for each run from its
input, a list in JSON: the repository to run in, the seconds it may take, and pytest's arguments. It
answers with a line, the exit code (None: it ran out of time) and the output. Each run is a process
of its own that has imported nothing of the repository, so the repository may change between two
runs. Importing torch and diffusers takes longer than most tests, and is done once. POSIX only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module


def run(place: str, seconds: float, arguments: Sequence[str]) -> tuple[int | None, str]:
    """Run pytest in a fork within ``place``; return its exit code and what it printed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = os.fork()
        if child == 0:
            _be_pytest(place, arguments, output.fileno())
        code = _wait(child, seconds)
        output.seek(0)
        return code, output.read()


def _be_pytest(place: str, arguments: Sequence[str], output: int) -> None:
    """Become a run of pytest; does not return."""
    code = 70
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(place)
        sys.path.insert(0, place)
        code = int(import_module("pytest").main(list(arguments)))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _wait(child: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    """Import the libraries that the arguments name, then answer each line of the input."""
    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        place, seconds, arguments = json.loads(line)
        print(json.dumps(run(place, seconds, arguments)), flush=True)


if __name__ == "__main__":
    main()
