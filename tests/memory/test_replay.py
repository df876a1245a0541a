"""Every line of the replays, against a dry run of the real classes: what is made, what is alive.

The peak of a forward or a decode is decided by few of its lines. Here each tensor that a replay
makes is set beside the one that the real class makes at the same place. The shapes are small: for a
dry run they need not be those of a real clip.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.dry_run import LiveBytes
from support.replay import TracedTape, compare, traced_tapes
from support.true_models import DTYPES, dry_transformer, dry_vae

from wan_core.decoding import host_cache, lean_decoder
from wan_core.forward import hints_in_turn
from wan_core.forward import transformer as lean_forward
from wan_core.memory.forward import transformer_peak
from wan_core.memory.forward_lean import lean_peak
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
    shape, kind, model = VAES[name], DTYPES[dtype], dry_vae(VAES[name], dtype)
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


# How many tensors both make and only the replay makes, and by how many percent of the peak it has
# more and less alive where both make the same. It makes all latents at once where the decoder
# convolves them frame by frame, knows no views, and replays one band of rows for all.
VAE_CASES: dict[tuple[str, str, int, str], tuple[int, int, float, float]] = {
    ("2.1", "bf16", 2, "decode"): (1296, 9, 0.93, -0.1),
    ("2.1", "bf16", 2, "encode"): (953, 6, 0.16, -0.16),
    ("2.1", "bf16", 2, "1 band"): (554, 9, 0.64, -1.28),
    ("2.1", "bf16", 2, "2 bands, cache in RAM"): (480, 243, 2.34, -0.63),
    ("2.2", "fp32", 1, "decode"): (1137, 12, 0.62, -0.05),
    ("2.2", "fp32", 1, "encode"): (875, 9, 0.13, -0.13),
    ("2.2", "fp32", 1, "1 band, cache in RAM"): (537, 12, 0.22, -0.22),
    ("2.2", "fp32", 1, "2 bands"): (496, 33, 0.11, -1.77),
}


SLOW = (("2.1", "bf16", 2, "encode"), ("2.1", "bf16", 2, "1 band"), ("2.2", "fp32", 1, "decode"),
        ("2.2", "fp32", 1, "2 bands"))  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in VAE_CASES],
    ids=lambda case: " ".join(map(str, case)),
)
def test_vae(case: tuple[str, str, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cache, "_HOST", torch.device("meta"))  # told apart from the device
    within(VAE_CASES[case], *vae_runs(*case))


def within(limits: tuple[int, int, float, float], ours: TracedTape, real: LiveBytes) -> None:
    found = compare(ours, real)
    more, less = (100 * live / real.peak for live in (found.most, found.least))
    assert (found.matched, len(found.ours), round(more, 2), round(less, 2)) == limits


# ------------------------------------------------------------------------------- transformer

LATENT = (5, 16, 20)
TOKENS = (16 // 2) * (20 // 2)  # of a frame


def small(name: str, hints: int = 0) -> TransformerShape:
    shape = VARIANTS[name].transformer
    own = None if shape.added_kv_dim is None else 2 * 128
    return replace(
        shape, heads=2, ffn_dim=640, layers=2, text_dim=64, added_kv_dim=own,
        vace_layers=tuple(range(hints)),
    )  # fmt: skip


def call(name: str, batch: int, kind: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a forward."""
    shape, (frames, height, width) = small(name), LATENT
    given: dict[str, Any] = {}
    if shape.image_dim is not None:
        rows = batch * (2 if shape.pos_embed_seq_len else 1)
        image = torch.empty(rows, 257, shape.image_dim, dtype=kind)
        given["encoder_hidden_states_image"] = image
    if shape.vace_in_channels is not None:
        size = (batch, shape.vace_in_channels, *LATENT)
        given["control_hidden_states"] = torch.empty(size, dtype=kind)
    per_token = VARIANTS[name].expand_timesteps
    return {
        "hidden_states": torch.empty(batch, shape.in_channels, frames, height, width, dtype=kind),
        "timestep": torch.empty(batch, frames * TOKENS) if per_token else torch.empty(batch),
        "encoder_hidden_states": torch.empty(batch, 512, shape.text_dim, dtype=kind),
        "return_dict": False,
        **given,
    }


WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "diffusers": (nullcontext, transformer_peak, {"hints_at_once": True}),
    "in turn": (hints_in_turn, transformer_peak, {}),
    "lean": (lean_forward.lean_forward, lean_peak, {}),
    "rows": (partial(lean_forward.lean_forward, exact=False), lean_peak, {"exact": False}),
}


def forward_runs(
    name: str, dtype: str, batch: int, way: str = "diffusers", hints: int = 0
) -> tuple[TracedTape, LiveBytes]:
    """Return the replay and the dry run of a forward."""
    kind, model = DTYPES[dtype], dry_transformer(small(name, hints), dtype)
    frames, height, width = LATENT
    numbers: dict[str, Any] = {
        "batch": batch, "latent_frames": frames, "latent_height": height, "latent_width": width,
        "size": kind.itemsize, "per_token": VARIANTS[name].expand_timesteps,
    }  # fmt: skip
    attach, predict, more = WAYS[way]

    def run(module: Any) -> None:
        with attach(module):
            module(**call(name, batch, kind))

    real = model.traced(run)
    return traced(predict, small(name, hints), **numbers, **more), real


# As above. Tensors of equal size follow one another here, and which of ours stands beside which of
# theirs is then a choice; that nothing changed shows all the same. By rows, the replay makes one
# span and one group of heads where the forward makes all.
FORWARD_CASES: dict[tuple[Any, ...], tuple[int, int, float, float]] = {
    ("wan2.1-t2v-1.3b", "bf16", 1): (154, 11, 30.6, -13.42),
    ("wan2.1-t2v-1.3b", "fp32", 2): (131, 7, 38.18, -8.37),
    ("wan2.1-flf2v-14b", "bf16", 1): (168, 12, 18.58, -23.5),
    ("wan2.1-flf2v-14b", "fp32", 2): (145, 8, 22.7, -53.84),
    ("wan2.2-ti2v-5b", "bf16", 1): (154, 11, 12.54, -8.25),
    ("wan2.2-ti2v-5b", "fp32", 2): (131, 7, 17.94, -7.87),
    ("wan2.1-t2v-1.3b", "bf16", 1, "lean"): (75, 16, 36.46, -24.28),
    ("wan2.1-flf2v-14b", "fp32", 2, "lean"): (87, 9, 17.83, -54.73),
    ("wan2.1-flf2v-14b", "bf16", 1, "rows"): (106, 10, 17.46, -20.32),
    ("wan2.2-ti2v-5b", "fp32", 2, "rows"): (81, 6, 16.01, -8.47),
    ("wan2.1-vace-1.3b", "bf16", 1, "diffusers", 2): (285, 23, 23.49, -15.47),
    ("wan2.1-vace-1.3b", "bf16", 2, "in turn", 2): (273, 31, 26.2, -17.25),
    ("wan2.1-vace-1.3b", "bf16", 2, "lean", 1): (105, 23, 36.91, -33.59),
}


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda case: " ".join(map(str, case)))
def test_transformer(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # A dry run has no values to compare: the first frame is one run, the others are one.
    monkeypatch.setattr(lean_forward, "_runs_of", lambda timestep: (0, TOKENS))
    within(FORWARD_CASES[case], *forward_runs(*case))


def test_every_token_is_embedded_in_fp32() -> None:
    """256 sines of each token, three hidden states of it, then what the blocks are given."""
    shape, tokens, dim = small("wan2.2-ti2v-5b"), 5 * TOKENS, 2 * 128
    tape = traced(
        lean_peak, shape, batch=2, latent_frames=5, latent_height=16, latent_width=20, size=2,
        per_token=True, embed_every_token=True,
    )  # fmt: skip
    sizes = [nbytes for nbytes, _ in tape.births]
    hidden = 2 * tokens * dim
    start = sizes.index(2 * tokens * 256 * 4)
    assert sizes[start : start + 6] == [
        2 * tokens * 256 * 4, *[hidden * 4] * 3, hidden * 2, 6 * hidden * 2
    ]  # fmt: skip
