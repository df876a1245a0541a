"""MagCache: its rule against a plain loop, and blocks that are left out against a model without."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.lean_models import inputs_of, model_of
from torch import Tensor, nn

from wan_core.forward import BlockPasses, block_passes, lean_forward, run_together
from wan_core.models import (
    MagCurve,
    computed,
    magcache_curve,
    magcache_plan,
    magcache_skips,
)
from wan_core.sampling import Conditions, DenoiseState, Expert, Shortcuts, denoise_steps

CURVED = (
    "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.2-t2v-a14b", "wan2.2-i2v-a14b",
    "wan2.2-ti2v-5b",
)  # fmt: skip


class Add(nn.Module):
    """Stands for all blocks: adds what it is given."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return hidden + self.residual


def without_blocks(model: Any, residual: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Return the output of a copy of ``model`` whose blocks do nothing but add ``residual``."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.blocks = nn.ModuleList([Add(residual)])
    found: Tensor = other(**call)[0]
    return found


def residual_of(model: Any, call: Mapping[str, Any]) -> Tensor:
    """Return what the blocks add, seen by hooks around the first and the last of them."""
    seen: list[Tensor] = []
    hooks = [
        model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())),
        model.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out.clone())),
    ]
    model(**call)
    for hook in hooks:
        hook.remove()
    return seen[1] - seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("family", ["wan2.1-t2v", "wan2.1-i2v", "wan2.2-ti2v-5b"])
@torch.no_grad()
def test_blocks_are_left_out_and_put_back(family: str, lean: bool, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    call = dict(inputs_of(model, dtype), return_dict=False)
    whole, residual = model(**call)[0], residual_of(model, call)
    forwards = [block.forward for block in model.blocks]
    first, second = BlockPasses([None]), BlockPasses([residual])
    context = lean_forward(model) if lean else None
    if context is not None:
        assert context.__enter__() is None
    with block_passes(model, first):
        assert torch.equal(model(**call)[0], whole)
    assert first.made[0] is not None and torch.equal(first.made[0], residual)
    with block_passes(model, second):
        left_out = model(**call)[0]
    assert second.made == [None]
    assert torch.equal(model(**call)[0], whole)
    if context is not None:
        context.__exit__(None, None, None)
    assert torch.equal(left_out, without_blocks(model, residual, call))
    assert [block.forward for block in model.blocks] == forwards


@pytest.mark.parametrize("skips", [(False, False), (True, False), (False, True), (True, True)])
@torch.no_grad()
def test_passes_side_by_side(skips: tuple[bool, bool]) -> None:
    """Each of two calls that run block by block is computed, or left out, by itself."""
    model = model_of("wan2.1-t2v", torch.float32)
    calls = [dict(inputs_of(model, torch.float32), return_dict=False) for _ in range(2)]
    calls[1]["encoder_hidden_states"] = calls[1]["encoder_hidden_states"].flip(1)
    residuals = [residual_of(model, call) for call in calls]
    passes = BlockPasses([r if skip else None for r, skip in zip(residuals, skips, strict=True)])
    with lean_forward(model), block_passes(model, passes):
        outputs = [output for (output,) in run_together(model, calls)]
    for call, residual, skip, made, output in zip(
        calls, residuals, skips, passes.made, outputs, strict=True
    ):
        expected = without_blocks(model, residual, call) if skip else model(**call)[0]
        assert torch.equal(output, expected)
        assert (made is None) if skip else torch.equal(made, residual)


@torch.no_grad()
def test_an_error_leaves_the_blocks_as_they_were() -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = dict(inputs_of(model, torch.float32), return_dict=False)
    whole = model(**call)[0]
    with pytest.raises(IndexError), block_passes(model, BlockPasses([None])):
        model(**call)
        model(**call)  # one call more than there are passes
    assert torch.equal(model(**call)[0], whole)


# The rule --------------------------------------------------------------------------------------


def plain_rule(ratios: list[float], kept: int, threshold: float) -> list[bool]:
    """The published rule for one pass of one expert, with all sums made anew at each step."""
    out: list[bool] = []
    for step in range(len(ratios)):
        last = max((s for s in range(step) if not out[s]), default=-1)
        first = max(last + 1, kept)
        products = [1.0]
        for s in range(first, step + 1):
            products.append(products[-1] * ratios[s])
        error = sum(abs(1 - product) for product in products[1:])
        out.append(step >= kept and error < threshold and step + 1 - first <= 2)
    return out


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.04, 0.12, 0.24])
@pytest.mark.parametrize("name", CURVED)
def test_the_rule_is_the_published_one(name: str, threshold: float) -> None:
    curve = magcache_curve(name, 1280, 720, False)
    assert curve is not None
    steps = len(curve.ratios) // 2 + 1  # those it was measured at, where it is taken as it is
    pairs = [(1.0, 1.0)] + [
        (1 + curve.ratios[i] / 1e5, 1 + curve.ratios[i + 1] / 1e5)
        for i in range(0, len(curve.ratios), 2)
    ]
    assert curve.at(steps) == tuple(pairs)
    switch = 15 if "a14b" in name else steps
    found = magcache_skips(curve, steps, switch, threshold)
    for which in (0, 1):
        expected: list[bool] = []
        for part in (range(switch), range(switch, steps)):
            kept = int(len(part) * curve.retained + 0.5)
            kept = len(part) if curve.low_only and part.start == 0 else max(kept, 1)
            ratios = [pair[which] for pair in pairs[part.start : part.stop]]
            expected += plain_rule(ratios, kept, threshold)
        assert [pair[which] for pair in found] == expected
    assert threshold or computed(found) == 2 * steps


