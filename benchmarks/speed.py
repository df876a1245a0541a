"""How fast is a forward, a decode, a clip? Each way beside diffusers, in one run on one GPU.

    python benchmarks/speed.py --part forward [--budget 500] [--output FOLDER] [--only forward-...]
    python benchmarks/speed.py --part decode
    python benchmarks/speed.py --part clip [--folder FOLDER]

Each part takes less than nine minutes on an H100. Transformers of true shape with random weights,
resident on the device. One forward (a guided step has two) of the 14B at 480p81 and 720p81, of the
5B at 704p121 with a held first frame, and of the 1.3B at 480p81, each in every way that applies:

- diffusers: its own forward, eager; compiled: the same with ``compile_repeated_blocks``;
- unfused, exact: the lean forward without and with fused kernels; both must have diffusers' bits;
- rows: the lean forward that cuts products by rows and heads, for the least memory;
- fast: the fastest 16-bit attention beside that; and, of a 14B whose matrices are stored in fp8,
  exact (matrices taken apart at each use), fast (products in fp8) and the feed-forwards alone;
- fastest: attention in 8 bit too, by the kernel that proves the fastest.

Decodes and encodes of both VAEs: ``autoencoders.py``. Errors are relative, in the Euclidean norm,
against diffusers' forward of the same weights, or its VAE in fp32. What a clip is: ``clip.py``.

Ways take turns; every second turn runs in reverse. A ratio is the median of the turns' ratios to
diffusers eager. What a part holds runs in the order of its worth within ``--budget`` seconds, and
results are written after each row: ``results/speed_<device>_<part>.json`` and ``.md``. With
``--tiny`` everything is gone through with small models on the CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from wan_core.memory import close_gaps

if __name__ == "__main__":
    close_gaps()  # before torch is imported

import torch
from support.true_models import KEEP_FP32, transformer
from torch import Tensor, nn

from wan_core.files import atomic_write
from wan_core.forward import lean_forward
from wan_core.journal import versions
from wan_core.kernels.attention_ways import ways as attention_kernels
from wan_core.loading.quantized import layer_of_fp8, replace_layer, rounded_to_fp8
from wan_core.models import VARIANTS, TransformerShape

GIB = 2**30
BASE = "diffusers"
TINY_SHAPE = replace(
    VARIANTS["wan2.1-t2v-1.3b"].transformer, heads=2, head_dim=16, ffn_dim=64, layers=3, text_dim=32
)
Way = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Case:
    """One forward: a model and the size of its latents (frames, height, width)."""

    name: str
    title: str
    model: str
    grid: tuple[int, int, int]
    needs: float
    """About how many seconds it takes on an H100."""
    turns: int = 3
    ways: tuple[str, ...] = (BASE, "unfused", "exact", "fast", "fastest")
    profile: bool = False
    stored: bool = False
    """Whether the matrices of the blocks are stored in fp8."""


CASES = (
    Case(
        "forward-14b-480p", "14B, 480p81", "wan2.2-t2v-a14b", (21, 60, 104), 85, profile=True,
        turns=2,
        ways=(BASE, "unfused", "exact", "rows", "fast", "fastest", "compiled"),
    ),
    Case(
        "forward-14b-480p-fp8", "14B stored in fp8, 480p81", "wan2.2-t2v-a14b", (21, 60, 104), 35,
        ways=(BASE, "exact", "feed-forwards in 8 bit", "fast", "fastest"), turns=2, stored=True,
        profile=True,
    ),
    Case(
        "forward-5b-704p", "5B, 704p121, first frame held", "wan2.2-ti2v-5b", (31, 44, 80), 20,
    ),
    Case("forward-1.3b-480p", "1.3B, 480p81", "wan2.1-t2v-1.3b", (21, 60, 104), 15),
    Case(
        "forward-14b-720p-fp8", "14B stored in fp8, 720p81", "wan2.2-t2v-a14b", (21, 90, 160), 100,
        turns=1, ways=(BASE, "exact", "fast", "fastest"), stored=True,
    ),
)  # fmt: skip
ORDER = {
    "forward": ("forward-14b-480p-fp8", "forward-14b-480p", "forward-14b-720p-fp8",
                "forward-5b-704p", "forward-1.3b-480p"),
    "decode": ("decode-2.1", "decode-2.2", "encode-2.1", "encode-2.2"),
    "clip": ("clip-bf16", "clip-fp8"),
}  # fmt: skip
"""What each part holds, in the order of its worth."""


@dataclass
class Bench:
    """Device, budget and what was found so far."""

    device: torch.device
    output: Path
    budget: float
    tiny: bool
    begun: float = field(default_factory=time.perf_counter)
    found: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begun:5.0f} s] {text}", flush=True)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any]) -> tuple[float, int, Any]:
        """Return seconds, bytes allocated at the peak beyond those before, and the result."""
        cuda = self.device.type == "cuda"
        self.sync()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        begun = time.perf_counter()
        result = call()
        self.sync()
        seconds = time.perf_counter() - begun
        return seconds, (torch.cuda.max_memory_allocated() if cuda else 0) - before, result

    def part(self, name: str, needs: float, work: Callable[[], object]) -> None:
        """Run a part if there is time for it, and keep what was found, come what may."""
        left = self.budget - (time.perf_counter() - self.begun)
        if left < needs and not self.tiny:
            self.note(f"{name}: skipped, needs about {needs:.0f} s of which {left:.0f} are left")
        else:
            try:
                work()
            except Exception as error:
                if self.tiny:
                    raise
                traceback.print_exc()
                self.note(f"{name}: {type(error).__name__}: {error}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        """Write what was found so far: a run that is cut short keeps its rows."""
        write_results(self.found, self.output)

    def note(self, text: str) -> None:
        self.found["notes"].append(text)
        self.say(text)


# ------------------------------------------------------------------------------- models


def random_transformer(shape: TransformerShape, device: torch.device) -> Any:
    """A transformer in bf16, but for what diffusers keeps in fp32, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with device:
            model = transformer(shape)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if any(part in name for part in KEEP_FP32):
            parameter.data = parameter.data.float()
        if parameter.ndim == 1 and "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def store_in_fp8(model: Any) -> None:
    """Store the matrices of all blocks in fp8 with a scale each, as published files do."""
    for block in model.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                replace_layer(block, name, layer_of_fp8(layer, *rounded_to_fp8(layer.weight.data)))


