"""What would fit: the numbers of an answer agree with each other and with the ladder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from support.cases import in_turn
from support.machines import architecture, cpu, gpu, stored_pair

from wan_core import OptimizationConfig, OptimizationManager
from wan_core.config import GIB
from wan_core.errors import DoesNotFit
from wan_core.job import MAX_LATENT_FRAMES, MAX_SIZE, MOST_FRAMES, encoder_bytes, video_frames
from wan_core.memory import SystemResources, Workload
from wan_core.models import ModelArchitecture, StoredSize
from wan_core.plan import Planner
from wan_core.plan.fits import (
    file_cure,
    fp8_cure,
    frames_text,
    largest_size,
    longest,
    more_ram,
    most_that_fits,
    smaller_that_fits,
    windows_that_fit,
)

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


@pytest.mark.parametrize(("machine", "name", "job"), in_turn(MACHINES, MODELS, JOBS))
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
    whole = Workload(width=832, height=480, num_frames=81, window_frames=33)
    for windows in (801, 805):  # no shorter than the clip
        text = most_that_fits(job, 16, of_area(832 * 480 * 801), lambda _, n=windows: n)
        assert "made in windows" not in text
    assert "made in windows" not in most_that_fits(
        whole, 16, of_area(832 * 480 * 801), lambda _: 33
    )


def test_bounds_are_those_of_jobs() -> None:
    whole = Workload(width=832, height=480, num_frames=81)
    text = most_that_fits(whole, 16, lambda _: True, lambda _: None)
    assert "4093 frames at 832x480 (no clip is longer without max_chunk_size)" in text
    in_windows = replace(whole, window_frames=81)
    text = most_that_fits(in_windows, 16, lambda _: True, lambda _: None)
    assert f"{video_frames(MOST_FRAMES // 4)} frames at 832x480 (no clip is longer)" in text
    assert "81 frames at 16384x9456 (no video is larger)" in text
    assert most_that_fits(whole, 16, lambda _: False, lambda _: None) == "No length or size fits."


@pytest.mark.parametrize("most", [1, 5, 9, 77, 81])
def test_the_longest_clip(most: int) -> None:
    job = Workload(width=832, height=480, num_frames=81)
    assert longest(job, lambda other: other.num_frames <= most) == most
    assert longest(replace(job, num_frames=79), lambda _: True) == 77  # 4n+1, not beyond the job's
    assert longest(job, lambda _: False) is None


def test_the_largest_size_is_below_the_jobs() -> None:
    job = Workload(width=64, height=32, num_frames=5)
    for width, expected in ((64, (48, 32)), (48, (48, 32)), (47, (32, 16)), (16, (16, 16))):
        found = largest_size(job, 16, lambda other, most=width: other.width <= most)
        assert found == expected
    assert largest_size(job, 16, lambda other: other.width < 16) is None
    assert largest_size(job, 16, lambda _: True, proportions=(1, 1)) == (48, 48)


def test_what_would_fit_instead() -> None:
    job = Workload(width=64, height=32, num_frames=81)
    for fits, said in (
        (lambda other: other.num_frames <= 41, ["What would fit: 41 frames at 64x32."]),
        (lambda other: other.width < 64, ["What would fit: 81 frames at 48x32."]),
        (
            lambda other: other.num_frames == 1 or other.width == 16,
            ["What would fit: 1 frame at 64x32 or 81 frames at 16x16."],
        ),
        (lambda _: False, []),
    ):
        assert smaller_that_fits(job, 16, fits) == said
    assert (frames_text(1), frames_text(2)) == ("1 frame", "2 frames")


def test_windows_that_would_fit() -> None:
    job = Workload(width=64, height=32, num_frames=161, window_overlap=16)
    seen: list[tuple[int | None, int]] = []

    def fits(most: int) -> Callable[[Workload], bool]:
        def answer(other: Workload) -> bool:
            seen.append((other.window_frames, other.window_overlap))
            return (other.window_frames or other.num_frames) <= most

        return answer

    for most, frames in ((81, 81), (80, 49), (48, 33), (17, 17)):
        text = windows_that_fit(job, fits(most))
        assert f"In windows of {frames} frames all 161 would fit" in text
    assert windows_that_fit(job, fits(16)) == ""
    assert set(seen) == {(81, 16), (49, 16), (33, 16), (17, 8)}
    seen.clear()
    assert windows_that_fit(replace(job, num_frames=33), fits(16)) == ""
    assert seen == [(17, 8)]
    assert windows_that_fit(replace(job, window_frames=49), fits(81)).startswith(
        " In windows of 33"
    )


# ---------------------------------------------------------------------------- cures of a refusal


def ram_added(system: SystemResources, gib: float) -> SystemResources:
    """The machine with so much more of free RAM."""
    more = int(gib * GIB)
    changed = {"ram_available_bytes": system.ram_available_bytes + more,
               "ram_total_bytes": system.ram_total_bytes + more}  # fmt: skip
    if system.device_kind == "cpu":
        changed["device_free_bytes"] = system.device_free_bytes + more
    return replace(system, **changed)


def cures(
    text: str, model: ModelArchitecture, job: Workload, system: SystemResources, wishes: object
) -> dict[str, tuple[object, ...]]:
    """What a refusal names, each carried out: what would then be planned."""
    found: dict[str, tuple[object, ...]] = {}
    limit = re.search(r"ram_limit_gb ([\d.]+) w", text)
    more = re.search(r"([\d.]+) GiB more of free RAM", text)
    if limit or more:
        wider = replace(wishes, ram_limit_gb=float(limit[1])) if limit else wishes  # type: ignore[type-var]
        name = "RAM and its limit" if limit and more else "limit" if limit else "RAM"
        found[name] = model, job, ram_added(system, float(more[1]) if more else 0), wider
    if "return_frames False" in text:
        found["file"] = model, replace(job, return_frames=False, to_file=True), system, wishes
    if fp8 := re.search(r"It fits with the (.+?)\.", text):
        names = [one.split(" in ")[0].replace(" ", "_") for one in fp8[1].split(" and the ")]
        in_fp8 = {
            **model.components,
            **{name: stored_pair("fp8").components[name] for name in names},
        }
        found["fp8"] = replace(model, components=in_fp8), job, system, wishes
    sizes = re.search(r"What would fit: (.+?)\.( |$)", text)
    for frames, wide, tall in re.findall(
        r"(\d+) frames? at (\d+)x(\d+)", sizes[1] if sizes else ""
    ):
        smaller = replace(job, num_frames=int(frames), width=int(wide), height=int(tall))
        found["shorter" if smaller.width == job.width else "smaller"] = (
            model,
            smaller,
            system,
            wishes,
        )
    if windows := re.search(r"In windows of (\d+) frames all", text):
        frames = int(windows[1])
        overlap = min(job.window_overlap, (frames - 1) // 2)
        cut = replace(job, window_frames=frames, window_overlap=overlap)
        found["windows"] = model, cut, system, wishes
    return found


Case = tuple[str, dict[str, object], SystemResources, dict[str, object], str]
REFUSED: dict[str, Case] = {
    "a limit of RAM": ("fp32", {}, gpu(24, ram=64), {"ram_limit_gb": 8}, "fp8 limit"),
    "a limit beyond the RAM": (
        "bf16", {}, gpu(24, ram=2), {"ram_limit_gb": 0.5}, "RAM and its limit"
    ),
    "a limit that more RAM would meet": (
        "bf16", {}, gpu(24, ram=1.5), {"ram_limit_gb": 1}, "RAM and its limit"
    ),
    "files in fp32": ("fp32", {}, gpu(24, ram=10), {"fp8_storage": "never"}, "RAM fp8"),
    "an encoder in fp32": ("fp32 encoder", {}, gpu(24, ram=10), {}, "RAM fp8"),
    "a mapped file": ("bf16", {"encode_text": False}, gpu(24, ram=1.5), {}, "RAM"),
    "others fill the RAM": ("fp8", {}, gpu(24, ram=3, ram_total_bytes=64 * GIB), {}, "RAM"),
    "frames fill the RAM": (
        "fp8", {"num_frames": 401}, gpu(80, ram=5), {}, "RAM file shorter smaller"
    ),
    "frames and little RAM": ("fp8", {"num_frames": 401}, gpu(80, ram=2), {}, "RAM"),
    "a small card": (
        "fp8", {"num_frames": 241}, gpu(4, ram=64), {"chunk_size": 0}, "shorter smaller windows"
    ),
    "nothing helps": ("fp8", {}, gpu(0.5, ram=64), {}, ""),
    "a CPU": ("bf16", {}, cpu(12), {}, "RAM fp8"),
    "a CPU and its limit": ("fp8", {}, cpu(64), {"ram_limit_gb": 6}, "limit shorter smaller"),
}  # fmt: skip
"""What is refused: the files, the job, the machine and the wishes; and what cures are named."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_cure_that_is_named_is_one(case: str) -> None:
    kind, asked, system, wanted, named = REFUSED[case]
    model, wishes = stored_pair(kind), OptimizationConfig(**wanted)  # type: ignore[arg-type]
    size: dict[str, object] = {"width": 832, "height": 480, "num_frames": 81}
    job = Workload(**(size | asked))  # type: ignore[arg-type]
    with pytest.raises(DoesNotFit) as caught:
        Planner().recommend_optimizations(model, job, system, wishes)
    text = str(caught.value)
    found = cures(text, model, job, system, wishes)
    assert " ".join(sorted(found)) == named, text
    assert ("close other programs" in text) == case.startswith("others"), text
    for name, carried_out in found.items():
        try:
            Planner().recommend_optimizations(*carried_out)  # type: ignore[arg-type]
        except DoesNotFit as still:
            pytest.fail(f"{name} is named and does not help. {text} THEN: {still}")


