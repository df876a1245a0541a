"""Does it fit, as planned? Wan 2.2 T2V-A14B of true shape on the GPU at hand, under caps.

    python benchmarks/gpu_memory.py [--budget 460] [--output FOLDER] [--folder FOLDER] [--tests]

Writes both experts, umT5-XXL and the VAE with random weights to a folder (/dev/shm, where there is
room) and runs the product on it: detection, plan, loading, text, both experts, decode. Caps of 4
to 24 GiB are set for the plan and for torch's allocator alike. For each: bytes predicted by the
plan, allocated and reserved, stage by stage; seconds of a guided step beside the resident model
and diffusers' group offload; whether the latents are those of diffusers' resident forward. Beside
that, without caps: the 2.1 decoder and one pass of two blocks of 14B and 5B, each way against
diffusers, in time, bytes and bits.

A cap counts all that the process holds on the device: what CUDA's context takes is measured and
left out of the plan's and the allocator's share. Torch allocates in expandable segments, as
``python -m wan_core`` does, unless PYTORCH_CUDA_ALLOC_CONF says otherwise.

Both experts read the same file under two names (see ``random_model``), but are loaded, pinned and
streamed as two models: every byte that should cross the bus does. Three steps are made, two with
the high-noise expert: the second one's time, from callback to callback, is a step's time. Runs
whose denoising is like another's make one step per expert. Peaks do not depend on their number.

Parts run in the order of their worth; one that would not end within ``--budget`` seconds is
skipped and said so. Results are written after every part: ``results/gpu_memory_<device>.json`` and
``.md``. Needs 42 GB of disk or shared memory and 115 GB of RAM. Where memory is added to a machine
as it is used, say with ``--ram-gb`` how much there will be. ``--tiny`` goes through everything with
small models on the CPU, where caps do nothing. After the arithmetic was changed, ``--again`` holds
it against what was measured.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from wan_core.memory import close_gaps, system_resources

if __name__ == "__main__":
    close_gaps()  # before torch is imported

import torch
from host_memory import ram_of, room_for_model
from random_model import Shapes, write_model
from support.casting import cast_module
from support.machines import architecture, gpu
from support.true_models import DTYPES, autoencoder, transformer

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.decoding import lean_decoder
from wan_core.forward import lean_forward
from wan_core.journal import versions
from wan_core.loading import component_cache
from wan_core.memory import (
    BANDS,
    LEAN_HEAD_GROUPS,
    STREAM_BUFFERS,
    Choices,
    Workload,
    decode_peak,
    estimate,
    lean_decode_bytes,
    lean_peak,
    transformer_peak,
)
from wan_core.memory.process import ON_CARD, done_here
from wan_core.models import PARTS, VAE_21, VARIANTS, TransformerShape, VaeShape
from wan_core.render import Timeline
from wan_core.sampling import StreamingDecoder, to_frames

MIB, GIB = 2**20, 2**30
MODEL = "wan2.2-t2v-a14b"
SMALL, LARGE = (832, 480, 81), (1280, 720, 81)
TINY_SIZE = (64, 32, 9)
TINY = Shapes(
    replace(
        VARIANTS[MODEL].transformer, heads=2, head_dim=12, ffn_dim=32, layers=2,
        text_dim=32,
    ),
    replace(VAE_21, base_dim=4, decoder_base_dim=4, num_res_blocks=1),
    {
        "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 640,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
)  # fmt: skip
KERNELS = 100 / 1024
"""GiB that kernels loaded later add to CUDA's context, in a process that has computed before."""
PINNED = 16 * GIB
"""What a decode alone may page-lock."""
REFERENCE, LEAN = "resident, diffusers' forward", "resident, lean forward"
STREAMED, ROWS = "480p81, 5 GiB", "480p81, 4 GiB"


