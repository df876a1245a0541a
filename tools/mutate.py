"""Breaks one line at a time and sees whether a test notices: seeded mutants and their survivors.

Run from the repository's root::

    python -m tools.mutate --packages memory --count 60
    python -m tools.mutate --modules plan/timing loading/cache --count 20 --seed 3
    python -m tools.mutate --packages plan memory loading placing --count 300 --jobs 16 \\
        --minutes 8 --results benchmarks/results/mutants
    python -m tools.mutate --packages plan ... --count 300 --shard 2/4 --results FOLDER
    python -m tools.mutate --packages plan memory --since HEAD~20
    python -m tools.mutate --again --wider --jobs 16 --minutes 8 --results FOLDER
    python -m tools.mutate --merge --write --results FOLDER

A mutant is the syntax tree of a module with one change: a comparison, an arithmetic operator, a
number, a boolean, a returned value (None), or a call that is left out. It is put into a copy of the
repository, where the tests that mirror the module run until the first that fails. Tests that fail
without any mutant (something they need is not installed, ...) are run first and left out: they
notice nothing. A mutant that no test notices has survived: a test is missing, or the change makes
no difference (why, is written in ``benchmarks/mutation_reasons.json``).

With ``--since`` only lines are changed that are not as they were at that commit. With
``--results`` every end is written there at once. The same command goes on where the last one
stopped, several machines may each take a shard, and ``--again`` tries what survived once more, with
``--wider`` against the other tests of its package and of a neighbour too. ``--merge`` makes one
table of a folder, and ``--write`` puts it into ``benchmarks/mutation.md``. A ``not_counted.json``
in the folder says of modules why their mutants told nothing where they ran.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from . import mutants
from .mutants import Mutant, choose, lines_since, modules_of, mutant_like, unknown_modules
from .mutation_page import Outcome, read_outcomes, report

REPORT, REASONS = "benchmarks/mutation.md", "benchmarks/mutation_reasons.json"
NOT_COPIED = (".git", ".venv", "output", "build", "__pycache__", "*.pyc", ".*_cache", ".hypothesis")
PACKAGES = (
    "plan", "memory", "loading", "placing", "kernels", "forward", "journal", "job", "formats",
    "models", "detect", "decoding", "loras", "sampling", "workers", "render", "serve",
)  # fmt: skip
NEIGHBOURS = {
    "plan": "memory", "memory": "plan", "loading": "placing", "placing": "loading",
    "kernels": "forward", "forward": "kernels", "journal": "render", "job": "detect",
    "formats": "loading", "models": "detect", "detect": "formats", "decoding": "memory",
    "sampling": "render", "workers": "placing", "render": "sampling", "serve": "render",
}  # fmt: skip
"""The package whose tests use a package most, besides its own: for ``--wider``."""
LIBRARIES: tuple[str, ...] = (
    "torch", "torch._subclasses.fake_tensor", "numpy", "PIL.Image", "safetensors.torch", "av",
    "hypothesis", "psutil", "transformers", "diffusers", "accelerate", "pytest",
    "diffusers.models.transformers.transformer_wan", "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.hooks.group_offloading",
)  # fmt: skip
"""What tests import that is not of this repository, and takes long."""
_WARM = Path(__file__).with_name("warm_tests.py")

MIRRORS: dict[str, tuple[str, ...]] = {
    "detect/build": ("detect/test_detector", "detect/test_single_files"),
    "detect/configs": ("detect/test_detector", "detect/test_folders"),
    "detect/lora_files": ("detect/test_lora_names", "job/test_request", "loras/test_apply"),
    "detect/lora_patches": ("detect/test_lora_names", "loras/test_apply", "loras/test_peft"),
    "forward/block": ("forward/test_transformer", "forward/test_cut", "forward/test_residual"),
    "job/fields": ("job/test_request", "job/test_noise", "job/test_control"),
    "job/steps": ("job/test_control", "job/test_saved_scheduler", "sampling/test_solvers"),
    "job/tensors": ("job/test_control", "job/test_request", "job/test_animate"),
    "loading/blueprint": ("loading/test_blueprint", "loading/test_component", "loading/test_fun"),
    "loading/cache": ("loading/test_promises", "loading/test_cache"),
    "loading/component": ("loading/test_promises", "loading/test_component"),
    "loading/dequantize": ("loading/test_promises", "loading/test_dequantize"),
    "loading/dequantize_kernels": ("loading/test_dequantize", "loading/test_gguf"),
    "loading/mapped": ("loading/test_promises", "loading/test_mapped", "loading/test_component"),
    "loading/moving": (
        "loading/test_promises",
        "placing/test_transport",
        "placing/test_offload",
        "placing/test_streaming",
    ),
    "loading/page_lock": ("loading/test_page_lock", "placing/test_streaming"),
    "loading/quantized": (
        "loading/test_promises",
        "loading/test_quantized",
        "loading/test_dequantize",
        "loading/test_gguf",
    ),
    "loading/tokenizer": ("loading/test_promises", "loading/test_tokenizer"),
    "loading/reader": (
        "loading/test_promises",
        "loading/test_progress",
        "loading/test_component",
        "loading/test_dtypes",
        "loading/test_torch_zip_weights",
        "loading/test_gguf",
    ),
    "placing/ahead": ("placing/test_ahead",),
    "placing/buffers": ("placing/test_streaming",),
    "placing/manager": ("placing/test_applied", "plan/test_manager"),
    "placing/streaming": ("placing/test_ahead", "placing/test_streaming"),
    "placing/transport": ("placing/test_ahead", "placing/test_transport", "placing/test_streaming"),
    "memory/choices": (
        "memory/test_closed_forms",
        "memory/test_stages",
        "plan/test_ladder",
        "memory/test_forward",
    ),
    "memory/forward_lean": ("memory/test_replay", "memory/test_forward", "memory/test_vace"),
    "memory/stages": (
        "memory/test_closed_forms",
        "memory/test_confidence",
        "memory/test_stages",
        "decoding/test_lean::test_the_estimate_of_a_decode_follows_the_plan",
    ),
    "memory/forward": (
        "memory/test_closed_forms",
        "memory/test_replay",
        "memory/test_vace",
        "memory/test_forward",
    ),
    "memory/text": ("memory/test_confidence", "memory/test_stages"),
    "memory/vae": ("memory/test_replay", "memory/test_forward", "memory/test_stages"),
    "memory/vae_lean": (
        "memory/test_replay",
        "decoding/test_lean::test_goals",
        "decoding/test_lean::test_arithmetic_agrees_with_the_dry_run",
        "decoding/test_lean::test_the_estimate_of_a_decode_follows_the_plan",
    ),
    "plan/config": ("plan/test_config", "plan/test_manager"),
    "plan/fits": ("plan/test_fits", "plan/test_manager"),
    "plan/ladder": ("plan/test_ladder", "plan/test_manager"),
    "plan/plan": ("plan/test_ladder", "plan/test_manager"),
    "plan/shortcuts": ("plan/test_speed",),
    "plan/reasons": ("plan/test_reasons", "plan/test_manager"),
}
"""Tests of modules that are not tested in a file of their own name alone: files, or tests in them.
For others that have no such file, all tests of the package run."""


def tests_of(module: str) -> list[str]:
    """Return the test files, or tests in them, that mirror a module."""
    package, _, name = module.partition("/")
    names = MIRRORS.get(module, (f"{package}/test_{name}",))
    named = [one.partition("::") for one in names]
    files = [
        f"tests/{file}.py{mark}{test}"
        for file, mark, test in named
        if (mutants.ROOT / f"tests/{file}.py").is_file()
    ]
    folder = mutants.ROOT / "tests" / package
    return files or [f"tests/{package}/{path.name}" for path in sorted(folder.glob("test_*.py"))]


def wider_tests_of(module: str) -> list[str]:
    """Return the test files of a module's package and of its neighbour, without those above."""
    package = module.partition("/")[0]
    folders = [
        mutants.ROOT / "tests" / name for name in (package, NEIGHBOURS.get(package, package))
    ]
    every = [path for folder in folders for path in sorted(folder.glob("test_*.py"))]
    files = [path.relative_to(mutants.ROOT).as_posix() for path in every]
    return [file for file in dict.fromkeys(files) if file not in tests_of(module)]


