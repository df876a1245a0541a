"""The journal of a clip that is denoised as a whole: exact, cheap, and there when it is needed."""

from __future__ import annotations

import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.cases import slow_but
from support.crashes import Crash
from support.tiny_models import make_folder, open_kept, open_wan

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.config import WanControl
from wan_core.errors import JournalMismatch, OutputError
from wan_core.journal import RenderJournal, disk, journal, resume
from wan_core.plan import Planner
from wan_core.preferences import Preferences
from wan_core.render import render
from wan_core.render.pipeline import WanPipelineWrapper

pytestmark = pytest.mark.usefixtures("nothing_is_left")
JOB = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 9, "seed": 1,
       "num_inference_steps": 12}  # fmt: skip
EASY = {"step_cache": "easycache", "step_cache_threshold": 0.3}
MAG = {"step_cache": "magcache", "step_cache_factor": 2.0}
GATE = {"guidance_gate": 0.5}


def crash_at(wanted: int) -> Any:
    def callback(done: int, *_: Any) -> None:
        if done == wanted:
            raise Crash

    return callback


def cut_off(path: Path, config: dict[str, Any], step: int, **wishes: Any) -> None:
    with pytest.raises(Crash):
        open_kept(path, **wishes).generate(
            GenerationConfig(**config, progress_callback=crash_at(step))
        )


def pictures(count: int) -> torch.Tensor:
    return torch.rand((count, 32, 32, 3), generator=torch.Generator().manual_seed(3))


def given(kind: str) -> tuple[str, dict[str, Any]]:
    """Return the family and what the job is given besides its text."""
    family = kind.removesuffix(" from a video").removesuffix(" from a picture")
    more: dict[str, Any] = {}
    if "vace" in kind:
        more["control"] = WanControl(video=pictures(9), reference=pictures(1))
    elif kind.endswith("video"):
        more["control"] = WanControl(video=pictures(9), denoise=0.9)
    elif "i2v" in kind or kind.endswith("picture"):
        more["image"] = pictures(1)[0]
    return family, more


KINDS = (
    "wan2.1-t2v", "wan2.1-i2v", "wan2.1-vace", "wan2.2-t2v-a14b", "wan2.2-i2v-a14b",
    "wan2.1-t2v from a video", "wan2.2-ti2v-5b from a picture",
)  # fmt: skip
SOLVERS = ("unipc", "euler", "dpm++2m", "lcm", "res_multistep")
SHORTCUTS = ({}, EASY, MAG | GATE, GATE)


CASES = [
    (kind, solver, SHORTCUTS[(i + j) % len(SHORTCUTS)])
    for i, kind in enumerate(KINDS)
    for j, solver in enumerate(SOLVERS)
]
"""Every kind with every solver, the shortcuts in turn."""
QUICK = (
    ("wan2.1-vace", "dpm++2m"), ("wan2.2-i2v-a14b", "res_multistep"),
    ("wan2.1-t2v from a video", "unipc"), ("wan2.2-ti2v-5b from a picture", "lcm"),
)  # fmt: skip
"""Those of which no other test has the like."""


@pytest.mark.parametrize(
    ("kind", "scheduler", "wishes"),
    slow_but(lambda case: (case[0], case[1]) in QUICK, CASES),
)
def test_every_kind_of_clip_goes_on_with_the_same_bits(
    folder: Any, tmp_path: Path, kind: str, scheduler: str, wishes: dict[str, Any]
) -> None:
    """Where one expert follows the other, from before the change and from after it."""
    family, more = given(kind)
    path, job = folder(family), JOB | more | {"scheduler": scheduler}
    if ("vace" in kind or kind.endswith("video")) and MAG.items() <= wishes.items():
        # MagCache is refused: hints are added between the blocks, or a part of the steps is made.
        wishes = EASY | GATE
    whole = open_kept(path, **wishes).generate(GenerationConfig(**job)).raise_for_error()
    kept = job | {"resume": "auto", "journal_folder": tmp_path / "j"}
    first = int(re.findall(r"\d+", whole.metadata["steps"])[0])
    for stop in (3, 9):
        cut_off(path, kept, stop, **wishes)
        rest = open_kept(path, **wishes).generate(GenerationConfig(**kept)).raise_for_error()
        assert rest.metadata["resumed"] == f"after step {first - 1 + stop} of 12"
        assert torch.equal(rest.latents, whole.latents)
        assert torch.equal(rest.frames, whole.frames)
        assert not (tmp_path / "j").exists()


