"""Norms of a VAE in fewer passes: where they are used, and what happens where they cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.fused_eager import scaled_silu
from torch import Tensor

from wan_core.kernels import maps
from wan_core.kernels.maps import FusedNorms, fused_norms
from wan_core.kernels.trials import Trials

pytestmark = pytest.mark.usefixtures("without_gradients")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class OnCard(SimpleNamespace):
    """A weight that says it is on a card; trials are made on the CPU."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(is_cuda=True, device=torch.device("cpu"), dtype=dtype)


def use(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    found = None if function is None else SimpleNamespace(scaled_silu=function)
    monkeypatch.setattr(maps, "map_kernels", lambda: found)
    monkeypatch.setattr(maps, "_trials", Trials("norms"))


def off_by_a_bit(*args: Any) -> None:
    scaled_silu(*args)
    out: Tensor = args[-1]
    out[-1, -1, -1, -1, -1] = torch.nextafter(out[-1, -1, -1, -1, -1], torch.tensor(9e9).to(out))


def over_the_edge(*args: Any) -> None:
    """Right, but one pixel of the zeros around the picture is written too."""
    scaled_silu(*args)
    out: Tensor = args[-1]
    if out.storage_offset():
        out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()


def broken(*args: Any) -> None:
    raise RuntimeError("no C compiler")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trial_finds_equal_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, scaled_silu)
    before = torch.random.get_rng_state()
    assert fused_norms(OnCard(dtype), [12]) == FusedNorms(frozenset({12}))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("function", [off_by_a_bit, over_the_edge, broken, lambda *_: None])
def test_a_trial_finds_what_is_wrong(
    function: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, function)
    with caplog.at_level("INFO"):
        assert fused_norms(OnCard(), [12]) is None
    assert ("no C compiler" if function is broken else "other bits than torch's") in caplog.text


def test_each_width_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[maps.Key] = []
    use(monkeypatch, scaled_silu)
    monkeypatch.setattr(maps, "_works", lambda key: tried.append(key) or key[2] != 192)
    weight: Any = OnCard(torch.bfloat16)
    for _ in range(2):
        assert fused_norms(weight, [384, 96, 192, 96]) == FusedNorms(frozenset({96, 384}))
        assert fused_norms(weight, [192]) is None
    assert [key[2] for key in tried] == [96, 192, 384]


def test_where_there_is_nothing_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_norms(torch.zeros(3), [96]) is None
    weight: Any = OnCard(torch.float64)
    assert fused_norms(weight, [96]) is None
    use(monkeypatch, None)
    weight.dtype = torch.float32
    assert fused_norms(weight, [96]) is None


def test_norms_and_maps_that_the_kernel_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, broken)
    norm = SimpleNamespace(
        bias=0.0, channel_first=True, gamma=torch.ones(4, 1, 1, 1), scale=2.0
    )  # fmt: skip
    fused, x = FusedNorms(frozenset({4})), torch.zeros(1, 4, 1, 2, 2)
    with pytest.raises(RuntimeError):
        fused.activate(norm, x, x)
    for change in (
        {"bias": torch.ones(4)}, {"channel_first": False}, {"gamma": norm.gamma.half()},
        {"gamma": norm.gamma.to("meta")},
    ):  # fmt: skip
        assert not fused.activate(SimpleNamespace(**{**vars(norm), **change}), x, x)
    assert not fused.activate(norm, x, x.half())
    assert not FusedNorms(frozenset({8})).activate(norm, x, x)
