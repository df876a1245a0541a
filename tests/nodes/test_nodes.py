"""The nodes' own logic, without ComfyUI: descriptions, folders, leases, inputs to jobs."""

from __future__ import annotations

import ast
import gc
import json
import re
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_models
from support.as_pack import ROOT, VALUES, open_model, part

COMFY = {"comfy", "folder_paths", "server", "execution", "latent_preview", "comfy_execution"}
PUBLISHERS = ("https://huggingface.co/Comfy-Org/", "https://huggingface.co/Kijai/")
"""Whose files ComfyUI's own templates name; those of the first lie in folders as ComfyUI's do."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diffusers")
    tiny_models.make_folder(root / "tiny", "wan2.1-t2v")
    tiny_models.make_folder(root / "org" / "other", "wan2.2-t2v-a14b", seed=1)
    (root / "notes").mkdir()
    (root / ".hidden").mkdir()
    (root / ".hidden" / "model_index.json").write_text("{}")
    return root


# -- the shape of the pack ----------------------------------------------------------------------
def test_importing_the_pack_imports_nothing_and_maps_no_v1_nodes(pack: ModuleType) -> None:
    assert callable(pack.comfy_entrypoint)
    assert (ROOT / pack.WEB_DIRECTORY).is_dir()
    # With it, ComfyUI would ignore comfy_entrypoint.
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")
    tree = ast.parse((ROOT / "__init__.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in top for alias in node.names} == {"annotations", "Any"}


def test_only_the_bridge_touches_comfyui() -> None:
    for path in (ROOT / "nodes").glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
        if path.name == "bridge.py":
            assert found & COMFY
        else:
            assert not found & COMFY, path.name
        if path.stem in ("pipeline", "lease", "job", "__init__"):
            assert "comfy_api" not in found, path.name


def test_every_node_has_a_help_page_and_every_workflow_a_thumbnail() -> None:
    declared = [
        found
        for path in (ROOT / "nodes").glob("*.py")
        for found in re.findall(r'node_id="(\w+)"', path.read_text())
    ]
    assert len(declared) == 7
    for name in declared:
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text()
        assert "## Common mistakes" in page, name
        assert f"](images/{name}.png)" in page, name
    for page in (ROOT / "web" / "docs").glob("*.md"):
        for line in page.read_text().splitlines():
            if line.startswith("!["):
                assert (page.parent / line.split("(")[1].rstrip(")")).is_file(), line
    workflows = list((ROOT / "example_workflows").glob("*.json"))
    assert len(workflows) == 12
    for path in workflows:
        assert path.with_suffix(".jpg").is_file()
        assert json.loads(path.read_text())["nodes"]


def test_files_that_a_workflow_names_can_be_fetched_from_it() -> None:
    """ComfyUI's dialog of missing models reads them; the demo models ship along and need none."""
    named = {}
    for path in (ROOT / "example_workflows").glob("*.json"):
        saved = json.loads(path.read_text())
        loader = next(node for node in saved["nodes"] if node["type"] == "WanLoader")
        files = [value for value in loader["widgets_values"] if str(value).endswith("tensors")]
        models = loader["properties"].get("models", [])
        assert set(files) <= {model["name"] for model in models}, path.name
        note = json.dumps([node for node in saved["nodes"] if node["type"] == "MarkdownNote"])
        for model in models:
            assert model["name"] in note and f"models/{model['directory']}" in note
            assert model["url"].startswith(PUBLISHERS)
            if model["url"].startswith(PUBLISHERS[0]):
                assert f"/{model['directory']}/" in model["url"]
            assert model["url"].endswith(f"/{model['name']}")
            named[model["name"]] = model["directory"]
    assert sorted(named.values()) == [
        "clip_vision", *["diffusion_models"] * 4, "text_encoders", "vae", "vae"
    ]  # fmt: skip


# -- folders ------------------------------------------------------------------------------------
def test_lists_folders_two_levels_deep_in_every_root(pack: ModuleType, models: Path) -> None:
    pipeline = part(pack, "nodes.pipeline")
    roots = [models, models / "absent"]
    listed = [name for name in pipeline.list_models(roots) if not name.startswith("WanFit demo")]
    assert listed == ["org/other", "tiny"]
    assert pipeline.find_model("org/other", roots) == models / "org" / "other"


