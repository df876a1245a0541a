"""Write the trained demo model as the two diffusers folders that ship with the pack.

python -m tools.export_demo --work .ckpt --out wan_core/demo_model
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from transformers import AutoTokenizer

from . import demo_models as models

FOLDERS = {
    "t2v": (WanPipeline, 16, 0.875, 12.0),
    "i2v": (WanImageToVideoPipeline, 36, 0.9, 5.0),
}
"""Pipeline class, input channels, boundary and flow shift: those of Wan 2.2's A14B pair."""


def load(work: Path, stage: str) -> dict[str, Any]:
    """Read a finished stage of `tools.train_demo`."""
    loaded: dict[str, Any] = torch.load(work / f"{stage}.pt", map_location="cpu", weights_only=True)
    return loaded


def export(work: Path, out: Path) -> None:
    """Write out/t2v and out/i2v in fp16, replacing what is there."""
    base = load(work, "base")
    vae: Any = models.build_vae()
    vae.load_state_dict(load(work, "vae")["vae"])
    vae.register_to_config(
        latents_mean=[round(v, 6) for v in base["statistics"]["mean"].tolist()],
        latents_std=[round(v, 6) for v in base["statistics"]["std"].tolist()],
    )
    encoder = models.build_text_encoder()
    encoder.load_state_dict(base["text_encoder"])
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    for task, (pipeline_class, channels, boundary, shift) in FOLDERS.items():
        experts = []
        for level in ("high", "low"):
            expert = models.build_transformer(in_channels=channels)
            expert.load_state_dict(load(work, f"{task}_{level}")["transformer"])
            experts.append(expert)
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        parts: dict[str, Any] = (
            {"image_encoder": None, "image_processor": None} if task == "i2v" else {}
        )
        pipeline = pipeline_class(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=experts[0],
            transformer_2=experts[1],
            boundary_ratio=boundary,
            **parts,
        )
        folder = out / task
        shutil.rmtree(folder, ignore_errors=True)
        pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
        shutil.copy(work / "tokenizer" / "spiece.model", folder / "tokenizer" / "spiece.model")


def main() -> None:
    """Export, then print each file's size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.work, args.out)


if __name__ == "__main__":
    main()
