"""No value of a matrix, and of pairs no pair, is left to the slow tests."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.cases import in_turn, pairs, slow_but

AXES = ("abcd", "xyz", (1, 2, 3, 4, 5, 6))


def quick(cases: list[Any]) -> list[tuple[Any, ...]]:
    return [case for case in cases if isinstance(case, tuple) and not hasattr(case, "marks")]


def values(cases: list[Any]) -> list[tuple[Any, ...]]:
    return [tuple(getattr(case, "values", case)) for case in cases]


@pytest.mark.parametrize("choose", [pairs, in_turn])
def test_no_combination_is_lost(choose: Any) -> None:
    assert values(choose(*AXES)) == list(itertools.product(*AXES))


def test_pairs_have_all_pairs_and_are_few() -> None:
    found = quick(pairs(*AXES))
    for a, b in itertools.combinations(range(3), 2):
        assert {(case[a], case[b]) for case in found} == set(itertools.product(AXES[a], AXES[b]))
    assert 24 <= len(found) <= 30


def test_in_turn_has_every_value_and_no_more() -> None:
    found = quick(in_turn(*AXES))
    assert len(found) == 6
    assert all({case[axis] for case in found} == set(AXES[axis]) for axis in range(3))


def test_what_is_not_kept_is_slow() -> None:
    found = slow_but(lambda case: case == "b", "abc")
    assert found[1] == "b" and all(case.marks for case in (found[0], found[2]))
    with pytest.raises(AssertionError, match="no case is left"):
        slow_but(lambda case: False, "abc")
