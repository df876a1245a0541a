"""Animate 2: a driving stream beside the stream that is generated, with Wan's own blocks.

The driving video's latents go through the same blocks at timestep 1, with a text and CLIP tokens of
their own. Generated frame j attends to all generated tokens and to driving frame j - 1; frame 0,
the character's, to generated tokens only. diffusers packs both streams and masks what must not be
seen (flex attention); here it is one plain attention per frame, as in ComfyUI. Driving positions:
time begins at 1, and the width is shifted by the grid's width. The unconditional pass leaves out
block 9. Sources: diffusers' ``transformer_wan_animate_2.py`` (0.42), ComfyUI's
``ldm/wan/model_animate2.py`` (0.33).

The driving stream does not depend on the step. What is kept of it, ``DrivingStream`` says: keys and
values of every block on the device ("kv"), the blocks' inputs in RAM, from which keys and values
are projected anew ("inputs"), or nothing, so that it runs again beside every forward ("again"). The
bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from ..kernels import Fused, Modulation, TimestepRuns, rotate_all, shared_by
from ..loading import Slab, lock_within
from .block import Beside, LeanOptions, run_block
from .timestep import embed_timestep

SKIPPED_BLOCK: Final = 9
"""The block that the unconditional pass leaves out."""
DRIVING_TIMESTEP: Final = 1.0
WAYS: Final = ("kv", "inputs", "again")

_cuda: Any = torch.cuda  # parts of it carry no types

Rotary = tuple[Tensor, Tensor]
Keys = tuple[Tensor, Tensor]


@dataclass(slots=True, kw_only=True)
class DrivingStream:
    """The driving stream of one stretch of a clip, and what is kept of it between forwards.

    ``latents`` (1, C, T, h, w) are the model's whole input, mask and condition included; ``text``
    (1, 512, text_dim) and ``image`` (1, 257, image_dim) its own. ``strength`` weighs what the
    generated frames read of it (1: as trained). ``keep`` is one of ``WAYS``. What goes to RAM is
    page-locked as far as ``pin_bytes`` allows, the limit for the whole process. Not for use by
    several threads.
    """

    latents: Tensor
    text: Tensor
    image: Tensor | None = None
    strength: float = 1.0
    keep: str = "again"
    pin_bytes: int = 0
    _keys: dict[int, Keys] = field(default_factory=dict)
    _host: _Host | None = None
    _full: bool = False

    @property
    def full(self) -> bool:
        """Whether what the first forward keeps is there for all blocks."""
        return self._full

    def keep_as(self, way: str, pin_bytes: int) -> None:
        """Keep it in another way from the next forward on, where a new plan says so."""
        if way != self.keep:
            self.empty()
        self.keep, self.pin_bytes = way, pin_bytes

    def empty(self) -> None:
        """Forget what is kept; the next forward runs the stream anew."""
        self._keys.clear()
        if self._host is not None:
            self._host.close()
        self._host, self._full = None, False

    def _take(self, index: int, count: int, device: torch.device) -> Tensor:
        assert self._host is not None
        return self._host.take(index, count, device)

    def _put(self, index: int, hidden: Tensor) -> None:
        if self._host is None:
            self._host = _Host(self.pin_bytes)
        self._host.put(index, hidden)


class _Host:
    """Inputs of blocks in RAM. On a CUDA device the next one is on its way while a block computes.

    They are taken in the order of the blocks.
    """

    def __init__(self, pin_bytes: int) -> None:
        self._pin_bytes = pin_bytes
        self._slabs: dict[int, Slab] = {}
        self._kept: dict[int, Tensor] = {}
        self._side: Any = None
        self._coming: dict[int, tuple[Tensor, Any]] = {}

    def put(self, index: int, hidden: Tensor) -> None:
        """Copy ``hidden``; whoever writes over it afterwards is queued behind the copy."""
        if index not in self._slabs:
            slab = self._slabs[index] = Slab(hidden.numel() * hidden.element_size())
            if hidden.device.type == "cuda":
                lock_within(slab, self._pin_bytes)
            self._kept[index] = slab.memory.view(hidden.dtype).view(hidden.shape)
        self._kept[index].copy_(hidden, non_blocking=True)

    def take(self, index: int, count: int, device: torch.device) -> Tensor:
        """Return the input of a block on ``device``; the next one of ``count`` is sent for."""
        if device.type != "cuda":
            return self._kept[index].to(device)
        if index not in self._coming:
            self._wait()
            self._send(index, device)
        hidden, arrived = self._coming.pop(index)
        torch.cuda.current_stream(device).wait_event(arrived)
        if index + 1 < count:
            self._send(index + 1, device)
        return hidden

    def _send(self, index: int, device: torch.device) -> None:
        home = self._kept[index]
        hidden = torch.empty(home.shape, dtype=home.dtype, device=device)
        if self._side is None:
            self._side = _cuda.Stream(device)
        # What used this memory before was queued before now.
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            hidden.copy_(home, non_blocking=True)
            self._coming[index] = hidden, self._side.record_event()

    def _wait(self) -> None:
        """Let copies that nobody took end before their memory is given to others."""
        if self._side is not None:
            self._side.synchronize()
        self._coming.clear()

    def close(self) -> None:
        """Unlock and forget everything."""
        self._wait()
        self._kept.clear()
        for slab in self._slabs.values():
            slab.unlock()
        self._slabs.clear()


@dataclass(slots=True)
class _Embedded:
    """What the driving stream goes through the blocks with."""

    hidden: Tensor
    context: Tensor
    temb: Tensor | TimestepRuns
    rotary: Rotary


class DrivingWalk:
    """The driving stream's way through the blocks beside one forward, or several side by side."""

    def __init__(self, stream: DrivingStream, transformer: Any) -> None:
        self._stream, self._model = stream, transformer
        self._count = len(transformer.blocks)
        self._state: _Embedded | None = None
        self._at = -1
        self._now: Keys | None = None

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        _, p_h, p_w = self._model.config.patch_size
        return int(self._stream.latents.shape[3] // p_h * (self._stream.latents.shape[4] // p_w))

    def stands_for(self, stream: DrivingStream) -> bool:
        """Say whether this is a way of ``stream``."""
        return self._stream is stream

    def keys(self, index: int, block: Any, options: LeanOptions) -> Keys:
        """Return a block's keys and values of the driving tokens, (1, tokens, dim) each.

        To be asked for every block in turn, as often as one likes, while its weights are there.
        """
        if index == self._at:
            assert self._now is not None
            return self._now
        self._now = None
        stream = self._stream
        if stream._full and stream.keep == "kv":
            found = stream._keys[index]
        elif stream._full:
            state = self._embedded(options, patched=False)
            hidden = stream._take(index, self._count, stream.latents.device)
            found = self._weighed(_keys_of(block, options, hidden, state))
        else:
            found = self._go_on(index, block, options)
        self._at, self._now = index, found
        return found

    def pass_by(self, index: int, block: Any, options: LeanOptions) -> None:
        """Go through a block whose keys nobody reads."""
        if not self._stream._full:
            self.keys(index, block, options)

    def end(self) -> None:
        """Let go of everything after the last block."""
        self._at, self._now, self._state = -1, None, None

    def _go_on(self, index: int, block: Any, options: LeanOptions) -> Keys:
        """Take the stream through a block, and return the block's keys."""
        stream = self._stream
        if index == 0:
            stream.empty()
            self._state = None
        state = self._embedded(options)
        if stream.keep == "inputs":
            stream._put(index, state.hidden)
        last = index + 1 == self._count
        if last:  # nobody reads what comes out of it
            keys = _keys_of(block, options, state.hidden, state)
            del state
            self._state = None
        else:
            kept: list[Keys] = []
            fused = options.fused(state.hidden, block.attn1.heads)
            state.hidden = run_block(
                block, options, state.hidden, state.context, state.temb, state.rotary, fused,
                keep=kept,
            )  # fmt: skip
            keys = kept.pop()
        keys = self._weighed(keys)
        if stream.keep == "kv":
            stream._keys[index] = keys
        stream._full = last and stream.keep != "again"
        return keys

    def _weighed(self, keys: Keys) -> Keys:
        strength = self._stream.strength
        return keys if strength == 1 else (keys[0], keys[1] * strength)

    def _embedded(self, options: LeanOptions, patched: bool = True) -> _Embedded:
        """Return the stream before its first block, made once; without tokens if not ``patched``.

        Keys are projected with the timestep and the positions alone.
        """
        if self._state is not None:
            return self._state
        stream, model = self._stream, self._model
        embedder, text = model.condition_embedder, stream.text
        time = torch.full((1,), DRIVING_TIMESTEP, device=stream.latents.device)
        _, parts = embed_timestep(embedder, time, text, None, options.exact)
        rotary = driving_rotary(model, stream.latents)
        hidden = context = text.new_empty(0)
        if patched:
            context = embedder.text_embedder(text)
            if stream.image is not None:
                image = embedder.image_embedder(stream.image)
                context = torch.concat([image, context], dim=1)
            tokens = model.patch_embedding(stream.latents)
            hidden = tokens.flatten(2).transpose(1, 2).contiguous()
        self._state = _Embedded(hidden, context, parts, rotary)
        return self._state


def driving_rotary(transformer: Any, latents: Tensor) -> Rotary:
    """Return cos and sin (1, L, 1, head_dim) for driving latents (1, C, T, h, w).

    Time begins at 1, beside the generated frame that is after the character's. The width begins
    where the generated frames' ends, so that no two tokens of the streams share a place.
    """
    rope, size = transformer.rope, transformer.config.attention_head_dim
    p_t, p_h, p_w = transformer.config.patch_size
    grid = latents.shape[2] // p_t, latents.shape[3] // p_h, latents.shape[4] // p_w
    begin = 1, 0, grid[2]
    side = 2 * (size // 6)
    tables = []
    for table in (rope.freqs_cos, rope.freqs_sin):
        axes = torch.split(table.to(latents.device), [size - 2 * side, side, side], dim=1)
        rows = []
        for axis, values in enumerate(axes):
            view = [1, 1, 1, values.shape[1]]
            view[axis] = grid[axis]
            part = values[begin[axis] : begin[axis] + grid[axis]].view(view)
            rows.append(part.expand(*grid, -1))
        tables.append(torch.cat(rows, dim=-1).reshape(1, grid[0] * grid[1] * grid[2], 1, -1))
    return tables[0], tables[1]


def _keys_of(block: Any, options: LeanOptions, hidden: Tensor, state: _Embedded) -> Keys:
    """Return the keys and values that ``hidden``, a block's input, has in its self attention."""
    attn = block.attn1
    fused = options.fused(hidden, attn.heads)
    modulation = Modulation(
        block.scale_shift_table, state.temb, hidden.shape[1], options.rows, upcast=True, fused=fused
    )
    # All three, as in the block's own forward: whether they share a product in 8 bit depends on it.
    layers = shared_by((attn.to_q, attn.to_k, attn.to_v), hidden.dtype, options.coded_attention)
    layers.read(modulation.all_normed_as(layers.kind, block.norm1, hidden, 0))
    key = rotate_all(
        attn.norm_k, layers.project(1), attn.heads, modulation.spans, state.rotary, fused
    )
    return key, layers.project(2, last=True)


@dataclass(frozen=True, slots=True)
class DrivenBlock:
    """One generated pass through one block, beside the driving stream."""

    walk: DrivingWalk
    index: int
    unconditional: bool

    def through(
        self, block: Any, options: LeanOptions, hidden: Tensor, context: Tensor,
        temb: Tensor | TimestepRuns, rotary: Rotary, fused: Fused,
    ) -> Tensor:  # fmt: skip
        """Return what ``run_block`` returns, with driving tokens in the self attention."""
        if self.unconditional and self.index == SKIPPED_BLOCK:
            self.walk.pass_by(self.index, block, options)
            return hidden
        key, value = self.walk.keys(self.index, block, options)
        beside = Beside(key, value, self.walk.frame_tokens)
        return run_block(block, options, hidden, context, temb, rotary, fused, beside=beside)
