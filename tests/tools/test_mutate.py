"""The mutation runner: what it changes and leaves alone, and what it says of a mutant's end."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tools import mutants, mutate
from tools.mutants import choose, modules_of, mutant_like, mutant_of, sites
from tools.mutate import MIRRORS, PACKAGES, wider_tests_of
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
    "_log.info('%s', 1)",
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
        original = ast.unparse(ast.parse(mutants._source(mutant.module)))
        assert mutant.source != original
        assert mutant.before != mutant.after
        compile(mutant.source, mutant.module, "exec")


def test_a_seed_gives_the_same_mutants() -> None:
    modules = modules_of("memory")
    first = choose(modules, 12, seed=4)
    assert first == choose(modules, 12, seed=4) and len(first) == 12
    assert first != choose(modules, 12, seed=5)


def test_a_module_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("memory/nowhere", "memory", "memory/machine.py", "../tools/mutate"):
        with pytest.raises(SystemExit):
            mutate.main(["--modules", "memory/machine", wrong])
        assert f"wan_core has no {wrong}." in capsys.readouterr().err


def test_every_module_has_tests() -> None:
    known = [module for package in PACKAGES for module in modules_of(package)]
    assert set(MIRRORS) <= set(known)
    named = {name.partition("::")[0] for names in MIRRORS.values() for name in names}
    assert [name for name in named if not (mutants.ROOT / f"tests/{name}.py").is_file()] == []
    faces = (mutants.ROOT / "wan_core").glob("*/__init__.py")
    assert sorted(PACKAGES) == sorted(face.parent.name for face in faces)
    for module in known:
        files = files_of(module)
        assert files and all((mutants.ROOT / path.partition("::")[0]).is_file() for path in files)
    assert files_of("memory/machine") == ["tests/memory/test_machine.py"]
    wider = wider_tests_of("memory/machine")
    assert "tests/plan/test_ladder.py" in wider and "tests/memory/test_stages.py" in wider
    assert "tests/memory/test_machine.py" not in wider


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
    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutate, "LIBRARIES", ("pytest",))
    return root


ENDS = {
    "a > b -> a >= b": "survived",
    "return a if a > b else b -> return None": "killed",
    "True -> False": "timeout",
    "not done -> not not done": "timeout",
    "time.sleep(0.05) -> None": "survived",
    "0.05 -> 0.1": "survived",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of pytest gets more than ten seconds: long for a busy machine, short for a test."""
    original = mutate._Warm.pytest

    def limited(warm: Any, tests: Any, seconds: float, *more: str) -> Any:
        return original(warm, tests, 10, *more)

    monkeypatch.setattr(mutate._Warm, "pytest", limited)


def ends_of(printed: str) -> dict[str, str]:
    words = ("killed", "survived", "timeout", "untested")
    lines = [line.split("  by ")[0] for line in printed.splitlines() if line.startswith(words)]
    return {line.split(maxsplit=2)[2]: line.split()[0] for line in lines}


@pytest.mark.slow
def test_killed_survived_and_endless(
    small: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "memory/thing: return a if a > b else b: a > b -> a >= b"
    (small / "benchmarks/mutation_reasons.json").write_text(f'{{"{key}": "Equal is equal."}}')
    arguments = ["--modules", "memory/thing", "--jobs", "2", "--write"]
    assert mutate.main(arguments) == 0
    printed = capsys.readouterr().out
    assert ends_of(printed) == ENDS
    assert "-> return None  by tests/memory/test_thing.py::test_larger" in printed
    page = (small / "benchmarks/mutation.md").read_text()
    assert "| memory | 6 | 3 | 2 | 3 | 50% |" in page
    assert "`return a if a > b else b`: `a > b` → `a >= b` (compare). Equal is equal." in page
    assert page.count("*a test is missing*") == 3  # the explanation, and two survivors
    assert "python -m tools.mutate --modules memory/thing --jobs 2 --write" in page
    assert (small / "wan_core/memory/thing.py").read_text() == MODULE, "only copies are changed"


@pytest.mark.slow
def test_shards_are_kept_gone_on_with_and_merged(
    small: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--results", str(small / "kept")]
    for shard, count in (("1/2", 3), ("2/2", 3), ("1/2", 0)):
        mutate.main(["--modules", "memory/thing", "--shard", shard, "--jobs", "2", *kept])
        assert len(ends_of(capsys.readouterr().out)) == count
    # A test more, in a file that does not mirror the module, and the module has moved on.
    (small / "tests/memory/test_equal.py").write_text(
        "from wan_core.memory import thing\ndef test(): assert thing.larger(1, 1.0) == 1 and "
        "type(thing.larger(1, 1.0)) is float"
    )
    (small / "wan_core/memory/thing.py").write_text("# A line more.\n" + MODULE)
    mutate.main(["--again", *kept])
    assert set(ends_of(capsys.readouterr().out).values()) == {"survived"}
    mutate.main(["--again", "--wider", *kept])
    again = ends_of(capsys.readouterr().out)
    assert again.pop("a > b -> a >= b") == "killed" and set(again.values()) == {"survived"}
    mutate.main(["--merge", "--write", *kept])
    assert "| all | 6 | 4 | 2 | 2 | 67% |" in (small / "benchmarks/mutation.md").read_text()
    (small / "kept/not_counted.json").write_text('{"memory/thing": "It needs a card."}')
    mutate.main(["--merge", "--write", *kept])
    page = (small / "benchmarks/mutation.md").read_text()
    assert "| all | 0 | 0 | 0 | 0 | - |" in page and "survived: It needs a card." in page


def test_only_lines_that_changed_since(small: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=small, check=True, capture_output=True)

    def moved() -> set[str]:
        lines = mutants.lines_since("HEAD")
        return {mutant.before for mutant in choose(["memory/thing"], None, 0, lines)}

    git("init")
    git("add", "wan_core")
    git("commit", "--message", "first")
    assert moved() == set()
    thing = small / "wan_core/memory/thing.py"
    thing.write_text("# A line more.\n" + MODULE.replace("0.05", "0.06").replace("not done", "1"))
    assert moved() == {"1", "0.06", "time.sleep(0.06)"}
    thing.write_text(MODULE.replace("        time.sleep(0.05)", "        pass"))
    assert moved() == set()
    thing.unlink()  # a module that is gone has no lines
    assert not mutants.lines_since("HEAD").get("memory/thing")


def test_only_a_test_that_passes_otherwise_can_kill(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thing = small / "tests/memory/test_thing.py"
    thing.write_text(TESTS + "\ndef test_absent(): import no_such_library\n")
    number = next(n for n in range(6) if mutant_of("memory/thing", n).operator == "return None")
    mutant = mutant_of("memory/thing", number)
    assert mutant_like(mutant.module, mutant.key) == mutant

    def end() -> str:
        copies = mutate.Copies(small.parent / f"copies{len(list(small.parent.iterdir()))}", 1)
        outcome = copies.try_one(mutant, files_of("memory/thing"), float("inf"))
        copies.close()
        assert outcome is not None
        return outcome.end

    assert end() == "killed"
    thing.write_text("def test(): assert 0")
    assert end() == "untested"
    thing.write_text("import no_such_library")
    assert end() == "untested"
    assert "is left out" in capsys.readouterr().out


def test_none_is_begun_after_the_time_is_up(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutate.main(["--modules", "memory/thing", "--minutes", "-1"]) == 0
    assert "| all | 0 | 0 | 0 | 0 | - |" in capsys.readouterr().out
