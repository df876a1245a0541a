"""Runs a real ComfyUI's conditioning nodes, and samples with what they make; run by its Python.

``python comfy_nodes.py JOBS.json OUT.safetensors``, in ComfyUI's checkout. The jobs file names a
VAE's weights under their original names, a file of tensors (texts' embeddings, pictures) and the
jobs, each a node with its inputs and, where it shall sample, a model file. Of a job "a", "a.KEY" is
what the node puts into the conditioning under KEY, and "a.latents" what was sampled, in the scale
of a LATENT, without the frames that the node says to trim; "rays" are WanCameraEmbedding's. Not
imported by any test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path.cwd()))


class Vae:
    """What the nodes ask of ComfyUI's VAE, for a small one: its own class knows one width."""

    latent_channels = 16

    def __init__(self, path: str) -> None:
        from comfy.ldm.wan.vae import WanVAE

        state = load_file(path)
        self.model = WanVAE(
            dim=state["encoder.conv1.weight"].shape[0], z_dim=16, dim_mult=[1, 2, 4, 4],
            num_res_blocks=2, temperal_downsample=[False, True, True],
        )  # fmt: skip
        self.model.load_state_dict(state)

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.encode(pixels.movedim(-1, 0)[None] * 2.0 - 1.0)
        return found


def tensors_of(conditioning: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {key: one[-1] if isinstance(one, list) else one for key, one in conditioning.items()}
    return {key: one.contiguous() for key, one in found.items() if isinstance(one, torch.Tensor)}


def main() -> None:
    """Run every job's node, and sample with it where a model is named."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sample
    import comfy.sd
    from comfy_extras import nodes_wan
    from comfy_extras.nodes_camera_trajectory import WanCameraEmbedding
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    given = json.loads(Path(sys.argv[1]).read_text())
    tensors, vae = load_file(given["tensors"]), Vae(given["vae"])
    rays = WanCameraEmbedding.execute(camera_pose="Pan Left", speed=3.0, **given["size"]).result[0]
    tensors["rays"] = rays
    results = {"rays": rays.contiguous()}
    for name, job in given["jobs"].items():
        inputs = {key: tensors.get(value, value) for key, value in job["inputs"].items()}
        for key in [key for key in inputs if key.startswith("clip_vision_output")]:
            inputs[key] = SimpleNamespace(penultimate_hidden_states=inputs[key])
        texts = ([[tensors[side], {}]] for side in ("positive", "negative"))
        with torch.no_grad():
            node = getattr(nodes_wan, job["node"])
            positive, negative, latent, *trim = node.execute(
                *texts, vae, batch_size=1, **given["size"], **inputs
            ).result
        for key, value in tensors_of(positive[0][1]).items():
            results[f"{name}.{key}"] = value.clone()
        if "model" not in job:
            continue
        model = ModelSamplingSD3().patch(comfy.sd.load_diffusion_model(job["model"]), 5.0)[0]
        noise = comfy.sample.prepare_noise(latent["samples"], given["seed"])
        sampled = comfy.sample.sample(
            model, noise, given["steps"], given["cfg"], "euler", "simple", positive, negative,
            latent["samples"], seed=given["seed"], disable_pbar=True,
        )  # fmt: skip
        results[f"{name}.latents"] = sampled[:, :, sum(trim[:1]) :].contiguous()
    save_file(results, sys.argv[2])


if __name__ == "__main__":
    main()
