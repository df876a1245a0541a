"""Files as people have them in a running ComfyUI, each version that is there: to an mp4.

Small files of the true layout: a pair in fp8 with scales and the encoder that nearly everybody
uses, and a pair in GGUF with a GGUF encoder that brings its tokenizer. ``test_comfyui`` runs the
latter in the first version, beside its other files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import single_files
from support.comfy_server import ComfyServer, find_checkouts
from support.comfy_stored import HIGH, LOW, TEXT, runs_as_stored, write_gguf
from support.stored_models import encoder, states, write_expert

pytestmark = [
    pytest.mark.slow,
    pytest.mark.comfyui,
    pytest.mark.skipif(not find_checkouts(), reason="no ComfyUI checkout (set COMFYUI_PATH)"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders, with the files of both workflows."""
    models = tmp_path_factory.mktemp("models")
    single_files.write(models)  # in bf16, with the names of files in fp8
    write_gguf(models)
    for state, name in zip(states(), (single_files.HIGH, single_files.LOW), strict=True):
        write_expert(models / "diffusion_models" / name, state, "fp8_scaled", "old")
    encoder(models, "fp8_scaled", "old")[0].replace(models / "text_encoders" / single_files.TEXT)
    return models


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer, models: Path) -> Iterator[ComfyServer]:
    for folder in models.iterdir():
        (comfyui.base / "models" / folder.name).symlink_to(folder)
    with comfyui:
        yield comfyui


@pytest.mark.parametrize(
    ("pair", "text", "kinds"),
    [
        ((single_files.HIGH, single_files.LOW), single_files.TEXT, ["fp8 scaled per tensor"]),
        ((HIGH, LOW), TEXT, ["GGUF Q8_0", "GGUF Q4_K"]),
    ],
    ids=["fp8_scaled", "gguf"],
)
def test_a_pair_and_its_encoder_as_stored_run_to_an_mp4(
    server: ComfyServer, models: Path, pair: tuple[str, str], text: str, kinds: list[str]
) -> None:
    runs_as_stored(server, models, pair, text, kinds)
