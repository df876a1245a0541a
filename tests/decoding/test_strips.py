"""A decode in strips: each card's part has the numbers of the whole picture, at the seams too."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.cases import slow_but
from support.decoding import decode_frames
from support.true_models import DTYPES, autoencoder, dry_vae
from support.vae_models import make_vae, shape_of
from torch import Tensor

from wan_core.decoding.decoder import DecodeOptions, DecoderWalk
from wan_core.decoding.lean import lean_decoder
from wan_core.memory import COLUMNS, ROWS, lean_decode_bytes, strips_cost, strips_of
from wan_core.memory.strips import Strip
from wan_core.models.variants import VAE_21, VAE_22, VaeShape
from wan_core.sampling.vae import StreamingDecoder, to_frames

VERSIONS = pytest.mark.parametrize("version", ["2.1", "2.2"])
FRAMES = 3
CASES = [("2.1", 13, 2, 3, 1), ("2.2", 1, 13, 2, 2), ("2.2", 31, 2, 2, 1), ("2.1", 3, 26, 4, 2)]


def random_latents(vae: Any, height: int, width: int) -> Tensor:
    shape = (1, vae.config.z_dim, FRAMES, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def walked(vae: Any, latents: Tensor, strip: Strip | None, bands: int = 1) -> Tensor:
    """The decoder's frames (1, C, F, H, W) in the dtype of the VAE, float64 too."""
    slots: list[Any] = [None] * 100
    options = DecodeOptions(bands, None, None, strip)
    return torch.cat([
        DecoderWalk(options, slots, [0]).through(vae.decoder, latents[:, :, i : i + 1], i == 0)
        for i in range(latents.shape[2])
    ], 2)  # fmt: skip


@pytest.mark.parametrize(
    ("version", "height", "width", "count", "bands"),
    slow_but(CASES[:2].__contains__, CASES),
)
def test_strips_are_the_whole_picture(
    version: str, height: int, width: int, count: int, bands: int
) -> None:
    """In float64 no rounding hides a seam."""
    vae = make_vae(version, torch.float64)
    latents = random_latents(vae, height, width).double()
    whole = walked(vae, latents, None)
    strips = strips_of(shape_of(vae), height, width, count)
    assert len(strips) == count and {s.axis for s in strips} == {
        COLUMNS if width > height else ROWS
    }
    made = torch.cat([walked(vae, latents, one, bands) for one in strips], strips[0].axis)
    torch.testing.assert_close(made, whole, rtol=1e-9, atol=1e-12)


class Poisoned(DecoderWalk):
    """Puts NaN where a strip's edges make a map wrong: at pixels whose neighbour is missing."""

    level = 0

    def _upsample(self, sampler: Any, held: list[Tensor]) -> None:
        super()._upsample(sampler, held)
        self.level += 1
        strip, x = self._strip, held[0]
        assert strip is not None
        if self._low > 0:
            x.select(strip.axis, 0).fill_(float("nan"))
        if self._low + x.shape[strip.axis] < strip.length * 2**self.level:
            x.select(strip.axis, -1).fill_(float("nan"))


