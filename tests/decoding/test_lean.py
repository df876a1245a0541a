"""The lean decode: diffusers' bits, less memory, and nothing left on the VAE."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import slow_but
from support.decoding import decode_frames
from support.machines import architecture, cpu, gpu
from support.traced import TracedMemory
from support.true_models import DTYPES, dry_vae
from support.vae_models import make_latents, make_vae
from torch import Tensor

from wan_core.config import GIB, StageEstimate
from wan_core.decoding import decoder as lean_decode
from wan_core.decoding import host_cache as decode_cache
from wan_core.decoding import lean as lean_vae
from wan_core.decoding.decoder import DecodeOptions, DecoderWalk
from wan_core.decoding.decoder_quick import Quick
from wan_core.decoding.host_cache import HostCache, HostEntry
from wan_core.decoding.lean import lean_decoder
from wan_core.forward.sources import norms_widen
from wan_core.memory.machine import SystemResources
from wan_core.memory.stages import Choices, Workload, estimate
from wan_core.memory.vae import decode_peak
from wan_core.memory.vae_lean import BANDS, lean_decode_bytes
from wan_core.models import PARTS
from wan_core.models.variants import VAE_21, VAE_22, VaeShape
from wan_core.placing import applied as placement
from wan_core.sampling.vae import StreamingDecoder, to_frames

VERSIONS = pytest.mark.parametrize("version", ["2.1", "2.2"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def chunks(vae: Any, latents: Tensor, **lean: Any) -> list[Tensor]:
    """Decode with the lean decoder, which must act."""
    with lean_decoder(vae, **lean) as refused:
        assert refused is None
        assert "forward" in vars(vae.decoder)
        return list(decode_frames(vae, latents))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@VERSIONS
@FLOATS
@pytest.mark.parametrize("batch", [1, 2])
def test_bits_are_those_of_diffusers(version: str, dtype: torch.dtype, batch: int) -> None:
    vae = make_vae(version, dtype)
    latents = make_latents(vae, 5, batch)
    expected = list(decode_frames(vae, latents))
    assert same(chunks(vae, latents), expected)
    assert same(chunks(vae, latents, cache_on_host=True), expected)


@cache
def wide_vae(version: str) -> Any:
    """Full-size channels of the 2.1 VAE; of the 2.2 VAE an eighth."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(3)
    if version == "2.1":
        return AutoencoderKLWan(base_dim=96).eval().requires_grad_(False)
    vae = AutoencoderKLWan(
        base_dim=20, decoder_base_dim=32, z_dim=48, in_channels=12, out_channels=12,
        is_residual=True, patch_size=2, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip
    return vae.eval().requires_grad_(False)


def traced(vae: Any, latents: Tensor, **lean: Any) -> tuple[list[Tensor], int]:
    """Return the chunks and the peak bytes of tensors while they were decoded."""
    manager = lean_decoder(vae, **lean) if lean else nullcontext()
    found = []
    with manager, TracedMemory() as memory:
        decoder = StreamingDecoder(vae, latents)
        while not decoder.done:
            found.append(decoder.decode_next())
        decoder.close()
    return found, memory.peak_bytes


@VERSIONS
def test_traced_peak_at_wide_channels(version: str) -> None:
    vae = wide_vae(version)
    latents = make_latents(vae, 3)
    expected, theirs = traced(vae, latents)
    found, ours = traced(vae, latents, cache_on_host=False)
    assert same(found, expected)
    # The picture is 16 pixels high: the zeros around it are a quarter of every buffer.
    assert ours <= 0.8 * theirs


def walked(
    vae: Any, latents: Tensor, bands: int, host: HostCache | None = None
) -> list[Tensor]:  # fmt: skip
    """The lean decode in the dtype of the VAE, float64 too, where rounding hides no seam."""
    slots: list[Any] = [None] * 100
    options = DecodeOptions(bands, host)
    return [
        DecoderWalk(options, slots, [0]).through(vae.decoder, latents[:, :, i : i + 1], i == 0)
        for i in range(latents.shape[2])
    ]


@VERSIONS
def test_a_band_sees_what_its_neighbours_hold(version: str) -> None:
    vae = make_vae(version, torch.float64)
    latents = make_latents(vae, 4, batch=2).double()
    expected = walked(vae, latents, bands=1)
    for bands in (2, 3, 5, 64):
        found = walked(vae, latents, bands)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert same(walked(vae, latents, bands, HostCache()), found), "rows at home are the same"


@VERSIONS
def test_a_decode_uses_one_piece_of_ram_for_each_convolution(version: str) -> None:
    vae, latents = make_vae(version), make_latents(make_vae(version), 5)
    seen: list[list[int]] = []
    with lean_decoder(vae, cache_on_host=True):
        decoder = StreamingDecoder(vae, latents)
        while not decoder.done:
            decoder.decode_next()
            assert decoder._cache is not None
            entries = [e for e in decoder._cache if isinstance(e, HostEntry)]
            seen.append([entry.memory.data_ptr() for entry in entries])
    upsamplers = len(seen[1]) - len(seen[0])  # these see the first frame only as a mark
    assert upsamplers == 2
    assert len(seen[0]) > 10 and set(seen[0]) < set(seen[1])
    assert seen[1] == seen[2] == seen[-1]


@pytest.mark.parametrize("bands", [None, 3])
def test_two_decodes_at_a_time_keep_their_own_frames_in_ram(bands: int | None) -> None:
    vae = make_vae("2.1")
    first, second = make_latents(vae, 4), make_latents(vae, 4) + 1
    expected = [chunks(vae, latents, bands=bands) for latents in (first, second)]
    with lean_decoder(vae, bands=bands, cache_on_host=True):
        pairs = list(zip(decode_frames(vae, first), decode_frames(vae, second), strict=True))
    for found, alone in zip(zip(*pairs, strict=True), expected, strict=True):
        assert same(list(found), alone)


@VERSIONS
@FLOATS
def test_bands_give_the_picture_to_rounding(version: str, dtype: torch.dtype) -> None:
    vae = make_vae(version, dtype)
    latents = make_latents(vae, 4)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    pairs = zip(chunks(vae, latents, bands=3), decode_frames(vae, latents), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@VERSIONS
def test_a_clip_may_change_the_way_of_decoding_at_any_frame(version: str) -> None:
    vae = make_vae(version)
    latents = make_latents(vae, 6)
    expected = list(decode_frames(vae, latents))
    decoder, found = StreamingDecoder(vae, latents), []
    while not decoder.done:
        manager = lean_decoder(vae) if decoder.position % 2 else nullcontext()
        with manager:
            found.append(decoder.decode_next())
    assert same(found, expected)


@VERSIONS
@pytest.mark.parametrize("on_host", [True, False])
def test_a_decode_that_failed_goes_on(
    version: str, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:

    vae = make_vae(version)
    latents = make_latents(vae, 4)
    expected = list(decode_frames(vae, latents))
    convolve, calls = lean_decode._apply, iter(range(10_000))

    def fails_once(conv: Any, padded: Tensor) -> Tensor:
        if next(calls) == 50:
            raise torch.OutOfMemoryError("injected")
        return convolve(conv, padded)

    monkeypatch.setattr(lean_decode, "_apply", fails_once)
    decoder, found, failures = StreamingDecoder(vae, latents), [], 0
    with lean_decoder(vae, cache_on_host=on_host):
        while not decoder.done:
            try:
                found.append(decoder.decode_next())
            except torch.OutOfMemoryError:
                failures += 1
    assert failures == 1
    assert same(found, expected)
    assert "forward" not in vars(vae.decoder)


def test_it_comes_off_after_an_error_and_serves_only_the_thread_that_asked() -> None:
    vae = make_vae("2.1")
    before = dict(vars(vae.decoder))
    with pytest.raises(KeyboardInterrupt), lean_decoder(vae), lean_decoder(vae, bands=2):
        modes: list[Any] = []
        installed = lean_vae._lean.on(vae.decoder)
        with torch.no_grad():
            mine = installed.mine()
            other = threading.Thread(target=lambda: modes.append(installed.mine()))
            other.start()
            other.join()
        assert mine is not None and mine.bands == 2
        assert modes == [None]
        assert installed.mine() is None, "gradients are on here"
        raise KeyboardInterrupt
    assert vars(vae.decoder) == before


def test_unknown_models_keep_their_own_decode() -> None:
    vae = make_vae("2.1")
    hook = vae.decoder.conv_in.register_forward_hook(lambda *_: None)
    with lean_decoder(vae) as reason:
        assert reason is not None and "decoder.conv_in: a hook" in reason
        assert "forward" not in vars(vae.decoder)
    hook.remove()
    assert lean_vae.why_not(vae) is None
    vae.decoder.norm_out.gamma.data = vae.decoder.norm_out.gamma.data.double()
    assert "torch.float32, torch.float64" in str(lean_vae.why_not(vae))


CASES = [
    (VAE_21, "bf16", 1, False, 60, 104),
    (VAE_21, "fp32", 1, True, 60, 104),
    (VAE_22, "bf16", 1, False, 44, 80),
    (VAE_21, "bf16", 2, False, 30, 52),
    (VAE_22, "fp32", 2, False, 22, 40),
    (VAE_22, "bf16", 3, True, 44, 80),
]
QUICK = (CASES[2],)


@pytest.mark.parametrize(
    ("shape", "dtype", "bands", "on_host", "height", "width"), slow_but(QUICK.__contains__, CASES)
)
def test_arithmetic_agrees_with_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, shape: VaeShape, dtype: str, bands: int, on_host: bool,
    height: int, width: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(decode_cache, "_HOST", torch.device("meta"))  # told apart from the device
    kind, options = DTYPES[dtype], {"bands": bands, "cache_on_host": on_host}

    def run(vae: Any) -> None:
        with lean_decoder(vae, **options):
            latents = torch.empty(1, shape.z_dim, 7, height, width, dtype=kind)
            decoder = StreamingDecoder(vae, latents)
            for _ in range(3):
                to_frames(decoder.decode_next())

    numbers = {"batch": 1, "latent_frames": 7, "latent_height": height, "latent_width": width}
    ours, _ = lean_decode_bytes(
        shape, size=kind.itemsize, workspace=False, bands=bands, cache_on_host=on_host, **numbers
    )
    # Before diffusers 0.38 the norms of half precision needed less.
    above = 0.01 if dtype == "fp32" or norms_widen() else 0.1
    assert -0.01 <= ours / dry_vae(shape, dtype).peak(run) - 1 <= above


@pytest.mark.parametrize("shape", [VAE_21, VAE_22], ids=["2.1", "2.2"])
def test_a_picture_keeps_one_frame_of_each_convolution(shape: VaeShape) -> None:
    """The cache after one latent frame, against that of a real decode."""
    numbers: dict[str, Any] = {"latent_height": 30, "latent_width": 52, "size": 2}
    kept = []

    def run(vae: Any) -> None:
        with lean_decoder(vae):
            decoder = StreamingDecoder(
                vae, torch.empty(1, shape.z_dim, 1, 30, 52, dtype=torch.bfloat16)
            )
            decoder.decode_next()
            entries = decoder._cache or []
            kept.extend(e.numel() * 2 for e in entries if isinstance(e, Tensor))

    live = dry_vae(shape, "bf16").peak(run)
    peak, cache = lean_decode_bytes(shape, batch=1, latent_frames=1, workspace=False, **numbers)
    above = 0.01 if norms_widen() else 0.1
    assert -0.01 <= peak / live - 1 <= above
    assert cache == pytest.approx(sum(kept), rel=0.01)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("shape", "height", "width"), [(VAE_21, 60, 104), (VAE_21, 90, 160), (VAE_22, 44, 80)]
)
def test_goals(shape: VaeShape, height: int, width: int, size: int) -> None:
    """Activations against diffusers': 0.75 with equal bits, 0.4 by bands with the cache in RAM."""
    numbers: dict[str, Any] = {
        "batch": 1, "latent_frames": 21, "latent_height": height, "latent_width": width,
        "size": size, "workspace": False,
    }  # fmt: skip
    theirs = decode_peak(shape, **numbers)
    exact, held = lean_decode_bytes(shape, **numbers)
    by_bands, moved = lean_decode_bytes(shape, bands=8, cache_on_host=True, **numbers)
    assert exact <= 0.75 * theirs
    assert by_bands <= 0.25 * theirs
    assert held == moved > 0.3 * theirs, "the feature cache does not get smaller, it moves"


def test_a_plan_decides_how_the_decode_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_core.render.stages import StageRunner

    vae, seen = make_vae("2.1"), []
    monkeypatch.setattr(StageRunner, "component", lambda *_, look_later: nullcontext(vae))
    monkeypatch.setattr(placement, "_placed", lambda *_: nullcontext())
    monkeypatch.setattr(lean_vae, "quick_for", lambda half: Quick(half is vae.encoder))
    for stage, lean, by_rows, quick in [
        ("decode", True, True, False), ("decode", True, False, False),
        ("decode", False, False, False), ("decode", True, False, True),
        ("condition_encode", True, True, False), ("control_encode", True, False, False),
        ("control_encode", False, False, False), ("condition_encode", True, False, True),
    ]:  # fmt: skip
        stages: Any = StageRunner(
            architecture=SimpleNamespace(loras_of=lambda part, **_: ()),
            cache=None, keep_components=True, callbacks=SimpleNamespace(loaded=print),
            smaller_plan=None, plan_alone=None,
            plan=SimpleNamespace(
                device="cpu",
                choices=SimpleNamespace(
                    lean=lean, by_rows=by_rows, cache_in_ram=False, quick=quick,
                    lean_vae=lean,
                ),
                pin_bytes=lambda budget: budget,
            ),
            result=SimpleNamespace(warnings=[]),
            timeline=SimpleNamespace(stage=lambda name: nullcontext()),
        )  # type: ignore[arg-type]  # fmt: skip
        with stages.use(stage, "vae"), torch.no_grad():
            both = lean_vae._lean.on(vae.decoder), lean_vae._lean.on(vae.encoder)
            seen.append(tuple(installed.mine() if installed else None for installed in both))
        assert stages.result.warnings == []
    by_bands, exact, plain, quick = seen[:4]
    assert by_bands[0].bands == BANDS and by_bands[0].host is not None
    assert exact == (DecodeOptions(), None) and plain == (None, None)
    assert quick == (DecodeOptions(quick=Quick(False)), None)
    by_bands, exact, plain, quick = ((encoder, decoder) for decoder, encoder in seen[4:])
    assert by_bands[0].bands == BANDS and by_bands[0].host is not None
    assert exact == (DecodeOptions(), None) and plain == (None, None)
    assert quick == (DecodeOptions(quick=Quick(True)), None)


def test_the_estimate_of_a_decode_follows_the_plan() -> None:
    def decode(machine: SystemResources, **choices: Any) -> StageEstimate:
        made = Choices(dtypes=dict.fromkeys(PARTS, "bf16"), offload="model", **choices)
        job = Workload(width=832, height=480, num_frames=81)
        stages = estimate(architecture("wan2.1-t2v-14b"), job, made, machine).stages
        return next(stage for stage in stages if stage.name == "decode")

    plain, lean, rows, quick, quick_rows = (
        decode(gpu(24), **more)
        for more in (
            {}, {"lean": True}, {"lean": True, "by_rows": True}, {"lean": True, "quick": True},
            {"lean": True, "by_rows": True, "quick": True},
        )
    )  # fmt: skip
    assert lean.activation_bytes < 0.84 * plain.activation_bytes
    assert rows.activation_bytes < 0.25 * plain.activation_bytes
    assert quick.activation_bytes < 0.82 * lean.activation_bytes
    assert quick_rows == rows, "bands are not quick"
    assert rows.host_bytes - lean.host_bytes > 1.7 * GIB, "the feature cache is in RAM"
    in_ram = decode(cpu(64), lean=True, by_rows=True)
    assert in_ram.activation_bytes > rows.activation_bytes + 1.7 * GIB
    hooked = decode(gpu(24), lean=True, part_offload={"vae": "sequential"})
    assert hooked.activation_bytes == plain.activation_bytes
