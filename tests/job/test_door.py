"""What can be known of a job beforehand is told before anything is read: every check, walked."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import single_files, tiny_models

from wan_core import GenerationConfig, WanControl, WanModelFiles, WanPipelineLoader
from wan_core.errors import InvalidRequest, MissingFile, ModelMismatch, OutputError, WanError
from wan_core.loading import ComponentCache

JOB = Path(__file__).parents[2] / "wan_core" / "job"
SIZE: dict[str, Any] = {
    "prompt": "a red cat", "width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 4,
}  # fmt: skip
PICTURE = Image.new("RGB", (64, 32), (90, 40, 10))
NAN = float("nan")
FOREIGN = () if os.name == "nt" else ("C:\\videos\\a.mp4", "d:/a.mp4", "\\\\server\\a.mp4")
"""Paths that would become odd names in the folder one is in."""
POSTSCRIPT = Image.new("RGB", (4, 4))
POSTSCRIPT.format = "EPS"
VIDEO = torch.rand(9, 32, 64, 3, generator=torch.Generator().manual_seed(0))
LATENTS = (1, 16, 3, 4, 8)


class Untouchable(ComponentCache):
    """A cache that no component may be asked of: the job must have been refused before."""

    def borrow(self, key: Any, nbytes: int, build: Any, *, keep: bool = True) -> Any:
        raise AssertionError(f"{key.kind} was wanted before the job was checked")


@dataclass
class Case:
    """A job that cannot be, the model it is asked of, and what must be named."""

    name: str
    error: type[WanError] = InvalidRequest
    model: str = "wan2.1-t2v"
    without: str = ""
    job: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path, pytest.MonkeyPatch], dict[str, Any]] | None = None
    before: Callable[[Path], None] | None = None
    """What happens to the model's files after it was opened."""


def continued(**more: Any) -> dict[str, Any]:
    return {"image": PICTURE, "window_mode": "continuation", "num_frames": 33,
            "max_chunk_size": 17, **more}  # fmt: skip


