"""Trials: once, or again in later renders where memory was short, and then it is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from wan_core.kernels import trials
from wan_core.kernels.trials import TRIES, Trials, begin_trials, trials_of_a_render

SHORT = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
]


class Attempt:
    """Raises what it is given in turn, or returns it; the last for ever."""

    def __init__(self, *outcomes: Exception | bool) -> None:
        self.outcomes, self.made = outcomes, 0

    def __call__(self) -> bool:
        outcome = self.outcomes[min(self.made, len(self.outcomes) - 1)]
        self.made += 1
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_renders", trials._Renders())


def render(work: Callable[[], object]) -> list[str]:
    """Do some work in a render; return its warnings."""
    warnings: list[str] = []
    with trials_of_a_render(warnings):
        work()
    return warnings


@pytest.mark.parametrize("outcome", [True, False, RuntimeError("no C compiler")])
def test_what_was_found_is_kept(outcome: Any, caplog: pytest.LogCaptureFixture) -> None:
    kernel, attempt = Trials("a kernel"), Attempt(outcome, True)
    with caplog.at_level("INFO"):
        for _ in range(3):
            assert render(lambda: kernel.of("key", attempt)) == []
            assert kernel.of("key", attempt) is (outcome is True)
    assert attempt.made == 1
    assert kernel.of("another", Attempt(True))
    assert ("Could not try a kernel: no C compiler" in caplog.text) is (
        outcome not in (True, False)
    )


@pytest.mark.parametrize("lack", SHORT)
def test_a_lack_of_memory_is_over_in_the_next_render(lack: Exception) -> None:
    kernel, attempt = Trials("a kernel"), Attempt(lack, True)

    def work() -> None:
        for _ in range(5):
            kernel.of("key", attempt)

    (said,) = render(work)
    assert attempt.made == 1, "not again within a render"
    assert "too little memory to try a kernel" in said and "next render" in said
    assert render(work) == []
    assert attempt.made == 2
    assert kernel.of("key", attempt)


def test_it_is_tried_in_so_many_renders() -> None:
    kernel, attempt = Trials("a kernel"), Attempt(SHORT[0])
    said = [render(lambda: [kernel.of(key, attempt) for key in "ab"]) for _ in range(TRIES + 2)]
    assert attempt.made == 2 * TRIES
    assert ["next render" in " ".join(one) for one in said] == [True] * (TRIES - 1) + [False] * 3
    assert [len(one) for one in said] == [1] * TRIES + [0, 0], "once, however many lacked it"
    assert f"After {TRIES} renders" in said[TRIES - 1][0]


def test_after_too_little_memory_a_failure_is_final() -> None:
    kernel, attempt = Trials("a kernel"), Attempt(SHORT[0], RuntimeError("no C compiler"), True)
    for _ in range(4):
        begin_trials()
        assert not kernel.of("key", attempt)
    assert attempt.made == 2


def test_a_failed_trial_s_tensors_are_freed() -> None:
    import weakref

    held: list[Any] = []

    def attempt() -> bool:
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    Trials("a kernel").of("key", attempt)
    assert held[0]() is None, "without waiting for the garbage collector"


def test_an_interrupt_is_no_result() -> None:
    kernel = Trials("a kernel")

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernel.of("key", interrupted)
    assert kernel.of("key", lambda: True)
