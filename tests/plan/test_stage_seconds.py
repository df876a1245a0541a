"""Seconds of stages: closed forms of their terms, properties, and runs that were measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import wan_layouts as layouts
from support.machines import architecture, cpu, gpu

from wan_core import ArchitectureDetector, OptimizationConfig, OptimizationPlan, WanModelFiles
from wan_core.config import GIB, StageEstimate
from wan_core.memory import Choices, SystemResources, Workload, lean_decode_bytes
from wan_core.memory.calibration import Calibration
from wan_core.models import PARTS, VAE_21, ModelArchitecture, all_blocks, part_bytes, rest_bytes
from wan_core.plan import Planner, stage_seconds, strips_forecast
from wan_core.plan.stage_seconds import (
    COMPILED,
    DISK,
    FIRST,
    PAGEABLE,
    StageSeconds,
    decode_seconds,
    encoded_frames,
    mp4_seconds,
)
from wan_core.plan.timing import timing

JOB = Workload(width=832, height=480, num_frames=81, steps=4)
BF16 = Choices(dtypes=dict.fromkeys(PARTS, "bf16") | {"vae": "fp32"})
LEAN = replace(BF16, lean=True)
T2V, A14B, FIVE = map(architecture, ("wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"))
EVERYTHING = ("imports", "encode", "denoise", "decode")
H100 = gpu(
    79, ram=240, compute_capability=(9, 0), multiprocessors=132, pcie_generation=5,
    allocator="expandable", done_here=EVERYTHING, process_bytes=GIB,
)  # fmt: skip
H200 = replace(H100, device_free_bytes=139 * GIB, device_total_bytes=139 * GIB)


def with_bytes(model: ModelArchitecture, nbytes: int = 3 * GIB) -> ModelArchitecture:
    parts = {name: replace(part, nbytes=nbytes) for name, part in model.components.items()}
    return replace(model, components=parts)


def stages(
    model: ModelArchitecture, job: Workload, choices: Choices, system: SystemResources,
    estimated: tuple[StageEstimate, ...] = (),
) -> dict[str, StageSeconds]:  # fmt: skip
    found = timing(model, job, choices, system, estimated)
    assert found.total == pytest.approx(sum(stage.warm for stage in found.stages))
    assert found.cold == pytest.approx(sum(stage.cold for stage in found.stages))
    assert found.cold >= found.total - 1e-9
    return {stage.name: stage for stage in found.stages}


# ------------------------------------------------------------------------------- terms, one by one


def test_reading_is_bytes_over_a_rate_and_nothing_where_the_process_holds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_seconds, "stays_in_file", lambda *_, **__: True)
    model, nbytes = with_bytes(T2V), 3 * GIB
    found = stages(model, JOB, BF16, H100)
    for name in ("text_encoder", "transformer", "vae"):
        assert found[f"load {name}"].warm == pytest.approx(0.3 + nbytes / 5e9)
        assert found[f"load {name}"].cold == pytest.approx(0.3 + nbytes / DISK)
    held = stages(model, JOB, BF16, replace(H100, loaded=("transformer", "tokenizer")))
    assert held["load transformer"].warm == held["load tokenizer"].warm == 0
    assert held["load transformer"].cold == found["load transformer"].cold
    assert held["load vae"] == found["load vae"]
    # What an idle expert and given embeddings do not need is not read.
    bare = stages(model, replace(JOB, encode_text=False), BF16, H100)
    assert not {"load text_encoder", "load tokenizer", "text_encode"} & set(bare)


def test_what_is_not_used_as_it_lies_in_its_file_is_copied_or_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A core copies 1.2 GB in a second or rounds 0.93 to fp8; then what that made is sent."""
    sent, half = (
        part_bytes(T2V, "transformer", "bf16", fp8=fp8) / (H100.bus_bytes_per_second * PAGEABLE)
        for fp8 in (False, True)
    )
    model = with_bytes(T2V)
    copied = stages(model, JOB, replace(BF16, offload="model"), H100)["load transformer"]
    assert copied.warm == pytest.approx(0.3 + 3 * GIB / 1.2e9 + sent)
    rounded = stages(model, JOB, replace(BF16, fp8_storage=True), H100)["load transformer"]
    assert rounded.warm == pytest.approx(0.3 + 3 * GIB / 9.3e8 + half) and half < 0.6 * sent
    assert rounded.cold == rounded.warm  # the disk is faster than that
    # A card rounds what is used as it lies in the file: sent to it, and half of that comes back.
    monkeypatch.setattr(stage_seconds, "stays_in_file", lambda *_, **__: True)
    there = stages(model, JOB, replace(BF16, fp8_storage=True), H100)["load transformer"]
    assert there.warm == pytest.approx(0.3 + 3 * GIB / 5e9 + 1.5 * GIB / 2e9 + half)
    host = stages(model, JOB, replace(BF16, fp8_storage=True), cpu(64))["load transformer"]
    assert host.warm == pytest.approx(0.3 + 3 * GIB / 9.3e8)


