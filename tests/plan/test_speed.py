"""What ``speed`` changes in a plan, and what the plan says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.machines import architecture, cpu, gpu
from wan_core.config import SPEEDS
from wan_core.errors import InvalidRequest
from wan_core.memory import SENDING, AttentionTimes, Choices
from wan_core.memory.process import FIRST
from wan_core.plan import OptimizationConfig, speed

from .test_manager import P480, SMALL, T2V, recommend

VACE = "wan2.1-vace-14b"
ALL = ("lean", "rows", "stream", "fp8")


def said(plan: object) -> list[str]:
    """Return the reasons that speak of the speed."""
    reasons: Any = plan.reasons  # type: ignore[attr-defined]
    return [one for one in reasons if one.startswith("speed ") and ": without " not in one]


def missed(plan: object) -> str:
    """Return the reason that says what did not help."""
    reasons: Any = plan.reasons  # type: ignore[attr-defined]
    return "".join(one for one in reasons if ": without " in one)


class Installed:
    """What is installed as far as a plan can see: modules, Triton's files, a C compiler."""

    def __init__(self, place: Path) -> None:
        self.place = place / "triton"
        self.modules = {"triton"}
        self.compiler: str | None = "/usr/bin/gcc"
        (self.place / "tools").mkdir(parents=True)
        for part in speed._TRITON_PARTS:
            (self.place / part).touch()

    def find_spec(self, name: str) -> Any:
        places = [str(self.place)] if name == "triton" else []
        return SimpleNamespace(submodule_search_locations=places) if name in self.modules else None

    def which(self, name: str) -> str | None:
        return self.compiler if name == "gcc" else None


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installed:
    """What is installed where the tests run does not change a plan here: it has Triton alone."""
    found = Installed(tmp_path)
    monkeypatch.setattr(speed, "find_spec", found.find_spec)
    monkeypatch.setattr(speed, "which", found.which)
    monkeypatch.delenv("CC", raising=False)
    kept = AttentionTimes(tmp_path / "times.json")
    monkeypatch.setattr(speed, "AttentionTimes", lambda: kept)
    return found


@pytest.mark.parametrize("name", [T2V, SMALL])
@pytest.mark.parametrize("size", [8, 24, 80])
def test_exact_is_the_default_and_changes_no_plan(name: str, size: int) -> None:
    """A plan with the word equals one without, to its reasons."""
    plain = recommend(name, P480, gpu(size), ALL)
    assert recommend(name, P480, gpu(size), ALL, speed="exact") == plain
    assert said(plain) == []


def test_fast_rounds_the_decode_and_says_what_it_saves() -> None:
    """The VAE in the transformer's dtype, in a tier above 0, with the seconds of both decodes."""
    exact = recommend(T2V, P480, gpu(80), ALL)
    fast = recommend(T2V, P480, gpu(80), ALL, speed="fast")
    assert (exact.dtypes["vae"], exact.tier) == ("fp32", 0)
    assert (fast.dtypes["vae"], fast.tier) == ("bf16", 1)
    assert fast.seconds < exact.seconds
    half, kernels = said(fast)
    assert half.startswith("speed fast: vae in bf16: decode ")
    assert kernels.startswith("speed fast: fastest kernels: decode ")
    slow, narrow, same, quick = (
        float(text.split()[0])
        for reason in (half, kernels)
        for text in reason.split("decode ")[1].split(" -> ")
    )
    assert quick < narrow == same < slow
    assert exact.seconds - fast.seconds == pytest.approx(slow - quick, abs=0.11)
    assert "vae bf16: for speed, as asked for; changes rounding only" in fast.reasons
    assert fast.choices == replace(exact.choices, dtypes=fast.choices.dtypes, quick=True)
    assert "fastest kernels" in fast.applied and "fastest kernels" not in exact.applied


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (VACE, {}, "VACE's hints are added between them"),
        ("wan2.1-fun-inp-1.3b", {"image": True}, "no curve of MagCache is published for"),
        (SMALL, {"partial_steps": True}, "this job makes a part"),
        (SMALL, {"moving_windows": True}, "none has a step before it"),
        (SMALL, {}, None),
    ],
)
def test_where_magcache_has_no_place(name: str, change: dict[str, Any], why: str | None) -> None:
    job = replace(P480, steps=50, **change)
    wishes = {"speed": "fastest", "step_cache": "magcache"}
    if why is None:
        assert recommend(name, job, gpu(80), ALL, **wishes).magcache
        return
    with pytest.raises(InvalidRequest, match=why) as caught:
        recommend(name, job, gpu(80), ALL, **wishes)
    assert caught.value.field == "step_cache"


