"""From what a user gives to a request: numbers of any library, idle settings, windows, pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.machines import architecture
from support.tiny_models import FAMILIES, make_folder

from wan_core import GenerationConfig, WanLoRA
from wan_core.config import plain_number
from wan_core.detect import ArchitectureDetector
from wan_core.detect.lora_files import as_lora
from wan_core.errors import InvalidRequest
from wan_core.job import check_inputs, pictures_needed, resolve
from wan_core.job.effects import window_settings_without_effect
from wan_core.models import ModelArchitecture
from wan_core.plan import OptimizationConfig

PICTURE = Image.new("RGB", (64, 32))
SIZE: dict[str, Any] = {"prompt": "a cat", "width": 64, "height": 32, "num_frames": 9}
WHOLE = {"num_frames": 9, "width": 64, "height": 32, "num_inference_steps": 4, "seed": 5,
         "batch_size": 2, "end_step": 3, "max_chunk_size": 5, "window_overlap": 4, "crf": 20,
         "switch_step": 2, "start_step": 1}  # fmt: skip
REAL = {"guidance_scale": 4.5, "guidance_scale_2": 3.5, "flow_shift": 5.25, "boundary": 0.5,
        "fps": 24.5, "drift_correction": 0.25}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelArchitecture]:
    root = tmp_path_factory.mktemp("models")
    detect = ArchitectureDetector().detect_model_architecture
    return {family: detect(make_folder(root / family, family)) for family in FAMILIES}


def of_any_library(value: float) -> list[Any]:
    """The same number as people's programs hold it."""
    forms: list[Any] = [np.float64(value), np.float32(value), np.array(value), Fraction(value),
                        torch.tensor(value), Decimal(str(value)), np.float16(value)]  # fmt: skip
    if value == int(value):
        whole = int(value)
        forms += [np.int64(whole), np.uint8(whole), np.array(whole), torch.tensor(whole),
                  float(whole)]  # fmt: skip
    return forms


@pytest.mark.parametrize("name", [*WHOLE, *REAL])
def test_a_number_of_any_library_is_a_number(
    models: dict[str, ModelArchitecture], name: str
) -> None:
    value = (WHOLE | REAL)[name]
    latents = torch.zeros(1, 16, 3, 4, 8)
    job = SIZE | {"latents": latents} | {name: value}
    plain = resolve(GenerationConfig(**job), models["wan2.2-t2v-a14b"])
    for form in of_any_library(value):
        found = resolve(GenerationConfig(**job | {name: form}), models["wan2.2-t2v-a14b"])
        assert found == plain, type(form)
        json.dumps({key: v for key, v in asdict(found).items() if key != "output_path"})


def test_a_wish_of_any_library_is_a_number() -> None:
    for name, value in (("vram_limit_gb", 10), ("ram_limit_gb", 4.5), ("min_vram_mb", 512),
                        ("chunk_size", 4), ("resident_blocks", 3)):  # fmt: skip
        plain = OptimizationConfig(**{name: value})
        for form in (np.int64(value), np.array(value), torch.tensor(value), np.float32(value)):
            if name in ("chunk_size", "resident_blocks") and "float" in str(form.dtype):
                continue
            if float(form) != value:
                continue
            assert OptimizationConfig(**{name: form}) == plain
            json.dumps(OptimizationConfig(**{name: form}).to_dict())
        for bad in (True, "4", float("nan"), float("inf"), np.bool_(True), -1):
            with pytest.raises(InvalidRequest) as raised:
                OptimizationConfig(**{name: bad})
            assert raised.value.field == name


def test_a_strength_of_any_library_is_a_number() -> None:
    for strength in (np.float32(0.5), torch.tensor(0.5), Fraction(1, 2)):
        assert as_lora(WanLoRA("a.safetensors", "both", strength)).strength == 0.5
    for bad in ("0.5", True, np.nan, np.bool_(True), None):
        with pytest.raises(InvalidRequest, match="strength"):
            as_lora(WanLoRA("a.safetensors", "both", bad))  # type: ignore[arg-type]