def test_saving_stays_within_its_share_and_an_interrupt_loses_no_step(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a save takes as long as many steps, not all are saved; the last is when it ends."""
    write = journal.write_state

    def slowly(*arguments: Any) -> int:
        time.sleep(0.05)
        return write(*arguments)

    monkeypatch.setattr(journal, "write_state", slowly)
    monkeypatch.setattr(resume, "MAX_SHARE", 1e-3)  # steps of a busy machine are long, too
    monkeypatch.setattr(journal, "USUAL_BYTES_PER_SECOND", 1e12)  # and those of an idle one short
    path = folder("wan2.2-t2v-a14b")
    job = JOB | {"num_inference_steps": 20, "switch_step": 10, "journal_folder": tmp_path / "j",
                 "guidance_scale": 1.0, "guidance_scale_2": 1.0}  # fmt: skip
    done = open_kept(path).generate(GenerationConfig(**job, resume="auto")).raise_for_error()
    # The first step, the last one of the first expert, and the finished latents.
    assert done.metadata["journal"].startswith("3 states of ")
    cut_off(path, job | {"resume": "auto"}, 17)
    rest = open_kept(path).generate(GenerationConfig(**job, resume="must")).raise_for_error()
    assert rest.metadata["resumed"] == "after step 17 of 20"
    assert torch.equal(rest.latents, done.latents)


@pytest.mark.parametrize(("write", "step"), [(1, 2), (2, 3)])
def test_an_interrupt_while_something_is_saved_loses_no_step(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int, step: int
) -> None:
    """Neither of the last state of the first expert, nor of the finished latents."""
    monkeypatch.setattr(resume, "MAX_SHARE", 0.0)
    path, save, writes = folder("wan2.2-t2v-a14b"), journal.write_state, []

    def interrupted(*arguments: Any) -> int:
        writes.append(arguments)
        if len(writes) == write:
            raise KeyboardInterrupt
        return save(*arguments)

    job = JOB | {"num_inference_steps": 3, "switch_step": 2}
    whole = open_kept(path).generate(GenerationConfig(**job)).raise_for_error()
    job |= {"resume": "auto", "journal_folder": tmp_path / "j"}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(journal, "write_state", interrupted)
        open_kept(path).generate(GenerationConfig(**job))
    rest = open_kept(path).generate(GenerationConfig(**job)).raise_for_error()
    assert rest.metadata["resumed"] == f"after step {step} of 3"
    assert torch.equal(rest.latents, whole.latents)


def test_a_kill_finds_the_first_expert_and_a_whole_segment_saved(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "MAX_SHARE", 0.0)
    monkeypatch.setattr(RenderJournal, "save_rest", lambda self: None)  # nothing runs after a kill
    kept = JOB | {"resume": "auto", "journal_folder": tmp_path / "j", "num_inference_steps": 6}
    path, cached = folder("wan2.2-t2v-a14b"), EASY | GATE
    job = kept | {"switch_step": 12, "num_inference_steps": 24}
    whole = open_kept(path, **cached).generate(GenerationConfig(**job)).raise_for_error()
    cut_off(path, job, 20, **cached)
    (state,) = (tmp_path / "j").glob("*/a.safetensors")
    with safe_open(state, "pt") as saved:
        assert not any("memory" in name for name in saved.keys())  # noqa: SIM118
    rest = open_kept(path, **cached).generate(GenerationConfig(**job)).raise_for_error()
    assert rest.metadata["resumed"] == "after step 12 of 24"
    assert torch.equal(rest.latents, whole.latents)
    assert rest.metadata["forwards"] == whole.metadata["forwards"]
    job = kept | {"image": pictures(1)[0], "window_mode": "continuation", "num_frames": 33,
                  "max_chunk_size": 17, "window_overlap": 8}  # fmt: skip
    cut_off(folder("wan2.1-i2v"), job, 9)
    rest = open_kept(folder("wan2.1-i2v")).generate(GenerationConfig(**job))
    assert rest.raise_for_error().metadata["resumed"] == "segment 1 of 3, after step 6 of 6"


def test_a_decode_without_memory_loses_no_step(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is told as an error, or the user ends it between the last step and the decode."""
    path, short = folder("wan2.1-t2v"), JOB | {"num_inference_steps": 2}
    job = short | {"resume": "auto", "journal_folder": tmp_path / "j"}
    monkeypatch.setattr(RenderJournal, "save_rest", lambda self: None)
    monkeypatch.setattr(Planner, "smaller_plan", lambda *_: None)
    whole = open_kept(path).generate(GenerationConfig(**short)).raise_for_error()

    def full(*_: Any) -> None:
        raise MemoryError("the decode does not fit")

    def ended(*_: Any) -> None:
        raise Crash

    for fault in (full, ended):
        with monkeypatch.context() as patched:
            patched.setattr("wan_core.render.render.Render._decode_rest", fault)
            config = GenerationConfig(**job)
            if fault is full:
                assert not open_wan(path).generate(config).success
            else:
                with pytest.raises(Crash):
                    open_wan(path).generate(config)
        rest = open_kept(path).generate(GenerationConfig(**job | {"resume": "must"}))
        assert "only decoded" in rest.raise_for_error().metadata["resumed"]
        assert not any("denoise" in stage.name for stage in rest.stages)
        assert torch.equal(rest.frames, whole.frames)


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for a machine with less memory free: its plan cuts products by rows."""

    def patch() -> None:
        plan = WanPipelineWrapper._plan

        def smaller(self: Any, *arguments: Any) -> Any:
            return plan(self, *arguments).with_choices(lean=True, by_rows=True)

        monkeypatch.setattr(WanPipelineWrapper, "_plan", smaller)

    yield patch
    monkeypatch.undo()


def test_a_plan_for_another_memory_throws_no_step_away(
    folder: Any, tmp_path: Path, by_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on as it began, and says so; but not where another forward is asked for by name."""
    path, short = folder("wan2.1-t2v"), JOB | {"num_inference_steps": 4}
    kept = short | {"resume": "auto", "journal_folder": tmp_path / "j"}
    by_rows()
    whole = open_kept(path).generate(GenerationConfig(**short)).raise_for_error()
    cut_off(path, kept, 3)
    monkeypatch.undo()
    refused = open_kept(path, forward="diffusers").generate(
        GenerationConfig(**kept | {"resume": "must"})
    )
    assert isinstance(refused.error, JournalMismatch) and "forward" in refused.errors[0]
    rest = open_kept(path).generate(GenerationConfig(**kept)).raise_for_error()
    assert rest.metadata["resumed"] == "after step 3 of 4"
    assert torch.equal(rest.latents, whole.latents) and torch.equal(rest.frames, whole.frames)
    assert "products by rows" in rest.applied_optimizations
    told = (
        'was made by another plan; this one keeps to it: forward (saved "lean_rows", now "exact")'
    )
    assert any(told in text for text in rest.warnings)
    assert not (tmp_path / "j").exists()


def test_a_forward_for_the_decode_alone_may_be_asked_for(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cure for a decode that does not fit does not cost the steps; before, it would."""
    path, short = folder("wan2.1-t2v"), JOB | {"num_inference_steps": 2}
    kept = short | {"resume": "auto", "journal_folder": tmp_path / "j"}
    whole = open_kept(path).generate(GenerationConfig(**short)).raise_for_error()
    cut_off(path, kept, 1)
    rows = {"forward": "lean_rows"}
    anew = open_kept(path, **rows).generate(GenerationConfig(**kept | {"resume": "must"}))
    assert isinstance(anew.error, JournalMismatch) and "forward" in anew.errors[0]

    def ended(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr("wan_core.render.render.Render._decode_rest", ended)
        open_kept(path).generate(GenerationConfig(**kept))
    rest = open_kept(path, **rows).generate(GenerationConfig(**kept | {"resume": "must"}))
    assert "only decoded" in rest.raise_for_error().metadata["resumed"]
    assert "products by rows" in rest.applied_optimizations
    assert torch.equal(rest.latents, whole.latents)
    assert any("were made by another plan" in text for text in rest.warnings)


def test_a_full_disk_is_said_once_and_the_clip_is_made(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OutputError("Cannot write: no space left on device.")

    monkeypatch.setattr(journal, "write_state", full)
    told: list[str] = []
    result = open_kept(folder("wan2.1-t2v")).generate(
        GenerationConfig(
            **JOB, resume="auto", journal_folder=tmp_path / "j", warning_callback=told.append
        )
    )
    result.raise_for_error()
    assert [text for text in told if "no space" in text] == [
        text for text in result.warnings if "not saved any more" in text
    ]
    assert sum("no space" in text for text in told) == 1
    assert not (tmp_path / "j").exists()


def test_a_preference_asks_for_a_journal_where_a_job_does_not(folder: Any, tmp_path: Path) -> None:
    """Python's jobs keep none unless they or the user ask for one; a job that asks has it."""

    def opened(journals: bool | None) -> Any:
        loader = WanPipelineLoader(preferences=Preferences(journal=journals))
        wishes = {"device": "cpu", "precision": "fp32"}
        return loader.load_wan_pipeline(folder("wan2.1-t2v"), optimization_config=wishes)

    def after_a_cut(journals: bool | None, **more: Any) -> bool:
        with pytest.raises(Crash):
            opened(journals).generate(
                GenerationConfig(**JOB, **more, progress_callback=crash_at(1))
            )
        return any(path.is_dir() for path in tmp_path.rglob("*") if len(path.name) == 32)

    output = {"output_path": tmp_path / "o.mp4"}
    refused = opened(True).generate(GenerationConfig(**JOB, **output, resume="must"))
    assert isinstance(refused.error, JournalMismatch)
    assert not after_a_cut(None, **output) and not after_a_cut(False, **output)
    assert not after_a_cut(True)  # there is no place for one
    assert after_a_cut(True, **output)
    assert after_a_cut(False, journal_folder=tmp_path / "j", resume="auto")


def test_nothing_is_saved_twice(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at an interrupt after a step that is saved, nor in a decode that fails."""
    write, saves = journal.write_state, []

    def noted(path: Path, *arguments: Any) -> int:
        saves.append(path.name)
        return write(path, *arguments)

    def ended(*_: Any) -> None:
        raise Crash

    monkeypatch.setattr(journal, "write_state", noted)
    monkeypatch.setattr(resume, "MAX_SHARE", math.inf)
    monkeypatch.setattr("wan_core.render.render.Render._decode_rest", ended)
    job = JOB | {"num_inference_steps": 3, "resume": "auto", "journal_folder": tmp_path / "j"}
    cut_off(folder("wan2.1-t2v"), job, 2)
    assert saves == ["a.safetensors", "b.safetensors"]
    monkeypatch.setattr(resume, "MAX_SHARE", 0.0)  # the last step is in the finished latents
    with pytest.raises(Crash):
        open_kept(folder("wan2.1-t2v")).generate(GenerationConfig(**job))
    assert saves[2:] == ["latents.safetensors"]


@pytest.mark.parametrize("what", ["MemoryError", "the CPU's allocator"])
def test_no_ram_for_a_save_takes_no_choice_from_the_render(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It is the journal that does without, and not the model that goes on with less."""
    job = JOB | {"num_inference_steps": 2}
    whole = open_kept(folder("wan2.1-t2v")).generate(GenerationConfig(**job)).raise_for_error()

    def full(_: Any) -> Any:
        if what == "MemoryError":
            raise MemoryError("full")
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(disk, "in_ram", full)
    result = open_kept(folder("wan2.1-t2v")).generate(
        GenerationConfig(**job, resume="auto", journal_folder=tmp_path / "j")
    )
    result.raise_for_error()
    assert result.applied_optimizations == whole.applied_optimizations
    assert torch.equal(result.latents, whole.latents)
    assert sum("not saved any more" in text for text in result.warnings) == 1


def test_a_state_for_other_sigmas_is_not_gone_on_with_and_ends_no_render(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update that makes them otherwise under the same number of its version."""
    path = folder("wan2.1-t2v")
    kept = JOB | {"num_inference_steps": 4, "resume": "auto", "journal_folder": tmp_path / "j"}
    cut_off(path, kept, 2)
    make = render.make_solver

    def otherwise(*arguments: Any) -> Any:
        scheduler = make(*arguments)
        scheduler.sigmas = scheduler.sigmas * 0.875
        return scheduler

    monkeypatch.setattr(render, "make_solver", otherwise)
    refused = open_kept(path).generate(GenerationConfig(**kept | {"resume": "must"}))
    assert isinstance(refused.error, JournalMismatch)
    plain = {name: value for name, value in kept.items() if name in JOB}
    whole = open_kept(path).generate(GenerationConfig(**plain)).raise_for_error()
    cut_off(path, kept, 1)  # over the older state, which had come further
    rest = open_kept(path).generate(GenerationConfig(**kept)).raise_for_error()
    assert rest.metadata["resumed"] == "after step 1 of 4"
    assert torch.equal(rest.latents, whole.latents)
    cut_off(path, kept, 3)
    monkeypatch.undo()
    anew = open_kept(path).generate(GenerationConfig(**kept)).raise_for_error()
    assert "resumed" not in anew.metadata and not (tmp_path / "j").exists()
    assert any("is not gone on with, this one starts anew" in text for text in anew.warnings)


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_an_end_between_the_last_segment_and_its_saving_blends_nothing_twice(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: float
) -> None:
    """What is saved then is the last step, with the clip as it was before the segment was put in.

    Only a state that was not due is saved so late: here none is but the last of a segment.
    """
    monkeypatch.setattr(resume, "MAX_SHARE", 0.0)
    path = folder("wan2.1-i2v")
    job = JOB | {"image": pictures(1)[0], "window_mode": "continuation", "num_frames": 33,
                 "max_chunk_size": 17, "window_overlap": 8, "num_inference_steps": 3,
                 "drift_correction": drift}  # fmt: skip
    whole = open_kept(path).generate(GenerationConfig(**job)).raise_for_error()
    kept = job | {"resume": "auto", "journal_folder": tmp_path / "j"}

    def ended(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(render, "denormalize_latents", ended)
        open_kept(path).generate(GenerationConfig(**kept))
    rest = open_kept(path).generate(GenerationConfig(**kept | {"resume": "must"}))
    assert rest.raise_for_error().metadata["resumed"] == "segment 3 of 3, after step 3 of 3"
    assert torch.equal(rest.latents, whole.latents)


def test_another_vae_costs_no_step_where_it_had_no_part_in_them(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what a user tries where the decode fails.

    The one before has encoded a picture; of VACE without a control, a grey clip.
    """
    vae = make_folder(tmp_path / "other", "wan2.1-t2v", seed=9) / "vae"
    for kind in ("wan2.1-t2v", "wan2.1-i2v", "wan2.1-vace"):
        family, more = given(kind)
        more.pop("control", None)
        path = tmp_path / kind
        shutil.copytree(folder(family), path)
        kept = JOB | more | {"num_inference_steps": 2, "resume": "auto"}
        kept |= {"journal_folder": tmp_path / "j"}
        with monkeypatch.context() as patched, pytest.raises(Crash):
            patched.setattr("wan_core.render.render.Render._decode", lambda *_: crash_at(0)(0))
            open_wan(path).generate(GenerationConfig(**kept))
        shutil.copytree(vae, path / "vae", dirs_exist_ok=True)
        rest = open_wan(path).generate(GenerationConfig(**kept)).raise_for_error()
        assert ("resumed" in rest.metadata) == (kind == "wan2.1-t2v")
        plain = {name: value for name, value in kept.items() if name in JOB or name in more}
        whole = open_wan(path).generate(GenerationConfig(**plain)).raise_for_error()
        assert torch.equal(rest.frames, whole.frames)
