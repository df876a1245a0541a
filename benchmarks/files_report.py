"""What ``files_people_have`` found, as figures beside their goals and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_memory import GIB, mib, number, short_name

Row = dict[str, Any]
RATIOS = {"fp8_scaled": 1.02, "int8_convrot": 1.02, "Q8_0": 1.02, "Q4_K": 1.04}
"""Goals: seconds of a guided step as stored, over those of the weights dequantised at load."""
SHARES = {"fp8_scaled": 0.02, "int8_convrot": 0.02, "Q8_0": 0.02, "Q4_K": 0.04}


def errors(found: Row, predicted: str, measured: str) -> list[tuple[float, str]]:
    """Return (predicted / measured - 1, where) of all stages that have both, the lowest first."""
    return sorted(
        (stage[predicted] / stage[measured] - 1, f"{run['case']}, {stage['name']}")
        for run in found["runs"]
        for stage in run["stages"]
        if stage.get(predicted) and stage.get(measured)
    )


def host_errors(found: Row) -> list[tuple[float, str]]:
    """Return the same of the RAM that each run took at most, and that its largest stage should.

    What is short of RAM fails at the peak. A stage by itself may differ more: a run of one step
    ends before the next expert's blocks are locked, which the stage counts.
    """
    rows = []
    for run in found["runs"]:
        told = [stage for stage in run["stages"] if stage.get("predicted_host")]
        most = max((stage.get("host") or 0 for stage in run["stages"]), default=0)
        if told and most:
            rows.append((max(s["predicted_host"] for s in told) / most - 1, run["case"]))
    return sorted(rows)


def p95(values: list[float]) -> float | None:
    """Return the value that 95 of 100 do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(0.95 * len(ordered)) - 1)] if ordered else None


def same_latents(runs: list[Row]) -> tuple[int, bool] | None:
    """Return how many runs of a kind there are, and whether their latents are equal bit for bit.

    Runs are compared step by step, as far as both went.
    """
    told = [run["latents"] for run in runs if run["latents"]]
    if len(told) < 2:
        return None
    steps = max(map(len, told))
    return len(told), all(
        len({latents[step] for latents in told if len(latents) > step}) == 1
        for step in range(steps)
    )


def goals(found: Row) -> Iterator[tuple[str, str, str]]:
    """Yield (what, figure, goal) for all that was measured."""
    for row in found["layers"]:
        kind = row["kind"]
        if "ratio" in row:
            yield (
                f"{kind}: step as stored / dequantised at load",
                number(row["ratio"], 4),
                (f"<= {RATIOS[kind]}"),
            )
            yield (
                f"{kind}: share of a step that takes weights apart",
                number(row["share"], 4),
                (f"<= {SHARES[kind]}"),
            )
            same = "equal" if row["equal"] else f"differ by {row['difference']:.1e}"
            yield f"{kind}: outputs beside dequantised at load", same, "equal"
        yield f"{kind}: RAM while loading and sending, in blocks", (
            number(row["host"] / row["block"], 2)
        ), "<= 1"  # fmt: skip
        yield f"{kind}: step streamed / resident", number(row["streamed_ratio"], 4), "<= 1.05"
        yield f"{kind}: outputs streamed beside resident", (
            "equal" if row["streamed_equal"] else "differ"
        ), "equal"  # fmt: skip
    for row in found["loads"]:
        yield f"{row['kind']}: load and send, over reading the file once ({row['file']})", (
            number(row["ratio"], 2)
        ), "<= 1.2"  # fmt: skip
    kinds = dict.fromkeys(run["kind"] for run in found["runs"])
    for kind in kinds:
        same = same_latents([run for run in found["runs"] if run["kind"] == kind])
        if same is not None:
            yield f"{kind}: latents of {same[0]} runs under caps", (
                "equal" if same[1] else "differ"
            ), "equal"  # fmt: skip
    for what, whose, rows in (
        ("device", "stages", errors(found, "predicted", "allocated")),
        ("RAM", "runs", host_errors(found)),
        ("RAM", "stages", errors(found, "predicted_host", "host")),
    ):
        if rows:
            yield f"{what}: P95 of the {whose}' error", (
                number(p95([abs(error) for error, _ in rows]), 4)
            ), "<= 0.05"  # fmt: skip
            yield f"{what}, {whose}: most under ({rows[0][1]})", number(rows[0][0], 4), ">= -0.02"
            yield f"{what}, {whose}: most over ({rows[-1][1]})", number(rows[-1][0], 4), ""
    ratios = ((seconds_ratio(run), run["case"]) for run in found["runs"])
    told = sorted((ratio, case) for ratio, case in ratios if ratio is not None)
    if told:
        yield f"seconds, runs: predicted / measured at least ({told[0][1]})", (
            number(told[0][0])
        ), ">= 0.6"  # fmt: skip
        yield f"seconds, runs: predicted / measured at most ({told[-1][1]})", (
            number(told[-1][0])
        ), "<= 1.6"  # fmt: skip
    failed = sum(run["out_of_memory"] + (not run["success"]) for run in found["runs"])
    yield "runs out of memory or failed", str(failed), "0"
    for run in found["runs"]:
        held = [stage["reserved"] for stage in run["stages"] if stage.get("reserved")]
        if held:
            most = max(held) / GIB + (run["context_mib"] or 0) / 1024
            yield (
                f"{run['case']}: GiB held at most, context included",
                number(most, 2),
                (f"<= {run['cap']:g}"),
            )


