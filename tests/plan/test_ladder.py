"""The ladder's order: what each tier fixes, what each placement is, and the limits they meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.machines import architecture, cpu, gpu

from wan_core import OptimizationConfig, OptimizationManager
from wan_core.config import GIB
from wan_core.memory import Choices, Workload
from wan_core.memory.machine import SystemResources
from wan_core.models import ModelArchitecture
from wan_core.models.stored import StoredSize, StoredSizes
from wan_core.plan.ladder import ABILITIES, Limits, ladder, main_dtype

JOB = Workload(width=832, height=480, num_frames=81)
T2V = "wan2.2-t2v-a14b"


def tiers(
    job: Workload, system: SystemResources, found: ModelArchitecture | None = None, **wishes: object
) -> list[list[Choices]]:
    requested = OptimizationConfig.from_mapping(wishes)
    limits = Limits.of(system, requested)
    rungs = ladder(found or architecture(T2V), job, system, requested, limits, ABILITIES)
    return [[candidate.choices for candidate in candidates] for candidates in rungs]


def order(job: Workload, system: SystemResources, **wishes: object) -> list[str]:
    """Say of each tier what it changes."""
    words = []
    for candidates in tiers(job, system, **wishes):
        first = candidates[0]
        said = [f"windows {first.window_frames}"] * (first.window_frames is not None)
        said += ["fp8"] * first.fp8_storage + [first.dtypes["vae"]] + ["rows"] * first.by_rows
        assert {(c.window_frames, c.fp8_storage, c.by_rows) for c in candidates} == {
            (first.window_frames, first.fp8_storage, first.by_rows)
        }
        words.append(" ".join(said))
    return words


ROUNDINGS = ["fp32", "bf16", "bf16 rows"]


def test_what_changes_the_video_comes_last() -> None:
    assert order(JOB, gpu(24)) == ROUNDINGS + [f"fp8 {one}" for one in ROUNDINGS]
    assert order(JOB, gpu(24), fp8_storage="never") == ROUNDINGS
    assert order(JOB, gpu(24), fp8_storage="always") == [f"fp8 {one}" for one in ROUNDINGS]
    assert order(JOB, gpu(24, wasteful_half_conv3d=True), fp8_storage="never") == [
        "fp32", "fp32 rows",
    ]  # fmt: skip
    assert order(JOB, gpu(24), forward="diffusers", fp8_storage="never") == ["fp32", "bf16"]
    assert order(JOB, cpu(512)) == ["fp32", "fp32 rows"]


def test_windows_come_before_fp8_unless_they_are_shorter_than_the_models_own() -> None:
    long = replace(JOB, num_frames=161)

    def kinds(**wishes: object) -> list[str]:
        found = [text.removesuffix(" fp32") for text in order(long, gpu(24), **wishes)]
        return [text for text in found if "bf16" not in text]

    own = ["windows 81", "windows 49", "windows 33", "windows 17"]
    assert kinds() == ["fp32", *own, "fp8", *(f"{text} fp8" for text in own)]
    assert kinds(chunk_size=13) == ["fp32", "fp8", "windows 49", "windows 49 fp8"]
    assert kinds(chunk_size=0) == ["fp32", "fp8"]


def stored(quantised: bool) -> ModelArchitecture:
    """A14B as its files hold it: one byte a weight, or two."""
    found = architecture(T2V)
    block = StoredSize(kept=350_000_000) if quantised else StoredSize(half=350_000_000)
    sizes = StoredSizes(
        blocks=(block,) * 40, rest=StoredSize(wide=100_000_000), tables=StoredSize(),
        largest=5120 * 13824 if quantised else 0,
    )  # fmt: skip
    experts = {
        name: replace(
            found.components[name], stored=sizes, nbytes=15 * GIB, format="safetensors",
            weight_kind="fp8_scaled" if quantised else "bf16",
        )
        for name in ("transformer", "transformer_2")
    }  # fmt: skip
    return replace(found, components={**found.components, **experts})


def test_what_is_quantised_is_not_stored_in_fp8() -> None:
    for quantised in (True, False):
        rungs = tiers(JOB, gpu(24), stored(quantised))
        assert any(choices.fp8_storage for rung in rungs for choices in rung) is not quantised


def test_limits_are_what_is_free_or_can_be_freed() -> None:
    system = gpu(24, ram=64, device_free_bytes=10 * GIB)
    system = replace(system, evictable_bytes=4 * GIB, ram_evictable_bytes=8 * GIB)
    free = Limits.of(system, OptimizationConfig())
    assert (free.device, free.ram) == (int(14 * GIB * 0.97), 71 * GIB)
    assert free.why == "" and not free.shared
    capped = Limits.of(system, OptimizationConfig(vram_limit_gb=8, ram_limit_gb=30.5))
    assert (capped.device, capped.ram) == (8 * GIB, int(30.5 * GIB))
    assert capped.why == " (ram_limit_gb is 30.5, vram_limit_gb is 8)"
    ample = Limits.of(system, OptimizationConfig(vram_limit_gb=80, ram_limit_gb=300))
    assert (ample.device, ample.ram) == (free.device, free.ram)
    assert Limits.of(cpu(64), OptimizationConfig()).device == 63 * GIB
    assert Limits.of(gpu(8, ram=0.5), OptimizationConfig()).ram == 0
    failed = replace(free, stages=(("decode", 3 * GIB), ("denoise", 99 * GIB)))
    assert [failed.of_stage(name) for name in ("decode", "denoise", "output")] == [
        3 * GIB, free.device, free.device,
    ]  # fmt: skip


def test_resident_blocks_that_were_asked_for_and_no_more_than_there_are() -> None:
    for asked, kept in ((0, 0), (7, 7), (40, 40), (99, 40)):
        (single,) = {
            c.resident_blocks for r in tiers(JOB, gpu(80), resident_blocks=asked) for c in r
        }
        assert single == kept
    buffers = {c.stream_buffers for rung in tiers(JOB, gpu(80), resident_blocks=7) for c in rung}
    assert buffers == {2}


def test_a_plan_says_in_words_what_it_does() -> None:
    plan = OptimizationManager().recommend_optimizations(architecture(T2V), JOB, gpu(12))
    two, one = (plan.with_choices(stream_buffers=n) for n in (2, 1))
    assert "one at a time" in one.applied and "one at a time" not in two.applied
    assert plan.blocks_and_buffers("transformer") == (plan.resident_blocks, 2)
    assert one.blocks_and_buffers("transformer_2") == (plan.resident_blocks, 1)
    assert one.blocks_and_buffers("text_encoder") == (0, 2)
    assert (
        "windows of 49 frames, 8 shared"
        in plan.with_choices(window_frames=49, window_overlap=8).applied
    )
    assert plan.with_choices(resident_blocks=None).blocks_and_buffers("transformer") == (0, 2)
    for name, word in (
        ("by_rows", "products by rows"), ("cache_in_ram", "VAE's cache in RAM"),
        ("fp8_storage", "fp8 storage"), ("lean", "lean forward"),
    ):  # fmt: skip
        assert (word in plan.with_choices(**{name: True}).applied) is True
        assert (word in plan.with_choices(**{name: False}).applied) is False


@pytest.mark.parametrize(
    ("wish", "kind", "system", "dtype"),
    [
        ("stored", "fp16", gpu(24), "fp16"),
        ("stored", "fp8_scaled", gpu(24), "bf16"),
        ("fp32", "fp16", gpu(24), "fp32"),
        ("auto", "fp16", gpu(24), "fp16"),
        ("auto", "fp16", gpu(24, supports_fp16=False), "bf16"),
        ("auto", "fp32", gpu(24), "bf16"),
        ("auto", "bf16", gpu(24, supports_bf16=False), "fp16"),
        ("auto", "fp32", cpu(4), "fp32"),
        ("auto", "bf16", cpu(8), "bf16"),
        ("auto", "bf16", cpu(512), "fp32"),
    ],
)
def test_the_transformers_dtype(wish: str, kind: str, system: SystemResources, dtype: str) -> None:
    requested = OptimizationConfig(precision=wish)
    found = architecture("wan2.1-t2v-14b", weight_kind=kind)
    limits = Limits.of(system, requested)
    chosen, why = main_dtype(found, JOB, system, requested, limits)
    assert chosen == dtype and why.startswith(f"precision {dtype}")


def test_the_text_encoder_is_never_in_fp16() -> None:
    for rung in tiers(JOB, gpu(24), architecture(T2V, weight_kind="fp16")):
        for choices in rung:
            assert choices.dtypes["transformer"] == choices.dtypes["transformer_2"] == "fp16"
            assert choices.dtypes["text_encoder"] == "bf16"
            assert choices.dtypes["image_encoder"] == "fp32"
