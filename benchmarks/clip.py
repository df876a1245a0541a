"""How long does a whole clip take? Four steps of Wan 2.2 T2V-A14B, from the files to the mp4.

    python benchmarks/speed.py --part clip [--budget 530] [--folder FOLDER] [--tiny]

832x480, 81 frames, four steps without guidance, two with each expert, at the levels of the lightx2v
distillation. Files of true shape with random weights lie in /dev/shm where there is room, so that
reading them is reading the page cache. For each way the first run comes after everything of the
model was dropped (cold), the next ones find what the first one left (warm).

- exact, fast: the product on a pair in bf16, at both speeds; then on a pair stored in fp8, where
  fast multiplies in 8 bit, and fastest attends in 8 bit too; fast also without an mp4, which is
  then made of the frames, to see which of decoder and encoder is waited for;
- diffusers: its ``WanPipeline`` on the same bf16 files, both experts and the VAE (fp32, as its
  documentation has it) resident. The text is encoded and its encoder dropped before the clock
  starts; a writer like ours makes its mp4 after the decode. Beside the forwards it is given their
  14B as both experts, and a text of random embeddings: what it computes is as much, and no file
  has to be written or read.

Seconds outside of stages are those in which none ran, and the JSON has between which stages they
were; stages that ran beside others are marked. What the result warns of and what was applied is in
the JSON of each clip of ours. Kernels that Triton had not kept on the disk are compiled in the
first clip that uses them: how many files a clip has added to Triton's folder is told with it. The
last clip is exact and cold once more, with kernels, libraries and CUDA's context there.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from gpu_memory import SMALL, TINY, TINY_SIZE
from random_model import Shapes, write_model
from speed_bench import Bench
from stored_layers import TINY_SHAPES
from stored_model import StoredModel
from support.tiny_models import make_scheduler
from support.true_models import autoencoder
from torch import Tensor

from wan_core import GenerationConfig, WanModelFiles, WanPipelineLoader
from wan_core.config import StageReport
from wan_core.loading import component_cache
from wan_core.render.report import Timeline
from wan_core.render.video import VideoWriter

STEPS, SHIFT, FPS = 4, 5.0, 16
BF16_BYTES, FP8_BYTES = 42e9, 23e9
"""What the files of a pair take, both experts being one file under two names."""
PARTS = {"clip-diffusers": 40.0, "clip-bf16": 230.0, "clip-fp8": 130.0}
"""About how many seconds each takes on an H200, files included. Estimated."""
BRIEFLY = {"exact": 50.0, "fast": 32.0, "fastest": 28.0}
"""The same of the speeds of a brief run, which are made once cold and once warm."""


def clips(bench: Bench, part: str, base: Path | None) -> None:
    """Measure one part of ``PARTS``; rows go to ``bench.found["clips"]``."""
    if part == "clip-diffusers":
        with _folder(base, 0) as folder:
            theirs(bench, *_their_parts(bench), folder, ("first", "warm"))
        return
    bench.drop_models()
    needed = BF16_BYTES if part == "clip-bf16" else FP8_BYTES
    with _folder(base, 0 if bench.tiny else needed) as folder:
        begun = time.perf_counter()
        (_bf16 if part == "clip-bf16" else _fp8)(bench, folder, begun)
        component_cache().clear()


@contextmanager
def _folder(base: Path | None, needed: float) -> Iterator[Path]:
    """Make a folder in shared memory, or where temporary files go; remove it at the end."""
    shared = Path("/dev/shm")
    if base is None and shared.is_dir() and shutil.disk_usage(shared).free > needed + 2e9:
        base = shared
    with tempfile.TemporaryDirectory(dir=base) as name:
        yield Path(name)


def _bf16(bench: Bench, folder: Path, begun: float) -> None:
    model = folder / "model"
    write_model(model, TINY if bench.tiny else Shapes(), 2**12 if bench.tiny else 64 * 2**20)
    bench.say(f"bf16 files written in {time.perf_counter() - begun:.0f} s")
    for speed in ("exact", "fast"):
        ours(bench, model, "bf16", speed, folder)
    component_cache().clear()
    theirs(bench, *_their_files(bench, model), folder)


def _fp8(bench: Bench, folder: Path, begun: float) -> None:
    shapes, numbers = (TINY_SHAPES, 2**14) if bench.tiny else (Shapes(), 2**24)
    stored = StoredModel(folder / "model", shapes, numbers)
    stored.write_rest()
    stored.transformer("fp8_scaled")
    bench.say(f"fp8 files written in {time.perf_counter() - begun:.0f} s")
    if bench.brief:
        for speed, needs in BRIEFLY.items():
            if bench.has_time(f"clip-fp8, {speed}", needs):
                ours(bench, stored.files(), "fp8", speed, folder, ("cold", "warm"))
        return
    for speed in ("exact", "fast", "fastest"):
        ours(bench, stored.files(), "fp8", speed, folder)
    ours(bench, stored.files(), "fp8", "exact", folder, ("cold, kernels kept",))


def ours(
    bench: Bench, model: Path | WanModelFiles, kind: str, speed: str, folder: Path,
    names: Sequence[str] = ("cold", "warm", "warm again"),
) -> None:  # fmt: skip
    """Make the clip with the product, the first time cold, then warm."""
    component_cache().clear()
    wishes = {"device": str(bench.device), "speed": speed}
    if bench.device.type == "cpu":
        wishes["precision"] = "bf16"
    wrapper = WanPipelineLoader().load_wan_pipeline(model, optimization_config=wishes)
    width, height, frames = TINY_SIZE if bench.tiny else SMALL
    config = GenerationConfig(
        prompt="a cat moves right", width=width, height=height, num_frames=frames, seed=0,
        num_inference_steps=STEPS, switch_step=STEPS // 2, flow_shift=SHIFT, fps=FPS,
        guidance_scale=1.0, guidance_scale_2=1.0, scheduler="euler", sigma_schedule="simple",
        output_path=folder / "ours.mp4", return_frames=False,
    )  # fmt: skip
    for name in names:
        made, row = _watched(bench, wrapper, config)
        _keep(bench, kind, speed, name, row, folder / "ours.mp4")
    if speed != "fast" or bench.brief:
        return
    # The frames of random weights are hard to compress: is it the encoder that is waited for?
    config = replace(config, output_path=None, return_frames=True)
    made, row = _watched(bench, wrapper, config)
    path = folder / "alone.mp4"
    begun = time.perf_counter()
    with VideoWriter(path, fps=FPS, width=width, height=height) as writer:
        writer.write(made.frames.cpu())
    row["stages"]["mp4 of these frames, afterwards"] = time.perf_counter() - begun
    _keep(bench, kind, speed, "warm, frames returned", row, path)


def _watched(bench: Bench, wrapper: Any, config: GenerationConfig) -> tuple[Any, dict[str, Any]]:
    """Generate, and return the result with what is kept of it."""
    spans: list[tuple[str, float, float]] = []
    plain, told = Timeline.stage, []

    @contextmanager
    def noted(timeline: Timeline, name: str) -> Iterator[StageReport]:
        begun = time.perf_counter()
        try:
            with plain(timeline, name) as report:
                yield report
        finally:
            spans.append((name, begun, time.perf_counter()))

    def run() -> tuple[float, float]:
        begun = time.perf_counter()
        told.append(wrapper.generate(config))
        return begun, time.perf_counter()

    known = triton_files()
    with patch.object(Timeline, "stage", noted):
        seconds, peak, (begun, ended) = bench.timed(run)
    made = told[-1].raise_for_error()
    gaps = outside(spans, begun, ended)
    return made, {
        "seconds": seconds, "peak": peak,
        "stages": stage_seconds(made.stages, [name for name, _, _ in spans]),
        "outside": sum(gap["seconds"] for gap in gaps),
        "gaps": [gap for gap in gaps if gap["seconds"] >= 0.02],
        "notes": {stage.name: stage.note for stage in made.stages if stage.note},
        "warnings": list(made.warnings), "applied": list(made.applied_optimizations),
        "compiled": len(triton_files() - known), "compiled_before": len(known),
    }  # fmt: skip


def stage_seconds(stages: Sequence[StageReport], waited: Sequence[str]) -> dict[str, float]:
    """Return the seconds of stages by name; those that were not waited for say so."""
    found: dict[str, float] = {}
    left = Counter(waited)
    for stage in stages:
        left[stage.name] -= 1
        name = stage.name if left[stage.name] >= 0 else f"{stage.name} (beside others)"
        found[name] = found.get(name, 0.0) + stage.seconds
    return found


def outside(
    spans: Sequence[tuple[str, float, float]], begun: float, ended: float
) -> list[dict[str, Any]]:
    """Return the times between ``begun`` and ``ended`` in which no stage ran: after and before
    which stage, and their seconds. Stages may lie within others."""
    found, reached, last = [], begun, "the beginning"
    for name, first, until in [*sorted(spans, key=lambda s: s[1]), ("the end", ended, ended)]:
        if first > reached:
            found.append({"after": last, "before": name, "seconds": first - reached})
        if until >= reached:
            reached, last = until, name
    return found


def triton_files() -> set[str]:
    """Return the names of what Triton keeps on the disk: a folder for each compiled kernel."""
    place = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return {entry.name for entry in place.iterdir()} if place.is_dir() else set()


def _their_files(bench: Bench, model: Path) -> tuple[Any, Tensor]:
    """Return diffusers' pipeline on the files of a model, and the embeddings of a text."""
    vae = AutoencoderKLWan.from_pretrained(model / "vae", torch_dtype=torch.float32)
    pipe: Any = WanPipeline.from_pretrained(model, vae=vae, torch_dtype=torch.bfloat16)
    pipe.text_encoder.to(bench.device)
    with torch.no_grad():
        text: Tensor = pipe.encode_prompt(
            "a cat moves right", do_classifier_free_guidance=False, device=bench.device
        )[0]
    pipe.text_encoder = None
    gc.collect()
    for part in (pipe.transformer, pipe.transformer_2, pipe.vae):
        part.to(bench.device)
        gc.collect()
    return pipe, text


