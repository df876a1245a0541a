"""What a process holds of RAM beside weights, and what it takes for the first time."""

from __future__ import annotations

import gc
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support.machines import cpu, gpu

from wan_core.memory import process
from wan_core.memory.process import AFTER_DENOISING, FIRST, FIRST_ON_CPU, TOKEN_BYTES

MIB = 2**20


def test_what_this_process_holds_is_read_from_the_system(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmRSS:\t  900 kB\nRssAnon:\t     700 kB\nRssFile:\t 200 kB\n")
    assert process.process_bytes(status) == 700 * 1024
    assert process.process_bytes(tmp_path / "none") is None
    status.write_text("Name:\tpython\n")
    assert process.process_bytes(status) is None
    if platform.system() == "Linux":
        held = process.process_bytes()
        assert held is not None
        more = bytearray(os.urandom(2**20) * 64)
        assert process.process_bytes() >= held + 48 * 2**20  # type: ignore[operator]
        del more


@pytest.mark.parametrize("kinds", [("encode",), ("denoise",), ("encode", "denoise"), ("decode",)])
def test_whatever_computes_first_pays_for_the_card(kinds: tuple[str, ...]) -> None:
    """And each library is paid for once, at its first stage; nothing is computed for imports."""
    fresh = replace(gpu(24), process_bytes=600 * MIB)
    assert fresh.process_ram(()) == 600 * MIB + FIRST["imports"]
    own = sum(FIRST[kind] for kind in kinds)
    first = 600 * MIB + FIRST["imports"] + FIRST["card"] + own
    assert fresh.process_ram([*kinds, *kinds]) == first
    later = replace(fresh, done_here=("card", "imports", *kinds))
    assert later.process_ram(kinds) == 600 * MIB
    beside = AFTER_DENOISING if kinds == ("denoise",) else 0  # what an encoder finds unpaid
    assert later.process_ram(("encode", "decode")) - later.process_ram(("decode",)) == beside + (
        0 if "encode" in kinds else FIRST["encode"]
    )
    assert later.process_ram() == beside + 600 * MIB + sum(
        FIRST[kind] for kind in ("encode", "denoise", "decode") if kind not in kinds
    )


def test_a_tokenizer_counts_by_its_tokens_where_there_is_none() -> None:
    for machine in (gpu(24), cpu(16)):
        fresh = replace(machine, process_bytes=600 * MIB)
        made = fresh.process_ram(("encode",), tokens=1000) - fresh.process_ram(("encode",))
        assert made == 1000 * TOKEN_BYTES
        there = replace(fresh, done_here=("tokenizer",))
        assert there.process_ram(("encode",), tokens=1000) == there.process_ram(("encode",))
        # Where the system does not tell what is held, nothing is.
        unknown = replace(there, process_bytes=None)
        assert unknown.process_ram(tokens=1000) - unknown.process_ram() == 1000 * TOKEN_BYTES


def test_components_that_can_be_dropped_are_no_part_of_the_libraries() -> None:
    done = replace(gpu(24), done_here=("card", "denoise", "imports"))
    cached = replace(done, process_bytes=2600 * MIB, ram_evictable_bytes=2000 * MIB)
    assert cached.process_ram(("denoise",)) == 600 * MIB
    assert replace(cached, ram_evictable_bytes=9000 * MIB).process_ram(("denoise",)) == 0


def test_what_is_taken_where_the_cpu_computes_or_nothing_is_told() -> None:
    on_cpu = replace(cpu(16), process_bytes=170 * MIB)
    assert on_cpu.process_ram() == 170 * MIB + sum(FIRST_ON_CPU.values())
    assert replace(on_cpu, done_here=("denoise", "imports")).process_ram() == 170 * MIB
    assert cpu(16).process_ram() == 160 * MIB + sum(FIRST_ON_CPU.values())
    assert gpu(24).process_ram() == 310 * MIB + sum(FIRST.values())
    first = FIRST["imports"] + FIRST["card"] + FIRST["decode"]
    assert gpu(24).process_ram(("decode",)) == 310 * MIB + first


def test_what_was_done_here_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_run_here", set())
    monkeypatch.setattr(process, "_tokenizers", type(process._tokenizers)())
    classes = ("diffusers.models.transformers.transformer_wan", "transformers.models.umt5")
    for absent in classes:  # one of the two is not all of what imports take
        for name in classes:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.delitem(sys.modules, absent)
        assert process.done_here("cuda:1") == ()
        monkeypatch.setitem(sys.modules, absent, ModuleType(absent))
    assert process.done_here("cuda:1") == ("imports",)
    process.stage_was_run("load transformer", "cuda")
    process.stage_was_run("output", "cuda")
    assert process.done_here("cuda:1") == ("imports",)
    process.stage_was_run("denoise", "cpu")
    assert process.done_here("cpu") == ("denoise", "imports")
    assert process.done_here("cuda:1") == ("imports",)
    for stage in ("denoise_low", "control_encode", "denoise_high", "text_encode"):
        process.stage_was_run(stage, "cuda:0")
    assert process.done_here("cuda:1") == ("card", "decode", "denoise", "encode", "imports")
    same = {"denoise": "denoise", "decode": "decode", "condition_encode": "decode",
            "image_encode": "encode", "load vae": ""}  # fmt: skip
    assert {stage: process.stage_kind(stage) for stage in same} == same


def test_a_tokenizer_is_held_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_tokenizers", type(process._tokenizers)())
    one = ModuleType("a tokenizer")
    process.tokenizer_was_made(one)
    assert "tokenizer" in process.done_here("cpu")
    del one
    gc.collect()
    assert "tokenizer" not in process.done_here("cpu")


def test_what_torch_keeps_page_locked_is_held_too() -> None:
    stats = {"allocated_bytes.current": 40 * MIB, "active_bytes.current": 8 * MIB}
    told = SimpleNamespace(cuda=SimpleNamespace(host_memory_stats=lambda: stats))
    assert process.locked_by_torch(told) == 40 * MIB
    for silent in (SimpleNamespace(host_memory_stats=dict), SimpleNamespace()):
        assert process.locked_by_torch(SimpleNamespace(cuda=silent)) == 0
