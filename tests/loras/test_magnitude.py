"""DoRA: LyCORIS' closed form, on quantised and moving weights, and what it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support import wan_layouts
from support.dry_run import LiveBytes
from support.lean_models import inputs_of, model_of
from support.lora_kinds import RANK, lora_file
from support.machines import architecture
from support.stored_layers import stored
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_core.config import WanLoRA
from wan_core.detect import with_loras
from wan_core.forward.transformer import lean_forward
from wan_core.loading import Undo
from wan_core.loading.quantized import replace_layer
from wan_core.loras import apply_loras, attach, magnitude
from wan_core.loras.delta import Delta, Magnitude
from wan_core.placing.offload import place
from wan_core.placing.streaming import stream_blocks

pytestmark = pytest.mark.usefixtures("without_gradients")

Files = Sequence[tuple[str, float]]
"""Kinds of ``lora_kinds`` with their strengths, in their order."""


def output(model: Any, call: dict[str, Any]) -> Tensor:
    result: Tensor = model(**call)[0]
    return result


def write(folder: Path, model: nn.Module, files: Files) -> list[WanLoRA]:
    state = layouts.original_transformer(layouts.state_of(model))
    found = []
    for number, (kind, strength) in enumerate(files):
        path = folder / f"{number}.safetensors"
        save_file(lora_file(state, kind, seed=number), path)
        found.append(WanLoRA(path, "both", strength))
    return found


def change_of(file: dict[str, Tensor], stem: str) -> Tensor:
    """What factors make, in float64, times alpha / rank where one is a product."""
    own = {name.rpartition(stem + ".")[2]: t.double() for name, t in file.items() if stem in name}
    if "lora_up.weight" in own:
        return own["lora_up.weight"] @ own["lora_down.weight"] * (1.5 / RANK)
    if "lokr_w1" in own:
        return torch.kron(own["lokr_w1"], own["lokr_w2"])
    one, two = (own[f"hada_w{n}_a"] @ own[f"hada_w{n}_b"] for n in (1, 2))
    return one * two * (1.5 / RANK)


def merge(model: nn.Module, files: Files) -> None:
    """Change the weights of a model one file after the other, by LyCORIS' and ComfyUI's formula."""
    state = layouts.original_transformer(layouts.state_of(model))
    made = [lora_file(state, kind, seed=n) for n, (kind, _) in enumerate(files)]
    modules = dict(model.named_modules())
    originals = {layouts.original_transformer({f"{n}.weight": None}).popitem()[0]: n  # type: ignore[dict-item]
                 for n, layer in modules.items() if isinstance(layer, nn.Linear)}  # fmt: skip
    for name, module in originals.items():
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        layer: Any = modules[module]
        weight = layer.weight.double()
        for (_, strength), file in zip(files, made, strict=True):
            if not any(one.startswith(stem + ".") for one in file):
                continue
            more, now = change_of(file, stem), weight
            if (rows := file.get(f"{stem}.dora_scale")) is not None:
                gain = rows.double() / weight.norm(dim=1, keepdim=True)
                now = weight + strength * (gain * (weight + more) - weight)
            else:
                now = weight + strength * more
            weight = now
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


NUMBERS = {"attention_head_dim": 32, "ffn_dim": 64}
DORA: Files = [("dora lora", 0.7)]
ALL: Files = [("lokr", 0.5), ("dora lora", 0.8), ("lora", -0.4), ("dora loha", 1.6),
              ("dora lokr", 0.3)]  # fmt: skip
FORWARDS = {
    "diffusers": contextlib.nullcontext,
    "by rows": lambda model: lean_forward(model, exact=False, rows=32, head_groups=2),
    "with gradients": lambda model: torch.enable_grad(),
}  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("files", [DORA, ALL], ids=["one", "among others"])
def test_equals_changed_weights(tmp_path: Path, files: Files, forward: str) -> None:
    model, changed = (model_of("wan2.1-t2v", torch.float32) for _ in range(2))
    call = inputs_of(model, torch.float32)
    plain = output(model, call)
    with FORWARDS[forward](model), apply_loras(model, write(tmp_path, model, files)):
        ours = output(model, call).detach()
    assert torch.equal(output(model, call), plain)
    merge(changed, files)
    wanted = output(changed, call)
    assert (wanted - plain).norm() > 0.05 * wanted.norm()
    assert (ours - wanted).norm() < 2e-5 * wanted.norm()


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_on_quantised_layers(tmp_path: Path, kind: str) -> None:
    """The rows that are measured are those that the layer computes with."""
    model, changed = (model_of("wan2.1-t2v", torch.float32, **NUMBERS) for _ in range(2))
    loras, call = write(tmp_path, model, DORA), inputs_of(model, torch.float32)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name.startswith("blocks."):
            replace_layer(model, name, stored(layer, kind))
            values = model.get_submodule(name).dequantized(torch.float32)
            changed.get_submodule(name).weight.data = values
    with apply_loras(model, loras, dtype=torch.float32):
        ours = output(model, call)
    with apply_loras(changed, loras):
        wanted = output(changed, call)
    assert (ours - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("placement", ["none", "sequential", "group", "streamed"])
def test_the_same_bits_wherever_the_weights_are(tmp_path: Path, placement: str) -> None:
    model = model_of("wan2.1-t2v", torch.bfloat16)
    call = inputs_of(model, torch.bfloat16)
    loras = write(tmp_path, model_of("wan2.1-t2v", torch.float32), ALL)
    with apply_loras(model, loras):
        alone = output(model, call)
    placed = (
        stream_blocks(model, "cpu") if placement == "streamed" else place(model, placement, "cpu")
    )
    with placed, apply_loras(model, loras, device="cpu", dtype=torch.bfloat16):
        assert torch.equal(output(model, call), alone)
        assert torch.equal(output(model, call), alone)


def test_half_precision_is_as_near_as_changed_weights(tmp_path: Path) -> None:
    """Gains near 1 are not rounded to the few numbers that bf16 has there."""
    exact, half = (model_of("wan2.1-t2v", dtype) for dtype in (torch.float32, torch.bfloat16))
    loras, call = write(tmp_path, exact, DORA), inputs_of(exact, torch.float32)
    rounded = {k: v.bfloat16() if k.endswith("states") else v for k, v in call.items()}
    with apply_loras(half, loras):
        ours = output(half, rounded).float()
    merge(exact, DORA)
    truth = output(exact, call)
    for name, value in exact.named_parameters():
        half.get_parameter(name).data = value.to(half.get_parameter(name).dtype)
    theirs = output(half, rounded).float()
    assert (ours - truth).norm() < 1.2 * (theirs - truth).norm()


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("target", ["blocks.0.ffn.net.0.proj", "patch_embedding"])
def test_a_whole_difference_has_its_strength_once(
    tmp_path: Path, target: str, strength: float
) -> None:
    """Also of a convolution, over one of its windows."""
    model = model_of("wan2.1-t2v", torch.float32)
    layer: Any = model.get_submodule(target)
    weight, given = layer.weight.flatten(1).double(), torch.randn(3, *layer.weight.shape[1:])
    diff, rows = torch.randn(layer.weight.shape), 1 + torch.rand(len(weight), 1)
    stem, path = f"diffusion_model.{target}", tmp_path / "l.safetensors"
    save_file({f"{stem}.diff": diff, f"{stem}.dora_scale": rows}, path)
    gain = rows.double() / weight.norm(dim=1, keepdim=True)
    changed = weight + strength * (gain * (weight + diff.flatten(1)) - weight)
    with apply_loras(model, [WanLoRA(path, "both", strength)]):
        ours = layer(given).flatten(1).double()
    wanted = given.flatten(1).double() @ changed.t() + layer.bias.double()
    assert (ours - wanted).norm() < 1e-5 * wanted.norm()


def test_rows_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    loras, call = write(tmp_path, model, DORA), inputs_of(model, torch.float32)
    seen: list[nn.Module] = []
    weigh = magnitude.weigh
    monkeypatch.setattr(attach, "weigh", lambda m, *rest: (seen.append(m), weigh(m, *rest)))
    with stream_blocks(model, "cpu"), apply_loras(model, loras):
        first = output(model, call)
        assert torch.equal(output(model, call), first)
    assert len(seen) == len(set(seen)) == 20


@pytest.mark.parametrize("rank", [16, 256, 1024])
@pytest.mark.parametrize("tokens", [32760, 75600])
def test_what_it_takes_is_planned(tmp_path: Path, rank: int, tokens: int) -> None:
    """While rows are measured, what is kept of them for every use, and the rank's activations."""
    path, (out, wide) = tmp_path / "l.safetensors", (13824, 5120)
    sizes = {
        "lora_down.weight": (rank, wide),
        "lora_up.weight": (out, rank),
        "dora_scale": (out, 1),
    }
    stem = "diffusion_model.blocks.0.ffn.0."
    header = {stem + name: ("BF16", size) for name, size in sizes.items()}
    wan_layouts.write_sparse(path, wan_layouts.Stored(header))
    model = with_loras(architecture("wan2.1-t2v-14b"), [path])
    with FakeTensorMode(), torch.no_grad(), Undo() as undo:
        layers = nn.Sequential(nn.Linear(wide, out, dtype=torch.bfloat16))
        given = torch.empty(tokens, wide, dtype=torch.bfloat16)
        counted = LiveBytes()
        for tensor in (*layers.parameters(), given):
            counted.know(tensor)
        with counted:
            delta = Delta(torch.bfloat16, magnitude=Magnitude(torch.empty(out), 1.0))
            delta.downs.append(torch.empty(rank, wide, dtype=torch.bfloat16))
            delta.ups.append(torch.empty(out, rank, dtype=torch.bfloat16))
            attach.attach(undo, layers, "0", [delta])
            result = layers(given).nbytes
    kept = model.lora_bytes("transformer", 2)
    assert counted.live <= kept <= counted.live + 2**20
    room, beside = model.lora_room("transformer", tokens, 2), counted.peak - kept - result
    assert beside <= room <= 2 * beside + 2**24


def test_a_dora_of_lokr_is_planned_with_its_pieces(tmp_path: Path) -> None:
    """It holds them in every forward, beside what measuring its rows takes once."""
    stem, rooms = "diffusion_model.blocks.0.ffn.0.", []
    for more in ({}, {"dora_scale": (13824, 1)}):
        path = tmp_path / f"{len(more)}.safetensors"
        sizes = {"lokr_w1": (8, 8), "lokr_w2": (1728, 640), **more}
        header = {stem + name: ("BF16", size) for name, size in sizes.items()}
        wan_layouts.write_sparse(path, wan_layouts.Stored(header))
        model = with_loras(architecture("wan2.1-t2v-14b"), [path])
        rooms.append([model.lora_room("transformer", tokens, 2) for tokens in (300, 32760)])
    assert all(plain <= dora for plain, dora in zip(*rooms, strict=True))
