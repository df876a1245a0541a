"""Every setting of a job has an effect on what comes of it, or the job says that it has none.

The oracle is the render itself: a small model of each family makes the clip with and without the
setting. Where all that comes of it is the same, a sentence must name the setting.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.tiny_models import FAMILIES, folders, open_wan

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.config import WanControl, WanModelFiles
from wan_core.errors import InvalidRequest
from wan_core.job import check_inputs, window_settings_without_effect

SEED = torch.Generator().manual_seed(1)
FIRST, LAST = (
    Image.fromarray((torch.rand(32, 32, 3, generator=SEED) * 255).byte().numpy()) for _ in range(2)
)
EMBEDS = torch.cat([torch.randn(1, 4, 32, generator=SEED), torch.zeros(1, 508, 32)], 1)
ABOUT: dict[str, Any] = {"folder": None, "latents": None, "continue_from": None}
"""Values that depend on the model or the place."""
OTHER: dict[str, tuple[Any, ...]] = {
    "prompt": ("a dog",), "negative_prompt": ("blurry",), "num_frames": (9,), "width": (64,),
    "height": (64,), "num_inference_steps": (3,), "guidance_scale": (3.3, 1.0, 0.0),
    "guidance_scale_2": (2.2, 1.0), "flow_shift": (7.7,), "boundary": (0.5, 0.0, 1.0),
    "switch_step": (1, 0, 2, 99), "scheduler": ("euler",), "fps": (7.0,), "seed": (9,),
    "batch_size": (2,), "image": (LAST,), "last_image": (FIRST,), "latents": ABOUT["latents"],
    "prompt_embeds": (EMBEDS,), "negative_prompt_embeds": (EMBEDS,), "start_step": (1,),
    "end_step": (1, 99), "force_chunked_processing": (True,),
    "window_overlap": (8,), "window_schedule": ("uniform",), "window_fusion": ("flat",),
    "window_mode": ("continuation",), "window_anchor": (True,),
    "continue_from": ABOUT["continue_from"], "drift_correction": (0.5,), "noise": ("frame",
    "freenoise"), "prompts": ("4: a dog\na cat",), "journal_folder": ABOUT["folder"],
    "codec": ("h265",), "crf": (51,), "pix_fmt": ("yuv444p",),
    "audio": ((torch.zeros(1, 400), 16000),), "output_metadata": ({"a": "b"},),
    "sigma_schedule": ("simple",), "sigmas": ([0.9, 0.5],), "guided_steps": (1,),
    "guided_scale": (2.0,), "return_frames": (False,),
}  # fmt: skip
HOW_ONLY = {
    "precision_override", "enable_optimizations", "resume", "control", "warning_callback",
    "progress_callback", "preview_callback", "chunk_callback", "decode_callback", "load_callback",
    "interrupt_check", "output_path", "max_chunk_size",
}  # fmt: skip
"""What says how, where and at most, not what; a control has tests of its own."""
QUICK = ("wan2.2-t2v-a14b",)


def test_every_setting_is_walked() -> None:
    assert set(OTHER) | HOW_ONLY == {field.name for field in fields(GenerationConfig)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return folders(tmp_path_factory.mktemp("models"))


def outcome(wan: Any, job: dict[str, Any]) -> tuple[dict[str, Any], list[str]] | None:
    """Return what came of a job and its warnings; None where it was refused by name."""
    try:
        found = wan.generate(GenerationConfig(**job)).raise_for_error()
    except InvalidRequest:
        return None
    told = ("fps", "windows", "steps", "width", "height", "num_frames")
    made = {"latents": found.latents, "frames": found.frames}
    return made | {name: found.metadata.get(name) for name in told}, found.warnings


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a, b)
        return bool(a == b) if not isinstance(a, torch.Tensor) else False

    return all(equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_a_setting_changes_the_clip_or_is_said_not_to(
    folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    five = family == "wan2.2-ti2v-5b"
    channels, side = (48, 2) if five else (16, 2)
    latents = torch.randn(1, channels, 2, side, side, generator=SEED)
    values = OTHER | {
        "latents": (latents,), "continue_from": (latents[:, :, :1],),
        "journal_folder": (str(tmp_path),),
    }  # fmt: skip
    job: dict[str, Any] = {
        "prompt": "a red cat", "num_frames": 5, "width": 16 + 16 * five, "height": 16 + 16 * five,
        "num_inference_steps": 2, "switch_step": 1 if family.endswith("a14b") else None,
    }  # fmt: skip
    if ("i2v" in family or "flf2v" in family) and not five:
        job["image"] = FIRST
    if "flf2v" in family:
        job["last_image"] = LAST
    loader = WanPipelineLoader()
    wishes = {"device": "cpu", "precision": "fp32"}
    wan = loader.load_wan_pipeline(folder(family), optimization_config=wishes)
    plain = outcome(wan, job)
    assert plain is not None and not any("effect" in text for text in plain[1])
    silent = []
    for name, value in ((n, v) for n, every in values.items() for v in every):
        if name in ("switch_step",) and value == job["switch_step"]:
            continue
        found = outcome(wan, job | {name: value})
        if found is None or job.get(name) is value or not same(plain[0], found[0]):
            continue
        if value == job.get(name) if not isinstance(value, torch.Tensor) else False:
            continue
        if not any(name in text for text in found[1]):
            silent.append((name, value))
    loader.clear_cache()
    assert silent == []


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"switch_step": 2}, "The low-noise expert has nothing to do: switch_step is 2 of 2 steps"),
        ({"switch_step": 99}, "The low-noise expert has nothing to do: switch_step is 99"),
        ({"switch_step": 0}, "The high-noise expert has nothing to do: switch_step is 0"),
        (
            {"boundary": 0.0},
            "at flow_shift 12 every step of 2 begins at or above the boundary 0, and",
        ),
        (
            {"boundary": 1.0},
            "The high-noise expert has nothing to do: at flow_shift 12 every step of "
            "2 begins below the boundary 1, and the low",
        ),
        (
            {"sigmas": [1.0, 0.95], "num_inference_steps": None},
            "The low-noise expert has nothing to do: with the sigmas 1, 0.95 every step of 2",
        ),
        ({"switch_step": 1, "control": WanControl()}, "control has no effect: it holds no video"),
        ({"end_step": 3}, "end_step has no effect: 3 is beyond the last of 2 steps"),
        ({"end_step": 2, "switch_step": 1}, ""),
        ({"end_step": 10_000, "switch_step": 1}, ""),  # "to the end", as in ComfyUI
        ({"end_step": 1, "switch_step": 1}, ""),  # the first of two jobs, of an expert each
        ({"force_chunked_processing": True, "switch_step": 1}, "force_chunked_processing has no"),
        ({"force_chunked_processing": True, "switch_step": 1, "num_frames": 85}, ""),
    ],
)
def test_an_expert_without_a_step_and_steps_beyond_the_last(
    folder: Callable[[str], Path], job: dict[str, Any], said: str
) -> None:
    wan = open_wan(folder("wan2.2-t2v-a14b"))
    config = GenerationConfig(
        **{"prompt": "a", "width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2}
        | job
    )
    request, _ = wan.plan(config)
    found = check_inputs(config, request, wan.architecture).warnings
    assert [text for text in found if said and said in text] if said else list(found) == []
    assert len(found) <= 2


def test_a_second_file_of_a_model_that_is_one_transformer(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Chosen by mistake: nothing says when it begins, so that it makes no step."""
    whole = folder("wan2.2-ti2v-5b")
    second = shutil.copytree(whole / "transformer", tmp_path / "second")
    names = ("transformer", "vae", "text_encoder", "tokenizer")
    parts = {name: whole / name for name in names}
    wan = WanPipelineLoader().load_wan_pipeline(WanModelFiles(**parts, transformer_2=second))
    for steps, more, said in ((2, {}, True), (1, {}, True), (2, {"switch_step": 1}, False)):
        config = GenerationConfig(
            prompt="a", width=32, height=32, num_frames=5, num_inference_steps=steps, **more
        )
        request, _ = wan.plan(config)
        found = check_inputs(config, request, wan.architecture).warnings
        assert any("one transformer and has no boundary" in text for text in found) == said
        assert any("Leave the second file out" in text for text in found) == said


