"""LoRAs at run time: every key style, against merged weights and diffusers, and nothing left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference_layouts as layouts
from support.as_pack import load_pack, open_model, part
from support.cases import in_turn
from support.lean_models import inputs_of, model_of
from support.lora_kinds import RANK, factors, lora_file
from support.machines import architecture
from support.stored_files import gguf_blocks
from support.tiny_models import components, make_folder, pipeline
from torch import Tensor, nn

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.config import WanLoRA, WanModelFiles
from wan_core.detect.detector import ArchitectureDetector
from wan_core.detect.lora_files import parse_lora, with_loras
from wan_core.detect.lora_names import read_patches
from wan_core.errors import CorruptFile, InvalidRequest, ModelMismatch, UnsupportedModel
from wan_core.formats import Storage, read_table
from wan_core.forward.fun import fun_inputs
from wan_core.forward.transformer import lean_forward
from wan_core.job import resolve, solver_sigmas
from wan_core.loading.dequantize import Scales
from wan_core.loading.quantized import StoredLinear, replace_layer
from wan_core.loras import apply_loras
from wan_core.loras.read import shape_of
from wan_core.models.recipes import recipe_of
from wan_core.placing.offload import place
from wan_core.placing.streaming import stream_blocks

# Written down here once more, so that a wrong table in the product is seen.
ORIGINAL = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img", "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    "attn1.norm_q": "self_attn.norm_q", "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q", "attn2.norm_k": "cross_attn.norm_k",
    "attn2.norm_added_k": "cross_attn.norm_k_img", "norm2": "norm3",
}  # fmt: skip
ORIGINAL_TOP = {
    "patch_embedding": "patch_embedding", "proj_out": "head.head",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
}  # fmt: skip


def original(name: str) -> str:
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        return f"blocks.{index}.{ORIGINAL[rest]}"
    return ORIGINAL_TOP[name]


# style: (name of a module as the style writes it, endings of its two matrices, may hold alpha)
STYLES = {
    "diffusers": (lambda n: f"transformer.{n}", "lora_A.weight", "lora_B.weight"),
    "peft": (lambda n: f"base_model.model.{n}", "lora_A.default.weight", "lora_B.default.weight"),
    "comfyui": (lambda n: f"diffusion_model.{original(n)}", "lora_A.weight", "lora_B.weight"),
    "kijai": (lambda n: f"diffusion_model.{original(n)}", "lora_down.weight", "lora_up.weight"),
    "bare": (original, "lora_down.weight", "lora_up.weight"),
    "bare diffusers": (lambda n: n, "lora_A.weight", "lora_B.weight"),
    "musubi": (
        lambda n: f"lora_unet_{original(n).replace('.', '_')}", "lora_down.weight",
        "lora_up.weight",
    ),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("without_gradients")


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }


def make_lora(
    model: nn.Module, style: str, *, alpha: float | None = None, only: str = "", seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA for every matrix whose name holds ``only``; returns file and change of each weight."""
    g = torch.Generator().manual_seed(seed)
    spell, down_end, up_end = STYLES[style]
    tensors, changes = {}, {}
    for name, layer in matrices(model).items():
        if only not in name:
            continue
        out, *inside = layer.weight.shape
        down = torch.randn(RANK, *inside, generator=g) * 0.3
        up = torch.randn(out, RANK, *([1] * (len(inside) - 1)), generator=g) * 0.3
        tensors[f"{spell(name)}.{down_end}"], tensors[f"{spell(name)}.{up_end}"] = down, up
        if alpha is not None:
            tensors[f"{spell(name)}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / RANK
        product = up.flatten(1).double() @ down.flatten(1).double() * scale
        changes[f"{name}.weight"] = product.reshape(layer.weight.shape)
    return tensors, changes


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


@contextlib.contextmanager
def merged(model: nn.Module, changes: dict[str, Tensor], strength: float) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].data for name in changes}
    for name, change in changes.items():
        new = before[name].double() + strength * change.reshape(before[name].shape)
        parameters[name].data = new.to(before[name].dtype)
    try:
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value


def output(model: Any, call: dict[str, Any]) -> Tensor:
    result: Tensor = model(**call)[0]
    return result


def assert_close(ours: Tensor, theirs: Tensor, untouched: Tensor, rel: float = 1e-5) -> None:
    scale = theirs.abs().max()
    assert (untouched - theirs).abs().max() > 0.02 * scale  # the LoRA does something
    assert (ours - theirs).abs().max() <= rel * scale


def state(model: nn.Module) -> tuple[str, int, list[str]]:
    """A hash of every tensor, the hooks in all, and what instances carry."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + str(value.dtype).encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return digest.hexdigest(), hooks, [key for m in model.modules() for key in sorted(vars(m))]


# Against merged weights and diffusers -------------------------------------------------------------


@pytest.mark.parametrize("family", ["wan2.1-t2v", "wan2.1-flf2v"])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_equals_merged_weights(tmp_path: Path, style: str, family: str) -> None:
    model = model_of(family, torch.float32)
    call = inputs_of(model, torch.float32)
    plain, before = output(model, call), state(model)
    tensors, changes = make_lora(model, style, alpha=None if style == "peft" else 1.5)
    path = saved(tmp_path / "lora.safetensors", tensors)
    with apply_loras(model, [WanLoRA(path, strength=0.7)]):
        ours = output(model, call)
    assert state(model) == before
    assert torch.equal(output(model, call), plain)
    with merged(model, changes, 0.7):
        assert_close(ours, output(model, call), plain)


def change_of(tensors: dict[str, Tensor], alpha: float) -> Tensor:
    """LyCORIS' formulas for the difference of a weight, in float64."""
    values = {name.split("_", 1)[1]: tensor.double() for name, tensor in tensors.items()}
    w1, w2 = (
        values[w].flatten(1) if w in values else values[f"{w}_a"] @ values[f"{w}_b"]
        for w in ("w1", "w2")
    )
    scale = alpha / RANK if any(name.endswith("_b") for name in values) else 1.0
    return (torch.kron(w1, w2) if "lokr" in next(iter(tensors)) else w1 * w2) * scale


