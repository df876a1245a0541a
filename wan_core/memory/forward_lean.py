"""The activation memory of the lean forward: ``forward/block.py`` replayed without tensors.

It is done as in ``memory/forward.py`` for diffusers' own forward, and here too variables and every
``del`` stand for those in the original. A call whose result is not kept stands for a temporary
that is freed at once. Work by rows is replayed for the longest span of tokens only, because what
one span needs is freed before the next one begins.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

from ..models import IMAGE_TOKENS, TEXT_TOKENS, TransformerShape
from .forward import (
    FP32,
    Blob,
    Dims,
    Tape,
    control_tokens,
    forward_inputs,
    text_embedding,
    time_embedding,
    window_tokens,
)

LEAN_ROWS = 4096
"""Tokens that the lean forward works on at once in elementwise operations."""
LEAN_HEAD_GROUPS = 4
"""Groups of heads when products are split. More would save little, as v is then a quarter of a
hidden state already, and each group costs another pass of the norm over the input."""
CODED_SHARE = 0.55
"""What attention in 8 bit holds of query, key and value beside them, in tensors of a hidden state:
5.5 of a tenth of the heads at most (``kernels/attention_ways.py``)."""
_REPEATED_TIMESTEPS = 16  # rows per distinct timestep, ``_REPEAT`` in ``forward/timestep.py``


class Lean:
    """The numbers of one lean forward, and the kinds of tensors it makes.

    ``span`` is the number of tokens in the longest span, ``groups`` the number of head groups.
    """

    def __init__(
        self, tape: Tape, dims: Dims, span: int, groups: int, cut: int = 1, *, coded: bool
    ) -> None:
        self.tape, self.d, self.span, self.groups = tape, dims, span, groups
        self.cut, self.coded = cut, coded
        self.row_elements = dims.batch * span * dims.dim

    def whole(self) -> Blob:
        return self.tape.new(self.d.hidden, self.d.size)

    def rows(self, size: int | None = None, elements: int | None = None) -> Blob:
        count = self.row_elements if elements is None else elements
        return self.tape.new(count, size or self.d.size)

    def text(self) -> Blob:
        return self.tape.new(self.d.batch * TEXT_TOKENS * self.d.dim, self.d.size)

    def image(self) -> Blob:
        return self.tape.new(self.d.batch * self.d.image_tokens * self.d.dim, self.d.size)

    def lse(self, tokens: int, heads: int) -> Blob:
        """Softmax's sums, or with ``coded`` what attention in 8 bit holds if that is more."""
        rows = self.d.batch * heads * tokens
        coded = int(rows * (self.d.dim // self.d.heads) * self.d.size * CODED_SHARE)
        return self.tape.new(max(rows * FP32, coded) if self.coded else rows * FP32, 1)


def _widened_rows(x: Lean) -> Blob:
    """``norm(rows.float())``; the widened rows are freed when the norm returns."""
    wide = x.rows(FP32) if x.d.size != FP32 else None
    normed = x.rows(FP32)
    del wide
    return normed


def _normed(x: Lean) -> Blob:
    """``Modulation.normed``: in place, except for the cast back."""
    normed = _widened_rows(x)
    return normed if x.d.size == FP32 else x.rows()


def all_normed(x: Lean) -> Blob:
    out = x.whole()
    _widened_rows(x)
    return out


def rotate(x: Lean) -> None:
    normed = x.rows()
    half = x.row_elements // 2
    left = x.rows(FP32, half)
    x.rows(FP32, half)
    x.tape.during(normed, left)


def add_gated(x: Lean) -> None:
    x.rows(FP32)


def _attend_whole(x: Lean) -> Blob:
    lse = x.lse(x.d.tokens, x.d.heads)
    out = x.whole()
    x.tape.during(lse)
    return out


def _leave(x: Lean) -> list[Blob]:
    """``Cut.to_heads``: what is filled, and what is sent: of two cards' the other's half."""
    given = x.whole()
    return [given, x.tape.new(x.d.hidden // (2 if x.cut == 2 else 1), x.d.size)]


def _arrive(x: Lean, held: list[Blob]) -> Blob:
    """``Arriving.wait``. A batch of one lies as it came; of more it is copied into its order."""
    given = held[0]
    held.clear()
    copied = x.whole() if x.d.batch > 1 else given
    x.tape.during(given)
    return copied


def _to_tokens(x: Lean, out: Blob) -> Blob:
    part = x.d.hidden // (2 if x.cut == 2 else 1)
    parts = [x.tape.new(part, x.d.size) for _ in range(2 if x.d.batch > 1 else 1)]
    whole = x.whole()
    x.tape.during(out, *parts)
    return whole


def _exchanged(x: Lean) -> tuple[Blob, Blob, Blob, tuple[Blob, ...]]:
    normed = all_normed(x)
    value = x.whole()
    values = _leave(x)
    del value
    query = x.whole()
    rotate(x)
    value = _arrive(x, values)
    queries = _leave(x)
    del query
    key = x.whole()
    del normed
    rotate(x)
    query = _arrive(x, queries)
    keys = _leave(x)
    del key
    texts = _context(x)
    return query, _arrive(x, keys), value, texts


def _projected(x: Lean) -> tuple[Blob, Blob, Blob]:
    normed = all_normed(x)
    query = x.whole()
    rotate(x)
    key = x.whole()
    rotate(x)
    value = x.whole()
    del normed
    return query, key, value


def _self_attention(x: Lean) -> tuple[Blob, tuple[Blob, ...]]:
    """What it adds, and what was made of the texts beside an exchange."""
    texts: tuple[Blob, ...] = ()
    if x.cut > 1:
        query, key, value, texts = _exchanged(x)
    else:
        query, key, value = _projected(x)
    out = _attend_whole(x)
    del query, key, value
    return project(x, out if x.cut == 1 else _to_tokens(x, out)), texts


def _add_and_norm(x: Lean, change: Blob) -> Blob:
    """``Modulation.add_and_norm``, which writes the norm over what was added."""
    add_gated(x)
    _widened_rows(x)
    return change


def project(x: Lean, out: Blob) -> Blob:
    projected = x.whole()
    del out
    return projected


def _context(x: Lean) -> tuple[Blob, ...]:
    image: tuple[Blob, ...] = ()
    if x.d.image_tokens:
        key = x.image()
        image = (x.image(), x.image())
        del key
    key = x.text()
    return (*image, x.text(), x.text())


def cross_attention(x: Lean, held: list[Blob], texts: tuple[Blob, ...] = ()) -> Blob:
    keys = texts or _context(x)
    normed = _add_and_norm(x, held.pop())
    query = x.whole()
    del normed
    x.rows()
    image = _attend_whole(x) if x.d.image_tokens else None
    out = _attend_whole(x)
    del image
    projected = project(x, out)
    x.tape.during(*keys, query)
    return projected


def feed_forward(x: Lean, held: list[Blob]) -> Blob:
    normed = _add_and_norm(x, held.pop())
    inner = x.tape.new(x.d.batch * x.d.tokens * x.d.ffn, x.d.size)
    del normed
    out = x.whole()
    del inner
    return out


def _self_attention_by_heads(x: Lean, whole_values: bool) -> None:
    d = x.d
    query, key = x.whole(), x.whole()  # filled span by span
    normed = _normed(x)
    for _ in range(2):
        projected = x.rows()
        rotate(x)
        del projected
    del normed
    if x.cut > 1:
        query = _arrive(x, _leave(x))
        key = _arrive(x, _leave(x))
    here = d.heads // x.cut
    heads = -(-here // x.groups)
    every = d.tokens * x.cut  # of these heads there are the tokens of all cards
    lanes = d.batch * every * heads * (d.dim // d.heads)
    # One group of heads; the next one begins when this one's tensors are gone.
    value = x.whole() if whole_values else x.tape.new(lanes, d.size)
    normed = _normed(x)
    x.rows() if whole_values else x.rows(elements=lanes * x.span // d.tokens)
    del normed
    if x.cut > 1:
        value = _arrive(x, _leave(x))
    lse = x.lse(every, heads)
    out = x.tape.new(lanes, d.size)
    del lse, value, out, key
    projected = x.rows()
    add_gated(x)
    x.tape.during(query, projected)


def rest_by_rows(x: Lean) -> None:
    d = x.d
    keys = _context(x)
    normed = _normed(x)
    query = x.rows()
    del normed
    query = x.rows()
    lse = x.lse(x.span, d.heads)
    image = x.rows() if d.image_tokens else None
    out = x.rows()
    del lse, image
    projected = x.rows()
    del query, out, projected
    normed = _normed(x)
    inner = x.rows(elements=d.batch * x.span * d.ffn)
    del normed
    fed = x.rows()
    del inner
    add_gated(x)
    x.tape.during(*keys, fed)


def _block(x: Lean, exact: bool, whole_values: bool) -> None:
    if exact:
        change, texts = _self_attention(x)
        held = [change]
        del change
        held.append(cross_attention(x, held, texts))
        del texts
        change = feed_forward(x, held)
        add_gated(x)
        x.tape.during(change)
    else:
        _self_attention_by_heads(x, whole_values)
        rest_by_rows(x)


def _vace_block(
    x: Lean, branches: list[Blob], index: int, first: bool, exact: bool, whole_values: bool
) -> Blob:
    """``run_vace_block`` for one pass: the hint; ``branches`` holds the state of every pass."""
    if first:
        before = branches[index]  # the caller's, alive until the block is done
        branches[index] = x.whole()
        _block(x, exact, whole_values)
        hint = x.whole()
        x.tape.during(before)
        return hint
    _block(x, exact, whole_values)
    return x.whole()


def longest_span(tokens: int, first: int, rows: int) -> int:
    """Return the length of the longest span when ``first`` tokens and the rest are two runs."""
    runs = [tokens] if first == 0 else [first, tokens - first]
    return max(-(-run // max(1, -(-run // rows))) for run in runs if run)


def _embed_every_token(tape: Tape, shape: TransformerShape, d: Dims) -> None:
    """``_all_tokens`` in ``forward/timestep.py``: seven hidden states, then a row per run."""
    rows = d.batch * d.tokens
    sines = tape.new(rows * shape.freq_dim, FP32)
    first = tape.new(d.hidden, FP32)
    activated = tape.new(d.hidden, FP32)
    del first
    second = tape.new(d.hidden, FP32)
    del activated, sines
    temb = second if d.size == FP32 else tape.new(d.hidden, d.size)
    del second
    tape.new(6 * d.hidden, d.size)
    tape.during(temb)


@lru_cache(maxsize=512)
def lean_peak(
    shape: TransformerShape, *, batch: int, latent_frames: int, latent_height: int,
    latent_width: int, size: int, per_token: bool = False, exact: bool = True, passes: int = 1,
    rows: int = LEAN_ROWS, groups: int = LEAN_HEAD_GROUPS, embed_every_token: bool = False,
    whole_values: bool = False, cut: int = 1, coded: bool = False,
) -> int:  # fmt: skip
    """Return the peak bytes of the lean forward, with its inputs but without weights.

    Arguments as for ``transformer_peak``; ``per_token`` means two runs of timesteps (that of the
    first frame and that of the rest). ``exact`` False splits matrix products. ``passes`` calls go
    through the blocks together (guidance with streamed weights). ``embed_every_token`` is what an
    exact forward with ``per_token`` does on a GPU. ``whole_values`` means that the value projection
    is quantised or has a LoRA and cannot be split by heads. ``cut`` is over how many cards the
    tokens are cut; what is around the blocks is computed whole on each. ``coded`` lets attention
    take 8 bit.
    """
    tape = Tape()
    tokens = window_tokens(shape, latent_frames, latent_height, latent_width)
    frame = tokens * shape.patch_size[0] // latent_frames
    images = 2 if shape.pos_embed_seq_len else 1
    image_tokens = 0 if shape.image_dim is None else IMAGE_TOKENS * images
    d = Dims(shape, batch, tokens, size, False, image_tokens)
    own = Dims(shape, batch, tokens // cut, size, False, image_tokens)
    span = longest_span(own.tokens, min(frame, own.tokens) if per_token else 0, rows)
    lean, whole_values = Lean(tape, own, span, groups, cut, coded=coded), whole_values or cut > 1
    latent = (latent_frames, latent_height, latent_width)
    held = [forward_inputs(tape, shape, d, latent, per_token=per_token)]
    held += [(tape.new(batch * TEXT_TOKENS * shape.text_dim, size),) for _ in range(passes - 1)]
    vace = len(shape.vace_layers)
    branches: list[Blob] = []
    # What each pass keeps from its first block to its last.
    for _ in range(passes):
        rope = tape.new(tokens * shape.head_dim, FP32), tape.new(tokens * shape.head_dim, FP32)
        if per_token and exact and embed_every_token:
            _embed_every_token(tape, shape, d)
        runs = 2 * _REPEATED_TIMESTEPS if per_token else 1
        times = time_embedding(tape, shape, d, rows=batch * runs)
        held += [rope, times, text_embedding(tape, d)[:1]]
        embedded = tape.new(d.hidden, size)
        held.append((lean.whole(),))
        del embedded
        if vace:
            controls = control_tokens(tape, d)
            branches.append(controls if cut == 1 else lean.whole())
            del controls
    # A block leaves nothing behind but the hidden states it overwrites, and one pass's temporaries
    # are gone before the next pass takes the block.
    for number in range(min(shape.layers, 2)):
        hints: list[Blob] = []
        for index in range(passes) if number < vace else ():
            hints.append(_vace_block(lean, branches, index, number == 0, exact, whole_values))
        if number + 1 == vace:
            branches.clear()
        _block(lean, exact, whole_values)
        tape.during(*hints)
    normed = all_normed(lean)
    patch = prod(shape.patch_size) * shape.out_channels
    out = tape.new(batch * own.tokens * patch, size)
    del normed
    if cut > 1:
        out = tape.new(batch * tokens * patch, size)
    tape.new(batch * tokens * patch, size)
    tape.during(out, *(blob for group in held for blob in group))
    return tape.peak
