"""Whether a LoRA's patch of one module fits the module, and the scale it is applied with.

Compares shapes from headers; no weight is read. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from ..errors import CorruptFile, ModelMismatch, UnsupportedModel
from ..files import quoted
from ..formats import TensorTable
from ..models import TransformerShape

PATCH_EMBEDDING: Final = "patch_embedding"
_PAIR: Final = ("down", "up")
KRONECKER: Final = ("lokr_w1", "lokr_w2")
"""Roles of LoKr's two factors, each whole or as a product (``_a`` and ``_b``)."""
HADAMARD: Final = ("hada_w1", "hada_w2")
"""Roles of LoHa's two factors, which are always products."""
LYCORIS_MAGNITUDE: Final = "dora_scale"
MAGNITUDES: Final = (LYCORIS_MAGNITUDE, "lora_magnitude_vector")
"""Roles of a DoRA's magnitudes, in files of LyCORIS and of PEFT."""


@dataclass(slots=True)
class Patch:
    """What a LoRA changes at one module or table; ``tensors`` names the tensors of its file.

    ``up @ down * alpha / rank + diff`` is added to the module's weight, and ``up_bias`` and
    ``diff_bias`` to its bias. Where ``target`` is a scale-shift table, ``diff`` is added to it.
    LoKr adds ``kron(w1, w2) * scale`` and LoHa ``w1 * w2 * scale``, element by element, with w1 and
    w2 whole or ``a @ b`` (LyCORIS; ``comfy/weight_adapter/lokr.py`` and ``loha.py``).
    """

    target: str
    """The diffusers name of the module, or of the table."""
    rank: int = 0
    """0 where no factor is a product: then a tensor that holds alpha says nothing."""
    tensors: dict[str, str] = field(default_factory=dict)
    """Names of tensors by role, a key of ``models.ENDINGS``."""
    stated_scale: float | None = None
    """alpha / rank from the configuration, where no tensor holds alpha."""
    pieces: int = 0
    """Numbers that LoKr's two products hold for a token; see ``FoundLora``."""
    columns: int = 0
    """Columns of the weight, where rows of it are made: by LoHa."""


def drop_empty(table: TensorTable, patch: Patch) -> bool:
    """Take a pair of rank 0, which adds nothing, out of a patch; say whether there was one.

    What cuts each layer of a LoRA to the rank that it needs writes them.
    """
    shapes = [table.tensors[patch.tensors[role]].shape for role in _PAIR if role in patch.tensors]
    if len(shapes) < 2 or shapes[0][:1] != (0,) or shapes[1][1:2] != (0,):
        return False
    for role in (*_PAIR, "up_bias", "alpha"):
        patch.tensors.pop(role, None)
    return True


