"""Files as people have them in a running ComfyUI, each version that is there: to an mp4.

Small files of the true layout: a pair in fp8 with scales and the encoder that nearly everybody
uses, and a pair in GGUF with a GGUF encoder that brings its tokenizer. The frames are those that
the library makes of the same files; ComfyUI's environment has the same torch and diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import gguf_umt5, single_files
from support import reference_layouts as layouts
from support.comfy_graphs import FILES, frames_of, graph, read_video, saved_video
from support.comfy_server import ComfyServer, find_checkouts
from support.stored_models import encoder, states, write_expert

from wan_core import GenerationConfig, WanModelFiles, WanPipelineLoader

CHECKOUTS = find_checkouts()
# A second ComfyUI takes 25 seconds to start and to import what a first run needs.
VERSIONS = [
    pytest.param(place, id=name, marks=[pytest.mark.slow] * (index > 0))
    for index, (name, place) in enumerate(CHECKOUTS.items())
]
HIGH, LOW = "wan2.2_t2v_high_noise_14B_Q8_0.gguf", "wan2.2_t2v_low_noise_14B_Q4_K_M.gguf"
TEXT = "umt5-xxl-encoder-Q8_0.gguf"
JOB: dict[str, Any] = {"num_frames": 5, "width": 64, "height": 48, "seed": 3, "switch_step": 1}

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not CHECKOUTS, reason="no ComfyUI checkout (set COMFYUI_PATH to one)"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders, with the files of both workflows."""
    models = tmp_path_factory.mktemp("models")
    single_files.write(models)  # in bf16, with the names of files in fp8
    diffusion, text = models / "diffusion_models", models / "text_encoders"
    fp8, gguf = (single_files.HIGH, single_files.LOW), (HIGH, LOW)
    for state, *names in zip(states(), fp8, gguf, strict=True):
        write_expert(diffusion / names[0], state, "fp8_scaled", "old")
        kind = "Q8_0" if names[1] == HIGH else "Q4_K"
        write_expert(diffusion / names[1], state, kind)
    state = load_file(text / single_files.TEXT)
    spiece = state.pop("spiece_model").numpy().tobytes()
    gguf_umt5.write_encoder(text / TEXT, layouts.gguf_umt5(state), spiece)
    encoder(models, "fp8_scaled", "old")[0].replace(text / single_files.TEXT)
    return models


@pytest.fixture(scope="module", params=VERSIONS or [None])
def checkout(request: pytest.FixtureRequest) -> Path:
    place: Path = request.param
    return place


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer, models: Path) -> Iterator[ComfyServer]:
    for folder in models.iterdir():
        (comfyui.base / "models" / folder.name).symlink_to(folder)
    with comfyui:
        yield comfyui


def library_frames(models: Path, **names: str) -> torch.Tensor:
    folders = {"vae": "vae", "text_encoder": "text_encoders"}
    paths = {part: models / folders.get(part, "diffusion_models") / n for part, n in names.items()}
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        WanModelFiles(vae=models / "vae" / single_files.VAE, **paths),
        optimization_config={"device": "cpu"},
    )
    job = GenerationConfig(prompt="a red cat moves right", num_inference_steps=2, **JOB)
    frames = wrapper.generate(job).raise_for_error().frames
    assert frames is not None
    return frames


@pytest.mark.parametrize(
    ("pair", "text", "said"),
    [
        ((single_files.HIGH, single_files.LOW), single_files.TEXT, "fp8"),
        ((HIGH, LOW), TEXT, "GGUF"),
    ],
    ids=["fp8_scaled", "gguf"],
)
def test_a_pair_and_its_encoder_as_stored_run_to_an_mp4(
    server: ComfyServer, models: Path, pair: tuple[str, str], text: str, said: str
) -> None:
    prompt = graph(name="stored", **JOB)
    chosen = {"low_noise_model": pair[1], "text_encoder": text}
    prompt["1"]["inputs"] = {"model": pair[0], **FILES, **chosen}
    prompt["9"] = {"class_type": "WanFitProbeText", "inputs": {"value": ["3", 3]}}
    outputs = server.run(prompt)
    frames, _, rate = read_video(saved_video(server, outputs, "5"))
    assert len(frames) == 5
    assert frames[0].shape == (48, 64, 3)
    assert rate == 16.0
    files = {"transformer": pair[0], "transformer_2": pair[1], "text_encoder": text}
    wanted = library_frames(models, **files)
    assert torch.equal(frames_of(server, "stored"), wanted)
    assert wanted.std() > 0.01  # not one flat colour
    shown, report = outputs["1"]["text"][0], outputs["9"]["value"][0]
    kinds = {"fp8": ["fp8 scaled per tensor"], "GGUF": ["GGUF Q8_0", "GGUF Q4_K"]}[said]
    for kind in kinds:
        assert f"stored as {kind}, computed in bf16 on a card that has it" in shown, shown
    for part in ("text_encoder", "transformer", "transformer_2"):
        assert re.search(rf"load {part} .*{said}.*, computed in ", report), report


def test_weights_are_evicted_while_garbage_waits_to_be_collected(server: ComfyServer) -> None:
    """ComfyUI's list of models stays whole: a broken entry in it would end its prompt worker."""
    found = server.post("/wanfit_probe/evict_amid_garbage")
    assert found == {"broken": [], "loaded": {"first": 0, "gone": 0, "last": 0}}
    assert server.run(graph(name="after", **JOB, model=single_files.HIGH))
