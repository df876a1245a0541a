"""The lean encode: diffusers' bits, less memory, and nothing left on the VAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import slow_but
from support.true_models import DTYPES, dry_vae
from support.vae_models import make_vae
from torch import Tensor

from wan_core.decoding import host_cache, lean_encoder
from wan_core.decoding import lean as lean_vae
from wan_core.decoding.decoder import DecodeOptions
from wan_core.decoding.decoder_quick import Quick
from wan_core.decoding.encoder import EncoderWalk
from wan_core.decoding.host_cache import HostCache
from wan_core.forward.sources import norms_widen
from wan_core.memory.vae import encode_peak
from wan_core.memory.vae_lean import BANDS, lean_encode_bytes
from wan_core.models.variants import VAE_21, VAE_22, VaeShape
from wan_core.sampling import vae as streamed
from wan_core.sampling.vae import encode_latents

VERSIONS = pytest.mark.parametrize("version", ["2.1", "2.2"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def video(frames: int = 13, batch: int = 1, high: int = 48, wide: int = 32) -> Tensor:
    g = torch.Generator().manual_seed(4)
    return torch.rand(batch, 3, frames, high, wide, generator=g) * 2 - 1


def encoded(vae: Any, pixels: Tensor, **lean: Any) -> Tensor:
    """Encode with the lean encoder, which must act."""
    with lean_encoder(vae, **lean) as refused:
        assert refused is None
        assert "forward" in vars(vae.encoder)
        found = encode_latents(vae, iter(in_chunks(pixels)))
    assert "forward" not in vars(vae.encoder)
    return found


def in_chunks(pixels: Tensor) -> list[Tensor]:
    return [pixels[:, :, :1], *(pixels[:, :, i : i + 4] for i in range(1, pixels.shape[2], 4))]


@VERSIONS
@FLOATS
@pytest.mark.parametrize("batch", [1, 2])
def test_bits_are_those_of_diffusers(version: str, dtype: torch.dtype, batch: int) -> None:
    vae, pixels = make_vae(version, dtype), video(batch=batch)
    with torch.no_grad():
        expected = vae.encode(pixels.to(dtype)).latent_dist.mode()
    assert torch.equal(encoded(vae, pixels), expected)
    assert torch.equal(encoded(vae, pixels, cache_on_host=True), expected)


@VERSIONS
def test_a_picture_and_two_clips_at_a_time(version: str) -> None:
    """The cache of a finished encode is used again, that of another one is not."""
    vae = make_vae(version)
    clips = [video(1), video(9), -video(9)]
    alone = [encode_latents(vae, iter(in_chunks(clip))) for clip in clips]
    with lean_encoder(vae, cache_on_host=True):
        for clip, expected in zip(clips, alone, strict=True):
            assert torch.equal(encode_latents(vae, iter(in_chunks(clip))), expected)

        def with_another() -> Any:
            """Encode another clip between two chunks of this one."""
            for index, chunk in enumerate(in_chunks(clips[1])):
                yield chunk
                if index == 1:
                    other = encode_latents(vae, iter(in_chunks(clips[2])))
                    assert torch.equal(other, alone[2])

        assert torch.equal(encode_latents(vae, with_another()), alone[1])


def test_an_encode_uses_one_piece_of_ram_for_each_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae, slab, made = make_vae("2.1"), host_cache.Slab, []
    monkeypatch.setattr(host_cache, "Slab", lambda *given: made.append(given) or slab(*given))
    with lean_encoder(vae, cache_on_host=True):
        for frames in (13, 17):
            encode_latents(vae, iter(in_chunks(video(frames))))
    # Those that look back two frames; the one frame of the levels that halve time stays.
    paddings = [getattr(module, "_padding", (0,) * 5) for module in vae.encoder.modules()]
    assert len(made) == sum(padding[4] > 0 for padding in paddings) > 10


def walked(vae: Any, pixels: Tensor, bands: int, host: HostCache | None = None) -> list[Tensor]:
    """The lean encode in the dtype of the VAE, float64 too, where rounding hides no seam."""
    slots: list[Any] = [None] * 100
    options, found = DecodeOptions(bands, host), []
    for chunk in in_chunks(pixels):
        if vae.config.patch_size is not None:
            chunk = streamed._model_code().patchify(chunk, patch_size=vae.config.patch_size)
        found.append(EncoderWalk(options, slots, [0]).through(vae.encoder, chunk))
    return found


@VERSIONS
def test_a_band_sees_what_its_neighbours_hold(version: str, without_gradients: None) -> None:
    vae, pixels = make_vae(version, torch.float64), video(9, batch=2).double()
    expected = walked(vae, pixels, bands=1)
    for bands in (2, 3, 5, 64):
        found = walked(vae, pixels, bands)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        at_home = walked(vae, pixels, bands, HostCache())
        assert all(torch.equal(a, b) for a, b in zip(at_home, found, strict=True))


def test_it_comes_off_after_an_error_and_frees_what_it_kept() -> None:
    vae = make_vae("2.1")
    expected = encode_latents(vae, iter(in_chunks(video(5))))
    before = dict(vars(vae.encoder))

    def failing() -> Any:
        yield video(1)
        raise torch.OutOfMemoryError("injected")

    with lean_encoder(vae, cache_on_host=True):
        with pytest.raises(torch.OutOfMemoryError):
            encode_latents(vae, failing())
        assert torch.equal(encode_latents(vae, iter(in_chunks(video(5)))), expected)
    assert vars(vae.encoder) == before


def test_unknown_models_keep_their_own_encode() -> None:
    vae = make_vae("2.1")
    hook = vae.encoder.conv_in.register_forward_hook(lambda *_: None)
    with lean_encoder(vae) as reason:
        assert reason is not None and "encoder.conv_in: a hook" in reason
        assert "forward" not in vars(vae.encoder)
    hook.remove()
    assert lean_vae.why_not(vae, "encoder") is None
    vae.encoder.norm_out.gamma.data = vae.encoder.norm_out.gamma.data.double()
    assert "torch.float32, torch.float64" in str(lean_vae.why_not(vae, "encoder"))
    assert lean_vae.why_not(vae) is None  # the decoder is as it was


# Shape, dtype, bands, cache in RAM, height, width: the last two are the sizes of a published clip.
CASES = [
    (VAE_21, "bf16", 1, False, 480, 832),
    (VAE_21, "bf16", 1, True, 720, 1280),
    (VAE_21, "fp32", 1, False, 720, 1280),
    (VAE_22, "fp32", 1, False, 352, 640),
    (VAE_22, "bf16", 1, True, 704, 1280),
    (VAE_21, "bf16", 3, True, 240, 416),
    (VAE_22, "bf16", 2, False, 352, 640),
]
QUICK = (CASES[5],)


@pytest.mark.parametrize(
    ("shape", "dtype", "bands", "on_host", "height", "width"), slow_but(QUICK.__contains__, CASES)
)
def test_arithmetic_agrees_with_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, shape: VaeShape, dtype: str, bands: int, on_host: bool,
    height: int, width: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(host_cache, "_HOST", torch.device("meta"))  # told apart from the device
    kind, options = DTYPES[dtype], {"bands": bands, "cache_on_host": on_host}

    def run(vae: Any) -> None:
        with lean_encoder(vae, **options):
            pixels = (torch.empty(1, 3, n, height, width, dtype=kind) for n in (1, 4, 4))
            encode_latents(vae, pixels)

    ours, _ = lean_encode_bytes(
        shape, batch=1, num_frames=9, height=height, width=width, size=kind.itemsize,
        workspace=False, **options,
    )  # fmt: skip
    live = dry_vae(shape, dtype).peak(run)
    # Before diffusers 0.38 the norms of half precision needed less.
    above = 0.02 if dtype == "fp32" or norms_widen() else 0.1
    assert -0.02 <= ours / live - 1 <= above, (ours / 2**20, live / 2**20)


@pytest.mark.parametrize(("shape", "high", "wide"), [(VAE_21, 120, 208), (VAE_22, 176, 320)])
def test_a_quick_encode_has_no_copies_beside_its_maps(
    monkeypatch: pytest.MonkeyPatch, shape: VaeShape, high: int, wide: int
) -> None:
    """A dry run counts tensors, not what convolutions copy: its peak is that of channels last."""
    monkeypatch.setattr(lean_vae, "quick_for", lambda half: Quick(fused=False))

    def run(vae: Any) -> None:
        with lean_encoder(vae, quick=True):
            pixels = (torch.empty(1, 3, n, high, wide, dtype=torch.bfloat16) for n in (1, 4, 4))
            encode_latents(vae, pixels)

    numbers: dict[str, Any] = {"batch": 1, "num_frames": 9, "height": high, "width": wide}
    quick, _ = lean_encode_bytes(shape, size=2, quick=True, **numbers)
    # Before diffusers 0.38 the norms of half precision needed less.
    above = 0.02 if norms_widen() else 0.1
    assert -0.02 <= quick / dry_vae(shape, "bf16").peak(run) - 1 <= above
    assert quick < lean_encode_bytes(shape, size=2, **numbers)[0]
    for more in ({"size": 4}, {"size": 2, "bands": 3}):
        exact = lean_encode_bytes(shape, **numbers, **more)
        assert lean_encode_bytes(shape, quick=True, **numbers, **more) == exact


@pytest.mark.parametrize("size", [2, 4])
def test_what_it_saves(size: int) -> None:
    """Of 720p: what the lean encode, its cache in RAM, and bands take of diffusers' peak."""
    numbers: dict[str, Any] = {
        "batch": 1, "num_frames": 81, "height": 720, "width": 1280, "size": size,
        "workspace": False,
    }  # fmt: skip
    theirs = encode_peak(VAE_21, **numbers)
    lean, held = lean_encode_bytes(VAE_21, **numbers)
    in_ram, moved = lean_encode_bytes(VAE_21, cache_on_host=True, **numbers)
    bands, _ = lean_encode_bytes(VAE_21, bands=BANDS, cache_on_host=True, **numbers)
    assert lean < 0.8 * theirs and in_ram < 0.5 * theirs and bands < 0.3 * theirs
    assert 0.99 * held < moved <= 1.01 * held
