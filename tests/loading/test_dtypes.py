"""Dtypes by name, and the same fp32 islands as diffusers' and transformers' own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.casting import cast_module, store_fp8
from support.lean_models import inputs_of, model_of
from support.placed_models import text_encoder, transformer, vae
from support.wild_bytes import wild_bytes

from wan_core.errors import InvalidRequest
from wan_core.forward.transformer import lean_forward
from wan_core.loading.dtypes import DTYPES, any_wild, dtype_of, is_finite, keep_in_fp32
from wan_core.loading.quantized import StoredLinear
from wan_core.models.sizes import block_bytes
from wan_core.placing.streaming import stream_blocks


def dtypes_of(module: torch.nn.Module) -> dict[str, torch.dtype]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.dtype for name, tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [transformer, text_encoder, vae])
def test_cast_equals_from_pretrained(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    module = make()
    module.save_pretrained(tmp_path)
    key = "dtype" if make is text_encoder else "torch_dtype"
    loaded = type(module).from_pretrained(tmp_path, **{key: dtype})
    cast = cast_module(module, dtype)
    assert dtypes_of(cast) == dtypes_of(loaded)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, cast.state_dict()[name]), name


def test_what_stays_fp32() -> None:
    kept = keep_in_fp32(transformer(), torch.bfloat16)
    assert "time_embedder" in kept
    assert "scale_shift_table" in kept
    assert keep_in_fp32(transformer(), torch.float32) == ()
    assert keep_in_fp32(text_encoder(), torch.bfloat16) == ()
    assert keep_in_fp32(text_encoder(), torch.float16) == ("wo",)


def test_names() -> None:
    for name, dtype in DTYPES.items():
        assert dtype_of(name) == dtype
        assert dtype_of(str(dtype)) == dtype
    with pytest.raises(InvalidRequest, match="int4.*bf16, fp16, fp32") as caught:
        dtype_of("int4")
    assert caught.value.field == "precision"


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_storage(stored: torch.dtype) -> None:
    model = model_of("wan2.1-i2v", torch.bfloat16)
    call = inputs_of(model, torch.bfloat16)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(**call)[0]
        saved = store_fp8(model, stored)
        matrices = [m for m in model.modules() if isinstance(m, StoredLinear)]
        assert len(matrices) == 2 * (4 + 4 + 2 + 2)
        assert saved == sum(m.weight.numel() for m in matrices)
        step = 2.0 ** -(3 if stored == torch.float8_e4m3fn else 2)  # half an ulp is half of it
        for name, module in model.named_modules():
            if isinstance(module, StoredLinear):
                before, after = weights[f"{name}.weight"], module.dequantized(torch.float32)
                error = (after - before).abs()
                assert (error <= step / 2 * before.abs() + module.whole_scale / 2).all(), name
                assert after.abs().amax() == pytest.approx(float(before.abs().amax()), rel=1e-2)
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.int8:
                assert torch.equal(parameter, weights[name]), name
        out = model(**call)[0]
        assert 0 < (out - expected).abs().max() < 0.5 * expected.abs().max()
        assert store_fp8(model, stored) == 0
        with stream_blocks(model, "cpu", resident_blocks=1), lean_forward(model) as reason:
            assert reason is None
            assert torch.equal(model(**call)[0], out)  # as stored, whichever way it is run


def test_fp8_storage_is_what_the_plan_counts() -> None:
    from support.machines import architecture

    from wan_core.placing.transport import Block

    found = architecture("wan2.1-t2v-1.3b")
    model = transformer(
        torch.float32, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1
    )
    cast_module(model, torch.bfloat16)
    plain = Block(model.blocks[0]).nbytes
    assert plain == pytest.approx(block_bytes(found, "transformer", "bf16"), rel=1e-3)
    store_fp8(model)
    assert Block(model.blocks[0]).nbytes == pytest.approx(
        block_bytes(found, "transformer", "bf16", fp8=True), rel=3e-3
    )


def test_a_device_finds_the_wild_numbers_that_the_host_finds() -> None:
    """The same code on any device: here it is the CPU's, on a GPU test_gpu_first_look has it."""
    for name, numbers, whole, damaged in wild_bytes():
        assert len(damaged) >= 6, name
        for raw, expected in ((whole, False), *((one, True) for one in damaged)):
            assert all(map(is_finite, numbers(raw))) is not expected, name
            assert any(bool(any_wild(found)) for found in numbers(raw)) is expected, name
