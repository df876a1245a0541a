"""Every line of the replays, against a dry run of the real classes: what is made, what is alive.

The peak of a forward or a decode is decided by few of its lines. Here each tensor that a replay
makes is set beside the one that the real class makes at the same place. The shapes are small: for a
dry run they need not be those of a real clip.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.dry_run import DryModel, LiveBytes
from support.replay import TracedTape, compare, traced_tapes
from support.true_models import DTYPES, KEEP_FP32, autoencoder, transformer

from wan_core.decoding import host_cache, lean_decoder
from wan_core.memory.forward import transformer_peak
from wan_core.memory.vae import decode_peak, encode_peak
from wan_core.memory.vae_lean import lean_decode_bytes
from wan_core.models.variants import VAE_21, VAE_22, VARIANTS, TransformerShape, VaeShape
from wan_core.sampling.vae import StreamingDecoder, encode_latents, to_frames

VAES = {
    "2.1": replace(VAE_21, base_dim=32, decoder_base_dim=32),
    "2.2": replace(VAE_22, base_dim=32, decoder_base_dim=32),
}
HIGH, WIDE = 8, 10  # of the latents of a decode
FRAMES = 4


@cache
def dry_vae(name: str, dtype: str) -> DryModel:
    return DryModel(lambda: autoencoder(VAES[name]), DTYPES[dtype])


def decode(vae: Any, shape: VaeShape, batch: int, kind: torch.dtype) -> None:
    decoder = StreamingDecoder(vae, torch.empty(batch, shape.z_dim, FRAMES, HIGH, WIDE, dtype=kind))
    for _ in range(3):
        to_frames(decoder.decode_next())


def traced(function: Any, *arguments: Any, **numbers: Any) -> TracedTape:
    """Run a replay and return its tape; past what it remembers of earlier calls."""
    with traced_tapes() as tapes:
        function.__wrapped__(*arguments, **numbers)
    return tapes[-1]


def vae_runs(name: str, dtype: str, batch: int, what: str) -> tuple[TracedTape, LiveBytes]:
    """Return the replay and the dry run of a decode, an encode or a lean decode."""
    shape, kind, model = VAES[name], DTYPES[dtype], dry_vae(name, dtype)
    size = {"size": kind.itemsize, "workspace": False, "batch": batch}
    latents = {"latent_frames": FRAMES, "latent_height": HIGH, "latent_width": WIDE}
    if what == "encode":
        video = (torch.empty(batch, 3, n, 64, 96, dtype=kind) for n in (1, 4, 4))
        real = model.traced(lambda vae: encode_latents(vae, video))
        return traced(encode_peak, shape, num_frames=9, height=64, width=96, **size), real
    if what == "decode":
        real = model.traced(lambda vae: decode(vae, shape, batch, kind))
        return traced(decode_peak, shape, **latents, **size), real
    bands, on_host = int(what[0]), what.endswith("in RAM")

    def lean(vae: Any) -> None:
        with lean_decoder(vae, bands=bands, cache_on_host=on_host) as why:
            assert why is None
            decode(vae, shape, batch, kind)

    real = model.traced(lean)
    options = {"bands": bands, "cache_on_host": on_host}
    return traced(lean_decode_bytes, shape, **latents, **size, **options), real


# How many tensors only the replay makes, and by how many percent of the peak it has more and less
# alive where both make the same. It makes all latents at once where the decoder convolves them
# frame by frame, knows no views, and replays one band of rows for all.
VAE_CASES: dict[tuple[str, str, int, str], tuple[int, float, float]] = {
    ("2.1", "bf16", 2, "decode"): (9, 0.93, -0.1),
    ("2.1", "bf16", 2, "encode"): (6, 0.16, -0.16),
    ("2.1", "bf16", 2, "1 band"): (9, 0.64, -1.28),
    ("2.1", "bf16", 2, "2 bands, cache in RAM"): (243, 2.34, -0.63),
    ("2.2", "fp32", 1, "decode"): (12, 0.62, -0.05),
    ("2.2", "fp32", 1, "encode"): (9, 0.13, -0.13),
    ("2.2", "fp32", 1, "1 band, cache in RAM"): (12, 0.22, -0.22),
    ("2.2", "fp32", 1, "2 bands"): (33, 0.11, -1.77),
}


@pytest.mark.parametrize("case", VAE_CASES, ids=lambda case: " ".join(map(str, case)))
def test_vae(case: tuple[str, str, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cache, "_HOST", torch.device("meta"))  # told apart from the device
    within(VAE_CASES[case], *vae_runs(*case))


def within(limits: tuple[int, float, float], ours: TracedTape, real: LiveBytes) -> None:
    found = compare(ours, real)
    more, less = (100 * live / real.peak for live in (found.most, found.least))
    assert (len(found.ours), round(more, 2), round(less, 2)) == limits


# ------------------------------------------------------------------------------- transformer

LATENT = (5, 16, 20)
TOKENS = (16 // 2) * (20 // 2)  # of a frame


def small(name: str) -> TransformerShape:
    shape = VARIANTS[name].transformer
    own = None if shape.added_kv_dim is None else 2 * 128
    return replace(shape, heads=2, ffn_dim=640, layers=2, text_dim=64, added_kv_dim=own)


@cache
def dry_transformer(name: str, dtype: str) -> DryModel:
    return DryModel(lambda: transformer(small(name), layers=2), DTYPES[dtype], KEEP_FP32)


def call(name: str, batch: int, kind: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a forward."""
    shape, (frames, height, width) = small(name), LATENT
    images = None
    if shape.image_dim is not None:
        rows = batch * (2 if shape.pos_embed_seq_len else 1)
        images = torch.empty(rows, 257, shape.image_dim, dtype=kind)
    per_token = VARIANTS[name].expand_timesteps
    return {
        "hidden_states": torch.empty(batch, shape.in_channels, frames, height, width, dtype=kind),
        "timestep": torch.empty(batch, frames * TOKENS) if per_token else torch.empty(batch),
        "encoder_hidden_states": torch.empty(batch, 512, shape.text_dim, dtype=kind),
        "encoder_hidden_states_image": images,
        "return_dict": False,
    }


