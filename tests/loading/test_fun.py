"""A Fun transformer from files as people have them, with the layers that diffusers' class lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support import stored_models
from support.tiny_models import FUN_FAMILIES, make_transformer
from torch import Tensor

from wan_core.detect import identify
from wan_core.errors import WanError
from wan_core.formats import read_table
from wan_core.forward import fun_inputs, lean_forward
from wan_core.loading import load_component
from wan_core.models import stored_sizes

BF16 = torch.bfloat16
CASES = [
    ("wan2.2-fun-control-a14b", "fp8_scaled"), ("wan2.2-fun-control-a14b", "Q8_0"),
    ("wan2.2-fun-camera-a14b", "Q4_K"), ("wan2.2-fun-camera-a14b", "int8_rows"),
]  # fmt: skip
OWN = {
    "wan2.2-fun-control-a14b": {"ref_conv.weight", "ref_conv.bias"},
    "wan2.2-fun-camera-a14b": {
        f"control_adapter.{layer}.{kind}"
        for layer in ("conv", "residual_blocks.0.conv1", "residual_blocks.0.conv2")
        for kind in ("weight", "bias")
    },
}


def state_of(family: str) -> layouts.State:
    torch.manual_seed(3)
    model = make_transformer(family, attention_head_dim=128, ffn_dim=512)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = {name: value.to(BF16) for name, value in layouts.state_of(model).items()}
    return layouts.original_transformer(state)


def inputs_of(family: str) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    z, more, reference, camera, _ = FUN_FAMILIES[family]
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(BF16)

    call = {
        "hidden_states": draw(1, z + more, 3, 4, 8), "timestep": torch.tensor([777.7]),
        "encoder_hidden_states": draw(1, 512, 32), "return_dict": False,
    }  # fmt: skip
    return call, {
        "reference": draw(1, reference, 4, 8) if reference else None,
        "camera": draw(1, 24, 3, 32, 64) if camera else None,
    }


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_as_stored_it_gives_the_bits_of_what_it_means(
    tmp_path: Path, family: str, kind: str
) -> None:
    state = state_of(family)
    chosen = {n for n, v in state.items() if "blocks." in n and v.ndim == 2}
    chosen = {n for n in chosen if n.endswith(".weight")}
    path, meant = tmp_path / "fun.safetensors", tmp_path / "meant.safetensors"
    if kind.startswith("Q"):
        path = path.with_suffix(".gguf")
        meanings = stored_models.write_gguf(path, state, chosen, kind)
    else:
        meanings = stored_models.write_safetensors(path, state, chosen, kind, "notes")
    save_file({**state, **{name: what(BF16) for name, what in meanings.items()}}, meant)
    ours: Any = load_component(path, BF16, kind="transformer", keep_quantized=True)
    plain: Any = load_component(meant, BF16, kind="transformer")
    assert OWN[family] == set(plain.state_dict()) - set(make_transformer("wan2.1-t2v").state_dict())
    for name in OWN[family]:
        assert torch.equal(ours.state_dict()[name], state[name])
    call, given = inputs_of(family)
    with torch.no_grad(), fun_inputs(ours, **given), fun_inputs(plain, **given):
        expected = plain(**call)[0]
        assert torch.equal(ours(**call)[0], expected)
        with lean_forward(ours) as reason:
            assert reason is None
            assert torch.equal(ours(**call)[0], expected)
    table = read_table(path)
    sizes = stored_sizes("transformer", table, identify(table).weights, "")
    assert sizes is not None
    outside = {n: p for n, p in ours.named_parameters() if not n.startswith("blocks.")}
    plain_numbers = sum(p.numel() for p in outside.values() if p.dtype == BF16)
    assert sizes.rest.plain + sizes.rest.half + sizes.tables.plain == plain_numbers


@pytest.mark.parametrize(
    "name", ["Wan2_2Transformer3DModel", "WanTransformer3DModel", "WanModel", None]
)
def test_a_folder_with_videox_fun_s_own_config(tmp_path: Path, name: str | None) -> None:
    """Under whatever class it was saved, one of which has a name that diffusers gives another."""
    family = "wan2.2-fun-control-a14b"
    state = state_of(family)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    config: dict[str, Any] = {
        "_diffusers_version": "0.30.1", "add_ref_conv": True, "in_dim_ref_conv": 16, "dim": 256,
        "eps": 1e-6, "ffn_dim": 512, "freq_dim": 256, "in_dim": 52, "model_type": "i2v",
        "num_heads": 2, "num_layers": 2, "out_dim": 16, "text_len": 512,
    }  # fmt: skip
    config |= {} if name is None else {"_class_name": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = load_component(tmp_path, BF16, kind="transformer")
    assert torch.equal(model.ref_conv.weight, state["ref_conv.weight"])


@pytest.mark.parametrize("family", OWN)
def test_a_file_that_lacks_one_of_them_is_refused(tmp_path: Path, family: str) -> None:
    state = state_of(family)
    gone = max(OWN[family])
    del state[gone]
    path = tmp_path / "fun.safetensors"
    save_file(state, path)
    with pytest.raises(WanError, match=gone.rsplit(".", 1)[0]):
        load_component(path, BF16, kind="transformer")
