"""Messages about fields of a GenerationConfig, reworded for a node's inputs. No ComfyUI here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..wan_core.errors import InvalidRequest, WanError

INPUTS = {
    "num_inference_steps": "steps",
    "image": "start_image",
    "last_image": "end_image",
    "prompt_embeds": "positive",
    "negative_prompt_embeds": "negative",
    "max_chunk_size": "window_frames",
    "window_schedule": "schedule",
    "window_mode": "mode",
    "window_fusion": "fusion",
    "window_anchor": "anchor",
    "return_frames": "return_images",
}
"""Fields of GenerationConfig -> inputs of the nodes, where their names differ."""
# The message may be shown at another node, so it says which node has the input.
_PLACES = {"window_frames": " of WanChunkedSampler"}
# "image" is also an ordinary word, so it is replaced only where the text speaks of the field.
_NAMES = "|".join(name for name in INPUTS if name != "image")
_FIELD = re.compile(
    rf"\b(?:(control\.\w+|{_NAMES})\b|(?<!start )(?<!end )(image)(?= is | was |[:;] ))"
)


def in_words_of_the_nodes(text: str) -> str:
    """Return ``text`` with the names of fields replaced by those of inputs."""

    def replaced(found: re.Match[str]) -> str:
        if found[0].startswith("control."):
            return f"{found[0].removeprefix('control.')} of WanControl"
        name = INPUTS[found[0]]
        return name + _PLACES.get(name, "")

    return _FIELD.sub(replaced, text)


@contextmanager
def said_in_words_of_the_nodes() -> Iterator[None]:
    """Make a WanError that leaves the block name the nodes' inputs instead of fields."""
    try:
        yield
    except WanError as error:
        error.args = tuple(
            in_words_of_the_nodes(part) if isinstance(part, str) else part for part in error.args
        )
        if isinstance(error, InvalidRequest) and error.field is not None:
            error.field = INPUTS.get(error.field, error.field).removeprefix("control.")
        raise
