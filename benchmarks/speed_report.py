"""What ``speed.py`` found, as JSON and as a page; where the time of a forward goes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wan_core.files import atomic_write

GIB = 2**30
KINDS = (
    ("attention", r"sdpa|flash_fprop|fmha|attention"),
    ("products", r"nvjet|gemm|cutlass|xmma|cublas"),
)


def split_of(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Return milliseconds on the device by kind of kernel, and the result."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        result = call()
    total = {"attention": 0.0, "products": 0.0, "the rest": 0.0}
    for event in seen.key_averages():
        kind = next((k for k, words in KINDS if re.search(words, event.key, re.I)), "the rest")
        total[kind] += event.self_device_time_total / 1e3
    return total, result


def command(part: str) -> str:
    """Return the command that makes a part."""
    return "python benchmarks/speed.py" + ("" if part == "all" else f" --part {part}")


def write_results(found: dict[str, Any], output: Path) -> None:
    """Write ``speed_<device>``, or of one part ``speed_<device>_<part>``: JSON and Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    name = f"speed_{found['short']}" + ("" if found["part"] == "all" else f"_{found['part']}")
    atomic_write(output / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())
    atomic_write(output / f"{name}.md", as_text(found).encode())


def as_text(found: dict[str, Any]) -> str:
    """Return the results as a page."""
    versions = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    took = f" It took {found['took']:.0f} s." if "took" in found else ""
    lines = [
        "# Speed", "",
        f"{found['device']}; {versions}. `{command(found['part'])}`.{took} True shapes, random "
        "weights, all ways in turn in one run; seconds are medians, ratios medians of the turns' "
        "ratios to diffusers eager. Errors are relative to diffusers, of a VAE to its fp32.",
    ]  # fmt: skip
    for table, title in (("forwards", "One forward"), ("decodes", "VAEs: decodes and encodes")):
        lines += table_of(found[table], title)
    if found["clips"]:
        from clip import clip_lines

        lines += clip_lines(found["clips"])
    lines += splits(found["forwards"])
    if found["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines) + "\n"


def table_of(rows: list[dict[str, Any]], title: str) -> Iterator[str]:
    """Return a table of ways, as lines."""
    if not rows:
        return
    yield from ("", f"## {title}", "", "| case | way | s | ratio | peak GiB | error | first s |")
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        error = "equal bits" if row["equal"] and row["error"] == 0 else f"{row['error']:.1e}"
        yield (
            f"| {row['case']} | {row['way']} | {row['median']:.3f} | {row['ratio']:.3f} | "
            f"{row['peak'] / GIB:.2f} | {error} | {row['first']:.1f} |"
        )


def splits(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Return where the time of forwards goes, as lines.

    The last column is what a way would take if all else took nothing, beside diffusers' time.
    """
    rows = [row for row in rows if row.get("split")]
    if not rows:
        return
    yield from ("", "## Where the time of a forward goes, ms", "")
    yield "| case | way | attention | products | the rest | first two, of diffusers' time |"
    yield "|---|---|---|---|---|---|"
    whole = {row["case"]: sum(row["split"].values()) for row in rows if row["ratio"] == 1}
    for row in rows:
        parts = " | ".join(f"{value:.0f}" for value in row["split"].values())
        floor = (row["split"]["attention"] + row["split"]["products"]) / whole[row["case"]]
        yield f"| {row['case']} | {row['way']} | {parts} | {floor:.3f} |"
