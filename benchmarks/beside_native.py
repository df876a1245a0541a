"""A native model and ours in turn, in one running ComfyUI: is WanFit a good neighbour?

    python benchmarks/beside_native.py [--comfy CHECKOUT] [--budget 400] [--output FOLDER] [--tiny]

ComfyUI runs as it comes, with its own memory management. Its own nodes sample two guided steps of a
14B in bf16; ours make a clip of four steps with a pair of 14B in scaled fp8 and write an mp4, both
at 832x480, 81 frames, from files of true shape with random weights. First each twice by itself (the
second time is its warm time), then in turn, three times. After every run: seconds, and free memory
of the device as ComfyUI counts it. The latents of the native model must be the same in every run.

The files lie in /dev/shm where there is room, so that "from the page cache" holds for them.
``--tiny`` goes through everything with small models on the CPU. Results are written after every
run: ``results/beside_native_<device>.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch
from gpu_memory import GIB, SMALL, TINY_SIZE, short_name
from stored_layers import TINY_SHAPES
from stored_model import Shapes, StoredModel
from support.comfy_graphs import FILES, graph
from support.comfy_server import ComfyServer, find_checkouts, find_python

NEEDED = 75e9
"""Bytes of the files: a pair in fp8, a transformer in bf16, text encoder and VAE."""
GOAL = 1.25
"""Ours in turn, over its warm time by itself."""
Row = dict[str, Any]


class Neighbours:
    """The files, the prompts and what was found."""

    def __init__(self, base: Path, output: Path, tiny: bool) -> None:
        self.base, self.output, self.tiny = base, output, tiny
        self.size = TINY_SIZE if tiny else SMALL
        self.names: dict[str, str] = {}
        self.found: Row = {"runs": [], "notes": []}
        self._count = 0

    def write_files(self, models: Path) -> None:
        """Write both models below ComfyUI's folder for models."""
        shapes, numbers = (TINY_SHAPES, 2**14) if self.tiny else (Shapes(), 2**24)
        # ComfyUI knows texts of umT5-XXL's width only.
        wide = replace(shapes, transformer=replace(shapes.transformer, text_dim=4096))
        native = StoredModel(self.base / "native", wide, numbers)
        ours = StoredModel(self.base / "ours", shapes, numbers)
        native.folder.mkdir(parents=True)
        native.transformer("bf16")
        ours.write_rest()
        ours.transformer("fp8_scaled")
        ours.part_experts()
        self.names = {
            "native": "native_bf16.safetensors", "high": ours.path("high").name,
            "low": ours.path("low").name, "text": ours.text.name, "vae": ours.vae.name,
        }  # fmt: skip
        places = {
            "native": ("diffusion_models", native.path("high")),
            "high": ("diffusion_models", ours.path("high")),
            "low": ("diffusion_models", ours.path("low")),
            "text": ("text_encoders", ours.text), "vae": ("vae", ours.vae),
        }  # fmt: skip
        for part, (folder, path) in places.items():
            (models / folder).mkdir(parents=True, exist_ok=True)
            (models / folder / self.names[part]).symlink_to(path)

    def write_condition(self, server: ComfyServer) -> None:
        """Write what stands for a text: small encoders are none that ComfyUI knows."""
        torch.manual_seed(0)
        for name in ("positive", "negative"):
            torch.save(torch.randn(1, 77, 4096), server.base / "input" / f"{name}.pt")

    def native(self) -> dict[str, Any]:
        """Two guided steps with ComfyUI's own nodes; each prompt is new to its cache of outputs."""
        self._count += 1
        width, height, frames = self.size
        texts: dict[str, Any] = {
            name: {"class_type": "WanFitProbeConditioning", "inputs": {"name": name}}
            for name in ("positive", "negative")
        }
        if not self.tiny:
            clip = {"clip_name": self.names["text"], "type": "wan", "device": "default"}
            texts = {
                "clip": {"class_type": "CLIPLoader", "inputs": clip},
                "positive": _text("a cat moves right"), "negative": _text("a dog"),
            }  # fmt: skip
        sampler = {
            "model": ["shift", 0], "positive": ["positive", 0], "negative": ["negative", 0],
            "latent_image": ["zeros", 0], "seed": 7, "steps": 2, "cfg": 5.0,
            "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        }  # fmt: skip
        unet = {"unet_name": self.names["native"], "weight_dtype": "default"}
        size = {"width": width, "height": height, "length": frames, "batch_size": 1}
        # Zeros times any number: the same picture, under a key of its own.
        zeros = {"samples": ["empty", 0], "multiplier": self._count / 100}
        kept = {"samples": ["sampler", 0], "filename_prefix": "latents/native"}
        return {
            **texts,
            "unet": {"class_type": "UNETLoader", "inputs": unet},
            "shift": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["unet", 0],
                                                                   "shift": 5.0}},
            "empty": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
            "zeros": {"class_type": "LatentMultiply", "inputs": zeros},
            "sampler": {"class_type": "KSampler", "inputs": sampler},
            "kept": {"class_type": "SaveLatent", "inputs": kept},
        }  # fmt: skip

    def ours(self) -> dict[str, Any]:
        """A clip of four steps without guidance, two with each expert, written as an mp4."""
        self._count += 1
        width, height, frames = self.size
        prompt = graph(
            prompt="a cat moves right", width=width, height=height, num_frames=frames, steps=4,
            guidance_scale=1.0, guidance_scale_2=1.0, scheduler="euler", switch_step=2,
            seed=self._count,
        )  # fmt: skip
        del prompt["4"]
        files = {
            **FILES, "model": self.names["high"], "low_noise_model": self.names["low"],
            "text_encoder": self.names["text"], "vae": self.names["vae"],
        }  # fmt: skip
        prompt["1"]["inputs"] = files
        return prompt

    def run(self, server: ComfyServer, who: str, phase: str) -> None:
        """Run one of both; note seconds, free memory and the native latents."""
        prompt = self.native() if who == "native" else self.ours()
        begun = time.perf_counter()
        server.run(prompt, 400)
        seconds = time.perf_counter() - begun
        device = server.get("/system_stats")["devices"][0]
        row = {
            "who": who, "phase": phase, "seconds": seconds, "free": device["vram_free"],
            "device": device["name"],
        }  # fmt: skip
        if who == "native":
            saved = sorted((server.base / "output" / "latents").glob("native_*.latent"))[-1]
            row["latents"] = _digest(saved)
        self.found["runs"].append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """Write what was found so far."""
        name = self.found["runs"][0]["device"].partition(" ")[2].partition(" :")[0]
        self.output.mkdir(parents=True, exist_ok=True)
        stem = self.output / f"beside_native_{'cpu' if self.tiny else short_name(name)}"
        stem.with_suffix(".json").write_text(json.dumps(self.found, indent=1) + "\n")
        stem.with_suffix(".md").write_text(report(self.found))


