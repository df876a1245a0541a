"""The denoising loop: noise in, latents out, with diffusers' transformers and schedulers.

When the clip is denoised as a whole, the result equals diffusers' ``WanPipeline`` and
``WanImageToVideoPipeline`` bit for bit. The loop knows nothing of files, devices or offloading: the
model it is given is ready to be called. Latents are (B, C, T, h, w), float32, normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidRequest, NonFiniteLatents
from ..job import Window, WindowPlan
from .shortcuts import Memory, Shortcuts, Step
from .units import (
    Conditions,
    Elsewhere,
    FarPasses,
    HerePasses,
    Kept,
    Together,
    Unit,
    hold_first_frame,
)

__all__ = [
    "Conditions",
    "DenoiseState",
    "Expert",
    "Signals",
    "denoise_steps",
    "hold_first_frame",
    "predict",
    "predict_windows",
]


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
    kept: Kept | None = None
    """Remembers the passes of a step as they are finished; what it knows is not computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One transformer and its guidance scale. ``name`` is "only", "high" or "low"."""

    name: str
    model: Callable[..., Any]
    dtype: torch.dtype
    guidance_scale: float
    together: Together | None = None
    """Runs several calls of the model block by block (``forward.run_together``), so that streamed
    weights arrive once for both passes of guidance. None runs the passes one after the other."""
    elsewhere: Elsewhere | None = None
    """Computes the passes in other processes; ``model`` is then not called."""

    @property
    def guided(self) -> bool:
        """Whether the unconditional pass is needed."""
        return self.guidance_scale > 1.0


def predict(
    latents: Tensor,
    timestep: Tensor,
    expert: Expert,
    conditions: Conditions,
    *,
    indices: Sequence[int] | None = None,
    check: Callable[[], object] = _nothing,
    step: Step | None = None,
    far: FarPasses | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Return the velocity (B, C, T, h, w) after guidance, in the model's dtype.

    ``indices`` are the frames of the clip that ``latents`` are, besides references in front of
    them; None means all, from the first on.
    ``check`` runs before each call of the model, or once before calls that run together. ``step``
    says which step this is where shortcuts may leave calls out. ``far`` computes the passes in
    place of the expert's model. ``kept`` is as in ``Signals``.

    Guidance is v_u + s (v_c - v_u) (Ho and Salimans 2022) and takes two passes; a guidance scale
    of 1 or less takes one. Raises InvalidRequest if negative embeddings are needed but missing.
    """
    check()
    if expert.guided and conditions.negative_prompt_embeds is None:
        raise InvalidRequest(
            f"The {expert.name} expert has guidance_scale {expert.guidance_scale}, but there are "
            "no negative embeddings; pass negative_prompt_embeds or a guidance_scale of 1.",
            field="negative_prompt_embeds",
        )
    seen = range(latents.shape[2]) if indices is None else indices
    here = HerePasses(
        model=expert.model,
        dtype=expert.dtype,
        together=expert.together,
        unit=Unit(latents=latents, timestep=timestep, indices=tuple(seen)),
        conditions=conditions,
        check=check,
        kept=kept,
    )
    compute = here.compute if far is None else far.compute
    passes = 2 if expert.guided else 1
    outputs = compute(passes, None) if step is None else step.velocities(latents, passes, compute)
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
    asked = _send_ahead(state, timestep, expert, conditions, windows, signals, anchor, step)
    for number in range(state.next_window, len(windows)):
        window, fractions = windows[number]
        signals.window(number, len(windows))
        # 1. Predict: all windows of a step read the same latents, those before the step.
        seen = _seen(window, anchor)
        places = torch.tensor(conditions.places(seen), device=latents.device)
        with _forget_on_error(state):
            velocity = predict(
                latents.index_select(2, places),
                timestep,
                expert,
                conditions if asked else conditions.window(seen, window.middle),
                indices=seen,
                check=signals.check,
                step=None if step is None else replace(step, key=_window_key(seen)),
                far=asked.get(number),
                kept=signals.kept,
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


def _seen(window: Window, anchor: bool) -> tuple[int, ...]:
    """Return the frames that the model sees for a window."""
    indices = tuple(window.indices)
    return (window.start - 1, *indices) if anchor and window.start else indices


def _send_ahead(
    state: DenoiseState,
    timestep: Tensor,
    expert: Expert,
    conditions: Conditions,
    windows: Sequence[tuple[Window, Sequence[float]]],
    signals: Signals,
    anchor: bool,
    step: Step | None,
) -> dict[int, FarPasses]:
    """Ask for all windows of the step that are left, where they are computed elsewhere.

    They read the same latents and do not wait for each other; what a shortcut leaves out is known
    before.
    """
    if expert.elsewhere is None:
        return {}
    asked = {}
    for number in range(state.next_window, len(windows)):
        window, _ = windows[number]
        seen = _seen(window, anchor)
        places = torch.tensor(conditions.places(seen), device=state.latents.device)
        unit = Unit(
            latents=state.latents.index_select(2, places),
            timestep=timestep,
            indices=seen,
            middle=window.middle,
        )
        asked[number] = _far(unit, expert, conditions, signals)
        _ask(asked[number], expert, None if step is None else replace(step, key=_window_key(seen)))
    return asked


def _far(unit: Unit, expert: Expert, conditions: Conditions, signals: Signals) -> FarPasses:
    assert expert.elsewhere is not None
    return FarPasses(
        elsewhere=expert.elsewhere, unit=unit, conditions=conditions, check=signals.check,
        kept=signals.kept,
    )  # fmt: skip


def _ask(far: FarPasses, expert: Expert, step: Step | None) -> None:
    passes = 2 if expert.guided else 1
    if step is None:
        far.send(passes, None)
    else:
        far.send(*step.foreseen(far.unit.latents, passes))


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
            )
        parts = None
        if windows is not None and windows.count > 1:
            parts = _windows_of_step(state, i, windows)
        # Of several windows, each forgets by itself.
        with _forget_on_error(state) if parts is None else nullcontext():
            # 1. Predict the velocity: of the whole clip at once, or window by window.
            timestep = scheduler.timesteps[i]
            if parts is None:
                velocity = _whole(state, timestep, expert, conditions, windows, signals, step)
            else:
                velocity = predict_windows(
                    state, timestep, expert, conditions, parts, signals, anchor=anchor, step=step
                )
            # 2. Predict the clean latents for a preview: x0 = x - sigma v, with x before the step.
            # Of frames that the 5B is given its prediction says nothing: they are shown as given.
            sigma, clean = float(scheduler.sigmas[i]), None
            if signals.preview is not None:
                clean = hold_first_frame(state.latents - sigma * velocity, conditions)
            # 3. Step. A scheduler remembers earlier predictions and counts its steps, so after an
            # error it must not be one step ahead of the latents.
            with _put_back_on_error(scheduler):
                latents = scheduler.step(velocity, timestep, state.latents, return_dict=False)[0]
                # Checked inside the context: the check may run out of memory as well.
                if not torch.isfinite(latents).all():
                    raise NonFiniteLatents(
                        step=i,
                        sigma=sigma,
                        expert=expert.name,
                        dtype=str(expert.dtype).split(".")[-1],
                    )
        # 4. Commit. Callbacks come last, so that one that raises finds the step finished.
        state.latents, state.next_step = latents, i + 1
        state.fused, state.next_window = None, 0
        if signals.preview is not None and clean is not None:
            signals.preview(i, clean)
        signals.step(i, latents)
    return state


