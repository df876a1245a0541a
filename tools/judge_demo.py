"""Measure the demo model with the judge and print the table of its model card.

python -m tools.judge_demo --model wan_core/demo_model --prompts 90
python -m tools.judge_demo --model wan_core/demo_model --tasks --long 12    # 65 frames by windows
python -m tools.judge_demo --prompts 24 --speeds exact fast fastest         # what a speed costs
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.config import SPEEDS
from wan_core.render import contact_sheet

from . import clips, judge

Cell = tuple[str, str, str, str]
SCALES = {"t2v": (2.0, 1.5), "i2v": (2.0, 2.0)}
"""Guidance of the high- and low-noise expert in the shipped recipe."""
STEPS = 20


def open_pipeline(model: Path, task: str) -> Any:
    """Open one of the two folders with diffusers' own pipeline, in float32."""
    kind = WanImageToVideoPipeline if task == "i2v" else WanPipeline
    pipeline = kind.from_pretrained(model / task, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def spread(count: int) -> list[Cell]:
    """Return `count` cells of the grid, evenly: every colour, shape, direction and background."""
    cells = clips.grid()
    return [cells[(index * 131) % len(cells)] for index in range(count)]


def first_frame(cell: Cell, seed: int) -> torch.Tensor:
    """Render the start image of a cell: float (1, 3, SIZE, SIZE) in -1..1."""
    return clips.render(clips.scene_of(*cell, seed=seed), 1)[:, :, 0] * 2 - 1


def generate(pipeline: Any, task: str, cell: Cell, seed: int, **changes: Any) -> torch.Tensor:
    """Return a clip, float (FRAMES, SIZE, SIZE, 3) in 0..1, with the shipped recipe."""
    template = "full" if task == "t2v" else "motion"
    arguments: dict[str, Any] = {
        "prompt": clips.sentence(*cell, template=template),
        "negative_prompt": "",
        "height": clips.SIZE,
        "width": clips.SIZE,
        "num_frames": clips.FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": SCALES[task][0],
        "guidance_scale_2": SCALES[task][1],
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
    }
    if task == "i2v":
        arguments["image"] = first_frame(cell, seed)
    frames: torch.Tensor = pipeline(**{**arguments, **changes}).frames[0]
    return frames.permute(0, 2, 3, 1).float()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of values in 0..1."""
    return float(-10 * torch.log10((a - b).square().mean().clamp(min=1e-10)))


def round_trip(vae: Any, count: int, seed: int = 1) -> float:
    """Return the mean PSNR in dB over fresh clips through encode and decode."""
    frames = clips.render(clips.sample_scenes(count, generator=torch.Generator().manual_seed(seed)))
    values = []
    with torch.no_grad():
        for clip in frames.split(1):
            latents = vae.encode(clip * 2 - 1).latent_dist.mode()
            values.append(psnr(vae.decode(latents).sample * 0.5 + 0.5, clip))
    return sum(values) / len(values)


class Score:
    """Counts, over clips, of what the judge found right."""

    def __init__(self) -> None:
        self.clips = 0
        self.right = dict.fromkeys(("colour", "shape", "direction", "background", "steady"), 0)
        self.start: list[float] = []

    def add(self, cell: Cell, frames: torch.Tensor) -> judge.Reading:
        """Judge a clip that should show a cell."""
        reading = judge.read_clip(frames)
        self.clips += 1
        for name, wanted in zip(("colour", "shape", "direction", "background"), cell, strict=True):
            self.right[name] += getattr(reading, name) == wanted
        self.right["steady"] += reading.steady() and reading.shape == cell[1]
        return reading

    def share(self, name: str) -> float:
        """Return the share of clips, 0..1, in which `name` was right."""
        return self.right[name] / max(1, self.clips)

    def __str__(self) -> str:
        parts = [f"{name} {100 * self.share(name):.1f} %" for name in self.right]
        if self.start:
            parts.append(f"first frame {min(self.start):.1f} dB at least")
        return f"{self.clips} clips: " + ", ".join(parts)


def measure(
    pipeline: Any, task: str, count: int, **changes: Any
) -> Iterator[tuple[Cell, torch.Tensor, judge.Reading, Score]]:
    """Generate and judge `count` clips over the grid, yielding each with the score so far."""
    score = Score()
    for seed, cell in enumerate(spread(count)):
        frames = generate(pipeline, task, cell, seed, **changes)
        if task == "i2v":
            start = first_frame(cell, seed)[0].permute(1, 2, 0) * 0.5 + 0.5
            score.start.append(psnr(frames[0], start))
        yield cell, frames, score.add(cell, frames), score


LONG = {"num_frames": 65, "max_chunk_size": 49, "window_overlap": 44, "window_fusion": "causal"}
"""How a clip longer than the model's own is made."""


def measure_long(model: Path, count: int) -> Iterator[tuple[Cell, int, int]]:
    """Make long clips by windows; yield (cell, frames that are right, frames) of each."""
    wrapper = WanPipelineLoader().load_wan_pipeline(
        model / "t2v", optimization_config={"device": "cpu", "precision": "fp32"}
    )
    for seed, cell in enumerate(spread(count)):
        size: dict[str, Any] = {"width": clips.SIZE, "height": clips.SIZE, **LONG}
        result = wrapper.generate(
            GenerationConfig(
                prompt=clips.sentence(*cell), seed=seed, num_inference_steps=STEPS, **size
            )
        )
        result.raise_for_error()
        frames = judge.read_clip(result.frames.reshape(-1, clips.SIZE, clips.SIZE, 3)).frames
        right = sum((frame.colour, frame.shape) == cell[:2] for frame in frames)
        yield cell, right, len(frames)


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the structural similarity of two clips (frames, height, width, 3) in 0..1.

    Wang et al. 2004, with windows of 7x7 pixels of equal weight, the mean over frames and colours.
    """

    def averaged(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(values, 7, stride=1)

    x, y = (clip.permute(0, 3, 1, 2).double() for clip in (a, b))
    mean_x, mean_y = averaged(x), averaged(y)
    spread_x, spread_y = averaged(x * x) - mean_x**2, averaged(y * y) - mean_y**2
    both = averaged(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (spread_x + spread_y + c2))).mean())


SHARES = ("colour", "shape", "direction", "background", "steady")


def measure_speeds(
    model: Path, task: str, count: int, speeds: list[str], **options: Any
) -> Iterator[str]:
    """Yield a table: for each speed the judge's shares, PSNR and SSIM beside exact, forwards."""
    exact: list[torch.Tensor] = []
    known: dict[str, str] = {}
    yield (
        f"| {task} | " + " | ".join(SHARES) + " | PSNR dB | SSIM | forwards | seconds a clip |\n"
        f"|---|{'---|' * (len(SHARES) + 4)}"
    )
    for speed in dict.fromkeys(("exact", *speeds)):
        wrapper = WanPipelineLoader().load_wan_pipeline(
            model / task, optimization_config={"speed": speed, **options}
        )
        how = str(wrapper.plan(_job(task, spread(1)[0], 0))[1].choices)
        if how in known:
            yield f"| {speed} | the same plan as {known[how]} on this machine |"
            continue
        known[how] = speed
        score, ratios, likeness, made = Score(), [], [], 0.0
        began = time.perf_counter()
        for seed, cell in enumerate(spread(count)):
            result = wrapper.generate(_job(task, cell, seed)).raise_for_error()
            frames = result.frames.reshape(-1, clips.SIZE, clips.SIZE, 3)
            score.add(cell, frames)
            if speed == "exact":
                exact.append(frames)
            ratios.append(psnr(frames, exact[seed]))
            likeness.append(ssim(frames, exact[seed]))
            found, whole = result.metadata.get("forwards", "1 of 1").split()[:3:2]
            made += int(found) / int(whole)
        seconds = (time.perf_counter() - began) / count
        shares = " | ".join(f"{100 * score.share(name):.1f} %" for name in SHARES)
        alike = (
            "equal | 1"
            if speed == "exact"
            else (f"{sum(ratios) / count:.1f} | {sum(likeness) / count:.3f}")
        )
        yield f"| {speed} | {shares} | {alike} | {100 * made / count:.0f} % | {seconds:.2f} |"


def _job(task: str, cell: Cell, seed: int) -> GenerationConfig:
    """Return the job of a cell with the shipped recipe."""
    template = "full" if task == "t2v" else "motion"
    job = GenerationConfig(
        prompt=clips.sentence(*cell, template=template), width=clips.SIZE, height=clips.SIZE,
        num_frames=clips.FRAMES, seed=seed,
    )  # fmt: skip
    if task == "i2v":
        job.image = (first_frame(cell, seed)[0] * 0.5 + 0.5).permute(1, 2, 0)
    return job


def main() -> None:
    """Measure both pairs, print the table, and write a contact sheet of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("wan_core/demo_model"))
    parser.add_argument("--prompts", type=int, default=90)
    tasks = ["t2v", "i2v"]
    parser.add_argument("--tasks", nargs="*", default=tasks, help=f"of {', '.join(tasks)}")
    parser.add_argument("--long", type=int, default=0, help="also so many clips of 65 frames")
    parser.add_argument("--speeds", nargs="*", default=[], help="compare speeds in place of it all")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--wrong", action="store_true", help="list what was misread")
    args = parser.parse_args()
    for name, known in (("tasks", tasks), ("speeds", list(SPEEDS))):
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    say = sys.stdout.write
    if args.speeds:
        for task in args.tasks:
            for line in measure_speeds(args.model, task, args.prompts, args.speeds):
                say(f"{line}\n")
                sys.stdout.flush()
        return
    for task in args.tasks:
        pipeline = open_pipeline(args.model, task)
        if task == "t2v":
            say(f"vae round trip: {round_trip(pipeline.vae, 64):.2f} dB mean of 64 fresh clips\n")
        rows = []
        began = time.perf_counter()
        for cell, frames, reading, score in measure(pipeline, task, args.prompts):
            total = score
            rows.append(frames[::4])
            found = (reading.colour, reading.shape, reading.direction, reading.background)
            if args.wrong and (found != cell or not reading.steady()):
                say(f"  {' '.join(cell)} -> {' '.join(found)} steady={reading.steady()}\n")
        seconds = (time.perf_counter() - began) / args.prompts
        say(f"{task}: {total}, {seconds:.2f} s a clip\n")
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            sheet = contact_sheet(torch.cat(rows[:24]), columns=15)
            sheet.save(args.sheets / f"{task}.png")
    if args.long:
        whole = 0
        for cell, right, made in measure_long(args.model, args.long):
            whole += right == made
            say(f"  long: {' '.join(cell)}: {right} of {made} frames right\n")
        say(f"long: every frame right in {whole} of {args.long} clips\n")


if __name__ == "__main__":
    main()
