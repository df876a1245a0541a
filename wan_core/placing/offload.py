"""Carries out placement: what is attached to a module here is always detached again.

Four means, chosen by the plan or the user: ``none`` (moved to the device and left there), ``model``
(on the device for one stage), ``sequential`` (leaf by leaf, through accelerate's hooks) and
``group`` (block by block, through diffusers' hooks; ``streaming`` does this better for Wan). None
changes a bit of a parameter: weights are read-only, so leaving a device puts the host's tensors
back instead of copying the device's.

One module may serve two threads. Threads that ask for the same placement share it; others wait
until the module is free, because a module can only be in one place.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..errors import InvalidRequest, MissingDependency, ModuleInUse
from ..loading import Undo, device_of, move, remember

MODES: tuple[str, ...] = ("none", "model", "sequential", "group")

_WAIT_SECONDS = 0.2  # how often a waiting thread wakes, so that an interrupt reaches it


@dataclass
class _Residence:
    """Where one module is now, and for whom."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    placement: str = ""
    users: list[int] = field(default_factory=list)
    undo: Undo = field(default_factory=Undo)


_residences: weakref.WeakKeyDictionary[nn.Module, _Residence] = weakref.WeakKeyDictionary()
_residences_lock = threading.Lock()


def _residence_of(module: nn.Module) -> _Residence:
    with _residences_lock:
        return _residences.setdefault(module, _Residence())


@contextmanager
def place(module: nn.Module, mode: str, device: torch.device | str) -> Iterator[nn.Module]:
    """Have ``module`` compute on ``device`` inside the ``with`` block, placed as ``mode`` says.

    "none" moves it to the device and leaves it there; "model" moves it there and puts it back on
    the host, also where an earlier "none" had left it on the device; "sequential" leaves it on the
    host and brings each leaf's weights for that leaf's forward; "group" does so for each block,
    ahead of its turn on CUDA. Parameters stay the same objects with the same values; hooks are
    gone afterwards, after an error or an interrupt too. A thread that asks for another placement
    than the one in use waits for it to end. Raises InvalidRequest for an unknown mode,
    MissingDependency when accelerate is absent, ModuleInUse when this thread holds the module in another
    placement.
    """
    if mode not in MODES:
        raise InvalidRequest(
            f"offload is {mode!r}; allowed here are {', '.join(MODES)}.", field="offload"
        )
    target = torch.device(device)
    attach = partial(_attach, module, mode, target)
    # Hooks hold one leaf's or block's weights at a time: two threads would take each other's.
    with occupy(module, f"{mode} on {target}", attach, shared=mode in ("none", "model")):
        yield module


@contextmanager
def occupy(
    module: nn.Module,
    placement: str,
    attach: Callable[[Undo], None],
    shared: bool,
    wait: bool = True,
) -> Iterator[None]:
    """Keep ``module`` in a placement, put on by ``attach`` and taken off by the steps it pushes.

    Threads that ask for the same placement share it where it is ``shared``; a thread that asks
    for another waits for the users of the present one. Raises ModuleInUse when that would be the thread
    itself, or when it shall not ``wait``. An error of ``attach`` is raised with everything taken
    off again.
    """
    residence = _residence_of(module)
    me = threading.get_ident()
    with residence.changed:
        _await_turn(residence, me, type(module).__name__, placement, shared, wait)
        if not residence.users:
            try:
                attach(residence.undo)
            except BaseException as error:
                residence.undo.__exit__(type(error), error, None)
                raise
            residence.placement = placement
        residence.users.append(me)
    try:
        yield
    except BaseException as error:
        _leave(residence, me, error)
        raise
    else:
        _leave(residence, me, None)


def _await_turn(
    residence: _Residence, me: int, name: str, placement: str, shared: bool, wait: bool
) -> None:
    while residence.users and not (shared and residence.placement == placement):
        if me in residence.users or not wait:
            raise ModuleInUse(
                f"{name} is already placed as {residence.placement!r}"
                f"{' by this thread' if me in residence.users else ''}; leave that placement "
                f"before asking for {placement!r}."
            )
        residence.changed.wait(_WAIT_SECONDS)


def _leave(residence: _Residence, me: int, error: BaseException | None) -> None:
    with residence.changed:
        residence.users.remove(me)
        try:
            if not residence.users:
                kind = type(error) if error else None
                residence.undo.__exit__(kind, error, None)
        finally:
            residence.changed.notify_all()


def _attach(module: nn.Module, mode: str, device: torch.device, undo: Undo) -> None:
    """Put the module where ``mode`` wants it."""
    if mode != "none" and device_of(module).type != "cpu":
        move(module, "cpu")  # left there by an earlier "none"; the host is what it returns to
    if mode in ("sequential", "group"):
        (_attach_sequential if mode == "sequential" else _attach_group)(undo, module, device)
        return
    if mode == "model":
        remember(undo, module)
    move(module, device)


def _attach_sequential(undo: Undo, module: nn.Module, device: torch.device) -> None:
    """Leaf-level offload as diffusers does it: accelerate's ``cpu_offload`` on the module."""
    try:
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_module
    except ImportError as error:
        raise MissingDependency(
            "offload 'sequential' needs the package accelerate, which cannot be imported "
            f"({error}). Install it, or choose offload 'model'."
        ) from error
    remember(undo, module)
    for owner in module.modules():
        undo.push(_forward_restorer(owner))
    for owner in module.modules():
        # One step per module: a hook that fails to detach must not keep the others attached.
        undo.push(partial(remove_hook_from_module, owner))
    cpu_offload(module, execution_device=device, offload_buffers=bool(module._parameters))


def _attach_group(undo: Undo, module: nn.Module, device: torch.device) -> None:
    """Group offload as diffusers does it: by blocks where there are, else by leaves."""
    from diffusers.hooks.group_offloading import apply_group_offloading

    remember(undo, module)
    for owner in module.modules():
        undo.push(_forward_restorer(owner))
    by_block = isinstance(getattr(module, "blocks", None), nn.ModuleList)
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level" if by_block else "leaf_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )


def _forward_restorer(owner: nn.Module) -> Callable[[], None]:
    """Make the step that drops what hooks wrote into one module's instance dictionary."""
    names = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")
    before = {name: owner.__dict__[name] for name in names if name in owner.__dict__}

    def restore() -> None:
        for name in names:
            owner.__dict__.pop(name, None)
        owner.__dict__.update(before)

    return restore


@contextmanager
def block_hooks(transformer: nn.Module, on_block: Callable[[], object]) -> Iterator[None]:
    """Call ``on_block`` before each transformer block this thread runs, to look for interrupts.

    What ``on_block`` raises leaves the forward unchanged. Blocks are the module list ``blocks``;
    hooks of other threads that render through the same module are not called here, nor ours there.
    """
    me = threading.get_ident()

    def before_block(block: nn.Module, args: object) -> None:
        if threading.get_ident() == me:
            on_block()

    with Undo() as undo:
        blocks = transformer.blocks
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            undo.push(block.register_forward_pre_hook(before_block).remove)
        yield
