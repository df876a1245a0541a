"""The lean forward: diffusers' bits, half of diffusers' memory, and nothing left on the model."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.dry_run import DryModel
from support.lean_models import TOKENS, inputs_of, model_of
from support.placed_models import Interrupted, state_of
from support.tiny_models import FAMILIES, TEXT_DIM, make_transformer
from support.traced import TracedMemory
from torch import nn

from wan_core.forward import timestep as lean_timestep
from wan_core.forward import transformer as lean_module
from wan_core.forward.transformer import lean_forward, run_together, why_not
from wan_core.placing.offload import block_hooks, place

KEEP_FP32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_bits(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    before = state_of(model)
    for batch in (1, 2):
        call = inputs_of(model, dtype, batch)
        given = {name: value.clone() for name, value in call.items() if name != "return_dict"}
        expected = model(**call)[0]
        for rows in (7, 16, 4096):
            with lean_forward(model, rows=rows) as reason:
                assert reason is None
                assert torch.equal(model(**call)[0], expected)
        for name, value in given.items():
            assert torch.equal(call[name], value), f"{name} was written into"
    assert state_of(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_further_rung_within_rounding(family: str) -> None:
    model = model_of(family, torch.float32)
    call = inputs_of(model, torch.float32)
    expected = model(**call)[0]
    for head_groups in (1, 2, 8):
        with lean_forward(model, exact=False, rows=16, head_groups=head_groups):
            out = model(**call)[0]
        assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_further_rung_with_a_projection_that_cannot_be_cut() -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    with lean_forward(model, exact=False, rows=16):
        expected = model(**call)[0]
    for block in model.blocks:
        block.attn1.to_v.register_forward_hook(lambda module, args, out: out * 2)
    doubled = model(**call)[0]
    with lean_forward(model, exact=False, rows=16):
        out = model(**call)[0]
    assert (out - doubled).abs().max() <= 2e-6 * doubled.abs().max()
    assert not torch.allclose(out, expected, rtol=1e-2)


@pytest.mark.parametrize("head_dim", [12, 32])
def test_many_distinct_timesteps_still_equal(head_dim: int) -> None:
    model = model_of("wan2.2-ti2v-5b", torch.bfloat16, attention_head_dim=head_dim)
    call = inputs_of(model, torch.bfloat16, batch=2)
    for per_token in (
        torch.arange(2 * TOKENS).reshape(2, TOKENS) * 3.5,
        torch.stack([torch.zeros(TOKENS), torch.full((TOKENS,), 9.0)]),
    ):
        call["timestep"] = per_token
        expected = model(**call)[0]
        with lean_forward(model, rows=16):
            assert torch.equal(model(**call)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [12, 32])
def test_all_tokens_embedded_where_short_products_round_differently(
    head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, here too: head_dim 12 gives equal timesteps unequal bits in fp32."""
    kinds: list[str] = []
    original = lean_timestep._all_tokens

    def watched(*args: Any) -> Any:
        found = original(*args)
        kinds.append("per token" if found is None else "runs")
        return found

    model = model_of("wan2.2-ti2v-5b", dtype, attention_head_dim=head_dim)
    call = inputs_of(model, dtype)
    expected = model(**call)[0]
    monkeypatch.setattr(
        lean_timestep,
        "_one_per_run",
        lambda *args: watched(*args) or lean_timestep._per_token(*args[:3]),
    )
    with lean_forward(model, rows=16):
        assert torch.equal(model(**call)[0], expected)
    assert kinds == ["per token" if (head_dim, dtype) == (12, torch.float32) else "runs"]


def test_the_model_can_be_called_in_every_way() -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    expected = model(**call)[0]
    with lean_forward(model):
        named = model(**{**call, "return_dict": True})
        positional = model(
            call["hidden_states"], call["timestep"], call["encoder_hidden_states"], None, False
        )
        scaled = model(**call, attention_kwargs={"scale": 1.0})
    assert type(named).__name__ == "Transformer2DModelOutput"
    assert torch.equal(named.sample, expected)
    assert torch.equal(positional[0], expected)
    assert torch.equal(scaled[0], expected)


