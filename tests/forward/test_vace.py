"""VACE's hints computed just before their block: diffusers' bits, one hint alive at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.lean_models import inputs_of, model_of
from support.placed_models import state_of

from wan_core.forward import blocks_in_order, hints_in_turn, lean_forward, run_together
from wan_core.forward.transformer import why_not

VACE = "wan2.1-vace"


pytestmark = pytest.mark.usefixtures("without_gradients")


def calls(model: Any, dtype: torch.dtype, batch: int = 1) -> Iterator[dict[str, Any]]:
    """A call with a scale for each block, without scales, and with a control that is too small."""
    call = inputs_of(model, dtype, batch)
    yield call
    yield {k: v for k, v in call.items() if k != "control_hidden_states_scale"}
    yield {**call, "control_hidden_states": call["control_hidden_states"][:, :, :4]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_bits(dtype: torch.dtype) -> None:
    model = model_of(VACE, dtype)
    before = state_of(model)
    for batch in (1, 2):
        for call in calls(model, dtype, batch):
            given = {k: v.clone() for k, v in call.items() if isinstance(v, torch.Tensor)}
            expected = model(**call)[0]
            for rows in (7, 4096):
                with lean_forward(model, rows=rows) as reason:
                    assert reason is None
                    assert torch.equal(model(**call)[0], expected)
            with hints_in_turn(model) as reason:
                assert reason is None
                assert torch.equal(model(**call)[0], expected)
            assert all(torch.equal(call[name], value) for name, value in given.items())
    assert state_of(model) == before


@pytest.mark.parametrize("layers", [[0], [0, 1, 2, 3], [3, 0, 2]])
def test_every_place_of_the_hints(layers: list[int]) -> None:
    """diffusers takes hints in the order of the base blocks, also where the list is unsorted."""
    model = model_of(VACE, torch.bfloat16, vace_layers=layers)
    call = inputs_of(model, torch.bfloat16)
    expected = model(**call)[0]
    scale = call["control_hidden_states_scale"]
    louder = model(**{**call, "control_hidden_states_scale": scale * 2})[0]
    assert not torch.equal(louder, expected)
    for context in (lean_forward, hints_in_turn):
        with context(model):
            assert torch.equal(model(**call)[0], expected)


def test_further_rung_within_rounding() -> None:
    model = model_of(VACE, torch.float32)
    call = inputs_of(model, torch.float32)
    expected = model(**call)[0]
    with lean_forward(model, exact=False, rows=16, head_groups=2):
        out = model(**call)[0]
    assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_order_of_the_blocks_is_that_of_computing() -> None:
    model = model_of(VACE, torch.bfloat16)
    names = {block: name for name, block in model.named_modules()}
    order: list[str] = []
    for block in (*model.blocks, *model.vace_blocks):
        block.register_forward_pre_hook(lambda block, args: order.append(names[block]))
    wanted = [names[block] for block in blocks_in_order(model)]
    assert wanted == [
        "vace_blocks.0", "blocks.0", "blocks.1", "vace_blocks.1", "blocks.2", "blocks.3",
    ]  # fmt: skip
    call = inputs_of(model, torch.bfloat16)
    for context in (lean_forward, hints_in_turn):
        order.clear()
        with context(model):
            model(**call)
        assert order == wanted
    plain = model_of("wan2.1-t2v", torch.bfloat16)
    assert blocks_in_order(plain) == list(plain.blocks)
    with hints_in_turn(plain) as reason:
        assert reason is None


def test_run_together_equals_one_after_the_other() -> None:
    model = model_of(VACE, torch.bfloat16)
    both = [inputs_of(model, torch.bfloat16, seed=seed) for seed in (1, 2)]
    expected = [model(**call)[0] for call in both]
    order: list[int] = []
    for number, block in enumerate(blocks_in_order(model)):
        block.register_forward_pre_hook(lambda *_, n=number: order.append(n))
    with lean_forward(model):
        together = run_together(model, both)
    assert all(torch.equal(a[0], b) for a, b in zip(together, expected, strict=True))
    assert order == [number for number in range(6) for _ in range(2)]
    order.clear()
    with hints_in_turn(model):  # both passes at once would need more memory than it promises
        run_together(model, both)
    assert order == [*range(6), *range(6)]


def test_called_in_every_way() -> None:
    model = model_of(VACE, torch.float32)
    call = inputs_of(model, torch.float32)
    expected = model(**call)[0]
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    control = [call["control_hidden_states"], call["control_hidden_states_scale"]]
    with lean_forward(model):
        positional = model(*(call[name] for name in names), None, *control, False)
        assert torch.equal(positional[0], expected)
        with pytest.raises(ValueError, match="Length of `control_hidden_states_scale`"):
            model(**{**call, "control_hidden_states_scale": torch.ones(3)})
        with torch.enable_grad():
            assert torch.equal(model(**call)[0], expected)


def test_a_vace_block_of_another_kind_keeps_the_models_own_forward() -> None:
    model = model_of(VACE, torch.float32)
    model.vace_blocks[1].ffn.net.append(torch.nn.Identity())
    assert str(why_not(model)).startswith("VACE block 1: its feed-forward")
    call = inputs_of(model, torch.float32)
    expected = model(**call)[0]
    with lean_forward(model) as reason:
        assert reason is not None
    with hints_in_turn(model) as reason:  # the blocks' own forward may be anything
        assert reason is None
        assert torch.equal(model(**call)[0], expected)
    model.train()
    with hints_in_turn(model) as reason:
        assert reason == "the model is in training mode"
