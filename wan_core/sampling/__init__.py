"""Everything that makes or changes latents: encoding, denoising, segments, the VAE.

In: modules whose weights are placed and ready to be called, conditions, noise. Out: latents, then
pixels, equal to those of diffusers' pipelines bit for bit.
"""

from __future__ import annotations

from .animate import (
    SegmentsDecoder,
    background_mask,
    carried_latents,
    character_latents,
    encode_frames,
    last_frames,
    moved_frames,
)
from .characters import (
    DRIVING_PROMPT,
    encode_carried,
    encode_character,
    encode_driving,
    encode_whole_clip,
    in_black_frame,
)
from .control import encode_video, noised
from .denoise import DenoiseState, Expert, Signals, denoise_steps
from .encode import (
    encode_clip,
    encode_first_frame,
    encode_keyframes,
    encode_text,
    prepare_picture,
    text_beyond,
)
from .segments import ClipSegments
from .shortcuts import Memory, Shortcuts, chosen_shortcuts
from .solvers import Solver, make_solver, start_latents
from .tracks import by_paths, by_points
from .units import (
    Conditions,
    Elsewhere,
    Kept,
    Made,
    Unit,
    compute_unit,
    hold_first_frame,
)
from .vace import ControlClip, encode_grey, encode_vace
from .vae import (
    Leaving,
    OutOfRange,
    StreamingDecoder,
    as_bytes,
    denormalize_latents,
    encode_latents,
    normalize_latents,
    to_frames,
    to_pictures,
)

__all__ = [
    "DRIVING_PROMPT",
    "ClipSegments",
    "Conditions",
    "ControlClip",
    "DenoiseState",
    "Elsewhere",
    "Expert",
    "Kept",
    "Leaving",
    "Made",
    "Memory",
    "SegmentsDecoder",
    "Shortcuts",
    "Signals",
    "OutOfRange",
    "Solver",
    "StreamingDecoder",
    "Unit",
    "as_bytes",
    "background_mask",
    "by_paths",
    "by_points",
    "carried_latents",
    "character_latents",
    "chosen_shortcuts",
    "compute_unit",
    "denoise_steps",
    "denormalize_latents",
    "encode_carried",
    "encode_character",
    "encode_clip",
    "encode_driving",
    "encode_first_frame",
    "encode_frames",
    "encode_grey",
    "encode_keyframes",
    "encode_latents",
    "encode_text",
    "encode_vace",
    "encode_video",
    "encode_whole_clip",
    "hold_first_frame",
    "in_black_frame",
    "last_frames",
    "make_solver",
    "moved_frames",
    "noised",
    "normalize_latents",
    "prepare_picture",
    "start_latents",
    "text_beyond",
    "to_frames",
    "to_pictures",
]
