"""What a server knows besides HTTP: its model, its queue, what it accepts, and how it is doing."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from ..config import GenerationConfig
from ..errors import DoesNotFit, InvalidRequest, OutputError, WanError, first_line
from ..files import make_folder
from .carry import Carrier
from .crew import Crew, carry_out
from .fields import Served, name_of, read_job
from .jobs import BatchJob
from .queue import MOST_WAITING, Queue, Row, new_id
from .uploads import MOST_BYTES, PART, Form, check_frames, look_at, remove_parts

_PAGE = Path(__file__).with_name("watch.html")


_KEPT_SECONDS, _KEPT_PART = 2.0, 20.0
"""How long the bytes of the folder are believed, and how many times the time that counting took."""
_USUAL_WAIT, _LONGEST_WAIT = 60, 3600
"""Seconds after which a client is told to ask again where no job has ended yet, and at most."""


class OutOfOrder(WanError):
    """No job is carried out just now, so none is accepted."""


class FolderFull(OutputError):
    """The folder holds as many bytes as it may."""


class Shelf:
    """How many bytes a folder holds, counted anew now and then, and how many it may hold."""

    def __init__(self, folder: Path, most: int | None) -> None:
        self.folder, self.most = folder, most
        self._lock = threading.Lock()
        self._bytes, self._until, self._took = 0, 0.0, 0.0
        self._coming = 0

    def kept(self) -> int:
        """Return the bytes of all files below the folder, as of some seconds ago at most."""
        with self._lock:
            began = time.monotonic()
            if began >= self._until:
                self._bytes = _bytes_below(self.folder)
                self._took = time.monotonic() - began
                self._until = began + max(_KEPT_SECONDS, _KEPT_PART * self._took)
            return self._bytes

    def changed(self) -> None:
        """Count again when asked next, unless counting takes long: something was taken out."""
        with self._lock:
            self._until = min(self._until, time.monotonic() + _KEPT_PART * self._took)

    def expect(self, nbytes: int) -> None:
        """Keep room for bytes of an upload that is on its way; raise FolderFull without room."""
        with self._lock:
            total = self._bytes + self._coming + nbytes
            if self.most is None or total <= self.most:
                self._coming += nbytes
                return
        raise FolderFull(self.full())

    def expected(self, nbytes: int, kept: int = 0) -> None:
        """Give back what was kept of room: so many bytes of it are in the folder for good."""
        with self._lock:
            self._coming -= nbytes
            self._bytes += kept  # until they are counted

    def has_room(self) -> bool:
        """Return whether the folder may grow."""
        return self.most is None or self.kept() < self.most

    def full(self) -> str:
        """Return what a client is told of a folder without room."""
        kept, most = (self.kept() + self._coming) / 2**20, (self.most or 0) / 2**20
        return (
            f"The server's folder holds {kept:,.0f} MiB, with the uploads on their way, and "
            f"{most:,.0f} are allowed. Fetch and delete videos that are done, or start it with a "
            "larger --folder-gb."
        )


def _bytes_below(folder: Path) -> int:
    """Return the bytes of all files below a folder; what goes meanwhile counts nothing.

    Nor do uploads that are not whole: ``Coming`` counts them.
    """
    # The folder of the jobs may be a link to another disk; links elsewhere are nobody's of ours.
    linked = [str(one) for one in folder.glob("*") if one.is_symlink() and one.is_dir()]
    total, folders = 0, [str(folder), *linked]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as found:
            for one in found:
                with contextlib.suppress(OSError):
                    if one.is_dir(follow_symlinks=False):
                        folders.append(one.path)
                    elif not one.name.endswith(PART):
                        total += one.stat(follow_symlinks=False).st_size
    return total


class Coming:
    """The room of one upload while it comes, so that many at once do not outgrow the folder.

    For ``with``: whatever ends the request, also its client's going away, gives the room back.
    """

    def __init__(self, shelf: Shelf, declared: int) -> None:
        self._shelf, self._room, self._came = shelf, declared, 0
        self.kept = 0
        """Bytes of it that stay, once its job is accepted."""

    def __enter__(self) -> Coming:
        self._shelf.expect(self._room)
        return self

    def __exit__(self, *_: object) -> None:
        self._shelf.expected(self._room, self.kept)

    async def counted(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass a body on; raise FolderFull where one that told no length outgrows the folder."""
        async for chunk in body:
            self._came += len(chunk)
            if self._came > self._room:
                self._shelf.expect(self._came - self._room)
                self._room = self._came
            yield chunk


