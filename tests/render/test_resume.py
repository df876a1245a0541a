"""A render that was cut off goes on where it stopped, and gives the bits of one that was not."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.cases import in_turn, slow_but
from support.clips import picture, read
from support.crashes import Crash
from support.failures import failing
from support.tiny_models import make_folder, open_kept, open_wan

from wan_core import GenerationConfig
from wan_core.errors import InvalidRequest, JournalMismatch, OutputError
from wan_core.job import SCHEDULERS
from wan_core.plan import Planner

pytestmark = pytest.mark.usefixtures("nothing_is_left")
ROOT = Path(__file__).parents[2]
JOB = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 33, "seed": 1,
       "num_inference_steps": 5, "max_chunk_size": 17, "window_overlap": 8}  # fmt: skip
SHORT = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 5, "seed": 1,
         "num_inference_steps": 4}  # fmt: skip


def crash_after(count: int) -> Any:
    left = count

    def callback(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Crash

    return callback


def noting(steps: list[int]) -> Any:
    return lambda step, total, latents: steps.append(step)


@pytest.mark.parametrize(
    ("family", "scheduler"),
    in_turn(("wan2.2-t2v-a14b", "wan2.2-i2v-a14b"), ("unipc", "euler", "dpm++2m")),
)
def test_going_on_after_any_step_gives_the_same_bits(
    folder: Any, tmp_path: Path, family: str, scheduler: str
) -> None:
    job = JOB | {"scheduler": scheduler}
    if family == "wan2.2-i2v-a14b":
        job["image"] = picture()
    whole = open_kept(folder(family)).generate(GenerationConfig(**job)).raise_for_error()
    kept = {"resume": "auto", "journal_folder": tmp_path / "j"}
    for stop in (1, 3, 5):
        with pytest.raises(Crash):
            open_kept(folder(family)).generate(
                GenerationConfig(**job, **kept, progress_callback=crash_after(stop))
            )
        steps: list[int] = []
        rest = open_kept(folder(family)).generate(
            GenerationConfig(**job, **kept, progress_callback=noting(steps))
        )
        rest.raise_for_error()
        assert torch.equal(rest.latents, whole.latents)
        assert torch.equal(rest.frames, whole.frames)
        assert steps == list(range(stop + 1, 6))  # no finished step was made again
        assert f"after step {stop}" in rest.metadata["resumed"]
        assert not (tmp_path / "j").exists()  # a finished render leaves no journal


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    slow_but(
        {("unipc", "simple"), ("lcm", "simple"), ("res_multistep", "official")}.__contains__,
        [
            *((name, "simple") for name in SCHEDULERS),
            ("lcm", "official"),
            ("res_multistep", "official"),
        ],
    ),
)
def test_going_on_with_a_solver_of_our_own(
    folder: Any, tmp_path: Path, scheduler: str, schedule: str
) -> None:
    """Also within a step, between two windows, and in the second of two experts."""
    job = JOB | {"scheduler": scheduler, "sigma_schedule": schedule, "return_frames": False}
    job["output_path"] = tmp_path / "o.mp4"
    path = folder("wan2.2-t2v-a14b")
    whole = open_kept(path).generate(GenerationConfig(**job)).raise_for_error()
    kept = {"resume": "auto", "journal_folder": tmp_path / "j"}
    for stop in ({"progress_callback": crash_after(3)}, {"chunk_callback": crash_after(2)}):
        with pytest.raises(Crash):
            open_kept(path).generate(GenerationConfig(**job, **kept, **stop))
        rest = open_kept(path).generate(GenerationConfig(**job, **kept)).raise_for_error()
        assert "resumed" in rest.metadata
        assert torch.equal(rest.latents, whole.latents)


@pytest.mark.parametrize("scheduler", ["lcm", "unipc"])
def test_segments_with_a_solver_of_our_own(folder: Any, tmp_path: Path, scheduler: str) -> None:
    """Each segment has its own fresh noise, and a resumed one draws it again."""
    job = JOB | {"scheduler": scheduler, "sigma_schedule": "simple", "image": picture(),
                 "window_mode": "continuation", "num_inference_steps": 3}  # fmt: skip
    path = folder("wan2.1-i2v")
    whole = open_kept(path).generate(GenerationConfig(**job)).raise_for_error()
    kept = {"resume": "auto", "journal_folder": tmp_path / "j"}
    with pytest.raises(Crash):
        open_kept(path).generate(GenerationConfig(**job, **kept, progress_callback=crash_after(4)))
    rest = open_kept(path).generate(GenerationConfig(**job, **kept)).raise_for_error()
    assert rest.metadata["resumed"].startswith("segment 2")
    assert torch.equal(rest.latents, whole.latents)


EASY = {"step_cache": "easycache", "step_cache_threshold": 0.3, "guidance_gate": 0.5}
MAG = {"step_cache": "magcache", "step_cache_factor": 2.0}
SHORTCUTS = [
    (EASY, "wan2.2-t2v-a14b", {"max_chunk_size": 17, "window_overlap": 8}, (3, 7, 11)),
    (EASY, "wan2.1-i2v", {"window_mode": "continuation", "max_chunk_size": 17}, (9, 17)),
    (EASY, "wan2.1-t2v", {"num_frames": 9}, (8,)),
    (MAG, "wan2.2-t2v-a14b", {"max_chunk_size": 17, "window_overlap": 8}, (7, 11)),
    (MAG, "wan2.1-i2v", {"window_mode": "continuation", "max_chunk_size": 17}, (9, 17)),
    (MAG | {"guidance_gate": 0.5}, "wan2.1-t2v", {"num_frames": 9}, (5, 8)),
]


@pytest.mark.parametrize(
    ("wishes", "family", "more", "stops"),
    slow_but(lambda case: case in (SHORTCUTS[0], *SHORTCUTS[4:]), SHORTCUTS),
)
def test_going_on_with_shortcuts(
    folder: Any, tmp_path: Path, wishes: dict[str, Any], family: str, more: dict[str, Any],
    stops: tuple[int, ...],
) -> None:  # fmt: skip
    """What step caches and the gate remember, per window, segment and expert, is saved too."""
    job = JOB | {"num_inference_steps": 12, "max_chunk_size": None, "resume": "auto"} | more
    job |= {"journal_folder": tmp_path / "j", "return_frames": False}
    job |= {"output_path": tmp_path / "o.mp4"} | ({"image": picture()} if "i2v" in family else {})
    path = folder(family)
    whole = open_kept(path, **wishes).generate(GenerationConfig(**job)).raise_for_error()
    plain = open_kept(path).generate(GenerationConfig(**job)).raise_for_error()
    assert not torch.equal(plain.latents, whole.latents) and "forwards" not in plain.metadata
    forwards, skipped, *_ = (int(word) for word in re.findall(r"\d+", whole.metadata["forwards"]))
    assert 0 < forwards < skipped + forwards
    for stop in stops:
        with pytest.raises(Crash):
            open_kept(path, **wishes).generate(
                GenerationConfig(**job, progress_callback=crash_after(stop))
            )
        rest = open_kept(path, **wishes).generate(GenerationConfig(**job)).raise_for_error()
        assert "resumed" in rest.metadata
        assert torch.equal(rest.latents, whole.latents)
        assert rest.metadata["forwards"] == whole.metadata["forwards"]


def test_going_on_within_a_step_at_the_window_that_was_next(folder: Any, tmp_path: Path) -> None:
    family = "wan2.1-t2v"
    whole = open_wan(folder(family)).generate(GenerationConfig(**JOB)).raise_for_error()
    kept = {"resume": "auto", "journal_folder": tmp_path / "j"}
    seen: list[tuple[int, int]] = []
    with pytest.raises(Crash):
        open_wan(folder(family)).generate(
            GenerationConfig(**JOB, **kept, chunk_callback=crash_after(2))
        )
    rest = open_wan(folder(family)).generate(
        GenerationConfig(**JOB, **kept, chunk_callback=lambda i, n: seen.append((i, n)))
    )
    assert torch.equal(rest.raise_for_error().latents, whole.latents)
    # Window 0 was not computed again: its state was saved, or its passes were kept.
    assert seen[0][0] == 1 or "2 passes taken over" in rest.metadata["journal"]


def test_a_crash_in_the_decode_repeats_only_the_decode(folder: Any, tmp_path: Path) -> None:
    family = "wan2.1-t2v"
    whole = open_wan(folder(family)).generate(GenerationConfig(**JOB)).raise_for_error()
    kept = {"resume": "auto", "journal_folder": tmp_path / "j"}
    wrapper = open_wan(folder(family))
    decoding = False
    chunks = 0

    def check() -> None:
        nonlocal chunks
        chunks += decoding
        if chunks == 4:
            raise Crash

    def progress(step: int, total: int, latents: Any) -> None:
        nonlocal decoding
        decoding = step == total

    with pytest.raises(Crash):
        wrapper.generate(
            GenerationConfig(**JOB, **kept, interrupt_check=check, progress_callback=progress)
        )
    called: list[int] = []
    rest = open_wan(folder(family)).generate(
        GenerationConfig(**JOB, **kept, progress_callback=lambda i, *_: called.append(i))
    )
    rest.raise_for_error()
    assert called == []
    assert not any("denoise" in stage.name or "text" in stage.name for stage in rest.stages)
    assert torch.equal(rest.frames, whole.frames)
    # The report says of the latents what it would have said without the break.
    made = {"steps", "windows"}
    assert {name: rest.metadata[name] for name in made} == {
        name: whole.metadata[name] for name in made
    }


CHANGES: tuple[dict[str, Any], ...] = (
    {"seed": 2}, {"prompt": "a blue dog"}, {"num_inference_steps": 6}, {"flow_shift": 4.0},
    {"guidance_scale": 2.0}, {"num_frames": 37}, {"window_overlap": 4},
    {"window_schedule": "uniform"}, {"scheduler": "euler"}, {"negative_prompt": "x"},
)  # fmt: skip


@pytest.fixture(scope="module")
def cut_off(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journals of a run of JOB that crashed after its second step."""
    kept = {"resume": "auto", "journal_folder": tmp_path_factory.mktemp("cut off") / "j"}
    with pytest.raises(Crash):
        open_kept(folder("wan2.1-t2v")).generate(
            GenerationConfig(**JOB, **kept, progress_callback=crash_after(2))
        )
    return kept["journal_folder"]


