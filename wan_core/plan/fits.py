"""What would fit where a job does not: another clip, by bisection (a smaller workload never needs
more), another file or more RAM. Every cure is tried on the planner before it is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from ..config import GIB
from ..job import MAX_LATENT_FRAMES, MAX_SIZE, MOST_FRAMES, encoder_bytes, video_frames
from ..memory import Workload
from ..models import (
    BYTES,
    Component,
    ModelArchitecture,
    StoredSize,
    StoredSizes,
    experts_of,
)
from .config import SHORTER_WINDOWS

if TYPE_CHECKING:
    from ..memory import SystemResources

_FP8_FILES = {"text_encoder": "fp8 (umt5_xxl_fp8_e4m3fn_scaled)"}
NOTHING = "No length or size of this model fits; free memory or take a smaller model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedies:
    """What a workload that does not fit could be, each alone; None where that does not help."""

    frames: int | None
    """Most video frames (4n+1) at its size."""
    size: tuple[int, int] | None
    """Largest (width, height) in pixels of its proportions and length."""
    windows: tuple[int, int] | None
    """(frames, overlap) of the longest windows in which all of it fits."""


def remedies(workload: Workload, multiple: int, fits: Callable[[Workload], bool]) -> Remedies:
    """Find them by bisection; ``multiple`` and ``fits`` as in ``smaller_that_fits``."""
    return Remedies(
        frames=longest(workload, fits),
        size=largest_size(workload, multiple, fits),
        windows=_windows(workload, fits),
    )


def most_that_fits(
    workload: Workload,
    multiple: int,
    fits: Callable[[Workload], bool],
    windows: Callable[[Workload], int | None],
) -> str:
    """Name the longest clip of this size and the largest size of this length that fit at all.

    What is tried ends where a job ends, so that a number is a limit of the machine or is said to be
    one of WanFit. ``windows`` returns the windows that a workload would be made in.
    """
    whole = workload.window_frames is None
    most = video_frames(MAX_LATENT_FRAMES) if whole else video_frames(MOST_FRAMES // 4)
    found = []
    long = longest(replace(workload, num_frames=most), fits)
    if long is not None:
        text = f"{frames_text(long)} at {workload.width}x{workload.height}"
        made_in = windows(replace(workload, num_frames=long))
        if made_in is not None and whole and made_in < long:
            text += f", made in windows of {made_in}"
        end = "no clip is longer without max_chunk_size" if whole else "no clip is longer"
        found.append(f"{text} ({end})" if long == most else text)
    # One step beyond the largest size: ``largest_size`` begins below the one it is given.
    width = MAX_SIZE * workload.width // max(workload.width, workload.height) // multiple * multiple
    beyond = replace(workload, width=width + multiple)
    size = largest_size(beyond, multiple, fits, proportions=(workload.width, workload.height))
    if size is not None:
        text = f"{frames_text(workload.num_frames)} at {size[0]}x{size[1]}"
        found.append(f"{text} (no video is larger)" if size[0] == width else text)
    return f"At most {' or '.join(found)}." if found else "No length or size fits."


def smaller_that_fits(
    workload: Workload, multiple: int, fits: Callable[[Workload], bool]
) -> list[str]:
    """Name the longest clip of this size, and the largest size of this length, that fit, if any.

    ``multiple`` is what width and height must be divisible by. ``fits`` must be monotone: a shorter
    or smaller workload fits whenever a larger one does.
    """
    frames, size = longest(workload, fits), largest_size(workload, multiple, fits)
    found = (
        [] if frames is None else [f"{frames_text(frames)} at {workload.width}x{workload.height}"]
    )
    if size is not None:
        found.append(f"{frames_text(workload.num_frames)} at {size[0]}x{size[1]}")
    return [f"What would fit: {' or '.join(found)}."] if found else []


def file_cure(workload: Workload, fits: Callable[[Workload], bool]) -> list[str]:
    """Say that the frames should not be returned, where the clip then fits."""
    if not workload.return_frames:
        return []
    asked = ("h264", "yuv420p", workload.width, workload.height, workload.num_frames)
    own = workload.encoder_bytes or workload.batch_size * encoder_bytes(*asked)
    if not fits(replace(workload, return_frames=False, to_file=True, encoder_bytes=own)):
        return []
    return [
        f"The finished frames are {workload.frames_bytes / GIB:.1f} GiB of that: write the video "
        "to a file with return_frames False."
    ]


def fp8_cure(
    architecture: ModelArchitecture, stage: str, fits: Callable[[ModelArchitecture], bool]
) -> list[str]:
    """Advise files in fp8 of the weights that a stage needs, where the job would fit with them.

    Most files stay mapped, and the system takes their pages back: then smaller ones save no RAM.
    """
    experts = experts_of(architecture)
    part = {"text_encode": "text_encoder", "denoise_low": "transformer_2"}.get(stage, "transformer")
    for names in dict.fromkeys(((part,), experts, (*experts, "text_encoder"))):
        smaller = {name: _in_fp8(architecture.components.get(name)) for name in names}
        known = {name: one for name, one in smaller.items() if one is not None}
        if not known:
            continue
        if fits(replace(architecture, components={**architecture.components, **known})):
            files = [
                f"{name.replace('_', ' ')} in {_FP8_FILES.get(name, 'fp8 or GGUF')}"
                for name in known
            ]
            return [f"It fits with the {' and the '.join(files)}."]
    return []


def _in_fp8(component: Component | None) -> Component | None:
    """Return a component as a file in fp8 would have it; None where it is quantised already."""
    stored = None if component is None else component.stored
    if component is None or stored is None or stored.quantised:
        return None

    def of(sizes: tuple[StoredSize, ...]) -> tuple[StoredSize, ...]:
        return tuple(StoredSize(kept=s.kept + s.half + s.plain, wide=s.wide) for s in sizes)

    found = StoredSizes(
        blocks=of(stored.blocks), rest=stored.rest, vace=of(stored.vace), faces=of(stored.faces),
        tables=StoredSize(half=stored.tables.half + stored.tables.plain),
        largest=max((s.half + s.plain for s in stored.blocks), default=1),
    )  # fmt: skip
    nbytes = found.whole.nbytes(BYTES["bf16"])
    return replace(component, stored=found, nbytes=nbytes, weight_kind="fp8_scaled")


def more_ram(system: SystemResources, limit_gb: float | None, needed: int) -> list[str]:
    """Say how much RAM would do for ``needed`` bytes, if it is short: free, and by the limit."""
    there, ways = system.usable_ram_bytes, []
    if limit_gb is not None and needed > limit_gb * GIB:
        ways.append(f"ram_limit_gb {_gib_up(needed):g}")
    short = needed - there
    if short > 0:
        ways.append(f"{_gib_up(short):.1f} GiB more of free RAM")
    others = system.ram_total_bytes - system.ram_available_bytes - system.ram_evictable_bytes
    close = ": close other programs" if 0 < short <= others - (system.held_bytes or 0) else ""
    return [f"{' with '.join(ways)} would do{close}."] if ways else []


def _gib_up(nbytes: int) -> float:
    """Return GiB, rounded up to a tenth."""
    return ceil(nbytes / GIB * 10) / 10


def longest(workload: Workload, fits: Callable[[Workload], bool]) -> int | None:
    """Return the most frames (4n+1, at most the workload's) that fit at its size, or None."""
    if not fits(replace(workload, num_frames=1)):
        return None
    low, high = 0, (workload.num_frames - 1) // 4  # latent frames after the first
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(workload, num_frames=4 * middle + 1)):
            low = middle
        else:
            high = middle - 1
    return 4 * low + 1


