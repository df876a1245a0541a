"""header, shards, gguf_header: every fault is a named error, quickly, without much memory."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import bad_files
from support.pace import pace

from wan_core.errors import CorruptFile, MissingFile, ModelFileError, UnsafeFile
from wan_core.formats.index import find_weights, listing
from wan_core.formats.one_file import parse_table
from wan_core.formats.open import ALLOW_ZEROS, read_small, read_table, refuse_holes
from wan_core.formats.small_json import read_json
from wan_core.formats.table import MAX_HEADER_BYTES

MANY = 20_000


def put(folder: Path, data: bytes, name: str = "x.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [
        (0.3, 1.0, True),  # the rest of a file
        (0.95, 1.0, True),
        (0.99, 1.0, True),
        (0.4, 0.6, True),  # one of its parts
        (0.5, 0.52, False),  # a layer that was switched off
        (0.9995, 1.0, False),  # rows that no token has
        (1.0, 1.0, False),
        (0.0, 1.0, False),
    ],
)
def test_what_a_download_has_not_filled_is_found(
    tmp_path: Path, first: float, last: float, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"blocks.{i:03}.weight": torch.randn(48, 48) for i in range(50)}, path)
    data = bytearray(path.read_bytes())
    start = len(data) - 50 * 48 * 48 * 4
    begin, end = (start + int((len(data) - start) * share) for share in (first, last))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    if not found:
        return refuse_holes(read_table(path))
    with pytest.raises(CorruptFile, match="nothing but zeros in .* not finished.*ALLOW_ZEROS=1"):
        refuse_holes(read_table(path))
    monkeypatch.setenv(ALLOW_ZEROS, "1")  # they are meant
    refuse_holes(read_table(path))


def test_reads_names_shapes_places(tmp_path: Path) -> None:
    data = bytes(range(32))
    path = put(tmp_path, bad_files.safetensors(data=data))
    table = read_table(path)
    assert list(table.tensors) == ["a.weight", "b.bias"]
    info = table.tensors["b.bias"]
    assert (info.dtype, info.shape, info.nbytes, info.numel) == ("BF16", (4,), 8, 4)
    assert path.read_bytes()[info.start : info.end] == data[24:]
    assert read_small([info, table.tensors["a.weight"]]) == [data[24:], data[:24]]
    assert table.nbytes == 32 and table.parameters == 10
    assert table.dtypes == {"F32": 24, "BF16": 8}
    assert table.header_bytes == len(path.read_bytes()) - 32


def test_read_small_is_bounded(tmp_path: Path) -> None:
    table = read_table(put(tmp_path, bad_files.safetensors()))
    with pytest.raises(CorruptFile, match="24 bytes; at most 8"):
        read_small([table.tensors["a.weight"]], limit=8)


def test_agrees_with_the_library(tmp_path: Path) -> None:
    """What the safetensors library writes, in every dtype it has, is read the same."""
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from safetensors.torch import save_file

    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8,
              torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e5m2]  # fmt: skip
    tensors = {f"t{i}": torch.zeros(i, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"who": "me"})
    table = read_table(path)
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            assert table.tensors[name].dtype == part.get_dtype()
            assert list(table.shape(name)) == part.get_shape()
    assert table.metadata == {"who": "me"} and len(table.tensors) == len(dtypes)


def test_corrupt_headers(tmp_path: Path) -> None:
    faults = bad_files.corrupt_safetensors()
    assert len(faults) >= 49
    for name, data in faults.items():
        path = put(tmp_path, data)
        start = time.process_time()
        with pytest.raises(CorruptFile, match=r"x\.safetensors"):
            read_table(path)
            pytest.fail(f"{name} was accepted")
        assert time.process_time() - start < 1, name


def test_corrupt_headers_take_little_memory(tmp_path: Path) -> None:
    """A 16 MiB header of nothing but brackets or commas is refused before it is parsed."""
    for filling in (b"[]," * 5_500_000, b"0," * 8_000_000, b'{"a":' * 3_000_000):
        path = put(tmp_path, bad_files.safetensors(raw=b"[" + filling[: MAX_HEADER_BYTES - 9]))
        tracemalloc.start()
        with pytest.raises(CorruptFile):
            read_table(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 * 2**20


def test_truncations(tmp_path: Path) -> None:
    for name, data in bad_files.truncations().items():
        with pytest.raises(CorruptFile):
            read_table(put(tmp_path, data))
            pytest.fail(f"{name} was accepted")


def test_truncation_says_how_many_bytes(tmp_path: Path) -> None:
    good = bad_files.safetensors()
    path = put(tmp_path, good[:-5])
    with pytest.raises(CorruptFile) as caught:
        read_table(path)
    expected = f"ends 5 bytes early (header needs {len(good)}, file has {len(good) - 5})"
    assert expected in str(caught.value) and "Download it again" in str(caught.value)


def test_file_that_shrinks_after_the_size_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, bad_files.safetensors())
    real = os.fstat

    def larger(fd: int) -> os.stat_result:
        values = list(real(fd))
        values[6] += 1000
        return os.stat_result(values)

    path.write_bytes(bad_files.safetensors()[:60])
    monkeypatch.setattr(os, "fstat", larger)
    with pytest.raises(CorruptFile):
        read_table(path)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    for name, (data, word) in bad_files.foreign_files().items():
        with pytest.raises(ModelFileError) as caught:
            read_table(put(tmp_path, data))
        assert word in str(caught.value), name


@pytest.mark.parametrize("name", ["m.gguf", "m.pth", "m.bin"])
def test_a_safetensors_file_under_another_name_is_to_be_renamed(tmp_path: Path, name: str) -> None:
    """A good file is not to be downloaded again."""
    save_file({"a": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(CorruptFile, match="Rename it to .safetensors") as caught:
        read_table(tmp_path / name)
    assert "ownload" not in str(caught.value)


def test_not_regular_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(CorruptFile, match="neither a file nor a folder"):
        read_table(fifo)
    with pytest.raises(MissingFile, match="does not exist"):
        read_table(tmp_path / "none.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(MissingFile, match="a link to something that is gone"):
        read_table(tmp_path / "link.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(MissingFile, match="holds no weights"):
        read_table(tmp_path / "folder.safetensors")
    with pytest.raises(MissingFile):
        read_table("x\0y.safetensors")


ODD_BUT_READABLE = {
    "an unknown key": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32], "x": 1}},
    "a name with ..": {"../a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}},
    "fp4": {"a": {"dtype": "F4", "shape": [64], "data_offsets": [0, 32]}},
    "an empty tensor": {
        "a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
        "b": {"dtype": "F32", "shape": [0, 3], "data_offsets": [32, 32]},
    },
    "a scalar": {"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]},
                 "b": {"dtype": "F64", "shape": [3], "data_offsets": [8, 32]}},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_BUT_READABLE)
def test_odd_but_readable(tmp_path: Path, name: str) -> None:
    header = ODD_BUT_READABLE[name]
    table = read_table(put(tmp_path, bad_files.safetensors(header)))
    assert list(table.tensors) == list(header)


def test_mutated_safetensors() -> None:
    """Seeded mutants: only CorruptFile or UnsafeFile, and what is accepted is consistent."""
    refused = 0
    good = bad_files.safetensors()
    for data in bad_files.mutants(good, MANY, 20_251, bad_files.SAFETENSORS_TOKENS):
        try:
            table = parse_table(io.BytesIO(data), Path("x.safetensors"), len(data))
        except (CorruptFile, UnsafeFile):
            refused += 1
        else:
            assert table.header_bytes + table.nbytes == len(data)
    assert MANY // 2 < refused < MANY


def test_mutated_gguf() -> None:
    refused = 0
    for data in bad_files.mutants(bad_files.GOOD_GGUF, MANY, 7, bad_files.GGUF_TOKENS):
        try:
            table = parse_table(io.BytesIO(data), Path("x.gguf"), len(data))
        except (CorruptFile, UnsafeFile):
            refused += 1
        else:
            assert all(info.end <= len(data) for info in table.tensors.values())
    assert MANY // 4 < refused < MANY


def test_gguf(tmp_path: Path) -> None:
    table = read_table(put(tmp_path, bad_files.GOOD_GGUF, "x.gguf"))
    assert table.format == "gguf" and table.metadata["general.architecture"] == "wan"
    info = table.tensors["a.weight"]
    assert (info.dtype, info.shape, info.nbytes) == ("Q8_0", (4, 64), 8 * 34)
    assert (table.tensors["b.bias"].start - info.start) == 288


def test_gguf_agrees_with_the_library(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("comfy.gguf.orig_shape.patch", [8, 4, 1, 2, 2])
    writer.add_array("tokens", [f"t{i}" for i in range(1000)])
    writer.add_tensor("f32", np.zeros((3, 5), np.float32))
    writer.add_tensor("patch", np.zeros((8, 16), np.float16))
    quantized = gguf.quants.quantize(np.ones((4, 256), np.float32), gguf.GGMLQuantizationType.Q5_0)
    writer.add_tensor("q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    table = read_table(path)
    assert table.shape("patch") == (8, 4, 1, 2, 2) and table.shape("q") == (4, 256)
    for tensor in gguf.GGUFReader(path).tensors:
        info = table.tensors[tensor.name]
        assert info.start == tensor.data_offset and info.nbytes == tensor.n_bytes
        assert info.dtype == tensor.tensor_type.name


def test_gguf_types_agree_with_the_library() -> None:
    gguf = pytest.importorskip("gguf")
    from wan_core.formats.gguf import GGML_TYPES

    for number, (name, block, width) in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (block, width)


def test_corrupt_gguf(tmp_path: Path) -> None:
    for name, data in bad_files.corrupt_gguf().items():
        path = put(tmp_path, data, "x.gguf")
        start = time.process_time()
        with pytest.raises(CorruptFile, match=r"x\.gguf"):
            read_table(path)
            pytest.fail(f"{name} was accepted")
        assert time.process_time() - start < 1, name
    assert len(next(iter(bad_files.corrupt_gguf().values()))) == 49


def test_gguf_text_that_is_something_else(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="Git LFS pointer"):
        read_table(put(tmp_path, bad_files.LFS_POINTER, "x.gguf"))


def shards(folder: Path, **changes: object) -> Path:
    """Two shards and their index; ``changes`` replace the index's fields."""
    for number, name in enumerate("ab", 1):
        header = {f"{name}.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}
        put(folder, bad_files.safetensors(header), f"m-0000{number}-of-00002.safetensors")
    index = {
        "metadata": {"total_size": 64},
        "weight_map": {
            "a.weight": "m-00001-of-00002.safetensors",
            "b.weight": "m-00002-of-00002.safetensors",
        },
    }
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps(index | changes))
    return path