def test_ram_that_is_not_short_is_no_cure() -> None:
    assert more_ram(gpu(24, ram=32), None, GIB) == more_ram(gpu(24, ram=32), 2, GIB) == []
    assert more_ram(gpu(24, ram=32), 2, 2 * GIB) == []
    assert more_ram(gpu(24, ram=32), 2, 2 * GIB + 1) == ["ram_limit_gb 2.1 would do."]
    assert more_ram(gpu(24, ram=32), 2, 3 * GIB) == ["ram_limit_gb 3 would do."]


def test_others_are_closed_where_that_frees_what_is_short() -> None:
    # Of 14 GiB 8 are free and this process has 3, which could drop 2 of them: others have 3.
    system = gpu(
        24, ram=8, ram_total_bytes=14 * GIB, process_bytes=3 * GIB, ram_evictable_bytes=2 * GIB
    )
    there = system.usable_ram_bytes
    assert more_ram(system, None, there) == []
    for short, said in (
        (1, "0.1 GiB more of free RAM would do: close other programs."),
        (3 * GIB, "3.0 GiB more of free RAM would do: close other programs."),
        (3 * GIB + 1, "3.1 GiB more of free RAM would do."),
    ):
        assert more_ram(system, None, there + short) == [said]
    unknown = replace(system, process_bytes=None)
    most = unknown.usable_ram_bytes + 4 * GIB
    assert "close other programs" in more_ram(unknown, None, most)[0]
    assert "close other programs" not in more_ram(unknown, None, most + 1)[0]
    assert more_ram(system, 1, 2 * GIB) == ["ram_limit_gb 2 would do."]
    assert "close other programs" not in more_ram(system, 1, there)[0]  # enough is free


