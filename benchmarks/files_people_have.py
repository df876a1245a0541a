"""Do weights stay as they are stored, and what does that cost? Files people have, on one GPU.

    python benchmarks/files_people_have.py [--kinds fp8_scaled,Q4_K] [--budget 465]
        [--folder FOLDER] [--output FOLDER] [--tiny]

For each kind of file (``stored_model``: true shapes, random weights) the transformer is loaded by
mapping, sent to the device and made to compute a guided pair of passes at 832x480, 81 frames:
resident beside the same file dequantised at load, in turns; taken apart alone; streamed with no
block resident. Then the product makes a clip, one step with each expert or with the first only,
under caps of video memory, and of RAM in a child process: within a control group where the machine
allows one, else with ``ram_limit_gb``. Predicted beside measured peaks of both memories, stage by
stage. Nothing that earlier runs taught enters a prediction; what this process holds when a run is
planned does, and counts in what is measured.

A cap of video memory counts all that the process holds on the device: CUDA's context is left out of
the plan's and the allocator's share. A step's time is from the call before its first pass to the
callback after it. Loads are cold where the files lie on a disk: they are dropped from the page
cache. The disk is used where it writes at least 1.5 GB/s, else /dev/shm; a load from the disk is
then measured by itself.

Parts run in turn; one is skipped, and said so, where the seconds left are needed for parts of more
worth. Results are written after every part: ``results/files_people_have_<device>.json`` and
``.md``. With ``--kinds`` the rows of other kinds are kept, if they are of the same device and
versions. Needs 40 GB of disk or shared memory and 60 GB of RAM beside it. ``--tiny`` goes through
everything with small models on the CPU, where caps of video memory do nothing.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from wan_core.memory import close_gaps

if __name__ == "__main__":
    close_gaps()  # before torch is imported

import torch
from files_report import report, write_results
from gpu_memory import GIB, SMALL, TINY_SIZE, reserved_too
from host_memory import (
    control_group,
    disk_rates,
    forget_pages,
    group_told,
    in_memory,
    run_within,
)
from stored_layers import FileBench, cold_load, layers
from stored_model import KINDS, sizes

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.loading import give_back_freed
from wan_core.memory import ram
from wan_core.sampling import denoise_steps

DISK_FROM = 1.5e9
"""Bytes per second that a disk must write to hold the files."""
NEEDED = 40e9


class Enough(Exception):
    """Ends a run of the product after its last wanted step: the interrupt of a user."""


@dataclass(frozen=True)
class Run:
    """One run of the product. ``needs`` is about how many seconds it took on an H100.

    What every kind has is worth 6 or more, and comes within the budget; the other rows come where
    time is left, and by ``--kinds`` and a second call.
    """

    kind: str
    cap: float
    needs: float
    worth: int
    ram: float | None = None
    low: bool = False
    """Also a step with the low-noise expert."""
    decode: bool = False
    cold: bool = False

    @property
    def name(self) -> str:
        """What it is called in results."""
        return f"{self.kind}, {self.cap:g} GiB" + (f", RAM {self.ram:g} GiB" if self.ram else "")


def whole(kind: str, cap: float, needs: float, worth: int, **more: Any) -> Run:
    """Return a run with both experts that begins cold."""
    return Run(kind, cap, needs, worth, low=True, cold=True, **more)


RUNS = [
    whole("fp8_scaled", 8, 45, 9, decode=True),
    Run("fp8_scaled", 24, 17, 9, decode=True),
    Run("fp8_scaled", 12, 20, 3, decode=True),
    Run("fp8_scaled", 16, 19, 3, decode=True),
    whole("fp8_scaled", 8, 85, 7, ram=16, decode=True),
    whole("fp8_scaled", 24, 60, 1, ram=32, decode=True),
    whole("Q4_K", 8, 21, 9),
    Run("Q4_K", 24, 10, 8),
    Run("Q4_K", 12, 10, 2),
    Run("Q4_K", 16, 10, 2),
    whole("int8_convrot", 8, 27, 4),
    Run("int8_convrot", 24, 11, 6),
    whole("bf16", 8, 55, 3),
    Run("bf16", 24, 17, 5),
    whole("Q8_0", 8, 27, 2),
    Run("Q8_0", 24, 11, 6),
]
LAYERS = {"fp8_scaled": (50, 10), "Q4_K": (34, 10), "int8_convrot": (42, 8), "bf16": (48, 7),
          "Q8_0": (34, 7)}  # fmt: skip
"""Seconds and worth of measuring the transformer of a kind by itself."""


# -- the product ------------------------------------------------------------------------------


def run_case(bench: FileBench, case: Run, told_ram: bool = False) -> dict[str, Any]:
    """Make a clip and return what it took; ``told_ram`` gives the plan its cap of RAM in words."""
    bench.ensure(case.kind)
    files = bench.model.files()
    wishes: dict[str, Any] = {"device": str(bench.device)}
    share = bench.share_of(case.cap)
    wishes |= {"vram_limit_gb": share} if bench.cuda else {"precision": "bf16", "offload": "stream"}
    if told_ram:
        wishes["ram_limit_gb"] = case.ram
    row: dict[str, Any] = {**asdict(case), "case": case.name}
    forget_calibration()
    wrapper = WanPipelineLoader().load_wan_pipeline(files, optimization_config=wishes)
    wrapper.unload()
    gc.collect()
    give_back_freed()  # what earlier parts left is none of the product's
    ends = Steps(bench, 2 if case.low else 1, stop=not case.decode)
    width, height, frames = TINY_SIZE if bench.tiny else SMALL
    # Spaces change no text, but embeddings are kept by it: each run encodes.
    spaces = " " * RUNS.index(case)
    config = GenerationConfig(
        prompt="a cat moves right" + spaces, negative_prompt="a dog" + spaces, seed=0,
        width=width, height=height, num_frames=frames, num_inference_steps=2, switch_step=1,
        end_step=2 if case.low else 1, progress_callback=ends.ended,
    )  # fmt: skip
    forecast = wrapper.foresee(config)  # of this moment: what is held and was done is in it
    plan, system = forecast.plan, forecast.system
    assert plan is not None, forecast.estimate
    bench.say(f"{case.name}: {', '.join(plan.applied)}")
    dropped = [files.transformer, files.transformer_2, files.text_encoder, files.vae]
    row["file"] = forget_pages(*map(Path, dropped)) if case.cold else "warm: read before"
    bench.cap(share)
    context = bench.context_mib()
    bench.watch.forget()
    before = bench.watch.look()
    result = None
    with reserved_too(bench.device) as held, bench.watch.stages(), ends.watched():
        with suppress(Enough):
            result = wrapper.generate(config)
        total = bench.sync() - before.at
    row |= told_of(bench, plan, held, before.at)
    seconds_told(row, plan, total, cold=row["file"].startswith("cold"))
    row |= {
        "applied": list(plan.applied), "tier": plan.tier, "seconds": total,
        "predicted_step_seconds": plan.step_seconds,
        "steps": ends.seconds, "latents": ends.digests, "context_mib": bench.context_mib(),
        "held_before": before.counted, "held_by_plan": system.held_bytes,
        "done_here": list(system.done_here),
        "context_by_plan_mib": context,
        "warnings": result.warnings if result else [], "errors": result.errors if result else [],
        "success": result.success if result else True,
    }  # fmt: skip
    row["out_of_memory"] = sum("emory ran out" in t for t in row["warnings"] + row["errors"])
    if result is not None and result.frames is not None:
        row["finite"] = bool(torch.isfinite(result.frames).all())
    for stage in row["stages"]:
        bench.say(f"  {stage}")
    return row


class Steps:
    """Times a run's steps and keeps a digest of the latents after each."""

    def __init__(self, bench: FileBench, last: int, stop: bool) -> None:
        self._bench, self._last, self._stop = bench, last, stop
        self._begun = 0.0
        self.seconds: list[float] = []
        self.digests: list[str] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note when an expert, whose weights are in their place, begins with its one step."""

        def noted(*args: Any, **more: Any) -> None:
            self._begun = self._bench.sync()
            denoise_steps(*args, **more)

        with patch("wan_core.render.render.denoise_steps", noted):
            yield

    def ended(self, done: int, total: int, latents: torch.Tensor) -> None:
        """After a step; ends the run after the last one where no frames are wanted."""
        self.seconds.append(self._bench.sync() - self._begun)
        data = latents.detach().float().cpu().contiguous()
        assert bool(torch.isfinite(data).all()), "the latents are not finite"
        self.digests.append(hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16])
        if self._stop and len(self.seconds) == self._last:
            raise Enough


def told_of(bench: FileBench, plan: Any, held: dict[str, int], since: float) -> dict[str, Any]:
    """Return the stages, predicted beside measured, on the device and in RAM.

    What comes before the first one, from ``since`` on, counts to it: imports, and the making of a
    tokenizer, belong to no stage.
    """
    predicted = {stage.name: stage for stage in plan.estimate.stages}
    measured = {} if bench.watch.timeline is None else {
        stage.name: stage for stage in bench.watch.timeline.stages
    }  # fmt: skip
    stages: list[dict[str, Any]] = []
    loading = None  # belongs to the stage that it is for: "load vae" to "decode"
    for name, begun, ended in sorted(bench.watch.spans, key=lambda span: span[1]):
        top, seconds = bench.watch.peak(since or begun, ended), ended - begun
        since = 0.0
        if name.startswith("load "):
            loading = max(loading, top, key=lambda s: s.counted) if loading else top
            stages.append({"name": name, "seconds": seconds, "host": top.counted})
            continue
        top = max(loading, top, key=lambda s: s.counted) if loading else top
        loading, expected = None, predicted.get(name)
        stages.append(
            {
                "name": name, "seconds": seconds,
                "predicted": expected.device_bytes if expected and bench.cuda else None,
                "allocated": measured[name].measured_peak_bytes if bench.cuda else None,
                "reserved": held.get(name),
                # Page locks take what is free, and are given back where it is wanted.
                "predicted_host": (
                    expected.host_bytes + expected.locked_bytes if expected else None
                ),
                "host": top.counted, "locked": top.locked, "mapped": top.mapped,
            }
        )  # fmt: skip
    return {
        "stages": stages,
        "predicted_host": max((s.get("predicted_host") or 0 for s in stages), default=0),
    }


def seconds_told(row: dict[str, Any], plan: Any, total: float, *, cold: bool) -> None:
    """Put predicted seconds beside a run's measured ones, stage by stage, and what is beside them.

    Files that were dropped from the page cache come from disk. A run that makes no frames is
    compared without what it leaves out.
    """
    stages = row["stages"]
    measured = {stage["name"] for stage in stages}
    made = "decode" in measured
    predicted = {one.name: one.cold if cold else one.warm for one in plan.stage_seconds}
    if not made:
        predicted = {n: s for n, s in predicted.items() if n not in ("load vae", "decode")}
    for stage in stages:
        stage["predicted_seconds"] = predicted.get(stage["name"])
    row["predicted_seconds"] = sum(predicted.values())
    beside = sum(seconds for name, seconds in predicted.items() if name not in measured)
    row["outside_seconds"] = total - sum(stage["seconds"] for stage in stages)
    row["predicted_outside_seconds"] = beside


def forget_calibration() -> None:
    """Have no earlier run teach the next estimate; the folder is this program's own."""
    Path(os.environ["XDG_CACHE_HOME"], "wanfit", "measured.json").unlink(missing_ok=True)


