"""Messages between a driver and its workers: JSON and tensors, over the pipes of the process.

A message is two lengths of 8 bytes, a JSON object, and the tensors in the safetensors format.
Nothing in a message can name code. Both ends are this package; what does not look like a message
is an error.
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
    """Write a message and flush it. Tensors are copied to the CPU, in their dtype."""
    from safetensors.torch import save

    text = json.dumps(header).encode()
    data = b""
    if tensors:
        # Cloned, because two names may share memory, which the format does not have.
        plain = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
        data = save(plain)
    stream.write(_LENGTHS.pack(len(text), len(data)))
    stream.write(text)
    stream.write(data)
    stream.flush()


def read_message(stream: BinaryIO) -> Message | None:
    """Read the next message; None at the end of the stream, also in the middle of one."""
    from safetensors.torch import load

    start = _exactly(stream, _LENGTHS.size)
    if start is None:
        return None
    text_length, data_length = _LENGTHS.unpack(start)
    if text_length > _MOST_JSON or data_length > _MOST_TENSORS:
        raise BrokenState(f"a worker's message claims {text_length} and {data_length} bytes")
    text = _exactly(stream, text_length)
    data = _exactly(stream, data_length)
    if text is None or data is None:
        return None
    header: dict[str, Any] = json.loads(text)
    # Copied by ``load`` into tensors of their own.
    return header, {name: torch.as_tensor(t) for name, t in load(data).items()} if data else {}


def _exactly(stream: BinaryIO, count: int) -> bytes | None:
    pieces = []
    while count:
        piece = stream.read(min(count, 2**24))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
