"""What the modules promise one by one, where no load of a whole model would notice a change."""

from __future__ import annotations

import gc
import json
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wan_core.errors import CorruptFile
from wan_core.files import FileIdentity
from wan_core.formats import Storage
from wan_core.formats.open import read_table
from wan_core.loading import cache as room
from wan_core.loading import component, dequantize, mapped, moving, quantized, reader, tokenizer
from wan_core.loading.cache import ComponentCache, ComponentKey
from wan_core.loading.dequantize import Scales
from wan_core.loading.mapped import Watch
from wan_core.models.names import Source

# ------------------------------------------------------------------------------------- the cache


def key(kind: str, *paths: str) -> ComponentKey:
    return ComponentKey(kind, tuple(FileIdentity(path, 1, 1) for path in paths), "fp32")


def have(cache: ComponentCache, one: ComponentKey) -> None:
    with cache.borrow(one, 256, lambda: nn.Linear(8, 8)):
        pass


def test_what_is_let_go_in_the_midst_of_another_goes_when_that_is_done() -> None:
    cache = ComponentCache()
    have(cache, key("vae", "/a"))
    with cache._held():
        cache.let_go_soon({"/a"})
        assert cache._entries, "somebody is in the middle of them"
    assert not cache._entries


def test_who_used_a_component_twice_has_let_go_of_it_twice() -> None:
    cache, one = ComponentCache(), key("vae", "/a")
    have(cache, one)
    with cache.borrow(one, 256, nn.Identity), cache.borrow(one, 256, nn.Identity):
        assert cache.drop_unused() == 0
    assert cache.drop_unused() == 1


def test_who_waits_for_a_component_looks_once_before_and_once_after() -> None:
    cache, one, looks = ComponentCache(), key("vae", "/a"), []
    begun, go_on = threading.Event(), threading.Event()
    held = cache._held

    def counted() -> Any:
        looks.append(threading.current_thread().name)
        return held()

    cache._held = counted  # type: ignore[method-assign]

    def build() -> nn.Module:
        begun.set()
        go_on.wait(60)
        return nn.Linear(8, 8)

    def use() -> None:
        with cache.borrow(one, 256, build):
            pass

    threads = [threading.Thread(target=use, name=name) for name in ("reads", "waits")]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    while "waits" not in looks:
        time.sleep(0.001)
    time.sleep(0.02)
    go_on.set()
    for thread in threads:
        thread.join()
    assert looks.count("waits") == 3, "before, after, and to give it back"


