"""One clip on several cards: seconds of a step, efficiency, bits, peaks; predicted and measured.

    python benchmarks/many.py [--devices 1 2 4] [--cases WORD ...] [--budget 480] [--tiny]
    python benchmarks/many.py --profile 480p81      (where a block's time goes: ``many_profile``)

On one card and on all there are, unless ``--devices`` says otherwise. Writes a Wan 2.2 T2V-A14B
with random weights of true shape to ``--folder`` (29 GB, and 10 GB for a 5B; /dev/shm where it has
room, else the temporary folder), then runs each case on each number of cards in turn, the same bits
expected of all. Windows come first, then guidance, then a cut of each pass along its tokens
(Ulysses): "cards" says how many gangs of how many. Whether a cut keeps the bits is tried by its
first pass, which is computed both ways; what the trial and the links between the cards showed is
listed. Records of earlier runs are not read, so that each trial is made here; what one card took is
learnt as a render would, and "predicted" is what a plan said with the assumed rates and, where that
had been learnt, with the measured pace. Streamed weights (no block resident) are copied by shares
and by each card for itself. Processes stay for the next case that divides the cards alike. Rows of
an earlier report of the same device and versions are kept where this run has none; what a case of
``--cases`` is compared with and no report has is measured before it. Only the high-
noise expert's steps are made and nothing is decoded: a run is stopped after its last step. What a
decode in strips takes, needs and rounds is measured by ``many_decode``, in this run as far as there
is time. So that a cut is tried between cards whose link is not known yet, the plan is made to
believe in NVLink until it is measured. A step's seconds are the median from callback to callback,
without the first, in which the trial is. Parts that the budget does not allow are left out and
named. Where memory is added to a machine as it is used, ``--ram-gb`` says how much there will be.
Writes ``many_<device>.json`` and ``.md``. ``--tiny`` runs small models on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from wan_core.memory import (
    FASTEST,
    Calibrations,
    CardRecords,
    Link,
    RunRecord,
    close_gaps,
    forward_name,
)

close_gaps()

import torch
from host_memory import ram_of, room_for_model
from many_cases import CASES, TINY, Case, Pace, chosen
from many_decode import DECODES, TINY_DECODES, decode
from many_profile import SIZES, profile
from many_report import kept_of, table, write
from random_model import Shapes, write_model

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.journal import versions
from wan_core.models import VARIANTS
from wan_core.plan.gangs import Cutting
from wan_core.workers import close_workers, worker_pool

MIB = 2**20


OVERLAP = 16
MODEL_BYTES = 45e9
"""What the models take, and what NCCL may want of /dev/shm beside them."""
BELIEVED = 99
"""So many cards have no link: what is kept for them is what the plan believes of others."""


class Done(BaseException):
    """Stops a run after its last step."""


def run(folder: Path, case: Case, devices: int, tiny: bool, fresh: bool = True) -> dict[str, Any]:
    """Make the steps of a case and return what they took and gave.

    ``fresh`` says that its processes are still to start.
    """
    gc.collect()  # what the run before has left must not count as this one's
    before = 0 if tiny else torch.cuda.memory_allocated()
    loader = WanPipelineLoader(enable_caching=False)
    wishes: dict[str, Any] = {"devices": devices, **case.wishes}
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
    if devices > 1:
        # Nobody would cut the small ones on a CPU: it is made to believe that exchanges take no
        # time.
        machine, free = plan.tried_as.partition("; ")[0], Link(FASTEST, 0.0)
        for cards in range(2, devices + 1) if tiny else (BELIEVED,):
            CardRecords().keep_link(machine, cards, free if tiny else Link(1.5e11, 1e-4))
        _, plan = wrapper.plan(config)
    if not tiny:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        result = wrapper.generate(config)
        found["errors"] = result.errors
    except Done:
        pass
    steps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    peaks, copied = [], []
    cut = 0
    if plan.workers and "errors" not in found:
        told = worker_pool(plan.workers, plan.gang).describe()
        peaks = [one["peak_bytes"] for one in told]
        copied = [round(one.get("copied_bytes", 0) / MIB) for one in told]
        cut = sum({one["gang"]: one["cut"] for one in told if "gang" in one}.values())
    elif not tiny:
        peaks = [torch.cuda.max_memory_allocated() - before]
    # Planned again, now that links and trial are known: what the next job would be told.
    assumed, after = foretold(wrapper, config, plan)
    if devices == 1 and steps and not case.wishes:
        learn(wrapper, plan, steps)
    denoise = next((s for s in plan.estimate.stages if s.name.startswith("denoise")), None)
    found |= {
        "case": case.name, "devices": devices, "workers": list(plan.workers), "gang": plan.gang,
        "cut_passes": cut,
        "units": case.units, "step_seconds": median(steps) if steps else None, "steps": steps,
        "first_step_after": ends[0] - began if ends else None,
        "predicted_first_step": until_first_step(plan, fresh),
        "assumed_step_seconds": assumed.step_seconds, "predicted_paced": after.paced,
        "predicted_step_seconds": after.step_seconds, "predicted_seconds": after.seconds,
        "beside": case.beside or case.name, "shared_weights": plan.shared_weights,
        "copied_mib": copied,
        "reason": after.reasons[-1], "applied": list(after.applied),
        "peak_mib": [round(peak / MIB) for peak in peaks],
        "predicted_peak_mib": round(
            (after.card_peak_bytes or (0 if denoise is None else denoise.device_bytes)) / MIB
        ),
    }  # fmt: skip
    if not tiny:
        torch.cuda.empty_cache()
    return found


def until_first_step(plan: Any, fresh: bool) -> dict[str, float]:
    """Return what a plan says of the seconds until the first step is made, by what takes them.

    A trial of a cut, which computes the first pass a second time, is not among them.
    """
    told = {one.name: one.warm for one in plan.stage_seconds}
    denoise = next(one for one in plan.stage_seconds if one.name.startswith("denoise"))
    begin = {name: told[name] for name in ("start workers", "load transformer") if name in told}
    if not fresh:
        begin.pop("start workers", None)
    once = denoise.first if fresh else 0.0
    return begin | {"libraries and kernels": once, "step": plan.step_seconds}


@contextmanager
def sharing(case: Case) -> Iterator[None]:
    """Have plans share streamed weights, or not, as a case says."""
    if case.shares is None:
        yield
        return

    def shares(job: Cutting, alone: float, cards: int) -> bool:
        return bool(case.shares) and cards > 1 and job.choices.stream

    with patch.object(Cutting, "shares_weights", shares):
        yield


def foretold(wrapper: Any, config: GenerationConfig, plan: Any) -> tuple[Any, Any]:
    """Return the plan by assumed rates, and by the pace that runs have taught, of the same ways."""
    path = Calibrations().path
    known = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    _, assumed = wrapper.plan(config)
    if known is not None:
        path.write_bytes(known)
    _, after = wrapper.plan(config)

    def same(one: Any) -> Any:
        return one if (one.gang, one.workers) == (plan.gang, plan.workers) else plan

    return same(assumed), same(after)


def learn(wrapper: Any, plan: Any, steps: list[float]) -> None:
    """Keep the pace that a run on one card had, as a render keeps it that goes on to its end."""
    key = wrapper._calibration_key(wrapper._manager.analyze_system_resources(plan.device))
    known = Calibrations().of(key)
    forward = forward_name(plan.choices.lean, plan.choices.by_rows)
    pace = known.pace * median(steps) / plan.step_seconds
    Calibrations().add(key, RunRecord(extra=None, pace=pace, forward=forward))


def measured_between() -> list[str]:
    """Return what the runs have shown of links and cuts, a line each."""
    known = CardRecords().between()
    lines = [
        f"link, {name}: {link.rate / 1e9:.3g} GB/s, {1e6 * link.seconds:.0f} us an exchange, "
        f"{link.host / 1e9:.3g} GB/s from RAM to each while all copy"
        for name, link in known.links.items()
        if link.rate < FASTEST and not name.endswith(f" {BELIEVED} cards")
    ]
    for kind, trial in known.trials.items():
        told = "every bit equal" if trial.equal else f"rounding, relative error {trial.error:.1e}"
        lines.append(f"trial, {kind}: {told}")
    return lines


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
    parser.add_argument("--cases", nargs="+", default=[""], help="only those with such a word")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument(
        "--profile", choices=[*SIZES], help="take blocks of a cut pass apart; alone"
    )
    arguments = parser.parse_args()
    if arguments.profile:
        print("\n".join(profile("tiny" if arguments.tiny else arguments.profile)))
        return
    began, tiny = time.perf_counter(), arguments.tiny
    there = 4 if tiny else torch.cuda.device_count()
    devices = arguments.devices or sorted({1, min(there, 2 if tiny else there)})
    found: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/many.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"), "versions": versions(), "runs": [], "decodes": [],
        "notes": [], "kept": {}, "order": [case.name for case in (*TINY, *CASES)],
        "device": "cpu" if tiny else f"{there} {torch.cuda.get_device_name(0)}",
    }  # fmt: skip
    found["kept"] = kept_of(found, arguments.output)
    known = {one["case"] for one in found["kept"].get("runs", ()) if one.get("step_seconds")}
    try:
        wanted = chosen(TINY if tiny else CASES, arguments.cases, devices, known)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    place = room_for_model(arguments.folder, tiny, MODEL_BYTES)
    folder = Path(tempfile.mkdtemp(prefix="wanfit_many_", dir=place))
    os.environ["XDG_CACHE_HOME"] = str(folder / "records")
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    pace = Pace()
    try:
        with ram_of(arguments.ram_gb):
            for case, counts in wanted:
                for count in counts:
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
                    try:
                        with sharing(case):
                            made = run(model, case, count, tiny, pace.starts(case, count))
                    except Exception as err:  # noqa: BLE001 - the others are measured anyway
                        found["notes"].append(
                            f"{case.name} on {count}: {type(err).__name__}: {err}"
                        )
                        close_workers()
                        continue
                    pace.learn(case, count, time.perf_counter() - written, made["step_seconds"])
                    found["runs"].append(made)
                    print(json.dumps(made), flush=True)
                    write(found, arguments.output)
            close_workers()
            for name in dict.fromkeys(case.model for case in CASES):
                if (folder / name).exists():
                    left = arguments.budget - (time.perf_counter() - began)
                    decodes(found, folder / name, devices, left, tiny)
                    write(found, arguments.output)
    finally:
        close_workers()
        found["notes"] += measured_between()
        shutil.rmtree(folder, ignore_errors=True)
    found["notes"].append(f"{time.perf_counter() - began:.0f} s in all")
    write(found, arguments.output)
    print(table(found))


if __name__ == "__main__":
    main()
