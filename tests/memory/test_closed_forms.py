"""What stages add up to, in closed forms: each term alone, against the sum it should be.

The replays (``transformer_peak``, ``encode_peak``, ...) are held by dry runs of the real classes;
what ``stages`` adds to them, and from which numbers of a job, is here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.machines import architecture, cpu, gpu

from wan_core.config import StageEstimate, WanLoRA
from wan_core.memory import SENDING
from wan_core.memory.choices import Choices, Workload, window_latents, windows_of
from wan_core.memory.forward import text_encoder_peak, transformer_peak, window_tokens
from wan_core.memory.process import FIRST
from wan_core.memory.stages import estimate
from wan_core.memory.vae import encode_peak
from wan_core.models import (
    PARTS,
    VOCABULARY,
    FoundLora,
    ModelArchitecture,
    block_bytes,
    rest_bytes,
    sizes,
)
from wan_core.models.stored import StoredSize, StoredSizes

JOB = Workload(width=832, height=480, num_frames=81)
FRAMES, HIGH, WIDE = 21, 60, 104
LATENT = FRAMES * HIGH * WIDE
BF16 = {**dict.fromkeys(PARTS, "bf16"), "vae": "fp32"}
GPU, CPU = gpu(80), cpu(300)


def found(
    model: ModelArchitecture, name: str, job: Workload = JOB, machine: Any = GPU,
    dtypes: dict[str, str] | None = None, **choices: Any,
) -> StageEstimate:  # fmt: skip
    """Return one stage, with each part on the device in its turn unless said otherwise."""
    made = Choices(**{"dtypes": dtypes or BF16, "offload": "model", **choices})
    stages = estimate(model, job, made, machine).stages
    return next(stage for stage in stages if stage.name == name)


@pytest.mark.parametrize("last", [False, True])
def test_pictures_go_through_every_layer_of_clip(last: bool) -> None:
    """ViT-H: 257 tokens, 33 states that are returned and 3 at work of 1280, 3 of 4 * 1280."""
    model = architecture("wan2.1-flf2v-14b")
    job = replace(JOB, image=True, last_image=last)
    tokens = 257 * (1 + last)
    seen = found(model, "image_encode", job).activation_bytes
    assert seen == tokens * 2 * ((33 + 3) * 1280 + 3 * 4 * 1280)


@pytest.mark.parametrize(("size", "dtype"), [(2, "bf16"), (4, "fp32")])
def test_the_text_encoders_attention(size: int, dtype: str) -> None:
    """64 heads, 512 x 512: three of them and six hidden states on a CPU, whose softmax is fused;
    CUDA has a mask of bytes, two fp32 and two of its own, and fourteen hidden states."""
    scores, hidden = 64 * 512 * 512, 512 * 4096
    narrow, wide = 3 * scores * size + 6 * hidden * size, scores * (9 + 2 * size)
    assert text_encoder_peak(size) == narrow
    assert text_encoder_peak(size, wide_softmax=True) == wide + 14 * hidden * size
    model, texts = architecture("wan2.1-t2v-14b"), 2 * 512 * 4096 * 4
    dtypes = dict.fromkeys(PARTS, dtype)
    on_cpu = found(model, "text_encode", machine=CPU, dtypes=dtypes)
    assert on_cpu.activation_bytes == narrow + texts
    on_gpu = found(model, "text_encode", dtypes=dtypes)
    assert on_gpu.activation_bytes == text_encoder_peak(size, wide_softmax=True) + texts


def test_ram_is_weights_latents_and_the_process() -> None:
    """And, on a GPU, the memory that weights are sent through, before anything is computed.

    What the stage's libraries take comes after that.
    """
    model, latents = architecture("wan2.1-t2v-14b"), 16 * LATENT * 4
    stages = (("text_encode", "text_encoder", ("encode",)),
              ("denoise", "transformer", ("encode", "denoise")))  # fmt: skip
    for name, part, kinds in stages:
        weights = sizes.part_bytes(model, part, "bf16")
        before, after = (GPU.process_ram(some, tokens=VOCABULARY) for some in (kinds[:-1], kinds))
        most = max(before + SENDING, after)
        assert found(model, name).host_bytes == weights + latents + most
    frames = 81 * 480 * 832 * 3 * 4
    vae = sizes.part_bytes(model, "vae", "fp32")
    leaving = (8 + 32) * 2**20  # pictures of one and of four frames, in powers of two
    assert found(model, "decode").host_bytes == (
        vae + frames + leaving + latents + GPU.process_ram(tokens=VOCABULARY)
    )
    mp4 = replace(JOB, encoder_bytes=3_000_000)
    for name, more in (("denoise", 0), ("decode", 3_000_000), ("output", 0)):
        assert found(model, name, mp4).host_bytes == found(model, name).host_bytes + more
    on_cpu = found(model, "text_encode", machine=CPU)
    weights = sizes.part_bytes(model, "text_encoder", "bf16")
    assert on_cpu.host_bytes - on_cpu.activation_bytes == (
        weights + latents + CPU.process_ram(("encode",), tokens=VOCABULARY)
    )


def test_loras_are_beside_the_weights() -> None:
    plain = architecture("wan2.1-t2v-14b")
    numbers = 10_000_000
    lora = FoundLora(lora=WanLoRA("x", "high"), parameters=numbers, rank=0)
    model: ModelArchitecture = replace(plain, loras=(lora,))
    for machine in (GPU, CPU):
        more, less = (found(one, "denoise", machine=machine) for one in (model, plain))
        assert more.weights_bytes - less.weights_bytes == 2 * numbers
        assert more.device_bytes - less.device_bytes == 2 * numbers
        in_ram = 2 * numbers if machine is CPU else 0
        assert more.host_bytes - less.host_bytes == in_ram


def test_what_loras_hold_beside_a_layer() -> None:
    """All ranks for every token, a DoRA's too; of LoKr and LoHa the larger."""
    plain = architecture("wan2.2-t2v-a14b")
    tokens = LATENT // 4
    one = FoundLora(lora=WanLoRA("x", "high"), parameters=0, rank=64, pairs=64)
    lokr = replace(one, rank=0, pairs=0, pieces=60_000)
    loha = replace(one, rank=160, pairs=0, columns=13824)
    dora = replace(one, rank=1024, pairs=1024, columns=5120)
    for loras, more in (
        ((one, replace(one, rank=32, pairs=32)), tokens * 2 * 96),
        ((lokr, replace(one, rank=8, pairs=8)), 1024 * 2 * 60_000),
        ((dora, replace(lokr, pieces=20_000)), tokens * 2 * 1024),
        ((loha,), 4 * 13824 * (256 + 160)),
    ):
        model = replace(plain, loras=loras)
        for stage, wanted in (("denoise_high", more), ("denoise_low", 0)):
            seen = [found(each, stage).activation_bytes for each in (model, plain)]
            assert seen[0] - seen[1] == wanted


