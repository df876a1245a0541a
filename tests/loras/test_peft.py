"""Folders that PEFT saves, of each kind that is applied, against PEFT's own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.lean_models import inputs_of, model_of
from torch import Tensor

from wan_core.config import WanLoRA
from wan_core.loras import apply_loras

pytestmark = pytest.mark.usefixtures("without_gradients")

TARGETS = ["attn1.to_q", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2"]
PATTERNS = {"rank_pattern": {"ffn.net.2": 3}, "alpha_pattern": {"blocks.1.attn1.to_q": 7}}
KINDS: dict[str, Any] = {
    "LoKr": peft.LoKrConfig(r=2, alpha=5, decompose_both=True, **PATTERNS),
    "LoKr of whole factors": peft.LoKrConfig(r=40, alpha=5, decompose_factor=4, **PATTERNS),
    "DoRA": peft.LoraConfig(r=2, lora_alpha=5, use_dora=True, **PATTERNS),
    "DoRA by the root of the rank": peft.LoraConfig(
        r=4, lora_alpha=5, use_dora=True, use_rslora=True
    ),
    "LoHa": peft.LoHaConfig(r=2, alpha=5, **PATTERNS),
}


def output(model: Any, call: dict[str, Any]) -> Tensor:
    result: Tensor = model(**call)[0]
    return result


def stretch(model: Any) -> None:
    """Have a DoRA's magnitudes differ from the norms that they begin with."""
    for name, value in model.named_parameters():
        if "lora_magnitude_vector" in name:
            value.data *= 1 + 0.4 * torch.rand(value.shape)


def saved(folder: Path, config: Any, seed: int = 0) -> tuple[Any, Path]:
    """A model with an adapter of random numbers, and the folder that PEFT saved of it."""
    convolution = {"patch_embedding"} if isinstance(config, peft.LoraConfig) else set()
    config.target_modules = {*TARGETS, *convolution}
    config.init_weights = config.init_lora_weights = False
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model_of("wan2.1-t2v", torch.float32), config)
    stretch(wrapped)
    wrapped.save_pretrained(folder)
    return wrapped.base_model.model, folder


def same(ours: Tensor, wanted: Tensor, plain: Tensor) -> bool:
    assert (wanted - plain).norm() > 0.01 * wanted.norm()
    return bool((ours - wanted).norm() < 1e-5 * wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(tmp_path: Path, kind: str) -> None:
    theirs, folder = saved(tmp_path, KINDS[kind])
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    plain, wanted = output(model, call), output(theirs, call)
    with apply_loras(model, [WanLoRA(folder)]):
        ours = output(model, call)
    assert same(ours, wanted, plain)


ORDERS = {"a DoRA after a LoRA": (False, True), "before it": (True, False), "two": (True, True)}


@pytest.mark.parametrize("order", ORDERS)
def test_several_with_their_strengths(tmp_path: Path, order: str) -> None:
    """A DoRA rescales what is put on before it, by the model's own weight and its own matrices."""
    names, strengths = ("one", "two"), (0.6, 1.7)
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    plain, wrapped = output(model, call), None
    torch.manual_seed(3)
    for name, dora in zip(names, ORDERS[order], strict=True):
        config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=dora, init_lora_weights=False,
                                 target_modules=TARGETS)  # fmt: skip
        if wrapped is None:
            wrapped = peft.get_peft_model(model_of("wan2.1-t2v", torch.float32), config, name)
        else:
            wrapped.add_adapter(name, config)
    stretch(wrapped)
    wrapped.save_pretrained(tmp_path)
    wrapped.base_model.set_adapter(list(names))
    for layer in wrapped.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for name, strength in zip(names, strengths, strict=True):
                layer.set_scale(name, strength)
    wanted = output(wrapped.base_model.model, call)
    loras = [WanLoRA(tmp_path / name, "both", n) for name, n in zip(names, strengths, strict=True)]
    with apply_loras(model, loras):
        assert same(output(model, call), wanted, plain)
    with apply_loras(model, loras[::-1]):
        assert not same(output(model, call), wanted, plain)
