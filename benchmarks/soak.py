"""Many mixed renders in one process: does memory grow, does a file or thread stay open?

    python benchmarks/soak.py --renders 50
    python benchmarks/soak.py --renders 50 --comfyui --write

Small models of every family, a LoRA, windows, continuation, pictures, files in fp8 and GGUF, a
journal and an mp4, with renders between them that fail or are interrupted. Every job is made once
to warm up; what the process holds afterwards is compared with what it holds after ``--renders``
more. Every result is compared, bit for bit, with that of a fresh process. ``--comfyui`` does the
same with workflows in one running ComfyUI. ``--write`` puts the figures into
``benchmarks/results/soak.md``. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import psutil
import torch
from PIL import Image
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support import single_files, stored_files, tiny_models
from support.comfy_graphs import FILES, frames_of, graph
from support.comfy_server import ComfyServer, find_checkout, find_python
from support.stored_models import write_gguf

from wan_core import GenerationConfig, WanLoRA, WanModelFiles, WanPipelineLoader

MIB = 1 << 20
MAX_GROWTH = 50 * MIB
REPORT = ROOT / "benchmarks" / "results" / "soak.md"
SMALL: dict[str, Any] = {"prompt": "a red cat", "width": 64, "height": 64, "num_frames": 17,
                         "num_inference_steps": 3, "seed": 1}  # fmt: skip
WINDOWS: dict[str, Any] = {"max_chunk_size": 9, "window_overlap": 4}


@dataclass
class Figures:
    """What a process held: after the warm-up, at the end, and most in between."""

    renders: int = 0
    failed_on_purpose: int = 0
    differing: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    """Bytes of the resident set after the warm-up and after every render since."""
    handles: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth(self) -> int:
        """Bytes by which the resident set of the last renders exceeds that after the warm-up."""
        return sorted(self.rss[-5:])[2] - self.rss[0]

    def look(self, process: psutil.Process) -> None:
        self.rss.append(process.memory_info().rss)
        self.handles.append(process.num_fds())
        self.threads.append(process.num_threads())


class Stop(Exception):
    """Raised by a callback: an interrupt."""


def write_models(folder: Path) -> None:
    """Make a folder of every family, both experts as single files in fp8 and GGUF, and a LoRA."""
    for number, family in enumerate(tiny_models.FAMILIES):
        tiny_models.make_folder(folder / family, family, seed=number)
    single_files.write(folder / "files")
    torch.manual_seed(3)
    for role in ("high", "low"):
        model = tiny_models.make_transformer("wan2.2-t2v-a14b", **single_files.TRANSFORMER)
        state = layouts.original_transformer(layouts.state_of(model))
        state = {name: value.to(torch.bfloat16) for name, value in state.items()}
        chosen = {n for n, v in state.items() if v.ndim == 2 and n.startswith("blocks.")}
        chosen = {n for n in chosen if n.endswith(".weight") and state[n].shape[1] % 32 == 0}
        tensors, metadata, _ = stored_files.pack(state, chosen, "fp8_scaled", "notes")
        stored_files.write(folder / f"{role}_fp8.safetensors", tensors, metadata)
        write_gguf(folder / f"{role}_Q8_0.gguf", state, chosen, "Q8_0")
    pairs = {}
    for name in ("self_attn.q", "ffn.0"):
        wide, inner = (24, 24) if name == "self_attn.q" else (24, 32)
        pairs[f"diffusion_model.blocks.0.{name}.lora_A.weight"] = torch.randn(2, wide)
        pairs[f"diffusion_model.blocks.0.{name}.lora_B.weight"] = torch.randn(inner, 2)
    save_file(pairs, folder / "lora.safetensors")
    Image.effect_noise((64, 64), 80).convert("RGB").save(folder / "in.png")


Job = Callable[[Path, WanPipelineLoader], "torch.Tensor | None"]
"""Makes one video of the models below a folder; None if the job fails on purpose."""


def _render(
    model: Any, job: dict[str, Any], loras: Any = (), wishes: dict[str, Any] | None = None
) -> Job:
    def run(folder: Path, loader: WanPipelineLoader) -> torch.Tensor | None:
        given = model(folder) if callable(model) else folder / model
        at = [WanLoRA(folder / path, expert, strength) for path, expert, strength in loras]
        options = {"device": "cpu", "precision": "fp32"} | (wishes or {})
        wrapper = loader.load_wan_pipeline(given, loras=at, optimization_config=options)
        config = {name: value(folder) if callable(value) and name in _PATHS else value
                  for name, value in job.items()}  # fmt: skip
        try:
            result = wrapper.generate(GenerationConfig(**(SMALL | config)))
        except Stop:
            return None
        if not result.success:
            return None
        for name in ("output_path",):
            if name in config:
                Path(config[name]).unlink()
        frames: torch.Tensor = result.frames
        return frames

    return run


_PATHS = ("image", "last_image", "output_path", "journal_folder", "audio")


def _stored(kind: str) -> Callable[[Path], WanModelFiles]:
    def files(folder: Path) -> WanModelFiles:
        end = "gguf" if kind == "Q8_0" else "safetensors"
        return WanModelFiles(
            transformer=folder / f"high_{kind}.{end}", transformer_2=folder / f"low_{kind}.{end}",
            vae=folder / "files" / "vae" / single_files.VAE,
            text_encoder=folder / "files" / "text_encoders" / single_files.TEXT,
        )  # fmt: skip

    return files


def _raise(*_: object) -> None:
    raise Stop


def _late() -> Callable[..., None]:
    calls = 0

    def check(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 10 == 0:
            raise Stop

    return check


def _picture(folder: Path) -> Path:
    return folder / "in.png"


IMAGE = {"image": _picture}
PLACE = {"output_path": lambda folder: folder / "out" / "clip.mp4", "resume": "auto"}
JOBS: dict[str, Job] = {
    "2.1 T2V": _render("wan2.1-t2v", {}),
    "2.1 T2V in windows": _render("wan2.1-t2v", WINDOWS),
    "2.2 TI2V-5B continued": _render("wan2.2-ti2v-5b", WINDOWS | {"window_mode": "continuation"}),
    "2.1 T2V with a LoRA": _render("wan2.1-t2v", {}, [("lora.safetensors", "both", 0.7)]),
    "2.1 T2V streamed": _render("wan2.1-t2v", {}, wishes={"offload": "sequential"}),
    "2.1 T2V in bf16": _render("wan2.1-t2v", {}, wishes={"precision": "bf16"}),
    "2.1 I2V": _render("wan2.1-i2v", IMAGE),
    "2.1 FLF2V": _render("wan2.1-flf2v", IMAGE | {"last_image": _picture}),
    "2.2 T2V-A14B": _render("wan2.2-t2v-a14b", {}),
    "2.2 T2V-A14B to an mp4": _render("wan2.2-t2v-a14b", PLACE),
    "2.2 T2V-A14B in fp8": _render(_stored("fp8"), {}, wishes={"precision": "bf16"}),
    "2.2 T2V-A14B in GGUF": _render(_stored("Q8_0"), {}, wishes={"precision": "bf16"}),
    "2.2 I2V-A14B in windows": _render("wan2.2-i2v-a14b", IMAGE | WINDOWS),
    "2.2 TI2V-5B": _render("wan2.2-ti2v-5b", {}),
    "2.2 TI2V-5B with a picture": _render("wan2.2-ti2v-5b", IMAGE),
    "refused: a size": _render("wan2.1-t2v", {"width": -3}),
    "refused: no picture": _render("wan2.1-i2v", {}),
    "refused: a codec": _render("wan2.1-t2v", PLACE | {"codec": "prores_ks"}),
    "failed: latents": _render(
        "wan2.1-t2v", {"latents": torch.full((1, 16, 5, 8, 8), float("nan"))}
    ),
    "interrupted at a step": _render("wan2.2-t2v-a14b", {"progress_callback": _raise}),
    "interrupted anywhere": _render("wan2.1-i2v", IMAGE | {"interrupt_check": _late()}),
    "interrupted, kept": _render(
        "wan2.1-flf2v",
        IMAGE | PLACE | {"last_image": _picture, "decode_callback": _raise},
    ),
}


def digest(frames: torch.Tensor | None) -> str:
    """Return a hash of the frames, "none" for a job that failed."""
    if frames is None:
        return "none"
    return hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()


def in_new_process(*arguments: str) -> str:
    """Run this program with ``arguments`` in a process of its own; return its last line."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return done.stdout.splitlines()[-1]