def test_group_offload_holds_two_blocks_and_reads_nothing_ahead() -> None:
    model = architecture("wan2.2-t2v-a14b")
    group = found(model, "denoise_high", offload="group")
    two = 2 * block_bytes(model, "transformer", "bf16")
    assert group.weights_bytes == rest_bytes(model, "transformer", "bf16") + two
    assert group.ahead_bytes == 0
    ahead = found(model, "denoise_high").ahead_bytes
    assert ahead == sizes.part_bytes(model, "transformer_2", "bf16")


def test_of_a_mapped_file_only_what_is_converted_counts() -> None:
    """Where bf16 lies in the file, norms in fp32 are copied; the rest is pages of the file."""
    plain = architecture("wan2.1-t2v-14b")
    norms = 1_000_000
    one = StoredSize(kept=3 * 2**30, wide=norms)
    stored = StoredSizes(blocks=(one,) * 9, rest=StoredSize(), tables=StoredSize(), largest=0)
    part = replace(
        plain.components["transformer"], nbytes=27 * 2**30, stored=stored, weight_kind="bf16"
    )
    model = replace(plain, components={**plain.components, "transformer": part})
    seen = found(model, "denoise")
    process = GPU.process_ram(("encode",), tokens=VOCABULARY)
    assert FIRST["denoise"] <= SENDING  # which comes before it
    always = 16 * LATENT * 4 + SENDING + process
    assert seen.host_bytes == 9 * norms * 4 + always
    assert seen.mapped_bytes == sizes.part_bytes(model, "transformer", "bf16") - 9 * norms * 4
    # Diffusers' group offload locks a copy of all of it.
    group = found(model, "denoise", offload="group")
    assert (group.mapped_bytes, group.host_bytes > 27 * 2**30) == (0, True)


def test_what_is_read_ahead_counts_once_where_all_is_in_ram() -> None:
    """On a CPU that holds all parts, the second expert's converted weights are among them."""
    model = architecture("wan2.2-t2v-a14b")
    one = StoredSize(kept=3 * 2**30, wide=100_000_000)
    stored = StoredSizes(blocks=(one,) * 2, rest=StoredSize(), tables=StoredSize(), largest=1)
    experts = {
        name: replace(
            model.components[name], nbytes=7 * 2**30, stored=stored, weight_kind="fp8_scaled"
        )
        for name in ("transformer", "transformer_2")
    }  # fmt: skip
    model = replace(model, components={**model.components, **experts})
    for offload in ("none", "model"):  # and one at a time it is there before its turn
        high, low = (
            found(model, f"denoise_{noise}", machine=CPU, offload=offload)
            for noise in ("high", "low")
        )
        assert high.ahead_bytes == 2 * 3 * 2**30 + 2 * 400_000_000
        assert high.host_bytes == low.host_bytes, offload


