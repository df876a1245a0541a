"""Placement gives the same bits, and leaves nothing behind: after success, errors, interrupts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from support.placed_models import Interrupted, run_text, state_of, text_encoder, transformer, vae
from torch import nn

from wan_core.errors import InvalidRequest, MissingDependency
from wan_core.loading.moving import Undo, remember
from wan_core.placing.offload import MODES, block_hooks, occupy, place, require_groups

Call = Callable[[], torch.Tensor]


def run_transformer(model: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    out: torch.Tensor = model(
        hidden_states=torch.randn(1, 16, 3, 4, 4, generator=g),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 16, 32, generator=g),
        return_dict=False,
    )[0]
    return out


def run_vae(model: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    out: torch.Tensor = model.decode(torch.randn(1, 16, 3, 2, 2, generator=g)).sample
    return out


COMPONENTS = {
    "transformer": (transformer, run_transformer),
    "text_encoder": (text_encoder, run_text),
    "vae": (vae, run_vae),
}


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_and_nothing_left(component: str, mode: str) -> None:
    make, call = COMPONENTS[component]
    module = make()
    with torch.no_grad():
        expected = call(module)
        before = state_of(module)
        for _ in range(2):
            with place(module, mode, "cpu") as placed:
                assert placed is module
                assert torch.equal(call(module), expected)
            assert state_of(module) == before
        assert torch.equal(call(module), expected)


def test_sequential_really_takes_the_weights_off() -> None:
    module = transformer()
    with place(module, "sequential", "cpu"):
        assert all(p.device.type == "meta" for p in module.parameters())
        assert module.rope.freqs_cos.device.type == "cpu"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
def test_nothing_left_after_an_error_inside_a_block(mode: str, error: type[BaseException]) -> None:
    module = transformer()
    with torch.no_grad():
        expected = run_transformer(module)
        before = state_of(module)
        seen: list[int] = []

        def stop() -> None:
            seen.append(1)
            if len(seen) == 2:
                raise error("stop")

        with (
            pytest.raises(error, match="stop"),
            place(module, mode, "cpu"),
            block_hooks(module, stop),
        ):
            run_transformer(module)
        assert len(seen) == 2
        assert state_of(module) == before
        assert torch.equal(run_transformer(module), expected)


class Fake(nn.Module):
    """A module with a tied parameter and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.second.bias = self.first.bias
        self.register_buffer("table", torch.ones(3), persistent=False)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make moving visible without a second device: what is sent becomes a copy, and is counted.

    With a number put into the list, that transfer fails as a full device does.
    """
    fail_at: list[int] = []
    calls: list[int] = []

    def send(tensor: torch.Tensor, device: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) in fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor.clone()

    monkeypatch.setattr("wan_core.loading.moving._sent", send)
    return fail_at


def addresses(module: nn.Module) -> list[int]:
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("fail_at", [1, 3, 4])
@pytest.mark.parametrize("mode", ["none", "model"])
def test_a_move_that_fails_half_way_moves_nothing(
    mode: str, fail_at: int, elsewhere: list[int]
) -> None:
    module = Fake()
    before = state_of(module)
    elsewhere.append(fail_at)
    with pytest.raises(torch.OutOfMemoryError), place(module, mode, "cpu"):
        pass
    assert state_of(module) == before
    with place(module, "model", "cpu"):  # the module is free again
        pass


def test_model_mode_moves_and_puts_the_host_tensors_back(elsewhere: list[int]) -> None:
    module = Fake()
    before, home = state_of(module), addresses(module)
    with place(module, "model", "cpu"):
        assert set(addresses(module)).isdisjoint(home)
        assert module.second.bias is module.first.bias
    assert state_of(module) == before


def test_a_shared_placement_lasts_until_its_last_user(elsewhere: list[int]) -> None:
    module = Fake()
    home = addresses(module)
    with place(module, "model", "cpu"):
        moved = addresses(module)
        with place(module, "model", "cpu"):
            assert addresses(module) == moved
        assert addresses(module) == moved
    assert addresses(module) == home


def test_none_mode_stays(elsewhere: list[int]) -> None:
    module = Fake()
    home, names = addresses(module), [id(p) for p in module.parameters()]
    with place(module, "none", "cpu"):
        moved = addresses(module)
    assert set(moved).isdisjoint(home)
    assert addresses(module) == moved
    assert [id(p) for p in module.parameters()] == names


@pytest.mark.parametrize("mode", ["model", "sequential", "group"])
def test_what_none_left_on_the_device_ends_on_the_host(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a card; what is sent to it is a copy with that name."""
    at: dict[int, torch.device] = {}

    def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        copy = tensor.clone()
        at[copy.data_ptr()] = torch.device(device)
        return copy

    def found(module: nn.Module) -> torch.device:
        return at.get(next(module.parameters()).data_ptr(), torch.device("cpu"))

    monkeypatch.setattr("wan_core.loading.moving._sent", send)
    monkeypatch.setattr("wan_core.placing.offload.device_of", found)
    for hooks in ("_attach_sequential", "_attach_group"):  # the libraries' own know no such card
        monkeypatch.setattr(
            f"wan_core.placing.offload.{hooks}", lambda undo, module, device: remember(undo, module)
        )
    module = Fake()
    with place(module, "none", "meta"):
        pass
    assert {at[address].type for address in addresses(module)} == {"meta"}
    with place(module, mode, "meta"):
        pass
    assert {at[address].type for address in addresses(module)} == {"cpu"}


