"""storage: what is said about quantised weights is believed, or refused from the header by name."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support import reference_layouts as layouts
from support import single_files
from support import stored_files as files
from support.tiny_models import make_transformer
from torch import Tensor

from wan_core import WanModelFiles, WanPipelineLoader
from wan_core.errors import CorruptFile, UnsupportedModel, WanError
from wan_core.formats import read_table
from wan_core.formats.foreign import FOREIGN
from wan_core.formats.gguf import GGML_TYPES
from wan_core.formats.kinds import GGUF_TYPES, KINDS
from wan_core.formats.storage import MAX_NOTES, read_weight_kind
from wan_core.loading.component import load_component
from wan_core.loading.reader import TensorReader

State = dict[str, Tensor]
Change = Callable[[State, dict[str, str]], object]
A, B = "blocks.0.self_attn.q", "blocks.0.ffn.0"  # 256 x 256, 512 x 256
ADVICE = re.compile(r"\b(Get|Download|Use|Restore|use|get|[Dd]ownload)\b[^.]*\.$")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    made = make_transformer("wan2.1-t2v", attention_head_dim=128, ffn_dim=512)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made.to(torch.bfloat16).requires_grad_(False)


_packed: dict[tuple[str, str, str], tuple[State, dict[str, str]]] = {}


def packed(
    model: Any, kind: str, style: str = "notes", inside: str = "blocks."
) -> tuple[State, dict[str, str]]:
    """The model in ComfyUI's names, the matrices whose name begins with ``inside`` as ``kind``."""
    key = (kind, style, inside)
    if key not in _packed:
        state = layouts.original_transformer(layouts.state_of(model))
        chosen = {n for n, v in state.items() if n.startswith(inside) and v.ndim == 2}
        matrices = {n for n in chosen if n.endswith(".weight")}
        _packed[key] = files.pack(state, matrices, kind, style)[:2]
    tensors, metadata = _packed[key]
    return dict(tensors), dict(metadata)


def note(value: object) -> Tensor:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def put(name: str, value: Tensor) -> Change:
    return lambda state, _: state.__setitem__(name, value)


def lose(*names: str) -> Change:
    return lambda state, _: [state.pop(name) for name in names]


def say(layer: str, value: object) -> Change:
    return put(f"{layer}.comfy_quant", note(value))


def cast(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda state, _: state.__setitem__(name, change(state[name]))


def both(*changes: Change) -> Change:
    return lambda state, metadata: [change(state, metadata) for change in changes]


def metadata_is(text: str) -> Change:
    return lambda _, metadata: metadata.__setitem__("_quantization_metadata", text)


def note_of_metadata(layer: str, value: object) -> Change:
    """Have the header's metadata say something else of one layer."""

    def change(_: State, metadata: dict[str, str]) -> None:
        whole = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))
        whole["layers"][layer] = value
        metadata["_quantization_metadata"] = json.dumps(whole)

    return change


def too_many(state: State, _: dict[str, str]) -> None:
    for index in range(MAX_NOTES + 1):
        state[f"extra.{index}.weight"] = torch.ones(1, dtype=torch.bfloat16)
        state[f"extra.{index}.comfy_quant"] = note({"format": "float8_e4m3fn"})


def other_names(_: State, metadata: dict[str, str]) -> None:
    metadata["_quantization_metadata"] = metadata["_quantization_metadata"].replace(
        "blocks.", "net.layer_"
    )


E4M3, E5M2 = {"format": "float8_e4m3fn"}, {"format": "float8_e5m2"}
INT8, ROTATED = {"format": "int8_tensorwise"}, {"format": "int8_tensorwise", "convrot": True}
F8 = torch.float8_e4m3fn

