"""Every kind of storage: published vectors, formulas, loaded modules, streamed and by rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_layouts as layouts
from support import stored_files as files
from support.cases import in_turn, slow_but
from support.stored_models import write_gguf
from torch import Tensor, nn

from wan_core.formats import Storage, read_table
from wan_core.formats.storage import read_weight_kind
from wan_core.forward.transformer import lean_forward, run_together
from wan_core.loading.component import load_component
from wan_core.loading.dequantize import Scales, dequantize, ordered_scales, rotation
from wan_core.loading.quantized import StoredLinear
from wan_core.placing.offload import place
from wan_core.placing.streaming import stream_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEX = bytes.fromhex


# Published vectors -------------------------------------------------------------------------------


def test_the_fp8_vector() -> None:
    (scale,) = files.float32_bits("9224493a")
    bits = torch.frombuffer(bytearray(HEX("f6f2ede25a6a7175")), dtype=torch.int8).view(1, 8)
    stored = Storage("fp8", "F8_E4M3", (1, 8), per="tensor")
    found = dequantize(bits, Scales(None, scale), stored, torch.bfloat16)
    assert found.view(torch.uint8).numpy().tobytes() == HEX("30befbbda3bdfbbc7b3c7b3de23d233e")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp8_is_multiplied_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """Rounding the scale first, as comfy-kitchen's eager code does, is another answer."""
    bits = torch.arange(256, dtype=torch.uint8).view(1, 256)
    bits = bits[:, ~bits.view(torch.float8_e4m3fn).float().isnan()[0]].view(torch.int8)
    stored = Storage("fp8", "F8_E4M3", tuple(bits.shape), per="tensor")
    scale = 0.0123456789
    found = dequantize(bits, Scales(None, scale), stored, dtype)
    wide = bits.view(torch.float8_e4m3fn).float() * torch.tensor(scale)
    assert torch.equal(found, wide.to(dtype))
    eager = bits.view(torch.float8_e4m3fn).to(dtype) * torch.tensor(scale).to(dtype)
    assert not torch.equal(found, eager)


def test_the_nvfp4_vector() -> None:
    rows = [HEX("feda1467fec92567edb0356feda1467f"), HEX("c92567edb0356feda1467fec92567edb")]
    bits = torch.zeros(16, 16, dtype=torch.uint8)
    for index, row in enumerate(rows):
        bits[index] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
    raw = torch.zeros(128 * 4, dtype=torch.uint8)
    raw[0] = raw[1] = 0x76
    raw[16] = raw[17] = 0x7E
    stored = Storage("nvfp4", "U8", (16, 32), "s", "t", "block")
    scales = ordered_scales(raw, stored)
    assert scales[0, 0] == 0x76 and scales[1, 0] == 0x7E
    (second,) = files.float32_bits("62180639")
    found = dequantize(bits, Scales(scales, second), stored, torch.bfloat16)
    assert found[0, :8].view(torch.uint8).numpy().tobytes() == HEX(
        "30beebbdb0bdebbc6b3c6b3deb3d303e"
    )
    assert not found[2:].any()


def test_the_mxfp8_vector() -> None:
    row = HEX("fbf8f2e86070767afaf6f0e06872787bf9f4ec006c7479fbf8f2e86070767afa")
    bits = torch.zeros(32, 32, dtype=torch.uint8)
    bits[0] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
    raw = torch.zeros(128 * 4, dtype=torch.uint8)
    raw[0] = 0x74
    stored = Storage("mxfp8", "F8_E4M3", (32, 32), "s", per="block")
    found = dequantize(bits, Scales(ordered_scales(raw, stored)), stored, torch.bfloat16)
    assert found[0, :8].view(torch.uint8).numpy().tobytes() == HEX(
        "30be00bea0bd00bd803c803de03d203e"
    )


def test_the_convrot_vector() -> None:
    text = (
        "-90 -66 -41 -16 8 33 57 82 -82 -57 -33 -8 16 41 66 90 -74 -49 -25 0 119 -45 -20 4 -66 -41 "
        "-16 8 127 -37 -12 12"
    )
    bits = torch.tensor([[int(word) for word in text.split()]], dtype=torch.int8)
    scales = torch.tensor(files.float32_bits("e8f3f93a"))
    stored = Storage("int8", "I8", (1, 32), "s", per="row", group=16)
    wide = dequantize(bits, Scales(scales), stored, torch.float32)
    expected = torch.tensor(files.float32_bits("72b930beb8dbfdbd4020a0bdc5e100bd"))
    assert torch.allclose(wide[0, :4], expected, rtol=1e-6, atol=0)  # sums in another order
    half = dequantize(bits, Scales(scales), stored, torch.bfloat16)
    assert half[0, :4].view(torch.uint8).numpy().tobytes() == HEX("31befebda0bd01bd")
    # Multiplied first, as comfy-kitchen's eager code does: a rounding of float32 apart.
    first = (bits.float() * scales).view(-1, 16) @ rotation(16)
    assert torch.allclose(wide, first.view(1, 32), rtol=1e-5, atol=1e-7)
    signs = "+++- +++- +++- ---+".replace(" ", "")
    assert "".join("+" if x > 0 else "-" for x in rotation(16)[0]) == signs