def largest_size(
    workload: Workload,
    multiple: int,
    fits: Callable[[Workload], bool],
    proportions: tuple[int, int] | None = None,
) -> tuple[int, int] | None:
    """Return the largest (width, height) below the workload's that fits.

    All have the workload's proportions, or those given, as (width, height).
    """
    wide, tall = proportions or (workload.width, workload.height)
    sizes = [
        (
            width,
            max(multiple, round(width * tall / wide / multiple) * multiple),
        )
        for width in range(workload.width - multiple, multiple - 1, -multiple)
    ]
    first, last = 0, len(sizes)
    while first < last:
        middle = (first + last) // 2
        width, height = sizes[middle]
        if fits(replace(workload, width=width, height=height)):
            last = middle
        else:
            first = middle + 1
    return sizes[first] if first < len(sizes) else None


def windows_that_fit(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """Name the longest windows in which the whole clip would fit, if any would."""
    found = _windows(workload, fits)
    if found is None:
        return ""
    return (
        f" In windows of {found[0]} frames all {workload.num_frames} would fit: "
        f"max_chunk_size or --window {found[0]}, in ComfyUI WanChunkedSampler."
    )


def _windows(workload: Workload, fits: Callable[[Workload], bool]) -> tuple[int, int] | None:
    for frames in (81, *SHORTER_WINDOWS):
        if frames < (workload.window_frames or workload.num_frames):
            overlap = min(workload.window_overlap, (frames - 1) // 2)
            if fits(replace(workload, window_frames=frames, window_overlap=overlap)):
                return frames, overlap
    return None


def frames_text(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"