@pytest.mark.parametrize("name", CURVED)
def test_a_factor_finds_its_threshold(name: str) -> None:
    curve = magcache_curve(name, 832, 480, True)
    assert curve is not None
    counts = []
    for factor in (1.0, 1.2, 1.5, 2.0, 4.0):
        threshold, skips = magcache_plan(curve, 40, 40, factor)
        assert skips == magcache_skips(curve, 40, 40, threshold)
        counts.append(computed(skips))
        assert factor > 1.5 or computed(skips) * factor <= 80
    assert counts[0] == 80 and counts == sorted(counts, reverse=True)


def test_curves_of_one_structure_are_told_apart() -> None:
    small, large = (
        magcache_curve("wan2.1-i2v-14b", *size, True) for size in ((832, 480), (1280, 720))
    )
    assert small != large
    text, image = (magcache_curve("wan2.2-ti2v-5b", 1280, 704, given) for given in (False, True))
    assert text != image
    assert magcache_curve("wan2.1-vace-14b", 832, 480, False) is None


# In the loop -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_loop_follows_the_table() -> None:
    """Against a loop with a model without blocks; with nothing left out no bit is another."""
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    noise, embeds = call["hidden_states"], call["encoder_hidden_states"]
    told = Conditions(prompt_embeds=embeds, negative_prompt_embeds=embeds.flip(1))

    class Steps:
        timesteps = torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])
        sigmas = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1, 0.0])

        def step(self, velocity: Tensor, time: Tensor, latents: Tensor, **_: Any) -> Any:
            return (latents - 0.2 * velocity,)

    def ours(skips: Any) -> DenoiseState:
        expert = Expert(name="only", model=model, dtype=torch.float32, guidance_scale=3.0)
        state = DenoiseState(latents=noise, next_step=0)
        asked = None if skips is None else Shortcuts(magcache=skips)
        return denoise_steps(state, range(5), expert, Steps(), told, shortcuts=asked)

    never = tuple((False, False) for _ in range(5))
    assert torch.equal(ours(never).latents, ours(None).latents)
    skips = ((False, False), (True, True), (False, True), (True, False), (False, False))
    latents, residuals = noise, [torch.zeros(())] * 2
    for index, pair in enumerate(skips):
        outputs = []
        for number, given in enumerate((embeds, embeds.flip(1))):
            asked: dict[str, Any] = {
                "hidden_states": latents, "timestep": Steps.timesteps[index].expand(1),
                "encoder_hidden_states": given, "return_dict": False,
            }  # fmt: skip
            if pair[number]:
                outputs.append(without_blocks(model, residuals[number], asked))
            else:
                outputs.append(model(**asked)[0])
                residuals[number] = residual_of(model, asked)
        latents = latents - 0.2 * (outputs[1] + 3.0 * (outputs[0] - outputs[1]))
    found = ours(skips)
    assert torch.equal(found.latents, latents)
    assert (found.memory.forwards, found.memory.skipped_steps) == (6, 4)


def test_a_curve_needs_a_step_in_which_to_begin() -> None:
    curve = MagCurve(ratios=(0, 0) * 9, retained=0.0)
    skips = magcache_skips(curve, 10, 4, 1.0)
    assert [pair[0] for pair in skips] == [
        False, True, True, False, False, True, True, False, True, True
    ]  # fmt: skip