@pytest.mark.parametrize("family", ["wan2.1-i2v", "wan2.2-ti2v-5b"])
def test_run_together_equals_one_after_the_other(family: str) -> None:
    model = model_of(family, torch.bfloat16)
    calls = [inputs_of(model, torch.bfloat16, seed=seed) for seed in (1, 2)]
    expected = [model(**call)[0] for call in calls]
    order: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, i=i: order.append(i))
        for i, block in enumerate(model.blocks)
    ]
    with lean_forward(model, rows=16):
        together = run_together(model, calls)
    assert order == [0, 0, 1, 1]  # both calls, before the next block
    separate = run_together(model, calls)
    assert order[4:] == [0, 1, 0, 1]  # lean is off: diffusers' own, one after the other
    for hook in hooks:
        hook.remove()
    for result in (together, separate):
        assert all(torch.equal(a[0], b) for a, b in zip(result, expected, strict=True))


def test_other_threads_keep_their_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    ran: list[int] = []
    original = lean_module.run_block

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        ran.append(threading.get_ident())
        return original(*args, **kwargs)

    monkeypatch.setattr(lean_module, "run_block", counted)
    expected = model(**call)[0]
    results: list[bool] = []

    def plain() -> None:
        with torch.no_grad():
            results.append(torch.equal(model(**call)[0], expected))

    def lean() -> None:
        with torch.no_grad(), lean_forward(model):
            results.append(torch.equal(model(**call)[0], expected))

    with lean_forward(model):
        for target in (plain, lean):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        lean_calls = len(ran)
        assert threading.get_ident() not in ran
        model(**call)
        assert ran[lean_calls:] == [threading.get_ident()] * 2
    assert results == [True, True]
    assert lean_calls == 2
    assert "forward" not in vars(model)


def test_gradients_get_diffusers_own_forward() -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    with lean_forward(model), torch.enable_grad():
        call["hidden_states"].requires_grad_()
        model(**call)[0].sum().backward()
    assert call["hidden_states"].grad is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("exact", [True, False])
def test_nothing_left_after_an_error(error: type[BaseException], exact: bool) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    call = inputs_of(model, torch.float32)
    expected, before = model(**call)[0], state_of(model)
    seen: list[int] = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise error("stop")

    with (
        pytest.raises(error, match="stop"),
        lean_forward(model, exact=exact),
        block_hooks(model, stop),
    ):
        model(**call)
    assert state_of(model) == before
    assert torch.equal(model(**call)[0], expected)


def test_under_sequential_offload() -> None:
    model = model_of("wan2.1-i2v", torch.float32)
    call = inputs_of(model, torch.float32)
    expected, before = model(**call)[0], state_of(model)
    with place(model, "sequential", "cpu"), lean_forward(model, rows=16) as reason:
        assert reason is None
        assert torch.equal(model(**call)[0], expected)
        assert torch.equal(run_together(model, [call])[0][0], expected)
    assert state_of(model) == before


def _fuse(model: Any) -> None:
    model.blocks[1].attn1.fuse_projections()


def _other_processor(model: Any) -> None:
    model.blocks[1].attn2.processor = type("Sage", (), {})()


def _first_block_cache(model: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_fuse, "block 1: its projections are fused"),
        (_other_processor, "block 1: its attention is computed by Sage"),
        (_first_block_cache, "a diffusers hook .* is attached"),
        (lambda model: model.train(), "training mode"),
    ],
)
def test_refuses_what_it_does_not_know(change: Callable[[Any], None], reason: str) -> None:
    model = model_of("wan2.1-t2v", torch.float32)
    change(model)
    with lean_forward(model) as why:
        assert why is not None
        assert re.search(reason, why)
        assert not any(
            isinstance(vars(block).get("forward"), lean_module.functools.partial)
            and vars(block)["forward"].func is lean_module._block_forward
            for block in model.blocks
        )