def run_here(bench: FileBench, case: Run) -> None:
    bench.found["runs"].append(run_case(bench, case))


def run_capped(bench: FileBench, case: Run) -> None:
    """Make the run in a child process that has only so much RAM."""
    assert case.ram is not None
    bench.ensure(case.kind)
    if shutil.disk_usage(bench.folder).free > bench.model.nbytes + 2e9:
        bench.model.part_experts()
    else:
        bench.note(f"{case.name}: both experts are one file, whose pages count once")
    bench.drop_components()
    told = bench.folder / "child.json"
    if in_memory(bench.model.path("high")):
        bench.note(f"{case.name}: files in shared memory, whose pages no cap of the child counts")
    others = bench.context_mib() or 0
    told.write_text(json.dumps({"case": asdict(case), "others_mib": others}))
    command = [
        sys.executable, str(Path(__file__).resolve()), "--child", str(told),
        "--folder", str(bench.folder), *(["--tiny"] if bench.tiny else []),
    ]  # fmt: skip
    with control_group(int(case.ram * GIB)) as (group, why_not):
        status, output = run_within(group, command, timeout=max(60.0, bench.left + 60))
        counts = group_told(group)
    if status != 0:
        raise RuntimeError(f"the child ended with {status}: {output[-1500:]}; {counts}")
    row = json.loads((bench.folder / "child_found.json").read_text())
    row["ram_by"] = "control group" if group else f"ram_limit_gb (no control group: {why_not})"
    if group and row.pop("told_ram"):
        row["ram_by"] += ", and ram_limit_gb, as its limit was not seen"
    row["group"] = counts
    bench.found["runs"].append(row)
    bench.say(f"{case.name}: {row['ram_by']}, {row['seconds']:.1f} s, {counts}")


