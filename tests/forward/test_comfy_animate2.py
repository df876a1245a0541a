"""Animate 2's forward predicts what ComfyUI's own model of it does, on the same weights.

A real ComfyUI that knows Animate 2 (0.33) runs in a process of its own; without one the test is
skipped and says what is missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support.animate2_models import inputs, plain_model
from support.comfy_server import checkout_with, find_python, told_by_comfyui

from wan_core.forward import DrivingStream, lean_forward

CHECKOUT = checkout_with("comfy/ldm/wan/model_animate2.py")
PYTHON = find_python(CHECKOUT) if isinstance(CHECKOUT, Path) else CHECKOUT
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]


@pytest.mark.slow
def test_velocity_of_both_streams(tmp_path: Path) -> None:
    model = plain_model(
        num_attention_heads=1,
        attention_head_dim=128,
        text_dim=4096,
        num_layers=3,
        added_kv_proj_dim=128,
    )
    given = inputs(text_dim=4096)
    save_file(given, tmp_path / "tensors.safetensors")
    config = {"transformer": {"model_type": "animate2"}}
    path = tmp_path / "wan_animate_2.safetensors"
    weights = layouts.original_transformer(layouts.state_of(model))
    save_file(weights, path, metadata={"config": json.dumps(config)})
    told = {"model": str(path), "tensors": str(tmp_path / "tensors.safetensors")}
    theirs = told_by_comfyui("comfy_animate2.py", told, tmp_path, CHECKOUT, PYTHON)
    assert bool(theirs["kind"])
    plain = {name: value for name, value in given.items() if not name.startswith("driving")}
    found = {}
    for name, strength in (("velocity", 1.0), ("half", 0.5)):
        stream = DrivingStream(
            latents=given["driving"], text=given["driving_text"], image=given["driving_image"],
            strength=strength,
        )  # fmt: skip
        with torch.no_grad(), lean_forward(model):
            (found[name],) = model(**plain, driving=stream, return_dict=False)
        error = (found[name] - theirs[name]).norm() / theirs[name].norm()
        assert error < 1e-4
    assert (found["half"] - found["velocity"]).norm() > 1e-2 * found["velocity"].norm()
