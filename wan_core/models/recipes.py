"""Settings that distilled files were trained for: recognised by name, used only when asked for.

A LoRA that distils Wan to four steps (lightx2v, Wan2.2-Lightning), and a checkpoint into which one
was merged, need their own schedule and no guidance; with a model's official settings the video is
oversaturated or grey. Pure data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .labels import words_of

if TYPE_CHECKING:
    from .variants import Defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings a distilled file was trained for. Scales of 1 switch guidance off."""

    name: str
    reason: str
    """The words it was recognised by, and where they were found."""
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float
    flow_shift: float
    scheduler: str
    timesteps: tuple[int, ...]
    """The timesteps it was trained at, which the scheduler derives from these settings."""

    def differences(self, settings: Any) -> list[str]:
        """Name the fields of ``settings`` (a Request) that differ from the recipe, with values."""
        return [
            f"{name} {getattr(settings, name):g}"
            if isinstance(value, int | float)
            else f"{name} {getattr(settings, name)}"
            for name, value in self._settings().items()
            if getattr(settings, name) != value
        ]

    def as_defaults(self, official: Defaults) -> Defaults:
        """Return ``official`` with these settings: what None in a GenerationConfig then means."""
        one_expert = official.guidance_scale_2 is None
        settings = self._settings() | ({"guidance_scale_2": None} if one_expert else {})
        return replace(official, **settings, flow_shift_480p=None)

    def describe(self) -> str:
        """Say in one sentence what to set."""
        return (
            f"distilled for {self.num_inference_steps} steps: set num_inference_steps "
            f"{self.num_inference_steps}, guidance_scale and guidance_scale_2 "
            f"{self.guidance_scale:g}, flow_shift {self.flow_shift:g}, scheduler {self.scheduler}"
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_scale_2": self.guidance_scale_2,
            "flow_shift": self.flow_shift,
            "scheduler": self.scheduler,
        }


# Words that say by themselves that a file is distilled to a few steps, and words that do so only
# beside another mark: "lightning" and "distill" are in the names of effects and styles too.
_STRONG: Final = frozenset({"lightx2v", "stepdistill", "cfgdistill", "4steps", "4step"})
_WEAK: Final = frozenset({"lightning", "distill", "distilled", "seko"})
_DISTILLED: Final = frozenset({"distill", "distilled", "distillation"})
_COUNT: Final = re.compile(r"(\d+)steps?")
_MOST: Final = 50
"""A larger number of steps is one of training, not of sampling."""
_TEXTS: Final = (
    "modelspec.title", "modelspec.description", "name", "title", "description", "ss_output_name",
    "general.name",
)  # fmt: skip


def recipe_of(path: str | Path, metadata: Mapping[str, str] | None = None) -> Recipe | None:
    """Recognise a LoRA or a checkpoint distilled to four steps by the words of its names.

    Looked at are the metadata, the file's name and the folder's: published files are called
    ``high_noise_model.safetensors`` in a folder that says what they are. Returns None when nothing
    says so, or when another number of steps is named.
    """
    file = Path(path)
    texts = [(f"metadata {key}", (metadata or {}).get(key, "")) for key in _TEXTS]
    texts += [("the file name", file.stem), ("the folder name", file.absolute().parent.name)]
    for place, text in texts:
        words = _words(text)
        counts = {int(found[1]) for word in words if (found := _COUNT.fullmatch(word))}
        if any(count != 4 and count <= _MOST for count in counts):
            return None
        marks = _marks(words)
        if marks:
            return Recipe(
                name="distilled-4", reason=f"{place} says {' '.join(marks)!r}",
                num_inference_steps=4, guidance_scale=1.0, guidance_scale_2=1.0, flow_shift=5.0,
                scheduler="unipc", timesteps=(999, 937, 833, 625),
            )  # fmt: skip
    return None


def _marks(words: list[str]) -> list[str]:
    """Return the words by which a text says "distilled to four steps"; none if it does not."""
    found = [word for word in words if word in _STRONG or word in _WEAK]
    # "cfg_step_distill", "StepDistill": what was distilled stands right before the word.
    said = any(
        _DISTILLED.intersection(words[index + 1 : index + 3])
        for index, word in enumerate(words)
        if word in ("step", "steps", "cfg")
    )
    enough = said or not _STRONG.isdisjoint(found) or len(set(found)) > 1
    return found if enough else []


def _words(text: str) -> list[str]:
    """Split into lower-case words; a number followed by "steps" becomes one word, "4steps"."""
    # Camel case divides LightX2V, which is one word.
    words = words_of(re.sub(r"light[-_ ]?x2v", "lightx2v", text, flags=re.IGNORECASE))
    for index, word in enumerate(words[:-1]):
        if word.isdecimal() and words[index + 1] in ("step", "steps"):
            words[index : index + 2] = [f"{word}steps", ""]
    return [word for word in words if word]