@pytest.mark.parametrize("name", ["gone", "../tiny", "", ".hidden", "notes", "/etc"])
def test_an_unknown_model_is_named_with_its_field_and_place(
    pack: ModuleType, models: Path, name: str
) -> None:
    pipeline = part(pack, "nodes.pipeline")
    error = part(pack, "wan_core.errors").InvalidRequest
    with pytest.raises(error) as raised:
        pipeline.find_model(name, [models])
    assert raised.value.field == "model"
    text = str(raised.value)
    assert repr(name) in text
    assert str(models) in text
    assert "'org/other'" in text


def test_fingerprint_changes_only_with_a_file(pack: ModuleType, tmp_path: Path) -> None:
    pipeline = part(pack, "nodes.pipeline")
    folder = tiny_models.make_folder(tmp_path / "m", "wan2.1-t2v")
    before = pipeline.fingerprint(folder)
    assert pipeline.fingerprint(folder) == before
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.touch()
    after = pipeline.fingerprint(folder)
    assert after != before


# -- descriptions and leases --------------------------------------------------------------------
def test_optimize_makes_a_new_description_and_leaves_the_old(
    pack: ModuleType, models: Path
) -> None:
    pipeline = open_model(pack, models / "tiny")
    other = pipeline.optimized(precision="fp32", offload="model")
    assert pipeline.optimization_config() == {"precision": "auto", "offload": "auto"}
    assert other.optimization_config() == {"precision": "fp32", "offload": "model"}
    assert other.lease is pipeline.lease
    assert other != pipeline
    with pytest.raises(AttributeError):
        pipeline.precision = "fp16"


def test_weights_live_as_long_as_a_description_of_their_files(
    pack: ModuleType, models: Path
) -> None:
    config = part(pack, "wan_core.config").GenerationConfig(
        prompt="a cat", width=32, height=32, num_frames=5, num_inference_steps=1
    )
    part(
        pack, "wan_core.loading.cache"
    ).component_cache().clear()  # of what other files' tests left
    options = {"device": "cpu"}
    first = open_model(pack, models / "tiny")
    second = open_model(pack, models / "org" / "other")
    for pipeline in (first, second):
        pipeline.lease.wrapper(options).generate(config).raise_for_error()
    alone = second.get_ram_usage()
    assert first.get_ram_usage() > 0
    copy = first.optimized(offload="model")
    cache = part(pack, "wan_core.loading.cache").component_cache()
    del first
    gc.collect()
    assert copy.get_ram_usage() > 0
    files = copy.lease.files
    del copy, pipeline
    gc.collect()
    assert part(pack, "nodes.lease").loaded_bytes(files) == 0
    assert second.get_ram_usage() == alone
    del second
    gc.collect()
    assert not [m for _, m in cache.loaded() if isinstance(m, torch.nn.Module)]


def test_one_lease_per_set_of_files(pack: ModuleType, models: Path) -> None:
    first, second = (open_model(pack, models / "tiny") for _ in range(2))
    assert first.lease is second.lease
    assert first.lease.wrapper({"device": "cpu"}) is second.lease.wrapper({"device": "cpu"})
    assert first.lease.wrapper({"device": "cpu"}) is not first.lease.wrapper({"offload": "model"})


def test_a_file_that_was_replaced_is_another_model(pack: ModuleType, tmp_path: Path) -> None:
    """The old description must not run the new file, nor the new one as what the old one was."""
    folder = tiny_models.make_folder(tmp_path / "m", "wan2.1-t2v")
    first = open_model(pack, folder)
    wrapper = first.lease.wrapper({"device": "cpu"})
    other = tiny_models.make_folder(tmp_path / "other", "wan2.2-i2v-a14b", seed=3)
    shutil.rmtree(folder)
    other.replace(folder)
    second = open_model(pack, folder)
    assert second.lease is not first.lease
    assert second.lease.wrapper({"device": "cpu"}).architecture.name == "wan2.2-i2v-a14b"
    mismatch = part(pack, "wan_core.errors").WanError
    for options in ({"device": "cpu"}, {"device": "cpu", "offload": "model"}):
        with pytest.raises(mismatch, match=r"replaced|cannot be read"):
            first.lease.wrapper(options)
    with pytest.raises(mismatch):
        wrapper.check(part(pack, "wan_core.config").GenerationConfig(prompt="a cat"))


def test_a_touched_file_has_a_lease_of_its_own(pack: ModuleType, tmp_path: Path) -> None:
    folder = tiny_models.make_folder(tmp_path / "m", "wan2.1-t2v")
    first = open_model(pack, folder)
    next((folder / "vae").glob("*.safetensors")).touch()
    second = open_model(pack, folder)
    assert second.lease is not first.lease and second.lease.files == first.lease.files
    second.lease.wrapper({"device": "cpu"})


