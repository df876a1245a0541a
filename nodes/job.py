"""Values of a node's inputs -> a GenerationConfig. Does not import ComfyUI.

A 0 in steps, guidance_scale, guidance_scale_2, flow_shift, boundary and fps means "the model's
official value" and becomes None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..wan_core.config import (
    CODECS,
    PRECISIONS,
    RESUME,
    SPEEDS,
    GenerationConfig,
    plain_number,
)
from ..wan_core.errors import InvalidRequest
from ..wan_core.job import (
    FUSIONS,
    MODES,
    NOISES,
    PIXEL_FORMATS,
    SCHEDULERS,
    SCHEDULES,
    SIGMA_SCHEDULES,
    latent_frames,
)
from ..wan_core.plan import FORWARDS, FP8, OFFLOADS, STEP_CACHES

LATER: dict[str, Any] = {
    "codec": None,  # as the user prefers
    "crf": 18,
    "pix_fmt": PIXEL_FORMATS[0],
    "official_negative": True,
    "sigma_schedule": "official",
    "sigmas": "",
    "guided_steps": 0,
    "guided_scale": 0.0,
    "devices": "1",
}
"""Values of the samplers' later inputs for a prompt in API format that leaves them out."""
OPTIMIZE: dict[str, Any] = {
    "precision": "auto",
    "offload": "auto",
    "vram_limit_gb": 0.0,
    "ram_limit_gb": 0.0,
    "fallback_window_frames": 0,
    "resident_blocks": -1,
    "forward": "auto",
    "fp8_storage": "auto",
    "speed": None,  # as the user prefers
    "step_cache": "auto",
    "step_cache_threshold": -1.0,
    "guidance_gate": 0.0,
    "step_cache_factor": 0.0,
}
"""Values of WanOptimize's inputs for a prompt in API format that leaves them out."""
LONG_CLIP: dict[str, Any] = {
    "schedule": SCHEDULES[0],
    "mode": MODES[0],
    "resume": "auto",
    "return_images": True,
    "noise": NOISES[0],
    "anchor": False,
    "prompts": "",
    "fusion": FUSIONS[0],
    "drift_correction": 0.0,
}
"""Values of WanChunkedSampler's later inputs for a prompt in API format that leaves them out."""


def require_choice(field: str, value: str, allowed: Sequence[str]) -> str:
    """Return ``value`` if it is allowed; older ComfyUI versions let any text through a combo."""
    if value not in allowed:
        raise InvalidRequest(
            f"{field} is {value!r}; allowed: {', '.join(allowed)}. Choose one of them.", field=field
        )
    return value


def require_kind(field: str, value: Any, default: Any) -> Any:
    """Return ``value`` if it is of the kind of the default; what has no default passes.

    A node of any type may be wired to a widget and give something else than its kind.
    """
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int | float):
        good = plain_number(value) is not None
    else:
        good = default is None or isinstance(value, str)
    if not good:
        kinds = {bool: "True or False", str: "a text"}
        wanted = kinds.get(type(default), "a number")
        raise InvalidRequest(f"{field} is {str(value)[:60]!r}; {wanted} is needed.", field=field)
    return value


def _set(value: Any) -> Any:
    """Return a value, and None for a 0; what is no number is told where the value is checked."""
    return None if plain_number(value) == 0 else value


def _or_preferred(field: str, value: str | None, allowed: Sequence[str]) -> str | None:
    """Return ``value`` if it is allowed; None, for an input that a prompt leaves out, is kept."""
    return None if value is None else require_choice(field, value, allowed)


def generation_config(values: Mapping[str, Any]) -> GenerationConfig:
    """Turn the shared inputs into a GenerationConfig; raises InvalidRequest naming the input."""
    values = {**LATER, **values}
    require_choice("scheduler", values["scheduler"], SCHEDULERS)
    positive = _embeds("positive", values.get("positive"))
    negative = _embeds("negative", values.get("negative"))
    return GenerationConfig(
        prompt=values["prompt"] if positive is None else None,
        negative_prompt=None if negative is not None else _negative(values),
        num_frames=values["num_frames"],
        width=values["width"],
        height=values["height"],
        num_inference_steps=_set(values["steps"]),
        guidance_scale=_set(values["guidance_scale"]),
        guidance_scale_2=_set(values["guidance_scale_2"]),
        flow_shift=_set(values["flow_shift"]),
        boundary=_set(values["boundary"]),
        switch_step=_set(values["switch_step"]),
        scheduler=_sampler(values["scheduler"]),
        fps=_set(values["fps"]),
        seed=values["seed"],
        image=_one_image("start_image", values.get("start_image")),
        last_image=_one_image("end_image", values.get("end_image")),
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        codec=_or_preferred("codec", values["codec"], CODECS),
        crf=values["crf"],
        pix_fmt=require_choice("pix_fmt", values["pix_fmt"], PIXEL_FORMATS),
        audio=_one_sound("audio", values.get("audio")),
        control=values.get("control"),
        sigma_schedule=_schedule(values),
        sigmas=_levels(values["sigmas"]),
        guided_steps=values["guided_steps"],
        guided_scale=_set(values["guided_scale"]),
    )


