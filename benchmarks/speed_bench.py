"""The bench of ``speed.py``: device, budget, ways in turn, and what was found so far."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed_report import GIB, split_of, write_results
from torch import Tensor

BASE = "diffusers"
"""The way that the others are measured beside."""


@dataclass
class Bench:
    """Device, budget and what was found so far."""

    device: torch.device
    output: Path
    budget: float
    tiny: bool
    brief: bool = False
    """Whether all parts run within one budget: of each what says most."""
    begun: float = field(default_factory=time.perf_counter)
    found: dict[str, Any] = field(default_factory=dict)
    models: Any = None
    """The transformers of the last case, for the next one of the same shape."""

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self.begun)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begun:5.0f} s] {text}", flush=True)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any]) -> tuple[float, int, Any]:
        """Return seconds, bytes allocated at the peak beyond those before, and the result."""
        self.sync()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        begun = time.perf_counter()
        result = call()
        self.sync()
        seconds = time.perf_counter() - begun
        return seconds, (torch.cuda.max_memory_allocated() if self.cuda else 0) - before, result

    def part(self, name: str, needs: float, work: Callable[[], object]) -> None:
        """Run a part if there is time for it, and keep what was found, come what may."""
        if self.has_time(name, needs):
            try:
                work()
            except Exception as error:  # noqa: BLE001 - noted; the other parts run
                self.failed(name, error)
        self.clean()
        self.save()

    def has_time(self, name: str, needs: float) -> bool:
        """Say whether there is time for something; note it where there is not."""
        if self.left >= needs or self.tiny:
            return True
        self.note(f"{name}: skipped, needs about {needs:.0f} s of which {self.left:.0f} are left")
        return False

    def drop_models(self) -> None:
        """Free the device from the last case's transformers."""
        self.models = None
        self.clean()

    def clean(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def failed(self, name: str, error: Exception) -> None:
        """Note what failed, and go on; with small models nothing may fail."""
        if self.tiny:
            raise error
        traceback.print_exception(error)
        self.note(f"{name}: {type(error).__name__}: {error}")

    def save(self) -> None:
        """Write what was found so far: a run that is cut short keeps its rows."""
        write_results(self.found, self.output)

    def note(self, text: str) -> None:
        self.found["notes"].append(text)
        self.say(text)


def in_turns(
    bench: Bench,
    ways: Mapping[str, Callable[[], Any]],
    turns: int,
    against: Tensor | None = None,
    profiled: Collection[str] = (),
) -> dict[str, Any]:
    """Run all ways in turn, once without counting; returns seconds, first seconds, peaks, errors.

    Bits are compared with the first way's; errors are taken ``against`` a result, or its own. The
    uncounted pass of those that are ``profiled`` is, on a GPU: ``split``. A way that fails in its
    first pass is noted and left out, unless it is the first.
    """
    found: dict[str, Any] = {}
    reference: Tensor | None = None
    for name, call in ways.items():
        first = partial(bench.timed, call)
        try:
            split, (seconds, _, out) = (
                split_of(first) if bench.cuda and name in profiled else ({}, first())
            )
        except Exception as error:
            if reference is None:
                raise
            bench.failed(name, error)
            continue
        reference = out if reference is None else reference
        found[name] = {
            "seconds": [], "first": seconds, "peak": 0, "equal": torch.equal(out, reference),
            "error": relative_error(out, reference if against is None else against),
            "out": out if against is None and out is reference else None,
        }  # fmt: skip
        if split:
            found[name]["split"] = split
    for turn in range(turns):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            seconds, peak, _ = bench.timed(ways[name])
            found[name]["seconds"].append(seconds)
            found[name]["peak"] = max(found[name]["peak"], peak)
    return found


def relative_error(out: Tensor, reference: Tensor) -> float:
    wide = reference.float()
    return float((out.float() - wide).norm() / wide.norm())


def keep(bench: Bench, table: str, title: str, found: dict[str, Any]) -> None:
    """Put the rows of a case, each beside diffusers', into a table of the results."""
    base = found[BASE]["seconds"]
    for name, row in found.items():
        row.pop("out", None)
        pairs = zip(row["seconds"], base, strict=False)
        row["ratio"] = statistics.median(a / b for a, b in pairs)
        row["median"] = statistics.median(row["seconds"])
        bench.found[table].append({"case": title, "way": name, **row})
        bench.say(
            f"{title}, {name}: {row['median']:.3f} s, ratio {row['ratio']:.3f}, "
            f"peak {row['peak'] / GIB:.2f} GiB, error {row['error']:.1e}"
            f"{', equal bits' if row['equal'] else ''} {row.get('split', '')}"
        )
    bench.save()
