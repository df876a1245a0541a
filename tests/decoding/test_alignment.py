"""Where a VAE's queries lie: a card's attention kernels read rows of whole vectors only.

A single pixel is the exception: diffusers' attention then gives torch queries one number apart,
which its kernel for fp32 refuses ("query is not correctly aligned"). Nothing here may make one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.true_models import dry_vae
from torch import Tensor

from wan_core.decoding import lean_decoder, lean_encoder
from wan_core.models import VAE_21, VAE_22, VARIANTS
from wan_core.sampling.vae import StreamingDecoder, encode_latents

VECTOR = 8  # numbers of 2 bytes in the 16 that a kernel reads at once; of fp32 it wants 4


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Where the rows of queries begin: the steps between them, and the first one."""
    return (*tensor.stride()[:-1], tensor.storage_offset())


@pytest.mark.parametrize("shape", [VAE_21, VAE_22], ids=["2.1", "2.2"])
def test_queries_are_aligned_at_true_widths(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the smallest picture there is, and of two at once of odd sizes."""
    plain, seen = torch.nn.functional.scaled_dot_product_attention, []

    def attend(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        for states in (query, key, value):
            assert states.stride(-1) == 1
            assert all(step % VECTOR == 0 for step in strides_of(states)), strides_of(states)
        seen.append(query.shape[-2])
        return plain(query, key, value, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    scale = shape.scale_factor_spatial

    def run(vae: Any) -> None:
        with lean_decoder(vae) as refused:
            assert refused is None
            decoder = StreamingDecoder(vae, torch.empty(1, shape.z_dim, 1, 2, 2))
            decoder.decode_next()
            decoder.close()
        with lean_encoder(vae) as refused:
            assert refused is None
            encode_latents(vae, iter([torch.empty(2, 3, 1, 3 * scale, 5 * scale)]))

    dry_vae(shape, "fp32").peak(run)
    assert seen == [4, 15]


def test_no_model_makes_a_single_latent_pixel() -> None:
    """A clip's sides are whole patches of two by two latents (``job`` refuses less)."""
    assert {variant.transformer.patch_size[1:] for variant in VARIANTS.values()} == {(2, 2)}
