"""Animate 2 from pictures to frames: diffusers' modular pipeline over two segments, and resume."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support.animate2_models import clip_encoder, dense_flex, diffusers_model, plain_model
from support.as_pack import load_pack, part
from support.tiny_models import components, make_scheduler, open_wan

from wan_core import GenerationConfig, WanControl
from wan_core.config import WanModelFiles
from wan_core.errors import InvalidRequest, MissingFile

WIDTH, HEIGHT, FRAMES, LENGTH = 64, 48, 9, 5


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    found = components("wan2.1-i2v", seed=3)
    found["transformer"] = plain_model(
        num_layers=10, num_attention_heads=1, attention_head_dim=128, added_kv_proj_dim=128
    )
    found["image_encoder"], found["image_processor"] = clip_encoder()
    return found


@pytest.fixture(scope="module")
def files(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> WanModelFiles:
    """Write every part; the transformer as diffusers' own class for Animate 2 saves it."""
    path = tmp_path_factory.mktemp("models")
    diffusers_model(parts["transformer"]).save_pretrained(path / "transformer")
    for name in ("vae", "text_encoder", "tokenizer", "image_encoder"):
        parts[name].save_pretrained(path / name)
    return WanModelFiles(
        transformer=path / "transformer", vae=path / "vae", text_encoder=path / "text_encoder",
        tokenizer=path / "tokenizer", image_encoder=path / "image_encoder",
    )  # fmt: skip


def pictures(frames: int = FRAMES) -> tuple[torch.Tensor, torch.Tensor]:
    """A character and a driving video of the clip's size, in whole 8-bit values."""
    g = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (frames, HEIGHT, WIDTH, 3), generator=g)
    return torch.randint(0, 256, (1, HEIGHT, WIDTH, 3), generator=g) / 255, video / 255


def config(**changes: Any) -> GenerationConfig:
    character, video = pictures()
    wanted: dict[str, Any] = {
        "prompt": "a red cat", "negative_prompt": "blue", "width": WIDTH, "height": HEIGHT,
        "num_frames": 0, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 7,
        "max_chunk_size": LENGTH, "flow_shift": 3.0,
        "control": WanControl(reference=character, video=video),
    }  # fmt: skip
    return GenerationConfig(**(wanted | changes))


def theirs(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, frames: int) -> torch.Tensor:
    """Return the frames that diffusers' own modular pipeline makes, (F, H, W, 3)."""
    from diffusers import UniPCMultistepScheduler
    from diffusers.modular_pipelines import WanAnimate2Blocks
    from PIL import Image

    class UniPC(UniPCMultistepScheduler):  # type: ignore[misc]
        """The pipeline hands its generator to whatever scheduler it has."""

        def step(self, *args: Any, generator: object = None, **more: Any) -> Any:
            return super().step(*args, **more)

    dense_flex(monkeypatch)
    pipe = WanAnimate2Blocks().init_pipeline()
    pipe.update_components(
        text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"], vae=parts["vae"],
        image_encoder=parts["image_encoder"], scheduler=UniPC.from_config(make_scheduler().config),
        transformer=diffusers_model(parts["transformer"]),
    )  # fmt: skip
    character, video = pictures(frames)
    as_pil = lambda one: Image.fromarray((one * 255).round().to(torch.uint8).numpy())  # noqa: E731
    made = pipe(
        image=as_pil(character[0]), driving_video=[as_pil(one) for one in video],
        prompt="a red cat", negative_prompt="blue", height=HEIGHT, width=WIDTH,
        segment_frame_length=LENGTH, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(7), output="videos",
    )  # fmt: skip
    return made[0].permute(0, 2, 3, 1)


