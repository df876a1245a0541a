"""Brings the next component near while the present one computes, in a thread.

What is done ahead is never waited for by those who compute, changes no number, and is given up as
soon as the render is stopped. What went wrong in it goes wrong again, and is told, when the
component's turn comes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files import open_regular

_WAIT_SECONDS = 0.05
_PIECE = 2**25
"""Bytes that the system is asked to read at once."""


class NotWanted(BaseException):
    """Ends what is done ahead: the render was stopped, or does it by itself by now."""


class Ahead:
    """What the two threads know of each other."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """How long the component was read, when it has been."""
        self._began = time.perf_counter()
        self._amount = (0, 0)
        self._read = threading.Event()
        self._stop = threading.Event()

    def check(self) -> None:
        """Raise NotWanted where the work is to end; called for every piece of it."""
        if self._stop.is_set():
            raise NotWanted

    def progress(self, done: int, total: int) -> None:
        """Take note of how much has been read."""
        self._amount = (done, total)

    def has_read(self) -> None:
        """Say that the component is there; what comes after it need not be waited for."""
        self.seconds = time.perf_counter() - self._began
        self._read.set()

    def wait(self) -> None:
        """Wait until the work is to end."""
        self._stop.wait()

    def _finish(self, tell: Callable[[int, int], object]) -> None:
        """Wait for a component that is half read: to begin anew would take longer."""
        told = False
        while not self._read.wait(_WAIT_SECONDS):
            tell(*self._amount)
            told = True
        if told:
            tell(*self._amount)


@contextmanager
def do_ahead(
    work: Callable[[Ahead], object], tell: Callable[[int, int], object]
) -> Iterator[Ahead]:
    """Do ``work`` in a thread during the ``with`` block.

    At the end of the block the component is waited for if it is being read, with ``tell`` called
    several times a second; everything else that ``work`` does is ended by ``Ahead.check``. An error
    in the block, or in ``tell``, ends the reading too.
    """
    ahead = Ahead()

    def run() -> None:
        with suppress(Exception, NotWanted):
            work(ahead)
        ahead._read.set()

    thread = threading.Thread(target=run, name="wanfit-ahead", daemon=True)
    thread.start()
    try:
        yield ahead
        ahead._finish(tell)
    finally:
        ahead._stop.set()
        thread.join()


@contextmanager
def files_ahead(files: Iterable[Path]) -> Iterator[None]:
    """Have the system read files into its cache during the ``with`` block, one after the other.

    It takes no memory that others could not have, and is ended, not waited for, by the block's end.
    Where a system cannot be asked for it (Windows, macOS) nothing is done.
    """
    ask: Any = getattr(os, "posix_fadvise", None)

    def work(ahead: Ahead) -> None:
        ahead.has_read()  # nobody need wait
        for path in files:
            with open_regular(path) as (file, size):
                for start in range(0, size, _PIECE):
                    ahead.check()
                    ask(file.fileno(), start, _PIECE, os.POSIX_FADV_WILLNEED)

    if ask is None:
        yield
        return
    with do_ahead(work, lambda *_: None):
        yield
