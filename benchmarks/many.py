"""One clip on several cards: seconds of a step, efficiency, bits, peaks; predicted and measured.

    python benchmarks/many.py [--devices 1 2 4] [--budget 480] [--output FOLDER] [--tiny]

Writes a Wan 2.2 T2V-A14B with random weights of true shape to ``--folder`` (29 GB, and 10 GB for a
5B; /dev/shm where it has room, else the temporary folder), then runs each case on each number of
cards in turn, the same bits expected of all. Windows come first, then guidance, then a cut of each
pass along its tokens (Ulysses): "cards" says how many gangs of how many. Whether a cut keeps the
bits is tried by its first pass, which is computed both ways; what the trial and the links between
the cards showed is listed. Records of earlier runs are not read, so that each trial is made here.
Only the high-noise expert's steps are made and nothing is decoded: a run is stopped after its last
step. What a decode in strips takes, needs and rounds is measured by ``many_decode``, in this run as
far as there is time. So that a cut is tried between cards whose link is not known yet, the plan is
made to believe in NVLink until it is measured. A step's seconds are the median from callback to
callback, without the first, in which the trial is. Parts that the budget does not allow are left
out and named. Where memory is added to a machine as it is used, ``--ram-gb`` says how much there
will be. Writes ``many_<device>.json`` and ``.md``. ``--tiny`` runs small models on the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from wan_core.memory import FASTEST, CardRecords, Link, close_gaps

close_gaps()

import torch
from host_memory import ram_of, room_for_model
from many_decode import DECODES, TINY_DECODES, decode, decode_table
from random_model import Shapes, write_model

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.files import atomic_write
from wan_core.journal import versions
from wan_core.models import VARIANTS
from wan_core.workers import close_workers, worker_pool

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A clip; ``units`` are the passes of a step that do not wait for each other."""

    name: str
    width: int
    height: int
    frames: int
    window: int | None
    units: int
    steps: int
    seconds: float
    """About what a step takes on one H100, to keep to the budget."""
    guidance: float | None = None
    """None: the model's own; 1 makes a step one pass, which only a cut can share out."""
    model: str = "wan2.2-t2v-a14b"


CASES = (
    Case("480p81", 832, 480, 81, None, 2, 4, 6.6),
    Case("480p81 without guidance", 832, 480, 81, None, 1, 4, 3.3, 1.0),
    Case("480p321 in windows of 81", 832, 480, 321, 81, 10, 2, 33.0),
    Case("720p81", 1280, 720, 81, None, 2, 3, 26.0),
    Case("5B 704p121 without guidance", 1280, 704, 121, None, 1, 4, 1.2, 1.0, "wan2.2-ti2v-5b"),
    Case("5B 704p121", 1280, 704, 121, None, 2, 4, 2.4, None, "wan2.2-ti2v-5b"),
)
TINY = (
    Case("whole", 64, 64, 17, None, 2, 3, 0.3),
    Case("whole without guidance", 64, 64, 17, None, 1, 3, 0.2, 1.0),
    Case("windows", 64, 64, 33, 17, 6, 3, 0.5),
)
OVERLAP = 16
ALONE, TOGETHER = 30.0, 45.0
"""Seconds until the weights are on one card, and until processes have started and theirs are, to
begin with; later what the run before has taken."""
MODEL_BYTES = 45e9
"""What the models take, and what NCCL may want of /dev/shm beside them."""
BELIEVED = 99
"""So many cards have no link: what is kept for them is what the plan believes of others."""


class Done(BaseException):
    """Stops a run after its last step."""


