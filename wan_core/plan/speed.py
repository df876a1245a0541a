"""What a plan may change for speed's sake: one table of ingredients, by the word that allows them.

``exact`` takes none of them. ``fast`` takes those that change rounding at most, and products in 8
bit of files that are 8 bit already; ``fastest`` takes all. An ingredient looks at the job and the
machine, and changes the choices or says why it does not help there. Pure arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from ..config import SPEEDS
from ..errors import InvalidRequest
from ..memory import (
    ATTENTION_8BIT,
    MATRIX_UNITS,
    AttentionTimes,
    Choices,
    Workload,
    latent_size,
    matrix_kind,
    window_tokens,
)
from ..models import ModelArchitecture, experts_of
from .config import OptimizationConfig
from .shortcuts import (
    Situation,
    cache_asked,
    gate,
    gate_asked,
    gate_says,
    step_cache,
    step_cache_says,
)
from .stage_seconds import decode_seconds
from .timing import timing

if TYPE_CHECKING:
    from ..memory import SystemResources


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredient:
    """One way to be faster.

    ``choose`` returns the choices with it, or a few words on why it does not help here.
    ``describe`` says what has changed between the choices without and with it, with the seconds
    that are expected and what it may change of the result.
    """

    name: str
    speed: str
    """The least speed that takes it: "fast" or "fastest"."""
    choose: Callable[[Situation, Choices], Choices | str]
    describe: Callable[[Situation, Choices, Choices], str]
    asked: Callable[[OptimizationConfig], bool] = lambda _: False
    """Whether it is asked for by name, whatever the speed."""
    fields: tuple[str, ...] = ()
    """The fields of OptimizationConfig by which it is asked for."""


def _half_vae(situation: Situation, choices: Choices) -> Choices | str:
    main = choices.dtypes["transformer"]
    if situation.system.device_kind == "cpu":
        return "a CPU is not faster in half precision"
    if main == "fp32":
        return "everything is computed in fp32"
    if situation.system.wasteful_half_conv3d:
        return "this torch and cuDNN take many times the memory for half precision"
    if choices.dtypes["vae"] != "fp32":
        return "it is in half precision already"
    return replace(choices, dtypes={**choices.dtypes, "vae": _half_of(situation, main)})


def _half_of(situation: Situation, main: str) -> str:
    """Return fp16 where it is safe, which rounds to 11 bits where bf16 rounds to 8.

    Decoded frames are 8 times nearer to fp32's (``benchmarks/results/speed_h100.md`` for VAE 2.1,
    ``speed_h200_decode.md`` for 2.2), and latents that are encoded are nearer too (random
    weights). What goes beyond its range is made again in bf16, or goes on in it.
    """
    known = situation.architecture.vae is not None and "wide norms" in situation.abilities
    # With bf16 too: it is what goes on.
    able = situation.system.supports_fp16 and situation.system.supports_bf16
    return "fp16" if known and able else main


def _half_vae_says(situation: Situation, before: Choices, after: Choices) -> str:
    slow, quick = _decodes(situation, before, after)
    return (
        f"vae in {after.dtypes['vae']}: decode {slow:.1f} -> {quick:.1f} s, by rates of an H100 "
        "and H200s; changes rounding only"
    )


def _decodes(situation: Situation, *ways: Choices) -> list[float]:
    """Return the predicted seconds of the decode with each."""
    architecture, workload, system = situation.architecture, situation.workload, situation.system
    return [decode_seconds(architecture, workload, choices, system) for choices in ways]


def _quick(situation: Situation, choices: Choices) -> Choices | str:
    if situation.system.device_kind != "cuda":
        return "a CPU has none to choose from"
    if "lean" not in situation.abilities or situation.requested.forward == "diffusers":
        return "diffusers' own forward does not choose"
    return replace(choices, quick=True)


def _quick_says(situation: Situation, before: Choices, after: Choices) -> str:
    slow, quick = _decodes(situation, replace(before, lean=True), replace(after, lean=True))
    return (
        f"fastest kernels: decode {slow:.1f} -> {quick:.1f} s, by rates of an H100 and "
        "H200s; "
        f"attention {_kept_times(situation, eight_bit=False) or 'by the clock'}"
        f"{_without_triton()}; changes rounding only"
    )


def _without_triton() -> str:
    why = _why_no_triton()
    return "" if why is None else f"; norms of the VAE take longer, as {why}"


def _eight_bit(situation: Situation, choices: Choices) -> Choices | str:
    reasons = list(_why_not_by_expert(situation).values())
    if None not in reasons:  # an expert that is multiplied is enough
        return str(reasons[0])
    if "lean" not in situation.abilities or situation.requested.forward == "diffusers":
        return "diffusers' own forward multiplies in 16 bit"
    if choices.dtypes["transformer"] == "fp32":
        return "their results are in 16 bit, and this job computes in fp32"
    why = _why_no_triton()
    return replace(choices, eight_bit=True) if why is None else f"{why}, which rounds to 8 bit"


def _why_not_by_expert(situation: Situation) -> dict[str, str | None]:
    """Return, by transformer, why how it is stored is not multiplied here; None: it is."""
    parts = situation.architecture.components
    names = experts_of(situation.architecture)
    stored = {name: parts[name].stored_as if name in parts else "" for name in names}
    return {name: _why_not_stored(situation, kind) for name, kind in stored.items()}


def _why_not_stored(situation: Situation, stored: str) -> str | None:
    kind = matrix_kind(stored, fp8=situation.requested.fp8_storage == "always")
    if stored.startswith("fp8 e5m2"):
        return "fp8 of 2 digits (e5m2) is not multiplied in 8 bit"
    if not kind:
        return "the file is not stored in fp8 or int8, and fp8_storage is not always"
    capability = situation.system.compute_capability
    if situation.system.device_kind != "cuda" or (capability or (0, 0)) < MATRIX_UNITS[kind]:
        return f"this device does not multiply {kind}"
    return None


def _eight_bit_says(situation: Situation, before: Choices, after: Choices) -> str:
    slow, quick = _steps(situation, before, after)
    left = [name for name, why in _why_not_by_expert(situation).items() if why is not None]
    other = {"transformer": "low", "transformer_2": "high"}
    where = f" of the {other[left[0]]}-noise expert alone" if left else ""
    return (
        f"products in 8 bit in attention and feed-forward{where}: {slow:.1f} -> {quick:.1f} s a "
        "step, computed from operations, where the card proves faster; changes the result, by "
        "about 1.6 % of a forward with random weights"
    )


def _steps(situation: Situation, before: Choices, after: Choices) -> list[float]:
    """Return the predicted seconds of a step with each, by the lean forward."""
    whole = (situation.architecture, situation.workload)
    return [
        timing(*whole, replace(choices, lean=True), situation.system).step
        for choices in (before, after)
    ]


_KERNELS_8BIT = {
    "triton": ("WanFit's kernel", "int8, values in"),
    "comfy_kitchen": ("comfy-kitchen", "comfy-kitchen"),
    "sageattention": ("SageAttention", "sageattention"),
}
"""What has attention in 8 bit, by the module that is looked for: its name, and what stands beside
kept times where it was there when they were taken. Ours is compiled by Triton."""
_OUR_CARDS = (8, 0)
"""The first compute capability that Triton compiles ours for."""
_OUR_HEADS = (64, 128)
_TRITON_PARTS = ("knobs.py", "tools/tensor_descriptor.py")
"""Files of Triton that our kernel of attention imports; both are there from 3.4 on."""
_IF_PROVEN = "if its result stays near torch's and it is the faster one by the clock"


def _why_no_triton(*needed: str) -> str | None:
    """Return why Triton's kernels cannot be used here as far as files tell, or None.

    ``needed`` are files of the package that a kernel imports. Nothing is imported.
    """
    spec = find_spec("triton")
    if spec is None:
        return "Triton is not installed"
    homes = [Path(home) for home in spec.submodule_search_locations or ()]
    if not any(all((home / part).is_file() for part in needed) for home in homes):
        return "the installed Triton is older than 3.4"
    if os.name == "posix" and not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "Triton finds no C compiler (gcc, clang or what CC names)"
    return None


def _why_not(situation: Situation) -> dict[str, str | None]:
    """Return, by module, why its attention in 8 bit cannot be used in this job; None: it can."""
    system, width = situation.system, situation.architecture.transformer.head_dim
    capability = system.compute_capability or (0, 0)
    why: dict[str, str | None] = {
        module: None if find_spec(module) is not None else "it is not installed"
        for module in _KERNELS_8BIT
    }
    why["triton"] = _why_no_triton(*_TRITON_PARTS)
    if system.backend != "cuda" or capability < _OUR_CARDS:
        why["triton"] = "it needs a card of compute capability 8.0"
    elif width not in _OUR_HEADS:
        why["triton"] = f"the heads are {width} numbers long, and it takes 64 and 128"
    times = _times_here(situation, eight_bit=True)
    for module in _there(why):
        known = any(ATTENTION_8BIT.get(name) == module for name in times)
        if times and not known and _was_tried(module, situation):
            why[module] = "it did not run or was too far from torch's when it was timed here"
    return why


def _there(why: Mapping[str, str | None]) -> list[str]:
    return [module for module, reason in why.items() if reason is None]


def _was_tried(module: str, situation: Situation) -> bool:
    return _KERNELS_8BIT[module][1] in situation.timed_beside


def _attention(situation: Situation, choices: Choices) -> Choices | str:
    if not choices.quick:
        return "attention is torch's own"
    if "DIFFUSERS_ATTN_BACKEND" in os.environ:
        return "DIFFUSERS_ATTN_BACKEND is set and names what attends"
    if choices.dtypes["transformer"] == "fp32":
        return "kernels in 8 bit take numbers in 16 bit"
    why = _why_not(situation)
    there = _there(why)
    if not there:
        return "; ".join(f"{_KERNELS_8BIT[module][0]}: {reason}" for module, reason in why.items())
    times = _times_here(situation, eight_bit=True)
    best = min(times, key=lambda name: times[name], default="")
    all_tried = all(_was_tried(module, situation) for module in there)
    if best and best not in ATTENTION_8BIT and all_tried:
        return f"{best} was the fastest when all were timed here"
    return replace(choices, attention_8bit=True)


def _attention_says(situation: Situation, before: Choices, after: Choices) -> str:
    slow, quick = _steps(situation, before, after)
    kept = _kept_times(situation, eight_bit=True)
    names = " or ".join(_KERNELS_8BIT[module][0] for module in _there(_why_not(situation)))
    return (
        f"attention in 8 bit by {names}: {slow:.1f} -> "
        f"{quick:.1f} s a step, computed from operations, "
        f"{kept or _IF_PROVEN}; changes the video"
    )


def _times_here(situation: Situation, *, eight_bit: bool) -> Mapping[str, float]:
    """Return the milliseconds of kernels that this machine has kept for the job's attention.

    With ``eight_bit`` those of a choice among kernels in 8 bit too.
    """
    workload, shape = situation.workload, situation.architecture.transformer
    frames, height, width = latent_size(situation.architecture, workload)
    tokens = window_tokens(shape, frames + workload.references, height, width)
    for title, times in situation.attention_times.items():
        wide = title.endswith("8 or 16 bit")
        if f"{tokens} x {tokens} tokens, {shape.heads} heads" in title and wide == eight_bit:
            return times
    return {}


def _kept_times(situation: Situation, *, eight_bit: bool) -> str:
    """Return in words what this machine has measured of the job's attention; "" for nothing."""
    times = _times_here(situation, eight_bit=eight_bit)
    if not times:
        return ""
    best = min(times, key=lambda name: times[name])
    return f"{best}, measured here: " + ", ".join(
        f"{name} {taken:.1f} ms" for name, taken in times.items()
    )


