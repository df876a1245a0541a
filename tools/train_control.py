"""Train the demo's models that obey a control, on top of its two text-to-video experts.

    python -m tools.train_control --work .ckpt-control                   # VACE; hours on a CPU
    python -m tools.train_control --work OUT --stop-after 500 --judge 24 # in so many seconds
    python -m tools.train_control --work OUT --sort fun                  # Fun Control

Reads wan_core/demo_model/t2v, whose experts stay as they are for VACE, and writes WORK/vace_high
and WORK/vace_low.safetensors in the layout of a published VACE module (for Fun Control, whole
transformers). An unfinished one leaves a checkpoint every two minutes; run the same command again
to go on. With --judge it ends with the table of `tools.judge_control`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from . import control_clips, judge_control, training
from . import demo_models as models
from .control_models import LAYERS, SORTS, Fun, Sort
from .train_demo import EXPERTS, Way, draw_sigma, lay_out
from .training import Trainer

SEED = 20_23
LEVELS = ("high", "low")
DEMO = Path(__file__).resolve().parents[1] / "wan_core" / "demo_model" / "t2v"
DECAY = 0.998
DROPPED = 0.1
"""How often a lesson's sentence is dropped; its control never is, as both passes get the same."""
REFERENCE_SHARE = 0.3
"""Part of a batch that shows a reference."""
COMPILING = 75.0
"""Seconds the first module needs on a GPU before its training: compiling and capturing."""
SETUP = 15.0
"""The same for the second one, whose kernels are there."""
JUDGING = 45.0
"""Seconds set aside for the table."""


class Run(training.Run):
    """What both stages share besides: the frozen demo."""

    def __init__(self, args: argparse.Namespace) -> None:
        limit = args.stop_after
        limit = None if limit is None else limit - (JUDGING if args.judge else 0.0)
        super().__init__(args, "control_training.log", SEED, limit)
        self.sort: Sort = SORTS[args.sort]
        vae: Any = AutoencoderKLWan.from_pretrained(args.base / "vae").float()
        self.vae = models.frame_by_frame(vae).to(self.device)
        lay_out(self.vae, Way("fp32", channels_last=True, flat=True))
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean, device=self.device).view(shape)
        self.std = torch.tensor(vae.config.latents_std, device=self.device).view(shape)
        self.table = self._embedded()

    @torch.no_grad()
    def _embedded(self) -> Tensor:
        """Return every sentence's embedding, those of `models.NEGATIVE_PROMPTS` last."""
        encoder = UMT5EncoderModel.from_pretrained(self.args.base / "text_encoder").float()
        tokenizer = AutoTokenizer.from_pretrained(self.args.base / "tokenizer")
        out = tokenizer(
            [*control_clips.sentences(), *models.NEGATIVE_PROMPTS],
            padding="max_length", max_length=models.TEXT_LENGTH, return_tensors="pt",
        )  # fmt: skip
        return models.embed(encoder, out.input_ids, out.attention_mask).to(self.device)

    def amp(self) -> torch.autocast:
        """Return bf16 autocast on a GPU, plain float32 on a CPU."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator of lessons."""
        return torch.Generator(self.device).manual_seed(SEED + seed)

    def lessons(self, count: int, kinds: dict[str, float], seed: int) -> control_clips.Lessons:
        """Draw lessons reproducibly on the run's device."""
        return control_clips.draw_lessons(count, kinds, self.device, self.generator(seed))

    def seconds(self, left: int) -> float:
        """Return how long one of so many stages that are left may train."""
        if self.args.seconds:
            return float(self.args.seconds)
        if self.args.stop_after is None:
            return 240.0
        assert self.clock.limit is not None
        setup = COMPILING if left == len(LEVELS) else SETUP
        free = self.clock.limit - self.clock.elapsed() - setup - SETUP * (left - 1)
        return float(max(1.0, free / left))

    def module_path(self, level: str) -> Path:
        """Return where what was trained for an expert is."""
        return self.work / f"{self.sort.name}_{level}.safetensors"

    def model(self, level: str) -> Any:
        """Return an expert's model, trained if there is one, ready to train."""
        folder = self.args.base / ("transformer" if level == "high" else "transformer_2")
        expert: Any = WanTransformer3DModel.from_pretrained(folder).float()
        model: Any = self.sort.build(expert, self.args.layers)
        path = self.module_path(level)
        if path.exists():
            model.load_state_dict(load_file(path), strict=False)
        model.to(self.device).set_attn_processor(models.PaddingProcessor())
        return model