def run(folder: Path, case: Case, devices: int, tiny: bool) -> dict[str, Any]:
    """Make the steps of a case and return what they took and gave."""
    loader = WanPipelineLoader(enable_caching=False)
    wishes: dict[str, Any] = {"devices": devices}
    if tiny:
        wishes |= {"device": "cpu", "precision": "fp32"}
    wrapper = loader.load_wan_pipeline(folder, optimization_config=wishes)
    width = wrapper.architecture.transformer.text_dim
    texts = torch.randn(2, 1, 512, width, generator=torch.Generator().manual_seed(7))
    ends: list[float] = []
    found: dict[str, Any] = {}

    def progress(step: int, total: int, latents: Any) -> None:
        if not tiny:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        if step == case.steps:
            data = latents.to("cpu", torch.float32).contiguous().numpy().tobytes()
            found["bits"] = hashlib.sha256(data).hexdigest()[:16]
            found["finite"] = bool(torch.isfinite(latents).all())
            raise Done

    config = GenerationConfig(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1], width=case.width,
        height=case.height, num_frames=case.frames, seed=0, num_inference_steps=case.steps,
        switch_step=case.steps if wrapper.architecture.two_experts else None,
        max_chunk_size=case.window, window_overlap=8 if tiny else OVERLAP,
        force_chunked_processing=case.window is not None, progress_callback=progress,
        guidance_scale=case.guidance,
    )  # fmt: skip
    _, plan = wrapper.plan(config)
    if tiny and devices > 1:
        # Nobody would cut these on a CPU: it is made to believe that exchanges take no time.
        machine = plan.tried_as.partition("; ")[0]
        for cards in range(2, devices + 1):
            CardRecords().keep_link(machine, cards, Link(FASTEST, 0.0))
        _, plan = wrapper.plan(config)
    elif devices > 1:
        CardRecords().keep_link(plan.tried_as.partition("; ")[0], BELIEVED, Link(1.5e11, 1e-4))
        _, plan = wrapper.plan(config)
    if not tiny:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        result = wrapper.generate(config)
        found["errors"] = result.errors
    except Done:
        pass
    # Planned again, now that links and trial are known: what the next job would be told.
    _, after = wrapper.plan(config)
    after = after if (after.gang, after.workers) == (plan.gang, plan.workers) else plan
    steps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    peaks = []
    cut = 0
    if plan.workers and "errors" not in found:
        told = worker_pool(plan.workers, plan.gang).describe()
        peaks = [one["peak_bytes"] for one in told]
        cut = sum({one["gang"]: one["cut"] for one in told if "gang" in one}.values())
    elif not tiny:
        peaks = [torch.cuda.max_memory_allocated()]
    denoise = next((s for s in plan.estimate.stages if s.name.startswith("denoise")), None)
    found |= {
        "case": case.name, "devices": devices, "workers": list(plan.workers), "gang": plan.gang,
        "cut_passes": cut,
        "units": case.units, "step_seconds": median(steps) if steps else None, "steps": steps,
        "first_step_after": ends[0] - began if ends else None,
        "predicted_step_seconds": after.step_seconds, "predicted_seconds": after.seconds,
        "reason": after.reasons[-1], "applied": list(after.applied),
        "peak_mib": [round(peak / MIB) for peak in peaks],
        "predicted_peak_mib": round(
            (after.card_peak_bytes or (0 if denoise is None else denoise.device_bytes)) / MIB
        ),
    }  # fmt: skip
    close_workers()
    loader.clear_cache()
    if not tiny:
        torch.cuda.empty_cache()
    return found


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"# One clip on several cards: {found['device']}", "",
        f"`{found['command']}`, {found['date']}, "
        + ", ".join(f"{k} {v}" for k, v in found["versions"].items()), "",
        "| case | cards | step, s | predicted | speed-up | of units / turns | bits | peak, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    alone = {one["case"]: one for one in found["runs"] if one["devices"] == 1}
    for one in found["runs"]:
        base, step = alone.get(one["case"]), one["step_seconds"]
        if step is None or base is None or base["step_seconds"] is None:
            lines.append(f"| {one['case']} | {one['devices']} | {one.get('errors')} | | | | | |")
            continue
        speed = base["step_seconds"] / step
        cards = max(1, len(one["workers"]))
        gangs = cards // one["gang"]
        ideal = one["gang"] * one["units"] / ceil(one["units"] / gangs)
        shown = f"{gangs} x {one['gang']}" if one["gang"] > 1 else str(cards)
        same = "equal" if one["bits"] == base["bits"] else "OTHER"
        lines.append(
            f"| {one['case']} | {shown} of {one['devices']} | {step:.2f} | "
            f"{one['predicted_step_seconds']:.2f} | {speed:.2f} | {speed / ideal:.2f} of "
            f"{ideal:.2f} | {same} | {', '.join(map(str, one['peak_mib']))} "
            f"({one['predicted_peak_mib']}) |"
        )
    lines += decode_table(found["decodes"])
    return "\n".join([*lines, "", *(f"- {note}" for note in found["notes"]), ""])


def measured_between() -> list[str]:
    """Return what the runs have shown of links and cuts, a line each."""
    known = CardRecords().between()
    lines = [
        f"link, {name}: {link.rate / 1e9:.3g} GB/s, {1e6 * link.seconds:.0f} us an exchange"
        for name, link in known.links.items()
        if link.rate < FASTEST and not name.endswith(f" {BELIEVED} cards")
    ]
    for kind, trial in known.trials.items():
        told = "every bit equal" if trial.equal else f"rounding, relative error {trial.error:.1e}"
        lines.append(f"trial, {kind}: {told}")
    return lines


