"""Go on training the VAE's decoder, so that it decodes clips longer than those it was born with.

    python -m tools.train_long_decode --work .ckpt --seconds 1800

`tools.train_demo` trains the VAE on clips of 17 frames, and beyond them its causal caches hold
what they never held in training. Here the encoder and the latents stay as they are, so the
transformers need not change; the decoder sees long sequences put together from the latents of
17-frame windows, as a windowed render makes them. Writes WORK/vae_long.pt, again and again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import clips
from . import demo_models as models

GRADIENT_CHUNKS = 3
"""Latent frames decoded with gradient; those before them only fill the caches."""
PEAK = 4e-4
DECAY = 0.98
LONGEST = 12


@torch.no_grad()
def encode(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Encode frames in -1..1 to the mean latents."""
    latents: torch.Tensor = vae.encode(frames).latent_dist.mode()
    return latents


def windowed_latents(vae: Any, frames: torch.Tensor, kind: str, length: int) -> torch.Tensor:
    """Return `length` latent frames of a long clip, put together from windows of five.

    "anchor": after the first four, each window gives its last four; its first was only looked at.
    "overlap": neighbouring windows share one latent frame, the mean of both.
    """
    first, last = (12, 4) if kind == "anchor" else (16, 5)
    out = encode(vae, frames[:, :, : clips.FRAMES])[:, :, :last]
    while out.shape[2] < length:
        window = encode(vae, frames[:, :, first : first + clips.FRAMES])
        if kind == "overlap":
            out[:, :, -1] = (out[:, :, -1] + window[:, :, 0]) / 2
        out = torch.cat([out, window[:, :, 1:]], 2)
        first += 16
    return out[:, :, :length]


def decode_part(vae: Any, latents: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Decode latent frames start..end-1 with gradient, after filling the caches without one."""
    vae.clear_cache()
    parts = []
    for index in range(end):
        with torch.set_grad_enabled(index >= start):
            vae._conv_idx = [0]
            part = vae.decoder(
                vae.post_quant_conv(latents[:, :, index : index + 1]),
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        if index >= start:
            parts.append(part)
    vae.clear_cache()
    return torch.cat(parts, 2)


@torch.no_grad()
def measure(vae: Any) -> str:
    """Return PSNR in dB of the first 17 frames and of the rest, for both kinds of windows."""
    frames = clips.render(clips.sample_scenes(2, generator=torch.Generator().manual_seed(5)), 65)
    frames = frames * 2 - 1
    notes = []
    for kind in ("anchor", "overlap"):
        latents = windowed_latents(vae, frames, kind, 13)
        error = (vae.decode(latents).sample - frames[:, :, :49]).square().mean((1, 3, 4))
        value = 10 * torch.log10(4 / error)
        notes.append(f"{kind} {float(value[:, :17].mean()):.1f} {float(value[:, 17:].mean()):.1f}")
    return ", ".join(notes) + " dB"


def batch_loss(vae: Any, batch: int) -> torch.Tensor:
    """Draw long clips and return the decoder's error on a stretch of each."""
    kind = "anchor" if bool(torch.rand(()) < 0.6) else "overlap"
    end = int(torch.randint(GRADIENT_CHUNKS, LONGEST + 1, ()))
    start = end - GRADIENT_CHUNKS
    frames = clips.render(clips.sample_scenes(batch), 61) * 2 - 1
    latents = windowed_latents(vae, frames, kind, end)
    latents = latents + 0.05 * torch.rand(()) * torch.randn_like(latents)
    first = max(0, 4 * start - 3)
    target = frames[:, :, first : 4 * end - 3]
    error = decode_part(vae, latents, start, end) - target
    return error.square().mean() + 0.05 * error.abs().mean()


def main() -> None:
    """Train until the time is up, writing the averaged weights every forty steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(2023)
    vae: Any = models.build_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True)["vae"])
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    average = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=PEAK, betas=(0.9, 0.99), weight_decay=0.0)
    began, step = time.monotonic(), 0
    while (passed := time.monotonic() - began) < args.seconds:
        rate = PEAK * min(1.0, (step + 1) / 20) * max(0.02, 1 - passed / args.seconds)
        optimizer.param_groups[0]["lr"] = rate
        loss = batch_loss(vae, args.batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - DECAY)
        if step % 40 == 0:
            kept = [p.detach().clone() for p in trained]
            with torch.no_grad():
                torch._foreach_copy_(trained, average)
                note = measure(vae)
                torch.save({"vae": vae.state_dict()}, args.work / "vae_long.pt")
                torch._foreach_copy_(trained, kept)
            line = f"[{passed:6.0f} s] long {step} loss {float(loss.detach()):.5f} {note}\n"
            with (args.work / "long.log").open("a") as log:
                log.write(line)
            sys.stdout.write(line)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
