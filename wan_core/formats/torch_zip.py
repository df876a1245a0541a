"""Tensor tables of PyTorch zip checkpoints (.pth, .pt, .bin, .ckpt), read without unpickling.

Such a file is a zip archive: a pickle that lists the tensors, and their bytes, uncompressed. The
pickle's opcodes are parsed by ``pickletools.genops``, which executes nothing, and interpreted by a
small machine that knows only the few names that a list of tensors needs and refuses every other
one. The weights are then read by their offset in the archive, like those of safetensors. Format:
``torch/serialization.py``, ``torch/_utils.py``; zip: PKWARE APPNOTE.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops
from typing import Any, BinaryIO, Final

from ..errors import CorruptFile, UnsafeFile, UnsupportedModel
from ..files import quoted, some_of
from .safetensors import DTYPE_BITS
from .table import AGAIN, MAX_DIMS, MAX_HEADER_BYTES, MAX_NAME, MAX_TENSORS, TensorInfo, TensorTable

_STORAGES: Final = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "DoubleStorage": "F64", "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16",
    "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
_DTYPES: Final = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64",
    "int32": "I32", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
MAX_STEPS: Final = 400_000
"""Most opcodes of one pickle; a list of 2,000 tensors takes about 60,000."""
_NESTS: Final = ("generator_ema", "generator", "state_dict", "model", "module", "params")
"""Where trainers put a model's tensors; of a distilled one beside what trained it (Self-Forcing)
the averaged weights, which its authors run."""
_SAVE_AS: Final = "Use a .safetensors or .gguf version of this model."


@dataclass(frozen=True, slots=True)
class _Name:
    """Stands for a known, harmless global of the pickle; the object itself is never imported."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MARK: Final = object()
_KNOWN: Final = frozenset(
    {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"),
     ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter"),
     ("torch.storage", "UntypedStorage")}
    | {("torch", name) for name in (*_STORAGES, *_DTYPES)}
)  # fmt: skip


def parse_pickle(file: BinaryIO, path: Path, size: int) -> TensorTable:
    """Read the tensor table of an open torch zip checkpoint of ``size`` bytes.

    Raises UnsafeFile for a pickle that names anything but tensors and for a TorchScript program,
    CorruptFile for a damaged or truncated file. Nothing in the file is executed.
    """
    _check_directory(file, path, size)
    try:
        archive = zipfile.ZipFile(file)
        members = {info.filename: info for info in archive.infolist()}
        root = next(n for n in members if n.endswith("data.pkl") and n.count("/") <= 1)
        root = root.removesuffix("data.pkl")
        if members[root + "data.pkl"].file_size > MAX_HEADER_BYTES:
            raise CorruptFile(f"The list of tensors in {quoted(path)} is too long to be one.")
        program = archive.read(root + "data.pkl")
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, StopIteration,
            RuntimeError, OSError, EOFError, KeyError, OverflowError) as err:  # fmt: skip
        raise CorruptFile(
            f"{quoted(path)} is not a whole PyTorch file: {str(err)[:80] or 'no data.pkl in it'}. "
            f"{AGAIN}"
        ) from err
    if any(n.startswith(root + "code/") for n in members):
        raise UnsafeFile(f"{quoted(path)} is a TorchScript program, no list of weights. {_SAVE_AS}")
    found, notes = _named_tensors(_run(program, path), path)
    places = _Places(file, path, size, members, root)
    tensors = {name: places.info(name, tensor) for name, tensor in found.items()}
    return TensorTable(path, (path,), tensors, {}, "pickle", len(program), notes)


def _check_directory(file: BinaryIO, path: Path, size: int) -> None:
    """Bound the size of the zip's directory, because ``zipfile`` reads it into memory at once.

    The "end of central directory" record (PK 05 06) states it, at the end of the archive before a
    comment of at most 65,535 bytes. Large archives state it in the zip64 record (PK 06 06) instead.
    """
    file.seek(max(0, size - 66_000))
    tail = file.read(66_000)
    at = tail.rfind(b"PK\x05\x06")
    length = 2**63
    if at >= 0 and len(tail) >= at + 22:
        (length,) = struct.unpack_from("<I", tail, at + 12)
        if length == 0xFFFFFFFF:
            start = tail.rfind(b"PK\x06\x06", 0, at)
            if start >= 0 and len(tail) >= start + 56:
                (length,) = struct.unpack_from("<Q", tail, start + 40)
    if length > MAX_HEADER_BYTES:
        raise CorruptFile(f"{quoted(path)} is a zip archive without a whole directory. {AGAIN}")
    file.seek(0)


