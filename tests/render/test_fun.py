"""The Fun models: the bits of a forward and a loop written after VideoX-Fun's formulas."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.cases import slow_but
from support.clips import as_tensor, pixels
from support.crashes import Crash
from support.tiny_models import FUN_FAMILIES, components, open_kept
from torch import Tensor, nn

from wan_core import GenerationConfig, PipelineManager, WanControl
from wan_core.errors import MissingFile, UnsupportedModel
from wan_core.forward import fun_inputs, lean_forward, run_together
from wan_core.job import make_scheduler
from wan_core.sampling import encode_clip, encode_text

FRAMES, WIDTH, HEIGHT, STEPS = 9, 64, 64, 3
SIZE: dict[str, Any] = {
    "num_frames": FRAMES, "width": WIDTH, "height": HEIGHT, "num_inference_steps": STEPS,
}  # fmt: skip
TEXT = {"prompt": "a red cat moves right", "negative_prompt": "a dog"}
CONTROL = [name for name in FUN_FAMILIES if "control" in name]


VIDEO, REFERENCE = pixels(FRAMES, HEIGHT, WIDTH, 3), pixels(1, HEIGHT, WIDTH, 3, seed=2)
START, END = pixels(HEIGHT, WIDTH, 3, seed=1), pixels(HEIGHT, WIDTH, 3, seed=3)
RAYS = torch.randn(1, 24, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4))


pytestmark = pytest.mark.usefixtures("without_gradients", "nothing_kept")


# -- by hand --------------------------------------------------------------------------------------


def by_formula(
    model: Any, x: Tensor, t: Tensor, text: Tensor, *, clip: Tensor | None = None,
    reference: Tensor | None = None, camera: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``WanTransformer3DModel.forward`` of VideoX-Fun with diffusers' layers and blocks."""
    batch, channels, frames, height, width = x.shape
    tokens = model.patch_embedding(x)
    if camera is not None:
        adapter = model.control_adapter
        flat = camera.permute(0, 2, 1, 3, 4).contiguous().view(-1, 24, *camera.shape[3:])
        found = adapter.conv(nn.PixelUnshuffle(8)(flat))
        block = adapter.residual_blocks[0]
        found = block.conv2(torch.relu(block.conv1(found))) + found
        found = found.view(1, frames, *found.shape[1:]).permute(0, 2, 1, 3, 4)
        tokens = tokens + found
    tokens = tokens.flatten(2).transpose(1, 2)
    first = 0
    if reference is not None:
        full_ref = model.ref_conv(reference).flatten(2).transpose(1, 2)
        first = full_ref.shape[1]
        tokens = torch.cat([full_ref.expand(batch, -1, -1), tokens], dim=1)
        if t.dim() != 1:
            t = torch.cat([t[:, -1].unsqueeze(1).repeat(1, first), t], dim=1)
    rotary = model.rope(x.new_zeros(batch, channels, frames + (first > 0), height, width))
    many = t.shape[1] if t.dim() == 2 else None
    temb, parts, text, image = model.condition_embedder(
        t.flatten() if many else t, text, clip, timestep_seq_len=many
    )
    parts = parts.unflatten(2 if many else 1, (6, -1))
    context = text if image is None else torch.cat([image, text], dim=1)
    for block in model.blocks:
        tokens = block(tokens, context, parts, rotary)
    if many:
        table = model.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)
        shift, scale = (one.squeeze(2) for one in table.chunk(2, dim=2))
    else:
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    tokens = (model.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
    out = model.proj_out(tokens)[:, first:]
    out = out.reshape(batch, frames, height // 2, width // 2, 1, 2, 2, -1)
    out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def encoded(vae: Any, frames: Tensor) -> Tensor:
    """(F, H, W, 3), -1..1, to normalised latents: the mode of the encode of the whole."""
    found = vae.encode(frames.permute(3, 0, 1, 2)[None]).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (found - mean) * (1.0 / std)


def known_frames(vae: Any, given: dict[int, np.ndarray[Any, Any]], like: Tensor) -> list[Tensor]:
    """The mask, repeated for the first frame and folded by four, and the masked clip's latents."""
    if not given:
        return [like.new_zeros(1, 4, *like.shape[2:]), torch.zeros_like(like)]
    clip, made = torch.zeros(FRAMES, HEIGHT, WIDTH, 3), torch.ones(FRAMES, 1, 1)
    for at, picture in given.items():
        clip[at], made[at] = as_tensor(picture) * 2 - 1, 0
    folded = torch.cat([made[:1].repeat(4, 1, 1), made[1:]]).view(-1, 4, 1, 1).transpose(0, 1)
    return [(1 - folded)[None].expand(1, 4, *like.shape[2:]), encoded(vae, clip)]


def by_hand(
    family: str, parts: dict[str, Any], *, video: bool = False, start: bool = False,
    end: bool = False, reference: bool = False, camera: bool = False,
) -> Tensor:  # fmt: skip
    """VideoX-Fun's pipelines: conditions, experts, guidance, held frame, UniPC."""
    vae, (z, more, has_reference, _, has_clip) = parts["vae"], FUN_FAMILIES[family]
    scale = 16 if z == 48 else 8
    like = torch.zeros(1, z, 3, HEIGHT // scale, WIDTH // scale)
    rest = [encoded(vae, as_tensor(VIDEO) * 2 - 1) if video else torch.zeros_like(like)]
    if more < 2 * z:
        rest = []
    given = ({0: START} if start else {}) | ({FRAMES - 1: END} if end else {})
    first = None
    if more % z:
        rest += known_frames(vae, given, like)
        first = rest[-1] if z == 48 and start else None
    else:
        slot = torch.zeros_like(like)
        if start:
            slot[:, :, :1] = encoded(vae, (as_tensor(START) * 2 - 1)[None])
        rest.append(slot)
    inputs: dict[str, Any] = {}
    if has_reference:
        seen = encoded(vae, as_tensor(REFERENCE) * 2 - 1) if reference else like
        inputs["reference"] = seen[:, :, 0]
    if camera:
        inputs["camera"] = RAYS
    if has_clip:
        inputs["clip"] = torch.zeros(1, 257, 16)
        if reference or start:
            seen_picture = Image.fromarray(REFERENCE[0] if reference else START)
            inputs["clip"] = encode_clip(
                parts["image_encoder"], parts["image_processor"], [seen_picture],
                torch.device("cpu"),
            )  # fmt: skip
    texts = [
        encode_text(parts["text_encoder"], parts["tokenizer"], TEXT[name], torch.device("cpu"))
        for name in ("prompt", "negative_prompt")
    ]
    scheduler = make_scheduler("unipc", 5.0)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(like.shape, generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(like[:, :1])
    if first is not None:
        mask[:, :, 0] = 0
        latents = (1 - mask) * first + mask * latents
    for t in scheduler.timesteps:
        high = "a14b" not in family or t >= 900
        model = parts["transformer" if high else "transformer_2"]
        time = t.expand(1)
        if first is not None:
            time = (mask[0][0][:, ::2, ::2] * t).flatten().unsqueeze(0)
        x = torch.cat([latents, *rest], dim=1)
        yes, no = (by_formula(model, x, time, text, **inputs) for text in texts)
        guided = no + (4.0 if high else 3.0) * (yes - no)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        if first is not None:
            latents = (1 - mask) * first + mask * latents
    return latents


# -- ours -----------------------------------------------------------------------------------------


opened = functools.partial(open_kept, offload="none")


def made(
    wrapper: Any, *, video: bool = False, start: bool = False, end: bool = False,
    reference: bool = False, camera: bool = False, **more: Any,
) -> Any:  # fmt: skip
    job = SIZE | TEXT | {"seed": 7, "guidance_scale": 4.0, "guidance_scale_2": 3.0}
    job |= {"flow_shift": 5.0, "boundary": 0.9} | more
    if not wrapper.architecture.two_experts:
        del job["guidance_scale_2"], job["boundary"]
    if video or reference or camera:
        job["control"] = WanControl(
            video=as_tensor(VIDEO) if video else None,
            reference=as_tensor(REFERENCE) if reference else None,
            camera=RAYS if camera else None,
        )
    job |= {"image": Image.fromarray(START)} if start else {}
    job |= {"last_image": Image.fromarray(END)} if end else {}
    return wrapper.generate(GenerationConfig(**job)).raise_for_error()


CASES: list[tuple[str, dict[str, bool]]] = [
    ("wan2.1-fun-control-v1.0", {"video": True, "start": True}),
    ("wan2.1-fun-control", {"video": True, "start": True, "reference": True}),
    ("wan2.1-fun-control", {"video": True}),
    ("wan2.2-fun-control-a14b", {"video": True, "reference": True}),
    ("wan2.2-fun-control-a14b", {"video": True, "start": True, "end": True}),
    ("wan2.2-fun-control-a14b", {"end": True}),
    ("wan2.2-fun-control-a14b", {}),
    ("wan2.2-fun-control-5b", {"video": True, "start": True, "reference": True}),
    ("wan2.2-fun-control-5b", {"video": True}),
    ("wan2.2-fun-inp-5b", {"start": True}),
    ("wan2.2-fun-inp-5b", {"start": True, "end": True}),
    ("wan2.1-fun-camera", {"start": True, "camera": True}),
    ("wan2.1-fun-camera", {"camera": True}),
    ("wan2.2-fun-camera-a14b", {"start": True, "camera": True}),
    ("wan2.2-fun-camera-a14b", {"end": True}),
]


@functools.cache
def _expected(index: int) -> Tensor:
    family, given = CASES[index]
    return by_hand(family, components(family), **given)


def expected(case: tuple[str, dict[str, bool]]) -> Tensor:
    return _expected(CASES.index(case))


def name_of(case: tuple[str, dict[str, bool]]) -> str:
    return "-".join([case[0], *case[1]])


LIKE_OTHERS = [CASES[i] for i in (2, 5, 8, 9, 12, 13)]
"""Each wish of theirs is in another case of their family, or their family in another with it."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=[pytest.mark.slow] * (one in LIKE_OTHERS)) for one in CASES],
    ids=name_of,
)
def test_equals_the_formulas_bit_for_bit(folder: Any, case: tuple[str, dict[str, bool]]) -> None:
    family, given = case
    wrapper = opened(folder(family))
    wanted = family.removesuffix("-v1.0")
    assert wrapper.architecture.name.startswith(wanted)
    result = made(wrapper, **given)
    assert torch.equal(result.latents, expected(case))


FORWARDS = ("wan2.1-fun-control", "wan2.2-fun-control-5b", "wan2.2-fun-camera-a14b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FORWARDS)
def test_the_forward_is_that_of_the_formula(family: str, dtype: torch.dtype) -> None:
    """Whatever forward the model has, for a batch of two; and nothing is left afterwards."""
    z, more, has_reference, has_camera, has_clip = FUN_FAMILIES[family]
    model = copy.deepcopy(components(family)["transformer"]).to(dtype)
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    x, texts = draw(2, z + more, 3, 4, 8), [draw(2, 512, 32), draw(2, 512, 32)]
    given: dict[str, Any] = {
        "reference": draw(1, has_reference, 4, 8) if has_reference else None,
        "camera": draw(1, 24, 3, 32, 64) if has_camera else None,
    }
    clip = draw(2, 257, 16) if has_clip else None
    t = torch.tensor([777.7, 777.7])
    if z == 48:
        t = torch.cat([torch.zeros(2, 8), torch.full((2, 16), 777.7)], dim=1)
    expected = [by_formula(model, x, t, text, clip=clip, **given) for text in texts]
    padded, first = x, int(has_reference > 0)
    if first:
        padded = torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2)
        t = torch.cat([t[:, -1:].repeat(1, 8), t], dim=1) if t.dim() == 2 else t
    calls: list[dict[str, Any]] = [
        {"hidden_states": padded, "timestep": t, "encoder_hidden_states": text,
         "encoder_hidden_states_image": clip, "return_dict": False}
        for text in texts
    ]  # fmt: skip

    def outputs() -> list[Tensor]:
        return [model(**call)[0][:, :, first:] for call in calls]

    plain = outputs()
    with fun_inputs(model, **given):
        assert all(map(torch.equal, outputs(), expected))
        with lean_forward(model, rows=7) as reason:
            assert reason is None
            assert all(map(torch.equal, outputs(), expected))
            together = [out[:, :, first:] for (out,) in run_together(model, calls)]
            assert all(map(torch.equal, together, expected))
    assert not any(map(torch.equal, plain, expected))
    assert all(map(torch.equal, outputs(), plain))


def test_another_thread_sees_nothing_of_it() -> None:
    import threading

    family = "wan2.2-fun-camera-a14b"
    model = components(family)["transformer"]
    x = torch.randn(1, 36, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    call = {"hidden_states": x, "timestep": torch.tensor([5.0]), "return_dict": False}
    call["encoder_hidden_states"] = torch.zeros(1, 512, 32)
    plain, found = model(**call)[0], []

    def other() -> None:
        with torch.no_grad():
            found.append(model(**call)[0])

    with fun_inputs(model, camera=RAYS[..., :32, :]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert not torch.equal(model(**call)[0], plain)
    assert torch.equal(found[0], plain)


# -- the whole product ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wishes",
    [
        {"forward": "diffusers"}, {"offload": "sequential"},
        {"offload": "stream", "resident_blocks": 1}, {"offload": "stream", "forward": "diffusers"},
    ],
    ids=lambda wishes: "-".join(map(str, wishes.values())),
)  # fmt: skip
@pytest.mark.parametrize(
    "case", [CASES[7], pytest.param(CASES[13], marks=pytest.mark.slow)], ids=name_of
)
def test_every_placement_and_forward_gives_the_same_bits(
    folder: Any, case: tuple[str, dict[str, bool]], wishes: dict[str, Any]
) -> None:
    family, given = case
    result = made(opened(folder(family), **wishes), **given)
    assert torch.equal(result.latents, expected(case))
    assert not [text for text in result.warnings if "More memory" in text]


def longer(family: str, frames: int) -> dict[str, Any]:
    """A job of so many frames with all that a family reads."""
    given: dict[str, Any] = {}
    if FUN_FAMILIES[family][3]:
        size = (1, 24, (frames - 1) // 4 + 1, HEIGHT, WIDTH)
        given["camera"] = torch.randn(size, generator=torch.Generator().manual_seed(4))
    elif "control" in family:
        given["video"] = as_tensor(pixels(frames, HEIGHT, WIDTH, 3))
    if FUN_FAMILIES[family][2]:
        given["reference"] = as_tensor(REFERENCE)
    job: dict[str, Any] = {"num_frames": frames, "control": WanControl(**given), "start": True}
    return job


LONG = ("wan2.1-fun-control", "wan2.2-fun-control-5b", "wan2.2-fun-camera-a14b")


@pytest.mark.parametrize("family", LONG[1:])
def test_a_window_that_covers_the_clip_equals_the_whole(folder: Any, family: str) -> None:
    wrapper, job = opened(folder(family)), longer(family, 17)
    whole = made(wrapper, **job).latents
    covered = made(wrapper, **job, max_chunk_size=17, force_chunked_processing=True).latents
    assert torch.equal(covered, whole)


@pytest.mark.parametrize("family", slow_but(LONG[::2].__contains__, LONG))
def test_a_window_sees_its_own_frames_of_the_control(folder: Any, family: str) -> None:
    """What is beyond a window changes nothing in it: one step, no overlap, the second half new."""
    wrapper = opened(folder(family))
    job = longer(family, 29) | {
        "max_chunk_size": 13, "window_overlap": 0, "num_inference_steps": 1, "noise": "frame",
    }  # fmt: skip
    before = made(wrapper, **job).latents
    video, camera = job["control"].video, job["control"].camera
    if video is not None:
        video = torch.cat([video[:13], video[13:] * 0.5])
    if camera is not None:
        camera = torch.cat([camera[:, :, :4], camera[:, :, 4:] * 0.5], dim=2)
    job["control"] = replace(job["control"], video=video, camera=camera)
    after = made(wrapper, **job).latents
    assert torch.equal(after[:, :, :4], before[:, :, :4])
    assert not torch.equal(after[:, :, 4:], before[:, :, 4:])


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        (LONG[1], "continuation"), pytest.param(LONG[2], "windows", marks=pytest.mark.slow),
        pytest.param(LONG[0], "continuation", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_long_clip_goes_on_after_an_interrupt(
    folder: Any, tmp_path: Path, family: str, mode: str
) -> None:
    wrapper = opened(folder(family))
    job = longer(family, 29) | {
        "max_chunk_size": 17, "window_overlap": 8, "window_mode": mode, "resume": "auto",
        "journal_folder": tmp_path,
    }  # fmt: skip
    whole = made(wrapper, **job)
    assert whole.latents.shape[2] == 8 and bool(torch.isfinite(whole.latents).all())

    def stop(done: int, total: int, latents: Tensor) -> None:
        if done == 2 + 3 * (mode == "continuation"):  # in the second segment
            raise Crash

    with pytest.raises(Crash):
        made(wrapper, **job, progress_callback=stop)
    again = made(wrapper, **job)
    assert "resumed" in again.metadata
    assert torch.equal(again.latents, whole.latents)
    other = made(wrapper, **(job | {"control": longer(family, 33)["control"]}))
    assert "resumed" not in other.metadata  # another control is another render


@pytest.mark.parametrize("family", slow_but(LONG[:1].__contains__, LONG[:2]))
def test_continuation_begins_with_the_latents_it_is_given(folder: Any, family: str) -> None:
    wrapper = opened(folder(family))
    before = made(wrapper, **(longer(family, 9) | {"start": False})).latents
    result = made(
        wrapper, **(longer(family, 25) | {"start": False}), window_mode="continuation",
        continue_from=before, max_chunk_size=17, window_overlap=4,
    )  # fmt: skip
    assert torch.equal(result.latents[:, :, :2], before[:, :, :2])
    assert result.latents.shape[2] == 7


def test_a_segment_keeps_its_control_and_marks_what_it_takes_over() -> None:
    from wan_core.job import plan_segments
    from wan_core.sampling import ClipSegments, Conditions

    g = torch.Generator().manual_seed(1)
    for mask, held in ((4, False), (0, False), (4, True)):
        concat = torch.randn(1, 3 + mask + 3, 21, 4, 4, generator=g)
        segments = ClipSegments(
            plan=plan_segments(21, 0, 45, 12), noise=torch.zeros(1, 3, 21, 4, 4),
            conditions=Conditions(
                prompt_embeds=torch.zeros(1, 1, 1), concat=concat, mask_channels=mask, held=held
            ),
        )  # fmt: skip
        state = segments.begin(0, 0)
        state.latents = torch.ones_like(state.latents)
        segments.finish(state, segments.conditions_of(0))
        found = segments.conditions_of(1)
        expected = concat[:, :, 9:].clone()
        expected[:, 3 : 3 + mask, :3], expected[:, 3 + mask :, :3] = 1, 1.0
        assert found.concat is not None and torch.equal(found.concat, expected)
        assert (found.first_frame is not None) == held
        assert found.first_frame is None or found.first_frame.shape[2] == 3


@pytest.mark.parametrize("family", ["wan2.2-fun-control-a14b", "wan2.2-fun-inp-5b"])
def test_key_frames_are_start_and_end(folder: Any, family: str) -> None:
    wrapper = opened(folder(family))
    keys = as_tensor(np.stack([START, END]))
    found = made(wrapper, control=WanControl(keyframes=keys, positions="0, -1")).latents
    assert torch.equal(found, made(wrapper, start=True, end=True).latents)
    middle = made(wrapper, control=WanControl(keyframes=keys, positions="0, 4")).latents
    assert not torch.equal(middle, found)


def test_of_several_references_the_first_is_seen(folder: Any) -> None:
    wrapper = opened(folder("wan2.1-fun-control"))
    two = torch.cat([as_tensor(REFERENCE), as_tensor(START)[None]])
    found = made(wrapper, control=WanControl(reference=two))
    assert torch.equal(found.latents, made(wrapper, reference=True).latents)
    assert any("the first" in text for text in found.warnings)


def test_a_batch_is_as_many_clips(folder: Any) -> None:
    wrapper = opened(folder("wan2.2-fun-control-5b"))
    given = {"video": True, "start": True, "reference": True}
    noise = torch.randn(2, 48, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    two = made(wrapper, **given, batch_size=2).latents
    one = made(wrapper, **given, latents=noise[1:]).latents
    assert torch.allclose(two[1], one[0], atol=1e-5)


def test_without_a_picture_no_image_encoder_is_needed(folder: Any) -> None:
    wrapper = opened(folder("wan2.1-fun-control"))
    whole = made(wrapper, video=True).latents
    parts = dict(wrapper.architecture.components)
    del parts["image_encoder"]
    wrapper.architecture = replace(wrapper.architecture, components=parts)
    assert torch.equal(made(wrapper, video=True).latents, whole)
    for given in ({"start": True}, {"reference": True}):
        with pytest.raises(MissingFile, match="image encoder"):
            made(wrapper, **given)


def test_the_estimate_names_what_is_encoded(folder: Any) -> None:
    wrapper = opened(folder("wan2.1-fun-control"))
    control = WanControl(video=as_tensor(VIDEO), reference=as_tensor(REFERENCE))
    for given, wanted in (
        ({}, []), ({"control": control}, ["image_encode", "condition_encode", "control_encode"]),
        ({"image": Image.fromarray(START)}, ["image_encode", "condition_encode"]),
    ):  # fmt: skip
        job = GenerationConfig(**SIZE, prompt="x", **given)
        found = [one.name for one in wrapper.estimate_memory_usage(job).stages]
        assert [name for name in found if name.endswith("_encode")][1:] == wanted
        result = wrapper.generate(job).raise_for_error()
        assert set(wanted) <= {one.name for one in result.stages}


def test_no_pipeline_of_diffusers_is_built_for_it(folder: Any) -> None:
    with pytest.raises(UnsupportedModel, match="Fun Control"):
        PipelineManager().load_custom_pipeline(folder("wan2.2-fun-control-a14b"))