def test_each_segment_has_the_text_of_its_middle(files: WanModelFiles) -> None:
    wan = open_wan(files)

    def made(**texts: Any) -> Any:
        job = config(num_inference_steps=1, guidance_scale=1.0, negative_prompt=None, **texts)
        return wan.generate(job).raise_for_error()

    one = made()
    two = made(prompt=None, prompts="5: a red cat\na blue dog")
    assert not two.warnings and torch.equal(two.latents[:, :, :2], one.latents[:, :, :2])
    assert not torch.equal(two.latents[:, :, 2:], one.latents[:, :, 2:])
    unseen = "2: a dog\n3: a red cat\na blue dog"
    three = made(prompt=None, prompts=unseen, window_mode="continuation")
    assert torch.equal(three.latents, two.latents)
    assert len(three.warnings) == 1 and "'a dog' is not seen" in three.warnings[0]


@pytest.mark.parametrize("frames", [8, pytest.param(9, marks=pytest.mark.slow)])
def test_as_diffusers_modular_pipeline_over_two_segments(
    parts: dict[str, Any], files: WanModelFiles, monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    expected = theirs(parts, monkeypatch, frames)
    character, video = pictures(frames)
    control = WanControl(reference=character, video=video)
    result = open_wan(files).generate(config(control=control)).raise_for_error()
    assert result.frames is not None and result.frames.shape == expected.shape
    assert (result.frames - expected).abs().max() < 2e-4
    assert result.latents is not None and result.latents.shape[2] == 2 * 2
    assert "2 segments of 5" in result.metadata["windows"]


def test_killed_in_the_second_segment_goes_on_with_equal_bits(
    files: WanModelFiles, tmp_path: Path
) -> None:
    whole = open_wan(files).generate(config()).raise_for_error()
    calls: list[int] = []

    def stop(step: int, total: int, latents: torch.Tensor) -> None:
        calls.append(step)
        assert total == 4
        if step == 3:
            raise KeyboardInterrupt

    job = config(resume="auto", journal_folder=tmp_path, progress_callback=stop)
    with pytest.raises(KeyboardInterrupt):
        open_wan(files).generate(job)
    assert calls == [1, 2, 3]
    again = open_wan(files).generate(config(resume="auto", journal_folder=tmp_path))
    again.raise_for_error()
    assert again.metadata["resumed"] == "segment 2 of 2, after step 1 of 2"
    assert torch.equal(again.frames, whole.frames) and torch.equal(again.latents, whole.latents)


@pytest.mark.slow
@pytest.mark.parametrize("wishes", [{"step_cache_threshold": 1.0}, {"speed": "fastest"}])
def test_a_step_cache_begins_anew_in_each_segment(
    files: WanModelFiles, wishes: dict[str, Any]
) -> None:
    wrapper = open_wan(files, step_cache="easycache", **wishes)
    two, one = (
        wrapper.generate(config(num_inference_steps=10, num_frames=frames)).raise_for_error()
        for frames in (FRAMES, LENGTH)
    )
    assert torch.equal(two.frames[:LENGTH], one.frames)
    counted = [
        [int(n) for n in re.findall(r"\d+", found.metadata["forwards"])] for found in (two, one)
    ]
    assert counted[0] == [2 * number for number in counted[1]]
    assert counted[1][0] < counted[1][1] == 20


@pytest.mark.slow
def test_several_cards_leave_it_to_one(files: WanModelFiles) -> None:
    whole = open_wan(files).generate(config()).raise_for_error()
    found = open_wan(files, devices=2).generate(config()).raise_for_error()
    assert torch.equal(found.frames, whole.frames) and "workers" not in found.metadata


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reference": None}, "control.reference is missing"),
        ({"face_video": torch.zeros(9, 16, 16, 3)}, "control.face_video was given, but Wan Anim"),
        ({"mask": torch.zeros(9, 16, 16)}, "control.mask was given, but Wan Animate 2"),
    ],
)
def test_a_mistake_is_told_before_any_weight_is_read(
    files: WanModelFiles, given: dict[str, Any], said: str
) -> None:
    character, video = pictures()
    wrapper = open_wan(files)
    control = WanControl(**{"reference": character, "video": video} | given)
    with pytest.raises(InvalidRequest, match=said):
        wrapper.generate(config(control=control)).raise_for_error()
    assert wrapper._cache.loaded() == []


