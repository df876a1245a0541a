"""The whole way from a folder to frames, against diffusers' own pipelines on the same weights."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.cases import in_turn, pairs, slow_but
from support.tiny_models import FAMILIES, components, make_folder, open_kept, open_wan, pipeline
from support.traced import TracedMemory

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.errors import (
    DoesNotFit,
    InvalidRequest,
    MissingDependency,
    ModelMismatch,
    NonFiniteLatents,
)
from wan_core.job.steps import DIFFUSERS_SCHEDULERS as SCHEDULERS
from wan_core.job.steps import make_scheduler

SIZE = {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 4}
IMAGE_FAMILIES = ("wan2.1-i2v", "wan2.1-flf2v", "wan2.2-i2v-a14b")
SHIFT = {"wan2.2-t2v-a14b": 12.0}


def picture(seed: int, width: int = 64, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def images_of(family: str, use_image: bool) -> dict[str, Any]:
    if family == "wan2.1-flf2v":
        return {"image": picture(1), "last_image": picture(2)}
    return {"image": picture(1)} if use_image else {}


def reference(
    family: str, images: dict[str, Any], scheduler: str, scales: tuple[float, float], **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and frames (F, H, W, 3) from diffusers' pipeline with the same weights."""
    parts = components(family)
    parts["scheduler"] = make_scheduler(scheduler, SHIFT.get(family, 5.0))
    pipe = pipeline(family, parts, image=bool(images))
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = SIZE | images | {
        "prompt": "a red cat moves right", "negative_prompt": "a dog",
        "guidance_scale": scales[0],
    } | more  # fmt: skip
    if family.endswith("a14b"):
        arguments["guidance_scale_2"] = scales[1]

    def run(kind: str) -> torch.Tensor:
        return pipe(
            **arguments, generator=torch.Generator().manual_seed(7), output_type=kind
        ).frames

    frames = torch.from_numpy(run("np"))
    return run("latent"), frames.flatten(0, 1)


def ours(
    path: Path, family: str, images: dict[str, Any], scheduler: str,
    scales: tuple[float, float], **more: Any,
) -> Any:  # fmt: skip
    config: dict[str, Any] = SIZE | images | {
        "prompt": "a red cat moves right", "negative_prompt": "a dog", "seed": 7,
        "guidance_scale": scales[0], "guidance_scale_2": scales[1], "scheduler": scheduler,
        "flow_shift": SHIFT.get(family, 5.0),
    } | more  # fmt: skip
    return open_wan(path).generate(GenerationConfig(**config)).raise_for_error()


CASES = [(f, f in IMAGE_FAMILIES) for f in FAMILIES if f != "wan2.2-ti2v-5b"]
CASES.append(("wan2.2-ti2v-5b", True))


@pytest.mark.parametrize(
    ("case", "scheduler", "scales"),
    pairs(CASES, SCHEDULERS, ((4.0, 3.0), (1.0, 1.0))),
    ids=lambda value: str(value[0] if isinstance(value, tuple) else value),
)
def test_equals_diffusers_bit_for_bit(
    folder: Any, case: tuple[str, bool], scheduler: str, scales: tuple[float, float]
) -> None:
    family, image = case
    images = images_of(family, image)
    latents, frames = reference(family, images, scheduler, scales)
    result = ours(folder(family), family, images, scheduler, scales)
    assert torch.equal(result.latents, latents)
    assert torch.equal(result.frames, frames)


