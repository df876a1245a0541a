"""Train the demo model from nothing: VAE, text encoder and base, four experts.

    python -m tools.train_demo --work .ckpt                    # everything; hours on a CPU
    python -m tools.train_demo --work .ckpt --stages vae base  # some stages; finished ones are kept

Each stage writes its averaged weights to WORK/<stage>.pt, an unfinished one WORK/<stage>.partial
every two minutes; run the same command again to continue. `tools.export_demo` makes the shipped
folders from WORK.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer

from . import clips, training
from . import demo_models as models
from .training import Trainer

SEED = 20_22
STAGES = ("vae", "base", "t2v_high", "t2v_low", "i2v_high", "i2v_low")
WEIGHTS = {
    "vae": 200,
    "base": 110,
    "t2v_high": 110,
    "t2v_low": 90,
    "i2v_high": 90,
    "i2v_low": 90,
}
"""Seconds of each stage on an H100; with --stop-after its share of the time that is left."""
SETUP = 9.0
"""Seconds a stage needs beside its training."""
PEAK = {"vae": 6e-4, "base": 1e-3}
DECAY = {"vae": 0.99}
EXPERT_DECAY = 0.998
"""Decay of the averaged weights; the VAE trains too few steps for a long average."""
EXPERT_PEAK = 6e-4
KL_WEIGHT = 1e-5
EDGE_WEIGHT = 20.0
"""What an error at a full edge counts more than one in a plain: corners are few pixels."""
LATER = 2
"""Latent frames after which the VAE's latents no longer depend on where a clip began."""
POOL_FRAMES = clips.FRAMES + 4 * LATER
"""Frames of each clip the VAE sees; it reads some from their first latents, some from later."""
LONG_FRAMES = 4 * (models.LONG_LATENTS - 1 + LATER) + 1
"""Frames of each clip the transformers see: long windows begin at the first latent or later."""
LONG_SHARE = 0.22
"""Part of a batch's windows that are long; about as many tokens as in all the others."""
EXPERTS = {
    "t2v_high": (0.875, 1.0, 12.0),
    "t2v_low": (0.0, 0.875, 12.0),
    "i2v_high": (0.9, 1.0, 5.0),
    "i2v_low": (0.0, 0.9, 5.0),
}
"""Lowest and highest sigma each expert sees, and the flow shift it will be sampled with."""
FIRST_SHARE = {"t2v": 0.5, "i2v": 0.75}
"""How often an expert sees a window that begins with its clip, rather than later in it."""
TEMPLATE_SHARES = {"t2v": (0.60, 0.15, 0.15, 0.0), "i2v": (0.35, 0.10, 0.10, 0.35)}
"""How often each of clips.TEMPLATES is used; in the remaining tenth the prompt is dropped."""


class Way(NamedTuple):
    """A way to run the VAE: precision, memory order, 2D convolutions in place of 1x3x3 ones."""

    precision: str
    channels_last: bool
    flat: bool


WAYS = tuple(
    Way(precision, channels_last, flat)
    for precision in ("fp32", "bf16")
    for channels_last in (False, True)
    for flat in (False, True)
)


