"""The fastest attention: by the clock, checked against torch's choice, asked for once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lean_models import inputs_of, model_of
from torch import Tensor

from wan_core.forward import block as block_module
from wan_core.forward import lean_forward
from wan_core.kernels import attention


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_chosen", {})
    with torch.no_grad():
        yield


def states() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, 4, 16, generator=generator).bfloat16() for n in (70, 50, 50)]


def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value) * 1.1


def broken(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("not on this card")


def noisy(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value)
    out[:, 2] = torch.randn_like(out[:, 2])  # one head is noise
    return out


OWN = F.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({"cuDNN": (OWN, 5.0), "flash": (OWN, 7.0)}, "cuDNN"),
        ({"cuDNN": (OWN, 9.9)}, attention.OWN),  # not worth other bits
        ({"cuDNN": (OWN, 12.0)}, attention.OWN),
        ({"cuDNN": (wrong, 1.0), "flash": (OWN, 8.0)}, "flash"),
        ({"cuDNN": (broken, 1.0), "flash": (noisy, 2.0)}, attention.OWN),
    ],
)
def test_the_fastest_that_agrees(
    others: dict[str, tuple[Callable[..., Tensor], float]], chosen: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """torch's choice takes 10 ms here."""
    table = {attention.OWN: (OWN, 10.0), **others}
    calls = {name: one for name, (one, _) in table.items()}
    times = iter([taken for one, taken in table.values() if one is OWN])
    monkeypatch.setattr(attention, "CANDIDATES", calls)
    monkeypatch.setattr(attention, "milliseconds", lambda call, runs: next(times))
    query, key, _ = states()
    with caplog.at_level("INFO"):
        assert attention._fastest(query, key) == chosen
    assert f"{chosen} is used" in caplog.text and "[1, 70, 4, 16]" in caplog.text


def test_a_cpu_keeps_torch_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_fastest", None)  # not asked
    query, key, value = states()
    expected = OWN(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    assert torch.equal(attention.attend(query, key, value), expected)


def test_each_shape_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []

    class Card:
        is_cuda, dtype, device = True, torch.bfloat16, "cuda:0"

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    def fastest(query: Any, key: Any) -> str:
        timed.append((query.shape, key.shape))
        return "flash"

    monkeypatch.setattr(attention, "_fastest", fastest)
    long, short = Card(1, 70, 4, 16), Card(1, 50, 4, 16)
    asked: list[Any] = [(long, long), (long, short), (long, long), (short, short)]
    assert {attention.chosen_for(*pair) for pair in asked} == {"flash"}
    assert len(timed) == 3


@pytest.mark.parametrize("exact", [True, False])
def test_a_block_asks_only_if_it_may_round(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where the user has set a backend of diffusers."""
    model = model_of("wan2.1-i2v", torch.float32)
    call = inputs_of(model, torch.float32)
    ran: list[tuple[int, ...]] = []
    plain = attention.attend

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ran.append(tuple(query.shape))
        return plain(query, key, value)

    monkeypatch.setattr(block_module, "attend", counted)
    expected = model(**call)[0]
    with lean_forward(model, exact=exact):
        model(**call)
    assert not ran
    with lean_forward(model, exact=exact, quick=True):
        out = model(**call)[0]
    assert (out - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert len(ran) >= 3 * len(model.blocks)  # itself, the image, the text
    for block in model.blocks:
        for attn in (block.attn1, block.attn2):
            attn.processor._attention_backend = "native"
    ran.clear()
    with lean_forward(model, quick=True):
        model(**call)
    assert not ran
