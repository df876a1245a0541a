"""A worker's side of a gang: the processes that compute one unit together, and how they talk.

torch.distributed is set up here, in a worker and never in its driver: gloo between CPUs, NCCL
between cards, one group of processes for each gang, which meet in a file. Every decision is that
of rank 0. Whoever hangs or ends here is ended, with the gang, by the driver: no collective is
waited for by a clock.

What a kernel is chosen by, a clock or a trial on its card, is no two times the same: ``Choices``
has one worker choose for all of a driver's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import is_oom
from ..forward import Exchange
from ..placing import Gathering, Pending

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORD = 256
"""Bytes of a name that rank 0 tells the others; kernels have shorter ones."""
_TIMEOUT = timedelta(hours=1)
"""A rank may wait as long for another that reads weights. The driver ends a gang that hangs."""


class GangBroken(Exception):
    """Another process of the gang has ended, or cannot be reached."""


class Group(Exchange, Gathering, Protocol):
    """``forward.Exchange`` with what the processes of a gang agree on, and what they gather."""

    def agreed(self, word: bool) -> bool:
        """Return the word of rank 0."""

    def all_say(self, word: bool) -> bool:
        """Return whether all say yes."""

    def first_says(self, name: str) -> str:
        """Return the name that rank 0 gives."""


class Choices:
    """What a worker chooses together with its gang; see ``kernels.Council``.

    Rank 0 asks the driver what another gang has chosen (``ask``): None where it is to choose by
    itself, and then it tells (``tell``) what that is, or None where it failed. The others try
    whether they can do it too; where not, ``say`` hears of it. To be used for units that all of the
    gang compute, or, with no group, for those that this worker computes alone.
    """

    def __init__(
        self, group: Group | None, ask: Callable[[str], str | None],
        tell: Callable[[str, str | None, bool], object], say: Callable[[str], object],
    ) -> None:  # fmt: skip
        self._group, self._ask, self._tell, self._say = group, ask, tell, say
        self._clip = -1
        self._found: dict[str, str | bool] = {}

    def of_clip(self, number: int) -> Choices:
        """Begin to choose anew where this is another clip: what lacked memory is tried again."""
        if number != self._clip:
            self._clip, self._found = number, {}
        return self

    def choose(
        self, what: str, choose: Callable[[], str], able: Callable[[str], bool], plain: str
    ) -> str:
        """Return what is chosen; all of the gang ask at the same place."""
        if what not in self._found:
            group, name = self._group, ""
            if group is None or group.rank == 0:
                name = self._ask(what) or self._own(what, choose, plain)
            if group is not None:
                name = group.first_says(name)
            can = name == plain or able(name)
            if group is not None:
                can = group.all_say(can)
            if not can:
                self._say(f"Not every card can do {what} by {name}: {plain} was taken there.")
            self._found[what] = name if can else plain
        return cast(str, self._found[what])

    def _own(self, what: str, choose: Callable[[], str], plain: str) -> str:
        """Choose, and tell the driver, for which others may wait."""
        name = None
        try:
            name = choose()
        finally:
            self._tell(what, name, name != plain)
        return name

    def all_can(self, what: str, can: Callable[[], bool]) -> bool:
        """Return whether all of the gang can do something."""
        if what not in self._found:
            mine = can()
            self._found[what] = mine if self._group is None else self._group.all_say(mine)
        return cast(bool, self._found[what])


Join = Callable[[int, int, str, torch.device], Group]


class ProcessGroup:
    """Processes of one gang, by torch.distributed. ``place`` is a path for the file they meet in.

    Made by all of them at the same time. Raises GangBroken, here and in every call, when another
    one is gone.
    """

    def __init__(self, rank: int, size: int, place: str, device: torch.device) -> None:
        # As an untyped module: it does not name what it exports.
        dist: Any = import_module("torch.distributed")
        self.rank, self.size, self._dist = rank, size, dist
        self._device = device
        self._weights: Any = None
        """Those who gather weights: the same processes with a communicator of its own, made when
        it is first used."""
        # The name that is not deprecated: torch 2.13 has another one than those before.
        newer = hasattr(dist, "all_gather_single")
        self._gather: Any = dist.all_gather_single if newer else dist.all_gather_into_tensor
        on_card = device.type == "cuda"
        if on_card:
            torch.cuda.set_device(device)
        with _told():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_card else "gloo",
                store=dist.FileStore(place, size),
                rank=rank,
                world_size=size,
                timeout=_TIMEOUT,
            )

    def begin_exchange(self, given: Tensor, parts: Tensor) -> Pending:
        """Begin to give away the rows of ``parts``, and to fill those of ``given``, in order.

        There is a row for each process, or for each other one: what it gives itself NCCL would
        copy by the few units that it takes of a card. On cards it is done on another stream.
        """
        splits = None
        if len(parts) < self.size:
            splits = [int(rank != self.rank) for rank in range(self.size)]
        with _told():
            work = self._dist.all_to_all_single(given, parts, splits, splits, async_op=True)
        return _Work(work)

    def all_gather(self, part: Tensor) -> Tensor:
        """Return the parts of all processes, (size, ...)."""
        gathered = part.new_empty((self.size * part.shape[0], *part.shape[1:]))
        with _told():
            self._gather(gathered, part)
        return gathered.view(self.size, *part.shape)

    def begin_gather(self, whole: Tensor) -> Pending:
        """Begin to fill in the parts of the others; ``whole`` (size x k bytes) has this one's.

        Beside the exchanges of a forward, which do not wait for it: they have another communicator,
        and on cards another stream.
        """
        own = whole.view(self.size, -1)[self.rank]
        with _told():
            if self._weights is None:
                self._weights = self._for_weights()
            work = self._gather(whole, own, group=self._weights, async_op=True)
        return _Work(work)

    def _for_weights(self) -> Any:
        """Return a group of all, for gathers alone; to be made by all at the same time."""
        if self._device.type != "cuda":
            return self._dist.new_group(backend="gloo", timeout=_TIMEOUT)
        # A stream before others: its kernels are small, and each rank waits for the last to begin.
        options = self._dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        return self._dist.new_group(backend="nccl", timeout=_TIMEOUT, pg_options=options)

    def agreed(self, word: bool) -> bool:
        """Return the word of rank 0."""
        said = torch.tensor([int(word)])
        with _told():
            self._dist.broadcast(said, 0)
        return bool(said)

    def all_say(self, word: bool) -> bool:
        """Return whether all say yes."""
        said = torch.tensor([int(word)])
        with _told():
            self._dist.all_reduce(said, self._dist.ReduceOp.MIN)
        return bool(said)

    def first_says(self, name: str) -> str:
        """Return the name that rank 0 gives."""
        text = name.encode()[:_WORD] if self.rank == 0 else b""
        said = torch.tensor([*text.ljust(_WORD, b"\0")], dtype=torch.uint8)
        with _told():
            self._dist.broadcast(said, 0)
        return bytes(said.tolist()).rstrip(b"\0").decode()


class _Work:
    """A gather or an exchange under way."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        """Have what is queued from now on come after it; on a CPU, wait until it is done."""
        with _told():
            self._work.wait()


@contextmanager
def _told() -> Iterator[None]:
    """Call what goes wrong between processes by one name; a shortage of memory keeps its own."""
    try:
        yield
    except RuntimeError as err:
        if is_oom(err):
            raise
        raise GangBroken(str(err)) from err
