"""Breaks one line at a time and sees whether a test notices: seeded mutants and their survivors.

Run from the repository's root::

    python -m tools.mutate --packages memory --count 60
    python -m tools.mutate --modules plan/timing loading/cache --count 20 --seed 3
    python -m tools.mutate --packages plan memory loading placing --count 300 --write

A mutant is the syntax tree of a module with one change: a comparison, an arithmetic operator, a
number, a boolean, a returned value (None), or a call that is left out. It is put into a copy of the
repository, where the tests that mirror the module run until the first that fails. A mutant that no
test notices has survived: a test is missing, or the change makes no difference (why, is written in
``benchmarks/mutation_reasons.json``). ``--write`` makes ``benchmarks/mutation.md`` of the result.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
REPORT, REASONS = "benchmarks/mutation.md", "benchmarks/mutation_reasons.json"
NOT_COPIED = (".git", ".venv", "output", "__pycache__", "*.pyc", ".*_cache", ".hypothesis")
PACKAGES = ("plan", "memory", "loading", "placing")
LIBRARIES: tuple[str, ...] = (
    "torch", "torch._subclasses.fake_tensor", "numpy", "PIL.Image", "safetensors.torch", "av",
    "hypothesis", "psutil", "transformers", "diffusers", "accelerate", "pytest",
    "diffusers.models.transformers.transformer_wan", "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.hooks.group_offloading",
)  # fmt: skip
"""What tests import that is not of this repository, and takes long."""
_WARM = Path(__file__).with_name("warm_tests.py")

MIRRORS: dict[str, tuple[str, ...]] = {
    "loading/blueprint": ("loading/test_component", "loading/test_dtypes"),
    "loading/dequantize_kernels": ("loading/test_dequantize", "loading/test_gguf"),
    "loading/mapped": ("loading/test_mapped", "loading/test_component"),
    "loading/moving": ("placing/test_offload", "placing/test_streaming", "loading/test_cache"),
    "loading/page_lock": ("placing/test_streaming",),
    "loading/quantized": ("loading/test_dequantize", "loading/test_gguf"),
    "loading/reader": (
        "loading/test_component",
        "loading/test_dtypes",
        "loading/test_torch_zip_weights",
        "loading/test_gguf",
    ),
    "placing/buffers": ("placing/test_streaming",),
    "placing/manager": ("placing/test_applied", "plan/test_manager"),
    "placing/transport": ("placing/test_streaming",),
    "memory/choices": ("memory/test_stages", "plan/test_ladder", "memory/test_forward"),
    "memory/forward_lean": ("memory/test_forward", "memory/test_vace"),
    "memory/stages": (
        "memory/test_stages",
        "forward/test_vae::test_the_estimate_of_a_decode_follows_the_plan",
    ),
    "memory/forward": ("memory/test_replay", "memory/test_vace", "memory/test_forward"),
    "memory/vae": ("memory/test_replay", "memory/test_forward", "memory/test_stages"),
    "memory/vae_lean": (
        "memory/test_replay",
        "forward/test_vae::test_goals",
        "forward/test_vae::test_arithmetic_agrees_with_the_dry_run",
        "forward/test_vae::test_the_estimate_of_a_decode_follows_the_plan",
    ),
    "plan/config": ("plan/test_config", "plan/test_manager"),
    "plan/fits": ("plan/test_fits", "plan/test_manager"),
    "plan/ladder": ("plan/test_ladder", "plan/test_manager"),
    "plan/plan": ("plan/test_ladder", "plan/test_manager"),
    "plan/reasons": ("plan/test_reasons", "plan/test_manager"),
}
"""Tests of modules that are not tested in a file of their own name alone: files, or tests in them.
For others that have no such file, all tests of the package run."""

_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip
_TEXTS = (ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.Set)


@dataclass(frozen=True)
class Site:
    """A place in a syntax tree, and a change to make there."""

    operator: str
    node: ast.AST
    change: Callable[[], None]
    """Makes the change, in the tree that the site was found in."""


@dataclass(frozen=True)
class Mutant:
    """The change at the site with this number in the module."""

    module: str
    number: int
    operator: str
    line: int
    text: str
    """The line of the source."""
    before: str
    after: str
    source: str
    """The whole changed module."""

    @property
    def key(self) -> str:
        """What it is called where reasons are given; line numbers would not last."""
        return f"{self.module}: {self.text}: {self.before} -> {self.after}"


# -------------------------------------------------------------------------------- mutants


def sites(node: ast.AST) -> Iterator[Site]:
    """Find every change in a tree, in the order of the source.

    Left out is what makes no difference to a result: annotations, decorators, documentation, the
    texts of errors, lists of names.
    """
    if _is_passive(node):
        return
    yield from _at(node)
    passive = {"annotation", "returns", "decorator_list", "type_params"}
    for field, value in ast.iter_fields(node):
        if field not in passive:
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, ast.AST):
                    yield from sites(inner)


def _is_passive(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) in ("__all__", "__slots__", "__getattr__")
    if isinstance(node, ast.Expr):  # documentation, also that below a name
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert)


def _at(node: ast.AST) -> Iterator[Site]:
    """Find the changes of one node."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            yield Site("compare", node, _setter(node.ops, index, _COMPARE[type(operator)]()))
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC:
        right = node.right if isinstance(node, ast.BinOp) else node.value
        left = node.left if isinstance(node, ast.BinOp) else node.target
        if not any(map(_is_text, (left, right))):
            new = _ARITHMETIC[type(node.op)]()
            yield Site("arithmetic", node, lambda: setattr(node, "op", new))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield Site("boolean", node, lambda: setattr(node, "op", other))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        twice = ast.UnaryOp(ast.Not(), node.operand)
        yield Site("boolean", node, lambda: setattr(node, "operand", twice))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield Site("boolean", node, lambda: setattr(node, "value", not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        doubled = isinstance(node.value, float) and node.value != 0
        value = node.value * 2 if doubled else node.value + 1
        yield Site("constant", node, lambda: setattr(node, "value", value))
    elif isinstance(node, ast.Return) and node.value is not None and _is_more_than_none(node.value):
        yield Site("return None", node, lambda: setattr(node, "value", ast.Constant(None)))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield Site("drop call", node, lambda: setattr(node, "value", ast.Constant(None)))


def _setter(where: list[ast.cmpop], index: int, new: ast.cmpop) -> Callable[[], None]:
    def change() -> None:
        where[index] = new

    return change


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, _TEXTS) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _is_more_than_none(node: ast.AST) -> bool:
    return not (isinstance(node, ast.Constant) and node.value is None)


def count_of(module: str) -> int:
    """Return how many mutants a module has."""
    return sum(1 for _ in sites(ast.parse(_source(module))))


def mutant_of(module: str, number: int) -> Mutant:
    """Return a mutant of a module ("memory/machine") by its number."""
    source = _source(module)
    tree = ast.parse(source)
    site = list(sites(tree))[number]
    line, before = getattr(site.node, "lineno", 1), _in_context(site.node)
    site.change()
    return Mutant(
        module=module,
        number=number,
        operator=site.operator,
        line=line,
        text=source.splitlines()[line - 1].strip(),
        before=before,
        after=_in_context(site.node),
        source=ast.unparse(ast.fix_missing_locations(tree)),
    )


def _source(module: str) -> str:
    return (ROOT / "wan_core" / f"{module}.py").read_text(encoding="utf-8")


def _in_context(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:90]


def modules_of(package: str) -> list[str]:
    """Return the modules of a package of wan_core, without its face."""
    files = sorted((ROOT / "wan_core" / package).glob("*.py"))
    return [f"{package}/{path.stem}" for path in files if path.stem != "__init__"]


def tests_of(module: str) -> list[str]:
    """Return the test files, or tests in them, that mirror a module."""
    package, _, name = module.partition("/")
    names = MIRRORS.get(module, (f"{package}/test_{name}",))
    named = [one.partition("::") for one in names]
    files = [
        f"tests/{file}.py{mark}{test}"
        for file, mark, test in named
        if (ROOT / f"tests/{file}.py").is_file()
    ]
    folder = ROOT / "tests" / package
    return files or [f"tests/{package}/{path.name}" for path in sorted(folder.glob("test_*.py"))]


def choose(modules: Sequence[str], count: int | None, seed: int) -> list[Mutant]:
    """Return ``count`` mutants of these modules (None: all), the same for the same seed."""
    every = [(module, number) for module in modules for number in range(count_of(module))]
    if count is not None and count < len(every):
        every = sorted(random.Random(seed).sample(every, count))
    return [mutant_of(module, number) for module, number in every]


# ---------------------------------------------------------------------------------- runs


class Copies:
    """Copies of the repository for so many runs at a time, and what a run without mutant takes."""

    def __init__(self, folder: Path, jobs: int, usual: float | None = None) -> None:
        self._usual = usual
        self._free: Queue[_Warm] = Queue()
        self._seconds: dict[tuple[str, ...], float] = {}
        self._measuring = threading.Lock()
        for job in range(jobs):
            place = folder / f"copy{job}"
            shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*NOT_COPIED))
            self._free.put(_Warm(place))

    def close(self) -> None:
        """End the processes; to be called when no run is going on."""
        while not self._free.empty():
            self._free.get().close()

    def _usual_seconds(self, warm: _Warm, tests: tuple[str, ...]) -> float:
        """Return what tests take without a mutant; ends the program if they fail."""
        if self._usual is not None:
            return self._usual
        with self._measuring:
            if tests not in self._seconds:
                started = time.monotonic()
                code, output = warm.pytest(tests, 3600)
                if code != 0:
                    sys.exit(f"{' '.join(tests)} fail without any mutant:\n{output[-3000:]}")
                self._seconds[tests] = time.monotonic() - started
                print(f"{' '.join(tests)}: {self._seconds[tests]:.0f} s", flush=True)
            return self._seconds[tests]

    def try_one(self, mutant: Mutant, until: float) -> str:
        """Return a mutant's end: "killed", "timeout", "survived", or "not run" after ``until``."""
        tests = tuple(tests_of(mutant.module))
        warm = self._free.get()
        path = warm.place / "wan_core" / f"{mutant.module}.py"
        before = path.read_bytes()
        try:
            if time.monotonic() > until:
                return "not run"
            usual = self._usual_seconds(warm, tests)
            path.write_text(mutant.source, encoding="utf-8")
            code, _ = warm.pytest(tests, 60 + 4 * usual)
        finally:
            path.write_bytes(before)
            self._free.put(warm)
        return "timeout" if code is None else "survived" if code == 0 else "killed"


