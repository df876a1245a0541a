"""One clip decoded by several workers, a strip of its pictures each, as the driver sees it.

The decoder's global part is computed by each of them, the local part for its strip with the margin
that this needs (``memory.strips_of``). Pictures come chunk by chunk through a ``Ring``; a worker is
never more than its slots ahead of the driver. Where a worker ends, hangs or runs out of memory the
driver is told at which chunk, and goes on from there by itself, unless another worker is free: that
makes the strip anew from its beginning, for its cache, and goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import WorkerFailed
from ..memory import Strip
from ..sampling import OutOfRange
from .ring import Ring

if TYPE_CHECKING:
    from .gang import Rank
    from .pool import WorkerPool
    from .weights import Weights

_SLOTS = 3
"""Chunks that a worker may be ahead: one is shown, one is ready, one is written."""
_TICK = 0.05


class StripsLost(Exception):
    """The strips cannot be finished by these workers; the text says why.

    ``again`` says whether those that are left could share out what is left.
    """

    def __init__(self, why: str, *, again: bool = False) -> None:
        super().__init__(why)
        self.again = again


@dataclass(slots=True)
class _Part:
    """A strip, and how far the worker has come that makes it."""

    rank: Rank
    frames: dict[int, int] = field(default_factory=dict)
    """By position: how many frames the chunks have that were written and not taken yet."""
    mapped: bool = False
    ended: bool = False
    lost: str = ""
    """Why it has no worker any more."""


class StripsDecoder:
    """Decodes ``latents`` (B, z, T, h, w), in VAE space, by the workers of a pool.

    Each of ``ranks`` makes the strip at its place in ``strips``. ``shape`` is that of a chunk's
    pictures (B, f, H, W, 3) at most. Use in a ``with`` block; what still runs is cancelled at its
    end, and the caller releases the pool. ``position`` counts latent frames, as that of a
    ``StreamingDecoder``, whose place it can take and leave.
    """

    def __init__(
        self, pool: WorkerPool, weights: Weights, latents: Tensor, strips: Sequence[Strip],
        ranks: Sequence[Rank], shape: tuple[int, int, int, int, int], *, whole_bytes: bool,
    ) -> None:  # fmt: skip
        self.position = self.frames_done = 0
        self._pool, self._weights, self._latents = pool, weights, latents.to("cpu")
        self._strips, self._count = strips, latents.shape[2]
        self._parts = [_Part(rank) for rank in ranks]
        self._shape, self._whole_bytes = shape, whole_bytes
        self._failed: str | None = None
        self.moved: list[str] = []
        """What is said of strips that another worker went on with."""
        self._now = 0
        self._number = -1
        self._ring: Ring | None = None
        self._slots: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether every latent frame has been decoded."""
        return self.position >= self._count

    @property
    def count(self) -> int:
        """Return how many strips there are."""
        return len(self._parts)

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what decides how long a worker may say nothing."""
        return (self._weights.key, *self._latents.shape[3:], len(self._parts))

    def go_on_from(self, other: Any) -> None:
        """Continue where another decoder of the same clip is; before the ``with`` block."""
        self.position, self.frames_done = other.position, other.frames_done

    def __enter__(self) -> StripsDecoder:
        try:
            self._ring = Ring.make(_SLOTS, self._shape, whole_bytes=self._whole_bytes)
            self._slots = self._ring.map()
        except (OSError, RuntimeError) as err:
            self._failed = f"there is no room for their pictures ({err})"
            return self
        self._number = self._pool.begin_strips(self, [part.rank for part in self._parts])
        for part, strip in zip(self._parts, self._strips, strict=True):
            self._ask(part, strip)
        return self

    def _ask(self, part: _Part, strip: Strip) -> None:
        """Have a worker make its strip from ``position`` on."""
        assert self._ring is not None
        self._pool.know(part.rank, self._weights)
        header = {
            "type": "decode", "number": self._number, "weights": self._weights.key,
            "strip": asdict(strip), "position": self.position, "ring": self._ring.plain(),
            "until": self.position + _SLOTS, "cut": False,
        }  # fmt: skip
        part.rank.process.send(header, {"latents": self._latents})

    def _hand_over(self) -> None:
        """Give the strips of workers that have ended to others that are free.

        Raises StripsLost where there are too few.
        """
        orphans = [n for n, part in enumerate(self._parts) if part.lost]
        if not orphans:
            return
        free = self._pool.free_ranks(len(orphans))
        first = self._parts[orphans[0]].lost
        if len(free) < len(orphans) or self._ring is None or not self._ring.stays:
            raise StripsLost(first, again=True)
        self._pool.join_strips(free)
        for number, rank in zip(orphans, free, strict=True):
            told = f"{self._parts[number].lost}; {rank.process.device} went on with its strip"
            self.moved.append(f"{told} from frame {self.frames_done + 1}.")
            self._parts[number] = _Part(rank)
            self._ask(self._parts[number], self._strips[number])

    def __exit__(self, *_: object) -> None:
        if self._number >= 0:
            self._pool.end_strips(self._number)
        if self._ring is not None:
            self._ring.remove()
        self._slots = None

    def pictures(self, check: Callable[[], object]) -> Tensor:
        """Return the pictures (B, f, H, W, 3) at ``position``; ``taken`` counts them as taken.

        They may be written over after that. ``check`` is called while they are waited for. Raises
        StripsLost, and OutOfRange where a strip is beyond the dtype's range.
        """
        while self._failed is None and not all(self.position in p.frames for p in self._parts):
            try:
                self._pool.wait(_TICK)
                self._hand_over()
            except WorkerFailed as err:
                self._failed = str(err)
            check()
        if self._failed is not None:
            raise StripsLost(self._failed)
        frames = {part.frames[self.position] for part in self._parts}
        if 0 in frames:
            raise OutOfRange
        assert self._slots is not None and len(frames) == 1
        self._now = frames.pop()
        return self._slots[self.position % _SLOTS, :, : self._now]

    def taken(self) -> None:
        """Go on to the next chunk: nobody reads the last one any more."""
        for part in self._parts:
            del part.frames[self.position]
        self.position += 1
        self.frames_done += self._now
        for part in self._parts:
            until = self.position + _SLOTS
            part.rank.process.send({"type": "go", "number": self._number, "until": until})

    # -- what the pool tells ------------------------------------------------------------------

    def hears(self, rank: Rank, header: dict[str, Any]) -> None:
        """Hear from a worker that makes a strip."""
        part = self._made_by(rank)
        if part is None:
            return
        kind = header["type"]
        if kind == "mapped":
            part.mapped = True
            all_have = all(one.mapped for one in self._parts)
            if self._ring is not None and all_have and not self._ring.stays:
                self._ring.remove()
        elif kind == "strip":
            part.frames[header["position"]] = header["frames"] if header["well"] else 0
        elif kind == "done":
            part.ended = True
        elif kind == "failed":
            self._failed = f"{rank.process.device}: {header['text']}"

    def lost(self, rank: Rank, why: str) -> None:
        """Hear that a worker has ended."""
        part = self._made_by(rank)
        if part is not None:
            part.lost = f"{rank.process.device} {why}"
            part.frames.clear()  # whoever goes on makes them anew

    def _made_by(self, rank: Rank) -> _Part | None:
        """Return the strip that a worker has in work; it may have finished another before."""
        mine = (part for part in self._parts if part.rank is rank and not part.ended)
        return next(mine, None)
