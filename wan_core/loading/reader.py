"""Stored bytes to tensors: read by offset, converted piece by piece, checked for NaN on the way.

A tensor that needs no conversion and stays on the CPU is read straight into the memory it keeps.
Any other is read through one small staging buffer, so that loading never needs more than the result
and that buffer. On request, tensors that need no conversion are views of the mapped file instead:
they are ready at once, and the system can drop their pages when RAM is short, but the file must not
change meanwhile.
"""

from __future__ import annotations

import io
import mmap
import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ..errors import CorruptFile, MissingDependency, MissingFile, UnsupportedModel
from ..files import quoted
from ..formats import GGUF_TYPES, TensorInfo, TensorTable
from ..models import Source

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that can be read without dequantising, by their name in a header."""

FP8: Final = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_PIECE: Final = 16 * 2**20
"""Bytes read, and converted, at a time."""
_CHECKED: Final = 2**20
"""Bytes checked for NaN at a time: few enough to stay in the processor's cache meanwhile."""
_mapped: weakref.WeakKeyDictionary[mmap.mmap, range] = weakref.WeakKeyDictionary()
"""Address ranges of the mapped files that are still the memory of some tensor."""


class TensorReader:
    """Reads the tensors of one table to one device; a context manager that keeps the files open.

    Its methods raise CorruptFile when a file is shorter than its header says or holds NaN or
    infinity, and UnsupportedModel for a dtype that cannot be read or is too small for the values.
    """

    def __init__(
        self, table: TensorTable, device: torch.device | str = "cpu", *, mapped: bool = False
    ) -> None:
        """``mapped`` makes tensors that stay as stored, on the CPU, views of the mapped file."""
        self.table = table
        self.device = torch.device(device)
        self._maps: dict[Path, mmap.mmap] | None = {} if mapped else None
        self._files: dict[Path, io.FileIO] = {}
        self._stack = ExitStack()
        self._buffer: torch.Tensor | None = None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer = None
        self._files.clear()
        self._stack.close()

    def read(
        self,
        source: Source,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        *,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the values of ``source`` in ``shape`` on the device, in ``dtype`` or as stored.

        ``dtype`` does not apply to integers; GGUF blocks are dequantised to it, or to bf16 for
        None. ``scale`` (float32, one number or one for each row) is multiplied in before the cast.
        """
        info = self.table.tensors[source.name]
        if info.dtype not in DTYPES:
            return self._dequantize(source, info, shape, dtype or torch.bfloat16)
        stored = DTYPES[info.dtype]
        target = dtype if dtype is not None and stored.is_floating_point else stored
        numel = info.numel // source.parts
        # A source may be one of several equal parts of a stored tensor (q, k or v of a fused one).
        start = info.start + source.part * (info.nbytes // source.parts)
        straight = target == stored and scale is None and self.device.type == "cpu"
        # A view must begin at a multiple of its element size; single files do not always align.
        if straight and self._maps is not None and start % stored.itemsize == 0 and numel:
            return self._view(self._maps, info, start, numel, stored).view(shape)
        out = torch.empty(numel, dtype=target, device=self.device)
        if straight:
            self._read_straight(info, start, out)
        else:
            columns = max(1, numel // shape[0]) if shape else 1
            self._read_converted(info, start, out, stored, columns, scale)
        if self.device.type != "cpu":
            # Once for the whole tensor: each check makes the host wait for the device. On the CPU
            # every piece has been checked already, while it was in the processor's cache.
            self._check_finite(info, out, None)
        return out.view(shape)

    def raw(self, name: str) -> torch.Tensor:
        """Return a tensor's bytes as stored: uint8 (rows, bytes of a row), on the device."""
        info = self.table.tensors[name]
        out = torch.empty(info.nbytes, dtype=torch.uint8, device=self.device)
        if self.device.type == "cpu":
            self._fill(info, info.start, out)
        else:
            self._read_converted(info, info.start, out, torch.uint8, 1, None)
        return out.view(info.shape[0] if len(info.shape) > 1 else 1, -1)

    def scale(self, source: Source, rows: int) -> torch.Tensor | None:
        """Return the scale of ``source``, if any: float32, CPU, one number or ``rows`` of them."""
        if source.scale is None:
            return None
        info = self.table.tensors[source.scale]
        if info.dtype not in ("F32", "F16", "BF16"):
            raise UnsupportedModel(
                f"Scale {info.name!r} of {quoted(info.file)} is stored as {info.dtype}; only fp8 "
                "weights with floating-point scales can be used. Get an fp8_scaled or bf16 version."
            )
        values = torch.empty(info.numel, dtype=DTYPES[info.dtype])
        self._fill(info, info.start, values.view(torch.uint8))
        scale = values.to(torch.float32)
        self._check_finite(info, scale, None)
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.numel() != rows * source.parts:
            raise UnsupportedModel(
                f"Scale {info.name!r} of {quoted(info.file)} has shape {list(info.shape)}; one "
                f"number, or one for each of {rows * source.parts} rows, can be used. Get another "
                "version of the model."
            )
        return scale.reshape(source.parts, rows)[source.part]

    # Reading -------------------------------------------------------------------------------------

    def _view(
        self,
        maps: dict[Path, mmap.mmap],
        info: TensorInfo,
        start: int,
        numel: int,
        stored: torch.dtype,
    ) -> torch.Tensor:
        if info.file not in maps:
            made = maps[info.file] = _map_file(self._open(info.file))
            # Known by its addresses, so that ``is_mapped`` can tell such tensors from others.
            first = torch.frombuffer(made, dtype=torch.uint8).data_ptr()
            _mapped[made] = range(first, first + len(made))
        if start + numel * stored.itemsize > len(maps[info.file]):
            raise CorruptFile(f"{quoted(info.file)} became shorter after its header was read.")
        view = torch.frombuffer(maps[info.file], dtype=stored, count=numel, offset=start)
        self._check_finite(info, view, None)
        return view

    def _read_straight(self, info: TensorInfo, start: int, out: torch.Tensor) -> None:
        size = out.element_size()
        step = _PIECE // size
        for begin in range(0, out.numel(), step):
            piece = out[begin : begin + step]
            self._fill(info, start + begin * size, piece.view(torch.uint8))
            self._check_finite(info, piece, None)

    def _read_converted(
        self,
        info: TensorInfo,
        start: int,
        out: torch.Tensor,
        stored: torch.dtype,
        columns: int,
        scale: torch.Tensor | None,
    ) -> None:
        size = stored.itemsize
        # A piece is a whole number of rows, so that the scales of its rows can be cut out.
        step = max(1, _PIECE // size // columns) * columns
        per_row = scale is not None and scale.dim() > 0
        for begin in range(0, out.numel(), step):
            piece = out[begin : begin + step]
            staged = self._staging(piece.numel() * size)
            self._fill(info, start + begin * size, staged)
            # The stored dtype crosses the bus, not the wider one it becomes. This copy is done when
            # the call returns, so the staging buffer is free for the next piece.
            values = staged.view(stored).to(self.device)
            if scale is not None:
                end = begin + piece.numel()
                own = scale[begin // columns : end // columns] if per_row else scale
                scaled = values.to(torch.float32).view(-1, columns)
                values = scaled.mul_(own.to(self.device).view(-1, 1)).view(-1)
            piece.copy_(values)
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
        buffer: Any = out.numpy()  # numpy's stubs do not say that an array is a buffer
        view = memoryview(buffer)
        done = 0
        try:
            file = self._open(info.file)
            file.seek(offset)
            # An unbuffered file may return less than it was asked for.
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    break
                done += count
        except OSError as err:
            raise CorruptFile(
                f"{quoted(info.file)} cannot be read at tensor {info.name!r}: "
                f"{err.strerror or err}. Check the disk, or download the file again."
            ) from err
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
            file = self._files[path] = self._stack.enter_context(io.FileIO(path, "rb"))
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
        raise CorruptFile(
            f"Tensor {info.name!r} of {quoted(info.file)} holds NaN or infinity. The file is "
            "damaged; download it again."
        )

    # GGUF ----------------------------------------------------------------------------------------

    def _dequantize(
        self, source: Source, info: TensorInfo, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a GGUF-quantised tensor as ``dtype``, dequantised by the gguf package."""
        gguf, kind = import_gguf(), gguf_type(info)
        rows = info.shape[0] if len(info.shape) > 1 else 1
        row_bytes = info.nbytes // rows
        first = source.part * rows // source.parts
        count = rows // source.parts
        out = torch.empty(count, info.numel // rows, dtype=dtype, device=self.device)
        # Some rows at a time: dequantising makes float32, several times the bytes of the result.
        step = max(1, _PIECE // row_bytes)
        for begin in range(0, count, step):
            staged = torch.empty(min(step, count - begin), row_bytes, dtype=torch.uint8)
            self._fill(info, info.start + (first + begin) * row_bytes, staged.view(-1))
            values = torch.from_numpy(gguf.quants.dequantize(staged.numpy(), kind))
            self._check_finite(info, values, None)
            out[begin : begin + step].copy_(values)
        return out.view(shape)


# For each dtype: the unsigned integer of its size, and a limit. Once the sign is shifted out, bits
# at or above the limit are NaN or infinity: the exponent is all ones. e4m3fn has no infinity; its
# only NaN has all bits set.
_LIMITS: Final[Mapping[torch.dtype, tuple[Any, int]]] = {
    torch.float64: (np.uint64, 0xFFE0_0000_0000_0000), torch.float32: (np.uint32, 0xFF00_0000),
    torch.float16: (np.uint16, 0xF800), torch.bfloat16: (np.uint16, 0xFF00),
    torch.float8_e4m3fn: (np.uint8, 0xFE), torch.float8_e5m2: (np.uint8, 0xF8),
}  # fmt: skip


def is_finite(values: torch.Tensor) -> bool:
    """Say whether no value is NaN or infinite, for any floating-point dtype.

    On the CPU the bits are compared, in one thread: ``torch.isfinite`` takes 30 times as long as
    reading the values, and its threads wait for each other where the cores are busy.
    """
    if values.device.type != "cpu":
        if values.dtype in FP8:
            values = values.to(torch.float16)
        # The sum is finite only if every term is, and needs no memory. A sum of finite terms may
        # overflow, so one that is not finite is looked at again.
        return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
    unsigned, limit = _LIMITS[values.dtype]
    bits = values.reshape(-1).view(torch.uint8).numpy().view(unsigned)
    step = _CHECKED // bits.itemsize
    doubled = np.empty(min(step, bits.size), unsigned)
    for begin in range(0, bits.size, step):
        part = bits[begin : begin + step]
        # Adding a number to itself shifts its sign bit out.
        if np.add(part, part, out=doubled[: part.size]).max() >= limit:
            return False
    return True


def is_mapped(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is a view of a mapped file, whose pages count as available RAM."""
    return tensor.device.type == "cpu" and any(
        tensor.data_ptr() in addresses for addresses in list(_mapped.values())
    )


def _map_file(file: io.FileIO) -> mmap.mmap:
    """Map a file so that writing to its tensors changes this process's pages, never the file."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # A private mapping reserves swap for pages that may be written to. Without NORESERVE a file
    # larger than RAM could not be mapped.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def gguf_type(info: TensorInfo) -> Any:
    """Return the gguf package's type of a quantised tensor; UnsupportedModel if unreadable."""
    if info.dtype not in GGUF_TYPES:
        raise UnsupportedModel(
            f"Tensor {info.name!r} of {quoted(info.file)} is stored as {info.dtype}, which cannot "
            f"be read. Readable are {', '.join(sorted(GGUF_TYPES))} and fp8. Get the model in one "
            "of these."
        )
    return import_gguf().GGMLQuantizationType[info.dtype]


def import_gguf() -> Any:
    """Return the gguf package; MissingDependency when it is absent or broken."""
    try:
        import gguf
        import gguf.quants
    except ImportError as err:
        raise MissingDependency(
            f"GGUF files need the package 'gguf' ({err}). Install it: pip install gguf."
        ) from err
    return gguf