def fresh_result(folder: Path, name: str) -> str:
    """Make one job and nothing else; return the hash of its result."""
    torch.set_num_threads(1)
    return digest(JOBS[name](folder, WanPipelineLoader(enable_caching=False)))


def soak_library(folder: Path, renders: int, seed: int = 0) -> Figures:
    """Warm up with every job, then make ``renders`` more in a seeded order; in this process."""
    torch.set_num_threads(1)
    figures, process, began = Figures(), psutil.Process(), time.perf_counter()
    expected = {name: in_new_process("--fresh", str(folder), name) for name in JOBS}
    loader, draw, order = WanPipelineLoader(), random.Random(seed), [*JOBS]
    for name in order:
        JOBS[name](folder, loader)
    gc.collect()
    figures.look(process)
    while figures.renders < renders:
        draw.shuffle(order)
        for name in order[: renders - figures.renders]:
            found = digest(JOBS[name](folder, loader))
            figures.renders += 1
            figures.failed_on_purpose += found == "none"
            if found != expected[name]:
                figures.differing.append(name)
            gc.collect()
            figures.look(process)
    figures.seconds = time.perf_counter() - began
    loader.clear_cache()
    return figures


def soak_alone(renders: int) -> Figures:
    """Run ``soak_library`` in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        return Figures(**json.loads(in_new_process("--alone", folder, str(renders))))


# -- in a ComfyUI ---------------------------------------------------------------------------------


def workflows() -> dict[str, dict[str, Any]]:
    """Return prompts by name; those named "refused" or "interrupted" make no frames."""
    image = {"class_type": "LoadImage", "inputs": {"image": "in.png"}}
    size = {"width": 64, "height": 64, "num_frames": 17, "steps": 3}
    found = {
        "2.1 T2V": graph(model="wan2.1-t2v", **size),
        "2.1 T2V in windows": graph("WanChunkedSampler", "wan2.1-t2v", **size),
        "2.1 I2V": graph(model="wan2.1-i2v", start_image=["7", 0], **size),
        "2.2 T2V-A14B": graph(model="wan2.2-t2v-a14b", **size),
        "2.2 I2V-A14B": graph(model="wan2.2-i2v-a14b", start_image=["7", 0], **size),
        "2.2 TI2V-5B": graph(model="wan2.2-ti2v-5b", **size),
        "2.2 T2V-A14B as files": graph(**size),
        "2.1 T2V with a LoRA": graph(model="wan2.1-t2v", **size),
        "refused: a picture is missing": graph(model="wan2.1-i2v", **size),
        "interrupted": graph(
            model="wan2.2-i2v-a14b", start_image=["7", 0], **(size | {"steps": 40})
        ),
    }
    for prompt in found.values():
        if "start_image" in prompt["3"]["inputs"]:
            prompt["7"] = image
    found["2.2 T2V-A14B as files"]["1"]["inputs"] = {"model": single_files.HIGH, **FILES}
    chosen = {"lora": "lora.safetensors", "expert": "both", "strength": 0.7, "use_recipe": False}
    lora = {"class_type": "WanLoRA", "inputs": {"pipeline": ["1", 0], **chosen}}
    with_lora = found["2.1 T2V with a LoRA"]
    with_lora["2"], with_lora["3"]["inputs"]["pipeline"] = lora, ["2", 0]
    return found


def run_workflow(server: ComfyServer, name: str, prompt: dict[str, Any], number: int) -> str:
    """Run a prompt, made to run anew by its rate; return the hash of its frames, or "none"."""
    prompt = json.loads(json.dumps(prompt))
    prompt["3"]["inputs"]["fps"] = 10 + number / 8
    prompt["4"]["inputs"]["name"] = "soak"
    queued = server.queue(prompt)
    if name == "interrupted":
        server.wait_until(lambda: server.state()["progress"].get("3", [0])[0] >= 1, 120)
        server.post("/interrupt")
    status = server.wait(queued)["status"]["status_str"]
    if name.startswith(("refused", "interrupted")):
        return "none" if status == "error" else status
    assert status == "success", (name, server.log()[-3000:])
    return digest(frames_of(server, "soak"))


def comfy_server(folder: Path, base: Path) -> ComfyServer:
    """Return a ComfyUI, not started yet, that sees the models of ``folder``."""
    checkout = find_checkout()
    python = checkout if isinstance(checkout, str) else find_python(checkout)
    if isinstance(checkout, str) or isinstance(python, str):
        raise RuntimeError(str(python))
    models = base / "models"
    models.mkdir(parents=True)
    for kind in ("diffusion_models", "text_encoders", "vae"):
        (models / kind).symlink_to(folder / "files" / kind, target_is_directory=True)
    (models / "diffusers").symlink_to(folder, target_is_directory=True)
    (models / "loras").mkdir()
    (models / "loras" / "lora.safetensors").symlink_to(folder / "lora.safetensors")
    server = ComfyServer(base, checkout, python)
    (base / "input" / "in.png").write_bytes((folder / "in.png").read_bytes())
    return server


def soak_comfyui(renders: int, seed: int = 0) -> Figures:
    """The same in one ComfyUI; the results to compare with are those of another, in turn."""
    figures, began, prompts = Figures(), time.perf_counter(), workflows()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "made"
        write_models(folder)
        with comfy_server(folder, Path(root) / "fresh") as server:
            expected = {}
            for name in sorted(prompts):  # another order than the one that follows
                expected[name] = run_workflow(server, name, prompts[name], 0)
                server.free("unload_models")
        with comfy_server(folder, Path(root) / "long") as server:
            process, draw, order = (
                psutil.Process(server._process.pid),
                random.Random(seed),
                [*prompts],
            )
            for number, name in enumerate(order):
                run_workflow(server, name, prompts[name], number)
            _settle(server)
            figures.look(process)
            while figures.renders < renders:
                draw.shuffle(order)
                for name in order[: renders - figures.renders]:
                    figures.renders += 1
                    found = run_workflow(server, name, prompts[name], 100 + figures.renders)
                    figures.failed_on_purpose += found == "none"
                    if found != expected[name]:
                        figures.differing.append(name)
                    _settle(server)
                    figures.look(process)
    figures.seconds = time.perf_counter() - began
    return figures


def _settle(server: ComfyServer) -> None:
    """Collect garbage in ComfyUI, which does so every ten seconds at most."""
    server.post("/wanfit_probe/collect")


def report(found: dict[str, Figures]) -> str:
    """Return the figures as a page of Markdown."""
    import diffusers
    import transformers

    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}, transformers {transformers.__version__}"
    )
    rows = [
        "# Soak",
        "",
        f"Measured {time.strftime('%Y-%m-%d')} on the CPU ({platform.machine()}, 1 thread), "
        f"{versions}, by `python benchmarks/soak.py --renders "
        f"{max(f.renders for f in found.values())}{' --comfyui' * (len(found) > 1)} --write`. "
        f"Small models of the real classes. Warm-up: every one of {len(JOBS)} jobs (in ComfyUI "
        f"{len(workflows())} workflows) once. RSS: the resident set; growth: the median of the "
        "last five renders over the end of the warm-up. Differing: results that are not, bit for "
        "bit, those of a fresh process (in ComfyUI those of another one, which unloads everything "
        "between workflows).",
        "",
        "| where | renders | of them failing on purpose | differing | RSS after warm-up MiB | at "
        "the end | most | growth | open files: warm, end | threads: warm, end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for where, f in found.items():
        rss = [f"{value / MIB:.1f}" for value in (f.rss[0], f.rss[-1], max(f.rss), f.growth)]
        rows.append(
            f"| {where} | {f.renders} | {f.failed_on_purpose} | {len(f.differing)} | "
            f"{' | '.join(rss)} | {f.handles[0]}, {f.handles[-1]} | "
            f"{f.threads[0]}, {f.threads[-1]} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--renders", type=int, default=50)
    parser.add_argument("--comfyui", action="store_true", help="also in a running ComfyUI")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(ROOT)}")
    parser.add_argument("--alone", nargs=2, metavar=("FOLDER", "RENDERS"), help=argparse.SUPPRESS)
    parser.add_argument("--fresh", nargs=2, metavar=("FOLDER", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fresh:
        print(fresh_result(Path(args.fresh[0]), args.fresh[1]))
        return
    if args.alone:
        figures = soak_library(Path(args.alone[0]), int(args.alone[1]))
        print(json.dumps(asdict(figures)))
        return
    found = {"one process": soak_alone(args.renders)}
    if args.comfyui:
        found["one ComfyUI"] = soak_comfyui(args.renders)
    text = report(found)
    print(text)
    for where, figures in found.items():
        print(where, figures.differing, [value // MIB for value in figures.rss], figures.seconds)
    if args.write:
        REPORT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
