"""The activation memory of Animate 2's two streams: ``forward/animate2.py`` without tensors.

Done as in ``forward_lean``, on whose blocks it builds. Three ways keep the driving stream between
forwards: keys and values of every block on the device ("kv"), the blocks' inputs in RAM
("inputs"), or nothing ("again"). The first forward of a segment runs the stream in each of them.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Final

from ..models import BYTES, IMAGE_TOKENS, TEXT_TOKENS, ModelArchitecture, TransformerShape
from .choices import Choices, Workload, latent_size, window_latents
from .forward import (
    FP32,
    Blob,
    Dims,
    Tape,
    forward_inputs,
    text_embedding,
    time_embedding,
    window_tokens,
)
from .forward_lean import (
    LEAN_HEAD_GROUPS,
    LEAN_ROWS,
    Lean,
    add_gated,
    all_normed,
    cross_attention,
    feed_forward,
    longest_span,
    project,
    rest_by_rows,
    rotate,
)

DRIVING_WAYS: Final = ("kv", "inputs", "again")
"""From the fastest to the one that needs the least."""


def kept_bytes(
    shape: TransformerShape, way: str, *, latent_frames: int, latent_height: int,
    latent_width: int, size: int,
) -> tuple[int, int]:  # fmt: skip
    """Return the bytes on the device and in RAM that a way keeps of ``latent_frames`` of driving.

    Keys and values are two hidden states for each block, its input is one.
    """
    tokens = window_tokens(shape, latent_frames, latent_height, latent_width)
    one = tokens * shape.dim * size * shape.layers
    return {"kv": (2 * one, 0), "inputs": (0, one), "again": (0, 0)}[way]


def kept_of(
    architecture: ModelArchitecture, workload: Workload, choices: Choices
) -> tuple[int, int]:
    """Return what a plan's choices keep of a driving stream, on the device and in RAM."""
    shape = architecture.transformer
    if shape.animate != 2 or not choices.driving:
        return 0, 0
    frames, height, width = latent_size(architecture, workload)
    return kept_bytes(
        shape, choices.driving, latent_frames=window_latents(workload, choices, frames),
        latent_height=height, latent_width=width, size=BYTES[choices.dtypes["transformer"]],
    )  # fmt: skip


@lru_cache(maxsize=512)
def driven_peak(
    shape: TransformerShape, *, way: str, batch: int, latent_frames: int, latent_height: int,
    latent_width: int, size: int, exact: bool = True, passes: int = 1, rows: int = LEAN_ROWS,
    coded: bool = False,
) -> int:  # fmt: skip
    """Return the peak bytes of a segment's forwards on the device, with inputs, without weights.

    ``latent_frames`` counts the generated frames with the character's in front. Where the device is
    the RAM, what ``kept_bytes`` says comes on top. Other arguments as for ``lean_peak``.
    """
    numbers = (batch, latent_frames, latent_height, latent_width, size, exact, passes, rows, coded)
    filling = _Streams(shape, way, *numbers).peak(full=False)
    if way == "again":
        return filling
    return max(filling, _Streams(shape, way, *numbers).peak(full=True))


