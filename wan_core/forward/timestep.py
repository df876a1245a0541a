"""Timestep embeddings for the lean forward: one embedding per run of equal timesteps.

Image-to-video with the 5B passes a timestep for every token, although there are only two distinct
values: 0 for the tokens of the first frame and t for all others. diffusers embeds every token and
holds modulation worth six hidden states during the whole forward. Here one row per run is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import TimestepRuns

_REPEAT = 16  # copies of each distinct timestep: CPU GEMM kernels for fewer rows round differently
_ROWS = 512  # tokens compared at once

Embedding = Tensor | TimestepRuns


def embed_timestep(
    embedder: Any, timestep: Tensor, text: Tensor, starts: Sequence[int] | None, exact: bool
) -> tuple[Embedding, Embedding]:
    """Return the timestep embedding (one part) and its projection (six parts).

    ``timestep`` is (B,) or (B, L). ``starts`` are the tokens at which its runs of equal values
    begin; with them the results are TimestepRuns. Results have ``text``'s dtype. With ``exact``
    they equal the embeddings of every token bit for bit. If the device's kernels give equal
    timesteps different bits, the result is per token after all.
    """
    if timestep.ndim == 1:
        temb = _embedded(embedder, timestep[None], text)[0]
        return temb.unsqueeze(1), embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))
    if starts is None:
        return _per_token(embedder, timestep, text)
    if not exact or timestep.device.type == "cpu":
        return _one_per_run(embedder, timestep, text, starts)
    # On a GPU the kernel, and with it the rounding, depends on the number of rows: only embedding
    # every token gives diffusers' bits. Whether one row may stand for a run is then checked.
    return _all_tokens(embedder, timestep, text, starts) or _per_token(embedder, timestep, text)


def _embedded(embedder: Any, timestep: Tensor, text: Tensor) -> Tensor:
    """Return the time embedder's output (B, L, dim), as ``WanTimeTextImageEmbedding`` does."""
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
    """Embed the timestep of each run alone.

    The bits are those of embedding all tokens wherever a row's rounding does not depend on how
    many rows there are.
    """
    distinct = timestep[:, list(starts)].repeat_interleave(_REPEAT, dim=1)
    temb, parts = _per_token(embedder, distinct, text)
    kept = tuple(starts)
    return TimestepRuns(temb[:, ::_REPEAT], kept), TimestepRuns(parts[:, ::_REPEAT], kept)


def _all_tokens(
    embedder: Any, timestep: Tensor, text: Tensor, starts: Sequence[int]
) -> tuple[TimestepRuns, TimestepRuns] | None:
    """Embed all tokens and keep one row per run; None if the rows of a run differ.

    At its peak this holds seven hidden states.
    """
    kept, first = tuple(starts), list(starts)
    temb = _embedded(embedder, timestep, text)
    if not _alike(temb, kept):
        return None
    values = temb[:, first].unsqueeze(2)  # copied before SiLU overwrites it
    in_place = type(embedder.act_fn) is nn.SiLU
    temb = F.silu(temb, inplace=True) if in_place else embedder.act_fn(temb)
    parts = embedder.time_proj(temb)
    del temb  # before the comparison allocates anything
    if not _alike(parts, kept):
        return None
    return TimestepRuns(values, kept), TimestepRuns(parts[:, first].unflatten(2, (6, -1)), kept)


def _alike(values: Tensor, starts: Sequence[int]) -> bool:
    """Say whether all rows of a run are equal, for every run of ``values`` (B, L, n)."""
    alike = torch.ones((), dtype=torch.bool, device=values.device)
    for begin, end in zip(starts, (*starts[1:], values.shape[1]), strict=True):
        first = values[:, begin : begin + 1]
        for rows in torch.split(values[:, begin:end], _ROWS, dim=1):
            alike &= (rows == first).all()
    return bool(alike)
