"""The command line as a person uses it: output, exit codes, JSON, Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from support.clips import patches, write
from support.tiny_models import make_folder

from wan_core import VideoGenerationResult, __version__
from wan_core.__main__ import _parser, main
from wan_core.config import demo_model
from wan_core.errors import CorruptFile

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("cli") / "t2v", "wan2.2-t2v-a14b")


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("cli") / "i2v", "wan2.2-i2v-a14b")


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(model: Path, output: Path, *more: Any) -> tuple[Any, ...]:
    return (
        "generate", model, "--prompt", "a red cat", "--width", 64, "--height", 32, "--frames", 9,
        "--steps", 2, "--output", output, *more,
    )  # fmt: skip


def test_inspect_prints_the_variant_and_why(model: Path, capsys: Any) -> None:
    for path in (model, model / "model_index.json"):
        code, out, _ = run(capsys, "inspect", path)
        assert code == 0 and "wan2.2-t2v-a14b" in out and "because" in out
    for wrong, said in (("", "path is empty"), (model / "vae" / "config.json", "the folder that")):
        code, _, err = run(capsys, "inspect", wrong)
        assert code == 1 and said in err
    code, out, _ = run(capsys, "inspect", model, "--json")
    assert code == 0 and json.loads(out)["variant"] == "wan2.2-t2v-a14b"


def test_inspect_says_what_may_guide_a_model(model: Path, tmp_path: Path, capsys: Any) -> None:
    assert "takes as control: video (to start from)" in run(capsys, "inspect", model)[1]
    fun = make_folder(tmp_path / "fun", "wan2.2-fun-control-5b")
    code, out, _ = run(capsys, "inspect", fun)
    assert code == 0 and "takes as control: video, reference, keyframes" in out
    found = json.loads(run(capsys, "inspect", fun, "--json")[1])
    assert found["control"] == {"video": "control", "reference": "control", "keyframes": "any"}


def test_references_of_several_sizes_from_files(tmp_path: Path, capsys: Any) -> None:
    from PIL import Image

    for name, size in (("a.png", (8, 8)), ("b.png", (24, 16))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    vace = make_folder(tmp_path / "vace", "wan2.1-vace")
    given = ("--control-reference", tmp_path / "a.png", tmp_path / "b.png")
    code, _, err = run(capsys, *generate(vace, tmp_path / "o.mp4", *given))
    assert code == 0, err


def test_inspect_names_a_part_for_what_it_is(model: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "inspect", model / "vae")
    assert code == 0 and "VAE" in out
    code, out, _ = run(capsys, "inspect", model / "text_encoder", "--json")
    assert code == 0 and json.loads(out)["kind"] == "text_encoder"
    # Beside the models that ship along lies a file that is none.
    code, _, err = run(capsys, "inspect", demo_model().parent)
    assert code == 1 and "is no model itself; it holds the models" in err


def test_estimate_has_its_peak_at_the_top_level(model: Path, capsys: Any) -> None:
    size = ("--width", 64, "--height", 64, "--frames", 17)
    code, out, _ = run(capsys, "estimate", model, *size, "--json")
    found = json.loads(out)
    assert code == 0 and found["peak_usage_mb"] > 0 and found["stages"]
    code, out, _ = run(capsys, "estimate", model, *size)
    assert code == 0 and "decode" in out and "GiB" in out


def test_estimate_of_an_image_model_needs_no_image(image_model: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "estimate", image_model, "--width", 64, "--height", 64, "--json")
    assert code == 0
    assert "condition_encode" in {stage["name"] for stage in json.loads(out)["stages"]}


def test_generate_writes_the_video_it_names(model: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "new folder" / "out.mp4"
    code, out, err = run(capsys, *generate(model, target))
    assert code == 0, err
    assert str(target) in out and "denoise_high" in out
    assert "load transformer: 100%" in err and "load vae: 100%" in err
    with av.open(str(target)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9


def test_json_is_one_object_and_nothing_else(model: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, err = run(capsys, *generate(model, tmp_path / "o.mp4", "--json", "--seed", 5))
    found = json.loads(out)
    assert code == 0 and not err.strip()
    assert found["success"] and found["metadata"]["seed"] == 5
    assert found["output_path"].endswith("o.mp4")
    assert {stage["name"] for stage in found["stages"]} >= {"denoise_high", "decode"}


def test_image_to_video_from_files(image_model: Path, tmp_path: Path, capsys: Any) -> None:
    from PIL import Image

    picture = tmp_path / "in.png"
    Image.new("RGB", (64, 32), "red").save(picture)
    code, _, err = run(capsys, *generate(image_model, tmp_path / "o.mp4", "--image", picture))
    assert code == 0, err
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    code, _, err = run(capsys, *generate(image_model, tmp_path / "o2.mp4", "--image", bad))
    assert code == 1 and "image" in err and "bad.png" in err


def test_a_video_and_key_frames_from_files(
    model: Path, image_model: Path, tmp_path: Path, capsys: Any
) -> None:
    from PIL import Image

    code, _, err = run(capsys, *generate(model, tmp_path / "first.mp4"))
    assert code == 0 and "control" not in err, err
    more = ("--control-video", tmp_path / "first.mp4", "--control-denoise", 0.5)
    code, out, err = run(capsys, *generate(model, tmp_path / "second.mp4", *more))
    assert code == 0 and "1 of 2 steps, from a video with noise of sigma" in out, err
    code, _, err = run(capsys, *generate(model, tmp_path / "third.mp4", *more, "--frames", 0))
    assert code == 0, err
    with av.open(str(tmp_path / "third.mp4")) as made:
        assert sum(1 for _ in made.decode(video=0)) == 9
    for index, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 32), colour).save(tmp_path / f"{index}.png")
    frames = ("--control-keyframes", tmp_path / "0.png", tmp_path / "1.png")
    place = ("--control-positions", "0, -1")
    code, _, err = run(capsys, *generate(image_model, tmp_path / "o.mp4", *frames, *place))
    assert code == 0, err
    code, out, err = run(capsys, "estimate", model, "--frames", 9, "--json", *more)
    assert code == 0 and "control_encode" in out, err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--control-video", "no.mp4"), "control.video: 'no.mp4' cannot be read"),
        (("--control-video", "text.mp4"), "control.video: 'text.mp4' cannot be read"),
        (("--control-keyframes", "no.png"), "control.keyframes: 'no.png' cannot be read|no such"),
        (("--control-keyframes", "a.png", "b.png"), "pictures of 8x8, 4x4 size"),
        (("--control-keyframes", "a.png"), "reads none"),
        (("--control-tracks", "no.json"), "control.tracks: no.json cannot be read"),
        (("--control-camera", "no.npy"), "control.camera: 'no.npy' cannot be read"),
        (("--control-camera", "text.mp4"), "control.camera: 'text.mp4' cannot be read"),
        (
            ("--control-camera", "rays.npy"),
            "control.camera was given, but Wan 2.2 text to video A14B",
        ),
        (("--control-denoise", "0.5"), "no video to start from"),
    ],
)
def test_a_control_that_cannot_be(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("no video")
    np.save("rays.npy", np.zeros((1, 24, 2, 32, 64), np.float32))
    Image.new("RGB", (8, 8)).save("a.png")
    Image.new("RGB", (4, 4)).save("b.png")
    code, _, err = run(capsys, *generate(model, "o.mp4", *options))
    assert code == 1 and any(part in err for part in said.split("|")), err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_of_an_editor_with_a_byte_order_mark(
    model: Path, tmp_path: Path, capsys: Any, encoding: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("5: a red circle\r\n4: a blue square\r\n".encode(encoding))
    command = generate(model, tmp_path / "o.mp4", "--prompts", prompts)
    code, _, err = run(capsys, *command)
    assert code == 0, err
    prompts.write_bytes(b"\x80\xff")
    code, _, err = run(capsys, *command)
    assert code == 1 and "prompts: " in err and "cannot be read" in err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_options_of_an_editor_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    from wan_core import WanPipelineLoader

    options = tmp_path / "options.json"
    options.write_bytes('{"precision": "fp16"}'.encode(encoding))
    loader = WanPipelineLoader(optimization_config_path=options)
    assert loader.get_system_info()["optimization_config"] == {"precision": "fp16"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--frames", 0), "num_frames"),
        (("--steps", 0), "num_inference_steps"),
        (("--scheduler", "ddim"), "scheduler"),
        (("--image", "none.png"), "image"),
        (("--precision", "int3"), "precision"),
        (("--offload", "magic"), "offload"),
        (("--width", 8), "width"),
    ],
)
def test_an_expected_error_is_one_line_and_exit_code_1(
    model: Path, tmp_path: Path, capsys: Any, arguments: tuple[Any, ...], said: str
) -> None:
    code, out, err = run(capsys, *generate(model, tmp_path / "o.mp4", *arguments))
    assert code == 1 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == []
    code, out, again = run(capsys, *generate(model, tmp_path / "o.mp4", *arguments, "--json"))
    found = json.loads(out)
    assert code == 1 and again == err and not found["success"]
    assert err == f"error: {found['errors'][0]}\n"


@pytest.mark.parametrize("name", ["a" * 300 + ".mp4", "file/o.mp4", "folder.mp4"])
def test_an_output_that_cannot_be_written_is_one_line(
    model: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    code, _, err = run(capsys, *generate(model, tmp_path / name, "--boundary", 0.95))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert str(tmp_path / name) in err and "name" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4"]


def test_warnings_are_told_also_when_the_run_fails(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CorruptFile("the weights are broken")

    monkeypatch.setattr("wan_core.render.render.draw_noise", fail)
    (tmp_path / ".wanfit").write_text("where the journal would be")
    code, _, err = run(capsys, *generate(model, tmp_path / "o.mp4"))
    *warnings, error = err.splitlines()
    assert code == 1 and error == "error: the weights are broken"
    assert any(text.startswith("warning: The render goes on but is not") for text in warnings)
    code, out, _ = run(capsys, *generate(model, tmp_path / "o.mp4", "--json"))
    assert code == 1
    assert [f"warning: {text}" for text in json.loads(out)["warnings"]] == warnings


def test_an_overlap_that_does_not_fit_is_shown_as_it_is_used(
    model: Path, tmp_path: Path, capsys: Any
) -> None:
    windows = ("--window", 5, "--overlap", 200, "--frames", 17)
    code, out, err = run(capsys, *generate(model, tmp_path / "o.mp4", *windows))
    assert code == 0, err
    assert "windows of 5 frames, 4 shared" in out and "200 shared" not in out
    assert "warning: overlap 200 does not fit a window of 5 frames; 4 is used" in out


def test_sound_is_read_no_further_than_the_clip(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan_core.render import video

    write(tmp_path / "in.mp4", patches(40), audio=(torch.zeros(1, 40000), 16000))
    original, lengths = video.read_audio, []

    def read_audio(path: Any, seconds: float | None = None) -> Any:
        found = original(path, seconds)
        lengths.append(found[0].shape[1] / found[1])
        return found

    monkeypatch.setattr(video, "read_audio", read_audio)
    sound = ("--audio", tmp_path / "in.mp4", "--fps", 18)
    code, _, err = run(capsys, *generate(model, tmp_path / "o.mp4", *sound))
    assert code == 0, err
    assert lengths == [pytest.approx(9 / 18, abs=1e-3)]


def printed(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "wan_core", *map(str, arguments)],
        cwd=ROOT, capture_output=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def printed_here(encoding: str, *arguments: Any) -> tuple[int, bytes]:
    """Run a command in this process, its output going to a console of an encoding."""
    wire = io.BytesIO()
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(wire, encoding)) as console,
        contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO(), encoding)),
    ):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as done:  # argparse's help
            code = int(done.code or 0)
        console.flush()
    return code, wire.getvalue()


NAME = "\u0444\u0438\u043b\u044c\u043c \u72d0 \U0001f98a.mp4"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "utf-8", "utf-16"])
def test_a_console_that_cannot_show_a_name_ends_well(
    model: Path, tmp_path: Path, encoding: str
) -> None:
    target = tmp_path / NAME
    for more in ((), ("--json",)):
        code, out = printed_here(encoding, *generate(model, target, *more))
        assert code == 0 and target.exists(), out
        text = out.decode(encoding)
        if more:
            assert json.loads(text)["output_path"] == str(target)
        else:
            assert (NAME if encoding.startswith("utf") else r"\u72d0 \U0001f98a.mp4") in text
        target.unlink()
    code, out = printed_here(encoding, "inspect", tmp_path / NAME, "--json")
    assert code == 1
    assert NAME in json.loads(out.decode(encoding))["errors"][0]
    for command in ("--help", "generate", "estimate"):
        more_help = () if command == "--help" else ("--help",)
        assert printed_here(encoding, command, *more_help)[0] == 0


def test_a_process_of_its_own_on_such_a_console(model: Path, tmp_path: Path) -> None:
    failed = printed("inspect", tmp_path / NAME, "--json", PYTHONIOENCODING="cp437")
    assert failed.returncode == 1
    assert NAME in json.loads(failed.stdout.decode("cp437"))["errors"][0]
    done = printed("inspect", model, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_names_that_are_no_text_are_printed(model: Path, tmp_path: Path) -> None:
    """On Linux a name is bytes; Python shows those that are no UTF-8 as lone surrogates."""
    target = os.fsdecode(bytes(tmp_path) + b"/bad\xff.mp4")
    try:
        Path(target).touch()
    except OSError:
        return  # a file system of texts: there is no such name
    done = printed("inspect", target)
    assert done.returncode == 1 and b"Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no /bin/sh")
def test_a_reader_that_stops_reading_is_no_error(model: Path) -> None:
    command = f"{sys.executable} -m wan_core inspect {model} --json; echo code $? >&2"
    done = subprocess.run(
        ["/bin/sh", "-c", f"({command}) | true"], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert "code 0" in done.stderr and "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_home_folder_is_found_in_every_path(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbf5: a fox\na hare")
    write(tmp_path / "sound.mp4", patches(5), audio=(torch.zeros(1, 8000), 16000))
    more = ("--prompts", "~/texts.txt", "--audio", "~/sound.mp4")
    code, _, err = run(capsys, *generate(Path("~/model"), Path("~/out.mp4"), *more))
    assert code == 0, err
    assert (tmp_path / "out.mp4").exists() and not (tmp_path / "~").exists()
    code, out, _ = run(capsys, "inspect", "~/model")
    assert code == 0 and "wan2.2-t2v-a14b" in out


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.mp3", "concat:a|b", "tcp://127.0.0.1:9"])
def test_sound_is_a_file_whatever_it_is_called(
    model: Path, tmp_path: Path, capsys: Any, address: str
) -> None:
    code, _, err = run(capsys, *generate(model, tmp_path / "o.mp4", "--audio", address))
    assert code == 1 and "cannot be read as sound" in err and "No such file" in err


def test_a_missing_model(capsys: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "~nobody-of-this-name/model"):
        for command in ("inspect", "estimate"):
            code, _, err = run(capsys, command, path)
            assert code == 1 and "does not exist" in err and "Traceback" not in err


def test_ctrl_c_ends_with_130_and_leaves_only_the_journal(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "o.mp4"
    arguments = [str(a) for a in generate(model, target, "--steps", 900)]
    process = subprocess.Popen(
        [sys.executable, "-m", "wan_core", *arguments],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A suite started in the background inherits an ignored SIGINT, as a terminal's never is.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + 180
    while "step/s" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    assert "step/s" in seen, seen
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=120) == 130
    assert "interrupted" in rest and "Traceback" not in rest
    assert "Run the same command again to go on." in rest
    # No video, nothing half written: only the journal the same command goes on from.
    assert [path.name for path in tmp_path.iterdir()] == [".wanfit"]


@pytest.mark.parametrize("package", ["torch", "av"])
def test_a_python_without_the_packages_says_what_to_install(package: str, tmp_path: Path) -> None:
    """A console of another Python than the one of .venv: the first thing that goes wrong."""
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module {package}')")
    ran = subprocess.run(
        [sys.executable, "-m", "wan_core", "demo", "--output", tmp_path / "o.mp4"], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert ran.returncode == 1 and ran.stderr.startswith("error: This Python"), ran.stderr
    assert f"No module {package}. Install them: pip install" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_without_a_command_there_is_an_example_of_each() -> None:
    code, shown = printed_here("utf-8")
    text = shown.decode()
    assert code == 0 and all(len(line) <= 80 for line in text.splitlines())
    for command in ("demo", "download", "inspect", "estimate", "generate", "batch", "serve"):
        assert f"python -m wan_core {command} " in text
    examples = [line.split("wan_core ")[1] for line in text.splitlines() if "  python" in line]
    for example in examples:
        _parser().parse_args(shlex.split(example))  # or argparse ends the test


def test_the_version_is_told(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"WanFit {__version__}\n"


def test_every_option_of_every_command_is_explained() -> None:
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    silent = [
        f"{name} {'/'.join(action.option_strings) or action.dest}"
        for name, command in commands.choices.items()
        for action in command._actions
        if not action.help
    ]
    assert silent == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_that_is_asked_to_end_ends_as_with_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Also a terminal that is closed; asked twice it still keeps what it has begun to keep."""
    from wan_core import __main__ as module

    number, kept = getattr(signal, name), list[str]()

    def work(_: object) -> tuple[str, dict[str, Any]]:
        try:
            signal.raise_signal(number)
            kept.append("all")
        finally:
            signal.raise_signal(number)
            kept.append("the state")
        return "done", {}

    monkeypatch.setattr(module, "_batch", work)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert main(["batch", "jobs.jsonl"]) == 128 + number
        assert kept == ["the state"] and signal.getsignal(number) is signal.SIG_DFL
        said = capsys.readouterr().err
        assert said.startswith("interrupted") and "Run the same command again" in said
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        assert main(["batch", "jobs.jsonl"]) == 0 and kept[1:] == ["all", "the state"]
    finally:
        signal.signal(number, before)


