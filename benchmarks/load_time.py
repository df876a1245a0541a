"""Time and memory of loading one transformer checkpoint: WanFit, safetensors alone, diffusers.

    python benchmarks/load_time.py [--gb 4] [--runs 3] [--folder DIR]

Writes a synthetic bf16 checkpoint of 14B blocks (deleted at the end), loads it in child processes
whose memory is sampled from outside, and writes ``results/load_time.md``. "Touched" is the time
until every page of every weight has been read once: a loader that only maps the file has done
nothing before that. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 40,
    "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 13824, "cross_attn_norm": True, "eps": 1e-6,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
# name: (what it does, code); `file`, `folder` and `dtype` are set before it runs.
LOADERS = {
    "safetensors": ("safetensors `load_file`, bf16", "load_file(file)", "bfloat16"),
    "diffusers": ("diffusers `from_pretrained`, bf16", "pretrained(folder, dtype)", "bfloat16"),
    "wanfit": ("WanFit `load_component`, bf16", "load_component(folder, dtype)", "bfloat16"),
    "wanfit-mapped": (
        "WanFit, `map_file=True`, bf16", "load_component(folder, dtype, map_file=True)", "bfloat16",
    ),
    "diffusers-cast": (
        "diffusers `from_pretrained`, to fp16", "pretrained(folder, dtype)", "float16",
    ),
    "wanfit-cast": ("WanFit `load_component`, to fp16", "load_component(folder, dtype)", "float16"),
    "wanfit-unchecked": (
        "WanFit without its check for NaN, bf16", "load_component(folder, dtype)", "bfloat16",
    ),
}  # fmt: skip
CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import torch, diffusers, transformers
from safetensors.torch import load_file
from wan_core import tensors
from wan_core.loading import load_component
pretrained = lambda folder, dtype: diffusers.WanTransformer3DModel.from_pretrained(
    folder, torch_dtype=dtype)
diffusers.WanTransformer3DModel  # imported on first use
if {unchecked}:
    tensors.is_finite = lambda *_: True
file, folder, dtype = {file!r}, {folder!r}, torch.{dtype}
torch.set_grad_enabled(False)
torch.set_num_threads(2)
print("ready", flush=True); sys.stdin.readline()
start, begun = time.perf_counter(), time.process_time()
loaded = {call}
seconds = time.perf_counter() - start
values = list(loaded.values() if isinstance(loaded, dict) else loaded.parameters())
for value in values:
    value.view(-1).view(torch.uint8)[::4096].sum()
touched, busy = time.perf_counter() - start, time.process_time() - begun
kept = sum(value.numel() * value.element_size() for value in values)
print(seconds, touched, busy, kept, flush=True); sys.stdin.readline()
"""


def write_checkpoint(folder: Path, gigabytes: float) -> Path:
    """Write a checkpoint of about this size tensor by tensor, so that memory stays small."""
    import torch
    from diffusers import WanTransformer3DModel

    layers = max(1, round((gigabytes * 1e9 - 0.47e9) / 0.703e9))
    config = {**CONFIG, "num_layers": layers}
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in model.state_dict().items():
        end = position + tensor.numel() * 2
        header[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors does, so that tensors are aligned
    noise = torch.randn(16 * MIB, generator=torch.manual_seed(0)).mul_(0.02).bfloat16()
    block = noise.view(torch.uint8).numpy().tobytes()
    path = folder / "diffusion_pytorch_model.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while position > 0:
            file.write(block[:position])
            position -= len(block)
        file.flush()
        os.fsync(file.fileno())
    return path


def forget_pages(path: Path) -> None:
    """Ask the kernel to drop the file from its cache, so that the next load reads the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of(pid: int) -> tuple[int, int]:
    """Return the (anonymous, file-backed) resident bytes of a process."""
    found = {"RssAnon": 0, "RssFile": 0}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) * 1024
    return found["RssAnon"], found["RssFile"]


def run(name: str, file: Path, cold: bool) -> dict[str, float]:
    """Load once in a child process; returns seconds and bytes above what the imports took."""
    _, call, dtype = LOADERS[name]
    code = CHILD.format(
        root=str(ROOT), unchecked=name.endswith("unchecked"), file=str(file), dtype=dtype,
        folder=str(file.parent), call=call,
    )  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdin and child.stdout
    assert child.stdout.readline().strip() == "ready", f"{name} did not start"
    if cold:
        forget_pages(file)
    before = memory_of(child.pid)
    os.set_blocking(child.stdout.fileno(), False)
    child.stdin.write("\n")
    child.stdin.flush()
    anonymous = mapped = total = 0
    line = ""
    while not line:
        now = memory_of(child.pid)
        anonymous = max(anonymous, now[0] - before[0])
        mapped = max(mapped, now[1] - before[1])
        total = max(total, sum(now) - sum(before))
        time.sleep(0.005)
        line = child.stdout.readline()
        assert child.poll() is None, f"{name} failed"
    seconds, touched, busy, kept = map(float, line.split())
    child.stdin.close()
    child.wait()
    return {
        "seconds": seconds, "touched": touched, "busy": busy, "kept": kept,
        "anonymous": anonymous, "mapped": mapped, "total": total,
    }  # fmt: skip


def report(
    results: dict[tuple[str, bool], list[dict[str, float]]], size: int, runs: int, load: float
) -> str:
    import diffusers
    import safetensors
    import torch

    lines = [
        "# Loading a transformer checkpoint",
        "",
        f"Measured {time.strftime('%Y-%m-%d')} by `python benchmarks/load_time.py`: one bf16 file "
        f"of {size / 1e9:.2f} GB (14B blocks, random weights), {os.cpu_count()} CPU cores "
        f"({platform.machine()}), torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"safetensors {safetensors.__version__}. Median of {runs} loads, each in a new process, "
        "loaders taking turns. Memory is what the process grew by while loading, sampled every "
        "5 ms: anonymous memory, and pages of the mapped file, which the system can take back. "
        f"CPU seconds are those of the process until touched; {load:.1f} processes were running "
        "on average meanwhile, so the seconds of the clock are upper bounds.",
        "",
        "| loader | file in cache | loaded s | touched s | CPU s | kept GB | anonymous peak GB "
        "| mapped GB | peak / kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, cold), rows in results.items():
        m = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        lines.append(
            f"| {LOADERS[name][0]} | {'no' if cold else 'yes'} | {m['seconds']:.2f} "
            f"| {m['touched']:.2f} | {m['busy']:.2f} | {m['kept'] / 1e9:.2f} "
            f"| {m['anonymous'] / 1e9:.2f} "
            f"| {m['mapped'] / 1e9:.2f} | {m['total'] / m['kept']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/load_time.md")
    arguments = parser.parse_args()
    results: dict[tuple[str, bool], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        file = write_checkpoint(Path(folder), arguments.gb)
        for cold in (False, True):
            if not cold:
                run("safetensors", file, cold)  # fills the cache
            for _ in range(arguments.runs):
                for name in LOADERS:
                    results.setdefault((name, cold), []).append(run(name, file, cold))
                    print(name, "cold" if cold else "warm", results[name, cold][-1], flush=True)
        size = file.stat().st_size
    text = report(results, size, arguments.runs, os.getloadavg()[2])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
