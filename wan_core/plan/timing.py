"""How long a workload takes, roughly: operations over the device's rate, bytes over the bus's.

It is made to compare choices on one machine, where its errors cancel. As a forecast of steps it is
good to a factor of two, until a run on the machine has been measured. What a job does beside its
steps is in ``stage_seconds``. Standard library only.

Operations of a Wan forward with L tokens of width d, per block: 2 per weight and token, 4 L^2 d in
self-attention and 4 L 512 d in cross-attention. Rates: dense half-precision throughput per
multiprocessor and clock (NVIDIA's architecture white papers) times the share that reported runs
reach. One 14B forward at 480x832x81 takes diffusers 3.44 s on an H100 and 3.28 s on an H200 with
cuDNN's attention (``benchmarks/results/speed_h100.md``, ``speed_h200_forward.md``; 4.60 s without
it, huggingface/diffusers issue 11605), two take 30.5 s on a 4090D (LightX2V's README).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from ..config import StageEstimate
from ..memory import (
    Choices,
    Workload,
    kept_of,
    latent_size,
    matrix_kind,
    spread,
    window_latents,
    window_tokens,
    windows_of,
)
from ..models import (
    TEXT_TOKENS,
    ModelArchitecture,
    all_blocks,
    block_count,
    block_parameters,
    computed,
    experts_of,
    fun_parameters,
    magcache_curve,
    magcache_plan,
    part_bytes,
    stored_of,
    vace_block_parameters,
)
from .stage_seconds import DISK, PAGEABLE, Counting, StageSeconds, device_rate

if TYPE_CHECKING:
    from ..memory import SystemResources

_LAYER_LATENCY = 1e-3
"""Seconds per layer that the hooks and the synchronous copy of sequential offload cost. Assumed,
not measured."""
_LAYERS_PER_BLOCK = 14
_CAST_COST = 1.02
"""What taking quantised matrices apart adds to a step: 16 ms (fp8) to 25 ms (Q6_K) a pass of the
14B on an H200 of 1.6 s (``benchmarks/results/dequantise_h200.json``); the reference code without
Triton takes four to fifteen times as long."""
_LEAN_COST, _ROWS_COST = 0.84, 0.91
"""Factors on the compute for the lean forward with fused kernels on CUDA, and for one that cuts
products by rows: 14B, 480p81. The first is 0.83 on an H100 and 0.85 on an H200 (less for the 5B),
the second was measured on the H200 (``benchmarks/results/speed_h200_forward.md``)."""
_UNFUSED_ROWS_COST = 1.04
"""Factor on the compute for products cut by rows without CUDA."""
_EIGHT_BIT_COST = 0.84
"""Factor on the compute for products in fp8, 0.92 for the feed-forwards alone: 14B, 480p81 on an
H200, the same file's."""
_ATTENTION_8BIT_GAIN = 0.23
"""Share of attention's time that our kernel in 8 bit saves on an H200 beside cuDNN's: 29.5 ms
against 38.5 for 32 760 tokens and 40 heads."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one denoising step (the mean over the experts) and of the whole run."""

    step: float
    total: float
    """The whole job as things stand: the sum of its stages' ``warm``."""
    cold: float = 0.0
    """The same in a new process with every file read from the disk."""
    compute_bound: bool = True
    """Whether the transfers of a step hide behind its compute."""
    stages: tuple[StageSeconds, ...] = ()


def forward_operations(
    architecture: ModelArchitecture, workload: Workload, choices: Choices
) -> float:
    """Return the floating-point operations of one pass of the transformer over all windows."""
    return sum(_operations(architecture, workload, choices))


def _operations(
    architecture: ModelArchitecture, workload: Workload, choices: Choices
) -> tuple[float, float]:
    """Return those of the products with weights, and those of attention."""
    shape = architecture.transformer
    frames, height, width = latent_size(architecture, workload)
    window = window_latents(workload, choices, frames)
    tokens = window_tokens(shape, window + workload.references, height, width)
    # Without the text's keys and values, which are few tokens' work.
    each = block_parameters(shape)[0] - 2 * shape.dim**2
    weights = shape.layers * each
    weights += sum(total - 2 * shape.dim**2 for total, _ in vace_block_parameters(shape))
    weights += fun_parameters(shape) if workload.camera else 0
    if shape.face is not None:  # two products each; a face's few tokens and its encoding not
        weights += shape.face.adapters * 2 * shape.dim**2
    seen = tokens
    if shape.animate == 2:  # a frame of the driving stream besides
        seen += window_tokens(shape, shape.patch_size[0], height, width)
    attention = 4.0 * tokens * seen * shape.dim + 4.0 * tokens * TEXT_TOKENS * shape.dim
    times = workload.batch_size * windows_of(workload, choices, frames)
    return 2.0 * weights * tokens * times, block_count(shape) * attention * times


@dataclass(frozen=True, slots=True)
class _Driving:
    """What Animate 2's driving stream costs beside the generated one."""

    whole: float = 0.0
    """Operations of its forward."""
    each: float = 0.0
    """Operations beside each forward, or beside several that run together."""
    sent: int = 0
    """Bytes from RAM beside them."""


