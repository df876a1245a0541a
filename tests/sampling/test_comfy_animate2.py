"""A clip of Animate 2 is what ComfyUI's own nodes make, within 1e-4 of its norm.

A real ComfyUI that knows Animate 2 (0.33) runs in a process of its own; without one the test is
skipped and says what is missing. The model has fewer than ten blocks: the unconditional pass leaves
out block 9 here, as in diffusers, and not there.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support.animate2_models import clip_encoder, plain_model
from support.comfy_server import checkout_with, find_python, told_by_comfyui
from support.tiny_models import components

from wan_core import GenerationConfig, WanControl, WanPipelineLoader
from wan_core.config import WanModelFiles
from wan_core.sampling import encode_whole_clip, in_black_frame

CHECKOUT = checkout_with("comfy/ldm/wan/model_animate2.py")
PYTHON = find_python(CHECKOUT) if isinstance(CHECKOUT, Path) else CHECKOUT
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]
FRAMES, WIDTH, HEIGHT, SEED, STEPS, GUIDANCE = 9, 64, 48, 5, 4, 3.0


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_native_nodes_latents(tmp_path: Path, strength: float) -> None:
    numbers = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    vae = components("wan2.1-i2v", seed=3, vae=numbers)["vae"]
    vae.save_pretrained(tmp_path / "vae")
    save_file(layouts.original_vae(layouts.state_of(vae), 2), tmp_path / "vae.safetensors")
    clip, _ = clip_encoder()
    clip.save_pretrained(tmp_path / "clip")
    model = plain_model(
        num_attention_heads=1, attention_head_dim=128, text_dim=4096, num_layers=3,
        added_kv_proj_dim=128,
    )  # fmt: skip
    path = tmp_path / "wan_animate_2.safetensors"
    metadata = {"config": json.dumps({"transformer": {"model_type": "animate2"}})}
    save_file(layouts.original_transformer(layouts.state_of(model)), path, metadata=metadata)
    g = torch.Generator().manual_seed(1)
    given = {name: torch.zeros(1, 512, 4096) for name in ("positive", "negative")}
    for name, tokens in (("positive", 9), ("negative", 4)):
        given[name][:, :tokens] = torch.randn(1, tokens, 4096, generator=g)
    given["video"] = torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=g)
    given["reference"] = torch.rand(1, HEIGHT, WIDTH, 3, generator=g)
    with torch.no_grad():
        for name in ("reference", "video"):
            frame = in_black_frame(given[name][0], WIDTH, HEIGHT)
            given[f"seen {name}"] = encode_whole_clip(clip, frame, torch.device("cpu"))
    save_file(given, tmp_path / "tensors.safetensors")
    inputs = {
        "reference_image": "reference", "pose_video": "video", "pose_strength": strength,
        "clip_vision_output": "seen reference", "clip_vision_output_pose": "seen video",
        "video_frame_offset": 0,
    }  # fmt: skip
    told = {
        "tensors": str(tmp_path / "tensors.safetensors"), "vae": str(tmp_path / "vae.safetensors"),
        "size": {"width": WIDTH, "height": HEIGHT, "length": FRAMES}, "seed": SEED,
        "steps": STEPS, "cfg": GUIDANCE,
        "jobs": {"a": {"node": "WanAnimate2ToVideo", "model": str(path), "inputs": inputs}},
    }  # fmt: skip
    theirs = told_by_comfyui("comfy_nodes.py", told, tmp_path, CHECKOUT, PYTHON)["a.latents"]
    files = WanModelFiles(transformer=path, vae=tmp_path / "vae", image_encoder=tmp_path / "clip")
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        files, optimization_config={"device": "cpu", "precision": "fp32"}
    )
    job = GenerationConfig(
        width=WIDTH, height=HEIGHT, num_frames=FRAMES, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, flow_shift=5.0, seed=SEED, scheduler="euler",
        sigma_schedule="simple", prompt_embeds=given["positive"],
        negative_prompt_embeds=given["negative"],
        control=WanControl(
            reference=given["reference"], video=given["video"], strength=strength
        ),
    )  # fmt: skip
    found = wrapper.generate(job).raise_for_error().vae_latents
    assert found is not None and found.shape == theirs.shape
    assert (found - theirs).norm() < 1e-4 * theirs.norm()
