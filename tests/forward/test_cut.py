"""A forward that is cut along its tokens: the same bits, and exchanges beside products."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.lean_models import inputs_of, model_of
from support.thread_gang import Late, ThreadExchange, together
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_core.forward import Cut, cut_tokens, lean_forward

pytestmark = pytest.mark.usefixtures("without_gradients")
HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_for_heads_and_back(size: int, batch: int) -> None:
    whole = torch.arange(batch * 8 * 12.0).view(batch, 8, 12)
    each = 12 // size

    def work(among: ThreadExchange) -> None:
        cut = Cut(among)
        own = whole[:, cut.own(8)]
        arriving = cut.to_heads(own.clone())
        heads = arriving.wait()
        assert torch.equal(heads, whole[..., among.rank * each : (among.rank + 1) * each])
        assert torch.equal(cut.to_tokens(heads), own)

    together(size, work)


def test_what_was_sent_makes_way_for_the_copy_in_order() -> None:
    """A plan counts on it: of a batch of two, what came is copied."""
    sent, gone = list[weakref.ref[Any]](), list[bool]()

    class Alone:
        rank, size = 0, 2

        def begin_exchange(self, given: Tensor, parts: Tensor) -> Late:
            late = Late(lambda: None)
            sent.extend(weakref.ref(one) for one in (parts, late))
            return late

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.clone.default:
                gone.extend(one() is None for one in sent)
            return func(*args, **(kwargs or {}))

    arriving = Cut(Alone()).to_heads(torch.zeros(2, 4, 6))  # type: ignore[arg-type]
    with Copies():
        arriving.wait()
    assert gone == [True, True]


class Watched(ThreadExchange):
    """Notes when exchanges begin, and when they are waited for."""

    def __init__(self, among: ThreadExchange, note: Callable[[str], object]) -> None:
        super().__init__(among.meeting, among.rank)
        self._note = note

    def begin_exchange(self, given: Tensor, parts: Tensor) -> Late:
        # Of two, none sends itself anything.
        assert len(parts) == (1 if self.size == 2 else self.size)
        late = super().begin_exchange(given, parts)
        self._note("begin")

        def wait() -> None:
            self._note("wait")
            late.wait()

        return Late(wait)


def call_of(model: Any) -> dict[str, Any]:
    """A call of 80 tokens, which two or four processes can share."""
    call, g = inputs_of(model, torch.float32), torch.Generator().manual_seed(3)
    for name in ("hidden_states", "control_hidden_states"):
        if name in call:
            call[name] = torch.randn(1, call[name].shape[1], 5, 8, 8, generator=g)
    if call["timestep"].ndim == 2:
        call["timestep"] = torch.full((1, 80), 777.7)
        call["timestep"][:, :16] = 0  # the first frame is held
    return call


CASES = [
    ("wan2.1-t2v", 2, True), ("wan2.1-i2v", 4, True), ("wan2.2-ti2v-5b", 2, True),
    ("wan2.1-vace", 2, True), ("wan2.2-ti2v-5b", 4, False),
]  # fmt: skip
ORDER = [
    "v", "begin", "q", "wait", "begin", "k", "wait", "begin", "text", "wait",
    "begin", "wait", "out",
]  # fmt: skip
"""In the order of a block: v is on its way while q is projected, q while k is, k while the text's
keys are; only the output is waited for."""


@pytest.mark.parametrize(("family", "size", "exact"), CASES)
def test_what_leaves_is_waited_for_when_it_has_had_time(
    family: str, size: int, exact: bool
) -> None:
    """The bits of one process, whatever comes as late as it can."""
    numbers = HEADS | ({"added_kv_proj_dim": 64} if family == "wan2.1-i2v" else {})
    model = model_of(family, torch.float32, **numbers)
    call, mine, seen = call_of(model), list[int](), list[str]()
    with lean_forward(model, exact=exact, rows=32):
        expected = model(**call)[0]
    attn, cross = model.blocks[-1].attn1, model.blocks[-1].attn2
    layers = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "out": attn.to_out[0]}
    layers["text"] = cross.to_k

    def note(word: str) -> None:
        if threading.get_ident() in mine:
            seen.append(word)

    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: note(name))

    def work(among: ThreadExchange) -> Tensor:
        if among.rank == 0:
            mine.append(threading.get_ident())
        with lean_forward(model, exact=exact, rows=32) as reason:
            assert reason is None
            with cut_tokens(model, Watched(among, note)):
                made: Tensor = model(**call)[0]
        return made

    assert all(torch.equal(made, expected) for made in together(size, work))
    blocks = len(model.blocks) + len(getattr(model, "vace_blocks", ()))
    assert seen.count("begin") == seen.count("wait") == 4 * blocks
    if exact:
        assert seen[-len(ORDER) :] == ORDER