def test_where_nothing_helps_the_plan_says_so() -> None:
    """On a CPU the choices are those of exact, on a card whose decode would be slower its dtype."""
    exact, fast = (recommend(SMALL, P480, cpu(64), ALL, speed=word) for word in SPEEDS[:2])
    assert (fast.choices, fast.tier) == (exact.choices, exact.tier)
    (reason,) = said(fast)
    assert reason.startswith("speed fast: the same as exact here (")
    for why in (
        "a CPU is not faster",
        "a CPU has none to choose from",
        "not stored in fp8 or int8",
    ):
        assert why in reason
    wasteful = recommend(
        SMALL, P480, replace(gpu(80), wasteful_half_conv3d=True), ALL, speed="fast"
    )
    assert wasteful.dtypes["vae"] == "fp32" and wasteful.quick
    plain = recommend(SMALL, P480, gpu(80), ALL, speed="fast", forward="diffusers")
    assert not plain.quick and not plain.eight_bit


@pytest.mark.parametrize(
    ("stored", "capability", "used"),
    [
        ("fp8 scaled per tensor", (9, 0), True),
        ("fp8", (8, 9), True),
        ("fp8", (8, 6), False),
        ("fp8 e5m2", (9, 0), False),
        ("int8 scaled per row, rotated by 256", (8, 6), True),
        ("GGUF Q4_K", (9, 0), False),
        ("bf16", (9, 0), False),
        ("bf16 asked for in fp8", (9, 0), True),
        ("bf16 asked for in fp8", (8, 6), False),
        ("GGUF Q4_K asked for in fp8", (9, 0), False),
    ],
)
def test_products_of_what_is_stored_in_8_bit(
    stored: str, capability: tuple[int, int], used: bool
) -> None:
    stored, _, wish = stored.partition(" asked for")
    found = architecture(T2V)
    component = replace(found.components["transformer"], stored_as=stored)
    pair = {"transformer": component, "transformer_2": component}
    found = replace(found, components={**found.components, **pair})
    requested = OptimizationConfig(speed="fast", fp8_storage="always" if wish else "auto")
    situation = speed.Situation(
        architecture=found, workload=P480, requested=requested,
        system=replace(gpu(80), compute_capability=capability), abilities=frozenset(ALL),
    )  # fmt: skip
    chosen = speed._eight_bit(situation, Choices(dtypes={"transformer": "bf16"}))
    assert isinstance(chosen, Choices) is used
    assert isinstance(speed._eight_bit(situation, Choices(dtypes={"transformer": "fp32"})), str)
    if isinstance(chosen, Choices):
        assert chosen.eight_bit
        text = speed._eight_bit_says(situation, Choices(dtypes={"transformer": "bf16"}), chosen)
        assert "s a step" in text and "changes the result" in text


@pytest.mark.parametrize(
    ("high", "low", "where"),
    [
        ("fp8", "int8 scaled per row", "feed-forward:"),
        ("fp8", "GGUF Q8_0", "feed-forward of the high-noise expert alone:"),
        ("bf16", "fp8 scaled per tensor", "feed-forward of the low-noise expert alone:"),
        ("bf16", "GGUF Q8_0", None),
    ],
)
def test_a_pair_needs_one_expert_that_is_stored_in_8_bit(
    high: str, low: str, where: str | None
) -> None:
    found = architecture(T2V)
    parts = {
        name: replace(found.components["transformer"], stored_as=stored)
        for name, stored in (("transformer", high), ("transformer_2", low))
    }
    situation = speed.Situation(
        architecture=replace(found, components={**found.components, **parts}), workload=P480,
        requested=OptimizationConfig(speed="fast"), abilities=frozenset(ALL),
        system=replace(gpu(80), compute_capability=(9, 0)),
    )  # fmt: skip
    before = Choices(dtypes={"transformer": "bf16"})
    chosen = speed._eight_bit(situation, before)
    if where is None:
        assert isinstance(chosen, str) and "not stored in fp8 or int8" in chosen
        return
    assert isinstance(chosen, Choices) and chosen.eight_bit
    assert f"products in 8 bit in attention and {where} " in speed._eight_bit_says(
        situation, before, chosen
    )