# ---------------------------------------------------------------------------------- runs


class _Warm:
    """A process that runs tests of a copy, see ``tools.warm_tests``."""

    def __init__(self, place: Path) -> None:
        self.place = place
        # No byte code: two mutants of one second and size would be taken for one another. No
        # device: many processes would share it, and the tests are those that need none.
        variables = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, str(_WARM), *LIBRARIES], cwd=place, env=variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def pytest(
        self, tests: Sequence[str], seconds: float, *more: str
    ) -> tuple[int | None, list[str]]:
        """Return pytest's exit code, None if it ran out of time, and the tests that failed."""
        arguments = ["-q", "-p", "no:cacheprovider", *tests, "-m", "not gpu and not slow", *more]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(self.place), seconds, arguments]) + "\n")
        self._process.stdin.flush()
        code, _, failed = json.loads(self._process.stdout.readline())
        return code, failed

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class _Usual:
    """What a file of tests does without a mutant."""

    seconds: float
    without: tuple[str, ...]
    """Arguments that leave out what fails."""
    any_left: bool


class Copies:
    """Copies of the repository for so many runs at a time, and what runs without mutants do."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._free: Queue[_Warm] = Queue()
        self._usual: dict[str, Future[_Usual]] = {}
        self._lock = threading.Lock()
        for job in range(jobs):
            place = folder / f"copy{job}"
            shutil.copytree(mutants.ROOT, place, ignore=shutil.ignore_patterns(*NOT_COPIED))
            self._free.put(_Warm(place))

    def close(self) -> None:
        """End the processes; to be called when no run is going on."""
        while not self._free.empty():
            self._free.get().close()

    @contextmanager
    def _one(self) -> Iterator[_Warm]:
        warm = self._free.get()
        try:
            yield warm
        finally:
            self._free.put(warm)

    def usual(self, test: str, warm: _Warm) -> _Usual:
        """Return what a test file does without a mutant; it is run the first time only."""
        with self._lock:
            first = test not in self._usual
            future = self._usual.setdefault(test, Future())
        if first:
            try:
                future.set_result(_without_a_mutant(test, warm))
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()

    def measure(self, test: str) -> None:
        """Run a test file without a mutant, for ``usual``."""
        with self._one() as warm:
            self.usual(test, warm)

    def try_one(self, mutant: Mutant, tests: Sequence[str], until: float) -> Outcome | None:
        """Return a mutant's end, None if its turn came after ``until``."""
        with self._one() as warm:
            if time.monotonic() > until:
                return None
            started = time.monotonic()
            path = warm.place / "wan_core" / f"{mutant.module}.py"
            before = path.read_bytes()
            known = [(test, self.usual(test, warm)) for test in tests]
            left = sorted(  # The quickest first: one of them may be enough.
                ((test, usual) for test, usual in known if usual.any_left),
                key=lambda one: one[1].seconds,
            )
            end, by = "untested", ""
            try:
                path.write_text(mutant.source, encoding="utf-8")
                if left:
                    limit = 30 + 4 * sum(usual.seconds for _, usual in left)
                    without = [argument for _, usual in left for argument in usual.without]
                    names = [test for test, _ in left]
                    code, failed = warm.pytest(names, limit, "-x", *without)
                    by = failed[0] if failed else ""
                    end = "timeout" if code is None else "survived" if code == 0 else "killed"
            finally:
                path.write_bytes(before)
        return Outcome.of(mutant, end, by, time.monotonic() - started)