def inputs_of(model: Any, grid: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """The inputs of one forward; with 48 channels (the 5B) each token of frame 0 has time 0."""
    generator = torch.Generator().manual_seed(1)
    config, (frames, height, width) = model.config, grid

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    time_step = torch.full((1,), 777.7, device=device)
    if config.in_channels == 48:
        frame = height * width // 4
        time_step = torch.full((1, frames * frame), 777.7, device=device)
        time_step[:, :frame] = 0
    return {
        "hidden_states": noise(1, config.in_channels, frames, height, width),
        "timestep": time_step,
        "encoder_hidden_states": noise(1, 512, config.text_dim),
        "return_dict": False,
    }


# ------------------------------------------------------------------------------ forwards


@contextmanager
def lean(model: Any, **options: Any) -> Iterator[None]:
    with lean_forward(model, **options) as refused:
        if refused:
            raise RuntimeError(refused)
        yield


def forward_ways(model: Any, names: tuple[str, ...]) -> dict[str, Way]:
    ways: dict[str, Way] = {
        BASE: nullcontext,
        "unfused": partial(lean, model, fuse=False),
        "exact": partial(lean, model),
        "rows": partial(lean, model, exact=False),
        "feed-forwards in 8 bit": partial(
            lean, model, quick=True, eight_bit=True, eight_bit_projections=False
        ),
        "fast": partial(lean, model, quick=True, eight_bit=True),
    }
    if any(way.eight_bit for way in attention_kernels().values()):
        ways["fastest"] = partial(lean, model, quick=True, eight_bit=True, attention_8bit=True)
    return {name: ways[name] for name in names if name in ways}


def in_turns(
    bench: Bench,
    ways: Mapping[str, Callable[[], Any]],
    turns: int,
    against: Tensor | None = None,
) -> dict[str, Any]:
    """Run all ways in turn, once without counting; returns seconds, first seconds, peaks, errors.

    Bits are compared with the first way's; errors are taken ``against`` a result, or its own.
    """
    found: dict[str, Any] = {
        name: {"seconds": [], "first": 0.0, "peak": 0, "error": 0.0, "equal": True} for name in ways
    }
    reference: Tensor | None = None
    for turn in range(turns + 1):
        for name in list(ways)[:: -1 if turn % 2 == 0 and turn else 1]:
            seconds, peak, out = bench.timed(ways[name])
            row = found[name]
            if turn:
                row["seconds"].append(seconds)
                row["peak"] = max(row["peak"], peak)
                continue
            row["first"] = seconds
            reference = out if reference is None else reference
            row["equal"] = torch.equal(out, reference)
            row["error"] = relative_error(out, reference if against is None else against)
            row["out"] = out if against is None and out is reference else None
    return found


def relative_error(out: Tensor, reference: Tensor) -> float:
    wide = reference.float()
    return float((out.float() - wide).norm() / wide.norm())


def forwards(bench: Bench, case: Case) -> None:
    shape, grid = VARIANTS[case.model].transformer, case.grid
    if bench.tiny:
        channels = {"in_channels": shape.in_channels, "out_channels": shape.out_channels}
        shape, grid = replace(TINY_SHAPE, **channels), (3, 4, 6)
    model = random_transformer(shape, bench.device)
    if case.stored:
        store_in_fp8(model)
    call = inputs_of(model, grid, bench.device)

    def run(way: Way) -> Tensor:
        with torch.no_grad(), way():
            out: Tensor = model(**call)[0]
        return out

    calls = {name: partial(run, way) for name, way in forward_ways(model, case.ways).items()}
    found = in_turns(bench, calls, case.turns)
    expected = found[BASE].pop("out")
    if case.profile and bench.device.type == "cuda":
        for name in (BASE, "exact", "fast"):
            found[name]["split"] = split(bench, calls[name])
    if "compiled" in case.ways and bench.device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True)
        plain = in_turns(bench, {"compiled": calls[BASE]}, case.turns, expected)
        found["compiled"] = {**plain["compiled"], "equal": plain["compiled"]["error"] == 0}
    keep(bench, "forwards", case.title, found)