def test_what_is_no_number_is_none() -> None:
    no_numbers: list[Any] = [
        None, "5", b"5", True, np.bool_(False), torch.tensor(True), np.array([5]),
        torch.tensor([5]), float("nan"), float("-inf"), np.float32("nan"), 1j, object(), [], {},
        Decimal("sNaN"), np.datetime64("2025-01-01"), torch.empty((), device="meta"),
    ]  # fmt: skip
    assert [plain_number(value) for value in no_numbers] == [None] * len(no_numbers)
    assert plain_number(10**400) == 10**400


# -- settings without effect ----------------------------------------------------------------------

ONE, TWO, FIVE = "wan2.1-t2v", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"
IDLE = [
    (ONE, {"guidance_scale_2": 3.0}, "guidance_scale_2"),
    (ONE, {"boundary": 0.5}, "boundary"),
    (ONE, {"switch_step": 1}, "switch_step"),
    (TWO, {"boundary": 0.5, "switch_step": 1}, "boundary"),
    (ONE, {"prompt_embeds": torch.zeros(1, 4, 32)}, "prompt"),
    (ONE, {"negative_prompt": "a dog", "negative_prompt_embeds": torch.zeros(1, 4, 32)},
     "negative_prompt"),
    (ONE, {"negative_prompt": "a dog", "guidance_scale": 1.0}, "negative_prompt"),
    (ONE, {"negative_prompt_embeds": torch.zeros(1, 4, 32), "guidance_scale": 1.0},
     "negative_prompt_embeds"),
    (ONE, {"noise": "frame", "latents": torch.zeros(1, 16, 3, 4, 8)}, "noise"),
    (ONE, {"seed": 9, "latents": torch.zeros(1, 16, 3, 4, 8)}, "seed"),
    (ONE, {"seed": 9, "noise": "frame", "latents": torch.zeros(1, 16, 3, 4, 8)}, "seed and noise"),
    (ONE, {"codec": "h265"}, "codec"),
    (ONE, {"crf": 30}, "crf"),
    (ONE, {"pix_fmt": "yuv444p"}, "pix_fmt"),
    (ONE, {"audio": (torch.zeros(1, 400), 16000)}, "audio"),
    (ONE, {"output_metadata": {"a": "b"}}, "output_metadata"),
    (ONE, {"journal_folder": "here"}, "journal_folder"),
    (ONE, {"drift_correction": 0.5}, "drift_correction"),
    (FIVE, {"window_mode": "continuation", "window_anchor": True}, "window_anchor"),
    (FIVE, {"window_mode": "continuation", "window_fusion": "flat"}, "window_fusion"),
]  # fmt: skip
EFFECTIVE = [
    (ONE, {}),
    (ONE, {"guidance_scale": 4.0, "guidance_scale_2": 4.0}),
    (ONE, {"guidance_scale": 1.0, "negative_prompt": ""}),
    (ONE, {"latents": torch.zeros(1, 16, 3, 4, 8)}),
    (ONE, {"latents": torch.zeros(1, 16, 3, 4, 8), "seed": 9, "noise": "frame",
           "scheduler": "lcm"}),  # which draws noise for each step
    (ONE, {"output_path": "o.mp4", "codec": "h265", "crf": 30, "pix_fmt": "yuv444p",
           "output_metadata": {"a": "b"}, "audio": (torch.zeros(1, 400), 16000)}),
    (ONE, {"output_path": "o.mp4", "resume": "auto", "journal_folder": "here"}),
    (TWO, {"guidance_scale_2": 3.0, "boundary": 0.5}),
    (TWO, {"switch_step": 1, "noise": "frame", "negative_prompt": "a dog"}),
    (TWO, {"guidance_scale": 1.0, "guidance_scale_2": 3.0, "negative_prompt": "a dog"}),
    (FIVE, {"window_mode": "continuation", "drift_correction": 0.5, "window_overlap": 8}),
]  # fmt: skip


def said(models: dict[str, ModelArchitecture], family: str, job: dict[str, Any]) -> list[str]:
    size = {"height": 64} if family == FIVE else {}
    config = GenerationConfig(**SIZE | size | job)
    request = resolve(config, models[family])
    return [*check_inputs(config, request, models[family]).warnings]


