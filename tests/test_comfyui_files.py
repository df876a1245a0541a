"""Single files, a killed server and the estimate's picture in a real, running ComfyUI.

Needs what ``test_comfyui.py`` needs; without it every test here is skipped, and says why.
"""

from __future__ import annotations

import io
import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import single_files
import torch
from comfy_server import ComfyServer, find_checkout, find_python
from PIL import Image
from safetensors.torch import load_file
from test_comfyui import as_api, frames_of, graph, read_video, saved_video, wait_for_step, workflow

CHECKOUT = find_checkout()
PYTHON = CHECKOUT if isinstance(CHECKOUT, str) else find_python(CHECKOUT)
FILES = {"low_noise_model": "auto", "text_encoder": "auto", "vae": "auto", "image_encoder": "auto"}

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    assert isinstance(CHECKOUT, Path)
    assert isinstance(PYTHON, Path)
    base = tmp_path_factory.mktemp("comfyui")
    single_files.write(base / "models")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("quantised.gguf", "unsafe.pth"):
        (elsewhere / name).touch()
    (base / "models" / "diffusion_models" / "linked").symlink_to(elsewhere)
    with ComfyServer(base, CHECKOUT, PYTHON) as running:
        yield running


def with_files(prompt: dict[str, Any], **parts: str) -> dict[str, Any]:
    """Have the loader of ``prompt`` take single files instead of a folder."""
    prompt["1"]["inputs"] = {"model": single_files.HIGH, **FILES, **parts}
    return prompt


def with_latent(prompt: dict[str, Any], source: list[Any], name: str) -> dict[str, Any]:
    """Save the latents of ``source`` exactly, with ComfyUI's own node."""
    inputs = {"samples": source, "filename_prefix": f"latents/{name}"}
    prompt["20"] = {"class_type": "SaveLatent", "inputs": inputs}
    return prompt


def latent_of(server: ComfyServer, name: str) -> torch.Tensor:
    """Return the latest latents saved as ``name``."""
    path = sorted((server.base / "output" / "latents").glob(f"{name}_*.latent"))[-1]
    return load_file(path)["latent_tensor"]


def failure(server: ComfyServer, prompt: dict[str, Any]) -> str:
    """Run a prompt that must fail and return what ComfyUI shows."""
    entry = server.wait(server.queue(prompt))
    assert entry["status"]["status_str"] == "error"
    return next(
        str(message["exception_message"])
        for kind, message in entry["status"]["messages"]
        if kind == "execution_error"
    )


# -- single files -------------------------------------------------------------------------------
def test_lists_files_of_linked_folders_and_none_that_could_run_code(server: ComfyServer) -> None:
    inputs = server.get("/object_info/WanLoader")["WanLoader"]["input"]
    # ComfyUI versions differ in where a combo's choices are.
    listed = {
        name: options[1].get("options", options[0])
        for name, options in (inputs["required"] | inputs["optional"]).items()
    }
    models = set(listed["model"])
    assert {"tiny-a14b", single_files.HIGH, single_files.LOW, "linked/quantised.gguf"} <= models
    assert "linked/unsafe.pth" not in models
    assert listed["vae"] == ["auto", "none", single_files.VAE]
    assert listed["text_encoder"] == ["auto", "none", single_files.TEXT]
    assert listed["image_encoder"] == ["auto", "none"]
    assert single_files.LOW in listed["low_noise_model"]


def test_single_files_equal_the_same_weights_as_a_folder(server: ComfyServer) -> None:
    folder = with_latent(graph(model="tiny-a14b", name="folder"), ["3", 2], "folder")
    server.run(folder)
    files = with_latent(with_files(graph(name="files")), ["3", 2], "files")
    outputs = server.run(files)
    shown = outputs["1"]["text"][0]
    for name in (single_files.LOW, single_files.VAE, single_files.TEXT):
        assert name in shown
    assert "Wan 2.2 text to video A14B" in shown
    assert torch.equal(latent_of(server, "folder"), latent_of(server, "files"))
    exact = frames_of(server, "files")
    assert torch.equal(frames_of(server, "folder"), exact)
    assert exact.std() > 0.01  # not one flat colour
    frames, _, _ = read_video(saved_video(server, outputs, "5"))
    assert len(frames) == len(exact) == 9
    seen = torch.from_numpy(np.stack(frames)).float() / 255
    assert (seen - exact).abs().mean() < 0.06  # what 4:2:0 H.264 does to noise


def test_swapped_experts_are_run_as_chosen_and_warned_of(server: ComfyServer) -> None:
    outputs = server.run(with_files(graph(name="right", seed=5)))
    assert "swapped" not in outputs["1"]["text"][0]
    swapped = with_files(graph(name="swapped", seed=5), low_noise_model=single_files.HIGH)
    swapped["1"]["inputs"]["model"] = single_files.LOW
    outputs = server.run(swapped)
    assert "Check that the two are not swapped" in outputs["1"]["text"][0]
    assert not torch.equal(frames_of(server, "right"), frames_of(server, "swapped"))


def test_the_example_workflow_of_single_files_runs_to_an_mp4(server: ComfyServer) -> None:
    prompt = as_api(workflow("single_files"))
    loader = next(node for node in prompt.values() if node["class_type"] == "WanLoader")
    assert loader["inputs"] == {"model": single_files.HIGH, **FILES}
    small = {"width": 64, "height": 48, "num_frames": 5, "steps": 2}
    next(n for n in prompt.values() if "steps" in n["inputs"])["inputs"].update(small)
    outputs = server.run(prompt)
    node = next(key for key, value in prompt.items() if value["class_type"] == "SaveVideo")
    frames, _, _ = read_video(saved_video(server, outputs, node))
    assert len(frames) == 5
    assert frames[0].shape == (48, 64, 3)


