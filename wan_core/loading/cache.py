"""A cache of loaded components, shared by everything in the process that uses the same files.

Two pipelines that name the same text encoder or VAE file get the same module. A component's key is
made of its files' paths, sizes and modification times, its dtype and its options, so that a file
that changed on disk is read again. Components stay until ``clear`` is called or their RAM is needed
for another component.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModuleInUse, is_host_oom
from ..files import FileIdentity, file_identity
from ..memory import RAM_RESERVE, ram
from ..models import Component

_LOCK_WAIT_SECONDS = 0.1
_TEXTS_KEPT = 32
_MAPPED_KEPT = 4
"""Components that nobody leases and that stay all the same, in their mapped files: a pair of
experts, a text encoder, and one more."""


@dataclass(frozen=True, slots=True)
class ComponentKey:
    """What two uses of a component must have in common to share one module."""

    kind: str
    files: tuple[FileIdentity, ...]
    dtype: str
    options: Hashable = ()


@dataclass(slots=True)
class _Entry:
    module: Any
    nbytes: int
    users: int = 0
    let_go: bool = False
    """Whether nobody leases it, and it stays only because it lies in its mapped file."""


def component_key(component: Component, dtype: str, options: Hashable = ()) -> ComponentKey:
    """Return the key of a component: its files as they are on disk now, dtype and options."""
    files: list[Path] = list(component.files)
    config = component.path / "config.json"
    if component.path.is_dir() and config.is_file():
        files.append(config)
    identities = tuple(file_identity(path) for path in files) or (_folder_identity(component),)
    return ComponentKey(component.kind, identities, dtype, options)


def _folder_identity(component: Component) -> FileIdentity:
    """Identify a component without weights (a tokenizer) by its newest file."""
    inside = [path for path in component.path.rglob("*") if path.is_file()]
    newest = max(inside, key=lambda path: path.stat().st_mtime_ns, default=component.path)
    return file_identity(newest)


class ComponentCache:
    """Modules by key, least recently used first. Safe to use from several threads."""

    def __init__(self) -> None:
        self._renders = threading.Lock()
        self._rendering: int | None = None
        """The thread that renders."""
        # Never held while a component is read: that takes minutes, and others ask what is loaded
        # meanwhile. A render holds ``_renders`` and takes this one now and then, never the reverse.
        # Not re-entrant: a finalizer may run in the thread that holds it, in the middle of a loop
        # over the entries. See ``let_go_soon``.
        self._lock = threading.Lock()
        self._unwanted: deque[AbstractSet[str]] = deque()
        self._entries: OrderedDict[ComponentKey, _Entry] = OrderedDict()
        self._building: dict[ComponentKey, threading.Event] = {}
        self._texts: OrderedDict[Hashable, Any] = OrderedDict()

    @contextmanager
    def one_render(self, check: Callable[[], object]) -> Iterator[None]:
        """Have the cache for a render, in the ``with`` block; ``check`` is called while it waits.

        Two renders at the same time would each use the memory that the plan of the other counts on.
        Raises ModuleInUse in the middle of a render of this thread.
        """
        me = threading.get_ident()
        if self._rendering == me:
            # Its LoRAs and forwards are on the modules, and count in this thread.
            raise ModuleInUse(
                "A render was begun in the middle of another one, by one of its callbacks. Begin "
                "it when that one has ended, or in a loader of its own (enable_caching=False)."
            )
        while not self._renders.acquire(timeout=_LOCK_WAIT_SECONDS):
            check()
        try:
            self._rendering = me
            yield
        finally:
            self._rendering = None
            self._renders.release()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock for the ``with`` block, then do what ``let_go_soon`` was asked for."""
        try:
            with self._lock:
                yield
        finally:
            self._drop_unwanted()

    def _drop_unwanted(self) -> None:
        # Whoever holds the lock comes here on letting go of it, so that nothing is forgotten.
        while self._unwanted and self._lock.acquire(blocking=False):
            try:
                while self._unwanted:
                    self._let_go_now(self._unwanted.popleft())
            finally:
                self._lock.release()

    def _forget(self, paths: AbstractSet[str]) -> bool:
        """Drop the components read from these files; the lock must be held."""
        gone = self._of_files(paths)
        for key in gone:
            del self._entries[key]
        return bool(gone)

    def _of_files(self, paths: AbstractSet[str]) -> list[ComponentKey]:
        return [k for k in self._entries if paths & {f.path for f in k.files}]

    def _let_go_now(self, paths: AbstractSet[str]) -> None:
        """Do what ``let_go_soon`` says; the lock must be held."""
        for key in self._of_files(paths):
            entry = self._entries[key]
            if entry.users == 0 and _costs_nothing(entry.module):
                entry.let_go = True
            else:
                del self._entries[key]
        for key in [k for k, entry in self._entries.items() if entry.let_go][:-_MAPPED_KEPT]:
            del self._entries[key]

    def holds(self, key: ComponentKey) -> bool:
        """Say whether a component is there, so that it would not be read."""
        with self._held():
            return key in self._entries

    @contextmanager
    def borrow(
        self, key: ComponentKey, nbytes: int, build: Callable[[], Any], *, keep: bool = True
    ) -> Iterator[Any]:
        """Yield the module of ``key``; call ``build`` for it if it is not in the cache.

        ``nbytes`` is about what it takes in RAM; other components are dropped to make space for
        it. A module is not dropped while it is in use. ``keep=False`` drops it after use.
        """
        entry = self._take(key, nbytes, build)
        try:
            yield entry.module
        finally:
            with self._held():
                entry.users -= 1
                if not keep and entry.users == 0 and self._entries.get(key) is entry:
                    del self._entries[key]

    def _take(self, key: ComponentKey, nbytes: int, build: Callable[[], Any]) -> _Entry:
        while True:
            with self._held():
                entry = self._entries.get(key)
                if entry is not None:
                    self._entries.move_to_end(key)
                    entry.let_go = False
                    entry.users += 1
                    return entry
                other = self._building.get(key)
                if other is None:
                    done = self._building[key] = threading.Event()
                    self._drop_stale(key)
                    break
            # Another thread reads it. If that fails, the next turn reads it here.
            other.wait()
        try:
            self._make_room(nbytes)
            entry = _Entry(build(), nbytes, users=1)
            with self._held():
                self._entries[key] = entry
            return entry
        finally:
            with self._held():
                del self._building[key]
            done.set()

    def _drop_stale(self, key: ComponentKey) -> None:
        """Drop modules read from earlier versions of the same files: no key can match them."""
        paths = {identity.path for identity in key.files}
        for old in [k for k in self._entries if k.kind == key.kind and k.files != key.files]:
            if paths & {identity.path for identity in old.files}:
                del self._entries[old]

    def _make_room(self, nbytes: int) -> None:
        """Drop unused components, least recently used first, until ``nbytes`` are available."""
        while True:
            # Asked anew each time: what a component frees is less than its size where its weights
            # are views of a mapped file.
            _, available, _ = ram()
            if available >= nbytes + RAM_RESERVE:
                return
            with self._held():
                unused = (key for key, entry in self._entries.items() if entry.users == 0)
                key = next(unused, None)
                if key is None:
                    return
                del self._entries[key]
            _collect()

    def get_text(self, key: Hashable) -> Any | None:
        """Return the embeddings stored under ``key``, or None."""
        with self._held():
            if key not in self._texts:
                return None
            self._texts.move_to_end(key)
            return self._texts[key]

    def put_text(self, key: Hashable, embeddings: Any) -> None:
        """Store the embeddings of a text; only the 32 most recently used are kept."""
        with self._held():
            self._texts[key] = embeddings
            while len(self._texts) > _TEXTS_KEPT:
                self._texts.popitem(last=False)

    def loaded(self) -> list[tuple[ComponentKey, Any]]:
        """Return the keys and modules that are loaded, least recently used first."""
        with self._held():
            return [(key, entry.module) for key, entry in self._entries.items()]

    def nbytes(self) -> int:
        """Return about how many bytes the loaded components take."""
        with self._held():
            return sum(entry.nbytes for entry in self._entries.values())

    def unused_bytes(self, device: str) -> tuple[int, int]:
        """Return (bytes on ``device``, bytes in RAM) held by components that are not in use.

        Weights that are views of a mapped file are left out: the system counts their pages as
        available already.
        """
        from .mapped import is_mapped

        on_device = in_ram = 0
        with self._held():
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

    def release_device(
        self, nbytes: int | None = None, paths: AbstractSet[str] | None = None
    ) -> int:
        """Move components that are not in use to the CPU; return the bytes that became free.

        With ``nbytes``, no more than about so many: the least recently used component first, and
        of the last one only blocks. ``paths`` (absolute, links resolved) limits it to components
        read from these files. A component for which there is no room in RAM is dropped: it can be
        read again.
        """
        freed = 0
        with self._held():
            for key, entry in list(self._entries.items()):
                if entry.users or not hasattr(entry.module, "parameters"):
                    continue
                if paths is not None and not paths & {file.path for file in key.files}:
                    continue
                left = None if nbytes is None else nbytes - freed
                came, no_room = _bring_home(entry.module, left)
                freed += came
                if no_room:
                    freed += _device_bytes(entry.module)
                    del self._entries[key]
        return freed

    def drop_unused(self) -> int:
        """Forget every component that is not in use; return how many there were."""
        with self._held():
            unused = [key for key, entry in self._entries.items() if entry.users == 0]
            for key in unused:
                del self._entries[key]
        if unused:
            _collect()
        return len(unused)

    def drop(self, paths: AbstractSet[str], *, collect: bool = True) -> None:
        """Drop the components read from these files (absolute paths, links resolved).

        Without ``collect`` no garbage is collected: for callers in whose midst no finalizer may
        run. The weights are freed all the same where nothing else refers to them.
        """
        with self._held():
            gone = self._forget(paths)
        if gone and collect:
            _collect()

    def let_go_soon(self, paths: AbstractSet[str]) -> None:
        """Free the memory of components read from these files; for finalizers.

        They are dropped, but for the last few that lie in mapped files: without their copy on the
        device those take no memory that anybody lacks, and come back without being read again.
        ComfyUI drops what a prompt does not use whenever RAM is short, and asks for it again.

        At once where nobody uses the cache, else when they are done: never waits, and never
        changes the entries below someone who is in the middle of them.
        """
        self._unwanted.append(paths)
        self._drop_unwanted()

    def clear(self) -> None:
        """Drop every component and every stored text; modules in use live until they are done."""
        with self._held():
            self._entries.clear()
            self._texts.clear()
        _collect()