def test_files_that_ram_cannot_hold_come_from_the_disk_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_seconds, "stays_in_file", lambda *_, **__: True)
    model = with_bytes(T2V)
    needed = sum(part.nbytes for part in model.components.values()) + GIB
    enough = replace(H100, ram_available_bytes=needed - GIB, ram_evictable_bytes=GIB)
    short = replace(enough, ram_evictable_bytes=GIB - 1)
    assert stages(model, JOB, BF16, enough)["load vae"].warm < 1
    found = stages(model, JOB, BF16, short)
    assert all(one.warm == one.cold for name, one in found.items() if name.startswith("load"))
    # A file of two components counts once.
    one = {name: replace(part, path=Path("one")) for name, part in model.components.items()}
    assert stages(replace(model, components=one), JOB, BF16, short)["load vae"].warm < 1


def estimated(name: str, **more: Any) -> StageEstimate:
    return StageEstimate(name=name, device_bytes=0, weights_bytes=0, activation_bytes=0, **more)


def test_blocks_that_stay_are_sent_once_also_where_others_stream() -> None:
    held = replace(H100, loaded=("transformer",))

    def denoise(**more: object) -> float:
        choices = replace(LEAN, offload="model", stream=True, **more)  # type: ignore[arg-type]
        return stages(T2V, JOB, choices, held)["denoise"].warm

    block = max(all_blocks(T2V, "transformer", "bf16"))
    rate = H100.bus_bytes_per_second * PAGEABLE
    none, ten = (denoise(resident_blocks=count) for count in (0, 10))
    assert ten - none == pytest.approx(10 * block / rate)
    rest = rest_bytes(T2V, "transformer", "bf16")
    whole = stages(T2V, JOB, replace(LEAN, offload="model"), held)["denoise"].warm
    assert whole - none == pytest.approx((part_bytes(T2V, "transformer", "bf16") - rest) / rate)