@pytest.mark.parametrize(("scale", "said"), [(0.0, False), (0.5, True), (1.0, False)])
def test_a_scale_below_1_is_said_to_be_as_1(
    folder: Callable[[str], Path], scale: float, said: bool
) -> None:
    both = {"guidance_scale": scale, "guidance_scale_2": scale}
    config = GenerationConfig(prompt="a", width=32, height=32, num_frames=5, **both)
    for family in ("wan2.1-t2v", "wan2.2-t2v-a14b"):
        wan = open_wan(folder(family))
        found = check_inputs(config, wan.plan(config)[0], wan.architecture).warnings
        for name in both:
            text = f"{name} {scale:g} is as 1: guidance is off from 1 down."
            assert (text in found) == (said and (name[-1] != "2" or "a14b" in family))


def test_settings_of_segments_are_idle_in_one() -> None:
    given: dict[str, Any] = {"window_overlap": 8, "drift_correction": 0.5}
    mode = "continuation"
    for count in (1, 2):
        for names in itertools.combinations(given, count):
            job = GenerationConfig(window_mode=mode, **{name: given[name] for name in names})
            (text,) = window_settings_without_effect(job)
            assert text.startswith(" and ".join(names)) and "single segment" in text
    assert not list(window_settings_without_effect(GenerationConfig(window_mode=mode)))


def test_windows_for_a_clip_as_long_as_a_short_video_are_no_mistake(
    folder: Callable[[str], Path],
) -> None:
    wan = open_wan(folder("wan2.2-t2v-a14b"))
    video = WanControl(video=torch.zeros(5, 32, 32, 3), denoise=0.5)
    for frames, told in ((0, False), (5, True)):
        config = GenerationConfig(
            prompt="a", width=32, height=32, num_frames=frames, num_inference_steps=2,
            control=video, force_chunked_processing=True,
        )  # fmt: skip
        request, _ = wan.plan(config)
        found = check_inputs(config, request, wan.architecture).warnings
        assert any("force_chunked_processing has no effect" in text for text in found) == told