@pytest.mark.parametrize("group", [4, 16, 64, 256])
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_rotated_codes_have_one_right_answer(group: int, per: str) -> None:
    """The same bits whatever the order of the sums: by rows, backwards, in float64."""
    generator = torch.Generator().manual_seed(group)
    bits = torch.randint(-128, 128, (7, 2 * group), dtype=torch.int8, generator=generator)
    bits[0], bits[1] = 127, -128  # the largest sums
    each = torch.rand(7, generator=generator) * 0.01
    scales = Scales(each) if per == "row" else Scales(None, 0.0123)
    stored = Storage("int8", "I8", (7, 2 * group), "s", per=per, group=group)
    exact = (bits.double().view(-1, group) @ rotation(group).double()).view(7, -1).float()
    factor = each.view(-1, 1) if per == "row" else 0.0123
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = dequantize(bits, scales, stored, dtype)
        assert torch.equal(whole, (exact * factor).to(dtype))
        for rows in (slice(3, 4), torch.tensor([6, 0, 2])):
            some = dequantize(bits[rows], scales.of_rows(rows), stored, dtype)
            assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_a_rotation_is_its_own_inverse(group: int) -> None:
    assert torch.equal(rotation(group) @ rotation(group), torch.eye(group))
    assert torch.equal(rotation(group), files.hadamard(group))


@pytest.mark.parametrize("bits", range(0, 256, 5))
def test_every_exponent_of_mxfp8(bits: int) -> None:
    raw = torch.full((512,), bits, dtype=torch.uint8)
    stored = Storage("mxfp8", "F8_E4M3", (1, 32), "s", per="block")
    ones = torch.ones(1, 32).to(torch.float8_e4m3fn).view(torch.int8)
    found = dequantize(ones, Scales(ordered_scales(raw, stored)), stored, torch.float32)
    expected = 0.0 if bits == 0 else float("inf") if bits == 255 else 2.0 ** (bits - 127)
    assert float(found[0, 0]) == expected


@pytest.mark.parametrize("rows", [1, 20, 32, 128, 129, 300])
@pytest.mark.parametrize("blocks", [1, 3, 4, 9])
def test_scales_in_tiles_come_out_by_rows(rows: int, blocks: int) -> None:
    plain = torch.randint(0, 256, (rows, blocks), dtype=torch.uint8)
    stored = Storage("mxfp8", "F8_E4M3", (rows, 32 * blocks), "s", per="block")
    assert torch.equal(ordered_scales(files.swizzled(plain), stored), plain)


# Files of every kind, as modules -----------------------------------------------------------------


def matrices(model: nn.Module) -> set[str]:
    """The matrices of the blocks but for one: files mix what is quantised and what is not."""
    names = {
        f"{name}.weight" for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("blocks.")
    }  # fmt: skip
    return set(
        layouts.original_transformer(
            dict.fromkeys(names - {"blocks.1.attn1.to_v.weight"}, torch.empty(0))
        )
    )


def stored_file(
    path: Path, model: nn.Module, kind: str, style: str = "notes", prefix: str = ""
) -> tuple[Path, dict[str, Any]]:
    """Write ``model`` as ``kind``; returns the file and each matrix's meaning by parameter name."""
    state = layouts.original_transformer(layouts.state_of(model))
    back = dict(zip(state, layouts.state_of(model), strict=True))
    tensors, metadata, meanings = files.pack(state, matrices(model), kind, style, prefix)
    files.write(path, tensors, metadata)
    return path, {back[name]: meaning for name, meaning in meanings.items()}


def gguf_file(path: Path, model: nn.Module, kind: str) -> tuple[Path, dict[str, Any]]:
    state = layouts.original_transformer(layouts.state_of(model))
    back = dict(zip(state, layouts.state_of(model), strict=True))
    meanings = write_gguf(path, state, matrices(model), kind)
    return path, {back[name]: meaning for name, meaning in meanings.items()}


def any_file(folder: Path, model: nn.Module, kind: str) -> tuple[Path, dict[str, Any]]:
    if kind in files.GGUF_KINDS:
        return gguf_file(folder / "m.gguf", model, kind)
    return stored_file(folder / "m.safetensors", model, kind)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=generator).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=generator).to(dtype),
    }


ALL_KINDS = (*files.KINDS, *files.GGUF_KINDS)


