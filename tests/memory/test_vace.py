"""VACE in estimates: weights of the real class, activations against a dry run of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.machines import architecture, gpu
from support.true_models import DTYPES, KEEP_FP32, dry_transformer, transformer

from wan_core.forward import hints_in_turn, lean_forward, run_together
from wan_core.memory import Choices, Workload, estimate, lean_peak, transformer_peak
from wan_core.models import PARTS, VARIANTS, all_blocks, block_count, rest_bytes, sizes

LARGE = VARIANTS["wan2.1-vace-14b"].transformer
SMALL = VARIANTS["wan2.1-vace-1.3b"].transformer
# As many VACE blocks as the published model has, on as few base blocks as carry them.
SHAPES = {
    "14B": replace(LARGE, layers=8, vace_layers=tuple(range(8))),
    "1.3B": replace(SMALL, layers=15, vace_layers=tuple(range(15))),
}
SHORT = replace(LARGE, layers=3, vace_layers=(0, 1, 2))
ONE = replace(LARGE, layers=2, vace_layers=(0,))


def call(frames: int, height: int, width: int, kind: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(1, 16, frames, height, width, dtype=kind),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=kind),
        "control_hidden_states": torch.empty(1, 96, frames, height, width, dtype=kind),
        "return_dict": False,
    }


NUMBERS: Mapping[str, Any] = {
    "batch": 1, "latent_frames": 21, "latent_height": 60, "latent_width": 104,
}  # fmt: skip
HIDDEN = 21 * 30 * 52 * LARGE.dim
FORWARDS: Mapping[str, tuple[Callable[..., Any], Callable[..., int], dict[str, Any]]] = {
    "diffusers": (lambda model: nullcontext(), transformer_peak, {"hints_at_once": True}),
    "in turn": (hints_in_turn, transformer_peak, {}),
    "lean": (lean_forward, lean_peak, {}),
    "rows": (lambda m: lean_forward(m, exact=False), lean_peak, {"exact": False}),
}
# Hidden states alive at the peak, besides what the model is given, of 14B in bf16 at 480x832x81.
STATES = {"diffusers": 20.12, "in turn": 13.12, "lean": 7.13, "rows": 5.87}
CASES = [("14B", way, "bf16") for way in FORWARDS] + [
    ("14B", "lean", "fp32"), ("1.3B", "in turn", "bf16"),
    pytest.param("1.3B", "diffusers", "fp32", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("name", "way", "dtype"), CASES)
def test_a_forward_agrees_with_the_dry_run(name: str, way: str, dtype: str) -> None:
    kind = DTYPES[dtype]
    # Only where all hints are kept does the peak depend on how many there are.
    shape = SHORT if name == "14B" and way != "diffusers" else SHAPES[name]
    attach, predict, more = FORWARDS[way]

    def run(model: torch.nn.Module) -> object:
        with attach(model) as refused:
            assert refused is None
            return model(**call(21, 60, 104, kind))

    live = dry_transformer(shape, dtype).peak(run)
    assert predict(shape, size=kind.itemsize, **NUMBERS, **more) == pytest.approx(live, rel=0.005)
    if (name, dtype) == ("14B", "bf16"):
        given = sum(v.nbytes for v in call(21, 60, 104, kind).values() if v is not False)
        assert (live - given) / (HIDDEN * 2) == pytest.approx(STATES[way], abs=0.01)


def test_a_single_vace_block() -> None:
    """Its state is gone as soon as the only hint is made."""
    for way in ("in turn", "lean"):
        attach, predict, more = FORWARDS[way]

        def run(model: torch.nn.Module, attach: Any = attach) -> object:
            with attach(model):
                return model(**call(21, 60, 104, torch.bfloat16))

        live = dry_transformer(ONE, "bf16").peak(run)
        assert predict(ONE, size=2, **NUMBERS, **more) == pytest.approx(live, rel=0.005)


def test_both_passes_through_one_block_at_a_time() -> None:
    shape = SHORT

    def run(model: torch.nn.Module) -> object:
        first = call(21, 60, 104, torch.bfloat16)
        text = torch.empty(1, 512, 4096, dtype=torch.bfloat16)
        with lean_forward(model):
            return run_together(model, [first, {**first, "encoder_hidden_states": text}])

    live = dry_transformer(shape, "bf16").peak(run)
    assert lean_peak(shape, size=2, passes=2, **NUMBERS) == pytest.approx(live, rel=0.005)


@pytest.mark.parametrize("name", ["wan2.1-vace-1.3b", "wan2.1-vace-14b"])
def test_bytes_are_those_of_the_real_class(name: str) -> None:
    found = architecture(name, bare=True)
    shape = found.transformer
    with torch.device("meta"):
        model = transformer(shape)
    assert block_count(shape) == len(model.blocks) + len(model.vace_blocks)  # type: ignore[arg-type]

    def size(tensors: Any, size: int) -> int:
        kept = [not set(KEEP_FP32).isdisjoint(key.split(".")) for key, _ in tensors]
        return sum(p.numel() * (4 if k else size) for (_, p), k in zip(tensors, kept, strict=True))

    assert size(list(model.named_parameters()), 2) == sizes.part_bytes(found, "transformer", "bf16")
    inside = all_blocks(found, "transformer", "bf16")
    order = [
        module
        for index, block in enumerate(model.blocks)  # type: ignore[arg-type]
        for module in (
            *(
                [model.vace_blocks[shape.vace_layers.index(index)]]  # type: ignore[index]
                if index in shape.vace_layers
                else []
            ),
            block,
        )
    ]
    assert list(inside) == [size(list(block.named_parameters()), 2) for block in order]
    rest = sizes.part_bytes(found, "transformer", "bf16") - sum(inside)
    assert rest == rest_bytes(found, "transformer", "bf16")
    fp8 = all_blocks(found, "transformer", "bf16", fp8=True)
    assert all(0.5 <= small / large < 0.51 for small, large in zip(fp8, inside, strict=True))


def test_a_stage_counts_vace_blocks_references_and_the_group_offload_of_diffusers() -> None:
    found, machine = architecture("wan2.1-vace-14b"), gpu(80)
    dtypes = dict.fromkeys(PARTS, "bf16")
    job = Workload(width=832, height=480, num_frames=81, guidance_high=False)

    def denoise(job: Workload = job, **choices: Any) -> Any:
        stages = estimate(found, job, Choices(dtypes=dtypes, **choices), machine).stages
        return next(stage for stage in stages if stage.name == "denoise")

    blocks = all_blocks(found, "transformer", "bf16")
    some = denoise(offload="model", stream=True, resident_blocks=12, lean=True)
    none = denoise(offload="model", stream=True, resident_blocks=0, lean=True)
    # Every fourth of 48: 4, 8, ... of which those before a fifth base block are VACE's.
    assert some.weights_bytes - none.weights_bytes == sum(blocks[3::4])
    assert "12 of 48 blocks" in some.note
    plain, group = denoise(offload="model"), denoise(part_offload={"transformer": "group"})
    unknown = denoise(offload="model", hints_in_turn=False)
    more = (group.activation_bytes - plain.activation_bytes) / (HIDDEN * 2)
    assert more == pytest.approx(7, abs=0.1)
    assert group.activation_bytes == unknown.activation_bytes
    # Two references are two more latent frames for everything but text.
    longer = denoise(replace(job, references=2), offload="model")
    assert longer.activation_bytes / plain.activation_bytes == pytest.approx(23 / 21, rel=0.01)
