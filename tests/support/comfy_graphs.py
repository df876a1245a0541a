"""Prompts for a running ComfyUI, and what they left in its output folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import av
import torch
from safetensors.torch import load_file

from support import single_files
from support.comfy_server import REPOSITORY, ComfyServer

SMALL: dict[str, Any] = {"width": 64, "height": 48, "num_frames": 9, "steps": 2}
FILES = {"low_noise_model": "auto", "text_encoder": "auto", "vae": "auto", "image_encoder": "auto"}


def graph(sampler: str = "WanGenerate", model: str = "tiny-t2v", **inputs: Any) -> dict[str, Any]:
    """Loader -> sampler -> SaveVideo and the probe that writes exact frames, in API format."""
    values: dict[str, Any] = {
        "prompt": "a red cat moves right", "negative_prompt": "", "guidance_scale": 0.0,
        "guidance_scale_2": 0.0, "flow_shift": 0.0, "scheduler": "unipc", "seed": 3,
        "boundary": 0.0, "switch_step": 0, "fps": 0.0, **SMALL,
    }  # fmt: skip
    if sampler == "WanChunkedSampler":
        values |= {"window_frames": 5, "window_overlap": 4}
    outputs = {"WanGenerate": (0, 1, 2), "WanChunkedSampler": (1, 2, 0)}[sampler]
    name = inputs.pop("name", "frames")
    values |= inputs
    return {
        "1": {"class_type": "WanLoader", "inputs": {"model": model}},
        "3": {"class_type": sampler, "inputs": {"pipeline": ["1", 0], **values}},
        "4": {
            "class_type": "WanFitProbeSave",
            "inputs": {"images": ["3", outputs[0]], "name": name},
        },
        "5": {
            "class_type": "SaveVideo",
            "inputs": {
                "video": ["3", outputs[1]],
                "filename_prefix": f"test/{name}",
                "format": "auto",
                "codec": "auto",
            },  # fmt: skip
        },
    }


def estimate_of(model: str, **files: str) -> dict[str, Any]:
    """Loader -> estimate of 81 frames of 832x480, in API format."""
    size = {"width": 832, "height": 480, "num_frames": 81, "window_frames": 0, "window_overlap": 16}
    inputs = {"pipeline": ["1", 0], **size}
    return {
        "1": {"class_type": "WanLoader", "inputs": {"model": model, **files}},
        "2": {"class_type": "WanEstimateMemory", "inputs": inputs},
    }


def frames_of(server: ComfyServer, name: str) -> torch.Tensor:
    saved: torch.Tensor = torch.load(server.base / "output" / f"{name}.pt", weights_only=True)
    return saved


def saved_video(server: ComfyServer, outputs: dict[str, Any], node: str) -> Path:
    entry = outputs[node]["images"][0]
    return Path(server.base / "output" / entry["subfolder"] / entry["filename"])


def read_video(path: Path) -> tuple[list[Any], dict[str, str], float]:
    """Return the frames as arrays, the container's metadata, and the rate."""
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return frames, dict(container.metadata), rate


def workflow(name: str) -> dict[str, Any]:
    text = (REPOSITORY / "example_workflows" / f"{name}.json").read_text()
    saved: dict[str, Any] = json.loads(text)
    return saved


def as_api(saved: dict[str, Any]) -> dict[str, Any]:
    """Turn a saved workflow into an API prompt, as the page does: widgets go by position."""
    links = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    prompt: dict[str, Any] = {}
    for node in saved["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for entry in node["inputs"]:
            if "widget" in entry:
                inputs[entry["name"]] = next(values)
                if entry["name"] == "seed":
                    assert next(values) in ("fixed", "randomize", "increment", "decrement")
            if entry["link"] is not None:
                inputs[entry["name"]] = links[entry["link"]]
        assert next(values, None) is None, node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def with_values(saved: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Set widgets of a saved workflow by name; the rest stays as it is shipped."""
    saved = copy.deepcopy(saved)
    for node in saved["nodes"]:
        names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        if "seed" in names:  # what becomes of it after a run is a widget too, without an input
            names.insert(names.index("seed") + 1, "control_after_generate")
        for name in names:
            if name in values:
                node["widgets_values"][names.index(name)] = values[name]
    return saved


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
