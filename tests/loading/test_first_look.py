"""Weights that are sent or page-locked are read once: for the look at them and for the copy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import reference_layouts as layouts
from support import stored_files as files
from support.crashes import Crash
from support.fake_cuda import FakeCuda
from support.stored_models import write_expert
from support.tiny_models import make_transformer
from torch import Tensor, nn

from wan_core.errors import CorruptFile, MissingFile
from wan_core.formats import read_table
from wan_core.loading import (
    component,
    first_look,
    load_component,
    mapped,
    move,
    moving,
    page_lock,
    quantized,
    reader,
    to_look_at,
)
from wan_core.placing.transport import Block
from wan_core.workers.child import Worker

KINDS = {"fp8_scaled": "safetensors", "Q4_K": "gguf", "int8_convrot": "safetensors"}
Read = list[range]


class HostAsCuda:
    """torch, whose CUDA device is the host."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty_like(self, tensor: Tensor, *, device: object) -> Tensor:
        assert str(device) == "cuda:0"
        return torch.full_like(tensor, 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    torch.manual_seed(1)
    model = make_transformer("wan2.1-t2v", attention_head_dim=128, ffn_dim=512)
    state = {name: value.to(torch.bfloat16) for name, value in layouts.state_of(model).items()}
    state = layouts.original_transformer(state)
    for kind, end in KINDS.items():
        write_expert(folder / f"{kind}.{end}", state, kind)
    files.write(folder / "bf16.safetensors", state)
    return folder


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[str, dict[str, Tensor]]:
    """What is loaded where all is looked at while it is loaded."""
    return {kind: bytes_of(opened(home, kind, later=False)) for kind in KINDS}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are treated as large ones are, and a CUDA device is there."""
    cuda = FakeCuda("")
    for name in ("Stream", "current_stream", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(page_lock, "_register", lambda memory: True)
    monkeypatch.setattr(page_lock, "_unregister", lambda address: None)
    monkeypatch.setattr(moving, "torch", HostAsCuda())
    monkeypatch.setattr(moving, "_sent", lambda tensor, device: tensor)
    monkeypatch.setattr(moving, "_RING_FROM", 1)
    monkeypatch.setattr(moving, "_PIECE", 50_000)  # several to a tensor, and no whole GGUF blocks
    monkeypatch.setattr(reader, "_SMALL", 0)
    monkeypatch.setattr(mapped, "_TOLD_SECONDS", 0.0)
    monkeypatch.setattr(mapped, "LOOKED_AT", 9_000)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """What is read of mapped files, besides headers and what is converted."""
    found: Read = []
    fetch = mapped.Looker.fetch

    def noted(self: Any, file: Any, piece: range, *more: Any) -> Any:
        found.append(piece)
        return fetch(self, file, piece, *more)

    monkeypatch.setattr(mapped.Looker, "fetch", noted)
    return found


def opened(home: Path, kind: str, *, later: bool = True) -> nn.Module:
    path = home / f"{kind}.{KINDS[kind]}"
    return load_component(
        path, torch.bfloat16, keep_quantized=True, map_file=True, look_later=later
    )


def to_device(module: nn.Module, check: Callable[[], object]) -> None:
    move(module, "cuda:0", check)


def to_slabs(module: nn.Module, check: Callable[[], object]) -> None:
    for block in module.blocks:  # type: ignore[union-attr]
        assert page_lock.pin_block(block, Block(block), check) is not None


def nowhere(module: nn.Module, check: Callable[[], object]) -> None:
    """Blocks that are streamed from their file."""


def looked_at(
    module: nn.Module, way: Any, told: list[tuple[int, int]] | None = None,
    check: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    amounts = [] if told is None else told
    with first_look(module, check, lambda *now: amounts.append(now)):
        way(module, check)


def bytes_of(module: nn.Module) -> dict[str, Tensor]:
    return {n: v.contiguous().view(-1).view(torch.uint8) for n, v in module.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("fp8_scaled", to_device), ("Q4_K", to_device), ("int8_convrot", to_device),
        ("Q4_K", to_slabs), ("fp8_scaled", nowhere),
    ],
)  # fmt: skip
def test_every_byte_is_read_once(
    home: Path, expected: dict[str, dict[str, Tensor]], kind: str, way: Any, read: Read
) -> None:
    read.clear()
    module = opened(home, kind)
    assert to_look_at(module) and not read
    unread = sum(
        len(there[1].span) for p in module.parameters() if (there := mapped.stored_at(p.data))
    )
    told: list[tuple[int, int]] = []
    looked_at(module, way, told)
    assert not to_look_at(module)
    spans = sorted(read, key=lambda span: span.start)
    assert all(a.stop <= b.start for a, b in zip(spans, spans[1:], strict=False))
    if way is to_device:
        assert sum(map(len, spans)) == unread
    elif kind != "int8_convrot":  # whole numbers cannot be wild: they are read when they are used
        assert unread * 0.9 < sum(map(len, spans)) <= unread
    found = bytes_of(module)
    assert found.keys() == expected[kind].keys()
    assert all(torch.equal(value, expected[kind][name]) for name, value in found.items())
    done = [now for now, _ in told]
    assert done == sorted(done) and told[-1][0] == told[-1][1] and len(told) > 3


@pytest.mark.parametrize(
    ("what", "way"),
    [
        ("NaN", to_device), ("short", to_device), ("stopped", to_device), ("NaN", to_slabs),
        ("disk", to_slabs), ("NaN", nowhere),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told_by_name_and_again(
    home: Path, expected: dict[str, dict[str, Tensor]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, what: str, way: Any,
) -> None:  # fmt: skip
    path = tmp_path / "expert.safetensors"
    path.write_bytes((home / "fp8_scaled.safetensors").read_bytes())
    module = load_component(
        path, torch.bfloat16, keep_quantized=True, map_file=True, look_later=True
    )
    weight = module.blocks[1].ffn.net[2].weight.data  # type: ignore[union-attr,index]
    stored = mapped.stored_at(weight)
    assert stored is not None
    with monkeypatch.context() as patch:
        error: type[BaseException] = CorruptFile
        if what == "stopped":
            error = Crash
        elif what == "NaN":
            with path.open("r+b") as file:
                file.seek(stored[1].span.stop - 1)
                file.write(b"\x7f")
        else:
            _break_reads(patch, stored[1].span, what)
        for _ in range(2):
            with pytest.raises(error) as caught:
                looked_at(module, way, check=_stop if what == "stopped" else lambda: None)
            assert to_look_at(module)
            move(module, "cpu")
            if what != "stopped":
                assert "'blocks.1.ffn.2.weight'" in str(caught.value)
                assert path.name in str(caught.value)
    if what != "NaN":
        looked_at(module, way)
        plain = expected["fp8_scaled"]
        assert all(torch.equal(v, plain[name]) for name, v in bytes_of(module).items())


def test_what_is_rounded_to_fp8_is_looked_at_while_it_is_read(home: Path, read: Read) -> None:
    """What the file holds of it is not needed any more, and is not read again."""
    module = load_component(
        home / "bf16.safetensors", torch.bfloat16,
        keep_quantized=True, map_file=True, fp8_storage=True, look_later=True,
    )  # fmt: skip
    there = [found for p in module.parameters() if (found := mapped.stored_at(p.data))]
    assert there and sum(map(len, read)) > sum(len(stored.span) for _, stored in there)
    read.clear()
    looked_at(module, nowhere)
    assert {span.start for span in read} == {stored.span.start for _, stored in there}


def in_fp8(path: Path, where: bool | torch.device, **more: Any) -> nn.Module:
    return load_component(
        path, torch.bfloat16, keep_quantized=True, map_file=True, fp8_storage=where, **more
    )


@pytest.fixture(scope="module")
def rounded_on_the_host(home: Path) -> nn.Module:
    return in_fp8(home / "bf16.safetensors", True)


def room_on_the_card(monkeypatch: pytest.MonkeyPatch, nbytes: int = 2**30) -> None:
    for name, found in (("mem_get_info", (nbytes, 0)), ("memory_reserved", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)


@pytest.mark.parametrize("room", ["enough", "too little", "lost on the way"])
def test_a_card_rounds_to_fp8_what_it_has_memory_for(
    home: Path, rounded_on_the_host: nn.Module, read: Read, monkeypatch: pytest.MonkeyPatch,
    room: str,
) -> None:  # fmt: skip
    room_on_the_card(monkeypatch, 2**30 - (room == "too little"))
    path = home / "bf16.safetensors"
    expected = rounded_on_the_host
    there: list[bool] = []
    rounded = quantized.rounded_to_fp8

    def spy(weight: Tensor) -> tuple[Tensor, float]:
        there.append(mapped.stored_at(weight) is None)
        if room == "lost on the way" and len(there) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rounded(weight)

    on_host: list[Tensor] = []
    monkeypatch.setattr(quantized, "rounded_to_fp8", spy)
    monkeypatch.setattr(
        component, "rounded_to_fp8", lambda w, check: on_host.append(w) or rounded(w)
    )
    read.clear()
    told: list[int] = []
    module = in_fp8(path, torch.device("cuda:0"), progress=lambda done, total: told.append(done))
    count = sum(isinstance(part, quantized.StoredLinear) for part in module.modules())
    assert count > 10
    assert len(there) == {"enough": count, "too little": 0, "lost on the way": 5}[room]
    assert all(there)
    assert len(on_host) == {"enough": 0, "too little": count, "lost on the way": count - 4}[room]
    if room == "enough":  # once, and nothing of it on the host
        spans = sorted(read, key=lambda span: span.start)
        assert all(a.stop <= b.start for a, b in zip(spans, spans[1:], strict=False))
    assert told == sorted(told) and told[-1] > 0.9 * sum(p.nbytes for p in expected.parameters())
    found, wanted = bytes_of(module), bytes_of(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    for name, layer in expected.named_modules():
        if isinstance(layer, quantized.StoredLinear):
            assert module.get_submodule(name).whole_scale == layer.whole_scale


@pytest.mark.parametrize("what", ["NaN", "short", "lost on the way", "stopped"])
def test_what_is_wrong_with_a_weight_that_is_rounded_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Also where the card has lost its memory by then."""
    room_on_the_card(monkeypatch)
    path = tmp_path / "expert.safetensors"
    path.write_bytes((home / "bf16.safetensors").read_bytes())
    weight = read_table(path).tensors["blocks.1.ffn.2.weight"]
    if what in ("NaN", "lost on the way"):
        with path.open("r+b") as file:
            file.seek(weight.end - 2)
            file.write(b"\xc0\xff")
    elif what == "short":
        _break_reads(monkeypatch, range(weight.start, weight.end), what)
    if what == "lost on the way":

        def lost(weight: Tensor) -> tuple[Tensor, float]:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(quantized, "rounded_to_fp8", lost)
    check = _stop if what == "stopped" else lambda: None
    error: type[BaseException] = Crash if what == "stopped" else CorruptFile
    match = None if what == "stopped" else r"'blocks\.1\.ffn\.2\.weight'.*expert|expert.*ffn\.2"
    with pytest.raises(error, match=match):
        in_fp8(path, torch.device("cuda:0"), interrupt_check=check)


@pytest.mark.parametrize("shared", [False, True])
def test_a_gang_has_read_a_file_before_parts_of_its_blocks_are_page_locked(
    home: Path, read: Read, shared: bool
) -> None:
    """They are copied from the file's pages; a worker alone reads while it sends."""
    weights: Any = SimpleNamespace(
        component="transformer", kind="transformer", path=home / "fp8_scaled.safetensors",
        module=None, dtype="bf16", fp8=False, mapped=True, shared=shared,
    )  # fmt: skip
    worker = Worker("cuda:0", lambda *_: None)
    worker._next_beat = float("inf")
    assert to_look_at(worker._read(weights)) != shared
    assert bool(read) == shared


def _stop() -> None:
    raise Crash


def _break_reads(patch: pytest.MonkeyPatch, bad: range, what: str) -> None:
    preadv = os.preadv

    def broken(fd: int, buffers: Any, offset: int) -> int:
        if offset in bad:
            if what == "disk":
                raise OSError(5, "Input/output error")
            return 0
        return preadv(fd, buffers, offset)

    patch.setattr(os, "preadv", broken)


def test_an_interrupt_ends_reads_that_are_under_way(
    home: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk does not answer to more than a few before who was interrupted has said so."""
    module = opened(home, "fp8_scaled")
    goes_on, preadv, close = threading.Event(), os.preadv, mapped.Looker.close

    def slow(fd: int, buffers: Any, offset: int) -> int:
        if len(read) > 8:
            goes_on.wait(60)
        return preadv(fd, buffers, offset)

    def closed(self: mapped.Looker) -> None:
        self._stop.set()
        goes_on.set()
        close(self)

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(mapped.Looker, "close", closed)

    def stop() -> None:
        if read:
            raise Crash

    with suppress(Crash):
        looked_at(module, to_device, check=stop)
    first = len(read)
    looked_at(module, to_device)
    assert first < len(read) - first


def test_as_on_windows(
    home: Path, expected: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There no system call reads at a place, and a mapped file is read by its name."""
    monkeypatch.delattr(os, "preadv")
    module = opened(home, "Q4_K")
    looked_at(module, to_device)
    found = bytes_of(module)
    assert all(torch.equal(value, found[name]) for name, value in expected["Q4_K"].items())


def test_a_file_stays_open_while_a_thread_reads_it_as_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt closes what reads; the thread that is in the middle of it still has its file."""
    monkeypatch.delattr(os, "preadv")
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    reads, goes_on = threading.Event(), threading.Event()

    class Slow(mapped.io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            reads.set()
            goes_on.wait(60)
            return super().readinto(buffer)

    monkeypatch.setattr(mapped.io, "FileIO", Slow)
    looker, into = mapped.Looker(mapped.Watch()), torch.ones(100, dtype=torch.uint8)
    found: list[Any] = []

    def fetch() -> None:
        with Slow(path) as file:
            found.append(looker.fetch(file, range(100), 1, None, into))

    reader, closer = threading.Thread(target=fetch), threading.Thread(target=looker.close)
    reader.start()
    assert reads.wait(60)
    closer.start()
    closer.join(0.2)
    goes_on.set()
    for thread in (reader, closer):
        thread.join(60)
    assert found == [""] and not into.any()


@pytest.mark.parametrize("what", ["opened", "mapped"])
def test_a_drive_that_allows_no_more_than_the_header_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Some network drives cannot be mapped; rights may change after the header was read."""
    error = PermissionError(13, "Permission denied") if what == "opened" else OSError(19, "No map")

    def fail(*_: object) -> None:
        raise error

    place = (reader.io, "FileIO") if what == "opened" else (reader, "map_file")
    monkeypatch.setattr(*place, fail)
    with pytest.raises(MissingFile, match=rf"fp8_scaled.*cannot be {what}.*{error.strerror}"):
        opened(home, "fp8_scaled")
