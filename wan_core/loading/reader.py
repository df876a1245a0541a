"""Stored bytes to tensors: read by offset, converted piece by piece, checked for NaN on the way.

A tensor that needs no conversion and stays on the CPU is read straight into the memory it keeps.
Any other is read through one small staging buffer, so that loading never needs more than the result
and that buffer. On request, tensors that need no conversion are views of the mapped file instead:
they are ready at once, and the system can drop their pages when RAM is short, but the file must not
change meanwhile.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from ..errors import CorruptFile, MissingFile, UnsupportedModel
from ..files import quoted
from ..formats import Storage, TensorInfo, TensorTable
from ..models import Source
from .dequantize import (
    Scales,
    block_scales,
    dequantize,
    numbers_that_may_be_wild,
    ordered_scales,
    unit_bytes,
)
from .dtypes import FP8, is_finite
from .mapped import (
    AT_ONCE,
    Amount,
    InFile,
    Looker,
    MappedFile,
    Numbers,
    Reason,
    Watch,
    look_later,
    map_file,
    stored_at,
)

__all__ = ["DTYPES", "FP8", "Amount", "TensorReader", "is_finite"]

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that can be read without dequantising, by their name in a header."""

_PIECE: Final = 16 * 2**20
"""Bytes converted at a time."""
_ALIGNED: Final = 64  # bytes; how torch allocates on a CPU
_SMALL: Final = 2**16
"""Bytes of a mapped tensor that is looked at on the spot: handing it on would take longer."""


