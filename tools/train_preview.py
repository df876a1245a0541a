"""Train the small decoder that shows the demo models' latents while a clip is made.

A linear map from latents to colours, which serves Wan's own VAE, explains a third of what the demo
VAE decodes to: its latents mean something only beside their neighbours. Three layers suffice.

Usage: python -m tools.train_preview          (a minute on one core; writes PREVIEW)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor, nn

from tools import clips

DEMO = Path(__file__).resolve().parent.parent / "wan_core" / "demo_model"
PREVIEW = DEMO / "preview.safetensors"
WIDTH, SCALE, STEPS = 64, 4, 2500


def examples(vae: AutoencoderKLWan, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return normalised latents (N, C, h, w) of single frames, and their pictures (N, 3, H, W).

    Pictures are in 0..1, decoded by the VAE and made smaller by what SCALE is short of 8.
    """
    config, generator = vae.config, torch.Generator().manual_seed(seed)
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    latents, pictures = [], []
    with torch.no_grad():
        for _ in range(count // 4):
            clip = clips.render(clips.sample_scenes(4, generator=generator))
            found = vae.encode(clip * 2 - 1).latent_dist.mode()
            decoded = vae.decode(found).sample / 2 + 0.5
            latents.append(((found - mean) / std).transpose(1, 2).flatten(0, 1))
            # Of the four frames that a latent stands for the last: all of them are in it.
            frames = decoded[:, :, ::4].transpose(1, 2).flatten(0, 1)
            pictures.append(nn.functional.avg_pool2d(frames, 8 // SCALE))
    return torch.cat(latents), torch.cat(pictures)


def network(channels: int) -> nn.Sequential:
    """Return the decoder: (N, channels, h, w) -> (N, 3, SCALE * h, SCALE * w)."""
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 3 * SCALE**2, 3, padding=1),
        nn.PixelShuffle(SCALE),
    )


def explained(found: Tensor, wanted: Tensor) -> float:
    """Return the share of the variance of ``wanted`` that ``found`` explains."""
    left = (found - wanted).square().sum()
    return 1 - float(left / (wanted - wanted.mean(0)).square().sum())


def main() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_pretrained(DEMO / "t2v" / "vae").eval()
    latents, pictures = examples(vae, 240, seed=0)
    unseen = examples(vae, 16, seed=1)
    model = network(latents.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, 1e-5)
    for step in range(STEPS):
        chosen = torch.randint(len(latents), (24,))
        # Noise: the latents of an early step are blurred, and none is exactly the encoder's.
        noisy = latents[chosen] + 0.1 * torch.randn_like(latents[chosen])
        loss = (model(noisy) - pictures[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == STEPS - 1:
            with torch.no_grad():
                print(step, f"{explained(model(unseen[0]), unseen[1]):.3f} explained", flush=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    mean = json.dumps(list(vae.config.latents_mean))
    save_file(weights, PREVIEW, {"latents_mean": mean, "scale": str(SCALE)})


if __name__ == "__main__":
    main()