def write(found: dict[str, Any], output: Path) -> None:
    name = "many_" + "_".join(found["device"].lower().split())
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())
    atomic_write(output / f"{name}.md", table(found).encode())


def model_folder(folder: Path, name: str, tiny: bool) -> Path:
    """Write the model, where it is not there yet, and return its folder."""
    if (folder / name).exists():
        return folder / name
    if tiny:
        from support.tiny_models import make_folder

        return make_folder(folder / name, name, transformer={"num_attention_heads": 4})
    variant = VARIANTS[name]
    assert variant.vae is not None
    shapes = Shapes(variant.transformer, variant.vae)
    write_model(folder / name, shapes, experts=variant.experts, texts=False)
    return folder / name


@dataclass
class Pace:
    """What a run is expected to take, after those before it."""

    alone: float = ALONE
    together: float = TOGETHER
    steps: float = 1.0
    """How long steps take beside ``Case.seconds``."""

    def needed(self, case: Case, count: int) -> float:
        """Return the seconds of a case on so many cards."""
        share = 1 / min(count, case.units)
        if count > case.units:  # a cut
            share = 1 / count
        # A trial computes one pass alone.
        computed = case.seconds * self.steps * (case.steps * share + 1 / case.units)
        return computed + (self.together if count > 1 else self.alone)

    def learn(self, case: Case, count: int, took: float, step: float | None) -> None:
        """Note what a run took, and its step; nothing where it failed."""
        if step is None:
            return
        if count == 1:
            self.alone, self.steps = took - case.steps * step, step / case.seconds
        else:
            self.together = took - case.steps * step


def decodes(
    found: dict[str, Any], model: Path, devices: list[int], left: float, tiny: bool
) -> None:
    """Measure decodes by a model's VAE, those that were not yet and for which there is time."""
    counts = [count for count in devices if count > 1]
    known = {one["case"] for one in found["decodes"]}
    for case in TINY_DECODES if tiny else DECODES:
        if case.model != model.name or case.name in known or not counts:
            continue
        began = time.perf_counter()
        if not tiny and left < case.seconds * (1 + len(counts)):
            found["notes"].append(f"decode of {case.name}: left out")
            continue
        found["decodes"] += decode(model, case, counts, tiny)
        left -= time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", help="(1, and all there are)")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (480)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--folder", type=Path, help="where to put the weights")
    parser.add_argument("--ram-gb", type=float, help="RAM the machine grows to, in GiB")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    arguments = parser.parse_args()
    began, tiny = time.perf_counter(), arguments.tiny
    there = 4 if tiny else torch.cuda.device_count()
    devices = arguments.devices or sorted({1, 2, there} & set(range(1, there + 1)))
    found: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/many.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"), "versions": versions(), "runs": [], "decodes": [],
        "notes": [],
        "device": "cpu" if tiny else f"{there} {torch.cuda.get_device_name(0)}",
    }  # fmt: skip
    place = room_for_model(arguments.folder, tiny, MODEL_BYTES)
    folder = Path(tempfile.mkdtemp(prefix="wanfit_many_", dir=place))
    os.environ["XDG_CACHE_HOME"] = str(folder / "records")
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    pace = Pace()
    try:
        with ram_of(arguments.ram_gb):
            for case in TINY if tiny else CASES:
                for count in devices:
                    needed = pace.needed(case, count)
                    if not tiny and time.perf_counter() - began + needed > arguments.budget:
                        note = f"{case.name} on {count}: left out, {needed:.0f} s"
                        found["notes"].append(note)
                        continue
                    started = time.perf_counter()
                    model = model_folder(folder, case.model, tiny)
                    written = time.perf_counter()
                    if written - started > 1:
                        note = f"{case.model} was written in {written - started:.0f} s"
                        found["notes"].append(note)
                    made = run(model, case, count, tiny)
                    pace.learn(case, count, time.perf_counter() - written, made["step_seconds"])
                    found["runs"].append(made)
                    print(json.dumps(made), flush=True)
                    write(found, arguments.output)
                if (folder / case.model).exists():
                    left = arguments.budget - (time.perf_counter() - began)
                    decodes(found, folder / case.model, devices, left, tiny)
                    write(found, arguments.output)
    finally:
        found["notes"] += measured_between()
        shutil.rmtree(folder, ignore_errors=True)
    found["notes"].append(f"{time.perf_counter() - began:.0f} s in all")
    write(found, arguments.output)
    print(table(found))


if __name__ == "__main__":
    main()