def test_the_demo_writes_over_no_picture_that_has_the_name_of_its_video(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from wan_core import __main__ as module

    def made(*_: object) -> VideoGenerationResult:
        path = tmp_path / "x.mp4"
        return VideoGenerationResult(success=True, frames=torch.zeros(1, 2, 2, 3), output_path=path)

    monkeypatch.setattr(module, "_generated", made)
    (tmp_path / "x.png").write_text("mine")
    assert main(["demo", "--output", str(tmp_path / "x.mp4"), "--json"]) == 0
    assert (tmp_path / "x.png").read_text() == "mine" and (tmp_path / "x.frames.png").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_an_interrupt_that_python_drops_ends_a_command_all_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In a finalizer, as of the locks of imports, an exception is told and nothing more."""
    from wan_core import __main__ as module

    number, dropped = getattr(signal, name), list[bool]()

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def work(_: object) -> tuple[str, dict[str, Any]]:
        Finalized()
        dropped.append(True)
        time.sleep(60)
        return "done", {}

    monkeypatch.setattr(module, "_batch", work)
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before, hook = signal.signal(number, usual), sys.unraisablehook
    try:
        began = time.monotonic()
        assert main(["batch", "jobs.jsonl"]) == 128 + number
        assert dropped and time.monotonic() - began < 50 and sys.unraisablehook is hook
    finally:
        signal.signal(number, before)


def test_a_terminal_that_is_gone_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a log on a full disk; a result that cannot be written is an error."""
    from wan_core import __main__ as module

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    module._say("line 1: done", sys.stderr)
    with pytest.raises(OSError, match="No space"):
        module._say("{}", Full())


class Deaf(io.StringIO):
    """A stream that nobody reads any more, or whose disk is full."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self._code = code

    def write(self, text: str) -> int:
        raise OSError(self._code, os.strerror(self._code))


@pytest.mark.parametrize("code", [errno.EPIPE, None])
def test_progress_that_nobody_can_be_told_ends_no_render(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """``2>&1 | head``, a log on a full disk, a lost terminal, a program without a console."""
    monkeypatch.setattr(sys, "stderr", None if code is None else Deaf(code))
    more = ("--steps", 1, "--frames", 1, "--window", 5, "--overlap", 4)  # which has warnings
    assert main([str(one) for one in generate(model, tmp_path / "a.mp4", *more)]) == 0
    assert (tmp_path / "a.mp4").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here is always full")
def test_a_result_that_cannot_be_written_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["inspect", str(model)]) == 1
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert "cannot be written to stdout: No space left" in capsys.readouterr().err


@pytest.mark.parametrize("stdin", [None, io.StringIO("y\n")])
def test_without_anybody_to_ask_nothing_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, stdin: Any
) -> None:
    """Not by a pipe that happens to say yes, nor where stdin is closed."""
    plan = SimpleNamespace(describe=lambda: "5 files")
    monkeypatch.setattr("wan_core.loading.plan_download", lambda *_: plan)
    monkeypatch.setattr(sys, "stdin", stdin)
    code, _, err = run(capsys, "download", "wan2.2-ti2v-5b")
    assert code == 1 and err.splitlines()[0] == "5 files" and "nobody to ask" in err
