"""Placement of a whole module, and the bookkeeping of who uses a module in which placement.

There are four modes, chosen by the plan or the user: ``none`` (moved to the device and left there),
``model`` (on the device for one stage), ``sequential`` (leaf by leaf, through accelerate's hooks)
and ``group`` (block by block, through diffusers' hooks; ``streaming`` is faster for Wan). Whatever
a mode attaches to a module is detached again. No mode changes a bit of a parameter: weights are
only read, so a module that leaves the device gets its old host tensors back, and nothing is copied
from the device.

One module may serve several threads. Threads that ask for the same placement share it where the
placement allows that; a thread that asks for another one waits, because a module can only be in
one place at a time.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..errors import InvalidRequest, MissingDependency, ModuleInUse
from ..forward import blocks_in_order
from ..loading import Undo, device_of, move, remember

MODES: tuple[str, ...] = ("none", "model", "sequential", "group")

_WAIT_SECONDS = 0.2  # how often a waiting thread wakes, so that an interrupt reaches it


@dataclass
class _Residence:
    """Where one module is now, and which threads use it there."""

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
def place(
    module: nn.Module, mode: str, device: torch.device | str,
    check: Callable[[], object] = lambda: None,
) -> Iterator[nn.Module]:  # fmt: skip
    """Have ``module`` compute on ``device`` inside the ``with`` block, placed as ``mode`` says.

    - "none" moves it to the device and leaves it there.
    - "model" moves it to the device and afterwards to the host, also where an earlier "none" had
      left it on the device.
    - "sequential" leaves it on the host and copies each leaf's weights for that leaf's forward.
    - "group" does the same for each block; on CUDA the copy runs ahead of the forward.

    Parameters stay the same objects with the same values. Hooks are removed at the end, also after
    an error or an interrupt. A thread that asks for another placement than the one in use waits
    until that one ends. Raises InvalidRequest for an unknown mode, MissingDependency when
    accelerate is absent or diffusers too old for the mode, ModuleInUse when this thread holds the
    module in another placement.
    """
    if mode not in MODES:
        raise InvalidRequest(
            f"offload is {mode!r}; allowed here are {', '.join(MODES)}.", field="offload"
        )
    target = torch.device(device)
    attach = partial(_attach, module, mode, target, check)
    # The hooks of the other two modes keep one leaf or block on the device at a time. With two
    # threads in the same module, one would remove the weights that the other computes with.
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
    """Keep ``module`` in a placement for the length of the ``with`` block.

    ``attach`` makes the placement and pushes onto the ``Undo`` the steps that take it back. It is
    called for the first user only; threads that ask for the same ``placement`` join when it is
    ``shared``, and the last one to leave runs the steps. A thread that asks for another placement
    waits until the present one has no users. Raises ModuleInUse when this thread is one of those
    users, as it would wait for itself, or when ``wait`` is False. When ``attach`` raises, what it
    had attached is taken off before the error goes on.
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
        # With a time limit: a wait without one cannot be interrupted on every system.
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


def _attach(
    module: nn.Module, mode: str, device: torch.device, check: Callable[[], object], undo: Undo
) -> None:
    """Place the module as ``mode`` says, and push the steps that undo it."""
    if mode != "none" and device_of(module).type != "cpu":
        # An earlier "none" left it on the device. These modes end on the host, so it starts there.
        move(module, "cpu")
    if mode in ("sequential", "group"):
        (_attach_sequential if mode == "sequential" else _attach_group)(undo, module, device)
        return
    if mode == "model":
        remember(undo, module)
    move(module, device, check)


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
    # Steps run in reverse: first the hooks are removed, then what they left behind in the modules'
    # dictionaries, and in the end the tensors are put back.
    remember(undo, module)
    for owner in module.modules():
        undo.push(_forward_restorer(owner))
    for owner in module.modules():
        # One step per module, so that one hook that fails to detach does not keep the others.
        undo.push(partial(remove_hook_from_module, owner))
    cpu_offload(module, execution_device=device, offload_buffers=bool(module._parameters))


def _attach_group(undo: Undo, module: nn.Module, device: torch.device) -> None:
    """Group offload as diffusers does it: by blocks if the module has blocks, else by leaves."""
    from diffusers.hooks.group_offloading import apply_group_offloading

    require_groups()
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


def require_groups() -> None:
    """Raise MissingDependency where diffusers' group offload cannot work.

    Before 0.41 its hooks ask torch for the machine's accelerator and take for granted that there is
    one.
    """
    # An older torch cannot be asked, and then these versions of diffusers do not ask it.
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is None or accelerator.current_accelerator() is not None:
        return
    import diffusers

    numbers = re.findall(r"\d+", diffusers.__version__)[:2]
    if [int(number) for number in numbers] < [0, 41]:
        raise MissingDependency(
            f"offload 'group' needs diffusers 0.41 or newer on a machine without a GPU; installed "
            f"is {diffusers.__version__}. Update it (pip install -U diffusers), or choose offload "
            "'auto'."
        )


def _forward_restorer(owner: nn.Module) -> Callable[[], None]:
    """Return a step that removes what hooks wrote into one module's instance dictionary."""
    names = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")
    before = {name: owner.__dict__[name] for name in names if name in owner.__dict__}

    def restore() -> None:
        for name in names:
            owner.__dict__.pop(name, None)
        owner.__dict__.update(before)

    return restore


@contextmanager
def block_hooks(transformer: nn.Module, on_block: Callable[[], object]) -> Iterator[None]:
    """Call ``on_block`` before each transformer block that this thread runs.

    Used to look for interrupts: an exception from ``on_block`` ends the forward and reaches its
    caller as it is. The blocks are those of the module list ``blocks``, and VACE's. Other threads
    may render through the same module: each is called back for its own forwards only.
    """
    me = threading.get_ident()

    def before_block(block: nn.Module, args: object) -> None:
        if threading.get_ident() == me:
            on_block()

    with Undo() as undo:
        for block in blocks_in_order(transformer):
            undo.push(block.register_forward_pre_hook(before_block).remove)
        yield
