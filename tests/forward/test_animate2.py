"""Animate 2's two streams: diffusers' class under a dense mask, and three ways with equal bits."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from support.animate2_models import (
    FRAMES,
    HEIGHT,
    WIDTH,
    dense_flex,
    diffusers_model,
    inputs,
    plain_model,
)
from torch import Tensor

from wan_core.forward import DrivingStream, lean_forward, run_together
from wan_core.placing import stream_blocks

MODEL = functools.cache(plain_model)


pytestmark = pytest.mark.usefixtures("without_gradients")


def stream_of(given: dict[str, Tensor], keep: str = "again", **more: Any) -> DrivingStream:
    return DrivingStream(
        latents=given["driving"], text=given["driving_text"], image=given["driving_image"],
        keep=keep, **more,
    )  # fmt: skip


def call_of(given: dict[str, Tensor], stream: DrivingStream, **more: Any) -> dict[str, Any]:
    plain = {name: value for name, value in given.items() if not name.startswith("driving")}
    return {**plain, "driving": stream, "return_dict": False, **more}


def theirs(model: Any, given: dict[str, Tensor], unconditional: bool, dense: Any) -> Tensor:
    """Return what diffusers' class predicts, its block mask made without a compiler."""
    from diffusers.models.transformers import transformer_wan_animate_2 as source

    cache = source.WanAnimate2KVCache(len(model.blocks))
    grid = torch.tensor([[FRAMES, HEIGHT // 2, WIDTH // 2]])
    tokens = math.prod(grid[0].tolist())
    driving = given["driving"][0]
    dense_flex(dense)
    model(
        [driving[:16]], timestep=torch.tensor([777.7]),
        encoder_hidden_states=[given["driving_text"][0]],
        encoder_hidden_states_image=given["driving_image"], condition_latents=[driving[16:]],
        kv_cache=cache, kv_cache_mode="extract", seq_len=tokens, offset_grid_sizes=grid,
    )  # fmt: skip
    noisy = given["hidden_states"][0]
    out: Tensor = model(
        [noisy[:16]], timestep=given["timestep"],
        encoder_hidden_states=[given["encoder_hidden_states"][0]],
        encoder_hidden_states_image=given["encoder_hidden_states_image"],
        condition_latents=[noisy[16:]], kv_cache=cache, kv_cache_mode="cached",
        seq_len=tokens // FRAMES * (FRAMES + 1), reference_grid_sizes=grid,
        origin_len=4 * FRAMES - 3, origin_area=[HEIGHT * 8, WIDTH * 8],
        is_uncondtion=unconditional,
    ).sample[0]  # fmt: skip
    return out


def test_as_diffusers_own_class_under_a_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, given = MODEL(), inputs()
    model = diffusers_model(plain)
    results = []
    for unconditional in (False, True):
        expected = theirs(model, given, unconditional, monkeypatch)
        with lean_forward(plain) as reason:
            assert reason is None
            call = call_of(given, stream_of(given), unconditional=unconditional)
            found = plain(**call)[0][0]
        # Positions are turned in float64 there, and a masked softmax sums in another order.
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
        results.append(found)
    assert not torch.allclose(*results, rtol=1e-2)


def predicted(
    model: Any, given: dict[str, Tensor], stream: DrivingStream, together: bool
) -> list[Tensor]:
    """Return both passes of guidance, as one step computes them."""
    calls = [
        call_of(given, stream),
        call_of(given, stream, unconditional=True)
        | {"encoder_hidden_states": -given["encoder_hidden_states"]},
    ]
    if together:
        return [out[0] for out in run_together(model, calls)]
    return [model(**call)[0] for call in calls]


@pytest.mark.parametrize(
    ("dtype", "batch", "layers"), [(torch.float32, 1, 11), (torch.bfloat16, 2, 3)]
)
def test_three_ways_to_keep_the_driving_stream_give_equal_bits(
    dtype: torch.dtype, batch: int, layers: int
) -> None:
    model = plain_model(dtype, num_layers=layers)
    given = {name: value.to(dtype) for name, value in inputs(batch=batch).items()}
    later = given | {"hidden_states": given["hidden_states"].flip(4)}
    found: dict[tuple[str, bool], list[Tensor]] = {}
    for keep in ("kv", "inputs", "again"):
        for together in (False, True):
            stream = stream_of(given, keep)
            with lean_forward(model, rows=5):
                both = predicted(model, given, stream, together)
                assert stream.full == (keep != "again")
                both += predicted(model, later, stream, together)
                stream.empty()  # as after a segment, or where memory ran out
                assert not stream.full
                if keep == "inputs":
                    assert torch.equal(predicted(model, given, stream, together)[0], both[0])
            found[keep, together] = both
    first = found["kv", False]
    assert all(
        torch.equal(a, b) for both in found.values() for a, b in zip(first, both, strict=True)
    )
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])


def test_each_sample_of_a_batch_as_alone() -> None:
    model, given = MODEL(), inputs(batch=2)
    with lean_forward(model):
        both = model(**call_of(given, stream_of(given)))[0]
        for index in range(2):
            alone = {
                name: value if name.startswith("driving") else value[index : index + 1]
                for name, value in given.items()
            }
            one = model(**call_of(alone, stream_of(alone)))[0]
            assert torch.allclose(both[index : index + 1], one, rtol=1e-4, atol=1e-5)


def test_strength_weighs_the_driving_values_and_rows_stay_near() -> None:
    model, given = MODEL(), inputs()
    with lean_forward(model):
        plain = model(**call_of(given, stream_of(given)))[0]
        deaf = model(**call_of(given, stream_of(given, strength=0.0)))[0]
        other = given | {"driving_text": -given["driving_text"]}
        moved = model(**call_of(other, stream_of(other)))[0]
        still = model(**call_of(other, stream_of(other, strength=0.0)))[0]
        kept = [
            model(**call_of(given, stream_of(given, keep, strength=0.5)))[0]
            for keep in ("kv", "inputs", "again")
        ]
    assert (moved - plain).norm() > 1e-4 * plain.norm()
    assert (deaf - plain).norm() > 1e-3 * plain.norm()
    # Its keys still count in the softmax, so that it is not gone.
    assert (still - deaf).norm() > 1e-4 * deaf.norm()
    assert all(torch.equal(kept[0], one) for one in kept) and not torch.equal(kept[0], plain)
    with lean_forward(model, exact=False, rows=4, head_groups=2):
        rows = model(**call_of(given, stream_of(given)))[0]
    assert (rows - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_streamed_blocks_bring_both_streams_their_weights() -> None:
    model, given = MODEL(), inputs()
    with lean_forward(model):
        expected = predicted(model, given, stream_of(given), together=False)
    with stream_blocks(model, "cpu", resident_blocks=2) as streaming, lean_forward(model):
        for keep in ("kv", "inputs", "again"):
            stream = stream_of(given, keep)
            for together in (False, True):
                found = predicted(model, given, stream, together)
                assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert streaming.loads > 9 * 3 * 3


def test_without_the_lean_forward_the_second_stream_is_refused() -> None:
    model, given = MODEL(), inputs()
    with pytest.raises(TypeError, match="driving"):
        model(**call_of(given, stream_of(given)))
