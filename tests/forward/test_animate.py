"""Animate's forward: the class's bits with fewer tensors alive, and faces encoded once."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from support.lean_models import inputs_of, model_of
from support.placed_models import state_of
from support.tiny_models import ANIMATE

from wan_core.forward import (
    as_pixels,
    blocks_in_order,
    encode_faces,
    known_faces,
    lean_forward,
    run_together,
)
from wan_core.forward.transformer import why_not

DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits(dtype: torch.dtype) -> None:
    """Of the class's own forward, whether faces come as pixels or as tokens made once."""
    model = model_of(ANIMATE, dtype)
    before = state_of(model)
    for batch in (1, 2):
        call = inputs_of(model, dtype, batch)
        given = {k: v.clone() for k, v in call.items() if isinstance(v, torch.Tensor)}
        expected = model(**call)[0]
        seen: list[int] = []
        tokens = encode_faces(model, call["face_pixel_values"], partial(seen.append, 1))
        assert tokens.shape == (batch, 4, 3, 24) and len(seen) == -(-13 * batch // 3)
        known = call | {"face_pixel_values": as_pixels(tokens)}
        with known_faces(model):
            assert torch.equal(model(**known)[0], expected)
        for rows in (7, 4096):
            with lean_forward(model, rows=rows) as reason:
                assert reason is None
                assert torch.equal(model(**call)[0], expected)
                with known_faces(model):
                    assert torch.equal(model(**known)[0], expected)
        assert all(torch.equal(call[name], value) for name, value in given.items())
        assert torch.equal(model(**call)[0], expected)  # nothing is left
        # In half precision the face of these random weights is lost in rounding.
        for name in ("pose_hidden_states", "face_pixel_values")[: 1 + (dtype == torch.float32)]:
            assert not torch.equal(model(**call | {name: call[name] * -9.0})[0], expected)
    assert state_of(model) == before


def test_both_passes_go_through_a_block_together() -> None:
    model = model_of(ANIMATE, torch.bfloat16)
    calls = [inputs_of(model, torch.bfloat16, seed=seed) for seed in (0, 1)]
    expected = [model(**call)[0] for call in calls]
    order: list[Any] = []
    blocks = blocks_in_order(model)
    hooks = [one.register_forward_pre_hook(lambda one, _: order.append(one)) for one in blocks]
    with lean_forward(model):
        found = [out for (out,) in run_together(model, calls)]
    assert all(map(torch.equal, found, expected))
    assert order == [one for block in blocks for one in (block, block)]
    for hook in hooks:
        hook.remove()


def test_the_order_of_the_blocks_is_that_of_computing() -> None:
    model = model_of(ANIMATE, torch.float32)
    names = {block: name for name, block in model.named_modules()}
    order: list[str] = []
    for block in (*model.blocks, *model.face_adapter):
        block.register_forward_pre_hook(lambda block, _: order.append(names[block]))
    model(**inputs_of(model, torch.float32))
    assert order == [names[block] for block in blocks_in_order(model)]
    assert order[:3] == ["blocks.0", "face_adapter.0", "blocks.1"] and len(order) == 6


def test_further_rung_within_rounding() -> None:
    model = model_of(ANIMATE, torch.float32)
    call = inputs_of(model, torch.float32)
    expected = model(**call)[0]
    with lean_forward(model, exact=False, rows=16, head_groups=2):
        out = model(**call)[0]
    assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_another_thread_still_gives_pixels() -> None:
    model = model_of(ANIMATE, torch.float32)
    call = inputs_of(model, torch.float32)
    expected, found = model(**call)[0], []

    def other() -> None:
        with torch.no_grad():
            found.append(model(**call)[0])

    with known_faces(model):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_what_is_not_foreseen_is_left_to_the_class() -> None:
    model = model_of(ANIMATE, torch.float32)
    call = inputs_of(model, torch.float32)
    short = call | {"pose_hidden_states": call["pose_hidden_states"][:, :, :-1]}
    with lean_forward(model), pytest.raises(ValueError, match="must be one less"):
        model(**short)
    adapter: Any = model.face_adapter[1]
    adapter.processor = type("Other", (), {"_attention_backend": None})()
    assert why_not(model) == "face adapter 1: its attention is computed by Other"