def hollow(values: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors of this shape that torch has and that hold no plain values."""
    return [values.to("meta"), values.to_sparse()]


def sound(wave: Any, rate: Any = 16000) -> dict[str, Any]:
    return {"audio": (wave, rate), "output_path": "out.mp4"}


def blocked(path: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    (path / "file").write_text("")
    return {"output_path": path / "file" / "out.mp4"}


def folder_there(path: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    (path / "out.mp4").mkdir()
    return {"output_path": path / "out.mp4"}


def no_encoder(path: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr("wan_core.job.inputs.ENCODERS", {"h264": "libnone"})
    return {"output_path": path / "out.mp4"}


def broken_picture(path: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    PICTURE.save(path / "in.png")
    (path / "in.png").write_bytes((path / "in.png").read_bytes()[:60])
    return {"image": path / "in.png"}


def text_as_picture(path: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    (path / "in.png").write_text("no picture")
    return {"image": path / "in.png"}


def touched(folder: Path) -> None:
    weights = next((folder / "vae").glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))


def grown(folder: Path) -> None:
    with next((folder / "transformer").glob("*.safetensors")).open("ab") as file:
        file.write(b"\0" * 8)


def gone(folder: Path) -> None:
    next((folder / "vae").glob("*.safetensors")).unlink()


def reads_all(_: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let the model take every input of a control."""
    names = ("mask", "reference", "keyframes", "camera", "tracks", "strength", "clear_masked")
    known = {"video": "control", **dict.fromkeys(names, "any")}
    patch.setattr("wan_core.job.control.reads", lambda architecture: known)
    return {}


def control(name: str, model: str = "wan2.1-t2v", **given: Any) -> Case:
    """A control that cannot be; start and end image are given in ``job``."""
    job = given.pop("job", {})
    if model in ("wan2.1-i2v", I2V):
        job = {"image": PICTURE} | job
    return Case(
        f"control.{name}" if name != "control" else name,
        model=model,
        prepare=given.pop("prepare", None),
        job={"control": WanControl(**given), **job},
    )


I2V, FLF, T5B, PAIR = "wan2.2-i2v-a14b", "wan2.1-flf2v", "wan2.2-ti2v-5b", "files"
FUN, CAMERA = "wan2.1-fun-control", "wan2.2-fun-camera-a14b"
RAYS = torch.zeros(1, 24, 3, 32, 64)
NUMBERS = (
    "num_frames", "width", "height", "num_inference_steps", "guidance_scale", "guidance_scale_2",
    "flow_shift", "boundary", "switch_step", "fps", "seed", "batch_size", "start_step", "end_step",
    "max_chunk_size", "window_overlap", "drift_correction", "crf",
)  # fmt: skip
CASES = [
    # Components that the model was opened without.
    Case("prompt", model=PAIR, without="text_encoder"),
    Case("negative_prompt", model=PAIR, without="text_encoder",
         job={"prompt_embeds": torch.zeros(1, 4, 32), "guidance_scale": 4.0}),
    Case("prompt", model=PAIR, without="tokenizer"),
    Case("VAE", MissingFile, PAIR, "vae"),
    Case("VAE", MissingFile, PAIR, "vae", {"return_frames": True, "end_step": 1}),
    Case("image encoder", MissingFile, "wan2.1-i2v", "image_encoder", {"image": PICTURE}),
    Case("transformer_2", MissingFile, PAIR, "the other half"),
    Case("vae", ModelMismatch, before=touched),
    Case("transformer", ModelMismatch, before=grown),
    Case("vae", MissingFile, before=gone),
    # Values.
    *(Case(name, job={name: bad}) for name in NUMBERS for bad in ("4", True, NAN, 10**400, [4])),
    Case("num_frames", job={"num_frames": 5000}),
    Case("width", model=T5B, job={"width": 16}),
    Case("num_frames", model=I2V, job={"image": PICTURE, "last_image": PICTURE, "num_frames": 1}),
    *(Case(name, job={name: bad})
      for name in ("scheduler", "noise", "window_schedule", "window_fusion", "window_mode",
                   "codec", "pix_fmt", "resume")
      for bad in ("magic", 5, np.array(["a", "b"])) if name != "resume"),
    Case("resume", job={"resume": "magic", "output_path": "out.mp4"}),
    Case("resume", job={"resume": "auto"}),
    *(Case(name, job={name: "yes"})
      for name in ("force_chunked_processing", "window_anchor", "return_frames")),
    *(Case(name, job={name: 5})
      for name in ("warning_callback", "progress_callback", "preview_callback", "chunk_callback",
                   "decode_callback", "interrupt_check")),
    *(Case(name, job={name: bad})
      for name in ("prompt", "negative_prompt", "prompts") for bad in (5, b"text", "half \ud83d")),
    Case("prompt", job={"prompt": None}),
    *(Case("precision_override", job={"precision_override": bad}) for bad in ("fp4", 16, "")),
    *(Case("output_path", job={"output_path": bad})
      for bad in ("https://a/b.mp4", "file:///tmp/b.mp4", "s3://b/c.mp4", "", " ")),
    *(Case("output_path", job={"output_path": bad}) for bad in FOREIGN),
    # Steps, windows, segments, texts.
    Case("start_step", job={"start_step": 2}),
    Case("sigmas", job={"sigmas": [0.5, 0.9]}),
    Case("guided_steps", job={"guided_steps": 1}),
    Case("sigma_schedule", job={"sigma_schedule": "karras"}),
    Case("num_inference_steps", job={"sigmas": [1.0, 0.5], "num_inference_steps": 3}),
    Case("start_step", job={"start_step": 4, "latents": torch.zeros(LATENTS)}),
    Case("start_step", job={"start_step": 3, "end_step": 2, "latents": torch.zeros(LATENTS)}),
    Case("prompts", job={"prompts": "", "prompt": None}),
    Case("prompts", job={"prompts": "a fox\n9: a hare"}),
    Case("prompts", job={"prompts": "0: a fox\na hare"}),
    Case("prompts", job={"prompts": "9: a fox", "prompt_embeds": torch.zeros(1, 4, 32)}),
    Case("prompts", model=I2V, job=continued(prompts="1: a fox\n1: a hare\na dog")),
    Case("window_mode", job={"window_mode": "continuation"}),
    Case("window_schedule", model=I2V, job=continued(window_schedule="looped")),
    Case("start_step", model=I2V, job=continued(end_step=2)),
    Case("window_overlap", model=I2V, job=continued(window_overlap=0)),
    Case("continue_from", job={"continue_from": torch.zeros(LATENTS)}),
    Case("continue_from", model=I2V, job=continued(continue_from=torch.zeros(2, 3))),
    Case("continue_from", model=I2V, job=continued(continue_from=torch.zeros(1, 16, 9, 4, 8))),
    Case("continue_from", model=I2V, job=continued(continue_from=torch.zeros(1, 16, 3, 4, 4))),
    Case("continue_from", model=I2V, job=continued(continue_from=torch.full(LATENTS, NAN))),
    # Pictures.
    Case("image", model=I2V),
    Case("image", model=I2V, job={"image": " "}),
    Case("image", job={"image": PICTURE}),
    Case("last_image", model=FLF, job={"image": PICTURE}),
    Case("last_image", model=T5B, job={"last_image": PICTURE, "width": 64, "height": 64}),
    Case("last_image", model=T5B, job={"image": PICTURE, "last_image": PICTURE, "height": 64}),
    *(Case("image", model=I2V, job={"image": bad})
      for bad in ("missing.png", "http://x/y.png", ".", POSTSCRIPT, 5, torch.zeros(0, 0, 3),
                  torch.zeros(5),
                  Image.new("RGB", (0, 1)), torch.full((4, 4, 3), NAN), np.array("a"),
                  torch.full((4, 4, 3), 255.0), np.full((4, 4, 3), 999),
                  Image.new("I", (4, 4), 70000), torch.zeros((4, 4, 3), dtype=torch.complex64))),
    Case("last_image", model=I2V, job={"image": PICTURE, "last_image": "missing.png"}),
    Case("image", model=I2V, prepare=broken_picture),
    Case("image", model=I2V, prepare=text_as_picture),
    # Control.
    Case("control", job={"control": {"video": VIDEO}}),
    *(control("video", video=bad)
      for bad in (VIDEO[:7], VIDEO[0], VIDEO.permute(0, 3, 1, 2), VIDEO * NAN, VIDEO * 255 + 3,
                  "clip.mp4", torch.zeros(9, 0, 64, 3))),
    control("video", "wan2.1-i2v", video=VIDEO),
    control("video", FLF, video=VIDEO, job={"image": PICTURE, "last_image": PICTURE}),
    control("video", video=VIDEO, job={"latents": torch.zeros(LATENTS)}),
    control("video", I2V, video=torch.cat([VIDEO] * 4)[:33], job=continued(
        continue_from=torch.zeros(LATENTS))),
    Case("start_step", job={"control": WanControl(video=VIDEO), "start_step": 2}),
    *(control("denoise", video=VIDEO, denoise=bad) for bad in (0, 1.2, NAN, "all")),
    control("denoise", denoise=0.5),
    control("denoise", video=VIDEO, denoise=0.5, prepare=reads_all),
    control("strength", video=VIDEO, strength=0.5),
    *(control("strength", video=VIDEO, strength=bad, prepare=reads_all)
      for bad in ([1, 2, 3], -1, "much", [NAN])),
    control("mask", video=VIDEO, mask=VIDEO[..., 0]),
    *(control("mask", video=VIDEO, mask=bad, prepare=reads_all)
      for bad in (torch.zeros(9, 32, 64), VIDEO[:5, ..., 0], torch.ones(9), VIDEO[..., 0] * NAN)),
    control("clear_masked", video=VIDEO, clear_masked=True, prepare=reads_all),
    control("clear_masked", mask=VIDEO[..., 0], clear_masked=True, prepare=reads_all),
    control("clear_masked", clear_masked="yes", prepare=reads_all),
    *(control(name, **{name: VIDEO}) for name in ("reference", "keyframes", "camera")),
    control("reference", reference=torch.zeros(1, 8, 8, 2), prepare=reads_all),
    control("keyframes", FLF, keyframes=VIDEO[:1]),
    control("keyframes", I2V, keyframes=VIDEO.repeat(2, 1, 1, 1)),
    control("keyframes", I2V, keyframes=VIDEO[:2] * NAN, positions="2, 3"),
    *(control("positions", I2V, keyframes=VIDEO[:2], positions=bad)
      for bad in ("1, 9", "1,-10", "8, -1", "0, 3", "1, x", [1, 2.5], "1, 2, 4", 5, "1, ")),
    control("positions", "wan2.1-i2v", positions="0", denoise=1.0, tracks="[]"),
    *(control("positions", T5B, keyframes=VIDEO[:n], positions=bad, job={"width": 64, "height": 64})
      for n, bad in ((1, "3"), (2, "0, 1"))),
    control("tracks", tracks="[]"),
    Case("num_frames", job={"num_frames": 0}),
    Case("num_frames", job={"num_frames": 0, "control": WanControl(keyframes=VIDEO[:1])},
         model=T5B),
    control("video", T5B, video=torch.zeros(1, 1, 1, 1).expand(4 * 1024 * 64 + 1, 8, 8, 3),
            denoise=0.5, job={"num_frames": 0}),
    control("reference", "wan2.1-vace", reference=[VIDEO[0], torch.zeros(8, 8)]),
    control("reference", "wan2.1-vace", reference=[VIDEO[0], VIDEO[0, :8] * NAN]),
    control("reference", "wan2.1-vace", reference="cat.png"),
    control("reference", "wan2.1-vace", reference=[]),
    # The Fun models.
    control("video", CAMERA, video=VIDEO, job={"latents": torch.zeros(LATENTS)}),
    control("video", FUN, video=VIDEO[:7]),
    control("mask", FUN, video=VIDEO, mask=VIDEO[..., 0]),
    control("clear_masked", FUN, video=VIDEO, clear_masked=True),
    control("strength", FUN, video=VIDEO, strength=0.5),
    control("denoise", FUN, video=VIDEO, denoise=0.5),
    control("camera", FUN, camera=RAYS),
    control("keyframes", FUN, keyframes=VIDEO[:1]),
    control("reference", FUN, reference=VIDEO[:1] * NAN),
    control("reference", CAMERA, reference=VIDEO[:1]),
    Case("last_image", model=FUN, job={"image": PICTURE, "last_image": PICTURE}),
    Case("image encoder", MissingFile, model=FUN, without="image_encoder",
         job={"control": WanControl(reference=VIDEO[:1])}),
    *(control("camera", CAMERA, camera=bad)
      for bad in (RAYS[:, :6], RAYS[0], RAYS[:, :, :2], RAYS * NAN, RAYS.long(), "Pan Up",
                  torch.cat([RAYS, RAYS]))),
    control("tracks", CAMERA, tracks="[]"),
    *(control("tracks", "wan2.1-i2v", tracks=bad)
      for bad in ("no json", "[]", "[[]]", '[[{"x": 1}]]', '[[{"x": 1, "y": NaN}]]', 7,
                  {"track_path": None}, {"track_path": torch.zeros(5, 2, 2)},
                  {"track_path": torch.zeros(9, 2)},
                  {"track_path": torch.zeros(9, 2, 2), "track_visibility": torch.ones(9, 3)})),
    # Tensors.
    *(Case("prompt_embeds", job={"prompt_embeds": bad})
      for bad in (torch.zeros(1, 4, 31), torch.zeros(1, 600, 32), torch.zeros(3, 4, 32),
                  torch.zeros(1, 0, 32), torch.zeros(32), torch.full((1, 4, 32), NAN), "text",
                  torch.zeros((1, 4, 32), dtype=torch.int64))),
    Case("negative_prompt_embeds",
         job={"negative_prompt_embeds": torch.zeros(1, 4, 31), "guidance_scale": 4.0}),
    *(Case("latents", job={"latents": bad})
      for bad in (torch.zeros(1, 16, 3, 4, 4), torch.zeros(2), "noise",
                  torch.zeros(LATENTS, dtype=torch.int32), torch.full(LATENTS, NAN),
                  torch.full(LATENTS, float("inf")), *hollow(torch.zeros(LATENTS)))),
    *(Case("image", model=I2V, job={"image": bad}) for bad in hollow(torch.zeros(4, 4, 3))),
    *(Case("prompt_embeds", job={"prompt_embeds": bad}) for bad in hollow(torch.zeros(1, 4, 32))),
    # What is written.
    *(Case("audio", job=job)
      for job in (sound(torch.full((1, 400), NAN)), sound(torch.zeros(1, 400), 12345),
                  sound(torch.zeros(1, 400), "fast"), sound(torch.zeros(400)),
                  sound(torch.zeros(3, 400)), sound(torch.zeros(1, 0)), sound("sound"),
                  sound(torch.zeros((1, 400), dtype=torch.int16)),
                  sound(torch.full((1, 400), -20_000.0)), sound(torch.full((2, 400), 1e30)),
                  {"audio": torch.zeros(1, 400), "output_path": "out.mp4"})),
    *(Case("output_metadata", job={"output_metadata": bad, "output_path": "out.mp4"})
      for bad in ({"a": {"b": 1}}, {1: "a"}, {"a": None}, {"a": "half \ud83d"}, {"a": "b\0c"},
                  {"": "a"},
                  "a")),
    *(Case("output_path", job={"output_path": bad})
      for bad in ("video.avi", "nul\0.mp4", 5, "a" * 5000 + ".mp4")),
    Case("output_path", job={"return_frames": False}),
    Case("output_path", prepare=folder_there),
    *(Case("journal_folder", job={"journal_folder": bad, "resume": "auto"}) for bad in (5, "")),
    Case("out.mp4", OutputError, prepare=blocked),
    Case("codec", prepare=no_encoder),
    Case("codec", job={"codec": "h265", "output_path": "out.mp4", "width": 16, "height": 16}),
]  # fmt: skip
NAMES = [f"{index}-{case.name}" for index, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("wan2.1-t2v", "wan2.1-i2v", I2V, FLF, T5B, FUN, CAMERA, "wan2.1-vace"):
        tiny_models.make_folder(root / family, family)
    single_files.write(root / "files")
    return root


def files_of(models: Path, without: str) -> WanModelFiles:
    root = models / "files"
    named: dict[str, Any] = {
        "transformer": root / "diffusion_models" / single_files.HIGH,
        "transformer_2": root / "diffusion_models" / single_files.LOW,
        "text_encoder": root / "text_encoders" / single_files.TEXT,
        "vae": root / "vae" / single_files.VAE,
    }
    named.pop(without, None)
    return WanModelFiles(**named)


def open_for(case: Case, models: Path, place: Path) -> Any:
    """Open the case's model, without what it shall lack, on a copy if that is changed."""
    source: Any = files_of(models, case.without) if case.model == PAIR else models / case.model
    if case.before is not None:
        source = shutil.copytree(source, place / "model")
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        source, optimization_config={"device": "cpu", "ram_limit_gb": 4}
    )
    if case.without in ("tokenizer", "image_encoder"):
        wrapper.architecture = without(wrapper.architecture, case.without)
    if case.without == "the other half":
        half = replace(wrapper.architecture, incomplete="Name the other one too: transformer_2.")
        wrapper.architecture = half
    if case.before is not None:
        case.before(source)
    return wrapper


def without(architecture: Any, name: str) -> Any:
    kept = {key: part for key, part in architecture.components.items() if key != name}
    return replace(architecture, components=kept)


def told(case: Case, models: Path, place: Path) -> BaseException:
    """Run the case and return its error; whatever is read on the way is another error."""
    place.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        job = SIZE | case.job | (case.prepare(place, patch) if case.prepare else {})
        wrapper = open_for(case, models, place)
        wrapper._cache = Untouchable()
        result = wrapper.generate(GenerationConfig(**job))
    assert not result.success and result.stages == []
    assert result.error is not None
    return result.error


def lines_met(error: BaseException) -> set[tuple[str, int]]:
    """Return where in the package an error passed: module and line."""
    met, trace = set(), error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.parent == JOB:
            met.add((path.stem, trace.tb_lineno))
        trace = trace.tb_next
    return met


@pytest.fixture(scope="module")
def met() -> dict[int, set[tuple[str, int]]]:
    """The lines that each case has met, of those that were run already."""
    return {}


@pytest.mark.parametrize("index", range(len(CASES)), ids=NAMES)
def test_it_is_told_before_anything_is_read(
    index: int, models: Path, tmp_path: Path, met: dict[int, set[tuple[str, int]]]
) -> None:
    case = CASES[index]
    error = told(case, models, tmp_path / "here")
    met[index] = lines_met(error)
    assert type(error) is case.error, repr(error)
    assert case.name in str(error), str(error)
    if isinstance(error, InvalidRequest):
        assert error.field == case.name, str(error)
    assert len(str(error)) < 1600 and "\n" not in str(error)
    assert "RAM" not in str(error)  # the machine of these cases is small, which is beside the point


# Checks that no job can meet, because another one stands before them; each says which.
UNREACHABLE = {
    "animate": "of models that these are not; test_animate.py has a case for each",
    "steps": "the names and the numbers were checked by resolve",
    "windows": "the names and the numbers were checked by resolve",
}


def test_every_check_there_is_has_a_case(
    models: Path, tmp_path: Path, met: dict[int, set[tuple[str, int]]]
) -> None:
    """Each ``raise`` of the package is met by one of the cases above."""
    for index in set(range(len(CASES))) - set(met):
        met[index] = lines_met(told(CASES[index], models, tmp_path / str(index)))
    lines = set().union(*met.values())
    missed = [
        f"{path.stem}:{node.lineno}"
        for path in sorted(JOB.glob("*.py"))
        if path.stem not in UNREACHABLE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and node.exc is not None
        if not any((path.stem, line) in lines for line in range(node.lineno, node.end_lineno + 1))
    ]
    assert missed == []