@pytest.mark.parametrize("family", ["wan2.1-t2v", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"])
def test_a_batch_equals_diffusers(folder: Any, family: str) -> None:
    images = images_of(family, family != "wan2.1-t2v")
    latents, frames = reference(family, images, "unipc", (4.0, 3.0), num_videos_per_prompt=2)
    result = ours(folder(family), family, images, "unipc", (4.0, 3.0), batch_size=2)
    assert torch.equal(result.latents, latents)
    assert torch.equal(result.frames, frames)
    assert not torch.equal(result.latents[0], result.latents[1])


def test_5b_text_to_video_passes_one_timestep_per_sample(folder: Any) -> None:
    """Stated difference: the same as diffusers' timestep per token within rounding."""
    family = "wan2.2-ti2v-5b"
    latents, _ = reference(family, {}, "unipc", (4.0, 3.0))
    result = ours(folder(family), family, {}, "unipc", (4.0, 3.0))
    assert torch.allclose(result.latents, latents, atol=2e-5, rtol=1e-4)


def test_image_to_video_of_the_5b_comes_from_a_folder_that_says_wanpipeline(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.2-ti2v-5b"))
    assert wrapper.architecture.name == "wan2.2-ti2v-5b"
    assert wrapper.architecture.variant.image_input == "optional"


class TestStatedDifferences:
    """Where DESIGN.md says that the loop does better than the pipelines it equals."""

    def counted(self, folder: Any, **config: Any) -> list[str]:
        """Return which expert and which prompt each transformer call saw."""
        wrapper = open_wan(folder("wan2.2-t2v-a14b"))
        calls: list[str] = []
        original = wrapper._cache.borrow

        def borrow(key: Any, nbytes: int, build: Any, *, keep: bool = True) -> Any:
            def counted() -> Any:
                module = build()
                if hasattr(module, "blocks"):
                    name = Path(key.files[0].path).parent.name
                    module.register_forward_pre_hook(lambda *_: calls.append(name))
                return module

            return original(key, nbytes, counted, keep=keep)

        wrapper._cache.borrow = borrow
        job = GenerationConfig(**(SIZE | {"prompt": "a red cat", "scheduler": "euler"} | config))
        wrapper.generate(job).raise_for_error()
        return calls

    def test_guidance_of_one_skips_the_unconditional_pass_of_that_expert(self, folder: Any) -> None:
        # Shift 12 and 4 steps: t = 1000, 972.5, 922, 799... the last is the low-noise expert's.
        guided_low = self.counted(folder, guidance_scale=1.0, guidance_scale_2=3.0)
        high, low = guided_low.count("transformer"), guided_low.count("transformer_2")
        guided_high = self.counted(folder, guidance_scale=4.0, guidance_scale_2=1.0)
        assert low % 2 == 0 and low > 0
        assert guided_high.count("transformer") == 2 * high
        assert guided_high.count("transformer_2") == low // 2

    def test_defaults_are_the_official_ones(self, folder: Any) -> None:
        expected = {
            "wan2.2-t2v-a14b": (12.0, 4.0, 3.0),
            "wan2.2-i2v-a14b": (5.0, 3.5, 3.5),
            "wan2.2-ti2v-5b": (5.0, 5.0, 5.0),
        }
        for family, (shift, scale, scale_2) in expected.items():
            images = images_of(family, family in IMAGE_FAMILIES)
            job = GenerationConfig(**SIZE, prompt="a cat", **images)
            request, _ = open_wan(folder(family)).plan(job)
            assert request.flow_shift == shift
            assert (request.guidance_scale, request.guidance_scale_2) == (scale, scale_2)

    def test_switch_by_step_equals_the_boundary_that_gives_that_step(self, folder: Any) -> None:
        wrapper = open_wan(folder("wan2.2-t2v-a14b"))
        base = SIZE | {"prompt": "a cat", "num_inference_steps": 5, "seed": 3}
        by_boundary = wrapper.generate(GenerationConfig(**base, boundary=0.93)).raise_for_error()
        by_step = wrapper.generate(GenerationConfig(**base, switch_step=3)).raise_for_error()
        other = wrapper.generate(GenerationConfig(**base, switch_step=1)).raise_for_error()
        assert "1-3 high-noise, 4-5 low-noise" in by_step.metadata["steps"]
        assert by_boundary.metadata["steps"] == by_step.metadata["steps"]
        assert torch.equal(by_boundary.latents, by_step.latents)
        assert not torch.equal(other.latents, by_step.latents)


def test_the_example_of_the_readme_runs(folder: Any) -> None:
    loader = WanPipelineLoader()
    wrapper = loader.load_wan_pipeline(
        folder("wan2.1-t2v"),
        optimization_config={"precision": "fp16", "chunk_size": 4, "min_vram_mb": 6144},
    )
    result = wrapper.generate(
        GenerationConfig(
            prompt="a beautiful sunset over mountains", num_frames=16, width=64, height=64,
            num_inference_steps=2,
        )
    )  # fmt: skip
    result.raise_for_error()
    assert result.frames.shape == (16, 64, 64, 3)
    assert any("17" in warning for warning in result.warnings)
    loader.clear_cache()


def test_frames_asked_for_are_the_first_of_those_made(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.1-t2v"))
    job = SIZE | {"prompt": "a cat", "seed": 0}
    whole = wrapper.generate(GenerationConfig(**(job | {"num_frames": 13}))).raise_for_error()
    part = wrapper.generate(GenerationConfig(**(job | {"num_frames": 10}))).raise_for_error()
    assert torch.equal(part.frames, whole.frames[:10])


def test_seed_zero_is_a_seed_and_none_is_named(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.1-t2v"))
    job = SIZE | {"prompt": "a cat"}
    zero = [wrapper.generate(GenerationConfig(**job, seed=0)).raise_for_error() for _ in range(2)]
    assert torch.equal(zero[0].latents, zero[1].latents)
    drawn = wrapper.generate(GenerationConfig(**job, seed=None)).raise_for_error()
    seed = drawn.metadata["seed"]
    again = wrapper.generate(GenerationConfig(**job, seed=seed)).raise_for_error()
    assert torch.equal(drawn.latents, again.latents)
    assert not torch.equal(drawn.latents, zero[0].latents)


def test_placement_changes_no_bit(folder: Any) -> None:
    job = GenerationConfig(**SIZE, prompt="a cat", image=picture(1))
    model = folder("wan2.2-i2v-a14b")
    plain = open_wan(model, offload="none").generate(job).raise_for_error()
    for offload in ("model", "sequential", "stream", "group"):
        other = open_wan(model, offload=offload).generate(job).raise_for_error()
        assert torch.equal(plain.latents, other.latents), offload
        assert torch.equal(plain.frames, other.frames), offload


def test_windows_that_the_plan_chose_by_itself_are_said(folder: Any) -> None:
    config = GenerationConfig(**SIZE | {"num_frames": 17}, prompt="a cat")
    wrapper = open_wan(folder("wan2.1-t2v"))
    use_plan(wrapper, {"window_frames": 9, "window_overlap": 4})
    result = wrapper.generate(config).raise_for_error()
    assert any("Made in windows of 9 frames" in text for text in result.warnings)
    config.max_chunk_size, config.window_overlap = 9, 4
    asked = open_wan(folder("wan2.1-t2v")).generate(config).raise_for_error()
    assert torch.equal(asked.latents, result.latents)
    assert not any("Made in windows" in text for text in asked.warnings)


PLANS = {
    "lean": {"lean": True},
    "streamed": {"stream": True, "resident_blocks": 0, "offload": "model"},
    "streamed lean": {"stream": True, "resident_blocks": 1, "offload": "model", "lean": True},
    "one at a time": {"stream": True, "stream_buffers": 1, "offload": "model", "lean": True},
    "lean, text encoder by layer": {
        "lean": True, "offload": "model", "part_offload": {"text_encoder": "sequential"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "family",
    slow_but("wan2.1-flf2v".__ne__, ["wan2.1-flf2v", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"]),
)
def test_every_way_to_run_a_plan_gives_the_same_bits(folder: Any, family: str) -> None:
    """The ways a large model is run on a card, carried out here on a CPU."""
    # A size with more than 16 tokens: CPU products of fewer rows round in another way.
    size = SIZE | {"width": 128, "height": 128}
    config = GenerationConfig(**size, prompt="a cat", **images_of(family, True))
    plain = open_wan(folder(family)).generate(config).raise_for_error()
    for name, changes in PLANS.items():
        other = open_wan(folder(family))
        use_plan(other, changes)
        result = other.generate(config).raise_for_error()
        assert torch.equal(plain.latents, result.latents), name
        assert torch.equal(plain.frames, result.frames), name


def use_plan(wrapper: Any, changes: dict[str, Any]) -> None:
    decide = wrapper._manager.recommend_optimizations
    wrapper._manager.recommend_optimizations = lambda *args: decide(*args).with_choices(**changes)


def test_two_threads_give_what_they_give_alone(folder: Any) -> None:
    loader = WanPipelineLoader()
    wrappers = [
        loader.load_wan_pipeline(folder("wan2.2-t2v-a14b"), optimization_config={"device": "cpu"})
        for _ in range(2)
    ]
    jobs = [
        GenerationConfig(**SIZE, prompt=text, seed=seed)
        for text, seed in (("a red cat", 1), ("a blue dog", 2))
    ]
    alone = [w.generate(job).raise_for_error() for w, job in zip(wrappers, jobs, strict=True)]
    loader.clear_cache()
    together: dict[int, Any] = {}

    def work(index: int) -> None:
        together[index] = [wrappers[index].generate(jobs[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for result in together[index]:
            result.raise_for_error()
            assert torch.equal(result.latents, alone[index].latents)
            assert torch.equal(result.frames, alone[index].frames)
    loader.clear_cache()


def test_windows_that_cover_the_clip_equal_the_plain_run(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.2-i2v-a14b"))
    job = SIZE | {"prompt": "a cat", "image": picture(1)}
    plain = wrapper.generate(GenerationConfig(**job)).raise_for_error()
    windowed = wrapper.generate(
        GenerationConfig(**job, max_chunk_size=9, force_chunked_processing=True)
    ).raise_for_error()
    assert torch.equal(plain.latents, windowed.latents)
    assert torch.equal(plain.frames, windowed.frames)


@pytest.mark.parametrize(("frames", "size"), in_turn((9, 13, 16, 32, 33), (None, 2, 4)))
def test_forced_windows_are_made_and_called(folder: Any, frames: int, size: int | None) -> None:
    """Their length is the plan's chunk_size, and what the result says of them is true."""
    wrapper = open_wan(folder("wan2.1-t2v"), chunk_size=size)
    called: list[tuple[int, int]] = []
    config = GenerationConfig(
        **SIZE | {"num_frames": frames, "num_inference_steps": 2}, prompt="a cat",
        force_chunked_processing=True, guidance_scale=1.0,
        chunk_callback=lambda index, count: called.append((index, count)),
    )  # fmt: skip
    result = wrapper.generate(config).raise_for_error()
    count = called[0][1]
    assert called == [(index, count) for _ in range(2) for index in range(count)]
    covers = size is None or 4 * (size - 1) + 1 >= frames
    assert (count == 1) == covers
    said = result.metadata["windows"]
    assert said.startswith("1 window over all" if covers else f"{count} windows of")
    assert any("windows" in text for text in result.applied_optimizations) != covers
    assert result.frames.shape[0] == frames


@pytest.mark.parametrize("family", ["wan2.1-i2v", "wan2.2-i2v-a14b", "wan2.1-flf2v"])
def test_a_last_picture_is_seen_by_every_model_that_takes_one(folder: Any, family: str) -> None:
    """An image branch for one picture sees the first; both are in the latents."""
    wrapper = open_wan(folder(family))
    job = SIZE | {"prompt": "a cat", "image": picture(1), "scheduler": "euler"}
    made = [
        wrapper.generate(GenerationConfig(**job, last_image=picture(seed))).raise_for_error()
        for seed in (2, 3)
    ]
    assert not torch.equal(made[0].latents, made[1].latents)
    if family != "wan2.1-flf2v":
        alone = wrapper.generate(GenerationConfig(**job)).raise_for_error()
        assert not torch.equal(alone.latents, made[0].latents)


def test_an_estimate_asks_for_no_picture(folder: Any) -> None:
    for family in FAMILIES:
        wrapper = open_wan(folder(family))
        job = GenerationConfig(**SIZE | {"height": 64}, prompt="")
        names = {stage.name for stage in wrapper.estimate_memory_usage(job).stages}
        assert ("condition_encode" in names) == (family in IMAGE_FAMILIES)
        assert "frames at" in wrapper.what_fits(job)
        assert WanPipelineLoader().preload_pipeline(folder(family))
    WanPipelineLoader().clear_cache()


def test_a_model_whose_file_was_replaced_is_not_run_as_what_it_was(tmp_path: Path) -> None:
    model = make_folder(tmp_path / "model", "wan2.1-t2v")
    wrapper = open_wan(model)
    wrapper.generate(GenerationConfig(**SIZE, prompt="a")).raise_for_error()
    make_folder(tmp_path / "other", "wan2.2-i2v-a14b")
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / "other" / "transformer" / name).replace(model / "transformer" / name)
    result = wrapper.generate(GenerationConfig(**SIZE, prompt="a"))
    assert isinstance(result.error, ModelMismatch) and result.stages == []
    assert "was replaced" in result.errors[0] and name in result.errors[0]
    with pytest.raises(ModelMismatch):
        wrapper.check(GenerationConfig(**SIZE, prompt="a"))


def test_windows_see_no_more_than_their_length(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.1-t2v"))
    seen: list[tuple[int, int]] = []
    job = GenerationConfig(
        **(SIZE | {"num_frames": 41}), prompt="a cat", max_chunk_size=17, window_overlap=8,
        chunk_callback=lambda index, total: seen.append((index, total)),
    )  # fmt: skip
    result = wrapper.generate(job).raise_for_error()
    assert result.frames.shape[0] == 41
    assert len(seen) == SIZE["num_inference_steps"] * seen[0][1]
    assert "window" in result.metadata["windows"]


def test_an_interrupt_comes_out_unchanged_and_the_next_run_is_right(folder: Any) -> None:
    class Stop(Exception):
        """A plain Exception, as ComfyUI's interrupt is in the oldest version supported."""

    wrapper = open_wan(folder("wan2.2-t2v-a14b"))
    job = SIZE | {"prompt": "a cat"}
    expected = wrapper.generate(GenerationConfig(**job)).raise_for_error()
    for stop_at in (1, 2, 5, 9, 14, 20):
        count = 0
        error = Stop("stop")

        def check(at: int = stop_at, error: Stop = error) -> None:
            nonlocal count
            count += 1
            if count == at:
                raise error

        with pytest.raises(Stop) as raised:
            wrapper.generate(GenerationConfig(**job, interrupt_check=check))
        assert raised.value is error
        assert count == stop_at
        again = wrapper.generate(GenerationConfig(**job)).raise_for_error()
        assert torch.equal(again.frames, expected.frames)


def test_the_interrupt_is_looked_at_between_blocks(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.1-t2v"))
    count = 0

    def check() -> None:
        nonlocal count
        count += 1

    job = GenerationConfig(**SIZE, prompt="a cat", interrupt_check=check)
    wrapper.generate(job).raise_for_error()
    blocks = 2 * 2 * SIZE["num_inference_steps"]  # two blocks, two passes
    assert count >= blocks


def test_a_failed_run_leaves_no_file(folder: Any, tmp_path: Path) -> None:
    wrapper = open_wan(folder("wan2.1-t2v"))
    target = tmp_path / "out.mp4"
    being_written = 0

    def check() -> None:
        nonlocal being_written
        being_written += any(path.suffix == ".mp4" for path in tmp_path.iterdir())
        if being_written == 2:  # the first frame is in it, the others are not
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        wrapper.generate(
            GenerationConfig(**SIZE, prompt="a cat", output_path=target, interrupt_check=check)
        )
    assert list(tmp_path.iterdir()) == []


def test_memory_is_flat_in_frames_down_to_the_mp4(folder: Any, tmp_path: Path) -> None:
    """A clip nine times as long takes its latents more: as they are, twice in the VAE's space
    (for the result and the decoder), and projected. Pictures take twelve times as much as these.
    """
    wrapper = open_wan(folder("wan2.1-t2v"))
    job = {"prompt": "a cat", "width": 32, "height": 32, "num_inference_steps": 1,
           "guidance_scale": 1.0, "scheduler": "euler", "max_chunk_size": 17, "window_overlap": 4,
           "output_path": tmp_path / "out.mp4", "return_frames": False}  # fmt: skip
    peaks, latents = {}, {}
    for frames in (5, 17, 161):  # the first one reads the weights
        with TracedMemory() as memory:
            result = wrapper.generate(GenerationConfig(**job, num_frames=frames))
        peaks[frames] = memory.peak_bytes
        assert result.raise_for_error().frames is None
        latents[frames] = result.latents.nbytes
    part = 4 * 32 * 32 * 3 * 4
    assert 0 < peaks[161] - peaks[17] < 4 * (latents[161] - latents[17]) + part, peaks


def test_memory_that_runs_out_is_a_result_not_an_exception(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.1-t2v"))

    def borrow(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 10 bytes")

    wrapper._cache.borrow = borrow
    result = wrapper.generate(GenerationConfig(**SIZE, prompt="a cat"))
    assert not result.success and isinstance(result.error, DoesNotFit)
    with pytest.raises(DoesNotFit, match="Memory ran out"):
        result.raise_for_error()


def test_latents_that_overflow_are_an_error_that_names_the_step(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.2-t2v-a14b"))
    noise = torch.full((1, 16, 3, 4, 8), 3e38)  # finite, but not for long
    result = wrapper.generate(GenerationConfig(**SIZE, prompt="a cat", latents=noise))
    assert isinstance(result.error, NonFiniteLatents)
    assert (result.error.step, result.error.expert) == (0, "high")
    assert "fp32" in result.errors[0] or "float32" in result.errors[0]


BAD = [
    ({"num_frames": 0}, "num_frames"),
    ({"width": 15}, "width"),
    ({"height": -32}, "height"),
    ({"width": 10**6}, "width"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 2.5}, "num_inference_steps"),
    ({"scheduler": "ddim"}, "scheduler"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"flow_shift": 0}, "flow_shift"),
    ({"flow_shift": float("inf")}, "flow_shift"),
    ({"fps": 0}, "fps"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"batch_size": 0}, "batch_size"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"image": "picture"}, "image"),
    ({"precision_override": "fp4"}, "precision_override"),
    ({"prompt_embeds": torch.zeros(1, 512, 31)}, "prompt_embeds"),
    ({"prompt_embeds": torch.zeros(1, 600, 32)}, "prompt_embeds"),
    ({"latents": torch.zeros(1, 16, 3, 4, 4)}, "latents"),
    ({"start_step": 4}, "start_step"),
    ({"max_chunk_size": 3}, "max_chunk_size"),
    ({"window_schedule": "zigzag"}, "window_schedule"),
    ({"output_path": "video.avi"}, "output_path"),
    ({"return_frames": False}, "output_path"),
    ({"num_frames": 5000}, "num_frames"),
    ({"num_frames": True}, "num_frames"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=[f"{f}-{i}" for i, (_, f) in enumerate(BAD)])
def test_a_bad_field_is_named(folder: Any, change: dict[str, Any], field: str) -> None:
    job = SIZE | {"prompt": "a cat"} | change
    result = open_wan(folder("wan2.1-t2v")).generate(GenerationConfig(**job))
    assert not result.success
    assert isinstance(result.error, InvalidRequest), result.error
    assert result.error.field == field
    assert field in result.errors[0]


def test_an_image_model_without_an_image(folder: Any) -> None:
    result = open_wan(folder("wan2.2-i2v-a14b")).generate(GenerationConfig(**SIZE, prompt="a cat"))
    assert isinstance(result.error, InvalidRequest) and result.error.field == "image"


def test_embeddings_in_place_of_prompts(folder: Any) -> None:
    """Short embeddings from outside are padded with zeros to the 512 tokens Wan attends."""
    wrapper = open_wan(folder("wan2.1-t2v"))
    embeds = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([embeds, torch.zeros(1, 506, 32)], dim=1)
    job = SIZE | {"negative_prompt_embeds": torch.zeros(1, 512, 32)}
    short = wrapper.generate(GenerationConfig(**job, prompt_embeds=embeds)).raise_for_error()
    full = wrapper.generate(GenerationConfig(**job, prompt_embeds=padded)).raise_for_error()
    assert torch.equal(short.latents, full.latents)
    assert not any(stage.name.startswith("load text") for stage in short.stages)


def test_a_text_that_is_cut_is_said_every_time(folder: Any) -> None:
    """Also where the embeddings come from the cache; up to 511 tokens and the end mark fit."""
    loader = WanPipelineLoader()
    loader.clear_cache()
    wrapper = loader.load_wan_pipeline(folder("wan2.1-t2v"), optimization_config={"device": "cpu"})
    for words, cut in ((511, False), (512, True), (800, True)):
        text = " ".join(["cat"] * (words - 1) + ["dog"])
        jobs = {"prompt": {"prompt": text}, "negative_prompt": {"negative_prompt": text},
                "prompts": {"prompt": None, "prompts": f"4: a fox\n{text}"}}  # fmt: skip
        for field, job in jobs.items():
            for _ in range(2):
                config = GenerationConfig(**SIZE | {"prompt": "a cat"} | job)
                warnings = wrapper.generate(config).raise_for_error().warnings
                said = [text for text in warnings if text.startswith(f"{field} is cut")]
                assert len(said) == cut, (field, words)
                assert all("512" in text and f"{words + 1:,} tokens" in text for text in said)
                assert not cut or "dog" in said[0] or words == 800
    loader.clear_cache()


def test_a_prompt_without_embeddings_is_part_of_the_estimate(folder: Any) -> None:
    """Also if only the negative one is to be encoded."""
    wrapper = open_wan(folder("wan2.1-t2v"))
    embeds = {"prompt_embeds": torch.zeros(1, 4, 32)}

    def stages(**job: Any) -> set[str]:
        found = wrapper.estimate_memory_usage(GenerationConfig(**SIZE, **job))
        return {stage.name for stage in found.stages}

    assert "text_encode" in stages(prompt="a")
    assert "text_encode" in stages(**embeds, guidance_scale=4.0)
    assert "text_encode" not in stages(**embeds, guidance_scale=1.0)
    both = embeds | {"negative_prompt_embeds": torch.zeros(1, 4, 32)}
    assert "text_encode" not in stages(**both, guidance_scale=4.0)


def test_every_text_is_encoded_once(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_core.render import conditions

    encoded: list[str] = []
    original = conditions.encode_text

    def counting(text_encoder: Any, tokenizer: Any, prompt: str, device: Any) -> Any:
        encoded.append(prompt)
        return original(text_encoder, tokenizer, prompt, device)

    monkeypatch.setattr(conditions, "encode_text", counting)
    loader = WanPipelineLoader()
    loader.clear_cache()
    wrapper = loader.load_wan_pipeline(folder("wan2.1-t2v"), optimization_config={"device": "cpu"})
    job = SIZE | {"prompt": "a cat", "negative_prompt": "a dog"}
    for _ in range(2):
        wrapper.generate(GenerationConfig(**job)).raise_for_error()
    assert encoded == ["a cat", "a dog"]
    loader.clear_cache()


def test_continuing_at_a_step_equals_the_whole_run(folder: Any) -> None:
    """Euler keeps no history, so steps 0-2 and then 2-4 are the same run."""
    wrapper = open_wan(folder("wan2.2-t2v-a14b"))
    job = SIZE | {"prompt": "a cat", "scheduler": "euler"}
    whole = wrapper.generate(GenerationConfig(**job)).raise_for_error()
    first = wrapper.generate(GenerationConfig(**job, end_step=2)).raise_for_error()
    rest = wrapper.generate(
        GenerationConfig(**job, start_step=2, latents=first.latents)
    ).raise_for_error()
    assert torch.equal(rest.latents, whole.latents)


def test_a_report_names_the_stages(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.2-i2v-a14b"))
    result = wrapper.generate(
        GenerationConfig(**SIZE, prompt="a cat", image=picture(1))
    ).raise_for_error()
    names = [stage.name for stage in result.stages if not stage.name.startswith("load")]
    assert names == ["text_encode", "condition_encode", "denoise_high", "denoise_low", "decode"]
    assert all(stage.seconds >= 0 and stage.measured_peak_bytes for stage in result.stages)
    predicted = {s.name: s.predicted_peak_bytes for s in result.stages}
    assert all(predicted[name] for name in names), predicted
    text = wrapper.report(result)
    assert "denoise_high" in text and "predicted" in text and "measured" in text


def test_seconds_count_what_is_to_be_read_and_the_mp4(folder: Any, tmp_path: Path) -> None:
    """What is held is read in a new process alone; stages are named as a result names them."""
    wrapper = open_kept(folder("wan2.2-i2v-a14b"))
    size = {**SIZE, "num_inference_steps": 2, "num_frames": 5}
    job: dict[str, Any] = {**size, "prompt": "a cat", "image": picture(1)}

    def told(**more: Any) -> dict[str, tuple[float, float]]:
        _, plan = wrapper.plan(GenerationConfig(**job, **more))
        return {one.name: (one.warm, one.cold) for one in plan.stage_seconds}

    before = told()
    result = wrapper.generate(GenerationConfig(**job)).raise_for_error()
    after, names = told(), {stage.name for stage in result.stages}
    assert set(before) - names == {"load tokenizer"} and names <= set(before)
    for name in (name for name in before if name.startswith("load ")):
        assert before[name][0] >= after[name][0] == 0 and after[name][1] == before[name][1]
    assert sum(warm for warm, _ in before.values()) > 2 + sum(warm for warm, _ in after.values())
    assert "mp4" not in before and told(output_path=tmp_path / "a.mp4")["mp4"][0] > 0
    WanPipelineLoader().clear_cache()
    assert told()["load transformer"] == before["load transformer"]


def test_a_diffusers_that_is_not_known_is_not_planned_with(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan asks what can stand in, from files, and what it then says is what is run."""
    from wan_core.forward import sources
    from wan_core.memory.choices import Choices
    from wan_core.memory.stages import estimate
    from wan_core.render.report import workload_of

    wanted = GenerationConfig(prompt="a red cat", **SIZE)
    assert "lean forward" in open_wan(folder("wan2.1-t2v"), forward="lean").plan(wanted)[1].applied
    reason = "diffusers 9.9.9 computes WanAttention.forward in a way not known here"
    monkeypatch.setattr(sources, "_version", lambda: "9.9.9")
    unknown = {"models.transformers.transformer_wan": {"WanAttention.forward": ("0",)}}
    monkeypatch.setattr(sources, "TRANSFORMER", unknown)
    for forward in ("auto", "lean", "lean_rows"):
        wrapper = open_wan(folder("wan2.1-t2v"), forward=forward)
        system = wrapper._system(wrapper.optimization)  # once: what the process holds changes
        monkeypatch.setattr(wrapper, "_system", lambda *_, seen=system: seen)
        _, plan = wrapper.plan(wanted)
        assert any(reason in told for told in plan.reasons)
        assert not plan.lean and not plan.by_rows
        choices: Choices = plan.choices
        job = workload_of(wrapper.plan(wanted)[0], wanted, wrapper.architecture)
        again = estimate(wrapper.architecture, job, choices, system)
        assert plan.estimate.peak_usage_mb == again.peak_usage_mb
        result = wrapper.generate(wanted).raise_for_error()
        assert not any("More memory than predicted" in told for told in result.warnings)


@pytest.mark.parametrize("how", ["missing", "too old for transformers", "a part is missing"])
def test_a_diffusers_that_cannot_be_imported_is_said_first(
    folder: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the plan, which needs none, and before a weight is read."""
    from wan_core.render.stages import StageRunner

    path = folder("wan2.1-t2v")  # which may have to be made, by diffusers
    if how == "missing":
        monkeypatch.setitem(sys.modules, "diffusers", None)
    else:  # as diffusers' own lazy modules raise it
        broken: Any = ModuleType("diffusers")

        def fails(name: str) -> None:
            missing = ModuleNotFoundError("No ftfy", name="ftfy")
            cause = missing if how == "a part is missing" else None
            raise RuntimeError(f"Failed to import diffusers for {name} because of ...") from cause

        broken.__getattr__ = fails
        monkeypatch.setitem(sys.modules, "diffusers", broken)
    read: list[str] = []
    monkeypatch.setattr(StageRunner, "component", lambda self, name: read.append(name))
    wrapper, config = open_wan(path), GenerationConfig(prompt="a cat", **SIZE)
    _, plan = wrapper.plan(config)
    assert not plan.lean
    assert "diffusers is not installed" in " ".join(plan.reasons)
    result = wrapper.generate(config)
    assert isinstance(result.error, MissingDependency)
    assert "diffusers cannot be imported" in str(result.error)
    advice = "-r requirements" if how == "a part is missing" else "-U diffusers"
    assert f"pip install {advice}" in str(result.error)
    assert read == []


def test_python_without_docstrings_is_not_blamed_on_the_versions(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``PYTHONOPTIMIZE=2`` breaks transformers; another version of it would be broken as well."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    flags = type("Flags", (), {"optimize": 2, "__getattr__": lambda _, n: getattr(real, n)})()
    real = sys.flags
    monkeypatch.setattr(sys, "flags", flags)
    result = open_wan(folder("wan2.1-t2v")).generate(GenerationConfig(prompt="a cat", **SIZE))
    assert isinstance(result.error, MissingDependency)
    assert "PYTHONOPTIMIZE=2" in str(result.error) and "pip" not in str(result.error)


def test_group_offload_that_cannot_work_is_refused_before_a_weight_is_read(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    from wan_core.render.stages import StageRunner

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(diffusers, "__version__", "0.38.0")
    read: list[str] = []
    monkeypatch.setattr(StageRunner, "component", lambda self, name: read.append(name))
    wrapper = open_wan(folder("wan2.1-t2v"), offload="group")
    result = wrapper.generate(GenerationConfig(prompt="a cat", **SIZE))
    assert isinstance(result.error, MissingDependency)
    assert "diffusers 0.41 or newer" in str(result.error)
    assert read == []


def test_a_kernel_that_lacked_memory_to_be_tried_is_said(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan_core.kernels import Trials
    from wan_core.render.render import Render

    def lacking() -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernel = Trials("a kernel")
    monkeypatch.setattr(Render, "run", lambda self: kernel.of("key", lacking))
    wrapper = open_wan(folder("wan2.1-t2v"))
    for _ in range(2):
        result = wrapper.generate(GenerationConfig(prompt="a red cat", seed=1, **SIZE))
        said = [text for text in result.warnings if "too little memory to try a kernel" in text]
        assert len(said) == 1
