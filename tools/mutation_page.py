"""What became of mutants, as kept in a folder, and the page that tells of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .mutants import Mutant


@dataclass(frozen=True)
class Outcome:
    """A mutant's end."""

    id: str
    module: str
    operator: str
    line: int
    text: str
    before: str
    after: str
    end: str
    """"killed", "timeout", "survived", or "untested" where no test of the module passes here."""
    by: str
    """The test that failed; empty where none did, or pytest itself broke off."""
    seconds: float

    @staticmethod
    def of(mutant: Mutant, end: str, by: str, seconds: float) -> Outcome:
        """Return the end of this mutant."""
        return Outcome(
            id=mutant.id, module=mutant.module, operator=mutant.operator, line=mutant.line,
            text=mutant.text, before=mutant.before, after=mutant.after, end=end, by=by,
            seconds=round(seconds, 1),
        )  # fmt: skip

    @property
    def key(self) -> str:
        """As ``Mutant.key``."""
        return f"{self.module}: {self.text}: {self.before} -> {self.after}"

    def again(self, mutant: Mutant) -> Mutant:
        """Return the same change in the module as it is now, under the name it had before."""
        _, number, digest = self.id.split("#")
        return replace(mutant, number=int(number), digest=digest)

    @property
    def place(self) -> str:
        """Where it is."""
        return f"{self.module}.py:{self.line}"

    def json(self) -> str:
        """Return a line for a file of outcomes."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def printed(self) -> str:
        """Return a line for a person."""
        by = f"  by {self.by}" if self.by else ""
        return f"{self.end:8} {self.place} {self.before} -> {self.after}{by}"


def read_outcomes(folder: Path) -> list[Outcome]:
    """Return what the files of a folder tell, in the order of the source; of two ends the later."""
    found: dict[str, Outcome] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            outcome = Outcome(**json.loads(line))
            found[outcome.id] = outcome
    return in_order(found.values())


def in_order(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Sort outcomes by module and place."""
    return sorted(outcomes, key=lambda one: (one.module, int(one.id.split("#")[1])))


def _rate(ends: Sequence[str]) -> str:
    late, lived, untested = map(ends.count, ("timeout", "survived", "untested"))
    tried = len(ends) - untested
    share = f"{(tried - lived) / tried:.0%}" if tried else "-"
    return f"{tried} | {tried - lived} | {late} | {lived} | {share} |"


def report(
    outcomes: Sequence[Outcome],
    command: str,
    reasons: Mapping[str, str],
    not_counted: Mapping[str, str] | None = None,
) -> str:
    """Format outcomes as a page: a row per package, and every survivor with its reason.

    ``not_counted`` says of a module why its mutants tell nothing; they are named, and in no row.
    """
    left_out = dict(not_counted or {})
    aside = [one for one in outcomes if one.module in left_out]
    outcomes = in_order(one for one in outcomes if one.module not in left_out)
    lines = [
        "# Mutants that tests noticed",
        "",
        f"Made by `{command}`. A mutant is one change in one module; the tests that mirror the",
        "module run until one fails. What survived is listed with the reason why it may, or with",
        "*a test is missing*.",
        "",
        "| package | mutants | killed | of them by time | survived | killed |",
        "|---|---|---|---|---|---|",
    ]
    packages = sorted({one.module.partition("/")[0] for one in outcomes})
    for package in [*packages, "all"]:
        ends = [one.end for one in outcomes if package in ("all", one.module.split("/")[0])]
        lines.append(f"| {package} | {_rate(ends)}")
    lines += ["", "| operator | mutants | killed | of them by time | survived | killed |"]
    lines += ["|---|---|---|---|---|---|"]
    for operator in sorted({one.operator for one in outcomes}):
        ends = [one.end for one in outcomes if one.operator == operator]
        lines.append(f"| {operator} | {_rate(ends)}")
    untested = sorted({one.module for one in outcomes if one.end == "untested"})
    if untested:
        lines += ["", f"No test passed where these ran, and they are not counted: {untested}."]
    for module in sorted({one.module for one in aside}):
        ends = [one.end for one in aside if one.module == module]
        lines += [
            "",
            f"Not counted: {len(ends)} mutants of `{module}`, of which {ends.count('survived')} "
            f"survived: {left_out[module]}",
        ]
    lines += ["", "## Survivors", ""]
    for one in outcomes:
        if one.end == "survived":
            why = reasons.get(one.key, "*a test is missing*")
            lines.append(
                f"- `{one.place}`, `{one.text}`: `{one.before}` → `{one.after}` "
                f"({one.operator}). {why}"
            )
    return "\n".join(lines) + "\n"
