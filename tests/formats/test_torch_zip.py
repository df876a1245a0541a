"""pickle_header: .pth files are read by offset; nothing in them ever runs."""

from __future__ import annotations

import io
import logging
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import bad_files

from wan_core.errors import CorruptFile, ModelFileError, UnsafeFile
from wan_core.formats.one_file import parse_table
from wan_core.formats.open import read_table
from wan_core.loading.reader import DTYPES

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(5).bfloat16(),
    "p": torch.nn.Parameter(torch.ones(2, 2).half()),
    "f8": torch.ones(4, 4).to(torch.float8_e4m3fn),
    "view": torch.arange(10.0)[2:5],
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "generator", "generator_ema"])
def test_reads_what_torch_wrote(tmp_path: Path, nest: str | None) -> None:
    path = tmp_path / "x.pth"
    torch.save({nest: TENSORS, "epoch": 3} if nest else TENSORS, path)
    table = read_table(path)
    assert list(table.tensors) == list(TENSORS) and table.format == "pickle"
    raw = path.read_bytes()
    for name, tensor in TENSORS.items():
        info = table.tensors[name]
        data = bytearray(raw[info.start : info.end])
        assert info.shape == tuple(tensor.shape) and DTYPES[info.dtype] == tensor.dtype
        if data:
            found = torch.frombuffer(data, dtype=tensor.dtype).reshape(info.shape)
            assert torch.equal(found.float(), tensor.detach().float())


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    """The note of module versions that torch adds to a state dict is passed over."""
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    torch.save(state, tmp_path / "x.pt")
    assert list(read_table(tmp_path / "x.pt").tensors) == list(state)


def test_tensors_that_are_not_in_one_piece(tmp_path: Path) -> None:
    for tensor in (torch.ones(3, 4).T, torch.ones(1).expand(2**40), torch.ones(4, 4)[:, :2]):
        torch.save({"a": tensor}, tmp_path / "x.pth")
        with pytest.raises(CorruptFile, match="not stored in one piece"):
            read_table(tmp_path / "x.pth")


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def malicious(canary: str) -> dict[str, bytes]:
    """Files that try to make ``canary``, or to pass for weights."""
    touch = f"open({canary!r}, 'w').close()"

    def saved(value: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    system = Call(os.system, f"touch {canary}")
    whole = saved({"a": torch.ones(2)})
    return {
        "os.system": saved({"a": system}),
        "eval": saved({"a": Call(eval, touch)}),
        "exec": saved(Call(exec, touch)),
        "log file": saved({"a": Call(logging.FileHandler, canary)}),
        "open": saved({"a": Call(open, canary, "w")}),
        "getattr": bad_files.pickle_zip(
            b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00a\x86R."
        ),
        "legacy format": saved({"a": system}, _use_new_zipfile_serialization=False),
        "raw protocol 0": pickle.dumps(system, 0), "raw protocol 2": pickle.dumps(system, 2),
        "raw protocol 4": pickle.dumps(system, 4),
        "whole module": saved(torch.nn.Linear(2, 2)),
        "TorchScript": program.getvalue(),
        "truncated": whole[:-40], "cut in the middle": whole[: len(whole) // 2], "empty": b"",
        "web page": b"<html>not found</html>", "safetensors renamed": bad_files.safetensors(),
        "instance": bad_files.pickle_zip(b"\x80\x02(cos\nsystem\no."),
        "INST": bad_files.pickle_zip(b"(S'x'\nios\nsystem\n."),
        "extension registry": bad_files.pickle_zip(b"\x80\x02\x82\x01."),
        "endless": bad_files.pickle_zip(b"\x80\x02}"),
        "deep tuple as a key": bad_files.pickle_zip(b"\x80\x02}" + DEEP + b"Ns."),
        "deep tuple as a name": bad_files.pickle_zip(b"\x80\x04" + DEEP + b"X\x01\0\0\0a\x93."),
        "deep tuple as a storage": bad_files.pickle_zip(b"\x80\x02(" + DEEP * 2 + b"NNNtQ."),
        "storage missing": bad_files.pickle_zip(pickle_of_tensor("7")),
        "not named": bad_files.pickle_zip(b"\x80\x02]."),
        "no pickle": zip_of({"archive/readme": b"x"}),
        "list of 20 MB": zip_of({"archive/data.pkl": b"N" * (20 * 2**20)}),
    }  # fmt: skip


# A tuple in a tuple, 190,000 times: hashing one overflows the C stack.
DEEP = b")" + b"\x85" * 190_000


def pickle_of_tensor(key: str) -> bytes:
    """A pickle of {"a": tensor} whose storage is ``key``."""
    storage = f"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00{key}".encode()
    storage += b"X\x03\x00\x00\x00cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((" + storage + b"s."


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_malicious_pickles(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name, data in malicious(str(canary)).items():
        for suffix in (".pth", ".safetensors"):
            path = tmp_path / f"x{suffix}"
            path.write_bytes(data)
            start = time.process_time()
            if name == "safetensors renamed" and suffix == ".safetensors":
                continue
            with pytest.raises(ModelFileError):
                read_table(path)
                pytest.fail(f"{name} was accepted")
            assert time.process_time() - start < 5, name
            assert not canary.exists(), name


def test_a_tensor_longer_than_its_storage(tmp_path: Path) -> None:
    """Four floats need 16 bytes: the weights of a neighbour must not be read as theirs."""
    path = tmp_path / "x.pth"
    for size, accepted in ((16, True), (15, False), (0, False)):
        members = {"archive/data.pkl": pickle_of_tensor("0"), "archive/data/0": bytes(size)}
        path.write_bytes(zip_of(members | {"archive/data/1": bytes(64)}))
        if accepted:
            assert read_table(path).tensors["a"].shape == (4,)
        else:
            with pytest.raises(CorruptFile, match=f"needs 16 bytes of a storage of {size}"):
                read_table(path)


def test_says_what_a_pickle_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(malicious(str(tmp_path / "canary"))["os.system"])
    with pytest.raises(UnsafeFile, match=r"asks for '(posix|nt)\.system'.* nothing of it was run"):
        read_table(path)


def test_mutated_checkpoints() -> None:
    buffer = io.BytesIO()
    torch.save({k: v.detach() for k, v in TENSORS.items()}, buffer)
    tokens = (b"cos\nsystem\n", b"R", b"t", b"(", b"Q", b"\x85", b"PK\x05\x06", b"\xff" * 8, b".")
    refused = 0
    for data in bad_files.mutants(buffer.getvalue(), 5000, 11, tokens):
        try:
            table = parse_table(io.BytesIO(data), Path("x.pth"), len(data))
        except ModelFileError:
            refused += 1
        else:
            assert all(info.end <= len(data) for info in table.tensors.values())
    assert 1500 < refused < 5000


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1, 2**40])
@pytest.mark.parametrize("member", ["archive/data.pkl", "archive/data/0"])
def test_a_place_beyond_every_file_is_refused(tmp_path: Path, member: str, offset: int) -> None:
    """The zip's directory says where members begin; Python cannot even seek to some numbers."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w") as archive:
        for info in good.infolist():
            name = "archive/" + info.filename.split("/", 1)[1]
            archive.writestr(name, good.read(info))
        archive.getinfo(member).header_offset = offset
    with pytest.raises(CorruptFile):
        read_table(path)
