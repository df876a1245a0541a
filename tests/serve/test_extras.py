"""What is optional stays so: all else works without it, and an error says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wan_core.__main__ import main
from wan_core.errors import InvalidRequest, MissingDependency
from wan_core.serve import Cluster, ServerOptions, serve

ROOT = Path(__file__).parents[2]
EXTRAS = ("fastapi", "uvicorn", "starlette", "python_multipart", "ray")


def test_no_module_needs_an_extra_to_be_imported() -> None:
    modules = [
        f"wan_core.serve.{path.stem}" for path in (ROOT / "wan_core/serve").glob("[a-z]*.py")
    ]
    code = (
        "import sys\n"
        f"for name in {EXTRAS!r}: sys.modules[name] = None\n"
        f"for module in {modules!r}: __import__(module)\n"
        "import wan_core.__main__ as m; m._parser()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_server_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingDependency, match=r"pip install fastapi uvicorn python-multipart"):
        serve(ServerOptions(model=tmp_path, folder=tmp_path))
    assert main(["serve", str(tmp_path), "--folder", str(tmp_path / "videos")]) == 1
    assert "extra [serve]" in capsys.readouterr().err
    assert not (tmp_path / "videos").exists()


def test_a_cluster_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"pip install ray.*extra \[cluster\]"):
        Cluster("auto")
    with pytest.raises(InvalidRequest, match="devices is 'auto'"):
        Cluster("auto", devices="auto")
    (tmp_path / "jobs.jsonl").write_text("")
    # A file without jobs needs no cluster.
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "--cluster", "auto"]) == 0