def child(told: Path, folder: Path, tiny: bool) -> int:
    """Make one run and leave what was found beside the files."""
    found = json.loads(told.read_text())
    case = Run(**found["case"])
    bench = FileBench("cpu" if tiny else "cuda:0", folder, folder, 600, tiny, fresh=True)
    bench.others_mib = found["others_mib"]
    bench.model.kind = case.kind
    bench.model.nbytes = bench.model.path("high").stat().st_size
    total, _, _ = ram()
    unseen = total > case.ram * GIB
    row = run_case(bench, case, told_ram=unseen)
    (folder / "child_found.json").write_text(json.dumps(row | {"told_ram": unseen}))
    bench.watch.close()
    return 0


# -- the whole --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Something to measure: seconds it needs, and its worth beside the others'."""

    name: str
    needs: float
    worth: int
    work: Callable[[], object]


def parts_of(
    bench: FileBench, kinds: tuple[str, ...], disk: tuple[Path, float] | None
) -> list[Part]:
    """Return the parts in the order in which they run: by kind.

    ``disk`` is where a cold load can be measured, and the seconds that takes.
    """
    out = []
    for kind in kinds:
        out.append(Part(f"{kind}, layers", *LAYERS[kind], partial(layers, bench, kind)))
        if kind == kinds[0] and disk is not None:
            work = partial(cold_load, bench, kind, disk[0])
            out.append(Part(f"{kind}, cold load", disk[1], 6, work))
        cases = [case for case in RUNS if case.kind == kind]
        if bench.tiny:  # without a device caps differ in nothing
            cases = list({(case.low, case.ram is None): case for case in cases}.values())
        for case in cases:
            run = run_here if case.ram is None else run_capped
            out.append(Part(case.name, case.needs, case.worth, partial(run, bench, case)))
    return out


