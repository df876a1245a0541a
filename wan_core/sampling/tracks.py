"""Tracks into the condition of an image-to-video model: where points of its first frame go.

Two ways, for models trained on one or the other; both change only the 20 channels of mask and
latents that every image-to-video model reads. A track is (x, y) in pixels of the clip and whether
the point is seen, frame by frame.

``by_points`` is ATI's (github.com/bytedance/ATI, ``wan/modules/motion_patch.py``): around a track's
place the first frame's feature is laid over the latents, with a weight that falls with the distance
and is the mask, too. ``by_paths`` is Wan-Move's (github.com/ali-vilab/Wan-Move,
``wan/modules/trajectory.py``): the feature where a track begins is copied to where it is later.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 220.0
"""How fast a track's weight falls with the squared distance, in halves of the shorter side."""
STRONGEST = 2
"""Tracks that are laid over one place at most."""
_LAST = 120


def by_points(condition: Tensor, tracks: Tensor, width: int, height: int) -> Tensor:
    """Return the condition (1, 4 + z, T, h, w) with ATI's tracks (121, N, 3) put in.

    The 121 points span the clip whatever its length: it was trained with 5 s at 24 fps.
    """
    mask, latents = condition[:, :4].clone(), condition[0, 4:].clone()
    frames, rows, columns = latents.shape[1:]
    short = min(rows, columns)
    device = latents.device
    tracks = tracks.to(device, torch.float32)
    seen = tracks[..., 2]
    # The middle of the clip is 0, and half its shorter side is 1.
    middle = torch.tensor([width, height], device=device) / 2
    places = (tracks[..., :2] - middle) / min(width, height) * 2
    moments = _moments(4 * (frames - 1), device)
    # The feature of each point in the first frame.
    half = torch.tensor([columns / short, rows / short], device=device)
    begin = (places[:1] / half).clamp(-1, 1).unsqueeze(0)
    features = F.grid_sample(
        latents[None, :, 0], begin, mode="bilinear", padding_mode="zeros", align_corners=False
    )[0, :, 0]
    x = torch.linspace(-columns / short, columns / short, columns, device=device)
    y = torch.linspace(-rows / short, rows / short, rows, device=device)
    for index in range(1, frames):
        of_frame = moments[4 * (index - 1) : 4 * index]
        visible = seen[of_frame]
        count = visible.sum(0)
        place = (places[of_frame] * visible.unsqueeze(-1)).sum(0) / (count + 1e-5).unsqueeze(-1)
        far = (place[:, 0] - x[None, :, None]) ** 2 + (place[:, 1] - y[:, None, None]) ** 2
        weight = torch.exp(-far * TEMPERATURE) * count.clamp(0, 1)
        strongest, which = weight.topk(min(STRONGEST, weight.shape[-1]), dim=-1)
        laid = (features[:, which] * strongest).sum(-1)
        total = strongest.sum(-1)
        latents[:, index] = laid + latents[:, index] * (1 - total.clamp(0, 1))
        mask[:, :, index] = torch.maximum(mask[:, :, index], total)
    return torch.cat([mask, latents.unsqueeze(0)], dim=1)


def _moments(frames: int, device: torch.device) -> Tensor:
    """Return which of the points 1 to 120 belongs to each of ``frames`` frames after the first."""
    common = gcd(_LAST, frames) if frames else 1
    step, times = _LAST // common, max(1, frames // common)
    found = (1 + step * torch.arange(frames, device=device)) // times
    return 1 + found.clamp(max=_LAST - 1)


def by_paths(condition: Tensor, tracks: Tensor, scale: int) -> Tensor:
    """Return the condition (1, 4 + z, T, h, w) with Wan-Move's tracks (F, N, 3) put in.

    ``scale`` is the pixels of a latent cell's side. Tracks whose beginning is not seen have nothing
    to carry; where several meet, the last one given is on top.
    """
    out = condition.clone()
    latents = out[0, 4:]
    frames, rows, columns = latents.shape[1:]
    first = latents[:, 0].clone()
    sampled = tracks[::4].to(latents.device)
    places = sampled[..., :2]
    ends = torch.tensor([columns, rows], device=places.device) * scale
    seen = (sampled[..., 2] > 0) & ((places >= 0) & (places < ends)).all(-1)
    # Only of those inside: of a number beyond its range no whole one can be told.
    cells = torch.div(places, scale, rounding_mode="floor").long()
    for index in range(1, min(frames, len(sampled))):
        for track in (seen[index] & seen[0]).nonzero().flatten().tolist():
            (x, y), (from_x, from_y) = cells[index, track].tolist(), cells[0, track].tolist()
            latents[:, index, y, x] = first[:, from_y, from_x]
    return out
