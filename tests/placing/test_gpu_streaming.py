"""On a CUDA device: streamed blocks and the lean forward give the resident run's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.decoding import decode_frames
from support.lean_models import model_of
from support.vae_models import make_latents, make_vae

from wan_core.decoding import lean as lean_vae
from wan_core.decoding.lean import lean_decoder, lean_encoder
from wan_core.forward.transformer import lean_forward, run_together
from wan_core.loading.page_lock import pinned_bytes, unpin
from wan_core.placing.offload import MODES, block_hooks, place
from wan_core.placing.streaming import pin_ahead, stream_blocks
from wan_core.sampling.vae import encode_latents, to_frames

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("without_gradients"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
DEVICE = "cuda"


def case(family: str = "wan2.1-t2v") -> tuple[Any, list[dict[str, Any]], list[torch.Tensor]]:
    """A transformer on the host, two calls on the device, and their resident results."""
    model = model_of(
        family, torch.bfloat16, num_layers=6, num_attention_heads=8, attention_head_dim=128,
        ffn_dim=2048,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    channels = model.config.in_channels
    calls = []
    for _ in range(2):
        call: dict[str, Any] = {
            "hidden_states": torch.randn(1, channels, 9, 32, 32, generator=g).bfloat16().cuda(),
            "timestep": torch.tensor([777.0]).cuda(),
            "encoder_hidden_states": torch.randn(1, 512, 32, generator=g).bfloat16().cuda(),
            "return_dict": False,
        }
        if channels == 48:
            call["timestep"] = torch.full((1, 9 * 256), 777.0).cuda()
            call["timestep"][:, :256] = 0
        calls.append(call)
    with place(model, "model", DEVICE):
        expected = [model(**call)[0] for call in calls]
    return model, calls, expected


def addresses(model: torch.nn.Module) -> list[Any]:
    return [(id(p), p.device.type) for p in model.parameters()]


@pytest.mark.parametrize("pinned", [0, 3, 6])
@pytest.mark.parametrize(("resident", "buffers"), [(0, 1), (0, 2), (0, 3), (2, 2), (5, 2), (6, 2)])
def test_streamed_equals_resident(resident: int, buffers: int, pinned: int) -> None:
    model, calls, expected = case()
    before = addresses(model)
    size = sum(p.nbytes for p in model.blocks[0].parameters())
    budget = int(size * pinned * 1.1)
    numbers = {"resident_blocks": resident, "buffers": buffers, "pin_bytes": budget}
    for _ in range(2):
        with stream_blocks(model, DEVICE, **numbers):
            for _ in range(4):
                for call, right in zip(calls, expected, strict=True):
                    assert torch.equal(model(**call)[0], right)
        assert addresses(model) == before
    assert pinned_bytes(model) <= budget
    unpin(model)
    assert pinned_bytes(model) == 0


@pytest.mark.parametrize("family", ["wan2.1-t2v", "wan2.2-ti2v-5b"])
def test_lean_and_shared_passes_equal_diffusers(family: str) -> None:
    model, calls, expected = case(family)
    with stream_blocks(model, DEVICE, resident_blocks=1), lean_forward(model) as reason:
        assert reason is None
        assert torch.equal(model(**calls[1])[0], expected[1])
        results = run_together(model, calls)
    assert all(torch.equal(a[0], b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_every_placement_gives_the_same_bits(mode: str) -> None:
    model, calls, expected = case()
    with place(model, mode, DEVICE):
        assert torch.equal(model(**calls[0])[0], expected[0])


def test_after_an_interrupt_the_stream_goes_on() -> None:
    model, calls, expected = case()
    turns: list[int] = []

    def stop() -> None:
        turns.append(1)
        if len(turns) == 3:
            raise KeyboardInterrupt

    with stream_blocks(model, DEVICE):
        with pytest.raises(KeyboardInterrupt), block_hooks(model, stop):
            model(**calls[0])
        assert torch.equal(model(**calls[0])[0], expected[0])


def test_pinned_ahead_while_another_computes() -> None:
    high, calls, expected = case()
    low, _, _ = case()
    with stream_blocks(high, DEVICE, pin_bytes=1 << 40), pin_ahead(low, pin_bytes=1 << 40):
        for _ in range(20):
            assert torch.equal(high(**calls[0])[0], expected[0])
    assert pinned_bytes(low) > 0
    with stream_blocks(low, DEVICE, pin_bytes=1 << 40):
        assert torch.equal(low(**calls[0])[0], expected[0])


def test_device_memory_is_what_the_buffers_hold() -> None:
    model, calls, _ = case()
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - 6 * block
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with stream_blocks(model, DEVICE, resident_blocks=1):
        model(**calls[0])
        held = torch.cuda.memory_allocated() - before
    assert held <= 1.02 * (rest + 3 * block) + 2**20
    assert torch.cuda.memory_allocated() - before < block


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("pin_bytes", [0, 2**30])
def test_a_decode_with_its_cache_in_ram_gives_the_same_bits(bands: int, pin_bytes: int) -> None:
    vae = make_vae("2.1").cuda()
    latents = make_latents(vae, 6).cuda()
    with lean_decoder(vae, bands=bands, cache_on_host=False):
        expected = [to_frames(chunk) for chunk in decode_frames(vae, latents)]
    with lean_decoder(vae, bands=bands, cache_on_host=True, pin_bytes=pin_bytes):
        installed: Any = lean_vae._lean.on(vae.decoder)
        slabs = installed.mine().host._slabs
        found = [to_frames(chunk) for chunk in decode_frames(vae, latents)]
        assert slabs and all(slab.pinned == bool(pin_bytes) for slab in slabs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(slab.pinned for slab in slabs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_a_lean_encode_gives_diffusers_bits(version: str, dtype: torch.dtype) -> None:
    vae, g = make_vae(version, dtype).cuda(), torch.Generator().manual_seed(2)
    pixels = (torch.rand(1, 3, 13, 96, 160, generator=g) * 2 - 1).to("cuda", dtype)
    expected = vae.encode(pixels).latent_dist.mode()
    for more in ({}, {"cache_on_host": True}, {"cache_on_host": True, "pin_bytes": 2**30}):
        with lean_encoder(vae, **more) as refused:
            assert refused is None
            chunks = iter([pixels[:, :, :1], *torch.split(pixels[:, :, 1:], 4, dim=2)])
            assert torch.equal(encode_latents(vae, chunks), expected), more