def _their_parts(bench: Bench) -> tuple[Any, Tensor]:
    """Return diffusers' pipeline on the 14B of the forwards, and embeddings of no text."""
    if bench.models is None:
        raise RuntimeError("the transformer of the forwards is needed, and was not made")
    model = bench.models.plain
    with bench.device:
        vae: Any = autoencoder((TINY if bench.tiny else Shapes()).vae).eval().requires_grad_(False)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=make_scheduler(), transformer=model,
        transformer_2=model, boundary_ratio=0.875,
    )  # fmt: skip
    text = torch.randn(1, 512, model.config.text_dim, device=bench.device, dtype=torch.bfloat16)
    return pipe, text


@torch.no_grad()
def theirs(
    bench: Bench, pipe: Any, text: Tensor, folder: Path,
    names: Sequence[str] = ("first", "warm", "warm again"),
) -> None:  # fmt: skip
    """Make the clip with diffusers' pipeline: once to warm up, then warm."""
    width, height, frames = TINY_SIZE if bench.tiny else SMALL
    pipe.set_progress_bar_config(disable=True)

    def run() -> None:
        video = pipe(
            prompt_embeds=text, width=width, height=height, num_frames=frames,
            num_inference_steps=STEPS, guidance_scale=1.0, guidance_scale_2=1.0,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).frames[0]  # fmt: skip
        with VideoWriter(folder / "theirs.mp4", fps=FPS, width=width, height=height) as writer:
            writer.write(video.permute(0, 2, 3, 1).float().cpu())

    for name in names:
        seconds, peak, _ = bench.timed(run)
        row = {"seconds": seconds, "peak": peak, "stages": {}}
        _keep(bench, "bf16", "diffusers", name, row, folder / "theirs.mp4")


