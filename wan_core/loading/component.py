"""Loads one component: from its file or folder to a diffusers or transformers module.

The module is first built on the meta device, without memory. Before any weight is read, its
parameters are compared by name and shape with the tensors in the headers. Then each tensor is read
straight to the dtype and device asked for. The module equals, in every parameter and its dtype,
what ``from_pretrained(folder, dtype=...)`` of diffusers or transformers returns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..detect import IdentifiedFile, identify, join_vace
from ..errors import CorruptFile, ModelMismatch, UnsupportedModel
from ..files import quoted, some_of
from ..formats import Storage, TensorInfo, TensorTable, logical_shape, read_table
from ..models import Mapped, Source, cast_at_use, map_names, stays_stored
from .blueprint import (
    Blueprint,
    add_fun_layers,
    build,
    found_blueprint,
    stated_blueprint,
    with_vace,
)
from .dequantize import Scales
from .dtypes import keep_in_fp32, stays_fp32
from .mapped import Watch, stored_at
from .quantized import (
    Rounding,
    StoredEmbedding,
    StoredLinear,
    layer_of_fp8,
    replace_layer,
    rounded_to_fp8,
)
from .reader import DTYPES, FP8, Amount, TensorReader

KINDS = ("transformer", "vae", "text_encoder", "image_encoder")
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}


def load_component(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    kind: str | None = None,
    keep_quantized: bool = False,
    map_file: bool = False,
    align: bool = False,
    fp8_storage: bool | torch.device = False,
    look_later: bool = False,
    module_path: str | os.PathLike[str] | None = None,
    interrupt_check: Callable[[], object] = lambda: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> nn.Module:
    """Return the component that a file or folder holds, as a diffusers or transformers module.

    ``dtype`` is what parameters are cast to, except those the class keeps in fp32. None keeps each
    tensor's stored dtype; fp8 and GGUF weights then become bf16. ``kind`` ("transformer", "vae",
    "text_encoder" or "image_encoder") is the kind that is expected; another one is refused.

    ``keep_quantized`` leaves the weights of linear layers as stored (fp8 or GGUF blocks) and
    dequantises them at each call, computing in ``dtype``. ``map_file`` makes weights that need no
    conversion views of the mapped file, which must then not change while the module is in use.

    ``align`` maps plain numbers only where the file has them aligned, for modules that compute on
    the CPU. ``fp8_storage`` stores the matrices of a transformer's blocks in fp8 where the file has
    not, each as soon as it is read; this changes the result. Given a CUDA device they are rounded
    there, if it has memory free. ``interrupt_check`` is called several times a second while the
    file is read, and ``progress`` with (bytes read, bytes in all).

    ``look_later`` leaves mapped weights unread: whoever uses the module does so after a
    ``first_look``, in which they are sent to where they are used.

    ``module_path`` is a VACE module that is joined with the text-to-video transformer of ``path``.

    A .pth file is read when ``path`` names it, never when it only lies in the folder that ``path``
    names. Raises ModelFileError, ModelMismatch or UnsupportedModel; where the headers show the
    mistake, before any weight is read.
    """
    check = _checked(Path(path), kind, module_path)
    table, module, part = check.table, check.module, check.part
    amount = Amount(table, progress)
    watch = Watch(interrupt_check, amount.more)
    with TensorReader(
        table, device, mapped=map_file, align=align, watch=watch, look_later=look_later
    ) as reader:
        keeping = _Keeping(keep_quantized, fp8_storage)
        _Filling(module, table, reader, check.sources, dtype, part, keeping, amount, watch).run()
    # What no file holds comes last: until now these buffers are on the meta device.
    _restore_buffers(module, torch.device(device))
    _tie(module, table)
    _keep_attention(module)
    return module.eval().requires_grad_(False)


def check_component(path: str | os.PathLike[str], kind: str) -> None:
    """Compare a file's or folder's headers with the module it would fill, and read nothing.

    Raises as :func:`load_component` does before it reads a weight.
    """
    _checked(Path(path), kind, None)


def _checked(source: Path, kind: str | None, module_path: str | os.PathLike[str] | None) -> _Check:
    """Return the module that the file fills, without memory yet, compared with its headers."""
    part, stated = _identified(source, read_table(source), kind)
    if module_path is not None:
        part = join_vace(part, identify(read_table(module_path)))
        stated = None if stated is None else with_vace(stated, part)
    table = part.table
    mapped = map_names(part.kind, table.tensors, part.prefix)
    plan = stated or found_blueprint(part, mapped)
    # Without memory, so that a wrong file is refused before gigabytes are allocated or read.
    module = build(plan)
    if part.transformer is not None:
        add_fun_layers(module, part.transformer)
    check = _Check(plan, table, mapped, module, part)
    check.run()
    return check


_TORCHS = "native"
"""diffusers' name of the attention that torch computes, as torch chooses."""


