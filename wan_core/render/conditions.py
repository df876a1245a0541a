"""The first stages of a render: encodes texts and pictures into the transformer's conditions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import GenerationConfig
from ..errors import InvalidRequest
from ..job import Request, latent_frames, latent_index
from ..loading import check_tokenizer, load_image_processor
from ..sampling import (
    Conditions,
    check_embeds,
    encode_clip,
    encode_condition,
    encode_first_frame,
    encode_text,
    load_picture,
    picture_size,
    prepare_picture,
    to_pil,
)
from .stages import StageRunner


@dataclass(slots=True, kw_only=True)
class ConditionMaker:
    """Makes the conditions of one render; every text and every picture is encoded once."""

    stages: StageRunner
    config: GenerationConfig
    request: Request

    def make(self) -> Conditions:
        """Encode texts, then pictures. All results are on the plan's device, except the image
        condition of a clip that is made in windows.

        Raises InvalidRequest for embeddings or pictures that do not suit the model.
        """
        batch = self.request.batch_size
        prompts, negative = self.stages.attempt("text_encode", self._texts)
        ready = [self._to_model(rows(prompt, batch)) for prompt in prompts]
        starts = [latent_index(part.start) for part in self.request.prompts]
        text = Conditions(
            prompt_embeds=ready[0], prompt_parts=tuple(zip(starts, ready, strict=False))
        )
        pictures = self._pictures()
        image_embeds = concat = first_frame = None
        if pictures:
            image_embeds = self.stages.attempt("image_encode", lambda: self._clip(pictures))
            concat, first_frame = self.stages.attempt(
                "condition_encode", lambda: self._start_latents(pictures)
            )
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
        )

    def _kept(self, concat: Tensor) -> Tensor:
        """Keep ``concat`` in RAM if the clip is made in windows, each of which needs a slice of it.

        For the whole clip it has more bytes than the latents.
        """
        window = self.stages.plan.choices.window_frames
        in_windows = window is not None and latent_frames(window) < self.request.latent_frames
        return concat.cpu() if in_windows else concat

    def _to_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.stages.device, self.stages.dtype("transformer"))

    # -- texts --------------------------------------------------------------------------------

    def _texts(self) -> tuple[list[Tensor], Tensor | None]:
        """Return (positive embeddings, negative embeddings or None).

        There is one positive tensor for each prompt of the clip, in their order. What is encoded
        here is on the CPU; embeddings that the user gave stay where they are.
        """
        config, request = self.config, self.request
        given = {"prompt": config.prompt_embeds, "negative_prompt": config.negative_prompt_embeds}
        width = self.stages.architecture.transformer.text_dim
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        for name in ("prompt", "negative_prompt") if request.guided else ("prompt",):
            value = given[name]
            if value is None:
                missing.append(name)
            else:
                found[name] = check_embeds(value, f"{name}_embeds", width, request.batch_size)
        parts = [part.text for part in request.prompts] or [request.prompt]
        texts = [request.negative_prompt] if "negative_prompt" in missing else []
        if "prompt" in missing:
            texts = [*parts, *texts]
        encoded = self.encode_texts(texts) if texts else []
        if "negative_prompt" in missing:
            found["negative_prompt"] = encoded.pop()
        return encoded or [found["prompt"]], found.get("negative_prompt")

    def encode_texts(self, texts: list[str]) -> list[Tensor]:
        """Return the embeddings of ``texts``, (1, 512, text_dim) each, from the cache if possible.

        Raises InvalidRequest if the model was loaded without text encoder or tokenizer.
        """
        stages = self.stages
        if not stages.has("text_encoder") or not stages.has("tokenizer"):
            raise InvalidRequest(
                "prompt needs a text encoder with its tokenizer, and this model was loaded "
                "without. Add the umT5 file, or pass prompt_embeds.",
                field="prompt",
            )
        encoder_key, tokenizer_key = stages.key("text_encoder"), stages.key("tokenizer")
        cached = {t: stages.cache.get_text((encoder_key, tokenizer_key, t)) for t in texts}
        found: dict[str, Tensor] = {t: embeds for t, embeds in cached.items() if embeds is not None}
        missing = [text for text in cached if text not in found]
        # The encoder (11 GB) is not even read when every text is cached.
        if missing:
            with (
                self._checked_tokenizer() as tokenizer,
                stages.use("text_encode", "text_encoder") as encoder,
            ):
                for text in missing:
                    stages.check_interrupt()
                    embeds = encode_text(encoder, tokenizer, text, stages.device).cpu()
                    stages.cache.put_text((encoder_key, tokenizer_key, text), embeds)
                    found[text] = embeds
        return [found[text] for text in texts]

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

    def _pictures(self) -> dict[str, Any]:
        """Read the pictures, and warn of those whose proportions will change."""
        request = self.request
        found: dict[str, Any] = {}
        for field in ("image", "last_image"):
            value = getattr(self.config, field)
            if value is None:
                continue
            found[field] = picture = load_picture(value, field)
            width, height = picture_size(picture)
            if abs(width * request.height / (height * request.width) - 1) > 0.02:
                self.stages.result.warnings.append(
                    f"{field} is {width}x{height} and is stretched to "
                    f"{request.width}x{request.height}; crop it to keep its proportions."
                )
        return found

    def _clip(self, pictures: dict[str, Any]) -> Tensor | None:
        """Return CLIP embeddings, or None for a model without an image branch."""
        stages = self.stages
        if stages.architecture.transformer.image_dim is None:
            return None
        with ExitStack() as stack:
            if stages.has("image_processor"):
                processor = stack.enter_context(stages.component("image_processor"))
            else:
                processor = load_image_processor(None)
            encoder = stack.enter_context(stages.use("image_encode", "image_encoder"))
            stages.check_interrupt()
            images = [to_pil(picture) for picture in pictures.values()]
            return encode_clip(encoder, processor, images, stages.device)

    def _start_latents(self, pictures: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return (concat, first_frame), one of which is None.

        The 5B takes its start image as the first latent frame, which is held fixed. The other
        models take mask and latents, concatenated to the noise.
        """
        stages, request = self.stages, self.request
        ready = {
            field: prepare_picture(picture, request.width, request.height)
            for field, picture in pictures.items()
        }
        with stages.use("condition_encode", "vae") as vae:
            if stages.architecture.variant.expand_timesteps:
                first = encode_first_frame(
                    vae, ready["image"], device=stages.device, check=stages.check_interrupt
                )
                return None, first
            concat = encode_condition(
                vae,
                ready["image"],
                num_frames=request.num_frames,
                last_image=ready.get("last_image"),
                device=stages.device,
                check=stages.check_interrupt,
            )
            return concat, None


def rows(tensor: Tensor, batch: int) -> Tensor:
    """Repeat a tensor of one row for every sample of the batch."""
    return tensor if tensor.shape[0] == batch else tensor.repeat(batch, *[1] * (tensor.ndim - 1))
