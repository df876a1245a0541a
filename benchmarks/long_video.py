"""Long video in windows: memory, time, cost, seams and what the journal costs.

    python benchmarks/long_video.py [--lengths 81 401 1001 2001] [--steps 3]

Every length is made twice in a child process of its own, on the CPU, with a small model of the real
classes: once to count the bytes of all tensors (``tests/support/traced.py``), once for the RSS of
the process; then all lengths turn by turn in one process for the times. Linux only (/proc). Writes
``results/long_video.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.blending import normalised

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from support.seams import MovingVideo, energy_at, in_ramps, linear_ramps

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.files import atomic_write
from wan_core.job import WindowPlan, latent_frames, plan_windows
from wan_core.journal import Journal

WINDOW, OVERLAP, SIZE = 81, 16, 32
STEP_SECONDS = (
    ("H100, official code, 326.9 s for a run of 40 steps", 326.9 / 40),
    ("4090D, diffusers, published by LightX2V", 30.5),
)
"""Published, not measured here: Wan2.2's assets/comp_effic.png, LightX2V's README."""
MIB = 2**20
SAVES = 31
ROUNDS = 11
"""Turns in which every length is made once, for the times."""


def rss() -> int:
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Renders:
    """Makes clips of any length with one model, and says what each took."""

    def __init__(self, model: str, steps: int, folder: Path) -> None:
        torch.set_num_threads(1)
        self.steps, self.target = steps, folder / "o.mp4"
        self.wrapper = WanPipelineLoader().load_wan_pipeline(
            model, optimization_config={"device": "cpu", "precision": "fp32"}
        )
        self.begun = 0
        self.render(101)  # weights are read, caches filled

    def render(self, frames: int) -> tuple[float, float]:
        """Make a clip; return CPU seconds of denoising and of decoding into the mp4."""
        marks: dict[str, float] = {}
        self.begun = 0

        def chunk(index: int, count: int) -> None:
            marks.setdefault("begin", time.process_time())
            self.begun += 1

        def progress(step: int, total: int, latents: Any) -> None:
            if step == total:
                marks["denoised"] = time.process_time()

        job = GenerationConfig(
            prompt_embeds=torch.zeros(1, 4, 32), width=SIZE, height=SIZE, num_frames=frames,
            num_inference_steps=self.steps, guidance_scale=1.0, seed=0, max_chunk_size=WINDOW,
            window_overlap=OVERLAP, force_chunked_processing=True, output_path=self.target,
            return_frames=False, chunk_callback=chunk, progress_callback=progress,
        )  # fmt: skip
        began = time.process_time()
        self.wrapper.generate(job).raise_for_error()
        end = time.process_time()
        return marks["denoised"] - marks.get("begin", began), end - marks["denoised"]


def child(model: str, frames: int, steps: int, traced: bool) -> dict[str, Any]:
    """Make one clip and return what it needed."""
    from support.traced import TracedMemory

    with tempfile.TemporaryDirectory() as folder:
        renders = Renders(model, steps, Path(folder))
        before, peak = rss(), 0
        if traced:
            with TracedMemory() as memory:
                renders.render(frames)
            peak = memory.peak_bytes
        else:
            renders.render(frames)
        size = renders.target.stat().st_size
    total = latent_frames(frames)
    plan = plan_windows(total, WINDOW, OVERLAP)
    begun = renders.begun if plan.count > 1 else steps
    return {
        "frames": frames, "latent": total, "traced": peak, "rss_before": before,
        "rss_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "mp4": size,
        "cost": begun * plan.window / (steps * total),
        "formula": (1 + math.ceil(max(0, total - plan.window) / max(1, plan.stride)))
        * plan.window / total,
        "windows": plan.count,
    }  # fmt: skip


def timed(model: str, lengths: list[int], steps: int, rounds: int) -> list[list[float]]:
    """Make clips of all lengths turn by turn; return each turn's seconds per frame of each.

    One process and short turns: what else the machine does slows all lengths alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        renders = Renders(model, steps, Path(folder))
        return [[sum(renders.render(n)) / n for n in lengths] for _ in range(rounds)]


