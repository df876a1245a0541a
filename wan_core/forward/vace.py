"""The VACE branch of a transformer: each hint is computed just before the block that it is for.

diffusers computes the hints of all blocks first and keeps them; at 14B those are eight hidden
states. Hint k needs only the state of VACE block k - 1 (the first one the patched latents), so one
hint is alive at a time here, with equal bits. ``blocks_in_order`` is the order that follows from
this, for whoever brings blocks to a device one after the other. The computation is that of
diffusers' ``transformer_wan_vace.py`` (0.35 to 0.42, see ``sources``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import Fused, TimestepRuns
from .animate import adapters_by_block
from .block import LeanOptions, run_block


def blocks_in_order(transformer: Any) -> list[nn.Module]:
    """Return the blocks in the order in which they compute.

    A VACE block comes before its base block, Animate's face adapter after the block whose output it
    reads. diffusers adds the hints in the order of the base blocks, however ``vace_layers`` are
    sorted.
    """
    vace, adapters = getattr(transformer, "vace_blocks", None), adapters_by_block(transformer)
    hints: dict[int, nn.Module] = {}
    if vace is not None:
        hints = dict(zip(sorted(transformer.config.vace_layers), vace, strict=True))
    order: list[nn.Module] = []
    for index, block in enumerate(transformer.blocks):
        order += [hints[index]] if index in hints else []
        order.append(block)
        order += [adapters[index]] if index in adapters else []
    return order


class HintBranch:
    """The VACE branch in one call of the model: its state, and the hint for the next block.

    ``control`` is (B, 96, T, h, w), ``scale`` has one number for each VACE block, and ``length`` is
    the number of tokens of the latents, of which those in ``own`` are computed here.
    """

    def __init__(
        self, model: Any, control: Tensor, scale: Tensor | None, length: int, own: slice
    ) -> None:
        self._numbers = {block: number for number, block in enumerate(model.vace_blocks)}
        ones = control.new_ones(len(self._numbers))
        self._scales = torch.unbind(ones if scale is None else scale)
        tokens = model.vace_patch_embedding(control).flatten(2).transpose(1, 2)
        # A control of fewer tokens than the latents have is filled up with zeros, as in diffusers.
        padding = tokens.new_zeros(tokens.shape[0], length - tokens.shape[1], tokens.shape[2])
        states = torch.cat([tokens, padding], dim=1)
        self._states: Tensor | None = states[:, own].contiguous()
        self._hint: Tensor | None = None

    def __contains__(self, block: nn.Module) -> bool:
        return block in self._numbers

    def through(
        self, block: nn.Module, hidden: Tensor, context: Tensor, parts: Tensor | TimestepRuns,
        rotary: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """Take the branch through one VACE block, which leaves the hint for the next base block."""
        number = self._numbers[block]
        hint, self._states = block(hidden, context, self._states, parts, rotary)
        self._hint = hint.mul_(self._scales[number])
        if number + 1 == len(self._numbers):
            self._states = None  # nothing reads the last block's state

    def add_to(self, hidden: Tensor) -> None:
        """Add the hint that is due to the hidden states, in place."""
        if self._hint is not None:
            hidden.add_(self._hint)
            self._hint = None


def run_vace_block(
    block: Any,
    options: LeanOptions,
    hidden: Tensor,
    context: Tensor,
    control: Tensor,
    temb: Tensor | TimestepRuns,
    rotary: tuple[Tensor, Tensor],
    fused: Fused,
) -> tuple[Tensor | None, Tensor]:
    """Run one ``WanVACETransformerBlock``; returns its hint and the state of the branch.

    ``hidden`` and ``control`` are (B, L, dim). ``control`` is overwritten, but by the first block,
    which projects it to a new tensor; ``hidden`` is read by that one only. The rest is as in
    :func:`wan_core.forward.block.run_block`.
    """
    if block.proj_in is not None:
        control = block.proj_in(control)
        control.add_(hidden)
    state = run_block(block, options, control, context, temb, rotary, fused)
    return None if block.proj_out is None else block.proj_out(state), state