def test_the_encoder_s_file_is_read_while_the_tokenizer_is_made() -> None:
    """On Linux, from a disk, where RAM has room: the cold seconds of the longer of the two."""

    def mapped(nbytes: int) -> ModelArchitecture:
        model = with_bytes(FIVE, nbytes)
        encoder = replace(model.components["text_encoder"], weight_kind="bf16")
        return replace(model, components={**model.components, "text_encoder": encoder})

    def load(
        os: str, ram: float = 240, loaded: tuple[str, ...] = (), nbytes: int = 6 * GIB
    ) -> StageSeconds:
        system = replace(
            H100, os=os, ram_available_bytes=int(ram * GIB), loaded=loaded, done_here=()
        )
        return stages(mapped(nbytes), JOB, LEAN, system)["load text_encoder"]

    serial, beside = load("Windows"), load("Linux")
    assert beside.cold == pytest.approx(serial.cold - 1.5) and beside.warm == serial.warm
    assert load("Linux", ram=6) == load("Windows", ram=6)  # no room for it
    # Not all files stay in the system's cache: they come from the disk each time.
    few = load("Linux", ram=14)
    assert few.warm == pytest.approx(load("Windows", ram=14).warm - 1.5)
    assert load("Linux", 14, ("tokenizer",)).warm == load("Windows", 14).warm
    assert load("Linux", loaded=("text_encoder",)).warm == 0
    # A file that is read in less hides no more than what the disk takes beside the cache.
    quick, slow = load("Linux", nbytes=2 * GIB), load("Windows", nbytes=2 * GIB)
    assert 0 < slow.cold - quick.cold < 1.5 and quick.cold >= quick.warm
    assert load("Linux", nbytes=GIB // 8) == load("Windows", nbytes=GIB // 8)  # it is not mapped
    # What the system gives back counts as free, what the job locks or holds does not.
    system = replace(H100, os="Linux", done_here=(), ram_available_bytes=15 * GIB // 2)
    given_back = replace(system, ram_available_bytes=GIB // 2, ram_evictable_bytes=7 * GIB)
    for more in ({}, {"host_bytes": GIB}, {"locked_bytes": GIB}, {"mapped_bytes": GIB}):
        of = {"model": mapped(6 * GIB), "job": JOB, "choices": LEAN}
        job = (estimated("denoise", **more), estimated("decode"))
        here, there = (
            stages(**of, system=one, estimated=job)["load text_encoder"]  # type: ignore[arg-type]
            for one in (system, replace(system, os="Windows"))
        )
        again = stages(**of, system=given_back, estimated=job)["load text_encoder"]  # type: ignore[arg-type]
        assert again == here
        assert (here.cold < there.cold) == (not {"host_bytes", "locked_bytes"} & set(more))


def test_page_locks_are_taken_before_a_stage_and_given_back_after_it() -> None:
    told = (estimated("denoise", locked_bytes=10 * 10**9), estimated("text_encode"))
    plain, locked = (stages(T2V, JOB, LEAN, H100, given) for given in ((), told))
    load = locked["load transformer"].warm - plain["load transformer"].warm
    assert load == pytest.approx(10 / 2)
    assert locked["give back page locks"].warm == pytest.approx(10 / 15)
    assert "give back page locks" not in plain
    encoder = (estimated("text_encode", locked_bytes=4 * 10**9),)
    streamed = stages(T2V, JOB, LEAN, H100, encoder)
    assert streamed["text_encode"].warm - plain["text_encode"].warm == pytest.approx(4 / 2)


def test_the_second_expert_is_read_and_locked_while_the_first_computes() -> None:
    model, job = with_bytes(A14B), replace(JOB, steps=2, high_steps=1)
    choices = replace(LEAN, offload="model")
    locked = {"locked_bytes": 2 * 10**9}
    apart = stages(model, job, choices, H100, (estimated("denoise_high", **locked),))
    told = (estimated("denoise_high", ahead_bytes=1, **locked),)
    ahead = stages(model, job, choices, H100, told)
    both = apart["load transformer_2"]
    assert both.warm == pytest.approx(apart["load transformer"].warm) and both.warm > 0.5
    hidden = min(both.warm, ahead["denoise_high"].warm)
    assert ahead["load transformer_2"].warm == pytest.approx(both.warm - hidden)
    sent = part_bytes(model, "transformer_2", "bf16") / (H100.bus_bytes_per_second * PAGEABLE)
    assert ahead["denoise_low"].warm - apart["denoise_low"].warm == pytest.approx(sent)
    kept = stages(model, job, choices, replace(H100, loaded=("transformer_2",)), told)
    assert kept["denoise_low"].warm == pytest.approx(ahead["denoise_low"].warm)


def test_steps_are_shared_out_between_the_experts() -> None:
    job = replace(JOB, steps=10, high_steps=3, guidance_low=False)
    found = stages(A14B, job, LEAN, H100)
    step = timing(A14B, replace(job, guidance_high=False), LEAN, H100).step
    assert found["denoise_high"].warm == pytest.approx(3 * 2 * step)
    assert found["denoise_low"].warm == pytest.approx(7 * step)
    even = stages(A14B, replace(job, high_steps=None), LEAN, H100)
    assert even["denoise_low"].warm == pytest.approx(5 * step)


def test_an_mp4_is_hidden_behind_the_decode_but_for_the_frames_that_x264_holds_back() -> None:
    job, each = replace(JOB, to_file=True), 832 * 480 / 1.6e7
    assert mp4_seconds(JOB, 0.0) == 0
    assert mp4_seconds(job, 100.0) == pytest.approx(40 * each)
    assert mp4_seconds(job, 1.0) == pytest.approx(81 * each - 1)
    assert mp4_seconds(replace(job, num_frames=17), 100.0) == pytest.approx(17 * each)
    found = stages(T2V, job, LEAN, H100)
    assert found["mp4"].warm == pytest.approx(mp4_seconds(job, found["decode"].warm))


def test_a_cache_in_ram_is_locked_once_and_crosses_the_bus_twice_for_each_latent_frame() -> None:
    cache = lean_decode_bytes(
        VAE_21, batch=1, latent_frames=21, latent_height=60, latent_width=104, size=4,
        cache_on_host=True,
    )[1]  # fmt: skip
    moved = cache / 2e9 + 42 * cache / H100.bus_bytes_per_second
    away = replace(LEAN, cache_in_ram=True)
    there, gone = (decode_seconds(T2V, JOB, way, H100) for way in (LEAN, away))
    assert gone - there == pytest.approx(moved)
    # diffusers' own decode has none, and a CPU's is in RAM anyway.
    plain = replace(away, lean=False)
    assert decode_seconds(T2V, JOB, plain, H100) == decode_seconds(T2V, JOB, BF16, H100)
    assert decode_seconds(T2V, JOB, away, cpu(64)) == decode_seconds(T2V, JOB, BF16, cpu(64))


def test_what_is_encoded_beside_texts() -> None:
    picture, video = replace(JOB, image=True), replace(JOB, start_video=True)
    i2v, vace = architecture("wan2.1-i2v-14b"), architecture("wan2.1-vace-14b")
    assert encoded_frames(i2v, picture) == {"condition_encode": 81}  # grey where nothing is known
    assert encoded_frames(FIVE, picture) == {"condition_encode": 1}
    assert encoded_frames(FIVE, replace(picture, keyframes=3)) == {"condition_encode": 3}
    assert encoded_frames(T2V, video) == {"control_encode": 81}
    assert encoded_frames(vace, replace(JOB, references=2)) == {"control_encode": 2 * 81 + 2}
    found = stages(i2v, picture, LEAN, H100)
    names = list(found)
    assert names.index("load vae") < names.index("condition_encode") < names.index("denoise")
    share = found["condition_encode"].warm / found["decode"].warm
    assert share == pytest.approx(stage_seconds._ENCODED[False])
    assert names.count("load vae") == 1 and "image_encode" in names


def test_a_pruned_vae_is_quicker_by_its_widths() -> None:
    narrow = replace(T2V, vae=replace(VAE_21, base_dim=24, decoder_base_dim=24))
    whole, quarter = (decode_seconds(model, JOB, LEAN, H100) for model in (T2V, narrow))
    assert quarter == pytest.approx(whole / 4)


def test_the_first_time_in_a_process_and_on_a_machine() -> None:
    """Triton compiles on a machine that has made no clip; libraries are begun by each process."""
    fresh = replace(H100, done_here=())
    known = replace(fresh, calibration=Calibration(runs=1))
    names = {"encode": "text_encode", "denoise": "denoise", "decode": "decode"}
    done = stages(T2V, JOB, LEAN, H100)
    for kind, name in names.items():
        more = stages(T2V, JOB, LEAN, known)[name].warm - done[name].warm
        assert more == pytest.approx(FIRST[kind])
        compiled = stages(T2V, JOB, LEAN, fresh)[name]
        assert compiled.warm - done[name].warm == pytest.approx(FIRST[kind] + COMPILED.get(kind, 0))
        assert compiled.first == pytest.approx(compiled.warm - done[name].warm)
        assert done[name].first == 0 and done[name].cold == pytest.approx(compiled.cold)
        unfused = stages(T2V, JOB, BF16, fresh)[name].warm - stages(T2V, JOB, BF16, H100)[name].warm
        assert unfused == pytest.approx(FIRST[kind])
        assert stages(T2V, JOB, LEAN, cpu(64))[name].first == 0
    pair = stages(A14B, JOB, LEAN, fresh)
    assert pair["denoise_low"].first == 0 < pair["denoise_high"].first
    reasons = planned(with_bytes(T2V), replace(JOB, steps=1), fresh).reasons
    assert any("the first time on this machine, for its kernels" in text for text in reasons)
    reasons = planned(with_bytes(T2V), replace(JOB, steps=1), H100).reasons
    assert not any("the first time" in text for text in reasons)


# -------------------------------------------------------------------------------------- properties


def planned(
    model: ModelArchitecture, job: Workload, system: SystemResources, **wishes: Any
) -> OptimizationPlan:
    return Planner().recommend_optimizations(model, job, system, OptimizationConfig(**wishes))


@pytest.mark.parametrize("model", [T2V, A14B, FIVE])
def test_more_pixels_frames_or_bytes_never_take_less(model: ModelArchitecture) -> None:
    ways = (BF16, LEAN, replace(LEAN, cache_in_ram=True), replace(LEAN, by_rows=True))
    wider = [replace(JOB, width=width, to_file=True) for width in (320, 832, 1280)]
    longer = [replace(JOB, num_frames=frames, to_file=True) for frames in (5, 81, 121)]
    for system in (H100, gpu(8, ram=16), cpu(32)):
        for way in (*ways, replace(LEAN, dtypes={**LEAN.dtypes, "vae": "bf16"})):
            for jobs in (wider, longer):
                seconds = [timing(model, job, way, system) for job in jobs]
                for found in ([one.total for one in seconds], [one.cold for one in seconds]):
                    assert found == sorted(found)
                decodes = [decode_seconds(model, job, way, system) for job in jobs]
                assert decodes == sorted(decodes)
        few, many = (timing(with_bytes(model, n), JOB, LEAN, system) for n in (GIB, 2 * GIB))
        assert few.total < many.total and few.cold < many.cold


@pytest.mark.parametrize("vram", [8, 24, 80])
def test_a_plan_s_seconds_are_those_of_its_stages(vram: int) -> None:
    for ram in (24, 128):
        for job in (JOB, replace(JOB, to_file=True, encode_text=False, high_steps=1)):
            plan = planned(with_bytes(A14B), job, gpu(vram, ram=ram))
            assert plan.seconds == pytest.approx(sum(s.warm for s in plan.stage_seconds))
            assert plan.cold_seconds == pytest.approx(sum(s.cold for s in plan.stage_seconds))
            assert plan.cold_seconds >= plan.seconds
            first = sum(s.first for s in plan.stage_seconds)
            assert plan.first_seconds == pytest.approx(first) and first > 0
            told = plan.to_dict()["stage_seconds"]
            assert [one["name"] for one in told] == [s.name for s in plan.stage_seconds]


# ------------------------------------------------------------------------- beside what was measured

DECODES = [  # card, model, size, dtype, way, seconds; from speed_h100, speed_h200_decode, many_2_*
    ("H100", T2V, (832, 480, 81), "fp32", "diffusers", 3.56),
    ("H100", T2V, (832, 480, 81), "fp32", "quick", 2.69),
    ("H100", T2V, (832, 480, 81), "bf16", "diffusers", 2.21),
    ("H100", T2V, (832, 480, 81), "fp16", "quick", 1.36),
    ("H200", T2V, (832, 480, 81), "fp32", "lean", 2.71),
    ("H200", T2V, (832, 480, 81), "fp32", "lean", 2.49),
    ("H200", T2V, (832, 480, 81), "fp16", "lean", 1.60),
    ("H200", T2V, (832, 480, 81), "fp16", "quick", 1.13),
    ("H200", T2V, (1280, 720, 81), "fp16", "quick", 2.86),
    ("H200", FIVE, (1280, 704, 41), "fp32", "diffusers", 3.42),
    ("H200", FIVE, (1280, 704, 41), "fp32", "lean", 2.95),
    ("H200", FIVE, (1280, 704, 41), "bf16", "quick", 1.55),
    ("H200", FIVE, (1280, 704, 121), "fp16", "quick", 4.89),
    ("H200", T2V, (832, 480, 81), "fp32", "in RAM", 7.14),  # files_people_have_h200
    ("H100", T2V, (832, 480, 81), "fp32", "in RAM", 7.40),  # files_people_have_h100
    ("H100", T2V, (832, 480, 81), "bf16", "rows", 6.12),  # gpu_memory_h100
]
WAYS = {
    "diffusers": {"lean": False}, "lean": {}, "quick": {"quick": True},
    "in RAM": {"cache_in_ram": True}, "rows": {"by_rows": True},
}  # fmt: skip


@pytest.mark.parametrize("row", DECODES)
def test_decodes_take_what_they_took(row: tuple[Any, ...]) -> None:
    card, model, (width, height, frames), dtype, way, seconds = row
    job = Workload(width=width, height=height, num_frames=frames)
    choices = replace(LEAN, dtypes={**LEAN.dtypes, "vae": dtype}, **WAYS[way])
    found = decode_seconds(model, job, choices, H100 if card == "H100" else H200)
    assert 0.8 < found / seconds < 1.25, f"{found:.2f} of {seconds}"


@pytest.mark.parametrize(
    ("model", "size", "dtype", "seconds"),
    [  # two H200s, frames on the host (many_2_nvidia_h200)
        (T2V, (832, 480, 81), "fp16", 0.87), (T2V, (832, 480, 81), "fp32", 1.35),
        (T2V, (1280, 720, 81), "fp16", 1.40), (FIVE, (1280, 704, 121), "fp16", 2.43),
    ],
)  # fmt: skip
def test_strips_take_what_they_took(
    model: ModelArchitecture, size: tuple[int, int, int], dtype: str, seconds: float
) -> None:
    job = Workload(width=size[0], height=size[1], num_frames=size[2])
    choices = replace(LEAN, dtypes={**LEAN.dtypes, "vae": dtype}, quick=dtype == "fp16")
    found = strips_forecast(model, job, choices, H200, 2).seconds
    assert 0.8 < found / seconds < 1.35, f"{found:.2f} of {seconds}"


@pytest.fixture(scope="module")
def fp8_pair(tmp_path_factory: pytest.TempPathFactory) -> ModelArchitecture:
    """A14B in scaled fp8 with umT5 in scaled fp8, from headers alone, as files people have."""
    folder = tmp_path_factory.mktemp("files")
    file = layouts.stored(layouts.FILES["t2v-14b"][0], "fp8_scaled old")
    high, low = (
        layouts.write_sparse(folder / f"a_{name}_noise.safetensors", file)
        for name in ("high", "low")
    )
    text = layouts.write_sparse(folder / "umt5.safetensors", layouts.fp8_umt5())
    files = WanModelFiles(transformer=high, transformer_2=low, text_encoder=text)
    model = ArchitectureDetector().detect_model_architecture(files)
    vae = replace(A14B.components["vae"], nbytes=507_600_000)
    return replace(model, components={**model.components, "vae": vae})


TWO = replace(JOB, steps=2, high_steps=1)  # guided, one with each expert
ONE = replace(JOB, steps=1, high_steps=1, partial_steps=True, idle=("transformer_2",))
CLIP = replace(
    JOB, high_steps=2, guidance_high=False, guidance_low=False, to_file=True, return_frames=False
)  # the four steps of ``speed.py --part clip``
NEW, HELD = {"done_here": ()}, {"loaded": (*A14B.components,)}
SMALL = NEW | {"ram_available_bytes": int(14.6 * GIB)}
RUNS = [  # what, card, cap in GiB without CUDA's context, job, machine, wishes, cold, seconds
    ("8 GiB", H200, 7.2, TWO, NEW, {}, False, 39.9),
    ("24 GiB", H200, 23.2, ONE, {}, {}, False, 16.1),
    ("24 GiB, RAM 32", H200, 23.2, TWO, NEW, {}, False, 25.0),
    ("8 GiB", H100, 7.2, TWO, NEW, {}, True, 43.1),
    ("24 GiB", H100, 23.1, ONE, {}, {}, False, 15.0),
    ("12 GiB", H100, 11.1, ONE, {}, {}, False, 18.8),
    ("16 GiB", H100, 15.1, ONE, {}, {}, False, 17.2),
    ("8 GiB, RAM 16", H100, 7.2, TWO, SMALL, {}, True, 73.1),
    ("clip, exact, cold", H200, None, CLIP, NEW, {}, False, 37.6),
    ("clip, exact, warm", H200, None, replace(CLIP, encode_text=False), HELD, {}, False, 15.1),
    ("clip, fast, warm", H200, None, replace(CLIP, encode_text=False), HELD, {"speed": "fast"},
     False, 11.6),
]  # fmt: skip
"""From files_people_have_h100 and _h200, and speed_h200_clip (its latest state): whole runs."""


@pytest.mark.parametrize("row", RUNS, ids=lambda row: f"{row[0]}")
def test_runs_take_what_they_took(row: tuple[Any, ...], fp8_pair: ModelArchitecture) -> None:
    _, card, cap, job, machine, wishes, cold, seconds = row
    limit = {} if cap is None else {"vram_limit_gb": cap}
    plan = planned(fp8_pair, job, replace(card, **machine), **limit, **wishes)
    found = plan.cold_seconds if cold else plan.seconds
    assert 0.6 < found / seconds < 1.6, [(s.name, s.warm, s.cold) for s in plan.stage_seconds]
    # 0.80 to 1.25 when the rates were taken from them.
    assert 0.75 < found / seconds < 1.3


def test_stages_of_a_run_take_what_they_took(fp8_pair: ModelArchitecture) -> None:
    """The run under 8 GiB on an H200, its second expert read and locked ahead."""
    plan = planned(fp8_pair, TWO, replace(H200, **NEW), vram_limit_gb=7.2)
    took = {
        "load text_encoder": 2.0, "load transformer": 8.1, "denoise_high": 9.6, "denoise_low": 7.6,
        "load vae": 0.63, "decode": 7.1,
    }  # fmt: skip
    found = {stage.name: stage.warm for stage in plan.stage_seconds}
    for name, seconds in took.items():
        assert 0.7 < found[name] / seconds < 1.3, f"{name}: {found[name]:.2f} of {seconds}"
    assert plan.choices.cache_in_ram and plan.choices.resident_blocks == 11
