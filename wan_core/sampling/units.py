"""Units of work: one call of a transformer, as a pure function of what it is given.

(weights, latents, timestep, conditions, pass) -> velocity. The same unit gives the same bits on
every device of a kind, and may be computed twice. Whoever computes it knows nothing of schedulers,
noise or blending. Latents are (B, C, T, h, w), float32, normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward import (
    BlockPasses,
    Cut,
    DrivingStream,
    Exchange,
    block_passes,
    cut_tokens,
    fun_inputs,
    known_faces,
)


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

    ``pose`` (B, C, T, h, w) are the latents of the pose that Animate follows; its latents have a
    frame of the character in front. ``face`` and ``no_face`` are the face's tokens as
    ``forward.as_pixels`` gives them, and those that the unconditional pass sees.
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
    pose: Tensor | None = None
    face: Tensor | None = None
    no_face: Tensor | None = None
    driving: DrivingStream | None = None
    """Animate 2's second stream, for a segment; its latents have the character's frame in front."""

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
    dtype: torch.dtype,
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
    return latents.to(dtype), timesteps


def model_call(
    latents: Tensor,
    timestep: Tensor,
    dtype: torch.dtype,
    conditions: Conditions,
    indices: Sequence[int],
) -> dict[str, Any]:
    """Return the arguments of the conditional call of a transformer.

    ``conditions`` are those of the frames ``indices``, which ``latents`` are besides references in
    front of them. What differs in the unconditional call is in ``second_pass``.
    """
    hidden_states, timesteps = _model_inputs(latents, timestep, dtype, conditions, indices)
    control: dict[str, Any] = {}
    if conditions.vace is not None:
        control["control_hidden_states"] = conditions.vace
        control["control_hidden_states_scale"] = conditions.vace_scale
    if conditions.pose is not None:
        control["pose_hidden_states"] = conditions.pose
        control["face_pixel_values"] = conditions.face
    if conditions.driving is not None:
        control["driving"] = conditions.driving
    return {
        "hidden_states": hidden_states,
        "timestep": timesteps,
        "encoder_hidden_states": conditions.prompt_embeds,
        "encoder_hidden_states_image": conditions.image_embeds,
        **control,
        "return_dict": False,
    }


def second_pass(conditions: Conditions) -> dict[str, Any]:
    """Return the arguments in which the unconditional call differs: text, and Animate's face."""
    other: dict[str, Any] = {"encoder_hidden_states": conditions.negative_prompt_embeds}
    if conditions.no_face is not None:
        other["face_pixel_values"] = conditions.no_face
    if conditions.driving is not None:
        other["unconditional"] = True
    return other


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One pass of one window in one step: all that its velocity depends on besides the weights
    and the clip's conditions."""

    latents: Tensor
    """(B, C, T, h, w) of the window, float32, with references in front."""
    timestep: Tensor
    """One number, as the scheduler has it."""
    indices: tuple[int, ...]
    """The frames of the clip that the latents are."""
    middle: int | None = None
    """The frame that decides which prompt is used; None where the clip is denoised as a whole."""
    second: bool = False
    """Whether this is the unconditional pass of guidance."""
    residual: Tensor | None = None
    """(B, tokens, width), added in place of what the blocks compute; None computes them."""
    keep: bool = False
    """Whether what the blocks added is wanted back."""


