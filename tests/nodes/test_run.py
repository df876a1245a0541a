"""What a run tells a node's user: the bar, the preview, and errors in the names of inputs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import pytest
import torch
from support import tiny_models
from support.as_pack import VALUES, part

CLIP = VALUES | {"width": 32, "height": 32, "num_frames": 33, "steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diffusers")
    tiny_models.make_folder(root / "t2v", "wan2.1-t2v")
    tiny_models.make_folder(root / "5b", "wan2.2-ti2v-5b", seed=2)
    return root


def open_wrapper(pack: ModuleType, folder: Path) -> Any:
    loader = part(pack, "wan_core").WanPipelineLoader()
    return loader.load_wan_pipeline(folder, optimization_config={"device": "cpu"})


def clip_config(pack: ModuleType, **given: Any) -> Any:
    """A clip of 9 latent frames as WanChunkedSampler asks for it, with windows of 5."""
    job = part(pack, "nodes.job")
    values = {**CLIP, **job.LONG_CLIP, "resume": "auto", **given}
    config = job.generation_config(values)
    job.use_windows(config, 17, 8)
    job.use_long_clip(config, values, None)
    config.resume = None
    return config


def listened(pack: ModuleType, wrapper: Any, config: Any) -> list[tuple[float, float, Any]]:
    """Everything that is shown; a caller runs the job or calls its callbacks."""
    shown: list[tuple[float, float, Any]] = []
    progress = part(pack, "nodes.progress").Progress(
        *wrapper.plan(config), config, lambda *told: shown.append(told)
    )
    progress.listen()
    return shown


def numbered(frames: int) -> torch.Tensor:
    """Latents whose every value is the number of their frame."""
    return torch.arange(frames, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(1, 16, -1, 4, 4)


def first_shown(shown: list[tuple[float, float, Any]]) -> float | None:
    latents = shown[-1][2]
    return None if latents is None else float(latents[0, 0, 0, 0, 0])


# -- the bar and the preview --------------------------------------------------------------------
def test_the_bar_moves_with_every_window_and_decoded_part(pack: ModuleType, models: Path) -> None:
    config = clip_config(pack)
    wrapper = open_wrapper(pack, models / "t2v")
    shown = listened(pack, wrapper, config)
    result = wrapper.generate(config).raise_for_error()
    assert result.metadata["windows"].startswith("3 windows")
    done = [told[0] for told in shown]
    total = shown[0][1]
    assert {told[1] for told in shown} == {total}
    assert done == sorted(done)
    assert done[:8] == [0, 0.33, 0.67, 1, 1, 1.33, 1.67, 2]
    assert len(done) == 8 + 9  # a part per latent frame
    assert done[-1] == total > done[8] > 2


def test_the_bar_shows_weights_that_take_long_to_read(
    pack: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = clip_config(pack)
    shown = listened(pack, open_wrapper(pack, models / "t2v"), config)
    now = 100.0
    monkeypatch.setattr(part(pack, "nodes.progress").time, "monotonic", lambda: now)
    config.load_callback("text_encoder", 0, 8)
    config.load_callback("text_encoder", 8, 8)
    assert shown == []  # at once
    config.preview_callback(1, 2, numbered(9))
    for seconds, done in ((0, 0), (0.3, 1), (0.6, 2), (0.9, 6), (1.2, 8)):
        now = 200 + seconds
        config.load_callback("transformer_2", done, 8)
    assert [told[:2] for told in shown] == [(1, 2.2), (0.25, 1), (0.75, 1), (1, 2.2)]


def test_the_preview_shows_the_window_that_is_made(pack: ModuleType, models: Path) -> None:
    config = clip_config(pack)
    shown = listened(pack, open_wrapper(pack, models / "t2v"), config)
    config.chunk_callback(0, 3)
    assert first_shown(shown) is None  # nothing was predicted yet
    config.preview_callback(1, 2, numbered(9))
    assert first_shown(shown) == 6  # the last of 0-4, 3-7 and 4-8, from its middle on
    for window, middle in enumerate((2, 5, 6)):
        config.chunk_callback(window, 3)
        assert first_shown(shown) == middle
        assert shown[-1][2].shape[2] == 3


def test_a_clip_in_one_piece_is_shown_from_its_first_frame(pack: ModuleType, models: Path) -> None:
    config = part(pack, "nodes.job").generation_config(CLIP)
    shown = listened(pack, open_wrapper(pack, models / "t2v"), config)
    config.preview_callback(1, 2, numbered(9))
    assert first_shown(shown) == 0
    assert shown[-1][2].shape[2] == 9


def test_the_preview_shows_what_is_new_in_a_segment(pack: ModuleType, models: Path) -> None:
    config = clip_config(pack, mode="continuation", num_frames=49)
    wrapper = open_wrapper(pack, models / "5b")
    shown = listened(pack, wrapper, config)
    for segment, new in enumerate((0, 2, 2, 3)):  # 13 frames: 0-4, 3-7, 6-10, 8-12
        config.chunk_callback(segment, 4)
        config.preview_callback(2 * segment + 1, 8, numbered(5))
        assert first_shown(shown) == new
    assert shown[-1][0] == 7 and shown[-1][1] == pytest.approx(8.8)
    given = torch.zeros(1, 48, 4, 2, 2)
    config = clip_config(pack, mode="continuation", num_frames=33)
    config.continue_from = given
    shown = listened(pack, wrapper, config)
    config.chunk_callback(0, 2)
    config.preview_callback(1, 4, numbered(5))
    assert first_shown(shown) == 2  # two of the four given frames are taken over


# -- errors -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image is missing; Wan makes", "start_image is missing; Wan makes"),
        ("last_image was given without image; give", "end_image was given without start_image;"),
        ("Load an image-to-video model, or leave the image out.", None),
        ("Add the umT5 file, or pass prompt_embeds.", "file, or pass positive."),
        ("Set max_chunk_size (81) to", "Set window_frames of WanChunkedSampler (81) to"),
        ("window_mode is 'x'; use window_mode 'windows'", "mode is 'x'; use mode 'windows'"),
        ("mode is 'x'; window_frames is 3; window_overlap is 0; start_image is bad", None),
    ],
)
def test_fields_are_said_as_inputs(pack: ModuleType, text: str, said: str | None) -> None:
    found = part(pack, "nodes.words").in_words_of_the_nodes(text)
    assert (said or text) in found
    assert said is not None or found == text


def test_every_name_that_is_translated_is_a_field(pack: ModuleType) -> None:
    known = {field.name for field in fields(part(pack, "wan_core.config").GenerationConfig)}
    assert part(pack, "nodes.words").INPUTS.keys() <= known


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"image": torch.zeros(8, 8, 3)}, "start_image", "start_image was given, but"),
        ({"window_mode": "continuation"}, "mode", "mode is 'continuation', but"),
        ({"max_chunk_size": 3}, "window_frames", "window_frames of WanChunkedSampler is 3"),
        ({"num_inference_steps": 2000}, "steps", "steps is 2000"),
    ],
)
def test_an_error_of_the_library_names_the_input(
    pack: ModuleType, models: Path, change: dict[str, Any], field: str, text: str
) -> None:
    config = clip_config(pack)
    for name, value in change.items():
        setattr(config, name, value)
    error = part(pack, "wan_core.errors").InvalidRequest
    with (
        pytest.raises(error) as raised,
        part(pack, "nodes.words").said_in_words_of_the_nodes(),
    ):
        open_wrapper(pack, models / "t2v").plan(config)
    assert raised.value.field == field
    assert str(raised.value).startswith(text)


# -- the mp4 ------------------------------------------------------------------------------------
def test_what_the_video_shall_be_reaches_the_job(pack: ModuleType) -> None:
    config = part(pack, "nodes.job").generation_config(VALUES)
    # A prompt that names no codec leaves it to the user's preference.
    assert (config.codec, config.crf, config.pix_fmt) == (None, 18, "yuv420p")
    assert config.audio is None
    sound = {"waveform": torch.rand(1, 2, 100), "sample_rate": 44100}
    asked = {"codec": "h265", "crf": 0, "pix_fmt": "yuv444p", "audio": sound}
    config = part(pack, "nodes.job").generation_config(VALUES | asked)
    assert (config.codec, config.crf, config.pix_fmt) == ("h265", 0, "yuv444p")
    assert torch.equal(config.audio[0], sound["waveform"][0]) and config.audio[1] == 44100


@pytest.mark.parametrize("shape", [(2, 1, 100), (2, 100)])
def test_a_sound_that_is_none_is_named(pack: ModuleType, shape: tuple[int, ...]) -> None:
    error = part(pack, "wan_core.errors").InvalidRequest
    sound = {"waveform": torch.zeros(shape), "sample_rate": 44100}
    with pytest.raises(error, match="audio has shape") as raised:
        part(pack, "nodes.job").generation_config(VALUES | {"audio": sound})
    assert raised.value.field == "audio"


def test_blending_and_drift_reach_the_job(pack: ModuleType) -> None:
    config = clip_config(pack)
    assert (config.window_fusion, config.drift_correction) == ("ramp", 0.0)
    config = clip_config(pack, fusion="pyramid", drift_correction=0.5)
    assert (config.window_fusion, config.drift_correction) == ("pyramid", 0.5)


def test_an_mp4_has_the_codec_the_job_names(
    pack: ModuleType, models: Path, tmp_path: Path, capfd: Any
) -> None:
    wrapper = open_wrapper(pack, models / "t2v")
    for codec, name, tag in (("h264", "h264", "avc1"), ("h265", "hevc", "hvc1")):
        config = clip_config(pack, num_frames=9, codec=codec)
        config.output_path = tmp_path / f"{codec}.mp4"
        wrapper.generate(config).raise_for_error()
        with av.open(str(config.output_path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.codec_tag) == (name, tag)
            assert sum(1 for _ in container.decode(stream)) == 9
    assert "x265" not in capfd.readouterr().err


def test_crf_0_keeps_every_bit_in_both_codecs(pack: ModuleType, tmp_path: Path) -> None:
    # Not smaller: x265 itself is not exact for tiny pictures.
    frames, seen = torch.rand(1, 256, 320, 3) / 2 + torch.rand(9, 256, 320, 3) / 8, {}
    for codec in ("h264", "h265"):
        writer = part(pack, "wan_core.render.video").VideoWriter(
            tmp_path / "clip.mp4", fps=16, width=320, height=256, codec=codec, crf=0,
            pix_fmt="yuv444p",
        )  # fmt: skip
        with writer:
            writer.write(frames)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            decoded = [torch.from_numpy(f.to_ndarray()) for f in container.decode(video=0)]
        seen[codec] = torch.stack(decoded)
    assert len(seen["h264"]) == 9
    assert torch.equal(seen["h264"], seen["h265"])


def test_a_control_reaches_the_job_and_is_spoken_of_as_a_node(pack: ModuleType) -> None:
    """The samplers hand it on as it is; messages name WanControl's input."""
    job, words = part(pack, "nodes.job"), part(pack, "nodes.words")
    control = part(pack, "wan_core").WanControl(denoise=0.5)
    assert job.generation_config(VALUES).control is None
    assert job.generation_config(VALUES | {"control": control}).control is control
    said = words.in_words_of_the_nodes("control.video has 7 frames; image was given")
    assert said == "video of WanControl has 7 frames; start_image was given"
    # A picture that is spoken of is no field.
    said = "(a start image is frame 0, an end image: frame 8)"
    assert words.in_words_of_the_nodes(said) == said
    error = part(pack, "wan_core.errors").InvalidRequest
    with pytest.raises(error) as raised, words.said_in_words_of_the_nodes():
        raise error("control.mask is all black", field="control.mask")
    assert raised.value.field == "mask" and "mask of WanControl" in str(raised.value)


def test_the_control_node_holds_what_it_is_given(pack: ModuleType) -> None:
    found = [one.name for one in fields(part(pack, "wan_core").WanControl)]
    assert found == [
        "video", "mask", "reference", "keyframes", "positions", "camera", "tracks", "strength",
        "denoise", "clear_masked", "face_video", "background_video",
    ]  # fmt: skip


def test_devices_reach_the_plan_and_one_card_changes_nothing(pack: ModuleType) -> None:
    job = part(pack, "nodes.job")
    assert job.device_options(VALUES) == job.device_options({"devices": " 1 "}) == {}
    assert job.device_options({"devices": "0,2"}) == {"devices": "0,2"}
