"""A plan on a module of one's own: equal bits, everything taken off, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.machines import architecture, gpu
from support.stored_layers import stored
from support.tiny_models import make_folder, make_transformer
from support.vae_models import make_vae

from wan_core import OptimizationManager, WanPipelineLoader
from wan_core.errors import InvalidRequest
from wan_core.memory.stages import Workload
from wan_core.placing import applied
from wan_core.placing.streaming import stream_blocks
from wan_core.plan.plan import OptimizationPlan
from wan_core.render.diffusers_pipeline import PipelineManager

JOB = Workload(width=832, height=480, num_frames=81)
CALL: dict[str, Any] = {
    "prompt": "a red cat", "negative_prompt": "blurry", "height": 32, "width": 32, "num_frames": 9,
    "num_inference_steps": 2, "output_type": "latent",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("placement") / "model", "wan2.2-t2v-a14b")


def plan(**changes: Any) -> OptimizationPlan:
    found = OptimizationManager().recommend_optimizations(
        architecture("wan2.2-t2v-a14b"), JOB, gpu(80)
    )
    return replace(found, device="cpu").with_choices(**changes)


def run(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipeline(**CALL, generator=torch.Generator().manual_seed(3)).frames
    return latents


PLANS = {
    "resident": {"offload": "none"},
    "model": {"offload": "model"},
    "layers": {"offload": "sequential"},
    "streamed": {"stream": True, "resident_blocks": 1, "lean": True},
    "groups": {
        "part_offload": {"transformer": "group", "transformer_2": "group"},
        "lean": False,
    },
    "text streamed": {"part_offload": {"text_encoder": "stream"}, "lean": True},
    "cache in RAM": {"lean": True, "cache_in_ram": True},
}


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS)
def test_a_pipeline_of_diffusers_makes_the_same_bits_under_a_plan(
    folder: Path, changes: dict[str, Any]
) -> None:
    pipeline = PipelineManager().load_custom_pipeline(folder, dtype="fp32")
    plain = run(pipeline)
    manager, chosen = OptimizationManager(), plan(**changes)
    forwards = {m: dict(m.__dict__) for m in pipeline.transformer.modules()}
    with (
        manager.apply_memory_optimizations(pipeline.text_encoder, chosen, "text_encoder"),
        manager.apply_memory_optimizations(pipeline.transformer, chosen) as missed,
        manager.apply_memory_optimizations(pipeline.transformer_2, chosen, "transformer_2"),
        manager.apply_memory_optimizations(pipeline.vae, chosen, "vae"),
    ):
        assert missed is None
        assert torch.equal(run(pipeline), plain)
    assert all("forward" not in module.__dict__ for module in forwards)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in forwards)
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("decoding", [True, False])
def test_a_vae_in_layers_keeps_its_own_halves(decoding: bool) -> None:
    vae = make_vae("2.1")
    chosen = plan(offload="sequential", lean=True)
    with applied.apply_plan(vae, "vae", chosen, decoding=decoding) as missed:
        assert missed is None
    chosen = plan(lean=True)
    half = vae.decoder if decoding else vae.encoder
    with applied.apply_plan(vae, "vae", chosen, decoding=decoding) as missed:
        assert missed is None and "forward" in vars(half)


def test_what_cannot_be_put_on_is_said(folder: Path) -> None:
    pipeline = PipelineManager().load_custom_pipeline(folder, dtype="fp32")
    pipeline.transformer.train()
    manager = OptimizationManager()
    with manager.apply_memory_optimizations(pipeline.transformer, plan(lean=True)) as missed:
        assert missed is not None and "training mode" in missed
    with pytest.raises(InvalidRequest, match=r"component is 'unet'; the plan has"):
        manager.apply_memory_optimizations(pipeline.transformer, plan(), "unet")


HINTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"lean": False}, ["hints_in_turn"]),
    ({"lean": True}, ["lean_forward"]),
    ({"lean": False, "hints_in_turn": False}, []),
    ({"lean": False, "part_offload": {"transformer": "group"}}, []),
]


@pytest.mark.parametrize(("choices", "expected"), HINTS)
def test_hints_of_vace_take_turns_where_the_plan_counts_on_it(
    monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any], expected: list[str]
) -> None:
    """Not where the plan has counted all hints at once."""
    attached: list[str] = []
    for name in ("hints_in_turn", "lean_forward"):
        original = getattr(applied, name)

        def attach(model: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            attached.append(name)
            return original(model, **more)

        monkeypatch.setattr(applied, name, attach)
    model = make_transformer("wan2.1-vace")
    with OptimizationManager().apply_memory_optimizations(model, plan(**choices)) as missed:
        assert missed is None
    assert attached == expected
    vae = plan(**{**choices, "part_offload": {}})
    with OptimizationManager().apply_memory_optimizations(torch.nn.Linear(1, 1), vae, "vae"):
        assert attached == expected, "only transformers have hints"


def test_fp8_storage_is_kept_apart_in_the_cache(folder: Path) -> None:
    """A plan with fp8 and one without do not hand each other their weights."""
    from wan_core import GenerationConfig

    made = {}
    config = GenerationConfig(
        prompt="a red cat", width=32, height=32, num_frames=9, num_inference_steps=2, seed=1,
        precision_override="bf16",
    )  # fmt: skip
    loader = WanPipelineLoader()
    for storage in ("never", "always", "never"):
        wrapper = loader.load_wan_pipeline(
            folder, optimization_config={"device": "cpu", "fp8_storage": storage}
        )
        result = wrapper.generate(config).raise_for_error()
        assert ("fp8 storage" in result.applied_optimizations) == (storage == "always")
        if storage in made:
            assert torch.equal(made[storage], result.latents)
        made[storage] = result.latents
    loader.clear_cache()
    assert not torch.equal(made["never"], made["always"])
    assert (made["never"] - made["always"]).abs().max() < 0.5


@pytest.mark.parametrize("buffers", [1, 2])
def test_streamed_blocks_get_as_many_buffers_as_the_plan_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, buffers: int
) -> None:
    seen: list[Any] = []
    pipeline = PipelineManager().load_custom_pipeline(folder, dtype="fp32")
    monkeypatch.setattr("wan_core.placing.applied.stream_blocks", partial(watched, seen))
    chosen = plan(stream=True, resident_blocks=0, stream_buffers=buffers)
    with OptimizationManager().apply_memory_optimizations(pipeline.transformer, chosen):
        block = sum(p.nbytes for p in pipeline.transformer.blocks[0].parameters())
        assert round(seen[0].buffer_bytes / block) == buffers


@contextmanager
def watched(seen: list[Any], *args: Any, **numbers: Any) -> Iterator[Any]:
    """Stream as told, and keep what the stream says of itself."""
    with stream_blocks(*args, **numbers) as state:
        seen.append(state)
        yield state


@pytest.mark.parametrize("kind", ["fp8", "int8", ""])
def test_only_an_expert_stored_in_8_bit_is_multiplied_so(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of a pair the plan may speak of one; the other would be told to have failed."""
    seen: list[bool] = []

    @contextmanager
    def forward(module: Any, *, eight_bit: bool, **_: Any) -> Iterator[None]:
        seen.append(eight_bit)
        yield None

    monkeypatch.setattr(applied, "lean_forward", forward)
    model = make_transformer("wan2.2-t2v-a14b")
    if kind:
        layer = model.blocks[0].ffn.net[2]
        model.blocks[0].ffn.net[2] = stored(layer, kind)
    for wanted in (True, False):
        chosen = plan(lean=True, eight_bit=wanted, offload="none")
        with applied.apply_plan(model, "transformer", chosen):
            pass
    assert seen == [bool(kind), False]