def _without_a_mutant(test: str, warm: _Warm) -> _Usual:
    """Run one test file, and say what of it is to be left out."""
    started = time.monotonic()
    code, failed = warm.pytest([test], 600)
    seconds = time.monotonic() - started
    without = tuple(f"--deselect={name}" for name in failed)
    # 5: nothing was collected; 2 and others: the file could not be read, or pytest ended early.
    left = code == 0 or (code == 1 and warm.pytest([test], 600, *without)[0] == 0)
    word = "passes" if code == 0 else f"without {len(failed)}" if left else "is left out"
    print(f"{test} {word}: {seconds:.0f} s {' '.join(failed)}", flush=True)
    return _Usual(seconds, without if left else (), left)


def run(chosen: Sequence[Mutant], given: argparse.Namespace, kept: Path | None) -> list[Outcome]:
    """Try mutants, ``given.jobs`` at a time; each end is printed and added to the file ``kept``."""
    until = time.monotonic() + 60 * given.minutes
    tests = {
        module: tests_of(module) + (wider_tests_of(module) if given.wider else [])
        for module in {mutant.module for mutant in chosen}
    }
    every = dict.fromkeys(test for mutant in chosen for test in tests[mutant.module])
    with tempfile.TemporaryDirectory() as folder:
        copies = Copies(Path(folder), given.jobs)
        with ThreadPoolExecutor(max_workers=given.jobs) as pool:
            if given.minutes > 0:
                list(pool.map(copies.measure, every))
            ends = pool.map(lambda one: copies.try_one(one, tests[one.module], until), chosen)
            outcomes = list(_kept(ends, kept))
        copies.close()
    return outcomes


