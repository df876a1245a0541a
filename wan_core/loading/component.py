"""Loads one component: from its file or folder to a diffusers or transformers module.

The module is first built on the meta device, without memory. Before any weight is read, its
parameters are compared by name and shape with the tensors in the headers. Then each tensor is read
straight to the dtype and device asked for. The module equals, in every parameter and its dtype,
what ``from_pretrained(folder, dtype=...)`` of diffusers or transformers returns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..detect import IdentifiedFile, identify
from ..errors import CorruptFile, MissingDependency, ModelMismatch, UnsupportedModel
from ..files import quoted, some_of
from ..formats import TensorInfo, TensorTable, read_table
from ..models import Mapped, Source, map_names
from .blueprint import Blueprint, found_blueprint, stated_blueprint
from .dtypes import keep_in_fp32, stays_fp32
from .quantized import ScaledLinear, gguf_linear, gguf_parameter, replace_linear
from .reader import DTYPES, FP8, TensorReader, gguf_type
from .tokenizer import load_image_processor, load_scheduler_config, load_tokenizer

__all__ = ["load_component", "load_image_processor", "load_scheduler_config", "load_tokenizer"]

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
) -> nn.Module:
    """Return the component that a file or folder holds, as a diffusers or transformers module.

    ``dtype`` is what parameters are cast to, except those the class keeps in fp32. None keeps each
    tensor's stored dtype; fp8 and GGUF weights then become bf16. ``kind`` ("transformer", "vae",
    "text_encoder" or "image_encoder") is the kind that is expected; another one is refused.

    ``keep_quantized`` leaves the weights of linear layers as stored (fp8 or GGUF blocks) and
    dequantises them at each call, computing in ``dtype``. ``map_file`` makes weights that need no
    conversion views of the mapped file, which must then not change while the module is in use.

    A .pth file is read when ``path`` names it, never when it only lies in the folder that ``path``
    names. Raises ModelFileError, ModelMismatch or UnsupportedModel; where the headers show the
    mistake, before any weight is read.
    """
    source = Path(path)
    table = read_table(source)
    part, stated = _identified(source, table, kind)
    mapped = map_names(part.kind, table.tensors, part.prefix)
    plan = stated or found_blueprint(part, mapped)
    # Without memory, so that a wrong file is refused before gigabytes are allocated or read.
    module = build(plan)
    check = _Check(plan, table, mapped, module)
    check.run()
    with TensorReader(table, device, mapped=map_file) as reader:
        _Filling(module, table, reader, check.sources, dtype, plan.kind, keep_quantized).run()
    # What no file holds comes last: until now these buffers are on the meta device.
    _restore_buffers(module, torch.device(device))
    _tie(module, table)
    return module.eval().requires_grad_(False)


def _identified(
    path: Path, table: TensorTable, kind: str | None
) -> tuple[IdentifiedFile, Blueprint | None]:
    """Return what the weights are recognised as, and what a config.json beside them states."""
    part, stated = identify(table), stated_blueprint(path)
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


def build(plan: Blueprint) -> nn.Module:
    """Return the module of a blueprint with every parameter on the meta device (no memory).

    Raises ModelMismatch when its class does not accept the configuration, MissingDependency when
    the class cannot be imported.
    """
    try:
        if plan.kind in ("transformer", "vae"):
            import diffusers

            made: Any = getattr(diffusers, plan.class_name)
        else:
            import transformers

            made = getattr(transformers, plan.class_name)
    except (ImportError, AttributeError) as err:
        raise MissingDependency(
            f"{plan.class_name} cannot be imported: {err}. Install diffusers >= 0.35 and "
            "transformers >= 4.50."
        ) from err
    try:
        # Not accelerate's init_empty_weights: it patches nn.Module for all threads of the process.
        with torch.device("meta"):
            if plan.kind in ("transformer", "vae"):
                module = made.from_config(dict(plan.config))
            else:
                module = made(made.config_class.from_dict(dict(plan.config)))
    except Exception as err:  # each library has errors of its own for a bad configuration
        raise ModelMismatch(
            f"{plan.class_name} cannot be built from {plan.origin}: {err}. Restore the model's "
            "own config.json."
        ) from err
    assert isinstance(module, nn.Module)
    return module


@dataclass
class _Check:
    """Compares the tensors a module needs with those the headers offer.

    ``sources`` is the result: for each name of the module's state dict, the stored tensor to read.
    """

    plan: Blueprint
    table: TensorTable
    mapped: Mapped
    module: nn.Module

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
                info = self.table.tensors[source.name]
                misshapen.append(f"{source.name!r} is {list(info.shape)}, not {list(shape)}")
            else:
                self.sources[name] = source
        if missing or misshapen or offered:
            self._refuse(len(wanted), missing, misshapen, [s.name for s in offered.values()])
        self._check_dtypes()

    def _fits(self, source: Source, wanted: tuple[int, ...]) -> bool:
        shape = self.table.tensors[source.name].shape
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

    def _check_dtypes(self) -> None:
        for source in self.sources.values():
            info = self.table.tensors[source.name]
            stored = DTYPES.get(info.dtype)
            if stored is None:
                gguf_type(info)
            elif not stored.is_floating_point:
                raise UnsupportedModel(
                    f"Weight {info.name!r} of {quoted(info.file)} is stored as {info.dtype}: an "
                    "integer quantisation that WanFit does not read. Get the fp16, bf16, "
                    "fp8_scaled or GGUF version."
                )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


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
    kind: str
    keep_quantized: bool

    def run(self) -> None:
        shapes = {name: tuple(t.shape) for name, t in self.module.state_dict().items()}
        for name in sorted(self.sources, key=self._position):
            source = self.sources[name]
            if not (self.keep_quantized and self._keep(name, source)):
                tensor = self._read(name, source, shapes[name])
                _assign(self.module, name, tensor)

    def _position(self, name: str) -> tuple[str, int, int]:
        source = self.sources[name]
        info = self.table.tensors[source.name]
        return str(info.file), info.start, source.part

    def _target(self, name: str, info: TensorInfo) -> torch.dtype:
        dtype = self.dtype
        if dtype is None:
            stored = DTYPES.get(info.dtype, torch.bfloat16)
            dtype = torch.bfloat16 if stored in FP8 else stored
        return torch.float32 if stays_fp32(name, keep_in_fp32(self.module, dtype)) else dtype

    def _read(self, name: str, source: Source, shape: tuple[int, ...]) -> torch.Tensor:
        target = self._target(name, self.table.tensors[source.name])
        scale = self.reader.scale(source, shape[0] if shape else 1)
        return self.reader.read(source, shape, target, scale=scale)

    def _keep(self, name: str, source: Source) -> bool:
        """Keep a linear layer's weight as stored; False where it must be dequantised now.

        Kept are whole weights of plain linear layers that compute in ``dtype``. Layers that stay in
        fp32 are small, and their class expects an ordinary weight.
        """
        info = self.table.tensors[source.name]
        layer_name, _, leaf = name.rpartition(".")
        layer = self.module.get_submodule(layer_name)
        target = self._target(name, info)
        if leaf != "weight" or type(layer) is not nn.Linear or source.parts > 1:
            return False
        if stays_fp32(name, keep_in_fp32(self.module, torch.bfloat16)):
            return False
        if target == torch.float32 and self.dtype != torch.float32:
            return False  # a layer that stays in fp32 beside fp16 only (umT5's ``wo``)
        if DTYPES.get(info.dtype) in FP8:
            stored = DTYPES[info.dtype]
            scaled = ScaledLinear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, stored=stored
            )
            values = self.reader.read(source, tuple(info.shape))
            scaled.set_weight(values, self.reader.scale(source, layer.out_features))
            new: nn.Module = scaled
        elif info.dtype not in DTYPES and self.kind == "transformer":
            new = gguf_linear(layer, target)
            new.weight = gguf_parameter(self.reader.raw(source.name), gguf_type(info))
        else:
            return False
        # Files hold weight and bias in either order: the bias may have been read already.
        new.bias = layer.bias
        replace_linear(self.module, layer_name, new)
        return True


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    if leaf in place._parameters:
        place._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        place._buffers[leaf] = tensor


def _tie(module: nn.Module, table: TensorTable) -> None:
    """Make umT5's encoder use the shared token embedding; CorruptFile where that is all zero."""
    shared = getattr(module, "shared", None)
    if not isinstance(shared, nn.Embedding):
        return
    weight = shared.weight
    # The first rows nearly always decide it, without a look at all 2 GB.
    if not (bool(weight[:1024].any()) or bool(weight.any())):
        raise CorruptFile(
            f"The token embedding of {quoted(table.path)} is all zero: every prompt would mean the "
            "same. Download the text encoder again."
        )
    for name in _TIED:
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