def test_another_job_is_not_gone_on_with_and_the_difference_is_named(
    folder: Any, cut_off: Path
) -> None:
    for change in CHANGES:
        refused = open_kept(folder("wan2.1-t2v")).generate(
            GenerationConfig(**JOB | change, resume="must", journal_folder=cut_off)
        )
        assert isinstance(refused.error, JournalMismatch), change
        assert next(iter(change)).removesuffix("_frames") in refused.errors[0]


@pytest.mark.parametrize(
    "change",
    slow_but(lambda change: "seed" in change or "num_frames" in change, CHANGES),
    ids=lambda change: next(iter(change)),
)
def test_another_job_is_made_anew(
    folder: Any, tmp_path: Path, cut_off: Path, change: dict[str, Any]
) -> None:
    family, job = "wan2.1-t2v", JOB | change
    shutil.copytree(cut_off, tmp_path / "j")
    anew = open_kept(folder(family)).generate(
        GenerationConfig(**job, resume="auto", journal_folder=tmp_path / "j")
    )
    plain = open_kept(folder(family)).generate(GenerationConfig(**job))
    assert torch.equal(anew.raise_for_error().latents, plain.raise_for_error().latents)


def test_a_replaced_model_file_is_another_render(folder: Any, tmp_path: Path) -> None:
    model = make_folder(tmp_path / "model", "wan2.1-t2v")
    kept = {"resume": "auto", "journal_folder": tmp_path / "journal"}
    with pytest.raises(Crash):
        open_wan(model).generate(GenerationConfig(**JOB, **kept, progress_callback=crash_after(2)))
    make_folder(model, "wan2.1-t2v", seed=9)
    result = open_wan(model).generate(GenerationConfig(**JOB, **(kept | {"resume": "must"})))
    assert isinstance(result.error, JournalMismatch)
    assert "files" in result.errors[0]


