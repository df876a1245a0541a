"""Messages: what is written is read, bit for bit; half of one is none, and nonsense is refused."""

from __future__ import annotations

import io
import json
import struct

import pytest
import torch

from wan_core.errors import BrokenState
from wan_core.workers.messages import _KINDS, read_message, write_message


def test_every_tensor_arrives_as_it_was() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 5, generator=g) * 99
    sent = {name: noise.to(kind) for name, kind in _KINDS.items()}
    sent |= {"part": noise[:, 1:, ::2], "turned": noise.transpose(0, 2), "same": noise}
    sent |= {"number": torch.tensor(3.5), "nothing": torch.empty(0, 4), "also the same": noise}
    stream = io.BytesIO()
    write_message(stream, {"type": "unit", "deep": [1, {"a": None}]}, sent)
    write_message(stream, {"type": "beat"})
    whole = stream.getvalue()
    stream.seek(0)
    for header, tensors in (
        ({"type": "unit", "deep": [1, {"a": None}]}, sent),
        ({"type": "beat"}, {}),
    ):
        found = read_message(stream)
        assert found is not None and found[0] == header and list(found[1]) == list(tensors)
        for name, tensor in tensors.items():
            assert found[1][name].dtype == tensor.dtype and torch.equal(found[1][name], tensor)
    assert read_message(stream) is None
    ends = [*range(40), *range(40, len(whole) - 40, 97)]
    assert all(read_message(io.BytesIO(whole[:end])) is None for end in ends)


@pytest.mark.parametrize(
    ("told", "nbytes"),
    [
        ([["a", "float32", [2]]], 7),
        ([["a", "float32", [2]]], 1 << 39),
        ([["a", "float32", [1 << 38]]], 8),
        ([], 2**41),
    ],
)
def test_sizes_that_contradict_each_other_are_refused_before_memory_is_taken(
    told: list[object], nbytes: int
) -> None:
    text = json.dumps([{}, told]).encode()
    data = struct.pack(">QQ", len(text), nbytes) + text + bytes(8)
    with pytest.raises(BrokenState):
        read_message(io.BytesIO(data))