def _keep_attention(module: nn.Module) -> None:
    """Have a transformer's attention computed by torch, whatever is set for others.

    diffusers keeps one backend per process for all processors that name none: another program that
    sets it for its own model would change every other model's result.
    """
    if _attention_is_named():
        return
    for part in module.modules():
        processor = getattr(part, "processor", None)
        if processor is not None and getattr(processor, "_attention_backend", "") is None:
            processor._attention_backend = _TORCHS


def attends_as_torch(processor: Any) -> bool:
    """Say whether a diffusers processor attends as torch chooses: the clock may then choose.

    That is how weights are loaded. A backend that somebody named stays, by the environment too.
    """
    backend = processor._attention_backend
    return bool(backend == _TORCHS or backend is None and not _attention_is_named())


def _attention_is_named() -> bool:
    """Say whether the environment names what attends: the user's own wish, for every program."""
    return "DIFFUSERS_ATTN_BACKEND" in os.environ


def _identified(
    path: Path, table: TensorTable, kind: str | None
) -> tuple[IdentifiedFile, Blueprint | None]:
    """Return what the weights are recognised as, and what a config.json beside them states."""
    part, stated = identify(table, kind), stated_blueprint(path)
    if part.kind not in KINDS and stated is not None:
        # The tensors by which it would be recognised are missing. Believe config.json for now: the
        # comparison with its module then names the missing ones.
        part = replace(part, kind=stated.kind, title=f"a {stated.class_name}")
    if kind is not None and part.kind != kind:
        raise ModelMismatch(
            f"{quoted(path)} is {part.title}; a {kind} was asked for. Choose another file."
        )
    if part.kind not in KINDS:
        raise UnsupportedModel(
            f"{quoted(path)} is {part.title}; loaded are Wan transformers, Wan VAEs, umT5 and CLIP "
            f"vision encoders. {'; '.join(part.reasons)}"
        )
    if stated is not None and stated.kind != part.kind:
        raise ModelMismatch(
            f"{stated.origin} describes a {stated.class_name}, the weights beside it are "
            f"{part.title}. Restore the folder from the model's download."
        )
    if part.weights.why_not:
        raise UnsupportedModel(f"{quoted(path)}: {part.weights.why_not}.")
    return part, stated