@pytest.mark.parametrize(
    ("began", "now", "named"),
    [
        ({"fp8_storage": "always"}, {"fp8_storage": "never"}, "fp8_storage (saved true, now false"),
        ({"forward": "lean_rows"}, {"forward": "diffusers"}, 'forward (saved "lean_rows", now'),
        ({"precision": "bf16"}, {"precision": "fp32"}, "precision.transformer (saved"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_choice_that_rounds_otherwise_is_another_render(
    folder: Any, tmp_path: Path, began: dict[str, str], now: dict[str, str], named: str
) -> None:
    model = folder("wan2.1-t2v")
    kept = {"journal_folder": tmp_path / "j"}
    with pytest.raises(Crash):
        open_wan(model, **began).generate(
            GenerationConfig(**SHORT, **kept, resume="auto", progress_callback=crash_after(2))
        )
    refused = open_wan(model, **now).generate(GenerationConfig(**SHORT, **kept, resume="must"))
    assert isinstance(refused.error, JournalMismatch) and named in refused.errors[0]
    told: list[str] = []
    job = GenerationConfig(**SHORT, **kept, resume="auto", progress_callback=crash_after(1))
    job.warning_callback = told.append
    with pytest.raises(Crash):
        open_wan(model, **now).generate(job)
    assert any("starts anew" in text and named in text for text in told)
    anew = open_wan(model, **now).generate(GenerationConfig(**SHORT, **kept, resume="must"))
    plain = open_wan(model, **now).generate(GenerationConfig(**SHORT)).raise_for_error()
    assert torch.equal(anew.raise_for_error().latents, plain.latents)


def test_another_version_of_this_package_is_another_render(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"journal_folder": tmp_path / "j"}
    with pytest.raises(Crash):
        open_wan(folder("wan2.1-t2v")).generate(
            GenerationConfig(**SHORT, **kept, resume="auto", progress_callback=crash_after(1))
        )
    monkeypatch.setattr("wan_core.__version__", "99.0")
    refused = open_wan(folder("wan2.1-t2v")).generate(
        GenerationConfig(**SHORT, **kept, resume="must")
    )
    assert isinstance(refused.error, JournalMismatch)
    assert "versions.wanfit" in refused.errors[0] and "99.0" in refused.errors[0]


def test_a_render_that_went_down_to_a_smaller_plan_goes_on_with_it(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fresh plan is the one it began with; the saved state says what it had come to."""
    model, job = folder("wan2.1-t2v"), SHORT | {"resume": "auto", "journal_folder": tmp_path / "j"}

    def by_rows(self: Any, *arguments: Any) -> Any:
        return arguments[4].with_choices(lean=True, by_rows=True)

    monkeypatch.setattr(Planner, "smaller_plan", by_rows)

    def run(stop: int) -> Any:
        wrapper = open_wan(model)
        failing(wrapper, "transformer", "", 5, lambda: MemoryError("full"))
        return wrapper.generate(GenerationConfig(**job, progress_callback=crash_after(stop)))

    whole = run(10**6).raise_for_error()
    assert "products by rows" in whole.applied_optimizations
    with pytest.raises(Crash):
        run(3)
    rest = open_wan(model).generate(GenerationConfig(**job)).raise_for_error()
    assert "after step 3" in rest.metadata["resumed"]
    assert "products by rows" in rest.applied_optimizations
    assert any('forward (saved "lean_rows", now "exact")' in text for text in rest.warnings)
    assert torch.equal(rest.latents, whole.latents)
    assert torch.equal(rest.frames, whole.frames)


def test_what_the_journal_said_is_there_when_the_render_fails(folder: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    job = SHORT | {
        "resume": "auto",
        "journal_folder": blocked,
    }

    def fail(*_: object) -> None:
        raise InvalidRequest("the callback fails")

    told: list[str] = []
    config = GenerationConfig(**job, warning_callback=told.append, progress_callback=fail)
    with pytest.raises(InvalidRequest, match="the callback fails"):
        open_wan(folder("wan2.1-t2v")).generate(config)
    assert any("not saved" in warning for warning in told)


def test_a_target_that_cannot_be_written_is_found_before_anything_is_loaded(
    folder: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = open_wan(folder("wan2.1-t2v")).generate(
        GenerationConfig(**SHORT, output_path=tmp_path / "file" / "out.mp4", resume="auto")
    )
    assert isinstance(result.error, OutputError) and result.stages == []
    assert "out.mp4" in result.errors[0] and "Choose another folder" in result.errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_journal_and_a_picture_in_the_home_folder(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are found there, and a picture that was replaced is another render."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def stop(*_: Any) -> None:
        raise Crash

    job = SHORT | {"image": "~/in.png", "resume": "auto", "width": 64}
    for place in ({"journal_folder": "~/j"}, {"output_path": "~/videos/out.mp4"}):
        for colour, resumed in (("red", False), ("red", True), ("blue", False)):
            Image.new("RGB", (64, 32), colour).save(tmp_path / "in.png")
            wrapper = open_wan(folder("wan2.2-i2v-a14b"))
            if not resumed and colour == "red":
                with pytest.raises(Crash):
                    wrapper.generate(GenerationConfig(**job, **place, progress_callback=stop))
                continue
            if colour == "blue":  # something to go on from, of the red picture
                Image.new("RGB", (64, 32), "red").save(tmp_path / "in.png")
                with pytest.raises(Crash):
                    wrapper.generate(GenerationConfig(**job, **place, progress_callback=stop))
                Image.new("RGB", (64, 32), colour).save(tmp_path / "in.png")
            done = wrapper.generate(GenerationConfig(**job, **place)).raise_for_error()
            assert ("resumed" in done.metadata) == resumed, (place, colour)
        assert not (tmp_path / "~").exists()


def test_must_without_a_journal(folder: Any, tmp_path: Path) -> None:
    result = open_wan(folder("wan2.1-t2v")).generate(
        GenerationConfig(**JOB, resume="must", journal_folder=tmp_path / "j")
    )
    assert isinstance(result.error, JournalMismatch)


def test_a_broken_journal_never_stops_a_render(folder: Any, tmp_path: Path) -> None:
    family = "wan2.1-t2v"
    kept = {"resume": "auto", "journal_folder": tmp_path / "j"}
    whole = open_wan(folder(family)).generate(GenerationConfig(**JOB)).raise_for_error()
    with pytest.raises(Crash):
        open_wan(folder(family)).generate(
            GenerationConfig(**JOB, **kept, progress_callback=crash_after(3))
        )
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
    rest = open_wan(folder(family)).generate(GenerationConfig(**JOB, **kept)).raise_for_error()
    assert torch.equal(rest.latents, whole.latents)
    assert any("not used" in warning for warning in rest.warnings)


def test_a_read_only_place_is_said_and_the_render_goes_on(folder: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = open_wan(folder("wan2.1-t2v")).generate(
        GenerationConfig(**JOB, resume="auto", journal_folder=blocked)
    )
    assert result.success
    assert any("not saved" in warning for warning in result.warnings)


def test_resume_needs_a_place(folder: Any) -> None:
    result = open_wan(folder("wan2.1-t2v")).generate(GenerationConfig(**JOB, resume="auto"))
    assert isinstance(result.error, InvalidRequest) and result.error.field == "resume"


ZYGOTE = """
import math, os, sys, time
import torch
import wan_core.journal.resume
from wan_core import GenerationConfig, WanPipelineLoader

torch.set_num_threads(1)
wan_core.journal.resume.MAX_SHARE = math.inf  # steps this short are not all saved otherwise
model, target = sys.argv[1:3]
wrapper = WanPipelineLoader().load_wan_pipeline(
    model, optimization_config={'device': 'cpu', 'precision': 'fp32'})
wrapper.preload()

def render():
    log = os.open(target + '.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    say = lambda text: os.write(log, (text + '\\n').encode())
    denoising = False
    def window(i, n):
        nonlocal denoising
        denoising = True
        say(f'window {i}')
    def step(i, n, x):
        nonlocal denoising
        denoising = False
        say(f'step {i}')
    def check():
        if not denoising:
            say('between')
            time.sleep(0.04)
    job = GenerationConfig(**JOB, prompt_embeds=torch.ones(1, 4, 32), resume='auto',
        journal_folder=target, progress_callback=step, interrupt_check=check,
        chunk_callback=window, output_path=target + '.mp4', crf=0, pix_fmt='yuv444p')
    result = wrapper.generate(job).raise_for_error()
    torch.save({'latents': result.latents, 'frames': result.frames}, target + '.tmp')
    os.replace(target + '.tmp', target + '.pt')

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            render()
            os._exit(0)
        except BaseException as err:
            os.write(2, repr(err).encode())
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("times", [12, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_makes_the_bits_of_an_uncut_run(
    folder: Any, tmp_path: Path, times: int
) -> None:
    """SIGKILL at random moments of denoising and decoding; one unit is lost at most per kill.

    A process that has imported everything forks one that renders, for every attempt.
    """
    model = folder("wan2.2-t2v-a14b")
    job = {
        "width": 16, "height": 16, "num_frames": 33, "seed": 1, "num_inference_steps": 6,
        "max_chunk_size": 17, "window_overlap": 8, "guidance_scale": 1.0, "guidance_scale_2": 1.0,
        "switch_step": 3,
    }  # fmt: skip
    target, draw = tmp_path / "journals", random.Random(0)
    log = Path(f"{target}.log")
    code = ZYGOTE.replace("**JOB", f"**{job!r}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    zygote = subprocess.Popen(
        [sys.executable, "-c", code, str(model), str(target)], env=env, cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert zygote.stdin is not None and zygote.stdout is not None

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    lived: list[list[str]] = []
    half_written: list[Path] = []
    kills = 0
    try:
        while not Path(f"{target}.pt").exists():
            assert len(lived) < 40
            before = len(lines())
            print("go", file=zygote.stdin, flush=True)
            child = int(zygote.stdout.readline())
            if kills < times:
                # Every window and every decoded frame is a line: let a few of them pass.
                decoding = "step 6" in lines()
                wanted = before + draw.choice((1, 2, 3) if decoding else (2, 3, 4, 5, 6))
                while len(lines()) < wanted and not Path(f"{target}.pt").exists():
                    time.sleep(0.001)
                time.sleep(draw.random() * 0.01)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    kills += 1
            assert int(zygote.stdout.readline()) in (0, -signal.SIGKILL)
            lived.append(lines()[before:])
            # The lock of an output has one name, and the next run takes it over.
            left_now = tmp_path.glob(".wanfit-*")
            half_written += [path for path in left_now if path.suffix != ".lock"]
    finally:
        zygote.stdin.close()
        zygote.wait(timeout=60)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = open_wan(model).generate(
            GenerationConfig(
                **job, prompt_embeds=torch.ones(1, 4, 32), output_path=tmp_path / "whole.mp4",
                crf=0, pix_fmt="yuv444p",
            )
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    whole.raise_for_error()
    saved = torch.load(f"{target}.pt", weights_only=True)
    assert torch.equal(saved["latents"], whole.latents)
    assert torch.equal(saved["frames"], whole.frames)
    in_decode = [not any("window" in line for line in life) for life in lived]
    assert kills == times and sum(in_decode) >= times // 5 and not any(in_decode[:4])
    # A step is saved before it is reported, and a life goes on after the last one saved: what
    # was finished is never made again, and a kill costs no more than the step it falls into.
    finished = 0
    for life in lived:
        made = [int(line.split()[1]) for line in life if line.startswith("step")]
        if made:
            # One may have been saved and not reported any more.
            assert made[0] in (finished + 1, finished + 2)
            assert made == list(range(made[0], made[-1] + 1))
            finished = made[-1]
    assert finished in (5, 6)  # the last one too may have been saved and not reported
    # No kill left a file for longer than until the next run began to write.
    assert half_written and len(set(half_written)) == len(half_written)
    made, wanted = read(Path(f"{target}.mp4"))[0], read(tmp_path / "whole.mp4")[0]
    assert made.shape == (33, 16, 16, 3) and (made == wanted).all()
    left = {f"journals.{kind}" for kind in ("log", "mp4", "pt")} | {"whole.mp4"}
    assert {path.name for path in tmp_path.iterdir()} == left
