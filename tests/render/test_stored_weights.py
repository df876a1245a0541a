"""The product from files as people have them: the bits of the same files dequantised at load.

Both experts of a small A14B, every kind of storage. What a file means is written down as a bf16
file by code that is not the library's, and generated from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import single_files
from support import stored_files as files
from support.cases import in_turn, slow_but
from support.crashes import Crash
from support.stored_models import LAYERS, encoder, experts, states
from torch import Tensor

from wan_core import GenerationConfig, WanLoRA, WanModelFiles, WanPipelineLoader
from wan_core.__main__ import main
from wan_core.loading.mapped import is_mapped
from wan_core.plan import OptimizationPlan

pytestmark = pytest.mark.usefixtures("mapped")

JOB = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 5, "seed": 1,
       "num_inference_steps": 2, "switch_step": 1, "guidance_scale": 3.0,
       "guidance_scale_2": 1.0}  # fmt: skip
WINDOWS = {"num_frames": 25, "max_chunk_size": 17, "window_overlap": 8}
KINDS = (*files.KINDS, *files.GGUF_KINDS)
RESIDENT, STREAMED = {"offload": "none"}, {"offload": "stream", "resident_blocks": 0}
WAYS: tuple[dict[str, Any], ...] = (
    {"offload": "none", "forward": "lean"}, {"offload": "none", "forward": "lean_rows"},
    {"offload": "model", "forward": "diffusers"}, {"offload": "sequential"},
    {"offload": "stream", "forward": "diffusers"},
    {"offload": "stream", "resident_blocks": 1, "forward": "lean"},
    {"offload": "stream", "forward": "lean_rows"},
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder and the VAE, and what is written for a kind beside them."""
    folder = tmp_path_factory.mktemp("stored")
    single_files.write(folder)
    return folder


def opened(
    home: Path, pair: list[Path], loras: Any = (), encoder: Path | None = None, **wishes: Any
) -> Any:
    given = WanModelFiles(
        transformer=pair[0], transformer_2=pair[1], vae=home / "vae" / single_files.VAE,
        text_encoder=encoder or home / "text_encoders" / single_files.TEXT,
    )  # fmt: skip
    wishes = {"device": "cpu", "precision": "bf16", "offload": "none"} | wishes
    return WanPipelineLoader().load_wan_pipeline(given, loras=loras, optimization_config=wishes)


def latents(wrapper: Any, **job: Any) -> Tensor:
    result = wrapper.generate(GenerationConfig(**(JOB | job))).raise_for_error()
    assert result.latents is not None and bool(torch.isfinite(result.latents).all())
    return result.latents


def layers_of(wrapper: Any) -> list[Any]:
    """The layers of all loaded components whose weights are as stored."""
    found = sorted(wrapper._cache.loaded(), key=lambda entry: str(entry[0]))
    loaded = [module for _, module in found if hasattr(module, "modules")]
    return [layer for module in loaded for layer in module.modules() if hasattr(layer, "stored")]


def hashes(wrapper: Any, pair: list[Path]) -> tuple[list[str], list[str]]:
    """Of the files, and of every byte that layers hold as stored."""
    layers = [
        hashlib.sha256(value.data.numpy().tobytes()).hexdigest()
        for layer in layers_of(wrapper)
        for value in layer.parameters(recurse=False)
        if value.dtype == torch.int8
    ]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in pair], layers


@pytest.mark.parametrize(("kind", "placed"), in_turn(KINDS, ("resident", "streamed")))
def test_every_kind_gives_the_bits_of_what_it_means(
    home: Path, plain: Tensor, kind: str, placed: str
) -> None:
    stored, meant = experts(home, kind)
    expected = latents(opened(home, meant))
    wrapper = opened(home, stored, **(RESIDENT if placed == "resident" else STREAMED))
    assert torch.equal(latents(wrapper), expected)
    layers = layers_of(wrapper)
    assert len(layers) == LAYERS  # none was dequantised while it was loaded
    assert all(layer.weight.dtype == torch.int8 for layer in layers)
    assert all(is_mapped(layer.weight) for layer in layers)
    assert not torch.equal(expected, plain)  # how it is stored matters to the result