class TensorReader:
    """Reads the tensors of one table to one device; a context manager that keeps the files open.

    Its methods raise CorruptFile when a file is shorter than its header says or holds NaN or
    infinity, and UnsupportedModel for a dtype that cannot be read or is too small for the values.
    """

    def __init__(
        self, table: TensorTable, device: torch.device | str = "cpu", *, mapped: bool = False,
        align: bool = False, watch: Watch | None = None, look_later: bool = False,
    ) -> None:  # fmt: skip
        """``mapped`` makes tensors that stay as stored, on the CPU, views of the mapped file.

        With ``align`` only where they lie as torch allocates: the rounding of some kernels of a CPU
        depends on it. ``watch`` follows the reading by pieces of 4 MiB at most, and looks for an
        interrupt more often where the disk is slow. With ``look_later`` large mapped tensors are
        not read: ``leave`` says whose they are, and ``first_look`` looks at them.
        """
        self.table = table
        self.device = torch.device(device)
        self._watch = watch or Watch()
        self.mapped = mapped
        self.align = align
        self._later = look_later
        self._maps: dict[Path, MappedFile] | None = {} if mapped else None
        self._looker = Looker(self._watch)
        self._files: dict[Path, io.FileIO] = {}
        self._stack = ExitStack()
        self._buffer: torch.Tensor | None = None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._looker.close()
            self._buffer = None
            self._files.clear()
            self._stack.close()

    def finish(self) -> None:
        """Wait until the mapped tensors that were returned have been read and looked at.

        Called at the end of the ``with`` block, too, where nothing else was raised.
        """
        self._looker.finish()

    def leave(self, module: torch.nn.Module, amount: Amount) -> bool:
        """Leave it to ``first_look`` to read what has not been; False where nothing is left."""
        files = tuple(file for file in (self._maps or {}).values() if file.unseen)
        if files:
            look_later(module, files, amount)
        return bool(files)

    def read(
        self, source: Source, shape: tuple[int, ...], dtype: torch.dtype | None = None, *,
        kept: bool = True, left: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Return the values of ``source`` in ``shape`` on the device, in ``dtype`` or as stored.

        For weights that are stored as plain numbers; ``unpack`` is for the others. ``dtype`` does
        not apply to integers. What is not ``kept`` as it is, is looked at now; a view of a mapped
        file that is ``left`` is not read, and the caller looks at it (``look``, or on a device).
        """
        info = self.table.tensors[source.name]
        stored = DTYPES[info.dtype]
        target = dtype if dtype is not None and stored.is_floating_point else stored
        numel, start = info.numel // source.parts, self._start_of(source)
        straight = target == stored and self.device.type == "cpu"
        aligned = start % (_ALIGNED if self.align else stored.itemsize) == 0
        if straight and self._maps is not None and aligned and numel:
            view = self._view(info, start, numel, stored)
            if view.nbytes <= _SMALL:
                self._check_finite(info, view, None)
                self._watch.seen(view.nbytes)
            else:
                numbers = partial(_as_numbers, stored) if stored.is_floating_point else None
                self._look(info, start, view.nbytes, stored.itemsize, numbers, kept=kept, left=left)
            return view.view(shape)
        out = torch.empty(numel, dtype=target, device=self.device)
        if straight:
            self._read_straight(info, start, out)
        else:
            self._read_converted(info, start, out, stored)
        if self.device.type != "cpu":
            # Once for the whole tensor: each check makes the host wait for the device. On the CPU
            # every piece has been checked already, while it was in the processor's cache.
            self._check_finite(info, out, None)
        return out.view(shape)

    def bits(self, source: Source, stored: Storage, *, kept: bool = True) -> torch.Tensor:
        """Return the bytes of a quantised weight as they lie in the file: int8 (rows, bytes).

        They are checked for NaN and infinity, as far as the kind of storage can have them; later
        only where they are ``kept`` as they are.
        """
        info = self.table.tensors[source.name]
        nbytes, start = info.nbytes // source.parts, self._start_of(source)
        rows = stored.shape[0] // source.parts if stored.shape and stored.by_rows else 1
        if self._maps is not None and self.device.type == "cpu":
            found = self._view(info, start, nbytes, torch.int8)
            unit = unit_bytes(stored)
            nothing = torch.zeros(unit, dtype=torch.int8)  # not the file's: that would read a page
            may_be = any(True for _ in numbers_that_may_be_wild(nothing, stored))
            numbers = partial(_may_be_wild, stored) if may_be else None
            self._look(info, start, nbytes, unit, numbers, kept=kept)
            return found.view(rows, -1)
        flat = torch.empty(nbytes, dtype=torch.int8, device=self.device)
        self._read_straight(info, start, flat)
        for values in numbers_that_may_be_wild(flat.view(rows, -1), stored):
            self._check_finite(info, values, None)
        return flat.view(rows, -1)

    def _look(
        self, info: TensorInfo, start: int, nbytes: int, unit: int, numbers: Numbers | None, *,
        kept: bool = True, left: bool = False,
    ) -> None:  # fmt: skip
        """Begin to read bytes of a tensor and to look at them, ``unit`` bytes being one number.

        Where none can be wild they are not read; where the first look comes later, neither.
        """
        assert self._maps is not None
        span, file = range(start, start + nbytes), self._maps[info.file]
        stored = file.tensors[start] = InFile(span, unit, numbers, partial(_wrong, info))
        if left or (self._later and kept):
            file.unseen.add(start)
        elif numbers is None:
            self._watch.seen(nbytes)
        else:
            self._looker.begin(file.file, span, unit, stored.finite, stored.wrong)

    def look(self, left: torch.Tensor) -> None:
        """Look at a tensor that was left."""
        home = stored_at(left)
        if home is not None and home[0].to_look_at(home[1]):
            file, stored = home
            self._looker.begin(file.file, stored.span, stored.unit, stored.finite, stored.wrong)
            self._looker.finish()
            file.unseen.discard(stored.span.start)

    def scales(self, source: Source, stored: Storage, prefix: str) -> Scales:
        """Return what a weight is multiplied with, in the order of its rows, on the device.

        ``prefix`` is that of the component: a Storage names its scales without it.
        """
        if not stored.scale:
            return Scales()
        ordered = ordered_scales(self._small(prefix + stored.scale), stored)
        if stored.per == "block":  # what pads their tiles is cut off, and may be anything
            info = self.table.tensors[prefix + stored.scale]
            self._check_finite(info, block_scales(ordered, stored), None)
        whole = float(self._small(prefix + stored.second_scale)) if stored.second_scale else 1.0
        if stored.per == "tensor":
            return Scales(None, float(ordered))
        rows = ordered.shape[0] // source.parts
        own = ordered[source.part * rows : (source.part + 1) * rows]
        return Scales(own.to(self.device), whole)

    def unpack(
        self, source: Source, stored: Storage, prefix: str, shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """Return a quantised weight in ``dtype``, taken apart while it is loaded."""
        info = self.table.tensors[source.name]
        bits = self.bits(source, stored, kept=False)
        scales = self.scales(source, stored, prefix)
        out = torch.empty(len(bits), math.prod(shape) // len(bits), dtype=dtype, device=self.device)
        # By rows: each kind would otherwise pass through a float32 copy of the whole weight.
        step = max(1, _PIECE // max(1, bits.shape[1]))
        for begin in range(0, len(bits), step):
            rows = slice(begin, begin + step)
            values = dequantize(bits[rows], scales.of_rows(rows), stored, dtype)
            self._check_finite(info, values, None)
            out[rows].copy_(values)
            self._watch.check()
        return out.view(shape)

    def _start_of(self, source: Source) -> int:
        info = self.table.tensors[source.name]
        return info.start + source.part * (info.nbytes // source.parts)

    def _small(self, name: str) -> torch.Tensor:
        """Read a tensor of scales: as numbers, or as bytes where they stand for blocks."""
        info = self.table.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self._fill(info, info.start, raw)
        if info.dtype not in ("F32", "F16", "BF16"):
            return raw
        values = raw.view(DTYPES[info.dtype])
        self._check_finite(info, values, None)
        return values

    # Reading -------------------------------------------------------------------------------------

    def _view(self, info: TensorInfo, start: int, numel: int, stored: torch.dtype) -> torch.Tensor:
        assert self._maps is not None
        made = self._maps.get(info.file)
        if made is None:
            made = self._maps[info.file] = self._mapped(info.file)
        if start + numel * stored.itemsize > len(made):
            raise _shortened(info)
        return made.view(start, numel, stored)

    def _mapped(self, path: Path) -> MappedFile:
        file = self._open(path)
        try:
            return map_file(file)
        except OSError as err:
            raise MissingFile(
                f"{quoted(path)} cannot be mapped into memory: {err.strerror or err}. What it is "
                "on, a network drive perhaps, does not allow it: copy it to a local disk."
            ) from err

    def _read_straight(self, info: TensorInfo, start: int, out: torch.Tensor) -> None:
        size = out.element_size()
        step = _PIECE // size
        for begin in range(0, out.numel(), step):
            piece = out[begin : begin + step]
            staged = piece if piece.device.type == "cpu" else self._staging(piece.nbytes)
            self._fill(info, start + begin * size, staged.view(torch.uint8))
            if staged is not piece:
                piece.copy_(staged.view(out.dtype))
            elif piece.is_floating_point():
                self._check_finite(info, piece, None)

    def _read_converted(
        self, info: TensorInfo, start: int, out: torch.Tensor, stored: torch.dtype
    ) -> None:
        size = stored.itemsize
        step = _PIECE // size
        for begin in range(0, out.numel(), step):
            piece = out[begin : begin + step]
            staged = self._staging(piece.numel() * size)
            self._fill(info, start + begin * size, staged)
            piece.copy_(staged.view(stored))
            if self.device.type == "cpu":
                self._check_finite(info, piece, staged.view(stored))

    def _staging(self, nbytes: int) -> torch.Tensor:
        """Return ``nbytes`` of the staging buffer, which is kept for all tensors of the table."""
        if self._buffer is None or self._buffer.numel() < nbytes:
            pin = self.device.type == "cuda"
            self._buffer = torch.empty(max(nbytes, _PIECE), dtype=torch.uint8, pin_memory=pin)
        return self._buffer[:nbytes]

    def _fill(self, info: TensorInfo, offset: int, out: torch.Tensor) -> None:
        """Fill ``out`` (uint8, contiguous, CPU) from the file, or raise CorruptFile."""
        self._watch.check()
        buffer: Any = out.numpy()  # numpy's stubs do not say that an array is a buffer
        view = memoryview(buffer)
        done = 0
        try:
            file = self._open(info.file)
            file.seek(offset)
            # An unbuffered file may return less than it was asked for.
            while done < len(view):
                count = file.readinto(view[done : done + AT_ONCE])
                if not count:
                    break
                done += count
                self._watch.seen(count)
        except OSError as err:
            raise _unreadable(info, err) from err
        if done < len(view):
            raise CorruptFile(
                f"{quoted(info.file)} ends {len(view) - done:,} bytes early, inside tensor "
                f"{info.name!r}; it became shorter after its header was read. Download it again."
            )

    def _open(self, path: Path) -> io.FileIO:
        file = self._files.get(path)
        if file is None:
            if not os.path.isfile(path):
                raise MissingFile(f"{quoted(path)} is gone since its header was read. Restore it.")
            try:
                opened = io.FileIO(path, "rb")
            except OSError as err:
                raise MissingFile(
                    f"{quoted(path)} cannot be opened: {err.strerror or err}. Check who may read "
                    "it, and the drive that it is on."
                ) from err
            file = self._files[path] = self._stack.enter_context(opened)
        return file

    # Checks --------------------------------------------------------------------------------------

    def _check_finite(
        self, info: TensorInfo, values: torch.Tensor, stored: torch.Tensor | None
    ) -> None:
        """Raise CorruptFile when ``values`` hold NaN or infinity.

        ``stored`` are the same values as the file holds them, if known: where those are finite, the
        cast has overflowed, and UnsupportedModel is raised instead.
        """
        if not values.is_floating_point() or is_finite(values):
            return
        if stored is not None and is_finite(stored):
            name = str(values.dtype).removeprefix("torch.")
            raise UnsupportedModel(
                f"Tensor {info.name!r} of {quoted(info.file)} holds values beyond what {name} can "
                f"store (up to {torch.finfo(values.dtype).max:g}). Use bf16 or fp32."
            )
        raise _not_finite(info)


def _as_numbers(stored: torch.dtype, raw: torch.Tensor) -> tuple[torch.Tensor]:
    return (raw.view(stored),)


def _may_be_wild(stored: Storage, raw: torch.Tensor) -> Iterator[torch.Tensor]:
    return numbers_that_may_be_wild(raw.view(torch.int8), stored)


def _wrong(info: TensorInfo, reason: Reason) -> Exception:
    if isinstance(reason, OSError):
        return _unreadable(info, reason)
    return _shortened(info) if reason == "short" else _not_finite(info)


def _not_finite(info: TensorInfo) -> CorruptFile:
    return CorruptFile(
        f"Tensor {info.name!r} of {quoted(info.file)} holds NaN or infinity. The file is "
        "damaged; download it again."
    )


def _unreadable(info: TensorInfo, err: OSError) -> CorruptFile:
    return CorruptFile(
        f"{quoted(info.file)} cannot be read at tensor {info.name!r}: {err.strerror or err}. Check "
        "the disk, or download the file again."
    )


def _shortened(info: TensorInfo) -> CorruptFile:
    return CorruptFile(
        f"{quoted(info.file)} became shorter after its header was read: it ends before or inside "
        f"tensor {info.name!r}. Download it again."
    )