@dataclass(frozen=True)
class Case:
    """One run of the product. ``needs`` is about how many seconds it takes on an H100."""

    name: str
    needs: float
    cap: float | None = None
    size: tuple[int, int, int] = SMALL
    wishes: dict[str, Any] = field(default_factory=dict)
    high: int = 2
    """Steps with the high-noise expert."""
    low: int = 1
    encode: bool = False
    """Encode the text even though an earlier run has."""


FIRST = Case("480p81, 8 GiB", 90, 8, high=1)
"""Reads and pins everything, so that its step's time counts for nothing."""
CASES = [
    Case(STREAMED, 35, 5),
    Case(ROWS, 45, 4, encode=True),
    Case(REFERENCE, 45, wishes={"offload": "model", "forward": "diffusers"}),
    Case("720p81, 7.5 GiB", 50, 7.5, LARGE, high=1, low=0),
    Case("720p81, 6 GiB", 55, 6, LARGE, high=1, low=0),
]
LATER = [
    Case("480p81, 12 GiB", 25, 12, high=1),
    Case(LEAN, 25, wishes={"offload": "model", "forward": "lean"}, low=0),
    Case("480p81, 6 GiB", 25, 6, high=1),
    Case("480p81, 16 GiB", 25, 16, high=1),
    Case("480p81, 24 GiB", 25, 24, high=1),
]
GROUP = Case("diffusers' group offload", 50, wishes={"offload": "group"}, low=0)
"""It pins memory of its own, for which ours must go first."""


class Bench:
    """Device, budget and what was found so far."""

    def __init__(self, device: str, folder: Path, output: Path, budget: float, tiny: bool) -> None:
        self.device, self.folder, self.output = torch.device(device), folder, output
        self.tiny, self.budget, self.begun = tiny, budget, time.perf_counter()
        self.cuda = self.device.type == "cuda"
        self.found: dict[str, Any] = {
            "machine": machine(self.device), "runs": [], "passes": [], "decodes": [], "notes": [],
        }  # fmt: skip

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begun:5.0f} s] {text}", flush=True)

    def note(self, text: str) -> None:
        self.found["notes"].append(text)
        self.say(text)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self.begun)

    def part(self, name: str, needs: float, work: Callable[[], object], kept: float = 0.0) -> None:
        """Run a part if there is time for it; keep what was found until then, come what may.

        ``kept`` are seconds that parts of more worth will need later.
        """
        left = self.left - kept
        if left < needs and not self.tiny:
            self.note(f"{name}: skipped, needs about {needs:.0f} s of which {left:.0f} are left")
            return
        failed: Exception | None = None
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the other parts still count
            traceback.print_exc()
            traceback.clear_frames(error.__traceback__)
            failed = error.with_traceback(None)
        if failed is not None:
            self.note(f"{name}: {type(failed).__name__}: {failed}")
            if self.tiny:
                raise failed
        self.clean()
        self.write()

    def write(self) -> None:
        """Write what was found so far."""
        write_results(self.found, self.output)

    def clean(self) -> None:
        """Leave the device empty and its allocator without a cap."""
        component_cache().release_device()
        if self.cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            torch.cuda.empty_cache()

    def cap(self, gib: float | None) -> None:
        """Have torch's allocator fail beyond so many GiB."""
        if self.cuda and gib is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), self.device)

    def share_of(self, cap: float | None) -> float | None:
        """Return the GiB of a cap that CUDA's context leaves."""
        if cap is None or not self.cuda:
            return cap
        warm = "card" in done_here(str(self.device))
        return cap - (self.context_mib() or 0) / 1024 - (KERNELS if warm else ON_CARD / GIB)

    def context_mib(self) -> float | None:
        """What the device holds beside the allocator's memory: context, kernels, other programs."""
        if not self.cuda:
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free - torch.cuda.memory_reserved(self.device)) / MIB

    def measure(self, run: Callable[[], object], warm: Callable[[], object]) -> dict[str, Any]:
        """Return seconds of a run, and MiB allocated and reserved beyond what was there."""
        warm()
        if not self.cuda:
            begun = time.perf_counter()
            run()
            seconds = time.perf_counter() - begun
            return {"seconds": seconds, "allocated": None, "reserved": None}
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        before, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - begun,
            "allocated": (torch.cuda.max_memory_allocated() - before) / MIB,
            "reserved": (torch.cuda.max_memory_reserved() - held) / MIB,
        }


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "device": "cpu", **versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "allocator": system_resources(str(device)).allocator,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


