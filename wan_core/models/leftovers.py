"""What may be left over in a file of weights: tensors that are no weights of the component.

The one table of it. Detection does not count them as foreign, and the mapping of names does not
look for a parameter for them. A tensor that stands on no list makes a file a derivative, so every
entry is exact and says what it is. Works on names alone; standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .lora_keys import flat_stem, read_lora_key, spellings

TAG: Final = "model_type."
"""Some publishers tell the variant by a tensor whose name begins so; its values mean nothing."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """One kind of tensor that may be left over, in components of ``kinds``.

    ``said`` tells whether a user should know that it is there and not used.
    """

    what: str
    pattern: str
    kinds: tuple[str, ...]
    said: bool = False


_COUNTER: Final = r"(?:.+\.)?num_batches_tracked|global_step|num_updates"
_ALL: Final = ("transformer", "vae", "text_encoder", "image_encoder")
LEFTOVERS: Final = (
    Leftover("a tag for the variant", rf"{re.escape(TAG)}.+", ("transformer",)),
    # diffusers' class does not use it; it is in official Wan 2.1 I2V folders all the same.
    Leftover("a norm no forward uses", r".+\.norm_added_q\.(?:weight|bias)", ("transformer",)),
    Leftover(
        "a rotary table, which is computed",
        r"(?:.+\.)?(?:freqs|rope\.freqs|freqs_cis|rope\.freqs_(?:cos|sin))",
        ("transformer",),
    ),
    # Blur kernels are constants in diffusers' code.
    Leftover("a blur kernel, which is computed", r"motion_encoder\..+\.kernel", ("transformer",)),
    Leftover("ComfyUI's sampling settings", r"model_sampling\..+", ("transformer",)),
    Leftover("an averaged copy of the weights", r"(?:model_)?ema\..+", _ALL, said=True),
    Leftover(
        "latent statistics, which are known",
        r"mean|std|latents_(?:mean|std)",
        ("vae",),
    ),
    Leftover("the VAE's training", r"(?:loss|discriminator)\..+|logvar(?:_init)?", ("vae",)),
    Leftover("a counter", _COUNTER, _ALL),
    Leftover("a table of positions", r"(?:.+\.)?position_ids", ("text_encoder", "image_encoder")),
    # A file of the full umT5 also holds its decoder, which encoding does not use.
    Leftover(
        "umT5's decoder",
        r"(?:decoder|dec)\..+|(?:lm_head|output)\.weight",  # the last as llama.cpp writes it
        ("text_encoder",),
    ),
    Leftover("a tokenizer", r"(?:.+\.)?spiece_model", ("text_encoder",)),
    Leftover("a scale of similarities", r"log(?:it)?_scale", ("text_encoder", "image_encoder")),
    Leftover(
        "a projection of CLIP that Wan does not use",
        r"(?:visual_projection|text_projection)(?:\.weight)?|(?:visual\.)?(?:head|proj)",
        ("text_encoder", "image_encoder"),
    ),
    Leftover("CLIP's text side", r"(?:textual|text_model)\..+", ("image_encoder",)),
)  # fmt: skip
LORA: Final = Leftover("a LoRA's tensor", "", ("transformer",), said=True)
"""What :func:`find_leftovers` gives for the tensors of a LoRA, which ``lora_keys`` recognises."""

_IN_LORAS: Final = re.compile(r"(?:.+\.)?scaled_fp8|" + _COUNTER)


def left_in_lora(name: str) -> bool:
    """Whether a tensor of a LoRA file is neither a patch nor a sign of anything: a counter of its
    training, or the mark of a quantiser, which holds no number."""
    return _IN_LORAS.fullmatch(name) is not None


# Per kind, one expression for all: a file has thousands of names.
_PATTERNS: Final = {
    kind: re.compile(
        "|".join(f"(?P<n{i}>{one.pattern})" for i, one in enumerate(LEFTOVERS) if kind in one.kinds)
    )
    for kind in _ALL
}


def find_leftovers(kind: str, names: Iterable[str]) -> dict[str, Leftover]:
    """Return what is left over among the names of a component of this kind, without prefix."""
    known = list(names)
    pattern = _PATTERNS[kind]
    found: dict[str, Leftover] = {}
    modules: set[str] | None = None
    for name in known:
        listed = pattern.fullmatch(name)
        match = LEFTOVERS[int(str(listed.lastgroup)[1:])] if listed else None
        if match is None and kind in LORA.kinds and (key := read_lora_key(name)) is not None:
            # An alpha or a GLoRA matrix alone says too little: it must scale a module of the file.
            modules = modules or {
                flat_stem(n.removesuffix(".weight"))
                for n in known
                if n.endswith(".weight") and read_lora_key(n) is None
            }
            ours = key.marks or any(bare in modules for bare in spellings(key.stem))
            match = LORA if ours else None
        if match is not None:
            found[name] = match
    return found
