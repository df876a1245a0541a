"""Settings that distilled files were trained for: recognised by name, used only when asked for.

A LoRA that distils Wan to a few steps, and a checkpoint into which one was merged or that was
trained so, need their own schedule and no guidance; with a model's official settings the video is
oversaturated or grey. Pure data.

Sources. lightx2v and Lightning: ``configs/distill`` and ``schedulers/wan/step_distill`` of
github.com/ModelTC/LightX2V. rCM and TurboWan: ``turbodiffusion/inference`` of
github.com/thu-ml/TurboDiffusion. FastWan: ``fastvideo/configs/pipelines/wan.py`` and
``stages/denoising.py`` of github.com/hao-ai-lab/FastVideo. Self-Forcing: its
``configs/self_forcing_dmd.yaml`` (levels 1000, 750, 500, 250 warped by a shift of 5). CausVid: the
settings of ComfyUI's own templates for its LoRA (``video_wan_vace_14B_t2v``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .labels import name_stem, words_of

if TYPE_CHECKING:
    from .variants import Defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings a distilled file was trained for. Scales of 1 switch guidance off."""

    name: str
    reason: str = ""
    """The words it was recognised by, and where they were found."""
    num_inference_steps: int
    guidance_scale: float = 1.0
    guidance_scale_2: float = 1.0
    flow_shift: float = 5.0
    scheduler: str
    sigma_schedule: str = "simple"
    sigmas: tuple[float, ...] = ()
    """The noise levels it was trained at, where they do not follow from steps and shift."""
    fewest_steps: int = 0
    """Fewer steps that it was made for as well, with the first of the levels; 0: none."""

    def differences(self, settings: Any) -> list[str]:
        """Name the fields of ``settings`` (a Request) that differ from the recipe, with values."""
        wanted = self._settings()
        if self.sigmas:  # which say it all
            del wanted["flow_shift"], wanted["sigma_schedule"]
            count = settings.num_inference_steps
            if self.fewest_steps and self.fewest_steps <= count < self.num_inference_steps:
                wanted["num_inference_steps"] = count
                wanted["sigmas"] = self.sigmas[:count]
        if settings.guided_steps:  # which come before those that it was trained for
            wanted = {name: wanted[name] for name in wanted if name in _BESIDE_STEPS}
        return [
            _named(name, getattr(settings, name))
            for name, value in wanted.items()
            if getattr(settings, name) != value
        ]

    def as_defaults(self, official: Defaults) -> Defaults:
        """Return ``official`` with these settings: what None in a GenerationConfig then means."""
        one_expert = official.guidance_scale_2 is None
        settings = self._settings() | ({"guidance_scale_2": None} if one_expert else {})
        return replace(official, **settings, flow_shift_480p=None)

    def describe(self) -> str:
        """Say in one sentence what to set."""
        schedule = (
            f"sigmas {_levels(self.sigmas)}"
            if self.sigmas
            else f"flow_shift {self.flow_shift:g}, sigma_schedule {self.sigma_schedule}"
        )
        return (
            f"distilled for {self.num_inference_steps} steps ({self.name}): set "
            f"num_inference_steps {self.num_inference_steps}, guidance_scale and guidance_scale_2 "
            f"{self.guidance_scale:g}, {schedule}, scheduler {self.scheduler}"
        )

    def _settings(self) -> dict[str, Any]:
        names = (
            "num_inference_steps", "guidance_scale", "guidance_scale_2", "flow_shift", "scheduler",
            "sigma_schedule", "sigmas",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


_BESIDE_STEPS = ("guidance_scale", "guidance_scale_2", "scheduler")


def _named(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return f"{name} {_levels(value)}" if value else "the sigmas of a schedule"
    return f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"


def _levels(sigmas: Iterable[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)


def _rcm_levels(most: float) -> tuple[float, ...]:
    """Return rCM's levels: its times are angles a, and tan a is the ratio of noise to signal."""
    ratios = (most, *(math.tan(angle) for angle in (1.5, 1.4, 1.0)))
    return tuple(ratio / (1 + ratio) for ratio in ratios)


_LIGHTX2V: Final = Recipe(name="lightx2v", num_inference_steps=4, scheduler="euler")
"""Levels 1, 0.9375, 0.8333, 0.625; deterministic."""
_RCM: Final = Recipe(
    name="rCM", num_inference_steps=4, scheduler="lcm", sigmas=_rcm_levels(80), fewest_steps=1
)
"""Fresh noise in each step; from text."""
_RCM_IMAGE: Final = replace(_RCM, scheduler="euler", sigmas=_rcm_levels(200))
"""Deterministic; from an image."""
_FASTWAN: Final = Recipe(
    name="FastWan", num_inference_steps=3, scheduler="lcm", sigmas=(1.0, 0.757, 0.522)
)
_CAUSVID: Final = Recipe(name="CausVid", num_inference_steps=4, scheduler="unipc", flow_shift=8.0)
_SELF_FORCING: Final = Recipe(name="Self-Forcing", num_inference_steps=4, scheduler="lcm")
"""The levels of lightx2v, with fresh noise in each step."""
_ANIMATE_2: Final = Recipe(name="Animate 2 distilled", num_inference_steps=10, scheduler="lcm")
"""Steps and guidance as in diffusers' ``WanAnimate2DistilledBlocks``; sampler and shift as in
ComfyUI's template ``video_wan_animate2_distilled``."""

# Words that name a family by themselves.
_FAMILIES: Final[Mapping[str, Recipe]] = {
    "rcm": _RCM, "turbowan": _RCM, "turbodiffusion": _RCM, "fastwan": _FASTWAN,
    "causvid": _CAUSVID, "selfforcing": _SELF_FORCING,
}  # fmt: skip

# Words that say by themselves that a file is distilled to a few steps, and words that do so only
# beside another mark: "lightning" and "distill" are in the names of effects and styles too.
_STRONG: Final = frozenset({"lightx2v", "stepdistill", "cfgdistill", "4steps", "4step"})
_WEAK: Final = frozenset({"lightning", "distill", "distilled", "seko"})
_DISTILLED: Final = frozenset({"distill", "distilled", "distillation"})
_COUNT: Final = re.compile(r"(\d+)steps?")
_ONE_WORD: Final = re.compile(
    r"(?i)light[-_ ]?x2v|(?:fast|turbo)[-_ ]?wan(?-i:(?![a-z]))|turbo[-_ ]?diffusion|caus[-_ ]?vid"
    r"|(?<![a-z])rcm(?![a-z])|self[-_ ]?forcing(?![a-z])"
    r"|fusion[-_ ]?i?x(?![a-z])|acc[-_ ]?vid(?:eo)?(?![a-z])"
)
_MOST: Final = 50
"""A larger number of steps is one of training, not of sampling."""
# Names and titles. A description tells what a file goes well with too, and so says nothing sure.
_TEXTS: Final = ("modelspec.title", "name", "title", "ss_output_name", "general.name")
_CLASSES: Final = {
    "WanDMDPipeline": _FASTWAN, "WanAnimate2DistilledModularPipeline": _ANIMATE_2,
}  # fmt: skip
"""Pipelines of a folder's index that run only distilled models."""
# Words that say what part of a model a file is, and nothing of the model.
_PART: Final = re.compile(
    r"high|low|noise|model|models|diffusion|pytorch|lora|weights|adapter|transformer|unet|index|of"
    r"|safetensors|bf16|fp16|fp32|\d+"
)
# Words of checkpoints that need few steps and no guidance, but whose settings depend on the version
# or were never published as one recipe; and what says the same of a LoRA too.
_FEW_SURE: Final = frozenset({"fusionx", "fusionix", "accvid", "accvideo", *_DISTILLED})
_FEW_LIKELY: Final = frozenset({"rapid", "turbo", "hyper", "lcm", "dmd", *_STRONG, *_WEAK})
_FEW_MOST: Final = 16


def recipe_of(
    path: str | Path, metadata: Mapping[str, str] | None = None, pipeline: str = ""
) -> Recipe | None:
    """Recognise a LoRA or a checkpoint distilled to a few steps by what it says of itself.

    Looked at are the metadata and the name of the file or folder; for a file whose name says only
    which part of a model it is (``high_noise_model.safetensors``), that of the folder it is
    published in; and ``pipeline``, the class that a folder's index names. Returns None when
    nothing says so, or when a number of steps is named that the family was not made for.
    """
    if pipeline in _CLASSES:
        return replace(_CLASSES[pipeline], reason=f"the folder's index says {pipeline!r}")
    for place, text in _texts(path, metadata):
        words = _words(text)
        family, marks = _family(words)
        few = {count for count in _counts(words) if count <= _MOST}
        if family is None:
            if few - {4}:
                return None
            continue
        least = family.fewest_steps or family.num_inference_steps
        if few - set(range(least, family.num_inference_steps + 1)):
            return None
        return replace(family, reason=f"{place} says {' '.join(marks)!r}")
    return None


def few_steps_hint(
    path: str | Path, metadata: Mapping[str, str] | None = None, *, whole: bool
) -> str:
    """Return a warning for a file that says it is distilled but has no recipe; empty for others.

    ``whole`` says that it is a checkpoint and not a LoRA: of an effect, a word like "turbo" tells
    nothing of steps, unless their number stands beside it.
    """
    if recipe_of(path, metadata) is not None:
        return ""
    for place, text in _texts(path, metadata):
        words = _words(text)
        few = sorted(count for count in _counts(words) if count <= _FEW_MOST)
        known = _FEW_SURE | _FEW_LIKELY | _FAMILIES.keys() if whole or few else _FEW_SURE
        marks = [word for word in words if word in known]
        # "distill" alone is in the names of effects; beside a number of steps it is not.
        if few and (whole or marks) or marks and (whole or not _DISTILLED.issuperset(marks)):
            said = " ".join([*marks, *(f"{count} steps" for count in few)])
            steps = str(few[0]) if few else "4 to 10"
            return (
                f"{place.capitalize()} says {said!r}: {Path(path).name} is probably distilled to "
                f"few steps, and no recipe for it is known. With a model's official steps and "
                "guidance such a video is burnt or grey: set the numbers of its page, often "
                f"num_inference_steps {steps} and guidance_scale and guidance_scale_2 1."
            )
    return ""


def _texts(path: str | Path, metadata: Mapping[str, str] | None) -> list[tuple[str, str]]:
    """Return the texts by which a file says what it is, and where each stands."""
    texts = [(f"metadata {key}", (metadata or {}).get(key, "")) for key in _TEXTS]
    file = Path(path).absolute()
    texts.append(("the file name", name_stem(file.name)))
    if all(_PART.fullmatch(word) for word in words_of(name_stem(file.name))):
        folder = file.parent
        # As the Hugging Face cache keeps a model: models--owner--name/snapshots/hash.
        folder = folder.parent.parent if folder.parent.name == "snapshots" else folder
        texts.append(("the folder name", folder.name))
    return texts


def _counts(words: Iterable[str]) -> set[int]:
    return {int(found[1]) for word in words if (found := _COUNT.fullmatch(word))}


def _family(words: list[str]) -> tuple[Recipe | None, list[str]]:
    """Return the recipe that a text's words name, and those words."""
    named = [word for word in words if word in _FAMILIES]
    if named:
        recipe = _FAMILIES[named[0]]
        return (_RCM_IMAGE if recipe is _RCM and "i2v" in words else recipe), named[:1]
    if "animate" in words and "2" in words and not _DISTILLED.isdisjoint(words):
        return _ANIMATE_2, [word for word in words if word == "animate" or word in _DISTILLED]
    marks = _marks(words)
    return (_LIGHTX2V if marks else None), marks


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
    # Camel case divides LightX2V and FastWan2, which are one word each.
    words = words_of(
        _ONE_WORD.sub(lambda found: f" {re.sub('[-_ ]', '', found[0]).lower()} ", text)
    )
    for index, word in enumerate(words[:-1]):
        if word.isdecimal() and words[index + 1] in ("step", "steps"):
            words[index : index + 2] = [f"{word}steps", ""]
    return [word for word in words if word]