def _text(words: str) -> dict[str, Any]:
    return {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": words}}


def _digest(path: Path) -> str:
    import hashlib

    from safetensors.torch import load_file

    latents = load_file(path)["latent_tensor"]
    return hashlib.sha256(latents.float().numpy().tobytes()).hexdigest()[:16]


def seconds_of(found: Row, who: str, phase: str) -> list[float]:
    """Return the seconds of the runs of one, in a phase."""
    return [r["seconds"] for r in found["runs"] if r["who"] == who and r["phase"] == phase]


def report(found: Row) -> str:
    """Return what was found as Markdown."""
    lines = [
        "# Beside a native model", "",
        f"ComfyUI {found.get('comfyui', '?')} on {found['runs'][0]['device']}, "
        f"{found.get('date', '')}; `python benchmarks/beside_native.py`. Native: two guided steps "
        "of a 14B in bf16. Ours: a clip of four steps, A14B in scaled fp8, to an mp4. 832x480, 81 "
        "frames, files of true shape with random weights in the page cache.", "",
        "| what | figure | goal |", "|---|---|---|",
    ]  # fmt: skip
    for who, goal in (("ours", f"<= {GOAL}"), ("native", "<= 1.05")):
        alone, turn = seconds_of(found, who, "warm"), seconds_of(found, who, "in turn")
        if alone and turn:
            ratio = statistics.median(turn) / alone[-1]
            lines.append(f"| {who} in turn / warm by itself | {ratio:.2f} | {goal} |")
    latents = {r["latents"] for r in found["runs"] if "latents" in r}
    lines.append(f"| native latents | {'equal' if len(latents) == 1 else 'differ'} | equal |")
    lines += ["", "| run | which | seconds | free GiB after |", "|---|---|---|---|"]
    for row in found["runs"]:
        lines.append(
            f"| {row['phase']} | {row['who']} | {row['seconds']:.1f} | {row['free'] / GIB:.1f} |"
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in found["notes"]), ""])


def run_all(bench: Neighbours, server: ComfyServer, budget: float) -> None:
    begun = time.perf_counter()
    bench.found["comfyui"] = server.get("/system_stats")["system"]["comfyui_version"]
    bench.found["date"] = time.strftime("%Y-%m-%d")
    plan = [("native", "cold"), ("native", "warm"), ("ours", "cold"), ("ours", "warm")]
    plan += [("native", "in turn"), ("ours", "in turn")] * 3
    for who, phase in plan:
        if time.perf_counter() - begun > budget:
            bench.found["notes"].append(f"{who}, {phase}: skipped, the time is up")
            continue
        bench.run(server, who, phase)
    bench.write()


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfy", type=Path, help="a ComfyUI checkout")
    parser.add_argument("--python", type=Path, help="the Python that runs it")
    parser.add_argument("--budget", type=float, default=400, help="seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    told = parser.parse_args(given)
    if not told.tiny and not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA device; --tiny runs small models on the CPU.")
    checkout = told.comfy or next(reversed(find_checkouts().values()), None)
    if checkout is None:
        raise SystemExit("No ComfyUI was found; give --comfy.")
    python = told.python or find_python(checkout)
    if isinstance(python, str):
        raise SystemExit(f"{python}; or give --python.")
    room = Path("/dev/shm")
    if told.tiny or not room.is_dir() or shutil.disk_usage(room).free < NEEDED:
        room = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(dir=room) as folder:
        base = Path(folder)
        bench = Neighbours(base, told.output, told.tiny)
        server = ComfyServer(base / "comfyui", checkout, python, cpu=told.tiny)
        bench.write_files(server.base / "models")
        bench.write_condition(server)
        try:
            with server:
                run_all(bench, server, told.budget)
        finally:
            told.output.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(server.log_path, told.output / "beside_native.log")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