# -- runs of the product ----------------------------------------------------------------------


@contextmanager
def reserved_too(device: torch.device) -> Iterator[dict[str, int]]:
    """Have a run's timeline also note what the allocator held at most in each stage."""
    held: dict[str, int] = {}

    class Watched(Timeline):
        @contextmanager
        def stage(self, name: str) -> Iterator[Any]:
            with super().stage(name) as report:
                try:
                    yield report
                finally:
                    if device.type == "cuda":
                        held[name] = torch.cuda.max_memory_reserved(device)

    with patch("wan_core.render.pipeline.Timeline", Watched):
        yield held


def run_case(bench: Bench, case: Case) -> None:
    """Make a video and keep what it took; latents as a digest, to compare bits."""
    wishes: dict[str, Any] = {"device": str(bench.device), "fp8_storage": "never", **case.wishes}
    share = bench.share_of(case.cap)
    if bench.cuda:
        wishes["vram_limit_gb"] = share
    else:
        wishes["precision"] = "bf16"
        wishes = {"offload": "stream", **wishes} if case.cap else wishes
    ends: list[float] = []
    width, height, frames = TINY_SIZE if bench.tiny else case.size
    number = len(bench.found["runs"])
    spaces = " " * number if case.encode else ""  # change no text, but embeddings go by it
    config = GenerationConfig(
        prompt="a cat moves right" + spaces, negative_prompt="a dog" + spaces,
        width=width, height=height, num_frames=frames, seed=0,
        num_inference_steps=case.high + 1, switch_step=case.high, end_step=case.high + case.low,
        progress_callback=lambda *_: ends.append(time.perf_counter()),
    )  # fmt: skip
    wrapper = WanPipelineLoader().load_wan_pipeline(bench.folder, optimization_config=wishes)
    _, plan = wrapper.plan(config)
    bench.say(f"{case.name}: {', '.join(plan.applied)}")
    bench.cap(share)
    with reserved_too(bench.device) as held:
        result = wrapper.generate(config)
    stages = [
        {
            "name": stage.name, "seconds": stage.seconds,
            "predicted": stage.predicted_peak_bytes, "allocated": stage.measured_peak_bytes,
            "reserved": held.get(stage.name),
        }
        for stage in result.stages
    ]  # fmt: skip
    digest = None
    if result.latents is not None and case.high + case.low == 3:
        digest = hashlib.sha256(result.latents.numpy().tobytes()).hexdigest()[:16]
    bench.found["runs"].append(
        {
            "case": case.name, "cap_gib": case.cap, "success": result.success,
            "applied": list(result.applied_optimizations), "tier": plan.tier, "stages": stages,
            "step_seconds": ends[1] - ends[0] if case.high > 1 and len(ends) > 1 else None,
            "predicted_step_seconds": plan.step_seconds, "seconds": result.generation_time,
            "context_mib": bench.context_mib(), "latents": digest,
            "out_of_memory": sum("emory ran out" in t for t in result.warnings + result.errors),
            "warnings": result.warnings, "errors": result.errors,
        }
    )  # fmt: skip
    bench.say(wrapper.report(result))
    if result.frames is not None and not bool(torch.isfinite(result.frames).all()):
        bench.note(f"{case.name}: frames are not finite")


def run_group(bench: Bench) -> None:
    component_cache().clear()  # slabs too: group offload pins every weight once more
    run_case(bench, GROUP)
    component_cache().clear()


