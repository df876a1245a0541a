"""Reading weights is followed: how far it is, and an interrupt within a fraction of a second."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.crashes import Crash
from support.tiny_models import make_transformer
from torch import nn

from wan_core.errors import CorruptFile
from wan_core.formats import read_table
from wan_core.loading import load_component, mapped
from wan_core.loading.reader import TensorReader
from wan_core.models import Source

PIECE = 4 * 2**20
Told = list[tuple[int, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of 27 MB, the largest matrix 8 MB."""
    model = make_transformer(
        "wan2.1-t2v", num_attention_heads=4, attention_head_dim=128, ffn_dim=4096, num_layers=1
    )
    folder = tmp_path_factory.mktemp("transformer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is told, however fast it is read."""
    monkeypatch.setattr(mapped, "_TOLD_SECONDS", 0.0)


class Counting(io.FileIO):
    """A file that notes how much is read at once, and may be slow."""

    largest = 0
    seconds_per_byte = 0.0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        Counting.largest = max(Counting.largest, count)
        time.sleep(count * Counting.seconds_per_byte)
        return count


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(Counting, "largest", 0)
    monkeypatch.setattr(io, "FileIO", Counting)
    return Counting


def loaded(folder: Path, told: Told, **options: Any) -> nn.Module:
    return load_component(folder, progress=lambda *amount: told.append(amount), **options)


def nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"map_file": True, "align": False}],
    ids=["read", "converted", "mapped"],
)
def test_every_byte_is_told_once_and_in_small_pieces(
    folder: Path, disk: type[Counting], options: dict[str, Any]
) -> None:
    told: Told = []
    model = loaded(folder, told, **options)
    total = nbytes(model) if "dtype" not in options else nbytes(load_component(folder))
    done = [amount for amount, _ in told]
    assert {whole for _, whole in told} == {total}
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)
    assert max(b - a for a, b in zip(done, done[1:], strict=False)) <= PIECE
    assert disk.largest <= PIECE


def test_a_slow_disk_is_told_of_and_can_be_interrupted(folder: Path, disk: type[Counting]) -> None:
    """At 40 MB/s a piece takes a tenth of a second."""
    disk.seconds_per_byte = 1 / 40e6
    told: Told = []
    try:
        loaded(folder, told)
        assert len(told) >= 5
        until_then: Told = []
        looks = 0

        def check() -> None:
            nonlocal looks
            looks += 1
            if looks == 3:
                raise Crash

        with pytest.raises(Crash):
            loaded(folder, until_then, interrupt_check=check)
        assert len(until_then) <= 3 < len(told)  # no piece is read after the interrupt
    finally:
        disk.seconds_per_byte = 0.0


def slow_pages(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], object]) -> None:
    """Have every reading of a mapped file wait, as a slow disk does."""
    read = mapped.Looker._read_at

    def slow(*given: Any) -> int:
        wait()
        return read(*given)

    monkeypatch.setattr(mapped.Looker, "_read_at", slow)


def test_an_interrupt_is_seen_while_the_disk_does_not_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, looks = threading.Event(), 0
    slow_pages(monkeypatch, lambda: answer.wait(60))

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == 5:
            answer.set()  # what the disk is asked for cannot be taken back, only what waits
            raise Crash

    began = time.monotonic()
    with pytest.raises(Crash):
        load_component(folder, map_file=True, interrupt_check=check)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("wild", [False, True])
def test_pieces_of_a_mapped_file_are_all_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wild: bool
) -> None:
    values = torch.zeros(PIECE // 2 + 5, 2, dtype=torch.bfloat16)
    if wild:
        values[-1, -1] = float("nan")
    save_file({"weight": values}, tmp_path / "weights.safetensors")
    seen: list[int] = []
    watch = mapped.Watch(read=seen.append)
    table = read_table(tmp_path / "weights.safetensors")
    opened = TensorReader(table, mapped=True, watch=watch)
    if wild:
        with pytest.raises(CorruptFile, match="'weight'.*holds NaN or infinity"), opened:
            opened.read(Source("weight"), tuple(values.shape))
        return
    with opened:
        opened.read(Source("weight"), tuple(values.shape))
    assert sum(seen) == values.nbytes
    assert max(seen) <= PIECE
