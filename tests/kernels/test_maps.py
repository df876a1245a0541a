"""Norms of a VAE in fewer passes: where they are used, and what happens where they cannot be."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.fused_eager import duplicated, scaled_silu
from torch import Tensor

from wan_core.kernels import maps
from wan_core.kernels.maps import FusedNorms, fused_duplicates, fused_norms
from wan_core.kernels.trials import Trials

pytestmark = pytest.mark.usefixtures("without_gradients")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class OnCard(SimpleNamespace):
    """A weight that says it is on a card; trials are made on the CPU."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(is_cuda=True, device=torch.device("cpu"), dtype=dtype)


def use(monkeypatch: pytest.MonkeyPatch, function: Any, duplicate: Any = duplicated) -> None:
    found = None
    if function is not None:
        found = SimpleNamespace(scaled_silu=function, duplicated=duplicate)
    monkeypatch.setattr(maps, "map_kernels", lambda: found)
    monkeypatch.setattr(maps, "_trials", Trials("norms"))
    monkeypatch.setattr(maps, "_shortcuts", Trials("the shortcut"))


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


class MapOnCard:
    """A map that says it is on a card."""

    is_cuda = True

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.values, name)


def other_cell(y: Tensor, x: Tensor, repeats: int, times: int, space: int, skipped: int) -> None:
    duplicated(y, x.flip(1), repeats, times, space, skipped)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer", "times"), [(6, 6, 2), (6, 3, 1), (4, 8, 2)])
def test_the_shortcut_of_a_level(
    inner: int, outer: int, times: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D

    use(monkeypatch, scaled_silu)
    shortcut = DupUp3D(inner, outer, times, 2)
    x = torch.randn(1, inner, 1, 3, 4).to(dtype)
    for first in (True, False):
        more = shortcut(x, first_chunk=first)
        y = torch.randn(more.shape).to(dtype)
        found: Any = MapOnCard(y.clone())
        monkeypatch.setattr(maps, "_duplicate", partial(on_values, maps._duplicate))
        assert fused_duplicates(found, x, shortcut, first)
        assert torch.equal(found.values, y + more)
        assert not fused_duplicates(y, x, shortcut, first), "on a CPU"


def on_values(plain: Any, y: Any, *more: Any) -> None:
    plain(getattr(y, "values", y) if isinstance(y, MapOnCard) else y, *more)


@pytest.mark.parametrize("function", [other_cell, broken, lambda *_: None])
def test_a_trial_finds_a_wrong_shortcut(
    function: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D

    use(monkeypatch, scaled_silu, function)
    y = torch.zeros(1, 6, 2, 6, 8)
    found: Any = MapOnCard(y)
    with caplog.at_level("INFO"):
        assert not fused_duplicates(found, torch.ones(1, 6, 1, 3, 4), DupUp3D(6, 6, 2, 2), False)
    assert bool((y == 0).all()), "nothing was done"
    assert ("no C compiler" if function is broken else "other bits than torch's") in caplog.text
