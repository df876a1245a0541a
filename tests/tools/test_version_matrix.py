"""The matrix of diffusers versions: what it installs and runs, and that a failure is one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tools import version_matrix
from tools.version_matrix import FULL, LEFT_OUT, QUICK, ROOT, Environment, environments, run_tests


def test_oldest_is_what_the_requirements_allow_and_newest_what_the_suite_runs_with() -> None:
    oldest, middle, newest = environments()
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for line in wanted.splitlines():
        name, _, bound = line.partition(">=")
        if name in version_matrix.BOUNDS:
            assert f"{name}=={bound}" in oldest.requirements
    assert len(oldest.requirements) == len(version_matrix.BOUNDS) + 2
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"diffusers=={newest.diffusers}" in constraints
    versions = [tuple(map(int, one.diffusers.split("."))) for one in (oldest, middle, newest)]
    assert versions == sorted(versions) and len(set(versions)) == 3


@pytest.mark.parametrize("named", [*QUICK, *FULL])
def test_what_it_runs_is_there(named: str) -> None:
    path, _, test = named.partition("::")
    assert (ROOT / path).exists()
    if test:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_it_leaves_out_is_there_and_has_a_reason() -> None:
    places = [ROOT / part.partition("::")[0] for part in FULL]
    files = [
        path for place in places for path in ([place] if place.is_file() else place.glob("*.py"))
    ]
    texts = [path.read_text(encoding="utf-8") for path in files]
    for environment, words in LEFT_OUT.items():
        assert environment in {one.name for one in environments()}
        for word, why in words:
            assert any(word in text for text in texts) and len(why) > 20


def test_makefile_and_ci_run_it() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(
        r"^test-all: .*\n(?:\t.*\n)*\t.*tools\.version_matrix$", makefile, re.MULTILINE
    )
    assert re.search(r"^test-versions: .*\n\t.*version_matrix --quick$", makefile, re.MULTILINE)
    assert "make test-versions" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_folders_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    one, other = Environment("a", ("diffusers==1.0",)), Environment("a", ("diffusers==1.1",))
    assert one.folder(tmp_path) != other.folder(tmp_path)
    assert one.folder(tmp_path) == Environment("a", ("diffusers==1.0",)).folder(tmp_path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An environment with a diffusers that is only a version, and tests of one's own."""
    made = Environment("fake", ("diffusers==9.9",))
    package = made.folder(tmp_path) / "diffusers"
    package.mkdir(parents=True)

    def prepare(version: str, test: str) -> Environment:
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
        path = tmp_path / "test_it.py"
        path.write_text(test)
        monkeypatch.setattr(version_matrix, "QUICK", (str(path),))
        return made

    return prepare


@pytest.mark.parametrize(
    ("version", "test", "good", "told"),
    [
        ("9.9.0", "import diffusers\ndef test(): assert diffusers.__version__ == '9.9.0'", True,
         "1 passed"),
        ("9.9.0", "def test(): assert 0", False, "1 failed"),
        ("9.9.0", "", False, "no tests ran"),
        ("9.8.0", "def test(): pass", False, "has diffusers 9.8.0"),
    ],
)  # fmt: skip
def test_a_failure_is_a_failure(
    fake: Any, tmp_path: Path, version: str, test: str, good: bool, told: str
) -> None:
    found, report = run_tests(fake(version, test), tmp_path, quick=True)
    assert found is good
    assert told in report


def test_an_environment_inside_the_checkout_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        version_matrix.main(["--into", str(ROOT / "output")])
    assert "inside the checkout" in capsys.readouterr().err
