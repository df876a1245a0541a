"""The denoising loop: noise in, latents out, with diffusers' transformers and schedulers.

Equal to diffusers' ``WanPipeline`` and ``WanImageToVideoPipeline`` bit for bit where the clip is
seen whole. Knows nothing of files, devices or offloading: the model it is given is ready to be
called. Latents are (B, C, T, h, w), float32, normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidRequest, NonFiniteLatents
from ..job import Window, WindowPlan


def _nothing(*_: object) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What the loop tells its caller. Whatever one of these raises leaves the loop unchanged."""

    step: Callable[[int, Tensor], object] = _nothing
    """After step i, with the latents."""
    preview: Callable[[int, Tensor], object] | None = None
    """After step i, with the predicted clean latents; costs one subtraction when set."""
    window: Callable[[int, int], object] = _nothing
    """Before window i of n within a step."""
    window_done: Callable[[int, int], object] = _nothing
    """After window i of n within a step; the state can be saved here."""
    check: Callable[[], object] = _nothing
    """Before every model call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the model is told besides the latents. All on the model's device, but for ``concat``
    of a clip made in windows: it may wait in RAM, of which a window takes its part.

    ``concat`` (B, 20, T, h, w) is mask and latents of the image-to-video models;
    ``first_frame`` (B, C, n, h, w) the latents the 5B holds fixed as frames 0 to n - 1;
    ``image_embeds`` (B, 257, image_dim), or (2B, 257, image_dim) with a last image, is CLIP's.
    ``prompt_parts`` is (first latent frame, embeddings) per part of a clip that has several
    texts; a window takes the part its middle frame lies in, a run without windows none of them.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    concat: Tensor | None = None
    first_frame: Tensor | None = None
    prompt_parts: tuple[tuple[int, Tensor], ...] = ()

    def window(self, indices: Sequence[int], middle: int | None = None) -> Conditions:
        """Return the conditions of the frames with these absolute indices.

        ``middle`` is the frame that decides which text is meant, if not the one in the middle.
        """
        found = self
        if self.prompt_parts:
            at = indices[len(indices) // 2] if middle is None else middle
            embeds = [part for start, part in self.prompt_parts if start <= at]
            found = replace(found, prompt_embeds=embeds[-1], prompt_parts=())
        if self.concat is not None:
            part = self.concat[:, :, list(indices)].to(self.prompt_embeds.device)
            found = replace(found, concat=part)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One transformer and how strongly it is guided. ``name`` is "only", "high" or "low"."""

    name: str
    model: Callable[..., Any]
    dtype: torch.dtype
    guidance_scale: float
    per_token_timesteps: bool = False
    """True passes the 5B one timestep per token also where all are equal, as diffusers does;
    False one per sample: the same within rounding, and half the memory."""
    together: Callable[[Any, Sequence[Mapping[str, Any]]], Sequence[Any]] | None = None
    """Runs several calls of the model block by block (``lean_forward.run_together``), so that
    streamed weights arrive once for both passes of guidance; None runs one after the other."""

    @property
    def guided(self) -> bool:
        """Whether the unconditional pass is needed."""
        return self.guidance_scale > 1.0


def hold_first_frame(latents: Tensor, conditions: Conditions) -> Tensor:
    """Put the given first frames back into the latents, as the 5B's image-to-video asks."""
    if conditions.first_frame is None:
        return latents
    return _hold(latents, conditions.first_frame, range(latents.shape[2]))[0]


