"""Predicted against measured device memory, stage by stage, on the GPU at hand.

    python benchmarks/gpu_estimate.py [--output FILE.json]

True shapes with random weights made on the device, two transformer blocks (the peak does not
depend on their number) and three chunks of the VAE (after which it repeats). For each case:
bytes predicted by ``wan_core``, bytes allocated and reserved beyond the weights, the time of one
transformer block. Takes about a minute on an H100.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.casting import cast_module

from wan_core.forward import lean_forward
from wan_core.memory import decode_peak, encode_peak, lean_peak, text_encoder_peak, transformer_peak
from wan_core.models import VAE_21, VAE_22, VARIANTS
from wan_core.sampling import StreamingDecoder, encode_latents, to_frames

DEVICE = "cuda:0"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIB = 2**20
CAPS: list[float] = []
"""Shares above the allocated peak to try, smallest first; empty: none."""


def tidy() -> None:
    """Leave the allocator with what is alive, and nothing else."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Return peak MiB allocated and reserved beyond what was there, and seconds of a warm run."""
    run()
    tidy()
    base, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    allocated = torch.cuda.max_memory_allocated() - base
    figures = {
        "seconds": seconds,
        "allocated": allocated / MIB,
        "reserved": (torch.cuda.max_memory_reserved() - held) / MIB,
        "before": base / MIB,
    }
    if CAPS:
        figures["room"] = least_room(run, base, allocated, CAPS)
    return figures