def test_a_missing_part_is_named_with_the_folder_for_it(server: ComfyServer) -> None:
    vae = server.base / "models" / "vae" / single_files.VAE
    aside = vae.rename(server.base / single_files.VAE)
    try:
        text = failure(server, with_files(graph(seed=6)))
    finally:
        aside.rename(vae)
    assert "No VAE with 16 latent channels was found" in text
    assert f"vae: {vae.parent}" in text
    assert server.run(with_files(graph(seed=6)))  # found, now that it is there


def test_a_file_in_the_wrong_place_is_named(server: ComfyServer) -> None:
    prompt = with_files(graph(seed=7), low_noise_model=single_files.HIGH)
    assert "Both experts are the same file" in failure(server, prompt)
    answer = server.post("/prompt", {"prompt": with_files(graph(), vae="gone.safetensors")})
    assert answer["status"] == 400
    text = json.dumps(answer["node_errors"]["1"])
    assert "vae: there is no file 'gone.safetensors'" in text
    assert single_files.VAE in text


# -- estimate -----------------------------------------------------------------------------------
def test_the_estimate_shows_its_picture_beside_the_text(server: ComfyServer) -> None:
    prompt = {
        "1": {"class_type": "WanLoader", "inputs": {"model": single_files.HIGH, **FILES}},
        "2": {
            "class_type": "WanEstimateMemory",
            "inputs": {
                "pipeline": ["1", 0],
                "width": 832,
                "height": 480,
                "num_frames": 81,
                "window_frames": 0,
                "window_overlap": 16,
            },  # fmt: skip
        },
        "3": {"class_type": "WanFitProbeSave", "inputs": {"images": ["2", 4], "name": "picture"}},
    }
    shown = server.run(prompt)["2"]
    assert "denoise" in shown["text"][0]
    assert [image["type"] for image in shown["images"]] == ["temp"]
    query = urllib.parse.urlencode(shown["images"][0])
    with urllib.request.urlopen(f"{server.url}/view?{query}") as answer:
        seen = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    exact = frames_of(server, "picture")[0]
    assert np.array_equal(seen, (exact * 255).round().to(torch.uint8).numpy())
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 4  # bars, not an empty sheet


# -- a render outlives the server ---------------------------------------------------------------
def long_prompt() -> dict[str, Any]:
    """The chunked example workflow with 161 frames, few steps and a small picture."""
    prompt = as_api(workflow("long_video"))
    sampler = next(k for k, v in prompt.items() if v["class_type"] == "WanChunkedSampler")
    changes = {"num_frames": 161, "steps": 2, "width": 32, "height": 32}
    prompt[sampler]["inputs"].update({**changes, "guidance_scale": 1.0, "guidance_scale_2": 1.0})
    assert prompt[sampler]["inputs"]["window_frames"] == 17
    prompt["21"] = {"class_type": "WanFitProbeText", "inputs": {"value": [sampler, 3]}}
    saved = {"images": [sampler, 1], "name": "long"}
    prompt["22"] = {"class_type": "WanFitProbeSave", "inputs": saved}
    return with_latent(prompt, [sampler, 0], "long")


def journals(server: ComfyServer) -> list[Path]:
    folder = server.base / "output" / ".wanfit"
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def kill_and_start_again(server: ComfyServer) -> None:
    """Kill ComfyUI with SIGKILL and start it on the same folders and port."""
    process = server._process
    process.kill()
    assert process.wait(30) == -9
    server._log.close()
    server.__enter__()


def long_run(server: ComfyServer, prompt: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Run ``prompt``, check its mp4 and return the exact frames and latents."""
    outputs = server.run(prompt, 600)
    node = next(key for key, value in prompt.items() if value["class_type"] == "SaveVideo")
    frames, _, _ = read_video(saved_video(server, outputs, node))
    exact = frames_of(server, "long")
    assert len(frames) == len(exact) == 161
    # Of the mp4 only this: x264 is not repeatable to the bit for pictures this small.
    seen = torch.from_numpy(np.stack(frames)).float() / 255
    assert (seen - exact).abs().mean() < 0.06
    report = outputs["21"]["value"][0]
    assert ("\nresumed: " in report) == (resume_of(prompt) == "auto")
    return exact, latent_of(server, "long")


def resume_of(prompt: dict[str, Any]) -> str:
    sampler = prompt["21"]["inputs"]["value"][0]
    return str(prompt[sampler]["inputs"].get("resume", "auto"))


def test_161_frames_go_on_after_the_server_was_killed(server: ComfyServer) -> None:
    prompt = long_prompt()
    sampler = prompt["21"]["inputs"]["value"][0]
    server.queue(prompt)
    wait_for_step(server, sampler, 1, 600)
    assert len(journals(server)) == 1
    kill_and_start_again(server)
    kept = journals(server)
    assert len(kept) == 1

    frames, latents = long_run(server, prompt)
    assert not kept[0].exists()  # a finished render leaves nothing behind

    prompt[sampler]["inputs"]["resume"] = "never"
    whole, whole_latents = long_run(server, prompt)
    assert torch.equal(latents, whole_latents)
    assert torch.equal(frames, whole)
