"""Builds the wheel, installs it into an empty environment, and runs it outside the checkout.

Run from the repository's root: ``python -m tools.check_wheel``. Needs about two minutes and the
package index; the environment is removed afterwards.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; ends with its output where it fails."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_contents(wheel: Path) -> None:
    """Every module of the checkout and every file of the demo model is in the wheel."""
    kept = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "wan_core").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = kept - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        sys.exit(f"{wheel.name} lacks {len(missing)} files: {', '.join(sorted(missing)[:5])}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(kept)} files of wan_core")


def main() -> None:
    """Build, look inside, install, run."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
        run(*pip, "wheel", ROOT, "--no-deps", "-w", place, cwd=place)
        wheel = next(place.glob("*.whl"))
        check_contents(wheel)
        venv.create(place / "env", with_pip=True)
        scripts = place / "env" / ("Scripts" if sys.platform == "win32" else "bin")
        python = scripts / "python"
        inside = (python, "-m", "pip", "-q", "--disable-pip-version-check")
        constraints = ROOT / "constraints.txt"
        run(*inside, "install", "-c", constraints, f"{wheel}[standalone]", cwd=place)
        where = run(python, "-c", "import wan_core; print(wan_core.__file__)", cwd=place)
        if not Path(where.strip()).is_relative_to(place):
            sys.exit(f"wan_core was imported from {where.strip()}, not from the environment")
        run(python, "-m", "wan_core", "demo", "--output", place / "demo.mp4", cwd=place)
        print(f"demo: {(place / 'demo.mp4').stat().st_size:,} bytes of mp4")
        demo = Path(where.strip()).parent / "demo_model" / "t2v"
        print(run(scripts / "wanfit", "inspect", demo, cwd=place).splitlines()[0])


if __name__ == "__main__":
    main()
