"""The lean forward of one Wan transformer block: half the activation memory, the same bits.

At the peak of a 14B block, diffusers holds tensors worth 11.1 hidden states, because elementwise
operations make fp32 temporaries of full length and variables are rebound only after the new value
exists. The lean block holds 5.1: the hidden states, q, k, v and the attention output. To get there

- elementwise operations work on rows of tokens, so that their fp32 temporaries stay small;
- rotary embeddings and residual additions happen in place;
- the input of a projection is released as soon as it has been used;
- the block overwrites the hidden states it was given.

No matrix product is split, so the result equals diffusers' bit for bit.

``exact=False`` goes further and splits matrix products too: self attention by groups of heads
(v exists for one group at a time, and the output overwrites q), cross attention and feed-forward
by rows of tokens. That holds 3.6 hidden states, but rounding may differ on some devices. The
computation follows diffusers' ``transformer_wan.py`` (0.35 to 0.42, see ``sources``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import (
    NOTHING,
    Fused,
    Modulation,
    Shared,
    Span,
    TimestepRuns,
    attend,
    fused_for,
    norm_all,
    products_of,
    rotate_all,
    rotate_span,
    shared_by,
)
from ..loading import attends_as_torch
from ..memory import LEAN_HEAD_GROUPS, LEAN_ROWS
from ..models import TEXT_TOKENS
from .cut import Cut

_EVERY: Span = (slice(None), 0)


@dataclass(frozen=True, slots=True)
class LeanOptions:
    """How a lean forward divides its work.

    Elementwise operations take at most ``rows`` tokens at once. With ``exact`` False, feed-forward
    and cross attention do so too, and self attention runs in ``head_groups`` groups of heads. With
    ``blocks`` False the blocks keep diffusers' forward, and only what is around them is ours.
    """

    exact: bool = True
    rows: int = LEAN_ROWS
    head_groups: int = LEAN_HEAD_GROUPS
    blocks: bool = True
    fuse: bool = True
    """Whether fused kernels are used where they give the same bits (see ``kernels.fused``)."""
    quick: bool = False
    """Whether attention may use a kernel that rounds differently (see ``kernels.attention``)."""
    eight_bit: bool = False
    """Whether layers stored in 8 bit are multiplied in 8 bit (see ``kernels.products``)."""
    eight_bit_projections: bool = True
    """Whether that counts for the projections of attention too, and not for feed-forwards alone."""
    attention_8bit: bool = False
    """Whether, with ``quick``, attention itself may be computed by kernels that round to 8 bit."""
    cut: Cut | None = None
    """Where the tokens are cut over several processes: which are computed here."""

    @property
    def coded_attention(self) -> bool:
        """Whether the projections of attention may be multiplied in 8 bit."""
        return self.eight_bit and self.eight_bit_projections

    def fused(self, hidden: Tensor, heads: int, *, per_token: bool = False) -> Fused:
        """Return which fused kernels a block with ``hidden`` (B, L, dim) may use."""
        return fused_for(hidden, heads, per_token) if self.fuse else NOTHING


@dataclass(frozen=True, slots=True)
class Beside:
    """Tokens of another stream that frames see in self attention besides their own (Animate 2).

    ``key`` and ``value`` are (1, n * frame_tokens, dim), rotated; frame j of the L tokens attends
    to all L and to the frame j - 1 of these, the first to its own stream only.
    """

    key: Tensor
    value: Tensor
    frame_tokens: int

    def room_for(self, own: Tensor) -> Tensor:
        """Return an empty tensor for keys or values like (B, L, dim), and a frame after them."""
        batch, tokens, dim = own.shape
        return own.new_empty(batch, tokens + self.frame_tokens, dim)

    def widened(self, own: Tensor) -> Tensor:
        """Copy keys or values (B, L, dim) into a tensor with room for a frame after them."""
        wide = self.room_for(own)
        wide[:, : own.shape[1]] = own
        return wide

    def attend(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, options: LeanOptions
    ) -> Tensor:
        """Attend frame by frame; each frame's result is written over its queries."""
        each, own = self.frame_tokens, query.shape[1]
        for begin in range(0, own, each):
            end = own
            if begin:
                end, seen = own + each, slice(begin - each, begin)
                key[:, own:], value[:, own:] = self.key[:, seen], self.value[:, seen]
            rows = query[:, begin : begin + each]
            rows.copy_(_attend(attn, rows, key[:, :end], value[:, :end], attn.heads, options))
        return query