def seconds_ratio(run: Row) -> float | None:
    """Return predicted over measured seconds; None of earlier runs, which left out other things."""
    return run["predicted_seconds"] / run["seconds"] if "outside_seconds" in run else None


def layer_lines(found: Row) -> list[str]:
    """Return the table of transformers by themselves."""
    lines = [
        "| kind | file GB | file | load s | to the device s | RAM while loading MiB | MiB with "
        "sending | guided pair s | dequantised at load s | ratio | taking apart ms | share of the "
        "step | bits | streamed s | ratio | blocks locked |",
        "|---" * 16 + "|",
    ]
    for row in found["layers"]:
        apart = row.get("dequantise_seconds")
        bits = "-" if "equal" not in row else "equal" if row["equal"] else "differ"
        plain = ", ".join(f"{s:.3f}" for s in row["plain_seconds"])
        lines.append(
            f"| {row['kind']} | {row['bytes'] / 1e9:.2f} | {row['file']} "
            f"| {row['load_seconds']:.2f} | {row['move_seconds']:.2f} | {mib(row['load_host'])} "
            f"| {mib(row['host'])} | {row['pair_seconds']:.3f} | {plain} "
            f"| {number(row.get('ratio'), 4)} | {number(apart and apart * 1e3, 1)} "
            f"| {number(row.get('share'), 4)} | {bits} | {row['streamed_seconds']:.3f} "
            f"| {number(row['streamed_ratio'], 4)} | {row['pinned_blocks']} |"
        )
    return lines


def run_lines(found: Row) -> list[str]:
    """Return the tables of runs, and of their stages."""
    bf16 = next((r["pair_seconds"] for r in found["layers"] if r["kind"] == "bf16"), None)
    plain = {r["kind"]: min(r["plain_seconds"]) for r in found["layers"]}
    lines = [
        "| run | as planned | device MiB predicted | measured | RAM MiB predicted | measured "
        "| whole s | predicted | predicted / measured | begun | guided steps s | predicted "
        "| over resident | RAM capped by |", "|---" * 14 + "|",
    ]  # fmt: skip
    for run in found["runs"]:
        stages = [stage for stage in run["stages"] if "predicted" in stage]
        device = [max((s[k] or 0 for s in stages), default=0) for k in ("predicted", "allocated")]
        host = max((s["host"] for s in run["stages"]), default=None)
        resident = bf16 or plain.get(run["kind"])
        over = run["steps"] and resident and min(run["steps"]) / resident
        lines.append(
            f"| {run['case']} | {', '.join(run['applied'])} | {mib(device[0])} | {mib(device[1])} "
            f"| {mib(run['predicted_host'])} | {mib(host)} | {run['seconds']:.1f} "
            f"| {run['predicted_seconds']:.1f} "
            f"| {number(seconds_ratio(run))} | {run['file']} "
            f"| {', '.join(f'{s:.2f}' for s in run['steps'])} "
            f"| {run['predicted_step_seconds']:.2f} | {number(over or None)} "
            f"| {run.get('ram_by', '-')} |"
        )
    lines += [
        "", "| run | stage | device MiB predicted | allocated | error | reserved | RAM MiB "
        "predicted | measured | error | page-locked | mapped | s | predicted "
        "| predicted / measured |", "|---" * 14 + "|",
    ]  # fmt: skip
    for run in found["runs"]:
        for stage in run["stages"]:
            lines.append(f"| {run['case']} | {stage['name']} | {_stage_cells(stage)} |")
        if "outside_seconds" in run:
            took, told = run["outside_seconds"], run["predicted_outside_seconds"]
            empty = " | -" * 9
            lines.append(f"| {run['case']} | outside of them{empty} | {_seconds(took, told)} |")
    return lines


