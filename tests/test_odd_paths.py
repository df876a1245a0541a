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

from wan_core import WanModelFiles, WanPipelineLoader
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


def test_a_link_to_something_that_is_gone_is_not_offered_in_its_place(tmp_path: Path) -> None:
    link = tmp_path / "wan.safetensors"
    link.symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(MissingFile, match="a link to something that is gone") as caught:
        inspect_file(link)
    assert "other letters" not in str(caught.value)


def test_a_folder_that_lost_its_index_is_told_so(tmp_path: Path) -> None:
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
    with pytest.raises(MissingFile, match="no model_index.json"):
        ArchitectureDetector().detect_model_architecture(tmp_path)


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
        ("hf://Wan-AI/Wan2.1/wan.safetensors", "fetches nothing unless it is asked"),
        ("smb://nas/models/wan.gguf", "connect the drive"),
        ("//nas/models/wan.gguf", "Check the path"),
        ("~/models/wan.gguf", "Write the path out"),
        ("$HOME/models/wan.gguf", "Write the path out"),
        ("%USERPROFILE%\\models\\wan.gguf", "Write the path out"),
        ("100%/wan.gguf", "Check the path"),
        ("C:\\models\\wan", "Check the path"),
        ("no/such/folder/wan.gguf", "Check the path"),
    ],
)
def test_an_address_is_no_path(name: str, said: str) -> None:
    with pytest.raises(MissingFile, match=said):
        inspect_file(name)


def test_a_file_that_others_may_not_read_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(MissingFile, match="cannot be opened: Permission denied. Check who may"):
        inspect_file(model)


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
    assert lora_list("ab") == ["ab"] and lora_list(("a", "b")) == ["a", "b"]
    (lora,) = with_loras(found, (path, "both", 0.5)).loras
    assert lora.lora.strength == 0.5
    for bad in (None, 5, {"path": path}):
        with pytest.raises(InvalidRequest, match="a list of LoRAs is needed"):
            with_loras(found, bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="loras is 1.0 .float.; the path of a file"):
        with_loras(found, [(1.0, "both", path)])


@pytest.mark.parametrize("value", [5, "", b"vae", None])
@pytest.mark.parametrize("field", ["transformer", "vae", "tokenizer", "vace_2"])
def test_what_is_no_path_is_named_by_its_field(model: Path, field: str, value: Any) -> None:
    files = WanModelFiles(**({"transformer": model} | {field: value}))
    open_it = ArchitectureDetector().detect_model_architecture
    if value is None and field != "transformer":
        assert open_it(files)
        return
    with pytest.raises(InvalidRequest, match=f"^{field} is ") as caught:
        open_it(files)
    assert caught.value.field == field


def test_what_is_no_path_of_a_configuration() -> None:
    with pytest.raises(InvalidRequest, match="optimization_config_path is 5 "):
        WanPipelineLoader(optimization_config_path=5)  # type: ignore[arg-type]
    with pytest.raises(MissingFile, match="missing.json' cannot be read: No such file"):
        WanPipelineLoader(optimization_config_path="missing.json")


def test_arguments_that_people_know_from_diffusers(model: Path) -> None:
    """The argument is to blame, not a configuration that was never given."""
    load = WanPipelineLoader(enable_caching=False).load_wan_pipeline
    with pytest.raises(InvalidRequest, match=r"no argument 'torch_dtype'.* Set precision instead"):
        load(model, torch_dtype=torch.float16)
    with pytest.raises(InvalidRequest, match="no argument 'revision'"):
        load(model, revision="main")


@pytest.mark.parametrize("given", [None, {"prompt": "a cat"}, "a cat"])
def test_what_is_no_configuration_of_a_job(model: Path, given: Any) -> None:
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(model)
    error = wrapper.generate(given).error
    assert isinstance(error, InvalidRequest) and "a GenerationConfig is needed" in str(error)
    for call in (wrapper.plan, wrapper.check, wrapper.estimate_memory_usage):
        with pytest.raises(InvalidRequest, match="a GenerationConfig is needed"):
            call(given)
