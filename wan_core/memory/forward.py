"""Bytes alive while a Wan model runs, beside its weights: the models' own code, without tensors.

Each function here follows one ``forward`` of diffusers 0.42 (``transformer_wan.py``,
``autoencoder_kl_wan.py``) line by line, with objects that know nothing but their size. Python's
reference counting decides when one dies, exactly as it does for the model's tensors, so also what
is kept alive by a name that is bound again too late is counted. Peaks do not depend on the number
of transformer blocks, and the VAE's caches are full after three chunks, so little is executed.

What no such run can see (workspaces of libraries, the allocator's rounding to large blocks, the
context) is added by ``memory``. Standard library only.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

from ..models import IMAGE_TOKENS, TEXT_TOKENS, TransformerShape

_GRAIN = 512
"""The CUDA caching allocator's smallest unit; every tensor is rounded up to it."""
FP32 = 4


class Tape:
    """Counts the bytes of the blobs that are alive, now and at most.

    ``workspace`` says whether memory that libraries take for an operator is counted too.
    """

    __slots__ = ("live", "peak", "workspace")

    def __init__(self, workspace: bool = False) -> None:
        self.live = self.peak = 0
        self.workspace = workspace

    def new(self, elements: int, size: int) -> Blob:
        """Return a blob of ``elements`` numbers of ``size`` bytes."""
        return Blob(self, elements, size)

    def during(self, *held: Blob) -> None:
        """Do nothing; reads as "these are still bound here"."""


