"""Which published variant a transformer is: decided by its numbers alone, with the reason.

Numbers leave some questions open: Wan 2.1 T2V-14B has the structure of one expert of Wan 2.2
T2V-A14B. All variants that fit are named, and a caller who knows how many experts there are narrows
them down. Any size is accepted; only the family must be certain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import UnsupportedModel
from ..files import quoted
from ..models import VARIANTS, TransformerShape, Variant
from .identified import IdentifiedFile


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen variant, the names of all that fit (the chosen one first), and the reason."""

    variant: Variant
    candidates: tuple[str, ...]
    custom_size: bool
    reason: str


def choose_variant(part: IdentifiedFile, shape: TransformerShape, experts: int | None) -> Choice:
    """Choose among the variants of a transformer's family.

    ``shape`` holds its numbers, with the heads that its config states; ``experts`` is 1 or 2 where
    the whole model is known, None for a single file. Raises UnsupportedModel, naming what the file
    is, when the table has no variant of its family.
    """
    names = _names(part.family, shape)
    pool = [VARIANTS[name] for name in names]
    if experts is not None:
        # A complete model with one expert is not a Wan 2.2 pair, unless its family has only pairs.
        pool = [v for v in pool if v.experts == experts] or pool
    if not pool:
        raise UnsupportedModel(
            f"{quoted(part.table.path)} is {part.title} ({shape.in_channels} channels in, "
            f"{shape.out_channels} out), a derivative of Wan that WanFit cannot run. Use "
            "a plain Wan 2.1 or 2.2 text- or image-to-video model."
        )
    exact = [v for v in pool if _same_size(v.transformer, shape)]
    chosen = exact or _nearest(pool, shape)
    variant = chosen[0]
    if exact:
        reason = f"its numbers are those of {' or '.join(v.name for v in exact)}"
    else:
        reason = (
            f"its family is that of {variant.name}; its size (width {shape.dim}, {shape.layers} "
            "blocks) is none that was published"
        )
    return Choice(variant, tuple(v.name for v in chosen), not exact, reason)


def _same_size(published: TransformerShape, found: TransformerShape) -> bool:
    # Heads are not compared: not every layout states them, and the width decides them. Versions of
    # Fun Control differ in whether they take a reference; the variant is the same.
    plain = replace(
        found, heads=published.heads, head_dim=published.head_dim, heads_known=True,
        reference_channels=published.reference_channels,
    )  # fmt: skip
    return found.dim == published.dim and plain == published


def _nearest(pool: list[Variant], shape: TransformerShape) -> list[Variant]:
    """Return the variants nearest in width, in the order of ``pool``."""
    best = min(abs(v.transformer.dim - shape.dim) for v in pool)
    near = [v for v in pool if abs(v.transformer.dim - shape.dim) == best]
    return near


def _names(family: str, shape: TransformerShape) -> tuple[str, ...]:
    """Return the names of a family's variants, the preferred one first."""
    demo = f"wanfit-demo-{family}"
    if demo in VARIANTS and _same_size(VARIANTS[demo].transformer, shape):
        return (demo,)  # known only by its exact numbers, never as the nearest size
    images = shape.image_dim is not None
    if shape.out_channels == 48:
        by_input = {48: "wan2.2-ti2v-5b", 100: "wan2.2-fun-inp-5b", 148: "wan2.2-fun-control-5b"}
        plain = family in ("t2v", "i2v", "control") and shape.in_channels in by_input
        return (by_input[shape.in_channels],) if plain and not images else ()
    if family == "i2v":
        if not images:
            return ("wan2.2-i2v-a14b",)
        # Fun InP is taken only where the numbers are exactly its own; any other size counts as the
        # official image-to-video model.
        small = VARIANTS["wan2.1-fun-inp-1.3b"]
        exact = _same_size(small.transformer, shape)
        return ("wan2.1-fun-inp-1.3b",) if exact else ("wan2.1-i2v-14b",)
    if family == "control":
        if images and shape.in_channels == 48:
            return ("wan2.1-fun-control-14b", "wan2.1-fun-control-1.3b")
        return ("wan2.2-fun-control-a14b",) if shape.in_channels == 52 and not images else ()
    if family == "camera":
        if images:
            return ("wan2.1-fun-camera-14b", "wan2.1-fun-camera-1.3b")
        return ("wan2.2-fun-camera-a14b",)
    return {
        "t2v": ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b"),
        "flf2v": ("wan2.1-flf2v-14b",),
        "vace": ("wan2.1-vace-1.3b", "wan2.1-vace-14b", "wan2.2-vace-fun-a14b"),
        "animate": ("wan2.2-animate-14b",),
        "animate2": ("wan-animate-2-14b",),
        "s2v": ("wan2.2-s2v-14b",),
        "humo": ("wan2.1-humo-17b",),
    }.get(family, ())
