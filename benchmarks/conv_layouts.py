"""Do the VAEs' convolutions have the same bits with channels last, and how much faster are they?

    python benchmarks/conv_layouts.py [--output FOLDER] [--tiny]

The exact decode keeps diffusers' layout, channels first, which cuDNN copies into its own and back.
The quick decode has channels last, and other bits: its norms add in another order. Whether the
convolutions by themselves would keep their bits is asked here, of every one that the first three
chunks of a decode and an encode have (later chunks are like the third): VAE 2.1 at 480p, VAE 2.2 at
704p, in fp32, bf16 and fp16. Inputs are random; milliseconds are medians.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.nn.functional as F
from support.casting import cast_module
from support.true_models import autoencoder
from torch import Tensor

from wan_core.decoding import lean_decoder, lean_encoder
from wan_core.journal import versions
from wan_core.models import VAE_21, VAE_22, VaeShape
from wan_core.sampling import StreamingDecoder
from wan_core.sampling.vae import encode_latents

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = (("VAE 2.1, 480p", VAE_21, (60, 104)), ("VAE 2.2, 704p", VAE_22, (44, 80)))
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
Call = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Shapes of input and weight, stride and padding."""


@contextmanager
def recorded(calls: dict[Call, int]) -> Iterator[None]:
    """Count the convolutions that are made in the ``with`` block, by their shapes."""
    plain = {name: getattr(F, name) for name in ("conv2d", "conv3d")}

    def counted(
        conv: Any, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
        *more: Any,
    ) -> Any:  # fmt: skip
        spatial = x.ndim - 2
        sizes = [
            (value,) * spatial if isinstance(value, int) else tuple(value)
            for value in (stride, padding)
        ]
        key = (tuple(x.shape), tuple(weight.shape), sizes[0], sizes[1])
        calls[key] = calls.get(key, 0) + 1
        return conv(x, weight, bias, stride, padding, *more)

    try:
        for name, conv in plain.items():
            setattr(F, name, partial(counted, conv))
        yield
    finally:
        for name, conv in plain.items():
            setattr(F, name, conv)


def calls_of(vae: Any, shape: VaeShape, grid: tuple[int, int]) -> dict[str, dict[Call, int]]:
    """Return the convolutions of three chunks: of a decode, and of an encode."""
    device, dtype, scale = vae.device, vae.dtype, shape.scale_factor_spatial
    found: dict[str, dict[Call, int]] = {"decode": {}, "encode": {}}
    latents = torch.randn(1, shape.z_dim, 3, *grid, device=device, dtype=dtype)
    with recorded(found["decode"]), lean_decoder(vae):
        decoder = StreamingDecoder(vae, latents)
        while not decoder.done:
            decoder.decode_next()
        decoder.close()
    high, wide = (scale * size for size in grid)
    pixels = (torch.rand(1, 3, n, high, wide, dtype=dtype) for n in (1, 4, 4))
    with recorded(found["encode"]), lean_encoder(vae):
        encode_latents(vae, pixels)
    return found


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median of five runs after one that does not count; on a CPU of one."""
    cuda, taken = device.type == "cuda", []
    for _ in range(6 if cuda else 1):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(taken[-5:])


def compared(call: Call, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Compute one convolution in both layouts."""
    size, kernel, stride, padding = call
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, weight, bias = random(*size), random(*kernel) * 0.05, random(kernel[0])
    conv = F.conv2d if len(size) == 4 else F.conv3d
    layout = LAYOUTS[len(size)]
    last = x.contiguous(memory_format=layout)
    first_ms = milliseconds(lambda: conv(x, weight, bias, stride, padding), device)
    last_ms = milliseconds(lambda: conv(last, weight, bias, stride, padding), device)
    expected = conv(x, weight, bias, stride, padding)
    out = conv(last, weight, bias, stride, padding)
    return {
        "equal": torch.equal(out, expected),
        "kept": out.is_contiguous(memory_format=layout),
        "error": float((out.float() - expected.float()).norm() / expected.float().norm()),
        "first_ms": first_ms,
        "last_ms": last_ms,
    }


@torch.no_grad()
def measured(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    rows = []
    for title, shape, grid in CASES:
        if tiny:
            shape, grid = replace(shape, base_dim=8, decoder_base_dim=8, num_res_blocks=1), (2, 3)
        for short, dtype in DTYPES.items():
            with device:
                vae = cast_module(autoencoder(shape).eval().requires_grad_(False), dtype)
            for what, calls in calls_of(vae, shape, grid).items():
                for call, count in calls.items():
                    row = {"case": title, "dtype": short, "half": what, "count": count}
                    names = ("input", "weight", "stride", "padding")
                    rows.append(
                        {**row, **dict(zip(names, call, strict=True)),
                         **compared(call, dtype, device)}
                    )  # fmt: skip
            say(rows, title, short)
            del vae
    return rows


def say(rows: list[dict[str, Any]], title: str, dtype: str) -> None:
    for line in summary(rows):
        if line.startswith(f"| {title} | {dtype} |"):
            sys.stdout.write(line + "\n")


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line of Markdown for each case, dtype and half."""
    lines = []
    for key in dict.fromkeys((row["case"], row["dtype"], row["half"]) for row in rows):
        some = [row for row in rows if (row["case"], row["dtype"], row["half"]) == key]
        first, last = (sum(row[name] * row["count"] for row in some)
                       for name in ("first_ms", "last_ms"))  # fmt: skip
        other = [row for row in some if not row["equal"]]
        share = sum(row["first_ms"] * row["count"] for row in other) / first
        lines.append(
            f"| {' | '.join(key)} | {len(some) - len(other)} of {len(some)} | {1 - share:.0%} | "
            f"{max(row['error'] for row in some):.1e} | {first:.1f} | {last:.1f} |"
        )
    return lines


def as_json(device: str, packages: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """Return the result as JSON, with a line for each row."""
    head = json.dumps({"device": device, "versions": packages})[:-1]
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{head}, "rows": [\n{lines}\n]}}\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    given = parser.parse_args(arguments)
    if not (given.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --tiny goes through everything on the CPU")
    device = torch.device("cpu" if given.tiny else "cuda")
    name = "CPU" if given.tiny else torch.cuda.get_device_name()
    rows = measured(device, given.tiny)
    short = re.search(r"[A-Z]{1,3}\d{2,4}", name)
    target = given.output / f"conv_layouts_{short.group().lower() if short else name.lower()}"
    given.output.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(as_json(name, versions(), rows), encoding="utf-8")
    told = ", ".join(f"{key} {text}" for key, text in versions().items())
    lines = [
        "# Convolutions of the VAEs with channels first and last", "",
        f"{name}; {told}. `python benchmarks/conv_layouts.py`. Three chunks; milliseconds are "
        "those of all their convolutions. Of the time: what convolutions of equal bits take.", "",
        "| case | dtype | half | equal bits | of the time | largest error | first, ms | last, ms |",
        "|---|---|---|---|---|---|---|---|", *summary(rows),
    ]  # fmt: skip
    target.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
