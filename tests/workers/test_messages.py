"""Messages: what is written is read, bit for bit; half of one is none, and nonsense is refused."""

from __future__ import annotations

import io
import json
import struct

import pytest
import torch
from torch import Tensor

from wan_core.errors import BrokenState
from wan_core.workers import messages
from wan_core.workers.messages import read_message, write_message

KINDS = {
    str(kind): kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype) and not str(kind).startswith(("torch.q", "torch.bits"))
}
"""Every dtype of this torch that has numbers, or bits, and nothing beside them."""


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def of_kind(kind: torch.dtype) -> Tensor:
    """Random bytes as a tensor (2, 3) of a dtype; those of bool are 0 and 1."""
    raw = torch.randint(0, 256, (6 * kind.itemsize,), dtype=torch.uint8)
    return (raw % 2 if kind == torch.bool else raw).view(kind).view(2, 3)


def test_every_tensor_arrives_as_it_was() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 5, generator=g) * 99
    sent = {name: of_kind(kind) for name, kind in KINDS.items()}
    twisted = torch.complex(noise, noise)
    sent |= {"conjugated": twisted.conj(), "negated": twisted.conj().imag}
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
            assert found[1][name].dtype == tensor.dtype
            assert found[1][name].shape == tensor.shape
            plain = tensor.resolve_conj().resolve_neg()
            assert torch.equal(bits(found[1][name]), bits(plain)), name
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


def test_what_lies_in_order_is_written_from_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of a long clip have a gigabyte: no copy of them is made on the way."""
    written: list[int] = []
    bytes_of = messages._bytes_of

    def watched(tensor: Tensor) -> memoryview:
        written.append(tensor.data_ptr())
        return bytes_of(tensor)

    monkeypatch.setattr(messages, "_bytes_of", watched)
    sent = {name: of_kind(kind) for name, kind in KINDS.items()}
    sent["with a gradient"] = torch.ones(2, requires_grad=True)
    sent["behind others"] = torch.ones(4, 3)[2:]
    write_message(io.BytesIO(), {}, sent)
    assert written == [tensor.data_ptr() for tensor in sent.values()]


@pytest.mark.parametrize("kind", ["Tensor", "load", "no_such", ""])
def test_what_is_no_dtype_is_refused(kind: str) -> None:
    text = json.dumps([{}, [["a", kind, [2]]]]).encode()
    with pytest.raises(BrokenState, match="no dtype"):
        read_message(io.BytesIO(struct.pack(">QQ", len(text), 8) + text + bytes(8)))
