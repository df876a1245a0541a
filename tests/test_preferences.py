"""What a user prefers: who wins, what a broken file does, and that all three readers agree."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from wan_core import GenerationConfig, OptimizationConfig, WanPipelineLoader
from wan_core.__main__ import main
from wan_core.config import demo_model
from wan_core.errors import InvalidRequest, OutputError
from wan_core.memory import Calibrations, RunRecord
from wan_core.preferences import (
    FIELDS,
    Preferences,
    preferences_path,
    read_preferences,
    write_preferences,
)
from wan_core.render.report import Callbacks

ALL: dict[str, Any] = {
    "speed": "fast", "vram_limit_gb": 10, "ram_limit_gb": 24.5, "preview": False, "codec": "h265",
    "journal": False,
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "of a user" / "preferences.json"
    monkeypatch.setenv("WANFIT_PREFERENCES", str(path))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny_models.make_folder(root / "t2v", "wan2.1-t2v")
    return root / "t2v"


def test_what_is_written_is_read(file: Path) -> None:
    assert read_preferences() == Preferences()  # no file is no fault
    assert write_preferences(Preferences(**ALL)) == file
    found = read_preferences()
    assert found.chosen() == ALL and set(ALL) == set(FIELDS) and not found.warnings
    write_preferences(replace(found, codec=None))
    assert "codec" not in json.loads(file.read_text())
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "Expecting"), (b"[1]", "not a JSON object"), (b"\xff\xfe\xff", "truncated"),
        (b'"' + b"x" * 70_000 + b'"', "more than 65536 bytes"), (b"[" * 60_000, "recursion"),
    ],
)  # fmt: skip
def test_a_broken_file_is_a_warning(file: Path, text: bytes, said: str) -> None:
    file.parent.mkdir()
    file.write_bytes(text)
    found = read_preferences()
    assert not found.chosen() and len(found.warnings) == 1
    assert said in found.warnings[0] and "preferences.json" in found.warnings[0]


def test_one_bad_value_costs_no_other(file: Path) -> None:
    file.parent.mkdir()
    values = {"speed": "warp", "codec": "h265", "vram_limit_gb": -1, "colour": 3, "preview": "no"}
    file.write_text(json.dumps(values))
    found = read_preferences()
    assert found.chosen() == {"codec": "h265"}
    for wrong in ("'warp'; allowed is one of exact, fast, fastest", "is -1;", "'colour' is unknown",
                  "'no'; allowed is true or false"):  # fmt: skip
        assert sum(wrong in text for text in found.warnings) == 1, wrong


@pytest.mark.parametrize("wrong", [{"speed": 1}, {"codec": "vp9"}, {"ram_limit_gb": float("nan")},
                                   {"vram_limit_gb": 0}, {"preview": 1}])  # fmt: skip
def test_what_is_not_allowed_is_not_kept(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Preferences(**wrong)
    assert caught.value.field == next(iter(wrong))


def test_a_user_without_a_home_has_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service, or a container's user without an entry among the users."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("WANFIT_PREFERENCES", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert read_preferences() == Preferences()
    with pytest.raises(OutputError, match="Cannot write"):
        write_preferences(Preferences(speed="fast"))
    Calibrations().add("a card", RunRecord(extra=1.0, pace=1.0, forward="lean"))
    WanPipelineLoader().load_wan_pipeline(demo_model()).plan(GenerationConfig(prompt="x"))
    monkeypatch.setenv("WANFIT_PREFERENCES", "~nobody-there/preferences.json")
    assert read_preferences() == Preferences()


def test_the_file_lies_where_settings_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANFIT_PREFERENCES")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert preferences_path() == tmp_path / "wanfit" / "preferences.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert preferences_path() == Path.home() / ".config" / "wanfit" / "preferences.json"
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setenv("APPDATA", str(tmp_path / "Roaming"))
    assert preferences_path() == tmp_path / "Roaming" / "wanfit" / "preferences.json"


def test_an_argument_wins_over_a_preference_and_that_over_what_is_built_in(
    file: Path, model: Path, tmp_path: Path
) -> None:
    write_preferences(Preferences(speed="fast", ram_limit_gb=20, codec="h265"))
    job = GenerationConfig(prompt="a cat", width=64, height=48, num_frames=9)

    def opened(given: Any = None, *, options: Path | None = None, **more: Any) -> Any:
        loader = WanPipelineLoader(options)
        return loader.load_wan_pipeline(model, optimization_config=given, device="cpu", **more)

    preferred = opened()
    assert preferred.optimization == OptimizationConfig(speed="fast", ram_limit_gb=20, device="cpu")
    request, plan = preferred.plan(job)
    assert request.codec == "h265" and preferred.plan(replace(job, codec="h264"))[0].codec == "h264"
    # x265 is not reliable below 32 pixels; a preference stops no clip.
    assert preferred.plan(replace(job, height=16))[0].codec == "h264"
    said = [text for text in plan.reasons if text.startswith("by your preferences (")]
    assert len(said) == 1 and said[0].endswith(
        "speed fast, ram_limit_gb 20, codec h265 where a job names none"
    )
    for found in (opened({"speed": "exact"}), opened(speed="exact"),
                  opened(OptimizationConfig(speed="exact"))):  # fmt: skip
        assert (found.optimization.speed, found.optimization.ram_limit_gb) == ("exact", 20)
        assert not any("speed fast" in text for text in found.plan(job)[1].reasons)
    options = tmp_path / "options.json"
    options.write_text('{"ram_limit_gb": 16}')
    assert opened({"speed": None}, options=options).optimization == OptimizationConfig(
        speed="fast", ram_limit_gb=16, device="cpu"
    )
    file.unlink()
    _, plan = opened().plan(job)
    assert opened().optimization == OptimizationConfig(device="cpu")
    assert opened().plan(job)[0].codec == "h264"
    assert not any("preferences" in text for text in plan.reasons)


def test_a_broken_file_is_told_with_every_answer(file: Path, model: Path) -> None:
    file.parent.mkdir()
    file.write_text("{")
    wrapper = WanPipelineLoader().load_wan_pipeline(model, device="cpu")
    job = GenerationConfig(prompt="a cat", width=32, height=32, num_frames=5, num_inference_steps=1)
    assert any("Preferences not used" in w for w in wrapper.estimate_memory_usage(job).warnings)
    assert any("Preferences not used" in w for w in wrapper.foresee(job).warnings)
    result = wrapper.generate(job)
    assert result.success and any("Preferences not used" in w for w in result.warnings)


def test_the_command_line_shows_keeps_and_reads_them(
    file: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> dict[str, Any]:
        main([*words, "--json"])
        return dict(json.loads(capsys.readouterr().out))

    assert run("preferences") == {"path": str(file), "preferences": {}}
    kept = run("preferences", "--speed", "fast", "--vram-limit-gb", "8", "--preview", "false")
    assert kept["preferences"] == {"speed": "fast", "vram_limit_gb": 8, "preview": False}
    assert run("preferences", "--vram-limit-gb", "")["preferences"] == {
        "speed": "fast", "preview": False
    }  # fmt: skip
    assert run("preferences", "--speed", "warp")["success"] is False
    assert json.loads(file.read_text()) == {"speed": "fast", "preview": False}
    size = ("--width", "64", "--height", "48", "--frames", "9", "--device", "cpu")
    assert any("speed fast" in text for text in run("estimate", str(model), *size)["reasons"])
    exact = run("estimate", str(model), *size, "--speed", "exact")["reasons"]
    assert not any("preferences" in text for text in exact)
    main(["preferences"])
    assert "codec          built-in" in capsys.readouterr().out


def test_the_command_line_keeps_a_journal_unless_told_otherwise(
    file: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Interrupted after the first step, it says how to go on where it can, and does."""
    size = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "3", "--device", "cpu")
    job = ("generate", str(model), *size, "--prompt", "x", "--output", str(tmp_path / "o.mp4"))

    def cut(*words: str) -> bool:
        """Run and interrupt; return whether something is left to go on from."""
        with monkeypatch.context() as patched:
            tell = Callbacks.call

            def interrupt(self: Any, function: Any, *args: Any) -> None:
                tell(self, function, *args)
                if len(args) == 3 and args[0] == 1:  # a finished step
                    raise KeyboardInterrupt

            patched.setattr(Callbacks, "call", interrupt)
            assert main([*job, *words]) == 130
        said = "Run the same command again" in capsys.readouterr().err
        kept = any(tmp_path.glob(".wanfit/*/*.safetensors"))
        assert kept == said
        return kept

    write_preferences(Preferences(journal=False))
    assert not cut()
    assert cut("--resume", "auto")  # what is asked for wins
    shutil.rmtree(tmp_path / ".wanfit")
    file.unlink()
    assert cut()
    assert main([*job, "--json"]) == 0
    metadata = json.loads(capsys.readouterr().out)["metadata"]
    assert metadata["resumed"] == "after step 1 of 3"