class Run(training.Run):
    """What all stages share besides: the tokens of every sentence."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, "training.log", SEED, args.stop_after)
        tokenizer_folder = self.work / "tokenizer"
        if not tokenizer_folder.exists():
            models.build_tokenizer(tokenizer_folder)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        self.ids, self.mask = (t.to(self.device) for t in models.token_table(tokenizer))

    def amp(self, enabled: bool) -> torch.autocast:
        """Return bf16 autocast where enabled, else plain float32."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def scenes(self, count: int, seed: int) -> clips.Scenes:
        """Draw scenes reproducibly on the run's device."""
        generator = torch.Generator(self.device).manual_seed(SEED + seed)
        return clips.sample_scenes(count, self.device, generator)

    def weights(self, stage: str) -> dict[str, Any]:
        """Read a finished stage."""
        path = self.work / f"{stage}.pt"
        loaded: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        return loaded

    def seconds(self, stage: str) -> float:
        """Return how long a stage may train: what was asked, or its share of what is left."""
        if self.args.seconds:
            return float(self.args.seconds)
        if self.args.stop_after is None:
            return float(WEIGHTS[stage])
        left = [s for s in self.args.stages if not (self.work / f"{s}.pt").exists()]
        free = self.args.stop_after - self.clock.elapsed() - SETUP * len(left)
        return max(1.0, free * WEIGHTS[stage] / sum(WEIGHTS[s] for s in left))

    def started(self, stage: str) -> dict[str, Any] | None:
        """Read WORK/<stage>.start.pt, an earlier run's weights to go on from, if it is there."""
        return (
            self.weights(f"{stage}.start") if (self.work / f"{stage}.start.pt").exists() else None
        )

    def trainer(self, stage: str, modules: list[nn.Module]) -> Trainer:
        """Return a trainer of a stage, resumed if it was cut off."""
        trainer = Trainer(
            stage,
            modules,
            PEAK.get(stage, EXPERT_PEAK) * self.args.rate,
            self.work,
            self.clock,
            self.say,
            DECAY.get(stage, EXPERT_DECAY),
        )
        trainer.resume()
        return trainer

    def prepared(self, model: Any) -> Any:
        """Return a transformer ready to train: short text, blocks compiled on a GPU."""
        model.to(self.device).set_attn_processor(models.PaddingProcessor())
        if self.device.type == "cuda" and not self.args.no_compile:
            model.compile_repeated_blocks(dynamic=False)
        return model

    def finish(self, stage: str, trainer: Trainer, **extra: object) -> None:
        """Write a stage's averaged weights and forget its partial checkpoint."""
        trainer.swap()
        whole = {"vae": ["vae"], "base": ["transformer", "text_encoder"]}
        names = whole.get(stage, ["transformer"])
        state: dict[str, object] = {
            name: models.all_taps({k: v.detach().cpu() for k, v in module.state_dict().items()})
            for name, module in zip(names, trainer.modules, strict=True)
        }
        torch.save({**state, **extra}, self.work / f"{stage}.tmp")
        (self.work / f"{stage}.tmp").replace(self.work / f"{stage}.pt")
        (self.work / f"{stage}.partial").unlink(missing_ok=True)
        self.say(f"{stage}: finished after {trainer.step} steps")


def to_unit(frames: torch.Tensor) -> torch.Tensor:
    """Map bytes to -1..1."""
    return frames.float() / 127.5 - 1


def render_pool(run: Run, count: int, frames: int) -> tuple[clips.Scenes, torch.Tensor]:
    """Render clips as bytes, (count, 3, frames, SIZE, SIZE), 12 kB a frame."""
    scenes = run.scenes(count, 1)
    pool = torch.empty(
        (count, 3, frames, clips.SIZE, clips.SIZE), dtype=torch.uint8, device=run.device
    )
    for first in range(0, count, 128):
        part = clips.Scenes(*(v[first : first + 128] for v in vars(scenes).values()))
        pool[first : first + 128] = (clips.render(part, frames) * 255).round().to(torch.uint8)
    return scenes, pool


@torch.no_grad()
def psnr(run: Run, vae: Any, count: int = 64) -> float:
    """Return the mean over fresh clips of the round trip's PSNR in dB, in float32."""
    frames = to_unit((clips.render(run.scenes(count, 2)) * 255).round())
    total = 0.0
    for part in frames.split(16):
        latents = vae.encode(part).latent_dist.mode()
        error = (vae.decode(latents).sample.clamp(-1, 1) - part).square().flatten(1).mean(1)
        total += float((10 * torch.log10(4 / error)).sum())
    return total / count


def averaged_psnr(run: Run, trainer: Trainer) -> str:
    """Say what a VAE with its averaged weights comes to."""
    trainer.swap()
    value = psnr(run, trainer.modules[0], 32)
    trainer.swap()
    return f"psnr {value:.2f} dB"


