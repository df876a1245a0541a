"""The benchmark of speed, gone through with small models: times mean nothing here, bits do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed

    return speed


def test_speed_with_small_models(speed: Any, tmp_path: Path) -> None:
    """Every way of a forward; times mean nothing here, bits do."""
    parts = ["forward-14b-480p", "forward-1.3b-480p"]
    command = ["--tiny", "--part", "forward", "--output", str(tmp_path), "--only", *parts]
    assert speed.main(command) == 0
    found = json.loads((tmp_path / "speed_cpu_forward.json").read_text())
    assert found["notes"] == []
    ways = {(row["case"], row["way"]): row for row in found["forwards"]}
    fastest = sum(way.endswith("fastest") for _, way in ways)  # where Triton is installed
    assert len(ways) - fastest == 8 + 4 and fastest in (0, 3)
    exact = [row for (_, way), row in ways.items() if not way.endswith(("bit", "fast", "fastest"))]
    assert len(exact) == 5 + 3 and all(row["equal"] and row["error"] == 0 for row in exact)
    text = (tmp_path / "speed_cpu_forward.md").read_text()
    assert "| 14B, 480p81 | fp8, exact | " in text and "--part forward`" in text


@pytest.mark.slow
def test_all_of_speed_is_one_command(speed: Any, tmp_path: Path) -> None:
    """Forwards of every size, both VAEs, the clip and diffusers' one, on one page."""
    import autoencoders
    import forwards

    command = ["--tiny", "--output", str(tmp_path), "--folder", str(tmp_path)]
    assert speed.main(command) == 0
    found = json.loads((tmp_path / "speed_cpu.json").read_text())
    assert found["notes"] == [] and found["took"] > 0
    assert {row["case"] for row in found["forwards"]} == {case.title for case in forwards.CASES}
    assert {row["case"] for row in found["decodes"]} == {c.title for c in autoencoders.CASES[:2]}
    clips = [(row["files"], row["way"], row["run"]) for row in found["clips"]]
    ours = [("fp8", way, run) for way in ("exact", "fast", "fastest") for run in ("cold", "warm")]
    assert clips == [("bf16", "diffusers", "first"), ("bf16", "diffusers", "warm"), *ours]
    text = (tmp_path / "speed_cpu.md").read_text()
    assert "`python benchmarks/speed.py`. It took " in text and "## Four steps" in text


def test_matrices_in_fp8_and_in_bf16_are_the_same_numbers(speed: Any) -> None:
    """Else an error beside diffusers would be that of storing, not of a way."""
    import forwards

    models = forwards.Models("small", forwards.TINY_SHAPE, torch.device("cpu"))
    before = models.plain.blocks[1].ffn.net[2].weight.clone()
    layer = models.stored().blocks[1].ffn.net[2]
    plain = models.plain.blocks[1].ffn.net[2].weight
    assert torch.equal(layer.dequantized(torch.bfloat16), plain)
    assert not torch.equal(plain, before)
    assert models.stored().proj_out.weight is models.plain.proj_out.weight


def test_the_page_says_how_far_a_way_could_come(speed: Any) -> None:
    import speed_report

    parts = {"attention": 50.0, "products": 30.0, "the rest": 20.0}
    rows = [
        {"case": "one", "way": "diffusers", "ratio": 1.0, "split": parts},
        {"case": "one", "way": "compiled", "ratio": 0.9},
        {"case": "one", "way": "fast", "ratio": 0.7, "split": parts | {"products": 15.0}},
    ]
    lines = list(speed_report.splits(rows))
    assert lines[-2:] == [
        "| one | diffusers | 50 | 30 | 20 | 0.800 |", "| one | fast | 50 | 15 | 20 | 0.650 |",
    ]  # fmt: skip
    assert list(speed_report.splits(rows[1:2])) == []


def test_a_way_that_fails_loses_no_other(speed: Any, tmp_path: Path) -> None:
    """It is noted and left out, wherever it is not what all are measured beside."""
    import speed_bench

    bench = speed_bench.Bench(torch.device("cpu"), tmp_path, 10, tiny=False)
    bench.found = {"notes": []}
    ways = {
        "diffusers": lambda: torch.ones(2),
        "broken": lambda: 1 / 0,
        "ours": lambda: torch.full((2,), 2.0),
    }
    found = speed_bench.in_turns(bench, ways, 2)
    assert list(found) == ["diffusers", "ours"] and bench.found["notes"][0].startswith("broken: ")
    assert found["ours"]["error"] == pytest.approx(1) and len(found["ours"]["seconds"]) == 2
    with pytest.raises(ZeroDivisionError):
        speed_bench.in_turns(bench, {"diffusers": ways["broken"]}, 1)


