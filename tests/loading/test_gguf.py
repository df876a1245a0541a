"""GGUF files: the same weights as diffusers' own loader takes from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support import reference_layouts as layouts
from support.stored_files import GGUF_KINDS, gguf_blocks, gguf_meaning

from wan_core.errors import ModelMismatch, UnsupportedModel
from wan_core.loading import dequantize as dequantize_module
from wan_core.loading.component import load_component

QuantType = gguf.GGMLQuantizationType
TYPES = GGUF_KINDS


def write_gguf(
    path: Path, state: layouts.State, quantized: set[str], kind: str, *, arch: str = "wan",
    flatten: bool = True,
) -> layouts.State:  # fmt: skip
    """Write a GGUF file as ComfyUI-GGUF's converter does; returns the values it stands for."""
    writer = gguf.GGUFWriter(path, arch)
    truth: layouts.State = {}
    for name, value in state.items():
        if name in quantized:
            data = gguf_blocks(value, kind)
            writer.add_tensor(name, data, raw_dtype=QuantType[kind])
            truth[name] = gguf_meaning(data, kind, torch.float32)
            continue
        half = value.ndim > 1
        stored = value.to(torch.float16) if half else value.float()
        truth[name] = stored.float()
        array = stored.numpy()
        if value.ndim > 4 and flatten:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in value.shape])
            array = array.reshape(value.shape[0], -1)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def linear(model: torch.nn.Module) -> set[str]:
    names = {
        f"{name}.weight" for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "blocks" in name
    }  # fmt: skip
    return set(layouts.original_transformer(dict.fromkeys(names, torch.empty(0))))


def write_model(
    path: Path, model: torch.nn.Module, kind: str, *, flatten: bool = True
) -> layouts.State:
    state = layouts.original_transformer(layouts.state_of(model))
    truth = write_gguf(path, state, linear(model), kind, flatten=flatten)
    back = dict(zip(state, layouts.state_of(model), strict=True))
    return {back[name]: value for name, value in truth.items()}


@pytest.mark.parametrize("kind", TYPES)
def test_dequantised_weights_are_diffusers_own(
    tmp_path: Path, model: torch.nn.Module, kind: str
) -> None:
    truth = write_model(tmp_path / "m.gguf", model, kind)
    for dtype in (torch.float32, torch.bfloat16):
        ours = dict(load_component(tmp_path / "m.gguf", dtype).named_parameters())
        assert ours.keys() == truth.keys()
        for name, value in ours.items():
            kept = any(part in name for part in ("norm2", "time_embedder", "scale_shift_table"))
            assert value.dtype == (torch.float32 if kept else dtype), name
            assert torch.equal(value, truth[name].to(value.dtype)), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_kept_blocks_equal_diffusers_own_loader(
    tmp_path: Path, model: torch.nn.Module, kind: str
) -> None:
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    # diffusers does not read the note with the shape of a flattened weight.
    write_model(tmp_path / "m.gguf", model, kind, flatten=False)
    (tmp_path / "config").mkdir()
    model.save_config(tmp_path / "config")  # type: ignore[operator]
    theirs = WanTransformer3DModel.from_single_file(
        str(tmp_path / "m.gguf"), config=str(tmp_path / "config"), torch_dtype=torch.bfloat16,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
    )  # fmt: skip
    ours = load_component(tmp_path / "m.gguf", torch.bfloat16, keep_quantized=True)
    for (name, mine), (other, value) in zip(
        sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True
    ):
        assert name == other, name
        theirs_bytes = torch.Tensor(value.as_subclass(torch.Tensor))
        if hasattr(value, "quant_type"):
            assert torch.equal(mine.data, theirs_bytes.view(torch.int8)), name
        else:
            assert mine.dtype == value.dtype and torch.equal(mine.data, theirs_bytes), name
    generator = torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=generator).bfloat16(),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator).bfloat16(),
    }
    with torch.no_grad():
        assert torch.equal(ours(**inputs).sample, theirs(**inputs).sample)


def test_a_5d_weight_without_its_shape_note(tmp_path: Path, model: torch.nn.Module) -> None:
    state = layouts.original_transformer(layouts.state_of(model))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    for name, value in state.items():
        flat = value.reshape(value.shape[0], -1) if value.ndim > 4 else value
        writer.add_tensor(name, np.ascontiguousarray(flat.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_component(tmp_path / "m.gguf")
    for name, value in layouts.state_of(model).items():
        assert torch.equal(ours.get_parameter(name), value), name


@pytest.mark.parametrize("keep", [False, True])
def test_text_encoder_with_llama_cpp_names(tmp_path: Path, keep: bool) -> None:
    from support.layout_models import umt5

    encoder = umt5(d_model=64, d_ff=96, d_kv=16)
    state = layouts.gguf_umt5(layouts.state_of(encoder))
    quantized = {n for n, v in state.items() if v.ndim == 2 and "rel_b" not in n}
    truth = write_gguf(tmp_path / "te.gguf", state, quantized, "Q8_0", arch="t5encoder")
    back = dict(zip(state, layouts.state_of(encoder), strict=True))
    encoder.load_state_dict({back[n]: v for n, v in truth.items()}, strict=False)
    ours = load_component(tmp_path / "te.gguf", torch.float32, keep_quantized=keep)
    ids = torch.tensor([[4, 8, 15, 16, 23, 42, 1]])
    with torch.no_grad():
        assert torch.equal(ours(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_a_type_that_cannot_be_taken_apart_is_refused(
    tmp_path: Path, model: torch.nn.Module
) -> None:
    write_model(tmp_path / "m.gguf", model, "Q8_0")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensor = next(t for t in reader.tensors if t.name == "blocks.0.ffn.0.weight")
    at = int(tensor.field.offset) + sum(part.nbytes for part in tensor.field.parts[:4])
    assert int.from_bytes(data[at : at + 4], "little") == QuantType.Q8_0
    data[at : at + 4] = int(QuantType.TQ1_0).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises((UnsupportedModel, ModelMismatch), match="TQ1_0"):
        load_component(tmp_path / "m.gguf")


def test_import_says_what_is_missing(
    tmp_path: Path, model: torch.nn.Module, monkeypatch: Any
) -> None:
    import sys

    from wan_core.errors import MissingDependency

    write_model(tmp_path / "m.gguf", model, "Q8_0")
    dequantize_module._gguf_functions.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "diffusers.quantizers.gguf.utils", raising=False)
    with pytest.raises(MissingDependency, match="pip install gguf"):
        load_component(tmp_path / "m.gguf")


def test_config_of_a_gguf_is_read_from_its_shapes(tmp_path: Path, model: torch.nn.Module) -> None:
    write_model(tmp_path / "m.gguf", model, "Q4_0")
    ours = load_component(tmp_path / "m.gguf")
    wanted = {k: v for k, v in model.config.items() if not k.startswith("_")}  # type: ignore[union-attr]
    found = {k: v for k, v in ours.config.items() if not k.startswith("_")}  # type: ignore[union-attr]
    assert json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)
