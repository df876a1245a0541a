"""From a GenerationConfig to a Request: defaults filled in and every field checked before loading.

In: a ``GenerationConfig`` and a ``ModelArchitecture``. Out: a ``Request`` (``resolve``), its
``Inputs`` read and checked (``check_inputs``), whether the model has what the job needs
(``check_parts``, ``check_files``) and its result can be written (``check_outputs``), and the
arithmetic that the denoising loop follows
(windows, segments, steps, prompt parts, noise). Whatever can be known of a job from its values,
from headers and from what it is given is checked here, before the first weight is read. Imports
``models`` and the packages below it; torch, diffusers, Pillow and PyAV only inside functions.
"""

from __future__ import annotations

from .animate import CharacterPlan, back_and_forth, mirrored, with_character
from .control import (
    ControlInputs,
    ControlRequest,
    control_of,
    has_control,
    has_keyframes,
    reads,
)
from .effects import window_settings_without_effect
from .fields import flag, real, whole
from .inputs import (
    ENCODERS,
    Inputs,
    as_preferred,
    check_inputs,
    check_outputs,
    clip_paths,
    encoder_bytes,
    encoder_options,
    face_size,
    output_paths,
)
from .noise import NOISES, StepNoise, draw_noise
from .output import AUDIO_RATES, PIXEL_FORMATS
from .parts import check_files, check_parts, files_of, texts_to_encode
from .pictures import load_picture, picture_size, to_pil
from .request import (
    MAX_LATENT_FRAMES,
    MAX_SIZE,
    MODES,
    MOST_CLIPS,
    MOST_FRAMES,
    Request,
    needs_clip,
    pictures_needed,
    resolve,
    seen_by_clip,
)
from .steps import (
    LAST_SIGMA,
    SCHEDULERS,
    SIGMA_SCHEDULES,
    StepPlan,
    expected_steps,
    make_scheduler,
    plan_steps,
    solver_sigmas,
)
from .tensors import latent_shape, references_in_front
from .windows import (
    FRAMES_PER_LATENT,
    FUSIONS,
    SCHEDULES,
    SegmentPlan,
    Window,
    WindowPlan,
    filling_overlap,
    latent_frames,
    latent_index,
    plan_segments,
    plan_windows,
    round_up_frames,
    video_frames,
)

__all__ = [
    "AUDIO_RATES",
    "CharacterPlan",
    "ControlInputs",
    "ControlRequest",
    "ENCODERS",
    "FRAMES_PER_LATENT",
    "FUSIONS",
    "Inputs",
    "LAST_SIGMA",
    "MAX_LATENT_FRAMES",
    "MAX_SIZE",
    "MODES",
    "MOST_CLIPS",
    "MOST_FRAMES",
    "NOISES",
    "PIXEL_FORMATS",
    "Request",
    "SCHEDULERS",
    "SCHEDULES",
    "SIGMA_SCHEDULES",
    "SegmentPlan",
    "StepNoise",
    "StepPlan",
    "Window",
    "WindowPlan",
    "back_and_forth",
    "check_files",
    "check_inputs",
    "check_outputs",
    "clip_paths",
    "as_preferred",
    "check_parts",
    "control_of",
    "draw_noise",
    "encoder_bytes",
    "encoder_options",
    "expected_steps",
    "face_size",
    "files_of",
    "filling_overlap",
    "flag",
    "has_control",
    "has_keyframes",
    "latent_frames",
    "latent_index",
    "latent_shape",
    "load_picture",
    "make_scheduler",
    "output_paths",
    "picture_size",
    "needs_clip",
    "pictures_needed",
    "plan_segments",
    "plan_steps",
    "plan_windows",
    "reads",
    "real",
    "mirrored",
    "references_in_front",
    "resolve",
    "round_up_frames",
    "seen_by_clip",
    "solver_sigmas",
    "texts_to_encode",
    "to_pil",
    "video_frames",
    "whole",
    "window_settings_without_effect",
    "with_character",
]
