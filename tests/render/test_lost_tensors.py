"""A VAE is read after the last step: what its header shows is told before the first, and a file
that was replaced meanwhile is not read in its place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.errors import CorruptFile, ModelMismatch
from wan_core.models import Component
from wan_core.render import render

LOST = ("decoder.mid_block.attentions.0.to_qkv.weight", "post_quant_conv.bias")


@pytest.mark.parametrize("lost", LOST)
def test_a_vae_that_lacks_a_tensor_is_told_before_the_first_step(tmp_path: Path, lost: str) -> None:
    tiny_models.make_folder(tmp_path, "wan2.1-t2v")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    state = load_file(file)
    del state[lost]
    steps: list[int] = []
    save_file(state, file)
    config = GenerationConfig(
        prompt="a cat", num_frames=5, width=64, height=64, num_inference_steps=2,
        progress_callback=lambda done, total, latents: steps.append(done),
    )  # fmt: skip
    result = WanPipelineLoader().load_wan_pipeline(tmp_path).generate(config)
    with pytest.raises(ModelMismatch, match=lost):
        result.raise_for_error()
    assert not steps and not [stage for stage in result.stages if stage.name == "denoise"]


@pytest.mark.parametrize("part", ["vae", "transformer_2"])
def test_a_file_that_was_not_filled_is_told_before_the_first_step(
    tmp_path: Path, part: str
) -> None:
    """What is read late, as everything else: it has its whole size, and its end is zeros."""
    tiny_models.make_folder(tmp_path, "wan2.2-t2v-a14b")
    (file,) = (tmp_path / part).glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    steps: list[int] = []
    config = GenerationConfig(
        prompt="a cat", num_frames=5, width=64, height=64, num_inference_steps=2,
        progress_callback=lambda done, total, latents: steps.append(done),
    )  # fmt: skip
    result = WanPipelineLoader().load_wan_pipeline(tmp_path).generate(config)
    with pytest.raises(CorruptFile, match="download was not finished"):
        result.raise_for_error()
    assert not steps and not [stage for stage in result.stages if stage.name == "denoise"]


def test_a_file_of_several_parts_is_looked_at_once_and_a_module_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, module = tmp_path / "all.safetensors", tmp_path / "vace.safetensors"
    for path in (whole, module):
        save_file({f"blocks.{i:02}.weight": torch.randn(48, 48) for i in range(40)}, path)
    data = module.read_bytes()
    module.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    looked: list[Path] = []
    read, parts = render.read_table, ("transformer", "vae", "text_encoder")
    monkeypatch.setattr(render, "read_table", lambda path: looked.append(path) or read(path))
    components = {name: Component(kind=name, path=whole) for name in parts}
    components["transformer"] = Component(kind="transformer", path=whole, module=module)
    stages: Any = SimpleNamespace(
        architecture=SimpleNamespace(components=components),
        cache=SimpleNamespace(holds=lambda key: False), key=lambda name: name,
    )  # fmt: skip
    job: Any = SimpleNamespace(stages=stages)
    with pytest.raises(CorruptFile, match=r"vace\.safetensors"):
        render.Render._make_way(job)
    module.write_bytes(data)
    looked.clear()
    monkeypatch.setattr(render, "check_component", lambda path, kind: looked.append(kind))
    monkeypatch.setattr(render, "check_outputs", lambda request: None)
    monkeypatch.setattr(render, "output_paths", lambda request: [])
    job.request = None
    render.Render._make_way(job)
    assert looked == [whole, module, "vae"]


@pytest.mark.parametrize("part", ["vae", "transformer_2"])
def test_a_file_that_is_is_replaced_during_the_steps_is_not_read(tmp_path: Path, part: str) -> None:
    """The low-noise expert is read in the middle, the VAE at the end; what is finished is kept."""
    tiny_models.make_folder(tmp_path, "wan2.2-t2v-a14b")
    (file,) = (tmp_path / part).glob("*.safetensors")

    def replace(done: int, total: int, latents: object) -> None:
        new = file.with_suffix(".new")
        new.write_bytes(file.read_bytes())
        new.replace(file)

    config = GenerationConfig(
        prompt="a cat", num_frames=5, width=64, height=64, num_inference_steps=2, switch_step=1,
        progress_callback=replace,
    )  # fmt: skip
    result = WanPipelineLoader().load_wan_pipeline(tmp_path).generate(config)
    with pytest.raises(ModelMismatch, match="replaced after the model was opened"):
        result.raise_for_error()
    assert part in str(result.error) and (result.latents is not None) == (part == "vae")