def first_and_later(latents: torch.Tensor, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what to decode, and what to: half of a batch from its first latents, half later.

    The decoder must read both: a window of a long clip begins with a later latent.
    """
    half, kept = len(clip) // 2, latents.shape[2] - LATER
    shown = 4 * (kept - 1) + 1
    begun = torch.cat([latents[:half, :, :kept], latents[half:, :, LATER:]])
    return begun, torch.cat([clip[:half, :, :shown], clip[half:, :, 4 * LATER :]])


def edges(frames: torch.Tensor) -> torch.Tensor:
    """Return the largest contrast within 3 x 3 pixels, (B, 1, T, H, W), 0..2."""
    flat = frames.transpose(1, 2).flatten(0, 1)
    contrast = F.max_pool2d(flat, 3, 1, 1) + F.max_pool2d(-flat, 3, 1, 1)
    return contrast.amax(1, keepdim=True).unflatten(0, (len(frames), -1)).transpose(1, 2)


def vae_loss(
    run: Run, vae: Any, pool: torch.Tensor, frames: int, way: Way
) -> Callable[[], torch.Tensor]:
    """Return a loss that draws a batch: squared error, a little absolute error, KL divergence."""
    batch = run.args.vae_batch

    def loss() -> torch.Tensor:
        rows = torch.randint(len(pool), (batch,), device=run.device)
        clip = to_unit(pool[rows, :, :frames])
        if way.channels_last:
            clip = clip.contiguous(memory_format=torch.channels_last_3d)
        with run.amp(way.precision == "bf16"):
            moments = vae._encode(clip).float()
            mean, log_variance = moments.chunk(2, 1)
            log_variance = log_variance.clamp(-30, 20)
            latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            begun, target = first_and_later(latents, clip)
            error = models.decode_unclamped(vae, begun).float() - target
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        weight = 1 + EDGE_WEIGHT * edges(target) / 2
        return (weight * (error.square() + 0.05 * error.abs())).mean() + KL_WEIGHT * kl

    return loss


def lay_out(vae: nn.Module, way: Way) -> None:
    """Put the VAE's 3D kernels in the memory order, and its convolutions in the form, asked for."""
    order = torch.channels_last_3d if way.channels_last else torch.contiguous_format
    for parameter in vae.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=order)
    for module in vae.modules():
        if isinstance(module, models.FrameConv):
            module.flat = way.flat


def fastest_way(run: Run, vae: nn.Module, pool: torch.Tensor) -> Way:
    """Time the ways to run the VAE's convolutions and return the fastest."""
    times = {}
    gpu = run.device.type == "cuda"
    for way in WAYS:
        loss = vae_loss(run, vae, pool, clips.FRAMES, way)
        lay_out(vae, way)
        for index in range(5):
            if index == 2:
                torch.cuda.synchronize() if gpu else None
                began = time.monotonic()
            loss().backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize() if gpu else None
        times[way] = (time.monotonic() - began) / 3
        vae.zero_grad(set_to_none=True)
    best = min(times, key=times.__getitem__)
    shown = ", ".join(f"{tuple(k)}: {1000 * v:.0f} ms" for k, v in times.items())
    run.say(f"vae: {shown}; took {best}")
    return best


def train_vae(run: Run) -> None:
    """Train the VAE on short clips first, then on longer ones."""
    _, pool = render_pool(run, run.args.clips, POOL_FRAMES)
    vae: Any = models.build_vae()
    start = run.started("vae")
    if start:
        vae.load_state_dict(start["vae"])
    vae = models.frame_by_frame(vae).to(run.device)
    if start:
        run.say(f"vae: goes on from earlier weights, {psnr(run, vae, 32):.2f} dB")
    way = fastest_way(run, vae, pool)
    lay_out(vae, way)
    trainer = run.trainer("vae", [vae])

    report = partial(averaged_psnr, run, trainer)
    steps, seconds = run.args.steps, run.seconds("vae")
    for frames, until, share in ((clips.FRAMES, 0.6, 0.55), (POOL_FRAMES, 1.0, 0.45)):
        part = None if steps is None else int(steps * share)
        trainer.run(vae_loss(run, vae, pool, frames, way), until, part, seconds * share, report)
    run.finish("vae", trainer)
    run.say(f"vae: round trip {psnr(run, vae, 64):.2f} dB on 64 fresh clips")


