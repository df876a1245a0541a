"""A neighbour in the same process that sets, breaks and raises: the render keeps its bits.

It acts before the render and inside every callback. What it has set is, afterwards, as it left it.
"""

from __future__ import annotations

import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch
from PIL import Image, ImageFile
from support.tiny_models import make_folder

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.errors import InvalidRequest, ModuleInUse, WanError
from wan_core.loading import component_cache

PICTURE = Image.fromarray(np.arange(64 * 32 * 3, dtype=np.uint8).reshape(32, 64, 3))
JOB: dict[str, Any] = {
    "prompt": "a red cat", "width": 32, "height": 32, "num_frames": 9, "seed": 1,
    "num_inference_steps": 3, "max_chunk_size": 5, "window_overlap": 4,
}  # fmt: skip
FAMILIES = ("wan2.2-i2v-a14b", "wan2.1-i2v", "wan2.2-ti2v-5b")
CALLBACKS = (
    "interrupt_check", "progress_callback", "preview_callback", "chunk_callback",
    "decode_callback", "warning_callback",
)  # fmt: skip
registry = attention_dispatch._AttentionBackendRegistry

GLOBALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], tuple[Any, ...]]] = {
    # name: how it is read, how it is set, and what the neighbour sets
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype,
                      (torch.float64, torch.bfloat16)),
    "default device": (torch.get_default_device, torch.set_default_device, ("meta",)),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"),
                 lambda on: torch.set_autocast_enabled("cpu", on), (True,)),
    "flash attention": (torch.backends.cuda.flash_sdp_enabled,
                        torch.backends.cuda.enable_flash_sdp, (False,)),
    "plain attention": (torch.backends.cuda.math_sdp_enabled,
                        torch.backends.cuda.enable_math_sdp, (False,)),
    "diffusers' attention": (lambda: registry._active_backend, registry.set_active_backend,
                             (attention_dispatch.AttentionBackendName._NATIVE_MATH,)),
    "deterministic": (torch.are_deterministic_algorithms_enabled,
                      torch.use_deterministic_algorithms, (True,)),
    "threads": (torch.get_num_threads, torch.set_num_threads,
                (2 if torch.get_num_threads() == 1 else 1,)),
    "matmul precision": (torch.get_float32_matmul_precision,
                         torch.set_float32_matmul_precision, ("high", "medium")),
    "interrupt signal": (lambda: signal.getsignal(signal.SIGINT),
                         lambda handler: signal.signal(signal.SIGINT, handler),
                         (signal.SIG_IGN, signal.SIG_DFL)),
    "numpy's errors": (np.geterr, lambda given: np.seterr(**given),
                       (dict.fromkeys(("divide", "over", "under", "invalid"), "raise"),)),
    "working folder": (os.getcwd, os.chdir, ("/",)),
    "broken pictures": (lambda: ImageFile.LOAD_TRUNCATED_IMAGES,
                        lambda on: setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", on), (True,)),
    "biggest picture": (lambda: Image.MAX_IMAGE_PIXELS,
                        lambda most: setattr(Image, "MAX_IMAGE_PIXELS", most), (None, 1)),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_folder(root / family, family)
    return root


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Put back what a test has left set."""
    before = {name: read() for name, (read, _, _) in GLOBALS.items()}
    yield
    torch.set_default_device(None)
    for name, (_, put, _) in GLOBALS.items():
        if name != "default device":
            put(before[name])


def job_of(family: str) -> dict[str, Any]:
    size = {"height": 64, "width": 64} if family == "wan2.2-ti2v-5b" else {}
    return JOB | size | {"image": PICTURE}


def make(models: Path, family: str, **more: Any) -> Any:
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        models / family, optimization_config={"device": "cpu", "precision": "fp32"}
    )
    return wrapper.generate(GenerationConfig(**job_of(family), **more))


def in_callbacks(act: Callable[..., Any]) -> dict[str, Any]:
    return dict.fromkeys(CALLBACKS, act)


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, torch.Tensor]:
    return {path.name: make(models, path.name).raise_for_error().frames
            for path in models.iterdir()}  # fmt: skip


QUICK = ("default dtype", "default device", "autocast", "flash attention", "threads",
         "diffusers' attention", "matmul precision")  # fmt: skip
"""What nodes packs are known to set; the others are tried in the slow tests."""


def one_of_each(rows: Sequence[Any], columns: Sequence[Any], quick: Sequence[Any]) -> list[Any]:
    """All pairs, all but one of each quick row marked slow: the columns take turns."""
    return [
        pytest.param(
            row,
            column,
            marks=[pytest.mark.slow] * ((i - j) % len(columns) != 0 or row not in quick),
        )
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


@pytest.mark.parametrize(("name", "family"), one_of_each(list(GLOBALS), FAMILIES, QUICK))
def test_what_a_neighbour_sets_changes_no_bit_and_stays_set(
    models: Path, expected: dict[str, torch.Tensor], name: str, family: str
) -> None:
    read, put, values = GLOBALS[name]
    before = read()

    def same_or_named(found: Any, wanted: torch.Tensor) -> bool:
        named = name == "matmul precision" and any("float32" in text for text in found.warnings)
        return named or torch.equal(found.raise_for_error().frames, wanted)

    for value in values:
        put(value)
        left = read()
        found = make(models, family)
        if name == "threads":  # how many there are when a render begins is part of the device
            assert f"{value} threads" in found.raise_for_error().metadata["device"]
        else:
            assert same_or_named(found, expected[family]), (name, value)
        assert read() == left, (name, value)
        put(None if name == "default device" else before)
        # Inside the callbacks it is set and unset in turn, so that neither can be relied on.
        draw, calls = random.Random(0), 0

        def act(*_: Any, value: Any = value, draw: random.Random = draw) -> None:
            nonlocal calls, left
            calls += 1
            put(draw.choice((value, None if name == "default device" else before)))
            left = read()

        found = make(models, family, **in_callbacks(act))
        assert same_or_named(found, expected[family]), (name, value)
        assert calls > 20 and read() == left, (name, value)
        put(None if name == "default device" else before)


def test_random_numbers_belong_to_the_neighbour(
    models: Path, expected: dict[str, torch.Tensor]
) -> None:
    """It seeds and draws from the process's generators, and gets the numbers it gets alone."""

    def drawn() -> list[float]:
        return [torch.rand(1).item(), random.random(), float(np.random.rand())]

    def seed(*_: Any) -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    seed()
    alone = drawn()
    found = make(models, "wan2.2-i2v-a14b", **in_callbacks(seed)).raise_for_error()
    assert torch.equal(found.frames, expected["wan2.2-i2v-a14b"]) and drawn() == alone
    seed()
    make(models, "wan2.2-i2v-a14b").raise_for_error()
    assert drawn() == alone


def test_tensors_that_a_callback_writes_into_are_its_own(
    models: Path, expected: dict[str, torch.Tensor]
) -> None:
    def spoil(step: int, total: int, latents: torch.Tensor) -> None:
        latents.fill_(float("nan"))

    for family, frames in expected.items():
        found = make(models, family, progress_callback=spoil, preview_callback=spoil)
        assert torch.equal(found.raise_for_error().frames, frames)


def test_gradients_and_inference_mode_of_a_callback(
    models: Path, expected: dict[str, torch.Tensor]
) -> None:
    def record(*_: Any) -> None:
        torch.set_grad_enabled(True)

    found = make(models, "wan2.2-i2v-a14b", **in_callbacks(record)).raise_for_error()
    assert torch.equal(found.frames, expected["wan2.2-i2v-a14b"]) and torch.is_grad_enabled()
    assert not found.latents.requires_grad


def test_a_neighbour_that_evicts_and_unloads(
    models: Path, expected: dict[str, torch.Tensor]
) -> None:
    """It empties the cache at every opportunity, as a program does that needs the memory."""
    loader = WanPipelineLoader()
    loader.clear_cache()
    wrapper = loader.load_wan_pipeline(
        models / "wan2.2-i2v-a14b", optimization_config={"device": "cpu", "precision": "fp32"}
    )
    acts = (
        loader.clear_cache, wrapper.unload, component_cache().release_device,
        component_cache().drop_unused,
    )  # fmt: skip
    draw, calls = random.Random(0), 0

    def act(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 20 == 0:  # between blocks, they are many
            draw.choice(acts)()

    config = GenerationConfig(**job_of("wan2.2-i2v-a14b"), **in_callbacks(act))
    found = wrapper.generate(config).raise_for_error()
    assert torch.equal(found.frames, expected["wan2.2-i2v-a14b"])
    loader.clear_cache()


def test_a_render_in_the_middle_of_another_is_refused(
    models: Path, expected: dict[str, torch.Tensor]
) -> None:
    """It would compute with what that one has attached to the modules, its LoRAs too.

    One in a loader of its own shares nothing with it.
    """
    loader, family, inside = WanPipelineLoader(), "wan2.2-ti2v-5b", []
    wrapper = loader.load_wan_pipeline(
        models / family, optimization_config={"device": "cpu", "precision": "fp32"}
    )

    def render(step: int, total: int, latents: torch.Tensor) -> None:
        if step == 1:
            inside.append(wrapper.generate(GenerationConfig(**job_of(family))))
            inside.append(make(models, family))

    config = GenerationConfig(**job_of(family), progress_callback=render)
    outside = wrapper.generate(config).raise_for_error()
    loader.clear_cache()
    assert isinstance(inside[0].error, ModuleInUse)
    assert torch.equal(inside[1].raise_for_error().frames, expected[family])
    assert torch.equal(outside.frames, expected[family])


ERRORS: tuple[BaseException, ...] = (
    MemoryError("theirs"), StopIteration("theirs"), OSError(28, "theirs"),
    KeyboardInterrupt("theirs"), RuntimeError("CUDA error: out of memory"), ValueError("theirs"),
    InvalidRequest("theirs"), torch.OutOfMemoryError("theirs"), RecursionError("theirs"),
    GeneratorExit("theirs"), SystemExit("theirs"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "name"),
    one_of_each(ERRORS, CALLBACKS, ERRORS[:5]),
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_what_a_callback_raises_passes_and_loses_nothing(
    models: Path, expected: dict[str, torch.Tensor], tmp_path: Path, error: BaseException,
    name: str,
) -> None:  # fmt: skip
    """Whichever callback raises, and whatever: the same comes out, and the render goes on later."""
    family, calls = "wan2.2-i2v-a14b", 0
    kept: dict[str, Any] = {"resume": "auto", "journal_folder": tmp_path / "j"}
    kept |= {"fps": 3.0} if name == "warning_callback" else {}

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        torch.set_default_dtype(torch.float64)  # and nobody tidies up after it
        if calls > (0 if name == "warning_callback" else 2):
            raise error

    with pytest.raises(type(error)) as caught:
        make(models, family, **kept, **{name: fail})
    assert caught.value is error
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)
    rest = make(models, family, **kept).raise_for_error()
    assert torch.equal(rest.frames, expected[family])


def test_warnings_that_a_neighbour_makes_errors(
    models: Path, expected: dict[str, torch.Tensor]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family, frames in expected.items():
            found = make(models, family)
            if found.success:
                assert torch.equal(found.frames, frames)
            else:
                assert isinstance(found.error, WanError), repr(found.error)


def test_a_replaced_attention_is_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.scaled_dot_product_attention

    def sage(*given: Any, **named: Any) -> Any:
        return real(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sage)
    found = make(models, "wan2.1-i2v").raise_for_error()
    assert any("attention was replaced" in text and "sage" in text for text in found.warnings)
