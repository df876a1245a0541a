"""What ComfyUI's own model of Animate 2 predicts; run by ComfyUI's Python, in its checkout.

``python comfy_animate2.py JOBS.json OUT.safetensors``. The jobs file names a model file and a file
with what ``support.animate2_models.inputs`` makes; the result holds the velocity without and with
``pose_strength`` 0.5. Not imported by any test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path.cwd()))


def main() -> None:
    """Load the model as ComfyUI does, so that its detection is asked too."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sd

    given = json.loads(Path(sys.argv[1]).read_text())
    model = comfy.sd.load_diffusion_model(given["model"]).model.diffusion_model
    tensors = load_file(given["tensors"])
    results = {}
    for name, strength in (("velocity", 1.0), ("half", 0.5)):
        with torch.no_grad():
            found = model(
                tensors["hidden_states"], tensors["timestep"], tensors["encoder_hidden_states"],
                clip_fea=tensors["encoder_hidden_states_image"],
                pose_latents=tensors["driving"][:, :16], clip_fea_pose=tensors["driving_image"],
                context_pose=tensors["driving_text"], pose_strength=strength,
                transformer_options={},
            )  # fmt: skip
        results[name] = found.contiguous()
    save_file(
        results | {"kind": torch.tensor([type(model).__name__ == "WanAnimate2Model"])}, sys.argv[2]
    )


if __name__ == "__main__":
    main()