class Blob:
    """A tensor's size; counted on the tape from its birth until Python drops it."""

    __slots__ = ("elements", "nbytes", "size", "tape")

    def __init__(self, tape: Tape, elements: int, size: int) -> None:
        self.tape, self.elements, self.size = tape, elements, size
        self.nbytes = -(-elements * size // _GRAIN) * _GRAIN
        tape.live += self.nbytes
        if tape.live > tape.peak:
            tape.peak = tape.live

    def __del__(self) -> None:
        self.tape.live -= self.nbytes


def _out(x: Blob, *others: Blob, size: int | None = None) -> Blob:
    """Return the result of an element-wise operator, of the widest input's dtype."""
    wide = max([x, *others], key=lambda blob: blob.elements)
    return Blob(x.tape, wide.elements, size or max(x.size, *(o.size for o in others), 0))


def _to(x: Blob, size: int) -> Blob:
    return x if x.size == size else Blob(x.tape, x.elements, size)


# --------------------------------------------------------------------------- transformer


class Dims:
    """The numbers one forward depends on: batch, tokens, width and bytes per number."""

    __slots__ = ("batch", "dim", "ffn", "heads", "image_tokens", "per_token", "size", "tokens")

    def __init__(
        self, shape: TransformerShape, batch: int, tokens: int, size: int, per_token: bool,
        image_tokens: int,
    ) -> None:  # fmt: skip
        self.batch, self.tokens, self.size, self.per_token = batch, tokens, size, per_token
        self.dim, self.ffn, self.heads = shape.dim, shape.ffn_dim, shape.heads
        self.image_tokens = image_tokens

    @property
    def hidden(self) -> int:
        return self.batch * self.tokens * self.dim


def _layer_norm(x: Blob, rows: int) -> Blob:
    statistics = (x.tape.new(rows, FP32), x.tape.new(rows, FP32))
    out = x.tape.new(x.elements, x.size)
    x.tape.during(*statistics)
    return out


def _modulated_norm(x: Blob, d: Dims, modulation: int) -> Blob:
    """``(norm(x.float()) * (1 + scale) + shift).type_as(x)``."""
    tape = x.tape
    wide = _to(x, FP32)
    normed = _layer_norm(wide, d.batch * d.tokens)
    del wide
    one_plus = tape.new(modulation, FP32)
    scaled = _out(normed, one_plus)
    del normed, one_plus
    shifted = _out(scaled)
    del scaled
    return _to(shifted, x.size)


def _gated_residual(x: Blob, y: Blob, *, widen: bool) -> Blob:
    """``(x.float() + y * gate).type_as(x)``; the feed-forward's ``y`` is widened first."""
    wide = _to(x, FP32)
    other = _to(y, FP32) if widen else y
    product = _out(other, size=FP32)
    del other, y
    total = _out(wide, product)
    del wide, product
    return _to(total, x.size)


def _rotated(x: Blob) -> Blob:
    """``apply_rotary_emb``: the tables are float32, so the halves are computed in it."""
    out = _out(x)
    for _ in range(2):
        left = x.tape.new(x.elements // 2, FP32)
        right = x.tape.new(x.elements // 2, FP32)
        _out(left, right)
        del left, right
    return out


def _attend(query: Blob, d: Dims) -> Blob:
    lse = query.tape.new(d.batch * d.heads * d.tokens, FP32)
    out = _out(query)
    query.tape.during(lse)
    return out


def _self_attention(x: Blob, d: Dims) -> Blob:
    query, key, value = _out(x), _out(x), _out(x)
    query = _out(query)
    key = _out(key)
    query = _rotated(query)
    key = _rotated(key)
    hidden = _attend(query, d)
    projected = _out(hidden)
    x.tape.during(key, value)
    return projected


def _cross_attention(x: Blob, d: Dims) -> Blob:
    tape = x.tape
    text = d.batch * TEXT_TOKENS * d.dim
    query = _out(x)
    key, value = tape.new(text, d.size), tape.new(text, d.size)
    query = _out(query)
    key = _out(key)
    image = None
    key_value_image: tuple[Blob, ...] = ()
    if d.image_tokens:
        tokens = d.batch * d.image_tokens * d.dim
        key_value_image = (tape.new(tokens, d.size), tape.new(tokens, d.size))
        key_value_image = (_out(key_value_image[0]), key_value_image[1])
        image = _attend(query, d)
    hidden = _attend(query, d)
    if image is not None:
        hidden = _out(hidden, image)
    projected = _out(hidden)
    tape.during(key, value, *key_value_image)
    return projected


def _feed_forward(x: Blob, d: Dims) -> Blob:
    projected = x.tape.new(d.batch * d.tokens * d.ffn, d.size)
    activated = _out(projected)
    del projected
    return x.tape.new(x.elements, activated.size)


def _block(x: Blob, d: Dims) -> Blob:
    """One ``WanTransformerBlock.forward``; ``x`` stays bound in the model's own loop."""
    modulation = d.hidden if d.per_token else d.batch * d.dim
    tape = x.tape
    widened = None if d.size == FP32 else tape.new(6 * modulation, FP32)
    six = tape.new(6 * modulation, FP32)
    del widened
    normed = _modulated_norm(x, d, modulation)
    attended = _self_attention(normed, d)
    hidden = _gated_residual(x, attended, widen=False)
    normed = _plain_norm(hidden, d)
    attended = _cross_attention(normed, d)
    hidden = _out(hidden, attended)
    normed = _modulated_norm(hidden, d, modulation)
    fed = _feed_forward(normed, d)
    hidden = _gated_residual(hidden, fed, widen=True)
    tape.during(six, attended)
    return hidden


def _plain_norm(x: Blob, d: Dims) -> Blob:
    wide = _to(x, FP32)
    normed = _layer_norm(wide, d.batch * d.tokens)
    del wide
    return _to(normed, x.size)


def time_embedding(tape: Tape, shape: TransformerShape, d: Dims, rows: int) -> tuple[Blob, Blob]:
    """``temb`` and ``timestep_proj``, for so many timesteps: one per sample, or per token."""
    half = tape.new(rows * shape.freq_dim // 2, FP32)
    scaled = _out(half)
    del half
    sine, cosine = _out(scaled), _out(scaled)
    both = tape.new(rows * shape.freq_dim, FP32)
    del sine, cosine, scaled
    flipped = _out(both)
    del both
    first = tape.new(rows * d.dim, FP32)
    activated = _out(first)
    del first
    second = _out(activated)
    del activated, flipped
    temb = _to(second, d.size)
    del second
    _out(temb)  # the SiLU's result, gone when its projection is made
    return temb, tape.new(rows * 6 * d.dim, d.size)


def text_embedding(tape: Tape, d: Dims) -> tuple[Blob, ...]:
    """The text's and the image's embeddings, joined for cross attention."""
    first = tape.new(d.batch * TEXT_TOKENS * d.dim, d.size)
    activated = _out(first)
    del first
    text = _out(activated)
    if not d.image_tokens:
        return (text,)
    del activated
    image = tape.new(d.batch * d.image_tokens * d.dim, d.size)
    joined = tape.new(text.elements + image.elements, d.size)
    del text
    return joined, image


def window_tokens(shape: TransformerShape, frames: int, height: int, width: int) -> int:
    """Return the tokens of so many latent frames of a latent size."""
    step_t, step_h, step_w = shape.patch_size
    return (frames // step_t) * (height // step_h) * (width // step_w)


def forward_inputs(
    tape: Tape, shape: TransformerShape, d: Dims, latent: tuple[int, int, int], *, per_token: bool
) -> tuple[Blob, ...]:
    """The arguments of the model's forward: latents, timesteps, text and image embeddings."""
    frames, height, width = latent
    inputs = [tape.new(d.batch * shape.in_channels * frames * height * width, d.size)]
    inputs.append(tape.new(d.batch * (d.tokens if per_token else 1), FP32))
    inputs.append(tape.new(d.batch * TEXT_TOKENS * shape.text_dim, d.size))
    if shape.image_dim is not None:
        inputs.append(tape.new(d.batch * d.image_tokens * shape.image_dim, d.size))
    return tuple(inputs)


@lru_cache(maxsize=512)
def transformer_peak(
    shape: TransformerShape, *, batch: int, latent_frames: int, latent_height: int,
    latent_width: int, size: int, per_token: bool = False,
) -> int:  # fmt: skip
    """Return the peak bytes of one forward, inputs included and weights not.

    ``size`` is the bytes per number of the transformer's dtype (4 or 2); ``per_token`` means a
    timestep for each token, as diffusers passes it for TI2V-5B. Sizes are those of the latents.
    """
    tape = Tape()
    tokens = window_tokens(shape, latent_frames, latent_height, latent_width)
    images = 2 if shape.pos_embed_seq_len else 1
    image_tokens = 0 if shape.image_dim is None else IMAGE_TOKENS * images
    d = Dims(shape, batch, tokens, size, per_token, image_tokens)
    latent = (latent_frames, latent_height, latent_width)
    inputs = forward_inputs(tape, shape, d, latent, per_token=per_token)
    rope = tape.new(tokens * shape.head_dim, FP32), tape.new(tokens * shape.head_dim, FP32)
    embedded = tape.new(d.hidden, size)
    hidden = _out(embedded)
    del embedded
    temb, projection = time_embedding(tape, shape, d, batch * (tokens if per_token else 1))
    text = text_embedding(tape, d)
    for _ in range(min(shape.layers, 2)):
        hidden = _block(hidden, d)
    modulation = d.hidden if per_token else batch * d.dim
    head = tape.new(2 * modulation, FP32)
    hidden = _modulated_norm(hidden, d, modulation)
    patch = prod(shape.patch_size) * shape.out_channels
    hidden = tape.new(batch * tokens * patch, size)
    _out(hidden)
    tape.during(*inputs, *rope, temb, projection, *text, head)
    return tape.peak


def text_encoder_peak(size: int, *, wide_softmax: bool = False) -> int:
    """Return the peak bytes of umT5-xxl on one prompt of 512 tokens, weights not included.

    Independent of depth; attention sets it: scores (64 heads, 512 x 512), the position bias and
    the softmax's result at once, beside six hidden states. With a position bias CUDA has no fused
    kernel: scores and softmax are float32 then, beside two bias maps, a mask of bytes and fourteen
    hidden states (``wide_softmax``; traced on an H100: 264.5 MiB in bf16).
    """
    scores, hidden = 64 * TEXT_TOKENS * TEXT_TOKENS, TEXT_TOKENS * 4096
    if wide_softmax:
        return scores * (2 * FP32 + 1 + 2 * size) + 14 * hidden * size
    return (3 * scores + 6 * hidden) * size
