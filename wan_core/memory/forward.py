"""The activation memory of Wan's transformer: diffusers' own code, replayed without tensors.

Each function here follows one function of diffusers 0.42 (``transformer_wan.py``) line by line, but
with blobs that have only a size in place of tensors. A blob is counted from its creation until
Python drops the last reference, exactly as a tensor's memory is. A variable that keeps a tensor
alive longer than needed is therefore counted as well. That is why variables, their order and every
``del`` matter here: they stand for those in the original, and removing one that looks unused
changes the estimate. The peak does not depend on the number of blocks, so two are enough.

What such a replay cannot see (workspaces of libraries, gaps in the allocator, the CUDA context) is
added by ``stages``. ``forward_lean``, ``vae`` and ``vae_lean`` use the same tape. Standard library
only.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Final

from ..models import IMAGE_TOKENS, TEXT_TOKENS, UNSHUFFLED, TransformerShape

_GRAIN = 512
"""The smallest unit of the CUDA caching allocator; the size of a tensor is rounded up to it."""
FP32 = 4
"""Bytes of a float32 number."""


class Tape:
    """Counts the bytes of all blobs that are alive: ``live`` now, ``peak`` at most so far.

    ``workspace`` says whether memory that a library takes during an operator is counted, too.
    """

    __slots__ = ("live", "peak", "workspace")

    def __init__(self, workspace: bool = False) -> None:
        self.live = self.peak = 0
        self.workspace = workspace

    def new(self, elements: int, size: int) -> Blob:
        """Return a blob of ``elements`` numbers of ``size`` bytes."""
        return Blob(self, elements, size)

    def during(self, *held: Blob) -> None:
        """Do nothing, but keep ``held`` alive until here, as the original's variables do."""


class Blob:
    """Stands for a tensor; counted on the tape until Python drops the last reference to it."""

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
    """Return the result of an element-wise operator: the largest input's shape, the widest dtype.

    ``size`` overrides the bytes per number.
    """
    wide = max([x, *others], key=lambda blob: blob.elements)
    return Blob(x.tape, wide.elements, size or max(x.size, *(o.size for o in others), 0))


def _to(x: Blob, size: int) -> Blob:
    # Like ``Tensor.to``: without a change of dtype it is the same tensor and costs nothing.
    return x if x.size == size else Blob(x.tape, x.elements, size)


# --------------------------------------------------------------------------- transformer


class Dims:
    """The numbers that one forward depends on; ``size`` is the bytes per number."""

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
    """``(x.float() + y * gate).type_as(x)``; ``widen``: y becomes fp32 first (feed-forward)."""
    wide = _to(x, FP32)
    other = _to(y, FP32) if widen else y
    product = _out(other, size=FP32)
    del other, y
    total = _out(wide, product)
    del wide, product
    return _to(total, x.size)


