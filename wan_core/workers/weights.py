"""What a worker needs in order to have a transformer's weights: plain data, equal in every process.

It names files and says how they are read and placed; no weight travels between processes. Each file
comes with its size and modification time, so that a worker that sees another file says so before
its first unit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import MemoryEstimate, WanLoRA
from ..errors import ModelMismatch
from ..files import FileIdentity, file_identity
from ..loading import component_key
from ..memory import Choices
from ..models import Component, TransformerShape
from ..plan import OptimizationPlan


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One transformer: its files, how they are read, and how the module computes."""

    component: str
    """"transformer" or "transformer_2"."""
    kind: str
    path: str
    module: str | None
    """The VACE module that is joined with it."""
    dtype: str
    fp8: bool
    """Whether its matrices are stored in fp8 although the file's are not."""
    mapped: bool
    """Whether its weights are views of the mapped file: one copy for all workers of a host."""
    nbytes: int
    """About what it takes in RAM."""
    files: tuple[FileIdentity, ...]
    loras: tuple[WanLoRA, ...]
    choices: Choices
    pin_limit: int | None = None
    """Bytes of RAM that one worker may page-lock."""
    heads: int = 1
    patch: tuple[int, int, int] = (1, 2, 2)
    """Frames, rows and columns of latents that are one token."""
    tried_as: str = ""
    """What a trial of a cut forward depends on beside shapes; see ``OptimizationPlan.tried_as``."""
    shared: bool = False
    """Whether a gang copies each streamed block to its cards once, each process a part."""
    must_equal: bool = True
    """Whether a forward is cut over several cards only where that keeps every bit."""

    @staticmethod
    def of(
        name: str, part: Component, plan: OptimizationPlan, loras: tuple[WanLoRA, ...], *,
        fp8: bool, mapped: bool, nbytes: int, pin_limit: int | None, shape: TransformerShape,
    ) -> Weights:  # fmt: skip
        """Return what describes the component ``part``, called ``name`` in the plan."""
        files = component_key(part, "").files
        return Weights(
            component=name,
            kind=part.kind.removesuffix("_2"),
            path=str(part.path.resolve()),
            module=None if part.module is None else str(part.module.resolve()),
            dtype=plan.choices.dtypes[name],
            fp8=fp8,
            mapped=mapped,
            nbytes=nbytes,
            files=(*files, *(file_identity(lora.path) for lora in loras)),
            loras=tuple(
                WanLoRA(str(Path(lora.path).resolve()), lora.expert, float(lora.strength))
                for lora in loras
            ),
            choices=plan.choices,
            pin_limit=pin_limit,
            heads=shape.heads,
            patch=shape.patch_size,
            tried_as=plan.tried_as,
            must_equal=plan.must_equal,
            shared=plan.shared_weights,
        )

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON, the same for equal weights."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        choices = {field.name: getattr(self.choices, field.name) for field in fields(Choices)}
        for name in ("dtypes", "part_offload"):
            choices[name] = dict(choices[name])
        return values | {
            "files": [asdict(one) for one in self.files],
            "loras": [[str(one.path), one.expert, one.strength] for one in self.loras],
            "choices": choices,
        }

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> Weights:
        """Return what ``plain`` was made of."""
        more: dict[str, Any] = {
            "files": tuple(FileIdentity(**one) for one in values["files"]),
            "loras": tuple(WanLoRA(*one) for one in values["loras"]),
            "choices": Choices(**values["choices"]),
            "patch": tuple(values["patch"]),
        }
        return Weights(**(dict(values) | more))

    @cached_property
    def key(self) -> str:
        """Names these weights, read and placed in this way."""
        text = json.dumps(self.plain(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check_files(self) -> None:
        """Raise ModelMismatch where this process sees other files, MissingFile where none."""
        for told in self.files:
            found = file_identity(told.path)
            if found != told:
                raise ModelMismatch(
                    f"{told.path} has {found.size} bytes and was changed at {found.mtime_ns} ns; "
                    f"the driver's has {told.size}, changed at {told.mtime_ns}. All workers must "
                    "see the same file."
                )

    def plan_for(self, device: str) -> OptimizationPlan:
        """Return the plan by which a worker places them on its ``device``."""
        nothing = MemoryEstimate(
            base_model_mb=0, generation_overhead_mb=0, output_tensors_mb=0, total_estimated_mb=0,
            peak_usage_mb=0, confidence=0,
        )  # fmt: skip
        return OptimizationPlan(
            device=device, choices=self.choices, estimate=nothing, pin_limit=self.pin_limit
        )