class _Warm:
    """A process that runs tests of a copy, see ``tools.warm_tests``."""

    def __init__(self, place: Path) -> None:
        self.place = place
        # No byte code: two mutants of one second and size would be taken for one another.
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(_WARM), *LIBRARIES], cwd=place, env=variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def pytest(self, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Return the exit code of pytest, None if it ran out of time, and what it printed."""
        arguments = ["-x", "-q", "-p", "no:cacheprovider", *tests, "-m", "not gpu and not slow"]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(self.place), seconds, arguments]) + "\n")
        self._process.stdin.flush()
        code, output = json.loads(self._process.stdout.readline())
        return code, output

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# -------------------------------------------------------------------------------- report


def report(results: Sequence[tuple[Mutant, str]], command: str, reasons: dict[str, str]) -> str:
    """Format the outcome as a page: a row per package, and every survivor with its reason."""
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
    packages = sorted({mutant.module.partition("/")[0] for mutant, _ in results})
    for package in [*packages, "all"]:
        ends = [end for mutant, end in results if package in ("all", *mutant.module.split("/")[:1])]
        late, lived = ends.count("timeout"), ends.count("survived")
        share = f"{(len(ends) - lived) / len(ends):.0%}" if ends else "-"
        lines.append(
            f"| {package} | {len(ends)} | {len(ends) - lived} | {late} | {lived} | {share} |"
        )
    lines += ["", "| operator | mutants | survived |", "|---|---|---|"]
    for operator in sorted({mutant.operator for mutant, _ in results}):
        ends = [end for mutant, end in results if mutant.operator == operator]
        lines.append(f"| {operator} | {len(ends)} | {ends.count('survived')} |")
    lines += ["", "## Survivors", ""]
    for mutant, end in results:
        if end == "survived":
            why = reasons.get(mutant.key, "*a test is missing*")
            lines.append(
                f"- `{mutant.module}.py:{mutant.line}`, `{mutant.text}`: `{mutant.before}` → "
                f"`{mutant.after}` ({mutant.operator}). {why}"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants, print each survivor and the table; returns 0 whatever survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--packages", nargs="+", default=[], choices=PACKAGES)
    parser.add_argument("--modules", nargs="+", default=[], help='such as "memory/machine"')
    parser.add_argument("--count", type=int, help="how many, drawn by --seed; all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin none after these")
    parser.add_argument(
        "--usual",
        type=float,
        help="the tests are known to pass within so many seconds: do not run them without a mutant",
    )
    parser.add_argument("--write", action="store_true", help=f"write {REPORT}")
    given = parser.parse_args(arguments)
    modules = [*given.modules, *(m for package in given.packages for m in modules_of(package))]
    if not modules:
        parser.error("name --packages or --modules")
    chosen = choose(modules, given.count, given.seed)
    with tempfile.TemporaryDirectory() as folder:
        copies = Copies(Path(folder), given.jobs, given.usual)
        until = time.monotonic() + 60 * given.minutes
        # In random order, so that those for which there is time are a sample of all.
        random.Random(given.seed).shuffle(chosen)
        with ThreadPoolExecutor(max_workers=given.jobs) as pool:
            results = []
            for mutant, end in zip(
                chosen, pool.map(lambda one: copies.try_one(one, until), chosen), strict=True
            ):
                if end != "not run":
                    results.append((mutant, end))
                    where = f"{mutant.module}.py:{mutant.line}"
                    print(f"{end:8} {where} {mutant.before} -> {mutant.after}", flush=True)
        copies.close()
    results.sort(key=lambda result: (result[0].module, result[0].number))
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    known = ROOT / REASONS
    reasons = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    page = report(results, f"python -m tools.mutate {words}", reasons)
    print(page)
    if given.write:
        (ROOT / REPORT).write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
