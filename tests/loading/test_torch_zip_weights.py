"""Official .pth files load; everything else in a pickle is refused without running it."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_layouts as layouts
from support.layout_models import assert_equal, clip, umt5, vae

from wan_core.errors import CorruptFile, ModelFileError, UnsafeFile
from wan_core.loading.component import load_component


@pytest.mark.parametrize("part", ["vae", "vae22", "text_encoder", "image_encoder"])
def test_official_releases(tmp_path: Path, part: str) -> None:
    if part.startswith("vae"):
        model = vae("2.2" if part == "vae22" else "2.1")
        state = layouts.original_vae(layouts.state_of(model), 2)
    elif part == "text_encoder":
        model = umt5()
        state = layouts.original_umt5(layouts.state_of(model))
    else:
        model = clip()
        state = layouts.original_clip(layouts.state_of(model))
    torch.save(state, tmp_path / "part.pth")
    assert_equal(load_component(tmp_path / "part.pth"), layouts.state_of(model))
    halved = load_component(tmp_path / "part.pth", torch.bfloat16)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}


def test_a_nested_state_dict(tmp_path: Path) -> None:
    model = vae("2.1")
    state = layouts.original_vae(layouts.state_of(model), 2)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "part.pth")
    assert_equal(load_component(tmp_path / "part.pth"), layouts.state_of(model))


def test_a_folder_with_only_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(layouts.original_vae(layouts.state_of(vae("2.1")), 2), tmp_path / "model.bin")
    with pytest.raises(UnsafeFile):
        load_component(tmp_path)


class Canary:
    """Unpickling this touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _raw(value: Any, protocol: int) -> bytes:
    return pickle.dumps(value, protocol)


def _archive(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _repacked(data: bytes, compression: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out.getvalue()


def _legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def bad_files(canary: Path) -> dict[str, bytes]:
    tensors = {"a": torch.ones(2)}
    whole = _archive(tensors)
    return {
        "system": _archive({"a": Canary(canary)}),
        "system beside tensors": _archive(tensors | {"b": Canary(canary)}),
        "raw protocol 2": _raw(Canary(canary), 2),
        "raw protocol 4": _raw(Canary(canary), 4),
        "legacy format": _legacy({"a": Canary(canary)}),
        "legacy tensors": _legacy(tensors),
        "whole module": _archive(torch.nn.Linear(2, 2)),
        "function": _archive({"a": os.system}),
        "truncated": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "empty": b"",
        "web page": b"<!doctype html><html></html>",
        "safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "expanded": _archive({"a": torch.zeros(1).expand(2**40)}),
        "list": _archive([torch.ones(2)]),
        "numbers": _archive({"a": 1}),
        "names": _archive({1: torch.ones(2)}),
        "nothing": _archive({}),
        "sparse": _archive({"a": torch.eye(3).to_sparse()}),
        "complex": _archive({"a": torch.ones(2, dtype=torch.complex64)}),
        "packed": _repacked(whole, zipfile.ZIP_DEFLATED),
    }


@pytest.mark.parametrize("name", list(bad_files(Path("x"))))
def test_bad_pickles_are_named_errors_and_run_nothing(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "model.pth"
    path.write_bytes(bad_files(canary)[name])
    with pytest.raises(ModelFileError) as caught:
        load_component(path)
    assert not canary.exists()
    assert "model.pth" in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_the_canary_works(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(bad_files(tmp_path / "canary")["system"])
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    pickle.loads(data)  # noqa: S301 - our own bytes, to see that they would have run
    assert (tmp_path / "canary").exists()


def test_mutants_give_only_named_errors(tmp_path: Path) -> None:
    import random

    whole = _archive({f"t{i}": torch.ones(3) for i in range(3)})
    generator = random.Random(7)
    path = tmp_path / "model.pth"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        with pytest.raises((ModelFileError, CorruptFile, Exception)) as caught:
            load_component(path)
        assert type(caught.value).__module__ == "wan_core.errors", caught.value
