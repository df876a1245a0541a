"""The lean halves with fused norms: diffusers' bits, each norm through the kernel, less memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.decoding import decode_frames
from support.fused_eager import duplicated, scaled_silu
from support.traced import TracedMemory
from support.vae_models import make_latents, make_vae
from torch import Tensor

from wan_core.decoding import lean as lean_vae
from wan_core.decoding import lean_decoder, lean_encoder, upsampling
from wan_core.kernels import maps
from wan_core.kernels.maps import FusedNorms
from wan_core.sampling.vae import encode_latents

pytestmark = pytest.mark.usefixtures("without_gradients")
VERSIONS = pytest.mark.parametrize("version", ["2.1", "2.2"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Norms and shortcuts are fused, by eager code; this holds the shapes of the norms' maps."""
    made: list[tuple[int, ...]] = []

    def counted(source: Tensor, *more: Any) -> None:
        made.append(tuple(source.shape))
        scaled_silu(source, *more)

    kernels = SimpleNamespace(scaled_silu=counted, duplicated=duplicated)
    monkeypatch.setattr(maps, "map_kernels", lambda: kernels)
    monkeypatch.setattr(
        upsampling, "fused_duplicates", lambda *given: maps._duplicate(*given) is None
    )
    monkeypatch.setattr(
        lean_vae, "fused_norms", lambda weight, channels: FusedNorms(frozenset(channels))
    )
    return made


def norms_of(half: Any) -> int:
    """Count the norms that a half passes through for each chunk, but for that of its attention."""
    return sum(type(module).__name__ == "WanRMS_norm" for module in half.modules()) - 1


@pytest.mark.parametrize(
    ("version", "dtype"),
    [("2.1", torch.float32), ("2.1", torch.float16), ("2.2", torch.bfloat16)],
)
def test_a_decode(version: str, dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    vae = make_vae(version, dtype)
    latents = make_latents(vae, 3, batch=2)
    expected = list(decode_frames(vae, latents))
    for more in ({"fuse": False}, {}, {"cache_on_host": True}):
        calls.clear()
        with lean_decoder(vae, **more):
            found = list(decode_frames(vae, latents))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(calls) == (0 if "fuse" in more else 3 * norms_of(vae.decoder))
        assert "fuse" in more or {shape[2] for shape in calls} == {1, 2, 4}, (
            "whole maps, not frame by frame"
        )


@pytest.mark.parametrize(("version", "dtype"), [("2.1", torch.bfloat16), ("2.2", torch.float32)])
def test_an_encode(version: str, dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    vae = make_vae(version, dtype)
    pixels = (torch.rand(1, 3, 9, 48, 32) * 2 - 1).to(dtype)
    expected = vae.encode(pixels).latent_dist.mode()
    with lean_encoder(vae):
        chunks = iter([pixels[:, :, :1], *torch.split(pixels[:, :, 1:], 4, dim=2)])
        assert torch.equal(encode_latents(vae, chunks), expected)
    assert len(calls) == 3 * norms_of(vae.encoder)


def test_bands(calls: list[tuple[int, ...]]) -> None:
    vae = make_vae("2.1")
    latents = make_latents(vae, 3)
    with lean_decoder(vae, bands=3):
        found = list(decode_frames(vae, latents))
    assert calls
    for ours, theirs in zip(found, decode_frames(vae, latents), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@VERSIONS
def test_no_more_memory_than_unfused(
    version: str, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's passes take nothing; of its numbers here nothing matters."""
    kernels = SimpleNamespace(
        scaled_silu=lambda *_: calls.append(()), duplicated=lambda *_: calls.append(())
    )
    monkeypatch.setattr(maps, "map_kernels", lambda: kernels)
    vae = make_vae(version)
    latents = make_latents(vae, 3)
    peaks = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(lean_vae, "fused_norms", lambda weight, channels: None)
            monkeypatch.setattr(upsampling, "fused_duplicates", lambda *_: False)
        with lean_decoder(vae), TracedMemory() as memory:
            list(decode_frames(vae, latents))
        peaks.append(memory.peak_bytes)
    assert calls
    assert peaks[0] <= peaks[1]