@dataclass
class _Check:
    """Compares the tensors a module needs with those the headers offer.

    ``sources`` is the result: for each name of the module's state dict, the stored tensor to read.
    """

    plan: Blueprint
    table: TensorTable
    mapped: Mapped
    module: nn.Module
    part: IdentifiedFile

    def __post_init__(self) -> None:
        self.sources: dict[str, Source] = {}

    def run(self) -> None:
        wanted = {name: tuple(t.shape) for name, t in self.module.state_dict().items()}
        offered = dict(self.mapped.sources)
        missing, misshapen = [], []
        for name, shape in wanted.items():
            if name in _TIED and _TIED[name] in wanted:
                continue  # the same tensor under a second name; files hold it once
            # Older versions of transformers put this prefix before a CLIP vision model's names.
            source = offered.pop(name.removeprefix("vision_model."), None)
            if source is None:
                missing.append(name)
            elif not self._fits(source, shape):
                found = list(self._shape_of(source))
                misshapen.append(f"{source.name!r} is {found}, not {list(shape)}")
            else:
                self.sources[name] = source
        if missing or misshapen or offered:
            self._refuse(len(wanted), missing, misshapen, [s.name for s in offered.values()])

    def _shape_of(self, source: Source) -> tuple[int, ...]:
        name = source.name.removeprefix(self.part.prefix)
        return logical_shape(name, self.table.tensors[source.name], self.part.weights)

    def _fits(self, source: Source, wanted: tuple[int, ...]) -> bool:
        shape = self._shape_of(source)
        if source.parts > 1 and (not shape or shape[0] % source.parts):
            return False
        stored = (shape[0] // source.parts, *shape[1:]) if source.parts > 1 else shape
        if stored == wanted:
            return True
        if self.table.format == "gguf" and len(wanted) > 4:
            # GGUF has at most four dimensions: a 5-D convolution is stored in another shape.
            return math.prod(stored) == math.prod(wanted)
        # In single files of other programs some vectors have additional axes of length 1 (class
        # token, biases of a convolution).
        return not self.plan.from_file and _squeezed(stored) == _squeezed(wanted)

    def _refuse(
        self, count: int, missing: list[str], misshapen: list[str], unknown: list[str]
    ) -> None:
        found = [
            f"{len(names)} {what} ({some_of(names)})"
            for what, names in (
                (f"of {count} tensors it needs are missing", missing),
                (f"of {count} have another shape", misshapen),
                ("tensors in the file are unknown to it", unknown),
            )
            if names
        ]
        where = f"{quoted(self.table.path)} does not fit {self.plan.class_name}"
        advice = (
            "Weights and config.json come from different models, or the download is incomplete."
            if self.plan.from_file
            else "The file is incomplete, or a derivative of Wan that WanFit does not load."
        )
        raise ModelMismatch(
            f"{where} as {self.plan.origin} describes it: {'; '.join(found)}. {advice}"
        )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


@dataclass(frozen=True)
class _Keeping:
    """Which weights do not become plain numbers of the computing dtype."""

    quantized: bool
    fp8: bool | torch.device
    """Whether matrices are rounded to fp8; the device where, if that is not the host."""


@dataclass
class _Filling:
    """Reads every source into its parameter.

    They are read in the order in which they lie in the files: a hard disk does not seek, and the
    system's read-ahead works.
    """

    module: nn.Module
    table: TensorTable
    reader: TensorReader
    sources: Mapping[str, Source]
    dtype: torch.dtype | None
    part: IdentifiedFile
    keeping: _Keeping
    amount: Amount
    watch: Watch

    def run(self) -> None:
        shapes = {name: tuple(t.shape) for name, t in self.module.state_dict().items()}
        self.amount.begin(self.sources.values())
        there = self._rounding()
        # In the order of the file, so that a disk reads forward.
        for name in sorted(self.sources, key=self._position):
            source = self.sources[name]
            if self.keeping.quantized and self._keep(name, source):
                continue
            if not self._is_rounded(name):
                _assign(self.module, name, self._read(name, source, shapes[name]))
                continue
            weight = self._read(name, source, shapes[name], kept=False, left=there is not None)
            if there is not None and stored_at(weight) is not None:
                there.add(name, weight)
            else:
                self._store_fp8(name, *rounded_to_fp8(weight, check=self.watch.check))
        self.reader.finish()
        for name, weight in ({} if there is None else there.run()).items():
            self.reader.look(weight)
            self._store_fp8(name, *rounded_to_fp8(weight, check=self.watch.check))
        if not self.reader.leave(self.module, self.amount):
            self.amount.end()

    def _position(self, name: str) -> tuple[str, int, int]:
        source = self.sources[name]
        info = self.table.tensors[source.name]
        return str(info.file), info.start, source.part

    def _stored(self, source: Source) -> Storage | None:
        return self.part.weights.weights.get(source.name.removeprefix(self.part.prefix))

    def _target(self, name: str, info: TensorInfo) -> torch.dtype:
        dtype = self.dtype
        if dtype is None:
            stored = DTYPES.get(info.dtype, torch.bfloat16)
            plain = stored.is_floating_point and stored not in FP8
            dtype = stored if plain else torch.bfloat16
        return torch.float32 if stays_fp32(name, keep_in_fp32(self.module, dtype)) else dtype

    def _read(
        self, name: str, source: Source, shape: tuple[int, ...], *,
        kept: bool = True, left: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        target, stored = self._target(name, self.table.tensors[source.name]), self._stored(source)
        if stored is None:
            return self.reader.read(source, shape, target, kept=kept, left=left)
        return self.reader.unpack(source, stored, self.part.prefix, shape, target)

    def _keep(self, name: str, source: Source) -> bool:
        """Fill a layer with its weight as stored; False where it is read as plain numbers."""
        info, stored = self.table.tensors[source.name], self._stored(source)
        target = self._target(name, info)
        if stored is None and self._cast_at_use(info, target):
            stored = Storage("float", info.dtype, info.shape)
        layer_name = name.rpartition(".")[0]
        layer = self.module.get_submodule(layer_name)
        if not stays_stored(self.part.kind, name, stored) or source.parts > 1:
            return False
        if target == torch.float32 and self.dtype != torch.float32:
            return False  # umT5 keeps some layers in fp32 beside fp16
        assert stored is not None
        if type(layer) is nn.Linear:
            new: StoredLinear | StoredEmbedding = StoredLinear(
                layer.in_features, layer.out_features, bias=layer.bias is not None
            )
            new.bias = layer.bias  # it may have been read before the weight
        elif type(layer) is nn.Embedding:
            new = StoredEmbedding(layer.num_embeddings, layer.embedding_dim, target)
        else:
            return False
        if stored.kind == "float":
            new.set_stored(self.reader.read(source, info.shape), Scales(), stored)
        else:
            scales = self.reader.scales(source, stored, self.part.prefix)
            new.set_stored(self.reader.bits(source, stored), scales, stored)
        replace_layer(self.module, layer_name, new)
        return True

    def _is_rounded(self, name: str) -> bool:
        """Whether this is a matrix of a block, and those are to be stored in fp8."""
        layer, _, leaf = name.rpartition(".")
        in_block = name.startswith(("blocks.", "vace_blocks.", "face_adapter."))
        matrix = leaf == "weight" and type(self.module.get_submodule(layer)) is nn.Linear
        return bool(self.keeping.fp8) and in_block and matrix

    def _rounding(self) -> Rounding | None:
        """Return where matrices are rounded to fp8; None for the host."""
        device = self.keeping.fp8
        if not isinstance(device, torch.device) or device.type != "cuda":
            return None
        found = Rounding(device, self.watch, self._store_fp8)
        return found if found.has_room() else None

    def _store_fp8(self, name: str, values: torch.Tensor, scale: float) -> None:
        layer_name = name.removesuffix(".weight")
        layer: Any = self.module.get_submodule(layer_name)
        replace_layer(self.module, layer_name, layer_of_fp8(layer, values, scale))

    def _cast_at_use(self, info: TensorInfo, target: torch.dtype) -> bool:
        """Whether a half-precision matrix stays as it is for the other half precision."""
        names = {torch.float16: "F16", torch.bfloat16: "BF16"}
        on_cpu = self.reader.device.type == "cpu" and not self.reader.mapped
        return not (on_cpu or self.keeping.fp8) and cast_at_use(info.dtype, names.get(target, ""))


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    if leaf in place._parameters:
        place._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        place._buffers[leaf] = tensor


def _tie(module: nn.Module, table: TensorTable) -> None:
    """Let umT5's encoder use the shared embedding, which must not be all zero."""
    shared = getattr(module, "shared", None)
    if not isinstance(shared, nn.Embedding):
        return
    weight = shared.weight
    if not (bool(weight[:1024].any()) or bool(weight.any())):
        raise CorruptFile(
            f"The token embedding of {quoted(table.path)} is all zero: every prompt would mean the "
            "same. Download the text encoder again."
        )
    for name in _TIED:
        if isinstance(shared, StoredEmbedding):
            replace_layer(module, name.rpartition(".")[0], shared)
        else:
            module.get_submodule(name.rpartition(".")[0]).weight = weight


def _restore_buffers(module: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no file holds: rotary tables, position ids, blur kernels.

    Raises UnsupportedModel for one that is not known, rather than leave it without values.
    """
    for name, owner in module.named_modules():
        lost = [key for key, value in owner._buffers.items() if value is not None and value.is_meta]
        if not lost:
            continue
        fresh = _fresh_buffers(owner)
        for key in lost:
            if key not in fresh or fresh[key].shape != owner._buffers[key].shape:
                raise UnsupportedModel(
                    f"{type(module).__name__} of this version has a table {name}.{key} that WanFit "
                    "does not know how to compute. Use the versions in constraints.txt."
                )
            owner._buffers[key] = fresh[key].to(device)


def _fresh_buffers(owner: Any) -> dict[str, torch.Tensor]:
    kind = type(owner).__name__
    if kind == "WanRotaryPosEmbed":
        # By the class's own code, on the CPU: its tables are computed in float64.
        new = type(owner)(owner.attention_head_dim, owner.patch_size, owner.max_seq_len)
        return {"freqs_cos": new.freqs_cos, "freqs_sin": new.freqs_sin}
    if kind == "CLIPVisionEmbeddings":
        return {"position_ids": torch.arange(owner.num_positions).expand((1, -1))}
    if kind == "MotionConv2d":
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        square = row[None, :] * row[:, None]
        return {"blur_kernel": square / square.sum()}
    return {}
