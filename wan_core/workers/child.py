"""What a worker does: it waits for units, computes them, and answers. Runs in its own process.

The main thread computes; another one reads, so that a cancelled unit ends between two blocks and
the worker ends with its driver.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..config import leave_ends_to_driver
from ..errors import first_line, is_host_oom, is_oom
from ..forward import alike, can_be_cut, take_settings, undisturbed
from ..journal import code_digest, device_name, versions
from ..kernels import begin_trials, choosing_with
from ..loading import ComponentCache, ComponentKey, dtype_of, first_look, load_component, unpin
from ..memory import Strip
from ..placing import Sharing
from ..sampling import Conditions, Unit, compute_unit
from .group import Choices, GangBroken, Group, Join, ProcessGroup
from .links import measured_link
from .messages import Message, read_message, write_message
from .placement import placed
from .ring import decode_strip, strip_from
from .weights import Weights

_BEAT_SECONDS = 0.2
_PAUSE_SECONDS = 0.002
_MAY_STAY = ("concat", "vace", "camera")
"""Conditions that stay in RAM where the driver has them there."""


class Cancelled(BaseException):
    """Ends the unit in work: its driver does not want it any more."""


class CannotBeCut(Exception):
    """The model computes in a way that cannot be cut over several processes."""


def conditions_message(conditions: Conditions, key: int) -> Message:
    """Return the message that takes a clip's conditions to a worker."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for field in fields(Conditions):
        value = getattr(conditions, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif value is not None and field.name != "prompt_parts":
            plain[field.name] = value
    for number, (_, embeds) in enumerate(conditions.prompt_parts):
        tensors[f"part {number}"] = embeds
    here = [name for name in _MAY_STAY if name in tensors and tensors[name].device.type == "cpu"]
    starts = [start for start, _ in conditions.prompt_parts]
    header = {"type": "conditions", "key": key, "starts": starts, "in_ram": here, "plain": plain}
    return header, tensors


def conditions_from(message: Message, device: torch.device) -> Conditions:
    """Return the conditions of a message, on ``device`` but for those that stay in RAM."""
    header, tensors = message
    there: dict[str, Any] = {
        name: tensor if name in header["in_ram"] else tensor.to(device)
        for name, tensor in tensors.items()
    }
    parts = tuple((start, there.pop(f"part {i}")) for i, start in enumerate(header["starts"]))
    return Conditions(**there, **header["plain"], prompt_parts=parts)


class Worker:
    """One worker: its card, the weights that are in their place, and what it is told."""

    def __init__(self, device: str, answer: Callable[..., None], join: Join = ProcessGroup) -> None:
        self.device = torch.device(device)
        self.inbox: queue.Queue[Message] = queue.Queue()
        self._cancelled: set[int] = set()
        self._may_go: tuple[int, int] = (-1, 0)
        """The number of a decode, and the chunk that it may not write yet."""
        self._chosen: queue.Queue[tuple[int, str | None]] = queue.Queue()
        """Numbers of what was asked, and what the driver's other workers have chosen."""
        self._asked = 0
        self._answer = answer
        self._cache = ComponentCache()
        self._known: dict[str, Weights] = {}
        self._conditions: tuple[int, Conditions | None] = (-1, None)
        self._placement = ExitStack()
        self._placed: tuple[tuple[str, Strip | None], Any] = (("", None), None)
        self._sharing: Sharing | None = None
        """Of the weights in their place, where the gang shares them."""
        self._unit = -1
        self._next_beat = 0.0
        self._join = join
        self._group: Group | None = None
        """The gang that this worker is one of, if it is not alone."""
        self._together: Group | None = None
        """The same while it computes a part of a unit: decisions are then those of rank 0."""
        self._choices = {alone: self._chooser(None) for alone in (True, False)}
        """What it chooses in units that it computes alone, and in those of the gang."""

    def hears_now(self, header: dict[str, Any]) -> bool:
        """Take what is said to the unit in work, from any thread; False for all else."""
        if header["type"] == "cancel":
            self._cancelled.update(header["numbers"])
        elif header["type"] == "go":
            self._may_go = header["number"], header["until"]
        elif header["type"] == "chosen":
            self._chosen.put((header["ask"], header["name"]))
        return header["type"] in ("cancel", "go", "chosen")

    def serve(self) -> None:
        """Answer messages until there is one that says to stop."""
        self._answer({
            "type": "hello", "pid": os.getpid(), "versions": versions(),
            "code": code_digest()[:12], "device_name": device_name(self.device),
        })  # fmt: skip
        while True:
            header, tensors = self.inbox.get()
            kind = header["type"]
            if kind == "stop":
                return
            if kind == "settings":
                take_settings(header["settings"])
            elif kind == "release":
                self._release(everything=header["everything"])
                self._answer({"type": "released"})
            elif kind == "gang":
                self._meet(header)
            elif kind == "weights":
                self._known[header["key"]] = Weights.from_plain(header["weights"])
            elif kind == "conditions":
                self._conditions = header["key"], conditions_from((header, tensors), self.device)
            elif kind in ("unit", "decode"):
                self._work(header, tensors)

    def _meet(self, header: dict[str, Any]) -> None:
        """Become one of a gang, together with its other processes."""
        group = self._join(header["rank"], header["size"], header["place"], self.device)
        self._group = group
        self._choices[False] = self._chooser(group)
        link, why = measured_link(group, self.device)
        told = None if link is None else [link.rate, link.seconds, link.host]
        self._answer({"type": "joined", "link": told, "why": why})

    def _work(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Compute a unit, alone or with the gang, or a strip; answer it, or say why not."""
        self._unit = header["number"]
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        together = self._group if header["cut"] else None
        told: dict[str, Any] | None = None
        made: dict[str, Tensor] = {}
        try:
            with undisturbed(), torch.inference_mode(False), torch.no_grad():
                if "strip" in header:
                    told_of = self._decoded(header, tensors["latents"])
                else:
                    given = self._prepared(header, tensors, together)
                    self._together = together
                    made, told_of = self._computed(given, header["both"])
        except Cancelled:
            told = {"type": "cancelled"}
        except Exception as err:  # noqa: BLE001 - told to the driver, which raises it
            midway = self._together is not None
            told = _failure(err) | {"midway": midway, "weights": header["weights"]}
            # The frames of the traceback hold the tensors that filled the memory.
            traceback.clear_frames(err.__traceback__)
        self._together = None
        strip = {"strip": True} if "strip" in header else {}
        if told is not None:
            # One that fails in the middle of a cut unit is ended, with those that wait for it: on a
            # card it could wait for them itself, before its weights may leave.
            if told["type"] == "failed" and not told["midway"]:
                self._release(everything=False)
            self._answer(told | strip | {"number": self._unit})
            return
        seconds = time.perf_counter() - started
        done = {"type": "done", "number": self._unit, "seconds": seconds, "cut": header["cut"]}
        self._answer(done | told_of | strip, made)

    def _decoded(self, header: dict[str, Any], latents: Tensor) -> dict[str, Any]:
        """Decode a strip, and say each chunk that is there; return what is told at the end."""
        vae = self._in_place(self._known[header["weights"]], strip_from(header["strip"]))
        number = header["number"]
        if self._may_go[0] != number:
            self._may_go = number, header["until"]

        def may_write(position: int) -> None:
            while position >= self._may_go[1]:
                self.check()
                time.sleep(_PAUSE_SECONDS)

        for told in decode_strip(vae, latents, header, may_write, self.check):
            self._answer(told | {"number": number})
        on_card = self.device.type == "cuda"
        return {"peak_bytes": torch.cuda.max_memory_allocated() if on_card else 0}

    def _prepared(
        self, header: dict[str, Any], tensors: dict[str, Tensor], together: Group | None
    ) -> tuple[Any, torch.dtype, Conditions, Unit]:
        """Have everything in its place; with a gang, wait until all its processes have.

        Raises Cancelled where another one could not.
        """
        failed: BaseException | None = None
        given = None
        try:
            self.check()
            given = self._given(header, tensors)
            if together is not None and not can_be_cut(given[0]):
                raise CannotBeCut("only the lean forward can be cut over several processes")
        except (Exception, Cancelled) as err:  # noqa: BLE001 - raised when the others know
            failed = err
        all_are = together is None or together.all_say(failed is None)
        if failed is not None:
            raise failed
        if not all_are:
            raise Cancelled
        assert given is not None
        return given

    def _given(
        self, header: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[Any, torch.dtype, Conditions, Unit]:
        """Return the module in its place, its dtype, the clip's conditions and the unit."""
        weights = self._known[header["weights"]]
        module = self._in_place(weights)
        key, conditions = self._conditions
        assert conditions is not None and key == header["conditions"]
        unit = Unit(
            latents=tensors["latents"].to(self.device),
            timestep=tensors["timestep"].to(self.device),
            indices=tuple(header["indices"]),
            middle=header["middle"],
            second=header["second"],
            residual=tensors.get("residual"),
            keep=header["keep"],
        )
        return module, dtype_of(weights.dtype), conditions, unit

    def _computed(
        self, given: tuple[Any, torch.dtype, Conditions, Unit], both: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compute a unit; return its tensors, and what is told of it: the peak, and a trial.

        With ``both`` rank 0 computes it alone as well, and that is what counts.
        """
        module, dtype, conditions, unit = given
        among, sharing = self._together, self._sharing
        before = 0 if sharing is None else sharing.copied_bytes
        if sharing is not None:
            sharing.begin(together=among is not None)
        clip = self._conditions[0]
        with choosing_with(self._choices[among is None].of_clip(clip)):
            velocity, residual = compute_unit(unit, module, dtype, conditions, among)
        # To the CPU here, so that kernels that fail do so inside the try of the caller.
        velocity = velocity.to("cpu")
        on_card = self.device.type == "cuda"
        told: dict[str, Any] = {"peak_bytes": torch.cuda.max_memory_allocated() if on_card else 0}
        if sharing is not None:
            told["copied_bytes"] = sharing.copied_bytes - before
        if among is not None and among.rank > 0:
            return {}, told
        if both and among is not None:
            self._together = None  # the others have done their part
            if sharing is not None:
                sharing.begin(together=False)
            with choosing_with(self._choices[True].of_clip(clip)):
                whole, residual = compute_unit(unit, module, dtype, conditions)
            equal, error = alike(whole.to("cpu"), velocity)
            velocity = whole.to("cpu")
            told |= {"equal": equal, "error": error}
        return {"velocity": velocity} | ({} if residual is None else {"residual": residual}), told

    def _chooser(self, group: Group | None) -> Choices:
        def tell(what: str, name: str | None, kept: bool) -> None:
            self._answer({"type": "chose", "what": what, "name": name, "kept": kept})

        def say(text: str) -> None:
            self._answer({"type": "note", "text": text})

        return Choices(group, self._ask, tell, say)

    def _ask(self, what: str) -> str | None:
        """Return what another worker has chosen; None where this one is to choose."""
        self._asked += 1
        self._answer({"type": "choose", "what": what, "ask": self._asked})
        try:
            while True:
                with suppress(queue.Empty):
                    number, name = self._chosen.get(timeout=_BEAT_SECONDS)
                    if number == self._asked:
                        return name
                if self._together is None:
                    self.check()
                else:  # the others of its gang do not look for an interrupt now
                    self._answer({"type": "beat"})
        except Cancelled:
            self._answer({"type": "chose", "what": what, "name": None})
            raise

    def _in_place(self, weights: Weights, strip: Strip | None = None) -> Any:
        """Return the module of these weights, placed; others leave the device first."""
        key, module = self._placed
        if key == (weights.key, strip):
            return module
        self._release(everything=False)
        weights.check_files()
        begin_trials()
        group = self._group if weights.shared else None
        sharing = None if group is None else Sharing(group)
        with ExitStack() as stack:
            module = stack.enter_context(self._borrowed(weights))
            plan = weights.plan_for(str(self.device))
            dtype = dtype_of(weights.dtype)
            ready = placed(
                module, weights.component, plan, weights.loras, dtype,
                check=self.check, sharing=sharing, strip=strip,
            )  # fmt: skip
            # What is read for the first time is looked at while it is sent to the card.
            with first_look(module, self.check, partial(self._has_read, weights.component)):
                note = stack.enter_context(ready)
            if note:
                self._answer({"type": "note", "text": note})
            self._placement = stack.pop_all()
        self._placed, self._sharing = ((weights.key, strip), module), sharing
        return module

    @contextmanager
    def _borrowed(self, weights: Weights) -> Iterator[Any]:
        options = ("fp8",) if weights.fp8 else ()
        key = ComponentKey(weights.kind, weights.files, weights.dtype, options)
        with self._cache.borrow(key, weights.nbytes, partial(self._read, weights)) as module:
            yield module

    def _read(self, weights: Weights) -> Any:
        return load_component(
            weights.path,
            dtype_of(weights.dtype),
            kind=weights.kind,
            keep_quantized=True,
            map_file=weights.mapped,
            align=self.device.type == "cpu",
            fp8_storage=weights.fp8 and self.device,
            # A gang page-locks parts of blocks, which are copied from the file's pages: they are to
            # be in RAM by then.
            look_later=weights.mapped and self.device.type == "cuda" and not weights.shared,
            module_path=weights.module,
            interrupt_check=self.check,
            progress=partial(self._has_read, weights.component),
        )

    def _has_read(self, component: str, done: int, total: int) -> None:
        self._answer({"type": "loaded", "component": component, "done": done, "total": total})

    def _release(self, *, everything: bool) -> None:
        """Take the weights off the device; with ``everything`` the modules are forgotten too."""
        placement, self._placement = self._placement, ExitStack()
        self._placed, self._sharing = (("", None), None), None
        with torch.inference_mode(False), torch.no_grad():
            placement.close()
            self._cache.release_device()
        # Page-locked memory cannot be swapped out, and others need it when this is done.
        unpin()
        if everything:
            self._cache.clear()
            self._conditions = (-1, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self) -> None:
        """Say that the worker is alive; raise Cancelled where the unit is not wanted any more."""
        cancelled = self._unit in self._cancelled
        if self._together is not None:
            # All leave at the same block: one that left alone would be waited for.
            cancelled = self._together.agreed(cancelled)
        if cancelled:
            raise Cancelled
        now = time.perf_counter()
        if now >= self._next_beat:
            self._next_beat = now + _BEAT_SECONDS
            self._answer({"type": "beat"})


def _failure(err: Exception) -> dict[str, Any]:
    """Return what a driver is told of an error."""
    why = "error"
    if isinstance(err, GangBroken | CannotBeCut):
        why = "gang" if isinstance(err, GangBroken) else "uncut"
    elif is_oom(err):
        why = "host_oom" if is_host_oom(err) else "oom"
    elif _is_of_the_device(err):
        why = "device"
    text = str(err) if why == "error" else first_line(err)
    return {"type": "failed", "why": why, "error": type(err).__name__, "text": text}


def _is_of_the_device(err: Exception) -> bool:
    """Whether a card gave the error, or its driver: it may be in use by one process alone."""
    named = any(cls.__name__ == "AcceleratorError" for cls in type(err).__mro__)
    return named or (isinstance(err, RuntimeError) and "CUDA error" in str(err))


def _listen(stream: BinaryIO, worker: Worker) -> None:
    """Hand on what the driver says. When the driver is gone, so is the worker."""
    try:
        while (message := read_message(stream)) is not None:
            if not worker.hears_now(message[0]):
                worker.inbox.put(message)
        os._exit(0)
    except Exception:  # noqa: BLE001 - by its last words the driver knows that memory ran out
        traceback.print_exc()
    finally:
        os._exit(1)  # a worker that cannot hear would outlive its driver, and hold the card


def main() -> None:
    """Serve one driver over stdin and stdout.

    ``sys.argv`` holds the root of the package, the device, and the number of CPU threads.
    """
    device, threads = sys.argv[2], int(sys.argv[3])
    answers, commands = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    # What a library prints must not get between the answers.
    os.dup2(2, 1)
    leave_ends_to_driver()
    torch.set_num_threads(threads)
    lock = threading.Lock()

    def answer(header: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        try:
            with lock:
                write_message(answers, header, tensors)
        except OSError:
            os._exit(0)  # nobody listens

    worker = Worker(device, answer)
    threading.Thread(target=_listen, args=(commands, worker), daemon=True).start()
    # Takes seconds, which pass while the driver encodes texts.
    import diffusers.models.transformers.transformer_wan  # noqa: F401

    worker.serve()
    # Without taking the interpreter down: the other thread still reads.
    os._exit(0)
