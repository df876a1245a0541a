"""What is planned on the computers people have: docs/machines.md, made from headers alone.

    python benchmarks/machines_table.py [--output docs/machines.md]

Files of true names, shapes and sizes are written without content, detected, and planned on eight
machines by the product's own planner: no weight is read and no GPU is needed. Of the memory that a
card and a computer have, a share is taken by the system; what is left free is in the table's head.
Seconds are predictions by the rates in ``wan_core/plan/timing.py`` and ``stage_seconds.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import wan_layouts as layouts
from support.machines import gpu

from wan_core import ArchitectureDetector, OptimizationPlan, WanModelFiles
from wan_core.config import GIB
from wan_core.errors import DoesNotFit
from wan_core.memory import STREAM_BUFFERS, SystemResources, Workload
from wan_core.models import ModelArchitecture, all_blocks
from wan_core.plan import Planner
from wan_core.plan.timing import reads_from_disk


@dataclass(frozen=True)
class Machine:
    """A card and the computer around it; ``free`` and ``ram`` are GiB that can be used."""

    name: str
    free: float
    ram: float
    capability: tuple[int, int]
    multiprocessors: int
    pcie: int = 4

    def resources(self) -> SystemResources:
        """Return it as the planner sees a machine."""
        return gpu(
            self.free, ram=self.ram, compute_capability=self.capability, device_name=self.name,
            multiprocessors=self.multiprocessors, pcie_generation=self.pcie,
            allocator="default", os="Linux",
        )  # fmt: skip


MACHINES = (
    Machine("4060, 8 + 16 GB", 6.9, 11.5, (8, 9), 24),
    Machine("3060, 12 + 16 GB", 10.8, 11.5, (8, 6), 28),
    Machine("4070, 12 + 32 GB", 10.8, 26, (8, 9), 46),
    Machine("4080, 16 + 32 GB", 14.7, 26, (8, 9), 76),
    Machine("4090, 24 + 64 GB", 22.5, 56, (8, 9), 128),
    Machine("5090, 32 + 64 GB", 30, 56, (12, 0), 170, 5),
    Machine("A6000, 48 + 128 GB", 46.5, 118, (8, 6), 84),
    Machine("H100, 80 + 256 GB", 78, 240, (9, 0), 132, 5),
)
A14B = ("fp8_scaled old", "Q4_K", "Q8_0", "int8_convrot new", "bf16")
NAMES = {
    "fp8_scaled old": "A14B fp8 scaled", "Q4_K": "A14B Q4_K", "Q8_0": "A14B Q8_0",
    "int8_convrot new": "A14B int8 convrot", "bf16": "A14B bf16",
}  # fmt: skip
GGUF = {"Q4_K": (12, 256, 144), "Q8_0": (8, 32, 34)}
P480, P720 = (832, 480, 81), (1280, 720, 81)
ANIMATE = (832, 480, 77), (1280, 720, 77)
FIVE = (1280, 704, 121)
INTRODUCTION = """\
# What is planned on which computer

