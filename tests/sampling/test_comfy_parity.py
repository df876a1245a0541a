"""The schedule ``simple`` gives the latents that ComfyUI's KSampler gives, by running both.

A real ComfyUI samples in a process of its own; without one the tests are skipped and say what is
missing. Weights, noise, embeddings and settings are the same, and so are the latents within 1e-4 of
their norm.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference_layouts as layouts
from support.comfy_server import find_checkout, find_python, told_by_comfyui
from support.lora_kinds import lora_file
from support.tiny_models import make_transformer, make_vae
from torch import Tensor

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.config import WanControl, WanLoRA, WanModelFiles

CHECKOUT = find_checkout()
PYTHON = find_python(CHECKOUT) if isinstance(CHECKOUT, Path) else CHECKOUT
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]

SIZE = {"width": 64, "height": 48, "num_frames": 9}
SHAPE = (1, 16, 3, 6, 8)
SEED = 5
# name: what both are asked for. ComfyUI 0.3.64 draws lcm's noise from the seed itself, which is the
# initial noise once more; later versions, and WanFit, from the seed after it ("later").
JOBS: dict[str, dict[str, Any]] = {
    "euler": {"sampler": "euler", "steps": 4, "shift": 5.0, "cfg": 1.0},
    "euler, two experts": {"sampler": "euler", "steps": 4, "shift": 5.0, "cfg": 1.0, "switch": 2},
    "euler, two experts, guided": {
        "sampler": "euler", "steps": 6, "shift": 8.0, "cfg": 3.5, "switch": 3,
    },
    "uni_pc": {"sampler": "uni_pc", "steps": 20, "shift": 8.0, "cfg": 6.0},
    "uni_pc, few": {"sampler": "uni_pc", "steps": 4, "shift": 5.0, "cfg": 1.0},
    "uni_pc, three": {"sampler": "uni_pc", "steps": 3, "shift": 8.0, "cfg": 1.0},
    "uni_pc, two": {"sampler": "uni_pc", "steps": 2, "shift": 8.0, "cfg": 1.0},
    "lcm": {"sampler": "lcm", "steps": 5, "shift": 5.0, "cfg": 1.0},
    "res_multistep": {"sampler": "res_multistep", "steps": 7, "shift": 5.0, "cfg": 2.0},
    "dpmpp_2m": {"sampler": "dpmpp_2m", "steps": 7, "shift": 5.0, "cfg": 2.0},
    "dpmpp_2m, odd shift": {"sampler": "dpmpp_2m", "steps": 3, "shift": 17.3, "cfg": 1.0},
    "uni_pc, low shift": {"sampler": "uni_pc", "steps": 5, "shift": 0.5, "cfg": 1.0},
}  # fmt: skip
# Two KSamplerAdvanced: the second one's solver knows nothing of the first one's steps.
HALVES: dict[str, dict[str, Any]] = {
    f"{name}, halves": {"sampler": name, "steps": 6, "shift": 5.0, "cfg": 1.5, "switch": 3}
    for name in ("euler", "dpmpp_2m", "res_multistep")
}
# A clip to start from. KSampler makes all its steps, here the last ones of a longer schedule.
STARTS: dict[str, dict[str, Any]] = {
    f"{name}, from a clip": {
        "sampler": name, "steps": 4, "shift": 3.0, "cfg": 1.0, "denoise": 0.5,
    }
    for name in ("euler", "uni_pc", "lcm", "res_multistep", "dpmpp_2m")
}  # fmt: skip
# Kinds of LoRAs with their strengths, in the order in which they are put on.
LORAS: tuple[tuple[tuple[str, float], ...], ...] = (
    (("lora", 0.7),), (("lightx2v", -0.5),), (("lokr", 1.0),), (("loha", 0.6),),
    (("dora lora", 1.0),), (("dora lora", 0.6),), (("dora lora", -0.4),), (("dora lora", 2.0),),
    (("dora lokr", 0.7),), (("dora loha", 1.3),),
    (("lora", 1.0), ("dora lora", 0.7)), (("dora lora", 1.0), ("lightx2v", 0.8)),
    (("lokr", 0.5), ("dora lora", 0.8), ("dora loha", 0.6), ("lora", 0.4)),
)  # fmt: skip
FEW: dict[str, Any] = {"sampler": "euler", "steps": 2, "shift": 5.0, "cfg": 1.0}
OURS = {"uni_pc": "unipc", "dpmpp_2m": "dpm++2m"}


def clip() -> Tensor:
    """Return a clip of SIZE to start from."""
    shape = SIZE["num_frames"], SIZE["height"], SIZE["width"], 3
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two small transformers under their original names, and two texts' embeddings."""
    folder = tmp_path_factory.mktemp("parity")
    state = torch.get_rng_state()
    torch.manual_seed(3)
    shape = {"num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 4096}
    for name in ("high", "low"):
        model = make_transformer("wan2.1-t2v", **shape)
        with torch.no_grad():  # a fresh one moves the latents by hardly anything
            model.proj_out.weight.mul_(4.0)
        path = folder / f"wan2.2_t2v_{name}_noise_14B.safetensors"
        save_file(layouts.original_transformer(layouts.state_of(model)), path)
        if name == "high":
            for kind in {kind for some in LORAS for kind, _ in some}:
                save_file(lora_file(load_file(path), kind), folder / f"{kind}.safetensors")
    embeds = {name: torch.zeros(1, 512, 4096) for name in ("positive", "negative")}
    for name, tokens in (("positive", 9), ("negative", 4)):
        embeds[name][:, :tokens] = torch.randn(1, tokens, 4096)
    vae = make_vae("wan2.1-t2v")
    vae.save_pretrained(folder / "vae")
    torch.set_rng_state(state)
    with torch.no_grad():  # in the scale of a LATENT
        embeds["start"] = vae.encode(clip().permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mode()
    save_file(embeds, folder / "embeds.safetensors")
    return folder


@pytest.fixture(scope="module")
def theirs(files: Path) -> dict[str, Tensor]:
    """Return ComfyUI's latents of every job."""
    jobs = [
        {"name": name, "shape": SHAPE, "seed": SEED, "later": 1, **job}
        for name, job in (JOBS | HALVES | STARTS).items()
    ]
    for number, some in enumerate(LORAS):
        paths = [(str(files / f"{kind}.safetensors"), strength) for kind, strength in some]
        jobs.append(
            {
                "name": f"lora {number}",
                "shape": SHAPE,
                "seed": SEED,
                "later": 0,
                "loras": paths,
                **FEW,
            }
        )
    given = {
        "models": [str(path) for path in sorted(files.glob("wan*"))],
        "embeds": str(files / "embeds.safetensors"),
        "jobs": jobs,
    }
    return told_by_comfyui("comfy_sampling.py", given, files, CHECKOUT, PYTHON)


@cache
def opened(files: Path, two: bool, loras: tuple[tuple[str, float], ...] = ()) -> Any:
    """Open one expert, or both."""
    high, low = sorted(files.glob("wan*"))
    return WanPipelineLoader().load_wan_pipeline(
        WanModelFiles(transformer=high, transformer_2=low if two else None, vae=files / "vae"),
        optimization_config={"device": "cpu", "precision": "fp32"},
        loras=[WanLoRA(files / f"{kind}.safetensors", "both", n) for kind, n in loras],
    )


def made(files: Path, job: dict[str, Any], loras: Any = (), **changes: Any) -> Any:
    """Return WanFit's result of a job."""
    embeds = load_file(files / "embeds.safetensors")
    settings: dict[str, Any] = {
        "num_inference_steps": job["steps"], "guidance_scale": job["cfg"],
        "guidance_scale_2": job["cfg"], "flow_shift": job["shift"], "seed": SEED,
        "scheduler": OURS.get(job["sampler"], job["sampler"]), "sigma_schedule": "simple",
        "switch_step": job.get("switch"), "prompt_embeds": embeds["positive"],
        "negative_prompt_embeds": embeds["negative"],
    }  # fmt: skip
    config = GenerationConfig(**SIZE, **(settings | changes))
    return opened(files, "switch" in job, loras).generate(config).raise_for_error()


def ours(files: Path, job: dict[str, Any], **changes: Any) -> Tensor:
    """Return WanFit's latents of a job in the scale of a LATENT."""
    found: Tensor = made(files, job, **changes).vae_latents
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference relative to that of ``b``."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", JOBS)
def test_the_latents_are_comfyui_s(files: Path, theirs: dict[str, Tensor], name: str) -> None:
    assert distance(ours(files, JOBS[name]), theirs[name]) < 1e-4


@pytest.mark.parametrize("number", range(len(LORAS)))
def test_loras_of_every_kind_are_comfyui_s(
    files: Path, theirs: dict[str, Tensor], number: int
) -> None:
    found, plain = (ours(files, FEW, loras=loras) for loras in (LORAS[number], ()))
    assert distance(plain, theirs[f"lora {number}"]) > 3e-3
    assert distance(found, theirs[f"lora {number}"]) < 1e-4


@pytest.mark.parametrize("name", HALVES)
def test_halves_are_those_of_two_ksampleradvanced(
    files: Path, theirs: dict[str, Tensor], name: str
) -> None:
    """In one run a solver with a memory takes it along to the second expert."""
    job = HALVES[name]
    first = made(files, job, end_step=job["switch"]).latents
    second = ours(files, job, start_step=job["switch"], latents=first)
    assert distance(second, theirs[name]) < 1e-4
    assert (distance(ours(files, job), theirs[name]) < 1e-4) == (job["sampler"] == "euler")


@pytest.mark.parametrize("name", STARTS)
def test_the_end_of_a_longer_schedule_from_a_clip(
    files: Path, theirs: dict[str, Tensor], name: str
) -> None:
    job = STARTS[name]
    control = WanControl(video=clip(), denoise=job["denoise"])
    steps = int(job["steps"] / job["denoise"])
    found = ours(files, job, num_inference_steps=steps, control=control)
    assert distance(found, theirs[name]) < 1e-4


@pytest.mark.parametrize("name", ["euler", "uni_pc", "dpmpp_2m"])
def test_the_official_schedule_is_another(
    files: Path, theirs: dict[str, Tensor], name: str
) -> None:
    """So the comparison above can fail, and the name of the schedule decides."""
    official = ours(files, JOBS[name], sigma_schedule="official")
    assert distance(official, theirs[name]) > 1e-3
