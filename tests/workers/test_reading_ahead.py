"""What workers read next is in the system's cache by then, where RAM has room for it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import single_files
from support.stored_models import experts
from support.thread_workers import ThreadWorker

from wan_core import GenerationConfig, WanModelFiles, WanPipelineLoader
from wan_core.render import conditions, stages

pytestmark = pytest.mark.usefixtures("mapped")
JOB = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 5, "seed": 1,
       "num_inference_steps": 4, "switch_step": 2}  # fmt: skip
GIB = 2**30


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    single_files.write(folder)
    experts(folder, "fp8_scaled")
    return folder


def generated(home: Path, devices: int, done: threading.Event) -> Any:
    pair, _ = experts(home, "fp8_scaled")
    files = WanModelFiles(
        transformer=pair[0], transformer_2=pair[1], vae=home / "vae" / single_files.VAE,
        text_encoder=home / "text_encoders" / single_files.TEXT,
    )  # fmt: skip
    wishes = {"device": "cpu", "precision": "bf16", "offload": "none", "devices": devices}
    wrapper = WanPipelineLoader().load_wan_pipeline(files, optimization_config=wishes)

    def step(number: int, *_: Any) -> None:
        if number == 1:
            done.wait(20)

    config = GenerationConfig(progress_callback=step, **JOB)
    return wrapper.generate(config).raise_for_error()


@pytest.mark.parametrize("free", [2**10, 0])
def test_the_first_expert_is_read_with_the_texts_and_the_second_beside_the_first(
    home: Path, threads: type[ThreadWorker], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    """Files, and how many units workers had been given when the system was asked to read them."""
    second = threading.Event()

    def ask(handle: int, *_: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        asked.append((name, sum(len(worker.units) for worker in threads.made)))
        if name.startswith("low_noise"):
            second.set()

    monkeypatch.setattr(os, "posix_fadvise", ask)
    alone = threading.Event()
    alone.set()
    whole = generated(home, 1, alone)
    WanPipelineLoader().clear_cache()
    asked.clear()
    for module in (stages, conditions):
        monkeypatch.setattr(module, "ram", lambda: (free * GIB, free * GIB, ()))
    if not free:
        second.set()
    result = generated(home, 2, second)
    assert torch.equal(result.latents, whole.latents) and len(threads.made) == 2
    if not free:
        assert not asked
        return
    given = dict(reversed(asked))
    assert given["high_noise_fp8_scaled.safetensors"] == 0
    assert 1 <= given["low_noise_fp8_scaled.safetensors"] < 4