def _named_tensors(value: Any, path: Path) -> tuple[dict[str, _Tensor], tuple[str, ...]]:
    """Return the tensors by name, also where the dict is nested under a usual key, and notes."""
    for nest in _NESTS:
        if isinstance(value, dict) and isinstance(value.get(nest), dict):
            value = value[nest]
    if not isinstance(value, dict):
        raise CorruptFile(f"{quoted(path)} holds no table of named tensors. {_SAVE_AS}")
    tensors = {k: v for k, v in value.items() if isinstance(v, _Tensor) and isinstance(k, str)}
    tables = [str(key) for key, entry in value.items() if isinstance(entry, dict) and entry]
    if not tensors and tables:
        raise UnsupportedModel(
            f"{quoted(path)} holds no tensors but tables of them, {some_of(tables)}, as training "
            "saves do. Save the table of the model's weights as a .safetensors file."
        )
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise CorruptFile(
            f"{quoted(path)} holds {len(tensors):,} named tensors; 1 to {MAX_TENSORS:,} are "
            f"allowed. {_SAVE_AS}"
        )
    others = len(value) - len(tensors)
    note = f"{path.name} also holds {others} entries that are no tensors."
    return tensors, (note,) if others else ()


class _Places:
    """Finds where in the file the bytes of each storage lie."""

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        size: int,
        members: Mapping[str, zipfile.ZipInfo],
        root: str,
    ) -> None:
        self._file, self._path, self._size = file, path, size
        self._members, self._root = members, root
        self._starts: dict[str, tuple[int, int]] = {}

    def info(self, name: str, tensor: _Tensor) -> TensorInfo:
        bits = DTYPE_BITS[tensor.dtype]
        numel = math.prod(tensor.shape)
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise self._fail(f"a name is empty, too long or not printable: {name[:80]!r}")
        if len(tensor.shape) > MAX_DIMS or numel >= 2**48:
            raise self._fail(f"tensor {name!r} has the impossible shape {list(tensor.shape)[:9]}")
        if tensor.stride != _contiguous(tensor.shape, tensor.stride):
            raise self._fail(f"tensor {name!r} is not stored in one piece")
        start, length = self._span(tensor.storage.key)
        begin = tensor.offset * bits // 8
        end = begin + numel * bits // 8
        if end > length:
            raise self._fail(f"tensor {name!r} needs {end:,} bytes of a storage of {length:,}")
        return TensorInfo(name, tensor.dtype, tensor.shape, start + begin, start + end, self._path)

    def _span(self, key: str) -> tuple[int, int]:
        if key not in self._starts:
            member = self._members.get(f"{self._root}data/{key}")
            if member is None or member.compress_type != zipfile.ZIP_STORED:
                raise self._fail(f"the bytes of storage {key[:40]!r} are missing or compressed")
            # A damaged directory may say any number, also one that cannot be sought to.
            inside = 0 <= member.header_offset < self._size
            self._file.seek(member.header_offset if inside else self._size)
            head = self._file.read(30)
            if len(head) < 30 or head[:4] != b"PK\x03\x04":
                raise self._fail(f"storage {key[:40]!r} does not begin where the directory says")
            # The local header repeats the name and may have other extra fields than the directory.
            name, extra = struct.unpack_from("<HH", head, 26)
            start = member.header_offset + 30 + name + extra
            if start + member.file_size > self._size:
                raise self._fail(f"storage {key[:40]!r} reaches past the end of the file")
            self._starts[key] = start, member.file_size
        return self._starts[key]

    def _fail(self, problem: str) -> CorruptFile:
        return CorruptFile(f"{quoted(self._path)} is damaged: {problem}. {AGAIN}")


