"""What would fit: the numbers of an answer agree with each other and with the ladder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from support.machines import architecture, cpu, gpu

from wan_core import OptimizationManager
from wan_core.errors import DoesNotFit
from wan_core.job import MAX_LATENT_FRAMES, MAX_SIZE, MOST_FRAMES, video_frames
from wan_core.memory import SystemResources, Workload
from wan_core.models import ModelArchitecture
from wan_core.plan.fits import most_that_fits

MACHINES = {"24 GB": gpu(24), "8 GB": gpu(8, ram=32), "80 GB": gpu(80, ram=256), "CPU": cpu(64)}
MODELS = ("wan2.1-t2v-1.3b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b")
JOBS = {
    "a picture": {"num_frames": 1},
    "five": {"num_frames": 5},
    "usual": {"num_frames": 81},
    "longer than usual": {"num_frames": 161},
    "long, in windows": {"num_frames": 1845, "window_frames": 81},
    "very long, to a file": {"num_frames": 20001, "window_frames": 49, "return_frames": False},
}


def fitting(model: ModelArchitecture, system: SystemResources) -> Callable[[Workload], bool]:
    def fits(job: Workload) -> bool:
        try:
            OptimizationManager().recommend_optimizations(model, job, system)
        except DoesNotFit:
            return False
        return True

    return fits


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("machine", MACHINES)
def test_an_answer_does_not_contradict_itself(machine: str, name: str, job: str) -> None:
    system, model = MACHINES[machine], architecture(name)
    size = (1280, 704) if name == "wan2.2-ti2v-5b" else (832, 480)
    asked = Workload(width=size[0], height=size[1], **JOBS[job])  # type: ignore[arg-type]
    text = OptimizationManager().what_fits(model, asked, system)
    fits = fitting(model, system)
    long = re.search(
        rf"(\d+) frames? at {size[0]}x{size[1]}(, made in windows of \d+)?( \()?", text
    )
    sizes = re.findall(rf"(?<!\d){asked.num_frames} frames? at (\d+)x(\d+)( \()?", text)
    if fits(asked):
        assert long is not None and int(long[1]) >= asked.num_frames, text
        assert sizes and int(sizes[-1][0]) >= size[0], text
    if long is None:
        assert not fits(replace(asked, num_frames=1))
        return
    frames = int(long[1])
    assert fits(replace(asked, num_frames=frames)), text
    most = video_frames(MAX_LATENT_FRAMES if asked.window_frames is None else MOST_FRAMES // 4)
    assert (frames == most) == (long[3] is not None), text  # a bound is said to be one
    if frames < most:
        assert not fits(replace(asked, num_frames=frames + 4)), text


def of_area(most: int) -> Callable[[Workload], bool]:
    return lambda job: job.width * job.height * job.num_frames <= most


@pytest.mark.parametrize("size", [(832, 480), (480, 832), (512, 512), (1280, 704), (16, 16)])
@pytest.mark.parametrize("multiple", [16, 32])
def test_the_largest_size_keeps_its_proportions_and_ends_where_jobs_end(
    size: tuple[int, int], multiple: int
) -> None:
    job = Workload(width=size[0], height=size[1], num_frames=5)
    for pixels in (10**5, 10**6, 10**8, 10**12):
        text = most_that_fits(job, multiple, of_area(pixels * 5), lambda _: None)
        found = re.search(r"5 frames at (\d+)x(\d+)( \(no video is larger\))?\.$", text)
        if found is None:
            assert multiple * multiple > pixels
            continue
        width, height = int(found[1]), int(found[2])
        assert width % multiple == height % multiple == 0
        assert max(width, height) <= MAX_SIZE + multiple
        assert abs(height - width * size[1] / size[0]) <= multiple
        assert width * height <= pixels
        assert (found[3] is not None) == (pixels == 10**12)


def test_fallback_windows_are_said() -> None:
    job = Workload(width=832, height=480, num_frames=81)

    def answer(windows: int | None) -> str:
        return most_that_fits(job, 16, of_area(832 * 480 * 801), lambda _: windows)

    assert "801 frames at 832x480, made in windows of 49 or" in answer(49)
    assert "801 frames at 832x480 or" in answer(None)
