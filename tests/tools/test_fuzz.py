"""The fuzzer: samples give only named errors, and it would find what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wan_core.errors import CorruptFile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import fuzz  # noqa: E402

SLOWEST, GROWTH = 5.0, 400 << 20


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_sample_gives_only_named_errors(kind: str, tmp_path: Path) -> None:
    found = fuzz.fuzz(kind, 60, 7, tmp_path)
    assert found.faults == []
    assert found.mutants == 60 == found.loaded + sum(found.refused.values())
    assert sum(found.refused.values()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_twenty_thousand_mutants(kind: str) -> None:
    """In a process of its own, whose memory is then that of the mutants."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.fuzz", "--kinds", kind, "--count", "20000", "--json"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])[kind]
    assert found["faults"] == [] and found["mutants"] == 20_000
    assert found["slowest"] < SLOWEST and found["grown"] < GROWTH


def test_a_raw_error_and_a_hang_are_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second mutant of this reader is refused by name, others raise or never end."""
    path, calls = tmp_path / "x", 0
    path.write_bytes(bytes(range(64)))

    def attempt() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyError("raw")
        while calls == 6:
            pass
        if calls % 2 and calls > 1:
            raise CorruptFile("named")

    made = fuzz.in_header(32, (b"x",))
    monkeypatch.setitem(fuzz.KINDS, "mine", lambda _: [fuzz.Subject("x", path, attempt, made)])
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    found = fuzz.fuzz("mine", 9, 0, tmp_path)
    assert [fault.split(":")[1].strip() for fault in found.faults] == ["KeyError", "Hang"]
    assert (found.loaded, found.refused["CorruptFile"]) == (3, 4)
    assert path.read_bytes() == bytes(range(64))


def test_memory_without_bounds_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "x", 0
    path.write_bytes(bytes(64))

    def attempt() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            bytearray(fuzz.HEADROOM + (1 << 28))

    made = fuzz.in_header(32, (b"x",))
    monkeypatch.setitem(fuzz.KINDS, "mine", lambda _: [fuzz.Subject("x", path, attempt, made)])
    (fault,) = fuzz.fuzz("mine", 2, 0, tmp_path).faults
    assert "MemoryError" in fault


def test_a_seed_gives_the_same_mutants() -> None:
    text = json.dumps({"a": [1, 2, {"b": None}], "c": {}}).encode()
    for made in (fuzz.of_json, fuzz.in_header(8, (b"{",))):
        first, again = (list(made(text, 40, 3)) for _ in range(2))
        assert first == again and len(set(first)) > 20
        assert first != list(made(text, 40, 4))