# -- without caps, against diffusers ----------------------------------------------------------


def passes(bench: Bench) -> None:
    """One pass through two blocks, each way, on the same input."""
    cases = [
        ("14B 832x480x81", "wan2.2-t2v-a14b", (21, 60, 104), False),
        ("5B 1280x704x121, timestep per token", "wan2.2-ti2v-5b", (31, 44, 80), True),
    ]
    for name, variant, latent, per_token in cases:
        shape = replace(VARIANTS[variant].transformer, layers=2)
        if bench.tiny:
            shape, latent = replace(shape, heads=2, head_dim=32, ffn_dim=64, text_dim=32), (3, 4, 4)
        run_passes(bench, name, shape, latent, per_token=per_token)
        bench.clean()


def run_passes(
    bench: Bench, name: str, shape: TransformerShape, latent: tuple[int, int, int], *,
    per_token: bool,
) -> None:  # fmt: skip
    kind, device = torch.bfloat16, bench.device
    torch.manual_seed(0)
    with torch.device(device):
        model = transformer(shape).eval().requires_grad_(False)
    cast_module(model, kind)
    model.to("cpu").to(device)  # the casts' gaps would otherwise count
    numbers = dict(zip(LATENT, latent, strict=True))
    common: dict[str, Any] = {"batch": 1, "size": 2, "per_token": per_token, **numbers}
    times = torch.full((1,), 900.0, device=device)
    if per_token:
        frame = latent[1] * latent[2] // 4
        times = times.expand(latent[0] * frame).clone().unsqueeze(0)
        times[:, :frame] = 0
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(1, shape.in_channels, *latent, generator=g)
    text = torch.randn(1, 512, shape.text_dim, generator=g)

    def call() -> Any:  # inputs are made anew: the arithmetic counts them
        return model(
            noise.to(device, kind), times.clone(), text.to(device, kind), return_dict=False
        )[0]

    ways: dict[str, tuple[Any, int]] = {
        "diffusers": (nullcontext, transformer_peak(shape, **common)),
        "lean": (partial(lean_forward, model), lean_peak(shape, embed_every_token=True, **common)),
    }
    for groups in (LEAN_HEAD_GROUPS, 2, 8):
        further = lean_peak(shape, exact=False, groups=groups, **common)
        on = partial(lean_forward, model, exact=False, head_groups=groups)
        ways[f"rows, {groups} groups of heads"] = (on, further)
    expected = None
    for way, (on, predicted) in ways.items():
        with on() as refused:
            assert refused is None, refused
            row = bench.measure(call, call)
            out = call().cpu()
        expected = out if expected is None else expected
        keep_row(bench, "passes", name, way, predicted, row, out, expected)


def keep_row(
    bench: Bench, part: str, name: str, way: str, predicted: int, row: dict[str, Any],
    out: torch.Tensor, expected: torch.Tensor,
) -> None:  # fmt: skip
    """Add a row beside diffusers', the first one of its name."""
    rows: list[dict[str, Any]] = bench.found[part]
    row |= {"case": name, "way": way, "predicted": predicted / MIB}
    first = next((r for r in rows if r["case"] == name), row)
    row["time_ratio"] = row["seconds"] / first["seconds"]
    row["memory_ratio"] = row["allocated"] and row["allocated"] / first["allocated"]
    row["equal_bits"] = torch.equal(out, expected)
    row["difference"] = float((out.float() - expected.float()).abs().max())
    rows.append(row)
    shown = (f"{key} {row[key]}" for key in ("seconds", "allocated", "predicted", "equal_bits"))
    bench.say(f"{name}, {way}: {', '.join(shown)}")


