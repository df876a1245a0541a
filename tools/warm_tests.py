"""Runs tests in forks of a process that has imported the large libraries already.

``python tools/warm_tests.py torch diffusers`` imports these, and reads a line for each run from its
input, a list in JSON: the repository to run in, the seconds it may take, and pytest's arguments. It
answers with a line: the exit code (None: it ran out of time), the output, and which tests failed.
Libraries that are not installed are passed over. Each run is a process
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
from contextlib import suppress
from importlib import import_module
from typing import Any


class Failures:
    """A plugin of pytest that writes the name of each test, or file, that fails to a file."""

    def __init__(self, file: int) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test began, ran or ended."""
        self._note(report)

    def pytest_collectreport(self, report: Any) -> None:
        """A file was read for its tests."""
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed:
            os.write(self._file, (json.dumps(report.nodeid) + "\n").encode())


def run(place: str, seconds: float, arguments: Sequence[str]) -> tuple[int | None, str, list[str]]:
    """Run pytest in a fork within ``place``; return its exit code, its output, what failed."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8") as failed,
    ):
        child = os.fork()
        if child == 0:
            _be_pytest(place, arguments, output.fileno(), failed.fileno())
        code = _wait(child, seconds)
        output.seek(0)
        failed.seek(0)
        return code, output.read(), list(dict.fromkeys(map(json.loads, failed)))


def _be_pytest(place: str, arguments: Sequence[str], output: int, failed: int) -> None:
    """Become a run of pytest; does not return."""
    code = 70
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(place)
        sys.path.insert(0, place)
        code = int(import_module("pytest").main(list(arguments), [Failures(failed)]))
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
        with suppress(ImportError):
            import_module(name)
    for line in sys.stdin:
        place, seconds, arguments = json.loads(line)
        print(json.dumps(run(place, seconds, arguments)), flush=True)


if __name__ == "__main__":
    main()
