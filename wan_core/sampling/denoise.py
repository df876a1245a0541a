"""The denoising loop: noise in, latents out, with diffusers' transformers and schedulers.

When the clip is denoised as a whole, the result equals diffusers' ``WanPipeline`` and
``WanImageToVideoPipeline`` bit for bit. The loop knows nothing of files, devices or offloading: the
model it is given is ready to be called. Latents are (B, C, T, h, w), float32, normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidRequest, NonFiniteLatents
from ..forward import fun_inputs
from ..job import Window, WindowPlan
from .shortcuts import Memory, Shortcuts, Step


def _nothing(*_: object) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Callbacks of the loop. What one of them raises is passed on to the loop's caller."""

    step: Callable[[int, Tensor], object] = _nothing
    """After step i, with the latents."""
    preview: Callable[[int, Tensor], object] | None = None
    """After step i, with the predicted clean latents. Setting it costs a tensor of their size."""
    window: Callable[[int, int], object] = _nothing
    """Before window i of n within a step."""
    window_done: Callable[[int, int], object] = _nothing
    """After window i of n within a step. The state is consistent here and can be saved."""
    check: Callable[[], object] = _nothing
    """Before every model call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the model is given besides the latents.

    All tensors are on the model's device. Only ``concat``, ``vace`` and ``camera`` may stay in RAM
    if the clip is made in windows; each window then copies its own frames to the device.

    ``concat`` (B, n, T, h, w) is what the model reads beside the noisy latents: mask and latents of
    known frames for the image-to-video models, a control video's latents before them for Fun
    Control; ``mask_channels`` of it, before the last C, are the mask.
    ``first_frame`` (B, C, n, h, w) holds the latents that the 5B keeps fixed as frames 0 to n - 1;
    with ``held`` those that a segment takes over are kept fixed too, though ``concat`` shows them.
    ``image_embeds`` is CLIP's, (B, 257, image_dim), or (2B, 257, image_dim) with a last image.
    ``prompt_parts`` is for a clip with several prompts: one (first latent frame, embeddings) for
    each. A window uses the prompt at its middle frame; without windows, ``prompt_embeds`` is used.

    ``vace`` (B, 96, R + T, h, w) is VACE's control, with ``vace_scale``, a number for each VACE
    block. The latents then have R = ``references`` frames in front of the clip's, which every
    window sees and predicts anew. ``vace_grey`` (1, 16, T, h, w) are the latents of a grey clip,
    for frames that a segment takes over.

    ``reference`` (1, C, h, w) and ``camera`` (1, 24, T, H, W) are for the Fun models that have
    layers for them. The model then sees a frame of the reference in front of every window, which is
    no part of the latents.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    concat: Tensor | None = None
    first_frame: Tensor | None = None
    prompt_parts: tuple[tuple[int, Tensor], ...] = ()
    vace: Tensor | None = None
    vace_scale: Tensor | None = None
    vace_grey: Tensor | None = None
    references: int = 0
    mask_channels: int = 4
    held: bool = False
    reference: Tensor | None = None
    camera: Tensor | None = None

    def places(self, indices: Iterable[int]) -> list[int]:
        """Return where the references and the frames with these indices are in the latents."""
        return [*range(self.references), *(self.references + index for index in indices)]

    def window(self, indices: Sequence[int], middle: int | None = None) -> Conditions:
        """Return the conditions for the frames with these indices in the clip.

        ``middle`` is the frame that decides which prompt is used; None takes the middle one.
        """
        found = self
        if self.prompt_parts:
            at = indices[len(indices) // 2] if middle is None else middle
            embeds = [part for start, part in self.prompt_parts if start <= at]
            found = replace(found, prompt_embeds=embeds[-1], prompt_parts=())
        if self.concat is not None:
            part = self.concat[:, :, list(indices)].to(self.prompt_embeds.device)
            found = replace(found, concat=part)
        if self.vace is not None:
            part = self.vace[:, :, self.places(indices)].to(self.prompt_embeds.device)
            found = replace(found, vace=part)
        if self.camera is not None:
            part = self.camera[:, :, list(indices)].to(self.prompt_embeds.device)
            found = replace(found, camera=part)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One transformer and its guidance scale. ``name`` is "only", "high" or "low"."""

    name: str
    model: Callable[..., Any]
    dtype: torch.dtype
    guidance_scale: float
    together: Callable[[Any, Sequence[Mapping[str, Any]]], Sequence[Any]] | None = None
    """Runs several calls of the model block by block (``forward.run_together``), so that streamed
    weights arrive once for both passes of guidance. None runs the passes one after the other."""

    @property
    def guided(self) -> bool:
        """Whether the unconditional pass is needed."""
        return self.guidance_scale > 1.0


