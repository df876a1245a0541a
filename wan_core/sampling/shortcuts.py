"""Fewer forwards: steps taken from the step before, and guidance without its second pass.

Each is asked for, changes the video, and acts per window, per segment and per expert. What it
remembers is in ``Memory``, which a journal can save. The tensors are kept in RAM: a few times the
latents, looked at once a step, and MagCache's hidden states.

EasyCache (Zhou et al. 2025, arXiv 2507.02860) takes the model's output for the input plus
something that changes slowly. With x the input of the conditional pass and v its output, from the
last two computed steps k = mean|v - v'| / mean|x - x'|. Each step adds k mean|x - x of the step
before| / mean|v| to an error; while that is below a threshold the step is not computed, and the
output is x + (v - x) of the last computed step, for both passes. The first fifth of an expert's
steps and its last one are always computed (the authors': 10 of 50).

MagCache (``models.magcache``) says beforehand in which steps the blocks of the transformer are left
out and what they added last is added again.

The guidance gate (Adaptive Guidance, Castillo et al. 2023, arXiv 2312.12487, in its linear form)
computes both passes in the first part of an expert's steps only; after it the last difference of
the two stands for the one that is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..forward import BlockPasses
from ..job import StepPlan
from ..memory import Choices
from ..models import MagCurve, Skips, easycache_warm, magcache_plan

Compute = Callable[[int, "BlockPasses | None"], Sequence[Tensor]]
_TENSORS = ("before", "at", "output", "kept", "kept_2", "delta", "residual", "residual_2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcuts:
    """What is asked for: a threshold of EasyCache, and the share of steps with both passes.

    A threshold of 0 computes every step, a share of 1 every pass.
    """

    easycache: float = 0.0
    gate: float = 1.0
    magcache: Skips | None = None
    """For each step of the schedule whether the passes leave the blocks out (``models``)."""

    @property
    def any(self) -> bool:
        """Whether anything is asked for."""
        return self.easycache > 0 or self.gate < 1 or self.magcache is not None


def chosen_shortcuts(
    choices: Choices, curve: MagCurve | None, steps: StepPlan, *, two_experts: bool
) -> Shortcuts | None:
    """Return the shortcuts that a plan has chosen for these steps, or None if it has none.

    ``curve`` is the model's; the plan has looked for it where it chose MagCache.
    """
    skips = None
    if choices.magcache and curve is not None:
        count = len(steps.timesteps)
        switch = steps.switch if two_experts else count
        skips = magcache_plan(curve, count, switch, choices.magcache)[1]
    found = Shortcuts(easycache=choices.easycache, gate=choices.guidance_gate, magcache=skips)
    return found if found.any else None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowMemory:
    """What is remembered of one window; replaced after each step, never changed.

    Tensors are (B, C, f, h, w), float32, in RAM.
    """

    step: int = -1
    """The last step that it was part of."""
    error: float = 0.0
    rate: float | None = None
    """EasyCache's k."""
    before: Tensor | None = None
    """The input of the last step, computed or not."""
    at: Tensor | None = None
    """The input of the last computed step."""
    output: Tensor | None = None
    """The conditional output of the last computed step."""
    kept: Tensor | None = None
    """Output minus input of the last computed step, of the conditional pass."""
    kept_2: Tensor | None = None
    """The same of the unconditional pass."""
    delta: Tensor | None = None
    """Conditional minus unconditional output, where both were computed last."""
    residual: Tensor | None = None
    """What the blocks added last in the conditional pass, (B, tokens, width), in their dtype."""
    residual_2: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class Memory:
    """What the shortcuts of one clip or segment remember, and what they have saved so far."""

    phase: str = ""
    """The expert, and its first step: another one's outputs say nothing."""
    windows: dict[str, WindowMemory] = field(default_factory=dict)
    forwards: int = 0
    """Forwards that were made."""
    skipped_steps: int = 0
    """Forwards that a step cache left out."""
    skipped_passes: int = 0
    """Unconditional forwards that the gate left out."""

    def enter(self, phase: str) -> None:
        """Forget what another expert said."""
        if phase != self.phase:
            self.phase = phase
            self.windows = {}

    def next_segment(self) -> Memory:
        """Return an empty memory that goes on counting."""
        return replace(self, phase="", windows={})

    def describe(self) -> str:
        """Say what was saved."""
        whole = self.forwards + self.skipped_steps + self.skipped_passes
        return (
            f"{self.forwards} of {whole} forwards: {self.skipped_steps} by the step cache, "
            f"{self.skipped_passes} by the guidance gate"
        )

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and plain values, for a journal."""
        tensors: dict[str, Tensor] = {}
        windows: dict[str, dict[str, Any]] = {}
        for name, window in self.windows.items():
            windows[name] = {"step": window.step, "error": window.error, "rate": window.rate}
            for part in _TENSORS:
                tensor = getattr(window, part)
                if tensor is not None:
                    tensors[f"memory.{name}.{part}"] = tensor
        counts = {name: getattr(self, name) for name in _COUNTS}
        return tensors, {"phase": self.phase, "windows": windows, **counts}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Memory:
        """Return what ``saved`` gave back as it was."""
        windows = {}
        for name, plain in values["windows"].items():
            parts: dict[str, Any] = {
                part: tensors.get(f"memory.{name}.{part}") for part in _TENSORS
            }
            windows[name] = WindowMemory(**plain, **parts)
        counts = {name: int(values[name]) for name in _COUNTS}
        return Memory(phase=values["phase"], windows=windows, **counts)


_COUNTS = tuple(part.name for part in fields(Memory) if part.name not in ("phase", "windows"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of one window, as far as shortcuts look at it."""

    shortcuts: Shortcuts
    memory: Memory
    index: int
    steps: range
    """The steps of the expert."""
    dtype: torch.dtype = torch.float32
    """Of the model's outputs."""
    key: str = "clip"
    """Names the window within the clip."""

    @property
    def gated(self) -> bool:
        """Whether the step is behind the gate."""
        first = self.steps.start + math.ceil(self.shortcuts.gate * len(self.steps))
        return self.index >= first

    @property
    def _must_compute(self) -> bool:
        warm = self.steps.start + easycache_warm(len(self.steps))
        return self.index < warm or self.index >= self.steps.stop - 1

    def velocities(self, latents: Tensor, passes: int, compute: Compute) -> list[Tensor]:
        """Return the outputs of 1 or 2 ``passes``, conditional first, computed or not.

        ``latents`` (B, C, f, h, w) is the window's input; ``compute(n, blocks)`` makes the first n
        passes, with what ``blocks`` says of the transformer's blocks unless it is None. What is
        remembered changes only if this returns.
        """
        present = latents.detach().to("cpu", torch.float32)
        found, needed = self._found(passes)
        skip, error = self._decide(found, present, passes, needed)
        if skip:
            outputs = self._from_before(found, present, latents, needed)
            after = replace(found, error=error)
        else:
            outputs, after, left_out = self._computed(found, needed, compute)
            after = self._learnt(replace(after, error=error), present, outputs)
            self.memory.forwards += needed - left_out
            self.memory.skipped_steps += left_out
        self.memory.skipped_steps += needed if skip else 0
        self.memory.skipped_passes += passes - needed
        if needed < passes:
            assert found.delta is not None
            outputs.append(outputs[0] - found.delta.to(outputs[0]))
        self.memory.windows[self.key] = replace(after, step=self.index, before=present)
        return outputs

    def _found(self, passes: int) -> tuple[WindowMemory, int]:
        """Return what is remembered of the window, and how many passes the gate leaves."""
        found = self.memory.windows.get(self.key)
        if found is None or found.step != self.index - 1:
            found = WindowMemory()  # a window that was not part of the step before
        gated = passes == 2 and self.gated and found.delta is not None
        return found, 1 if gated else passes

    def foreseen(self, latents: Tensor, passes: int) -> tuple[int, BlockPasses | None]:
        """Return what ``velocities`` will call ``compute`` with; no passes where it will not."""
        found, needed = self._found(passes)
        present = latents.detach().to("cpu", torch.float32)
        if self._decide(found, present, passes, needed)[0]:
            return 0, None
        return needed, self._blocks(found, needed)

    def _blocks(self, found: WindowMemory, needed: int) -> BlockPasses | None:
        """Return which passes leave the blocks out; None without MagCache."""
        if self.shortcuts.magcache is None:
            return None
        kept, skips = (found.residual, found.residual_2), self.shortcuts.magcache[self.index]
        return BlockPasses([kept[n] if skips[n] else None for n in range(needed)])

    def _computed(
        self, found: WindowMemory, needed: int, compute: Compute
    ) -> tuple[list[Tensor], WindowMemory, int]:
        """Call the model; return outputs, memory, and how many passes left the blocks out."""
        passes = self._blocks(found, needed)
        outputs = list(compute(needed, passes))
        if passes is None:
            return outputs, found, 0
        kept = [found.residual, found.residual_2]
        for number, made in enumerate(passes.made):
            kept[number] = kept[number] if made is None else made
        left_out = sum(one is not None for one in passes.given)
        return outputs, replace(found, residual=kept[0], residual_2=kept[1]), left_out

    def _decide(
        self, found: WindowMemory, present: Tensor, passes: int, needed: int
    ) -> tuple[bool, float]:
        """Return whether the step is left out, and the error that has then added up."""
        threshold = self.shortcuts.easycache
        if self._must_compute:
            return False, 0.0
        if not threshold or found.rate is None or found.before is None or found.output is None:
            return False, found.error
        if needed == 2 and found.kept_2 is None:
            return False, found.error
        change = _mean(present - found.before) / max(_mean(found.output), 1e-12)
        error = found.error + found.rate * change
        return (True, error) if error < threshold else (False, 0.0)

    def _from_before(
        self, found: WindowMemory, present: Tensor, like: Tensor, needed: int
    ) -> list[Tensor]:
        kept = (found.kept, found.kept_2)[:needed]
        return [(present + one).to(like.device, self.dtype) for one in kept if one is not None]

    def _learnt(
        self, found: WindowMemory, present: Tensor, outputs: Sequence[Tensor]
    ) -> WindowMemory:
        """Return what is remembered after a step that was computed."""
        if self.shortcuts.easycache:
            first, *second = [out.detach().to("cpu", torch.float32) for out in outputs]
            rate = found.rate
            if found.output is not None and found.at is not None:
                rate = _mean(first - found.output) / max(_mean(present - found.at), 1e-12)
            found = replace(
                found, rate=rate, at=present, output=first, kept=first - present,
                kept_2=second[0] - present if second else None,
            )  # fmt: skip
        if len(outputs) == 2 and self.shortcuts.gate < 1:
            delta = (outputs[0] - outputs[1]).detach().to("cpu", torch.float32)
            found = replace(found, delta=delta)
        return found


def _mean(difference: Tensor) -> float:
    return float(difference.abs().mean())