def least_room(
    run: Callable[[], object], base: int, allocated: int, shares: Sequence[float]
) -> float:
    """Return the least of ``shares`` above what is allocated with which ``run`` gets through.

    ``base`` bytes stay, ``allocated`` come and go; NaN where no share is enough.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    for share in shares:
        tidy()
        torch.cuda.set_per_process_memory_fraction((base + allocated * (1 + share)) / total)
        try:
            run()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            continue
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return share
    return float("nan")


TRANSFORMERS = [
    ("wan2.1-t2v-14b", 832, 480, 81, "bf16", False),
    ("wan2.1-t2v-14b", 1280, 720, 81, "bf16", False),
    ("wan2.1-t2v-14b", 832, 480, 33, "fp16", False),
    ("wan2.1-i2v-14b", 832, 480, 81, "bf16", False),
    ("wan2.2-ti2v-5b", 1280, 704, 121, "bf16", False),
    ("wan2.2-ti2v-5b", 1280, 704, 121, "bf16", True),
    ("wan2.1-t2v-1.3b", 832, 480, 81, "bf16", False),
    ("wan2.1-t2v-1.3b", 832, 480, 81, "fp32", False),
]
MODES = (("diffusers", None), ("lean", True), ("rows", False))


def transformer_cases(report: Callable[..., None]) -> None:
    from diffusers import WanTransformer3DModel

    for name, width, height, frames, dtype, per_token in TRANSFORMERS:
        shape = VARIANTS[name].transformer
        with torch.device(DEVICE):
            model = WanTransformer3DModel(
                num_attention_heads=shape.heads, ffn_dim=shape.ffn_dim, num_layers=2,
                in_channels=shape.in_channels, out_channels=shape.out_channels,
                image_dim=shape.image_dim, added_kv_proj_dim=shape.added_kv_dim,
            ).eval()  # fmt: skip
        cast_module(model, DTYPES[dtype])
        # Away and back: the casts' gaps would otherwise count as room that is needed.
        model.cpu()
        torch.cuda.empty_cache()
        model.to(DEVICE)
        case = f"{name} {width}x{height}x{frames} {dtype}" + " per token" * per_token
        scale = VARIANTS[name].vae.scale_factor_spatial
        latent = (frames - 1) // 4 + 1, height // scale, width // scale
        _transformer_case(report, case, model, shape, latent, per_token=per_token)
        del model
        torch.cuda.empty_cache()


def _transformer_case(
    report: Callable[..., None], case: str, model: Any, shape: Any, latent: tuple[int, int, int],
    *, per_token: bool,
) -> None:  # fmt: skip
    kind = model.dtype
    frame = (latent[1] // 2) * (latent[2] // 2)

    def run(exact: bool | None) -> None:
        times = torch.full((1,), 900.0, device=DEVICE)
        if per_token:
            times = times.expand(latent[0] * frame).clone()
            times[:frame] = 0
            times = times.unsqueeze(0)
        image = None
        if shape.image_dim:
            image = torch.randn(1, 257, shape.image_dim, device=DEVICE, dtype=kind)
        with lean_forward(model, exact=exact) if exact is not None else nullcontext():
            model(
                torch.randn(1, shape.in_channels, *latent, device=DEVICE, dtype=kind),
                times,
                torch.randn(1, 512, shape.text_dim, device=DEVICE, dtype=kind),
                image,
                return_dict=False,
            )

    sizes = dict(zip(("latent_frames", "latent_height", "latent_width"), latent, strict=True))
    numbers: dict[str, Any] = {"batch": 1, "size": kind.itemsize, "per_token": per_token, **sizes}
    for mode, exact in MODES:
        if exact is None:
            predicted = transformer_peak(shape, **numbers)
        else:
            predicted = lean_peak(shape, exact=exact, **numbers)
        report(f"{case} {mode}", predicted, measure(partial(run, exact)))


def vae_cases(report: Callable[..., None]) -> None:
    from diffusers import AutoencoderKLWan

    for shape, sizes in ((VAE_21, [(832, 480), (1280, 720)]), (VAE_22, [(1280, 704)])):
        for dtype in ("fp32", "bf16"):
            with torch.device(DEVICE):
                vae = AutoencoderKLWan(
                    base_dim=shape.base_dim, decoder_base_dim=shape.decoder_base_dim,
                    z_dim=shape.z_dim, is_residual=shape.is_residual,
                    in_channels=shape.in_channels, out_channels=shape.out_channels,
                    patch_size=shape.patch_size, scale_factor_spatial=shape.scale_factor_spatial,
                    latents_mean=list(shape.latents_mean), latents_std=list(shape.latents_std),
                ).eval().to(DTYPES[dtype])  # fmt: skip
            for width, height in sizes:
                _vae_case(report, vae, shape, width, height, dtype)
            del vae
            torch.cuda.empty_cache()


def _vae_case(
    report: Callable[..., None], vae: Any, shape: Any, width: int, height: int, dtype: str
) -> None:
    kind, scale = DTYPES[dtype], shape.scale_factor_spatial

    def decode() -> None:
        latents = torch.randn(
            1, shape.z_dim, 4, height // scale, width // scale, device=DEVICE, dtype=kind
        )
        decoder = StreamingDecoder(vae, latents)
        while not decoder.done:
            to_frames(decoder.decode_next())

    def encode() -> None:
        chunks = (
            torch.randn(1, 3, 4 if i else 1, height, width, device=DEVICE, dtype=kind)
            for i in range(3)
        )
        encode_latents(vae, chunks)

    name = f"vae {shape.z_dim} {width}x{height} {dtype}"
    predicted = decode_peak(
        shape, batch=1, latent_frames=4, latent_height=height // scale,
        latent_width=width // scale, size=kind.itemsize,
    )  # fmt: skip
    report(f"{name} decode", predicted, measure(decode))
    predicted = encode_peak(
        shape, batch=1, num_frames=9, height=height, width=width, size=kind.itemsize
    )
    report(f"{name} encode", predicted, measure(encode))


def text_cases(report: Callable[..., None]) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        d_model=4096, d_ff=10240, num_layers=2, num_heads=64, d_kv=64, vocab_size=1000,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    for dtype in ("bf16", "fp32"):
        with torch.device(DEVICE):
            model = UMT5EncoderModel(config).eval().to(DTYPES[dtype])

        def run(model: Any = model) -> None:
            tokens = torch.ones(1, 512, dtype=torch.long, device=DEVICE)
            model(tokens, torch.ones_like(tokens))

        report(f"umT5 {dtype}", text_encoder_peak(DTYPES[dtype].itemsize), measure(run))
        del model


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--caps", action="store_true", help="also find how little room is enough")
    arguments = parser.parse_args()
    CAPS.extend([0.0, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4] if arguments.caps else [])
    rows: list[dict[str, Any]] = []

    def report(case: str, predicted: int, measured: dict[str, float]) -> None:
        row = {"case": case, "predicted": predicted / MIB, **measured}
        row["error"] = row["predicted"] / row["allocated"] - 1
        row["fragmentation"] = row["reserved"] / row["allocated"] - 1
        rows.append(row)
        print(
            f"{case:<52} predicted {row['predicted']:8.0f} allocated {row['allocated']:8.0f} "
            f"({row['error']:+6.1%}) reserved {row['reserved']:8.0f} "
            f"({row['fragmentation']:+5.1%}) room {row.get('room', 0):.0%} {row['seconds']:.3f} s",
            flush=True,
        )

    found = torch.cuda.get_device_properties(0)
    machine = {
        "device": found.name,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "bytes": found.total_memory,
    }
    print(machine)
    for cases in (transformer_cases, vae_cases, text_cases):
        try:
            cases(report)
        except torch.OutOfMemoryError as error:
            print(f"{cases.__name__}: {error}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine, "cases": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
