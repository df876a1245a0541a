"""Animate through the whole product: WanAnimatePipeline's bits over segments, in both modes."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.clips import as_tensor, pixels
from support.crashes import Crash
from support.tiny_models import ANIMATE, FACE_SIZE, components, make_folder, open_kept, pipeline

from wan_core import GenerationConfig, WanControl, WanPipelineLoader
from wan_core.detect.detector import inspect_file
from wan_core.errors import InvalidRequest
from wan_core.job import make_scheduler
from wan_core.loading import load_component
from wan_core.models import map_names, read_transformer, transformer_tensors

WIDTH, HEIGHT, STEPS = 32, 48, 2
TEXT = {"prompt": "a red cat moves right", "negative_prompt": "a dog"}
pytestmark = pytest.mark.usefixtures("nothing_kept")
LONG = 22
"""Frames of the driving video: with segments of 13 the second one is padded."""


# The character has other proportions than the clip, the face another size than the model's.
PERSON = pixels(40, 40, 3, seed=1)
POSE = pixels(LONG, HEIGHT, WIDTH, 3, seed=2)
FACE = pixels(LONG, FACE_SIZE, FACE_SIZE, 3, seed=3)
BEHIND = pixels(LONG, HEIGHT, WIDTH, 3, seed=4)
MASK = pixels(LONG, HEIGHT, WIDTH, seed=5)


def control(replace: bool = False, **more: Any) -> WanControl:
    given: dict[str, Any] = {
        "reference": as_tensor(PERSON)[None], "video": as_tensor(POSE),
        "face_video": as_tensor(FACE),
    }  # fmt: skip
    if replace:
        given |= {"background_video": as_tensor(BEHIND), "mask": as_tensor(MASK)}
    return WanControl(**given | more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("animate") / "model", ANIMATE)


opened = functools.partial(open_kept, offload="none")


def made(wrapper: Any, **more: Any) -> Any:
    job: dict[str, Any] = TEXT | {
        "width": WIDTH, "height": HEIGHT, "num_inference_steps": STEPS, "seed": 7,
        "guidance_scale": 3.0, "num_frames": 0, "max_chunk_size": 13, "control": control(),
        "force_chunked_processing": True,
    }  # fmt: skip
    return wrapper.generate(GenerationConfig(**job | more)).raise_for_error()


def frames_of(video: np.ndarray[Any, Any]) -> list[Image.Image]:
    return [Image.fromarray(one) for one in video]


def diffusers(*, replace: bool, carried: int, scale: float, **more: Any) -> torch.Tensor:
    """The frames of ``WanAnimatePipeline``, (F, H, W, 3)."""
    parts = components(ANIMATE)
    parts["scheduler"] = make_scheduler("unipc", 5.0)
    pipe = pipeline(ANIMATE, parts)
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {
        "image": Image.fromarray(PERSON), "pose_video": frames_of(POSE),
        "face_video": frames_of(FACE), "mode": "replace" if replace else "animate",
        "width": WIDTH, "height": HEIGHT, "num_inference_steps": STEPS, "guidance_scale": scale,
        "segment_frame_length": 13, "prev_segment_conditioning_frames": carried,
    }  # fmt: skip
    if replace:
        given |= {"background_video": frames_of(BEHIND), "mask_video": frames_of(MASK)}
    result = pipe(**TEXT, **given | more, generator=torch.Generator().manual_seed(7))
    return torch.from_numpy(result.frames)[0]


@pytest.mark.parametrize(
    ("replace", "carried", "scale"),
    [(False, 1, 3.0), (True, 5, 1.0), pytest.param(True, 1, 3.0, marks=pytest.mark.slow)],
)
def test_equals_diffusers_bit_for_bit_over_two_segments(
    folder: Path, replace: bool, carried: int, scale: float
) -> None:
    expected = diffusers(replace=replace, carried=carried, scale=scale)
    found = made(
        opened(folder), control=control(replace), guidance_scale=scale, window_overlap=carried
    )
    assert found.latents.shape == (1, 16, (2 if carried == 1 else 3) * 4, 6, 4)
    assert torch.equal(found.frames, expected) and len(expected) == LONG


@functools.cache
def plain() -> torch.Tensor:
    return diffusers(replace=False, carried=1, scale=3.0)


@pytest.mark.parametrize(
    "wishes",
    [
        {"forward": "diffusers"},
        {"offload": "stream", "resident_blocks": 1},
        pytest.param({"offload": "stream", "forward": "diffusers"}, marks=pytest.mark.slow),
        pytest.param({"offload": "sequential"}, marks=pytest.mark.slow),
        pytest.param({"offload": "model"}, marks=pytest.mark.slow),
    ],
    ids=lambda wishes: "-".join(map(str, wishes.values())),
)
def test_every_placement_and_forward_gives_the_same_bits(
    folder: Path, wishes: dict[str, Any]
) -> None:
    result = made(opened(folder, **wishes))
    assert torch.equal(result.frames, plain())
    assert not [text for text in result.warnings if "More memory" in text]


def test_it_goes_on_in_the_second_segment_and_after_the_last_step(
    folder: Path, tmp_path: Path
) -> None:
    wrapper = opened(folder)
    job: dict[str, Any] = {"resume": "auto", "journal_folder": tmp_path}

    def stop(done: int, total: int, latents: torch.Tensor) -> None:
        assert total == 2 * STEPS and latents.shape[2] == 4
        if done == STEPS + 1:
            raise Crash

    def stop_decoding(done: int, total: int) -> None:
        if done > 13:
            raise Crash

    with pytest.raises(Crash):
        made(wrapper, **job, progress_callback=stop)
    seen: list[int] = []
    with pytest.raises(Crash):
        made(
            wrapper, **job, decode_callback=stop_decoding,
            progress_callback=lambda done, *_: seen.append(done),
        )  # fmt: skip
    assert seen == [2 * STEPS]
    last = made(wrapper, **job)
    assert "only decoded" in last.metadata["resumed"]
    assert torch.equal(last.frames, plain())


@pytest.mark.slow
@pytest.mark.parametrize("wishes", [{"step_cache_threshold": 1.0}, {"speed": "fastest"}])
def test_a_step_cache_begins_anew_in_each_segment(folder: Path, wishes: dict[str, Any]) -> None:
    """It leaves out as much of each as of a segment alone, and the first one's bits are that's."""
    wrapper = opened(folder, step_cache="easycache", **wishes)
    job: dict[str, Any] = {"num_inference_steps": 10}
    two, one = made(wrapper, **job), made(wrapper, num_frames=13, **job)
    assert torch.equal(two.frames[:13], one.frames)
    counted = [
        [int(n) for n in re.findall(r"\d+", found.metadata["forwards"])] for found in (two, one)
    ]
    assert counted[0] == [2 * number for number in counted[1]]
    assert counted[1][0] < counted[1][1] == 20
    assert not torch.equal(made(opened(folder), num_frames=13, **job).frames, one.frames)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reference": None}, "control.reference is missing"),
        ({"reference": as_tensor(np.stack([PERSON] * 2))}, "control.reference holds 2 pictures"),
        ({"face_video": None}, "control.face_video is missing"),
        ({"keyframes": as_tensor(PERSON)[None]}, "control.keyframes was given"),
        (
            {"background_video": as_tensor(BEHIND), "mask": as_tensor(MASK[:9])},
            "control.mask has 9 frames and control.background_video 22",
        ),
    ],
)
def test_a_mistake_is_told_before_any_weight_is_read(
    folder: Path, given: dict[str, Any], said: str
) -> None:
    wrapper = opened(folder)
    with pytest.raises(InvalidRequest, match=said):
        made(wrapper, control=control(**given))
    assert wrapper._cache.loaded() == []


@pytest.mark.slow
def test_a_short_clip_is_a_segment_of_its_own_length(folder: Path) -> None:
    """As diffusers with a segment as long as the video; a longer one is asked for by force."""
    wrapper = opened(folder)
    short = control(video=as_tensor(POSE[:9]), mask=as_tensor(MASK[0]),
                    background_video=as_tensor(BEHIND[:9]))  # fmt: skip
    found = made(wrapper, control=short, max_chunk_size=None, force_chunked_processing=False)
    assert found.frames.shape[0] == 9 and found.latents.shape[2] == 3
    mask = np.repeat(MASK[:1], 9, axis=0)
    expected = diffusers(
        replace=True, carried=1, scale=3.0, segment_frame_length=9,
        pose_video=frames_of(POSE[:9]), mask_video=frames_of(mask),
    )  # fmt: skip
    assert torch.equal(found.frames, expected)


@pytest.mark.slow
def test_what_is_scaled_is_scaled_as_in_diffusers(folder: Path) -> None:
    """Pose, background and mask of another size, and a face: by the same filter."""
    pose, behind = pixels(9, 64, 24, 3, seed=6), pixels(9, 24, 40, 3, seed=7)
    face, mask = pixels(9, 30, 20, 3, seed=8), pixels(9, 24, 16, seed=9)
    given = control(
        video=as_tensor(pose), face_video=as_tensor(face), mask=as_tensor(mask),
        background_video=as_tensor(behind),
    )  # fmt: skip
    found = made(opened(folder), control=given)
    expected = diffusers(
        replace=True, carried=1, scale=3.0, pose_video=frames_of(pose), face_video=frames_of(face),
        background_video=frames_of(behind), mask_video=frames_of(mask),
    )  # fmt: skip
    assert torch.equal(found.frames, expected)
    for name in ("video", "face_video", "background_video", "mask", "reference"):
        assert any(text.startswith(f"control.{name} is ") for text in found.warnings), name


@pytest.mark.slow
def test_given_noise_is_that_of_the_first_segment(folder: Path) -> None:
    """The next segment's is then the first draw, as in diffusers."""
    noise = torch.randn(1, 16, 5, 6, 4, generator=torch.Generator().manual_seed(11))
    expected = diffusers(replace=False, carried=1, scale=3.0, latents=noise)
    assert torch.equal(made(opened(folder), latents=noise).frames, expected)