INGREDIENTS: tuple[Ingredient, ...] = (
    Ingredient(name="vae", speed="fast", choose=_half_vae, describe=_half_vae_says),
    Ingredient(name="kernels", speed="fast", choose=_quick, describe=_quick_says),
    Ingredient(name="products", speed="fast", choose=_eight_bit, describe=_eight_bit_says),
    Ingredient(
        name="attention in 8 bit", speed="fastest", choose=_attention, describe=_attention_says
    ),
    Ingredient(
        name="step cache", speed="fastest", choose=step_cache, describe=step_cache_says,
        asked=cache_asked, fields=("step_cache",),
    ),
    Ingredient(
        name="guidance gate", speed="fastest", choose=gate, describe=gate_says, asked=gate_asked,
        fields=("guidance_gate",),
    ),
)  # fmt: skip
"""In the order in which they are put on."""


def wanted(requested: OptimizationConfig) -> tuple[Ingredient, ...]:
    """Return the ingredients that the speed asked for allows, and those asked for by name."""
    return tuple(one for one in INGREDIENTS if _allowed(one, requested) or one.asked(requested))


def _allowed(one: Ingredient, requested: OptimizationConfig) -> bool:
    return SPEEDS.index(one.speed) <= SPEEDS.index(requested.speed)


def check_asked(situation: Situation, plain: Choices) -> None:
    """Raise InvalidRequest if what is asked for by name makes no sense for this job."""
    for one in wanted(situation.requested):
        found = one.choose(situation, plain) if one.asked(situation.requested) else plain
        if isinstance(found, str):
            name = one.fields[0]
            raise InvalidRequest(
                f"{name} is {getattr(situation.requested, name)!r}, but {found}. Leave it out, or "
                "change the job.",
                field=name,
            )


