"""What LoRAs change in one module, and the products by which it is added to an output."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import LORA_ROWS, LORA_TOKENS


class Term(Protocol):
    """What the factors of a LoKr or LoHa add to a linear layer."""

    def __call__(self, output: Tensor, given: Tensor) -> Tensor:
        """Return the output (..., out) with what the factors make of the input (..., in)."""

    def rows(self, rows: slice) -> Tensor:
        """Return some rows of the difference that the factors make, float32 (rows, in)."""

    def rescaled(self, gain: Tensor) -> Term:
        """Return the same with each row of the difference times its number of ``gain`` (out,)."""


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: kron(w1, w2), never made whole; ``w2`` is one matrix or the two it is a product of."""

    w1: Tensor
    w2: list[Tensor]
    gain: Tensor | None = None

    def __call__(self, output: Tensor, given: Tensor) -> Tensor:
        """Return output + given @ kron(w1, w2)^T, some tokens at a time."""
        flat, rows = output.reshape(-1, output.shape[-1]), given.reshape(-1, given.shape[-1])
        if torch.is_grad_enabled():
            return (flat + self._product(rows).to(output.dtype)).view(output.shape)
        for start in range(0, len(rows), LORA_TOKENS):
            here = slice(start, start + LORA_TOKENS)
            flat[here].add_(self._product(rows[here]))
        return flat.view(output.shape)

    def _product(self, tokens: Tensor) -> Tensor:
        """Return (tokens, out). The input is pieces, as many as w1 has columns.

        Each is multiplied with w2, and what comes is mixed by w1.
        """
        pieces = torch.unflatten(tokens, 1, (self.w1.shape[1], -1))
        for matrix in reversed(self.w2):
            pieces = F.linear(pieces, matrix)
        mixed = (self.w1 @ pieces).flatten(1)
        return mixed if self.gain is None else mixed.mul_(self.gain)

    def rows(self, rows: slice) -> Tensor:
        """Return some rows of kron(w1, w2), each a row of w1 with one of w2."""
        w1, w2 = self.w1.float(), functools.reduce(torch.matmul, [w.float() for w in self.w2])
        numbers = torch.arange(len(w1) * len(w2), device=w1.device)[rows]
        one, two = w1[numbers // len(w2)], w2[numbers % len(w2)]
        found = (one.unsqueeze(2) * two.unsqueeze(1)).flatten(1)
        return found if self.gain is None else found * self.gain[rows, None].float()

    def rescaled(self, gain: Tensor) -> Kronecker:
        """Return the same with each row times its number of ``gain``."""
        return replace(self, gain=gain.to(self.w1.dtype))


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: (a1 @ b1) * (a2 @ b2), element by element, never made whole."""

    first: list[Tensor]
    second: list[Tensor]

    def __call__(self, output: Tensor, given: Tensor) -> Tensor:
        """Return output + given @ ((a1 @ b1) * (a2 @ b2))^T, some rows of it at a time."""
        count = len(self.first[0])
        if torch.is_grad_enabled():
            return plus(output, F.linear(given, self.rows(slice(count)).to(given.dtype)))
        for start in range(0, count, LORA_ROWS):
            rows = slice(start, start + LORA_ROWS)
            output[..., rows].add_(F.linear(given, self.rows(rows).to(given.dtype)))
        return output

    def rows(self, rows: slice) -> Tensor:
        """Return some rows of the difference, float32."""
        (a1, b1), (a2, b2) = self.first, self.second
        return (a1[rows].float() @ b1.float()) * (a2[rows].float() @ b2.float())

    def rescaled(self, gain: Tensor) -> Hadamard:
        """Return the same with each row times its number of ``gain``."""
        a1, b1 = self.first
        return replace(self, first=[(a1 * gain.unsqueeze(1)).to(a1.dtype), b1])


@dataclass(frozen=True, slots=True)
class Magnitude:
    """What a DoRA says of the rows of a weight; ``magnitude`` says what is made of it."""

    values: Tensor
    """float32 (out,)."""
    strength: float | None
    """Of a LyCORIS file; None for one of PEFT, where the factors are multiplied with it."""


@dataclass(slots=True)
class Delta:
    """What LoRAs together change in one module, up to the next DoRA.

    Their low-rank matrices are concatenated along the rank, so that several LoRAs cost two matrix
    products. ``weight`` and ``bias`` are differences of the whole weight and bias; ``terms`` are
    what factors of another kind add, whose product would be as large as the weight.
    """

    dtype: torch.dtype
    downs: list[Tensor] = field(default_factory=list)
    ups: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None
    bias: Tensor | None = None
    terms: list[Term] = field(default_factory=list)
    magnitude: Magnitude | None = None
    """Of a DoRA, which is alone in its delta: it rescales the weight and all deltas before it."""
    kept: tuple[Tensor, Tensor] | None = None
    """What a DoRA multiplies the output with and adds to it, float32 (out,), once it is known."""

    def matrices(self) -> tuple[Tensor, Tensor] | None:
        """Return down (ranks, in ...) and up (out, ranks), or None if there are none."""
        if not self.downs:
            return None
        self.downs, self.ups = [torch.cat(self.downs)], [torch.cat(self.ups, dim=1)]
        return self.downs[0], self.ups[0]

    def on(self, weight: Tensor, rows: slice) -> Tensor:
        """Change some rows of a weight, float32 (rows, in), as this does; return them."""
        if self.kept is not None:
            weight.mul_(self.kept[0][rows, None])
        for down, up in zip(self.downs, self.ups, strict=True):
            weight.addmm_(up[rows].float(), down.flatten(1).float())
        if self.weight is not None:
            weight.add_(self.weight.flatten(1)[rows])
        for term in self.terms:
            weight.add_(term.rows(rows))
        return weight

    def rescale(self, gain: Tensor) -> None:
        """Multiply each row of what a DoRA's own factors make with its number of ``gain``."""
        for up in self.ups:
            for start in range(0, len(up), LORA_ROWS):
                rows = slice(start, start + LORA_ROWS)
                up[rows] = up[rows].float() * gain[rows, None]
        self.terms = [term.rescaled(gain) for term in self.terms]
        if self.weight is not None:  # of a convolution
            flat = self.weight.flatten(1).float() * gain.unsqueeze(1)
            self.weight = flat.to(self.dtype).view(self.weight.shape)

    def keep(self, output: Tensor, axes: tuple[int, ...] = ()) -> Tensor:
        """Return what was computed before, rescaled; ``axes`` are ones after the channels."""
        if self.kept is None:
            return output
        factor, shift = (one.view(-1, *axes) for one in self.kept)
        if torch.is_grad_enabled():
            return (output * factor + shift).to(output.dtype)
        if axes:
            return torch.addcmul(shift, output, factor, out=output)
        flat = output.reshape(-1, output.shape[-1])
        for start in range(0, len(flat), LORA_TOKENS):  # a CPU makes float32 of what it is given
            here = flat[start : start + LORA_TOKENS]
            torch.addcmul(shift, here, factor, out=here)
        return flat.view(output.shape)


def plus(output: Tensor, more: Tensor) -> Tensor:
    more = more.to(output.dtype)
    return output + more if torch.is_grad_enabled() else output.add_(more)


def plus_product(output: Tensor, given: Tensor, matrix: Tensor) -> Tensor:
    """Return output + given @ matrix^T; where gradients are off, in the output's own memory."""
    if output.dtype != matrix.dtype:
        return plus(output, F.linear(given, matrix))
    flat, rows = output.reshape(-1, output.shape[-1]), given.reshape(-1, given.shape[-1])
    # In place is safe: the layer has just made this output, and nobody else has seen it yet.
    add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
    return add(flat, rows, matrix.t()).view(output.shape)
