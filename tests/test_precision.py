"""Dtypes by name, and the same fp32 islands as diffusers' and transformers' own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_offload import text_encoder, transformer, vae

from wan_core.errors import InvalidRequest
from wan_core.precision import (
    DTYPES,
    cast_module,
    component_dtype,
    dtype_of,
    keep_in_fp32,
    name_of,
    resolve_dtype,
)


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
        assert name_of(dtype) == name
        assert dtype_of(str(dtype)) == dtype
    assert name_of(torch.float8_e4m3fn) == "fp8_e4m3fn"
    with pytest.raises(InvalidRequest, match="int4.*bf16, fp16, fp32") as caught:
        dtype_of("int4")
    assert caught.value.field == "precision"


@pytest.mark.parametrize(
    ("precision", "stored", "expected"),
    [
        ("auto", torch.float32, torch.float32),
        ("auto", None, torch.float32),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float8_e4m3fn, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("BF16", torch.float32, torch.bfloat16),
    ],
)
def test_resolution_on_a_cpu(
    precision: str, stored: torch.dtype | None, expected: torch.dtype
) -> None:
    dtype, reason = resolve_dtype(precision, "cpu", stored)
    assert dtype == expected
    assert name_of(dtype) in reason


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_resolution_on_a_card(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert resolve_dtype("auto", "cuda")[0] == expected


def test_components() -> None:
    assert component_dtype("transformer", torch.float16) == torch.float16
    assert component_dtype("text_encoder", torch.float16) == torch.bfloat16
    assert component_dtype("text_encoder", torch.float32) == torch.float32
    assert component_dtype("vae", torch.bfloat16) == torch.float32
