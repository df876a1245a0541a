"""Embeds the timesteps of a lean forward: one embedding per run of equal timesteps.

The 5B's image-to-video gives every token its timestep, of which there are two: 0 for the first
frame and t. diffusers embeds all tokens and holds six hidden states of modulation for the whole
forward; here one row per run is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import TimestepRuns

_REPEAT = 16  # rows per distinct timestep: CPU GEMM kernels for fewer rows round differently
_ROWS = 512  # compared at once

Embedding = Tensor | TimestepRuns


def embed_timestep(
    embedder: Any, timestep: Tensor, text: Tensor, starts: Sequence[int] | None, exact: bool
) -> tuple[Embedding, Embedding]:
    """Return the timestep's embedding with one part and its projection with six parts.

    ``timestep`` is (B,) or (B, L); with ``starts`` its runs of equal values begin there, and the
    results are Segments. Results have ``text``'s dtype. With ``exact`` they are those of every
    token, bit for bit; where a device's kernels gave equal timesteps unequal bits, per token.
    """
    if timestep.ndim == 1:
        temb = _embedded(embedder, timestep[None], text)[0]
        return temb.unsqueeze(1), embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))
    if starts is None:
        return _per_token(embedder, timestep, text)
    if not exact or timestep.device.type == "cpu":
        return _one_per_run(embedder, timestep, text, starts)
    return _all_tokens(embedder, timestep, text, starts) or _per_token(embedder, timestep, text)


def _embedded(embedder: Any, timestep: Tensor, text: Tensor) -> Tensor:
    """Return the time embedder's output (B, L, dim), as ``WanTimeTextImageEmbedding.forward``."""
    rows = embedder.timesteps_proj(timestep.flatten()).unflatten(0, (timestep.shape[0], -1))
    dtype = next(iter(embedder.time_embedder.parameters())).dtype
    if dtype not in (rows.dtype, torch.int8):  # int8 holds quantised weights
        rows = rows.to(dtype)
    embedded: Tensor = embedder.time_embedder(rows).type_as(text)
    return embedded


def _per_token(embedder: Any, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    temb = _embedded(embedder, timestep, text)
    parts = embedder.time_proj(embedder.act_fn(temb)).unflatten(2, (6, -1))
    return temb.unsqueeze(2), parts


def _one_per_run(
    embedder: Any, timestep: Tensor, text: Tensor, starts: Sequence[int]
) -> tuple[TimestepRuns, TimestepRuns]:
    """Embed each run's timestep alone; bits as for all tokens where rows round independently."""
    distinct = timestep[:, list(starts)].repeat_interleave(_REPEAT, dim=1)
    temb, parts = _per_token(embedder, distinct, text)
    kept = tuple(starts)
    return TimestepRuns(temb[:, ::_REPEAT], kept), TimestepRuns(parts[:, ::_REPEAT], kept)


def _all_tokens(
    embedder: Any, timestep: Tensor, text: Tensor, starts: Sequence[int]
) -> tuple[TimestepRuns, TimestepRuns] | None:
    """Embed all tokens and keep one per run; None where the tokens of a run differ.

    Seven hidden states at its peak: the activation happens in place. A product of two rows would
    take another kernel than one of all rows, and round differently.
    """
    kept, first = tuple(starts), list(starts)
    temb = _embedded(embedder, timestep, text)
    if not _alike(temb, kept):
        return None
    values = temb[:, first].unsqueeze(2)
    in_place = type(embedder.act_fn) is nn.SiLU
    temb = F.silu(temb, inplace=True) if in_place else embedder.act_fn(temb)
    parts = embedder.time_proj(temb)
    del temb
    if not _alike(parts, kept):
        return None
    return TimestepRuns(values, kept), TimestepRuns(parts[:, first].unflatten(2, (6, -1)), kept)


def _alike(values: Tensor, starts: Sequence[int]) -> bool:
    """Say whether within each run all rows of ``values`` (B, L, n) are the first one's."""
    alike = torch.ones((), dtype=torch.bool, device=values.device)
    for begin, end in zip(starts, (*starts[1:], values.shape[1]), strict=True):
        first = values[:, begin : begin + 1]
        for rows in torch.split(values[:, begin:end], _ROWS, dim=1):
            alike &= (rows == first).all()
    return bool(alike)
