"""load_component against from_pretrained, and what it refuses before a weight is read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference_layouts as layouts
from support.tiny_models import FAMILIES, components, make_folder

from wan_core.errors import (
    CorruptFile,
    MissingDependency,
    ModelFileError,
    ModelMismatch,
    UnsupportedModel,
    WanError,
)
from wan_core.loading.blueprint import Blueprint
from wan_core.loading.component import build, load_component
from wan_core.models import map_names

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {family: make_folder(root / family, family) for family in FAMILIES}


def from_pretrained(folder: Path, **kwargs: Any) -> torch.nn.Module:
    import diffusers
    import transformers

    config = json.loads((folder / "config.json").read_text())
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_pretrained(folder, **kwargs)
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder, **kwargs)


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for name, value in other.items():
        assert mine[name].dtype == value.dtype, name
        assert torch.equal(mine[name], value), name
    buffers = dict(theirs.named_buffers())
    assert dict(ours.named_buffers()).keys() == buffers.keys()
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name
    assert type(ours) is type(theirs)
    assert not ours.training


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_component_equals_from_pretrained(
    folders: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    parts = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
    seen = 0
    for part in parts:
        folder = folders[family] / part
        if folder.is_dir():
            ours = load_component(folder, dtype)
            assert_same(ours, from_pretrained(folder, torch_dtype=dtype))
            seen += 1
    assert seen >= 3


def test_modules_kept_in_fp32_are_fp32_and_others_not(folders: dict[str, Path]) -> None:
    model = load_component(folders["wan2.1-t2v"] / "transformer", torch.bfloat16)
    assert model.get_parameter("scale_shift_table").dtype == torch.float32
    assert model.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16
    assert model.get_buffer("rope.freqs_cos").dtype == torch.float32
    text = load_component(folders["wan2.1-t2v"] / "text_encoder", torch.float16)
    assert text.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight").dtype == (
        torch.float32
    )


def settings(module: torch.nn.Module) -> dict[str, Any]:
    config: Any = module.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {k: v for k, v in values.items() if k not in ("_name_or_path", "dtype")}


def test_configuration_and_output_equal_from_pretrained(folders: dict[str, Path]) -> None:
    root = folders["wan2.1-i2v"]
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        ours, theirs = load_component(root / part), from_pretrained(root / part)
        left, right = settings(ours), settings(theirs)
        assert left == right and len(left) > 10
    ids = torch.tensor([[5, 9, 1]])
    ours, theirs = load_component(root / "text_encoder"), from_pretrained(root / "text_encoder")
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)


def test_none_keeps_the_files_dtype(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "bf16", "wan2.1-t2v", dtype=torch.bfloat16)
    model = load_component(folder / "transformer")
    assert model.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16
    assert model.get_parameter("blocks.0.norm2.weight").dtype == torch.float32
    vae = load_component(folder / "vae")
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}


def test_sharded_weights_equal_whole_ones(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = make_folder(tmp_path / "sharded", "wan2.1-t2v", max_shard_size="20KB")
    shards = list((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    whole = folders["wan2.1-t2v"]
    assert_same(load_component(folder / "transformer"), load_component(whole / "transformer"))


def test_umt5_shares_its_embedding(folders: dict[str, Path]) -> None:
    model = load_component(folders["wan2.1-t2v"] / "text_encoder", torch.bfloat16)
    shared = model.get_parameter("shared.weight")
    assert model.encoder.embed_tokens.weight is shared  # type: ignore[union-attr]


def test_umt5_embedding_under_its_second_name_only(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    folder = copy(folders["wan2.1-t2v"] / "text_encoder", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, folder / "model.safetensors")
    assert_same(load_component(folder), load_component(folders["wan2.1-t2v"] / "text_encoder"))


def test_nothing_is_left_without_memory_or_with_gradient(folders: dict[str, Path]) -> None:
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        model = load_component(folders["wan2.1-i2v"] / part)
        tensors = [*model.parameters(), *model.buffers()]
        assert tensors
        assert not any(t.is_meta or t.requires_grad for t in tensors)


def test_the_file_may_be_overwritten_after_loading(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    folder = copy(folders["wan2.1-t2v"] / "vae", tmp_path)
    model = load_component(folder)
    before = [p.clone() for p in model.parameters()]
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_mapped_weights_are_equal_and_never_written_to_the_file(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    folder = copy(folders["wan2.1-i2v"] / "transformer", tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    for dtype in DTYPES:
        assert_same(load_component(folder, dtype, map_file=True), load_component(folder, dtype))
    model = load_component(folder, map_file=True)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert max(pointers) - min(pointers) < len(before)  # all within one mapping
    with torch.no_grad():
        model.get_parameter("proj_out.weight").add_(1.0)
    assert file.read_bytes() == before
    file.unlink()
    assert bool(torch.isfinite(model.get_parameter("proj_out.weight")).all())


@pytest.mark.parametrize("mapped", [False, True])
def test_a_header_of_odd_length(tmp_path: Path, folders: dict[str, Path], mapped: bool) -> None:
    folder = copy(folders["wan2.1-t2v"] / "vae", tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    while len(header) % 2 == 0:
        header += b" "
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    whole = load_component(folders["wan2.1-t2v"] / "vae")
    assert_same(load_component(folder, map_file=mapped), whole)


def test_mapped_weights_that_are_not_finite_are_named(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    folder = copy(folders["wan2.1-t2v"] / "vae", tmp_path)
    name = "decoder.conv_in.weight"
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(CorruptFile, match=name):
        load_component(folder, map_file=True)


def test_default_dtype_and_seed_of_the_process_are_untouched(folders: dict[str, Path]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_component(folders["wan2.1-t2v"] / "transformer", torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.rand(1), expected)


# What is refused -----------------------------------------------------------------------------


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to / folder.name)
    return to / folder.name


def change_tensors(folder: Path, change: Any) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def refused(folder: Path, error: type[WanError]) -> str:
    """Load ``folder``, expect ``error``, and require that no weight was read."""
    from wan_core.loading import reader as tensors

    reads: list[str] = []
    original = tensors.TensorReader.read

    def spy(self: Any, source: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        reads.append(source.name)
        return original(self, source, *args, **kwargs)

    tensors.TensorReader.read = spy  # type: ignore[method-assign]
    try:
        with pytest.raises(error) as caught:
            load_component(folder)
    finally:
        tensors.TensorReader.read = original  # type: ignore[method-assign]
    assert reads == []
    return str(caught.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder"])
def test_missing_unknown_and_misshapen_tensors_are_named(
    tmp_path: Path, folders: dict[str, Path], part: str
) -> None:
    folder = copy(folders["wan2.1-i2v"] / part, tmp_path)
    names: list[str] = []

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names.extend(sorted(n for n in tensors if n.endswith("weight"))[3:5])
        tensors.pop(names[0])
        tensors[names[1]] = torch.zeros(7, 7)
        tensors["decoder.stray"] = torch.zeros(2)
        tensors["stray"] = torch.zeros(2)

    change_tensors(folder, change)
    message = refused(folder, ModelMismatch)
    assert names[0].removeprefix("vision_model.") in message
    assert names[1] in message and "[7, 7]" in message
    assert "stray" in message and "config.json" in message


def test_a_missing_transformer_tensor_is_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = copy(folders["wan2.1-t2v"] / "transformer", tmp_path)
    change_tensors(folder, lambda tensors: tensors.pop("blocks.1.ffn.net.2.bias"))
    message = refused(folder, ModelMismatch)
    assert "1 of " in message and "blocks.1.ffn.net.2.bias" in message


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("num_layers", 3, ModelMismatch),
        ("num_layers", 10**6, CorruptFile),
        ("num_layers", "two", ModelMismatch),
        ("in_channels", 36, ModelMismatch),
        ("rope_max_seq_len", 10**9, CorruptFile),
        ("_class_name", "UNet2DConditionModel", UnsupportedModel),
        ("_class_name", "AutoencoderKLWan", ModelMismatch),
        ("quantization_config", {"quant_method": "bitsandbytes"}, UnsupportedModel),
    ],
)
def test_a_config_that_disagrees_is_named(
    tmp_path: Path, folders: dict[str, Path], key: str, value: Any, error: type[WanError]
) -> None:
    folder = copy(folders["wan2.1-t2v"] / "transformer", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    message = refused(folder, error)
    assert "config.json" in message


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_encoder", "d_model", "wide"),
        ("text_encoder", "num_layers", 3),
        ("text_encoder", "num_heads", 3),
        ("image_encoder", "hidden_size", 24),
        ("image_encoder", "num_attention_heads", 0),
        ("vae", "dim_mult", "four"),
        ("vae", "z_dim", 48),
        ("vae", "dim_mult", [1, 2]),
    ],
)
def test_a_config_of_another_part_that_disagrees_is_named(
    tmp_path: Path, folders: dict[str, Path], part: str, key: str, value: Any
) -> None:
    folder = copy(folders["wan2.1-i2v"] / part, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert "config.json" in refused(folder, ModelMismatch)


def test_another_kind_than_asked_for_is_named(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelMismatch, match="VAE.*transformer was asked for"):
        load_component(folders["wan2.1-t2v"] / "vae", kind="transformer")


def test_integer_weights_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = copy(folders["wan2.1-t2v"] / "vae", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "decoder.conv_in.weight"
        tensors[name] = tensors[name].to(torch.int32)

    change_tensors(folder, change)
    assert "I32" in refused(folder, UnsupportedModel)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["kept", "cast"])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path,
    folders: dict[str, Path],
    value: float,
    stored: torch.dtype,
    dtype: torch.dtype | None,
) -> None:
    folder = copy(folders["wan2.1-t2v"] / "vae", tmp_path)
    name = "decoder.mid_block.resnets.0.conv1.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].to(stored)
        tensors[name].view(-1)[-1] = value

    change_tensors(folder, change)
    with pytest.raises(CorruptFile, match="NaN or infinity") as caught:
        load_component(folder, dtype)
    assert name in str(caught.value) and "diffusion_pytorch_model.safetensors" in str(caught.value)


def test_a_sum_that_overflows_is_no_error_but_a_value_that_does_is(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    name = "decoder.mid_block.resnets.0.conv1.weight"
    folder = copy(folders["wan2.1-t2v"] / "vae", tmp_path)
    change_tensors(folder, lambda tensors: tensors[name].fill_(60000.0))
    model = load_component(folder, torch.float16)
    assert bool((model.get_parameter(name) == 60000.0).all())
    change_tensors(folder, lambda tensors: tensors[name].fill_(70000.0))
    with pytest.raises(UnsupportedModel, match="float16"):
        load_component(folder, torch.float16)
    load_component(folder, torch.bfloat16)


def test_an_embedding_of_zeros_is_an_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = copy(folders["wan2.1-t2v"] / "text_encoder", tmp_path)
    change_tensors(folder, lambda tensors: tensors["shared.weight"].zero_())
    with pytest.raises(CorruptFile, match="embedding.*all zero"):
        load_component(folder)

    def last_row(tensors: dict[str, torch.Tensor]) -> None:
        tensors["shared.weight"][-1] = 1.0

    change_tensors(folder, last_row)
    load_component(folder)


def test_truncated_weights_are_an_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = copy(folders["wan2.1-t2v"] / "vae", tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "100 bytes early" in refused(folder, ModelFileError)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    from wan_core.formats.open import read_table
    from wan_core.loading.reader import TensorReader
    from wan_core.models.names import Source

    folder = copy(folders["wan2.1-t2v"] / "vae", tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    table = read_table(file)
    last = max(table.tensors.values(), key=lambda info: info.end)
    with open(file, "r+b") as handle:
        handle.truncate(last.end - 1)
    with TensorReader(table) as reader, pytest.raises(CorruptFile, match="1 bytes early"):
        reader.read(Source(last.name), last.shape)


def test_no_network_and_no_remote_code(folders: dict[str, Path], monkeypatch: Any) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        load_component(folders["wan2.1-i2v"] / part)


def test_two_threads_load_what_one_does(folders: dict[str, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        paths = [folders["wan2.1-i2v"] / p for p in ("transformer", "text_encoder", "vae")] * 4
        with ThreadPoolExecutor(4) as pool:
            models = list(pool.map(lambda p: load_component(p, torch.bfloat16), paths))
    finally:
        sys.setswitchinterval(old)
    for path, model in zip(paths, models, strict=True):
        assert_same(model, load_component(path, torch.bfloat16))


def test_components_are_deterministic() -> None:
    first, again = components("wan2.1-t2v"), components("wan2.1-t2v")
    assert_same(first["transformer"], again["transformer"])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=lambda d: str(d)[6:],
)  # fmt: skip
def test_finite_by_the_bits_equals_torch(dtype: torch.dtype) -> None:
    from wan_core.loading.dtypes import any_wild, is_finite

    size = dtype.itemsize
    if size <= 2:  # every number there is
        integers = torch.arange(2 ** (8 * size), dtype=torch.int32)
        bits = integers.to(torch.uint8) if size == 1 else integers.to(torch.int16)
        values = bits.view(dtype)
    else:
        special = [0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).max, torch.finfo(dtype).min,
                   torch.finfo(dtype).tiny, float("inf"), -float("inf"), float("nan")]  # fmt: skip
        values = torch.tensor(special, dtype=dtype)
        values = torch.cat([values, -values[-1:]])  # NaN with its sign set
    expected = torch.isfinite(values.double())
    assert not bool(expected.all()) and bool(expected.any())
    assert is_finite(values[expected]) and not any_wild(values[expected])
    for index in torch.nonzero(~expected).view(-1).tolist()[:200]:
        assert not is_finite(values[index : index + 1]) and any_wild(values[index : index + 1])
    # The last of many, beyond the first piece that is looked at.
    many = torch.zeros(2**21 // size + 3, dtype=torch.float32).to(dtype)
    assert is_finite(many)
    many[-1] = values[~expected][0]
    assert not is_finite(many)
    assert is_finite(many[:0]) and not any_wild(many[:0])


MEMORY = """
import gc, pathlib, sys
import torch, diffusers, transformers
from wan_core.loading.component import load_component
from wan_core.models import map_names
def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) * 1024
load_component(sys.argv[1], torch.bfloat16)  # imports what is imported late
for path in sys.argv[2:]:
    model = None
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    assert status("VmHWM") - before < 5e6, "an earlier peak would hide this one"
    model = load_component(path, torch.bfloat16)
    sizes = [t.numel() * t.element_size() for t in model.parameters()]
    print(status("VmHWM") - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux' /proc")
def test_memory_while_loading_is_what_is_kept(tmp_path: Path, folders: dict[str, Path]) -> None:
    import subprocess

    from support.tiny_models import make_transformer

    model = make_transformer(
        "wan2.1-t2v", num_attention_heads=8, attention_head_dim=128, ffn_dim=4096, num_layers=4
    )
    dtypes = (torch.float32, torch.bfloat16)
    for stored in dtypes:
        model.to(stored).save_pretrained(tmp_path / str(stored))
    small = folders["wan2.1-t2v"] / "transformer"
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, small, *(tmp_path / str(dtype) for dtype in dtypes)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    found = [tuple(map(int, line.split())) for line in output.splitlines()]
    for peak, kept, largest in found:
        assert kept > 125e6
        assert peak <= 1.1 * kept + largest, f"{peak / 1e6:.0f} MB for {kept / 1e6:.0f} MB kept"
    assert len(found) == 2
    assert found[0][0] > 0.9 * found[0][1]  # of bf16 nothing is copied: the file is mapped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_to_a_gpu_gives_the_same_values(folders: dict[str, Path]) -> None:
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        folder = folders["wan2.1-i2v"] / part
        ours = load_component(folder, torch.bfloat16, "cuda")
        assert {t.device.type for t in [*ours.parameters(), *ours.buffers()]} == {"cuda"}
        assert_same(ours.cpu(), load_component(folder, torch.bfloat16))


@pytest.mark.parametrize("error", [ImportError, AttributeError, RuntimeError])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_library_that_cannot_be_imported_is_named(
    library: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their lazy modules raise RuntimeError, with the failed import's text below the first line."""
    broken: Any = ModuleType(library)

    def fails(name: str) -> None:
        raise error(f"Failed to import {library}.models because of the following error:\nlong text")

    broken.__getattr__ = fails
    monkeypatch.setitem(sys.modules, library, broken)
    kind = "transformer" if library == "diffusers" else "text_encoder"
    plan = Blueprint(kind=kind, class_name="Some", config={}, origin="x", from_file=True)
    with pytest.raises(MissingDependency, match="Some cannot be imported: Failed") as caught:
        build(plan)
    assert "long text" not in str(caught.value)
    assert "Install diffusers >= 0.35" in str(caught.value)


# A VACE module beside its base --------------------------------------------------------------------


def _vace_state(seed: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(seed)
    module = WanVACETransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=16, ffn_dim=64, num_layers=4, vace_layers=[0, 2],
        vace_in_channels=96,
    ).eval()  # fmt: skip
    return module, layouts.original_transformer(layouts.state_of(module))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kept", [False, True])
def test_a_vace_module_is_read_beside_its_base(tmp_path: Path, prefix: str, kept: bool) -> None:
    """Base and module in two files, under different prefixes, are the module of one file."""
    whole, state = _vace_state(3)
    base = {f"{prefix}{n}": t for n, t in state.items() if not n.startswith("vace_")}
    module = {n: t.to(torch.float16) for n, t in state.items() if n.startswith("vace_")}
    save_file(base, tmp_path / "base.safetensors")
    save_file(module, tmp_path / "module.safetensors")
    got = load_component(
        tmp_path / "base.safetensors", torch.float32, kind="transformer", keep_quantized=kept,
        module_path=tmp_path / "module.safetensors",
    )  # fmt: skip
    assert type(got) is type(whole) and got.config.vace_layers == [0, 2]
    wanted = whole.state_dict()
    found = got.state_dict()
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        stored = value.half().float() if name.startswith("vace_") else value
        assert torch.equal(found[name], stored), name


def test_a_vace_module_stored_in_fp8_beside_a_plain_base(tmp_path: Path) -> None:
    whole, state = _vace_state(4)
    base = {n: t for n, t in state.items() if not n.startswith("vace_")}
    module = {n: t for n, t in state.items() if n.startswith("vace_")}
    linear = {n for n, t in module.items() if t.ndim == 2 and n.endswith(".weight")}
    packed, metadata, meaning = layouts.scaled_fp8(module, linear, "old")
    save_file(base, tmp_path / "base.safetensors")
    save_file(packed, tmp_path / "module.safetensors", metadata or None)
    got = load_component(
        tmp_path / "base.safetensors", torch.float32, kind="transformer",
        module_path=tmp_path / "module.safetensors",
    )  # fmt: skip
    names = map_names("transformer", state)
    for name, source in names.sources.items():
        value = meaning.get(source.name, state[source.name])
        assert torch.allclose(got.state_dict()[name], value.float(), atol=1e-6), name
