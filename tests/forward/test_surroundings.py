"""What the caller has set for torch does not reach a computation inside ``undisturbed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.cases import in_turn
from support.tiny_models import make_folder

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.forward import undisturbed
from wan_core.job import SCHEDULERS

COUNT = torch.arange(1, 7)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "default fp64": lambda: default_dtype(torch.float64),
    "default bf16": lambda: default_dtype(torch.bfloat16),
    "default fp16": lambda: default_dtype(torch.float16),
    "default device": lambda: default_device("meta"),
    "with a device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}

CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "tensor": lambda: torch.tensor([0.1, 2, 3]),
    "tensor of a float": lambda: torch.tensor(0.1),
    "tensor of tensors": lambda: torch.tensor([torch.tensor(0.1, dtype=torch.float32), 1.0]),
    "tensor of half": lambda: torch.tensor([torch.tensor(0.1, dtype=torch.float16), 0.1]),
    "tensor of ints": lambda: torch.tensor([1, 2]),
    "tensor of numpy": lambda: torch.tensor(np.linspace(0, 1, 5)),
    "tensor of numpy scalars": lambda: torch.tensor([np.float64(0.1), 0.2]),
    "as_tensor": lambda: torch.as_tensor([0.1, 0.2]),
    "asarray": lambda: torch.asarray([0.1, 0.2]),
    "scalar": lambda: torch.scalar_tensor(0.1),
    "full": lambda: torch.full((2, 3), 0.1),
    "full of ints": lambda: torch.full((2, 3), 7),
    "arange": lambda: torch.arange(0.0, 1.0, 0.1),
    "arange of ints": lambda: torch.arange(5),
    "linspace": lambda: torch.linspace(0, 1, 7),
    "logspace": lambda: torch.logspace(0, 1, 7),
    "ones": lambda: torch.ones(3) / 3,
    "zeros": lambda: torch.zeros(3).exp() / 3,
    "eye": lambda: torch.eye(3) / 3,
    "window": lambda: torch.hann_window(9),
    "fftfreq": lambda: torch.fft.fftfreq(9),
    "randn": lambda: torch.randn(5, generator=torch.Generator("cpu").manual_seed(0)),
    "rand": lambda: torch.rand(5, generator=torch.Generator("cpu").manual_seed(0)),
    "randperm": lambda: torch.randperm(5, generator=torch.Generator("cpu").manual_seed(0)),
    "named dtype": lambda: torch.ones(3, dtype=torch.float64) / 3,
    "named half": lambda: torch.full((3,), 0.1, dtype=torch.float16),
    "quotient of ints": lambda: COUNT / 3,
    "quotient of two": lambda: torch.div(COUNT, COUNT + 1),
    "times a float": lambda: COUNT * 0.1,
    "root of ints": lambda: COUNT.sqrt(),
    "power of ints": lambda: COUNT**0.5,
    "exponential of ints": lambda: torch.exp(-COUNT),
    "cast of ints": lambda: COUNT.double() / 3,
    "cast to float": lambda: COUNT.float() / 3,
    "product": lambda: torch.nn.functional.linear(torch.full((2, 3), 0.1), torch.full((4, 3), 0.3)),
    "module": lambda: torch.nn.LayerNorm(4, elementwise_affine=False)(torch.linspace(0, 1, 4)),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_gives_what_it_gives_alone(name: str, call: str) -> None:
    expected = CALLS[call]()
    with SURROUNDINGS[name](), undisturbed():
        found = CALLS[call]()
    assert found.dtype == expected.dtype and found.device.type == "cpu"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_was_set_is_set_again_afterwards(name: str) -> None:
    def seen() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"),
            torch.ones(1).dtype, torch.ones(1).device,
        )  # fmt: skip

    with SURROUNDINGS[name]():
        before = seen()
        with undisturbed():
            pass
        assert seen() == before
        with pytest.raises(RuntimeError, match="boom"), undisturbed():
            raise RuntimeError("boom")
        assert seen() == before


PICTURE = Image.fromarray(np.arange(64 * 32 * 3, dtype=np.uint8).reshape(32, 64, 3))
JOB: dict[str, Any] = {"prompt": "a red cat", "width": 64, "height": 32, "num_frames": 9,
                       "num_inference_steps": 3}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("wan2.1-t2v", "wan2.1-i2v", "wan2.2-ti2v-5b"):
        make_folder(root / family, family)
    return root


def made(models: Path, family: str, scheduler: str) -> torch.Tensor:
    """The frames of a job for which everything is read and encoded anew."""
    image = {} if family == "wan2.1-t2v" else {"image": PICTURE}
    size = {"height": 64} if family == "wan2.2-ti2v-5b" else {}
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(models / family)
    config = GenerationConfig(**JOB | size | image, scheduler=scheduler)
    frames: torch.Tensor = wrapper.generate(config).raise_for_error().frames
    return frames


@pytest.fixture(scope="module")
def expected(models: Path) -> Callable[[str, str], torch.Tensor]:
    return cache(partial(made, models))


JOBS = (
    *(("wan2.1-t2v", scheduler) for scheduler in SCHEDULERS),
    ("wan2.1-i2v", "unipc"), ("wan2.2-ti2v-5b", "unipc"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "job"),
    in_turn(SURROUNDINGS, JOBS),
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_a_video_is_the_same_whatever_surrounds_it(
    models: Path, expected: Callable[[str, str], torch.Tensor], name: str, job: tuple[str, str]
) -> None:
    wanted = expected(*job)
    with SURROUNDINGS[name]():
        found = made(models, *job)
    assert torch.equal(found, wanted)


def test_a_run_inside_autocast_spoils_no_later_one(models: Path) -> None:
    """Texts are kept: rounded ones would change the same job until the process ends."""
    loader = WanPipelineLoader()
    loader.clear_cache()
    wrapper = loader.load_wan_pipeline(models / "wan2.1-t2v")
    with torch.autocast("cpu", torch.bfloat16):
        first = wrapper.generate(GenerationConfig(**JOB)).raise_for_error()
    later = wrapper.generate(GenerationConfig(**JOB)).raise_for_error()
    loader.clear_cache()
    fresh = wrapper.generate(GenerationConfig(**JOB)).raise_for_error()
    loader.clear_cache()
    assert torch.equal(first.frames, fresh.frames)
    assert torch.equal(later.frames, fresh.frames)


def test_weights_that_are_read_early_in_inference_mode_serve_later_runs(
    models: Path, expected: Callable[[str, str], torch.Tensor]
) -> None:
    loader = WanPipelineLoader()
    loader.clear_cache()
    with torch.inference_mode():
        assert loader.preload_pipeline(models / "wan2.1-t2v")
    wrapper = loader.load_wan_pipeline(models / "wan2.1-t2v", offload="stream")
    found = wrapper.generate(GenerationConfig(**JOB)).raise_for_error()
    loader.clear_cache()
    assert torch.equal(found.frames, expected("wan2.1-t2v", "unipc"))
