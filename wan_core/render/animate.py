"""A character moved by a video, segment by segment: what each is given, and how it goes on.

As ``WanAnimatePipeline`` of diffusers does it: the last pictures of a segment are decoded and
encoded again as the beginning of the next, which starts from new noise. Once per clip are made the
latents of the character and the tokens of a blank face, which guidance's unconditional pass sees;
once per segment the latents of the pose, of what is known, and the tokens of the face.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..forward import DrivingStream, as_pixels, encode_faces
from ..job import (
    CharacterPlan,
    Inputs,
    Request,
    face_size,
    latent_index,
    latent_shape,
    mirrored,
    references_in_front,
)
from ..models import ModelArchitecture
from ..placing import pin_budget
from ..sampling import (
    DRIVING_PROMPT,
    Conditions,
    DenoiseState,
    Expert,
    SegmentsDecoder,
    StreamingDecoder,
    background_mask,
    carried_latents,
    character_latents,
    denormalize_latents,
    encode_carried,
    encode_character,
    encode_driving,
    encode_frames,
    encode_whole_clip,
    in_black_frame,
    last_frames,
    moved_frames,
)
from .conditions import ConditionMaker, rows
from .experts import unseen_texts
from .stages import StageRunner


def character_plan(stages: StageRunner, request: Request) -> CharacterPlan | None:
    """Return the segments of a clip that moves a character; None for any other model."""
    if stages.architecture.transformer.animate is None:
        return None
    length = stages.plan.choices.window_frames or request.window_frames
    assert length is not None  # ``resolve`` sets it
    return CharacterPlan(request.wanted_frames, length, request.window_overlap)


def decoder_of(
    stages: StageRunner, request: Request, made: CharacterSegments | None, vae: Any, latents: Tensor
) -> Any:
    """Return what decodes a clip's latents, in VAE space: as one video or segment by segment.

    ``made`` are the segments as they were made: a smaller plan may have come in between.
    """
    plan = character_plan(stages, request) if made is None else made.plan
    if plan is None:
        return StreamingDecoder(vae, latents)
    return SegmentsDecoder(vae, latents, plan.latents, plan.carried)


def segment_shape(
    plan: CharacterPlan, request: Request, architecture: ModelArchitecture
) -> tuple[int, int, int, int, int]:
    """Return (batch, channels, latent frames, height, width) of a segment, the character's frame
    in front."""
    batch, channels, _, height, width = latent_shape(request, architecture)
    frames = plan.latents + references_in_front(request, architecture)
    return batch, channels, frames, height, width


@dataclass(slots=True, kw_only=True)
class CharacterSegments:
    """The segments of one clip, made in order; ``conditions`` hold texts and CLIP's tokens.

    ``start`` turns noise into the latents of the first step.
    """

    stages: StageRunner
    request: Request
    inputs: Inputs
    plan: CharacterPlan
    conditions: Conditions
    start: Callable[[Tensor], Tensor]
    _made: list[Tensor] = field(default_factory=list)
    _character: Tensor | None = None
    _no_face: Tensor | None = None

    def __len__(self) -> int:
        return self.plan.count

    def frames(self, number: int) -> range:
        """Return as many numbers as segment ``number`` has latent frames."""
        return range(self.plan.latents)

    @property
    def clip(self) -> Tensor:
        """The latents of the finished segments, one after the other: (B, C, n x T, h, w)."""
        return torch.cat(self._made, dim=2)

    def begin(self, number: int, step: int) -> DenoiseState:
        """Return the state in which segment ``number`` starts, at ``step`` of the schedule."""
        return DenoiseState(
            latents=self.start(self._noise(number)),
            next_step=step,
            segment=number,
            clip=self.clip if self._made else None,
        )

    def go_on(self, state: DenoiseState) -> None:
        """Take over the finished segments of a saved state."""
        if state.clip is not None:
            self._made = list(torch.split(state.clip, self.plan.latents, dim=2))

    def _noise(self, number: int) -> Tensor:
        """Draw a segment's noise: one draw after the other from the generator of the clip."""
        shape = segment_shape(self.plan, self.request, self.stages.architecture)
        given = self.inputs.latents
        if given is not None and number == 0:
            return given.to(device=self.stages.device, dtype=torch.float32)
        generator = torch.Generator("cpu").manual_seed(self.request.seed)
        for _ in range(number - (given is not None)):
            torch.randn(shape, generator=generator, dtype=torch.float32)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.stages.device)

    def middle(self, number: int) -> int:
        """Return the latent frame of the clip at the middle of what segment ``number`` adds."""
        frames = self.plan.frames_of(number)
        return latent_index(frames[(len(frames) + (self.plan.carried if number else 0)) // 2])

    def _told(self, number: int) -> Conditions:
        """Return the clip's conditions with the text of segment ``number``."""
        return self.conditions.window(range(self.plan.latents), self.middle(number))

    def conditions_of(self, number: int) -> Conditions:
        """Encode what segment ``number`` is given; its face follows when the model is there."""
        stages, frames = self.stages, self.plan.frames_of(number)
        found = self._told(number)
        carried = stages.attempt("decode", self._carried) if number else None
        known = stages.attempt("condition_encode", lambda: self._known(frames, carried))
        pose = stages.attempt("control_encode", lambda: self._pose(frames))
        batch, dtype = self.request.batch_size, stages.dtype("transformer")
        return replace(
            found,
            concat=rows(known, batch).to(stages.device),
            pose=rows(pose, batch).to(stages.device, dtype),
            references=1,
        )

    def _carried(self) -> Tensor:
        """Decode the last frames of the segment before."""
        stages, before = self.stages, self._made[-1]
        while True:
            with stages.use("decode", "vae") as vae:
                latents = before.to(stages.device, vae.dtype)
                decoder = StreamingDecoder(vae, denormalize_latents(latents, vae.config))
                found = last_frames(decoder, self.plan.carried, check=stages.check_interrupt)
            if found.dtype != torch.float16 or bool(torch.isfinite(found).all()):
                return found.cpu()
            stages.widen_vae(0)

    def _known(self, frames: range, carried: Tensor | None) -> Tensor:
        """Return mask and latents of the character and of what is known of a segment."""
        control, size = self.inputs.control, (self.request.width, self.request.height)
        assert control is not None
        check, behind = self.stages.check_interrupt, control.background_video
        with self.stages.use("condition_encode", "vae") as vae:
            if self._character is None:
                picture = control.references[0]
                self._character = character_latents(vae, picture, *size, check=check)
            latents = carried_latents(
                vae,
                carried,
                None if behind is None else moved_frames(behind, frames, *size),
                frames=len(frames),
                taken=self.plan.carried,
                size=size,
                check=check,
            )
        known = 0 if carried is None else self.plan.carried
        mask = background_mask(control.mask, frames, known=known, latents=latents, size=size)
        mask = mask.expand(latents.shape[0], -1, -1, -1, -1)
        whole = torch.cat([mask, latents], dim=1)
        return torch.cat([rows(self._character.to(whole), whole.shape[0]), whole], dim=2)

    def _pose(self, frames: range) -> Tensor:
        control = self.inputs.control
        assert control is not None and control.video is not None
        moved = moved_frames(control.video, frames, self.request.width, self.request.height)
        with self.stages.use("control_encode", "vae") as vae:
            return encode_frames(vae, moved, check=self.stages.check_interrupt)

    def with_faces(self, conditions: Conditions, number: int, model: Any) -> Conditions:
        """Return a segment's conditions with its face, and the blank one where guidance needs it.

        ``model`` is the transformer in its place, which has the encoders of the face.
        """
        control, stages = self.inputs.control, self.stages
        assert control is not None and control.face_video is not None
        dtype, batch = stages.dtype("transformer"), self.request.batch_size

        def encoded(pixels: Tensor) -> Tensor:
            tokens = encode_faces(model, pixels.to(dtype), stages.check_interrupt, stages.device)
            return rows(as_pixels(tokens), batch)

        size = face_size(stages.architecture)
        moved = moved_frames(control.face_video, self.plan.frames_of(number), *size)
        pixels = torch.stack(list(moved), dim=2)
        if self.request.guided and self._no_face is None:
            self._no_face = encoded(torch.full_like(pixels, -1))
        return replace(conditions, face=encoded(pixels), no_face=self._no_face)

    def finish(self, state: DenoiseState, conditions: Conditions) -> None:
        """Keep the latents of a fully denoised segment, without the character's frame."""
        self._made.append(state.latents[:, :, 1:].clone())


class DrivenSegments(CharacterSegments):
    """The segments of Animate 2, which follow a driving video in a second stream.

    As diffusers' ``modular_pipelines/wan_animate_2``: each segment encodes its own stretch of the
    driving video, and goes on from the last frame of the segment before.
    """

    _seen: tuple[Tensor, Tensor] | None = None
    _driving_text: Tensor | None = None
    _first: Tensor | None = None

    def conditions_of(self, number: int) -> Conditions:
        """Encode what segment ``number`` is given."""
        stages, frames = self.stages, self.plan.frames_of(number)
        if self._driving_text is None:
            self._driving_text = self._to_model(stages.attempt("text_encode", self._text))[:1]
        if self._seen is None and stages.architecture.transformer.image_dim is not None:
            seen = stages.attempt("image_encode", self._clip)
            self._seen = self._to_model(seen[:1]), self._to_model(seen[1:])
        carried = stages.attempt("decode", self._carried) if number else None
        if self._first is None:
            self._first = stages.attempt("condition_encode", self._of_the_character)
        known, driving = stages.attempt("control_encode", lambda: self._encoded(frames, carried))
        concat = torch.cat([rows(self._first, len(known)), known], dim=2)
        batch, control = self.request.batch_size, self.request.control
        return replace(
            self._told(number),
            image_embeds=None if self._seen is None else rows(self._seen[0], batch),
            concat=rows(concat, batch).to(stages.device),
            references=1,
            driving=DrivingStream(
                latents=self._to_model(driving),
                text=self._driving_text,
                image=None if self._seen is None else self._seen[1],
                strength=1.0 if control is None else control.strength[0],
                keep=stages.plan.choices.driving or "again",
            ),
        )

    def _to_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.stages.device, self.stages.dtype("transformer"))

    @property
    def _pictures(self) -> tuple[Any, Tensor]:
        control = self.inputs.control
        assert control is not None and control.video is not None  # ``resolve`` has seen to it
        return control.references[0], control.video

    @property
    def _size(self) -> tuple[int, int]:
        return self.request.width, self.request.height

    def _text(self) -> Tensor:
        """Return the driving stream's text.

        A text encoder is not read for that sentence alone: embeddings that were given stand for
        it, as in ComfyUI's node.
        """
        if not self.inputs.texts:
            return self.conditions.prompt_embeds
        maker = ConditionMaker(stages=self.stages, request=self.request, inputs=self.inputs)
        (found,) = maker.encode_texts([("control.video", DRIVING_PROMPT)])
        return found

    def _clip(self) -> Tensor:
        picture, video = self._pictures
        frames = (
            in_black_frame(picture, *self._size),
            in_black_frame(video[0], *self._size, video=True),
        )
        with self.stages.use("image_encode", "image_encoder") as encoder:
            self.stages.check_interrupt()
            # One by one: a product of another shape may round differently.
            found = [encode_whole_clip(encoder, one, self.stages.device) for one in frames]
            return torch.cat(found).cpu()

    def _of_the_character(self) -> Tensor:
        picture = in_black_frame(self._pictures[0], *self._size)
        with self.stages.use("condition_encode", "vae") as vae:
            return encode_character(
                vae, picture, device=self.stages.device, check=self.stages.check_interrupt
            )

    def _encoded(self, frames: range, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mask and latents of a segment's frames, and the driving stream's input."""
        video, check = self._pictures[1], self.stages.check_interrupt
        last = None if carried is None else carried[:, :, -1]
        indices = [mirrored(at, len(video)) for at in frames]
        with self.stages.use("control_encode", "vae") as vae:
            known = encode_carried(
                vae, last, self._size, len(frames), device=self.stages.device, check=check
            )
            return known, encode_driving(vae, video, indices, self._size, check=check)

    def finish(self, state: DenoiseState, conditions: Conditions) -> None:
        """Keep a segment's latents, and nothing of its driving stream."""
        if conditions.driving is not None:
            conditions.driving.empty()
        super().finish(state, conditions)


def character_segments(
    stages: StageRunner,
    request: Request,
    inputs: Inputs,
    conditions: Conditions,
    start: Callable[[Tensor], Tensor],
) -> CharacterSegments:
    """Return the segments of a clip that moves a character, and say what they are."""
    plan = character_plan(stages, request)
    assert plan is not None
    stages.result.metadata["windows"] = plan.describe()
    kind = DrivenSegments if stages.architecture.transformer.animate == 2 else CharacterSegments
    made = kind(
        stages=stages, request=request, inputs=inputs, plan=plan, conditions=conditions, start=start
    )
    stages.result.warnings += unseen_texts(request, map(made.middle, range(plan.count)))
    return made


def with_faces(
    made: CharacterSegments | None, conditions: Conditions, number: int, expert: Expert
) -> Conditions:
    """Return the conditions with the face of a segment, where there is one and it is not there.

    Workers are sent the face's tokens: the model is then taken here for as long as it encodes.
    """
    if conditions.driving is not None and made is not None:  # a smaller plan may keep less of it
        plan = made.stages.plan
        conditions.driving.keep_as(plan.choices.driving or "again", pin_budget(plan))
    if made is None or conditions.face is not None or conditions.pose is None:
        return conditions
    if expert.elsewhere is None:
        return made.with_faces(conditions, number, expert.model)
    with made.stages.use("face_encode", "transformer") as model:
        return made.with_faces(conditions, number, model)
