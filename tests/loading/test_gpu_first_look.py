"""On a real card: a file is read once, on its way there, and the bits are those of the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_layouts as layouts
from support import stored_files as files
from support.stored_models import write_expert
from support.tiny_models import make_transformer
from support.wild_bytes import rounded_plainly, weights_of_every_bf16, wild_bytes

from wan_core.errors import CorruptFile
from wan_core.formats import read_table
from wan_core.loading import first_look, load_component, move, moving, to_look_at, unpin
from wan_core.loading.dtypes import any_wild, is_finite
from wan_core.loading.quantized import rounded_to_fp8
from wan_core.placing import stream_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = {"fp8_scaled": "safetensors", "Q4_K": "gguf", "int8_convrot": "safetensors"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 30 to 60 MB, of several pieces of the ring."""
    folder = tmp_path_factory.mktemp("first")
    torch.manual_seed(1)
    model = make_transformer(
        "wan2.1-t2v", num_attention_heads=8, attention_head_dim=128, ffn_dim=8192, num_layers=2
    )
    state = {name: value.to(torch.bfloat16) for name, value in layouts.state_of(model).items()}
    state = layouts.original_transformer(state)
    for kind, end in KINDS.items():
        write_expert(folder / f"{kind}.{end}", state, kind)
    files.write(folder / "bf16.safetensors", state)
    return folder


@pytest.fixture(autouse=True)
def through_the_ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(moving, "_RING_FROM", 1)
    yield
    unpin()


def opened(path: Path, *, later: bool) -> Any:
    return load_component(
        path, torch.bfloat16, keep_quantized=True, map_file=True, look_later=later
    )


def bytes_of(module: Any) -> dict[str, torch.Tensor]:
    """The bytes of all parameters, on the CPU."""
    return {
        name: value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        for name, value in module.named_parameters()
    }


def rchar() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resident", [None, 2, 1, 0])
def test_sent_and_page_locked_weights_are_the_file_s(
    home: Path, kind: str, resident: int | None
) -> None:
    path = home / f"{kind}.{KINDS[kind]}"
    expected = bytes_of(opened(path, later=False))
    module = opened(path, later=True)
    before = rchar()
    with first_look(module, lambda: None, lambda *_: None):
        if resident is None:
            move(module, "cuda")
        else:
            streaming = stream_blocks(
                module, "cuda", resident_blocks=resident, buffers=2, pin_bytes=1 << 30
            )
            with streaming:
                torch.cuda.synchronize()
                assert {p.device.type for p in module.blocks[0].parameters()} <= {"cuda", "cpu"}
    read = rchar() - before
    assert not to_look_at(module)
    torch.cuda.synchronize()
    found = bytes_of(module)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert read < 1.05 * path.stat().st_size + 2**20


def test_the_card_finds_the_wild_numbers_that_the_host_finds() -> None:
    for name, numbers, whole, damaged in wild_bytes():
        for raw, expected in ((whole, False), *((one, True) for one in damaged)):
            found = [any_wild(values) for values in numbers(raw.cuda())]
            assert any(map(bool, found)) is expected, name


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_each_bit_pattern_is_wild_on_the_card_where_it_is_on_the_host(dtype: torch.dtype) -> None:
    """Alone, and as the last of more numbers than one group of threads looks at."""
    size = dtype.itemsize
    bits = torch.arange(2 ** (8 * size), dtype=torch.int32)
    every = bits.to(torch.uint8 if size == 1 else torch.int16).view(dtype)
    wild = ~torch.isfinite(every.double())
    assert not any_wild(every[~wild].cuda())
    many = torch.ones(2**22 + 3, device="cuda").to(dtype)
    for index in torch.nonzero(wild).view(-1).tolist()[:: max(1, int(wild.sum()) // 40)]:
        one = every[index : index + 1]
        assert not is_finite(one) and any_wild(one.cuda())
        many[-1:].view(torch.uint8).copy_(one.view(torch.uint8))
        assert any_wild(many)


@pytest.mark.parametrize("kind", ["fp8_scaled", "Q4_K"])
def test_a_damaged_number_anywhere_is_found_on_the_card(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In the first and in the last piece of a tensor of several."""
    monkeypatch.setattr(moving, "_PIECE", 2**20 - 100)
    whole = home / f"{kind}.{KINDS[kind]}"
    name = "blocks.1.ffn.0.weight"
    weight = read_table(whole).tensors[name]
    last = 144 if kind == "Q4_K" else 1  # the scale of the last block, or the last number
    content = whole.read_bytes()
    for place in (weight.start, weight.end - last):
        bad = tmp_path / whole.name
        damaged = bytearray(content)
        number = b"\x00\x7c" if kind == "Q4_K" else b"\x7f"
        damaged[place : place + len(number)] = number
        bad.write_bytes(damaged)
        module = opened(bad, later=True)
        with (
            pytest.raises(CorruptFile, match=rf"'{name}'.*{bad.name}"),
            first_look(module, lambda: None, lambda *_: None),
        ):
            move(module, "cuda")
        assert to_look_at(module)


@pytest.mark.parametrize("locked", [False, True])
def test_a_damaged_weight_is_named_before_anything_computes(
    home: Path, tmp_path: Path, locked: bool
) -> None:
    whole = home / "fp8_scaled.safetensors"
    weight = read_table(whole).tensors["blocks.1.ffn.2.weight"]
    content = bytearray(whole.read_bytes())
    content[weight.end - 1] = 0x7F
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    module = opened(bad, later=True)
    for _ in range(2):
        with (
            pytest.raises(CorruptFile, match=r"'blocks\.1\.ffn\.2\.weight'.*bad\.safetensors"),
            first_look(module, lambda: None, lambda *_: None),
        ):
            if locked:
                with stream_blocks(module, "cuda", pin_bytes=1 << 30):
                    pass
            else:
                move(module, "cuda")
    torch.zeros(1, device="cuda").add_(1)  # no error of CUDA is left behind


def test_the_card_rounds_every_bf16_number_to_fp8_as_the_host_does() -> None:
    for weight in weights_of_every_bf16():
        for stored in (torch.float8_e4m3fn, torch.float8_e5m2):
            values, scale = rounded_to_fp8(weight.cuda(), stored)
            expected, whole = rounded_plainly(weight, stored)
            assert scale == whole
            assert torch.equal(values.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_a_bf16_file_that_the_card_rounds_to_fp8_is_the_host_s(home: Path) -> None:
    path = home / "bf16.safetensors"
    made = []
    for where in (True, torch.device("cuda")):
        before = rchar()
        module = load_component(
            path, torch.bfloat16, keep_quantized=True, map_file=True, fp8_storage=where
        )
        read = rchar() - before
        assert {p.device.type for p in module.parameters()} == {"cpu"}
        made.append(bytes_of(module))
    assert read < 1.05 * path.stat().st_size + 2**20
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
