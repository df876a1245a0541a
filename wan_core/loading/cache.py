"""Loaded components, shared between everything in the process that asks for the same files.

Two pipelines that name the same text encoder or VAE file get the same module. A component is
known by path, size and modification time of its files, its dtype and its options; a file that
changed on disk is read again. Components stay until ``clear`` or until room in RAM is needed.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import FileIdentity, file_identity
from ..memory import RAM_RESERVE, ram
from ..models import Component

_TEXTS_KEPT = 32


@dataclass(frozen=True, slots=True)
class ComponentKey:
    """What makes two requests for a component the same."""

    kind: str
    files: tuple[FileIdentity, ...]
    dtype: str
    options: Hashable = ()


@dataclass(slots=True)
class _Entry:
    module: Any
    nbytes: int
    users: int = 0


def component_key(component: Component, dtype: str, options: Hashable = ()) -> ComponentKey:
    """Identify a component by its files on disk now, its dtype and its options."""
    files: list[Path] = list(component.files)
    config = component.path / "config.json"
    if component.path.is_dir() and config.is_file():
        files.append(config)
    identities = tuple(file_identity(path) for path in files) or (_folder_identity(component),)
    return ComponentKey(component.kind, identities, dtype, options)


def _folder_identity(component: Component) -> FileIdentity:
    """Identify a part without weights (tokenizer) by its newest file."""
    inside = [path for path in component.path.rglob("*") if path.is_file()]
    newest = max(inside, key=lambda path: path.stat().st_mtime_ns, default=component.path)
    return file_identity(newest)


class ComponentCache:
    """Modules by key, least recently used first. Safe to use from several threads.

    ``render_lock`` is held by a render from start to end: two at once would each take the memory
    that the other's plan counts on.
    """

    def __init__(self) -> None:
        self.render_lock = threading.RLock()
        # Taken after render_lock, never before it; held while a component is being read.
        self._lock = threading.RLock()
        self._entries: OrderedDict[ComponentKey, _Entry] = OrderedDict()
        self._texts: OrderedDict[Hashable, Any] = OrderedDict()

    @contextmanager
    def borrow(
        self, key: ComponentKey, nbytes: int, build: Callable[[], Any], *, keep: bool = True
    ) -> Iterator[Any]:
        """Yield the module of ``key``, building it if it is not there; in use, it is not evicted.

        ``nbytes`` is about what it takes in RAM. ``keep=False`` drops it after use.
        """
        entry = self._take(key, nbytes, build)
        try:
            yield entry.module
        finally:
            with self._lock:
                entry.users -= 1
                if not keep and entry.users == 0 and self._entries.get(key) is entry:
                    del self._entries[key]

    def _take(self, key: ComponentKey, nbytes: int, build: Callable[[], Any]) -> _Entry:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._drop_stale(key)
                self._make_room(nbytes)
                entry = _Entry(build(), nbytes)
                self._entries[key] = entry
            self._entries.move_to_end(key)
            entry.users += 1
            return entry

    def _drop_stale(self, key: ComponentKey) -> None:
        """Forget older versions of the same files: they can never be asked for again."""
        paths = {identity.path for identity in key.files}
        for old in [k for k in self._entries if k.kind == key.kind and k.files != key.files]:
            if paths & {identity.path for identity in old.files}:
                del self._entries[old]

    def _make_room(self, nbytes: int) -> None:
        unused = [key for key, entry in self._entries.items() if entry.users == 0]
        for key in unused:
            _, available, _ = ram()
            if available >= nbytes + RAM_RESERVE:
                return
            del self._entries[key]
            gc.collect()

    def get_text(self, key: Hashable) -> Any | None:
        """Return the embeddings stored under ``key``, or None."""
        with self._lock:
            if key not in self._texts:
                return None
            self._texts.move_to_end(key)
            return self._texts[key]

    def put_text(self, key: Hashable, embeddings: Any) -> None:
        """Store embeddings; the least recently used of more than 32 are forgotten."""
        with self._lock:
            self._texts[key] = embeddings
            while len(self._texts) > _TEXTS_KEPT:
                self._texts.popitem(last=False)

    def loaded(self) -> list[tuple[ComponentKey, Any]]:
        """Return the keys and modules that are loaded, least recently used first."""
        with self._lock:
            return [(key, entry.module) for key, entry in self._entries.items()]

    def nbytes(self) -> int:
        """Return about how many bytes the loaded components take."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def unused_bytes(self, device: str) -> tuple[int, int]:
        """Return the bytes that components not in use hold on ``device`` and in RAM.

        Views of a mapped file are not among those in RAM: the system calls them available already.
        """
        from .reader import is_mapped

        on_device = in_ram = 0
        with self._lock:
            for entry in self._entries.values():
                if entry.users or not hasattr(entry.module, "parameters"):
                    continue
                for tensor in (*entry.module.parameters(), *entry.module.buffers()):
                    if is_mapped(tensor):
                        continue
                    if str(tensor.device) == device:
                        on_device += tensor.nbytes
                    elif tensor.device.type == "cpu":
                        in_ram += tensor.nbytes
        return (0, on_device) if device == "cpu" else (on_device, in_ram)

    def release_device(self) -> int:
        """Move every component that is not in use to the CPU; return how many were moved."""
        from .moving import move

        moved = 0
        with self._lock:
            for entry in self._entries.values():
                tensor = next(iter(getattr(entry.module, "parameters", tuple)()), None)
                if entry.users == 0 and tensor is not None and tensor.device.type != "cpu":
                    move(entry.module, "cpu")
                    moved += 1
        return moved

    def drop(self, paths: set[str]) -> None:
        """Forget the components read from these files (absolute paths, links resolved)."""
        with self._lock:
            gone = [k for k in self._entries if paths & {f.path for f in k.files}]
            for key in gone:
                del self._entries[key]
        if gone:
            gc.collect()

    def clear(self) -> None:
        """Forget every component and every stored text; those in use go when their user is done."""
        with self._lock:
            self._entries.clear()
            self._texts.clear()
        gc.collect()


_PROCESS_CACHE = ComponentCache()


def component_cache() -> ComponentCache:
    """Return the cache that all loaders of this process share."""
    return _PROCESS_CACHE