def keep_others(bench: FileBench, kinds: tuple[str, ...]) -> None:
    """Take over the rows of other kinds that were measured on this device, with these versions."""
    path = write_results(None, bench.output, bench.found["machine"])
    if not path.is_file():
        return
    old = json.loads(path.read_text())
    date = {"date": None}
    if old["machine"] | date != bench.found["machine"] | date:
        return
    for part in ("files", "layers", "runs", "loads"):
        bench.found[part] = [row for row in old[part] if row["kind"] not in kinds]
    others = {row["kind"] for row in bench.found["files"]}
    notes = [n for n in old["notes"] if n.split(",")[0] in others]
    bench.found["notes"] += notes + [f"Kept from {old['machine']['date']}: {k}" for k in others]


Rates = tuple[float, float]
"""Bytes per second that a disk writes, and reads when cold."""


def room_for_files(wanted: Path | None, tiny: bool) -> tuple[Path | None, str, Rates | None]:
    """Choose where the files go, and say why; with the disk's rates where it was looked at."""
    if wanted is not None or tiny:
        return wanted, f"files in {wanted}, as asked" if wanted else "small files", None
    disk, memory = Path(tempfile.gettempdir()), Path("/dev/shm")
    free = {path: shutil.disk_usage(path).free for path in (disk, memory) if path.is_dir()}
    rates, told = None, "was not looked at"
    if free.get(disk, 0) > NEEDED and not in_memory(disk / "x"):
        rates = disk_rates(disk)
        told = f"writes {rates[0] / 1e9:.2f} GB/s and reads {rates[1] / 1e9:.2f} GB/s cold"
        if rates[0] > DISK_FROM or free.get(memory, 0) < NEEDED:
            return disk, f"files on the disk, which {told}", rates
    if free.get(memory, 0) > NEEDED:
        return memory, f"files in /dev/shm; the disk {told}", rates
    raise SystemExit(f"40 GB are needed; free are {free}. Give --folder.")


def run_all(bench: FileBench, kinds: tuple[str, ...], rates: Rates | None) -> None:
    bench.say(str(bench.found["machine"]))
    begun = time.perf_counter()
    nbytes = bench.model.write_rest()
    bench.say(f"encoder and VAE: {nbytes / 1e9:.1f} GB in {time.perf_counter() - begun:.0f} s")
    disk, needs = Path(tempfile.gettempdir()), 0.0
    nbytes = sizes(bench.model.shapes, kinds[:1])[kinds[0]]
    if not in_memory(disk / "x") and shutil.disk_usage(disk).free > nbytes + 2e9:
        write, read = rates or (DISK_FROM, DISK_FROM)
        needs = 15 + nbytes * (1 / write + 3 / read)
    parts = parts_of(bench, kinds, (disk, needs) if needs else None)
    for index, part in enumerate(parts):
        later = sum(p.needs for p in parts[index + 1 :] if p.worth > part.worth)
        bench.part(part.name, part.needs, part.work, kept=later)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=465, help="seconds")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--folder", type=Path, help="where to put the files")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    kinds = tuple(kind for kind in arguments.kinds.split(",") if kind)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(unknown)} is not one of {', '.join(KINDS)}")
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA device; --tiny runs small models on the CPU.")
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(patch.dict(os.environ, XDG_CACHE_HOME=cache))
        if arguments.child is not None:
            return child(arguments.child, arguments.folder, arguments.tiny)
        room, why, rates = room_for_files(arguments.folder, arguments.tiny)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=room))) / "model"
        device = "cpu" if arguments.tiny else "cuda:0"
        bench = FileBench(device, folder, arguments.output, arguments.budget, arguments.tiny)
        stack.callback(bench.watch.close)
        bench.note(why)
        bench.note(
            f"RAM of the interpreter: {bench.alone / 2**20:,.0f} MiB, with the libraries of the "
            f"device in use {bench.base / 2**20:,.0f} MiB"
        )
        keep_others(bench, kinds)
        run_all(bench, kinds, rates)
    print(report(bench.found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