@torch.no_grad()
def encode(run: Run, clip: Tensor) -> Tensor:
    """Return the normalised latents of clips (N, 3, F, H, W) in -1..1."""
    clip = clip.contiguous(memory_format=torch.channels_last_3d)
    latents = run.vae.encode(clip).latent_dist.mode().contiguous()
    return (latents - run.mean) / run.std


def encode_lessons(run: Run, lessons: control_clips.Lessons) -> tuple[Tensor, Tensor]:
    """Return what is to be made and the control, of 64 lessons at a time."""
    clean, control = [], []
    for first in range(0, len(lessons), 64):
        part = lessons.only(torch.arange(first, min(first + 64, len(lessons))))
        made, shown = run.sort.encode(part, partial(encode, run))
        clean.append(made)
        control.append(shown.half())
    return torch.cat(clean), torch.cat(control)


class Pool:
    """Lessons of one sort, encoded: what is to be made, its control, its sentence."""

    def __init__(self, run: Run, count: int, kinds: dict[str, float], seed: int) -> None:
        clean, control, rows = [], [], []
        for index in range(0, count, 512):
            lessons = run.lessons(min(512, count - index), kinds, seed + index)
            made, shown = encode_lessons(run, lessons)
            clean.append(made)
            control.append(shown)
            rows.append(lessons.row)
        self.clean, self.control, self.row = torch.cat(clean), torch.cat(control), torch.cat(rows)


def flow_loss(
    run: Run, level: str, model: nn.Module, pools: list[tuple[Pool, int]]
) -> Callable[[], Tensor]:
    """Return a flow-matching loss that draws so many lessons of each pool."""
    whole = sum(count for _, count in pools)
    sentences, negatives = len(control_clips.sentences()), len(models.NEGATIVE_PROMPTS)

    def part(pool: Pool, count: int) -> Tensor:
        rows = torch.randint(len(pool.clean), (count,), device=run.device)
        clean = pool.clean[rows]
        noise = torch.randn_like(clean)
        sigma = draw_sigma(run, f"t2v_{level}", count)  # type: ignore[arg-type]
        at = sigma[:, None, None, None, None]
        other = sentences + torch.randint(negatives, (count,), device=run.device)
        dropped = torch.rand(count, device=run.device) < DROPPED
        text = run.table[torch.where(dropped, other, pool.row[rows])]
        with run.amp():
            shown = pool.control[rows].float()
            guess = run.sort.call(model, (1 - at) * clean + at * noise, shown, sigma * 1000, text)
        return (guess.float() - (noise - clean)).square().mean()

    def loss() -> Tensor:
        return torch.stack([part(pool, n) * (n / whole) for pool, n in pools if n]).sum()

    return loss


def write_parts(parts: dict[str, nn.Module], target: Path) -> None:
    """Write what was trained in half precision, whole or not at all."""
    state = {
        f"{prefix}{key}": value.detach().half().cpu().contiguous()
        for prefix, part in parts.items()
        for key, value in part.state_dict().items()
    }
    save_file(state, target.with_suffix(".tmp"), metadata={"format": "pt"})
    target.with_suffix(".tmp").replace(target)


def train(run: Run, level: str, pools: list[tuple[Pool, int]], left: int) -> None:
    """Train what one expert needs to obey and write it."""
    model: Any = run.model(level)
    if run.device.type == "cuda" and not run.args.no_compile:
        model.compile_repeated_blocks(dynamic=False)
    parts = run.sort.parts(model)
    name = f"{run.sort.name}_{level}"
    peak = run.sort.peak * run.args.rate
    trainer = Trainer(name, list(parts.values()), peak, run.work, run.clock, run.say, DECAY)
    trainer.resume()
    loss = flow_loss(run, level, model, pools)
    trainer.run(loss, 1.0, run.args.steps, run.seconds(left))
    trainer.swap()
    target = run.module_path(level)
    write_parts(parts, target)
    (run.work / f"{name}.partial").unlink(missing_ok=True)
    size = target.stat().st_size / 1e6
    run.say(f"{name}: finished after {trainer.step} steps, {size:.2f} MB")


