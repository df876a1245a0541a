"""Fused kernels: what they compute, when they are used, and what happens where they cannot be."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.fused_eager import add_rows, norm_rows, rotate_rows
from support.lean_models import inputs_of, model_of
from support.tiny_models import FAMILIES
from torch import Tensor, nn

from wan_core.forward import block as lean_block
from wan_core.forward import lean_forward
from wan_core.kernels import fused, fused_trial, modulation, rotary
from wan_core.kernels.fused import NOTHING, Fused
from wan_core.kernels.fused_trial import fused_for
from wan_core.kernels.trials import Trials

ALL = Fused(norms=True, rotations=True)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("without_gradients")


class Kernels:
    """Stands for the module of Triton kernels: the same functions in eager code, counted."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def norm_rows(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("norm" if kwargs.get("change") is None else "add and norm")
        norm_rows(*args, **kwargs)

    def add_rows(self, *args: Any) -> None:
        self.calls.append("add")
        add_rows(*args)

    def rotate_rows(self, *args: Any) -> None:
        self.calls.append("norm heads" if args[3] is None else "rotate")
        rotate_rows(*args)


def use(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    for trials in ("_norms", "_rotations"):
        monkeypatch.setattr(fused_trial, trials, Trials("them"))
    for module in (fused_trial, rotary, modulation):
        monkeypatch.setattr(module, "triton_kernels", lambda: kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_asks_kernels_for_what_diffusers_computes(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kernels = model_of(family, dtype), Kernels()
    use(monkeypatch, kernels)
    monkeypatch.setattr(lean_block, "fused_for", lambda *_: ALL)
    for batch in (1, 2):
        call = inputs_of(model, dtype, batch)
        expected = model(**call)[0]
        with lean_forward(model, rows=16) as reason:
            assert reason is None
            assert torch.equal(model(**call)[0], expected)
    runs = 2 if family == "wan2.2-ti2v-5b" else 1
    norms = ["norm"] * runs + ["rotate"] * 2 + ["add and norm"] * runs + ["norm heads"]
    assert kernels.calls[: len(norms)] == norms
    assert kernels.calls.count("add and norm") == 2 * runs * 2 * 2  # blocks, batches
    assert kernels.calls.count("add") == runs * 2 * 2


def test_one_timestep_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kernels = model_of("wan2.2-ti2v-5b", torch.bfloat16), Kernels()
    use(monkeypatch, kernels)
    asked: list[bool] = []

    def all_fused(hidden: Tensor, heads: int, per_token: bool) -> Fused:
        asked.append(per_token)
        return ALL

    monkeypatch.setattr(lean_block, "fused_for", all_fused)
    call = inputs_of(model, torch.bfloat16)
    call["timestep"] = torch.arange(call["timestep"].numel())[None] * 3.5
    expected = model(**call)[0]
    with lean_forward(model, rows=16):
        assert torch.equal(model(**call)[0], expected)
    assert asked == [True, True, True]  # two blocks and the last norm
    assert "add and norm" in kernels.calls


def test_products_by_rows_use_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kernels = model_of("wan2.1-t2v", torch.float32), Kernels()
    call = inputs_of(model, torch.float32)
    with lean_forward(model, exact=False, rows=16):
        expected = model(**call)[0]
        use(monkeypatch, kernels)
        monkeypatch.setattr(lean_block, "fused_for", lambda *_: ALL)
        assert torch.equal(model(**call)[0], expected)
    assert set(kernels.calls) == {"norm", "add", "rotate", "norm heads"}


def _hook(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, args, out: out)


def _offload(norm: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(norm, ModelHook())


@pytest.mark.parametrize("change", [_hook, _offload])
def test_a_norm_with_a_hook_is_called(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may bring the weights first, or change what comes out."""
    model, kernels = model_of("wan2.1-t2v", torch.float32), Kernels()
    use(monkeypatch, kernels)
    monkeypatch.setattr(lean_block, "fused_for", lambda *_: ALL)
    call = inputs_of(model, torch.float32)
    expected = model(**call)[0]
    for block in model.blocks:
        for norm in (block.norm1, block.norm2, block.norm3, block.attn1.norm_q, block.attn2.norm_q):
            change(norm)
    with lean_forward(model):
        assert torch.equal(model(**call)[0], expected)
    # The key's norm has no hook, nor has the last norm of the model.
    assert set(kernels.calls) == {"add", "rotate", "norm"}
    assert kernels.calls.count("norm") == 1
    assert kernels.calls.count("rotate") == len(model.blocks)


def test_weights_of_another_dtype_or_device_are_left_to_torch() -> None:
    states = torch.zeros(1, 3, 8)
    norm = nn.RMSNorm(8, eps=1e-6)
    assert fused.rms_norm_is_plain(norm, states)
    assert not fused.rms_norm_is_plain(norm.to(torch.bfloat16), states)
    assert not fused.rms_norm_is_plain(nn.RMSNorm(8, eps=1e-6, device="meta"), states)
    assert not fused.rms_norm_is_plain(nn.RMSNorm(8), states)  # its epsilon is torch's secret
    assert not fused.rms_norm_is_plain(nn.RMSNorm(4, eps=1e-6), states)
    assert not fused.rms_norm_is_plain(nn.RMSNorm(8, eps=1e-6), torch.zeros(1, 8, 3).mT)


def trial(dtype: torch.dtype = torch.bfloat16, per_token: bool = False) -> Fused:
    return fused_trial._try_all((CPU, dtype, 512, 4, per_token))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trial_finds_equal_bits(
    dtype: torch.dtype, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Kernels())
    before = torch.random.get_rng_state()
    assert trial(dtype, per_token) == ALL
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_trial_finds_one_bit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def off(states: Tensor, *args: Any) -> None:
        rotate_rows(states, *args)
        states[-1, -1, -1] = torch.nextafter(states[-1, -1, -1], torch.tensor(1e9).to(states))

    kernels = Kernels()
    monkeypatch.setattr(kernels, "rotate_rows", off)
    use(monkeypatch, kernels)
    with caplog.at_level("INFO"):
        assert trial() == Fused(norms=True, rotations=False)
    assert "other bits than torch's" in caplog.text


def test_a_kernel_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C compiler")

    kernels = Kernels()
    monkeypatch.setattr(kernels, "add_rows", broken)
    use(monkeypatch, kernels)
    with caplog.at_level("INFO"):
        assert trial() == Fused(norms=False, rotations=True)
    assert "no C compiler" in caplog.text


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    assert trial() == NOTHING


def test_a_device_is_tried_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    use(monkeypatch, Kernels())
    monkeypatch.setattr(fused_trial, "_works", lambda _, key, attempt: tried.append(key) or True)

    def hidden(dim: int, cuda: bool = True) -> Any:
        return SimpleNamespace(
            is_cuda=cuda, shape=(1, 9, dim), device="cuda:0", dtype=torch.bfloat16
        )

    for _ in range(2):
        assert fused_for(hidden(5120), 40) == ALL
        assert fused_for(hidden(1536), 12) == ALL
        assert fused_for(hidden(1536), 12, True) == ALL
    assert tried[::2] == tried[1::2]  # norms and rotations
    assert [key[2:] for key in tried[::2]] == [
        (5120, 40, False),
        (1536, 12, False),
        (1536, 12, True),
    ]
    for states, heads in ((hidden(5120, False), 40), (hidden(600), 4), (hidden(1536), 16)):
        assert fused_for(states, heads) == NOTHING  # a CPU, a width, a head of 96
    assert len(tried) == 6


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_triton_s_interpreter() -> None:
    """What Triton compiles for a card it can also run here, slowly: the same formulas."""
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-m", "support.fused_interpreted"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(root / "tests"), str(root), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "3 kinds agree" in found.stdout
