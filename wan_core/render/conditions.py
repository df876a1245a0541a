"""The first stages of a render: encodes texts and pictures into the transformer's conditions."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..job import Inputs, Request, latent_frames, latent_index, seen_by_clip, to_pil
from ..loading import check_tokenizer, load_image_processor
from ..memory import RAM_RESERVE, ram
from ..models import IMAGE_TOKENS, TEXT_TOKENS
from ..placing import files_ahead
from ..sampling import (
    Conditions,
    by_paths,
    by_points,
    encode_clip,
    encode_keyframes,
    encode_text,
    encode_video,
    prepare_picture,
    text_beyond,
)
from .fun import fun_conditions, pictures_shown, reads_fun
from .stages import StageRunner
from .vace import vace_conditions


@dataclass(slots=True, kw_only=True)
class ConditionMaker:
    """Makes the conditions of one render; every text and every picture is encoded once."""

    stages: StageRunner
    request: Request
    inputs: Inputs

    def make(self) -> Conditions:
        """Encode texts, then pictures. All results are on the plan's device, except the image
        condition of a clip that is made in windows.
        """
        batch = self.request.batch_size
        prompts, negative = self.stages.attempt("text_encode", self.texts)
        ready = [self._to_model(rows(prompt, batch)) for prompt in prompts]
        starts = [latent_index(part.start) for part in self.request.prompts]
        text = Conditions(
            prompt_embeds=ready[0], prompt_parts=tuple(zip(starts, ready, strict=False))
        )
        pictures = self._pictures()
        image_embeds = concat = first_frame = None
        vace = vace_conditions(self.stages, self.request, self.inputs)
        fun: dict[str, Any] = {}
        if reads_fun(self.stages.architecture):
            image_embeds = self.stages.attempt("image_encode", self._seen_by_fun)
            fun = fun_conditions(self.stages, self.request, self.inputs)
            concat, first_frame = fun.pop("concat"), fun.pop("first_frame")
        elif self.stages.architecture.transformer.animate is not None:
            if self.stages.architecture.transformer.animate == 1:  # 2 sees whole frames
                image_embeds = self.stages.attempt("image_encode", self._seen_of_the_character)
        elif pictures and not vace:
            image_embeds = self.stages.attempt("image_encode", lambda: self._clip(pictures))
            concat, first_frame = self.stages.attempt("condition_encode", self._start_latents)
        more = vace | fun
        more |= {name: self._kept(more[name]) for name in ("vace", "camera") if name in more}
        return Conditions(
            prompt_embeds=text.window(range(self.request.latent_frames)).prompt_embeds,
            prompt_parts=text.prompt_parts,
            negative_prompt_embeds=None
            if negative is None
            else self._to_model(rows(negative, batch)),
            # With a last image there are two CLIP rows per sample, (first, last), so that for a
            # batch the pair is repeated as a whole.
            image_embeds=None
            if image_embeds is None
            else self._to_model(image_embeds.repeat(batch, 1, 1)),
            concat=None if concat is None else self._kept(rows(concat, batch)),
            first_frame=first_frame,
            **more,
        )

    def _kept(self, concat: Tensor) -> Tensor:
        """Keep ``concat``, VACE's control or a camera in RAM if the clip is made in windows.

        Each of them needs a slice of it. For the whole clip it has more bytes than the latents.
        """
        window = self.stages.plan.choices.window_frames
        in_windows = window is not None and latent_frames(window) < self.request.latent_frames
        return concat.cpu() if in_windows else concat.to(self.stages.device)

    def _to_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.stages.device, self.stages.dtype("transformer"))

    # -- texts --------------------------------------------------------------------------------

    def texts(self) -> tuple[list[Tensor], Tensor | None]:
        """Return (positive embeddings, negative embeddings or None).

        There is one positive tensor for each prompt of the clip, in their order. What is encoded
        here is on the CPU; embeddings that the user gave stay where they are.
        """
        request, given, missing = self.request, self.inputs.embeds, self.inputs.texts
        parts = [part.text for part in request.prompts] or [request.prompt]
        field = "prompts" if request.prompts else "prompt"
        texts = [(field, text) for text in parts if "prompt" in missing]
        if "negative_prompt" in missing:
            texts.append(("negative_prompt", request.negative_prompt))
        encoded = self.encode_texts(texts) if texts else []
        negative = encoded.pop() if "negative_prompt" in missing else given.get("negative_prompt")
        return encoded or [given["prompt"]], negative

    def encode_texts(self, texts: list[tuple[str, str]]) -> list[Tensor]:
        """Return the embeddings of ``texts``, (1, 512, text_dim) each, from the cache if possible.

        Each text comes with the field that it was given in, which a warning names if Wan does not
        see all of it.
        """
        stages = self.stages
        encoder_key, tokenizer_key = stages.key("text_encoder"), stages.key("tokenizer")
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        for text in dict.fromkeys(text for _, text in texts):
            cached = stages.cache.get_text((encoder_key, tokenizer_key, text))
            if cached is None:
                missing.append(text)
            else:
                found[text] = cached
        # The encoder (11 GB) is not even read when every text is cached.
        if missing:
            # Making a tokenizer of 256,000 pieces takes a processor, and reading files a disk.
            with files_ahead(self._files_to_come()), self._checked_tokenizer() as tokenizer:
                # Kept like the embeddings: a text that comes from the cache is cut just the same.
                for text in missing:
                    beyond = text_beyond(tokenizer, text)
                    if beyond is not None:
                        stages.cache.put_text((tokenizer_key, text, "beyond"), beyond)
                with stages.use("text_encode", "text_encoder") as encoder:
                    for text in missing:
                        stages.check_interrupt()
                        embeds = encode_text(encoder, tokenizer, text, stages.device).cpu()
                        stages.cache.put_text((encoder_key, tokenizer_key, text), embeds)
                        found[text] = embeds
        self._say_what_is_cut(texts, tokenizer_key)
        return [found[text] for _, text in texts]

    def _say_what_is_cut(self, texts: list[tuple[str, str]], tokenizer_key: Hashable) -> None:
        for field, text in texts:
            beyond = self.stages.cache.get_text((tokenizer_key, text, "beyond"))
            if beyond is not None:
                self.stages.say_once(
                    f"{field} is cut: Wan reads {TEXT_TOKENS} tokens of a text, and what comes "
                    f"from {beyond} on is not seen. Shorten it."
                )

    def _files_to_come(self) -> list[Path]:
        """Return the files that are read next, the first expert's last, as far as RAM has room."""
        stages = self.stages
        needed = max(s.host_bytes + s.locked_bytes for s in stages.plan.estimate.stages)
        room, found = ram()[1] - RAM_RESERVE - needed, list[Path]()
        for stage in stages.plan.stage_seconds:
            name = stage.name.removeprefix("load ")
            part = stages.architecture.components.get(name)
            if name == stage.name or part is None or stages.cache.holds(stages.key(name)):
                continue
            room -= part.nbytes
            if room < 0:
                break
            found += part.files
            if name.startswith("transformer"):
                break
        return list(dict.fromkeys(found))  # a tokenizer may lie in its encoder's file

    @contextmanager
    def _checked_tokenizer(self) -> Iterator[Any]:
        """Borrow the tokenizer; refuses another encoder's, before the encoder itself is read."""
        parts = self.stages.architecture.components
        vocabulary = parts["text_encoder"].vocabulary
        with self.stages.component("tokenizer") as tokenizer:
            if vocabulary is not None:
                paths = parts["tokenizer"].path, parts["text_encoder"].path
                check_tokenizer(tokenizer, vocabulary, *paths)
            yield tokenizer

    # -- pictures -----------------------------------------------------------------------------

    def _clip(self, pictures: Mapping[str, Any]) -> Tensor | None:
        """Return CLIP embeddings, or None for a model without an image branch."""
        stages = self.stages
        seen = seen_by_clip(stages.architecture)
        if not seen:
            return None
        with ExitStack() as stack:
            if stages.has("image_processor"):
                processor = stack.enter_context(stages.component("image_processor"))
            else:
                processor = load_image_processor(None)
            encoder = stack.enter_context(stages.use("image_encode", "image_encoder"))
            stages.check_interrupt()
            images = [to_pil(picture) for picture in list(pictures.values())[:seen]]
            return encode_clip(encoder, processor, images, stages.device)

    def _seen_by_fun(self) -> Tensor | None:
        """Return the embeddings of the reference, else of the start image, else zeros.

        As ``pipeline_wan_fun_control.py`` of VideoX-Fun; None for a model without an image branch.
        """
        width = self.stages.architecture.transformer.image_dim
        control, pictures = self.inputs.control, self.inputs.pictures
        seen = control.references[:1] if control is not None else ()
        seen = seen or tuple(pictures.values())[:1]
        if width is None or not seen:
            return None if width is None else torch.zeros(1, IMAGE_TOKENS, width)
        return self._clip({"image": seen[0]})

    def _seen_of_the_character(self) -> Tensor | None:
        control = self.inputs.control
        assert control is not None  # ``resolve`` refuses an Animate without one
        return self._clip({"image": control.references[0]})

    def _start_latents(self) -> tuple[Tensor | None, Tensor | None]:
        """Return (concat, first_frame), one of which is None, of the pictures that the clip shows.

        The 5B takes its first frames as latents, which are held fixed. The other models take mask
        and latents, concatenated to the noise.
        """
        stages, request = self.stages, self.request
        frames = {
            at: prepare_picture(picture, request.width, request.height)
            for at, picture in pictures_shown(request, self.inputs).items()
        }
        leading = stages.architecture.variant.expand_timesteps
        with stages.use("condition_encode", "vae") as vae:
            found = encode_keyframes(
                vae,
                frames,
                num_frames=len(frames) if leading else request.num_frames,
                device=stages.device,
                check=stages.check_interrupt,
            )
        # The 5B's are known frames, all of them: it takes their latents without a mask.
        return (None, found[:, 4:]) if leading else (self._with_tracks(found), None)

    def _pictures(self) -> Mapping[str, Any]:
        """Return the pictures of the clip; of key frames the first and the last one in time."""
        control = self.inputs.control
        if control is None or not control.keyframes:
            return self.inputs.pictures
        (_, first), *_, (_, last) = (*control.keyframes[:1], *control.keyframes)
        return {"image": first, "last_image": last}

    def _with_tracks(self, concat: Tensor) -> Tensor:
        """Put the control's tracks into the condition of an image-to-video model."""
        control, asked = self.inputs.control, self.request.control
        if control is None or asked is None or control.tracks is None:
            return concat
        if asked.tracks == "points":
            return by_points(concat, control.tracks, self.request.width, self.request.height)
        vae = self.stages.architecture.vae_shape
        return by_paths(concat, control.tracks, vae.scale_factor_spatial)

    # -- a video to start from ----------------------------------------------------------------

    def start(self) -> Tensor | None:
        """Return the latents (1, z, T, h, w) of the video that the clip starts from, or None."""
        control, asked = self.inputs.control, self.request.control
        if control is None or control.video is None or asked is None or asked.video != "start":
            return None
        video = control.video

        def encode() -> Tensor:
            with self.stages.use("control_encode", "vae") as vae:
                return encode_video(
                    vae,
                    video,
                    self.request.width,
                    self.request.height,
                    check=self.stages.check_interrupt,
                )

        return self.stages.attempt("control_encode", encode)


def rows(tensor: Tensor, batch: int) -> Tensor:
    """Repeat a tensor of one row for every sample of the batch."""
    return tensor if tensor.shape[0] == batch else tensor.repeat(batch, *[1] * (tensor.ndim - 1))