@torch.no_grad()
def sample(
    run: Run, experts: dict[str, Any], rows: Tensor, control: Tensor, steps: int = 20
) -> Tensor:
    """Make clips (N, FRAMES, SIZE, SIZE, 3), 0..1, for sentences and controls, all at once.

    With the demo's recipe: UniPC, its flow shift, boundary and guidance.
    """
    from diffusers import UniPCMultistepScheduler

    boundary, _, shift = EXPERTS["t2v_high"]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps, device=run.device)
    # Fun's reference is no part of the latents, VACE's is.
    frames_ = models.LATENT_SHAPE[1] if run.sort is Fun else control.shape[2]
    latents = torch.randn(
        (len(rows), 16, frames_, *control.shape[3:]), device=run.device, generator=run.generator(99)
    )
    text = torch.cat([run.table[rows], run.table[-len(models.NEGATIVE_PROMPTS)].expand(
        len(rows), -1, -1)])  # fmt: skip
    both = control.float().repeat(2, 1, 1, 1, 1)
    for timestep in scheduler.timesteps:
        level = "high" if timestep >= boundary * 1000 else "low"
        when = timestep.expand(2 * len(rows))
        with run.amp():
            twice = latents.repeat(2, 1, 1, 1, 1)
            guess = run.sort.call(experts[level], twice, both, when, text).float()
        told, free = guess.chunk(2)
        scale = judge_control.SCALES[level]
        latents = scheduler.step(free + scale * (told - free), timestep, latents)[0]
    latents = latents[:, :, -models.LATENT_SHAPE[1] :]
    frames = [
        run.vae.decode(one.contiguous(memory_format=torch.channels_last_3d)).sample
        for one in (latents * run.std + run.mean).split(16)
    ]
    return (torch.cat(frames).permute(0, 2, 3, 4, 1) * 0.5 + 0.5).clamp(0, 1)


def draw_sheet(target: Path, lessons: control_clips.Lessons, frames: Tensor) -> None:
    """Write a picture: of eight controls three frames and the reference, and what was made."""
    rows = []
    for index, made in enumerate(frames[:8]):
        shown = lessons.video[index].permute(1, 2, 3, 0).cpu()
        picture = lessons.reference[index].permute(1, 2, 0)[None].cpu()
        rows.append(torch.cat([*shown[::8], *picture, *made[::2]], 1))
    Image.fromarray((torch.cat(rows) * 255).round().byte().numpy()).save(target)


def judged(run: Run) -> None:
    """Make clips of fresh lessons and say what the judge found."""
    experts = {level: run.model(level).eval() for level in LEVELS}
    run.say(judge_control.HEAD)
    for kinds in run.sort.kinds:
        for name in kinds:
            found = judge_control.Score(name)
            lessons = run.lessons(run.args.judge, {name: 1.0}, 7_000_000)
            _, control = encode_lessons(run, lessons)
            frames = sample(run, experts, lessons.row, control).cpu()
            for index in range(len(lessons)):
                found.add(judge_control.asked(lessons, index), frames[index])
            run.say(str(found))
            draw_sheet(run.work / f"{run.sort.name}_{name.replace(' ', '_')}.png", lessons, frames)


def main() -> None:
    """Train the modules that are not finished yet; judge them if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", required=True, help="folder of checkpoints, modules and log")
    parser.add_argument("--sort", choices=SORTS, default="vace", help="which model is trained")
    parser.add_argument("--base", type=Path, default=DEMO, help="the trained demo's t2v folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="steps a module (otherwise by --seconds)")
    parser.add_argument("--seconds", type=float, help="seconds a module")
    parser.add_argument("--stop-after", type=float, help="end after so many seconds, all in all")
    parser.add_argument("--lessons", type=int, default=49152, help="lessons in the pools")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layers", type=int, default=LAYERS, help="VACE blocks a module has")
    parser.add_argument("--rate", type=float, default=1.0, help="learning rate times this")
    parser.add_argument("--judge", type=int, default=0, help="judge so many clips of each kind")
    parser.add_argument("--further", action="store_true", help="train WORK's modules further")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the blocks")
    run = Run(parser.parse_args())
    run.say(f"torch {torch.__version__} on {run.args.device}, seed {SEED}, {vars(run.args)}")
    left = [level for level in LEVELS if run.args.further or not run.module_path(level).exists()]
    if left:
        shown = round(run.args.lessons * REFERENCE_SHARE)
        drawn = round(run.args.batch * REFERENCE_SHARE)
        plain, showing = run.sort.kinds
        pools = [
            (Pool(run, run.args.lessons - shown, plain, 0), run.args.batch - drawn),
            (Pool(run, shown, showing, 1_000_000), drawn),
        ]
        run.say(f"{run.args.lessons} lessons encoded")
        for index, level in enumerate(left):
            train(run, level, pools, len(left) - index)
    if run.args.judge:
        judged(run)


if __name__ == "__main__":
    main()