LATENT = ("latent_frames", "latent_height", "latent_width")
DECODED = (21, 60, 104)
DECODES: dict[str, dict[str, Any] | None] = {
    "diffusers": None,
    "lean": {},
    "lean, its cache in RAM": {"cache_on_host": True},
    f"{BANDS} bands, cache in RAM": {"bands": BANDS, "cache_on_host": True},
}


def decode_peaks(shape: VaeShape, **numbers: Any) -> dict[str, int]:
    """Return the bytes predicted for each way to decode."""
    return {
        way: decode_peak(shape, **numbers)
        if wishes is None
        else lean_decode_bytes(shape, **numbers, **wishes)[0]
        for way, wishes in DECODES.items()
    }


def decodes(bench: Bench, dtype: str) -> None:
    """The 2.1 decoder at 480p81: 21 latent frames, each way."""
    shape = TINY.vae if bench.tiny else VAE_21
    size = (2, 2, 2) if bench.tiny else DECODED
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(1, shape.z_dim, *size, generator=g)
    numbers = dict(zip(LATENT, size, strict=True))
    kind = DTYPES[dtype]
    torch.manual_seed(0)
    vae: Any = autoencoder(shape).eval().requires_grad_(False)
    cast_module(vae, kind).to(bench.device)
    peaks = decode_peaks(shape, size=kind.itemsize, batch=1, **numbers)
    expected = None
    for way, predicted in peaks.items():
        frames: list[torch.Tensor] = []

        def decode(count: int, frames: Any = frames) -> None:
            frames.clear()
            decoder = StreamingDecoder(vae, latents.to(bench.device, kind))
            while decoder.position < count:
                frames.append(to_frames(decoder.decode_next()))
            decoder.close()

        wishes = DECODES[way]
        on = nullcontext() if wishes is None else lean_decoder(vae, pin_bytes=PINNED, **wishes)
        with on as refused:
            assert refused is None, refused
            row = bench.measure(partial(decode, size[0]), partial(decode, 2))
        made = torch.cat(frames, dim=1)
        expected = made if expected is None else expected
        name = f"VAE 2.1 832x480x81, {dtype}"
        keep_row(bench, "decodes", name, way, predicted, row, made, expected)


def gpu_tests(bench: Bench) -> None:
    left = max(30.0, bench.left)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests/placing/test_gpu_streaming.py",
        "-q",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    bench.note(
        f"pytest -m gpu tests/placing/test_gpu_streaming.py: {lines[-1] if lines else 'no output'}"
    )


# -- results ----------------------------------------------------------------------------------


def goals(found: dict[str, Any]) -> list[tuple[str, float | None, str]]:
    """Return (what, figure, goal); None where it was not measured."""
    runs = {run["case"]: run for run in found["runs"]}
    errors = sorted(
        abs(stage["predicted"] / stage["allocated"] - 1)
        for run in found["runs"]
        for stage in run["stages"]
        if stage["predicted"] and stage["allocated"]
    )
    p95 = errors[max(0, math.ceil(0.95 * len(errors)) - 1)] if errors else None
    failed = sum(run["out_of_memory"] + (not run["success"]) for run in found["runs"])
    steps = {case: run["step_seconds"] for case, run in runs.items()}

    def ratio(above: str, below: str) -> float | None:
        return steps[above] / steps[below] if steps.get(above) and steps.get(below) else None

    rows = [
        ("P95 of the stages' error, predicted beside allocated", p95, "<= 0.05"),
        ("runs out of memory or failed", float(failed), "0"),
        ("step, streamed / resident, diffusers' forward", ratio(STREAMED, REFERENCE), "<= 1.05"),
        ("step, streamed / resident, lean forward", ratio(STREAMED, LEAN), ""),
        ("step, products by rows and heads / resident", ratio(ROWS, REFERENCE), ""),
        ("step, diffusers' group offload / streamed", ratio(GROUP.name, STREAMED), ""),
    ]  # fmt: skip
    for run in found["runs"]:
        reserved = [stage["reserved"] for stage in run["stages"] if stage["reserved"]]
        if run["cap_gib"] and reserved:
            held = max(reserved) / GIB + (run["context_mib"] or 0) / 1024
            what = f"{run['case']}: GiB held at most, context included"
            rows.append((what, held, f"<= {run['cap_gib']:g}"))
    return rows