# -- inputs to jobs -----------------------------------------------------------------------------
def test_zero_means_official(pack: ModuleType) -> None:
    config = part(pack, "nodes.job").generation_config(VALUES)
    for name in ("num_inference_steps", "guidance_scale", "guidance_scale_2", "flow_shift"):
        assert getattr(config, name) is None, name
    for name in ("boundary", "switch_step", "fps", "negative_prompt", "image", "prompt_embeds"):
        assert getattr(config, name) is None, name
    assert config.seed == 0
    assert config.prompt == "a cat"


def test_an_empty_negative_prompt_can_be_asked_for(pack: ModuleType) -> None:
    def negative(**values: Any) -> Any:
        return part(pack, "nodes.job").generation_config(VALUES | values).negative_prompt

    assert negative() is None and negative(official_negative=True) is None
    assert negative(official_negative=False) == ""
    for official in (True, False):
        assert negative(negative_prompt="blur", official_negative=official) == "blur"
        given = {"negative": [[torch.zeros(1, 4, 32), {}]], "negative_prompt": "blur"}
        assert negative(**given, official_negative=official) is None


def test_values_reach_the_job(pack: ModuleType) -> None:
    picture = torch.rand(1, 8, 8, 4)
    embeds = torch.rand(1, 512, 32)
    given = {
        "steps": 4, "guidance_scale": 3.5, "guidance_scale_2": 2.0, "flow_shift": 5.0,
        "boundary": 0.9, "switch_step": 2, "fps": 24.0, "negative_prompt": "blur", "seed": 7,
        "start_image": picture, "end_image": picture, "positive": [[embeds, {"pooled": None}]],
        "scheduler": "euler",
    }  # fmt: skip
    config = part(pack, "nodes.job").generation_config(VALUES | given)
    assert config.num_inference_steps == 4
    assert (config.guidance_scale, config.guidance_scale_2) == (3.5, 2.0)
    assert (config.flow_shift, config.boundary, config.switch_step) == (5.0, 0.9, 2)
    assert (config.fps, config.negative_prompt, config.seed) == (24.0, "blur", 7)
    assert config.scheduler == "euler"
    assert torch.equal(config.image, picture[0])
    assert torch.equal(config.last_image, picture[0])
    assert torch.equal(config.prompt_embeds, embeds)
    assert config.prompt is None


def test_a_grey_picture_is_one(pack: ModuleType) -> None:
    """Depth maps come so from some packs."""
    grey = torch.rand(1, 8, 8, 1)
    config = part(pack, "nodes.job").generation_config(VALUES | {"start_image": grey})
    load = part(pack, "wan_core.job.pictures").load_picture
    assert torch.equal(load(config.image, "image"), grey[0].expand(8, 8, 3))


def test_the_transparency_of_a_picture_reaches_the_one_who_warns_of_it(pack: ModuleType) -> None:
    picture = torch.rand(1, 8, 8, 4)
    config = part(pack, "nodes.job").generation_config(VALUES | {"end_image": picture})
    pictures = part(pack, "wan_core.job.pictures")
    assert torch.equal(pictures.load_picture(config.last_image, "image"), picture[0, ..., :3])
    assert "transparent" in str(pictures.describe_loss(config.last_image, "end_image"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheduler", "magic"),
        ("positive", [[torch.zeros(1), {}]] * 2),
        ("negative", []),
        ("positive", "a fox"),
        ("positive", ["a fox"]),
        ("negative", [torch.zeros(1, 8, 8, 3)]),
        ("start_image", "a.png"),
        ("end_image", torch.zeros(1, 8, 8)),
        ("end_image", torch.zeros(1, 8, 8, 2)),
        ("positive", [[torch.zeros(1, 1, 1), {"concat_latent_image": torch.zeros(1)}]]),
        ("negative", [[torch.zeros(1, 1, 1), {"vace_frames": [torch.zeros(1)]}]]),
        ("positive", [[torch.zeros(1, 1, 1), {"start_percent": 0.2, "end_percent": 1.0}]]),
        ("negative", [[torch.zeros(1, 1, 1), {"strength": 0.5}]]),
        ("positive", [[torch.zeros(1, 1, 1), {"mask": torch.zeros(1, 8, 8)}]]),
        ("start_image", torch.zeros(2, 8, 8, 3)),
        ("end_image", torch.zeros(0, 8, 8, 3)),
        ("sigmas", 0.5),
        ("audio", "a.wav"),
        ("audio", {}),
        ("audio", torch.zeros(1, 2, 5)),
        ("audio", {"waveform": None, "sample_rate": 44100}),
        ("audio", {"waveform": torch.zeros(1, 2, 5), "sample_rate": "fast"}),
        ("audio", {"waveform": torch.zeros(2, 2, 5), "sample_rate": 44100}),
    ],
)
def test_a_bad_input_is_named(pack: ModuleType, field: str, value: Any) -> None:
    error = part(pack, "wan_core.errors").InvalidRequest
    with pytest.raises(error) as raised:
        part(pack, "nodes.job").generation_config(VALUES | {field: value})
    assert raised.value.field == field
    assert field in str(raised.value)


