"""Which cases of a large matrix the quick suite runs; the others are marked slow, and none is lost.

``pairs`` and ``in_turn`` give all combinations, for ``pytest.mark.parametrize``. A fault that shows
with one value, or with two together, is found without the others; what only three together would
show is what ``make test-all`` runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def pairs(*axes: Iterable[Any]) -> list[Any]:
    """All combinations; those that run quickly have every value of an axis with every other's."""
    return _chosen(axes, 2)


def in_turn(*axes: Iterable[Any]) -> list[Any]:
    """All combinations; those that run quickly have every value, the axes in step."""
    return _chosen(axes, 1)


def slow_but(kept: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """All cases; those that are not ``kept`` are marked slow."""
    quick = [(case, kept(case)) for case in cases]
    assert any(is_quick for _, is_quick in quick), "no case is left"
    return [case if is_quick else _slow(case) for case, is_quick in quick]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)


def _chosen(axes: tuple[Iterable[Any], ...], strength: int) -> list[Any]:
    lists = [list(axis) for axis in axes]
    cases = list(itertools.product(*(range(len(axis)) for axis in lists)))
    quick = _in_step([len(axis) for axis in lists]) if strength == 1 else _covering(cases)
    return [
        case if index in quick else _slow(case)
        for index, case in zip(cases, itertools.product(*lists), strict=True)
    ]


def _in_step(lengths: list[int]) -> set[tuple[int, ...]]:
    return {tuple(turn % length for length in lengths) for turn in range(max(lengths))}


def _covering(cases: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Few cases that have all pairs, by taking the one with most new pairs again and again."""

    def pairs_of(case: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs_of, cases))
    found = set()
    while missing:
        best = max(cases, key=lambda case: len(missing & pairs_of(case)))
        found.add(best)
        missing -= pairs_of(best)
    return found
