"""What a user names in place of a file: said what it is, what is there instead, and what to do."""

from __future__ import annotations

import errno
import io
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import wan_layouts as layouts

from wan_core import WanPipelineLoader
from wan_core.detect import ArchitectureDetector, inspect_file, lora_list, with_loras
from wan_core.errors import InvalidRequest, MissingFile
from wan_core.files import open_regular

SMALL = layouts.shallow(layouts.FILES["t2v-14b"][0])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layouts.write_sparse(tmp_path / "wan.safetensors", layouts.stored(SMALL, "bf16"))


@pytest.mark.parametrize("value", [None, 5, b"wan", ["wan"], {"transformer": "wan"}, 1.5])
def test_what_is_no_path_is_a_bad_request(value: Any) -> None:
    for open_it in (
        ArchitectureDetector().detect_model_architecture,
        WanPipelineLoader(enable_caching=False).load_wan_pipeline,
    ):
        with pytest.raises(InvalidRequest, match="model_path is .*; the path of a file or folder"):
            open_it(value)


@pytest.mark.parametrize("value", ["", "  ", "\t\n"])
def test_nothing_is_not_the_folder_one_is_in(value: str) -> None:
    with pytest.raises(InvalidRequest, match="model_path is empty"):
        ArchitectureDetector().detect_model_architecture(value)


@pytest.mark.parametrize("form", ['"{}"', "'{}'", "{}\n", " {}", '" {} "'])
def test_quotes_and_blanks_around_a_path(model: Path, form: str) -> None:
    with pytest.raises(MissingFile, match="It is there without the quotation marks or blanks"):
        inspect_file(form.format(model))


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("Modell.safetensors", "modell.safetensors"),
        ("wan.SAFETENSORS", "wan.safetensors"),
        (unicodedata.normalize("NFC", "modèle.gguf"), unicodedata.normalize("NFD", "modèle.gguf")),
        (unicodedata.normalize("NFD", "modèle.gguf"), unicodedata.normalize("NFC", "modèle.gguf")),
        ("ｗａｎ.gguf", "wan.gguf"),
    ],
)
def test_a_name_that_only_looks_the_same(tmp_path: Path, there: str, asked: str) -> None:
    (tmp_path / there).write_bytes(b"x")
    if (tmp_path / asked).exists():
        pytest.skip("this file system takes the two for one name")
    with pytest.raises(MissingFile) as caught:
        inspect_file(tmp_path / asked)
    assert repr(there) in str(caught.value) and ascii(there) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B", "fetches nothing unless it is asked"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "fetches nothing unless it is asked"),
        ("file:///models/wan", "without 'file:'"),
        ("C:\\models\\wan", "Check the path"),
        ("no/such/folder/wan.gguf", "Check the path"),
    ],
)
def test_an_address_is_no_path(name: str, said: str) -> None:
    with pytest.raises(MissingFile, match=said):
        inspect_file(name)


def test_the_root_of_a_hub_cache_names_its_snapshots(tmp_path: Path) -> None:
    root = tmp_path / "models--Wan-AI--Wan2.1"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / "abc").mkdir(parents=True)
    with pytest.raises(MissingFile, match="Hugging Face cache.*snapshots.abc"):
        ArchitectureDetector().detect_model_architecture(root)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_drive_that_goes_away_is_a_named_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Gone(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", lambda path, *a, **k: Gone(path))
    with pytest.raises(MissingFile, match="cannot be read: .*connection to the drive") as caught:
        inspect_file(model)
    assert isinstance(caught.value.__cause__, OSError) and os.strerror(number) in str(caught.value)


def test_other_errors_of_who_reads_pass(model: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_regular(model) as (file, size):
        assert size == model.stat().st_size and file.read(1)
        raise ZeroDivisionError


def test_one_lora_is_a_list_of_one(tmp_path: Path, model: Path) -> None:
    name = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    path = tmp_path / "lora.safetensors"
    save_file({name.format("A"): torch.ones(2, 5120), name.format("B"): torch.ones(5120, 2)}, path)
    found = ArchitectureDetector().detect_model_architecture(model)
    for given in (path, str(path), [path], (str(path),), iter([path])):
        (lora,) = with_loras(found, given).loras  # type: ignore[arg-type]
        assert Path(lora.lora.path) == path
    assert lora_list("ab") == ["ab"]
    for bad in (None, 5):
        with pytest.raises(InvalidRequest, match="a list of LoRAs is needed"):
            with_loras(found, bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="loras is '1.0' .float.; the path of a file"):
        with_loras(found, [(1.0, "both", path)])