@pytest.mark.parametrize(("kind", "dtype"), in_turn(ALL_KINDS, DTYPES), ids=str)
def test_kept_and_dequantised_are_what_the_file_means(
    tmp_path: Path, model: nn.Module, kind: str, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, meanings = any_file(tmp_path, model, kind)
    whole = load_component(path, dtype)
    kept = load_component(path, dtype, keep_quantized=True)
    for name, meaning in meanings.items():
        expected = meaning(dtype)
        assert torch.equal(whole.get_parameter(name), expected), name
        layer = kept.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, StoredLinear), name
        assert layer.weight.dtype == torch.int8
        assert torch.equal(layer.dequantized(dtype), expected), name
        assert torch.equal(layer.dequantized(dtype, slice(3, 40)), expected[3:40])
        with monkeypatch.context() as patch:  # large weights are taken apart a few rows at a time
            patch.setattr("wan_core.loading.dequantize._AT_ONCE", 20 * expected.shape[1])
            assert torch.equal(layer.dequantized(dtype), expected), name
            assert torch.equal(layer.dequantized(dtype, slice(3, 40)), expected[3:40])
    stored = [layer for layer in kept.modules() if isinstance(layer, StoredLinear)]
    assert len(stored) == len(meanings)
    with torch.no_grad():
        once = kept(**inputs(dtype)).sample
        assert torch.equal(once, whole(**inputs(dtype)).sample)
    bits = digest(kept)
    assert digest(kept.to(torch.float16)) == bits  # a cast of the module touches no stored byte


def digest(module: nn.Module) -> str:
    """A hash of every stored byte of the quantised layers."""
    total = hashlib.sha256()
    for layer in module.modules():
        if isinstance(layer, StoredLinear):
            total.update(layer.weight.data.cpu().numpy().tobytes())
            if layer.weight_scales is not None:
                total.update(layer.weight_scales.data.cpu().numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize(
    "kind",
    slow_but(
        {"fp8_rows", "int8_convrot", "mxfp8", "nvfp4", "Q4_K", "Q8_0"}.__contains__, ALL_KINDS
    ),
)
def test_placements_and_forwards_change_no_bit(
    tmp_path: Path, model: nn.Module, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_core.loading.reader._PIECE", 4096)
    path, _ = any_file(tmp_path, model, kind)
    call = inputs(torch.bfloat16)
    mapped = load_component(path, torch.bfloat16, keep_quantized=True, map_file=True)
    before = digest(mapped)
    file_before = hashlib.sha256(path.read_bytes()).hexdigest()
    with torch.no_grad():
        expected = load_component(path, torch.bfloat16)(**call).sample
        assert torch.equal(mapped(**call).sample, expected)
        for buffers, resident in ((2, 0), (1, 0), (2, 1)):
            with stream_blocks(mapped, "cpu", resident_blocks=resident, buffers=buffers):
                assert torch.equal(mapped(**call).sample, expected)
                with lean_forward(mapped) as why_not:
                    assert why_not is None
                    for found in run_together(mapped, [call, call]):
                        assert torch.equal(found.sample, expected)
        with place(mapped, "model", "cpu"), lean_forward(mapped, exact=False, rows=7) as why_not:
            assert why_not is None
            rows = mapped(**call).sample
        with stream_blocks(mapped, "cpu"), lean_forward(mapped, exact=False, rows=7):
            assert torch.equal(mapped(**call).sample, rows)
        assert (rows - expected).abs().max() <= 0.05 * expected.abs().max()
        with pytest.raises(KeyboardInterrupt), stream_blocks(mapped, "cpu"):
            mapped(**call)
            raise KeyboardInterrupt
    assert digest(mapped) == before
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file_before


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("kind", "style"),
    files.in_every_style("fp8_scaled", "fp8_rows", "fp8_scaled_e5m2", "int8_convrot"),
)
def test_every_way_to_say_it(
    tmp_path: Path, model: nn.Module, kind: str, style: str, prefix: str
) -> None:
    path, meanings = stored_file(tmp_path / "m.safetensors", model, kind, style, prefix)
    kept = load_component(path, torch.bfloat16, keep_quantized=True)
    for name, meaning in meanings.items():
        layer: Any = kept.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.dequantized(torch.bfloat16), meaning(torch.bfloat16)), name


def test_metadata_with_another_prefix_is_matched(tmp_path: Path, model: nn.Module) -> None:
    state = layouts.original_transformer(layouts.state_of(model))
    tensors, metadata, _ = files.pack(state, matrices(model), "int8_convrot", "metadata")
    metadata = {
        k: v.replace('"blocks.', '"model.diffusion_model.blocks.') for k, v in metadata.items()
    }
    table = read_table(files.write(tmp_path / "m.safetensors", tensors, metadata))
    kind = read_weight_kind(table, table.tensors)
    assert {s.group for s in kind.weights.values()} == {256} and kind.name == "int8_convrot"
