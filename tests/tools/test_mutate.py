"""The mutation runner: what it changes and leaves alone, and what it says of a mutant's end."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tools import mutate
from tools.mutate import MIRRORS, PACKAGES, choose, modules_of, sites
from tools.mutate import tests_of as files_of

CHANGES = [
    ("compare", "x < 1", ["x <= 1", "x < 2"]),
    ("compare", "a is b in c", ["a is not b in c", "a is b not in c"]),
    ("arithmetic", "a + b * c", ["a - b * c", "a + b / c"]),
    ("arithmetic", "a // b", ["a * b"]),
    ("arithmetic", "x += y", ["x -= y"]),
    ("constant", "f(3, 0.5)", ["None", "f(4, 0.5)", "f(3, 1.0)"]),
    ("boolean", "a and b", ["a or b"]),
    ("boolean", "a or not b", ["a and (not b)", "a or not not b"]),
    ("boolean", "x = True", ["x = False"]),
    ("return None", "def f():\n    return a", ["def f():\n    return None"]),
    ("drop call", "a.b()", ["None"]),
]
ALONE = [
    '"""Text."""',
    "x: int",
    "raise E(1 + 2, not a)",
    "assert a < b",
    "f'{a + 1}'",
    "import a",
    "__all__ = ['a', 1]",
    "if TYPE_CHECKING:\n    x = 1",
    "'a' + b",
    "[a] + b",
    "def f():\n    return None",
    "@cache(maxsize=5)\ndef f(a: Literal[1]) -> Literal[2]:\n    '''Text.'''",
]


def changed(code: str) -> list[str]:
    found = []
    for number in range(len(list(sites(ast.parse(code))))):
        tree = ast.parse(code)
        list(sites(tree))[number].change()
        found.append(ast.unparse(ast.fix_missing_locations(tree)))
    return found


@pytest.mark.parametrize(("operator", "code", "expected"), CHANGES)
def test_each_operator(operator: str, code: str, expected: list[str]) -> None:
    assert changed(code) == expected
    assert operator in {site.operator for site in sites(ast.parse(code))}


@pytest.mark.parametrize("code", ALONE)
def test_what_makes_no_difference_is_left_alone(code: str) -> None:
    assert changed(code) == []


def test_every_mutant_is_another_program() -> None:
    for mutant in choose(["memory/choices", "plan/fits"], None, 0):
        original = ast.unparse(ast.parse(mutate._source(mutant.module)))
        assert mutant.source != original
        assert mutant.before != mutant.after
        compile(mutant.source, mutant.module, "exec")


def test_a_seed_gives_the_same_mutants() -> None:
    modules = modules_of("memory")
    first = choose(modules, 12, seed=4)
    assert first == choose(modules, 12, seed=4) and len(first) == 12
    assert first != choose(modules, 12, seed=5)


def test_every_module_has_tests() -> None:
    known = [module for package in PACKAGES for module in modules_of(package)]
    assert set(MIRRORS) <= set(known)
    for module in known:
        files = files_of(module)
        assert files and all((mutate.ROOT / path.partition("::")[0]).is_file() for path in files)
    assert files_of("memory/machine") == ["tests/memory/test_machine.py"]


MODULE = """
import time

def larger(a, b):
    return a if a > b else b

def wait(done=True):
    while not done:
        time.sleep(0.05)
"""
TESTS = """
from wan_core.memory.thing import larger, wait

def test_larger():
    assert larger(1, 2) == 2
    wait()
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one module, one test of it, and no settings."""
    root = tmp_path / "root"
    for path, text in {
        "wan_core/__init__.py": "",
        "wan_core/memory/__init__.py": "",
        "wan_core/memory/thing.py": MODULE,
        "tests/memory/test_thing.py": TESTS,
        "benchmarks/keep": "",
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['gpu: x']\npythonpath = ['.']\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.setattr(mutate, "ROOT", root)
    monkeypatch.setattr(mutate, "LIBRARIES", ("pytest",))
    return root


def test_killed_survived_and_endless(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def limited(warm: Any, tests: Any, seconds: float) -> tuple[int | None, str]:
        return original(warm, tests, 5)

    original = mutate._Warm.pytest
    monkeypatch.setattr(mutate._Warm, "pytest", limited)
    key = "memory/thing: return a if a > b else b: a > b -> a >= b"
    (small / "benchmarks/mutation_reasons.json").write_text(f'{{"{key}": "Equal is equal."}}')
    arguments = ["--modules", "memory/thing", "--jobs", "2", "--write"]
    assert mutate.main(arguments) == 0
    printed = capsys.readouterr().out
    ends = {
        line.split(maxsplit=2)[2]: line.split()[0]
        for line in printed.splitlines()
        if line.startswith(("killed", "survived", "timeout"))
    }
    assert ends == {
        "a > b -> a >= b": "survived",
        "return a if a > b else b -> return None": "killed",
        "True -> False": "timeout",
        "not done -> not not done": "timeout",
        "time.sleep(0.05) -> None": "survived",
        "0.05 -> 0.1": "survived",
    }
    page = (small / "benchmarks/mutation.md").read_text()
    assert "| memory | 6 | 3 | 2 | 3 | 50% |" in page
    assert "`return a if a > b else b`: `a > b` → `a >= b` (compare). Equal is equal." in page
    assert page.count("*a test is missing*") == 3  # the explanation, and two survivors
    assert "python -m tools.mutate --modules memory/thing --jobs 2 --write" in page
    assert (small / "wan_core/memory/thing.py").read_text() == MODULE, "only copies are changed"


def test_tests_that_fail_anyway_tell_nothing(small: Path) -> None:
    (small / "tests/memory/test_thing.py").write_text("def test(): assert 0")
    with pytest.raises(SystemExit, match="fail without any mutant"):
        mutate.main(["--modules", "memory/thing"])


def test_none_is_begun_after_the_time_is_up(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutate.main(["--modules", "memory/thing", "--minutes", "-1"]) == 0
    assert "| all | 0 | 0 | 0 | 0 | - |" in capsys.readouterr().out