@pytest.mark.parametrize("forward", ["diffusers", "lean", "by rows"])
@pytest.mark.parametrize("kind", ["lokr", "lokr w2", "lokr w1 w2", "loha"])
def test_factors_of_another_kind_equal_merged_weights(
    tmp_path: Path, kind: str, forward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoKr and LoHa, whole factors and products, a convolution's too, with a plain LoRA beside."""
    monkeypatch.setattr("wan_core.loras.delta.LORA_TOKENS", 7)
    monkeypatch.setattr("wan_core.loras.delta.LORA_ROWS", 5)
    model = model_of("wan2.1-t2v", torch.float32)
    call, g = inputs_of(model, torch.float32), torch.Generator().manual_seed(3)
    plain, before = output(model, call), state(model)
    tensors, changes = {}, {}
    for name, layer in matrices(model).items():
        made = factors(kind, tuple(layer.weight.shape), g)
        stem = f"lycoris_{original(name).replace('.', '_')}"
        tensors |= {f"{stem}.{end}": value for end, value in made.items()}
        tensors[f"{stem}.alpha"] = torch.tensor(1.5)
        changes[f"{name}.weight"] = 0.7 * change_of(made, 1.5)
        if "w1" not in kind and kind != "loha":  # beside a whole factor parts count for nothing
            tensors[f"{stem}.lokr_w1_a"] = torch.ones(2, RANK)
    beside, more = make_lora(model, "kijai", only="blocks.0")
    paths = [saved(tmp_path / f"{n}.safetensors", one) for n, one in enumerate((tensors, beside))]
    for name, change in more.items():
        changes[name] = changes[name] + change.flatten(1)
    loras = [WanLoRA(paths[0], strength=0.7), WanLoRA(paths[1])]
    with FORWARDS[forward](model) as why_not, apply_loras(model, loras):
        assert forward == "diffusers" or why_not is None
        ours = output(model, call)
    with torch.enable_grad(), apply_loras(model, loras):
        assert_close(output(model, call).detach(), ours, plain, rel=5e-5)
    assert state(model) == before and torch.equal(output(model, call), plain)
    with merged(model, changes, 1.0):
        assert_close(ours, output(model, call), plain, rel=5e-5)


@pytest.mark.parametrize(
    "family", ["wan2.1-fun-control", "wan2.2-fun-camera-a14b", "wan2.2-animate", "wan2.1-vace"]
)
def test_layers_that_only_some_models_have(tmp_path: Path, family: str) -> None:
    """A reference's, a camera's, a face's and VACE's layers are changed like any others."""
    model = model_of(family, torch.float32)
    call = inputs_of(model, torch.float32)
    frames, height, width = call["hidden_states"].shape[-3:]
    reads: dict[str, Tensor] = {}
    if family == "wan2.1-fun-control":
        reads = {"reference": torch.randn(1, 16, height, width)}
    elif "camera" in family:
        reads = {"camera": torch.randn(1, 24, frames, height * 8, width * 8)}
    tensors, changes = make_lora(model, "diffusers", alpha=1.5)
    path = saved(tmp_path / "lora.safetensors", tensors)
    assert not read_patches(read_table(path), shape_of(model), Path("m")).notes
    with fun_inputs(model, **reads):
        plain = output(model, call)
    with apply_loras(model, [WanLoRA(path)]), fun_inputs(model, **reads):
        ours = output(model, call)
    with merged(model, changes, 1.0), fun_inputs(model, **reads):
        assert_close(ours, output(model, call), plain)


def test_an_alpha_is_the_same_in_every_dtype(tmp_path: Path) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call, found = inputs_of(model, torch.float32), []
    for dtype in (torch.float32, torch.float64, torch.int64, torch.uint16, torch.uint32,
                  torch.uint64, torch.float8_e4m3fn):  # fmt: skip
        tensors, _ = make_lora(model, "kijai", alpha=2.0, only="blocks.0")
        tensors = {n: t.to(dtype) if n.endswith(".alpha") else t for n, t in tensors.items()}
        with apply_loras(model, [WanLoRA(saved(tmp_path / "lora.safetensors", tensors))]):
            found.append(output(model, call))
    assert all(torch.equal(one, found[0]) for one in found)


def test_layers_of_rank_0_are_left_out_and_the_others_used(tmp_path: Path) -> None:
    """Cutting each layer of a LoRA to the rank that it needs leaves some with none."""
    model = model_of("wan2.1-t2v", torch.float32)
    call, (tensors, _) = inputs_of(model, torch.float32), make_lora(model, "kijai", alpha=2.0)
    kept, emptied = dict(tensors), dict(tensors)
    for name in tensors:
        if "blocks.1.ffn" in name:
            kept.pop(name)
        if "blocks.1.ffn" in name and not name.endswith(".alpha"):
            rows = name.endswith("down.weight")
            emptied[name] = tensors[name][:0] if rows else tensors[name][:, :0]
    found = []
    for number, state in enumerate((kept, emptied)):
        path = saved(tmp_path / f"{number}.safetensors", state)
        with apply_loras(model, [WanLoRA(path)]):
            found.append(output(model, call))
    assert torch.equal(*found) and not torch.equal(found[0], output(model, call))
    patches = read_patches(read_table(path), shape_of(model), Path("m"))
    assert "2 of the layers it names have matrices of rank 0" in patches.notes[0]


@pytest.mark.parametrize(
    ("style", "alpha"), [("diffusers", None), ("comfyui", 1.5), ("kijai", 1.5), ("musubi", 1.5)]
)
def test_equals_diffusers(tmp_path: Path, style: str, alpha: float | None) -> None:
    parts = components("wan2.1-t2v")
    model = parts["transformer"] = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    plain = output(model, call)
    tensors, _ = make_lora(model, style, alpha=alpha, only="blocks.")
    if style in ("comfyui", "kijai"):
        for name in list(tensors):
            if name.endswith("alpha"):
                width = dict(model.named_modules())["blocks.0.attn1.to_q"].out_features
                tensors[name.replace("alpha", "diff_b")] = torch.full(
                    (32 if ".ffn.0." in name else width,), 0.2
                )
    path = saved(tmp_path / "lora.safetensors", tensors)
    with apply_loras(model, [WanLoRA(path)]):
        ours = output(model, call)
    pipe = pipeline("wan2.1-t2v", parts)
    pipe.load_lora_weights(str(path))
    assert_close(ours, output(pipe.transformer, call), plain)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_that_diffusers_keeps_in_the_metadata(tmp_path: Path, rslora: bool) -> None:
    from peft import LoraConfig

    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    plain = output(model, call)
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=11, target_modules=["to_q", "to_out.0"], use_rslora=rslora,
                   alpha_pattern={"to_out.0": 5}, init_lora_weights=False)
    )  # fmt: skip
    theirs = output(model, call)
    model.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    model.delete_adapters("default")
    fresh = model_of("wan2.1-t2v", torch.float32)
    assert torch.equal(output(fresh, call), plain)
    with apply_loras(fresh, [WanLoRA(tmp_path / "lora.safetensors")]):
        assert_close(output(fresh, call), theirs, plain)