@pytest.mark.parametrize("distilled", [False, True])
def test_a_modular_folder_of_diffusers_is_known(
    parts: dict[str, Any], tmp_path: Path, distilled: bool
) -> None:
    """As diffusers saves one, and as a copy of a published one, whose index points to the hub."""
    from diffusers import modular_pipelines

    pack = part(load_pack(), "nodes.pipeline")
    blocks = "WanAnimate2DistilledBlocks" if distilled else "WanAnimate2Blocks"
    pipe = getattr(modular_pipelines, blocks)().init_pipeline()
    pipe.update_components(
        **{name: parts[name] for name in ("text_encoder", "tokenizer", "vae", "image_encoder")},
        scheduler=make_scheduler(), transformer=diffusers_model(parts["transformer"]),
    )  # fmt: skip
    folder = tmp_path / "character"
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    assert not (folder / "model_index.json").exists()
    index = folder / "modular_model_index.json"
    entries = json.loads(index.read_text())
    for entry in entries.values():
        if isinstance(entry, list):
            entry[2]["pretrained_model_name_or_path"] = "somebody/a-repository"
    index.write_text(json.dumps(entries))
    for path in (folder, index):
        wrapper = open_wan(path)
        assert wrapper.architecture.name == "wan-animate-2-14b"
        assert set(wrapper.architecture.components) == {
            "transformer", "vae", "text_encoder", "tokenizer", "image_encoder", "scheduler",
        }  # fmt: skip
        recipe = wrapper.architecture.recipe
        assert (recipe is not None and recipe.num_inference_steps == 10) == distilled
    assert pack.list_models([tmp_path])[0] == "character"
    shutil.rmtree(folder / "vae")
    with pytest.raises(MissingFile, match="lacks vae"):
        open_wan(folder)


@pytest.mark.slow
def test_a_modular_folder_makes_the_same_clip(
    parts: dict[str, Any], files: WanModelFiles, tmp_path: Path
) -> None:
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "image_encoder"):
        (tmp_path / name).symlink_to(Path(str(getattr(files, name))))
    entries = {
        name: ["diffusers", "Any", {"subfolder": name}]
        for name in ("transformer", "vae", "text_encoder", "tokenizer", "image_encoder")
    }
    told = {"_class_name": "WanAnimate2ModularPipeline", "guider": None}
    (tmp_path / "modular_model_index.json").write_text(json.dumps(told | entries))
    one = config(num_frames=LENGTH, num_inference_steps=1)
    expected = open_wan(files).generate(one).raise_for_error()
    assert torch.equal(open_wan(tmp_path).generate(one).raise_for_error().frames, expected.frames)


@pytest.mark.slow
def test_official_names_and_fp8_give_the_same_bits(
    parts: dict[str, Any], files: WanModelFiles, tmp_path: Path
) -> None:
    def latents(name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        save_file(weights, tmp_path / name)
        other = replace(files, transformer=tmp_path / name)
        found = open_wan(other).generate(config()).raise_for_error().latents
        assert found is not None
        return found

    plain = layouts.original_transformer(layouts.state_of(parts["transformer"]))
    nested = {re.sub(r"^(blocks\.\d+)\.", r"\1.block.", name): one for name, one in plain.items()}
    expected = open_wan(files).generate(config()).raise_for_error().latents
    assert torch.equal(latents("x.safetensors", nested), expected)
    fp8 = {
        name: one.to(torch.float8_e4m3fn) if name.startswith("blocks") and one.ndim == 2 else one
        for name, one in plain.items()
    }
    wide = {name: one.to(torch.float32) for name, one in fp8.items()}
    stored = latents("wan_animate_2_fp8.safetensors", fp8)
    assert torch.equal(stored, latents("wan_animate_2.safetensors", wide))
    assert not torch.equal(stored, expected)
