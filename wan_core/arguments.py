"""The command line's arguments: one function per group, each adds its group to a command.

And how a command ends that is asked to.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .config import CODECS, SPEEDS
from .errors import InvalidRequest
from .files import decode_text
from .job import FUSIONS, SCHEDULERS
from .plan import FORWARDS, FP8, OFFLOADS, STEP_CACHES
from .preferences import FIELDS, read_preferences

_PREFERRED = {
    "speed": ("|".join(SPEEDS), "what may be changed to be faster: no bit, rounding, the video"),
    "vram_limit_gb": ("GIB", "use at most so much of the card"),
    "ram_limit_gb": ("GIB", "use at most so much RAM"),
    "preview": ("true|false", "moving pictures in ComfyUI while a clip is made"),
    "codec": ("|".join(CODECS), "of the mp4s"),
    "journal": ("true|false", "whether a render that was cut off can go on"),
}


def add_size(command: argparse.ArgumentParser) -> None:
    """Add how large and how long a clip is; None means the model's own."""
    command.add_argument("--width", type=int, help="pixels (default: the model's own)")
    command.add_argument("--height", type=int, help="pixels (default: the model's own)")
    command.add_argument(
        "--frames", type=int, help="frames, 0: those of --control-video (the model's own)"
    )
    command.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    command.add_argument("--window", type=int, help="frames the denoiser sees at once")
    command.add_argument("--overlap", type=int, help="frames windows share (16, or to fill cards)")


def add_plan(command: argparse.ArgumentParser) -> None:
    """Add what a plan is asked for (``OptimizationConfig``), and LoRAs."""
    command.add_argument("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    command.add_argument("--offload", default="auto", help=", ".join(OFFLOADS))
    command.add_argument("--resident-blocks", type=int, help="stream, and keep so many blocks")
    command.add_argument("--forward", default="auto", help=", ".join(FORWARDS))
    command.add_argument("--fp8-storage", default="auto", help=", ".join(FP8))
    command.add_argument("--speed", help=", ".join(SPEEDS) + " (as preferred, else exact)")
    command.add_argument("--step-cache", default="auto", help=", ".join(STEP_CACHES))
    command.add_argument(
        "--step-cache-threshold", type=float, metavar="0..1", help="for easycache: its error (0.05)"
    )
    command.add_argument("--step-cache-factor", type=float, metavar="1..4", help="for magcache")
    command.add_argument("--guidance-gate", type=float, metavar="0..1", help="steps fully guided")
    command.add_argument("--device", help="cuda:0, cpu ... (default: the best there is)")
    command.add_argument("--devices", default="1", help="cards: a number, all, auto, or 0,2 (1)")
    command.add_argument("--vram-limit-gb", type=float, help="use at most so much of the card")
    command.add_argument("--ram-limit-gb", type=float, help="use at most so much RAM")
    command.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:EXPERT[:STRENGTH]]",
        help="a LoRA; expert both, high or low, strength 1.0; may be given several times",
    )  # fmt: skip
    command.add_argument(
        "--use-recipe", action="store_true",
        help="steps, scales and shift that a distilled LoRA was trained for",
    )  # fmt: skip


def add_control(command: argparse.ArgumentParser) -> None:
    """Add what guides the clip; pictures and videos are files, frames are counted from 0."""
    for name, many, what in (
        ("video", None, "a video to start from, or to follow where the model reads one"),
        ("mask", None, "a picture or a video, white = make something new"),
        ("reference", "+", "pictures of what shall appear"),
        ("keyframes", "+", "pictures that the clip shows at --control-positions"),
        ("camera", None, "a .npy file of WanCameraEmbedding's rays, for Fun Camera"),
        ("tracks", None, "a JSON file of tracks, for image-to-video models trained on them"),
        ("face-video", None, "crops of a face that a character's face moves like (Animate)"),
        ("background-video", None, "the video whose character is replaced (Animate)"),
    ):
        command.add_argument(f"--control-{name}", nargs=many, metavar="FILE", help=what)
    command.add_argument("--control-positions", default="", help="'0, 40, -1' (evenly spread)")
    command.add_argument("--control-strength", type=float, default=1.0, help="for VACE (1)")
    command.add_argument("--control-denoise", type=float, default=1.0, help="share of steps (1)")
    command.add_argument(
        "--control-clear-masked", action="store_true", help="make the masked area grey"
    )


