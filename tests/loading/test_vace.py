"""A VACE transformer from files as people have them: as stored, with the bits of what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support import stored_models
from support.lean_models import inputs_of
from support.tiny_models import make_transformer

from wan_core.detect import identify
from wan_core.formats import read_table
from wan_core.forward import lean_forward
from wan_core.loading import load_component
from wan_core.models import stored_sizes

KINDS = ("fp8_scaled", "int8_rows", "Q8_0", "Q4_K")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    made = make_transformer("wan2.1-vace", attention_head_dim=128, ffn_dim=512)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made


def written(folder: Path, model: Any, kind: str) -> tuple[Path, Path]:
    """The matrices of all blocks, VACE's too, as ``kind``; and what they mean in bf16."""
    state = {name: value.to(BF16) for name, value in layouts.state_of(model).items()}
    state = layouts.original_transformer(state)
    chosen = {n for n, v in state.items() if "blocks." in n and v.ndim == 2}
    chosen = {n for n in chosen if n.endswith(".weight")}
    assert sum(n.startswith("vace_") for n in chosen) == 2 * 11 + 1
    end = "gguf" if kind.startswith("Q") else "safetensors"
    path, meant = folder / f"vace_{kind}.{end}", folder / f"vace_{kind}_meant.safetensors"
    if end == "gguf":
        meanings = stored_models.write_gguf(path, state, chosen, kind)
    else:
        meanings = stored_models.write_safetensors(path, state, chosen, kind, "notes")
    save_file({**state, **{name: what(BF16) for name, what in meanings.items()}}, meant)
    return path, meant


@pytest.mark.parametrize("kind", KINDS)
def test_as_stored_it_gives_the_bits_of_what_it_means(
    tmp_path: Path, model: Any, kind: str
) -> None:
    path, meant = written(tmp_path, model, kind)
    ours: Any = load_component(path, BF16, kind="transformer", keep_quantized=True)
    plain: Any = load_component(meant, BF16, kind="transformer")
    assert type(ours) is type(model) and list(ours.config.vace_layers) == [0, 2]
    for block in (*ours.blocks, *ours.vace_blocks):
        assert hasattr(block.ffn.net[2], "stored") and hasattr(block.attn1.to_q, "stored")
    assert hasattr(ours.vace_blocks[0].proj_in, "stored")
    call = inputs_of(plain, BF16)
    with torch.no_grad():
        expected = plain(**call)[0]
        for exact in (True, False):
            with lean_forward(ours, exact=exact) as reason:
                assert reason is None
                found = ours(**call)[0]
            assert torch.equal(found, expected) or not exact
            assert torch.allclose(found.float(), expected.float(), atol=0.05, rtol=0.05)
    # What an estimate counts, from the header alone, is what is loaded.
    table = read_table(path)
    sizes = stored_sizes("transformer", table, identify(table).weights, "")
    assert sizes is not None and (len(sizes.blocks), len(sizes.vace)) == (4, 2)
    real = [
        sum(p.numel() * p.element_size() for p in block.parameters())
        for blocks in (ours.blocks, ours.vace_blocks)
        for block in blocks
    ]
    counted = [one.nbytes(2) for one in (*sizes.blocks, *sizes.vace)]
    assert counted == pytest.approx(real, rel=0.01)


def test_blocks_are_stored_in_fp8_where_that_is_asked_for(tmp_path: Path, model: Any) -> None:
    state = {name: value.to(BF16) for name, value in layouts.state_of(model).items()}
    path = tmp_path / "vace.safetensors"
    prefix = "model.diffusion_model."
    save_file({prefix + k: v for k, v in layouts.original_transformer(state).items()}, path)
    ours: Any = load_component(path, BF16, kind="transformer", fp8_storage=True)
    plain: Any = load_component(path, BF16, kind="transformer")
    for name in ("vace_blocks.0.proj_in", "vace_blocks.1.attn2.to_k", "blocks.3.ffn.net.2"):
        assert hasattr(ours.get_submodule(name), "stored")
        assert torch.equal(plain.get_submodule(name).weight, state[f"{name}.weight"])
    assert not hasattr(ours.vace_patch_embedding, "stored")
