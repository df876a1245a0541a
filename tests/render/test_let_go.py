"""A render that ends early lets go of its weights at once, not when rubbish is next collected."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from support.crashes import Crash
from support.tiny_models import open_wan

from wan_core import GenerationConfig
from wan_core.render.render import Render


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def stopped(kind: type[BaseException] | None) -> Callable[..., None]:
    def ended(step: int, total: int, latents: torch.Tensor) -> None:
        if kind is not None and step == 2:
            raise kind

    return ended


def fail(*_: Any) -> None:
    raise ValueError


@pytest.mark.parametrize(
    "way",
    [{}, {"offload": "stream"}, pytest.param({"offload": "sequential"}, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", [None, Crash, ValueError, "own"])
def test_no_weights_stay(
    kind: Any, way: dict[str, Any], folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch, uncollected: None,
) -> None:  # fmt: skip
    """``own`` is an error of the computation, with a cause; the result that is kept holds them."""
    seen: list[weakref.ref[torch.nn.Module]] = []
    plain = WanTransformer3DModel.forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        seen.append(weakref.ref(self))
        if kind == "own" and len(seen) == 2:
            try:
                fail(self)
            except ValueError as err:
                raise RuntimeError("the computation failed") from err
        return plain(self, *args, **more)

    monkeypatch.setattr(WanTransformer3DModel, "forward", forward)
    callback = stopped(None if kind == "own" else kind)
    config = GenerationConfig(
        prompt="a", num_frames=5, width=32, height=32, num_inference_steps=3,
        progress_callback=callback,
    )  # fmt: skip
    wrapper, result = open_wan(folder("wan2.2-t2v-a14b"), forward="diffusers", **way), None
    with contextlib.suppress(Crash, ValueError):
        result = wrapper.generate(config)
    assert len(seen) > 1 and all(one() is None for one in seen)
    if kind == "own":
        assert result is not None and "the computation failed" in str(result.error)


@pytest.mark.parametrize("late", [False, True])
def test_no_latents_stay(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, uncollected: None, late: bool
) -> None:
    """Neither of a failed result that is dropped, nor where the last warning's callback raises."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def decode(self: Render, latents: torch.Tensor) -> None:
        seen.append(weakref.ref(self.stages.result.latents))
        self.stages.result.warnings.append("late")
        if not late:
            raise ValueError

    def warned(text: str) -> None:
        if late and text == "late":
            raise ValueError

    monkeypatch.setattr(Render, "_decode", decode)
    job = {"prompt": "a", "num_frames": 5, "width": 32, "height": 32, "num_inference_steps": 1}
    result, given = None, torch.zeros(1, 16, 2, 4, 4)
    seen.append(weakref.ref(given))
    config = GenerationConfig(**job, warning_callback=warned, latents=given)
    with contextlib.suppress(ValueError):
        result = open_wan(folder("wan2.1-t2v")).generate(config)
    assert len(seen) == 2 and late == (result is None)
    del result, given, config
    assert all(one() is None for one in seen)
