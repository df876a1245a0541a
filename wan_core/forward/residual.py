"""Leaves out a transformer's blocks: what they added to the hidden states last is added again.

Patches, conditions and the output layer are computed as ever. It is put on top of whatever forward
the blocks have, for one call of the model or for several that run side by side, and taken off.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .replaced import Installed, ReplacedForward


class BlockPasses:
    """What the next calls of the model do: the n-th call of a block belongs to pass n.

    ``given`` holds, for each pass, the residual (B, tokens, width) to add in place of the blocks,
    or None to compute them; ``made`` then holds the residuals of the computed ones, in RAM.
    """

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        self.given = tuple(given)
        self.made: list[Tensor | None] = [None] * len(self.given)
        self._entered: list[Tensor | None] = [None] * len(self.given)
        self._turns: dict[int, int] = {}

    def turn(self, block: int) -> int:
        """Return which pass calls this block now."""
        found = self._turns.get(block, 0)
        self._turns[block] = found + 1
        return found

    def enter(self, number: int, hidden: Tensor) -> None:
        """Keep the input of the first block: the lean forward writes over it."""
        self._entered[number] = hidden.clone()

    def leave(self, number: int, hidden: Tensor) -> None:
        """Take down what the blocks have added."""
        entered = self._entered[number]
        assert entered is not None
        self.made[number] = torch.sub(hidden, entered, out=entered).to("cpu")
        self._entered[number] = None


def _put_on(transformer: Any, installed: Installed[BlockPasses]) -> None:
    last = len(transformer.blocks) - 1
    for index, block in enumerate(transformer.blocks):
        installed.set_forward(block, functools.partial(_forward, installed, index, last))


_skipping = ReplacedForward(_put_on)


@contextmanager
def block_passes(transformer: nn.Module, passes: BlockPasses) -> Iterator[None]:
    """Call ``transformer`` inside the ``with`` block as ``passes`` say, in this thread."""
    with _skipping(transformer, passes):
        yield


def _forward(
    installed: Installed[BlockPasses], index: int, last: int, before: Any, hidden: Tensor,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    passes = installed.mine()
    if passes is None:
        return before(hidden, *args, **kwargs)
    number = passes.turn(index)
    residual = passes.given[number]
    if residual is not None:
        return hidden + residual.to(hidden) if index == 0 else hidden
    if index == 0:
        passes.enter(number, hidden)
    result = before(hidden, *args, **kwargs)
    if index == last:
        passes.leave(number, result)
    return result