def test_a_clip_in_a_file_is_counted_with_its_encoder() -> None:
    tried: list[Workload] = []
    job = Workload(width=832, height=480, num_frames=81, batch_size=2)
    own = 2 * encoder_bytes("h264", "yuv420p", 832, 480, 81)
    for asked, encoder in ((job, own), (replace(job, encoder_bytes=7), 7)):
        (said,) = file_cure(asked, lambda other: not tried.append(other))
        gib = 2 * 81 * 480 * 832 * 3 * 4 / GIB
        assert said.startswith(f"The finished frames are {gib:.1f} GiB of that: write the video")
        assert tried.pop() == replace(
            asked, return_frames=False, to_file=True, encoder_bytes=encoder
        )
    assert file_cure(job, lambda _: False) == []
    assert file_cure(replace(job, return_frames=False), lambda _: True) == []


def test_files_in_fp8_are_what_is_tried() -> None:
    """A number that is computed in half is a byte then; what stays in fp32 stays."""
    tried: list[ModelArchitecture] = []

    def fits(model: ModelArchitecture) -> bool:
        tried.append(model)
        return False

    model = stored_pair("bf16")
    mixed = StoredSize(kept=5, half=700, plain=30, wide=2)
    stored = replace(
        model.components["transformer"].stored, blocks=(mixed,), vace=(mixed,), faces=(mixed,),
        tables=StoredSize(half=8, plain=3),
    )  # fmt: skip
    part = replace(model.components["transformer"], stored=stored)
    model = replace(model, components={**model.components, "transformer": part})
    assert fp8_cure(model, "denoise_high", fits) == []
    found = tried[0].components["transformer"]
    small = StoredSize(kept=735, wide=2)
    assert found.stored is not None and found.weight_kind == "fp8_scaled"
    assert found.stored.blocks == found.stored.vace == found.stored.faces == (small,)
    assert found.stored.tables == StoredSize(half=11) and found.stored.rest == stored.rest
    assert found.stored.quantised and found.stored.largest == 730
    assert found.nbytes == 3 * (735 + 2 * 4) + 11 * 2 + stored.rest.nbytes(2)
    # One part, both experts, and the text encoder too.
    usual = stored_pair("bf16").components
    changed = [
        {name for name, one in each.components.items() if one.weight_kind == "fp8_scaled"}
        for each in tried
    ]
    experts = {"transformer", "transformer_2"}
    assert changed == [{"transformer"}, experts, experts | {"text_encoder"}]
    assert all(each.components["vae"] == usual["vae"] for each in tried)
    for stage, name in (("text_encode", "text encoder"), ("denoise_low", "transformer 2"),
                        ("decode", "transformer")):  # fmt: skip
        (text,) = fp8_cure(stored_pair("bf16"), stage, lambda _: True)
        assert text.startswith(f"It fits with the {name} in fp8 ")
    assert fp8_cure(stored_pair("fp8"), "denoise_high", lambda _: True) == []
    unknown = architecture("wan2.2-t2v-a14b")  # of whose files nothing is known
    assert fp8_cure(unknown, "denoise_high", lambda _: True) == []
