"""Animate 2's two streams in estimates: a dry run of true shape, for each way to keep one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.true_models import dry_transformer

from wan_core.forward import DrivingStream, animate2, lean_forward, run_together
from wan_core.memory import DRIVING_WAYS, driven_peak
from wan_core.models import VARIANTS

SHAPE = replace(VARIANTS["wan-animate-2-14b"].transformer, layers=3)
SIZES = {"480p": (22, 60, 104), "720p": (22, 90, 160)}


class Sent:
    """Stands for the inputs in RAM of a CUDA device: one arrives while the one before is used."""

    def __init__(self, pin_bytes: int) -> None:
        self.shape: tuple[int, ...] = ()
        self.coming: torch.Tensor | None = None

    def put(self, index: int, hidden: torch.Tensor) -> None:
        self.shape = hidden.shape

    def take(self, index: int, count: int, device: torch.device) -> torch.Tensor:
        empty = lambda: torch.empty(self.shape, dtype=torch.bfloat16)  # noqa: E731
        here = empty() if self.coming is None else self.coming
        self.coming = empty() if index + 1 < count else None
        return here

    def close(self) -> None:
        self.coming = None


def call(frames: int, height: int, width: int) -> dict[str, Any]:
    kind = torch.bfloat16
    return {
        "hidden_states": torch.empty(1, 36, frames, height, width, dtype=kind),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=kind),
        "encoder_hidden_states_image": torch.empty(1, 257, 1280, dtype=kind),
        "return_dict": False,
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", DRIVING_WAYS)
@pytest.mark.parametrize(
    ("size", "passes", "exact"),
    [
        ("480p", 1, True),
        ("720p", 1, True),
        ("480p", 2, True),
        ("720p", 1, False),
    ],
)
def test_a_segment_agrees_with_the_dry_run(
    way: str, size: str, passes: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, height, width = SIZES[size]
    monkeypatch.setattr(animate2, "_Host", Sent)

    def run(model: torch.nn.Module) -> object:
        first = call(frames, height, width)
        given = call(frames - 1, height, width)
        stream = DrivingStream(
            latents=given["hidden_states"], text=given["encoder_hidden_states"],
            image=given["encoder_hidden_states_image"], keep=way,
        )  # fmt: skip
        stray = given.pop("timestep")  # counted with the driving stream's inputs
        calls = [{**first, "driving": stream}]
        if passes == 2:
            text = torch.empty(1, 512, 4096, dtype=torch.bfloat16)
            calls.append({**calls[0], "encoder_hidden_states": text, "unconditional": True})
        with lean_forward(model, exact=exact):
            for _ in range(2):
                run_together(model, calls) if passes == 2 else model(**calls[0])
        return stray

    live = dry_transformer(SHAPE, "bf16").peak(run)
    found = driven_peak(
        SHAPE, way=way, batch=1, latent_frames=frames, latent_height=height, latent_width=width,
        size=2, exact=exact, passes=passes,
    )  # fmt: skip
    assert found == pytest.approx(live, rel=0.01), (found / 2**20, live / 2**20)
