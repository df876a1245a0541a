"""Weights that ComfyUI may ask for back at any time, from any thread, while others come and go."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.as_pack import part

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def nothing_left(pack: ModuleType) -> Iterator[None]:
    yield
    part(pack, "wan_core.loading").component_cache().clear()


class Pipeline:
    """What holds a lease; a circle, as ComfyUI's old output caches are."""

    def __init__(self, pack: ModuleType, name: str) -> None:
        self.files = frozenset({f"/nowhere/{name}"})
        self.lease = part(pack, "nodes.lease").WeightsLease(None, self.files, {})
        self.itself = self


def use(pack: ModuleType, name: str) -> Any:
    """Take part in a render: borrow a component of this name, built if need be."""
    files, cache = part(pack, "wan_core.files"), part(pack, "wan_core.loading.cache")
    identity = files.FileIdentity(f"/nowhere/{name}", 1, 1)
    key = cache.ComponentKey("transformer", (identity,), "fp32")
    with cache.component_cache().borrow(key, 1, lambda: torch.nn.Linear(16, 16)) as module:
        return module


def test_weights_go_with_the_last_lease(pack: ModuleType) -> None:
    loaded = part(pack, "nodes.lease").loaded_bytes
    first, second = Pipeline(pack, "a"), Pipeline(pack, "a")
    files = first.files
    use(pack, "a")
    del first
    gc.collect()
    assert loaded(files) == 4 * (16 * 16 + 16)
    del second
    gc.collect()
    assert loaded(files) == 0


def test_what_two_checkpoints_share_counts_once(pack: ModuleType) -> None:
    """As an encoder that both name: ComfyUI adds up what each entry of its list tells."""
    loaded = part(pack, "nodes.lease").loaded_bytes
    for name in ("a", "b", "shared"):
        use(pack, name)
    one, files = 4 * (16 * 16 + 16), [frozenset({f"/nowhere/{x}", "/nowhere/shared"}) for x in "ab"]
    assert loaded(files[0]) == loaded(files[1]) == 2 * one
    assert loaded(files[1], None, files[0]) == one
    assert loaded(files[0] | files[1]) == loaded(files[0]) + loaded(files[1], None, files[0])
    assert loaded(files[0], None, files[0]) == 0


def test_a_lease_that_ends_in_the_middle_of_a_look_at_the_cache(pack: ModuleType) -> None:
    """Its finalizer runs in the thread that is in the middle of the entries."""
    cache = part(pack, "wan_core.loading").component_cache()
    pipelines = [Pipeline(pack, name) for name in "ab"]
    files = pipelines[0].files
    for name in "ab":
        use(pack, name)
    with cache._held():
        for _ in cache._entries.items():  # as any method goes through them
            pipelines.clear()
            gc.collect()
        assert len(cache._entries) == 2
    assert part(pack, "nodes.lease").loaded_bytes(files) == 0
    assert cache.loaded() == []


def test_a_finalizer_never_waits_for_another_thread(pack: ModuleType) -> None:
    """One thread looks at the cache while another, which has to do with leases, waits for it."""
    cache = part(pack, "wan_core.loading").component_cache()
    lease = part(pack, "nodes.lease")
    pipelines = [Pipeline(pack, "a")]
    use(pack, "a")
    looking, leasing = threading.Event(), threading.Event()

    def looks_at_the_cache() -> None:
        with cache._held():
            looking.set()
            assert leasing.wait(60)
            pipelines.clear()
            gc.collect()

    def waits_for_the_cache() -> None:
        assert looking.wait(60)
        with lease._lock:
            leasing.set()
            cache.loaded()

    both = (looks_at_the_cache, waits_for_the_cache)
    threads = [threading.Thread(target=one, daemon=True) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert cache.loaded() == []


def test_no_garbage_is_collected_while_comfyui_frees_memory(pack: ModuleType) -> None:
    """ComfyUI takes models that are collected out of the list it is walking through."""
    use(pack, "a")
    waiting = Pipeline(pack, "b")
    collected = threading.Event()
    waiting.bell = Bell(collected)  # type: ignore[attr-defined]
    files = frozenset({"/nowhere/a"})
    gc.disable()
    try:
        del waiting
        assert part(pack, "nodes.lease").unload(files, CPU) > 0
        assert not collected.is_set()
        gc.collect()
        assert collected.is_set()
    finally:
        gc.enable()


class Bell:
    def __init__(self, rung: threading.Event) -> None:
        self.rung = rung

    def __del__(self) -> None:
        self.rung.set()


def test_many_threads_at_once(pack: ModuleType, tmp_path: Path) -> None:
    """Renders, ComfyUI's looks and evictions, leases that end, files that are mapped."""
    lease, loading = part(pack, "nodes.lease"), part(pack, "wan_core.loading")
    mapped = part(pack, "wan_core.loading.mapped")
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(64)}, path)
    files = frozenset({"/nowhere/a", "/nowhere/b"})
    cache, errors, stop = loading.component_cache(), [], threading.Event()

    def map_it() -> None:
        with path.open("rb", buffering=0) as file:
            assert mapped.is_mapped(mapped.map_file(file).view(0, 8, torch.uint8))

    def leases() -> None:
        pipeline = Pipeline(pack, "a")
        use(pack, "a")
        del pipeline
        gc.collect(0)

    def again(action: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                action()
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    actions: list[Callable[[], object]] = [
        lambda: use(pack, "b"),
        lambda: lease.loaded_bytes(files),
        lambda: lease.unload(files, CPU, 1),
        lambda: lease.unload(files, META, 1),
        lambda: cache.unused_bytes("cuda:0"),
        leases,
        map_it,
    ]
    threshold = gc.get_threshold()
    gc.set_threshold(20)
    threads = [threading.Thread(target=again, args=[action], daemon=True) for action in actions]
    try:
        for thread in threads:
            thread.start()
        time.sleep(1.0)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
        gc.set_threshold(*threshold)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    gc.collect()
    assert lease.loaded_bytes(frozenset({"/nowhere/a"})) == 0
