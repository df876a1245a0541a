"""What Animate reads beside latents and texts: a pose and a face.

The pose's latents go through a patch convolution of their own and are added to the tokens of all
frames but the first, which is the character's. The face is read by a motion encoder (a vector for
each crop) and a face encoder (five tokens for each latent frame); after every fifth block a face
adapter has the tokens of a frame attend to the face of that frame. diffusers' class encodes the
face in every forward, though it is the same in every step: ``encode_faces`` does it once, and
inside ``known_faces`` the model takes the result in place of pixels, whatever forward it has. The
computation is that of diffusers' ``transformer_wan_animate.py`` (0.38 to 0.42, see ``sources``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .block import LeanOptions, attend_by
from .replaced import Installed, ReplacedForward


def reads_faces(transformer: Any) -> bool:
    """Say whether this is an Animate transformer, with face adapters."""
    return isinstance(getattr(transformer, "face_adapter", None), nn.ModuleList)


def encode_faces(
    transformer: Any,
    faces: Tensor,
    check: Callable[[], object] = lambda: None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the tokens (B, T, heads + 1, dim) of a face's crops (B, 3, F, size, size), -1..1.

    T is (F - 1) / 4 + 1. As the model does it itself: in batches of the size that its
    configuration names, because a batch of another size may round otherwise; ``check`` runs before
    each. ``faces`` have the model's dtype; each batch of them is moved to ``device``.
    """
    batch, channels, count, height, width = faces.shape
    flat = faces.permute(0, 2, 1, 3, 4).reshape(-1, channels, height, width)
    found = []
    for some in torch.split(flat, transformer.config.motion_encoder_batch_size):
        check()
        found.append(transformer.motion_encoder(some.to(device)))
    tokens: Tensor = transformer.face_encoder(torch.cat(found).view(batch, count, -1))
    return tokens


def as_pixels(tokens: Tensor) -> Tensor:
    """Return a face's tokens (B, T, n, dim) in the form of a video, as ``known_faces`` reads it."""
    return tokens.permute(0, 2, 1, 3).unsqueeze(-1)


def _put_on(transformer: Any, installed: Installed[bool]) -> None:
    def motion(before: Any, pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        return before(pixels, *args, **kwargs) if installed.mine() is None else pixels

    tokens = transformer.face_encoder.num_heads + 1

    def face(before: Any, states: Tensor) -> Any:
        return (
            before(states) if installed.mine() is None else torch.unflatten(states, 2, (tokens, -1))
        )

    installed.set_forward(transformer.motion_encoder, motion)
    installed.set_forward(transformer.face_encoder, face)


_known = ReplacedForward(_put_on)


@contextmanager
def known_faces(transformer: Any, known: bool = True) -> Iterator[None]:
    """Have this thread's calls take ``as_pixels`` of a face's tokens as ``face_pixel_values``.

    The class takes its video apart into pictures, encodes each and joins them: with encoders that
    hand on what they are given, tokens come out as they went in. Acts inside the ``with`` block, if
    they are ``known``.
    """
    if not known:
        yield
        return
    with _known(transformer, True):
        yield


class FaceBranch:
    """The face in one call of the model: its tokens, and what an adapter adds for the next block.

    ``faces`` are what the model's forward takes as ``face_pixel_values``.
    """

    def __init__(self, model: Any, faces: Tensor, size: int | None) -> None:
        self._adapters = set(model.face_adapter)
        flat = faces.permute(0, 2, 1, 3, 4).flatten(0, 1)
        parts = torch.split(flat, size or model.config.motion_encoder_batch_size)
        motion = torch.cat([model.motion_encoder(part) for part in parts])
        del flat, parts
        tokens = model.face_encoder(motion.view(faces.shape[0], faces.shape[2], -1))
        # The character's own frame is given no face.
        self._tokens = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)

    def __contains__(self, block: nn.Module) -> bool:
        return block in self._adapters

    def through(self, adapter: Any, hidden: Tensor) -> None:
        """Add to ``hidden`` (B, L, dim), in place, what one adapter makes of it.

        The adapter is called as a module, so that hooks which bring its weights still act.
        """
        hidden.add_(adapter(hidden, self._tokens))


def run_adapter(adapter: Any, options: LeanOptions, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Run a ``WanAnimateFaceBlockCrossAttention``: what it adds to ``hidden`` (B, L, dim).

    ``tokens`` are (B, T, n, dim); the L tokens of ``hidden`` are T frames of equal length. Each
    tensor is released as soon as it has been read: beside ``hidden`` two of its size are alive.
    """
    batch, frames, many, _ = tokens.shape
    heads = adapter.heads
    normed = adapter.pre_norm_kv(tokens).flatten(1, 2)
    key, value = (
        layer(normed).view(batch, frames, many, heads, -1) for layer in (adapter.to_k, adapter.to_v)
    )
    key, value = adapter.norm_k(key).flatten(0, 1), value.flatten(0, 1)
    del normed
    query = torch.unflatten(adapter.to_q(adapter.pre_norm_q(hidden)), 2, (heads, -1))
    query = torch.unflatten(adapter.norm_q(query), 1, (frames, -1)).flatten(0, 1)
    out = attend_by(adapter.processor, query, key, value, options)
    del query
    out = torch.unflatten(out.flatten(2, 3), 0, (batch, frames)).flatten(1, 2)
    added: Tensor = adapter.to_out(out)
    return added


def why_not_adapter(adapter: Any) -> str | None:
    """Return why a face adapter cannot be run by ``run_adapter``, or None if it can."""
    from diffusers.models.transformers import transformer_wan_animate as animate

    if type(adapter) is not animate.WanAnimateFaceBlockCrossAttention:
        return f"it is a {type(adapter).__name__}"
    if adapter._compiled_call_impl is not None:
        return "it is compiled"
    processor: Any = adapter.processor
    known = type(processor) is animate.WanAnimateFaceBlockAttnProcessor
    if not known or getattr(processor, "_parallel_config", None) is not None:
        return f"its attention is computed by {type(processor).__name__}"
    return "its projections are fused" if getattr(adapter, "fused_projections", False) else None


def adapters_by_block(transformer: Any) -> dict[int, nn.Module]:
    """Return each face adapter by the index of the block that it follows; none in other models."""
    if not reads_faces(transformer):
        return {}
    every = transformer.config.inject_face_latents_blocks
    return {index * every: one for index, one in enumerate(transformer.face_adapter)}


def add_pose(model: Any, patched: Tensor, pose: Tensor) -> None:
    """Add a pose's latents (B, C, T, h, w) to the patched latents of T + 1 frames, in place."""
    patched[:, :, 1:].add_(model.pose_patch_embedding(pose))
