"""An output is one render's while it is made; a killed one keeps it from nobody."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import make_folder, open_wan

from wan_core import GenerationConfig, VideoGenerationResult, WanPipelineLoader
from wan_core.errors import OutputError
from wan_core.files import lock_beside, sweep
from wan_core.journal.lock import claim, try_lock

TINY: dict[str, Any] = {"num_frames": 5, "width": 32, "height": 32, "num_inference_steps": 2}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield make_folder(tmp_path_factory.mktemp("lock") / "tiny", "wan2.1-t2v")
    WanPipelineLoader().clear_cache()


def made(model: Path, output: Path, **more: Any) -> VideoGenerationResult:
    config = GenerationConfig(
        **{"prompt": "a fox", "seed": 1, "resume": "auto", **TINY, **more}, output_path=output
    )
    return open_wan(model).generate(config)


REFUSED: list[dict[str, Any]] = [
    {"seed": 2}, {"prompt": "a cat"}, {"crf": 30}, {"fps": 8}, {"resume": None}, {"batch_size": 2},
    {"resume": "never", "seed": 2},
]  # fmt: skip


def test_a_render_into_a_file_that_another_one_makes_is_told_before_its_first_step(
    model: Path, tmp_path: Path
) -> None:
    """Of two shells, say. Two that make the same video may both write it."""
    output = tmp_path / "fox.mp4"
    refused: list[VideoGenerationResult] = []
    same: list[VideoGenerationResult] = []
    steps: list[int] = []

    def begin_others(done: int, *_: Any) -> None:
        if done == 1:  # the first one is in the middle of its steps
            count = {"progress_callback": lambda *_: steps.append(1)}
            refused.extend(made(model, output, **more, **count) for more in REFUSED)
            same.append(made(model, output))

    result = made(model, output, progress_callback=begin_others)
    for one in (result, *same):
        one.raise_for_error()
    for one, more in zip(refused, REFUSED, strict=True):
        assert isinstance(one.error, OutputError), more
        assert f"another video as '{output}'" in str(one.error), more
    assert len(same) == 1 and not steps
    assert [path.name for path in tmp_path.iterdir()] == ["fox.mp4"]  # no lock, no journal


def test_outputs_of_a_batch_are_kept_one_by_one_and_let_go(model: Path, tmp_path: Path) -> None:
    for resume in ("auto", None):  # without a journal nothing is known to be the same
        with claim(tmp_path / "fox_2.mp4", "something else"):
            error = made(model, tmp_path / "fox.mp4", batch_size=2, resume=resume).error
        assert isinstance(error, OutputError) and "fox_2.mp4" in str(error)
        assert not list(tmp_path.iterdir())


def test_a_render_that_was_killed_keeps_its_output_from_nobody(tmp_path: Path) -> None:
    output = tmp_path / ("ä" * 120 + ".mp4")  # as long as a name may be
    program = (
        "import sys, os, pathlib; from wan_core.journal.lock import claim\n"
        "with claim(pathlib.Path(sys.argv[1]), 'x'): print(os.getpid(), flush=True); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(output)], cwd=ROOT, stdin=-1, stdout=-1
    ) as other:
        assert other.stdout is not None
        number = other.stdout.readline().decode().strip()
        with pytest.raises(OutputError, match=rf"\(process {number}\)"), claim(output, "y"):
            pass
        with claim(output, "x"):  # the same video
            pass
        sweep(tmp_path)
        assert lock_beside(output).exists()
        other.kill()
    with claim(output, "y"):
        assert lock_beside(output).exists()
    lock_beside(output).touch()  # as the kill left it
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [b"", b"\n77 y"], ids=["empty", "of a killed one"])
def test_who_looks_for_what_is_left_over_keeps_an_output_from_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bytes
) -> None:
    """``sweep`` locks the file for as long as it takes to remove it."""
    output = tmp_path / "fox.mp4"
    lock_beside(output).write_bytes(left)
    swept = try_lock(lock_beside(output))
    assert swept is not None
    monkeypatch.setattr("wan_core.journal.lock.time.sleep", lambda _: swept.close())
    with claim(output, "x"):
        assert b"x" in lock_beside(output).read_bytes()
    assert not list(tmp_path.iterdir())


def test_two_that_begin_the_same_at_once_both_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has the lock before it says what it makes."""
    output = tmp_path / "fox.mp4"
    other = try_lock(lock_beside(output))
    assert other is not None

    def say(_: float) -> None:
        other.file.write(b"\n77 x")
        other.file.flush()

    monkeypatch.setattr("wan_core.journal.lock.time.sleep", say)
    with claim(output, "x"):
        pass
    monkeypatch.setattr("wan_core.journal.lock.time.sleep", lambda _: None)
    with pytest.raises(OutputError, match=r"\(process 77\)"), claim(output, "y"):
        pass
    other.file.truncate(0)
    with pytest.raises(OutputError, match="Another run is making"), claim(output, "x"):
        pass
    other.close()


@pytest.mark.skipif(sys.platform == "win32", reason="it has no O_NOFOLLOW")
def test_a_link_that_lies_where_the_lock_does_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "else").write_text("kept")
    lock_beside(tmp_path / "fox.mp4").symlink_to(tmp_path / "else")
    with claim(tmp_path / "fox.mp4", "x"):
        pass
    assert (tmp_path / "else").read_text() == "kept"