def _sampler(name: str) -> str | None:
    """Return the sampler; the first, official one leaves it to a recipe that is in use."""
    return None if name == SCHEDULERS[0] else name


def _schedule(values: Mapping[str, Any]) -> str | None:
    """Return the schedule; ``official`` leaves it to the model, or to a recipe that is in use."""
    name = require_choice("sigma_schedule", values["sigma_schedule"], SIGMA_SCHEDULES)
    return None if name == "official" else name


def _levels(text: str) -> list[float] | None:
    """Return the noise levels that are typed one by one; None for an empty text."""
    words = str(require_kind("sigmas", text, "")).replace(",", " ").split()
    try:
        return [float(word) for word in words] or None
    except ValueError as err:
        raise InvalidRequest(
            f"sigmas is {text!r}; numbers are needed with commas or blanks between ({err}). Leave "
            "it empty for the levels of the schedule.",
            field="sigmas",
        ) from err


def _negative(values: Mapping[str, Any]) -> str | None:
    """Return the negative prompt; None, for an empty one, asks for the official one."""
    text = str(values["negative_prompt"])
    return None if not text and values["official_negative"] else text


def use_windows(config: GenerationConfig, frames: int, overlap: int) -> None:
    """Set windows of ``frames`` video frames, of which neighbours share ``overlap``.

    One below 0 leaves it to the plan, which may share more where that fills several cards. Raises
    InvalidRequest if the overlap is not shorter than the window.
    """
    require_kind("window_frames", frames, 0)
    if require_kind("window_overlap", overlap, 0) >= frames:
        raise InvalidRequest(
            f"window_overlap is {overlap} and window_frames {frames}: the overlap must be shorter "
            "than the window. Lower it to about a fifth of the window.",
            field="window_overlap",
        )
    # One window may hold the whole clip: then there is nothing to force.
    config.force_chunked_processing = not 0 < (plain_number(config.num_frames) or 0) <= frames
    config.max_chunk_size = frames
    config.window_overlap = None if overlap < 0 else overlap


def use_long_clip(config: GenerationConfig, values: Mapping[str, Any], vae: Any) -> None:
    """Set what only WanChunkedSampler asks for; ``vae`` holds the mean and std of the latents.

    Raises InvalidRequest naming the input.
    """
    config.window_schedule = require_choice("schedule", values["schedule"], SCHEDULES)
    config.window_mode = require_choice("mode", values["mode"], MODES)
    config.resume = require_choice("resume", values["resume"], RESUME)
    config.noise = require_choice("noise", values["noise"], NOISES)
    config.window_fusion = require_choice("fusion", values["fusion"], FUSIONS)
    config.window_anchor = values["anchor"]
    config.drift_correction = values["drift_correction"]
    config.return_frames = values["return_images"]
    config.prompts = require_kind("prompts", values["prompts"], "").strip() or None
    latent = values.get("continue_from")
    if latent is not None:
        from ..wan_core.sampling import normalize_latents

        samples = _video_latents("continue_from", latent, len(vae.latents_mean))
        config.continue_from = normalize_latents(samples.float(), vae.statistics)


def device_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field of an OptimizationConfig that a sampler's ``devices`` sets; none for 1."""
    wanted = str({**LATER, **values}["devices"]).strip()
    return {} if wanted in ("", "1") else {"devices": wanted}


def optimization_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn WanOptimize's inputs into fields of an OptimizationConfig; raises InvalidRequest."""
    values = {**OPTIMIZE, **values}
    frames, blocks, threshold = (
        require_kind(name, values[name], OPTIMIZE[name])
        for name in ("fallback_window_frames", "resident_blocks", "step_cache_threshold")
    )
    speed = _or_preferred("speed", values["speed"], SPEEDS)
    return ({} if speed is None else {"speed": speed}) | {
        "precision": require_choice("precision", values["precision"], PRECISIONS),
        "offload": require_choice("offload", values["offload"], OFFLOADS),
        "vram_limit_gb": _set(values["vram_limit_gb"]),
        "ram_limit_gb": _set(values["ram_limit_gb"]),
        "chunk_size": 0 if frames < 0 else window_of("fallback_window_frames", frames),
        "resident_blocks": None if blocks < 0 else blocks,
        "forward": require_choice("forward", values["forward"], FORWARDS),
        "fp8_storage": require_choice("fp8_storage", values["fp8_storage"], FP8),
        "step_cache": require_choice("step_cache", values["step_cache"], STEP_CACHES),
        "step_cache_threshold": None if threshold < 0 else threshold,
        "guidance_gate": _set(values["guidance_gate"]),
        "step_cache_factor": _set(values["step_cache_factor"]),
    }


