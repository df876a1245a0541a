"""Weights that real processes stream together, over gloo: the bits of weights in their place.

The quick suite has one such gang, in ``test_ulysses``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import shared_streams
from support.process_gang import in_processes

UNITS = "support.shared_streams.units"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_stored_kinds_and_loras_keep_every_bit(tmp_path: Path, size: int) -> None:
    """Gathers go on beside the exchanges of a cut forward; one unit is computed by rank 0 alone,
    and one is left by all in the middle."""
    lora = tmp_path / "lora.safetensors"
    shared_streams.write_lora(lora)
    found = in_processes(size, UNITS, str(lora), 1, 2, folder=tmp_path)
    assert [one["equal"] for one in found] == [[True] * 4] + [[True] * 3] * (size - 1)
    steady = [one["copied"][1] - one["copied"][0] for one in found]
    assert sum(steady) == shared_streams.most_bytes(1)
    assert all(one["at_once"] for one in found)
