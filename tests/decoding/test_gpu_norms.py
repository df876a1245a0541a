"""On a GPU: the lean halves give diffusers' bits norms fused and not, at true widths too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from support.casting import cast_module
from support.true_models import autoencoder
from support.vae_models import make_vae
from torch import Tensor

from wan_core.decoding import lean as lean_vae
from wan_core.decoding import lean_decoder, lean_encoder, upsampling
from wan_core.decoding.decoder_quick import Quick, quick_for
from wan_core.kernels import maps
from wan_core.models import VAE_21, VAE_22
from wan_core.sampling.vae import Leaving, StreamingDecoder, encode_latents, to_pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
    pytest.mark.usefixtures("without_gradients"),
]
VERSIONS = pytest.mark.parametrize("version", ["2.1", "2.2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
FUSED = pytest.mark.parametrize("fused", [True, False])


@pytest.fixture
def calls(fused: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Hold the channels of the maps that the kernel was given; ``fused`` says whether it is to."""
    made: list[int] = []
    kernels = maps.map_kernels()
    plain = kernels.scaled_silu

    def counted(source: Tensor, *more: Any) -> None:
        made.append(source.shape[1])
        plain(source, *more)

    if fused:
        monkeypatch.setattr(kernels, "scaled_silu", counted)
        monkeypatch.setattr(upsampling, "fused_duplicates", must_be_fused)
    else:
        monkeypatch.setattr(lean_vae, "fused_norms", lambda weight, channels: None)
        monkeypatch.setattr(upsampling, "fused_duplicates", lambda *_: False)
    yield made
    assert bool(made) is fused


def must_be_fused(*given: Any) -> bool:
    assert maps.fused_duplicates(*given), "the shortcut's bits"
    return True


@cache
def true_vae(version: str, dtype: torch.dtype) -> Any:
    """A VAE of true width with random weights, and norms whose weights differ."""
    with torch.random.fork_rng(devices=["cuda"]), torch.device("cuda"):
        torch.manual_seed(0)
        vae = autoencoder(VAE_21 if version == "2.1" else VAE_22).eval().requires_grad_(False)
        for name, parameter in vae.named_parameters():
            if "gamma" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return cast_module(vae, dtype)


def latents_of(vae: Any, *shape: int) -> Tensor:
    """Latents (batch, z, frames, height, width) of a VAE's dtype, on its device."""
    batch, *rest = shape
    made = torch.randn(batch, vae.config.z_dim, *rest, generator=torch.Generator().manual_seed(1))
    return made.to("cuda", vae.dtype)