def add_job(command: argparse.ArgumentParser) -> None:
    """Add what the clip shows, how it is made and where it goes (``GenerationConfig``)."""
    command.add_argument("--prompt", default=None, help="what is to be seen")
    command.add_argument("--negative-prompt", help="default: the model's official one")
    command.add_argument("--image", help="picture of the first frame")
    command.add_argument("--last-image", help="picture of the last frame")
    command.add_argument("--seed", type=int, default=0, help="which noise to begin with (0)")
    command.add_argument("--guidance-scale", type=float, help="of the only or high-noise expert")
    command.add_argument("--guidance-scale-2", type=float, help="of the low-noise expert")
    command.add_argument(
        "--flow-shift",
        type=float,
        help="above 1: more steps at high noise (the model's own)",
    )
    command.add_argument("--boundary", type=float, help="share of timesteps where experts switch")
    command.add_argument("--switch-step", type=int, help="first step of the low-noise expert")
    command.add_argument("--scheduler", help=", ".join(SCHEDULERS))
    command.add_argument(
        "--sigma-schedule", help="noise levels: official (Wan's), or simple (ComfyUI's)"
    )
    command.add_argument(
        "--guided-steps", type=int, default=0, help="first steps without the distilled LoRAs"
    )
    command.add_argument("--guided-scale", type=float, help="guidance scale of the guided steps")
    command.add_argument("--sigmas", metavar="1,0.75,...", help="noise levels one by one")
    command.add_argument("--fps", type=float, help="frames per second (the model's own)")
    command.add_argument("--prompts", metavar="FILE", help="lines FRAMES: TEXT, for --prompt")
    command.add_argument("--schedule", default="static", help="static, uniform or looped windows")
    command.add_argument(
        "--fusion", default="ramp", help="how windows blend: " + ", ".join(FUSIONS)
    )
    command.add_argument("--noise", default="clip", help="clip, frame or freenoise")
    command.add_argument("--mode", default="windows", help="windows, or continuation (I2V, 5B)")
    command.add_argument("--anchor", action="store_true", help="show windows the frame before them")
    command.add_argument(
        "--drift-correction", type=float, default=0.0, metavar="0..1",
        help="move the colours of later segments to those of the first",
    )  # fmt: skip
    command.add_argument(
        "--resume",
        help="auto: go on with this render if it was cut off (auto); must: only that; never: anew",
    )  # fmt: skip
    command.add_argument("--audio", metavar="FILE", help="sound that goes into the video")
    command.add_argument("--codec", help=", ".join(CODECS) + " (as preferred, else h264)")
    command.add_argument("--crf", type=int, default=18, help="0 best .. 51 smallest (18)")
    command.add_argument("--pix-fmt", default="yuv420p", help="yuv420p plays everywhere")
    command.add_argument("--output", required=True, metavar="FILE.mp4", help="the video")


def add_batch(command: argparse.ArgumentParser) -> None:
    """Add what holds for all jobs of a file; each line may say otherwise."""
    command.add_argument("path", help="a file with a JSON object on each line: model, output ...")
    command.add_argument("--folder", help="where the clips go (default: beside the file)")
    command.add_argument("--model", help="for lines that name none")
    command.add_argument("--tries", type=int, default=2, help="before a job is set aside (2)")
    command.add_argument("--device", help="cuda:0, cpu ... (default: the best there is)")
    command.add_argument("--devices", help="cards for one clip: a number, all, auto, or 0,2 (1)")
    command.add_argument("--speed", help=", ".join(SPEEDS))
    add_crew(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(resume="auto")


def add_preferences(command: argparse.ArgumentParser) -> None:
    """Add what a user may prefer (``Preferences``); an empty text goes back to what is built in."""
    for name in FIELDS:
        values, what = _PREFERRED[name]
        command.add_argument(f"--{name.replace('_', '-')}", metavar=values, help=what)
    command.add_argument("--json", action="store_true", help="print one JSON object")


def add_crew(command: argparse.ArgumentParser) -> None:
    """Add who carries jobs out: how many at once, and where."""
    command.add_argument(
        "--at-once", metavar="N",
        help="jobs at the same time, each on cards of its own; all: as many as there is room for; "
        "overlap: one on --devices cards, and the next begins there while it is decoded",
    )  # fmt: skip
    command.add_argument(
        "--cluster", metavar="ADDRESS", help="let a Ray cluster do it: auto, local, HOST:PORT"
    )


def add_serve(command: argparse.ArgumentParser) -> None:
    """Add what a server has and who may use it."""
    command.add_argument("model", help="a diffusers folder or a model file")
    command.add_argument("--folder", default="videos", help="queue, inputs and clips (videos)")
    command.add_argument("--host", default="127.0.0.1", help="others can reach it: needs a token")
    command.add_argument("--port", type=int, default=8091, help="(8091; 0: any that is free)")
    command.add_argument("--token-file", metavar="FILE", help="(else the variable WANFIT_TOKEN)")
    command.add_argument("--upload-mb", type=float, default=64.0, help="largest upload, MiB (64)")
    command.add_argument("--tries", type=int, default=2, help="before a job fails for good (2)")
    command.add_argument(
        "--queue-limit", type=int, default=10_000, metavar="N",
        help="jobs that may wait; more are answered 429 (10000)",
    )  # fmt: skip
    command.add_argument(
        "--folder-gb", type=float, metavar="GB",
        help="while the folder holds so much no job is taken, 507, and none begins (no limit)",
    )  # fmt: skip
    command.add_argument("--device", help="cuda:0, cpu ... (default: the best there is)")
    command.add_argument("--devices", help="cards for one clip: a number, all, auto, or 0,2 (1)")
    command.add_argument("--speed", help=", ".join(SPEEDS))
    command.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:EXPERT[:STRENGTH]]",
        help="for all clips; may be given several times",
    )  # fmt: skip
    command.add_argument("--use-recipe", action="store_true", help="as of generate")
    command.add_argument("--lora-folder", metavar="FOLDER", help="LoRAs that requests may name")
    add_crew(command)
    command.set_defaults(json=False, resume="auto")