@pytest.mark.slow
def test_a_batch_is_as_many_clips(folder: Path) -> None:
    expected = diffusers(replace=True, carried=1, scale=1.0, num_videos_per_prompt=2)
    found = made(opened(folder), control=control(True), guidance_scale=1.0, batch_size=2)
    # Rounding: faces are encoded once for the batch, there in batches that cross its clips.
    assert torch.allclose(found.frames[:LONG], expected, atol=1e-5)


def test_the_estimate_names_what_is_encoded_and_needs_no_picture(folder: Path) -> None:
    wrapper = opened(folder)
    size: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "prompt": "x"}
    found = wrapper.estimate_memory_usage(GenerationConfig(**size, num_frames=LONG))
    names = [one.name for one in found.stages]
    two = {"num_frames": 0, "max_chunk_size": 13, "guidance_scale": 3.0, "control": control()}
    _, shared = opened(folder, devices=2).plan(GenerationConfig(**size, **two))
    # Segments wait for each other, the passes of guidance do not.
    assert any("a step has 2 passes" in reason for reason in shared.reasons), shared.reasons
    assert names[1:4] == ["image_encode", "condition_encode", "control_encode"]
    result = made(wrapper)
    assert set(names) - {"output"} <= {one.name for one in result.stages}
    assert result.metadata["windows"].startswith("2 segments of 13 frames")
    assert "windows of 13 frames, 1 shared" in result.applied_optimizations