@pytest.mark.parametrize(
    ("name", "frames", "more"),
    [("wan2.2-ti2v-5b", 1, {}), ("wan2.1-i2v-14b", 81, {}), ("wan2.2-i2v-a14b", 81, {})],
)
def test_a_mask_of_known_frames_needs_the_whole_clip(
    name: str, frames: int, more: dict[str, int]
) -> None:
    model = architecture(name)
    job = replace(JOB, image=True, **more)
    expected = encode_peak(
        model.variant.vae, batch=1, num_frames=frames, height=480, width=832, size=4
    )
    assert found(model, "condition_encode", job).activation_bytes == expected


def test_vace_encodes_two_halves_and_a_mask() -> None:
    """Beside the encode: 96 channels of control, in fp32, twice (parts, and joined)."""
    model = architecture("wan2.1-vace-14b")
    for references in (0, 2):
        job = replace(JOB, references=references)
        whole = encode_peak(
            model.variant.vae, batch=1, num_frames=81, height=480, width=832, size=4
        )
        control = 2 * 4 * 96 * (FRAMES + references) * HIGH * WIDE
        assert found(model, "control_encode", job).activation_bytes == whole + control


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("window", [None, 33])
def test_a_prediction_with_condition_and_texts(guided: bool, window: int | None) -> None:
    """Six states in fp32, the condition's 20 channels that a window sees, and the other text."""
    model = architecture("wan2.1-i2v-14b")
    job = replace(JOB, image=True, guidance_high=guided, window_frames=window)
    seen = FRAMES if window is None else 9
    forward = transformer_peak(
        model.transformer, batch=1, latent_frames=seen, latent_height=HIGH, latent_width=WIDE,
        size=2,
    )  # fmt: skip
    condition, text = 20 * seen * HIGH * WIDE * 4, guided * 512 * 4096 * 2
    expected = forward + 6 * 16 * LATENT * 4 + condition + text
    assert found(model, "denoise", job).activation_bytes == pytest.approx(expected, abs=4)


@pytest.mark.parametrize(("guided", "passes"), [(False, 1), (True, 2)])
def test_magcache_remembers_a_hidden_state_of_each_pass_and_window(
    guided: bool, passes: int
) -> None:
    model = architecture("wan2.1-t2v-14b")
    for window, windows in ((None, 1), (33, 3)):
        job = replace(
            JOB, guidance_high=guided, window_frames=window, window_overlap=8, batch_size=2
        )
        assert windows_of(job, Choices(dtypes=BF16), FRAMES) == windows
        with_it, without = (found(model, "denoise", job, magcache=v) for v in (2.0, 0.0))
        state = 2 * window_tokens(model.transformer, 9 if window else 21, HIGH, WIDE) * 5120 * 2
        in_ram = windows * passes * state
        # They come where weights were sent through before, beside what the libraries take.
        assert with_it.host_bytes - without.host_bytes == in_ram - (SENDING - FIRST["denoise"])
        assert with_it.activation_bytes - without.activation_bytes == state


@pytest.mark.parametrize(("window", "windows"), [(None, 1), (33, 3)])
def test_a_cameras_rays_wait_in_ram_where_a_window_sees_a_part(
    window: int | None, windows: int
) -> None:
    """24 numbers for each pixel of a latent frame: all on the card, or a part and all in RAM."""
    model, seen = architecture("wan2.1-fun-camera-14b"), 9 if window else FRAMES
    job = replace(JOB, image=True, window_frames=window, window_overlap=8)
    # MagCache has more in RAM than what weights are sent through.
    with_it, without = (
        found(model, "denoise", replace(job, camera=camera), magcache=2.0)
        for camera in (True, False)
    )
    rays = 24 * 480 * 832 * 2
    assert with_it.activation_bytes - without.activation_bytes >= seen * rays
    assert with_it.host_bytes - without.host_bytes == (windows > 1) * FRAMES * rays


@pytest.mark.parametrize("anchor", [False, True])
def test_an_anchor_is_one_more_latent_frame(anchor: bool) -> None:
    choices = Choices(dtypes={})
    for frames, latents in ((1, 1), (5, 2), (6, 3), (9, 3), (33, 9), (81, 21)):
        job = replace(JOB, window_frames=frames, window_anchor=anchor)
        assert window_latents(job, choices, 100) == latents + anchor
        assert window_latents(job, choices, 2) == min(2, latents + anchor)