def _seconds(took: float, told: float | None) -> str:
    """Return measured seconds, predicted ones and their ratio; earlier runs have none predicted."""
    ratio = number(told / took) if told and took > 0.005 else "-"
    return f"{took:.2f} | {number(told)} | {ratio}"


def _stage_cells(stage: Row) -> str:
    def error(predicted: str, measured: str) -> str:
        told, seen = stage.get(predicted), stage.get(measured)
        return f"{told / seen - 1:+.1%}" if told and seen else "-"

    cells = [
        mib(stage.get("predicted")), mib(stage.get("allocated")), error("predicted", "allocated"),
        mib(stage.get("reserved")), mib(stage.get("predicted_host")), mib(stage.get("host")),
        error("predicted_host", "host"), mib(stage.get("locked")), mib(stage.get("mapped")),
        _seconds(stage["seconds"], stage.get("predicted_seconds")),
    ]  # fmt: skip
    return " | ".join(cells)


def report(found: Row) -> str:
    """Return the whole as Markdown."""
    told = found["machine"]
    lines = [
        "# Files people have", "",
        f"Measured {told['date']} on {told['device']} by `python benchmarks/files_people_have.py`: "
        + ", ".join(f"{k} {v}" for k, v in told.items() if k not in ("date", "device")) + ".", "",
        "Wan 2.2 T2V-A14B of true shape with random weights, in the layouts that are published; "
        "832x480, 81 frames; text encoder umT5-XXL in scaled fp8. RAM is anonymous and page-locked "
        "memory, the interpreter's included; pages of mapped files are not counted. A step is a "
        "guided pair of passes.", "",
        "| what | figure | goal |", "|---|---|---|",
        *(f"| {what} | {figure} | {goal} |" for what, figure, goal in goals(found)), "",
        "## The transformer by itself", "", *layer_lines(found), "",
        "## Clips under caps", "",
        "Stages with the loading before them; a run that ends after a step makes no frames. "
        "Predicted seconds are those with the files where they were, and what a run leaves out is "
        "not among them; outside of the stages lie the tokenizer and page locks that are given "
        "back. Rows of earlier runs have whole seconds alone, which others were predicted for.", "",
        *run_lines(found), "",
    ]  # fmt: skip
    problems = [text for run in found["runs"] for text in run["errors"] + run["warnings"]]
    written = [
        f"{row['kind']}: {row['bytes'] / 1e9:.2f} GB written in {row['write_seconds']:.1f} s"
        for row in found["files"]
    ]
    lines += [f"- {text}" for text in found["notes"] + written + list(dict.fromkeys(problems))]
    return "\n".join([*lines, ""])


def write_results(found: Row | None, output: Path, machine: Row | None = None) -> Path:
    """Write what was found, if anything; return the path of the JSON file."""
    told = machine if found is None else found["machine"]
    assert told is not None
    path = output / f"files_people_have_{short_name(told['device'])}.json"
    if found is not None:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(report(found))
    return path
