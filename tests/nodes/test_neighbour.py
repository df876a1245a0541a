"""A bad neighbour in a running ComfyUI: another pack that sets, evicts and raises at every step.

Slow: a ComfyUI of its own, because what the neighbour has replaced would be there for other tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.comfy_graphs import frames_of, graph
from support.comfy_server import REPOSITORY, ComfyServer, find_checkout, find_python

CHECKOUT = find_checkout()
PYTHON = CHECKOUT if isinstance(CHECKOUT, str) else find_python(CHECKOUT)
MODEL = "tiny-a14b"
NEIGHBOUR = REPOSITORY / "tests" / "support" / "comfy_neighbour"
SETS: dict[str, Any] = {
    "default dtype": "torch.float64", "default device": "meta", "autocast": True,
    "attention": False, "deterministic": True, "precision": "medium", "threads": 2,
}  # fmt: skip
"""What is read after an act of this name."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.comfyui,
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]


@pytest.fixture(scope="module")
def checkout() -> Path:
    assert isinstance(CHECKOUT, Path)
    return CHECKOUT


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer) -> Iterator[ComfyServer]:
    base = comfyui.base
    tiny_models.make_folder(base / "models" / "diffusers" / MODEL, "wan2.2-t2v-a14b", seed=1)
    comfyui.options += ("--preview-method", "latent2rgb")
    (base / "custom_nodes" / "neighbour").symlink_to(NEIGHBOUR, target_is_directory=True)
    with comfyui:
        yield comfyui


def beside(act: str, when: str, sampler: str = "WanGenerate", **inputs: Any) -> dict[str, Any]:
    prompt = graph(sampler, MODEL, name="beside", seed=5, steps=4, **inputs)
    chosen = {"pipeline": ["1", 0], "act": act, "when": when}
    prompt["8"] = {"class_type": "WanFitNeighbour", "inputs": chosen}
    prompt["3"]["inputs"]["pipeline"] = ["8", 0]
    images = prompt["4"]["inputs"]["images"]
    prompt["6"] = {"class_type": "WanFitProbeText", "inputs": {"value": ["3", 3]}}
    prompt["9"] = {"class_type": "WanFitNeighbourState", "inputs": {"after": images}}
    return prompt


@pytest.fixture(scope="module")
def alone(server: ComfyServer) -> torch.Tensor:
    server.run(beside("none", "before"))
    return frames_of(server, "beside")


@pytest.mark.parametrize("when", ["before", "preview"])
@pytest.mark.parametrize(
    "act",
    ["none", "default dtype", "default device", "autocast", "attention", "deterministic",
     "precision", "threads", "gradients", "seeds", "evicts", "signals"],
)  # fmt: skip
def test_the_render_has_its_bits_and_the_neighbour_its_settings(
    server: ComfyServer, alone: torch.Tensor, act: str, when: str
) -> None:
    outputs = server.run(beside(act, when))
    report = outputs["6"]["value"][0]
    if act == "precision":  # cannot be kept out without being changed for everybody
        assert "Products of float32 numbers" in report
    elif (act, when) == ("threads", "before"):  # as many as there are when a render begins
        assert "2 threads" in report
    else:
        assert torch.equal(frames_of(server, "beside"), alone)
    (state,), (previews,) = outputs["9"]["state"], outputs["9"]["previews"]
    assert previews > 2
    if act in SETS:
        assert state[act] == SETS[act]


@pytest.mark.parametrize("act", ["raises", "out of memory"])
def test_a_previewer_that_raises_costs_the_previews_alone(
    server: ComfyServer, alone: torch.Tensor, act: str
) -> None:
    outputs = server.run(beside(act, "preview"))
    assert torch.equal(frames_of(server, "beside"), alone)
    assert outputs["9"]["previews"] == [1]
    assert "no more previews" in server.log()


def test_a_node_that_raises_before_loses_nothing(server: ComfyServer, alone: torch.Tensor) -> None:
    entry = server.wait(server.queue(beside("raises", "before")))
    assert entry["status"]["status_str"] == "error"
    assert "the neighbour's previewer is broken" in str(entry["status"]["messages"])
    server.run(beside("none", "before"))
    assert torch.equal(frames_of(server, "beside"), alone)
