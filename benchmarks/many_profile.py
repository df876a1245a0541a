"""Where the time of a block goes when two cards compute a pass together, beside one card alone.

    python benchmarks/many_profile.py [--size 480p81] [--tiny]      (or: many.py --profile)

Two processes, a card each, compute passes of a 14B of few blocks with random weights, as a gang
does: cut over both, and each the whole pass by itself. torch's profiler lists what the cards did.
Passes of two depths are taken apart, so that what is around the blocks drops out: per block the
milliseconds of matrix products, attention, element-wise kernels, copies and exchanges, how long an
exchange had nothing beside it ("exposed"), and gaps, in which the card did nothing. Of the four
exchanges of a block (v, q, k and the output) the process that comes last only moves bytes; what
another takes longer is waiting. "lost" is what a block takes beyond its share of the whole pass.
Needs 2 CUDA cards, 12 GB on each, less than a minute; prints, and writes nothing. ``--tiny`` runs
small blocks on the CPU with gloo: its figures say nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch

SIZES = {"480p81": (21, 60, 104), "720p81": (21, 90, 160), "tiny": (5, 8, 8)}
"""Latent frames, rows and columns."""
FEW, MANY = 1, 4
"""Blocks of the two depths."""
PASSES = 3
KINDS = ("products", "attention", "element-wise", "copies", "exchange")
LEAVES = ("v", "q", "k", "out")
"""In the order in which a block exchanges them (``_exchanged`` in ``forward/block.py``)."""
_WORDS = {
    "exchange": ("ncclDevKernel_SendRecv", "SendRecv", "gloo:all_to_all", "gloo:alltoall"),
    "": ("nccl", "gloo:", "c10d::"),
    "attention": ("flash", "fmha", "sdpa", "scaled_dot_product", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "aten::linear", "aten::addmm"),
    "copies": ("memcpy", "memset", "direct_copy", "aten::copy_", "aten::contiguous", "aten::clone"),
}
"""What the names of activities have in them, by kind; the first that fits counts."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Activity:
    """What a device did, in milliseconds of its own clock."""

    name: str
    begin: float
    end: float

    @property
    def kind(self) -> str:
        """Return one of ``KINDS``; empty for what is none of a block's work."""
        low = self.name.lower()
        for kind, words in _WORDS.items():
            if any(word.lower() in low for word in words):
                return kind
        return "element-wise"


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the intervals in order, those that touch as one."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Return how long it is that any of the intervals covers."""
    return sum(end - begin for begin, end in joined(intervals))


def pass_times(activities: Sequence[Activity]) -> dict[str, float]:
    """Return the milliseconds of a pass: in all, of each kind, exposed exchanges and gaps."""
    known = [one for one in activities if one.kind]
    spans = {kind: [(a.begin, a.end) for a in known if a.kind == kind] for kind in KINDS}
    everything = [span for each in spans.values() for span in each]
    computing = [span for kind, each in spans.items() if kind != "exchange" for span in each]
    if not everything:
        return dict.fromkeys(("all", *KINDS, "exposed", "gaps"), 0.0)
    whole = max(end for _, end in everything) - min(begin for begin, _ in everything)
    busy = length(everything)
    times = {kind: sum(end - begin for begin, end in each) for kind, each in spans.items()}
    return {"all": whole, **times, "exposed": busy - length(computing), "gaps": whole - busy}


def per_block(few: dict[str, float], many: dict[str, float]) -> dict[str, float]:
    """Return what a block takes, by passes of ``FEW`` and of ``MANY`` blocks."""
    return {name: (many[name] - few[name]) / (MANY - FEW) for name in many}


def waiting(ranks: Sequence[Sequence[float]]) -> list[list[tuple[float, float]]]:
    """Return of each rank what each of a block's four exchanges takes: (bytes, waiting).

    ``ranks`` are the milliseconds of a pass's exchanges, four a block, in their order. Who came
    last has waited for nobody; medians over the blocks.
    """
    counts = {len(each) for each in ranks}
    if len(counts) != 1 or counts.pop() % len(LEAVES):
        raise ValueError(f"exchanges of each rank: {[len(each) for each in ranks]}")
    moving = [min(each) for each in zip(*ranks, strict=True)]
    found = []
    for each in ranks:
        found.append([
            (
                median(moving[first :: len(LEAVES)]),
                median(
                    took - bare
                    for took, bare in zip(
                        each[first :: len(LEAVES)], moving[first :: len(LEAVES)], strict=True
                    )
                ),
            )
            for first in range(len(LEAVES))
        ])  # fmt: skip
    return found


