"""On a real card: a file is read once, on its way there, and the bits are those of the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_layouts as layouts
from support.stored_models import write_expert
from support.tiny_models import make_transformer

from wan_core.errors import CorruptFile
from wan_core.formats import read_table
from wan_core.loading import first_look, load_component, move, moving, to_look_at, unpin
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