def predict_again(found: dict[str, Any]) -> None:
    """Put what the present arithmetic says in the place of what was predicted when it ran."""
    system = gpu(80)
    jobs = {case.name: case.size for case in (FIRST, *CASES, *LATER)}
    for run in found["runs"]:
        width, height, frames = jobs.get(run["case"], SMALL)
        job = Workload(width=width, height=height, num_frames=frames)
        first_way = replace(choices_of(run["applied"]), by_rows=False)
        names = [stage["name"] for stage in run["stages"]]
        for index, stage in enumerate(run["stages"]):
            again = stage["name"] in names[index + 1 :]  # memory ran out: once more, by rows
            made = first_way if again else choices_of(run["applied"])
            for expected in estimate(architecture(MODEL), job, made, system).stages:
                if expected.name == stage["name"]:
                    stage["predicted"] = expected.device_bytes
    for row in found["decodes"]:
        size = DTYPES[row["case"].split()[-1]].itemsize
        numbers = dict(zip(LATENT, DECODED, strict=True))
        row["predicted"] = decode_peaks(VAE_21, size=size, batch=1, **numbers)[row["way"]] / MIB


def choices_of(applied: list[str]) -> Choices:
    """Read a plan's words back."""
    kinds = {word.split()[0]: word.split()[1] for word in applied if len(word.split()) == 2}
    dtypes = dict.fromkeys(PARTS, kinds["precision"]) | {"vae": kinds["vae"]}
    streamed = next((word for word in applied if word.endswith("the rest streamed")), None)
    return Choices(
        dtypes=dtypes,
        offload=kinds["offload"],
        part_offload={part: how for part, how in kinds.items() if how in ("stream", "group")},
        stream=streamed is not None,
        resident_blocks=int(streamed.split()[0]) if streamed else None,
        stream_buffers=1 if "one at a time" in applied else STREAM_BUFFERS,
        lean="lean forward" in applied,
        by_rows="products by rows" in applied,
        cache_in_ram=any(word.endswith("'s cache in RAM") for word in applied),
    )


