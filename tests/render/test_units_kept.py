"""A render that is killed within a step repeats the pass that was in work, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import slow_but
from support.crashes import Crash
from support.tiny_models import open_kept

from wan_core import GenerationConfig
from wan_core.journal import Journal, resume
from wan_core.journal import units as units_module
from wan_core.sampling.units import HerePasses

pytestmark = pytest.mark.usefixtures("nothing_is_left")
JOB = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 33, "seed": 1,
       "num_inference_steps": 4, "max_chunk_size": 17, "window_overlap": 8,
       "return_frames": False, "resume": "auto"}  # fmt: skip
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("wan2.2-t2v-a14b", {}, {}),
    ("wan2.1-t2v", {"step_cache": "magcache", "step_cache_factor": 2.0},
     {"num_inference_steps": 12, "num_frames": 25}),
    ("wan2.1-t2v", {"step_cache": "easycache", "step_cache_threshold": 0.3},
     {"num_inference_steps": 12, "num_frames": 25}),
    ("wan2.1-i2v", {"offload": "stream"}, {"window_mode": "continuation"}),
    ("wan2.2-ti2v-5b", {}, {"num_frames": 17, "max_chunk_size": None}),
]  # fmt: skip


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The passes that models have begun; ``passes.clear()`` counts anew."""
    computed: list[int] = []
    compute = HerePasses._compute

    def counted(self: HerePasses, *rest: Any) -> None:
        began = self.model.patch_embedding.register_forward_pre_hook(lambda *_: computed.append(1))
        with began:
            compute(self, *rest)

    monkeypatch.setattr(HerePasses, "_compute", counted)
    return computed


@pytest.mark.parametrize(
    ("family", "wishes", "more", "states"),
    slow_but(
        [(*CASES[0], False), (*CASES[1], True)].__contains__,
        [(*case, states) for case in CASES for states in (False, True)],
    ),
)
def test_killed_anywhere_it_repeats_one_pass(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int],
    family: str, wishes: dict[str, Any], more: dict[str, Any], states: bool,
) -> None:  # fmt: skip
    """Also where no state was saved since the beginning: the steps are then gone through again."""
    monkeypatch.setattr(resume, "MAX_SHARE", float("inf"))
    monkeypatch.setattr(Journal, "due", lambda *_: states)
    monkeypatch.setattr(units_module, "_LIMIT", 1000)  # a state would make room in them
    job = JOB | more | {"output_path": tmp_path / "o.mp4"}
    if "i2v" in family and "ti2v" not in family:
        from PIL import Image

        job["image"] = Image.effect_noise((32, 32), 60).convert("RGB")
    path = folder(family)
    plain = job | {"resume": None}
    whole = open_kept(path, **wishes).generate(GenerationConfig(**plain)).raise_for_error()
    units = len(passes)
    together = wishes.get("offload") == "stream"  # both passes of a window at once
    for stop in (1, units // 2 + 1, units - 2):
        journal, killed = tmp_path / "journal", tmp_path / f"killed {stop}"
        seen = 0
        passes.clear()

        def check(stop: int = stop, journal: Path = journal, killed: Path = killed) -> None:
            nonlocal seen
            if len(passes) >= stop and not seen:
                seen = len(passes)
                shutil.copytree(journal, killed)  # as SIGKILL leaves it
                raise Crash

        asked = job | {"journal_folder": journal, "interrupt_check": check}
        with pytest.raises(Crash):
            open_kept(path, **wishes).generate(GenerationConfig(**asked))
        passes.clear()
        must = {"resume": "must" if stop > 1 else "auto"}  # nothing is kept of the first yet
        asked = job | {"journal_folder": killed} | must
        rest = open_kept(path, **wishes).generate(GenerationConfig(**asked)).raise_for_error()
        assert torch.equal(rest.latents, whole.latents)
        assert units <= seen + len(passes) <= units + (2 if together else 1), (stop, seen)
        assert ("resumed" in rest.metadata) == (stop > 1) and not any(
            "anew" in text for text in rest.warnings
        )
        assert not killed.exists()  # a finished render leaves no journal
        shutil.rmtree(journal, ignore_errors=True)
