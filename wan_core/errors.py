"""Every error WanFit raises on purpose, and the one place that recognises "out of memory".

    WanError
    ├── InvalidRequest        a field of the request has a value that is not allowed
    ├── ModelFileError        a file of the model cannot be used as it is
    │   ├── MissingFile       a file or folder that is needed does not exist
    │   ├── CorruptFile       truncated, half downloaded, or not what its name says
    │   └── UnsafeFile        opening it would run code, or its name leaves its folder
    ├── UnsupportedModel      readable, but not a model WanFit can run; the text says what it is
    ├── ModelMismatch         two files, or a file and its config, do not belong together
    ├── MissingDependency     a Python package is absent or broken
    ├── DoesNotFit            no plan fits this machine, or memory ran out while carrying one out
    ├── NonFiniteLatents      the model produced NaN or infinity
    ├── DownloadError         a file that was asked for could not be fetched
    ├── JournalMismatch       resume='must', and no saved state belongs to this render
    ├── OutputError           a result could not be written
    ├── WorkerFailed          a process that computes for this one cannot
    └── and, for the library's own use:
        ├── SpilledMemory     the driver moved device memory to RAM (also a MemoryError)
        ├── NoWorkers         none is left of the processes that compute (also a WorkerFailed)
        ├── ModuleInUse       modules that a render or a placement has (also a RuntimeError)
        └── BrokenState       a saved state is damaged or foreign; caught inside the journal

A message has three parts: what was found (file or field, number), what is allowed, what to do.
Interrupts (``KeyboardInterrupt`` and ComfyUI's own) are never a ``WanError``; no handler for
``WanError`` catches them.
This module imports nothing but the standard library.
"""

from __future__ import annotations

import re
import sys
import traceback


class WanError(Exception):
    """Base of all expected failures; ``generate`` reports these instead of raising them."""


class InvalidRequest(WanError):
    """A field of the request has a value that is not allowed; ``field`` names it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelFileError(WanError):
    """A file of the model cannot be used as it is."""


class MissingFile(ModelFileError):
    """A file or folder that is needed does not exist.

    ``component`` names the part of a model that no file was found for, where it is one.
    """

    def __init__(self, message: str, *, component: str | None = None) -> None:
        super().__init__(message)
        self.component = component


class CorruptFile(ModelFileError):
    """A file is truncated, half downloaded, or not what its name says."""


class UnsafeFile(ModelFileError):
    """Opening the file would run code, or a name in it points outside its folder."""


class UnsupportedModel(WanError):
    """The file is readable but holds no model WanFit can run; the text says what it is."""


class ModelMismatch(WanError):
    """Two files, or a file and its config, do not belong together."""


class MissingDependency(WanError):
    """A Python package WanFit needs is absent or fails to import."""


class DoesNotFit(WanError):
    """No plan fits this machine, or memory ran out although one was expected to fit.

    ``needed_bytes`` and ``available_bytes`` are None where they are not known.
    """

    def __init__(
        self,
        message: str,
        *,
        needed_bytes: int | None = None,
        available_bytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class NonFiniteLatents(WanError):
    """The model produced NaN or infinity; the render is stopped instead of saving a black video."""

    def __init__(self, *, step: int, sigma: float, expert: str, dtype: str) -> None:
        super().__init__(
            f"The latents are not finite after step {step + 1} (sigma {sigma:.4f}, {expert}-noise "
            f"expert, {dtype}). Weights or activations overflowed or the checkpoint holds NaN. "
            "Try precision 'bf16' or 'fp32', and check that the file is complete."
        )
        self.step, self.sigma, self.expert, self.dtype = step, sigma, expert, dtype


class DownloadError(WanError):
    """A file that was asked for could not be fetched; the part already downloaded is kept."""


class JournalMismatch(WanError):
    """A saved render must be continued (resume='must'), but no saved state belongs to it."""


class SpilledMemory(WanError, MemoryError):
    """The driver moved device memory to RAM instead of refusing the allocation.

    Treated like running out of memory, because the render would go on many times slower.
    """


class ModuleInUse(WanError, RuntimeError):
    """A module's weights are placed in a way that excludes the placement asked for."""


class BrokenState(WanError):
    """A saved state of a render cannot be used; the text says why. Caught inside the journal."""


class OutputError(WanError):
    """A result could not be written."""


class WorkerFailed(WanError):
    """A process that computes parts of a render cannot do so."""


class NoWorkers(WorkerFailed):
    """None is left of the processes that compute; a render goes on in its own where that fits."""


# What the backends say when memory runs out without raising torch.OutOfMemoryError.
_OOM_TEXTS = (
    "cuda error: out of memory",
    "cuda out of memory",
    "hip out of memory",
    "hip error: out of memory",
    "mps backend out of memory",
    "xpu out of memory",
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "triton error [cuda]: out of memory",
    "unable to allocate",
    # NCCL's, for what it allocates itself: the last line of torch's error, or of a process' log.
    "cuda failure 2 'out of memory'",
    "cuda failure 'out of memory'",
    "failed to cuda calloc",
    "failed to cuda malloc",
)
_OOM_NAMES = ("OutOfMemoryError", "MemoryError")


# Of these, the ones that mean the computer's own memory.
_HOST_TEXTS = ("defaultcpuallocator", "unable to allocate")


def is_host_oom(error: BaseException | None) -> bool:
    """Say whether an error that ``is_oom`` recognises means RAM, not the memory of a device."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, SpilledMemory):
            return False
        if isinstance(error, MemoryError):
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(mark in text for mark in _HOST_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_oom(error: BaseException | None) -> bool:
    """Say whether ``error``, or an error in its chain of causes, means that memory ran out.

    Recognised are ``torch.OutOfMemoryError`` and ``MemoryError`` by their class, and by their text
    the other errors with which CUDA (``AcceleratorError``), HIP, MPS, XPU and the CPU allocator
    report it.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Compared by class name: importing torch here would make every planning module load it.
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & set(_OOM_NAMES):
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(mark in text for mark in _OOM_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def clear_frames(error: BaseException) -> None:
    """Free what the tracebacks of an error, and of those that it came from, hold: tensors, weights.

    To be called outside the ``except`` block. The error that the caller is handling, if any, stays
    as it is.
    """
    seen, left = {id(None), id(sys.exc_info()[1])}, [error]
    while left:
        one = left.pop()
        if id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            left += filter(None, [one.__cause__, one.__context__])


def tells_oom(text: str) -> bool:
    """Say whether the last words of a process that has ended mean that memory ran out in it."""
    named = any(_names(name, text) for name in _OOM_NAMES)
    return named or any(mark in text.lower() for mark in _OOM_TEXTS)


def tells_host_oom(text: str) -> bool:
    """Say whether words that ``tells_oom`` recognises mean RAM, not the memory of a device."""
    return _names("MemoryError", text) or any(mark in text.lower() for mark in _HOST_TEXTS)


def _names(name: str, text: str) -> bool:
    """Say whether an error of this class ended a traceback; it may have had nothing to say."""
    return re.search(rf"^(?:\w+\.)*{name}(?::|\s*$)", text, re.MULTILINE) is not None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
