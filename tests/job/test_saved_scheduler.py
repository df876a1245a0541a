"""Settings of a scheduler come from a file: those its class does not take are named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_folder, make_scheduler

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.errors import CorruptFile
from wan_core.job import make_scheduler as ours

SAVED = {name: value for name, value in make_scheduler().config.items() if name[0] != "_"}
SAVED["_class_name"] = "UniPCMultistepScheduler"
BAD: dict[str, Any] = {
    "num_train_timesteps": (0, "1000", 1000.5, 999, True, []),
    "disable_corrector": ("x", 1, {}),
    "solver_type": ("zz", 3),
    "solver_order": ("2", 2.5, True),
    "use_flow_sigmas": ("yes", 1),
    "lower_order_final": (0,),
    "beta_schedule": (3,),
    "thresholding": ("no",),
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=str
)
def test_a_setting_of_another_kind_is_named(name: str, value: Any) -> None:
    saved = SAVED | {name: value}
    with pytest.raises(CorruptFile, match="scheduler_config.json cannot be used"):
        ours("unipc", 3.0, saved)


@pytest.mark.parametrize(
    "more",
    [
        {}, {"flow_shift": None}, {"use_dynamic_shifting": True}, {"unknown": 1},
        {"_diffusers_version": "0.35.0"}, {"num_train_timesteps": 1000}, {"solver_order": 2},
        {"disable_corrector": [1]}, {"trained_betas": None}, {"sample_max_value": 1},
    ],
)  # fmt: skip
def test_what_the_class_takes_is_taken(more: dict[str, Any]) -> None:
    scheduler = ours("unipc", 5.0, SAVED | more)
    scheduler.set_timesteps(4)
    plain = ours("unipc", 5.0, SAVED)
    plain.set_timesteps(4)
    assert torch.equal(scheduler.sigmas, plain.sigmas)
    assert scheduler.config.flow_shift == 5.0


def test_another_scheduler_s_file_is_not_asked(tmp_path: Path) -> None:
    for name in ("euler", "dpm++2m"):
        assert (
            ours(name, 3.0, SAVED | {"num_train_timesteps": 0}).config.num_train_timesteps == 1000
        )


def test_it_is_told_before_a_step(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "wan2.1-t2v")
    saved = json.dumps(SAVED | {"num_train_timesteps": "1000"}, default=str)
    (folder / "scheduler" / "scheduler_config.json").write_text(saved)
    wan = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        folder, optimization_config={"device": "cpu"}
    )
    read: list[str] = []
    result = wan.generate(
        GenerationConfig(
            prompt="a cat", num_frames=5, width=16, height=16,
            load_callback=lambda name, done, all_bytes: read.append(name),
        )
    )  # fmt: skip
    assert isinstance(result.error, CorruptFile) and read == []
