"""What the nodes make of single files, limits and long clips, without ComfyUI."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import single_files
from support.as_pack import VALUES, part


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    single_files.write(root)
    return root


def files_of(pack: ModuleType, models: Path, high: str, low: str) -> Any:
    folder = models / "diffusion_models"
    return part(pack, "wan_core.config").WanModelFiles(
        transformer=folder / high,
        transformer_2=folder / low,
        vae=models / "vae" / single_files.VAE,
        text_encoder=models / "text_encoders" / single_files.TEXT,
    )


DISTILLED = "wan2.2_t2v_A14b_{}_noise_lightx2v_4step.safetensors"


def distilled(pack: ModuleType, models: Path, folder: Path) -> Any:
    """Return the description of a pair whose names say that it was distilled to 4 steps."""
    high, low = (folder / DISTILLED.format(role) for role in ("high", "low"))
    for name, path in ((single_files.HIGH, high), (single_files.LOW, low)):
        shutil.copy(models / "diffusion_models" / name, path)
    files = files_of(pack, models, str(high), str(low))
    found = part(pack, "wan_core.detect").ArchitectureDetector().detect_model_architecture(files)
    lease = part(pack, "nodes.lease").lease_for(found, files)
    return part(pack, "nodes.pipeline").WanPipeline("m", high, found, lease)


def test_a_distilled_checkpoints_settings_are_used_where_that_is_asked_for(
    pack: ModuleType, models: Path, tmp_path: Path
) -> None:
    plain = distilled(pack, models, tmp_path)
    used = plain.with_recipe()
    # Not asked for, it is not used, and every job says so.
    config = part(pack, "wan_core.config").GenerationConfig
    job = config(prompt="a", width=64, height=64, num_frames=5)
    steps, told = [], []
    for one in (plain, used):
        wrapper = one.lease.wrapper({"device": "cpu"}, one.loras, one.use_recipe)
        request, _ = wrapper.plan(job)
        steps.append((request.num_inference_steps, request.guidance_scale, request.flow_shift))
        told.append([text for text in request.warnings if "distilled" in text])
        described = one.architecture.variant.defaults.num_inference_steps
        assert described == request.num_inference_steps
    assert steps[0][0] == 40 and steps[1] == (4, 1.0, 5.0)
    assert len(told[0]) == 1 and "This job has num_inference_steps 40" in told[0][0]
    assert told[1] == []
    # A LoRA that follows leaves them in place, whatever its own switch says.
    assert used.lease is plain.lease and not plain.use_recipe and used.use_recipe
    lora = part(pack, "wan_core.config").WanLoRA
    path = tmp_path / "style.safetensors"
    name = "diffusion_model.blocks.0.ffn.0"
    wide = {"lora_A": torch.zeros(2, 256), "lora_B": torch.zeros(320, 2)}
    save_file({f"{name}.{key}.weight": value for key, value in wide.items()}, path)
    followed = used.with_lora(lora(str(path)), False)
    assert followed.use_recipe
    assert followed.architecture.variant.defaults == used.architecture.variant.defaults
    assert followed.architecture.reasons.count(used.architecture.reasons[-1]) == 1


def test_a_recipe_that_nothing_speaks_of_is_refused(pack: ModuleType, models: Path) -> None:
    files = files_of(pack, models, single_files.HIGH, single_files.LOW)
    found = part(pack, "wan_core.detect").ArchitectureDetector().detect_model_architecture(files)
    lease = part(pack, "nodes.lease").lease_for(found, files)
    plain = part(pack, "nodes.pipeline").WanPipeline("m", Path("m"), found, lease)
    with pytest.raises(part(pack, "wan_core.errors").InvalidRequest, match="no recipe") as raised:
        plain.with_recipe()
    assert raised.value.field == "use_recipe"


def lease_on(pack: ModuleType, files: Any) -> Any:
    detector = part(pack, "wan_core.detect.detector").ArchitectureDetector()
    architecture = detector.detect_model_architecture(files)
    return part(pack, "nodes.lease").lease_for(architecture, files)


# -- single files -------------------------------------------------------------------------------
def test_swapped_experts_have_a_lease_of_their_own(
    pack: ModuleType, models: Path, tmp_path: Path
) -> None:
    """Names that say nothing: with those that do, swapped experts are refused."""
    with pytest.raises(part(pack, "wan_core.errors").ModelMismatch, match="are swapped"):
        lease_on(pack, files_of(pack, models, single_files.LOW, single_files.HIGH))
    one, other = (tmp_path / f"{name}.safetensors" for name in ("one", "other"))
    for name, path in ((single_files.HIGH, one), (single_files.LOW, other)):
        shutil.copy(models / "diffusion_models" / name, path)
    right = files_of(pack, models, str(one), str(other))
    swapped = files_of(pack, models, str(other), str(one))
    first, second = lease_on(pack, right), lease_on(pack, swapped)
    assert first.files == second.files
    assert lease_on(pack, right) is first
    wrappers = [lease.wrapper({"device": "cpu"}) for lease in (first, second)]
    names = [w.architecture.components["transformer"].path.name for w in wrappers]
    assert names == [one.name, other.name]


def test_fingerprint_of_files_changes_with_a_file_or_a_role(pack: ModuleType, models: Path) -> None:
    fingerprint = part(pack, "nodes.pipeline").fingerprint
    files = files_of(pack, models, single_files.HIGH, single_files.LOW)
    before = fingerprint(files)
    assert fingerprint(files) == before
    assert fingerprint(files_of(pack, models, single_files.LOW, single_files.HIGH)) != before
    vae = Path(files.vae)
    stat = vae.stat()
    vae.touch()
    assert vae.stat().st_mtime_ns != stat.st_mtime_ns
    assert fingerprint(files) != before


def test_a_change_behind_a_linked_folder_is_seen(pack: ModuleType, tmp_path: Path) -> None:
    """Components may lie on another disk, as links to folders; a link may even lead back."""
    fingerprint = part(pack, "nodes.pipeline").fingerprint
    disk, model = tmp_path / "disk" / "transformer", tmp_path / "model"
    disk.mkdir(parents=True)
    model.mkdir()
    weights = disk / "diffusion_pytorch_model.sft"
    weights.write_bytes(b"1")
    (model / "transformer").symlink_to(disk)
    (disk / "back").symlink_to(model)
    (model / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    seen = [fingerprint(model)]
    weights.write_bytes(b"12")
    seen.append(fingerprint(model))
    (model / "vae").mkdir()
    (model / "vae" / "config.json").write_text("{}")
    seen.append(fingerprint(model))
    # The same files under the name of another component are another model.
    (model / "vae").rename(model / "vae_old")
    seen.append(fingerprint(model))
    (model / "._vae_old").write_bytes(b"macOS")
    assert len(set(seen)) == 4 and fingerprint(model) == seen[-1]


def test_a_name_that_another_node_gives_counts_with_all_files(
    pack: ModuleType, tmp_path: Path
) -> None:
    """ComfyUI asks before it is known, and would render anew each time if that failed."""
    files = part(pack, "nodes.files")
    listed = {"transformer": {"a.sft": tmp_path / "a.sft"}, "vae": {"b.sft": tmp_path / "b.sft"}}
    folders = files.Folders((tmp_path / "diffusers",), listed, {}, lambda name: None)
    seen = set()
    for place in ("a.sft", "b.sft", "diffusers/model/model_index.json"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
        seen |= {files.fingerprint_of_all({"model": None}, folders) for _ in range(2)}
    seen.add(files.fingerprint_of_all({"model": "a.sft", "vae": None}, folders))
    assert len(seen) == 4


def test_parts_that_are_folders_count_with_their_files(pack: ModuleType, tmp_path: Path) -> None:
    fingerprint = part(pack, "nodes.pipeline").fingerprint
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").write_bytes(b"1")
    files = part(pack, "wan_core.config").WanModelFiles(transformer=tmp_path / "transformer")
    before = fingerprint(files)
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert fingerprint(files) != before


def test_names_of_workflows_saved_on_another_system(pack: ModuleType, tmp_path: Path) -> None:
    """Windows writes backslashes; a name that really has one comes first."""
    pipeline = part(pack, "nodes.pipeline")
    files = {
        "sub/wan.safetensors": Path("a"),
        r"odd\name.gguf": Path("b"),
        "odd/name.gguf": Path("c"),
    }
    assert pipeline.named_file(files, r"sub\wan.safetensors") == Path("a")
    assert pipeline.named_file(files, "sub/wan.safetensors") == Path("a")
    assert pipeline.named_file(files, r"odd\name.gguf") == Path("b")
    assert pipeline.named_file(files, r"sub\gone.safetensors") is None
    (tmp_path / "org" / "wan").mkdir(parents=True)
    (tmp_path / "org" / "wan" / "model_index.json").write_text("{}")
    assert pipeline.find_model(r"org\wan", [tmp_path]) == tmp_path / "org" / "wan"


def test_a_file_that_is_not_there_is_told_as_a_file(pack: ModuleType, tmp_path: Path) -> None:
    """And not as a folder with a model_index.json; the likest name comes first."""
    files = part(pack, "nodes.files")
    names = ["a.gguf", "other.safetensors", "Wan/wan2.2_T2V_high.safetensors", "z.sft"]
    listed = {"transformer": dict.fromkeys(names, tmp_path)}
    places = {"transformer": "/models/diffusion_models"}
    folders = files.Folders((tmp_path,), listed, places, lambda name: None)
    files.require_model("a.gguf", folders)
    for name, told in {
        r"old\wan2.2_t2v_high.safetensors": "there is no file .* Put it into /models/diffusion_mo"
        ".* Found: Wan/wan2.2_T2V_high.safetensors, ",
        "wan.CKPT": r"can run code when it is opened.* \.safetensors, \.sft, \.gguf\. Found: ",
        "wan2.2": "A model is a folder",
    }.items():
        with pytest.raises(part(pack, "wan_core.errors").InvalidRequest, match=told) as raised:
            files.require_model(name, folders)
        assert raised.value.field == "model" and str(raised.value).startswith("model: ")


def test_files_chosen_beside_a_folder_are_said_to_be_unused(
    pack: ModuleType, tmp_path: Path
) -> None:
    files = part(pack, "nodes.files")
    folders = files.Folders((), {"transformer": {"a.gguf": tmp_path}}, {}, lambda name: None)
    chosen = {"low_noise_model": "low.sft", "vae": "v.sft", "text_encoder": "auto",
              "image_encoder": "none", "vace_module": "m.sft"}  # fmt: skip
    assert files.unused_parts("a.gguf", chosen, folders) == []
    found = files.unused_parts("a folder", chosen, folders)
    assert [text.split(" is not used")[0] for text in found] == [
        "low_noise_model 'low.sft'", "vae 'v.sft'", "vace_module 'm.sft'",
    ]  # fmt: skip
    assert "Set it to 'auto'" in found[1] and "Set it to 'none'" in found[2]


@pytest.mark.parametrize("name", ["model", "low_noise_model", "vae", "vace_module"])
@pytest.mark.parametrize("value", [None, 3, ["a.gguf"], {}], ids=str)
def test_a_name_that_is_no_text_is_named(
    pack: ModuleType, tmp_path: Path, name: str, value: Any
) -> None:
    """A node of any type may be wired to a choice."""
    files = part(pack, "nodes.files")
    listed = {part_of: {"a.gguf": tmp_path} for part_of in ("transformer", "vae", "transformer_2")}
    folders = files.Folders((), listed, {}, lambda name: None)
    chosen = {"model": "a.gguf", name: value}
    with pytest.raises(part(pack, "wan_core.errors").InvalidRequest, match="a text is needed") as e:
        files.model_source(chosen.pop("model"), chosen, folders)
    assert e.value.field == name


def test_files_that_are_offered(pack: ModuleType) -> None:
    is_offered = part(pack, "nodes.pipeline").is_offered
    names = {
        "a.safetensors": True, "sub/A.GGUF": True, "._a.safetensors": False, "a.pth": False,
        "sub/._a.gguf": False, r"sub\._a.gguf": False, ".hidden/a.gguf": True, "a.gguf.part": False,
    }  # fmt: skip
    assert {n: is_offered(n, (".safetensors", ".gguf")) for n in names} == names


# -- limits -------------------------------------------------------------------------------------
def test_a_fallback_window_is_given_in_video_frames(pack: ModuleType) -> None:
    window_of = part(pack, "nodes.job").window_of
    assert [window_of("w", frames) for frames in (0, 5, 81)] == [None, 2, 21]
    error = part(pack, "wan_core.errors").InvalidRequest
    with pytest.raises(error, match="fallback_window_frames is 4; a window has 5") as raised:
        window_of("fallback_window_frames", 4)
    assert raised.value.field == "fallback_window_frames"


# -- long clips ---------------------------------------------------------------------------------
def long_clip(pack: ModuleType, channels: int = 16, **given: Any) -> Any:
    job = part(pack, "nodes.job")
    values = {**VALUES, **job.LONG_CLIP, **given}
    config = job.generation_config(values)
    variants = part(pack, "wan_core.models.variants")
    job.use_long_clip(config, values, variants.VAE_21 if channels == 16 else variants.VAE_22)
    return config


def test_what_a_long_clip_is_without_the_last_inputs(pack: ModuleType) -> None:
    config = long_clip(pack)
    assert (config.window_schedule, config.window_mode) == ("static", "windows")
    assert (config.resume, config.noise, config.window_anchor) == ("auto", "clip", False)
    assert (config.return_frames, config.prompts, config.continue_from) == (True, None, None)


def test_what_a_long_clip_asks_reaches_the_job(pack: ModuleType) -> None:
    config = long_clip(
        pack, schedule="looped", mode="continuation", resume="must", noise="frame", anchor=True,
        return_images=False, prompts=" 5: a fox\na hare ",
    )  # fmt: skip
    assert (config.window_schedule, config.window_mode) == ("looped", "continuation")
    assert (config.resume, config.noise, config.window_anchor) == ("must", "frame", True)
    assert (config.return_frames, config.prompts) == (False, "5: a fox\na hare")


@pytest.mark.parametrize("field", ["schedule", "mode", "resume", "noise"])
def test_a_wrong_choice_is_named(pack: ModuleType, field: str) -> None:
    error = part(pack, "wan_core.errors").InvalidRequest
    with pytest.raises(error, match=f"{field} is 'magic'; allowed: ") as raised:
        long_clip(pack, **{field: "magic"})
    assert raised.value.field == field


@pytest.mark.parametrize("channels", [16, 48])
def test_latents_to_go_on_from_are_normalised(pack: ModuleType, channels: int) -> None:
    from wan_core.models.variants import VAE_21, VAE_22
    from wan_core.sampling.vae import denormalize_latents

    vae = VAE_21 if channels == 16 else VAE_22
    stats = {"latents_mean": vae.latents_mean, "latents_std": vae.latents_std}
    wanted = torch.randn(1, channels, 3, 2, 2, generator=torch.manual_seed(0))
    given = {"samples": denormalize_latents(wanted, stats)}
    found = long_clip(pack, channels, continue_from=given, mode="continuation").continue_from
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16, 2, 2), (1, 48, 3, 2, 2), (16, 3, 2, 2)])
def test_latents_of_another_model_are_named(pack: ModuleType, shape: tuple[int, ...]) -> None:
    error = part(pack, "wan_core.errors").InvalidRequest
    with pytest.raises(error, match="continue_from has shape .* 16, frames") as raised:
        long_clip(pack, continue_from={"samples": torch.zeros(shape)})
    assert raised.value.field == "continue_from"


# -- the estimate's picture ---------------------------------------------------------------------
BLUE, RED, YELLOW = (70, 130, 200), (220, 80, 70), (240, 200, 80)


def drawn(pack: ModuleType, models: Path, available_mb: float | None, gib: float) -> torch.Tensor:
    """The picture of an estimate whose every stage needs ``gib``, half of it weights."""
    core = part(pack, "wan_core")
    files = files_of(pack, models, single_files.HIGH, single_files.LOW)
    wrapper = core.WanPipelineLoader().load_wan_pipeline(
        files, optimization_config={"device": "cpu"}
    )
    estimate = wrapper.estimate_memory_usage(core.GenerationConfig(prompt="", num_frames=9))
    size = {"device_bytes": int(gib * 2**30), "weights_bytes": int(gib * 2**29)}
    stages = [replace(stage, **size) for stage in estimate.stages]
    estimate = replace(estimate, stages=stages, available_mb=available_mb)
    picture: torch.Tensor = part(pack, "nodes.picture").estimate_picture(estimate)
    return picture


def columns(picture: torch.Tensor, colour: tuple[int, int, int]) -> list[int]:
    """The columns of the first bar's row that have this colour."""
    row = (picture[0, 48] * 255).round().to(torch.int64)
    return [x for x in range(row.shape[0]) if tuple(row[x].tolist()) == colour]


def test_the_picture_shows_what_is_too_much(pack: ModuleType, models: Path) -> None:
    picture = drawn(pack, models, 12 * 1024.0, 16.0)
    assert picture.dtype == torch.float32
    assert picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.min() >= 0 and picture.max() <= 1
    blue, red, line = (columns(picture, colour) for colour in (BLUE, RED, YELLOW))
    left = min(blue)
    full = max(red) - left
    assert abs(max(blue) - left - full / 2) <= 2  # half of it is weights
    assert abs(min(line) - left - full * 12 / 16) <= 2
    assert abs(min(red) - min(line)) <= 3


@pytest.mark.parametrize("available_mb", [None, 200 * 1024.0])
def test_the_picture_of_what_fits_has_no_red(
    pack: ModuleType, models: Path, available_mb: float | None
) -> None:
    picture = drawn(pack, models, available_mb, 16.0)
    assert not columns(picture, RED)
    assert not columns(picture, YELLOW)  # unknown, or too far away to be drawn
    assert columns(picture, BLUE)