def _driving(architecture: ModelArchitecture, workload: Workload, choices: Choices) -> _Driving:
    shape = architecture.transformer
    if not choices.driving:
        return _Driving()
    frames, height, width = latent_size(architecture, workload)
    window = window_latents(workload, choices, frames)
    tokens = window_tokens(shape, window, height, width)
    weights = shape.layers * (block_parameters(shape)[0] - 2 * shape.dim**2)
    attention = 4.0 * tokens * (tokens + TEXT_TOKENS) * shape.dim
    segments = windows_of(workload, choices, frames)
    whole = (2.0 * weights * tokens + shape.layers * attention) * segments
    if choices.driving == "again":
        return _Driving(whole, whole)
    if choices.driving == "kv":
        return _Driving(whole)
    projected = 2.0 * shape.layers * 2 * shape.dim**2 * tokens * segments
    sent = kept_of(architecture, workload, choices)[1]
    return _Driving(whole, projected, sent * segments)


def blocks_share(architecture: ModelArchitecture, workload: Workload, choices: Choices) -> float:
    """Return the share of the passes in which the blocks are computed, with MagCache."""
    job = workload
    curve = magcache_curve(architecture.name, job.width, job.height, job.image)
    if not choices.magcache or curve is None:
        return 1.0
    switch = job.steps if job.high_steps is None else job.high_steps
    skips = magcache_plan(curve, job.steps, switch, choices.magcache)[1]
    return computed(skips) / (2 * job.steps)


def windows_per_step(architecture: ModelArchitecture, workload: Workload, choices: Choices) -> int:
    """Return the windows of one step; streamed weights are transferred anew for each of them."""
    frames, _, _ = latent_size(architecture, workload)
    return windows_of(workload, choices, frames)


def timing(
    architecture: ModelArchitecture, workload: Workload, choices: Choices, system: SystemResources,
    stages: Sequence[StageEstimate] = (),
) -> Timing:  # fmt: skip
    """Return the predicted time of ``workload`` when it is run as ``choices`` say.

    ``stages`` are those of its estimate, which say what is page-locked and what is read ahead.
    """
    dtype = choices.dtypes["transformer"]
    rate = device_rate(system, dtype)
    passes = {
        part: 1 + choices.guidance_gate if each == 2 else 1.0
        for part, each in passes_of(architecture, workload).items()
    }
    # Of a pair each expert is stored in its own way, and computes and is copied as that takes.
    costs = {part: _forward_cost(architecture, part, workload, choices, system) for part in passes}
    driving = _driving(architecture, workload, choices)
    # Streamed blocks compute both passes of guidance beside one driving stream.
    beside = driving.each / (2 if choices.stream and workload.guidance_high else 1)
    seconds = (forward_operations(architecture, workload, choices) + beside) / rate
    seconds *= blocks_share(architecture, workload, choices)
    steps = {
        part: _step(
            architecture, part, workload, choices, system, costs[part] * seconds, passes[part]
        )
        for part in passes
    }
    step = sum(steps.values()) / len(steps)
    bound = step <= seconds * sum(passes[part] * costs[part] for part in passes) / len(passes)
    shares = _steps_of(workload, len(steps))
    whole = {part: step * count for (part, step), count in zip(steps.items(), shares, strict=True)}
    if choices.driving in ("kv", "inputs"):
        whole["transformer"] += costs["transformer"] * driving.whole / rate
    counting = Counting(
        architecture=architecture, workload=workload, choices=choices, system=system, stages=stages
    )
    found = counting.all_stages(whole)
    total, cold = sum(stage.warm for stage in found), sum(stage.cold for stage in found)
    return Timing(step, total, cold, bound, found)


def passes_of(architecture: ModelArchitecture, workload: Workload) -> dict[str, int]:
    """Return how many passes of a window each transformer makes that has steps to make."""
    names = experts_of(architecture)
    if architecture.two_experts:
        names = tuple(name for name in names if name not in workload.idle) or names[:1]
    return {name: 2 if workload.guided(name) else 1 for name in names}


def _steps_of(workload: Workload, experts: int) -> list[float]:
    """Return how many steps each expert makes; half of them each where that is not known."""
    if experts == 2 and workload.high_steps is not None:
        return [workload.high_steps, workload.steps - workload.high_steps]
    return [workload.steps / experts] * experts


def _forward_cost(
    architecture: ModelArchitecture, part: str, workload: Workload, choices: Choices,
    system: SystemResources,
) -> float:  # fmt: skip
    """Return the factor on diffusers' compute that a transformer's forward has as chosen."""
    cost = _CAST_COST if _taken_apart(architecture, part, choices) else 1.0
    cost *= system.calibration.pace
    if system.device_kind != "cuda":
        return cost * (_UNFUSED_ROWS_COST if choices.by_rows else 1.0)
    return cost * _lean_cost(architecture, part, workload, choices)