def _hold(latents: Tensor, given: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Put ``given``, the clip's first frames, among the latents of the frames ``indices``.

    Returns them and a mask (1, 1, T, h, w), 0 in the frames put in. Multiplied by the mask, not
    assigned, so that signed zeros and NaN behave as in diffusers.
    """
    count = given.shape[2]
    places = [place for place, index in enumerate(indices) if index < count]
    mask = torch.ones((1, 1, *latents.shape[2:]), dtype=torch.float32, device=latents.device)
    mask[:, :, places] = 0
    frames = given
    if count > 1:
        frames = torch.zeros_like(latents)
        frames[:, :, places] = given[:, :, [indices[place] for place in places]]
    return (1 - mask) * frames + mask * latents, mask


def _model_inputs(
    latents: Tensor,
    timestep: Tensor,
    expert: Expert,
    conditions: Conditions,
    indices: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the transformer's input latents and its timesteps, (B,) or (B, tokens).

    ``indices`` says which frames of the clip these latents are.
    """
    batch, given = latents.shape[0], conditions.first_frame
    if conditions.concat is not None:
        latents = torch.cat([latents, conditions.concat], dim=1)
        return latents.to(expert.dtype), timestep.expand(batch)
    if given is not None and min(indices) < given.shape[2]:
        latents, mask = _hold(latents, given, indices)
    elif expert.per_token_timesteps:
        mask = torch.ones((1, 1, *latents.shape[2:]), device=latents.device)
    else:
        return latents.to(expert.dtype), timestep.expand(batch)
    # The 5B patches 2x2 latent pixels into a token; tokens of a given frame are at t = 0.
    per_token = (mask[0][0][:, ::2, ::2] * timestep).flatten()
    return latents.to(expert.dtype), per_token.unsqueeze(0).expand(batch, -1)


def predict(
    latents: Tensor,
    timestep: Tensor,
    expert: Expert,
    conditions: Conditions,
    *,
    indices: Sequence[int] | None = None,
    check: Callable[[], object] = _nothing,
) -> Tensor:
    """Return the guided velocity (B, C, T, h, w) in the model's dtype.

    ``indices`` are the frames of the clip that ``latents`` are; None: all from the first on.

    Guidance is v_u + s (v_c - v_u) (Ho and Salimans 2022), two passes one after the other; a
    scale of 1 or less makes one pass.
    """
    seen = range(latents.shape[2]) if indices is None else indices
    hidden_states, timesteps = _model_inputs(latents, timestep, expert, conditions, seen)

    def call(embeds: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": hidden_states,
            "timestep": timesteps,
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_image": conditions.image_embeds,
            "return_dict": False,
        }

    check()
    if not expert.guided:
        velocity: Tensor = expert.model(**call(conditions.prompt_embeds))[0]
        return velocity
    if conditions.negative_prompt_embeds is None:
        raise InvalidRequest(
            f"The {expert.name} expert has guidance_scale {expert.guidance_scale}, but there are "
            "no negative embeddings; pass negative_prompt_embeds or a guidance_scale of 1.",
            field="negative_prompt_embeds",
        )
    calls = [call(conditions.prompt_embeds), call(conditions.negative_prompt_embeds)]
    if expert.together is not None:
        (conditional,), (unconditional,) = expert.together(expert.model, calls)
    else:
        conditional = expert.model(**calls[0])[0]
        check()
        unconditional = expert.model(**calls[1])[0]
    guided: Tensor = unconditional + expert.guidance_scale * (conditional - unconditional)
    return guided


@dataclass(slots=True, kw_only=True)
class DenoiseState:
    """Latents and how far they are; what a continued run starts from.

    Within a step of several windows ``fused`` holds the mean of the first ``next_window`` of them.
    A clip made segment by segment has one state per segment: ``segment`` counts the finished
    ones, ``clip`` holds their latents.
    """

    latents: Tensor
    next_step: int
    next_window: int = 0
    fused: Tensor | None = None
    fused_by: str = ""
    """The windows ``fused`` was made with; with others (a smaller plan) the step starts anew."""
    segment: int = 0
    clip: Tensor | None = None
    finished: list[int] = field(default_factory=list)
    """Steps made so far in this process, in order; a step appears once unless it was made twice."""


def predict_windows(
    state: DenoiseState,
    timestep: Tensor,
    expert: Expert,
    conditions: Conditions,
    windows: Sequence[tuple[Window, Sequence[float]]],
    signals: Signals,
    *,
    anchor: bool = False,
) -> Tensor:
    """Predict window by window and fuse in float32.

    Each window comes with the share of its frames in the mean so far (``blend_fractions``), so a
    frame on which all windows agree stays exactly what they say. They are blended in the order
    given. When one fails, ``state`` holds the mean so far, and the next call goes on with it.
    ``anchor`` shows a window that begins after frame 0 the frame before it as well, and throws
    its prediction away: the model treats whatever it sees first as the start of a video.
    """
    latents = state.latents
    if state.fused is None:
        state.fused, state.next_window = torch.zeros_like(latents, dtype=torch.float32), 0
    for number in range(state.next_window, len(windows)):
        window, fractions = windows[number]
        signals.window(number, len(windows))
        seen = (window.start - 1, *window.indices) if anchor and window.start else window.indices
        velocity = predict(
            latents.index_select(2, torch.tensor(seen, device=latents.device)),
            timestep,
            expert,
            conditions.window(seen, window.indices[len(window.indices) // 2]),
            indices=seen,
            check=signals.check,
        )[:, :, len(seen) - len(window.indices) :]
        index = torch.tensor(window.indices, device=latents.device)
        share = torch.tensor(fractions, dtype=torch.float32, device=latents.device)
        blended = torch.lerp(
            state.fused.index_select(2, index), velocity.float(), share.view(1, 1, -1, 1, 1)
        )
        state.fused.index_copy_(2, index, blended)
        state.next_window = number + 1
        signals.window_done(number, len(windows))
    return state.fused


def denoise_steps(
    state: DenoiseState,
    steps: range,
    expert: Expert,
    scheduler: Any,
    conditions: Conditions,
    *,
    windows: WindowPlan | None = None,
    anchor: bool = False,
    signals: Signals | None = None,
) -> DenoiseState:
    """Make those of ``steps`` that are not behind ``state`` yet, with one expert.

    ``state`` and ``scheduler`` move on together after every finished step; a step that raises
    leaves both as they were before it, so that the call can be made again. ``scheduler`` is a
    diffusers scheduler with its timesteps set; its begin index is set by the caller. Raises
    NonFiniteLatents where the model's output is not finite.
    """
    signals = signals or Signals()
    for i in range(max(steps.start, state.next_step), steps.stop):
        timestep = scheduler.timesteps[i]
        if windows is None or windows.count == 1:
            velocity = predict(state.latents, timestep, expert, conditions, check=signals.check)
        else:
            if state.fused_by != (name := repr(windows)):
                state.fused, state.next_window, state.fused_by = None, 0, name
            parts = tuple(zip(windows.windows(i), windows.blend_fractions(i), strict=True))
            velocity = predict_windows(
                state, timestep, expert, conditions, parts, signals, anchor=anchor
            )
        sigma = float(scheduler.sigmas[i])
        clean = state.latents - sigma * velocity if signals.preview is not None else None
        with _put_back_on_error(scheduler):
            latents = scheduler.step(velocity, timestep, state.latents, return_dict=False)[0]
            # Looked at in here: this too may run out of memory, with the scheduler one step on.
            if not torch.isfinite(latents).all():
                raise NonFiniteLatents(
                    step=i, sigma=sigma, expert=expert.name, dtype=str(expert.dtype).split(".")[-1]
                )
        state.latents, state.next_step = latents, i + 1
        state.fused, state.next_window = None, 0
        state.finished.append(i)
        if signals.preview is not None and clean is not None:
            signals.preview(i, clean)
        signals.step(i, latents)
    return state


@contextmanager
def _put_back_on_error(scheduler: Any) -> Iterator[None]:
    """Where the block raises, give the scheduler the history back that it had before."""
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}
    try:
        yield
    except BaseException:
        vars(scheduler).update(before)
        raise
