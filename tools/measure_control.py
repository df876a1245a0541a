"""Make controlled clips with the demo by wan_core, judge them, and print the table.

python -m tools.measure_control --clips 10           # the models that ship, on the CPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_core import GenerationConfig, WanControl, WanPipelineLoader
from wan_core.config import demo_model
from wan_core.render import contact_sheet

from . import clips, control_clips
from .control_models import SORTS
from .judge_control import HEAD, Score, Verdict, asked

SEED = 2024
"""Of the lessons that are judged; training has others."""
KINDS = {
    sort: tuple(kind for kinds in model.kinds for kind in kinds) for sort, model in SORTS.items()
}
"""What each model can be asked for."""


def control_of(lessons: control_clips.Lessons, index: int) -> WanControl | None:
    """Return one of the lessons as a control of a job; None where nothing is shown."""
    kind = lessons.kinds[int(lessons.kind[index])]
    video, mask = lessons.video[index].permute(1, 2, 3, 0), lessons.mask[index]
    if kind == "free":
        return None
    given: dict[str, Any] = {"video": video, "mask": mask}
    if kind == "frames":
        known = (mask.amax((1, 2)) < 0.5).nonzero().flatten()
        given = {"keyframes": video[known], "positions": [int(at) for at in known]}
    elif bool((mask > 0.5).all()):
        given = {"video": video}
    if kind.startswith("reference"):
        given["reference"] = lessons.reference[index].permute(1, 2, 0)[None]
        if kind == "reference":
            del given["video"]
    return WanControl(**given)


def measure(wrapper: Any, kind: str, count: int) -> Iterator[tuple[Verdict, Tensor, Score]]:
    """Make and judge clips of fresh lessons of a kind, with the score so far."""
    generator = torch.Generator().manual_seed(SEED)
    lessons = control_clips.draw_lessons(count, {kind: 1.0}, "cpu", generator)
    score = Score(kind)
    for index in range(count):
        job = GenerationConfig(
            prompt=control_clips.sentences()[int(lessons.row[index])], seed=index,
            width=clips.SIZE, height=clips.SIZE, num_frames=clips.FRAMES,
            control=control_of(lessons, index),
        )  # fmt: skip
        made = wrapper.generate(job).raise_for_error().frames.reshape(-1, clips.SIZE, clips.SIZE, 3)
        yield score.add(asked(lessons, index), made), made, score


def main() -> None:
    """Print the tables of the models that ship."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=10, help="clips of each kind")
    parser.add_argument("--sorts", nargs="*", choices=SORTS, default=[*SORTS])
    parser.add_argument("--kinds", nargs="*", help="of these kinds alone")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    args = parser.parse_args()
    known = {kind: None for sort in args.sorts for kind in KINDS[sort]}
    if unknown := set(args.kinds or ()) - set(known):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    for sort in args.sorts:
        wrapper = WanPipelineLoader().load_wan_pipeline(
            demo_model(sort), optimization_config={"device": "cpu", "precision": "fp32"}
        )
        sys.stdout.write(f"{sort}:\n{HEAD}\n")
        for kind in KINDS[sort]:
            if args.kinds and kind not in args.kinds:
                continue
            rows, score = [], Score(kind)
            for _, made, now in measure(wrapper, kind, args.clips):
                rows.append(made[::4])
                score = now
            sys.stdout.write(f"{score}\n")
            sys.stdout.flush()
            if args.sheets:
                args.sheets.mkdir(parents=True, exist_ok=True)
                sheet = contact_sheet(torch.cat(rows[:24]), columns=15)
                sheet.save(args.sheets / f"{sort}_{kind.replace(' ', '_')}.png")


if __name__ == "__main__":
    main()