def mib(value: float | None, scale: float = MIB) -> str:
    return "-" if value is None else f"{value / scale:,.0f}"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def report(found: dict[str, Any]) -> str:
    told = found["machine"]
    reference = next((r["latents"] for r in found["runs"] if r["case"] == REFERENCE), None)
    lines = [
        "# Does it fit, as planned?", "",
        f"Measured {told['date']} on {told['device']} by `python benchmarks/gpu_memory.py`: "
        + ", ".join(f"{k} {v}" for k, v in told.items() if k not in ("date", "device")) + ".", "",
        "Wan 2.2 T2V-A14B of true shape with random weights, both experts, text encoder and decode "
        "included; plan and allocator capped at what CUDA's context leaves.", "",
        "| what | figure | goal |", "|---|---|---|",
        *(f"| {what} | {number(value)} | {goal} |" for what, value, goal in goals(found)), "",
        "## Runs", "",
        "| run | as planned | guided step, s | predicted, s | latents as the resident run's "
        "| out of memory | context MiB |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for run in found["runs"]:
        same = "-" if None in (reference, run["latents"]) else str(run["latents"] == reference)
        lines.append(
            f"| {run['case']} | {', '.join(run['applied'])} | {number(run['step_seconds'], 2)} "
            f"| {number(run['predicted_step_seconds'], 2)} | {same} | {run['out_of_memory']} "
            f"| {mib(run['context_mib'], 1)} |"
        )
    lines += ["", "| run | stage | predicted MiB | allocated | error | reserved | seconds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for run in found["runs"]:
        for stage in run["stages"]:
            predicted, allocated = stage["predicted"], stage["allocated"]
            error = f"{predicted / allocated - 1:+.1%}" if predicted and allocated else "-"
            lines.append(
                f"| {run['case']} | {stage['name']} | {mib(predicted)} | {mib(allocated)} "
                f"| {error} | {mib(stage['reserved'])} | {stage['seconds']:.2f} |"
            )
    for part, title in (("passes", "One pass through two blocks"), ("decodes", "Decoding")):
        lines += ["", f"## {title}", ""]
        lines += ["| case | way | seconds | of diffusers' | predicted MiB | allocated | of "
                  "diffusers' | equal bits | largest difference |", "|---" * 9 + "|"]  # fmt: skip
        lines += [
            f"| {r['case']} | {r['way']} | {r['seconds']:.3f} | {r['time_ratio']:.3f} "
            f"| {r['predicted']:,.0f} | {mib(r['allocated'], 1)} | {number(r['memory_ratio'])} "
            f"| {r['equal_bits']} | {r['difference']:.1e} |"
            for r in found[part]
        ]
    problems = [text for run in found["runs"] for text in run["errors"] + run["warnings"]]
    lines += ["", *(f"- {text}" for text in found["notes"] + problems), ""]
    return "\n".join(lines)


def short_name(device: str) -> str:
    """Return a device's name as results carry it: "h100", "cpu"."""
    word = re.search(r"\b[A-Z]*\d+\w*", device)
    return word.group().lower() if word else "cpu"


def write_results(found: dict[str, Any], output: Path) -> None:
    name = f"gpu_memory_{short_name(found['machine']['device'])}"
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / f"{name}.md").write_text(report(found))


# -- the whole --------------------------------------------------------------------------------


@torch.no_grad()
def run_all(bench: Bench, tests: bool) -> None:
    bench.say(str(bench.found["machine"]))
    begun = time.perf_counter()
    nbytes = write_model(
        bench.folder, TINY if bench.tiny else Shapes(), 2**16 if bench.tiny else 2**26
    )
    bench.note(f"{nbytes / 1e9:.1f} GB of weights written in {time.perf_counter() - begun:.0f} s")
    bench.part("decodes, fp32", 25, partial(decodes, bench, "fp32"))
    for case in (FIRST, *CASES):
        bench.part(case.name, case.needs, partial(run_case, bench, case))
    bench.part("passes", 12, partial(passes, bench))
    bench.part("decodes, bf16", 20, partial(decodes, bench, "bf16"))
    for case in LATER[:1]:
        bench.part(case.name, case.needs, partial(run_case, bench, case))
    bench.part(GROUP.name, GROUP.needs, partial(run_group, bench))
    if tests:
        bench.part("tests", 60, partial(gpu_tests, bench))
    for case in LATER[1:]:
        bench.part(case.name, case.needs, partial(run_case, bench, case))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=460, help="seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--folder", type=Path, help="where to put the weights")
    parser.add_argument("--ram-gb", type=float, help="RAM the machine grows to, in GiB")
    parser.add_argument("--tests", action="store_true", help="run the GPU tests at the end")
    parser.add_argument("--again", type=Path, help="predict a results file's stages anew, no more")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    arguments = parser.parse_args(given)
    if arguments.again is not None:
        found = json.loads(arguments.again.read_text())
        predict_again(found)
        write_results(found, arguments.again.parent)
        return 0
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA device; --tiny runs small models on the CPU.")
    with ExitStack() as stack:
        room = room_for_model(arguments.folder, arguments.tiny, 42e9)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=room))) / "model"
        stack.enter_context(ram_of(arguments.ram_gb))
        device = "cpu" if arguments.tiny else "cuda:0"
        bench = Bench(device, folder, arguments.output, arguments.budget, arguments.tiny)
        run_all(bench, arguments.tests)
    print(report(bench.found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