# what is wrong: (kind and style of the rest of the file, the change, tensor or layer that the error
# names, what it says was found)
BAD: dict[str, tuple[str, str, Change, str, str]] = {
    "scales of blocks along K (musubi)": (
        "fp8_scaled", "old", put(f"{B}.scale_weight", torch.ones(512, 4, 1)),
        f"{B}.scale_weight", "[512, 4, 1]"),
    "scales of blocks, half precision": (
        "fp8_scaled", "notes", put(f"{B}.weight_scale", torch.ones(512, 4).half()),
        f"{B}.weight_scale", "[512, 4]"),
    "scales of one block a row": (
        "fp8_rows", "notes", put(f"{B}.weight_scale", torch.ones(512, 1, 1)),
        f"{B}.weight_scale", "[512, 1, 1]"),
    "scales of columns": (
        "fp8_scaled", "notes", put(f"{B}.weight_scale", torch.ones(256)),
        f"{B}.weight_scale", "[256]"),
    "scales of columns of a square weight": (
        "fp8_scaled", "notes", put(f"{A}.weight_scale", torch.ones(1, 256)),
        f"{A}.weight_scale", "[1, 256]"),
    "no number in a scale": (
        "fp8_scaled", "notes", put(f"{A}.weight_scale", torch.ones(0)), f"{A}.weight_scale", "[0]"),
    "scale in float64": (
        "fp8_scaled", "notes", put(f"{A}.weight_scale", torch.ones((), dtype=torch.float64)),
        f"{A}.weight_scale", "F64"),
    "scale of int8 rows in blocks": (
        "int8_rows", "notes", put(f"{B}.weight_scale", torch.ones(512, 2)),
        f"{B}.weight_scale", "[512, 2]"),
    "scale of an fp8 layer lost": (
        "fp8_scaled", "notes", lose(f"{A}.weight_scale"), f"{A}.weight", "scale"),
    "scale lost, by metadata": (
        "fp8_scaled", "metadata", lose(f"{A}.weight_scale"), f"{A}.weight", "scale"),
    "scale lost, by its siblings": (
        "fp8_scaled", "old", lose(f"{A}.scale_weight"), f"{A}.weight", "1 of 2"),
    "scale of int8 lost": (
        "int8_rows", "notes", lose(f"{A}.weight_scale"), f"{A}.weight", "scale"),
    "int8 without note or scale": (
        "fp8_scaled", "old", both(
            put(f"{A}.weight", torch.ones(256, 256, dtype=torch.int8)), lose(f"{A}.scale_weight")),
        f"{A}.weight", "I8"),
    "one int8 layer without a note": (
        "int8_convrot", "notes", lose(f"{A}.comfy_quant"), f"{A}.weight", "rotated"),
    "a scale for a weight in full precision": (
        "fp8_scaled", "old", cast(f"{A}.weight", lambda w: w.to(torch.bfloat16)),
        f"{A}.weight", "BF16"),
    "a scale without a weight": (
        "fp8_scaled", "old", put("blocks.7.ffn.0.scale_weight", torch.ones(())),
        "blocks.7.ffn.0.scale_weight", "weight"),
    "a kind nobody knows": (
        "fp8_scaled", "notes", say(A, {"format": "int3_tensorwise"}), A, "int3_tensorwise"),
    "int4 rotated": ("fp8_scaled", "notes", say(A, {"format": "convrot_w4a4"}), A, "convrot_w4a4"),
    "a note without a kind": ("fp8_scaled", "notes", say(A, {"convrot": True}), A, "note"),
    "a note that is no JSON": ("fp8_scaled", "notes", say(A, b"{'format'"), A, "note"),
    "a note that is a list": ("fp8_scaled", "notes", say(A, ["float8_e4m3fn"]), A, "note"),
    "a kind that is a list": ("fp8_scaled", "notes", say(A, {"format": ["nvfp4"]}), A, "note"),
    "a note that is a book": (
        "fp8_scaled", "notes", say(A, b" " * 600), f"{A}.comfy_quant", "600 bytes"),
    "too many notes": ("fp8_scaled", "notes", too_many, "comfy_quant", f"{MAX_NOTES:,}"),
    "a note on a layer that is not there": (
        "fp8_scaled", "notes", say("blocks.9.ffn.0", E4M3), "blocks.9.ffn.0", "no weight"),
    "metadata that is no JSON": (
        "int8_convrot", "metadata", metadata_is("{'layers'"), "_quantization_metadata", "JSON"),
    "metadata without layers": (
        "int8_convrot", "metadata", metadata_is('{"layers": 3}'), "_quantization_metadata",
        "layers"),
    "metadata of other layers, int8 weights": (
        "int8_convrot", "metadata", other_names, "blocks.0.", "metadata"),
    "metadata against a note": (
        "fp8_scaled", "notes", note_of_metadata(A, INT8), A, "int8_tensorwise"),
    "fp8 by its note, bf16": (
        "fp8_scaled", "notes", cast(f"{A}.weight", lambda w: w.to(torch.bfloat16)),
        f"{A}.weight", "BF16"),
    "e5m2 by its note, e4m3": ("fp8_scaled", "notes", say(A, E5M2), f"{A}.weight", "F8_E4M3"),
    "int8 by its note, fp8": ("fp8_scaled", "notes", say(A, INT8), f"{A}.weight", "F8_E4M3"),
    "int8 in three axes": (
        "int8_rows", "notes", cast(f"{A}.weight", lambda w: w.view(256, 256, 1)),
        f"{A}.weight", "[256, 256, 1]"),
    "nvfp4 by its note, fp8": (
        "fp8_scaled", "notes", say(A, {"format": "nvfp4"}), f"{A}.weight", "F8_E4M3"),
    "mxfp8 by its note, bf16": (
        "mxfp8", "notes", cast(f"{A}.weight", lambda w: w.to(torch.bfloat16)),
        f"{A}.weight", "BF16"),
    "nvfp4 without a note": (
        "nvfp4", "notes", lose(f"{A}.comfy_quant"), f"{A}.weight", "nvfp4"),
    "mxfp8 without a note": (
        "mxfp8", "notes", lose(f"{A}.comfy_quant"), f"{A}.weight", "mxfp8"),
    "nvfp4, its second scale lost": (
        "nvfp4", "notes", lose(f"{A}.weight_scale_2"), f"{A}.weight", "weight_scale_2"),
    "nvfp4, its scales lost": (
        "nvfp4", "notes", lose(f"{A}.weight_scale"), f"{A}.weight", "weight_scale"),
    "nvfp4, scales without padding": (
        "nvfp4", "notes", cast(f"{A}.weight_scale", lambda s: s[:100].clone()),
        f"{A}.weight_scale", "[100, 16]"),
    "nvfp4, scales that are floats": (
        "nvfp4", "notes", cast(f"{A}.weight_scale", lambda s: s.float()),
        f"{A}.weight_scale", "F32"),
    "nvfp4, a second scale for each row": (
        "nvfp4", "notes", put(f"{A}.weight_scale_2", torch.ones(256)),
        f"{A}.weight_scale_2", "[256]"),
    "nvfp4, a second scale in fp8": (
        "nvfp4", "notes", put(f"{A}.weight_scale_2", torch.ones(()).to(F8)),
        f"{A}.weight_scale_2", "F8_E4M3"),
    "nvfp4, half a block": (
        "nvfp4", "notes", cast(f"{A}.weight", lambda w: w[:, :124].clone()), f"{A}.weight", "248"),
    "mxfp8, half a block": (
        "mxfp8", "notes", cast(f"{A}.weight", lambda w: w[:, :240].clone()), f"{A}.weight", "240"),
    "mxfp8, scales that are floats": (
        "mxfp8", "notes", cast(f"{A}.weight_scale", lambda s: s.float()),
        f"{A}.weight_scale", "F32"),
    "rotated by 24": (
        "int8_convrot", "notes", say(A, ROTATED | {"convrot_groupsize": 24}), f"{A}.weight", "24"),
    "rotated by more than there are": (
        "int8_convrot", "notes", say(A, ROTATED | {"convrot_groupsize": 1024}), f"{A}.weight",
        "1024"),
    "rotated by a word": (
        "int8_convrot", "notes", say(A, ROTATED | {"convrot_groupsize": "256"}), f"{A}.weight",
        "'256'"),
    "rotated by a fraction": (
        "int8_convrot", "notes", say(A, ROTATED | {"convrot_groupsize": 256.0}), f"{A}.weight",
        "256.0"),
    "rotated by the word false": (
        "int8_rows", "notes", say(A, INT8 | {"convrot": "false"}), f"{A}.weight", "'false'"),
    "two scales that differ": (
        "fp8_scaled", "notes", put(f"{A}.scale_weight", torch.tensor(2.0)), f"{A}.scale_weight",
        "differ"),
    "fp8 marked as scaled, all scales lost": (
        "fp8", "old", put("scaled_fp8", torch.empty(0, dtype=F8)), "scales", "20 fp8 weights"),
    **{f"a weight in {name}": (
        "fp8_scaled", "old", put("blocks.0.ffn.0.bias", torch.ones(512).to(dtype)),
        "blocks.0.ffn.0.bias", name)
        for name, dtype in {"F64": torch.float64, "I64": torch.int64, "U8": torch.uint8,
                            "BOOL": torch.bool}.items()},
    **{f"foreign {suffix}": (
        "fp8_scaled", "old", put(f"{A}{suffix}", torch.ones(256)), f"{A}{suffix}", what)
        for suffix, what in FOREIGN.items()},
}  # fmt: skip


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a weight was to be read")

    monkeypatch.setattr(TensorReader, "__init__", refuse)
    for reader in ("load_component", "load_tokenizer"):
        monkeypatch.setattr(f"wan_core.render.stages.{reader}", refuse)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    single_files.write(folder)
    return folder


