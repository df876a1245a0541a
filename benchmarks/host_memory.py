"""Host memory that counts, watched while something runs; and programs run within less of it.

What counts is memory that the system cannot simply take back: anonymous pages (``RssAnon``), and
page-locked memory that CUDA has allocated itself, which is in no process's resident set. Slabs that
are page-locked by registering them are anonymous already; they are told apart as ``locked``. Pages
of mapped files do not count. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from wan_core.loading import all_pinned_bytes

SAMPLE_SECONDS = 0.01
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Sample:
    """Bytes at one moment."""

    at: float
    counted: int
    locked: int
    mapped: int
    anonymous: int = 0
    """What is counted without the page-locked memory of torch's allocator."""


class HostWatch:
    """A thread that looks at the process's memory a hundred times a second."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.spans: list[tuple[str, float, float]] = []
        """(stage, begin, end) of the runs inside ``stages``, in the order of their end."""
        self.after: dict[tuple[str, float], Sample] = {}
        """What was held after each of them, by (stage, begin)."""
        self.timeline: Any = None
        """The timeline of the last run inside ``stages``."""
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="host-watch", daemon=True)
        self._thread.start()

    def look(self) -> Sample:
        """Take a sample now."""
        lines = os.pread(self._status, 8192, 0).decode().splitlines()
        found = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
        anonymous, mapped = (int(found[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile"))
        sample = Sample(
            time.perf_counter(), anonymous + _allocated_locked(), all_pinned_bytes(), mapped,
            anonymous,
        )  # fmt: skip
        self.samples.append(sample)
        return sample

    def _work(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.look()

    def forget(self) -> None:
        """Drop the samples and stages so far."""
        self.samples, self.spans, self.after, self.timeline = [], [], {}, None

    def peak(self, begin: float, end: float | None = None) -> Sample:
        """Return the largest sample between two moments; a new one where there is none."""
        now = self.look()
        end = time.perf_counter() if end is None else end
        inside = [s for s in list(self.samples) if begin <= s.at <= end]
        return max(inside, key=lambda s: s.counted, default=now)

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()
        os.close(self._status)

    @contextmanager
    def stages(self) -> Iterator[None]:
        """Note when each stage of the runs inside the ``with`` block begins and ends."""
        import wan_core.render.pipeline as pipeline

        watch, base = self, pipeline.Timeline

        class Timed(base):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **more)
                watch.timeline = self

            @contextmanager
            def stage(self, name: str) -> Iterator[Any]:
                begun = time.perf_counter()
                try:
                    with super().stage(name) as report:
                        yield report
                finally:
                    watch.spans.append((name, begun, time.perf_counter()))
                    watch.after[name, begun] = watch.look()

        with patch("wan_core.render.pipeline.Timeline", Timed):
            yield


def _allocated_locked() -> int:
    """Bytes that torch's allocator of page-locked memory holds."""
    if not torch.cuda.is_initialized():
        return 0
    ask: Any = getattr(torch.cuda, "host_memory_stats", dict)  # since torch 2.6
    return int(ask().get("allocated_bytes.current", 0))


# -- the file on the disk ---------------------------------------------------------------------


def in_memory(path: Path) -> bool:
    """Say whether a file lies in shared memory, where it cannot be dropped."""
    kind, mounts = "", Path("/proc/mounts").read_text().splitlines()
    best = ""
    for line in mounts:
        _, place, name, *_ = line.split()
        inside = str(path.resolve()).startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(best):
            best, kind = place, name
    return kind in ("tmpfs", "ramfs")


def forget_pages(*paths: Path) -> str:
    """Have the kernel drop files from its cache; return in words what is cold then."""
    if any(in_memory(path) for path in paths):
        return "warm: the file is in shared memory"
    for path in paths:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "cold: the file was dropped from the page cache"


def read_once(path: Path, threads: int = 4) -> float:
    """Return the seconds of reading a file once, as fast as some threads can."""
    from concurrent.futures import ThreadPoolExecutor

    size, piece = path.stat().st_size, 32 * 2**20
    buffers = threading.local()
    begun = time.perf_counter()
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:

        def read(start: int) -> None:
            if not hasattr(buffers, "memory"):
                buffers.memory = bytearray(piece)
            os.preadv(file.fileno(), [buffers.memory], start)

        list(pool.map(read, range(0, size, piece)))
    return time.perf_counter() - begun


def disk_rates(folder: Path, nbytes: int = 2**30) -> tuple[float, float]:
    """Return the bytes per second that a folder's disk writes, and reads when cold."""
    path = folder / f"wanfit-rate-{os.getpid()}"
    try:
        data = os.urandom(2**20) * 64
        begun = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for _ in range(nbytes // len(data)):
                file.write(data)
            os.fsync(file.fileno())
        written = time.perf_counter() - begun
        forget_pages(path)
        return nbytes / written, nbytes / read_once(path)
    finally:
        path.unlink(missing_ok=True)


# -- less memory ------------------------------------------------------------------------------


@contextmanager
def control_group(nbytes: int) -> Iterator[tuple[Path | None, str]]:
    """Make a control group with so much memory; yields its folder and "", or None and why not."""
    group = CGROUPS / f"wanfit_benchmark_{os.getpid()}"
    why_not = ""
    try:
        if not (CGROUPS / "cgroup.controllers").is_file():
            raise OSError("no control groups of version 2 at /sys/fs/cgroup")
        if "memory" not in (CGROUPS / "cgroup.subtree_control").read_text().split():
            (CGROUPS / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / "memory.max").write_text(str(nbytes))
        with contextlib.suppress(OSError):  # absent where the kernel has no swap
            (group / "memory.swap.max").write_text("0")
    except OSError as error:
        why_not = str(error)
    try:
        yield (None if why_not else group), why_not
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def run_within(group: Path | None, command: list[str], timeout: float) -> tuple[int, str]:
    """Run a program inside a control group; return its exit status and the end of its output."""
    if group is not None:
        # The shell joins the group and then becomes the program.
        join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", join, str(group), *command]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    return done.returncode, done.stdout[-4000:]


def group_told(group: Path | None) -> dict[str, Any]:
    """Return what a control group has counted."""
    if group is None:
        return {}
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found["peak"] = int((group / "memory.peak").read_text())
    with contextlib.suppress(OSError, ValueError):
        events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
        found |= {"reclaims": int(events["max"]), "killed": int(events["oom_kill"])}
    return found


def room_for_model(wanted: Path | None, tiny: bool, nbytes: float) -> Path | None:
    """Choose where the weights go: as told, else shared memory, else the temporary folder."""
    if wanted is not None or tiny:
        return wanted
    for path in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if path.is_dir() and shutil.disk_usage(path).free > nbytes:
            return path
    room = f"{nbytes / 1e9:.0f} GB"
    raise SystemExit(f"Neither /dev/shm nor the temporary folder has {room} free; give --folder.")


@contextmanager
def ram_of(gib: float | None) -> Iterator[None]:
    """Take the machine to have so much RAM, also where the kernel does not show it yet."""
    if gib is None:
        yield
        return
    import psutil

    look = psutil.virtual_memory

    def grown() -> Any:
        now = look()
        total = max(now.total, int(gib * 2**30))
        return now._replace(total=total, available=total - now.total + now.available)

    with patch("psutil.virtual_memory", grown):
        yield
