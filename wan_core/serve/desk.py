"""What a server knows besides HTTP: its model, its queue, what it accepts, and how it is doing."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import GenerationConfig
from ..errors import DoesNotFit, InvalidRequest, WanError, first_line
from .carry import Carrier
from .crew import Crew, carry_out
from .fields import Served, name_of, read_job
from .jobs import BatchJob
from .queue import Queue, Row, new_id
from .uploads import MOST_BYTES, Form, check_frames, look_at, remove_parts

_PAGE = Path(__file__).with_name("watch.html")


class OutOfOrder(WanError):
    """No job is carried out just now, so none is accepted."""


class Desk:
    """Accepts jobs into a queue, and has a crew carry them out in a thread of its own.

    ``folder`` holds everything: the queue, uploads, journals and clips. ``crew`` makes the crew,
    given the queue. ``plan`` False leaves out whether a job fits: for a crew on other machines.
    """

    def __init__(
        self, served: Served, folder: Path, crew: Callable[[Queue], Crew], *,
        most_bytes: int = MOST_BYTES, tries: int = 2, plan: bool = True,
    ) -> None:  # fmt: skip
        self.served, self.most_bytes, self._plan = served, most_bytes, plan
        self.queue = Queue(folder / "queue.sqlite3", tries)
        self.uploads = folder / "uploads"
        self.uploads.mkdir(exist_ok=True)
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
        if self._failed or self.queue.trouble:
            return self._failed or self.queue.trouble
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
        wrapper, config = self._carrier.open(job), job.config()
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
        needed, system = forecast.estimate.peak_usage_mb, forecast.system
        free = system.device_free_bytes / 2**20
        would = " or ".join(way for way in ways if way)
        raise DoesNotFit(
            f"The job needs {needed:,.0f} MiB on {system.device_name}, where {free:,.0f} MiB are "
            f"free while nothing else runs. {f'What would fit: {would}.' if would else ''}".strip()
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