def opened(whole: Path, bad: Path, place: str = "transformer_2") -> Any:
    """Open a pair of experts, with ``bad`` in one place and good files in the others."""
    given: dict[str, Any] = {
        "transformer": whole / "diffusion_models" / single_files.HIGH,
        "transformer_2": whole / "diffusion_models" / single_files.LOW,
        "text_encoder": whole / "text_encoders" / single_files.TEXT,
        "vae": whole / "vae" / single_files.VAE,
    }
    return WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        WanModelFiles(**given | {place: bad}), optimization_config={"device": "cpu"}
    )


def refused(call: Callable[[], object], path: Path, subject: str, found: str) -> str:
    with pytest.raises(WanError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) in (CorruptFile, UnsupportedModel), text
    assert path.name in text, "the error does not name the file"
    assert subject in text, f"{subject} is not named: {text}"
    assert found in text, f"{found} is not said: {text}"
    assert ADVICE.search(text), f"what to do is not said: {text}"
    return text


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("case", BAD)
def test_what_is_said_wrongly_is_refused_from_the_header(
    tmp_path: Path, whole: Path, model: Any, case: str
) -> None:
    kind, style, change, subject, found = BAD[case]
    tensors, metadata = packed(model, kind, style)
    change(tensors, metadata)
    path = files.write(tmp_path / "bad.safetensors", tensors, metadata)
    text = refused(lambda: opened(whole, path), path, subject, found)
    assert refused(lambda: opened(whole, path, "transformer"), path, subject, found) == text
    assert refused(lambda: load_component(path), path, subject, found) == text