def _windows_of_step(
    state: DenoiseState, index: int, windows: WindowPlan
) -> tuple[tuple[Window, Sequence[float]], ...]:
    """Return the windows of a step with their weights, and forget a blend of other windows."""
    # Predictions blended with other windows cannot be continued with these.
    if state.fused_by != (name := repr(windows)):
        state.fused, state.next_window, state.fused_by = None, 0, name
    return tuple(zip(windows.windows(index), windows.blend_fractions(index), strict=True))


def _whole(
    state: DenoiseState, timestep: Tensor, expert: Expert, conditions: Conditions,
    windows: WindowPlan | None, signals: Signals, step: Step | None,
) -> Tensor:  # fmt: skip
    """Predict the velocity of an undivided clip, elsewhere if its passes are computed there."""
    latents, far = state.latents, None
    if windows is not None:
        signals.window(0, 1)
    if expert.elsewhere is not None:
        frames = tuple(range(latents.shape[2]))
        unit = Unit(latents=latents, timestep=timestep, indices=frames)
        far = _far(unit, expert, conditions, signals)
    return predict(
        latents, timestep, expert, conditions, check=signals.check, step=step, far=far,
        kept=signals.kept,
    )  # fmt: skip


def _window_key(indices: Sequence[int]) -> str:
    """Name a window by its frames; they are in order, but may go round the end of the clip."""
    return f"{indices[0]}-{indices[-1]}"


@contextmanager
def _forget_on_error(state: DenoiseState) -> Iterator[None]:
    """Restore what shortcuts remembered if the ``with`` block raises: it will be predicted again.

    What a window remembers is true from the prediction that ``state`` keeps of it on.
    """
    before = replace(state.memory, windows=dict(state.memory.windows))
    try:
        yield
    except BaseException:
        state.memory = before
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
