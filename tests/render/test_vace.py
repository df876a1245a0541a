"""VACE through the whole product: WanVACEPipeline's bits, in every placement, windows, segments."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.cases import in_turn, slow_but
from support.clips import as_tensor, pixels
from support.crashes import Crash
from support.tiny_models import VACE_FAMILIES, components, make_folder, open_kept, pipeline

from wan_core import GenerationConfig, PipelineManager, WanControl
from wan_core.errors import InvalidRequest
from wan_core.job import make_scheduler
from wan_core.models import VARIANTS

FRAMES, WIDTH, HEIGHT = 9, 48, 32
SIZE: dict[str, Any] = {
    "num_frames": FRAMES, "width": WIDTH, "height": HEIGHT, "num_inference_steps": 3,
}  # fmt: skip
TEXT = {"prompt": "a red cat moves right", "negative_prompt": "a dog"}
pytestmark = pytest.mark.usefixtures("nothing_kept")


VIDEO, MASK = pixels(FRAMES, HEIGHT, WIDTH, 3), pixels(FRAMES, HEIGHT, WIDTH, seed=1)
REFERENCES = pixels(3, 40, 24, 3, seed=2)


def control(**more: Any) -> WanControl:
    return WanControl(**({"video": as_tensor(VIDEO), "mask": as_tensor(MASK)} | more))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vace")
    return {family: make_folder(root / family, family) for family in VACE_FAMILIES}


opened = functools.partial(open_kept, offload="none")


def made(wrapper: Any, **more: Any) -> Any:
    job = SIZE | TEXT | {"seed": 7, "guidance_scale": 4.0, "guidance_scale_2": 3.0} | more
    job = {"flow_shift": 3.0, "scheduler": "unipc"} | job
    return wrapper.generate(GenerationConfig(**job)).raise_for_error()


def diffusers(family: str, references: int, scale: Any, given: bool, **more: Any) -> Any:
    parts = components(family)
    parts["scheduler"] = make_scheduler("unipc", 3.0)
    pipe = pipeline(family, parts)
    pipe.set_progress_bar_config(disable=True)
    arguments = SIZE | TEXT | {"guidance_scale": 4.0, "conditioning_scale": scale} | more
    if given:
        arguments["video"] = [Image.fromarray(one) for one in VIDEO]
        arguments["mask"] = [Image.fromarray(one) for one in MASK]
    if references:
        arguments["reference_images"] = [Image.fromarray(one) for one in REFERENCES[:references]]
    if family.endswith("a14b"):
        arguments["guidance_scale_2"] = 3.0
    return pipe(**arguments, generator=torch.Generator().manual_seed(7))


CASES = [
    (True, 0, 1.0), (True, 1, [1.0, 0.4]), (False, 3, 0.7), (False, 0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("family", "case"), in_turn(VACE_FAMILIES, CASES))
def test_equals_diffusers_bit_for_bit(
    folders: dict[str, Path], family: str, case: tuple[bool, int, Any]
) -> None:
    given, references, scale = case
    latents = diffusers(family, references, scale, given, output_type="latent").frames
    found = control(
        strength=scale,
        reference=as_tensor(REFERENCES[:references]) if references else None,
        **({} if given else {"video": None, "mask": None}),
    )
    result = made(opened(folders[family]), control=found)
    assert result.latents.shape[2] == 3 and latents.shape[2] == 3 + references
    assert torch.equal(result.latents, latents[:, :, references:])


def test_frames_are_diffusers_and_references_are_cut_off(folders: dict[str, Path]) -> None:
    frames = diffusers(VACE_FAMILIES[0], 2, 1.0, True, output_type="np").frames
    found = control(reference=as_tensor(REFERENCES[:2]))
    seen: list[int] = []
    result = made(
        opened(folders[VACE_FAMILIES[0]]), control=found,
        progress_callback=lambda *call: seen.append(call[2].shape[2]),
        preview_callback=lambda *call: seen.append(call[2].shape[2]),
    )  # fmt: skip
    assert torch.equal(result.frames, torch.from_numpy(frames)[0])
    assert seen == [3] * 6


@pytest.mark.parametrize(
    "wishes",
    slow_but(
        lambda wishes: "resident_blocks" in wishes or wishes in (
            {"forward": "diffusers"}, {"offload": "sequential"}
        ),
        [
            {"forward": "lean"}, {"forward": "diffusers"}, {"offload": "model"},
            {"offload": "sequential"}, {"offload": "stream", "resident_blocks": 2},
            {"offload": "stream", "forward": "diffusers"},
        ],
    ),
    ids=lambda wishes: "-".join(map(str, wishes.values())),
)  # fmt: skip
def test_every_placement_and_forward_gives_the_same_bits(
    folders: dict[str, Path], wishes: dict[str, Any]
) -> None:
    family = VACE_FAMILIES[1]
    expected = diffusers(family, 1, [1.0, 0.4], True, output_type="latent").frames[:, :, 1:]
    found = control(strength=[1.0, 0.4], reference=as_tensor(REFERENCES[:1]))
    result = made(opened(folders[family], **wishes), control=found)
    assert torch.equal(result.latents, expected)
    assert not [text for text in result.warnings if "More memory" in text]


def test_references_of_several_sizes(folders: dict[str, Path]) -> None:
    """As diffusers takes a list of pictures; of one size a list is a batch."""
    family = VACE_FAMILIES[0]
    several = [pixels(40, 24, 3, seed=2), pixels(16, 56, 3, seed=3)]
    parts = components(family)
    parts["scheduler"] = make_scheduler("unipc", 3.0)
    pipe = pipeline(family, parts)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        **SIZE, **TEXT, guidance_scale=4.0, output_type="latent",
        reference_images=[Image.fromarray(one) for one in several],
        generator=torch.Generator().manual_seed(7),
    ).frames[:, :, 2:]  # fmt: skip
    wrapper = opened(folders[family])
    given = WanControl(reference=[as_tensor(one) for one in several])
    assert torch.equal(made(wrapper, control=given).latents, latents)
    batch = WanControl(reference=as_tensor(REFERENCES[:2]))
    one_by_one = WanControl(reference=list(as_tensor(REFERENCES[:2])))
    found = made(wrapper, control=one_by_one).latents
    assert torch.equal(found, made(wrapper, control=batch).latents)


def test_a_batch_is_as_many_clips(folders: dict[str, Path]) -> None:
    wrapper = opened(folders[VACE_FAMILIES[0]])
    two = made(wrapper, control=control(), batch_size=2).latents
    one = made(wrapper, control=control(), latents=_noise(2, 3)[1:]).latents
    assert torch.allclose(two[1], one[0], atol=1e-5)


def _noise(batch: int, frames: int) -> torch.Tensor:
    shape = (batch, 16, frames, HEIGHT // 8, WIDTH // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_given_latents_have_the_references_in_front(folders: dict[str, Path]) -> None:
    wrapper = opened(folders[VACE_FAMILIES[0]])
    found = control(reference=as_tensor(REFERENCES[:2]))
    expected = made(wrapper, control=found).latents
    assert torch.equal(made(wrapper, control=found, latents=_noise(1, 5)).latents, expected)
    with pytest.raises(InvalidRequest, match=r"latents have shape .* this job needs .*16, 5, 4, 6"):
        made(wrapper, control=found, latents=_noise(1, 3))


# -- key frames --------------------------------------------------------------------------------


def test_key_frames_start_and_end_equal_a_hand_made_video_and_mask(
    folders: dict[str, Path],
) -> None:
    wrapper = opened(folders[VACE_FAMILIES[0]])
    video, mask = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.5), torch.ones(FRAMES, HEIGHT, WIDTH)
    for at in (0, 3, FRAMES - 1):
        video[at], mask[at] = as_tensor(VIDEO[at]), 0
    expected = made(wrapper, control=WanControl(video=video, mask=mask)).latents
    keys = as_tensor(VIDEO[[0, 3, FRAMES - 1]])
    found = made(wrapper, control=WanControl(keyframes=keys, positions="0, 3, -1")).latents
    assert torch.equal(found, expected)
    first, last = Image.fromarray(VIDEO[0]), Image.fromarray(VIDEO[-1])
    found = made(
        wrapper, control=WanControl(keyframes=keys[1:2], positions=[3]), image=first,
        last_image=last,
    )  # fmt: skip
    assert torch.equal(found.latents, expected)
    video[3], mask[3] = 0.5, 1
    expected = made(wrapper, control=WanControl(video=video, mask=mask)).latents
    assert torch.equal(made(wrapper, image=first, last_image=last).latents, expected)
    video[0], mask[0] = 0.5, 1
    expected = made(wrapper, control=WanControl(video=video, mask=mask)).latents
    assert torch.equal(made(wrapper, last_image=last).latents, expected)


# -- long clips --------------------------------------------------------------------------------


def longer(frames: int) -> WanControl:
    return WanControl(
        video=as_tensor(pixels(frames, HEIGHT, WIDTH, 3)),
        mask=as_tensor(pixels(frames, HEIGHT, WIDTH, seed=1)),
        reference=as_tensor(REFERENCES[:2]),
    )


def test_a_window_that_covers_the_clip_equals_the_whole(folders: dict[str, Path]) -> None:
    wrapper = opened(folders[VACE_FAMILIES[1]])
    job: dict[str, Any] = {"num_frames": 17, "control": longer(17)}
    whole = made(wrapper, **job).latents
    covered = made(wrapper, **job, max_chunk_size=17, force_chunked_processing=True).latents
    assert torch.equal(covered, whole)


@pytest.mark.parametrize("mode", [pytest.param("windows", marks=pytest.mark.slow), "continuation"])
def test_a_long_clip_goes_on_after_an_interrupt(
    folders: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    wrapper = opened(folders[VACE_FAMILIES[1]])
    job: dict[str, Any] = {
        "num_frames": 29, "control": longer(29), "max_chunk_size": 17, "window_overlap": 8,
        "window_mode": mode, "resume": "auto", "journal_folder": tmp_path,
    }  # fmt: skip
    whole = made(wrapper, **job)
    assert whole.latents.shape[2] == 8 and bool(torch.isfinite(whole.latents).all())
    assert whole.frames.shape[0] == 29

    calls: list[int] = []

    def stop(done: int, total: int, latents: torch.Tensor) -> None:
        calls.append(done)
        if done == 2 + 3 * (mode == "continuation"):  # in the second segment
            raise Crash

    with pytest.raises(Crash):
        made(wrapper, **job, progress_callback=stop)
    again = made(wrapper, **job)
    assert "resumed" in again.metadata
    assert torch.equal(again.latents, whole.latents)
    # Another control is another render.
    other = made(wrapper, **(job | {"control": longer(33), "num_frames": 29}))
    assert "resumed" not in other.metadata


def test_continuation_begins_with_the_latents_it_is_given(folders: dict[str, Path]) -> None:
    wrapper = opened(folders[VACE_FAMILIES[0]])
    before = made(wrapper, control=control()).latents
    result = made(
        wrapper, num_frames=25, window_mode="continuation", continue_from=before,
        max_chunk_size=17, window_overlap=4, control=longer(25),
    )  # fmt: skip
    assert torch.equal(result.latents[:, :, :2], before[:, :, :2])
    assert result.latents.shape[2] == 7


# -- around it ---------------------------------------------------------------------------------


def test_the_estimate_has_the_control_and_counts_references(folders: dict[str, Path]) -> None:
    wrapper = opened(folders[VACE_FAMILIES[1]])
    job = GenerationConfig(**SIZE, prompt="x", control=control())
    stages = {one.name: one for one in wrapper.estimate_memory_usage(job).stages}
    assert list(stages)[:4] == ["text_encode", "control_encode", "denoise_high", "denoise_low"]
    found = control(reference=as_tensor(REFERENCES))
    more = wrapper.estimate_memory_usage(GenerationConfig(**SIZE, prompt="x", control=found))
    after = {one.name: one for one in more.stages}
    assert after["denoise_low"].activation_bytes > stages["denoise_low"].activation_bytes
    result = made(wrapper, control=found)
    assert {"control_encode", "denoise_high", "denoise_low"} <= {one.name for one in result.stages}


def test_grey_is_encoded_once_for_a_size(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan_core.render import vace as module

    calls: list[int] = []
    original = module.encode_grey
    monkeypatch.setattr(
        module, "encode_grey", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    wrapper = opened(folders[VACE_FAMILIES[0]])
    first = made(wrapper).latents
    assert torch.equal(made(wrapper).latents, first)
    made(wrapper, num_frames=5)
    assert len(calls) == 2


def test_a_pipeline_of_diffusers_is_built_for_it(folders: dict[str, Path]) -> None:
    pipe = PipelineManager().load_custom_pipeline(folders[VACE_FAMILIES[1]])
    assert type(pipe).__name__ == "WanVACEPipeline" and pipe.config.boundary_ratio == 0.875


def test_vace_s_own_settings() -> None:
    for name in ("wan2.1-vace-1.3b", "wan2.1-vace-14b", "wan2.2-vace-fun-a14b"):
        assert VARIANTS[name].supported
