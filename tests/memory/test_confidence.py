"""How far an estimate may be trusted is a sum of what is known and what is assumed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.machines import architecture, cpu, gpu

from wan_core.memory import Choices, Workload, estimate
from wan_core.memory.calibration import Calibration
from wan_core.models import PARTS

JOB = Workload(width=832, height=480, num_frames=81)
WHOLE = architecture("wan2.1-t2v-14b")
BARE = architecture("wan2.1-t2v-14b", bare=True)
ODD = replace(WHOLE, transformer=replace(WHOLE.transformer, heads_known=False))
H100 = gpu(80, compute_capability=(9, 0))
KNOWN = replace(gpu(80), calibration=Calibration(runs=3))


def rated(model: Any, machine: Any, **choices: Any) -> tuple[float, str]:
    dtypes = dict.fromkeys(PARTS, "bf16")
    found = estimate(model, JOB, Choices(dtypes=dtypes, **choices), machine)
    return found.confidence, found.basis


@pytest.mark.parametrize(
    ("model", "machine", "choices", "confidence", "basis"),
    [
        (WHOLE, gpu(80), {}, 0.8, "arithmetic"),
        (WHOLE, H100, {}, 0.9, "arithmetic, compared with runs on such a card"),
        (WHOLE, KNOWN, {}, 0.95, "arithmetic and 3 runs on this machine"),
        (WHOLE, replace(H100, calibration=Calibration(runs=1)), {}, 0.95,
         "arithmetic and 1 run on this machine"),
        (WHOLE, cpu(200), {}, 0.65, "arithmetic"),
        (BARE, gpu(80), {}, 0.7, "arithmetic"),
        (ODD, gpu(80), {}, 0.6, "arithmetic"),
        (WHOLE, gpu(80), {"offload": "sequential"}, 0.75, "arithmetic"),
        (WHOLE, gpu(80), {"offload": "model"}, 0.8, "arithmetic"),
        (replace(BARE, transformer=ODD.transformer), cpu(200), {"offload": "sequential"}, 0.3,
         "arithmetic"),
    ],
)  # fmt: skip
def test_each_thing_known_or_assumed_counts_once(
    model: Any, machine: Any, choices: dict[str, Any], confidence: float, basis: str
) -> None:
    assert rated(model, machine, **choices) == (confidence, basis)


def test_texts_are_counted_as_guidance_needs_them() -> None:
    """A second text of 512 x 4096 numbers in fp32 where either expert is guided."""
    dtypes = dict.fromkeys(PARTS, "bf16")
    model = architecture("wan2.2-t2v-a14b")

    def text(high: bool, low: bool) -> int:
        job = replace(JOB, guidance_high=high, guidance_low=low)
        found = estimate(model, job, Choices(dtypes=dtypes, offload="model"), gpu(80))
        return next(s.activation_bytes for s in found.stages if s.name == "text_encode")

    none = text(False, False)
    for high, low in ((True, False), (False, True), (True, True)):
        assert text(high, low) - none == 512 * 4096 * 4
