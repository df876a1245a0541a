"""The lean encoder of Wan's VAE: less activation memory, the same bits.

Its residual blocks and causal convolutions are the decoder's, and are walked as there
(``decoder.py``): norms written straight into the padded buffer that a convolution reads, maps given
up before it runs, the feature cache on the device or in RAM, bands of rows where they are asked
for. What is an encoder's own are the levels that halve the picture, and in 2.2 the shortcuts
around them.

The computation follows diffusers' ``autoencoder_kl_wan.py`` (0.35 to 0.42, see ``sources``).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .decoder import DecoderWalk
from .decoder_quick import Quick, empty


class EncoderWalk(DecoderWalk):
    """One call of the encoder, layer by layer; ``held`` and slots are as in ``DecoderWalk``."""

    def through(self, encoder: Any, x: Tensor, first_chunk: bool = False) -> Tensor:
        """Return the encoder's output for one chunk of frames, (B, C, 1 or 4, H, W).

        ``first_chunk`` makes no difference: an encoder knows that by its empty cache.
        """
        held = [x]
        del x
        held.append(self._convolve(encoder.conv_in, held))
        for layer in encoder.down_blocks:
            self._layer(layer, held)
        self._middle(encoder.mid_block, held)
        return self._convolve(encoder.conv_out, held, encoder.norm_out)

    def _layer(self, layer: Any, held: list[Tensor]) -> None:
        """Go through one of ``down_blocks``: in 2.1 single layers, in 2.2 whole levels."""
        if hasattr(layer, "avg_shortcut"):
            self._down_level(layer, held)
        elif hasattr(layer, "resample"):
            self._downsample(layer, held)
        elif hasattr(layer, "conv_shortcut"):
            self._residual(layer, held)
        else:
            held.append(layer(held.pop()))  # attention

    def _down_level(self, block: Any, held: list[Tensor]) -> None:
        # The shortcut reads the level's input at the end. The input is shared, not copied as in
        # diffusers, so the first residual block must not overwrite it.
        kept = held[0]
        for resnet in block.resnets:
            self._residual(resnet, held, writable=held[0] is not kept)
        if block.downsampler is not None:
            self._downsample(block.downsampler, held)
        held[0].add_(block.avg_shortcut(kept))

    def _downsample(self, sampler: Any, held: list[Tensor]) -> None:
        """Halve height and width, and after the clip's first frame the number of frames."""
        x = held.pop()
        conv = sampler.resample[1]
        batch, channels, frames, height, width = x.shape
        size = (conv.out_channels, height // 2, width // 2)
        if self._options.bands > 1:
            out = x.new_empty(batch, frames, *size)
            for rows in self._bands(size[1]):
                piece = _halved(conv, _edged(x, slice(2 * rows.start, 2 * rows.stop)))
                out[..., rows, :] = piece.view(batch, frames, size[0], -1, size[2])
                del piece
            del x
        else:
            padded = _edged(x, slice(0, height), self._quick)
            del x
            out = _halved(conv, padded).view(batch, frames, *size)
            del padded
        held.append(out.transpose(1, 2))
        del out
        if sampler.mode == "downsample3d":
            self._halve_time(sampler.time_conv, held)

    def _halve_time(self, conv: Any, held: list[Tensor]) -> None:
        """Make one frame of two; the frame before is what the slot keeps, on the device."""
        slot = self._next_slot()
        x, before = held[0], self._slots[slot]
        if before is None:
            self._slots[slot] = x.clone()
            return
        held.clear()
        kept = x[:, :, -1:].clone()
        batch, channels, frames, height, width = x.shape
        joined = empty(x, (batch, channels, frames + 1, height, width), self._quick)
        joined[:, :, :1] = before[:, :, -1:]
        joined[:, :, 1:] = x
        del x
        held.append(F.conv3d(joined, conv.weight, conv.bias, stride=conv.stride))
        self._slots[slot] = kept


def _edged(x: Tensor, rows: slice, quick: Quick | None = None) -> Tensor:
    """Return rows of each frame, with the row below and a column on the right.

    (B*T, C, rows + 1, W + 1), zero outside the picture. ``rows`` begin at an even one.
    """
    batch, channels, frames, height, width = x.shape
    low, high = rows.start, min(height, rows.stop + 1)
    made = empty(x, (batch * frames, channels, rows.stop - low + 1, width + 1), quick)
    out = made.view(batch, frames, *made.shape[1:])
    out[..., -1:].zero_()
    out[..., high - low :, :].zero_()
    out[..., : high - low, :width].copy_(x[:, :, :, low:high].transpose(1, 2))
    return made


def _halved(conv: Any, padded: Tensor) -> Tensor:
    return F.conv2d(padded, conv.weight, conv.bias, stride=conv.stride)
