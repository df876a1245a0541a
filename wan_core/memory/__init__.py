"""How many bytes each stage of a render needs, and what this computer has.

In: a ``ModelArchitecture``, a ``Workload`` and the plan's ``Choices``. Out: a ``MemoryEstimate``;
``SystemResources``, which describe the machine; ``Calibrations``, which keep what earlier runs
measured. Estimates are pure arithmetic; torch is imported only to ask the device for its memory.
"""

from __future__ import annotations

from .calibration import ATTENTION_8BIT, AttentionTimes, Calibrations, RunRecord, forward_name
from .cards import (
    FASTEST,
    Between,
    Card,
    CardRecords,
    Link,
    Trial,
    all_cards,
    cut_kind,
    link_name,
)
from .choices import (
    MATRIX_UNITS,
    STREAM_BUFFERS,
    Choices,
    Workload,
    latent_size,
    matrix_kind,
    seen_latents,
    spread,
    window_latents,
    windows_of,
)
from .forward import text_encoder_peak, transformer_peak, window_tokens
from .forward_driven import DRIVING_WAYS, driven_peak, kept_bytes, kept_of
from .forward_lean import LEAN_HEAD_GROUPS, LEAN_ROWS, lean_peak
from .machine import (
    RAM_RESERVE,
    SystemResources,
    close_gaps,
    pinned_budget_now,
    ram,
    system_resources,
)
from .process import RING, SENDING, process_bytes, stage_was_run, tokenizer_was_made
from .stages import estimate, reserved_bytes
from .strips import COLUMNS, ROWS, Strip, strips_cost, strips_of
from .text import format_estimate
from .vae import CHUNKS, decode_peak, encode_peak
from .vae_lean import BANDS, lean_decode_bytes, lean_encode_bytes

Job = Workload
"""The old name of ``Workload``, kept for one release."""

__all__ = [
    "ATTENTION_8BIT",
    "AttentionTimes",
    "BANDS",
    "Between",
    "CHUNKS",
    "COLUMNS",
    "Calibrations",
    "Card",
    "CardRecords",
    "Choices",
    "DRIVING_WAYS",
    "FASTEST",
    "Job",
    "LEAN_HEAD_GROUPS",
    "LEAN_ROWS",
    "Link",
    "MATRIX_UNITS",
    "RAM_RESERVE",
    "RING",
    "ROWS",
    "RunRecord",
    "SENDING",
    "STREAM_BUFFERS",
    "Strip",
    "SystemResources",
    "Trial",
    "Workload",
    "all_cards",
    "close_gaps",
    "cut_kind",
    "decode_peak",
    "driven_peak",
    "encode_peak",
    "estimate",
    "format_estimate",
    "forward_name",
    "kept_bytes",
    "kept_of",
    "latent_size",
    "link_name",
    "lean_decode_bytes",
    "lean_encode_bytes",
    "lean_peak",
    "matrix_kind",
    "pinned_budget_now",
    "process_bytes",
    "ram",
    "reserved_bytes",
    "seen_latents",
    "spread",
    "stage_was_run",
    "strips_cost",
    "strips_of",
    "system_resources",
    "text_encoder_peak",
    "tokenizer_was_made",
    "transformer_peak",
    "window_latents",
    "window_tokens",
    "windows_of",
]
