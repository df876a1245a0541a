"""How much more than the bytes alive does each of torch's CUDA allocators need to get through?

    python benchmarks/allocator_room.py [--output FOLDER] [--only NAME ...]

Freed tensors leave gaps that the next, larger one does not fit into. Three ways to allocate are
tried, each in a process of its own because torch reads the choice once: torch's default, the same
with ``expandable_segments:True`` (PYTORCH_CUDA_ALLOC_CONF), and CUDA's own pool
(``backend:cudaMallocAsync``, which ComfyUI chooses on most cards).

For each, a 14B transformer of true shape and random weights, cut to a few blocks that are streamed
through two buffers, makes guided passes; then the VAE decodes. First without a cap: bytes alive at
most, beside what the allocator held. Then capped at the bytes alive and a little more, until it
gets through: that little more is the room it needs. Two minutes for each allocator on an H100.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch
from gpu_estimate import least_room, tidy
from support.casting import cast_module
from support.true_models import autoencoder, transformer

from wan_core.decoding import lean_decoder
from wan_core.forward import lean_forward, run_together
from wan_core.models import VAE_21, VARIANTS
from wan_core.placing import stream_blocks
from wan_core.sampling import StreamingDecoder, to_frames

MIB = 2**20
ALLOCATORS = {
    "default": "",
    "expandable segments": "expandable_segments:True",
    "cudaMallocAsync": "backend:cudaMallocAsync",
}
SIZES = {"480p81": (21, 60, 104), "720p81": (21, 90, 160)}
BLOCKS = 3
"""Of the forty: what is alive at the peak does not depend on how many follow."""
PASSES = 2
SHARES = (0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Room to try, as shares of the activations, smallest first."""


def room(run: Callable[[], object], weights: int) -> dict[str, float]:
    """Return MiB of activations and held beside all, and the least share that got through.

    ``weights`` are bytes that stay while ``run`` runs, of its peak.
    """
    run()
    tidy()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    alive, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    activations = alive - weights
    return {
        "seconds": seconds,
        "alive": alive / MIB,
        "activations": activations / MIB,
        "held": held / MIB,
        "room": least_room(run, weights, activations, SHARES),
    }


@contextmanager
def streamed(model: Any, way: str) -> Iterator[None]:
    """Stream a model's blocks, with diffusers' forward or one of ours."""
    with ExitStack() as stack:
        stack.enter_context(stream_blocks(model, "cuda:0", pin_bytes=64 * 2**30))
        if way != "diffusers":
            refused = stack.enter_context(lean_forward(model, exact=way == "lean"))
            assert refused is None, refused
        yield


def passes(size: tuple[int, int, int], model: Any, way: str) -> None:
    """Make guided passes, as a run's steps do: the stream is opened and closed each time."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, *size, generator=g)
    texts = [torch.randn(1, 512, 4096, generator=g) for _ in range(2)]
    with streamed(model, way):
        latents = noise.to("cuda:0")
        for _ in range(PASSES):
            calls = [
                {
                    "hidden_states": latents.bfloat16(),
                    "timestep": torch.full((1,), 900.0, device="cuda:0"),
                    "encoder_hidden_states": text.to("cuda:0", torch.bfloat16),
                    "return_dict": False,
                }
                for text in texts
            ]
            positive, negative = (out[0].float() for out in run_together(model, calls))
            latents = latents - 0.1 * (negative + 4 * (positive - negative))


def decode(size: tuple[int, int, int], vae: Any, wishes: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 16, *size, generator=g).to("cuda:0", vae.dtype)
    with lean_decoder(vae, pin_bytes=16 * 2**30, **wishes) as refused:
        assert refused is None, refused
        decoder = StreamingDecoder(vae, latents)
        while decoder.position < 4:
            to_frames(decoder.decode_next())
        decoder.close()


def weights_while_streaming(model: Any) -> int:
    before = torch.cuda.memory_allocated()
    with streamed(model, "diffusers"):
        return torch.cuda.memory_allocated() - before


def measure_passes() -> dict[str, Any]:
    torch.manual_seed(0)
    shape = replace(VARIANTS["wan2.2-t2v-a14b"].transformer, layers=BLOCKS)
    with torch.device("cuda:0"):
        model: Any = transformer(shape).eval().requires_grad_(False)
    cast_module(model, torch.bfloat16).to("cpu")
    tidy()
    weights = weights_while_streaming(model)
    return {
        f"{name} {way}": room(partial(passes, size, model, way), weights)
        for name, size in SIZES.items()
        for way in ("diffusers", "lean", "rows")
    }


def measure_decodes() -> dict[str, Any]:
    vae: Any = autoencoder(VAE_21).eval().requires_grad_(False)
    cast_module(vae, torch.bfloat16).to("cuda:0")
    weights = torch.cuda.memory_allocated()
    ways: dict[str, dict[str, Any]] = {"lean": {}, "lean, cache in RAM": {"cache_on_host": True}}
    return {
        f"480p81 decode bf16 {name}": room(partial(decode, SIZES["480p81"], vae, wishes), weights)
        for name, wishes in ways.items()
    }


@torch.no_grad()
def measure_all() -> dict[str, Any]:
    """Measure every case with this process's allocator."""
    found = measure_passes()
    tidy()
    return {**found, **measure_decodes()}


def report(found: dict[str, Any]) -> str:
    lines = [
        "# The room each allocator needs", "",
        f"Measured on {found['device']}, torch {found['torch']}, by "
        "`python benchmarks/allocator_room.py`. Room: what is needed beyond the bytes alive, as a "
        "share of the activations, to get through under a cap.", "",
        "| case | allocator | seconds | MiB alive | activations | held, no cap | room |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, cases in found["allocators"].items():
        for case, row in cases.items():
            least = "-" if math.isnan(row["room"]) else f"{row['room']:.0%}"
            lines.append(
                f"| {case} | {name} | {row['seconds']:.2f} | {row['alive']:,.0f} "
                f"| {row['activations']:,.0f} | {row['held']:,.0f} | {least} |"
            )
    missing = [name for name in ALLOCATORS if name not in found["allocators"]]
    lines += ["", f"Not measured here: {', '.join(missing)}."] * bool(missing)
    return "\n".join([*lines, ""])


def child(name: str) -> dict[str, Any]:
    """Measure with one allocator, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_ALLOC_CONF")}
    if ALLOCATORS[name]:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = ALLOCATORS[name]
    command = [sys.executable, __file__, "--here"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--only", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--here", action="store_true", help="measure in this process, as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA device.")
    if arguments.here:
        print(json.dumps(measure_all()))
        return 0
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_properties(0).name,
        "torch": torch.__version__,
        "allocators": {},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        found["allocators"][name] = child(name)
        (arguments.output / "allocator_room.json").write_text(json.dumps(found, indent=1) + "\n")
        (arguments.output / "allocator_room.md").write_text(report(found))
        print(report(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