def wanted_resume(given: str | None) -> str | None:
    """Return ``--resume``, or "auto" where it is not given; None where no journal is wanted."""
    return "auto" if given is None and read_preferences().journal is not False else given


def plain_word(text: str) -> Any:
    """Return a word of the command line as JSON has it; None for an empty one."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def number_list(text: str | None) -> list[float] | None:
    """Return the numbers of ``--sigmas``; raises InvalidRequest for what is none."""
    try:
        return None if text is None else [float(word) for word in text.replace(",", " ").split()]
    except ValueError as err:
        raise InvalidRequest(
            f"--sigmas is {text!r}; numbers with commas between are needed ({err}).", field="sigmas"
        ) from err


def read_text(path: str | None, field: str = "prompts") -> str | None:
    """Return what is in a text file, as editors save it; raises InvalidRequest."""
    if path is None:
        return None
    try:
        return decode_text(Path(os.path.expanduser(path)).read_bytes())
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidRequest(f"{field}: {path} cannot be read ({err}).", field=field) from err


class Told:
    """A stream for what is told of work that goes on: a reader that has gone, or a full disk where
    a log is kept, ends no render. tqdm alone forgives nothing but a lost terminal.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()


_LOST_SECONDS = 0.05
"""How long is waited before an interrupt that Python has dropped is sent again. Assumed."""


class AskedToEnd(KeyboardInterrupt):
    """The process was asked to end by ``signal``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextlib.contextmanager
def ends_in_order() -> Iterator[None]:
    """Have SIGTERM, and SIGHUP of a terminal that is closed, end a command as Ctrl-C does.

    What is in work is kept then. One that is ignored, as under ``nohup``, stays so; and so does all
    where a program of its own calls the command in another thread, or hears these signals itself.
    """
    before: dict[int, Any] = {}
    begun = False
    """Whether the command is ending: who asks twice is not to interrupt that."""
    unraisable = sys.unraisablehook

    def end(number: int, _: object) -> None:
        nonlocal begun
        if not begun:
            begun = True
            raise AskedToEnd(number)

    def again(number: int) -> None:
        nonlocal begun
        time.sleep(_LOST_SECONDS)  # by then what could not be interrupted is over
        begun = False
        _send_to_main(number)

    def lost(told: Any) -> None:
        """Ask once more where Python drops the interrupt: of a finalizer or a weak reference."""
        if isinstance(told.exc_value, KeyboardInterrupt):
            number = getattr(told.exc_value, "signal", signal.SIGINT)
            # This may run anywhere, also under the locks of ``threading``.
            _thread.start_new_thread(again, (number,))
        else:
            unraisable(told)

    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = lost
        numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
        for number in filter(None, numbers):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        if sys.unraisablehook is lost:
            sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def _send_to_main(number: int) -> None:
    """Send this process' main thread a signal, which also ends what it waits for."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)