def test_an_ingredient_counts_from_its_speed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that belongs to fastest is not taken by fast; both get their sentence."""

    def rows(_: speed.Situation, choices: Choices) -> Choices:
        return replace(choices, lean=True, by_rows=True)

    more = speed.Ingredient(
        name="rows", speed="fastest", choose=rows, describe=lambda *_: "cut by rows"
    )
    monkeypatch.setattr(speed, "INGREDIENTS", (*speed.INGREDIENTS, more))
    plans = {word: recommend(T2V, P480, gpu(80), ALL, speed=word) for word in SPEEDS}
    assert [plans[word].by_rows for word in SPEEDS] == [False, False, True]
    assert [len(said(plans[word])) for word in SPEEDS] == [0, 2, 6]
    assert said(plans["fastest"])[-1] == "speed fastest: cut by rows"


@pytest.mark.parametrize("word", ["quick", "", 1])
def test_a_word_that_is_none(word: object) -> None:
    """The error names the field and what is allowed."""
    with pytest.raises(InvalidRequest, match="speed is .*; allowed is one of exact, fast, fastest"):
        OptimizationConfig.from_mapping({"speed": word})


MANY, FEW = replace(P480, steps=40), replace(P480, steps=8)


def test_fastest_leaves_forwards_out_and_says_how_many(installed: Installed) -> None:
    """The gate counts in the seconds; what EasyCache saves depends on the clip, and does not."""
    installed.modules = set()
    fast = recommend(T2V, MANY, gpu(80), ALL, speed="fast")
    fastest = recommend(T2V, MANY, gpu(80), ALL, speed="fastest")
    assert (fastest.easycache, fastest.guidance_gate) == (0.05, 0.5)
    assert (fast.easycache, fast.guidance_gate) == (0.0, 1.0)
    assert fastest.step_seconds == pytest.approx(0.75 * fast.step_seconds)
    cache, gate = said(fastest)[-2:]
    assert "of 40 steps 9 or more are computed" in cache
    assert "about 60 of 80 forwards" in gate
    assert {"EasyCache 0.05", "guidance gate 0.5"} <= set(fastest.applied)


def test_by_name_whatever_the_speed() -> None:
    plan = recommend(T2V, MANY, gpu(80), ALL, step_cache="easycache", step_cache_threshold=0.2)
    assert (plan.easycache, plan.guidance_gate, plan.tier) == (0.2, 1.0, 1)
    assert plan.dtypes["vae"] == "fp32"
    assert any(text.startswith("asked for: EasyCache, threshold 0.2") for text in plan.reasons)
    plan = recommend(SMALL, MANY, cpu(64), ALL, guidance_gate=0.3)
    assert (plan.easycache, plan.guidance_gate) == (0.0, 0.3)
    never = recommend(T2V, MANY, gpu(80), ALL, speed="fastest", step_cache="never", guidance_gate=1)
    assert (never.easycache, never.guidance_gate) == (0.0, 1.0)
    exact = recommend(T2V, MANY, gpu(80), ALL, step_cache_threshold=0.2, guidance_gate=1)
    assert exact.choices == recommend(T2V, MANY, gpu(80), ALL).choices


REFUSED = [
    (FEW, {"step_cache": "easycache"}, "step_cache", "the job has 8 steps"),
    (FEW, {"guidance_gate": 0.5}, "guidance_gate", "the job has 8 steps"),
    (replace(MANY, moving_windows=True), {"step_cache": "easycache"}, "step_cache", "windows move"),
    (replace(MANY, moving_windows=True), {"guidance_gate": 0.5}, "guidance_gate", "windows move"),
    (
        replace(MANY, guidance_high=False, guidance_low=False),
        {"guidance_gate": 0.5}, "guidance_gate", "there is no guidance",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("job", "asked", "field", "why"), REFUSED)
def test_what_makes_no_sense_is_refused_by_name_and_left_out_by_speed(
    job: Any, asked: dict[str, Any], field: str, why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        recommend(T2V, job, gpu(80), ALL, **asked)
    assert caught.value.field == field
    plan = recommend(T2V, job, gpu(80), ALL, speed="fastest")
    assert not getattr(plan, "easycache" if field == "step_cache" else "guidance_gate") % 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_cache", "teacache"), ("step_cache_threshold", -0.1),
        ("step_cache_threshold", 1.5), ("step_cache_threshold", "a"), ("guidance_gate", 0),
        ("guidance_gate", 1.2), ("guidance_gate", float("nan")), ("guidance_gate", True),
    ],
)  # fmt: skip
def test_values_out_of_range(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is .*; allowed is") as caught:
        OptimizationConfig.from_mapping({field: value})
    assert caught.value.field == field


def test_magcache_is_planned_by_its_curve() -> None:
    """The reason counts the passes, the seconds follow it, and RAM and card are counted."""
    plain = recommend(T2V, MANY, gpu(80), ALL)
    job = replace(MANY, high_steps=15)
    plan = recommend(T2V, job, gpu(80), ALL, step_cache="magcache")
    (reason,) = [text for text in plan.reasons if text.startswith("asked for: MagCache, factor")]
    assert "computed in 52 of 80 passes" in reason and "MagCache 1.5" in plan.applied
    assert plan.step_seconds == pytest.approx(plain.step_seconds * 52 / 80)
    hidden = 21 * 30 * 52 * 5120 * 2
    before, after = (
        next(s for s in one.estimate.stages if s.name == "denoise_high") for one in (plain, plan)
    )
    assert after.device_bytes - before.device_bytes == hidden
    # They come where weights were sent through before.
    assert after.host_bytes - before.host_bytes == (2 * hidden - (SENDING - FIRST["denoise"]))
    with pytest.raises(InvalidRequest, match="no curve of MagCache is published for wan2.1-flf2v"):
        recommend("wan2.1-flf2v-14b", MANY, gpu(80), ALL, step_cache="magcache")
    for bad in (0.5, 5, "a"):
        with pytest.raises(InvalidRequest, match="step_cache_factor is .*; allowed is"):
            OptimizationConfig.from_mapping({"step_cache_factor": bad})


def test_attention_in_8_bit_is_for_fastest_where_it_is_installed(installed: Installed) -> None:
    installed.modules = set()
    plan = recommend(T2V, MANY, gpu(80), ALL, speed="fastest")
    assert not plan.choices.attention_8bit
    assert "attention in 8 bit: WanFit's kernel: Triton is not installed; comfy-" in missed(plan)
    old = gpu(80, compute_capability=(7, 5))
    for module, card, name in (
        ("triton", old, None), ("triton", gpu(80, backend="rocm"), None),
        ("triton", gpu(80), "WanFit's kernel"), ("comfy_kitchen", old, "comfy-kitchen"),
    ):  # fmt: skip
        installed.modules = {module}
        plan = recommend(T2V, MANY, card, ALL, speed="fastest")
        assert plan.choices.attention_8bit == (name is not None)
        texts = [one for one in said(plan) if "fastest: attention in 8 bit by" in one]
        assert len(texts) == (name is not None)
        for text in texts:
            assert f"by {name}: " in text and "changes the video" in text
            assert "attention in 8 bit where faster" in plan.applied
    assert not recommend(T2V, MANY, gpu(80), ALL, speed="fast").choices.attention_8bit
    plain = recommend(T2V, MANY, gpu(80), ALL, speed="fastest", forward="diffusers")
    assert not plain.choices.attention_8bit


def test_no_kernel_is_promised_that_cannot_be_compiled(installed: Installed) -> None:
    """Triton's files and a compiler are looked for; products and the VAE's norms need them too."""

    def plan() -> Any:
        return recommend("wan2.1-t2v-14b", MANY, gpu(80), ALL, speed="fastest")

    assert plan().choices.attention_8bit and "norms of the VAE" not in " ".join(said(plan()))
    installed.compiler = None
    assert not plan().choices.attention_8bit
    assert "Triton finds no C compiler" in missed(plan())
    assert "norms of the VAE take longer, as Triton finds no C" in " ".join(said(plan()))
    installed.compiler = "/usr/bin/gcc"
    (installed.place / "tools" / "tensor_descriptor.py").unlink()
    assert not plan().choices.attention_8bit
    assert "the installed Triton is older than 3.4" in missed(plan())
    assert "norms of the VAE" not in " ".join(said(plan()))


@pytest.mark.parametrize(
    ("times", "where", "used", "why"),
    [
        ({"int8, values in fp8": 20.0}, "int8, values in fp8", True, "int8, values in fp8, measur"),
        ({}, "int8, values in fp8", False, "it did not run or was too far from torch's"),
        ({"int8, values in fp16": 60.0}, "int8, values in fp8", False, "torch's choice was the"),
        ({}, "cuDNN 9", True, "WanFit's kernel"),
    ],
)  # fmt: skip
def test_what_kernels_did_here_before_counts(
    times: dict[str, float], where: str, used: bool, why: str
) -> None:
    """Times that were taken without a kernel say nothing of it."""
    machine = gpu(80)
    name = f"{machine.device_name}, {machine.backend}, torch {machine.torch_version}"
    shape = "1 x 32760 x 32760 tokens, 40 heads of 128, 8 or 16 bit"
    speed.AttentionTimes().keep(name, where, shape, {"torch's choice": 37.0, **times})
    plan = recommend(T2V, MANY, machine, ALL, speed="fastest")
    assert plan.choices.attention_8bit is used
    assert why in (" ".join(said(plan)) if used else missed(plan))


def test_what_was_timed_on_this_machine_is_shown() -> None:
    kept = speed.AttentionTimes()
    machine = gpu(80)
    assert "attention by the clock" in " ".join(
        recommend(T2V, P480, machine, ALL, speed="fast").reasons
    )
    name = f"{machine.device_name}, {machine.backend}, torch {machine.torch_version}"
    shape = "1 x 32760 x 32760 tokens, 40 heads of 128, bfloat16"
    kept.keep(name, "cuDNN 9", shape, {"torch's choice": 58.9, "cuDNN": 37.04})
    text = " ".join(recommend(T2V, P480, machine, ALL, speed="fast").reasons)
    assert "attention cuDNN, measured here: torch's choice 58.9 ms, cuDNN 37.0 ms" in text


def test_the_vae_in_fp16_where_it_is_nearer() -> None:
    """Not where its norms would compute in fp16 too; both VAEs, whether it encodes or not."""
    able = (*ALL, "wide norms")
    assert recommend(T2V, P480, gpu(80), ALL, speed="fast").dtypes["vae"] == "bf16"
    assert recommend(T2V, P480, gpu(80), able).dtypes["vae"] == "fp32"
    image, video = replace(P480, image=True), replace(P480, start_video=True)
    for name, job in (
        (T2V, P480), (T2V, video), (VACE, video), ("wan2.2-i2v-a14b", image),
        ("wan2.2-ti2v-5b", image), ("wan2.2-ti2v-5b", P480),
    ):  # fmt: skip
        assert recommend(name, job, gpu(80), able, speed="fast").dtypes["vae"] == "fp16", name


@pytest.mark.parametrize(("high", "least"), [(None, 9), (10, 3 + 7), (0, 9), (39, 9 + 1)])
def test_easycache_computes_the_first_and_the_last_steps_of_each_expert(
    high: int | None, least: int
) -> None:
    job = replace(MANY, high_steps=high)
    plan = recommend("wan2.2-t2v-a14b", job, gpu(80), ALL, speed="fastest")
    assert f"of 40 steps {least} or more are computed" in " ".join(said(plan))
