"""Processes of a gang whose clocks and cards disagree on the kernels to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.formats import Storage
from wan_core.kernels import attention, choosing_with, codes, fused_trial, products
from wan_core.kernels.attention_ways import Way
from wan_core.kernels.trials import Trials
from wan_core.memory import AttentionTimes
from wan_core.workers.group import Choices

OWN = attention.OWN
Card = tuple[Sequence[float], Sequence[str]]
"""How long torch's attention, kernels "x" and "y", and products in 16 and in 8 bit take on a card;
and which of these, and of "norms" and "codes", do not work there."""


class OnCard(Tensor):
    """A tensor of the CPU that says it is on a card."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def broken(*_: Any) -> Tensor:
    raise RuntimeError("not on this card")


@contextmanager
def on_card(card: Card, folder: Path) -> Iterator[None]:
    """Have this process compute on such a card."""
    clock, lacks = card
    names = (OWN, "x", "y")
    times = dict(zip((*names, "16 bit", "8 bit"), clock, strict=True))

    def numbered(by: float) -> Any:
        return lambda *states: F.scaled_dot_product_attention(*states) * by

    # Each has numbers of its own, as kernels that round differently have.
    ways = {name: Way(numbered(1 + i / 2**10)) for i, name in enumerate(names)}
    ways |= {name: Way(broken) for name in names if name in lacks}
    runs = {id(way.run): name for name, way in ways.items()}
    weight = SimpleNamespace(
        bits=SimpleNamespace(is_cuda=True, device="cuda:0"),
        stored=Storage("fp8", "F8_E4M3", (64, 32), per="row"),
    )

    def right(*_: Any) -> bool:
        return "8 bit" not in lacks

    with (
        patch.multiple(
            attention,
            ways=lambda: ways,
            _chosen={},
            milliseconds=lambda call, _: times[runs[id(call.func)]],
            AttentionTimes=lambda: AttentionTimes(folder / "times.json"),
        ),
        patch.multiple(
            products,
            stored_weight=lambda _: weight,
            triton_kernels=object,
            _right=right,
            _pays=lambda *_: right() and times["8 bit"] < times["16 bit"],
            _trials=Trials("products"),
        ),
        patch.object(fused_trial, "_try_all", lambda _: fused_trial.Fused("norms" not in lacks)),
        patch.multiple(codes, _agrees=lambda *_: "codes" not in lacks, _trials=Trials("codes")),
        patch.multiple(torch.cuda, get_device_name=str, get_device_capability=lambda *_: (9, 0)),
    ):
        yield


def chosen(council: Any) -> tuple[str, bool, bool, bool, bytes]:
    """Return what is taken: attention, whether products and norms in 8 bit and fused norms are, and
    the bytes that attention gives."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, 4, 16, generator=generator).bfloat16() for n in (70, 50))
    query, key = query.as_subclass(OnCard), key.as_subclass(OnCard)
    hidden = torch.randn(1, 8, 512).as_subclass(OnCard)
    with choosing_with(council):
        for _ in range(2):  # as in the next block
            product = products.product_for(nn.Linear(32, 64), torch.bfloat16)
            norms = fused_trial.fused_for(hidden, 4).norms
            # As a block does: only who fuses norms asks whether they may write in 8 bit.
            coded = norms and codes.norms_to_codes(hidden, torch.int8, False)
            out = attention.attend(query, key, key)
    name = attention.used_attention()
    numbers = out.as_subclass(Tensor).contiguous().view(torch.int16)
    return name, product is not None, coded, norms, numbers.numpy().tobytes()


def choose(group: Any, device: str, rounds: Sequence[Sequence[Card]], folder: str) -> list[Any]:
    """Return what this process takes in each of some rounds, given a card for each rank, what it
    would take alone, and what it said."""
    made = []
    for number, cards in enumerate(rounds):
        said: list[str] = []
        council = Choices(group, lambda what: None, lambda *_: None, said.append)
        with on_card(cards[group.rank], Path(folder) / f"{number} {group.rank}"):
            alone = chosen(Choices(None, lambda what: None, lambda *_: None, said.append))
        with on_card(cards[group.rank], Path(folder) / f"{number} {group.rank} together"):
            made.append((chosen(council), alone, said))
    return made