def test_shards(tmp_path: Path) -> None:
    table = read_table(shards(tmp_path))
    assert [info.file.name[:7] for info in table.tensors.values()] == ["m-00001", "m-00002"]
    assert table.nbytes == 64 and len(table.files) == 2 and not table.notes
    assert read_table(tmp_path).files == table.files


def test_shard_faults(tmp_path: Path) -> None:
    one, two = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"

    def fails(kind: type[Exception], word: str) -> None:
        with pytest.raises(kind, match=word):
            read_table(tmp_path / "m.safetensors.index.json")

    shards(tmp_path)
    (tmp_path / two).unlink()
    fails(MissingFile, "1 of 2 shards .* are missing: m-00002")
    shards(tmp_path)
    (tmp_path / two).write_bytes(b"")
    fails(CorruptFile, "m-00002-of-00002.safetensors' is 0 bytes")
    shards(tmp_path)
    (tmp_path / two).write_bytes((tmp_path / one).read_bytes()[:-4])
    fails(CorruptFile, "ends 4 bytes early")
    shards(tmp_path, weight_map={"a.weight": two, "b.weight": one})
    fails(CorruptFile, "says 'm-00002.*' holds 'a.weight', and it does not")
    shards(tmp_path)
    (tmp_path / two).write_bytes((tmp_path / one).read_bytes())
    fails(CorruptFile, "holds 'b.weight', and it does not")
    both = {f"{n}.weight": {"dtype": "F32", "shape": [4], "data_offsets": [i * 16, i * 16 + 16]}
            for i, n in enumerate("ab")}  # fmt: skip
    shards(tmp_path)
    put(tmp_path, bad_files.safetensors(both), two)
    fails(CorruptFile, "'a.weight' is in two shards")
    shards(tmp_path, weight_map={"a.weight": one})
    put(tmp_path, bad_files.safetensors(both), one)
    fails(CorruptFile, "holds 'b.weight', which .* does not list")
    shards(tmp_path)
    put(tmp_path, bad_files.safetensors(), "m-00003-of-00002.safetensors")
    table = read_table(tmp_path / "m.safetensors.index.json")
    assert "m-00003-of-00002.safetensors" in table.notes[0]
    (tmp_path / "m.safetensors.index.json").write_text("{not json")
    fails(CorruptFile, "not valid JSON")
    for wrong in ([], {}, None, {"a": 1}, {"a": ["b"]}):
        shards(tmp_path, weight_map=wrong)
        fails(CorruptFile, "weight_map")
    shards(tmp_path, weight_map={f"t{i}": f"m-{i}.safetensors" for i in range(50_000)})
    fails(CorruptFile, "50,000 shards")
    shards(tmp_path, weight_map={f"t{i}": one for i in range(70_000)})
    fails(CorruptFile, "70,000 tensors")


