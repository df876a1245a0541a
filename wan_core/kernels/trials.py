"""Trials on a device, each made once per process; where memory was short, a few times more.

A kernel is tried before it is used, and a failed trial means that the plain code stays for the life
of the process. Lack of memory is another thing: it says nothing of the kernel, and may be over when
the next render begins. Such a trial is made again then, at most ``TRIES`` times in all, and what
was left untried is said in the render's warnings. Until then the choice stays as it is.

Processes that compute a clip together choose alike (``chosen_together``): a clock has no two equal
answers, and what rounds otherwise on another card gives other bits by who computed what.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from ..errors import first_line, is_oom

_log = logging.getLogger(__name__)
TRIES = 3
"""Renders in which a trial that lacks memory is made."""


class Council(Protocol):
    """Processes that compute one clip together; all ask it the same questions in one order."""

    def choose(
        self, what: str, choose: Callable[[], str], able: Callable[[str], bool], plain: str
    ) -> str:
        """Return what one of them chooses; ``plain`` where not all who ask are ``able`` to."""

    def all_can(self, what: str, can: Callable[[], bool]) -> bool:
        """Return whether all who ask at this moment can do something."""


_council: ContextVar[Council | None] = ContextVar("council", default=None)


@contextmanager
def choosing_with(council: Council) -> Iterator[None]:
    """Have this thread choose together with others inside the ``with`` block."""
    token = _council.set(council)
    try:
        yield
    finally:
        _council.reset(token)


def chosen_together(
    what: str, choose: Callable[[], str], able: Callable[[str], bool], plain: str
) -> str:
    """Return a choice between ways that may round differently, ``plain`` the one all can take.

    ``what`` names it, equal in all processes; who asks differs in nothing but its card and clock.
    ``choose`` makes it here, ``able`` says whether one that another made gives right results here.
    """
    council = _council.get()
    return choose() if council is None else council.choose(what, choose, able, plain)


def all_can(what: str, can: Callable[[], bool]) -> bool:
    """Return whether all who compute this together can do it; see ``chosen_together``."""
    council = _council.get()
    return can() if council is None else council.all_can(what, can)


class _Renders:
    """How many renders have begun in this process, and what was said in which of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.begun = 0
        self.said: dict[str, int] = {}


_renders = _Renders()


def begin_trials() -> None:
    """Let trials that lacked memory be made again: a render begins, or weights come to a device."""
    with _renders.lock:
        _renders.begun += 1


@contextmanager
def trials_of_a_render(warnings: list[str]) -> Iterator[None]:
    """Do ``begin_trials``, and add to ``warnings`` what lacked memory inside the ``with`` block."""
    begin_trials()
    begun = _renders.begun
    try:
        yield
    finally:
        with _renders.lock:
            now = [text for text, render in _renders.said.items() if render >= begun]
        warnings += [text for text in now if text not in warnings]


class Trials:
    """The results of trials of one kind, by what was tried."""

    def __init__(self, what: str) -> None:
        """``what`` is tried, in words that go on after "try"."""
        self._what = what
        self._lock = threading.Lock()
        self._found: dict[Hashable, bool] = {}
        self._short: dict[Hashable, list[int]] = {}
        """The renders in which each trial lacked memory."""

    def of(self, key: Hashable, attempt: Callable[[], bool]) -> bool:
        """Return what ``attempt`` found for ``key``, now or before; False where it failed."""
        with self._lock:
            if key in self._found:
                return self._found[key]
            short = self._short.setdefault(key, [])
            if short and short[-1] == _renders.begun:
                return False
            try:
                self._found[key] = attempt()
            except Exception as err:  # noqa: BLE001 - it needs a C compiler, a known card, ...
                # The error itself is not kept: what its frames hold is freed at once.
                lacked, why = is_oom(err), first_line(err)
            else:
                return self._found[key]
            if lacked:
                short.append(_renders.begun)
                self._say(len(short))
            else:
                _log.info("Could not try %s: %s", self._what, why)
            if not lacked or len(short) == TRIES:
                self._found[key] = False
            return False

    def _say(self, times: int) -> None:
        then = "The next render tries again."
        if times == TRIES:
            then = (
                f"After {TRIES} renders without it is left out until the program is started anew."
            )
        text = f"There was too little memory to try {self._what}; the plain way was taken. {then}"
        _log.warning(text)
        with _renders.lock:
            _renders.said[text] = _renders.begun