@pytest.fixture(scope="module")
def plain(home: Path) -> Tensor:
    """What the experts make in bf16."""
    pair = [home / "high.safetensors", home / "low.safetensors"]
    for path, state in zip(pair, states(), strict=True):
        save_file(state, path)
    return latents(opened(home, pair))


@pytest.mark.parametrize(
    "kind",
    slow_but({"int8_convrot", "Q4_K"}.__contains__, ["fp8_rows", "int8_convrot", "nvfp4", "Q4_K"]),
)
def test_placements_and_forwards_change_no_bit(home: Path, kind: str) -> None:
    stored, meant = experts(home, kind)
    expected = latents(opened(home, meant))
    by_rows = latents(opened(home, meant, forward="lean_rows"))
    for wishes in WAYS:
        result = (wrapper := opened(home, stored, **wishes)).generate(GenerationConfig(**JOB))
        wanted = by_rows if wishes.get("forward") == "lean_rows" else expected
        assert torch.equal(result.raise_for_error().latents, wanted), wishes
        assert len(layers_of(wrapper)) == LAYERS
        resident = f"{wishes.get('resident_blocks', 0)} blocks resident, the rest streamed"
        said = resident if wishes["offload"] == "stream" else f"offload {wishes['offload']}"
        assert said in result.applied_optimizations, "the plan did not do what was asked for"


