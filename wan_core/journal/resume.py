"""Connects a render with its journal: what is saved after each step, and how it is restored.

``journal`` stores states without knowing what is in them. Here they are made from a
``DenoiseState``, the scheduler and the plan's choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..config import GenerationConfig
from ..errors import JournalMismatch, first_line
from ..job import Request, output_paths
from ..models import ModelArchitecture
from ..plan import OptimizationPlan
from ..sampling import DenoiseState, Memory
from .disk import DONE, STATES, is_there, journals, opened_number, read_identity, state_head
from .identity import (
    BY_ROWS,
    EXACT,
    FASTER,
    canonical_json,
    choices_of,
    device_name,
    identity_differences,
    identity_key,
    listed,
    plain_identity,
    render_identity,
)
from .journal import Journal, JournalState, restore_scheduler, scheduler_state
from .lock import claim
from .units import KeptUnits

_State = tuple[int, dict[str, Tensor], dict[str, Any]]
"""What ``Journal.save`` takes: finished steps, tensors, and what JSON can hold."""

FOLDER = ".wanfit"
"""Name of the folder for journals, next to the output."""
MAX_SHARE = 0.01
"""Share of a render's time that saving its steps takes at most. A crash costs a hundred times what
one save takes here: seconds on a local disk, a few minutes on a slow share."""

_TOLD = ("steps", "windows", "control", "forwards")
"""What the metadata of a result say of its latents."""


class RenderJournal:
    """Saves what a render needs to be continued in another process.

    The state is saved after a step, or a window within it, as often as this takes no more than 1 %
    of the time; always where a long wait or much memory comes next, and when the render ends by an
    error or an interrupt. A render without a journal has None in the place of this.
    """

    def __init__(self, journal: Journal, *, adopted: bool) -> None:
        self._journal = journal
        self._adopted = adopted  # begun by a plan that chose otherwise
        self._unsaved: _State | None = None
        self.saved: JournalState | None = journal.load()
        self._units = KeptUnits(journal)

    @property
    def warnings(self) -> list[str]:
        """Sentences about what went wrong with the journal so far."""
        return self._journal.warnings

    @property
    def finished_latents(self) -> Tensor | None:
        """The saved latents, (B, C, T, h, w) float32, if denoising was over; else None."""
        return None if self.saved is None else self.saved.latents

    @property
    def told(self) -> dict[str, Any]:
        """What a result says of how the finished latents were made; empty without them."""
        found = {} if self.finished_latents is None or self.saved is None else self.saved.scalars
        return dict(found.get("told", {}))

    def restore(self, state: DenoiseState, scheduler: Any) -> int:
        """Bring ``state`` and ``scheduler`` to where the saved render stopped.

        Returns the next step to make. If the saved render used another scheduler or other sigmas,
        as after an update of the code that makes them, the render starts anew with a warning;
        raises JournalMismatch then where it must go on.
        """
        saved = self.saved
        if saved is None or saved.latents is not None:
            return state.next_step
        device = state.latents.device
        # First, because it may raise, and ``state`` is then still that of a new render. The latents
        # alone are not enough: a multistep solver needs its earlier model outputs too.
        try:
            restore_scheduler(scheduler, saved, device)
        except JournalMismatch as err:
            self._journal.discard(err)
            self.saved = None
            return state.next_step
        state.latents = saved.tensors["latents"].to(device)
        state.next_step = int(saved.scalars["next_step"])
        state.next_window = int(saved.scalars["next_window"])
        if "fused" in saved.tensors:
            state.fused = saved.tensors["fused"].to(device)
            state.fused_by = str(saved.scalars["fused_by"])
        if "clip" in saved.tensors:
            state.clip = saved.tensors["clip"].to(device)
        state.segment = int(saved.scalars.get("segment", 0))
        if "memory" in saved.scalars:
            state.memory = Memory.restored(saved.tensors, saved.scalars["memory"])
        return state.next_step

    def continued(self, plan: OptimizationPlan) -> OptimizationPlan:
        """Return ``plan`` with those choices that the saved state was made with.

        They differ from the plan's only if memory ran out in the saved render and it went on with a
        smaller plan. A warning then names them.
        """
        scalars = {} if self.saved is None else self.saved.scalars
        before, now = scalars.get("device"), _device(plan)
        if before not in (None, now):
            self.warnings.append(
                f"The saved part was made on {before}, the rest is made on {now}: the result may "
                "be rounded otherwise than one made on either alone."
            )
        plan = self._same_overlap(plan, scalars.get("overlap"))
        saved = scalars.get("choices", {})
        fresh = plain_identity(choices_of(plan))
        if not saved or saved == fresh:
            return plan
        differ = listed(identity_differences(saved, fresh))
        if self._adopted and self.finished_latents is not None:
            # Made by a plan for another memory; what is left is decoded as it fits this one.
            self.warnings.append(f"The saved latents were made by another plan: {differ}.")
            return plan
        why = (
            "was made by another plan"
            if self._adopted
            else ("had gone on with a smaller plan when memory ran out")
        )
        self.warnings.append(f"The saved render {why}; this one keeps to it: {differ}.")
        by_rows = saved["forward"] == BY_ROWS
        dtypes = MappingProxyType(dict(saved["precision"]))
        lean = plan.choices.lean or by_rows
        faster = {name: bool(saved.get(name)) for name in FASTER}
        return plan.with_choices(dtypes=dtypes, by_rows=by_rows, lean=lean, **faster)

    def _same_overlap(self, plan: OptimizationPlan, saved: Any) -> OptimizationPlan:
        """Return ``plan`` with the overlap of windows that the saved state was made with.

        It differs only where it was chosen to fill another number of cards.
        """
        now = plan.choices.window_overlap
        if plan.choices.window_frames is None or saved in (None, now):
            return plan
        self.warnings.append(
            f"The windows of the saved part share {saved} frames, and so do those of the rest; "
            f"this number of cards alone would choose {now}."
        )
        return plan.with_choices(window_overlap=int(saved))

    def units(self, state: DenoiseState, plan: Callable[[], OptimizationPlan]) -> KeptUnits:
        """Return what keeps the finished passes of a clip or segment; ``plan`` gives the latest."""

        def about() -> str:
            now = plan()
            return canonical_json([state.segment, choices_of(now), _device(now)]).decode()

        return self._units.of(state.latents, about)

    def step_done(
        self, state: DenoiseState, scheduler: Any, plan: OptimizationPlan, *, last: bool = False
    ) -> None:
        """Save the state after a finished step, and the choices it was made with.

        This is done if enough time has passed since the last save, or after the ``last`` step of an
        expert or a segment; else the state is kept for ``save_rest``.
        """
        if last:  # the next one forgets the outputs of this one, which may have gigabytes
            state = replace(state, memory=replace(state.memory, windows={}))
        # The tensors themselves, no copies: a step replaces them and writes into none.
        self._unsaved = found = self._state(state, scheduler, plan)
        if (last or self._journal.due(_size(found))) and self._save(found):
            self._units.step_saved()

    def window_done(self, state: DenoiseState, scheduler: Any, plan: OptimizationPlan) -> None:
        """Save the state after a finished window, if enough time has passed since the last save.

        Where all its passes are kept, a state would add nothing, once there is one.
        """
        if self._units.whole and (self._journal.saves or self._journal.resuming):
            return
        found = self._state(state, scheduler, plan)
        if self._journal.due(_size(found)):
            self._save(found)

    def save_rest(self) -> None:
        """Save the last finished step if it has not been saved: the render ends here.

        What goes wrong becomes a warning, as another error may be on its way.
        """
        if (left := self._unsaved) is None:
            return
        try:
            self._save(left)
        except Exception as err:  # noqa: BLE001 - a device that failed gives no tensor back
            self._unsaved = None
            self.warnings.append(f"The last steps could not be saved: {first_line(err)}")

    def _save(self, state: _State) -> bool:
        self._unsaved = state  # an interrupt while it is written leaves it to ``save_rest``
        written = self._journal.save(*state)
        self._unsaved = None
        return written

    def _state(self, state: DenoiseState, scheduler: Any, plan: OptimizationPlan) -> _State:
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
            **_made_with(plan),
        }
        if state.memory.phase:
            remembered, scalars["memory"] = state.memory.saved()
            tensors |= remembered
        return state.next_step, tensors, scalars

    def latents_done(
        self, latents: Tensor, plan: OptimizationPlan, metadata: Mapping[str, Any]
    ) -> None:
        """Save the finished latents. From now on only the decode would have to be repeated.

        What the result's ``metadata`` says of how they were made is saved with them.
        """
        told = {name: metadata[name] for name in _TOLD if name in metadata}
        self._journal.latents_done(latents, {**_made_with(plan), "told": told})
        self._unsaved = None  # only now: see ``_save``
        self._units.remove()

    def finish(self) -> None:
        """Remove the journal: the render is finished."""
        self._units.close()
        self._journal.finish()

    def close(self) -> None:
        """Leave the journal for a later run, or remove it if it holds nothing to go on from."""
        self._units.close()
        if self._journal.saves or self._journal.resuming or self._units.there:
            self._journal.close()
        else:
            self._journal.finish()

    def report(self, metadata: dict[str, Any]) -> None:
        """Say what was saved, how long that took, and what of it was taken over."""
        metadata["journal"] = self._journal.describe() + self._units.describe()
        if self._units.found:
            metadata.setdefault("resumed", f"with {self._units.found} passes of a step")
        elif self._journal.units_alone:
            self.warnings.append(
                "None of the saved passes could be used, as where another card or plan made them: "
                "the clip was made anew."
            )


def _size(state: _State) -> int:
    return sum(tensor.nbytes for tensor in state[1].values())


def _made_with(plan: OptimizationPlan) -> dict[str, Any]:
    return {
        "choices": choices_of(plan),
        "device": _device(plan),
        "overlap": plan.choices.window_overlap,
        "forward_asked": plan.forward_asked,
    }


def _device(plan: OptimizationPlan) -> str:
    return device_name(torch.device(plan.device))


def open_journal(
    stack: ExitStack,
    config: GenerationConfig,
    request: Request,
    architecture: ModelArchitecture,
    plan: OptimizationPlan,
) -> RenderJournal | None:
    """Open the journal that the request asks for; ``stack`` closes it. None if it asks for none.

    Before that the outputs are kept for this render, until ``stack`` ends: raises OutputError where
    one is being written that shows something else.

    A saved render of the same job goes on also where its plan chose other things for want of
    memory, or for more of it (see ``_kindred``). Raises JournalMismatch for resume="must" if there
    is no render to continue.
    """
    if request.resume is None:
        _claim(stack, request, "")
        return None
    root = journal_folder(request)
    own = plain_identity(render_identity(config, request, architecture, plan))
    # VACE reads the VAE's latents of a grey clip where it is given no control.
    _claim(stack, request, identity_key(own))
    encoded = bool(own["given"]) or architecture.transformer.vace_in_channels is not None
    identity = own if request.resume == "never" else _kindred(root, own, plan, encoded)
    opened = Journal.open(
        root,
        identity,
        request.resume,
        max_share=MAX_SHARE,
        keep=config.output_metadata,
    )
    stack.callback(opened.close)
    journal = RenderJournal(opened, adopted=identity != own)
    stack.callback(journal.close)
    return journal


def _claim(stack: ExitStack, request: Request, latents: str) -> None:
    """Keep the outputs; the same ``latents`` written in the same way are the same video."""
    way = [request.codec, request.crf, request.pix_fmt, request.fps]
    what = f"{latents} {' '.join(map(str, way))}" if latents else ""
    for path in output_paths(request):
        stack.enter_context(claim(path, what))


def _kindred(
    root: Path, own: dict[str, Any], plan: OptimizationPlan, encoded: bool
) -> dict[str, Any]:
    """Return the identity of the saved render to go on with: ``own``, or one that only a plan made.

    Where nothing is ``encoded`` by the VAE, its file counts as little: it has no part in the
    latents, and another may be the cure for a decode that fails.

    How much memory is free decides the dtype of the VAE and whether products are cut by rows, and
    it is seldom the same after a crash. Forty minutes of steps are worth more than that rounding,
    but not more than what a user asked for by name. Once the latents are finished, only the decode
    is left, and a forward that saves memory in it may be asked for.
    """
    if _states(root / identity_key(own)):
        return own
    for folder in sorted(journals(root), key=opened_number, reverse=True):
        saved, states = read_identity(folder), _states(folder)
        if saved is None or not states:
            continue
        done = DONE in states
        heads = [state_head(folder / name, folder.name) for name in states]
        asked = [head["scalars"].get("forward_asked", True) for head in heads if head is not None]
        free = not plan.forward_asked and asked and not any(asked)
        free = free or (done and saved.get("forward") == EXACT)
        if _but_for_choices(saved, own, forward=free, vae=not encoded):
            return saved
    return own


def _but_for_choices(
    saved: dict[str, Any], own: dict[str, Any], *, forward: bool, vae: bool
) -> bool:
    """Say whether two identities are the same but for the VAE's dtype, and what is named."""

    def rest(identity: dict[str, Any]) -> dict[str, Any]:
        dtypes, files = identity.get("precision"), identity.get("files")
        dtypes = {**dtypes, "vae": None} if isinstance(dtypes, dict) else dtypes
        if isinstance(files, dict) and vae:
            files = {**files, "vae": None}
        same = {"precision": dtypes, "files": files, **({"forward": None} if forward else {})}
        return {**identity, **same}

    return rest(saved) == rest(own)


def _states(folder: Path) -> list[str]:
    return [name for name in STATES if is_there(folder / name)]


def journal_folder(request: Request) -> Path:
    """Return the folder for journals: the one given, or ``.wanfit`` next to the output."""
    if request.journal_folder is not None:
        return request.journal_folder
    assert request.output_path is not None  # ``resolve`` refuses a journal without either
    return request.output_path.absolute().parent / FOLDER