def test_shard_names_that_escape(tmp_path: Path) -> None:
    outside = tmp_path / "x.safetensors"
    outside.write_bytes(bad_files.safetensors())
    inside = tmp_path / "in"
    inside.mkdir()
    for name in bad_files.ESCAPING_NAMES:
        for shown in (name, name + ".safetensors"):
            shards(inside, weight_map={"a.weight": shown})
            with pytest.raises((UnsafeFile, MissingFile)) as caught:
                read_table(inside / "m.safetensors.index.json")
            # A harmless name with the ending added is merely not there.
            assert caught.type is UnsafeFile or shown != name, name


def test_a_shard_lies_beside_its_index(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    put(tmp_path / "sub", bad_files.safetensors())
    shards(tmp_path, weight_map={"a.weight": "sub/x.safetensors", "b.bias": "sub/x.safetensors"})
    with pytest.raises(UnsafeFile, match="a shard is a plain .safetensors name"):
        read_table(tmp_path / "m.safetensors.index.json")


def test_linked_shards_are_allowed(tmp_path: Path) -> None:
    """Hub caches keep shards as links into another folder."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    index = shards(tmp_path / "snapshot")
    for shard in (tmp_path / "snapshot").glob("*.safetensors"):
        shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(tmp_path / "blobs" / shard.name)
    assert len(read_table(index).tensors) == 2


def test_component_folders(tmp_path: Path) -> None:
    def folder(*names: str) -> Path:
        path = tmp_path / str(len(os.listdir(tmp_path)))
        path.mkdir()
        for name in names:
            put(path, bad_files.safetensors(), name)
        return path

    plain = "diffusion_pytorch_model.safetensors"
    assert find_weights(folder(plain, "diffusion_pytorch_model.fp16.safetensors")).name == plain
    tagged = folder("diffusion_pytorch_model.fp16.safetensors", "config.json")
    assert find_weights(tagged).name == "diffusion_pytorch_model.fp16.safetensors"
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert find_weights(folder("a-00001-of-00001.safetensors", index)).name == index
    assert find_weights(folder("wan-Q4_K.gguf")).name == "wan-Q4_K.gguf"
    with pytest.raises(MissingFile, match="2 sets of weights"):
        find_weights(folder("one.safetensors", "two.safetensors"))
    with pytest.raises(CorruptFile, match="2 shards .* not their index"):
        find_weights(folder("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"))
    with pytest.raises(UnsafeFile, match="only as diffusion_pytorch_model.bin"):
        find_weights(folder("diffusion_pytorch_model.bin", "config.json"))
    with pytest.raises(MissingFile, match="has not finished"):
        find_weights(folder("diffusion_pytorch_model.safetensors.incomplete"))
    with pytest.raises(MissingFile, match="found nothing"):
        find_weights(folder())


def test_read_json_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(MAX_HEADER_BYTES + 1)
    with pytest.raises(CorruptFile, match="at most"):
        read_json(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
def test_json_with_a_byte_order_mark(tmp_path: Path, mark: bytes) -> None:
    """As Windows' Notepad and PowerShell save it; a mark inside, or without JSON, is none."""
    path = tmp_path / "config.json"
    encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(mark, "utf-8")
    path.write_bytes(mark + '{"dim": 4, "ü": "\\u00fc"}\r\n'.encode(encoding))
    assert read_json(path) == {"dim": 4, "ü": "ü"}
    for bad in (mark + b"x", mark + mark + b"{}" if mark else b"[", mark + b"\xff\xff\xff"):
        path.write_bytes(bad)
        with pytest.raises(CorruptFile, match=r"config\.json"):
            read_json(path)


def test_hidden_names_are_not_listed(tmp_path: Path) -> None:
    for name in ("a.safetensors", "._a.safetensors", ".DS_Store"):
        (tmp_path / name).touch()
    assert listing(tmp_path) == ["a.safetensors"]


def test_weights_of_adapters_are_found_by_their_name(tmp_path: Path) -> None:
    for name in ("adapter_model", "pytorch_lora_weights"):
        folder = tmp_path / name
        folder.mkdir()
        for file in (f"{name}.safetensors", "optimizer.safetensors"):
            (folder / file).write_bytes(bad_files.safetensors())
        assert find_weights(folder) == folder / f"{name}.safetensors"


def test_reads_only_the_header_of_a_sparse_28_gb_file(tmp_path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [14_000_000_000], "data_offsets": [0, 28_000_000_000]}
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 28_000_000_000)
    start = time.process_time()
    assert read_table(path).nbytes == 28_000_000_000
    assert time.process_time() - start < 0.1 * pace()