class Latents:
    """A pool of encoded clips: normalised latents, I2V conditions, and the scenes they show."""

    @torch.no_grad()
    def __init__(self, run: Run, conditions: bool) -> None:
        vae: Any = models.build_vae()
        vae.load_state_dict(run.weights("vae")["vae"])
        vae = models.frame_by_frame(vae).to(run.device)
        lay_out(vae, Way("fp32", channels_last=True, flat=True))
        scenes, pool = render_pool(run, run.args.clips // 2, LONG_FRAMES)
        self.row = scenes.index()
        self.clean = self._encode(vae, pool, first_only=False)
        self.mean = self.clean.mean((0, 2, 3, 4), keepdim=True)
        self.std = (self.clean - self.mean).square().mean((0, 2, 3, 4), keepdim=True).sqrt()
        self.clean = (self.clean - self.mean) / self.std
        if conditions:
            self.condition = (self._encode(vae, pool, first_only=True) - self.mean) / self.std
        run.say(f"latents: {len(pool)} clips, std {self.std.min():.3f} to {self.std.max():.3f}")

    @staticmethod
    def _encode(vae: Any, pool: torch.Tensor, first_only: bool) -> torch.Tensor:
        parts = []
        for part in pool.split(64):
            clip = to_unit(part)
            if first_only:
                clip[:, :, 1:] = 0
            clip = clip.contiguous(memory_format=torch.channels_last_3d)
            parts.append(vae.encode(clip).latent_dist.mode().contiguous())
        return torch.cat(parts)


def draw_sigma(run: Run, stage: str, batch: int) -> torch.Tensor:
    """Draw noise levels: half as the sampler's shifted schedule visits them, half evenly."""
    low, high, shift = EXPERTS.get(stage, (0.0, 1.0, 5.0))

    def unshifted(sigma: float) -> float:
        return sigma / (shift - (shift - 1) * sigma)

    draw = torch.rand(batch, device=run.device)
    u = unshifted(low) + (unshifted(high) - unshifted(low)) * draw
    even = low + (high - low) * torch.rand(batch, device=run.device)
    return torch.where(
        torch.rand(batch, device=run.device) < 0.5, shift * u / (1 + (shift - 1) * u), even
    )


def draw_sentences(run: Run, rows: torch.Tensor, task: str) -> torch.Tensor:
    """Draw a row of `all_sentences()` for each scene: a template of its own, or a negative."""
    edges = torch.tensor(TEMPLATE_SHARES[task], device="cpu").cumsum(0).tolist()
    draw = torch.rand(len(rows), device=run.device)
    template = sum((draw >= edge).long() for edge in edges)
    cells, templates = len(clips.grid()), len(clips.TEMPLATES)
    negative = templates * cells + torch.randint(
        len(models.NEGATIVE_PROMPTS), (len(rows),), device=run.device
    )
    return torch.where(template < templates, template * cells + rows, negative)


def draw_windows(run: Run, batch: int, length: int, frames: int, firsts: float) -> torch.Tensor:
    """Draw the latent frames of windows, (batch, length): a share begins with the clip."""
    begins = torch.randint(LATER, frames - length + 1, (batch, 1), device=run.device)
    begins[: round(batch * firsts)] = 0
    return begins + torch.arange(length, device=run.device)


def cut(clips_: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Cut each clip (B, C, T, H, W) to the frames of its window (B, length)."""
    shape = (-1, clips_.shape[1], -1, *clips_.shape[3:])
    return clips_.gather(2, windows[:, None, :, None, None].expand(shape))


def flow_loss(
    run: Run,
    stage: str,
    model: nn.Module,
    latents: Latents,
    text: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[], torch.Tensor]:
    """Return a flow-matching loss that draws a batch: the model predicts noise minus latents.

    Most windows have the length of a clip of FRAMES, some are long.
    """
    task = "i2v" if stage.startswith("i2v") else "t2v"
    longs = round(run.args.batch * LONG_SHARE)

    def part(batch: int, length: int) -> torch.Tensor:
        rows = torch.randint(len(latents.clean), (batch,), device=run.device)
        windows = draw_windows(run, batch, length, latents.clean.shape[2], FIRST_SHARE[task])
        clean = cut(latents.clean[rows], windows)
        noise = torch.randn_like(clean)
        sigma = draw_sigma(run, stage, batch)
        level = sigma[:, None, None, None, None]
        noisy = (1 - level) * clean + level * noise
        if task == "i2v":
            shown = (windows == 0).to(clean.dtype)[:, None, :, None, None]
            shown = shown.expand(-1, 4, -1, *clean.shape[3:])
            noisy = torch.cat([noisy, shown, cut(latents.condition[rows], windows)], 1)
        with run.amp(run.device.type == "cuda"):
            embedded = text(draw_sentences(run, latents.row[rows], task))
            guess = model(noisy, sigma * 1000, embedded, return_dict=False)[0]
        return (guess.float() - (noise - clean)).square().mean()

    def loss() -> torch.Tensor:
        short = part(run.args.batch - longs, models.LATENT_SHAPE[1])
        return (1 - LONG_SHARE) * short + LONG_SHARE * part(longs, models.LONG_LATENTS)

    return loss


def train_base(run: Run) -> None:
    """Train a transformer for all noise levels, together with the text encoder."""
    latents = Latents(run, conditions=False)
    model = run.prepared(models.build_transformer())
    encoder = models.build_text_encoder().to(run.device)
    start = run.started("base")
    if start:
        model.load_state_dict(start["transformer"])
        encoder.load_state_dict(start["text_encoder"])
        run.say("base: goes on from earlier weights")
    trainer = run.trainer("base", [model, encoder])

    def text(sentences: torch.Tensor) -> torch.Tensor:
        return models.embed(encoder, run.ids[sentences], run.mask[sentences])

    loss = flow_loss(run, "base", model, latents, text)
    trainer.run(loss, 1.0, run.args.steps, run.seconds("base"))
    statistics = {"mean": latents.mean.flatten().cpu(), "std": latents.std.flatten().cpu()}
    run.finish("base", trainer, statistics=statistics)


def train_expert(run: Run, stage: str, latents: Latents) -> None:
    """Continue from the base (I2V: from the T2V expert) on one expert's noise levels."""
    base = run.weights("base")
    encoder = models.build_text_encoder().to(run.device)
    encoder.load_state_dict({k: v.half().float() for k, v in base["text_encoder"].items()})
    with torch.no_grad():
        table = models.embed(encoder, run.ids, run.mask)
    task, level = stage.split("_")
    model = models.build_transformer()
    model.load_state_dict(
        base["transformer"] if task == "t2v" else run.weights(f"t2v_{level}")["transformer"]
    )
    if task == "i2v":
        model = models.widened(model)
    start = run.started(stage)
    if start:
        model.load_state_dict(start["transformer"])
        run.say(f"{stage}: goes on from earlier weights")
    model = run.prepared(model)
    trainer = run.trainer(stage, [model])
    loss = flow_loss(run, stage, model, latents, lambda sentences: table[sentences])
    trainer.run(loss, 1.0, run.args.steps, run.seconds(stage))
    run.finish(stage, trainer)


def main() -> None:
    """Run the stages asked for that are not finished yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", required=True, help="folder of checkpoints and log")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="steps a stage (otherwise by --seconds)")
    parser.add_argument("--seconds", type=float, help="seconds a stage, instead of the defaults")
    parser.add_argument(
        "--stop-after", type=float, help="end the running stage after so many seconds"
    )
    parser.add_argument("--clips", type=int, default=32768, help="clips in the pool")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.0, help="learning rates times this")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the blocks")
    run = Run(parser.parse_args())
    run.say(f"torch {torch.__version__} on {run.args.device}, seed {SEED}, {vars(run.args)}")
    latents: Latents | None = None
    for stage in run.args.stages:
        if (run.work / f"{stage}.pt").exists() or run.clock.over():
            continue
        if stage == "vae":
            train_vae(run)
        elif stage == "base":
            train_base(run)
        else:
            if latents is None:
                latents = Latents(run, conditions=any(s.startswith("i2v") for s in run.args.stages))
            train_expert(run, stage, latents)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