def table(cut: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the report: per block, of each rank, cut and its share of the whole."""
    columns = ("all", *KINDS, "exposed", "gaps")
    lines = [
        "| ms per block | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for rank, (part, alone) in enumerate(zip(cut, whole, strict=True)):
        share = {name: alone["block"][name] / len(cut) for name in columns}
        lost = {name: part["block"][name] - share[name] for name in columns}
        for said, row in (("cut", part["block"]), ("share of the whole", share), ("lost", lost)):
            shown = " | ".join(f"{row[name]:.2f}" for name in columns)
            lines.append(f"| rank {rank}, {said} | {shown} |")
    each = waiting([one["exchanges"] for one in cut])
    lines += ["", "| exchange, ms | " + " | ".join(LEAVES) + " |", "|---" * (len(LEAVES) + 1) + "|"]
    for rank, row in enumerate(each):
        shown = " | ".join(f"{bare:.3f} + {waits:.3f} waiting" for bare, waits in row)
        lines.append(f"| rank {rank} | {shown} |")
    for rank, one in enumerate(cut):
        lines.append(
            f"- rank {rank}: {one['kernels']:.0f} kernels a block cut, "
            f"{whole[rank]['kernels']:.0f} whole; the host queued a pass of {MANY} blocks "
            f"in {one['host_ms']:.1f} ms; "
            f"bits {'equal' if one['equal'] else 'OTHER'}"
        )
    return lines


# -- in each of the processes -----------------------------------------------------------------


def measure(among: Any, device: str, size: str) -> dict[str, Any]:
    """Profile passes, cut among the processes and whole; plain values, for ``table``."""
    from support.shared_streams import plain_model

    from wan_core.forward import cut_tokens, lean_forward

    model = plain_model(256 if size == "tiny" else 5120).to(device)
    call = call_of(model, device, SIZES[size])
    blocks, found = list(model.blocks), {}
    results = {}
    for name in ("whole", "cut"):
        times = {}
        for depth in (FEW, MANY):
            model.blocks = torch.nn.ModuleList(blocks[:depth])
            with lean_forward(model):
                together = cut_tokens(model, among) if name == "cut" else nullcontext()
                with together:
                    made, runs, host = profiled(lambda: model(**call)[0], among, device)
            times[depth] = {
                key: median(one[key] for one in map(pass_times, runs)) for key in pass_times(())
            }
            results[name] = made
        last = runs[-1]
        swaps = [one.end - one.begin for one in last if one.kind == "exchange"]
        found[name] = {
            "block": per_block(times[FEW], times[MANY]), "exchanges": swaps, "host_ms": host,
            "kernels": len([one for one in last if one.kind]) / MANY,
        }  # fmt: skip
    found["cut"]["equal"] = torch.equal(results["cut"], results["whole"])
    return found


def call_of(model: Any, device: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Return a call of the model with noise."""
    g = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).bfloat16().to(device)

    return {
        "hidden_states": noise(1, model.config.in_channels, *size),
        "timestep": torch.tensor([777.0]).to(device),
        "encoder_hidden_states": noise(1, 512, model.config.text_dim),
        "return_dict": False,
    }


def profiled(
    work: Callable[[], torch.Tensor], among: Any, device: str
) -> tuple[torch.Tensor, list[list[Activity]], float]:
    """Do some work in all processes at once; return its result, what each time has shown, and the
    milliseconds in which the host had queued it."""
    on_card = device.startswith("cuda")
    kinds = torch.profiler.ProfilerActivity

    def finish() -> None:
        if on_card:
            torch.cuda.synchronize(device)

    runs, hosts = [], []
    for _ in range(PASSES + 1):  # the first one also tries kernels
        among.all_say(True)
        finish()
        with torch.profiler.profile(activities=[kinds.CUDA if on_card else kinds.CPU]) as profile:
            begun = time.perf_counter()
            made = work()
            hosts.append(1e3 * (time.perf_counter() - begun))
            finish()
        runs.append(activities_of(profile.events(), on_card))
    return made.to("cpu"), runs[1:], median(hosts[1:])


def activities_of(events: Iterable[Any], on_card: bool) -> list[Activity]:
    """Return what ran on a card, or of a CPU the operations that no other one called."""
    found = []
    for event in events:
        kind = str(event.device_type)
        mine = kind.endswith("CUDA") if on_card else event.cpu_parent is None
        if mine and event.time_range.end > event.time_range.start:
            name, span = event.name, event.time_range
            found.append(Activity(name, span.start / 1e3, span.end / 1e3))
    return sorted(found, key=lambda one: one.begin)


def profile(size: str) -> list[str]:
    """Measure in two processes; return the report's lines."""
    from support.process_gang import in_processes

    from wan_core.workers.process import environment

    device = "cpu" if size == "tiny" else "cuda"
    for name, value in environment("cpu", os.environ).items():
        os.environ.setdefault(name, value)  # as workers have it
    with tempfile.TemporaryDirectory() as folder:
        found = in_processes(
            2, "many_profile.measure", size, folder=Path(folder), device=device, patience=300
        )
    where = "CPU" if device == "cpu" else torch.cuda.get_device_name(0)
    head = f"A pass of {size} cut over two, {MANY} blocks: 2 {where}, torch {torch.__version__}"
    return [head, "", *table([one["cut"] for one in found], [one["whole"] for one in found])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*SIZES], default="480p81", help="(480p81)")
    parser.add_argument("--tiny", action="store_true", help="small blocks on the CPU")
    arguments = parser.parse_args()
    print("\n".join(profile("tiny" if arguments.tiny else arguments.size)))


if __name__ == "__main__":
    main()
