"""Fifty mixed renders in one process, and fifty in one ComfyUI: nothing is left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.comfy_server import find_checkout, find_python

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import soak  # noqa: E402

RENDERS = 50
CHECKOUT = find_checkout()
PYTHON = CHECKOUT if isinstance(CHECKOUT, str) else find_python(CHECKOUT)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="handles are counted in /proc"),
]


def check(found: soak.Figures) -> None:
    assert found.renders == RENDERS and 0 < found.failed_on_purpose < RENDERS
    assert found.differing == []
    assert found.growth <= soak.MAX_GROWTH, [value // soak.MIB for value in found.rss]
    # A connection to ComfyUI may be open at the moment of a look.
    assert min(found.handles[-5:]) <= found.handles[0], found.handles
    assert found.threads[-1] <= found.threads[0], found.threads


def test_fifty_renders_in_one_process() -> None:
    check(soak.soak_alone(RENDERS))


@pytest.mark.comfyui
@pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON))
def test_fifty_workflows_in_one_comfyui() -> None:
    check(soak.soak_comfyui(RENDERS))