def test_decodes_of_both_vaes(speed: Any, tmp_path: Path) -> None:
    assert speed.main(["--tiny", "--part", "decode", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "speed_cpu_decode.json").read_text())
    assert found["notes"] == []
    decodes = {(row["case"], row["way"]): row for row in found["decodes"]}
    assert len(decodes) == 48
    sizes = ("VAE 2.1, 480p81", "VAE 2.2, 704p41")
    for case in (*sizes, *(f"encode, {size}" for size in sizes)):
        assert decodes[case, "lean, fp32"]["equal"] and decodes[case, "unfused, bf16"]["equal"]
        half = [decodes[case, f"lean, {kind}"]["error"] for kind in ("fp16", "bf16")]
        assert 0 < half[0] < half[1] < 0.1
        assert f"| {case} | quick, bf16 | " in (tmp_path / "speed_cpu_decode.md").read_text()
    import autoencoders
    import forwards

    work = {case.name for case in (*forwards.CASES, *autoencoders.CASES)}
    assert work == {*speed.ORDER["forward"], *speed.ORDER["decode"]}
    with pytest.raises(SystemExit):
        speed.main(["--tiny", "--part", "decode", "--only", "forward-5b-704p"])


@pytest.mark.slow
def test_a_clip_cold_and_warm_beside_diffusers(speed: Any, tmp_path: Path) -> None:
    """From files to mp4, each way three times."""
    begin = ["--tiny", "--part", "clip", "--folder", str(tmp_path)]
    assert speed.main([*begin, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "speed_cpu_clip.json").read_text())
    assert found["notes"] == []
    runs = {(row["files"], row["way"], row["run"]): row for row in found["clips"]}
    ways = [("bf16", "exact"), ("bf16", "fast"), ("bf16", "diffusers"), ("fp8", "exact"),
            ("fp8", "fast"), ("fp8", "fastest")]  # fmt: skip
    assert list(dict.fromkeys(key[:2] for key in runs)) == ways
    assert len(runs) == 3 * len(ways) + 3  # fast also without an mp4, exact cold again
    for (_, way, _), row in runs.items():
        assert row["seconds"] > 0
        assert ("denoise_low" in row["stages"]) == (way != "diffusers")
        if way == "diffusers":
            continue
        assert row["applied"] and row["compiled"] == 0 and 0 < row["outside"] < row["seconds"]
        serial = {k: v for k, v in row["stages"].items() if "beside" not in k and "mp4" not in k}
        assert sum(serial.values()) <= row["seconds"] + 1e-6
    assert "| fp8 | fast | warm again | " in (tmp_path / "speed_cpu_clip.md").read_text()
    assert list(tmp_path.glob("tmp*")) == []


def test_a_clip_s_row_is_written_at_once_with_what_lay_outside_of_stages(
    speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clip

    from wan_core.config import StageReport

    # The text encoder's loading lies in its stage; two seconds before it, one before the decode.
    spans = [("text", 12.0, 15.0), ("load text", 12.5, 14.0), ("denoise", 15.0, 19.0),
             ("decode", 20.0, 22.0)]  # fmt: skip
    gaps = clip.outside(spans, 10.0, 22.5)
    assert [(gap["after"], gap["before"], gap["seconds"]) for gap in gaps] == [
        ("the beginning", "text", 2.0), ("denoise", "decode", 1.0), ("decode", "the end", 0.5),
    ]  # fmt: skip
    reports = [StageReport(name=name, seconds=2.0) for name in ("denoise", "denoise", "load b")]
    stages = clip.stage_seconds(reports, ["denoise", "denoise"])
    assert stages == {"denoise": 4.0, "load b (beside others)": 2.0}

    from speed_bench import Bench

    bench = Bench(torch.device("cpu"), tmp_path, 10, tiny=True)
    bench.found = {
        "device": "CPU", "short": "cpu", "versions": {}, "part": "clip", "forwards": [],
        "decodes": [], "clips": [], "notes": [],
    }  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    assert clip.triton_files() == set()
    (tmp_path / "kernels" / "one").mkdir(parents=True)
    assert clip.triton_files() == {"one"}
    row = {
        "seconds": 12.5, "peak": 2**30, "stages": stages, "outside": 3.5, "compiled": 1,
        "compiled_before": 0, "warnings": ["no such kernel"], "applied": ["lean forward"],
    }  # fmt: skip
    (tmp_path / "made.mp4").write_bytes(b"made")
    clip._keep(bench, "fp8", "fastest", "cold", row, tmp_path / "made.mp4")
    found = json.loads((tmp_path / "speed_cpu_clip.json").read_text())
    assert found["clips"][0]["warnings"] == ["no such kernel"]
    assert (
        "| fp8 | fastest | cold | 12.5 | denoise 4.0, load b (beside others) 2.0, outside of "
        "stages 3.5 | 1.0 | 1 (none kept before) |"
    ) in (tmp_path / "speed_cpu_clip.md").read_text()
