"""The journal of one render: opened with its identity, written after every unit, read to go on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .architecture import ModelArchitecture
from .cache import component_key
from .config import GenerationConfig
from .denoise import DenoiseState
from .files import file_identity
from .journal import Journal, JournalState, restore_scheduler, scheduler_state
from .monitor import versions
from .plan import OptimizationPlan
from .render_identity import identity_differences, listed, plain_identity
from .request import Request

FOLDER = ".wanfit"
"""Name of the folder for journals, beside the output."""
BY_ROWS = "lean_rows"
"""The forward that rounds otherwise than the rest, which are "exact"."""
_NOT_IN_LATENTS = (
    "output_path", "warnings", "resume", "wanted_frames", "fps", "codec", "crf", "pix_fmt",
)  # fmt: skip


class RenderJournal:
    """Keeps what a render needs to go on in another process; a render without one has None.

    Every finished step is kept; within a step of several windows also finished windows, as often
    as costs no more than 1 % of the time.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.saved: JournalState | None = journal.load()

    @property
    def warnings(self) -> list[str]:
        """What went wrong with the journal so far."""
        return self._journal.warnings

    @property
    def finished_latents(self) -> Tensor | None:
        """Latents of a render whose denoising was over, (B, C, T, h, w) float32."""
        return None if self.saved is None else self.saved.latents

    def restore(self, state: DenoiseState, scheduler: Any) -> int:
        """Move ``state`` and ``scheduler`` to where the saved render stopped; return that step.

        Raises JournalMismatch where the schedule is another.
        """
        saved = self.saved
        if saved is None or saved.latents is not None:
            return state.next_step
        device = state.latents.device
        restore_scheduler(scheduler, saved, device)
        state.latents = saved.tensors["latents"].to(device)
        state.next_step = int(saved.scalars["next_step"])
        state.next_window = int(saved.scalars["next_window"])
        if "fused" in saved.tensors:
            state.fused = saved.tensors["fused"].to(device)
            state.fused_by = str(saved.scalars["fused_by"])
        if "clip" in saved.tensors:
            state.clip = saved.tensors["clip"].to(device)
        state.segment = int(saved.scalars.get("segment", 0))
        return state.next_step

    def continued(self, plan: OptimizationPlan) -> OptimizationPlan:
        """Return ``plan`` with the choices the saved state was made with, where they differ.

        They differ only where memory ran out in the saved render, after which it went on with
        a smaller plan. A warning names them.
        """
        saved = {} if self.saved is None else self.saved.scalars.get("choices", {})
        fresh = plain_identity(choices_of(plan))
        if not saved or saved == fresh:
            return plan
        self.warnings.append(
            "The saved render had gone on with a smaller plan when memory ran out; this one keeps "
            f"to it: {listed(identity_differences(saved, fresh))}."
        )
        by_rows = saved["forward"] == BY_ROWS
        dtypes = MappingProxyType(dict(saved["precision"]))
        return replace(plan, dtypes=dtypes, by_rows=by_rows, lean=plan.lean or by_rows)

    def step_done(self, state: DenoiseState, scheduler: Any, plan: OptimizationPlan) -> None:
        """Keep the state after a finished step, and what it was made with."""
        self._save(state, scheduler, plan)

    def window_done(self, state: DenoiseState, scheduler: Any, plan: OptimizationPlan) -> None:
        """Keep the state after a finished window, if that is cheap enough by now."""
        if self._journal.due():
            self._save(state, scheduler, plan)

    def _save(self, state: DenoiseState, scheduler: Any, plan: OptimizationPlan) -> None:
        tensors, scalars = scheduler_state(scheduler)
        tensors["latents"] = state.latents
        if state.fused is not None:
            tensors["fused"] = state.fused
        if state.clip is not None:
            tensors["clip"] = state.clip
        scalars |= {
            "next_step": state.next_step,
            "next_window": state.next_window,
            "fused_by": state.fused_by,
            "segment": state.segment,
            "choices": choices_of(plan),
        }
        self._journal.save(state.next_step, tensors, scalars)

    def latents_done(self, latents: Tensor, plan: OptimizationPlan) -> None:
        """Keep the finished latents: from now on only the decode would be repeated."""
        self._journal.latents_done(latents, {"choices": choices_of(plan)})

    def finish(self) -> None:
        """Remove the journal: the render is finished."""
        self._journal.finish()

    def close(self) -> None:
        """Leave the journal for a later run; one without a saved state goes."""
        if self._journal.saves or self._journal.resuming:
            self._journal.close()
        else:
            self._journal.finish()

    def describe(self) -> str:
        """Say in one line what was kept and what it cost."""
        return self._journal.describe()


def open_journal(
    stack: ExitStack,
    config: GenerationConfig,
    request: Request,
    architecture: ModelArchitecture,
    plan: OptimizationPlan,
) -> RenderJournal | None:
    """Open the journal the job asks for, closed by ``stack``; None where it asks for none.

    Raises JournalMismatch for resume="must" without a render to go on with.
    """
    if request.resume is None:
        return None
    identity = render_identity(config, request, architecture, plan)
    opened = Journal.open(journal_folder(config), identity, request.resume)
    stack.callback(opened.close)
    journal = RenderJournal(opened)
    stack.callback(journal.close)
    return journal


def journal_folder(config: GenerationConfig) -> Path:
    """Return the folder for journals: the one given, or ``.wanfit`` beside the output."""
    if config.journal_folder is not None:
        return Path(config.journal_folder)
    assert config.output_path is not None  # resolve has seen to it
    return Path(config.output_path).absolute().parent / FOLDER


def render_identity(
    config: GenerationConfig,
    request: Request,
    architecture: ModelArchitecture,
    plan: OptimizationPlan,
) -> dict[str, Any]:
    """Name everything that decides a render's latents; two equal ones may continue each other.

    Where the mp4 goes, and how parts are placed on the device, changes no bit and is left out.
    What the plan chose and rounds otherwise is in: a render made with other choices starts anew
    and says which they are, so that they can be asked for. ``plan`` is the one a render begins
    with; what it went down to when memory ran out is kept in its states (``continued``).
    """
    fields = {name: getattr(request, name) for name in request.__slots__}
    for name in _NOT_IN_LATENTS:
        fields.pop(name, None)
    tensors = (
        "image", "last_image", "latents", "continue_from", "prompt_embeds",
        "negative_prompt_embeds",
    )  # fmt: skip
    given: Mapping[str, Any] = {
        name: _content(value) for name in tensors if (value := getattr(config, name)) is not None
    }
    files = {
        name: component_key(part, "")
        for name, part in architecture.components.items()
        if part.files
    }
    return {
        "variant": architecture.name,
        "files": files,
        "loras": [
            [file_identity(found.lora.path), found.lora.expert, float(found.lora.strength)]
            for found in architecture.loras
            if found.lora.strength
        ],
        "job": fields,
        "given": given,
        **choices_of(plan),
        "windows": [plan.window_frames, plan.window_overlap],
        "device": torch.device(plan.device).type,
        "versions": versions(),
    }


def choices_of(plan: OptimizationPlan) -> dict[str, Any]:
    """Return what a plan chose that changes numbers, by the names it is asked for with."""
    return {
        "precision": dict(plan.dtypes),
        "forward": BY_ROWS if plan.by_rows else "exact",
        "fp8_storage": plan.fp8_storage,
    }


def _content(value: Any) -> Any:
    """A picture named by its path is known by its bytes: the file may be replaced."""
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        path = Path(value)
        return path.read_bytes() if path.is_file() else str(path)
    return value