class _Streams:
    """Both streams of one forward."""

    def __init__(
        self, shape: TransformerShape, way: str, batch: int, frames: int, height: int, width: int,
        size: int, exact: bool, passes: int, rows: int, coded: bool,
    ) -> None:  # fmt: skip
        self.coded = coded
        self.shape, self.way, self.exact, self.passes = shape, way, exact, passes
        self.tape = Tape()
        self.latent = (frames, height, width)
        self.made = self._dims(batch, frames, size, rows)
        self.driving = self._dims(1, frames - 1, size, rows)
        self.frame = window_tokens(shape, shape.patch_size[0], height, width)

    def _dims(self, batch: int, frames: int, size: int, rows: int) -> Lean:
        _, height, width = self.latent
        tokens = window_tokens(self.shape, frames, height, width)
        images = 0 if self.shape.image_dim is None else IMAGE_TOKENS
        d = Dims(self.shape, batch, tokens, size, False, images)
        span = longest_span(tokens, 0, rows)
        return Lean(self.tape, d, span, LEAN_HEAD_GROUPS, coded=self.coded)

    def peak(self, *, full: bool) -> int:
        """Return the peak of one forward; ``full`` where an earlier one has kept the stream."""
        shape, tape, d = self.shape, self.tape, self.made.d
        frames, height, width = self.latent
        held = [forward_inputs(tape, shape, d, self.latent, per_token=False)]
        one = (frames - 1, height, width)
        held += [forward_inputs(tape, shape, self.driving.d, one, per_token=False)]
        text = d.batch * TEXT_TOKENS * shape.text_dim
        held += [(tape.new(text, d.size),) for _ in range(self.passes - 1)]
        for _ in range(self.passes):
            held += [self._rope(self.made), time_embedding(tape, shape, d, rows=d.batch)]
            held += [text_embedding(tape, d)[:1]]
            embedded = self.made.whole()
            held.append((self.made.whole(),))
            del embedded
        each = self.driving.d.hidden
        few = min(shape.layers, 3)
        before = shape.layers - (0 if full else few) if self.way == "kv" else 0
        kept = [tape.new(2 * each * before, d.size)]
        embedded_driving: list[Blob] = []
        state: list[Blob] = []
        for index in range(few):
            keys = self._keys(index, few, full, embedded_driving, state)
            for _ in range(self.passes):
                self._generated()
            if self.way == "kv" and not full:
                kept += keys
            keys.clear()
        embedded_driving.clear()
        normed = all_normed(self.made)
        patch = prod(shape.patch_size) * shape.out_channels
        out = tape.new(d.batch * d.tokens * patch, d.size)
        del normed
        tape.new(d.batch * d.tokens * patch, d.size)
        tape.during(out, *kept, *(blob for group in held for blob in group))
        return tape.peak

    def _rope(self, x: Lean) -> tuple[Blob, ...]:
        each = x.d.tokens * self.shape.head_dim
        return tuple(self.tape.new(each, FP32) for _ in range(2))

    def _keys(
        self, index: int, few: int, full: bool, embedded: list[Blob], state: list[Blob]
    ) -> list[Blob]:
        """``DrivingWalk.keys``: the keys and values of a block; ``state`` is what goes on."""
        x, d = self.driving, self.driving.d
        if full and self.way == "kv":
            return []
        if index == 0:
            embedded += [*time_embedding(self.tape, self.shape, d, rows=1), *self._rope(x)]
        if full:
            arrived = state.pop() if state else x.whole()
            if index + 1 < few:
                state.append(x.whole())  # on its way while this block computes
            keys = self._projected()
            self.tape.during(arrived)
            return keys
        if index == 0:
            embedded += [text_embedding(self.tape, d)[0]]
            patched = x.whole()
            state.append(x.whole())
            del patched
        if index + 1 == few:
            keys = self._projected()
            state.clear()
            embedded.clear()
            return keys
        return self._driven_block()

    def _projected(self) -> list[Blob]:
        """``_keys_of``."""
        x = self.driving
        normed = all_normed(x)
        key = x.whole()
        rotate(x)
        value = x.whole()
        self.tape.during(normed)
        return [key, value]

    def _driven_block(self) -> list[Blob]:
        """``run_block`` of the driving stream: its keys and values."""
        x = self.driving
        normed = all_normed(x)
        query = x.whole()
        rotate(x)
        key = x.whole()
        rotate(x)
        value = x.whole()
        del normed
        lse = x.lse(x.d.tokens, x.d.heads)
        out = x.whole()
        del lse, query
        held = [project(x, out)]
        del out
        self._rest(x, held)
        return [key, value]

    def _generated(self) -> None:
        """``run_block`` of the generated stream, with driving tokens beside its own."""
        x, d = self.made, self.made.d
        wide = d.batch * (d.tokens + self.frame) * d.dim
        if not self.exact:
            self._beside_by_rows(wide)
            rest_by_rows(x)
            return
        normed = all_normed(x)
        query = x.whole()
        rotate(x)
        key = x.whole()
        rotate(x)
        keys = self.tape.new(wide, d.size)
        del key
        value = x.whole()
        del normed
        values = self.tape.new(wide, d.size)
        del value
        lse = x.lse(self.frame, d.heads)
        self.tape.new(d.batch * self.frame * d.dim, d.size)
        del lse, keys, values
        held = [project(x, query)]
        del query
        self._rest(x, held)

    def _beside_by_rows(self, wide: int) -> None:
        """``_self_attention_beside``."""
        x, d = self.made, self.made.d
        query = x.whole()
        keys, values = (self.tape.new(wide, d.size) for _ in range(2))
        normed = x.rows()
        projected = x.rows()
        rotate(x)
        del normed, projected
        lse = x.lse(self.frame, d.heads)
        self.tape.new(d.batch * self.frame * d.dim, d.size)
        del lse, keys, values
        projected = x.rows()
        add_gated(x)
        self.tape.during(query, projected)

    def _rest(self, x: Lean, held: list[Blob]) -> None:
        if self.exact:
            held.append(cross_attention(x, held))
            change = feed_forward(x, held)
            add_gated(x)
            self.tape.during(change)
            return
        add_gated(x)
        held.clear()
        rest_by_rows(x)