@pytest.mark.parametrize(("family", "job", "name"), IDLE, ids=[name for *_, name in IDLE])
def test_a_setting_without_effect_is_said(
    models: dict[str, ModelArchitecture], family: str, job: dict[str, Any], name: str
) -> None:
    (text,) = (text for text in said(models, family, job) if "no effect" in text)
    assert text.startswith(f"{name} ha{'ve' if ' and ' in name else 's'} no effect: ")


@pytest.mark.parametrize(("family", "job"), EFFECTIVE)
def test_a_setting_with_effect_is_not(
    models: dict[str, ModelArchitecture], family: str, job: dict[str, Any]
) -> None:
    assert said(models, family, job) == []


def test_settings_of_windows_are_idle_only_in_one_piece() -> None:
    given = {"window_overlap": 8, "window_schedule": "uniform", "window_fusion": "flat",
             "window_anchor": True, "noise": "freenoise"}  # fmt: skip
    for name, value in given.items():
        (text,) = window_settings_without_effect(GenerationConfig(**SIZE | {name: value}))
        assert text.startswith(name) and "one piece" in text
    assert not list(window_settings_without_effect(GenerationConfig(**SIZE)))


def test_one_transformer_has_one_scale(models: dict[str, ModelArchitecture]) -> None:
    """The other one must not have a negative prompt encoded that nothing uses."""
    job = GenerationConfig(**SIZE, guidance_scale=1.0, guidance_scale_2=5.0)
    assert not resolve(job, models[ONE]).guided
    assert resolve(job, models[TWO]).guided


# -- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [5, 9, 32, 33, 81, 200])
@pytest.mark.parametrize("length", [None, 5, 13, 81])
def test_forced_windows_are_as_long_as_the_plan_was_told(
    models: dict[str, ModelArchitecture], frames: int, length: int | None
) -> None:
    job = GenerationConfig(**SIZE | {"num_frames": frames}, force_chunked_processing=True)
    made = -(-(frames - 1) // 4) * 4 + 1
    assert resolve(job, models[ONE], window=length).window_frames == min(length or 81, made)
    given = replace(job, max_chunk_size=9)
    assert resolve(given, models[ONE], window=length).window_frames == 9
    free = replace(job, force_chunked_processing=False)
    assert resolve(free, models[ONE], window=length).window_frames is None


# -- pictures -------------------------------------------------------------------------------------


def test_the_pictures_a_model_cannot_do_without(models: dict[str, ModelArchitecture]) -> None:
    needed = {family: pictures_needed(model) for family, model in models.items()}
    assert needed == {
        "wan2.1-t2v": (), "wan2.2-t2v-a14b": (), "wan2.2-ti2v-5b": (),
        "wan2.1-i2v": ("image",), "wan2.2-i2v-a14b": ("image",),
        "wan2.1-flf2v": ("image", "last_image"),
    }  # fmt: skip
    for family, names in needed.items():
        for name in names:
            pictures = {other: PICTURE for other in names if other != name}
            with pytest.raises(InvalidRequest) as raised:
                resolve(GenerationConfig(**SIZE, **pictures), models[family])
            expected = "image" if "image" not in pictures else "last_image"
            assert raised.value.field in (name, expected)
        resolve(GenerationConfig(**SIZE, **dict.fromkeys(names, PICTURE)), models[family])


def test_every_field_of_a_config_is_checked_or_passed_on() -> None:
    """A new field without a check is noticed here."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("job", "render")
        for path in (Path(__file__).parents[2] / "wan_core" / folder).glob("*.py")
    )
    names = [found.name for found in fields(GenerationConfig)]
    assert [n for n in names if f"config.{n}" not in source and f'"{n}"' not in source] == []


def test_sound_is_kept_as_it_is_up_to_the_bound() -> None:
    model = architecture("wan2.1-t2v-1.3b")
    for peak in (0.0, 1.0, -8.0, 8.01):
        wave = torch.full((2, 400), peak)
        config = GenerationConfig(prompt="x", audio=(wave, 16000), output_path="a.mp4")
        request = resolve(config, model)
        if peak > 8:
            with pytest.raises(InvalidRequest, match=r"audio holds values up to 8\.01"):
                check_inputs(config, request, model)
        else:
            found = check_inputs(config, request, model).audio
            assert found is not None and torch.equal(found[0], wave) and found[1] == 16000