def window_of(field: str, frames: int) -> int | None:
    """Return a window of video ``frames`` in latent frames; None for 0, which means no window."""
    if frames == 0:
        return None
    if frames < 5:
        raise InvalidRequest(
            f"{field} is {frames}; a window has 5 frames or more. Enter 0 for no window.",
            field=field,
        )
    return latent_frames(frames)


def _video_latents(field: str, latent: Any, channels: int) -> Any:
    """Return a LATENT's samples if they are (batch, channels, frames, height, width)."""
    samples = latent.get("samples") if isinstance(latent, Mapping) else latent
    shape = tuple(getattr(samples, "shape", ()))
    if not isinstance(latent, Mapping) or len(shape) != 5 or shape[1] != channels:
        found = f"has shape {shape}" if shape else f"is {str(samples)[:60]!r}"
        raise InvalidRequest(
            f"{field} {found}; this model's latents are (batch, {channels}, frames, height, "
            "width). Connect the latent of a clip made with it.",
            field=field,
        )
    return samples


_BESIDE_TEXT = {
    "concat_latent_image": "start_image, or keyframes of a Wan Control",
    "vace_frames": "video, mask and reference of a Wan Control",
    "control_video": "video of a Wan Control",
    "reference_latents": "reference of a Wan Control",
    "camera_conditions": "camera of a Wan Control",
    "face_video_pixels": "face_video of a Wan Control",
    "pose_video_latent": "video of a Wan Control",
}
"""What ComfyUI's nodes hang on a text -> the inputs that take it here."""
_MEANT = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}
"""Numbers that are hung on a text -> those that change nothing."""
_NOWHERE = (
    "area", "mask", "control", "hooks", "gligen", "unclip_conditioning", "clip_vision_output",
    "time_dim_concat", "context_latents", "audio_embed", "reference_motion",
)  # fmt: skip
"""What is hung on a text and has no input that takes it."""


def _embeds(field: str, conditioning: Any) -> Any:
    """Return the embeddings (1, tokens, width) of a CONDITIONING that holds one text.

    What a node like WanImageToVideo has hung on it would be left out without a word: refused.
    """
    if conditioning is None:
        return None
    if not isinstance(conditioning, list):
        raise InvalidRequest(
            f"{field} is {str(conditioning)[:60]!r}; the output of a CLIP Text Encode is needed.",
            field=field,
        )
    if len(conditioning) != 1:
        raise InvalidRequest(
            f"{field} holds {len(conditioning)} texts; Wan takes one. Connect a single CLIP Text "
            "Encode, without Conditioning (Combine).",
            field=field,
        )
    try:
        embeds, hung = conditioning[0]
        beside = _beside(hung)
    except (TypeError, ValueError, AttributeError) as err:  # a list of something else
        raise InvalidRequest(
            f"{field} is a list of {str(conditioning[0])[:60]!r}; the output of a CLIP Text Encode "
            "is needed.",
            field=field,
        ) from err
    if beside is not None:
        cure = _BESIDE_TEXT.get(beside)
        also = f", and what that node was given to {cure}" if cure else ""
        raise InvalidRequest(
            f"{field} comes from a node that has put {beside} beside the text; here only the text "
            f"would be read. Connect the CLIP Text Encode itself{also}.",
            field=field,
        )
    return embeds


def _beside(hung: Mapping[str, Any]) -> str | None:
    """Return what a node has hung on a text that would change the clip, or None."""
    given = [key for key in (*_BESIDE_TEXT, *_NOWHERE) if hung.get(key) is not None]
    given += [key for key, usual in _MEANT.items() if hung.get(key, usual) != usual]
    return given[0] if given else None


def _one_image(field: str, image: Any) -> Any:
    """Return the single picture (H, W, 3) of an IMAGE; (H, W, 1 or 4) of a grey or RGBA one."""
    if image is None:
        return None
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) != 4 or shape[-1] not in (1, 3, 4):
        raise InvalidRequest(
            f"{field} is no picture but {str(shape or image)[:60]}; a picture is (1, height, "
            "width, 3). Connect an IMAGE.",
            field=field,
        )
    if shape[0] != 1:
        raise InvalidRequest(
            f"{field} holds {shape[0]} pictures; one is needed. Take one with an "
            "'ImageFromBatch' node.",
            field=field,
        )
    return image[0]


def _one_sound(field: str, audio: Any) -> Any:
    """Return (waveform (channels, samples), sample rate in Hz) of an AUDIO socket."""
    if audio is None:
        return None
    given = audio if isinstance(audio, Mapping) else {}
    shape = tuple(getattr(given.get("waveform"), "shape", ()))
    rate = plain_number(given.get("sample_rate"))
    if not shape or rate is None:
        raise InvalidRequest(
            f"{field} is no sound but {str(audio)[:60]!r}. Connect an AUDIO, or nothing.",
            field=field,
        )
    if len(shape) != 3 or shape[0] != 1:
        raise InvalidRequest(
            f"{field} has shape {shape}; one sound is (1, channels, samples). Connect a single "
            "one.",
            field=field,
        )
    return given["waveform"][0], int(rate)