def _rotated(x: Blob) -> Blob:
    """``apply_rotary_emb``; the tables are float32, so both halves are computed in float32."""
    out = _out(x)
    for _ in range(2):
        left = x.tape.new(x.elements // 2, FP32)
        right = x.tape.new(x.elements // 2, FP32)
        _out(left, right)
        del left, right
    return out


def _attend(query: Blob, d: Dims) -> Blob:
    # Fused kernels also return the log-sum-exp of each query, for a backward pass.
    lse = query.tape.new(d.batch * d.heads * d.tokens, FP32)
    out = _out(query)
    query.tape.during(lse)
    return out


def _self_attention(x: Blob, d: Dims) -> Blob:
    query, key, value = _out(x), _out(x), _out(x)  # projections
    query = _out(query)  # norms; the result exists before the variable lets go of its input
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
    """One ``WanTransformerBlock.forward``; the model's loop keeps ``x`` alive meanwhile."""
    modulation = d.hidden if d.per_token else d.batch * d.dim
    tape = x.tape
    # The table plus ``temb.float()``; its six chunks are views that live to the end of the block.
    widened = None if d.size == FP32 else tape.new(6 * modulation, FP32)
    six = tape.new(6 * modulation, FP32)
    del widened
    # ``normed`` and ``attended`` are rebound only when the next value exists, as in the original.
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


def _vace_block(control: Blob, d: Dims, *, first: bool) -> tuple[Blob, Blob]:
    """One ``WanVACETransformerBlock.forward``: the hint, and the branch's new state.

    The caller keeps the old state alive meanwhile.
    """
    tape, modulation = control.tape, d.batch * d.dim
    if first:
        control = _out(control)  # proj_in
        control = _out(control)  # the patched latents are added
    widened = None if d.size == FP32 else tape.new(6 * modulation, FP32)
    six = tape.new(6 * modulation, FP32)
    del widened
    normed = _modulated_norm(control, d, modulation)
    attended = _self_attention(normed, d)
    control = _gated_residual(control, attended, widen=False)
    normed = _plain_norm(control, d)
    attended = _cross_attention(normed, d)
    control = _out(control, attended)
    normed = _modulated_norm(control, d, modulation)
    fed = _feed_forward(normed, d)
    control = _gated_residual(control, fed, widen=True)
    hint = _out(control)
    tape.during(six, attended, normed, fed)
    return hint, control


class _Hints:
    """The VACE branch of one forward: its state, and the hints that are alive.

    ``at_once``: all hints are made before the first block, as in diffusers' own forward. Otherwise
    each is made just before its block (``forward/vace.py``).
    """

    def __init__(self, tape: Tape, d: Dims, count: int, at_once: bool) -> None:
        self.d, self.count, self.at_once = d, count, at_once
        self.states: Blob | None = control_tokens(tape, d)
        self.hints: list[Blob] = []

    def before(self, number: int) -> None:
        """Make what is made before base block ``number``, as if every base block had a hint."""
        wanted = range(self.count) if self.at_once and number == 0 else (number,)
        for index in wanted if not (self.at_once and number) else ():
            if self.states is None or index >= self.count:
                return
            hint, self.states = _vace_block(self.states, self.d, first=index == 0)
            self.hints.append(hint)
            if index + 1 == self.count and not self.at_once:
                self.states = None

    def after(self, hidden: Blob) -> Blob:
        """Add a hint to the output of a base block."""
        if not self.hints:
            return hidden
        hint = self.hints.pop(0)
        if not self.at_once:  # in place
            return hidden
        scaled = _out(hint)
        return _out(hidden, scaled)


def control_tokens(tape: Tape, d: Dims) -> Blob:
    """The patched control: what the convolution gives, copied to where the padding would follow."""
    patched = tape.new(d.hidden, d.size)
    padded = _out(patched)
    del patched
    return padded


def _plain_norm(x: Blob, d: Dims) -> Blob:
    wide = _to(x, FP32)
    normed = _layer_norm(wide, d.batch * d.tokens)
    del wide
    return _to(normed, x.size)


def time_embedding(tape: Tape, shape: TransformerShape, d: Dims, rows: int) -> tuple[Blob, Blob]:
    """Return ``temb`` and ``timestep_proj`` for ``rows`` timesteps: one per sample or per token."""
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
    """Return the embeddings of text and image, joined for cross attention, and what stays alive."""
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
    """Return the number of tokens of so many latent frames of this latent size."""
    step_t, step_h, step_w = shape.patch_size
    return (frames // step_t) * (height // step_h) * (width // step_w)


def forward_inputs(
    tape: Tape, shape: TransformerShape, d: Dims, latent: tuple[int, int, int], *, per_token: bool
) -> tuple[Blob, ...]:
    """Return the arguments of the model's forward: latents, timesteps, text, image and control.

    Of Animate also the pose's latents, and the face's tokens as they are given and with the
    character's frame in front.
    """
    frames, height, width = latent
    inputs = [tape.new(d.batch * shape.in_channels * frames * height * width, d.size)]
    inputs.append(tape.new(d.batch * (d.tokens if per_token else 1), FP32))
    inputs.append(tape.new(d.batch * TEXT_TOKENS * shape.text_dim, d.size))
    if shape.image_dim is not None:
        inputs.append(tape.new(d.batch * d.image_tokens * shape.image_dim, d.size))
    if shape.vace_in_channels is not None:
        inputs.append(tape.new(d.batch * shape.vace_in_channels * frames * height * width, d.size))
    if shape.face is not None:
        pose = d.batch * shape.out_channels * (frames - 1) * height * width
        tokens = d.batch * (shape.face.heads + 1) * d.dim
        inputs.append(tape.new(pose, d.size))
        inputs += [tape.new(tokens * count, d.size) for count in (frames - 1, frames)]
    return tuple(inputs)


def _face_adapter(x: Blob, d: Dims) -> Blob:
    """One ``WanAnimateFaceBlockAttnProcessor``; keys and values are few and not counted."""
    normed = x.tape.new(x.elements, x.size)
    query = _out(x)
    query = _out(query)
    del normed
    attended = _attend(query, d)
    return _out(attended)


def face_tokens(shape: TransformerShape, frames: int) -> int:
    """Return how many numbers the tokens of a face are for so many latent frames."""
    return 0 if shape.face is None else frames * (shape.face.heads + 1) * shape.dim


_FACES_AT_ONCE: Final = 8
"""Crops of a face that ``forward.encode_faces`` encodes together."""


def face_peak(shape: TransformerShape, *, size: int, frames: int) -> int:
    """Return the bytes that encoding the face of ``frames`` latent frames takes at most.

    The peak lies in the first residual block: its input, what the first convolution has made of it,
    and the steps of the activation.
    """
    if shape.face is None:
        return 0
    pixels = shape.face.size**2 * _FACES_AT_ONCE
    tokens = face_tokens(shape, frames)
    return (pixels * (3 + 5 * shape.face.widths[0]) + 2 * tokens) * size


@lru_cache(maxsize=512)
def transformer_peak(
    shape: TransformerShape, *, batch: int, latent_frames: int, latent_height: int,
    latent_width: int, size: int, per_token: bool = False, hints_at_once: bool = False,
) -> int:  # fmt: skip
    """Return the peak bytes of one forward, with its inputs but without weights.

    ``size`` is the bytes per number of the transformer's dtype (4 or 2); ``per_token`` means a
    timestep for each token, as diffusers passes it for TI2V-5B. ``hints_at_once`` says that a VACE
    model's hints are all made before its first block (see ``forward.hints_in_turn``). Frames,
    height and width are those of the latents.
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
    pose = added = None
    if shape.face is not None:
        pose = tape.new(d.hidden * (latent_frames - 1) // latent_frames, size)
    vace = len(shape.vace_layers)
    hints = _Hints(tape, d, vace, hints_at_once) if vace else None
    temb, projection = time_embedding(tape, shape, d, batch * (tokens if per_token else 1))
    text = text_embedding(tape, d)
    # All blocks are alike: what two of them reach is the peak of any number.
    for number in range(min(shape.layers, 2)):
        if hints is not None:
            hints.before(number)
        hidden = _block(hidden, d)
        if hints is not None:
            hidden = hints.after(hidden)
        # What an adapter adds stays alive until the next one has made its own.
        if shape.face is not None and number % shape.face_every == 0:
            added = _face_adapter(hidden, d)
            hidden = _out(hidden, added)
    modulation = d.hidden if per_token else batch * d.dim
    head = tape.new(2 * modulation, FP32)
    hidden = _modulated_norm(hidden, d, modulation)
    patch = prod(shape.patch_size) * shape.out_channels
    hidden = tape.new(batch * tokens * patch, size)
    _out(hidden)
    held = (blob for blob in (pose, added) if blob is not None)
    tape.during(*inputs, *rope, temb, projection, *text, head, *held)
    return tape.peak


def camera_peak(
    shape: TransformerShape, *, batch: int, latent_frames: int, latent_height: int,
    latent_width: int, size: int, passes: int = 1, channels_last: bool = False,
) -> int:  # fmt: skip
    """Return the peak bytes while a camera's rays become tokens (``forward.fun.camera_tokens``).

    With the forward's inputs and the patched latents, but without the rays themselves, which stay.
    In a lean forward that splits its products this is more than what the blocks need.
    ``channels_last``: cuDNN convolves copies of its input and its result in that order, beside
    both (1.49 GiB in all for the 1.3B at 480p81 in bf16, measured on an H200).
    """
    tokens = window_tokens(shape, latent_frames, latent_height, latent_width)
    image_tokens = 0 if shape.image_dim is None else IMAGE_TOKENS
    tape, latent = Tape(), (latent_frames, latent_height, latent_width)
    d = Dims(shape, batch, tokens, size, False, image_tokens)
    held = [*forward_inputs(tape, shape, d, latent, per_token=False)]
    # Each pass has a text of its own; the last one's tokens are made beside those of the others.
    held += [tape.new(batch * TEXT_TOKENS * shape.text_dim, size) for _ in range(passes - 1)]
    for _ in range(passes):
        held += text_embedding(tape, d)[:1]
    held += [tape.new(tokens * shape.head_dim, FP32) for _ in range(2 * passes)]  # rotary tables
    held += [tape.new(d.hidden, size) for _ in range(passes)]
    one = tokens * shape.dim  # the camera is the same for every clip of a batch
    pixels = shape.patch_size[1] * shape.patch_size[2] * UNSHUFFLED**2
    rays = (shape.camera_channels or 0) * tokens * pixels
    unshuffled = tape.new(rays, size)
    maps = [tape.new(one, size)]
    if channels_last:
        tape.during(tape.new(rays, size), tape.new(one, size), unshuffled)
    del unshuffled
    maps += [tape.new(one, size) for _ in range(2)]
    tape.during(*maps, *held)
    return tape.peak


def text_encoder_peak(size: int, *, wide_softmax: bool = False) -> int:
    """Return the peak bytes of umT5-xxl on one prompt of 512 tokens, without weights.

    The peak is reached in attention and does not depend on depth: the scores (64 heads, 512 x 512),
    the position bias and the softmax's result are alive at once, beside six hidden states. On CUDA
    (``wide_softmax``) there is no fused kernel with a position bias. Scores and softmax are float32
    then, beside two bias maps, a mask of bytes and fourteen hidden states (in bf16 264.5 MiB,
    traced on an H100).
    """
    scores, hidden = 64 * TEXT_TOKENS * TEXT_TOKENS, TEXT_TOKENS * 4096
    if wide_softmax:
        return scores * (2 * FP32 + 1 + 2 * size) + 14 * hidden * size
    return (3 * scores + 6 * hidden) * size