def video(vae: Any, *shape: int) -> Tensor:
    """Pixels (batch, 3, frames, height, width) of a VAE's dtype, on its device."""
    batch, *rest = shape
    made = torch.rand(batch, 3, *rest, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return made.to("cuda", vae.dtype)


def streamed(vae: Any, latents: Tensor, **options: Any) -> Tensor:
    with lean_decoder(vae, **options) as refused:
        assert refused is None
        decoder, found = StreamingDecoder(vae, latents), []
        while not decoder.done:
            found.append(decoder.decode_next())
        decoder.close()
    return torch.cat(found, 2)


def encoded(vae: Any, pixels: Tensor, **options: Any) -> Tensor:
    rest = (pixels[:, :, i : i + 4] for i in range(1, pixels.shape[2], 4))
    with lean_encoder(vae, **options) as refused:
        assert refused is None
        return encode_latents(vae, iter([pixels[:, :, :1], *rest]))


def decodes_as_diffusers(vae: Any, latents: Tensor) -> bool:
    expected = vae.decode(latents, return_dict=False)[0]
    return all(
        torch.equal(streamed(vae, latents, **more), expected)
        for more in ({}, {"cache_on_host": True})
    )


def encodes_as_diffusers(vae: Any, pixels: Tensor) -> bool:
    return torch.equal(encoded(vae, pixels), vae.encode(pixels).latent_dist.mode())


@pytest.mark.parametrize("dtype", maps._DTYPES)
@pytest.mark.parametrize("channels", [96, 160, 192, 256, 320, 384, 512, 640, 1024, 3])
def test_the_kernel_gives_the_bits(channels: int, dtype: torch.dtype) -> None:
    assert maps._works((torch.device("cuda", 0), dtype, channels))


@DTYPES
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    norm = WanRMS_norm(96, images=False).cuda().to(dtype)
    x = torch.ones(1, 96, 2, 4, 6, device="cuda", dtype=dtype)
    x[0, 5, 1, 2, 3], x[0, 7, 0, 1, 1] = float("nan"), float("inf")
    found, expected = torch.empty_like(x), torch.nn.functional.silu(norm(x))
    assert maps.FusedNorms(frozenset({96})).activate(norm, x, found)
    assert torch.equal(found.isnan(), expected.isnan()) and bool(found[0, :, 1, 2, 3].isnan().all())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@FUSED
@VERSIONS
@DTYPES
def test_small_ones_of_odd_sizes(
    version: str, dtype: torch.dtype, fused: bool, calls: list[int]
) -> None:
    """Of one latent pixel diffusers itself has no attention in fp32, and no clip has only one."""
    vae = make_vae(version, dtype).cuda()
    for shape in ((1, 4, 5, 7), (2, 3, 9, 3), (1, 1, 1, 2)):
        assert decodes_as_diffusers(vae, latents_of(vae, *shape)), shape
    scale = vae.config.scale_factor_spatial
    for shape in (
        (1, 13, 5 * scale, 7 * scale), (2, 5, 3 * scale, scale), (1, 1, scale, 2 * scale),
    ):  # fmt: skip
        assert encodes_as_diffusers(vae, video(vae, *shape)), shape


@FUSED
@VERSIONS
@DTYPES
def test_true_widths(version: str, dtype: torch.dtype, fused: bool, calls: list[int]) -> None:
    """Of these widths aten adds a pixel's channels in an order that its neighbours decide."""
    vae = true_vae(version, dtype)
    assert decodes_as_diffusers(vae, latents_of(vae, 1, 4, 13, 18))
    scale = vae.config.scale_factor_spatial
    assert encodes_as_diffusers(vae, video(vae, 1, 9, 13 * scale, 18 * scale))
    if fused:
        wide = {96, 192, 384} if version == "2.1" else {160, 320, 640, 256, 512, 1024}
        assert set(calls) == wide


@pytest.mark.parametrize("fused", [True])
@VERSIONS
@DTYPES
def test_memory_is_no_more_than_unfused(
    version: str, dtype: torch.dtype, fused: bool, calls: list[int], monkeypatch: Any
) -> None:
    vae = true_vae(version, dtype)
    latents, peaks = latents_of(vae, 1, 3, 12, 20), []
    for _ in range(3):  # the first tries, the last is without
        if len(peaks) == 2:
            monkeypatch.setattr(lean_vae, "fused_norms", lambda weight, channels: None)
        torch.cuda.reset_peak_memory_stats()
        streamed(vae, latents)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[2] * 1.001


QUICK_BOUNDS = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative errors: of the H100's TF32 1e-3 was measured, of a decode in fp32."""


@VERSIONS
@DTYPES
def test_quick_ones_round_differently(version: str, dtype: torch.dtype) -> None:
    vae = true_vae(version, dtype)
    assert quick_for(vae.decoder) == quick_for(vae.encoder) == Quick(fused=True)
    latents, scale = latents_of(vae, 1, 3, 13, 18), vae.config.scale_factor_spatial
    expected = vae.decode(latents, return_dict=False)[0]
    found = streamed(vae, latents, quick=True)
    assert relative(found, expected) < QUICK_BOUNDS[dtype]
    pixels = video(vae, 1, 9, 13 * scale, 18 * scale)
    expected = vae.encode(pixels).latent_dist.mode()
    assert relative(encoded(vae, pixels, quick=True), expected) < QUICK_BOUNDS[dtype]


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


@DTYPES
@pytest.mark.parametrize("whole_bytes", [True, False])
def test_pictures_leave_while_the_card_goes_on(whole_bytes: bool, dtype: torch.dtype) -> None:
    chunk = torch.rand(1, 3, 4, 96, 160, device="cuda", dtype=dtype) * 2 - 1
    expected = to_pictures(chunk, whole_bytes=whole_bytes).cpu()
    leaving = Leaving(chunk, whole_bytes=whole_bytes)
    chunk.fill_(float("nan"))  # queued behind the copy
    pictures, well = leaving.arrived()
    assert well and not pictures.is_cuda and torch.equal(pictures, expected)
    _, well = Leaving(chunk, whole_bytes=whole_bytes).arrived()
    assert well is (dtype != torch.float16)