def hold_first_frame(latents: Tensor, conditions: Conditions) -> Tensor:
    """Put the given first frames back into the latents, as image-to-video with the 5B requires."""
    if conditions.first_frame is None:
        return latents
    return _hold(latents, conditions.first_frame, range(latents.shape[2]))[0]


def _hold(latents: Tensor, given: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Put ``given``, the first frames of the clip, into the latents of the frames ``indices``.

    Returns the new latents and a mask (1, 1, T, h, w), which is 0 in the frames that were put in.
    """
    count = given.shape[2]
    places = [place for place, index in enumerate(indices) if index < count]
    mask = torch.ones((1, 1, *latents.shape[2:]), dtype=torch.float32, device=latents.device)
    mask[:, :, places] = 0
    frames = given
    if count > 1:
        frames = torch.zeros_like(latents)
        frames[:, :, places] = given[:, :, [indices[place] for place in places]]
    # Multiplied, not assigned: signed zeros and NaN then come out as in diffusers.
    return (1 - mask) * frames + mask * latents, mask


def _model_inputs(
    latents: Tensor,
    timestep: Tensor,
    expert: Expert,
    conditions: Conditions,
    indices: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the transformer's input latents and its timesteps, (B,) or (B, tokens).

    ``indices`` says which frames of the clip these latents are. A frame in front of them stands for
    Fun Control's reference, if there is one.
    """
    given, in_front = conditions.first_frame, conditions.reference is not None
    # The 5B is given frames in place of their latents. Without any, all per-token timesteps would
    # be equal: one per sample says the same within rounding, with half the memory.
    timesteps = timestep.expand(latents.shape[0])
    if given is not None and min(indices) < given.shape[2]:
        latents, mask = _hold(latents, given, indices)
        # The 5B patches 2x2 latent pixels into a token; tokens of a given frame get timestep 0.
        per_token = (mask[0][0][:, ::2, ::2] * timestep).flatten()
        if in_front:  # the reference's tokens have the last token's
            per_token = torch.cat(
                [per_token[-1:].expand(mask[0, 0, 0, ::2, ::2].numel()), per_token]
            )
        timesteps = per_token.unsqueeze(0).expand(latents.shape[0], -1)
    # Models with more input channels read mask and condition latents there.
    if conditions.concat is not None:
        latents = torch.cat([latents, conditions.concat], dim=1)
    if in_front:
        latents = F.pad(latents, (0, 0, 0, 0, 1, 0))
    return latents.to(expert.dtype), timesteps


def predict(
    latents: Tensor,
    timestep: Tensor,
    expert: Expert,
    conditions: Conditions,
    *,
    indices: Sequence[int] | None = None,
    check: Callable[[], object] = _nothing,
    step: Step | None = None,
) -> Tensor:
    """Return the velocity (B, C, T, h, w) after guidance, in the model's dtype.

    ``indices`` are the frames of the clip that ``latents`` are, besides references in front of
    them; None means all, from the first on.
    ``check`` runs before each call of the model, or once before calls that run together. ``step``
    says which step this is where shortcuts may leave calls out.

    Guidance is v_u + s (v_c - v_u) (Ho and Salimans 2022) and takes two passes; a guidance scale
    of 1 or less takes one. Raises InvalidRequest if negative embeddings are needed but missing.
    """
    seen = range(latents.shape[2]) if indices is None else indices
    hidden_states, timesteps = _model_inputs(latents, timestep, expert, conditions, seen)
    control: dict[str, Any] = {}
    if conditions.vace is not None:
        control["control_hidden_states"] = conditions.vace
        control["control_hidden_states_scale"] = conditions.vace_scale

    def call(embeds: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": hidden_states,
            "timestep": timesteps,
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_image": conditions.image_embeds,
            **control,
            "return_dict": False,
        }

    check()
    if expert.guided and conditions.negative_prompt_embeds is None:
        raise InvalidRequest(
            f"The {expert.name} expert has guidance_scale {expert.guidance_scale}, but there are "
            "no negative embeddings; pass negative_prompt_embeds or a guidance_scale of 1.",
            field="negative_prompt_embeds",
        )
    embeds = [conditions.prompt_embeds]
    if expert.guided and conditions.negative_prompt_embeds is not None:
        embeds.append(conditions.negative_prompt_embeds)

    def compute(passes: int) -> list[Tensor]:
        # Two calls of batch B rather than one of 2B: half the activations, and as diffusers does.
        calls = [call(one) for one in embeds[:passes]]
        with fun_inputs(expert.model, conditions.reference, conditions.camera):
            if len(calls) > 1 and expert.together is not None:
                outputs = [output for (output,) in expert.together(expert.model, calls)]
            else:
                outputs = [expert.model(**calls[0])[0]]
                for later in calls[1:]:
                    check()
                    outputs.append(expert.model(**later)[0])
        return outputs if conditions.reference is None else [out[:, :, 1:] for out in outputs]

    if step is None:
        outputs = compute(len(embeds))
    else:
        outputs = step.velocities(latents, len(embeds), compute)
    if not expert.guided:
        return outputs[0]
    conditional, unconditional = outputs
    return unconditional + expert.guidance_scale * (conditional - unconditional)


@dataclass(slots=True, kw_only=True)
class DenoiseState:
    """Latents and how far they have been denoised: all that a continued run needs.

    Within a step of several windows, ``fused`` holds the blended prediction of the first
    ``next_window`` windows. A clip made in segments has one state per segment: ``segment`` is the
    number of finished segments and ``clip`` holds their latents.
    """

    latents: Tensor
    next_step: int
    next_window: int = 0
    fused: Tensor | None = None
    fused_by: str = ""
    """The windows that ``fused`` was made with. If they have changed since (after a new plan with
    shorter windows), the step starts again."""
    segment: int = 0
    clip: Tensor | None = None
    memory: Memory = field(default_factory=Memory)
    """What shortcuts remember; empty where none is used."""
    finished: list[int] = field(default_factory=list)
    """Numbers of the steps that this process has finished, in order."""


def predict_windows(
    state: DenoiseState,
    timestep: Tensor,
    expert: Expert,
    conditions: Conditions,
    windows: Sequence[tuple[Window, Sequence[float]]],
    signals: Signals,
    *,
    anchor: bool = False,
    step: Step | None = None,
) -> Tensor:
    """Predict window by window and blend the predictions, in float32.

    Each window comes with the weight that its frames get against the mean of the windows before
    (``WindowPlan.blend_fractions``). A frame on which all windows agree keeps exactly that value.
    If a window fails, ``state`` holds the blend so far, and the next call continues from there.
    With ``anchor`` a window that begins after frame 0 also sees the frame before it, whose
    prediction is dropped: the model treats the first frame it sees as the start of a video.
    """
    latents, references = state.latents, conditions.references
    # Kept in the state, not in a local variable: a window that fails does not cost those before.
    if state.fused is None:
        state.fused, state.next_window = torch.zeros_like(latents, dtype=torch.float32), 0
    for number in range(state.next_window, len(windows)):
        window, fractions = windows[number]
        signals.window(number, len(windows))
        # 1. Predict: all windows of a step read the same latents, those before the step.
        seen = (window.start - 1, *window.indices) if anchor and window.start else window.indices
        places = torch.tensor(conditions.places(seen), device=latents.device)
        velocity = predict(
            latents.index_select(2, places),
            timestep,
            expert,
            conditions.window(seen, window.indices[len(window.indices) // 2]),
            indices=seen,
            check=signals.check,
            step=None if step is None else replace(step, key=_window_key(seen)),
        )
        if unused := len(seen) - len(window.indices):
            after = velocity[:, :, references + unused :]
            velocity = torch.cat([velocity[:, :, :references], after], dim=2)
        # 2. Blend: a running weighted mean, so that no second buffer for the weights is needed.
        # ``lerp`` between equal values returns that value, where a weighted sum would round.
        # References are in every window, whose predictions of them count alike.
        shares = (*[1 / (number + 1)] * references, *fractions)
        index = torch.tensor(conditions.places(window.indices), device=latents.device)
        share = torch.tensor(shares, dtype=torch.float32, device=latents.device)
        blended = torch.lerp(
            state.fused.index_select(2, index), velocity.float(), share.view(1, 1, -1, 1, 1)
        )
        # 3. Only now does the window count as done.
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
    shortcuts: Shortcuts | None = None,
) -> DenoiseState:
    """Run those of ``steps`` that ``state`` has not passed yet, with one expert.

    ``state`` and ``scheduler`` advance together after every finished step. A step that raises
    leaves both as they were before it (but for finished windows, which ``state`` keeps), so that
    the call can be repeated. ``scheduler`` is a diffusers scheduler with its timesteps set; the
    caller sets its begin index. ``shortcuts`` may leave forwards out. Raises NonFiniteLatents if
    the latents are not finite after a step.
    """
    signals = signals or Signals()
    if shortcuts is not None and state.next_step < steps.stop:
        state.memory.enter(f"{expert.name} {steps.start}")
    for i in range(max(steps.start, state.next_step), steps.stop):
        step = None
        if shortcuts is not None:
            step = Step(
                shortcuts=shortcuts,
                memory=state.memory,
                index=i,
                steps=steps,
                dtype=expert.dtype,
                model=expert.model,
            )
        remembered = replace(state.memory, windows=dict(state.memory.windows))
        # 1. Predict the velocity: of the whole clip at once, or window by window.
        timestep = scheduler.timesteps[i]
        if windows is None or windows.count == 1:
            if windows is not None:
                signals.window(0, 1)
            velocity = predict(
                state.latents, timestep, expert, conditions, check=signals.check, step=step
            )
        else:
            # Predictions blended with other windows cannot be continued with these.
            if state.fused_by != (name := repr(windows)):
                state.fused, state.next_window, state.fused_by = None, 0, name
            parts = tuple(zip(windows.windows(i), windows.blend_fractions(i), strict=True))
            velocity = predict_windows(
                state, timestep, expert, conditions, parts, signals, anchor=anchor, step=step
            )
        # 2. Predict the clean latents for a preview: x0 = x - sigma v, with x before the step.
        sigma = float(scheduler.sigmas[i])
        clean = state.latents - sigma * velocity if signals.preview is not None else None
        # 3. Step. A scheduler remembers earlier predictions and counts its steps, so after an
        # error it must not be one step ahead of the latents.
        with _put_back_on_error(scheduler), _forget_on_error(state, remembered):
            latents = scheduler.step(velocity, timestep, state.latents, return_dict=False)[0]
            # Checked inside the context: the check may run out of memory as well.
            if not torch.isfinite(latents).all():
                raise NonFiniteLatents(
                    step=i, sigma=sigma, expert=expert.name, dtype=str(expert.dtype).split(".")[-1]
                )
        # 4. Commit. Callbacks come last, so that one that raises finds the step finished.
        state.latents, state.next_step = latents, i + 1
        state.fused, state.next_window = None, 0
        state.finished.append(i)
        if signals.preview is not None and clean is not None:
            signals.preview(i, clean)
        signals.step(i, latents)
    return state


def _window_key(indices: Sequence[int]) -> str:
    """Name a window by its frames; they are in order, but may go round the end of the clip."""
    return f"{indices[0]}-{indices[-1]}"


@contextmanager
def _forget_on_error(state: DenoiseState, remembered: Memory) -> Iterator[None]:
    """Restore what shortcuts remembered if the step is not finished and will be predicted again.

    Predictions of windows are kept in the state, and what was remembered of them stays true.
    """
    try:
        yield
    except BaseException:
        if state.fused is None:
            state.memory = remembered
        raise


@contextmanager
def _put_back_on_error(scheduler: Any) -> Iterator[None]:
    """Restore the scheduler's history if the ``with`` block raises."""
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}
    try:
        yield
    except BaseException:
        vars(scheduler).update(before)
        raise
