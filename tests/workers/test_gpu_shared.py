"""On two cards: weights that they stream together give the bits of weights in their place, and the
gather of a block is hidden behind the block before."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from support import shared_streams
from support.process_gang import in_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.device_count() < 2,
        reason="this machine has no two CUDA devices",
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes of one gang found in all ways in turn, and then of times: processes that
    begin, with a CUDA context each, take longer than all that they do."""
    folder = tmp_path_factory.mktemp("gang")
    lora = folder / "lora.safetensors"
    shared_streams.write_lora(lora)
    return in_processes(
        2, "support.shared_streams.units_in_turn", str(lora), shared_streams.WAYS, (5120, 9),
        folder=folder, device="cuda", patience=300,
    )  # fmt: skip


@pytest.mark.parametrize("way", shared_streams.WAYS, ids=str)
def test_stored_kinds_and_loras_keep_every_bit(
    found: list[dict[str, Any]], way: shared_streams.Way
) -> None:
    """fp8, int8, GGUF and bf16 in one model; page-locked as a whole, in part, and not at all; and
    only this process's part of what stays in its file."""
    resident, _, pinned, _ = way
    ranks = [one["ways"][shared_streams.WAYS.index(way)] for one in found]
    shared_streams.keeps_every_bit(ranks, resident)
    for one in ranks:
        whole = pinned == 1 << 40
        assert one["at_once"] == whole
        assert 0 < len(one["pinned"]) < 5 if pinned == 1 << 21 else bool(one["pinned"]) == whole


def test_copies_and_gathers_are_hidden_behind_what_computes(
    found: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of the 14B's shape, four of them, cut over two cards: the profiler's own times."""
    times = [one["hidden"] for one in found]
    with capsys.disabled():
        for rank, one in enumerate(times):
            told = ", ".join(f"{name} {value:.4g}" for name, value in one.items())
            sys.stdout.write(f"\nrank {rank}: {told}\n")
    for one in times:
        assert one["equal"]
        assert one["gathers"] >= 8 and one["gather_ms"] > 0
        # What is not hidden is the time in which nothing computes.
        assert one["gather_hidden"] > 0.9, one
        assert one["shared_ms"] < 1.15 * one["resident_ms"], one