@pytest.mark.parametrize("value", [None, "9", [9], {}, torch.zeros(2)], ids=str)
def test_no_junk_that_is_wired_to_a_widget_is_another_error(pack: ModuleType, value: Any) -> None:
    """A node of any type may be wired to a widget: each is named, here or where it is checked."""
    job, errors = part(pack, "nodes.job"), part(pack, "wan_core.errors")
    told = []

    def tried(field: str, use: Any) -> None:
        try:
            use()
        except errors.InvalidRequest as error:
            told.append((error.field, field, field in str(error)))

    vae = SimpleNamespace(latents_mean=[0.0] * 16)
    for name in (*VALUES, *job.LATER):
        if name != "official_negative":
            tried(name, lambda n=name: job.generation_config(VALUES | {n: value}))
    for name in ("window_frames", "window_overlap"):
        sizes = {"window_frames": 9, "window_overlap": 4, name: value}
        tried(name, lambda s=sizes: job.use_windows(job.generation_config(VALUES), *s.values()))
    for name in (*job.LONG_CLIP, *(["continue_from"] if value is not None else [])):
        values = VALUES | job.LONG_CLIP | {name: value}
        tried(name, lambda v=values: job.use_long_clip(job.generation_config(VALUES), v, vae))
    for name in job.OPTIMIZE:
        tried(name, lambda n=name: job.optimization_options({n: value}))
    assert all(found == field and named for found, field, named in told)
    assert {"window_frames", "window_overlap", "resident_blocks"} <= {field for field, *_ in told}


def test_what_changes_nothing_beside_a_text_is_taken(pack: ModuleType) -> None:
    embeds = torch.zeros(1, 1, 1)
    hung = {"pooled_output": None, "start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}
    found = part(pack, "nodes.job").generation_config(VALUES | {"positive": [[embeds, hung]]})
    assert found.prompt_embeds is embeds


def test_what_is_no_pipeline_is_named(pack: ModuleType) -> None:
    for given in (None, "tiny"):
        error = part(pack, "wan_core.errors").InvalidRequest
        with pytest.raises(error, match=f"pipeline is '{given}'; a model from a Wan Loader"):
            part(pack, "nodes.pipeline").require_pipeline(given)


def test_an_overlap_as_long_as_the_window_is_refused(pack: ModuleType) -> None:
    job = part(pack, "nodes.job")
    config = job.generation_config(VALUES)
    with pytest.raises(part(pack, "wan_core.errors").InvalidRequest, match="window_overlap is 17"):
        job.use_windows(config, 17, 17)
    job.use_windows(config, 17, 16)
    assert (config.max_chunk_size, config.window_overlap) == (17, 16)
    assert not config.force_chunked_processing  # one window holds the 9 frames
    for chosen in (-4, -1):  # left to the plan
        job.use_windows(config, 17, chosen)
        assert config.window_overlap is None
    job.use_windows(config, 17, 0)
    assert config.window_overlap == 0
    for frames in (33, 0):  # 0: as long as a video that is not there yet
        config.num_frames = frames
        job.use_windows(config, 17, 16)
        assert config.force_chunked_processing


def test_noise_levels_are_typed_and_the_official_ones_are_left_to_the_model(
    pack: ModuleType,
) -> None:
    """The first choices are None, so that a recipe in use may stand for them."""

    def made(**values: Any) -> Any:
        return part(pack, "nodes.job").generation_config(VALUES | values)

    usual = made()
    assert (usual.scheduler, usual.sigma_schedule, usual.sigmas) == (None, None, None)
    asked = made(scheduler="lcm", sigma_schedule="simple", sigmas=" 1, 0.5 0.25")
    assert (asked.scheduler, asked.sigma_schedule) == ("lcm", "simple")
    assert asked.sigmas == [1.0, 0.5, 0.25]
    for bad in ({"sigmas": "1; x"}, {"sigma_schedule": "karras"}, {"scheduler": "heun"}):
        with pytest.raises(part(pack, "wan_core.errors").InvalidRequest) as caught:
            made(**bad)
        assert caught.value.field == next(iter(bad))