def lightx2v(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Everything such files hold: matrices, differences of weights, biases, norms and tables."""
    g = torch.Generator().manual_seed(5)
    tensors, changes = make_lora(model, "kijai", alpha=1.0, only="blocks.")
    for name, value in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        change = torch.randn(value.shape, generator=g) * 0.1
        if name.endswith("scale_shift_table"):
            owner = "head" if name == "scale_shift_table" else module
            tensors[f"diffusion_model.{owner}.diff_m"] = change
        elif leaf == "bias":
            tensors[f"diffusion_model.{original(module)}.diff_b"] = change
        elif leaf == "weight" and (value.dim() == 1 or not name.startswith("blocks.")):
            tensors[f"diffusion_model.{original(module)}.diff"] = change
        else:
            continue
        changes[name] = changes.get(name, 0) + change.double()
    return tensors, changes


FORWARDS = {
    "diffusers": contextlib.nullcontext,
    "lean": lambda model: lean_forward(model, rows=32),
    "by rows": lambda model: lean_forward(model, exact=False, rows=32, head_groups=2),
}


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("family", ["wan2.1-i2v", "wan2.2-ti2v-5b"])
def test_differences_of_weights_biases_norms_and_tables(
    tmp_path: Path, family: str, forward: str
) -> None:
    model = model_of(family, torch.float32)
    call = inputs_of(model, torch.float32)
    plain, before = output(model, call), state(model)
    tensors, changes = lightx2v(model)
    touched = {name for name, _ in model.named_parameters()} - changes.keys()
    assert not touched, "every parameter is changed by this file"
    path = saved(tmp_path / "lora.safetensors", tensors)
    with FORWARDS[forward](model) as why_not, apply_loras(model, [WanLoRA(path, strength=0.6)]):
        assert forward == "diffusers" or why_not is None
        ours = output(model, call)
    assert state(model) == before
    with merged(model, changes, 0.6):
        assert_close(ours, output(model, call), plain, rel=5e-5)


def test_several_at_once_add_up(tmp_path: Path) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    plain = output(model, call)
    loras, total = [], {}
    for number, (style, strength) in enumerate((("kijai", 0.5), ("musubi", -0.4), ("bare", 1.0))):
        tensors, changes = make_lora(model, style, alpha=2.0, seed=number)
        loras.append(WanLoRA(saved(tmp_path / f"{number}.safetensors", tensors), "both", strength))
        for name, change in changes.items():
            total[name] = total.get(name, 0) + strength * change
    with apply_loras(model, loras):
        ours = output(model, call)
    with merged(model, total, 1.0):
        assert_close(ours, output(model, call), plain)


# On quantised weights and under every placement ---------------------------------------------------


def quantize(model: Any, kind: str) -> dict[str, Tensor]:
    """Put quantised layers into the blocks; returns their values in float32."""
    values = {}
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or not name.startswith("blocks."):
            continue
        new = StoredLinear(layer.in_features, layer.out_features, bias=True)
        shape = (layer.out_features, layer.in_features)
        if kind == "fp8":
            how = Storage("fp8", "F8_E4M3", shape, per="tensor")
            new.set_stored(layer.weight.to(torch.float8_e4m3fn), Scales(None, 0.5), how)
        else:
            data = torch.from_numpy(gguf_blocks(layer.weight, "Q8_0"))
            new.set_stored(data, Scales(), Storage("gguf", "Q8_0", shape))
        values[name] = new.dequantized(torch.float32)
        new.bias = layer.bias
        replace_layer(model, name, new)
    return values


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_on_quantised_layers(tmp_path: Path, kind: str) -> None:
    numbers = {"attention_head_dim": 32, "ffn_dim": 64}
    model = model_of("wan2.1-t2v", torch.float32, **numbers)
    call = inputs_of(model, torch.float32)
    tensors, changes = make_lora(model, "kijai", alpha=1.0)
    path = saved(tmp_path / "lora.safetensors", tensors)
    values = quantize(model, kind)
    plain, before = output(model, call), state(model)
    with apply_loras(model, [WanLoRA(path)], dtype=torch.float32):
        ours = output(model, call)
    assert state(model) == before
    whole = model_of("wan2.1-t2v", torch.float32, **numbers)
    for name, value in values.items():
        whole.get_submodule(name).weight.data = value
    with merged(whole, changes, 1.0):
        assert_close(ours, output(whole, call), plain)


PLACEMENTS = {
    "none": lambda model: place(model, "none", "cpu"),
    "sequential": lambda model: place(model, "sequential", "cpu"),
    "streamed": lambda model: stream_blocks(model, "cpu"),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_same_bits_under_every_placement(tmp_path: Path, placement: str) -> None:
    model = model_of("wan2.1-t2v", torch.bfloat16)
    call = inputs_of(model, torch.bfloat16)
    path = saved(tmp_path / "lora.safetensors", lightx2v(model)[0])
    with apply_loras(model, [WanLoRA(path)]):
        alone = output(model, call)
    before = state(model)
    with (
        PLACEMENTS[placement](model),
        apply_loras(model, [WanLoRA(path)], device="cpu", dtype=torch.bfloat16),
    ):
        assert torch.equal(output(model, call), alone)
    assert state(model) == before


def test_half_precision_is_as_near_as_merging(tmp_path: Path) -> None:
    exact = model_of("wan2.1-t2v", torch.float32)
    tensors, changes = make_lora(exact, "kijai", alpha=1.0)
    path = saved(tmp_path / "lora.safetensors", tensors)
    call = inputs_of(exact, torch.float32)
    with merged(exact, changes, 1.0):
        truth = output(exact, call)
    half = model_of("wan2.1-t2v", torch.bfloat16)
    rounded = {k: v.bfloat16() if k.endswith("states") else v for k, v in call.items()}
    with apply_loras(half, [WanLoRA(path)]):
        ours = output(half, rounded).float()
    with merged(half, changes, 1.0):
        theirs = output(half, rounded).float()
    assert (ours - truth).abs().mean() < 1.2 * (theirs - truth).abs().mean()


# Removal, strength, threads ----------------------------------------------------------------------


def test_strength_0_changes_no_bit(tmp_path: Path) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    plain = output(model, call)
    path = saved(tmp_path / "lora.safetensors", lightx2v(model)[0])
    with apply_loras(model, [WanLoRA(path, strength=0.0)]):
        assert torch.equal(output(model, call), plain)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    before = state(model)
    path = saved(tmp_path / "lora.safetensors", lightx2v(model)[0])
    with pytest.raises(KeyboardInterrupt), apply_loras(model, [WanLoRA(path)]):
        assert state(model)[1] > before[1]
        raise KeyboardInterrupt
    assert state(model) == before


def test_a_bad_second_lora_attaches_nothing(tmp_path: Path) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    before = state(model)
    good = saved(tmp_path / "good.safetensors", make_lora(model, "bare")[0])
    broken = load_file(good)
    broken["blocks.1.ffn.0.lora_up.weight"][0, 0] = float("nan")
    bad = saved(tmp_path / "bad.safetensors", broken)
    with (
        pytest.raises(CorruptFile, match=r"blocks\.1\.ffn\.0\.lora_up\.weight.*NaN"),
        apply_loras(model, [WanLoRA(good), WanLoRA(bad)]),
    ):
        pass
    assert state(model) == before


def test_threads_that_share_a_module_do_not_see_each_other_s(tmp_path: Path) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    plain, before = output(model, call), state(model)
    paths = [
        saved(tmp_path / f"{seed}.safetensors", make_lora(model, "kijai", seed=seed)[0])
        for seed in (1, 2)
    ]
    expected = []
    for path in paths:
        with apply_loras(model, [WanLoRA(path)]):
            expected.append(output(model, call))
    meet = threading.Barrier(3, timeout=30)
    results: dict[int, Tensor] = {}

    def render(number: int) -> None:
        with torch.no_grad(), apply_loras(model, [WanLoRA(paths[number])]):
            meet.wait()
            results[number] = output(model, call)
            meet.wait()

    threads = [threading.Thread(target=render, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    meet.wait()
    assert torch.equal(output(model, call), plain)  # this thread has none
    meet.wait()
    for thread in threads:
        thread.join(30)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    assert state(model) == before


# Found from headers ------------------------------------------------------------------------------

KEY = "diffusion_model.blocks.0.self_attn.q"
PAIR = {
    f"{KEY}.lora_down.weight": torch.zeros(2, 24), f"{KEY}.lora_up.weight": torch.zeros(24, 2)
}  # fmt: skip
PATCH = "diffusion_model.patch_embedding"
REFUSED = {
    "dora of columns": (
        PAIR | {f"{KEY}.dora_scale": torch.zeros(1, 24)}, UnsupportedModel,
        r"a magnitude for each input .*dora_scale' \[1, 24\].*wd_on_output"),
    "dora of a convolution's columns": (
        {f"{PATCH}.lora_down.weight": torch.zeros(2, 16, 1, 2, 2),
         f"{PATCH}.lora_up.weight": torch.zeros(24, 2, 1, 1, 1),
         f"{PATCH}.dora_scale": torch.zeros(1, 16, 1, 1, 1)}, UnsupportedModel, "wd_on_output"),
    "dora of another width": (
        PAIR | {f"{KEY}.dora_scale": torch.zeros(25, 1)}, ModelMismatch, "needs 24 magnitudes"),
    "peft dora of another width": (
        PAIR | {f"{KEY}.lora_magnitude_vector": torch.zeros(23)}, ModelMismatch,
        "needs 24 magnitudes"),
    "magnitudes alone": (
        {f"{KEY}.lora_magnitude_vector": torch.zeros(24)}, CorruptFile, "without the matrices"),
    "whole weights": (
        PAIR | {"base_model.model.blocks.0.attn1.to_k.weight": torch.zeros(24, 24)},
        UnsupportedModel, "weights to be replaced .*to_k.weight"),
    "magnitudes of a norm": (
        {f"{KEY.replace('_attn.q', '_attn.norm_q')}.{x}": torch.zeros(24)
         for x in ("diff", "dora_scale")}, ModelMismatch, "norm of width 24"),
    "a core of loha": ({f"{KEY}.hada_t1": torch.zeros(2, 2, 1, 1)}, UnsupportedModel, "LoHa with"),
    "a core of lokr": ({f"{KEY}.lokr_t2": torch.zeros(2, 2, 1, 1)}, UnsupportedModel, "LoKr with"),
    "half of loha": (
        {f"{KEY}.hada_w1_a": torch.zeros(24, 2)}, CorruptFile, "without its 'hada_w1_b'"),
    "half of lokr": (
        {f"{KEY}.lokr_w1": torch.zeros(2, 2)}, CorruptFile, "without its 'lokr_w2_a'"),
    "lokr of another width": (
        {f"{KEY}.lokr_w1": torch.zeros(2, 2), f"{KEY}.lokr_w2": torch.zeros(12, 13)},
        ModelMismatch, r"needs factors that make \[24, 24\]; these are \[2, 2\] and \[12, 13\]"),
    "loha of another width": (
        {f"{KEY}.hada_w{n}_{half}": torch.zeros(*size) for n in (1, 2)
         for half, size in (("a", (48, 2)), ("b", (2, 48)))},
        ModelMismatch, "width 48.*width 24"),
    "loha of two widths": (
        {f"{KEY}.hada_w{n}_a": torch.zeros(24, 2) for n in (1, 2)}
        | {f"{KEY}.hada_w{n}_b": torch.zeros(2, 23 + n) for n in (1, 2)},
        ModelMismatch, r"\[24, 24\] and \[24, 25\]"),
    "loha of two heights, the first wrong": (
        {f"diffusion_model.blocks.0.ffn.0.hada_w{n}_a": torch.zeros(34 - n, 2) for n in (1, 2)}
        | {f"diffusion_model.blocks.0.ffn.0.hada_w{n}_b": torch.zeros(2, 24) for n in (1, 2)},
        ModelMismatch, r"\[33, 24\] and \[32, 24\]"),
    "a factor of lokr in one axis": (
        {f"{KEY}.lokr_w1": torch.zeros(24), f"{KEY}.lokr_w2": torch.zeros(1, 24)},
        ModelMismatch, r"w1' .* is \[24\]; .* needs a matrix"),
    "half a factor in one axis": (
        {f"{KEY}.lokr_w1": torch.zeros(1, 24), f"{KEY}.lokr_w2_a": torch.zeros(24, 2),
         f"{KEY}.lokr_w2_b": torch.zeros(2)}, CorruptFile, r"\[2\] of .* cannot be multiplied"),
    "half a factor in three axes": (
        {f"{KEY}.lokr_w1": torch.zeros(1, 1), f"{KEY}.lokr_w2_a": torch.zeros(24, 2, 1),
         f"{KEY}.lokr_w2_b": torch.zeros(2, 24)}, CorruptFile, "cannot be multiplied"),
    "factors of no rank": (
        {f"{KEY}.lokr_w1": torch.zeros(1, 1), f"{KEY}.lokr_w2_a": torch.zeros(24, 0),
         f"{KEY}.lokr_w2_b": torch.zeros(0, 24)}, CorruptFile, "cannot be multiplied"),
    "lokr on a norm": (
        {f"{KEY.replace('_attn.q', '_attn.norm_q')}.lokr_{w}": torch.zeros(2, 2)
         for w in ("w1", "w2")},
        ModelMismatch, "norm of width"),
    "factors that do not meet": (
        {f"{KEY}.lokr_w1": torch.zeros(2, 2), f"{KEY}.lokr_w2_a": torch.zeros(12, 2),
         f"{KEY}.lokr_w2_b": torch.zeros(3, 12)}, CorruptFile, "cannot be multiplied"),
    "int8": (
        {k: v.to(torch.int8) for k, v in PAIR.items()}, UnsupportedModel, "stored as I8"),
    "width": (
        {f"{KEY}.lora_down.weight": torch.zeros(2, 48),
         f"{KEY}.lora_up.weight": torch.zeros(48, 2)}, ModelMismatch, "width 48.*width 24"),
    "blocks": (
        {k.replace("blocks.0", "blocks.7"): v for k, v in PAIR.items()}, ModelMismatch,
        "patches 8 blocks, .* has 2"),
    "unknown": (
        PAIR | {"diffusion_model.blocks.0.self_attn.zz.lora_up.weight": torch.zeros(24, 2)},
        ModelMismatch, r"1 of 3 tensors .* match nothing .*self_attn\.zz\.lora_up"),
    "scaled fp8": (
        {k: v.to(torch.float8_e4m3fn) for k, v in PAIR.items()}
        | {f"{KEY}.lora_up.scale_weight": torch.tensor(0.5)},
        UnsupportedModel, r"quantised form \(.*lora_up.scale_weight.*bf16 or fp16"),
    "text encoder alone": (
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 24)},
        ModelMismatch, "Nothing in the LoRA"),
    "both experts": (
        {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 24),
         "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.zeros(24, 2),
         "transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 24)},
        ModelMismatch, "both experts"),
    "both experts, by number": (
        {k.replace("diffusion_model.", f"diffusion_model.transformer_{n}."): v.clone()
         for k, v in PAIR.items() for n in (1, 2)}, ModelMismatch, "both experts"),
    "half": ({f"{KEY}.lora_down.weight": torch.zeros(2, 24)}, CorruptFile, "without its 'up'"),
    "alpha alone": (PAIR | {"blocks.0.ffn.0.alpha": torch.tensor(1.0)}, CorruptFile,
                    "without the matrices"),
    "ranks": (
        PAIR | {f"{KEY}.lora_up.weight": torch.zeros(24, 3)}, CorruptFile, "cannot be multiplied"),
    "rows": (
        PAIR | {f"{KEY}.lora_up.weight": torch.zeros(23, 2)}, ModelMismatch, r"needs 24 rows"),
    "bias": (PAIR | {f"{KEY}.diff_b": torch.zeros(25)}, ModelMismatch, r"diff_b.* \[25\]"),
    "two in one": (
        PAIR | {k.replace("diffusion_model.", ""): v.clone() for k, v in PAIR.items()},
        CorruptFile, "several LoRAs in one file"),
    "input channels alone": (
        {f"{PATCH}.diff": torch.zeros(24, 36, 1, 2, 2)}, ModelMismatch, "Nothing in the LoRA"),
    "input kernel": (
        PAIR | {f"{PATCH}.diff": torch.zeros(23, 16, 1, 2, 2)}, ModelMismatch, "needs .24, 16"),
    "two alphas": (PAIR | {f"{KEY}.alpha": torch.ones(2)}, CorruptFile, r"alpha.* shape \[2\]"),
    "alpha of no number": (
        PAIR | {f"{KEY}.alpha": torch.ones(0)}, CorruptFile, r"alpha.* shape \[0\]"),
    "an alpha for each rank": (
        PAIR | {f"{KEY}.alpha": torch.ones(2, 1)}, CorruptFile, "alpha is a single number"),
    "an alpha that is no real number": (
        PAIR | {f"{KEY}.alpha": torch.ones((), dtype=torch.complex64)}, UnsupportedModel,
        "alpha.* stored as C64"),
    "nothing but rank 0": (
        {f"{KEY}.lora_down.weight": torch.zeros(0, 24),
         f"{KEY}.lora_up.weight": torch.zeros(24, 0)},
        ModelMismatch, "rank 0: they change nothing"),
    "rank 0 on one side": (
        PAIR | {f"{KEY}.lora_down.weight": torch.zeros(0, 24)}, CorruptFile,
        "cannot be multiplied"),
    "a model": ({}, ModelMismatch, "is a Wan .* transformer, not a LoRA"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_folder(tmp_path_factory.mktemp("wan") / family, family)
        return made[family]

    return get


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("wan2.1-flf2v", "condition_embedder.image_embedder.pos_embed"),
        ("wan2.2-animate", "motion_encoder.motion_synthesis_weight"),
        ("wan2.2-animate", "motion_encoder.res_blocks.0.conv1"),
        ("wan2.2-animate", "face_encoder.padding_tokens"),
    ],
)
def test_what_no_layer_of_torch_computes_is_refused(
    tmp_path: Path, family: str, target: str
) -> None:
    model = model_of(family, torch.float32)
    own = model.state_dict()
    shape = own.get(target, own.get(f"{target}.weight")).shape
    path = saved(tmp_path / "lora.safetensors", {f"{target}.diff": torch.zeros(shape)})
    with pytest.raises(UnsupportedModel, match=f"changes '{target}'.*cannot do at run time"):
        read_patches(read_table(path), shape_of(model), Path("m"))


def test_what_a_patch_holds_while_its_layer_computes(tmp_path: Path) -> None:
    """Nothing for pairs, and for a convolution's factors, which are multiplied out before."""
    model = model_of("wan2.2-animate", torch.float32)

    def found(target: str, **tensors: tuple[int, ...]) -> tuple[int, int, int]:
        named = {f"{target}.{role}": torch.zeros(shape) for role, shape in tensors.items()}
        path = saved(tmp_path / "lora.safetensors", named)
        (patch,) = read_patches(read_table(path), shape_of(model), Path("m")).patches
        return patch.rank, patch.pieces, patch.columns

    for target in ("blocks.0.attn1.to_q", "face_encoder.conv1_local"):
        rows, *others = model.get_submodule(target).weight.shape
        wide = torch.Size(others).numel()
        whole = {"lokr_w1": (2, 6), "lokr_w2": (rows // 2, wide // 6)}
        halves = {"lokr_w1": (1, 1), "lokr_w2_a": (rows, 1), "lokr_w2_b": (1, wide)}
        loha = {
            f"hada_w{n}_{h}": s for n in (1, 2) for h, s in (("a", (rows, 1)), ("b", (1, wide)))
        }
        linear = len(others) == 1
        assert found(target, **whole) == (0, linear * (6 * rows // 2 + rows), 0)
        assert found(target, **halves) == (1, linear * 2 * rows, 0)
        assert found(target, **loha) == (1, 0, linear * wide)
    pair = {"lora_down.weight": (2, 24), "lora_up.weight": (24, 2)}
    assert found("blocks.0.attn1.to_q", **pair) == (2, 0, 0)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_from_the_header(folders: Any, tmp_path: Path, case: str) -> None:
    tensors, error, text = REFUSED[case]
    architecture = ArchitectureDetector().detect_model_architecture(folders("wan2.1-t2v"))
    path = tmp_path / "lora.safetensors"
    if tensors:
        saved(path, tensors)
    else:
        path = next((folders("wan2.1-t2v") / "transformer").glob("*.safetensors"))
    with pytest.raises(error, match=text) as caught:
        with_loras(architecture, [path])
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "field"),
    [(("l.safetensors", "middle"), "expert"), (("l.safetensors", "high"), "expert"),
     (("l.safetensors", "both", float("nan")), "strength"), (3, "loras")],
)  # fmt: skip
def test_wrong_requests_name_the_field(folders: Any, lora: Any, field: str) -> None:
    architecture = ArchitectureDetector().detect_model_architecture(folders("wan2.1-t2v"))
    with pytest.raises(InvalidRequest) as caught:
        with_loras(architecture, [lora])
    assert caught.value.field == field


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_peft_folder_is_applied_with_its_scale(tmp_path: Path, given: str) -> None:
    """lora_alpha of adapter_config.json does what the same number as tensors does."""
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    plain, _ = make_lora(model, "peft")
    with_alpha = dict(plain)
    for name in plain:
        if "lora_A" in name:
            with_alpha[name.partition(".lora_A")[0] + ".alpha"] = torch.tensor(12.0)
    path = saved(tmp_path / "alpha.safetensors", with_alpha)
    with apply_loras(model, [WanLoRA(path)]):
        wanted = output(model, call)
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 12}')
    path = saved(folder / "adapter_model.safetensors", plain)
    with apply_loras(model, [WanLoRA(folder if given == "folder" else path)]):
        assert torch.equal(output(model, call), wanted)
    (folder / "adapter_config.json").unlink()
    with apply_loras(model, [WanLoRA(path)]):
        assert not torch.equal(output(model, call), wanted)


def test_a_lora_with_foreign_parts_does_what_the_rest_of_it_does(
    folders: Any, tmp_path: Path
) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    tensors, _ = make_lora(model, "kijai", only="blocks.")
    more = {
        f"{PATCH}.diff": torch.ones(24, 36, 1, 2, 2),
        "lora_te_x.lora_down.weight": torch.ones(2, 24),
        "diffusion_model.img_emb.emb_pos.diff": torch.ones(1, 514, 16),
    }  # fmt: skip
    with apply_loras(model, [WanLoRA(saved(tmp_path / "plain.safetensors", tensors))]):
        wanted = output(model, call)
    with apply_loras(model, [WanLoRA(saved(tmp_path / "more.safetensors", tensors | more))]):
        assert torch.equal(output(model, call), wanted)


def test_a_text_lora_on_an_image_model(folders: Any, tmp_path: Path) -> None:
    """Its patch of the input layer goes to the first 16 channels, the noise, and this is said."""
    text = model_of("wan2.1-t2v", torch.float32)
    image = model_of("wan2.2-i2v-a14b", torch.float32)
    tensors, changes = make_lora(text, "kijai", alpha=1.0)
    tensors[f"{PATCH}.diff"] = torch.randn(24, 16, 1, 2, 2)
    path = saved(tmp_path / "lora.safetensors", tensors)
    architecture = ArchitectureDetector().detect_model_architecture(folders("wan2.2-i2v-a14b"))
    assert any("noise channels" in text for text in with_loras(architecture, [path]).warnings)
    wide = torch.zeros(image.patch_embedding.weight.shape, dtype=torch.float64)
    wide[:, :16] = changes["patch_embedding.weight"] + tensors[f"{PATCH}.diff"]
    call = inputs_of(image, torch.float32)
    plain = output(image, call)
    with apply_loras(image, [WanLoRA(path)]):
        ours = output(image, call)
    with merged(image, changes | {"patch_embedding.weight": wide}, 1.0):
        assert_close(ours, output(image, call), plain)


def test_the_image_branch_is_left_out_where_there_is_none(folders: Any, tmp_path: Path) -> None:
    with_branch = model_of("wan2.1-i2v", torch.float32)
    path = saved(tmp_path / "lora.safetensors", make_lora(with_branch, "kijai")[0])
    architecture = ArchitectureDetector().detect_model_architecture(folders("wan2.2-i2v-a14b"))
    warned = with_loras(architecture, [path]).warnings
    # Two blocks with k_img and v_img, two layers of img_emb: each a pair.
    assert any("12 of" in text and "image branch" in text for text in warned)


# Recipes -----------------------------------------------------------------------------------------

NAMES = {
    "lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16": True,
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32": True,
    "Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16": True,
    "wan_4_steps": True,
    "StepDistill": True,
    "LightX2V_4Step_high": True,
    "Wan21_I2V_cfg_step_distill": True,
    "wan2.2_lightning_seko": True,
    "lightx2v_trained_2000steps": True,
    "wan_8steps_distill": False,
    # Effects and styles: one word that also means something else is not enough.
    "thunder_lightning_effect_wan": False,
    "Lenovo_lightning_photo_style": False,
    "lightning_storm_wan22_high": False,
    "distill_of_roses": False,
    "enlightning_strikes": False,
    "my_style_lora": False,
    "14steps": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_recognised_by_whole_words(name: str) -> None:
    assert (recipe_of(f"/loras/{name}.safetensors") is not None) == NAMES[name]


def test_recipes_from_the_folder_and_from_metadata() -> None:
    folder = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    found = recipe_of(f"/x/{folder}/high_noise_model.safetensors")
    assert found is not None
    assert "folder name" in found.reason
    found = recipe_of("/x/a.safetensors", {"modelspec.title": "Wan lightx2v"})
    assert found is not None
    assert "modelspec.title" in found.reason


FAMILIES = {
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise": ("lightx2v", "euler"),
    "TurboWan2.1-T2V-14B-480P": ("rCM", "lcm"),
    "TurboWan2.2-I2V-A14B-high-720P-quant": ("rCM", "euler"),
    "rCM_Wan2.1_T2V_1.3B_480p_2steps": ("rCM", "lcm"),
    "Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16": ("rCM", "lcm"),
    "FastWan2.1-T2V-1.3B-Diffusers": ("FastWan", "lcm"),
    "FastWan2.2-TI2V-5B-FullAttn_3steps": ("FastWan", "lcm"),
    "Wan21_CausVid_14B_T2V_lora_rank32": ("CausVid", "unipc"),
    "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32": ("CausVid", "unipc"),
    "FastWan_8steps": None,
    "causvid_40steps": None,
    "marcm_style": None,
    "fast_wanderer": None,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_few_steps_are_told_apart(name: str) -> None:
    found = recipe_of(f"/loras/{name}.safetensors")
    assert (None if found is None else (found.name, found.scheduler)) == FAMILIES[name]


LEVELS = {  # as published, to the digits that are
    "lightx2v": (1.0, 0.9375, 0.8333, 0.625),
    "rcm_t2v": (0.98765, 0.93378, 0.85290, 0.60898),
    "rcm_i2v": (0.99502, 0.93378, 0.85290, 0.60898),
    "fastwan": (1.0, 0.757, 0.522),
}


@pytest.mark.parametrize("name", LEVELS)
def test_a_recipe_s_settings_make_the_published_levels(name: str, tmp_path: Path) -> None:
    """From the defaults that a recipe gives, through the request, to the solver."""
    recipe = recipe_of(f"/loras/{name}.safetensors")
    assert recipe is not None and recipe.guidance_scale == 1.0
    model = architecture("wan2.1-t2v-14b")
    variant = replace(model.variant, defaults=recipe.as_defaults(model.variant.defaults))
    request = resolve(GenerationConfig(prompt=""), replace(model, variant=variant))
    made = solver_sigmas(
        request.scheduler, request.sigma_schedule, request.num_inference_steps,
        request.flow_shift, request.sigmas,
    )  # fmt: skip
    assert made == pytest.approx((*LEVELS[name], 0.0), abs=6e-5)
    assert recipe.differences(request) == []


def test_what_departs_from_a_recipe_s_levels_is_named() -> None:
    """rCM was made for fewer steps too; a shift or more steps put the levels aside."""
    recipe = recipe_of("/loras/rcm_t2v.safetensors")
    assert recipe is not None
    model = architecture("wan2.1-t2v-14b")
    variant = replace(model.variant, defaults=recipe.as_defaults(model.variant.defaults))
    model = replace(model, variant=variant)

    def differences(**asked: Any) -> list[str]:
        return recipe.differences(resolve(GenerationConfig(prompt="", **asked), model))

    two = resolve(GenerationConfig(prompt="", num_inference_steps=2), model)
    assert two.sigmas == recipe.sigmas[:2] and recipe.differences(two) == []
    assert differences(num_inference_steps=6) == [
        "num_inference_steps 6", "the sigmas of a schedule"
    ]  # fmt: skip
    assert differences(flow_shift=3.0) == ["the sigmas of a schedule"]
    assert differences(sigmas=[1.0, 0.9, 0.8, 0.5]) == ["sigmas 1, 0.9, 0.8, 0.5"]
    assert differences(scheduler="euler", guidance_scale=2.0)[0] == "guidance_scale 2"


# Whole renders -----------------------------------------------------------------------------------

JOB = GenerationConfig(
    prompt="a red cat", width=64, height=32, num_frames=5, num_inference_steps=3,
    guidance_scale=2.0, seed=3, return_frames=False, output_path="unused.mp4",
)  # fmt: skip


def latents(path: Any, tmp_path: Path, loras: Any = (), **more: Any) -> Tensor:
    loader = WanPipelineLoader(enable_caching=more.pop("caching", False))
    wishes = {"device": "cpu", "precision": "fp32", "offload": more.pop("offload", "auto")}
    wrapper = loader.load_wan_pipeline(path, optimization_config=wishes, loras=loras)
    config = replace(JOB, output_path=tmp_path / "o.mp4", **more)
    result: Tensor = wrapper.generate(config).raise_for_error().latents
    return result


def test_each_expert_has_its_own(folders: Any, tmp_path: Path) -> None:
    folder = folders("wan2.2-t2v-a14b")
    model = model_of("wan2.2-t2v-a14b", torch.float32)
    path = saved(tmp_path / "lora.safetensors", make_lora(model, "kijai")[0])
    plain = latents(folder, tmp_path, switch_step=2)
    changed = {
        expert: latents(folder, tmp_path, [(path, expert, 1.0)], switch_step=2)
        for expert in ("both", "high", "low")
    }
    every = [plain, *changed.values()]
    for index, one in enumerate(every):
        assert all(not torch.equal(one, other) for other in every[index + 1 :])
    # With one expert doing all the steps, its LoRA is all there is.
    for expert, other, switch in (("high", "low", 3), ("low", "high", 0)):
        alone = latents(folder, tmp_path, [(path, expert, 1.0)], switch_step=switch)
        both = latents(folder, tmp_path, [(path, "both", 1.0)], switch_step=switch)
        none = latents(folder, tmp_path, [(path, other, 1.0)], switch_step=switch)
        assert torch.equal(alone, both)
        assert torch.equal(none, latents(folder, tmp_path, switch_step=switch))


def test_the_same_render_however_the_model_is_placed(folders: Any, tmp_path: Path) -> None:
    model = model_of("wan2.1-i2v", torch.float32)
    state = layouts.original_transformer(layouts.state_of(model))
    files = {"lora": lightx2v(model)[0], "dora": lora_file(state, "dora lora")}
    loras = [saved(tmp_path / f"{name}.safetensors", file) for name, file in files.items()]
    job = {"image": torch.rand(32, 64, 3, generator=torch.Generator().manual_seed(0))}
    folder = folders("wan2.1-i2v")
    plain = latents(folder, tmp_path, **job)
    ways = [
        latents(folder, tmp_path, loras, offload=offload, **job)
        for offload in ("none", "model", "sequential")
    ]
    assert not torch.equal(ways[0], plain)
    assert torch.equal(ways[0], ways[1])
    assert torch.equal(ways[0], ways[2])


def test_a_cached_model_is_as_it_was_for_the_next_render(folders: Any, tmp_path: Path) -> None:
    folder = folders("wan2.1-t2v")
    model = model_of("wan2.1-t2v", torch.float32)
    path = saved(tmp_path / "lora.safetensors", make_lora(model, "musubi")[0])
    first = latents(folder, tmp_path, caching=True)
    changed = latents(folder, tmp_path, [path], caching=True)
    assert not torch.equal(first, changed)
    assert torch.equal(latents(folder, tmp_path, caching=True), first)
    assert torch.equal(latents(folder, tmp_path, [(path, "both", 0.0)], caching=True), first)
    WanPipelineLoader().clear_cache()


def test_loras_named_among_the_files_of_a_model(folders: Any, tmp_path: Path) -> None:
    folder = folders("wan2.1-t2v")
    model = model_of("wan2.1-t2v", torch.float32)
    path = saved(tmp_path / "lora.safetensors", make_lora(model, "bare")[0])
    files = WanModelFiles(
        transformer=folder / "transformer", vae=folder / "vae",
        text_encoder=folder / "text_encoder", tokenizer=folder / "tokenizer",
        loras=((str(path), "both", 0.5),),
    )  # fmt: skip
    found = ArchitectureDetector().detect_model_architecture(files)
    assert [one.lora.strength for one in found.loras] == [0.5]
    assert any("LoRA lora.safetensors, strength 0.5, rank 3" in text for text in found.reasons)


def test_a_recipe_is_offered_and_used_only_when_asked(folders: Any, tmp_path: Path) -> None:
    folder = folders("wan2.2-t2v-a14b")
    model = model_of("wan2.2-t2v-a14b", torch.float32)
    name = "Wan2.2-Lightning_4steps.safetensors"
    path = saved(tmp_path / name, make_lora(model, "kijai")[0])
    plain = ArchitectureDetector().detect_model_architecture(folder)
    job = GenerationConfig(prompt="", width=64, height=32, num_frames=5)
    offered = with_loras(plain, [path])
    request = resolve(job, offered)
    assert (request.num_inference_steps, request.flow_shift) == (40, 12.0)
    (warning,) = [text for text in request.warnings if name in text]
    assert (
        "set num_inference_steps 4, guidance_scale and guidance_scale_2 1, flow_shift 5" in warning
    )
    assert "This job has num_inference_steps 40, guidance_scale 4" in warning
    used = resolve(job, with_loras(plain, [path], use_recipe=True))
    assert (used.num_inference_steps, used.flow_shift, used.guidance_scale) == (4, 5.0, 1.0)
    assert used.guidance_scale_2 == 1.0
    assert not used.warnings
    recipe_settings: dict[str, Any] = {
        "num_inference_steps": 4, "flow_shift": 5.0, "guidance_scale": 1.0, "guidance_scale_2": 1.0,
        "scheduler": "euler", "sigma_schedule": "simple",
    }  # fmt: skip
    assert not resolve(replace(job, **recipe_settings), offered).warnings
    # What a job says itself still counts, and is then warned of.
    own = resolve(replace(job, num_inference_steps=6), with_loras(plain, [path], use_recipe=True))
    assert own.num_inference_steps == 6
    assert "This job has num_inference_steps 6." in own.warnings[0]
    ordinary = saved(tmp_path / "style.safetensors", make_lora(model, "kijai")[0])
    with pytest.raises(InvalidRequest, match="no recipe is known for style"):
        with_loras(plain, [ordinary], use_recipe=True)


def test_a_lora_on_the_wrong_expert_is_warned_of(folders: Any, tmp_path: Path) -> None:
    plain = ArchitectureDetector().detect_model_architecture(folders("wan2.2-t2v-a14b"))
    path = saved(tmp_path / "style_high_noise.safetensors", PAIR)
    assert not with_loras(plain, [(path, "high", 1.0)]).warnings
    assert "says high" in with_loras(plain, [(path, "low", 1.0)]).warnings[-1]


def test_a_saved_render_with_another_lora_is_another_render(folders: Any, tmp_path: Path) -> None:
    from wan_core.journal.identity import render_identity

    folder = folders("wan2.1-t2v")
    path = saved(tmp_path / "lora.safetensors", PAIR)
    identities = []
    for loras in ([], [(path, "both", 1.0)], [(path, "both", 0.5)], [(path, "both", 0.0)]):
        wrapper = WanPipelineLoader().load_wan_pipeline(
            folder, optimization_config={"device": "cpu"}, loras=loras
        )
        request, plan = wrapper.plan(JOB)
        identity = render_identity(JOB, request, wrapper.architecture, plan)
        identities.append(json.dumps(identity["loras"], default=str))
    assert len(set(identities)) == 3
    assert identities[0] == identities[3]


def test_a_saved_render_knows_the_scale_of_a_peft_folder(folders: Any, tmp_path: Path) -> None:
    """Another adapter_config.json beside the same weights is another render."""
    from wan_core.journal.identity import render_identity

    folder = folders("wan2.1-t2v")
    saved(tmp_path / "adapter_model.safetensors", PAIR)
    identities = []
    for alpha in (None, 2, 16):
        if alpha is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        wrapper = WanPipelineLoader().load_wan_pipeline(
            folder, optimization_config={"device": "cpu"}, loras=[tmp_path]
        )
        request, plan = wrapper.plan(JOB)
        identity = render_identity(JOB, request, wrapper.architecture, plan)
        identities.append(json.dumps(identity["loras"], default=str))
    assert len(set(identities)) == 3


def test_a_distilled_checkpoint_offers_its_recipe_too(folders: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "Wan2.2-T2V-A14B-lightx2v-4steps"
    shutil.copytree(folders("wan2.2-t2v-a14b"), folder)
    plain = ArchitectureDetector().detect_model_architecture(folder)
    job = GenerationConfig(prompt="", width=64, height=32, num_frames=5)
    (warning,) = resolve(job, plain).warnings
    assert warning.startswith(f"The checkpoint {folder.name} is distilled for 4 steps")
    assert "This job has num_inference_steps 40" in warning
    used = resolve(job, with_loras(plain, [], use_recipe=True))
    assert (used.num_inference_steps, used.guidance_scale) == (4, 1.0) and not used.warnings


def test_the_estimate_counts_what_a_lora_takes(folders: Any, tmp_path: Path) -> None:
    model = model_of("wan2.2-t2v-a14b", torch.float32)
    tensors = make_lora(model, "kijai")[0]
    path = saved(tmp_path / "lora.safetensors", tensors)
    plain = ArchitectureDetector().detect_model_architecture(folders("wan2.2-t2v-a14b"))
    found = with_loras(plain, [(path, "high", 1.0)])
    assert found.lora_bytes("transformer", 2) == 2 * sum(t.numel() for t in tensors.values())
    assert found.lora_bytes("transformer_2", 2) == found.lora_bytes("text_encoder", 2) == 0


# The node's description --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes_pack() -> Any:
    return load_pack()


def test_a_description_with_a_lora_leaves_the_other_as_it_was(
    nodes_pack: Any, folders: Any, tmp_path: Path
) -> None:
    model = model_of("wan2.2-t2v-a14b", torch.float32)
    name = "lightx2v_high_noise.safetensors"
    path = saved(tmp_path / name, make_lora(model, "kijai")[0])
    plain = open_model(nodes_pack, folders("wan2.2-t2v-a14b"))
    lora = part(nodes_pack, "wan_core.config").WanLoRA(str(path), "high", 0.5)
    one = plain.with_lora(lora, False)
    two = one.optimized(precision="fp32").with_lora(lora, True)
    assert [len(each.loras) for each in (plain, one, two)] == [0, 1, 2]
    assert [each.use_recipe for each in (plain, one, two)] == [False, False, True]
    steps = [each.architecture.variant.defaults.num_inference_steps for each in (plain, one, two)]
    assert steps == [40, 40, 4]
    wrappers = [
        each.lease.wrapper({"device": "cpu"}, each.loras, each.use_recipe)
        for each in (plain, one, two, one)
    ]
    assert wrappers[1] is wrappers[3]
    assert [len(each.architecture.loras) for each in wrappers] == [0, 1, 2, 1]
    assert wrappers[2].architecture.variant.defaults.num_inference_steps == 4


def test_the_command_line_takes_loras(folders: Any, tmp_path: Path, capsys: Any) -> None:
    from wan_core.__main__ import main

    folder = folders("wan2.2-t2v-a14b")
    path = saved(tmp_path / "Wan_lightx2v_low_noise.safetensors", PAIR)
    job = ["estimate", str(folder), "--width", "64", "--height", "32", "--frames", "5"]
    assert main([*job, "--lora", f"{path}:low:0.5", "--use-recipe", "--device", "cpu"]) == 0
    assert "set num_inference_steps" not in capsys.readouterr().out
    assert main([*job, "--lora", f"{path}:low", "--device", "cpu"]) == 0
    assert "set num_inference_steps 4" in capsys.readouterr().out
    assert main([*job, "--lora", f"{path}:900", "--device", "cpu"]) == 1
    assert "strength" in capsys.readouterr().err
    assert main(["inspect", str(path)]) == 0
    assert "distilled for 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "lora"),
    [("a.safetensors", WanLoRA("a.safetensors")), ("a:high", WanLoRA("a", "high")),
     ("a:0.5", WanLoRA("a", "both", 0.5)), ("a:low:-.5", WanLoRA("a", "low", -0.5)),
     (r"C:\l\a.safetensors", WanLoRA(r"C:\l\a.safetensors")),
     (r"C:\l\a.safetensors:high:2", WanLoRA(r"C:\l\a.safetensors", "high", 2.0))],
)  # fmt: skip
def test_the_command_line_s_form(text: str, lora: WanLoRA) -> None:
    assert parse_lora(text) == lora


# Guided steps before the distilled LoRA --------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "guided", "name"),
    in_turn(
        ("wan2.1-t2v", "wan2.2-t2v-a14b"),
        (1, 2, 3),
        ("wan_lightx2v_4steps", "Wan2.1_T2V_14B_FusionX_LoRA", "Wan21_AccVid_T2V_14B_lora_rank32"),
    ),
)
def test_guided_steps_are_those_of_a_run_without_the_lora(
    folders: Any, tmp_path: Path, family: str, guided: int, name: str
) -> None:
    """Two runs, as people chain KSamplers: the first without the LoRA, the second with it.

    A style that is no distilled LoRA stays on in both.
    """
    model = model_of(family, torch.float32)
    fast = saved(tmp_path / f"{name}.safetensors", make_lora(model, "kijai")[0])
    style = saved(tmp_path / "style.safetensors", make_lora(model, "kijai", seed=7)[0])
    job: dict[str, Any] = {
        "num_inference_steps": 4, "guidance_scale": 1.0, "guidance_scale_2": 1.0,
        "scheduler": "euler", "sigma_schedule": "simple", "switch_step": 2,
    }  # fmt: skip
    whole = latents(
        folders(family), tmp_path, [fast, style], guided_steps=guided, guided_scale=3.0, **job
    )
    first = job | {"guidance_scale": 3.0, "guidance_scale_2": 3.0, "end_step": guided}
    begun = latents(folders(family), tmp_path, [style], **first)
    rest = latents(
        folders(family), tmp_path, [fast, style], latents=begun, start_step=guided, **job
    )
    assert torch.equal(whole, rest)
    assert not torch.equal(whole, latents(folders(family), tmp_path, [fast, style], **job))


def test_guided_steps_need_a_distilled_lora_and_a_step_with_it(
    folders: Any, tmp_path: Path
) -> None:
    folder = folders("wan2.2-t2v-a14b")
    model = model_of("wan2.2-t2v-a14b", torch.float32)
    fast = saved(tmp_path / "wan_lightx2v_4steps.safetensors", make_lora(model, "kijai")[0])
    plain = ArchitectureDetector().detect_model_architecture(folder)
    used = with_loras(plain, [fast], use_recipe=True)
    size = {"prompt": "", "width": 64, "height": 32, "num_frames": 5}
    found = resolve(GenerationConfig(**size, guided_steps=2, num_inference_steps=6), used)
    # The official scale, though the recipe's 1 has taken its place as the default.
    assert (found.guided_steps, found.guided_scale, found.guidance_scale) == (2, 4.0, 1.0)
    assert found.guided and not found.warnings
    idle = resolve(GenerationConfig(**size, guided_scale=3.0), used)
    assert (idle.guided_steps, idle.guided_scale, idle.guided) == (0, None, False)
    for architecture_, steps in ((used, 4), (used, 9), (plain, 1), (with_loras(plain, []), 2)):
        with pytest.raises(InvalidRequest) as caught:
            resolve(GenerationConfig(**size, guided_steps=steps), architecture_)
        assert caught.value.field == "guided_steps"
    off = with_loras(plain, [(fast, "both", 0.0)])
    with pytest.raises(InvalidRequest, match="known to be distilled .*Name its file"):
        resolve(GenerationConfig(**size, guided_steps=1), off)