def _kept(ends: Iterable[Outcome | None], path: Path | None) -> Iterator[Outcome]:
    for outcome in ends:
        if outcome is None:
            continue
        print(outcome.printed(), flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(outcome.json() + "\n")
        yield outcome


# --------------------------------------------------------------------------- command line


def _chosen(given: argparse.Namespace, known: Sequence[Outcome]) -> list[Mutant]:
    """Return the mutants to try, in random order, so that those with time are a sample of all."""
    if given.again:
        lived = [outcome for outcome in known if outcome.end == "survived"]
        again = [(outcome, mutant_like(outcome.module, outcome.key)) for outcome in lived]
        chosen = [outcome.again(mutant) for outcome, mutant in again if mutant is not None]
    else:
        modules = [*given.modules, *(m for package in given.packages for m in modules_of(package))]
        lines = lines_since(given.since) if given.since else None
        chosen = choose(modules, given.count, given.seed, lines)
    random.Random(given.seed).shuffle(chosen)
    number, _, shards = given.shard.partition("/")
    chosen = chosen[int(number) - 1 :: int(shards)]
    done = set() if given.again else {outcome.id for outcome in known}
    return [mutant for mutant in chosen if mutant.id not in done]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--packages", nargs="+", default=[], choices=PACKAGES)
    parser.add_argument("--modules", nargs="+", default=[], help='such as "memory/machine"')
    parser.add_argument("--count", type=int, help="how many, drawn by --seed; all without it")
    parser.add_argument("--since", metavar="COMMIT", help="only lines that changed after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin none after these")
    parser.add_argument("--shard", default="1/1", help="of N equal shares the Ith: I/N")
    parser.add_argument("--results", type=Path, help="a folder to keep every end in, and to go on")
    parser.add_argument("--again", action="store_true", help="try the survivors in --results")
    parser.add_argument("--wider", action="store_true", help="with more tests than mirror a module")
    parser.add_argument("--merge", action="store_true", help="try none: the table of --results")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants, print each end and the table; returns 0 whatever survived."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not (given.modules or given.packages or given.again or given.merge):
        parser.error("name --packages or --modules, or --again or --merge with --results")
    if (given.again or given.merge) and given.results is None:
        parser.error("--again and --merge need --results")
    unknown = unknown_modules(given.modules)
    if unknown:
        parser.error(
            f"--modules: wan_core has no {', '.join(unknown)}. A module is named by its package, "
            "such as memory/machine, without .py"
        )
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    known = read_outcomes(given.results) if given.results else []
    if not given.merge:
        kept: Path | None = None
        if given.results:
            kept = given.results / f"{time.time_ns()}.jsonl"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.with_suffix(".txt").write_text(_facts(words), encoding="utf-8")
        found = run(_chosen(given, known), given, kept)
        known = read_outcomes(given.results) if given.results else found
    page = report(known, f"python -m tools.mutate {words}", _reasons(), _not_counted(given.results))
    print(page)
    if given.write:
        (mutants.ROOT / REPORT).write_text(page, encoding="utf-8")
    return 0


def _reasons() -> dict[str, str]:
    path = mutants.ROOT / REASONS
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _not_counted(results: Path | None) -> dict[str, str]:
    """Return why modules are not counted, which a person has written into a folder of results."""
    path = results / "not_counted.json" if results else None
    found: dict[str, str] = (
        json.loads(path.read_text("utf-8")) if path is not None and path.is_file() else {}
    )
    return found


def _facts(words: str) -> str:
    """Return what a run was made with."""
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"python -m tools.mutate {words}", f"Python {sys.version.split()[0]}"]
    for name in ("torch", "diffusers", "transformers", "pytest"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join([*lines, f"{os.cpu_count()} processors"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