def with_speed(situation: Situation, choices: Choices) -> Choices:
    """Return ``choices`` with every ingredient that is allowed and helps here."""
    for one in wanted(situation.requested):
        chosen = one.choose(situation, choices)
        if not isinstance(chosen, str):
            choices = chosen
    return choices


def situation_of(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, abilities: Collection[str],
) -> Situation:  # fmt: skip
    """Return the situation of a plan."""
    found = Situation(
        architecture=architecture, workload=workload, system=system, requested=requested,
        abilities=frozenset(abilities),
    )  # fmt: skip
    if requested.speed == "exact":
        return found
    kept = AttentionTimes()
    machine = f"{system.device_name}, {system.backend}, torch {system.torch_version}"
    return replace(found, attention_times=kept.of(machine), timed_beside=kept.where(machine))


def speed_reasons(situation: Situation, plain: Choices) -> Iterator[str]:
    """Yield a sentence for each ingredient that acts on ``plain``, the choices without any.

    Where none does, one sentence says why.
    """
    word = situation.requested.speed
    refused, choices = [], plain
    for one in wanted(situation.requested):
        chosen = one.choose(situation, choices)
        if isinstance(chosen, str):
            refused.append(f"{one.name}: {chosen}")
            continue
        why = f"speed {word}" if _allowed(one, situation.requested) else "asked for"
        yield f"{why}: {one.describe(situation, choices, chosen)}"
        choices = chosen
    if choices is plain and refused:
        yield f"speed {word}: the same as exact here ({'; '.join(refused)})"
    elif refused:
        yield f"speed {word}: without {'; '.join(refused)}"