def _keep(bench: Bench, kind: str, way: str, name: str, row: dict[str, Any], path: Path) -> None:
    assert path.stat().st_size > 0
    path.unlink()
    bench.found["clips"].append({"files": kind, "way": way, "run": name, **row})
    bench.say(f"clip, {kind}, {way}, {name}: {row['seconds']:.1f} s ({_stages_of(row)})")
    for text in row.get("warnings", ()):
        bench.say(f"  warned: {text}")
    if "applied" in row:
        bench.say(f"  applied: {', '.join(row['applied'])}")
    bench.save()


def _stages_of(row: dict[str, Any]) -> str:
    parts = [f"{name} {taken:.1f}" for name, taken in row["stages"].items()]
    if "outside" in row:
        parts.append(f"outside of stages {row['outside']:.1f}")
    return ", ".join(parts)


def _compiled(row: dict[str, Any]) -> str:
    """Say how many kernels Triton compiled in a clip, and whether it had any to begin with."""
    if not row.get("compiled"):
        return "0" if "compiled" in row else "-"
    return f"{row['compiled']}{' (none kept before)' if not row['compiled_before'] else ''}"


def clip_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of the clips, as lines of Markdown."""
    lines = ["", "## Four steps of A14B at 480p81, files to mp4", ""]
    lines += ["| files | way | run | s | stages, s | peak GiB | Triton compiled |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['files']} | {row['way']} | {row['run']} | {row['seconds']:.1f} | "
            f"{_stages_of(row) or '-'} | {row['peak'] / 2**30:.1f} | {_compiled(row)} |"
        )
    return lines


def parts(bench: Bench, base: Path | None) -> dict[str, tuple[float, Callable[[], None]]]:
    """Return what can be measured: seconds it needs, and the work."""
    needed = PARTS | ({"clip-fp8": 60.0} if bench.brief else {})
    return {name: (needs, partial(clips, bench, name, base)) for name, needs in needed.items()}