def test_refuses_another_class() -> None:
    assert why_not(nn.Linear(1, 1)) == "Linear is not WanTransformer3DModel"
    assert why_not(model_of("wan2.1-t2v", torch.float32)) is None


def _shape(family: str, video: tuple[int, int, int]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Config of a true-width transformer with two blocks, and its latent's shape."""
    width, height, frames = video
    numbers: dict[str, Any] = {"attention_head_dim": 128, "text_dim": 4096, "num_layers": 2}
    scale, channels = 8, 16
    if family == "wan2.2-ti2v-5b":
        numbers |= {"num_attention_heads": 24, "ffn_dim": 14336}
        scale, channels = 16, 48
    else:
        numbers |= {"num_attention_heads": 40, "ffn_dim": 13824}
    return numbers, (1, channels, (frames - 1) // 4 + 1, height // scale, width // scale)


def _peak(
    family: str, video: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, **lean: Any
) -> int:
    numbers, shape = _shape(family, video)
    per_frame = (shape[3] // 2) * (shape[4] // 2)
    # Fake tensors have no values to find the runs in.
    monkeypatch.setattr(lean_module, "_runs_of", lambda timestep: (0, per_frame))

    def run(model: Any) -> None:
        tokens = (1, shape[2] * per_frame) if family == "wan2.2-ti2v-5b" else (1,)
        latents = torch.empty(shape, dtype=torch.bfloat16)
        text = torch.empty(1, 512, 4096, dtype=torch.bfloat16)
        on: Any = lean_forward(model, **lean) if lean else contextlib.nullcontext()
        with on as reason:
            assert reason is None
            model(latents, torch.empty(tokens), text, return_dict=False)

    dry = DryModel(lambda: make_transformer(family, **numbers), torch.bfloat16, KEEP_FP32)
    return dry.peak(run)


@pytest.mark.parametrize(
    ("family", "video", "equal", "further"),
    [
        ("wan2.1-t2v", (832, 480, 81), 0.48, 0.36),
        pytest.param("wan2.1-t2v", (1280, 720, 81), 0.48, 0.36, marks=pytest.mark.slow),
        ("wan2.2-ti2v-5b", (1280, 704, 121), 0.25, 0.15),
    ],
)
def test_peak_at_full_size_against_diffusers(
    family: str,
    video: tuple[int, int, int],
    equal: float,
    further: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = _peak(family, video, monkeypatch)
    assert _peak(family, video, monkeypatch, exact=True) <= equal * reference
    assert _peak(family, video, monkeypatch, exact=False) <= further * reference


def _wide() -> tuple[Any, dict[str, Any]]:
    model = model_of(
        "wan2.1-t2v", torch.bfloat16, num_attention_heads=4, attention_head_dim=64, ffn_dim=691
    )
    g = torch.Generator().manual_seed(0)
    call: dict[str, Any] = {
        "hidden_states": torch.randn(1, 16, 5, 32, 32, generator=g).bfloat16(),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, TEXT_DIM, generator=g).bfloat16(),
        "return_dict": False,
    }
    return model, call


def test_traced_peak_with_real_tensors() -> None:
    model, call = _wide()
    peaks = {}
    for name in ("diffusers", "lean", "further"):
        on: Any = lean_forward(model, exact=name == "lean", rows=128)
        with contextlib.nullcontext() if name == "diffusers" else on, TracedMemory() as traced:
            model(**call)
        peaks[name] = traced.peak_bytes
    assert peaks["lean"] <= 0.55 * peaks["diffusers"]
    assert peaks["further"] <= 0.45 * peaks["diffusers"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_step_is_not_slower_than_diffusers() -> None:
    """In seconds of this thread, so that what else the machine does counts little."""
    model, call = _wide()
    seconds: dict[str, list[float]] = {"diffusers": [], "lean": []}
    for _ in range(5):
        for name, taken in seconds.items():
            with lean_forward(model) if name == "lean" else contextlib.nullcontext():
                start = time.thread_time()
                model(**call)
                taken.append(time.thread_time() - start)
    assert min(seconds["lean"]) <= 1.15 * min(seconds["diffusers"])
