"""The component cache: what it counts as RAM, and when it makes room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wan_core.files import file_identity
from wan_core.formats.open import read_table
from wan_core.loading import cache as room
from wan_core.loading.cache import ComponentCache, ComponentKey
from wan_core.loading.reader import TensorReader
from wan_core.models.names import Source

GIB = 2**30


def key(kind: str) -> ComponentKey:
    return ComponentKey(kind, (), "fp32")


def linear() -> nn.Module:
    return nn.Linear(8, 8, bias=False)


@pytest.mark.parametrize(("available", "kept"), [(3 * GIB, 2), (GIB, 1)])
def test_room_is_made_within_what_the_container_leaves(
    available: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ComponentCache()
    with cache.borrow(key("vae"), GIB, linear):
        pass
    monkeypatch.setattr(room, "ram", lambda: (4 * GIB, available, ()))
    with cache.borrow(key("transformer"), GIB, linear):
        assert len(cache.loaded()) == kept


@pytest.mark.parametrize("mapped", [False, True])
def test_views_of_a_mapped_file_are_not_ram_that_could_be_freed(
    tmp_path: Path, mapped: bool
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(8, 8)}, path)

    def build() -> nn.Module:
        module = linear()
        with TensorReader(read_table(path), mapped=mapped) as reader:
            module.weight = nn.Parameter(reader.read(Source("weight"), (8, 8)))
        module.register_buffer("table", torch.ones(4))
        return module

    cache = ComponentCache()
    with cache.borrow(key("transformer"), 256, build) as module:
        assert cache.unused_bytes("cuda:0") == (0, 0), "it is in use"
    assert cache.unused_bytes("cuda:0") == (0, 16 if mapped else 272)
    module.weight.data = module.weight.data.clone()  # as coming back from a device makes it
    assert cache.unused_bytes("cuda:0") == (0, 272)
    assert cache.unused_bytes("cpu") == (0, 272)


def from_file(cache: ComponentCache, path: Path, *, mapped: bool) -> nn.Module:
    """Have a component of a file in the cache, as if a render had used it."""
    save_file({"weight": torch.ones(8, 8)}, path)

    def build() -> nn.Module:
        module = linear()
        with TensorReader(read_table(path), mapped=mapped) as reader:
            module.weight = nn.Parameter(reader.read(Source("weight"), (8, 8)), requires_grad=False)
        return module

    found = ComponentKey("transformer", (file_identity(path),), "fp32")
    with cache.borrow(found, 256, build) as module:
        assert isinstance(module, nn.Module)
        return module


def test_what_lies_in_its_file_is_let_go_without_being_forgotten(tmp_path: Path) -> None:
    cache, path = ComponentCache(), tmp_path / "w.safetensors"
    module = from_file(cache, path, mapped=True)
    cache.let_go_soon({file_identity(path).path})
    assert [found for _, found in cache.loaded()] == [module]
    assert cache.unused_bytes("cuda:0") == (0, 0)
    assert torch.equal(module.weight, torch.ones(8, 8))
    assert from_file(cache, path, mapped=True) is not module, "the file was written again"
    cache.drop({file_identity(path).path})
    assert not cache.loaded(), "who wants it forgotten is obeyed"


def test_what_takes_memory_is_dropped_when_it_is_let_go(tmp_path: Path) -> None:
    cache, path = ComponentCache(), tmp_path / "w.safetensors"
    from_file(cache, path, mapped=False)
    cache.let_go_soon({file_identity(path).path})
    assert not cache.loaded()


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    cache = ComponentCache()
    paths = [tmp_path / f"{number}.safetensors" for number in range(room._MAPPED_KEPT + 2)]
    modules = [from_file(cache, path, mapped=True) for path in paths]
    for path in paths:
        cache.let_go_soon({file_identity(path).path})
    assert [found for _, found in cache.loaded()] == modules[2:]
    # One that is asked for again is in use like any other, and does not count.
    last = ComponentKey("transformer", (file_identity(paths[2]),), "fp32")
    with cache.borrow(last, 256, linear) as module:
        assert module is modules[2]
    more = tmp_path / "more.safetensors"
    from_file(cache, more, mapped=True)
    cache.let_go_soon({file_identity(more).path})
    assert len(cache.loaded()) == room._MAPPED_KEPT + 1