def _collect() -> None:
    """Free what was dropped, also to the system."""
    from .moving import give_back_freed

    gc.collect()
    give_back_freed()


def _bring_home(module: Any, nbytes: int | None) -> tuple[int, bool]:
    """Move a module's pieces to the CPU until ``nbytes`` are free on its device; all where None.

    Returns the bytes that became free, and whether RAM ran out; what did not fit is where it was.
    """
    from .moving import move

    freed = 0
    for piece in _pieces_of(module):
        if nbytes is not None and freed >= nbytes:
            break
        held = _device_bytes(piece)
        if not held:
            continue
        try:
            move(piece, "cpu")
        except (MemoryError, RuntimeError) as err:
            if not is_host_oom(err):
                raise
            return freed, True
        freed += held
    return freed, False


def _costs_nothing(module: Any) -> bool:
    """Take a module off its device where that needs no memory; say whether it can be kept so."""
    from .moving import lies_in_files

    # On Windows a file that is mapped can be neither replaced nor deleted.
    if os.name == "nt" or not hasattr(module, "parameters") or not lies_in_files(module):
        return False
    return not _bring_home(module, None)[1]


def _pieces_of(module: Any) -> list[Any]:
    """Return the blocks of a module from the last to the first, then the module for its rest."""
    blocks = getattr(module, "blocks", None)
    if blocks is None:
        blocks = getattr(getattr(module, "encoder", None), "block", None)
    return [*reversed(list(blocks or ())), module]


def _device_bytes(module: Any) -> int:
    """Return the bytes of a module's parameters that are not in RAM."""
    return sum(p.nbytes for p in module.parameters() if p.device.type != "cpu")


_PROCESS_CACHE = ComponentCache()


def component_cache() -> ComponentCache:
    """Return the cache that all loaders of this process share."""
    return _PROCESS_CACHE