TEXT_LAYER = "encoder.block.0.layer.1.DenseReluDense.wi_0"
BAD_TEXT: dict[str, tuple[Change, str, str]] = {
    "a kind nobody knows": (say(TEXT_LAYER, {"format": "int3"}), TEXT_LAYER, "int3"),
    "no scale": (say(TEXT_LAYER, E4M3), TEXT_LAYER, "scale"),
    "scales of blocks": (
        both(say(TEXT_LAYER, E4M3), put(f"{TEXT_LAYER}.weight_scale", torch.ones(64, 2, 1))),
        f"{TEXT_LAYER}.weight_scale", "[64, 2, 1]"),
    "a note on nothing": (say("encoder.block.9.q", E4M3), "encoder.block.9.q", "no weight"),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("case", BAD_TEXT)
def test_a_text_encoder_is_refused_from_the_header(tmp_path: Path, whole: Path, case: str) -> None:
    from safetensors.torch import load_file

    change, subject, found = BAD_TEXT[case]
    tensors = load_file(whole / "text_encoders" / single_files.TEXT)
    tensors[f"{TEXT_LAYER}.weight"] = tensors[f"{TEXT_LAYER}.weight"].to(F8)
    change(tensors, {})
    path = files.write(tmp_path / "bad.safetensors", tensors)
    refused(lambda: opened(whole, path, "text_encoder"), path, subject, found)


# GGUF --------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Any, kind: str, change: Any = None) -> Path:
    """Write the matrices of the model's blocks in a GGUF quantisation, the rest in F32.

    ``change`` is given every tensor instead, and returns its blocks, or None for F32.
    """

    def usual(_: Any, name: str, value: Tensor) -> np.ndarray | None:
        matrix = name.startswith("blocks.") and value.ndim == 2
        return files.gguf_blocks(value, kind) if matrix else None

    writer = gguf.GGUFWriter(path, "wan")
    for name, value in layouts.original_transformer(layouts.state_of(model)).items():
        data = (change or usual)(writer, name, value)
        if data is None:
            writer.add_tensor(name, np.ascontiguousarray(value.float().numpy()))
        else:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("lost", [1, 100_000, "in the header"])
def test_a_truncated_gguf_is_refused_from_its_header(
    tmp_path: Path, whole: Path, model: Any, lost: int | str
) -> None:
    path = write_gguf(tmp_path / "bad.gguf", model, "Q8_0")
    data = path.read_bytes()
    path.write_bytes(data[:500] if lost == "in the header" else data[: -int(lost)])
    with pytest.raises(CorruptFile, match=r"bad\.gguf.*(early|left|shorter).*Download"):
        opened(whole, path)


def retyped(path: Path, name: str, new: int, size: int) -> None:
    """Write another type number beside one tensor's name, and its data at the end of the file."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (dims,) = struct.unpack_from("<I", data, at)
    place = at + 4 + 8 * dims
    base = read_table(path).tensors
    start = min(info.start for info in base.values())
    end = -(-(len(data) - start) // 32) * 32
    struct.pack_into("<IQ", data, place, new, end)
    path.write_bytes(bytes(data).ljust(start + end, b"\0") + bytes(size))


def test_every_gguf_type_is_read_or_refused_by_name(
    tmp_path: Path, whole: Path, model: Any, nothing_is_read: None
) -> None:
    refusals = 0
    for number, (kind, block, width) in GGML_TYPES.items():
        if kind in GGUF_TYPES:
            continue
        path = write_gguf(tmp_path / "bad.gguf", model, "Q8_0")
        retyped(path, f"{B}.weight", number, 512 * 256 // block * width)
        text = refused(lambda path=path: opened(whole, path), path, f"{B}.weight", kind)
        assert "Q4_K" in text and "Q8_0" in text  # what is allowed
        refusals += 1
    assert refusals > 10


def test_a_gguf_type_that_did_not_exist_yet_is_refused(
    tmp_path: Path, whole: Path, model: Any, nothing_is_read: None
) -> None:
    path = write_gguf(tmp_path / "bad.gguf", model, "Q8_0")
    retyped(path, f"{B}.weight", 77, 64)
    refused(lambda: opened(whole, path), path, f"{B}.weight", "77")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (struct.pack(">I", 3), "big-endian"), (struct.pack("<I", 1), "version 1"),
        (struct.pack("<I", 4), "version 4"),
    ],
)  # fmt: skip
def test_a_gguf_of_another_version_or_byte_order_is_told(
    tmp_path: Path, model: Any, version: bytes, said: str
) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(b"GGUF" + version + bytes(64))
    refused(lambda: read_table(path), path, said, "GGUF")


@pytest.mark.parametrize("alignment", [1, 4096])
def test_gguf_tensors_lie_at_any_alignment(tmp_path: Path, model: Any, alignment: int) -> None:
    def aligned(writer: Any, name: str, value: Tensor) -> np.ndarray | None:
        if not writer.kv_data[0].get("general.alignment"):
            writer.add_custom_alignment(alignment)
        matrix = name.startswith("blocks.") and value.ndim == 2
        return files.gguf_blocks(value, "Q8_0") if matrix else None

    path = write_gguf(tmp_path / "odd.gguf", model, "Q8_0", aligned)
    usual = write_gguf(tmp_path / "usual.gguf", model, "Q8_0")
    starts = [info.start for info in read_table(path).tensors.values()]
    assert all(b % alignment == 0 for b in starts)
    ours, theirs = (
        load_component(one, torch.bfloat16, keep_quantized=True, map_file=True)
        for one in (path, usual)
    )
    for name, value in theirs.named_parameters():
        same = ours.get_parameter(name)
        assert torch.equal(same.view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_blocks_that_run_across_rows(tmp_path: Path, kind: str) -> None:
    """Some writers fold a matrix into rows of whole blocks and note its shape; some do biases."""
    torch.manual_seed(1)
    narrow = make_transformer("wan2.1-t2v", attention_head_dim=128, ffn_dim=528, num_layers=1)
    folded = {"blocks.0.ffn.2.weight": [256, 528], "blocks.0.self_attn.q.bias": [256]}
    expected = {}

    def change(writer: Any, name: str, value: Tensor) -> np.ndarray | None:
        if name not in folded:
            return None
        data = files.gguf_blocks(value.view(-1, 256), kind, seed=len(expected))
        expected[name] = files.gguf_meaning(data, kind, torch.bfloat16).view(folded[name])
        writer.add_array(f"comfy.gguf.orig_shape.{name}", folded[name])
        return data

    path = write_gguf(tmp_path / "m.gguf", narrow, kind, change)
    assert len(expected) == 2
    for keep in (False, True):
        loaded = load_component(path, torch.bfloat16, keep_quantized=keep)
        assert torch.equal(loaded.blocks[0].ffn.net[2].weight, expected["blocks.0.ffn.2.weight"])
        assert torch.equal(loaded.blocks[0].attn1.to_q.bias, expected["blocks.0.self_attn.q.bias"])


# What is odd and right ---------------------------------------------------------------------------


def loaded_equal(path: Path, like: Path) -> Any:
    """Load both, kept and dequantised, and compare every number; returns the first as kept."""
    for keep in (False, True):
        ours = load_component(path, torch.bfloat16, keep_quantized=keep)
        theirs = load_component(like, torch.bfloat16, keep_quantized=keep)
        for name, layer in ours.named_modules():
            same: Any = theirs.get_submodule(name)
            if hasattr(layer, "dequantized"):
                assert torch.equal(
                    layer.dequantized(torch.bfloat16), same.dequantized(torch.bfloat16)
                )
            for key, value in layer.named_parameters(recurse=False):
                other = getattr(same, key)
                if other is not None:  # a scale for each row, that of all of them in the other
                    assert torch.equal(value.view(torch.uint8), other.view(torch.uint8)), name
    return ours


def one_byte(dtype: torch.dtype) -> Change:
    def change(state: State, _: dict[str, str]) -> None:
        for name in [n for n, v in state.items() if v.dtype in (F8, torch.float8_e5m2)]:
            state[name] = state[name].view(dtype)

    return change


def below_params(state: State, _: dict[str, str]) -> None:
    for name in [n for n in state if n.endswith(".comfy_quant")]:
        whole = json.loads(state[name].numpy().tobytes())
        state[name] = note({"format": whole.pop("format"), "params": whole})


def prefixed(old: str, new: str) -> Change:
    def change(_: State, metadata: dict[str, str]) -> None:
        text = metadata["_quantization_metadata"]
        metadata["_quantization_metadata"] = text.replace(f'"{old}blocks.', f'"{new}blocks.')

    return change


def scales(change: Callable[[Tensor], Tensor]) -> Change:
    def apply(state: State, _: dict[str, str]) -> None:
        for name in [n for n in state if n.endswith((".weight_scale", ".scale_weight"))]:
            state[name] = change(state[name])

    return apply


def hints(state: State, _: dict[str, str]) -> None:
    state[f"{A}.input_scale"] = torch.tensor(17.0)
    state[f"{B}.scale_input"] = torch.tensor([17.0])


def both_spellings(state: State, _: dict[str, str]) -> None:
    for name in [n for n in state if n.endswith(".weight_scale")]:
        state[name.removesuffix("weight_scale") + "scale_weight"] = state[name].clone()


def of_many_forms(state: State, _: dict[str, str]) -> None:
    """Scales of a number or of rows, in the shapes that writers give them."""
    forms = ((), (1,), (1, 1), (-1,), (-1, 1))
    names = sorted(n for n in state if n.endswith(".scale_weight"))
    for index, name in enumerate(names):
        form, rows = forms[index % 5], len(state[name.removesuffix("scale_weight") + "weight"])
        whole = state[name].reshape(1)
        state[name] = (whole.expand(rows) if -1 in form else whole).reshape(form).contiguous()
    for name in [n for n in state if "norm" in n and n.endswith("weight")]:
        state[name] = state[name].float()


def nothing_said(state: State, _: dict[str, str]) -> None:
    """Options that are null where the note's other place, or nothing, says them."""
    null = dict.fromkeys(("convrot", "convrot_groupsize", "full_precision_matrix_mult"))
    for index, name in enumerate([n for n in state if n.endswith(".comfy_quant")]):
        whole = json.loads(state[name].numpy().tobytes())
        below = {"format": whole["format"], "params": null | whole, **null}
        note_of = below if index % 2 else null | whole | {"params": null}
        say(name.removesuffix(".comfy_quant"), note_of)(state, {})


ODD: dict[str, tuple[str, str, Change]] = {
    "options that are null": ("int8_convrot", "notes", nothing_said),
    "options that are null, not rotated": ("int8_rows", "notes", nothing_said),
    "both spellings of a scale": ("fp8_scaled", "notes", both_spellings),
    "scales of many forms, norms in fp32": ("fp8_scaled", "old", of_many_forms),
    "fp8 typed U8": ("fp8_scaled", "notes", one_byte(torch.uint8)),
    "fp8 typed I8": ("fp8_scaled", "notes", one_byte(torch.int8)),
    "e5m2 typed U8": ("fp8_scaled_e5m2", "notes", one_byte(torch.uint8)),
    "e5m2 typed U8, by metadata": ("fp8_scaled_e5m2", "metadata", one_byte(torch.uint8)),
    "nvfp4 scales typed U8": ("nvfp4", "notes", one_byte(torch.uint8)),
    "mxfp8 typed U8": ("mxfp8", "notes", one_byte(torch.uint8)),
    "options below params": ("int8_convrot", "notes", below_params),
    "metadata with a prefix": ("int8_convrot", "metadata", prefixed("", "model.diffusion_model.")),
    "metadata with another prefix": ("fp8_scaled", "metadata", prefixed("", "net.")),
    "one number as [1]": ("fp8_scaled", "notes", scales(lambda s: s.reshape(1))),
    "one number as [1, 1]": ("fp8_scaled", "old", scales(lambda s: s.reshape(1, 1))),
    "rows as [N] where N = K": ("fp8_rows", "notes", scales(lambda s: s.reshape(-1))),
    "int8 rows as [N] where N = K": ("int8_convrot", "notes", scales(lambda s: s.reshape(-1))),
    "hints for activations": ("fp8_scaled", "old", hints),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_and_right_gives_the_same_numbers(
    tmp_path: Path, model: Any, case: str
) -> None:
    kind, style, change = ODD[case]
    tensors, metadata = packed(model, kind, style)
    plain = files.write(tmp_path / "plain.safetensors", tensors, metadata)
    tensors, metadata = dict(tensors), dict(metadata)
    change(tensors, metadata)
    odd = files.write(tmp_path / "odd.safetensors", tensors, metadata)
    kept = loaded_equal(odd, plain)
    assert sum(hasattr(layer, "dequantized") for layer in kept.modules()) == 20


def test_a_note_may_forbid_products_in_8_bit(tmp_path: Path, model: Any) -> None:
    for kind in ("fp8_scaled", "int8_rows"):
        tensors, metadata = packed(model, kind)
        whole = json.loads(tensors[f"{A}.comfy_quant"].numpy().tobytes())
        say(A, whole | {"params": {"full_precision_matrix_mult": True}})(tensors, metadata)
        table = read_table(files.write(tmp_path / "m.safetensors", tensors, metadata))
        found = read_weight_kind(table, table.tensors).weights
        assert [name for name, one in found.items() if one.full_precision] == [f"{A}.weight"]


def test_packed_layers_outside_the_blocks_have_their_own_sizes(tmp_path: Path, model: Any) -> None:
    """Two numbers in a byte: the model's sizes are not the stored tensors'."""
    state = layouts.original_transformer(layouts.state_of(model))
    names = {f"{name}.weight" for name in ("text_embedding.0", "time_embedding.0", "head.head")}
    tensors, metadata, meanings = files.pack(state, names, "nvfp4", "notes")
    path = files.write(tmp_path / "m.safetensors", tensors, metadata)
    for keep in (False, True):
        loaded = load_component(path, torch.bfloat16, keep_quantized=keep)
        layer: Any = loaded.condition_embedder.text_embedder.linear_1
        found = layer.dequantized(torch.bfloat16) if keep else layer.weight
        assert torch.equal(found, meanings["text_embedding.0.weight"](torch.bfloat16))


@pytest.mark.parametrize(("kind", "wild"), [("nvfp4", 0x7F), ("nvfp4", 0xFF), ("mxfp8", 255)])
def test_a_scale_of_a_block_that_is_no_number_is_found_where_it_is_read(
    tmp_path: Path, model: Any, kind: str, wild: int
) -> None:
    """A CPU's attention takes NaN for nothing: the video would be noise and no error."""
    state = layouts.original_transformer(layouts.state_of(model))
    name = "text_embedding.0"  # 32 columns: blocks that are padded to four
    tensors, metadata, _ = files.pack(state, {f"{name}.weight"}, kind, "notes")
    whole = tensors[f"{name}.weight_scale"].view(torch.uint8)
    for at, in_padding in ((0, False), (3, True)):
        bad = whole.clone()
        bad.view(-1)[at] = wild
        tensors[f"{name}.weight_scale"] = bad
        path = files.write(tmp_path / "m.safetensors", tensors, metadata)
        for keep in (False, True):
            if in_padding:
                load_component(path, torch.bfloat16, keep_quantized=keep)
                continue
            with pytest.raises(CorruptFile, match="NaN or infinity") as caught:
                load_component(path, torch.bfloat16, keep_quantized=keep)
            assert f"{name}.weight_scale" in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize("kind", ["int8_convrot", "nvfp4"])
def test_shards_say_each_of_their_own_layers(tmp_path: Path, model: Any, kind: str) -> None:
    """Metadata of one shard do not hide those of another: rotated rows would be read as plain."""
    tensors, metadata = packed(model, kind, "metadata")
    whole = files.write(tmp_path / "whole.safetensors", tensors, metadata)
    said = json.loads(metadata["_quantization_metadata"])["layers"]
    folder = tmp_path / "shards"
    folder.mkdir()

    def written(*others: dict[str, Any]) -> Path:
        places: dict[str, str] = {}
        for index, (first, more) in enumerate(zip((True, False), others, strict=True)):
            own = {n: v for n, v in tensors.items() if n.startswith("blocks.0.") == first}
            layers = {n: v for n, v in said.items() if n.startswith("blocks.0.") == first} | more
            name = f"m-0000{index + 1}-of-00002.safetensors"
            stated = {"_quantization_metadata": json.dumps({"layers": layers})}
            files.write(folder / name, own, stated)
            places |= dict.fromkeys(own, name)
        index_file = folder / "m.safetensors.index.json"
        index_file.write_text(json.dumps({"weight_map": places}))
        return index_file

    loaded_equal(written({}, {}), whole)
    loaded_equal(written({}, {A: said[A]}), whole)
    index_file = written({}, {A: {"format": "float8_e4m3fn"}})
    refused(lambda: read_table(index_file), index_file, A, "_quantization_metadata")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["fp8_scaled", "fp8_rows", "int8_rows"])
def test_scales_in_half_precision_are_widened_and_not_rounded_again(
    tmp_path: Path, model: Any, kind: str, dtype: torch.dtype
) -> None:
    tensors, metadata = packed(model, kind)
    half = {n: v.to(dtype) if n.endswith(".weight_scale") else v for n, v in tensors.items()}
    wide = {n: v.float() if n.endswith(".weight_scale") else v for n, v in half.items()}
    loaded_equal(
        files.write(tmp_path / "half.safetensors", half, metadata),
        files.write(tmp_path / "wide.safetensors", wide, metadata),
    )


def test_image_embedders_norms_are_no_siblings_of_its_linear_layers(tmp_path: Path) -> None:
    """img_emb.proj.0 and .4 are LayerNorms, .1 and .3 linear: only their numbers differ."""
    torch.manual_seed(2)
    model = make_transformer("wan2.1-i2v", attention_head_dim=128, ffn_dim=512)
    state = layouts.original_transformer(layouts.state_of(model.to(torch.bfloat16)))
    linear = {"img_emb.proj.1.weight", "img_emb.proj.3.weight", f"{A}.weight"}
    assert state["img_emb.proj.0.weight"].ndim == 1
    for style in files.STYLES:
        tensors, metadata, _ = files.pack(state, linear, "fp8_scaled", style)
        for norms in (torch.bfloat16, F8):
            for index in (0, 4):
                name = f"img_emb.proj.{index}.weight"
                tensors[name] = state[name].to(norms)
            path = files.write(tmp_path / "m.safetensors", tensors, metadata)
            kind = read_weight_kind(table := read_table(path), table.tensors)
            assert {n for n, s in kind.weights.items() if s.scale} == linear
            load_component(path, torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "style"),
    files.in_every_style("fp8_scaled", "fp8_rows", "int8_rows", "nvfp4"),
)
def test_files_that_mix_are_whole(tmp_path: Path, model: Any, kind: str, style: str) -> None:
    state = layouts.original_transformer(layouts.state_of(model))
    for inside in ("blocks.1.", "blocks.0.ffn", "blocks.1.cross_attn.v"):
        tensors, metadata = packed(model, kind, style, inside)
        path = files.write(tmp_path / "m.safetensors", tensors, metadata)
        kept = load_component(path, torch.bfloat16, keep_quantized=True)
        count = sum(n.startswith(inside) and v.ndim == 2 for n, v in state.items())
        assert sum(hasattr(layer, "dequantized") for layer in kept.modules()) == count
        for wide in (torch.float32, torch.float16):
            tensors[f"{A}.bias"] = tensors[f"{A}.bias"].to(wide)
            load_component(files.write(path, tensors, metadata), torch.bfloat16)