@pytest.mark.parametrize("more", [{}, {"collect": True}, {"collect": False}])
def test_garbage_is_collected_unless_no_finalizer_may_run(
    more: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[bool] = []
    monkeypatch.setattr(room, "gc", SimpleNamespace(collect=lambda: collected.append(True)))
    cache = ComponentCache()
    have(cache, key("vae", "/a"))
    cache.drop({"/b"}, **more)
    assert not collected, "nothing is gone"
    cache.drop({"/a"}, **more)
    assert bool(collected) == more.get("collect", True)
    assert gc.isenabled()


# ---------------------------------------------------------------------------------- shapes, tables


@pytest.mark.parametrize(
    ("stored", "parts", "wanted", "fits"),
    [
        ((12, 4), 3, (4, 4), True), ((12, 4), 1, (12, 4), True), ((12, 4), 3, (12, 4), False),
        ((13, 4), 3, (4, 4), False), ((12,), 3, (4,), True), ((), 3, (4,), False),
        ((12, 4), 2, (6, 4), True),
    ],
)  # fmt: skip
def test_a_part_of_a_fused_tensor_has_its_share_of_the_rows(
    stored: tuple[int, ...], parts: int, wanted: tuple[int, ...], fits: bool
) -> None:
    table = SimpleNamespace(format="safetensors", tensors={"qkv": SimpleNamespace(shape=stored)})
    check: Any = SimpleNamespace(
        table=table, plan=SimpleNamespace(from_file=True), _shape_of=lambda source: stored
    )
    found = component._Check._fits(check, Source("qkv", part=0, parts=parts), wanted)
    assert found is fits


def test_tables_are_those_that_their_classes_make() -> None:
    """The buffers that a module on the meta device lost, against a real module's."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
    from diffusers.models.transformers.transformer_wan_animate import MotionConv2d
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    clip = CLIPVisionConfig(hidden_size=24, image_size=28, patch_size=14)
    owners = [
        MotionConv2d(3, 4, 3, stride=2, blur_kernel=(1, 3, 3, 1)),
        WanRotaryPosEmbed(32, (1, 2, 2), 64),
        CLIPVisionEmbeddings(clip),
    ]
    for owner in owners:
        fresh = component._fresh_buffers(owner)
        assert set(fresh) == set(owner._buffers)
        for name, value in fresh.items():
            assert torch.equal(value, owner._buffers[name]), (type(owner).__name__, name)


# ------------------------------------------------------------------------------------ stored kinds


@pytest.mark.parametrize(("rows", "at_once", "steps"), [(8, 256, 1), (8, 128, 2), (9, 64, 5)])
def test_a_large_weight_is_taken_apart_a_few_rows_at_a_time(
    rows: int, at_once: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Storage("int8", "I8", (rows, 32), "s", per="row")
    values = torch.arange(rows * 32, dtype=torch.int64).to(torch.int8).view(rows, 32)
    scales = Scales(torch.rand(rows))
    whole = dequantize.dequantize(values, scales, stored, torch.float32)
    made, one = [], dequantize._dequantize
    monkeypatch.setattr(dequantize, "_AT_ONCE", at_once)
    monkeypatch.setattr(dequantize, "_dequantize", lambda *a: made.append(len(a[0])) or one(*a))
    assert torch.equal(dequantize.dequantize(values, scales, stored, torch.float32), whole)
    assert (len(made), sum(made)) == (steps, rows)


def test_a_kernel_that_works_is_what_a_device_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    bits: Any = SimpleNamespace(is_cuda=True, device="cuda:0")
    layer: Any = SimpleNamespace(
        weight=SimpleNamespace(data=bits), _scales=Scales,
        stored=Storage("fp8", "F8_E4M3", (4, 8), per="tensor"),
    )  # fmt: skip
    made = torch.ones(4, 8)
    monkeypatch.setattr(quantized, "_kernel_works", lambda *_: True)
    monkeypatch.setattr(quantized, "_kernels", lambda: SimpleNamespace(run=lambda *_: made))
    assert quantized._Stored.dequantized(layer, torch.float32) is made


@pytest.mark.parametrize(("per", "whole"), [("row", 1.0), ("block", 0.37), ("tensor", 0.37)])
def test_a_kernel_is_tried_with_the_scales_that_its_kind_has(per: str, whole: float) -> None:
    """One of the whole beside those of blocks; by rows there is none."""
    seen: list[Scales] = []
    kernels = SimpleNamespace(run=lambda bits, scales, *_: seen.append(scales))
    kind = ("nvfp4", "U8") if per == "block" else ("fp8", "F8_E4M3")
    stored = Storage(*kind, (16, 32), "s", "t" if per == "block" else "", per)  # type: ignore[arg-type]
    with pytest.raises(TypeError):  # what gives no tensor equals none
        quantized._agrees(kernels, stored, torch.device("cpu"), torch.float32)
    assert seen[0].whole == whole


# ---------------------------------------------------------------------------------------- reading


def test_an_interrupt_is_seen_while_a_piece_is_looked_at(tmp_path: Path) -> None:
    def interrupt() -> None:
        if looking.is_set():
            raise InterruptedError

    def finite(raw: torch.Tensor) -> bool:
        looking.set()
        return answer.wait(60)

    looking, answer = threading.Event(), threading.Event()
    path = tmp_path / "w"
    path.write_bytes(bytes(100))
    began = time.monotonic()
    with path.open("rb", buffering=0) as file:
        looker = mapped.Looker(Watch(interrupt))
        with pytest.raises(InterruptedError):
            looker.begin(file, range(100), 1, finite, lambda reason: ValueError())
            looker.finish()
        assert time.monotonic() - began < 30
        answer.set()
        looker.close()


@pytest.mark.parametrize("target", [None, torch.float64])
def test_a_tensor_of_many_pieces_is_read_in_their_order(
    target: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": torch.rand(7), "w": torch.rand(13, 11)}
    save_file(values, tmp_path / "w.safetensors")
    monkeypatch.setattr(reader, "_PIECE", 64)
    monkeypatch.setattr(reader, "AT_ONCE", 12)
    with reader.TensorReader(read_table(tmp_path / "w.safetensors")) as found:
        for name, value in values.items():
            read = found.read(Source(name), tuple(value.shape), target)
            assert torch.equal(read, value.to(read.dtype))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_part_counts_with_its_share_of_the_bytes(parts: int, tmp_path: Path) -> None:
    save_file({"qkv": torch.rand(6, 10)}, tmp_path / "w.safetensors")
    told: list[tuple[int, int]] = []
    amount = reader.Amount(read_table(tmp_path / "w.safetensors"), lambda *now: told.append(now))
    amount.begin(Source("qkv", part=part, parts=parts) for part in range(parts))
    amount.end()
    assert told == [(0, 240), (240, 240)]


@pytest.mark.parametrize("shape", [(4, 8), ()])
def test_a_number_without_rows_is_one_row(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"w": torch.zeros(shape, dtype=torch.int8)}, tmp_path / "w.safetensors")
    stored = Storage("int8", "I8", shape, per="tensor")
    with reader.TensorReader(read_table(tmp_path / "w.safetensors")) as found:
        assert tuple(found.bits(Source("w"), stored).shape) == (shape or (1, 1))


def test_only_what_lies_in_one_piece_on_the_host_goes_through_the_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    carried: list[Any] = []
    ring = SimpleNamespace(carry=lambda pieces, check: carried.extend(pieces))
    monkeypatch.setattr(moving, "_RING_FROM", 1)
    monkeypatch.setattr(moving, "_Ring", lambda target: ring)
    monkeypatch.setattr(moving, "_sent", lambda tensor, device: tensor)
    monkeypatch.setattr(moving, "torch", _Torch())
    whole, turned = torch.rand(4, 6), torch.rand(4, 6).t()
    out = moving._sent_all([whole, turned], "cuda:0", lambda: None)
    assert out[0] is not whole and out[1] is turned
    assert [(piece.source.data_ptr(), piece.target.data_ptr()) for piece in carried] == [
        (whole.data_ptr(), out[0].data_ptr())
    ]


class _Torch:
    """torch, whose CUDA device is the host."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty_like(self, tensor: torch.Tensor, *, device: object) -> torch.Tensor:
        assert str(device) == "cuda:0"
        return torch.empty_like(tensor)


# -------------------------------------------------------------------------------------- tokenizers


def field(number: int, wire: int, value: bytes) -> bytes:
    tag = number << 3 | wire
    start = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return start + (bytes([len(value)]) + value if wire == 2 else value)


PIECES = b"".join(
    field(1, 2, field(1, 2, text) + field(2, 5, b"\0\0\0\0")) for text in (b"a", b"b")
)


@pytest.mark.parametrize(
    ("trainer", "unknown"),
    [(b"", 0), (field(2, 2, b""), 0), (field(2, 2, field(3, 0, b"\1")), 0),
     (field(2, 2, field(40, 0, b"\1")), 1)],
)  # fmt: skip
def test_the_unknown_piece_is_the_first_unless_stated(trainer: bytes, unknown: int) -> None:
    assert tokenizer.parse_sentencepiece(PIECES + trainer, "x").unknown == unknown


def test_fields_of_every_width_are_passed_over() -> None:
    eight, four = struct.pack("<d", 1.5), struct.pack("<f", 2.5)
    data = field(7, 1, eight) + field(8, 5, four) + field(9, 0, b"\5") + field(6, 2, b"xyz")
    assert list(tokenizer._fields(data)) == [(7, eight), (8, four), (9, 5), (6, b"xyz")]


def test_a_damaged_configuration_of_the_image_processor_is_named(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"size": {"height": 224}})[:-3], encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"preprocessor_config\.json"):
        tokenizer.load_image_processor(tmp_path)