class Desk:
    """Accepts jobs into a queue, and has a crew carry them out in a thread of its own.

    ``folder`` holds everything: the queue, uploads, journals and clips. ``crew`` makes the crew,
    given the queue. ``plan`` False leaves out whether a job fits: for a crew on other machines.
    While the folder holds ``most_kept`` bytes no job is accepted, and none begins.
    """

    def __init__(
        self, served: Served, folder: Path, crew: Callable[[Queue], Crew], *,
        most_bytes: int = MOST_BYTES, tries: int = 2, plan: bool = True,
        most_waiting: int = MOST_WAITING, most_kept: int | None = None,
    ) -> None:  # fmt: skip
        self.served, self.most_bytes, self._plan = served, most_bytes, plan
        self.shelf = Shelf(folder, most_kept)
        room = self.shelf.has_room
        self.queue = Queue(folder / "queue.sqlite3", tries, most_waiting, room)
        self.uploads = folder / "uploads"
        make_folder(self.uploads)
        remove_parts(self.uploads)
        self._carrier = Carrier()
        self._check_lock = threading.Lock()
        self._machine: Any = None
        self._crew = crew
        self._thread: threading.Thread | None = None
        self._began = time.time()
        self.refused = 0
        self._failed: str | None = None

    @property
    def failed(self) -> str | None:
        """Return why no job is carried out, now or any more; None while all is well."""
        trouble = self._failed or self.queue.trouble or self.queue.lost
        if trouble is not None:
            return trouble
        ended = self._thread is not None and not self._thread.is_alive()
        if ended and not self.queue.closed:
            return "What hands out the jobs has ended. Start the server again."
        return None

    def start(self) -> None:
        """Look at the machine while nothing runs on it, and begin with what waits."""
        if self._plan:
            self._look()
        self._thread = threading.Thread(target=self._work, name="wanfit-serve", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        """Keep what the machine has: later a render in work would count as memory not there."""
        served = self.served
        job = BatchJob(
            number=0, model=served.model, output=Path("x.mp4"), loras=served.loras,
            use_recipe=served.use_recipe, optimization=served.optimization,
        )  # fmt: skip
        config = GenerationConfig(
            prompt="", width=served.width, height=served.height, num_frames=served.num_frames
        )
        self._machine = self._carrier.open(job).foresee(config).system

    def _work(self) -> None:
        try:
            carry_out(self.queue, self._crew(self.queue), pause=0.2)
        except Exception as err:  # noqa: BLE001 - /health tells it; jobs stay in the queue
            self._failed = f"{type(err).__name__}: {first_line(err)}"

    def stop(self) -> None:
        """Give out no more jobs and end those in work, which go on when the server starts again."""
        self.queue.end()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def check_room(self) -> None:
        """Raise FolderFull where nothing more may be kept."""
        if not self.shelf.has_room():
            self.refused += 1
            raise FolderFull(self.shelf.full())

    def coming(self, declared: int) -> Coming:
        """Return what keeps room for an upload of so many bytes, 0 where it does not tell."""
        return Coming(self.shelf, declared)

    def delete(self, id: str) -> bool:
        """Take a job out, with all that belongs to it; see ``Queue.delete``."""
        found = self.queue.delete(id)
        self.shelf.changed()
        return found

    def ask_again_after(self) -> int:
        """Return after how many seconds a place in the queue may be free: what a try takes here."""
        ended = sum(self.queue.counts[name] for name in ("completed", "failed", "again"))
        each = math.ceil(self.queue.seconds / ended) if ended else _USUAL_WAIT
        return max(1, min(_LONGEST_WAIT, each))

    def accept(self, form: Form) -> Row:
        """Check a request from headers and put its job into the queue.

        Raises OutOfOrder while no job is carried out, InvalidRequest with the request's name of the
        field, DoesNotFit with what would fit, and other errors that say what is wrong.
        """
        trouble = self.failed
        if trouble is not None:
            self.refused += 1
            raise OutOfOrder(f"No job is carried out just now: {trouble}")
        id = new_id()
        folder = self.queue.folder_of(id)
        kept = False
        try:
            upload = None if form.file is None else look_at(form.file, folder / "input")
            job, told = read_job(form.fields, upload, self.served, folder / "clip.mp4")
            if upload is not None:  # before any frame is decoded
                check_frames(upload, job.values["num_frames"])
            with self._check_lock:
                self._check(job)
            row = self.queue.add(id, job, told)
            kept = True
            return row
        except InvalidRequest as err:
            raise type(err)(str(err), field=name_of(err.field, self.served)) from err
        finally:
            if not kept:
                self.refused += 1
                self.queue.remove_folder(id)

    def _check(self, job: BatchJob) -> None:
        wrapper = self._carrier.open(job)
        config = job.config(wrapper.architecture.variant.defaults)
        wrapper.check(config)
        if not self._plan:
            return
        forecast = wrapper.foresee(config, self._machine)
        if forecast.plan is not None:
            return
        best = wrapper.remedies(forecast)
        ways = [
            f"num_frames {best.frames}" if best.frames else "",
            f"size {best.size[0]}x{best.size[1]}" if best.size else "",
            f"extra_params.max_chunk_size {best.windows[0]}" if best.windows else "",
        ]
        would = " or ".join(way for way in ways if way)
        short = forecast.shortage(wrapper.optimization)
        raise DoesNotFit(
            f"The job needs {short} while nothing else runs. "
            f"{f'What would fit: {would}.' if would else ''}".strip()
        )

    def metrics(self) -> str:
        """Return the queue's state in Prometheus' text format (version 0.0.4)."""
        states, counts = self.queue.by_status(), self.queue.counts
        well = int(self.failed is None)
        rows: list[tuple[str, str, str, list[tuple[str, float]]]] = [
            ("wanfit_up", "gauge", "1 while jobs are carried out", [("", well)]),
            ("wanfit_start_time_seconds", "gauge", "when the server began", [("", self._began)]),
            ("wanfit_jobs", "gauge", "jobs in the queue by state",
             [(f'{{status="{name}"}}', number) for name, number in states.items()]),
            ("wanfit_tries_total", "counter", "tries that ended since, by how they did",
             [(f'{{result="{name}"}}', counts[name])
              for name in ("completed", "failed", "again", "lost", "deleted")]),
            ("wanfit_folder_bytes", "gauge", "bytes of all that is kept",
             [("", self.shelf.kept())]),
            ("wanfit_requests_refused_total", "counter", "requests that became no job",
             [("", self.refused)]),
            ("wanfit_render_seconds_total", "counter", "seconds of all tries that ended since",
             [("", round(self.queue.seconds, 3))]),
        ]  # fmt: skip
        lines: list[str] = []
        for name, kind, what, values in rows:
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{label} {value}" for label, value in values]
        return "\n".join(lines) + "\n"

    def page(self) -> tuple[str, str]:
        """Return the page and the policy that lets its own script run and nothing else load."""
        text = _PAGE.read_text(encoding="utf-8")
        script = re.search(r"<script>(.*?)</script>", text, re.S)
        assert script is not None
        digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
        policy = (
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
            "connect-src 'self'; media-src 'self' blob:; form-action 'none'; "
            "base-uri 'none'; frame-ancestors 'none'"
        )
        return text, policy
