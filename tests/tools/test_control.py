"""Lessons for VACE are encoded as wan_core does it, and the judge tells who disobeys a control."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import slow_but

from tools import (
    clips,
    control_clips,
    control_models,
    export_control,
    judge_control,
    train_control,
)
from tools import demo_models as models
from tools.control_clips import KINDS, KINDS_WITH_REFERENCE
from tools.train_demo import Way, lay_out

DEMO = Path(__file__).parents[2] / "wan_core" / "demo_model" / "t2v"
EVERY = [*KINDS, *KINDS_WITH_REFERENCE]


def lessons(kind: str, count: int = 6, seed: int = 5) -> control_clips.Lessons:
    return control_clips.draw_lessons(
        count, {kind: 1.0}, "cpu", torch.Generator().manual_seed(seed)
    )


def clip_of(some: control_clips.Lessons, index: int) -> torch.Tensor:
    return some.clip[index].permute(1, 2, 3, 0)


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(DEMO / "vae").float()


@pytest.mark.parametrize("kind", EVERY)
def test_a_lesson_s_own_clip_obeys(kind: str) -> None:
    some = lessons(kind, 8)
    for index in range(8):
        verdict = judge_control.judge_clip(judge_control.asked(some, index), clip_of(some, index))
        assert verdict.obeys(), verdict


@pytest.mark.parametrize("kind", ["inpaint", "outpaint", "reference inpaint"])
def test_a_change_of_what_is_kept_is_noticed(kind: str) -> None:
    some = lessons(kind)
    for index in range(6):
        kept = some.mask[index] <= 0.5
        if float(kept.float().mean()) < 0.05:
            continue
        shifted = clip_of(some, index).roll((3, 3), (1, 2)) + 0.05
        changed = torch.where(kept[..., None], shifted, clip_of(some, index))
        verdict = judge_control.judge_clip(judge_control.asked(some, index), changed)
        assert verdict.kept is not None and verdict.kept < judge_control.KEPT_DB + 3
        assert verdict.filled
        moved = torch.where(kept[..., None], 1 - clip_of(some, index), clip_of(some, index))
        assert not judge_control.judge_clip(judge_control.asked(some, index), moved).obeys()


@pytest.mark.parametrize("kind", ["inpaint", "outpaint", "reference inpaint", "frames"])
def test_an_area_left_grey_is_not_filled(kind: str) -> None:
    some = lessons(kind)
    for index in range(6):
        grey = some.video[index].permute(1, 2, 3, 0)
        verdict = judge_control.judge_clip(judge_control.asked(some, index), grey)
        assert verdict.filled is False
        assert verdict.kept is not None and verdict.kept > 90  # what was kept is not blamed


@pytest.mark.parametrize("kind", ["dot", "edges", "reference dot"])
def test_a_shape_on_another_way_does_not_follow(kind: str) -> None:
    some = lessons(kind, 8)
    for index in range(8):
        asked = judge_control.asked(some, index)
        clip = clip_of(some, index)
        for other in (
            clip.roll((6, 0), (1, 2)),
            clip.roll((0, -6), (1, 2)),
            clip[:1].expand_as(clip),
        ):
            verdict = judge_control.judge_clip(asked, other)
            still = float((some.centre[index] - some.centre[index, :1]).norm(dim=1).mean())
            if other.stride(0) == 0 and still <= judge_control.ON_WAY:
                continue
            assert verdict.off is not None and verdict.off > judge_control.ON_WAY
            assert verdict.colour and verdict.shape
            assert not verdict.obeys()


def test_a_clip_without_a_shape_is_far_off_the_way() -> None:
    some = lessons("dot", 1)
    verdict = judge_control.judge_clip(judge_control.asked(some, 0), torch.zeros(17, 64, 64, 3))
    assert verdict.off is not None and verdict.off > 40


@pytest.mark.parametrize("kind", list(KINDS_WITH_REFERENCE))
def test_another_colour_than_the_reference_s_is_noticed(kind: str) -> None:
    some = lessons(kind)
    for index in range(6):
        colour, shape, direction, background = clips.grid()[int(some.cell[index])]
        assert colour not in control_clips.sentences()[int(some.row[index])].split()
        other = "blue" if colour != "blue" else "red"
        scene = clips.scene_of(other, shape, direction, background)
        painted = clips.render(scene, clips.FRAMES, some.centre[index : index + 1])[0]
        verdict = judge_control.judge_clip(
            judge_control.asked(some, index), painted.permute(1, 2, 3, 0)
        )
        assert not verdict.colour
        assert not verdict.obeys()


def test_a_score_counts_only_what_was_asked() -> None:
    score = judge_control.Score("dot")
    some = lessons("dot", 4)
    for index in range(4):
        frames = clip_of(some, index)
        score.add(judge_control.asked(some, index), frames if index else frames.roll(9, 1))
    assert score.share("obeys") == score.share("way") == 0.75
    assert score.share("colour") == 1.0
    assert score.share("kept") is None and score.share("filled") is None
    assert score.row().startswith("| dot | 4 | 75 | 100 |")
    assert score.row().count("|") == judge_control.HEAD.splitlines()[0].count("|")


@pytest.mark.parametrize(
    "kind",
    slow_but(
        {"edges", "reference inpaint"}.__contains__,
        ["inpaint", "edges", "frames", "reference inpaint"],
    ),
)
def test_a_lesson_is_encoded_as_a_render_encodes_it(vae: Any, kind: str) -> None:
    from wan_core.sampling.vace import ControlClip, encode_grey, encode_vace

    some = lessons(kind, 2)
    short: Any = models.frame_by_frame(
        train_control.AutoencoderKLWan.from_pretrained(DEMO / "vae").float()
    )
    lay_out(short, Way("fp32", channels_last=True, flat=True))
    shape = (1, -1, 1, 1, 1)
    run: Any = SimpleNamespace(
        vae=short,
        sort=control_models.Vace,
        mean=torch.tensor(vae.config.latents_mean).view(shape),
        std=torch.tensor(vae.config.latents_std).view(shape),
    )
    referenced = kind in KINDS_WITH_REFERENCE
    made, control = train_control.encode_lessons(run, some)
    assert made.shape == (2, 16, 5 + referenced, 8, 8)
    with torch.no_grad():
        for index in range(2):
            clip = ControlClip(
                num_frames=clips.FRAMES, width=clips.SIZE, height=clips.SIZE,
                video=some.video[index].permute(1, 2, 3, 0), mask=some.mask[index],
                references=[some.reference[index].permute(1, 2, 0)] if referenced else [],
            )  # fmt: skip
            grey = encode_grey(vae, clip, check=lambda: None)
            wanted = encode_vace(vae, clip, check=lambda: None, grey=lambda g=grey: g)  # type: ignore[misc]
            assert control[index : index + 1].shape == wanted.shape
            assert (control[index].float() - wanted[0]).abs().max() < 0.01  # half precision


def test_an_untrained_module_changes_nothing_and_only_it_is_trained() -> None:
    from diffusers import WanTransformer3DModel

    expert: Any = WanTransformer3DModel.from_pretrained(DEMO / "transformer").float().eval()
    model: Any = control_models.Vace.build(expert).eval()
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *models.LATENT_SHAPE, generator=g)
    control = torch.randn(1, 96, *models.LATENT_SHAPE[1:], generator=g)
    text, when = torch.randn(1, 8, 96, generator=g), torch.tensor([700.0])
    wanted = expert(latents, when, text).sample
    got = model(latents, when, text, control_hidden_states=control).sample
    assert torch.equal(got, wanted)
    got.square().mean().backward()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(name.startswith("vace_") for name in trained)
    assert model.vace_blocks[0].proj_out.weight.grad.abs().max() > 0
    parts = control_models.Vace.parts(model)
    held = {f"{p}{k}" for p, module in parts.items() for k in module.state_dict()}
    assert held == {name for name in model.state_dict() if name.startswith("vace_")}


def test_known_frames_are_told_as_the_image_to_video_models_are() -> None:
    from wan_core.sampling.encode import keyframe_mask

    some = lessons("frames", 12)
    made = control_models.known_channels(1 - some.mask)
    for index in range(12):
        known = (some.mask[index].amax((1, 2)) < 0.5).nonzero().flatten().tolist()
        wanted = keyframe_mask(dict.fromkeys(known), clips.FRAMES, 8, 8)
        assert torch.equal(made[index : index + 1], wanted)


def test_an_untrained_fun_model_reads_its_reference_alone() -> None:
    """Its new channels have zero weights; the reference's tokens stand in front of the clip's."""
    from diffusers import WanTransformer3DModel

    expert: Any = WanTransformer3DModel.from_pretrained(DEMO / "transformer").float().eval()
    torch.manual_seed(0)
    model: Any = control_models.Fun.build(expert).eval()
    g = torch.Generator().manual_seed(1)
    noisy = torch.randn(1, *models.LATENT_SHAPE, generator=g)
    control = torch.randn(1, 36, 6, 8, 8, generator=g)
    text, when = torch.randn(1, 8, 96, generator=g), torch.tensor([700.0])
    with torch.no_grad():
        first = control_models.Fun.call(model, noisy, control, when, text)
        control[:, 16:] = 0
        control[:, :, 1:] = 0
        same = control_models.Fun.call(model, noisy, control, when, text)
        control[:, :16, 0] += 1
        other = control_models.Fun.call(model, noisy, control, when, text)
        model.ref_conv.weight.zero_()
        model.ref_conv.bias.copy_(expert.patch_embedding.bias)
        plain = torch.cat([torch.zeros(1, 16, 1, 8, 8), noisy], 2)
        wanted = expert(plain, when, text).sample[:, :, 1:]
        blank = control_models.Fun.call(model, noisy, control, when, text)
    assert first.shape == noisy.shape
    assert torch.equal(first, same)
    assert (other - same).abs().max() > 1e-4
    assert (blank - wanted).abs().max() < 2e-5
    assert not model.patch_embedding._forward_hooks


def test_a_fun_model_is_trained_as_it_is_run() -> None:
    from diffusers import WanTransformer3DModel

    from wan_core.forward import fun_inputs

    expert: Any = WanTransformer3DModel.from_pretrained(DEMO / "transformer").float().eval()
    torch.manual_seed(0)
    model: Any = control_models.Fun.build(expert).eval()
    g = torch.Generator().manual_seed(1)
    model.patch_embedding.weight.data[:, 16:].normal_(generator=g)
    noisy = torch.randn(1, *models.LATENT_SHAPE, generator=g)
    control = torch.randn(1, 36, 6, 8, 8, generator=g)
    text, when = torch.randn(1, 8, 96, generator=g), torch.tensor([700.0])
    whole = torch.nn.functional.pad(torch.cat([noisy, control[:, :, 1:]], 1), (0, 0, 0, 0, 1, 0))
    with torch.no_grad(), fun_inputs(model, control[:, :16, 0]):
        wanted = model(whole, when, text).sample[:, :, 1:]
    with torch.no_grad():
        assert torch.equal(control_models.Fun.call(model, noisy, control, when, text), wanted)


@pytest.mark.parametrize(
    "sort, variant", [("vace", "wanfit-demo-vace"), ("fun", "wanfit-demo-control")]
)
def test_what_was_trained_is_recognised_beside_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sort: str, variant: str
) -> None:
    from diffusers import WanTransformer3DModel

    from wan_core import ArchitectureDetector, config

    out = tmp_path / "wan_core" / "demo_model"
    shutil.copytree(DEMO, out / "t2v")
    for level, folder in export_control.FOLDERS.items():
        expert: Any = WanTransformer3DModel.from_pretrained(DEMO / folder)
        model = control_models.SORTS[sort].build(expert)
        parts = control_models.SORTS[sort].parts(model)
        train_control.write_parts(parts, tmp_path / f"{sort}_{level}.safetensors")
    assert len(export_control.export(tmp_path, out)) == 2
    monkeypatch.setattr(config, "__file__", str(out.parent / "config.py"))
    source = config.demo_model(sort)
    found = ArchitectureDetector().detect_model_architecture(source)
    assert found.variant.name == variant
    assert found.transformer == found.variant.transformer
    assert not found.warnings


@pytest.mark.slow
@pytest.mark.parametrize("sort", control_models.SORTS)
def test_the_recipe_trains_goes_on_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sort: str
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        f"train_control --sort {sort} --work {tmp_path} --device cpu --steps 2 --lessons 12 "
        "--batch 4 --judge 1".split(),
    )
    train_control.main()
    log = (tmp_path / "control_training.log").read_text()
    assert f"{sort}_low: finished after 2 steps" in log
    for kinds in control_models.SORTS[sort].kinds:
        for kind in kinds:
            assert f"| {kind} | 1 |" in log
            assert (tmp_path / f"{sort}_{kind.replace(' ', '_')}.png").is_file()


def test_lessons_can_be_drawn_again() -> None:
    first, second = lessons("reference dot", 3), lessons("reference dot", 3)
    for name in ("clip", "video", "mask", "reference", "centre", "row"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.video, lessons("reference dot", 3, seed=6).video)


def test_curves_stay_in_view_and_bend() -> None:
    some = lessons("dot", 40)
    edge = (some.centre - clips.SIZE / 2).abs().amax((1, 2))
    bent = (some.centre[:, 0] - 2 * some.centre[:, 8] + some.centre[:, 16]).norm(dim=1) > 1
    assert bent.float().mean() > 0.3
    assert float(edge[bent].max()) <= clips.SIZE / 2 - 9
