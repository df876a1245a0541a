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

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import LEAN_HEAD_GROUPS, LEAN_ROWS
from ..models import TEXT_TOKENS

Span = tuple[slice, int]
"""A slice of tokens, and the index of the run of equal timesteps that it lies in."""


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


class TimestepRuns(NamedTuple):
    """Per-token timestep embeddings, stored once per run of tokens with equal timesteps.

    ``values`` is (B, n, parts, dim); ``starts`` is the first token of each of the n runs.
    """

    values: Tensor
    starts: tuple[int, ...]


class Modulation:
    """The tokens' shift, scale and gate: a table (1, parts, dim) plus the timestep embedding.

    ``temb`` is (B, parts, dim), TimestepRuns, or (B, L, parts, dim). ``upcast`` converts it to
    fp32 before the table is added.
    """

    def __init__(
        self, table: Tensor, temb: Tensor | TimestepRuns, length: int, rows: int, upcast: bool
    ) -> None:
        self._table, self._upcast = table, upcast
        self._per_token: Tensor | None = None
        starts: tuple[int, ...] = (0,)
        if isinstance(temb, TimestepRuns):
            starts = temb.starts
            self._values = table.unsqueeze(1) + self._cast(temb.values)
        elif temb.ndim == 4:
            self._per_token = temb
        else:
            self._values = (table + self._cast(temb)).unsqueeze(1)
        self.spans: list[Span] = []
        for run, (begin, end) in enumerate(pairwise((*starts, length))):
            # Spans of equal size: a short last span could select another GEMM kernel, which
            # rounds differently.
            pieces = max(1, -(-(end - begin) // rows))
            edges = [begin + (end - begin) * i // pieces for i in range(pieces + 1)]
            self.spans += [(slice(a, b), run) for a, b in pairwise(edges)]

    def _cast(self, temb: Tensor) -> Tensor:
        return temb.float() if self._upcast else temb

    def part(self, index: int, span: Span) -> Tensor:
        """Return one part for a span's tokens, (B, 1 or tokens, dim)."""
        # Per-token embeddings are added to the table span by span: the sum over all tokens and
        # parts, which diffusers makes, is six fp32 hidden states.
        if self._per_token is not None:
            return self._table[:, index : index + 1] + self._cast(
                self._per_token[:, span[0], index]
            )
        return self._values[:, span[1] : span[1] + 1, index]

    def normed(
        self, norm: nn.Module, hidden: Tensor, shift: int, span: Span, out: Tensor | None = None
    ) -> Tensor:
        """Return ``norm(hidden) * (1 + scale) + shift`` for the tokens of a span.

        ``shift`` is the index of the shift among the parts; the scale is the part after it. The
        result is computed in fp32 and rounded once, into ``out`` if it is given.
        """
        rows = hidden[:, span[0]]
        wide: Tensor = norm(rows.float())
        wide.mul_(1 + self.part(shift + 1, span))
        if out is None:
            out = wide if wide.dtype == rows.dtype else torch.empty_like(rows)
        return torch.add(wide, self.part(shift, span), out=out)

    def all_normed(self, norm: nn.Module, hidden: Tensor, shift: int) -> Tensor:
        """Return :meth:`normed` of all tokens, computed span by span."""
        out = torch.empty_like(hidden)
        for span in self.spans:
            self.normed(norm, hidden, shift, span, out[:, span[0]])
        return out

    def add_gated(self, hidden: Tensor, change: Tensor, gate: int, span: Span) -> None:
        """Add ``change`` times its gate to the span of ``hidden``, in place, computed in fp32.

        ``change`` holds the span's tokens only; ``gate`` is the index of the gate among the parts.
        """
        hidden[:, span[0]].add_(change * self.part(gate, span))


def run_block(
    block: Any,
    options: LeanOptions,
    hidden: Tensor,
    context: Tensor,
    temb: Tensor | TimestepRuns,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Run a ``WanTransformerBlock``, or the part of a VACE block that is like one, on ``hidden``.

    ``hidden`` is (B, L, dim); it is overwritten and returned.

    ``context`` is (B, image + text tokens, dim), ``temb`` has six parts (see Modulation),
    ``rotary`` cos and sin (1, L, 1, head_dim). Not for use with gradients.
    """
    modulation = Modulation(
        block.scale_shift_table, temb, hidden.shape[1], options.rows, upcast=True
    )
    if options.exact:
        _self_attention(block, hidden, modulation, rotary)
        _cross_attention(block, hidden, context, modulation)
        _feed_forward(block, hidden, modulation)
    else:
        _self_attention_by_heads(block, options.head_groups, hidden, modulation, rotary)
        _rest_by_rows(block, hidden, context, modulation)
    return hidden


def _by_heads(states: Tensor, heads: int) -> Tensor:
    return torch.unflatten(states, 2, (heads, -1))


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attend with diffusers' dispatcher, on the backend that the block's processor is set to.

    ``query``, ``key``, ``value`` and the result are (B, n, heads * d).
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    out: Tensor = dispatch_attention_fn(
        _by_heads(query, heads),
        _by_heads(key, heads),
        _by_heads(value, heads),
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        backend=attn.processor._attention_backend,
    )
    return out.flatten(2, 3).type_as(query)


def _rotate(
    norm: nn.Module, rows: Tensor, heads: int, span: Span, rotary: tuple[Tensor, Tensor],
    out: Tensor,
) -> None:  # fmt: skip
    """Norm a span's query or key (B, r, heads * d) over all heads, rotate it, write it to ``out``.

    ``out`` may be ``rows``: the norm returns a new tensor, so nothing is read after it was
    overwritten.
    """
    pairs = torch.unflatten(norm(rows), -1, (heads, -1, 2))
    first, second = pairs.unbind(-1)
    cos, sin = rotary[0][:, span[0], :, 0::2], rotary[1][:, span[0], :, 1::2]
    turned = torch.unflatten(out, -1, (heads, -1, 2))
    turned[..., 0] = (first * cos).sub_(second * sin)
    turned[..., 1] = (first * sin).add_(second * cos)


def _rotate_all(
    norm: nn.Module, projected: Tensor, heads: int, spans: list[Span], rotary: tuple[Tensor, Tensor]
) -> Tensor:
    for span in spans:
        rows = projected[:, span[0]]
        _rotate(norm, rows, heads, span, rotary, out=rows)
    return projected


def _project_out(attn: Any, out: Tensor) -> Tensor:
    projected: Tensor = attn.to_out[1](attn.to_out[0](out))
    return projected


def _self_attention(
    block: Any, hidden: Tensor, modulation: Modulation, rotary: tuple[Tensor, Tensor]
) -> None:
    attn, spans = block.attn1, modulation.spans
    # The normed input is made whole: each projection must be one product over all tokens to round
    # as diffusers' does.
    normed = modulation.all_normed(block.norm1, hidden, 0)
    query = _rotate_all(attn.norm_q, attn.to_q(normed), attn.heads, spans, rotary)
    key = _rotate_all(attn.norm_k, attn.to_k(normed), attn.heads, spans, rotary)
    value = attn.to_v(normed)
    # v was the last to need the normed input. Released now, it makes way for the attention output:
    # the peak of the block is h, q, k, v and that output.
    del normed
    out = _attend(attn, query, key, value, attn.heads)
    # q, k and v go before the output projection allocates its result.
    del query, key, value
    out = _project_out(attn, out)
    for span in spans:
        modulation.add_gated(hidden, out[:, span[0]], 2, span)


class _Context:
    """Keys and values of the text, and of the image where the model has one (Wan 2.1 I2V)."""

    def __init__(self, attn: Any, context: Tensor) -> None:
        self._attn = attn
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
            out = _attend(attn, query, *self._text, attn.heads)
        else:
            image = _attend(attn, query, *self._image, attn.heads)
            out = _attend(attn, query, *self._text, attn.heads).add_(image)
            del image
        del query
        return _project_out(attn, out)


def _cross_attention(block: Any, hidden: Tensor, context: Tensor, modulation: Modulation) -> None:
    attn = block.attn2
    keys = _Context(attn, context)
    normed = torch.empty_like(hidden)
    for rows, _ in modulation.spans:
        normed[:, rows] = block.norm2(hidden[:, rows].float())
    query = attn.to_q(normed)
    del normed
    # A norm treats each token alone, so it can overwrite the query row by row.
    for rows, _ in modulation.spans:
        query[:, rows] = attn.norm_q(query[:, rows])
    hidden.add_(keys.attend(query))


def _feed_forward(block: Any, hidden: Tensor, modulation: Modulation) -> None:
    normed = modulation.all_normed(block.norm3, hidden, 3)
    inner = block.ffn.net[0].proj(normed)
    # ``inner`` is the widest tensor of the block, so each input is released as soon as it has
    # been read.
    del normed
    out = _feed_out(block.ffn, inner)
    del inner
    for span in modulation.spans:
        modulation.add_gated(hidden, out[:, span[0]], 5, span)


def _feed_out(ffn: Any, inner: Tensor) -> Tensor:
    """Apply the feed-forward's GELU to ``inner``, in place, and then its second projection."""
    # All at once: CPUs compute the last few numbers of a tensor in scalar code, which rounds
    # differently from the vector code, so pieces would get other bits.
    torch.ops.aten.gelu_(inner, approximate=ffn.net[0].approximate)
    out: Tensor = ffn.net[2](ffn.net[1](inner))
    return out


def _self_attention_by_heads(
    block: Any,
    groups: int,
    hidden: Tensor,
    modulation: Modulation,
    rotary: tuple[Tensor, Tensor],
) -> None:
    """Self attention with q and k whole, but v for one group of heads at a time."""
    attn = block.attn1
    # q and k cannot be made by groups: their norms average over all heads of a token.
    query, key = torch.empty_like(hidden), torch.empty_like(hidden)
    for span in modulation.spans:
        normed = modulation.normed(block.norm1, hidden, 0, span)
        for norm, project, whole in (
            (attn.norm_q, attn.to_q, query),
            (attn.norm_k, attn.to_k, key),
        ):
            _rotate(norm, project(normed), attn.heads, span, rotary, out=whole[:, span[0]])
        del normed
    values = None
    # v by groups multiplies with rows of the weight. A quantised layer has no such rows, and a
    # hook (a LoRA's, for one) expects the whole output: then v is made whole.
    if not is_plain_linear(attn.to_v):
        values = torch.empty_like(hidden)
        for span in modulation.spans:
            values[:, span[0]] = attn.to_v(modulation.normed(block.norm1, hidden, 0, span))
    size = query.shape[-1] // attn.heads
    heads_each = -(-attn.heads // groups)
    for first in range(0, attn.heads, heads_each):
        heads = min(heads_each, attn.heads - first)
        lanes = slice(first * size, (first + heads) * size)
        if values is None:
            value = _value_of_heads(block, hidden, modulation, lanes)
        else:
            value = values[..., lanes]
        # Heads do not see each other, so this group's output can overwrite its queries.
        query[..., lanes] = _attend(attn, query[..., lanes], key[..., lanes], value, heads)
        del value
    del key, values
    for span in modulation.spans:
        out = _project_out(attn, query[:, span[0]])
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


def _rest_by_rows(block: Any, hidden: Tensor, context: Tensor, modulation: Modulation) -> None:
    """Run cross attention and feed-forward for one span of tokens after the other.

    After self attention tokens no longer see each other, so a span can be finished and written
    back before the next one begins; no tensor of full length is made.
    """
    attn, ffn = block.attn2, block.ffn
    keys = _Context(attn, context)  # once for all spans: the context is the same for every token
    for span in modulation.spans:
        rows = hidden[:, span[0]]
        query = attn.norm_q(attn.to_q(block.norm2(rows.float()).type_as(rows)))
        rows.add_(keys.attend(query))
        del query
        normed = modulation.normed(block.norm3, hidden, 3, span)
        inner = ffn.net[0].proj(normed)
        del normed
        modulation.add_gated(hidden, _feed_out(ffn, inner), 5, span)
        del inner
