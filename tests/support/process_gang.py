"""Gangs whose processes are real: what a function returns in each of them."""

from __future__ import annotations

import importlib
import queue
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def _run(rank: int, size: int, place: str, device: str, work: str, given: Any, out: Any) -> None:
    """Meet the others, do the work, and put what it returned, or why it failed, into ``out``."""
    from wan_core.workers.group import ProcessGroup

    torch.set_num_threads(1)
    try:
        where = torch.device(f"cuda:{rank}" if device == "cuda" else device)
        group = ProcessGroup(rank, size, place, where)
        module, _, name = work.rpartition(".")
        with torch.no_grad():
            made = getattr(importlib.import_module(module), name)(group, str(where), *given)
        out.put((rank, made, ""))
    except BaseException:  # noqa: BLE001 - raised in the test
        out.put((rank, None, traceback.format_exc()))


def in_processes(
    size: int, work: str, *given: Any, folder: Path, device: str = "cpu", patience: float = 120.0
) -> list[Any]:
    """Return what ``work``, "module.function", returns in each of ``size`` processes.

    It is given the group, the device and ``given``. Raises AssertionError with the traceback of the
    first that fails; the others are then ended, because they may wait for it.
    """
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    place = str(folder / "meeting")
    processes = [
        context.Process(target=_run, args=(rank, size, place, device, work, given, out))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results: list[Any] = [None] * size
    try:
        until, left = time.monotonic() + patience, set(range(size))
        while left:
            assert time.monotonic() < until, f"{left} have said nothing for {patience:.0f} s"
            dead = [r for r in left if processes[r].exitcode not in (None, 0)]
            try:
                rank, made, failed = out.get(timeout=0.5)
            except queue.Empty:
                assert not dead, f"{dead} have ended"
                continue
            assert not failed, f"process {rank}:\n{failed}"
            results[rank] = made
            left.discard(rank)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return results
