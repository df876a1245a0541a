"""A pair of experts and its encoder, stored as people have them, run in a ComfyUI to an mp4.

The frames are those that the library makes of the same files; ComfyUI's environment has the same
torch and diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from support import gguf_umt5, single_files
from support import reference_layouts as layouts
from support.comfy_graphs import FILES, frames_of, graph, read_video, saved_video
from support.comfy_server import ComfyServer
from support.stored_models import states, write_expert
from wan_core import GenerationConfig, WanModelFiles, WanPipelineLoader

HIGH, LOW = "wan2.2_t2v_high_noise_14B_Q8_0.gguf", "wan2.2_t2v_low_noise_14B_Q4_K_M.gguf"
TEXT = "umt5-xxl-encoder-Q8_0.gguf"
JOB: dict[str, Any] = {"num_frames": 5, "width": 64, "height": 48, "seed": 3, "switch_step": 1}


def write_gguf(models: Path) -> list[Path]:
    """Add a pair in GGUF and the encoder of ``single_files`` in GGUF; return what was written."""
    diffusion, text = models / "diffusion_models", models / "text_encoders"
    for state, name, kind in zip(states(), (HIGH, LOW), ("Q8_0", "Q4_K"), strict=True):
        write_expert(diffusion / name, state, kind)
    state = load_file(text / single_files.TEXT)
    spiece = state.pop("spiece_model").numpy().tobytes()
    gguf_umt5.write_encoder(text / TEXT, layouts.gguf_umt5(state), spiece)
    return [diffusion / HIGH, diffusion / LOW, text / TEXT]


def runs_as_stored(
    server: ComfyServer, models: Path, pair: tuple[str, str], text: str, kinds: Sequence[str]
) -> None:
    """Fail unless the files give the library's frames, and the nodes say how they are stored."""
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
    wanted = _library_frames(models, **files)
    assert torch.equal(frames_of(server, "stored"), wanted)
    assert wanted.std() > 0.01  # not one flat colour
    shown, report = outputs["1"]["text"][0], outputs["9"]["value"][0]
    for kind in kinds:
        assert f"stored as {kind}, computed in bf16 on a card that has it" in shown, shown
    family = kinds[0].split()[0]
    for part in ("text_encoder", "transformer", "transformer_2"):
        assert re.search(rf"load {part} .*{family}.*, computed in ", report), report


def _library_frames(models: Path, **names: str) -> Tensor:
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