@pytest.fixture(scope="module")
def lora(home: Path) -> Path:
    g, tensors = torch.Generator().manual_seed(5), {}
    for name, value in next(states()).items():
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2:
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=g) / 10
            tensors[f"{layer}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=g) / 10
    path = home / "lora.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "kind",
    slow_but({"fp8_scaled", "Q8_0"}.__contains__, ["fp8_scaled", "int8_convrot", "mxfp8", "Q8_0"]),
)
def test_a_lora_and_windows_on_top(home: Path, lora: Path, kind: str) -> None:
    stored, meant = experts(home, kind)
    loras = [WanLoRA(lora, strength=0.7)]
    expected = latents(opened(home, meant, loras), **WINDOWS)
    assert not torch.equal(expected, latents(opened(home, meant), **WINDOWS))
    for wishes in (RESIDENT, STREAMED | {"forward": "lean"}):
        assert torch.equal(latents(opened(home, stored, loras, **wishes), **WINDOWS), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_way(
    home: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Resident, streamed, by rows and through one buffer, with a LoRA, in windows and resumed."""
    stored, meant = experts(home, kind)
    loras = [WanLoRA(lora, strength=0.7)]
    expected = latents(opened(home, meant, loras), **WINDOWS)
    by_rows = latents(opened(home, meant, loras, forward="lean_rows"), **WINDOWS)
    for wishes in WAYS:
        wanted = by_rows if wishes.get("forward") == "lean_rows" else expected
        found = latents(opened(home, stored, loras, **wishes), **WINDOWS)
        assert torch.equal(found, wanted), wishes
    monkeypatch.setattr(OptimizationPlan, "blocks_and_buffers", lambda *_: (0, 1))
    wrapper = opened(home, stored, loras, **STREAMED)
    before = hashes(wrapper, stored)[0]
    kept = {"resume": "auto", "journal_folder": tmp_path / "journal"}
    with pytest.raises(Crash):
        latents(wrapper, **WINDOWS, **kept, progress_callback=stopping(1))
    assert torch.equal(latents(wrapper, **WINDOWS, **kept), expected)
    assert hashes(wrapper, stored)[0] == before


def test_through_one_buffer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, meant = experts(home, "fp8_scaled")
    expected = latents(opened(home, meant))
    seen: list[int] = []

    def one(*_: Any) -> tuple[int, int]:
        seen.append(1)
        return 0, 1

    monkeypatch.setattr(OptimizationPlan, "blocks_and_buffers", one)
    assert torch.equal(latents(opened(home, stored, **STREAMED)), expected)
    assert seen


def test_what_weights_are_stored_as_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the plan (and so the optimizer), by inspect and by the report, for each part."""
    pair = [experts(home, "Q8_0")[0][0], experts(home, "Q4_K")[0][1]]
    wrapper = opened(home, pair, encoder=encoder(home, "fp8_scaled", "old")[0])
    _, plan = wrapper.plan(GenerationConfig(**JOB))
    for whose, kind in (
        ("transformer", "GGUF Q8_0"), ("transformer 2", "GGUF Q4_K"),
        ("text encoder", "fp8 scaled per tensor"),
    ):  # fmt: skip
        assert f"weights of {whose} stay {kind}, computed in bf16" in plan.reasons
    same = opened(home, experts(home, "fp8_scaled")[0]).plan(GenerationConfig(**JOB))[1]
    assert "weights stay fp8 scaled per tensor, computed in bf16" in same.reasons
    assert main(["inspect", str(experts(home, "int8_convrot")[0][0])]) == 0
    said = capsys.readouterr().out
    assert "int8 scaled per row, rotated by 256, computed in bf16 on a card that has it" in said
    result = wrapper.generate(GenerationConfig(**JOB)).raise_for_error()
    notes = {stage.name: stage.note for stage in result.stages}
    assert notes["load transformer"] == "GGUF Q8_0, computed in bf16"
    assert notes["load transformer_2"].startswith("GGUF Q4_K, computed in bf16")
    assert notes["load text_encoder"] == "fp8 scaled per tensor, computed in bf16"


def stopping(after: int) -> Callable[..., None]:
    left = after

    def callback(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Crash

    return callback


@pytest.mark.parametrize(
    ("kind", "wishes"),
    slow_but(
        lambda case: case[0] in ("fp8_scaled", "int8_convrot"),
        [
            ("fp8_scaled", RESIDENT),
            ("Q4_K", RESIDENT),
            ("int8_convrot", STREAMED),
            ("nvfp4", STREAMED),
        ],
    ),
)
def test_no_stored_byte_changes_and_a_render_goes_on(
    home: Path, tmp_path: Path, lora: Path, kind: str, wishes: dict[str, Any]
) -> None:
    """After success, an error, an interrupt in a step and one while loading."""
    stored, _ = experts(home, kind)
    wrapper = opened(home, stored, [WanLoRA(lora)], **wishes)
    with pytest.raises(Crash):  # in a component's loading or right after it
        latents(wrapper, interrupt_check=stopping(3))
    whole = latents(wrapper, **WINDOWS)
    before = hashes(wrapper, stored)
    assert len(before[1]) >= LAYERS
    kept = {"resume": "auto", "journal_folder": tmp_path / "journal"}
    with pytest.raises(Crash):
        latents(wrapper, **WINDOWS, **kept, progress_callback=stopping(1))
    assert hashes(wrapper, stored) == before
    assert torch.equal(latents(wrapper, **WINDOWS, **kept), whole)
    with pytest.raises(Crash):  # between two blocks
        latents(wrapper, **WINDOWS, interrupt_check=stopping(8))
    assert hashes(wrapper, stored) == before
    failing = next(module for _, module in wrapper._cache.loaded() if hasattr(module, "blocks"))
    handle = failing.blocks[1].attn1.to_q.register_forward_pre_hook(broken)
    result = wrapper.generate(GenerationConfig(**JOB))
    handle.remove()
    assert isinstance(result.error, RuntimeError) and "a broken layer" in str(result.error)
    assert hashes(wrapper, stored) == before
    assert torch.equal(latents(wrapper, **WINDOWS), whole)
    assert hashes(wrapper, stored) == before


def broken(*_: Any) -> None:
    raise RuntimeError("a broken layer")


# The text encoder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "style"),
    slow_but(
        lambda case: case[0] in ("fp8_scaled", "int8_rows"),
        [
            ("fp8_scaled", "old"),
            ("fp8_rows", "notes"),
            ("int8_rows", "metadata"),
            ("mxfp8", "notes"),
        ],
    ),
)
def test_the_text_encoder_as_stored(home: Path, kind: str, style: str) -> None:
    path, meant = encoder(home, kind, style)
    pair, _ = experts(home, "fp8_scaled")
    job = {"prompt": f"a green dog, {kind} {style}"}
    expected = latents(opened(home, pair, encoder=meant), **job)
    for wishes in (RESIDENT, STREAMED):
        WanPipelineLoader().clear_cache()  # embeddings of a text are kept, too
        wrapper = opened(home, pair, encoder=path, **wishes)
        assert torch.equal(latents(wrapper, **job), expected), wishes
        text = next(m for _, m in wrapper._cache.loaded() if hasattr(m, "shared"))
        assert sum(hasattr(layer, "stored") for layer in text.modules()) == 14
