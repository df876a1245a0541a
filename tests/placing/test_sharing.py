"""Weights that a gang streams together: each copies its part, and the bits are those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import shared_streams
from support.lean_models import inputs_of, model_of
from support.thread_gang import ThreadExchange, together

from wan_core.placing import Sharing, stream_blocks

LAYERS = 5
pytestmark = pytest.mark.usefixtures("without_gradients")


class Stopped(Exception):
    """Ends a forward between two blocks."""


def calls_of(model: Any) -> list[dict[str, Any]]:
    calls = []
    for seed in range(4):
        call = inputs_of(model, torch.float32, seed=seed)
        call["hidden_states"] = call["hidden_states"][:, :, :2, :4, :4]
        call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :8]
        calls.append(call)
    return calls


@pytest.mark.parametrize(
    ("size", "resident", "buffers"),
    [(2, 0, 2), (2, 1, 3), (3, 2, 2), (2, 0, 1), (2, 4, 2), (2, 5, 2)],
)
def test_a_gang_copies_each_block_once_and_keeps_the_bits(
    size: int, resident: int, buffers: int
) -> None:
    """Two units together, one alone, one that all leave at block 3, and another together."""
    models = [model_of("wan2.1-t2v", torch.float32, num_layers=LAYERS) for _ in range(size)]
    calls = calls_of(models[0])
    expected = [models[0](**call)[0] for call in calls]

    def work(among: ThreadExchange) -> tuple[list[bool], list[int]]:
        model, sharing, found, copied = models[among.rank], Sharing(among), [], [0]
        with stream_blocks(
            model, "cpu", resident_blocks=resident, buffers=buffers, sharing=sharing
        ):

            def compute(number: int, together: bool = True) -> None:
                sharing.begin(together=together)
                found.append(torch.equal(model(**calls[number])[0], expected[number]))
                copied.append(sharing.copied_bytes)

            compute(0)
            compute(1)
            if among.rank == 0:
                compute(2, together=False)

            def stop(*_: object) -> None:
                raise Stopped

            sharing.begin(together=True)
            handle = model.blocks[3].register_forward_pre_hook(stop)
            with pytest.raises(Stopped):
                model(**calls[2])
            handle.remove()
            compute(3)
        return found, copied

    results = together(size, work)
    assert all(all(found) for found, _ in results)
    assert [len(found) for found, _ in results] == [4] + [3] * (size - 1)
    if resident == LAYERS:
        return
    # In a step together each copies its part: one n-th, rounded to 256 bytes for each block.
    block = sum(-(-p.nbytes // 256) * 256 for p in models[0].blocks[0].parameters())
    steady = [copied[2] - copied[1] for _, copied in results]
    streamed = LAYERS - resident
    if streamed > buffers:
        assert sum(steady) == streamed * block
        assert max(steady) - min(steady) <= streamed * size * 256
    # Alone it copies all, and once more what the buffers held in parts.
    alone = results[0][1][3] - results[0][1][2]
    assert alone >= streamed * block if streamed > buffers else alone >= block


@pytest.mark.parametrize("again", [0, 1])
def test_a_rank_whose_weights_were_put_in_their_place_again(again: int) -> None:
    """What its buffers hold is whole, what those of the others hold is a part: all begin anew."""
    models = [model_of("wan2.1-t2v", torch.float32, num_layers=LAYERS) for _ in range(2)]
    calls = calls_of(models[0])
    expected = [models[0](**call)[0] for call in calls]

    def work(among: ThreadExchange) -> list[bool]:
        model, found = models[among.rank], []

        def compute(sharing: Sharing, numbers: list[int]) -> None:
            for number in numbers:
                sharing.begin(together=True)
                found.append(torch.equal(model(**calls[number])[0], expected[number]))

        first = [0] if among.rank == again else [0, 1, 2]
        sharing = Sharing(among)
        with stream_blocks(model, "cpu", buffers=2, sharing=sharing):
            compute(sharing, first)
        if among.rank == again:
            sharing = Sharing(among)
            with stream_blocks(model, "cpu", buffers=2, sharing=sharing):
                compute(sharing, [1, 2])
        return found

    assert together(2, work) == [[True] * 3] * 2


def test_a_rank_that_leaves_breaks_the_gather_of_the_others_off() -> None:
    """Nobody waits for a part that does not come."""
    models = [model_of("wan2.1-t2v", torch.float32, num_layers=LAYERS) for _ in range(2)]
    call = calls_of(models[0])[0]

    def work(among: ThreadExchange) -> None:
        sharing = Sharing(among)
        with stream_blocks(models[among.rank], "cpu", buffers=2, sharing=sharing):
            sharing.begin(together=True)
            if among.rank == 1:
                raise MemoryError("this one has none left")
            models[among.rank](**call)

    with pytest.raises(MemoryError, match="this one"):
        together(2, work)
    for model in models:
        assert all(p.device.type == "cpu" and not p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "resident", "buffers", "late"),
    [(2, 0, 2, True), pytest.param(4, 1, 3, False, marks=pytest.mark.slow)],
)
def test_stored_kinds_loras_and_blocks_of_unequal_size(
    tmp_path: Path, size: int, resident: int, buffers: int, late: bool
) -> None:
    """fp8, int8, GGUF and bf16 in one model, of which the gang computes a cut forward: the parts of
    no block are of equal size, and the last one of some is shorter."""
    lora = tmp_path / "lora.safetensors"
    shared_streams.write_lora(lora)
    models = [shared_streams.mixed_model() for _ in range(size)]

    def work(among: ThreadExchange) -> dict[str, Any]:
        model = models[among.rank]
        given = ("cpu", str(lora), resident, buffers)
        return shared_streams.units(among, *given, model=model, late=late)

    results = together(size, work)
    assert [one["equal"] for one in results] == [[True] * 4] + [[True] * 3] * (size - 1)
    steady = [one["copied"][1] - one["copied"][0] for one in results]
    assert sum(steady) == shared_streams.most_bytes(resident) and len(set(steady)) > 1
    for one in results:
        assert one["at_once"] is not late
        held: dict[int, int] = {}
        for what, block, buffer in one["events"]:  # what was given up is not gathered
            if what == "load":
                held[buffer] = block
            assert what != "gather" or held[buffer] == block


@pytest.mark.parametrize("slow", [None, 1])
def test_a_block_is_gathered_while_the_one_before_computes(slow: int | None) -> None:
    """Where a process first has to bring a copy into page-locked memory, none begins at once: all
    of them begin their gathers at the same places of the forward."""
    models = [model_of("wan2.1-t2v", torch.float32, num_layers=LAYERS) for _ in range(2)]
    call = calls_of(models[0])[0]
    expected = models[0](**call)[0]

    def work(among: ThreadExchange) -> tuple[bool, list[tuple[str, int]]]:
        model, sharing = models[among.rank], Sharing(among)
        events: list[tuple[str, int]] = []

        def note(what: str, block: int, buffer: int) -> None:
            events.append((what, block))

        with stream_blocks(model, "cpu", sharing=sharing, events=note):
            sharing._can_at_once = among.rank != slow
            sharing.begin(together=True)
            model(**call)
            events.clear()
            return torch.equal(model(**call)[0], expected), events

    (first, events), (second, others) = together(2, work)
    assert first and second and events == others
    for block in range(1, LAYERS):  # what belongs to the first began in the forward before
        after = (block + 1) % LAYERS
        begun = [("load", after), ("gather", after), ("use", block)]
        if slow is not None:
            begun = [("gather", block), ("load", after), ("use", block)]
        first_of = events.index(begun[0])
        assert events[first_of : first_of + 3] == begun