# -- which kind keeps more ------------------------------------------------------------------------


def test_kinds_are_ranked_by_what_they_keep_of_a_weight() -> None:
    """Errors on normally distributed weights of 0.02, by the same quantisers as the files here;
    GGUF's types that the package cannot write by their bits."""
    weight = 0.02 * torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))

    def error(found: Tensor) -> float:
        return float((found.float() - weight).pow(2).mean().sqrt() / 0.02)

    errors = {
        "fp8": error(weight.to(torch.float8_e4m3fn)),
        "fp8_e5m2": error(weight.to(torch.float8_e5m2)),
        "fp8_scaled": error(files.fp8(weight).meaning(torch.float32)),
        "int8": error(files.int8(weight).meaning(torch.float32)),
        "mxfp8": error(files.mxfp8(weight).meaning(torch.float32)),
        "nvfp4": error(files.nvfp4(weight).meaning(torch.float32)),
    }
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        data = files.gguf_blocks(weight, kind)
        errors[kind] = error(files.gguf_meaning(data, kind, torch.float32))
    by_error = sorted(errors, key=lambda kind: errors[kind])
    assert by_error == sorted(errors, key=KINDS.index), errors
    bits = {name: nbytes / numbers for name, numbers, nbytes in GGML_TYPES.values()}
    fitted = [kind for kind in KINDS if kind.endswith("_K") or kind.startswith("IQ")]
    assert fitted == sorted(fitted, key=lambda kind: -bits[kind])
    assert KINDS[:3] == ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("kind", [*files.KINDS, *files.GGUF_KINDS, "F32", "F16", "BF16"])
def test_every_kind_of_file_has_its_place(tmp_path: Path, model: Any, kind: str) -> None:
    if kind in files.KINDS:
        state, metadata = packed(model, kind)
        table = read_table(files.write(tmp_path / "m.safetensors", state, metadata))
    else:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
        quant = gguf.GGMLQuantizationType[kind]
        numbers = np.zeros((4, 256), np.float16 if kind == "F16" else np.float32)
        if kind == "BF16":
            numbers = np.zeros((4, 512), np.uint8)
        if kind in files.GGUF_KINDS:
            numbers = files.gguf_blocks(torch.zeros(4, 256), kind)
        writer.add_tensor("blocks.0.self_attn.q.weight", numbers, raw_dtype=quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        table = read_table(tmp_path / "m.gguf")
    found = read_weight_kind(table, table.tensors)
    assert found.kind in KINDS and found.rank == KINDS.index(found.kind) < len(KINDS)
    assert replace(found, name="int5").rank == len(KINDS)
    if kind in files.GGUF_KINDS:
        assert found.kind == kind
