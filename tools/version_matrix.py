"""Runs a part of the tests with the oldest, a middle and the newest diffusers.

Run from the repository's root: ``python -m tools.version_matrix`` (``make test-all``), or with
``--quick`` for the part that continuous integration runs: equal bits of the lean forward and
decoder, and of whole runs, in each version. ``--diffusers 0.43.0`` tries one version instead, a new
release for example.

The oldest environment has the lower bounds of requirements.txt, all of them at once; the newest has
the versions of constraints.txt. Each is a folder outside the checkout with only what differs from
the environment that runs this, before which Python looks there (PYTHONPATH). Folders are kept for
the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 1800
"""Seconds after which a run of tests is given up."""

BOUNDS = ("diffusers", "transformers", "accelerate", "safetensors", "sentencepiece", "gguf")
"""Packages of requirements.txt whose lower bounds make the oldest environment. The others (av,
psutil, Pillow ...) have nothing to do with what a model computes."""
OLD_PARTNERS = ("huggingface_hub==0.34.0", "tokenizers==0.21.4")
"""What the oldest transformers and diffusers need beside them."""
HTTP = ("httpx==0.28.1", "httpcore==1.0.9", "anyio==4.16.0", "h11==0.16.0")
"""What diffusers 0.36 to 0.40 need beside what later versions need."""
MIDDLE = ("diffusers==0.38.0", *HTTP)

QUICK = (
    "tests/forward/test_sources.py",
    "tests/forward/test_transformer.py::test_equal_bits",
    "tests/decoding/test_lean.py::test_bits_are_those_of_diffusers",
    "tests/decoding/test_encoder.py::test_bits_are_those_of_diffusers",
    "tests/render/test_pipeline.py::test_equals_diffusers_bit_for_bit",
)
QUICK_ONLY = "not (euler or dpm or unguided)"
FULL = (
    "tests/forward",
    "tests/decoding/test_encoder.py",
    "tests/sampling",
    "tests/memory/test_forward.py",
    "tests/loading/test_component.py::test_every_component_equals_from_pretrained",
    "tests/loading/test_tokenizer.py",
    "tests/placing/test_offload.py",
    "tests/placing/test_applied.py",
    "tests/placing/test_streaming.py",
    "tests/render/test_pipeline.py",
)
_GROUPS = "diffusers' group offload itself fails before 0.41 on a machine without a GPU"
_TOKENIZER = "transformers 4 cannot make the tokenizer that ours is compared with there"
LEFT_OUT: dict[str, tuple[tuple[str, str], ...]] = {
    "oldest": (
        ("group", _GROUPS),
        ("test_placement_changes_no_bit", _GROUPS),
        ("test_ids_equal_transformers", _TOKENIZER),
        ("test_calls_of_the_pipeline_are_the_same", _TOKENIZER),
    ),
    "middle": (("group", _GROUPS), ("test_placement_changes_no_bit", _GROUPS)),
}
"""By environment: words of test names that are not run there, with the reason."""


@dataclass(frozen=True)
class Environment:
    """A name, and the requirements in it that differ from the environment that runs this."""

    name: str
    requirements: tuple[str, ...]

    @property
    def diffusers(self) -> str:
        """The version of diffusers, as it is written in the requirement."""
        return next(r.partition("==")[2] for r in self.requirements if r.startswith("diffusers=="))

    def folder(self, into: Path) -> Path:
        """The folder it is installed in; its name changes with the requirements."""
        text = "\n".join((sys.version, *self.requirements))
        return into / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def install(self, into: Path) -> Path:
        """Install it unless it is there, and return its folder."""
        folder = self.folder(into)
        if folder.is_dir():
            return folder
        into.mkdir(parents=True, exist_ok=True)
        # Made beside its place and renamed: an installation that broke off is not taken for one.
        with tempfile.TemporaryDirectory(dir=into) as unfinished:
            target = Path(unfinished) / "packages"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--target", str(target)]
            subprocess.run([*command, *self.requirements], check=True, cwd=unfinished)
            target.rename(folder)
        return folder


def environments() -> list[Environment]:
    """Return oldest, middle and newest, read from requirements.txt and constraints.txt."""
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", wanted, flags=re.MULTILINE))
    oldest = tuple(f"{name}=={bounds[name]}" for name in BOUNDS) + OLD_PARTNERS
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    newest = tuple(line for line in pinned if line.startswith("diffusers=="))
    return [
        Environment("oldest", oldest),
        Environment("middle", MIDDLE),
        Environment("newest", newest),
    ]


def run_tests(environment: Environment, into: Path, *, quick: bool) -> tuple[bool, str]:
    """Install an environment and run the tests in it; returns success and a report."""
    started = time.monotonic()
    folder = environment.install(into)
    variables = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    ask = "import diffusers; print(diffusers.__version__)"
    found = subprocess.run(
        [sys.executable, "-c", ask], env=variables, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    version = found.stdout.strip()
    if not _same_version(version, environment.diffusers):
        return False, f"{environment.name}: has diffusers {version or found.stderr}"
    left_out = LEFT_OUT.get(environment.name, ())
    chosen = [QUICK_ONLY] if quick else []
    chosen += [f"not {word}" for word, _ in left_out]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore"]
    command += [*(QUICK if quick else FULL), "-m", "not gpu"]
    command += ["-k", " and ".join(chosen)] if chosen else []
    done = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    told = [f"{environment.name}: diffusers {version}, {time.monotonic() - started:.0f} s"]
    told += [f"  left out: {word}: {why}" for word, why in left_out if not quick]
    lines = (done.stdout + done.stderr).strip().splitlines()
    told += [f"  {line}" for line in (lines[-60:] if done.returncode else lines[-1:])]
    return done.returncode == 0, "\n".join(told)


def _same_version(found: str, wanted: str) -> bool:
    """Say whether two versions are equal; "0.35" is "0.35.0"."""
    return found.removesuffix(".0") == wanted.removesuffix(".0") != ""


def cache_folder() -> Path:
    """Return where environments are kept: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "wanfit" / "versions"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests in every environment, two at a time; returns 1 if any failed."""
    known = environments()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the part that takes a few minutes")
    parser.add_argument("--only", choices=[one.name for one in known], help="one environment")
    parser.add_argument("--diffusers", help="one version of diffusers instead of the three")
    parser.add_argument("--into", type=Path, default=cache_folder(), help="where they are kept")
    given = parser.parse_args(arguments)
    if given.diffusers:
        known = [Environment("asked-for", (f"diffusers=={given.diffusers}", *HTTP))]
    chosen = [one for one in known if given.only in (None, one.name)]
    into = given.into.resolve()
    if into.is_relative_to(ROOT):
        parser.error(f"--into {into} is inside the checkout; the tests would find it there")
    with ThreadPoolExecutor(max_workers=2) as pool:
        good = []
        for success, report in pool.map(lambda e: run_tests(e, into, quick=given.quick), chosen):
            print(report, flush=True)
            good.append(success)
    return 0 if good and all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