@pytest.mark.parametrize(
    ("version", "gpu", "refused"),
    [
        ("0.35.2", False, True), ("0.40.0", False, True), ("0.41.0", False, False),
        ("0.42.0.dev0", False, False), ("1.0.0", False, False), ("0.35.2", True, False),
    ],
)  # fmt: skip
def test_group_offload_says_what_it_needs(
    version: str, gpu: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 0.41 diffusers asks an accelerator that is not there for its type."""
    device = torch.device("cuda") if gpu else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    monkeypatch.setattr(diffusers, "__version__", version)
    module = transformer()
    before = state_of(module)
    if refused:
        with pytest.raises(MissingDependency, match=f"0.41 or newer.*{version}.*offload 'auto'"):
            require_groups()
        with pytest.raises(MissingDependency), place(module, "group", "cpu"):
            pass
    else:
        require_groups()
    assert state_of(module) == before


def test_unknown_mode_is_named() -> None:
    with (
        pytest.raises(InvalidRequest, match="'disk'.*none, model, sequential"),
        place(Fake(), "disk", "cpu"),
    ):
        pass


def test_undo_runs_all_in_reverse_and_keeps_the_first_error() -> None:
    order: list[int] = []

    def step(number: int, error: BaseException | None = None) -> Call:
        def run() -> Any:
            order.append(number)
            if error:
                raise error

        return run

    with pytest.raises(ValueError, match="body") as caught, Undo() as undo:
        undo.push(step(1))
        undo.push(step(2, RuntimeError("two")))
        undo.push(step(3, RuntimeError("three")))
        raise ValueError("body")
    assert order == [3, 2, 1]
    assert [note.split(": ")[-1] for note in caught.value.__notes__] == ["three", "two"]

    with pytest.raises(RuntimeError, match="three") as alone, Undo() as undo:
        undo.push(step(2, RuntimeError("two")))
        undo.push(step(3, RuntimeError("three")))
    assert alone.value.__notes__ == ["While detaching: RuntimeError: two"]


def test_undo_never_swallows_an_interrupt() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def fail() -> None:
        raise RuntimeError("detach")

    with pytest.raises(KeyboardInterrupt), Undo() as undo:
        undo.push(interrupt)
        undo.push(fail)
        raise ValueError("body")
    with pytest.raises(Interrupted), Undo() as undo:
        undo.push(fail)
        raise Interrupted


def test_a_hook_that_fails_to_detach_does_not_keep_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = transformer()
    before = state_of(module)
    with pytest.raises(RuntimeError, match="broken hook"), place(module, "sequential", "cpu"):
        hook = module.blocks[1].attn1.to_q._hf_hook
        monkeypatch.setattr(hook, "detach_hook", _raise_broken)
    monkeypatch.undo()
    assert state_of(module) == before


def _raise_broken(module: nn.Module) -> None:
    raise RuntimeError("broken hook")


def test_two_threads_share_or_wait() -> None:
    module = transformer()
    with torch.no_grad():
        expected = run_transformer(module)
    before = state_of(module)
    results: list[bool] = []
    active: list[str] = []

    def work(mode: str) -> None:
        for _ in range(4):
            with torch.no_grad(), place(module, mode, "cpu"):
                active.append(mode)
                if mode == "sequential" and active.count(mode) > 1:
                    results.append(False)
                results.append(torch.equal(run_transformer(module), expected))
                active.remove(mode)

    threads = [
        threading.Thread(target=work, args=(mode,))
        for mode in ("sequential", "sequential", "model", "model", "none")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 20
    assert state_of(module) == before


def test_asking_for_two_placements_at_once_is_an_error_not_a_deadlock() -> None:
    module = Fake()
    with (
        place(module, "none", "cpu"),
        place(module, "none", "cpu"),
        pytest.raises(RuntimeError, match="already placed as 'none on cpu'"),
        place(module, "model", "cpu"),
    ):
        pass


def test_block_hooks_fire_per_block_and_only_for_their_thread() -> None:
    module = transformer()
    mine: list[int] = []
    others: list[int] = []

    def other() -> None:
        with torch.no_grad(), block_hooks(module, lambda: others.append(1)):
            run_transformer(module)

    with block_hooks(module, lambda: mine.append(1)), torch.no_grad():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (len(mine), len(others)) == (0, 3)
        run_transformer(module)
    assert (len(mine), len(others)) == (3, 3)
    assert not any(block._forward_pre_hooks for block in module.blocks)


def test_what_an_attach_had_attached_when_it_failed_is_taken_off() -> None:
    module, done = Fake(), []

    def attach(undo: Undo) -> None:
        undo.push(lambda: done.append("off"))
        raise RuntimeError("half way")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="half way"), occupy(module, "x", attach, False):
            done.append("inside")
    assert done == ["off", "off"]
    with place(module, "model", "cpu"):  # the module is free
        pass
    assert done == ["off", "off"]
