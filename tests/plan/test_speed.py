"""What ``speed`` changes in a plan, and what the plan says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.machines import cpu, gpu
from wan_core.errors import InvalidRequest
from wan_core.memory import Choices
from wan_core.plan import SPEEDS, OptimizationConfig, speed

from .test_manager import P480, SMALL, T2V, recommend

ALL = ("lean", "rows", "stream", "fp8")


def said(plan: object) -> list[str]:
    """Return the reasons that speak of the speed."""
    return [text for text in plan.reasons if text.startswith("speed ")]  # type: ignore[attr-defined]


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
    (reason,) = said(fast)
    assert reason.startswith("speed fast: vae in bf16: decode ")
    slow, quick = (float(text.split()[0]) for text in reason.split("decode ")[1].split(" -> "))
    assert quick < slow and exact.seconds - fast.seconds == pytest.approx(slow - quick, abs=0.11)
    assert "vae bf16: for speed, as asked for; changes rounding only" in fast.reasons
    assert fast.choices == replace(exact.choices, dtypes=fast.choices.dtypes)


def test_where_nothing_helps_the_plan_says_so() -> None:
    """On a CPU, and on a card whose decode would be slower, the choices are those of exact."""
    wasteful = replace(gpu(80), wasteful_half_conv3d=True)
    for system, why in ((cpu(64), "a CPU is not faster"), (wasteful, "many times the memory")):
        exact = recommend(SMALL, P480, system, ALL)
        fast = recommend(SMALL, P480, system, ALL, speed="fast")
        assert (fast.choices, fast.tier) == (exact.choices, exact.tier)
        (reason,) = said(fast)
        assert reason.startswith("speed fast: the same as exact here (") and why in reason


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
    assert [len(said(plans[word])) for word in SPEEDS] == [0, 1, 2]
    assert said(plans["fastest"])[1] == "speed fastest: cut by rows"


@pytest.mark.parametrize("word", ["quick", "", None, 1])
def test_a_word_that_is_none(word: object) -> None:
    """The error names the field and what is allowed."""
    with pytest.raises(InvalidRequest, match="speed is .*; allowed is one of exact, fast, fastest"):
        OptimizationConfig.from_mapping({"speed": word})
