"""On two cards: weights that they stream together give the bits of weights in their place, and the
gather of a block is hidden behind the block before."""

from __future__ import annotations

import sys
from pathlib import Path
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


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(
    ("resident", "buffers", "pinned"),
    [(0, 2, 1 << 40), (1, 3, 1 << 40), (0, 1, 1 << 40), (0, 2, 0), (0, 2, 1 << 21)],
)
def test_stored_kinds_and_loras_keep_every_bit(
    tmp_path: Path, resident: int, buffers: int, pinned: int, in_file: bool
) -> None:
    """fp8, int8, GGUF and bf16 in one model; page-locked as a whole, in part, and not at all; and
    only this process's part of what stays in its file."""
    lora = tmp_path / "lora.safetensors"
    shared_streams.write_lora(lora)
    given = (str(lora), resident, buffers, pinned, in_file)
    found = in_processes(2, "support.shared_streams.units", *given, folder=tmp_path, device="cuda")
    assert [one["equal"] for one in found] == [[True] * 4, [True] * 3]
    steady = [one["copied"][1] - one["copied"][0] for one in found]
    assert sum(steady) == shared_streams.most_bytes(resident)
    for one in found:
        whole = pinned == 1 << 40
        assert one["at_once"] == whole
        assert 0 < len(one["pinned"]) < 5 if pinned == 1 << 21 else bool(one["pinned"]) == whole


def test_copies_and_gathers_are_hidden_behind_what_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of the 14B's shape, four of them, cut over two cards: the profiler's own times."""
    work = "support.shared_streams.hidden"
    found: list[dict[str, Any]] = in_processes(
        2, work, 5120, 9, folder=tmp_path, device="cuda", patience=300
    )
    with capsys.disabled():
        for rank, one in enumerate(found):
            told = ", ".join(f"{name} {value:.4g}" for name, value in one.items())
            sys.stdout.write(f"\nrank {rank}: {told}\n")
    for one in found:
        assert one["equal"]
        assert one["gathers"] >= 8 and one["gather_ms"] > 0
        # What is not hidden is the time in which nothing computes.
        assert one["gather_hidden"] > 0.9, one
        assert one["shared_ms"] < 1.15 * one["resident_ms"], one
