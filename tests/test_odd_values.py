"""Any value of any field, from Python: it is taken, or one short line names the field.

Which of the two is the business of the other tests; here every field of every form that a user
fills in meets what other libraries, config files and mistakes put there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wan_core import (
    GenerationConfig,
    OptimizationConfig,
    WanControl,
    WanLoRA,
    WanModelFiles,
    WanPipelineLoader,
)
from wan_core.config import demo_model
from wan_core.detect import with_loras
from wan_core.errors import WanError
from wan_core.preferences import FIELDS, Preferences

SMALL: dict[str, Any] = {"prompt": "a", "num_frames": 5, "width": 32, "height": 32}


class Silent:
    """An object of another library that cannot even say what it is."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


ODD: tuple[Any, ...] = (
    "false", "a\0b", "\ud800", "a\nb\n" * 50, "x" * 5000, -1, 1e308, float("nan"), 10**5000,
    np.array(4), np.array([1, 2]), torch.tensor(0.5), torch.empty(0), torch.empty(1, device="meta"),
    Decimal("sNaN"), b"4", {"a": 1}, [None], Silent(), memoryview(b"4"),
)  # fmt: skip
"""With NaN and infinity come numbers that overflow, and arrays that are not one number."""


@dataclass(frozen=True)
class Form:
    """Something with fields that a user fills in, and what looks at it."""

    name: str
    fields: tuple[str, ...]
    look: Callable[[str, Any], object]
    elsewhere: tuple[str, ...] = ()
    """Fields whose error may name another: a path that is not there is named itself."""


def names_of(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def forms() -> list[Form]:
    loader = WanPipelineLoader(preferences=Preferences())
    wrapper = loader.load_wan_pipeline(demo_model("vace"))
    picture = loader.load_wan_pipeline(demo_model("i2v"))
    video = torch.rand(5, 32, 32, 3)

    def job(name: str, value: Any) -> object:
        model = picture if name == "image" else wrapper
        return model.plan(GenerationConfig(**{**SMALL, name: value}))

    def control(name: str, value: Any) -> object:
        given: dict[str, Any] = {"video": video}
        if name == "positions":
            given = {"keyframes": video[:2]}
        guided = WanControl(**{**given, name: value})
        return wrapper.plan(GenerationConfig(**SMALL, control=guided))

    def plan(name: str, value: Any) -> object:
        OptimizationConfig.from_mapping({name: value})  # most are refused here, and that is quick
        asked = loader.load_wan_pipeline(demo_model(), optimization_config={name: value})
        return asked.plan(GenerationConfig(**SMALL))

    def loading(name: str, value: Any) -> object:
        opening: dict[str, Any] = {"model_path": demo_model(), name: value}
        return loader.load_wan_pipeline(**opening)

    def files(name: str, value: Any) -> object:
        named: Any = demo_model("fun")
        return loader.load_wan_pipeline(replace(named, **{name: value}))

    def lora(name: str, value: Any) -> object:
        return with_loras(picture.architecture, [replace(WanLoRA("none"), **{name: value})])

    parts, adapter = names_of(WanModelFiles), names_of(WanLoRA)
    switches = ("trust_remote_code", "apply_optimizations", "use_recipe", "optimization_config")
    of_a_loader = ("optimization_config_path", "preferences", "enable_caching")
    return [
        Form("GenerationConfig", names_of(GenerationConfig), job),
        Form("WanControl", names_of(WanControl), control),
        Form("OptimizationConfig", names_of(OptimizationConfig), plan),
        Form("Preferences", FIELDS, lambda name, value: Preferences(**{name: value})),
        Form("Loader", of_a_loader, lambda name, value: WanPipelineLoader(**{name: value})),
        Form("load", (*switches, "model_path", "loras"), loading, ("model_path", "loras")),
        Form("WanModelFiles", parts, files, parts),
        Form("WanLoRA", adapter, lora, adapter),
    ]


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.name)
def test_an_odd_value_is_taken_or_named(form: Form, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in form.fields:
        for value in ODD:
            try:
                form.look(name, value)
            except WanError as err:
                said = str(err)
                assert name in said or name in form.elsewhere, (name, said)
                # A path may be shown whole: 5,000 characters are the longest here.
                assert "\n" not in said and len(said) < 6000, (name, said)
    assert not list(tmp_path.iterdir()), "a look makes no files"