def test_a_single_file_with_official_names_is_the_same_module(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    file = tmp_path / "wan2.2_animate_14B_bf16.safetensors"
    save_file(official(state), file)
    found = load_component(file).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    shape = inspect_file(file).transformer
    assert shape is not None and (shape.heads, shape.head_dim, shape.animate) == (2, 12, 1)
    assert shape == inspect_file(folder / "transformer").transformer


@pytest.mark.slow
def test_weights_as_stored_and_a_lora_for_image_to_video(folder: Path, tmp_path: Path) -> None:
    stored = shutil.copytree(folder, tmp_path / "fp8")
    file = stored / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name, value in state.items():
        if name.startswith(("blocks.", "face_adapter.")) and value.dim() == 2:
            state[name] = value.to(torch.float8_e4m3fn)
    save_file(state, file, {"format": "pt"})
    wrapper = opened(stored)
    assert wrapper.architecture.components["transformer"].stored.quantised
    first = made(wrapper, num_frames=13).frames
    assert 0 < (first - plain()[:13]).abs().max() < 0.2
    streamed = opened(stored, offload="stream", resident_blocks=2)
    assert torch.equal(made(streamed, num_frames=13).frames, first)
    lora, g = tmp_path / "lora.safetensors", torch.Generator().manual_seed(1)
    name = "diffusion_model.blocks.1.self_attn.q.lora_{}.weight"
    sides = {"A": (2, 24), "B": (24, 2)}
    save_file({name.format(k): torch.randn(v, generator=g) for k, v in sides.items()}, lora)
    tuned = WanPipelineLoader().load_wan_pipeline(
        stored, optimization_config={"device": "cpu", "precision": "fp32"}, loras=[str(lora)]
    )
    assert not torch.equal(made(tuned, num_frames=13).frames, first)


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors their official names: keys and values in one, biases of activations wide."""
    mapped = map_names("transformer", transformer_tensors(_shape(state), "original")).sources
    out: dict[str, torch.Tensor] = {}
    for name, source in sorted(mapped.items(), key=lambda pair: pair[1].part):
        value = state[name]
        if name.endswith("act_fn.bias"):
            value = value.view(1, -1, 1, 1)
        if source.name in out:
            value = torch.cat([out[source.name], value])
        out[source.name] = value.contiguous()
    return out


def _shape(state: dict[str, torch.Tensor]) -> Any:
    return read_transformer({name: tuple(v.shape) for name, v in state.items()}, "diffusers")