def _contiguous(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor; axes of size 1 keep the stride they have."""
    out, step = list(stride), 1
    for axis in reversed(range(min(len(shape), len(out)))):
        if shape[axis] != 1:
            out[axis] = step
        step *= shape[axis]
    return tuple(out) if len(out) == len(shape) else ()


def _run(program: bytes, path: Path) -> Any:
    """Interpret a pickle's opcodes; return the object it describes, with stand-ins for tensors."""
    machine = _Machine(path)
    try:
        for count, (opcode, argument, _) in enumerate(genops(program)):
            if opcode.name == "STOP":
                return machine.stack.pop()
            if count > MAX_STEPS:
                raise ValueError(f"it has more than {MAX_STEPS:,} steps")
            machine.step(opcode.name, argument)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as err:
        raise CorruptFile(
            f"The list of tensors in {quoted(path)} is damaged ({str(err)[:80]}). {AGAIN}"
        ) from err
    raise CorruptFile(f"The list of tensors in {quoted(path)} does not end. {AGAIN}")


class _Machine:
    """A pickle interpreter that imports and calls nothing, and refuses every unknown name."""

    def __init__(self, path: Path) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._path = path

    def step(self, name: str, argument: Any) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise self._refuse(f"the opcode {name}")

    def _refuse(self, what: str) -> UnsafeFile:
        return UnsafeFile(
            f"{quoted(self._path)} is a pickle that asks for {what}, which a list of weights does "
            f"not need; nothing of it was run. {_SAVE_AS}"
        )

    def _since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else int(index)] = self.stack[-1]

    def get(self, index: Any) -> None:
        self.stack.append(self._memo[int(index)])

    def tuple_of(self, count: int) -> None:
        items = self.stack[len(self.stack) - count :]
        if len(items) != count:
            raise ValueError("stack is empty")
        del self.stack[len(self.stack) - count :]
        self.stack.append(tuple(items))

    def tuple_marked(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self.stack[-1].append(item)

    def appends(self, _: Any) -> None:
        items = self._since_mark()
        self.stack[-1].extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def set_items(self, _: Any) -> None:
        self._fill(self._since_mark())

    def _fill(self, items: list[Any]) -> None:
        table = self.stack[-1]
        # Only texts and integers as keys: hashing a deeply nested tuple would overflow the C stack.
        if not isinstance(table, dict) or any(type(key) not in (str, int) for key in items[::2]):
            raise TypeError("an item is set with an odd key, or on something that is no dict")
        table.update(zip(items[::2], items[1::2], strict=True))

    def global_(self, argument: Any) -> None:
        if argument is None:
            name, module = self.stack.pop(), self.stack.pop()
        else:
            module, name = str(argument).split(" ", 1)
        # Both must be text before the lookup hashes them, for the reason given in _fill.
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name is no text")
        if (module, name) not in _KNOWN:
            raise self._refuse(repr(f"{module}.{name}"[:80]))
        self.stack.append(_Name(module, name))

    def persistent(self, _: Any) -> None:
        kind, storage, key, *_rest = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str):
            raise ValueError("a storage is not one")
        self.stack.append(_Storage(_STORAGES[storage.name], key))

    def build(self, _: Any) -> None:
        # The state of an OrderedDict is torch's record of module versions, which is not needed.
        self.stack.pop()

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name):
            raise self._refuse("a call of something that is no function")
        if function.name == "OrderedDict":
            if arguments:
                raise self._refuse("an OrderedDict made in an odd way")
            self.stack.append({})
        elif function.name == "_rebuild_parameter":
            self.stack.append(arguments[0])
        elif function.name.startswith("_rebuild_tensor"):
            self.stack.append(_rebuilt(function.name, arguments))
        else:
            raise self._refuse(f"a call of {function.name}")


def _rebuilt(function: str, arguments: Sequence[Any]) -> _Tensor:
    storage, offset, shape, stride = arguments[:4]
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor is not one")
    dtype = _DTYPES[arguments[6].name] if function.endswith("v3") else storage.dtype
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(stride))


_LITERALS: Final = frozenset(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    )
)  # fmt: skip
_CONSTANTS: Final[Mapping[str, Callable[[], Any]]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_ACTIONS: Final[Mapping[str, Callable[[_Machine, Any], None]]] = {
    "MARK": _Machine.mark, "POP": _Machine.pop, "TUPLE": _Machine.tuple_marked,
    "TUPLE1": lambda m, _: m.tuple_of(1), "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3), "APPEND": _Machine.append,
    "APPENDS": _Machine.appends, "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_, "STACK_GLOBAL": _Machine.global_,
    "BINPERSID": _Machine.persistent, "REDUCE": _Machine.reduce, "BUILD": _Machine.build,
    "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put, "PUT": _Machine.put,
    "MEMOIZE": _Machine.put, "BINGET": _Machine.get, "LONG_BINGET": _Machine.get,
    "GET": _Machine.get,
}  # fmt: skip
