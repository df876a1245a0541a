"""Samples with a real ComfyUI's own code; run by ComfyUI's Python, in its checkout.

``python comfy_sampling.py JOBS.json OUT.safetensors``. The jobs file names model files, a file with
the embeddings ``positive`` and ``negative``, and the jobs; the result holds their latents by name,
in the scale of a LATENT. Not imported by any test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path.cwd()))


def main() -> None:
    """Load the models once, and make every job's latents."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sample
    import comfy.sd
    import comfy.utils
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    given = json.loads(Path(sys.argv[1]).read_text())
    models = [comfy.sd.load_diffusion_model(path) for path in given["models"]]
    embeds = load_file(given["embeds"])
    positive, negative = ([[embeds[name], {}]] for name in ("positive", "negative"))
    results = {}
    for job in given["jobs"]:
        latent = embeds["start"] if "denoise" in job else torch.zeros(job["shape"])
        noise = comfy.sample.prepare_noise(latent, job["seed"])
        shifted = [ModelSamplingSD3().patch(model, job["shift"])[0] for model in models]
        for path, strength in job.get("loras", ()):
            lora = comfy.utils.load_torch_file(path, safe_load=True)
            shifted[0] = comfy.sd.load_lora_for_models(shifted[0], None, lora, strength, 0.0)[0]

        def sample(model: Any, noise: Any, latent: Any, job: Any = job, **more: Any) -> Any:
            return comfy.sample.sample(
                model, noise, job["steps"], job["cfg"], job["sampler"], "simple", positive,
                negative, latent, seed=job["seed"] + job["later"], disable_pbar=True, **more,
            )  # fmt: skip

        if "switch" not in job:
            share = job.get("denoise", 1.0)
            results[job["name"]] = sample(shifted[0], noise, latent, denoise=share)
            continue
        # As two KSamplerAdvanced do: the second one adds no noise.
        latent = sample(shifted[0], noise, latent, start_step=0, last_step=job["switch"])
        results[job["name"]] = sample(
            shifted[1], torch.zeros_like(noise), latent, start_step=job["switch"],
            last_step=10000, force_full_denoise=True, disable_noise=True,
        )  # fmt: skip
    save_file({name: found.contiguous() for name, found in results.items()}, sys.argv[2])


if __name__ == "__main__":
    main()