Made by `python benchmarks/machines_table.py` from headers of true shape: T2V-A14B as a pair of
single files in five kinds of storage, TI2V-5B and T2V-1.3B in fp16, a segment of Animate 1 and of
Animate 2 in two kinds each, all with umT5 in scaled fp8; 20 guided steps, of Animate 1 unguided
ones, as it was made for. *driving* says what is kept of Animate 2's
driving stream: keys and values on the card (kv), the blocks' inputs in RAM (inputs), or nothing
(again). *Card* is the predicted peak. *RAM* is what nothing else can have meanwhile, *file*
the weights that are read from their mapped file: RAM that the system takes back when it needs it.
Seconds are predicted: of a step good to a factor of two until a run on the machine was measured
(`wan_core/plan/timing.py`); *cold* is a whole job without an mp4 in a new process, its kernels
compiled, every file read from a disk of 1.5 GB/s, its decode included
(`wan_core/plan/stage_seconds.py`: rates of an H100 and H200s, within a fourth of the runs they come
from; on none of these other cards was a whole job measured).
"""
COLUMNS = (
    "| model and size | plan | card GiB | RAM GiB | file GiB | s a step | cold s | verdict |",
    "|---|---|---|---|---|---|---|---|",
)


def write_expert(path: Path, model: str, kind: str) -> Path:
    """Write a transformer of true shape as ``kind``, without content."""
    shapes = layouts.FILES[model][0]
    if kind in GGUF:
        return layouts.write_sparse_gguf(path.with_suffix(".gguf"), shapes, *GGUF[kind])
    file = layouts.stored(shapes, kind)
    return layouts.write_sparse(path.with_suffix(".safetensors"), file)


def models(
    folder: Path,
) -> Iterator[tuple[str, ModelArchitecture, tuple[tuple[int, int, int], ...]]]:
    """Yield a title, the detected model, and the sizes to plan."""
    encoder = layouts.write_sparse(folder / "umt5.safetensors", layouts.fp8_umt5())
    detector = ArchitectureDetector()
    for kind in A14B:
        high = write_expert(folder / "a_high_noise", "t2v-14b", kind)
        low = write_expert(folder / "a_low_noise", "t2v-14b", kind)
        files = WanModelFiles(transformer=high, transformer_2=low, text_encoder=encoder)
        yield NAMES[kind], detector.detect_model_architecture(files), (P480, P720)
        high.unlink()
        low.unlink()
    for title, model, sizes in (
        ("5B fp16", "ti2v-5b", (FIVE,)), ("1.3B fp16", "t2v-1.3b", (P480,)),
    ):  # fmt: skip
        path = write_expert(folder / model, model, "fp16")
        files = WanModelFiles(transformer=path, text_encoder=encoder)
        yield title, detector.detect_model_architecture(files), sizes
    for kind in ("fp8_scaled old", "Q4_K"):
        path = write_expert(folder / "wan2.2_animate", "animate-14b", kind)
        files = WanModelFiles(transformer=path, text_encoder=encoder)
        title = NAMES[kind].replace("A14B", "Animate 1")
        yield title, detector.detect_model_architecture(files), ANIMATE
        path.unlink()
    # Animate 2 has the shapes of Wan 2.1 I2V-14B, and is known by its name.
    for kind in ("int8_convrot new", "Q4_K"):
        path = write_expert(folder / "wan_animate_2", "i2v-14b", kind)
        files = WanModelFiles(transformer=path, text_encoder=encoder)
        title = NAMES[kind].replace("A14B", "Animate 2")
        yield title, detector.detect_model_architecture(files), (P480, P720)
        path.unlink()


def plan_of(
    found: ModelArchitecture, size: tuple[int, int, int], machine: Machine, steps: int = 20
) -> OptimizationPlan | DoesNotFit:
    """Return the plan, or the refusal."""
    width, height, frames = size
    workload = Workload(
        width=width, height=height, num_frames=frames, steps=steps, return_frames=False
    )
    if found.transformer.animate is not None:  # one segment, the character's frame in front
        workload = replace(workload, references=1, reference_picture=True, start_video=True)
    if found.transformer.animate == 1:
        workload = replace(workload, guidance_high=False, guidance_low=False)
    try:
        return Planner().recommend_optimizations(found, workload, machine.resources())
    except DoesNotFit as refusal:
        return refusal


def words(plan: OptimizationPlan, layers: int) -> str:
    """Return a plan in a few words."""
    choices = plan.choices
    if choices.stream:
        said = f"{choices.resident_blocks} of {layers} blocks resident"
        if not choices.resident_blocks:
            said = "streamed" + (", one block at a time" if choices.stream_buffers == 1 else "")
    else:
        said = {"none": "all resident", "model": "expert resident"}.get(choices.offload, "by layer")
    said += f", driving {choices.driving}" if choices.driving else ""
    said += ", lean" * choices.lean + ", by rows" * choices.by_rows
    said += ", VAE bf16" * (choices.dtypes["vae"] != "fp32") + ", fp8 storage" * choices.fp8_storage
    return said + (f", windows of {choices.window_frames}" if choices.window_frames else "")


def judged(plan: OptimizationPlan, machine: Machine, found: ModelArchitecture) -> str:
    """Say what an expert would say of a plan."""
    choices = plan.choices
    if choices.window_frames or choices.fp8_storage:
        return "changes the video: nothing exact fits"
    if choices.offload == "sequential":
        return "the least there is: every layer crosses the bus for each stretch of rows"
    if not choices.stream:
        return "as it should be: nothing crosses the bus during a step"
    if reads_from_disk(found, choices, machine.resources()):
        return "RAM cannot hold what is streamed: each step reads it from disk"
    if choices.driving == "inputs" and choices.resident_blocks == _layers(found) - STREAM_BUFFERS:
        return "all but what travels stays: streamed, so that both passes share the driving stream"
    if choices.resident_blocks:
        return "the card is filled; the rest hides behind the step where the bus is fast enough"
    return "activations fill the card; blocks come from RAM"


def _layers(found: ModelArchitecture) -> int:
    return len(all_blocks(found, "transformer", "bf16"))  # an adapter counts as one


def table(folder: Path) -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    rows: dict[str, list[str]] = {machine.name: [] for machine in MACHINES}
    for title, found, sizes in models(folder):
        for size in sizes:
            layers = _layers(found)
            for machine in MACHINES:
                plan = plan_of(found, size, machine)
                what = f"{title}, {size[0]}x{size[1]}x{size[2]}"
                if isinstance(plan, DoesNotFit):
                    rows[machine.name].append(f"| {what} | **refused**: {plan} | | | | | | |")
                    continue
                mapped = max(s.mapped_bytes for s in plan.estimate.stages) / GIB
                card = plan.estimate.peak_usage_mb / 1024
                rows[machine.name].append(
                    f"| {what} | {words(plan, layers)} | {card:.1f} | "
                    f"{plan.estimate.host_ram_mb / 1024:.1f} | {mapped:.1f} | "
                    f"{plan.step_seconds:.0f} | {plan.cold_seconds:.0f} | "
                    f"{judged(plan, machine, found)} |"
                )
    for machine in MACHINES:
        lines += [
            f"## {machine.name}", "",
            f"{machine.free:g} GiB of the card and {machine.ram:g} GiB of RAM are free.", "",
            *COLUMNS, *rows[machine.name], "",
        ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "machines.md")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        output.write_text(table(Path(folder)), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