@pytest.mark.parametrize(
    ("version", "width"),
    [("2.1", 23), ("2.2", 22), pytest.param("2.2", 30, marks=pytest.mark.slow)],
)
def test_what_the_edges_make_wrong_never_reaches_a_strip(
    version: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one pixel less round it would be too little, on either side and at every level."""
    monkeypatch.setattr(f"{__name__}.DecoderWalk", Poisoned)
    vae = make_vae(version)
    latents = random_latents(vae, 1, width)[:, :, :1]
    strip = strips_of(shape_of(vae), 1, width, 3)[1]
    assert walked(vae, latents, strip).isfinite().all()
    for level in range(len(strip.keeps) - 1):
        low, high = strip.keeps[level]
        for fewer in ((low + 1, high), (low, high - 1)):
            keeps = (*strip.keeps[:level], fewer, *strip.keeps[level + 1 :])
            assert walked(vae, latents, replace(strip, keeps=keeps)).isnan().any()


@VERSIONS
def test_strips_in_half_precision_have_the_bits_of_the_whole_decode_here(version: str) -> None:
    """Kernels of a CPU, for sizes at which they do not change: every bit, chunk by chunk."""
    vae = make_vae(version, torch.bfloat16)
    latents = random_latents(vae, 1, 19).bfloat16()
    whole = list(decode_frames(vae, latents))
    pieces = []
    for one in strips_of(shape_of(vae), 1, 19, 2):
        with lean_decoder(vae, strip=one) as refused:
            assert refused is None
            pieces.append(list(decode_frames(vae, latents)))
    first, last = one.pixels
    assert pieces[-1][0].shape[-1] == last - first and last == whole[0].shape[-1]
    for index, chunk in enumerate(whole):
        assert torch.equal(torch.cat([piece[index] for piece in pieces], 4), chunk)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 200])
@pytest.mark.parametrize(("height", "width"), [(60, 104), (45, 30), (1, 1), (7, 7)])
def test_strips_share_the_plane_out(height: int, width: int, count: int) -> None:
    for shape in (VAE_21, VAE_22):
        strips = strips_of(shape, height, width, count)
        side = max(height, width)
        assert len(strips) == min(count, side)
        ends = [0, *(one.pixels[1] for one in strips)]
        assert [one.pixels for one in strips] == list(pairwise(ends))
        assert ends[-1] == side * shape.scale_factor_spatial
        for one in strips:
            for level, (low, high) in enumerate(one.level_reads):
                assert 0 <= low <= one.keeps[level][0] and one.keeps[level][1] <= high
                assert high <= side * 2**level
        assert strips_cost(shape, height, width, 1) == pytest.approx(1)
        cost = strips_cost(shape, height, width, count)
        assert 1 / len(strips) <= cost * 1.000001 and cost <= 1.000001


@pytest.mark.parametrize(
    ("shape", "dtype", "index"),
    [pytest.param(VAE_21, "bf16", 1, marks=pytest.mark.slow), (VAE_22, "fp32", 0)],
    ids=["2.1", "2.2"],
)
def test_arithmetic_agrees_with_the_dry_run(shape: VaeShape, dtype: str, index: int) -> None:
    kind = DTYPES[dtype]
    strip = strips_of(shape, 44, 80, 3)[index]

    def run(vae: Any) -> None:
        with lean_decoder(vae, strip=strip):
            decoder = StreamingDecoder(vae, torch.empty(1, shape.z_dim, 7, 44, 80, dtype=kind))
            for _ in range(3):
                to_frames(decoder.decode_next())

    numbers = {"batch": 1, "latent_frames": 7, "latent_height": 44, "latent_width": 80}
    given = numbers | {"size": kind.itemsize, "workspace": False}
    ours, cache = lean_decode_bytes(shape, strip=strip, **given)
    peak = dry_vae(shape, dtype).peak(run)
    assert -0.01 <= ours / peak - 1 <= 0.1
    whole, all_of_it = lean_decode_bytes(shape, **given)
    assert ours < 0.6 * whole and cache < 0.6 * all_of_it


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@VERSIONS
@pytest.mark.parametrize(
    ("dtype", "quick", "bound"),
    [(torch.float32, False, 1e-5), (torch.float16, True, 1e-2), (torch.bfloat16, True, 5e-2)],
)
def test_strips_on_a_card_differ_by_rounding(
    version: str, dtype: torch.dtype, quick: bool, bound: float
) -> None:
    shape = VAE_21 if version == "2.1" else VAE_22
    with torch.device("cuda"):
        torch.manual_seed(0)
        vae = autoencoder(shape).eval().requires_grad_(False).to(dtype)
    latents = torch.randn(1, shape.z_dim, FRAMES, 18, 34, generator=torch.manual_seed(1))
    latents = latents.to("cuda", dtype)

    def frames(strip: Strip | None) -> Tensor:
        with lean_decoder(vae, quick=quick, strip=strip) as refused:
            assert refused is None
            return torch.cat(list(decode_frames(vae, latents)), 2).double()

    whole = frames(None)
    for count in (2, 4):
        strips = strips_of(shape, 18, 34, count)
        made = torch.cat([frames(one) for one in strips], strips[0].axis)
        apart = (made - whole).abs()
        assert apart.norm() <= bound * whole.norm()
        # No seam: where strips meet, nothing is worse than elsewhere.
        edge = strips[0].pixels[1]
        assert apart[..., edge - 8 : edge + 8].mean() <= 3 * apart.mean() + 1e-12