def measured(model: Path, lengths: list[int], steps: int) -> list[dict[str, Any]]:
    rows = []
    for frames in lengths:
        found: dict[str, Any] = {}
        for traced in (True, False):
            command = [sys.executable, __file__, "--child", str(model), str(frames), str(steps)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            run = subprocess.run(
                [*command, str(int(traced))], check=True, capture_output=True, env=environment
            )
            row = json.loads(run.stdout.splitlines()[-1])
            found |= row if not traced else {"traced_peak": row["traced"]}
        rows.append(found)
        print(f"{frames} frames done", file=sys.stderr)
    command = [sys.executable, __file__, "--timed", str(model), str(steps)]
    command += [str(length) for length in lengths]
    run = subprocess.run(command, check=True, capture_output=True, env=environment)
    turns = json.loads(run.stdout.splitlines()[-1])
    for index, row in enumerate(rows):
        row["seconds"] = statistics.median(turn[index] for turn in turns)
        # Beside the shortest clip made in windows: the first one makes none.
        row["ratio"] = statistics.median(
            turn[index] / turn[min(1, len(rows) - 1)] for turn in turns
        )
    return rows


def length_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| frames | windows | traced peak MiB | RSS before MiB | RSS peak MiB | mp4 MiB | cost | "
        "formula | CPU ms per frame | beside the second row |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['frames']} | {r['windows']} | {r['traced_peak'] / MIB:.2f} | "
            f"{r['rss_before'] / MIB:.0f} | {r['rss_peak'] / MIB:.0f} | {r['mp4'] / MIB:.2f} | "
            f"{r['cost']:.4f} | {r['formula']:.4f} | {r['seconds'] * 1e3:.2f} | {r['ratio']:.3f} |"
        )
    return lines


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """What the traced peak grows by, and how even the times are, from the second length on."""
    lines = []
    if len(rows) > 2:
        before, last = rows[-2:]
        slope = (last["traced_peak"] - before["traced_peak"]) / (last["latent"] - before["latent"])
        frame = 16 * (SIZE // 8) ** 2 * 4
        lines.append(
            f"Between the last two lengths the traced peak grows by {slope:,.0f} bytes per latent "
            f"frame, {slope / frame:.1f} times the {frame:,} bytes of the frame itself: none of it "
            "is the windows'. From step to step live five buffers of the clip's latents: the "
            "latents, the fused prediction and UniPC's two outputs and last sample; the others are "
            "the new output and the terms of diffusers' UniPC update while it runs (traced by "
            "where they were made), when a window's activations are gone. At 832x480 a latent "
            f"frame is {16 * 60 * 104 * 4:,} bytes."
        )
        ratios = [row["ratio"] for row in rows[1:]]
        lines.append(
            f"The time per frame varies by {max(ratios) / min(ratios) - 1:.1%} between "
            f"{rows[1]['frames']:,} and {rows[-1]['frames']:,} frames."
        )
    return lines


# -- seams ------------------------------------------------------------------------------------


def fused(clip: torch.Tensor, plan: WindowPlan, lean: float) -> torch.Tensor:
    """What windows make whose right answer is ``clip`` and that lean apart by ``lean`` each."""
    made = torch.zeros_like(clip)
    for window, weights in zip(plan.windows(), normalised(plan), strict=True):
        index = list(window.indices)
        share = torch.tensor(weights).view(1, 1, -1, 1, 1)
        made[:, :, index] += share * (clip[:, :, index] + lean * window.index)
    return made


def ways() -> list[tuple[str, int, Callable[[WindowPlan], WindowPlan]]]:
    """Name, overlap in frames, and what makes the plan of it."""
    found: list[tuple[str, int, Callable[[WindowPlan], WindowPlan]]] = []
    for overlap in (8, 16, 32):
        found += [("k/(O+1), WanFit", overlap, lambda plan: plan)]
        found += [("linear(0..1)", overlap, linear_ramps)]
    found.append(("independent segments", 0, lambda plan: replace(plan, fusion="flat")))
    return found


def seam_table() -> list[str]:
    """Lay out what a moving gradient shows at the seams."""

    def gradient(frames: int) -> torch.Tensor:
        place = torch.arange(4.0).view(1, 1, 1, 1, 4) / 10
        steps = 0.1 * torch.arange(frames).view(1, 1, -1, 1, 1)
        return (place + steps).expand(1, 16, -1, 4, 4).clone()

    def movement(clip: torch.Tensor) -> torch.Tensor:
        return clip.diff(dim=2).abs().mean((0, 1, 3, 4))

    lines = [
        "| fusing | overlap | largest change at a seam / elsewhere | median | energy at the "
        "period, 1e-6 |",
        "|---|---|---|---|---|",
    ]
    for name, overlap, wrap in ways():
        plan = wrap(plan_windows(59, WINDOW, overlap))
        change, ramp = movement(fused(gradient(59), plan, lean=0.03)), in_ramps(plan)
        off = statistics.median(float(c) for i, c in enumerate(change) if i not in ramp)
        at = [float(c) / off for i, c in enumerate(change) if i in ramp]
        whole = wrap(plan_windows(plan.window + 5 * plan.stride, WINDOW, overlap))
        energy = energy_at(movement(fused(gradient(whole.total), whole, 0.03)), whole.stride)
        lines.append(
            f"| {name} | {overlap} | {max(at):.3f} | {statistics.median(at):.3f} | "
            f"{energy * 1e6:.0f} |"
        )
    return lines


def decoded_table() -> list[str]:
    """Lay out what decoded video shows at the seams."""
    video = MovingVideo()
    rows = [
        ("k/(O+1), WanFit", 8, plan_windows(6, 13, 8)),
        ("linear(0..1)", 8, linear_ramps(plan_windows(6, 13, 8))),
        ("independent segments", 0, plan_windows(6, 9, 0)),
    ]
    lines = ["| fusing | overlap | least | largest change |", "|---|---|---|---|"]
    for name, overlap, plan in rows:
        found = video.ratios(plan)
        lines.append(f"| {name} | {overlap} | {found.min():.3f} | {found.max():.3f} |")
    return lines


# -- journal ----------------------------------------------------------------------------------


def journal_seconds() -> tuple[float, float, int]:
    """Seconds to save the state of a UniPC run at 832x480, 81 frames, and its bytes.

    Medians of saving it, and of first making the checksum and then writing, turn by turn.
    """
    tensors = {name: torch.randn(1, 16, 21, 60, 104) for name in ("latents", "a", "b", "c")}
    parts = [t.view(-1).view(torch.uint8).numpy().data for t in tensors.values()]
    saved, in_turn = [], []
    with (
        tempfile.TemporaryDirectory(dir=ROOT) as folder,
        Journal.open(Path(folder) / "journal", {"bench": 1}, max_share=math.inf) as journal,
    ):
        for unit in range(SAVES):
            began = time.perf_counter()
            journal.save(unit, tensors)
            saved.append(time.perf_counter() - began)
            began = time.perf_counter()
            checksum = 0
            for part in parts:
                checksum = zlib.crc32(part, checksum)
            atomic_write(Path(folder) / f"{unit % 2}", lambda file: file.writelines(parts))
            in_turn.append(time.perf_counter() - began)
        return statistics.median(saved), statistics.median(in_turn), journal.state_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[81, 401, 1001, 2001])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/long_video.md")
    arguments = parser.parse_args()
    from support.tiny_models import make_folder

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        model = make_folder(Path(folder) / "model", "wan2.1-t2v")
        rows = measured(model, arguments.lengths, arguments.steps)
    seconds, in_turn, size = journal_seconds()
    busy = "quiet" if load < 0.7 * (os.cpu_count() or 1) else "busy with other work"
    text = [
        "# Long video in windows", "",
        f"Measured {time.strftime('%Y-%m-%d')} on the CPU ({platform.machine()}, "
        f"{os.cpu_count()} cores, 1 thread used, load {load:.1f} at the start: {busy}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, by "
        f"`python benchmarks/long_video.py --steps {arguments.steps}`.", "",
        "## Length", "",
        f"A small Wan 2.1 text-to-video model of the real classes, {SIZE}x{SIZE} pixels, "
        f"{arguments.steps} steps, windows of {WINDOW} frames that share {OVERLAP}, into an mp4. "
        "Traced peak: bytes of all tensors made during the render that were alive at once, weights "
        "not counted. RSS: of the process, before the render (weights read) and at its peak. Time: "
        "CPU seconds from noise to mp4 over frames, and their ratio; all lengths are made turn by "
        f"turn in one process, medians of {ROUNDS} turns.", "",
        *length_table(rows), "",
        *growth(rows),
        "Cost is latent frames predicted per step over latent frames in the clip; the "
        "formula is (1 + ceil((T - L) / (L - O))) L / T.", "",
        "## Seams", "",
        "A gradient that moves evenly; every window adds 0.3 of a frame's movement to the window "
        "before it. 1.000 means that a seam moves as fast as the rest. Energy: autocovariance of "
        "the movement at the windows' period, over the squared movement, in a clip of five whole "
        "periods; 0 is a clip that knows of no windows.", "",
        *seam_table(), "",
        "Four clips of a moving shape, encoded and decoded by the demo model's VAE, in two windows "
        "of which the second is a frame of movement ahead: the change from frame to frame, per "
        "latent frame, over that of the same clips without windows.", "",
        *decoded_table(), "",
        "## Journal", "",
        f"Saving the state of a UniPC run at 832x480, 81 frames ({size / 1e6:.1f} MB: latents and "
        f"three tensors of the solver) takes {seconds * 1e3:.0f} ms here (median of {SAVES}; "
        f"checksum, write, sync and rename), {in_turn * 1e3:.0f} ms where the disk begins only "
        "when the checksum is made, as it was before (measured turn by turn). That is so much of "
        "a step of the 14B at this size:", "",
        "| card | seconds a step | share |", "|---|---|---|",
        *(f"| {card} | {step:.1f} | {seconds / step:.2%} |" for card, step in STEP_SECONDS), "",
        "Windows within a step are saved only as often as costs 1 % of the time.", "",
    ]  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(text))
    print(arguments.output.read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        folder, *numbers = sys.argv[2:]
        print(json.dumps(child(folder, *(int(n) for n in numbers[:2]), bool(int(numbers[2])))))
    elif sys.argv[1:2] == ["--timed"]:
        folder, steps, *lengths = sys.argv[2:]
        print(json.dumps(timed(folder, [int(n) for n in lengths], int(steps), ROUNDS)))
    else:
        main()
