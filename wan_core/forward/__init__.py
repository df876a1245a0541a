"""How a model computes: the same bits as diffusers, with fewer tensors alive at once.

In: a module built by ``loading``. Out: context managers. Inside them the module runs the lean
forward (``lean_forward``), computes VACE's hints one at a time (``hints_in_turn``), sees the
reference and the camera of the Fun models (``fun_inputs``) or a face's tokens that ``encode_faces``
made once (``known_faces``), or shares a call's tokens with other processes (``cut_tokens``);
``undisturbed`` keeps out what the caller has set for torch, and a worker takes what cannot be kept
out (``torch_settings``). ``why_no_lean`` gives the reason that lies in the installed diffusers,
before there is a module; ``blocks_in_order`` lists the blocks as they compute; a ``DrivingStream``
given to the lean forward is Animate 2's second stream. Nothing here knows on which device weights
are or how they get there. Names are resolved on first use, so that a plan asks for ``why_no_lean``
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .animate import as_pixels, encode_faces, known_faces, reads_faces
    from .animate2 import DrivingStream
    from .cut import Cut, Exchange, alike
    from .fun import fun_inputs
    from .replaced import Installed, ReplacedForward, unknown_code
    from .residual import BlockPasses, block_passes
    from .sources import DECODER, ENCODER, norms_widen, why_no_lean
    from .surroundings import (
        Surroundings,
        settings_notes,
        take_settings,
        torch_settings,
        undisturbed,
    )
    from .transformer import can_be_cut, cut_tokens, hints_in_turn, lean_forward, run_together
    from .vace import blocks_in_order

__getattr__ = lazy_names(
    __name__,
    {
        "animate": ("as_pixels", "encode_faces", "known_faces", "reads_faces"),
        "animate2": ("DrivingStream",),
        "cut": ("Cut", "Exchange", "alike"),
        "fun": ("fun_inputs",),
        "replaced": ("Installed", "ReplacedForward", "unknown_code"),
        "residual": ("BlockPasses", "block_passes"),
        "sources": ("DECODER", "ENCODER", "norms_widen", "why_no_lean"),
        "surroundings": (
            "Surroundings",
            "settings_notes",
            "take_settings",
            "torch_settings",
            "undisturbed",
        ),
        "transformer": (
            "can_be_cut",
            "cut_tokens",
            "hints_in_turn",
            "lean_forward",
            "run_together",
        ),
        "vace": ("blocks_in_order",),
    },
)

__all__ = [
    "DECODER",
    "ENCODER",
    "BlockPasses",
    "Cut",
    "DrivingStream",
    "Exchange",
    "Installed",
    "ReplacedForward",
    "Surroundings",
    "alike",
    "as_pixels",
    "block_passes",
    "blocks_in_order",
    "can_be_cut",
    "cut_tokens",
    "encode_faces",
    "fun_inputs",
    "hints_in_turn",
    "known_faces",
    "lean_forward",
    "norms_widen",
    "reads_faces",
    "run_together",
    "settings_notes",
    "take_settings",
    "torch_settings",
    "undisturbed",
    "unknown_code",
    "why_no_lean",
]
