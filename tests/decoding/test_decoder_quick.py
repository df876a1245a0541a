"""The quick VAE: channels last, norm and SiLU in one pass; the same numbers but for rounding."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fused_eager import norm_silu
from support.vae_models import make_latents, make_vae
from torch import Tensor

from wan_core.decoding import decoder_quick, lean_decoder, lean_encoder
from wan_core.decoding import lean as vae
from wan_core.decoding.decoder_quick import Quick, quick_for
from wan_core.kernels.trials import Trials
from wan_core.sampling import StreamingDecoder
from wan_core.sampling.vae import encode_latents

pytestmark = pytest.mark.usefixtures("without_gradients")


class Kernels:
    """The fused norm in eager code, and what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def norm_silu(self, source: Tensor, out: Tensor, gamma: Tensor, scale: float) -> None:
        assert source.stride(1) == out.stride(1) == 1
        assert source.data_ptr() != out.data_ptr()
        self.calls.append(tuple(source.shape))
        norm_silu(source, out, gamma, scale)


def as_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have convolutions return channels last where they are given so, which a CPU's may not."""

    def convolved(plain: Any, layout: Any, x: Tensor, *more: Any, **rest: Any) -> Tensor:
        out: Tensor = plain(x, *more, **rest)
        last = x.is_contiguous(memory_format=layout) and not x.is_contiguous()
        return out.contiguous(memory_format=layout) if last else out

    for name, layout in (("conv2d", torch.channels_last), ("conv3d", torch.channels_last_3d)):
        monkeypatch.setattr(F, name, partial(convolved, getattr(F, name), layout))


def decode(model: Any, latents: Tensor, **options: Any) -> Tensor:
    with lean_decoder(model, **options) as refused:
        assert refused is None
        decoder = StreamingDecoder(model, latents)
        chunks = []
        while not decoder.done:
            chunks.append(decoder.decode_next())
        decoder.close()
    return torch.cat(chunks, dim=2)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_video_of_diffusers_but_for_rounding(
    version: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kernels = make_vae(version), Kernels()
    monkeypatch.setattr(decoder_quick, "triton_kernels", lambda: kernels)
    monkeypatch.setattr(vae, "quick_for", lambda decoder: Quick(fused))
    for batch, frames in ((1, 3), (2, 2)):
        latents = make_latents(model, frames, batch)
        expected = model.decode(latents, return_dict=False)[0]
        out = decode(model, latents, quick=True)
        assert out.shape == expected.shape
        assert float((out - expected).norm() / expected.norm()) < 1e-5
        assert torch.equal(decode(model, latents), expected)
    assert bool(kernels.calls) is fused


@pytest.mark.parametrize(("version", "fused"), [("2.1", True), ("2.2", True), ("2.2", False)])
def test_the_latents_of_diffusers_but_for_rounding(
    version: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, one frame and several, chunk by chunk."""
    model, kernels, seen = make_vae(version), Kernels(), []
    monkeypatch.setattr(decoder_quick, "triton_kernels", lambda: kernels)
    monkeypatch.setattr(vae, "quick_for", lambda half: seen.append(half) or Quick(fused))
    as_cudnn(monkeypatch)
    unit = model.config.scale_factor_spatial
    for batch, frames, high, wide in ((1, 9, 3, 5), (2, 5, 1, 3), (1, 1, 2, 1)):
        g = torch.Generator().manual_seed(3)
        pixels = torch.rand(batch, 3, frames, high * unit, wide * unit, generator=g) * 2 - 1
        chunks = [pixels[:, :, :1], *(pixels[:, :, i : i + 4] for i in range(1, frames, 4))]
        expected = model.encode(pixels).latent_dist.mode()
        kernels.calls.clear()
        for quick in (True, False):
            with lean_encoder(model, quick=quick) as refused:
                assert refused is None
                out = encode_latents(model, iter(chunks))
            assert out.shape == expected.shape
            assert float((out - expected).norm() / expected.norm()) < 1e-5
        assert torch.equal(out, expected), "the exact encode"
        # All but the attention's norm are the kernel's, of maps with channels last.
        norms = sum(hasattr(module, "gamma") for module in model.encoder.modules()) - 1
        assert len(kernels.calls) == (len(chunks) * norms if fused else 0)
    assert seen == [model.encoder] * 3


def test_bands_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_vae("2.1")
    monkeypatch.setattr(vae, "quick_for", lambda decoder: Quick(True))
    latents = make_latents(model, 2)
    expected = decode(model, latents, bands=2)
    assert torch.equal(decode(model, latents, bands=2, quick=True), expected)


def test_a_cpu_has_nothing_quicker() -> None:
    assert quick_for(make_vae("2.1").decoder) is None


def test_norms_that_the_kernel_does_not_know() -> None:
    quick, norm = Quick(True), SimpleNamespace(
        bias=0.0, channel_first=True, gamma=torch.ones(4, 1, 1, 1), scale=2.0
    )  # fmt: skip
    first = torch.zeros(1, 4, 1, 2, 2)
    last = first.contiguous(memory_format=torch.channels_last_3d)
    assert not quick.activate(norm, first, last)
    assert not quick.activate(norm, last, first)
    for change in ({"bias": torch.ones(4)}, {"channel_first": False}, {"gamma": norm.gamma.half()}):
        assert not quick.activate(SimpleNamespace(**{**vars(norm), **change}), last, last)


def test_a_kernel_is_tried_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")

    def works(function: Any) -> bool:
        monkeypatch.setattr(decoder_quick, "_trials", Trials("the norm"))
        found = None if function is None else SimpleNamespace(norm_silu=function)
        monkeypatch.setattr(decoder_quick, "triton_kernels", lambda: found)
        return decoder_quick._works(cpu, torch.bfloat16)

    def broken(*args: Any) -> None:
        raise RuntimeError("no C compiler")

    def unwritten(*args: Any) -> None:
        pass

    assert works(norm_silu)
    assert not works(unwritten)
    assert not works(None)
    with caplog.at_level("INFO"):
        assert not works(broken)
    assert "no C compiler" in caplog.text
