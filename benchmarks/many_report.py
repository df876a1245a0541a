"""What ``many.py`` writes: its rows, and those of an earlier run of which it has none."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any

from many_decode import decode_table

from wan_core.files import atomic_write


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"# One clip on several cards: {found['device']}", "",
        f"`{found['command']}`, {found['date']}, "
        + ", ".join(f"{k} {v}" for k, v in found["versions"].items()), "",
        "| case | cards | step, s | predicted (/ with the pace of runs) | speed-up | "
        "of units / turns | bits | peak, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in rows_of(found, "runs"):
        lines.append(_row(one, base_of(found, one)))
    lines += begin_table(rows_of(found, "runs"))
    lines += decode_table(rows_of(found, "decodes"))
    return "\n".join([*lines, "", *(f"- {note}" for note in found["notes"]), ""])


def _row(one: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Return a run's row; ``base`` is what it is compared with, if that was ever measured."""
    step, cards = one["step_seconds"], max(1, len(one["workers"]))
    gangs = cards // one["gang"]
    shown = f"{gangs} x {one['gang']}" if one["gang"] > 1 else str(cards)
    begin = f"| {one['case']} | {shown} of {one['devices']} |"
    told = f"{one.get('assumed_step_seconds', one['predicted_step_seconds']):.2f}"
    if one.get("predicted_paced"):
        told += f" / {one['predicted_step_seconds']:.2f}"
    peaks = f"{', '.join(map(str, one['peak_mib']))} ({one['predicted_peak_mib']})"
    if step is None:
        return f"{begin} failed | {told} | - | - | {one.get('errors') or 'no step'} | {peaks} |"
    if base is None or base["step_seconds"] is None:
        beside = one.get("beside", one["case"])
        return f"{begin} {step:.2f} | {told} | - | - | no row of {beside} | {peaks} |"
    speed = base["step_seconds"] / step
    ideal = one["gang"] * one["units"] / ceil(one["units"] / gangs)
    ideal /= max(1, len(base["workers"]))  # where that is none on one card
    same = "equal" if one["bits"] == base["bits"] else "OTHER"
    return (
        f"{begin} {step:.2f} | {told} | {speed:.2f} | {speed / ideal:.2f} of {ideal:.2f} | "
        f"{same} | {peaks} |"
    )


def begin_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return what passed until the first step was made, of the rows that were predicted."""
    told = [one for one in rows if one.get("predicted_first_step") and one["first_step_after"]]
    if not told:
        return []
    lines = [
        "", "| until the first step | cards | s | predicted | predicted / measured | of that |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in told:
        parts, took = one["predicted_first_step"], one["first_step_after"]
        whole = sum(parts.values())
        each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds)
        lines.append(
            f"| {one['case']} | {one['devices']} | {took:.1f} | {whole:.1f} | {whole / took:.2f} "
            f"| {each} |"
        )
    return lines


def rows_of(found: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """Return the rows of this run, and those of an earlier one of which it has none."""

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return (one["case"], one.get("devices"))

    measured = [one for one in found[part] if one.get("step_seconds", 0) is not None]
    here = {key(one) for one in measured}
    kept = [one for one in found["kept"].get(part, []) if key(one) not in here]
    here |= {key(one) for one in kept}
    rows = [*measured, *kept, *(one for one in found[part] if key(one) not in here)]
    places = {name: place for place, name in enumerate(found["order"])}
    return sorted(rows, key=lambda one: places.get(one["case"], len(places)))


def base_of(found: dict[str, Any], one: dict[str, Any]) -> dict[str, Any] | None:
    """Return the run that another is compared with: of the same clip, on the fewest cards."""
    beside = one.get("beside", one["case"])
    alike = [base for base in rows_of(found, "runs") if base["case"] == beside]
    return min(alike, key=lambda base: base["devices"], default=None)


def kept_of(found: dict[str, Any], output: Path) -> dict[str, Any]:
    """Return the rows of a report of this device and these versions, if there is one."""
    path = output / f"{file_name(found)}.json"
    if not path.is_file():
        return {}
    old = json.loads(path.read_text())
    if (old["device"], old["versions"]) != (found["device"], found["versions"]):
        return {}
    return {
        part: [{"date": old["date"], **one} for one in old.get(part, [])]
        for part in ("runs", "decodes")
    }


def file_name(found: dict[str, Any]) -> str:
    return "many_" + "_".join(found["device"].lower().split())


def write(found: dict[str, Any], output: Path) -> None:
    name = file_name(found)
    output.mkdir(parents=True, exist_ok=True)
    kept = {part: rows_of(found, part) for part in ("runs", "decodes")}
    plain = {key: value for key, value in found.items() if key not in ("kept", "order")} | kept
    atomic_write(output / f"{name}.json", (json.dumps(plain, indent=1) + "\n").encode())
    atomic_write(output / f"{name}.md", table(found).encode())
