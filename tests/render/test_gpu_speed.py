"""On a CUDA device: a render computes what its speed has promised, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import make_folder, open_wan

from wan_core import GenerationConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


@pytest.mark.parametrize(("speed", "chosen"), [("exact", False), ("fast", True), ("fastest", True)])
def test_attention_is_chosen_by_the_clock_where_rounding_may_differ(
    tmp_path: Path, speed: str, chosen: bool
) -> None:
    """Of weights that were loaded as always, whose processors name a backend."""
    model = open_wan(
        make_folder(tmp_path / "model", "wan2.1-t2v"), device="cuda", precision="bf16", speed=speed
    )
    job = GenerationConfig(
        prompt="a red cat", num_frames=17, width=64, height=64, num_inference_steps=2, seed=7
    )
    result = model.generate(job).raise_for_error()
    notes = [stage.note for stage in result.stages if stage.name.startswith("denoise")]
    assert notes and all(("attention: " in note) == chosen for note in notes)