def compute_unit(
    unit: Unit, model: Any, dtype: torch.dtype, conditions: Conditions,
    among: Exchange | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return a unit's velocity (B, C, T, h, w) in ``dtype``, and what the blocks added if kept.

    With ``among`` the processes of a gang compute it together, each a part of the tokens.

    ``conditions`` are the whole clip's; they and the unit's tensors are on the model's device, as
    ``Conditions`` says.
    """
    if unit.middle is not None:
        conditions = conditions.window(unit.indices, unit.middle)
    call = model_call(unit.latents, unit.timestep, dtype, conditions, unit.indices)
    if unit.second:
        assert conditions.negative_prompt_embeds is not None
        call |= second_pass(conditions)
    blocks = None
    cut = None if among is None else Cut(among)
    if unit.residual is not None or unit.keep:
        blocks = BlockPasses([unit.residual if cut is None else cut.residual(unit.residual)])
    with (
        cut_tokens(model, among),
        fun_inputs(model, conditions.reference, conditions.camera),
        known_faces(model, conditions.face is not None),
        nullcontext() if blocks is None else block_passes(model, blocks),
    ):
        velocity = model(**call)[0]
    if conditions.reference is not None:
        velocity = velocity[:, :, 1:]
    made = None if blocks is None else blocks.made[0]
    return velocity, made if cut is None or made is None else cut.whole(made)


Made = tuple[Tensor, "Tensor | None"]
"""What ``compute_unit`` returns."""


class Kept(Protocol):
    """Remembers finished units for a run that goes on after this one; ``journal`` has it."""

    def name(self, unit: Unit) -> str:
        """Name a unit by all that it depends on."""

    def find(self, name: str) -> Made | None:
        """Return what a unit of that name gave, in RAM, if it is known."""

    def keep(self, name: str, made: Made) -> None:
        """Remember what it gave; raises nothing where that fails."""


class Elsewhere(Protocol):
    """Computes units of one expert in other processes; ``workers`` has it."""

    def send(self, unit: Unit, conditions: Conditions, kept: Kept | None = None) -> int:
        """Ask for a unit without waiting for it; return its number.

        What ``kept`` remembers is not computed, and what was computed it is told at once.
        """

    def result(self, number: int, check: Callable[[], object]) -> Made:
        """Wait for what ``compute_unit`` returns, in RAM; ``check`` is called meanwhile."""

    def forget(self) -> None:
        """Give up every unit whose result has not been taken."""


Together = Callable[[Any, Sequence[Mapping[str, Any]]], Sequence[Any]]


def _pass_of(unit: Unit, number: int, blocks: BlockPasses | None) -> Unit:
    """Return the unit of a window's conditional pass, 0, or of its unconditional one, 1."""
    residual = None if blocks is None else blocks.given[number]
    keep = blocks is not None and residual is None
    return replace(unit, second=number > 0, residual=residual, keep=keep)


@dataclass(slots=True, kw_only=True)
class HerePasses:
    """The passes of one window, computed by a model of this process."""

    model: Any
    dtype: torch.dtype
    together: Together | None
    unit: Unit
    conditions: Conditions
    """Those of the window."""
    check: Callable[[], object]
    kept: Kept | None = None

    def compute(self, count: int, blocks: BlockPasses | None) -> list[Tensor]:
        """Return the first ``count`` velocities; those that are remembered are not computed."""
        outputs, names = dict[int, Tensor](), dict[int, str]()
        if self.kept is not None:
            for number in range(count):
                names[number] = self.kept.name(_pass_of(self.unit, number, blocks))
                if (found := self.kept.find(names[number])) is not None:
                    outputs[number] = found[0].to(self.unit.latents.device)
                    if blocks is not None:
                        blocks.made[number] = found[1]
        left = [number for number in range(count) if number not in outputs]
        if left:
            self._compute(left, outputs, names, blocks)
        return [outputs[number] for number in range(count)]

    def _compute(
        self, numbers: Sequence[int], outputs: dict[int, Tensor], names: Mapping[int, str],
        blocks: BlockPasses | None,
    ) -> None:  # fmt: skip
        unit, conditions, model = self.unit, self.conditions, self.model
        # Two calls of batch B rather than one of 2B: half the activations, and as diffusers does.
        call = model_call(unit.latents, unit.timestep, self.dtype, conditions, unit.indices)
        calls = [call | second_pass(conditions) if number else call for number in numbers]
        passes = None if blocks is None else BlockPasses([blocks.given[n] for n in numbers])

        def done(place: int, output: Any) -> None:
            number, velocity = numbers[place], output[0]
            outputs[number] = velocity if conditions.reference is None else velocity[:, :, 1:]
            residual = None
            if blocks is not None and passes is not None:
                residual = blocks.made[number] = passes.made[place]
            if self.kept is not None:
                self.kept.keep(names[number], (outputs[number], residual))

        with (
            fun_inputs(model, conditions.reference, conditions.camera),
            known_faces(model, conditions.face is not None),
            nullcontext() if passes is None else block_passes(model, passes),
        ):
            if len(calls) > 1 and self.together is not None:
                for place, output in enumerate(self.together(model, calls)):
                    done(place, output)
            else:
                for place, each in enumerate(calls):
                    if place:
                        self.check()
                    done(place, model(**each))


@dataclass(slots=True, kw_only=True)
class FarPasses:
    """The passes of one window, computed elsewhere: sent as early as one likes, taken in turn."""

    elsewhere: Elsewhere
    unit: Unit
    conditions: Conditions
    check: Callable[[], object]
    kept: Kept | None = None
    _sent: list[int] = field(default_factory=list)

    def send(self, count: int, blocks: BlockPasses | None) -> None:
        """Ask for the first ``count`` passes; those that were asked for stay so."""
        for number in range(len(self._sent), count):
            unit = _pass_of(self.unit, number, blocks)
            self._sent.append(self.elsewhere.send(unit, self.conditions, self.kept))

    def compute(self, count: int, blocks: BlockPasses | None) -> list[Tensor]:
        """Return the first ``count`` velocities, on the device of the latents."""
        self.send(count, blocks)
        outputs = []
        for number, sent in enumerate(self._sent[:count]):
            velocity, residual = self.elsewhere.result(sent, self.check)
            outputs.append(velocity.to(self.unit.latents.device))
            if blocks is not None:
                blocks.made[number] = residual
        return outputs