def run_block(
    block: Any,
    options: LeanOptions,
    hidden: Tensor,
    context: Tensor,
    temb: Tensor | TimestepRuns,
    rotary: tuple[Tensor, Tensor],
    fused: Fused = NOTHING,
    *,
    beside: Beside | None = None,
    keep: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Run a ``WanTransformerBlock``, or the part of a VACE block that is like one, on ``hidden``.

    ``hidden`` is (B, L, dim); it is overwritten and returned.

    ``context`` is (B, image + text tokens, dim), ``temb`` has six parts (see Modulation),
    ``rotary`` cos and sin (1, L, 1, head_dim); ``fused`` says which fused kernels may be used.
    ``beside`` are tokens of another stream; ``keep`` gets the keys and values of self attention.
    With ``keep`` self attention is not split. Not for use with gradients.
    """
    modulation = Modulation(
        block.scale_shift_table, temb, hidden.shape[1], options.rows, upcast=True, fused=fused
    )
    if options.exact:
        # What a part of the block adds to the hidden states is added by the next part, which takes
        # it from the list: the only reference to it, so that it is freed as soon as it is used.
        texts = cache(partial(_Context, block.attn2, context, options))
        given = (block, hidden, modulation, rotary, fused, options)
        held = [_self_attention(*given, beside, keep, meanwhile=texts)]
        held.append(_cross_attention(block, hidden, held, texts(), modulation, fused, options))
        del texts
        change = _feed_forward(block, hidden, held, modulation, options.eight_bit)
        modulation.add_all_gated(hidden, change, 5)
    else:
        if keep is not None:
            change = _self_attention(block, hidden, modulation, rotary, fused, options, None, keep)
            modulation.add_all_gated(hidden, change, 2)
            del change
        elif beside is not None:
            _self_attention_beside(block, options, hidden, modulation, rotary, fused, beside)
        else:
            _self_attention_by_heads(block, options, hidden, modulation, rotary, fused)
        _rest_by_rows(block, hidden, context, modulation, fused, options)
    return hidden


def attend_by(
    processor: Any, query: Tensor, key: Tensor, value: Tensor, options: LeanOptions
) -> Tensor:
    """Attend with diffusers' dispatcher, on the backend that ``processor`` is set to.

    ``query``, ``key``, ``value`` and the result are (B, n, heads, d). With ``options.quick``, and
    no other backend than torch's named, it is the fastest one.
    """
    if options.quick and attends_as_torch(processor):
        return attend(query, key, value, options.attention_8bit)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    out: Tensor = dispatch_attention_fn(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
        backend=processor._attention_backend,
    )  # fmt: skip
    return out.type_as(query)


def _attend(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, options: LeanOptions
) -> Tensor:
    """Attend as the block's processor does; all are (B, n, heads * d)."""
    q, k, v = (torch.unflatten(x, 2, (heads, -1)) for x in (query, key, value))
    return attend_by(attn.processor, q, k, v, options).flatten(2, 3)


def _project_out(attn: Any, held: list[Tensor], eight_bit: bool) -> Tensor:
    """Project the attention output that ``held`` holds, which is taken out of it."""
    layer = shared_by((attn.to_out[0],), held[0].dtype, eight_bit)
    layer.read(held.pop())
    projected: Tensor = attn.to_out[1](layer.project(last=True))
    return projected


def _self_attention(
    block: Any,
    hidden: Tensor,
    modulation: Modulation,
    rotary: tuple[Tensor, Tensor],
    fused: Fused,
    options: LeanOptions,
    beside: Beside | None = None,
    keep: list[tuple[Tensor, Tensor]] | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return what self attention adds to the hidden states, before its gate.

    ``meanwhile`` is done where a forward that is cut has to wait.
    """
    attn, spans, coded = block.attn1, modulation.spans, options.coded_attention
    layers = shared_by((attn.to_q, attn.to_k, attn.to_v), hidden.dtype, coded)
    # The normed input is made whole: each projection must be one product over all tokens to round
    # as diffusers' does.
    layers.read(modulation.all_normed_as(layers.kind, block.norm1, hidden, 0))
    heads, cut = attn.heads, options.cut
    if cut is not None:
        heads = cut.heads(heads)
        query, key, value = _exchanged(attn, layers, cut, spans, rotary, fused, meanwhile)
    else:
        query = rotate_all(attn.norm_q, layers.project(0), heads, spans, rotary, fused)
        key = rotate_all(attn.norm_k, layers.project(1), heads, spans, rotary, fused)
        if beside is not None:
            key = beside.widened(key)
        # v is the last to need the normed input. Released now, it makes way for the attention
        # output: the peak of the block is h, q, k, v and that output.
        value = layers.project(2, last=True)
        if keep is not None:
            keep.append((key, value))
    if beside is not None:
        value = beside.widened(value)
        held = [beside.attend(attn, query, key, value, options)]
    else:
        held = [_attend(attn, query, key, value, heads, options)]
    # q, k and v go before the output projection allocates its result.
    del query, key, value
    if cut is not None:
        held.append(cut.to_tokens(held.pop()))
    return _project_out(attn, held, coded)


def _exchanged(
    attn: Any, layers: Shared, cut: Cut, spans: list[Span], rotary: tuple[Tensor, Tensor],
    fused: Fused, meanwhile: Callable[[], object],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return query, key and value of all tokens, for the heads that are attended to here.

    v, which is neither normed nor turned, leaves first: it is on its way while q is projected, q
    while k is, and k while the texts' keys are, whose products are too small to fill a card. Each
    is waited for before the next leaves, which could not overtake it: what was sent makes way.
    """
    values = cut.to_heads(layers.project(2))
    query = rotate_all(attn.norm_q, layers.project(0), attn.heads, spans, rotary, fused)
    value = values.wait()
    queries = cut.to_heads(query)
    del query
    key = rotate_all(attn.norm_k, layers.project(1, last=True), attn.heads, spans, rotary, fused)
    query = queries.wait()
    keys = cut.to_heads(key)
    del key
    meanwhile()
    return query, keys.wait(), value


class _Context:
    """Keys and values of the text, and of the image where the model has one (Wan 2.1 I2V)."""

    def __init__(self, attn: Any, context: Tensor, options: LeanOptions) -> None:
        self._attn, self._options = attn, options
        self._image: tuple[Tensor, Tensor] | None = None
        text = context
        if attn.add_k_proj is not None:
            # The image's tokens come first. diffusers, too, counts on 512 text tokens after them.
            image_tokens = context.shape[1] - TEXT_TOKENS
            image, text = context[:, :image_tokens], context[:, image_tokens:]
            self._image = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
        self._text = attn.norm_k(attn.to_k(text)), attn.to_v(text)

    def attend(self, query: Tensor) -> Tensor:
        """Attend to text and image, add both and project the sum; ``query`` is (B, n, dim)."""
        attn = self._attn
        if self._image is None:
            out = _attend(attn, query, *self._text, attn.heads, self._options)
        else:
            image = _attend(attn, query, *self._image, attn.heads, self._options)
            out = _attend(attn, query, *self._text, attn.heads, self._options).add_(image)
            del image
        del query
        held = [out]
        del out
        return _project_out(attn, held, self._options.coded_attention)


def _cross_attention(
    block: Any,
    hidden: Tensor,
    held: list[Tensor],
    keys: _Context,
    modulation: Modulation,
    fused: Fused,
    options: LeanOptions,
) -> Tensor:
    """Add what self attention made, and return what cross attention adds."""
    attn = block.attn2
    layer = shared_by((attn.to_q,), hidden.dtype, options.coded_attention)
    layer.read(modulation.add_and_norm_as(layer.kind, hidden, held.pop(), 2, block.norm2, None))
    query = layer.project(last=True)
    query = norm_all(attn.norm_q, query, attn.heads, modulation.spans, fused)
    return keys.attend(query)


def _feed_forward(
    block: Any, hidden: Tensor, held: list[Tensor], modulation: Modulation, eight_bit: bool
) -> Tensor:
    """Add what cross attention made, and return what the feed-forward adds, before its gate."""
    first, second = _feeding(block.ffn, hidden.dtype, eight_bit)
    first.read(modulation.add_and_norm_as(first.kind, hidden, held.pop(), None, block.norm3, 3))
    return _fed(block.ffn, first, second)


def _feeding(ffn: Any, dtype: torch.dtype, eight_bit: bool) -> tuple[Shared, Any]:
    """Return the first layer of a feed-forward, and the second one's product if both have one."""
    layers = ffn.net[0].proj, ffn.net[2]
    products = (
        products_of(layers, dtype) if eight_bit and ffn.net[0].approximate == "tanh" else None
    )
    if products is None:
        return Shared(layers[:1]), None
    return Shared(layers[:1], products[:1]), products[1]


def _fed(ffn: Any, first: Shared, second: Any) -> Tensor:
    """Return the feed-forward of the tokens that its first layer has read."""
    if second is not None:
        return first.feed(second)
    # The output is the widest tensor of the block, so each input is released as soon as it has
    # been read.
    return _feed_out(ffn, first.project(last=True))


def _feed_out(ffn: Any, inner: Tensor) -> Tensor:
    """Apply the feed-forward's GELU to ``inner``, in place, and then its second projection."""
    # All at once: CPUs compute the last few numbers of a tensor in scalar code, which rounds
    # differently from the vector code, so pieces would get other bits.
    torch.ops.aten.gelu_(inner, approximate=ffn.net[0].approximate)
    out: Tensor = ffn.net[2](ffn.net[1](inner))
    return out


def _self_attention_by_heads(
    block: Any,
    options: LeanOptions,
    hidden: Tensor,
    modulation: Modulation,
    rotary: tuple[Tensor, Tensor],
    fused: Fused,
) -> None:
    """Self attention with q and k whole, but v for one group of heads at a time."""
    attn, cut, coded = block.attn1, options.cut, options.coded_attention
    # q and k cannot be made by groups: their norms average over all heads of a token.
    query, key = torch.empty_like(hidden), torch.empty_like(hidden)
    for span in modulation.spans:
        layers = shared_by((attn.to_q, attn.to_k), hidden.dtype, coded)
        layers.read(modulation.normed(block.norm1, hidden, 0, span))
        for index, (norm, whole) in enumerate(((attn.norm_q, query), (attn.norm_k, key))):
            rows = layers.project(index, last=index == 1)
            rotate_span(norm, rows, attn.heads, span, rotary, whole[:, span[0]], fused)
            del rows, whole
    values, here = None, attn.heads
    if cut is not None:
        here = cut.heads(here)
        query = cut.to_heads(query).wait()  # one by one: each takes the place of its own
        key = cut.to_heads(key).wait()
    # v by groups multiplies with rows of the weight. A quantised layer has no such rows, and a
    # hook (a LoRA's, for one) expects the whole output: then v is made whole. So it is where other
    # processes need their heads of it.
    if cut is not None or not is_plain_linear(attn.to_v):
        values = torch.empty_like(hidden)
        for span in modulation.spans:
            layer = shared_by((attn.to_v,), hidden.dtype, coded)
            layer.read(modulation.normed(block.norm1, hidden, 0, span))
            values[:, span[0]] = layer.project(last=True)
    if cut is not None and values is not None:
        values = cut.to_heads(values).wait()
    size = query.shape[-1] // here
    heads_each = -(-here // options.head_groups)
    for first in range(0, here, heads_each):
        heads = min(heads_each, here - first)
        lanes = slice(first * size, (first + heads) * size)
        if values is None:
            value = _value_of_heads(block, hidden, modulation, lanes)
        else:
            value = values[..., lanes]
        # Heads do not see each other, so this group's output can overwrite its queries.
        query[..., lanes] = _attend(attn, query[..., lanes], key[..., lanes], value, heads, options)
        del value
    del key, values
    if cut is not None:
        query = cut.to_tokens(query)
    for span in modulation.spans:
        out = _project_out(attn, [query[:, span[0]]], coded)
        modulation.add_gated(hidden, out, 2, span)
        del out


def _self_attention_beside(
    block: Any,
    options: LeanOptions,
    hidden: Tensor,
    modulation: Modulation,
    rotary: tuple[Tensor, Tensor],
    fused: Fused,
    beside: Beside,
) -> None:
    """Self attention beside another stream, projected span by span.

    Keys and values go straight to where there is room for a frame of the other stream, so that
    neither they nor the normed input are there a second time.
    """
    attn, coded = block.attn1, options.coded_attention
    query, key, value = torch.empty_like(hidden), beside.room_for(hidden), beside.room_for(hidden)
    for span in modulation.spans:
        layers = shared_by((attn.to_q, attn.to_k, attn.to_v), hidden.dtype, coded)
        layers.read(modulation.normed(block.norm1, hidden, 0, span))
        for index, (norm, whole) in enumerate(((attn.norm_q, query), (attn.norm_k, key))):
            rows = layers.project(index)
            rotate_span(norm, rows, attn.heads, span, rotary, whole[:, span[0]], fused)
            del rows, whole
        value[:, span[0]] = layers.project(2, last=True)
    beside.attend(attn, query, key, value, options)
    del key, value
    for span in modulation.spans:
        out = _project_out(attn, [query[:, span[0]]], coded)
        modulation.add_gated(hidden, out, 2, span)
        del out


def _value_of_heads(block: Any, hidden: Tensor, modulation: Modulation, lanes: slice) -> Tensor:
    """Return v (B, L, lanes) of some heads; the normed input is computed again, span by span."""
    weight, bias = block.attn1.to_v.weight[lanes], block.attn1.to_v.bias
    value = hidden.new_empty((*hidden.shape[:2], lanes.stop - lanes.start))
    for span in modulation.spans:
        normed = modulation.normed(block.norm1, hidden, 0, span)
        value[:, span[0]] = F.linear(normed, weight, None if bias is None else bias[lanes])
        del normed
    return value


def is_plain_linear(module: nn.Module) -> bool:
    """Say whether a layer is torch's own Linear without hooks or a replaced forward.

    Only then does its weight alone tell what it computes.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked


def _rest_by_rows(
    block: Any,
    hidden: Tensor,
    context: Tensor,
    modulation: Modulation,
    fused: Fused,
    options: LeanOptions,
) -> None:
    """Run cross attention and feed-forward for one span of tokens after the other.

    After self attention tokens no longer see each other, so a span can be finished and written
    back before the next one begins; no tensor of full length is made.
    """
    attn, ffn = block.attn2, block.ffn
    # Once for all spans: the context is the same for every token.
    keys = _Context(attn, context, options)
    for span in modulation.spans:
        rows = hidden[:, span[0]]
        layer = shared_by((attn.to_q,), hidden.dtype, options.coded_attention)
        layer.read(block.norm2(rows.float()).type_as(rows))
        query = layer.project(last=True)
        query = norm_all(attn.norm_q, query, attn.heads, [_EVERY], fused)
        rows.add_(keys.attend(query))
        del query
        first, second = _feeding(ffn, hidden.dtype, options.eight_bit)
        first.read(modulation.normed(block.norm3, hidden, 3, span))
        modulation.add_gated(hidden, _fed(ffn, first, second), 5, span)