KINDS = (
    ("attention", r"sdpa|flash_fprop|fmha|attention"),
    ("products", r"nvjet|gemm|cutlass|xmma|cublas"),
)


def split(bench: Bench, call: Callable[[], Any]) -> dict[str, float]:
    """Return milliseconds on the device by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        bench.sync()
    total = {"attention": 0.0, "products": 0.0, "the rest": 0.0}
    for event in seen.key_averages():
        kind = next((k for k, words in KINDS if re.search(words, event.key, re.I)), "the rest")
        total[kind] += event.self_device_time_total / 1e3
    return total


def keep(bench: Bench, table: str, title: str, found: dict[str, Any]) -> None:
    base = found[BASE]["seconds"]
    for name, row in found.items():
        row.pop("out", None)
        pairs = zip(row["seconds"], base, strict=False)
        row["ratio"] = statistics.median(a / b for a, b in pairs)
        row["median"] = statistics.median(row["seconds"])
        bench.found[table].append({"case": title, "way": name, **row})
        bench.say(
            f"{title}, {name}: {row['median']:.3f} s, ratio {row['ratio']:.3f}, "
            f"peak {row['peak'] / GIB:.2f} GiB, error {row['error']:.1e}"
            f"{', equal bits' if row['equal'] else ''} {row.get('split', '')}"
        )
    bench.save()


# ------------------------------------------------------------------------------- results


def write_results(found: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    name = f"speed_{found['short']}_{found['part']}"
    atomic_write(output / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())
    atomic_write(output / f"{name}.md", as_text(found).encode())


def as_text(found: dict[str, Any]) -> str:
    versions_text = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    lines = [
        "# Speed", "",
        f"{found['device']}; {versions_text}. "
        f"`python benchmarks/speed.py --part {found['part']}`. True shapes, random "
        "weights, all ways in turn in one run; seconds are medians, ratios medians of the turns' "
        "ratios to diffusers eager. Errors are relative to diffusers, of a VAE to its fp32.",
    ]  # fmt: skip
    for table, title in (("forwards", "One forward"), ("decodes", "VAEs: decodes and encodes")):
        rows = found[table]
        if not rows:
            continue
        lines += ["", f"## {title}", "", "| case | way | s | ratio | peak GiB | error | first s |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            error = "equal bits" if row["equal"] and row["error"] == 0 else f"{row['error']:.1e}"
            lines.append(
                f"| {row['case']} | {row['way']} | {row['median']:.3f} | {row['ratio']:.3f} | "
                f"{row['peak'] / GIB:.2f} | {error} | {row['first']:.1f} |"
            )
    if found["clips"]:
        from clip import clip_lines

        lines += clip_lines(found["clips"])
    splits = [row for row in found["forwards"] if row.get("split")]
    if splits:
        lines += ["", "## Where the time of a forward goes, ms", ""]
        lines += ["| case | way | attention | products | the rest |", "|---|---|---|---|---|"]
        for row in splits:
            parts = " | ".join(f"{value:.0f}" for value in row["split"].values())
            lines.append(f"| {row['case']} | {row['way']} | {parts} |")
    if found["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--part", default="forward", choices=list(ORDER))
    parser.add_argument("--budget", type=float, default=500, help="seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", help="of the part, these; see ORDER")
    parser.add_argument("--folder", type=Path, help="where a clip's files are written")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    names = ORDER[given.part] if given.only is None else tuple(given.only)
    if unknown := set(names) - set(ORDER[given.part]):
        parser.error(f"{', '.join(sorted(unknown))}: the part has {', '.join(ORDER[given.part])}")
    cuda = torch.cuda.is_available() and not given.tiny
    if not cuda and not given.tiny:
        parser.error("there is no CUDA device; --tiny goes through everything on the CPU")
    bench = Bench(torch.device("cuda" if cuda else "cpu"), given.output, given.budget, given.tiny)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    short = re.search(r"[A-Z]{1,3}\d{2,4}", name)
    bench.found = {
        "device": name,
        "short": short.group().lower() if short else name.lower().replace(" ", "_"),
        "versions": versions(), "part": given.part, "forwards": [], "decodes": [], "clips": [],
        "notes": [],
    }  # fmt: skip
    work: dict[str, tuple[float, Callable[[], object]]] = {
        case.name: (case.needs, partial(forwards, bench, case)) for case in CASES
    }
    if given.part == "decode":
        import autoencoders

        work |= autoencoders.parts(bench)
    if given.part == "clip":
        from clip import parts

        work |= parts(bench, given.folder)
    for name in names:
        bench.part(name, *work[name])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