def forward_runs(name: str, dtype: str, batch: int) -> tuple[TracedTape, LiveBytes]:
    """Return the replay and the dry run of diffusers' forward."""
    kind, model = DTYPES[dtype], dry_transformer(name, dtype)
    frames, height, width = LATENT
    numbers: dict[str, Any] = {
        "batch": batch, "latent_frames": frames, "latent_height": height, "latent_width": width,
        "size": kind.itemsize, "per_token": VARIANTS[name].expand_timesteps,
    }  # fmt: skip
    real = model.traced(lambda module: module(**call(name, batch, kind)))
    return traced(transformer_peak, small(name), **numbers), real


# As above. Tensors of equal size follow one another here, and which of ours stands beside which of
# theirs is then a choice; that nothing changed shows all the same.
FORWARD_CASES: dict[tuple[str, str, int], tuple[int, float, float]] = {
    ("wan2.1-t2v-1.3b", "bf16", 1): (11, 30.6, -13.42),
    ("wan2.1-t2v-1.3b", "fp32", 2): (7, 38.18, -8.37),
    ("wan2.1-flf2v-14b", "bf16", 1): (12, 18.58, -23.5),
    ("wan2.1-flf2v-14b", "fp32", 2): (8, 22.7, -53.84),
    ("wan2.2-ti2v-5b", "bf16", 1): (11, 12.54, -8.25),
    ("wan2.2-ti2v-5b", "fp32", 2): (7, 17.94, -7.87),
}


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda case: " ".join(map(str, case)))
def test_transformer(case: tuple[str, str, int]) -> None:
    within(FORWARD_CASES[case], *forward_runs(*case))
