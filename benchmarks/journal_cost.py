"""Prints what saving a render costs on a disk: ``python benchmarks/journal_cost.py FOLDER``.

States of true size, with random contents: latents of 81 frames, what UniPC remembers, what step
caches remember. ``--output results/journal_cost.md`` writes the table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from wan_core.journal import Journal

SIZES = {"832x480": (60, 104), "1280x720": (90, 160)}
"""Height and width of the latents, of 16 channels and 21 frames."""
HELD = {"euler": 1, "unipc": 4, "unipc, EasyCache": 10}
"""Tensors of the latents' size in a state."""
RUNS = 7
HEAD = """# What saving a state costs

`python benchmarks/journal_cost.py`, {machine}, torch {torch}, on a local virtual disk; medians of
{runs} saves, each complete on the disk (fsync) before the render goes on. A step is saved where all
saves together take at most 1 % of the time, so the last column is what a crash costs at most where
steps are shorter; an interrupt or an error costs nothing.

| 81 frames | state | bytes | one save | longest | a crash costs at most |
|---|---|---|---|---|---|
"""


def states(size: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of a state by the name of what holds them."""
    height, width = SIZES[size]
    latents = torch.randn(1, 16, 21, height, width)
    made = {
        name: {f"t{number}": latents + number for number in range(count)}
        for name, count in HELD.items()
    }
    if size == "1280x720":  # what the blocks of 14B added, of both passes of guidance
        residual = torch.randn(1, 21 * height * width // 4, 5120, dtype=torch.bfloat16)
        made["unipc, MagCache"] = {**made["unipc"], "c": residual, "u": residual + 1}
    return made


def row(folder: Path, size: str, name: str, tensors: dict[str, torch.Tensor]) -> str:
    """Save a state several times and return its line of the table."""
    seconds = []
    with Journal.open(folder, {"size": size, "state": name}) as journal:
        for unit in range(RUNS):
            began = time.perf_counter()
            if not journal.save(unit, tensors):
                raise SystemExit(" ".join(journal.warnings))
            seconds.append(time.perf_counter() - began)
        journal.finish()
    middle = statistics.median(seconds)
    return (
        f"| {size} | {name} | {journal.state_bytes / 1e6:.0f} MB | {middle:.2f} s | "
        f"{max(seconds):.2f} s | {100 * middle:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="on the disk (default: temporary)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    machine = f"{platform.system()} {platform.machine()}"
    text = HEAD.format(machine=machine, torch=torch.__version__, runs=RUNS)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for size in SIZES:
            for name, tensors in states(size).items():
                text += row(Path(folder) / "journals", size, name, tensors) + "\n"
                print(text.splitlines()[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
