"""Messages between a driver and its workers: JSON and tensors, over the pipes of the process.

A message is two lengths of 8 bytes, a JSON array (a header, and name, dtype and shape of each
tensor), and the tensors' bytes as they lie, one after the other. They are written from where they
are and read to where they stay: a pass of a gang waits for the last of its processes that has its
latents. Nothing in a message can name code. Both ends are this package; what does not look like a
message is an error.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import BrokenState

Message = tuple[dict[str, Any], dict[str, Tensor]]
"""(header, tensors); the header's "type" says what it is."""
_LENGTHS = struct.Struct(">QQ")
_MOST_JSON, _MOST_TENSORS = 2**24, 2**40


def write_message(
    stream: BinaryIO, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a message and flush it. Tensors are copied to the CPU, in their dtype.

    They are dense, and of any dtype but torch's quantised ones, whose scales are not sent. What is
    on the CPU already, and contiguous, is written as it lies.
    """
    plain = {name: _in_ram(tensor) for name, tensor in (tensors or {}).items()}
    told = [[k, str(t.dtype).removeprefix("torch."), list(t.shape)] for k, t in plain.items()]
    text = json.dumps([header, told]).encode()
    stream.write(_LENGTHS.pack(len(text), sum(t.nbytes for t in plain.values())))
    stream.write(text)
    for tensor in plain.values():
        stream.write(_bytes_of(tensor))
    stream.flush()


def read_message(stream: BinaryIO) -> Message | None:
    """Read the next message; None at the end of the stream, also in the middle of one.

    Raises BrokenState where something else comes.
    """
    start = _exactly(stream, _LENGTHS.size)
    if start is None:
        return None
    text_length, data_length = _LENGTHS.unpack(start)
    if text_length > _MOST_JSON or data_length > _MOST_TENSORS:
        raise BrokenState(f"a worker's message claims {text_length} and {data_length} bytes")
    text = _exactly(stream, text_length)
    if text is None:
        return None
    header, told = json.loads(text)
    # Sizes first, which take no memory.
    given = [(name, _dtype(kind), torch.Size(shape)) for name, kind, shape in told]
    nbytes = sum(shape.numel() * dtype.itemsize for _, dtype, shape in given)
    if nbytes != data_length:
        raise BrokenState(f"a worker's message has {data_length} bytes for tensors of {nbytes}")
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape in given:
        tensor = torch.empty(shape, dtype=dtype)
        if not _fill(stream, _bytes_of(tensor)):
            return None
        tensors[name] = tensor
    return header, tensors


def _dtype(name: str) -> torch.dtype:
    """Return the dtype of a name; raises BrokenState where torch has none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise BrokenState(
            f"a worker's message has a tensor of {name!r}, which is no dtype of torch"
        )
    return found


def _in_ram(tensor: Tensor) -> Tensor:
    """Return a tensor in RAM whose bytes lie in order: itself if they do."""
    # What only counts as conjugated or negated has other bytes than numbers.
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in RAM, where they are."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _exactly(stream: BinaryIO, count: int) -> bytearray | None:
    found = bytearray(count)
    return found if _fill(stream, memoryview(found)) else None


def _fill(stream: BinaryIO, room: memoryview) -> bool:
    """Read as many bytes as there is room for; False where the stream ends before."""
    while room:
        count: int = stream.readinto(room)  # type: ignore[attr-defined]
        if not count:
            return False
        room = room[count:]
    return True