@dataclass
class PatchCheck:
    """Compares the tensors of one patch with the module they belong to, and with each other."""

    table: TensorTable
    patch: Patch
    shape: TransformerShape
    own: Mapping[str, tuple[int, ...]]
    """Shapes of the transformer's tensors, by their diffusers names."""
    model: Path

    def run(self) -> list[str]:
        """Set the patch's rank and return notes; raises where the patch does not fit.

        A patch of an input layer of other channels is emptied: the patch of a model for another
        task, whose other layers are the same.
        """
        tensors, target, own = self.patch.tensors, self.patch.target, self.own
        if target in own:
            return self._check_table(own[target])
        # Its layers are classes of their own, which scale their weights as they compute.
        if target.startswith("motion_encoder."):
            self._refuse_at_run_time()
        self.weight = own[target + ".weight"]
        self._check_alpha()
        foreign = self._drop_other_channels()
        if foreign:
            return foreign
        if "down" in tensors or "up" in tensors or "up_bias" in tensors:
            self._check_pair()
        for factors in (KRONECKER, HADAMARD):
            if any(role.startswith(factors) for role in tensors):
                self._check_factors(*factors)
        for role in MAGNITUDES:
            if role in tensors:
                self._check_magnitude(role)
        if "alpha" in tensors and len(tensors) == 1:
            raise CorruptFile(
                f"{quoted(self.table.path)} has {tensors['alpha']!r} without the matrices it "
                "scales. Download it again."
            )
        for role in ("up_bias", "diff_bias"):
            if role in tensors:
                if target + ".bias" not in own:
                    self._refuse(role, "no bias there")
                self._fits(role, own[target + ".bias"])
        if "diff" in tensors and not self._narrow("diff"):
            self._fits("diff", self.weight)
        narrow = any(role in tensors and self._narrow(role) for role in ("down", "diff"))
        return [self._widened()] if narrow else []

    def _check_table(self, shape: tuple[int, ...]) -> list[str]:
        if not self.patch.target.endswith("scale_shift_table"):
            self._refuse_at_run_time()
        for role in self.patch.tensors:
            if role != "diff":
                self._refuse(role, "a table, which takes only a difference")
        self._fits("diff", shape)
        return []

    def _check_alpha(self) -> None:
        name = self.patch.tensors.get("alpha")
        info = self.table.tensors[name] if name is not None else None
        if info is not None and info.numel != 1:
            raise CorruptFile(
                f"{name!r} of the LoRA {quoted(self.table.path)} has shape {list(info.shape)}; "
                "alpha is a single number. Download it again, or get another version."
            )

    def _drop_other_channels(self) -> list[str]:
        """Empty a patch of the input layer that is made for other input channels; say so."""
        channels = self._made_for() if self.patch.target == PATCH_EMBEDDING else 0
        if channels in (0, self.shape.in_channels):
            return []
        kept = {role: name for role, name in self.patch.tensors.items() if role == "diff_bias"}
        self.patch.tensors, self.patch.rank = kept, 0
        return [
            f"{self.table.path.name}: its patch of the input layer is made for {channels} input "
            f"channels, this model has {self.shape.in_channels}; left out."
        ]

    def _made_for(self) -> int:
        """Return the input channels that a patch of the input layer is made for and needs.

        0 where its shape says none, or where it is widened to the model's.
        """
        rescales = any(role in self.patch.tensors for role in MAGNITUDES)
        for role in ("down", "diff"):
            if role in self.patch.tensors:
                return 0 if self._narrow(role) and not rescales else self._channels(role)
        for names in (KRONECKER, HADAMARD):
            if any(role.startswith(names) for role in self.patch.tensors):
                one, two = map(self._factor, names)
                columns = two[1] * (one[1] if names is KRONECKER else 1)
                taps = math.prod(self.shape.patch_size)
                return 0 if columns % taps else columns // taps
        return 0

    def _channels(self, role: str) -> int:
        """Return the input channels of a patch of the input layer, 0 where it fits none."""
        given, kernel = self.table.tensors[self.patch.tensors[role]].shape, self.shape.patch_size
        rows = given[0] if given else 0
        fits = role != "diff" or rows == self.weight[0]
        if not fits or math.prod(given) % max(1, rows * math.prod(kernel)):
            return 0
        return math.prod(given) // max(1, rows * math.prod(kernel))

    def _check_pair(self) -> None:
        tensors = self.patch.tensors
        for here, absent in (("down", "up"), ("up", "down"), ("up_bias", "up")):
            if here in tensors and absent not in tensors:
                raise CorruptFile(
                    f"{quoted(self.table.path)} has {tensors[here]!r} without its "
                    f"{absent!r} matrix. Download it again."
                )
        if len(self.weight) < 2:
            self._refuse("down", f"a norm of width {self.weight[0]}")
        down, up = self._flat("down"), self._flat("up")
        if len(down) < 2 or len(up) != 2 or down[0] != up[1] or down[0] < 1:
            raise CorruptFile(
                f"{tensors['down']!r} {list(down)} and {tensors['up']!r} {list(up)} of "
                f"{quoted(self.table.path)} cannot be multiplied. Download it again."
            )
        self.patch.rank = down[0]
        if up[0] != self.weight[0]:
            self._refuse("up", f"{self.weight[0]} rows")
        if not self._narrow("down") and math.prod(down[1:]) != math.prod(self.weight[1:]):
            self._refuse("down", f"{math.prod(self.weight[1:])} columns")

    def _check_factors(self, first: str, second: str) -> None:
        """Check LoKr's or LoHa's two factors with the weight, and set the rank."""
        one, two = self._factor(first), self._factor(second)
        rows, columns = self.weight[0], math.prod(self.weight[1:])
        role = next(role for role in self.patch.tensors if role.startswith((first, second)))
        if len(self.weight) < 2:
            self._refuse(role, f"a norm of width {rows}")
        kronecker = first in KRONECKER
        pieces = one if kronecker else (1, 1)
        made = (pieces[0] * two[0], pieces[1] * two[1])
        if made != (rows, columns) or (not kronecker and one != two):
            self._refuse(
                role, f"factors that make {[rows, columns]}; these are {list(one)} and {list(two)}"
            )
        if len(self.weight) > 2:
            return  # of a convolution they are multiplied out
        if kronecker:  # what w2 makes of the pieces, and before it w2's first matrix or w1 after it
            self.patch.pieces = one[1] * two[0] + max(rows, one[1] * self.patch.rank)
        else:
            self.patch.columns = columns

    def _check_magnitude(self, role: str) -> None:
        """Check the magnitudes of a DoRA: one for each row of a weight that has factors, too."""
        name, count = self.patch.tensors[role], self.weight[0]
        factors = {"down", "diff", *KRONECKER, *HADAMARD}
        if not any(one.removesuffix("_a") in factors for one in self.patch.tensors):
            raise CorruptFile(
                f"{quoted(self.table.path)} has {name!r} without the matrices of its LoRA. "
                "Download it again."
            )
        shape = self.table.tensors[name].shape
        if len(self.weight) < 2:
            self._refuse(role, f"none: it is a norm of width {count}")
        columns = len(shape) > 1 and shape[:2] == (1, self.weight[1]) != (1, 1)
        if columns and role == LYCORIS_MAGNITUDE:
            raise UnsupportedModel(
                f"{quoted(self.table.path)} is a DoRA with a magnitude for each input of a layer "
                f"({name!r} {list(shape)}), which WanFit cannot apply exactly; those with one for "
                "each output can be used (LyCORIS: wd_on_output). Get or train it that way."
            )
        if math.prod(shape) != count:
            self._refuse(role, f"{count} magnitudes")
        self.patch.columns = math.prod(self.weight[1:])

    def _factor(self, role: str) -> tuple[int, int]:
        """Return the rows and columns of a factor that is whole, or a product of two matrices."""
        tensors = self.patch.tensors
        if role in tensors:
            shape = self.table.tensors[tensors[role]].shape
            if len(shape) < 2:
                self._refuse(role, "a matrix")
            return shape[0], math.prod(shape[1:])
        halves = (f"{role}_a", f"{role}_b")
        for half in halves:
            if half not in tensors:
                raise CorruptFile(
                    f"{quoted(self.table.path)} has {self._name()} without its {half!r} matrix. "
                    "Download it again."
                )
        a, b = (self.table.tensors[tensors[half]].shape for half in halves)
        if len(a) != 2 or len(b) < 2 or a[1] != b[0] or b[0] < 1:
            raise CorruptFile(
                f"{tensors[halves[0]]!r} {list(a)} and {tensors[halves[1]]!r} {list(b)} of "
                f"{quoted(self.table.path)} cannot be multiplied. Download it again."
            )
        self.patch.rank = b[0]
        return a[0], math.prod(b[1:])

    def _flat(self, role: str) -> tuple[int, ...]:
        shape = self.table.tensors[self.patch.tensors[role]].shape
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        return shape

    def _narrow(self, role: str) -> bool:
        """Say whether this is a text model's patch of an image model's input layer.

        The first input channels of both are the noisy latents; an image model's mask and image
        channels come after them.
        """
        if self.patch.target != PATCH_EMBEDDING or role not in self.patch.tensors:
            return False
        noise = self.shape.out_channels
        given = self.table.tensors[self.patch.tensors[role]].shape
        wanted = (noise, *self.shape.patch_size)
        return self.shape.in_channels > noise and given[1:] == wanted

    def _widened(self) -> str:
        return (
            f"{self.table.path.name} is made for text to video: its patch of the input layer "
            f"({self.shape.out_channels} channels) is applied to the noise channels of this "
            f"model's {self.shape.in_channels}."
        )

    def _fits(self, role: str, wanted: tuple[int, ...]) -> None:
        given = self.table.tensors[self.patch.tensors[role]].shape
        if math.prod(given) != math.prod(wanted):
            self._refuse(role, f"{list(wanted)}")

    def _name(self) -> str:
        return repr(next(iter(self.patch.tensors.values())))

    def _refuse_at_run_time(self) -> NoReturn:
        raise UnsupportedModel(
            f"The LoRA {quoted(self.table.path)} changes {self.patch.target!r} ({self._name()}), "
            "which WanFit cannot do at run time. Use another version."
        )

    def _refuse(self, role: str, needed: str) -> None:
        name = self.patch.tensors[role]
        given = list(self.table.tensors[name].shape)
        raise ModelMismatch(
            f"Tensor {name!r} of the LoRA {quoted(self.table.path)} is {given}; "
            f"{self.patch.target!r} of the transformer {quoted(self.model)} needs {needed}. "
            "Choose a LoRA for this model."
        )
