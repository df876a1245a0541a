"""The forecast of RAM beside what clips took on H200s (benchmarks/files_people_have.py).

T2V-A14B in scaled fp8, 832x480, 81 frames, one step with each expert or with the first only. The
terms of ``memory/process.py`` were chosen by these runs: what is held here is that they still add
up to them. What a process held and had done before is part of a run. Left out are the encodes of
texts that came while a tokenizer kept twice what it keeps now, and a stage that ended before all
that it page-locks was locked.

The runs in new processes are of ``benchmarks/results/files_people_have_h200.md`` and of an hour
before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from support import wan_layouts as layouts
from support.machines import gpu

from wan_core import ArchitectureDetector, WanModelFiles
from wan_core.memory import Choices, Workload, estimate
from wan_core.models import ModelArchitecture

MIB = 2**20
DTYPES = {
    "transformer": "bf16", "transformer_2": "bf16", "text_encoder": "bf16", "vae": "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A clip: the RAM in GiB, what was held before in MiB, what was done, MiB of stages."""

    ram: int
    held: float
    done: tuple[str, ...]
    stages: dict[str, int]
    low: bool = True
    resident: int | None = None
    """Blocks that stay on the card while the others stream; None: all."""


RUNS = {
    "8 GiB of the card, after the forwards of a transformer": Run(
        251, 1388.8, ("card", "denoise", "imports"), {"denoise_low": 21_422, "decode": 6_495},
        resident=11,
    ),
    "24 GiB, after that clip": Run(
        251, 1640.9, ("card", "decode", "denoise", "encode", "imports"),
        {"denoise_high": 2_080, "decode": 2_775}, low=False,
    ),
    "24 GiB and 32 GiB of RAM, in a new process": Run(
        32, 610.7, ("imports",),
        {"text_encode": 1_319, "denoise_high": 1_755, "denoise_low": 1_844, "decode": 2_748},
    ),
    "the same on another machine, its files on a disk": Run(
        32, 610.7, ("imports",),
        {"text_encode": 1_320, "denoise_high": 1_740, "denoise_low": 1_846, "decode": 2_750},
    ),
    "8 GiB, a text for the first time after the forwards of a transformer": Run(
        251, 1229.5, ("card", "denoise", "imports"),
        {"text_encode": 1_591, "denoise_high": 21_359, "denoise_low": 21_460, "decode": 6_539},
        resident=11,
    ),
    "24 GiB, after that clip, its tokenizer dropped": Run(
        251, 1701.1, ("card", "decode", "denoise", "encode", "imports"),
        {"text_encode": 1_950, "denoise_high": 2_141, "decode": 2_831}, low=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelArchitecture:
    folder = tmp_path_factory.mktemp("a14b")
    stored = layouts.stored(layouts.FILES["t2v-14b"][0], "fp8_scaled old")
    experts = [
        layouts.write_sparse(folder / f"a_{noise}_noise.safetensors", stored)
        for noise in ("high", "low")
    ]
    encoder = layouts.write_sparse(folder / "umt5.safetensors", layouts.fp8_umt5())
    files = WanModelFiles(transformer=experts[0], transformer_2=experts[1], text_encoder=encoder)
    return ArchitectureDetector().detect_model_architecture(files)


@pytest.mark.parametrize("name", RUNS)
def test_the_forecast_is_near_what_was_measured(name: str, model: ModelArchitecture) -> None:
    """At most 5 % over, at most 2 % under."""
    run = RUNS[name]
    job = Workload(
        width=832, height=480, num_frames=81, steps=1 + run.low, high_steps=1,
        idle=() if run.low else ("transformer_2",),
    )  # fmt: skip
    streamed = run.resident is not None
    choices = Choices(
        dtypes=DTYPES, offload="model", lean=True, stream=streamed, cache_in_ram=streamed,
        resident_blocks=run.resident,
    )  # fmt: skip
    machine = gpu(
        140, ram=run.ram, process_bytes=int(run.held * MIB), done_here=run.done,
        compute_capability=(9, 0), allocator="expandable",
    )  # fmt: skip
    found = {stage.name: stage for stage in estimate(model, job, choices, machine).stages}
    told = {name: (one.host_bytes + one.locked_bytes) / MIB for name, one in found.items()}
    errors = {stage: told[stage] / measured - 1 for stage, measured in run.stages.items()}
    assert all(-0.02 < error < 0.05 for error in errors.values()), errors