def _lean_cost(
    architecture: ModelArchitecture, part: str, workload: Workload, choices: Choices
) -> float:
    """Return the factor on diffusers' compute that the lean forward and its kernels have."""
    cost = _ROWS_COST if choices.by_rows else _LEAN_COST if choices.lean else 1.0
    stored = architecture.components[part].stored_as if part in architecture.components else ""
    if choices.eight_bit and choices.lean and matrix_kind(stored, fp8=choices.fp8_storage):
        cost *= _EIGHT_BIT_COST
    if choices.attention_8bit and choices.lean:
        products, attention = _operations(architecture, workload, choices)
        cost -= _ATTENTION_8BIT_GAIN * attention / (products + attention)
    return cost


def _step(
    architecture: ModelArchitecture, part: str, workload: Workload, choices: Choices,
    system: SystemResources, compute: float, passes: float,
) -> float:  # fmt: skip
    """Return the seconds of one step; with streaming, the longer of compute and transfers."""
    how = choices.offload_of("transformer")
    sent = _driving(architecture, workload, choices).sent / system.bus_bytes_per_second
    if how in ("stream", "group"):
        arriving = sent + stream_seconds(architecture, workload, choices, system, passes, part)
        if choices.stream_buffers == 1:  # a block is copied only when the one before is done
            return passes * compute + arriving
        return max(passes * compute, arriving)
    if how != "sequential":
        return passes * max(compute, sent)
    bytes_moved = part_bytes(architecture, part, choices.dtypes["transformer"])
    copy = bytes_moved / _rate(architecture, part, choices, system, PAGEABLE)
    hooks = block_count(architecture.transformer) * _LAYERS_PER_BLOCK * _LAYER_LATENCY
    return passes * (compute + windows_per_step(architecture, workload, choices) * (copy + hooks))


def _taken_apart(architecture: ModelArchitecture, part: str, choices: Choices) -> bool:
    """Whether a transformer's matrices are dequantised at each use."""
    stored = stored_of(architecture, part)
    return choices.fp8_storage or (stored is not None and stored.quantised)


def streamed_bytes(
    architecture: ModelArchitecture, choices: Choices, part: str = "transformer"
) -> int:
    """Return the bytes of a transformer's blocks that are not resident."""
    dtype = choices.dtypes["transformer"]
    blocks = all_blocks(architecture, part, dtype, fp8=choices.fp8_storage)
    stay = set(spread(len(blocks), min(choices.resident_blocks or 0, len(blocks))))
    return sum(nbytes for index, nbytes in enumerate(blocks) if index not in stay)


def stream_seconds(
    architecture: ModelArchitecture, workload: Workload, choices: Choices, system: SystemResources,
    passes: float, part: str = "transformer",
) -> float:  # fmt: skip
    """Return the seconds that the transfers of streamed blocks take in a step of ``passes``."""
    moved = streamed_bytes(architecture, choices, part)
    # With the lean forward each block computes both guidance passes when it has arrived. With
    # diffusers' group offload every pass brings all blocks again.
    trips = 1 if choices.lean else passes
    trips *= windows_per_step(architecture, workload, choices)
    return trips * moved / _rate(architecture, part, choices, system)


def _rate(
    architecture: ModelArchitecture, part: str, choices: Choices, system: SystemResources,
    share: float = 1.0,
) -> float:  # fmt: skip
    """Return the bytes per second at which weights arrive: a share of the bus, or the disk's."""
    bus = system.bus_bytes_per_second * share
    return min(bus, DISK) if reads_from_disk(architecture, choices, system, part) else bus


def reads_from_disk(
    architecture: ModelArchitecture, choices: Choices, system: SystemResources,
    part: str = "transformer",
) -> bool:  # fmt: skip
    """Say whether RAM cannot hold what crosses the bus in a step, and each step reads the file.

    The system's file cache has what the run leaves of RAM. Blocks that stay on the device need no
    place in it once they are there, nor does the other expert.
    """
    dtype = choices.dtypes["transformer"]
    if choices.offload_of("transformer") == "sequential":
        moved = part_bytes(architecture, part, dtype, fp8=choices.fp8_storage)
    else:
        moved = streamed_bytes(architecture, choices, part)
    growth = system.process_ram(("denoise",)) - (system.held_bytes or 0)
    return moved > system.ram_available_bytes + system.ram_evictable_bytes - growth


def blocks_that_hide_the_bus(
    architecture: ModelArchitecture, workload: Workload, choices: Choices, system: SystemResources
) -> int:
    """Return how many resident blocks it takes for the transfers to hide behind the compute.

    The transfers may then take half of the compute's time: both rates are uncertain.
    """
    dtype = choices.dtypes["transformer"]
    compute = forward_operations(architecture, workload, choices) / device_rate(system, dtype)
    compute *= system.calibration.pace
    passes = 1 + (
        workload.guidance_high and (workload.guidance_low or not architecture.two_experts)
    )
    none = replace(choices, resident_blocks=0)
    busy = stream_seconds(architecture, workload, none, system, passes)
    blocks = block_count(architecture.transformer)
    return max(0, ceil(blocks * (1 - passes * compute / (2 * busy))))
