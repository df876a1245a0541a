"""What is set for all of torch in the driver is set in its workers: their bits are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cut_clips import CLIP, made
from support.thread_workers import ThreadWorker
from support.tiny_models import make_folder, open_wan

from wan_core.forward import settings_notes, take_settings, torch_settings, undisturbed
from wan_core.workers import child, close_workers, worker_pool

JOB = CLIP | {"num_inference_steps": 1, "num_frames": 5}
MATMUL, CUDA = torch.backends.cuda.matmul, torch.backends.cuda
SETTINGS: dict[str, Callable[[], Any]] = {
    "ComfyUI's --fast fp16_accumulation": lambda: setattr(MATMUL, "allow_fp16_accumulation", True),
    "sums in bf16": lambda: setattr(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "no cuDNN": lambda: setattr(torch.backends.cudnn, "enabled", False),
    "convolutions in fp32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "another attention": lambda: CUDA.enable_flash_sdp(False),
    "attention's sums in half": lambda: CUDA.allow_fp16_bf16_reduction_math_sdp(True),
    "ComfyUI's --deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "products in bf16": lambda: torch.set_float32_matmul_precision("medium"),
    "products in bf16, by oneDNN's own name": lambda: setattr(
        torch.backends.mkldnn.matmul, "fp32_precision", "bf16"
    ),
    "products in tf32, by CUDA's own name": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "convolutions in fp32, by cuDNN's own name": lambda: setattr(
        torch.backends.cudnn.conv, "fp32_precision", "ieee"
    ),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "no oneDNN": lambda: setattr(torch.backends.mkldnn, "enabled", False),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch_settings()
    yield
    take_settings(before)
    assert torch_settings() == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("settings") / "model", "wan2.1-t2v")


if not hasattr(MATMUL, "fp32_precision"):  # torch before 2.9
    SETTINGS = {name: act for name, act in SETTINGS.items() if "own name" not in name}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_is_told_and_taken(name: str) -> None:
    before = torch_settings()
    SETTINGS[name]()
    after = torch_settings()
    assert after != before
    with undisturbed() as surroundings:  # a render goes on, and says where it is rounded more
        noted = [*surroundings.notes, *settings_notes("cpu")]
    assert any("float32" in note for note in noted) == name.startswith("products")
    take_settings(before)
    assert torch_settings() == before
    take_settings(after)
    assert torch_settings() == after


def test_workers_compute_with_what_is_set_when_a_render_begins(
    folder: Path, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that were started for a render before it."""
    taken: list[Any] = []
    monkeypatch.setattr(child, "take_settings", taken.append)
    wrapper = open_wan(folder, devices=2)
    made(wrapper, JOB)
    assert len(taken) >= 2 and all(settings == torch_settings() for settings in taken)
    taken.clear()
    SETTINGS["no oneDNN"]()
    made(wrapper, JOB)
    assert len(threads.made) == len(taken) == 2
    assert all(settings == torch_settings() for settings in taken)


@pytest.mark.slow
def test_processes_have_the_bits_of_one_under_other_settings(folder: Path) -> None:
    close_workers()
    plain = made(open_wan(folder, devices=2), JOB)
    started = worker_pool(("cpu", "cpu")).pids
    SETTINGS["products in bf16"]()
    whole = made(open_wan(folder), JOB)
    # Another wrapper: the first one has kept what it encoded of the text.
    found = made(open_wan(folder, devices=2), JOB)
    assert worker_pool(("cpu", "cpu")).pids == started
    close_workers()
    assert torch.equal(found.latents, whole.latents)
    assert not torch.equal(plain.latents, whole.latents), "the setting changes no bit here"
