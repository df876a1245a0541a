"""How fast this machine computes now: what bounds in seconds are measured against."""

from __future__ import annotations

import json
import time

REFERENCE_SECONDS = 0.007
"""What ``_work`` takes of a core of the machine on which the bounds were set (AMD EPYC)."""


def pace() -> float:
    """How many times longer than there, at least 1: the factor of a bound in processor seconds."""
    return max(1.0, min(_work() for _ in range(5)) / REFERENCE_SECONDS)


def _work() -> float:
    """Return the processor seconds of what detection is made of: JSON, dicts and strings."""
    began = time.process_time()
    text = json.dumps({f"blocks.{i}.weight": {"shape": [i, 5120]} for i in range(4000)})
    sorted(f"{name}.{value['shape']}" for name, value in json.loads(text).items())
    return time.process_time() - began
