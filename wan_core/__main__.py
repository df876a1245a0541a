"""Command line: ``python -m wan_core`` with a command; without one it names them all.

The exit code is 0 on success, 1 for an expected error (a line on stderr) or a batch with jobs that
failed, 2 for a wrong command line, 130 after Ctrl-C, 143 after SIGTERM. With ``--json`` stdout is
one object: the API's result, or for an error ``success``, ``errors`` and ``warnings``.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from . import __version__
from .arguments import (
    Told,
    add_batch,
    add_control,
    add_job,
    add_plan,
    add_preferences,
    add_serve,
    add_size,
    ends_in_order,
    number_list,
    plain_word,
    read_text,
    wanted_resume,
)  # fmt: skip
from .config import MIB, GenerationConfig, WanControl, demo_model
from .errors import InvalidRequest, MissingDependency, WanError, first_line
from .files import named_path
from .job import MOST_FRAMES, has_control, reads
from .memory import close_gaps
from .preferences import FIELDS, Preferences, preferences_path, read_preferences, write_preferences

_READ_AS = {"start": "to start from", "leading": "the first frames"}
"""What ``job.reads`` says of an input, in words; the rest says itself."""
_OF_ALL = ("device", "devices", "speed")
"""Options that hold for all jobs of a batch or a server, by their names in OptimizationConfig."""
_PLAN = (
    *_OF_ALL, "precision", "offload", "resident_blocks", "forward", "fp8_storage", "step_cache",
    "step_cache_threshold", "step_cache_factor", "guidance_gate", "vram_limit_gb", "ram_limit_gb",
)  # fmt: skip
"""Options of a plan, by the same names."""
_JOB = (
    "prompt", "negative_prompt", "image", "last_image", "seed", "guidance_scale",
    "guidance_scale_2", "flow_shift", "boundary", "switch_step", "scheduler", "sigma_schedule",
    "guided_steps", "guided_scale", "fps", "drift_correction", "noise", "resume", "codec", "crf",
    "pix_fmt",
)  # fmt: skip
"""Options of a job that have their names in GenerationConfig."""
DEMO_PROMPT = "a red circle moves right on a dark background"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.run is None:  # what there is, with an example each
        _parser().print_help()
        return 0
    try:
        with ends_in_order():
            text, values = _carry_out(arguments)
    except WanError as err:
        if arguments.json:
            failed = {"success": False, "errors": [str(err)], "warnings": arguments.warnings}
            _say(_as_json(failed))
        _say(f"error: {err}", sys.stderr)
        return 1
    except KeyboardInterrupt as err:
        kept = getattr(arguments, "resume", None) not in (None, "never")
        more = " Run the same command again to go on."
        more *= kept or arguments.run in (_download, _batch)
        _say(f"interrupted; nothing half written is left.{more}", sys.stderr)
        return 128 + getattr(err, "signal", 2)
    try:
        _say(_as_json(values) if arguments.json else text)
    except OSError as err:  # as a file on a full disk; the work itself is done
        _say(f"error: what came of it cannot be written to stdout: {err.strerror}", sys.stderr)
        return 1
    return 0 if values.get("success", True) else 1


def _carry_out(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Run a command; a package that this Python lacks is an expected error."""
    try:
        result: tuple[str, dict[str, Any]] = arguments.run(arguments)
    except ImportError as err:
        if (err.name or "").startswith("wan_core"):
            raise
        raise MissingDependency(
            f"This Python ({sys.executable}) lacks a package that WanFit needs: {first_line(err)}. "
            "Install them: pip install -r requirements.txt torch numpy. 'make demo' does so too, "
            "for the Python in .venv."
        ) from err
    return result


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print a text as far as the stream can: by now the work is done, and must not end in an error.

    What a code page lacks becomes \\u escapes. A reader that has gone (``| head``, a terminal that
    was closed) has seen enough, and a full disk keeps no log.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:  # a program without a console
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError as err:
        if err.errno in (errno.EPIPE, errno.EIO):
            # Python flushes the stream once more at its end, and would complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        elif stream is not sys.stderr:
            raise


def _as_json(values: dict[str, Any]) -> str:
    """Return JSON that stdout can show, with JSON's escapes for what the console does not have."""
    text = json.dumps(values, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(values, indent=2, default=str)
    return text


def _parser() -> argparse.ArgumentParser:
    table = {
        "demo": (_demo, "make a video with the small model that ships along", "--seed 7"),
        "download": (_download, "fetch an official model, after asking", "wan2.2-ti2v-5b"),
        "inspect": (_inspect, "say what a model folder or file is", "models/wan2.2-ti2v-5b"),
        "estimate": (_estimate, "say what a run needs, without running it", "MODEL --frames 81"),
        "generate": (_generate, "make a video", 'MODEL --prompt "a fox runs" --output fox.mp4'),
        "batch": (_batch, "make a video for every line of a file", "jobs.jsonl --folder clips"),
        "serve": (_serve, "make videos for who asks over HTTP", "models/wan2.2-ti2v-5b"),
        "preferences": (_preferences, "what jobs take where they say nothing", "--speed fast"),
    }
    examples = [f"  python -m wan_core {name} {given}" for name, (*_, given) in table.items()]
    parser = argparse.ArgumentParser(
        prog="python -m wan_core", description="Runs Wan 2.1 and 2.2 video models on this machine.",
        epilog="\n".join(("examples:", *examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"WanFit {__version__}")
    parser.set_defaults(warnings=[], run=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    made = {name: commands.add_parser(name, help=what) for name, (_, what, _) in table.items()}
    for name, command in made.items():
        command.set_defaults(run=table[name][0])
    demo, download, inspect, estimate, generate, batch, serve, preferences = made.values()

    download.add_argument("variant", help="wan2.2-ti2v-5b, wan2.2-t2v-a14b ...")
    download.add_argument("--to", default="models", metavar="FOLDER", help="(models)")
    download.add_argument("--endpoint", metavar="URL", help="a mirror (default: HF_ENDPOINT)")
    download.add_argument("--yes", action="store_true", help="do not ask")
    download.add_argument("--json", action="store_true", help="print one JSON object")

    for command in (inspect, estimate, generate):
        command.add_argument("path", help="a diffusers folder or a model file")
    for command in (inspect, estimate, generate, demo):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    for command in (estimate, generate):
        add_size(command)
        add_plan(command)
        add_control(command)
    add_job(generate)
    add_batch(batch)
    add_preferences(preferences)
    add_serve(serve)
    demo.add_argument("--prompt", default=DEMO_PROMPT, help=f"({DEMO_PROMPT})")
    demo.add_argument("--seed", type=int, default=0, help="which noise to begin with (0)")
    demo.add_argument("--output", default="output/demo.mp4", metavar="FILE.mp4", help="the video")
    return parser


def _inspect(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .detect import ArchitectureDetector, index_of, inspect_file
    from .models import experts_of
    from .plan import computed_in

    path = Path(os.path.expanduser(named_path(arguments.path, "path")))
    path = path.parent if index_of(path.parent) == path else path
    if path.exists() and index_of(path) is None and not _is_release(path):
        part = inspect_file(path)
        if part.kind != "transformer":
            return _describe_part(part)
    found = ArchitectureDetector().detect_model_architecture(path)
    lines = [f"{found.variant.title} ({found.name})", f"layout: {found.layout}"]
    lines += [f"also possible: {name}" for name in found.candidates if name != found.name]
    for name, component in found.components.items():
        size = f", {component.nbytes / MIB:,.0f} MiB" if component.nbytes else ""
        kind = component.stored_as or component.weight_kind
        if name in (*experts_of(found), "text_encoder") and kind:
            kind += f", {computed_in(found, name)}"
        lines.append(f"  {name}: {component.path.name}{size} {kind}".rstrip())
    lines += [f"because {reason}" for reason in found.reasons]
    lines += [f"warning: {warning}" for warning in found.warnings]
    control = reads(found) if found.variant.supported else {}
    if not found.variant.supported:
        lines.append(f"cannot be run: {found.variant.why_not}")
    if control:
        said = (f"{name} ({_READ_AS[how]})" if how in _READ_AS else name
                for name, how in control.items())  # fmt: skip
        lines.append(f"takes as control: {', '.join(said)}")
    return "\n".join(lines), found.to_json_dict() | {"control": dict(control)}


def _is_release(path: Path) -> bool:
    from .detect import is_release

    return path.is_dir() and is_release(path)


def _describe_part(part: Any) -> tuple[str, dict[str, Any]]:
    """Describe a file that holds one component other than a transformer, a LoRA, or neither."""
    kind = part.weights.title or part.weights.name
    size = f"{part.table.nbytes / MIB:,.0f} MiB {kind}, layout {part.layout}"
    lines = [f"{part.title}: {size}"]
    lines += [f"because {reason}" for reason in part.reasons]
    lines += [f"warning: {warning}" for warning in part.warnings]
    recipe = None
    if part.kind == "lora":
        from .models import recipe_of

        recipe = recipe_of(part.table.path, part.table.metadata)
        lines += [f"{recipe.describe()} ({recipe.reason})"] if recipe is not None else []
    return "\n".join(lines), {
        "recipe": None if recipe is None else recipe.describe(),
        "variant": None,
        "kind": part.kind,
        "title": part.title,
        "layout": part.layout,
        "weight_kind": part.weights.name,
        "bytes": part.table.nbytes,
        "reasons": list(part.reasons),
        "warnings": list(part.warnings),
    }


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return those of the options that were given."""
    values = ((name, getattr(arguments, name)) for name in names)
    return {name: value for name, value in values if value is not None}


def _open(arguments: argparse.Namespace) -> Any:
    from .detect import parse_lora
    from .render import WanPipelineLoader

    return WanPipelineLoader().load_wan_pipeline(
        arguments.path,
        optimization_config=_given(arguments, _PLAN),
        loras=[parse_lora(text) for text in arguments.lora],
        use_recipe=arguments.use_recipe,
    )


def _control(arguments: argparse.Namespace, most: int) -> WanControl | None:
    """Read the files of the control, at most ``most`` frames of a video; None without any."""
    from .render import read_numbers, read_pictures, read_video

    def path(name: str) -> Any:
        return getattr(arguments, f"control_{name}")

    videos = {
        name: read_video(path(name), f"control.{name}", most)
        for name in ("video", "mask", "face_video", "background_video")
        if path(name) is not None
    }
    pictures: dict[str, Any] = {}
    if path("keyframes") is not None:
        pictures["keyframes"] = read_pictures(path("keyframes"), "control.keyframes")
    if path("reference") is not None:  # of several sizes, if they like
        pictures["reference"] = [
            read_pictures([one], "control.reference") for one in path("reference")
        ]
    if "mask" in videos:
        videos["mask"] = videos["mask"][..., 0]
    control = WanControl(
        **videos,
        **pictures,
        positions=arguments.control_positions,
        camera=read_numbers(arguments.control_camera, "control.camera"),
        tracks=read_text(arguments.control_tracks, "control.tracks"),
        strength=arguments.control_strength,
        denoise=arguments.control_denoise,
        clear_masked=arguments.control_clear_masked,
    )
    return control if has_control(control) else None


def _job(arguments: argparse.Namespace, wrapper: Any, **more: Any) -> GenerationConfig:
    usual = wrapper.architecture.variant.defaults
    shape = usual.shape(arguments.width, arguments.height, arguments.frames)
    frames = shape["num_frames"]
    return GenerationConfig(
        **shape,
        control=_control(arguments, (frames if frames > 0 else MOST_FRAMES) + 3),
        num_inference_steps=arguments.steps,
        max_chunk_size=arguments.window,
        window_overlap=arguments.overlap,
        **more,
    )


def _estimate(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .memory import format_estimate

    wrapper = _open(arguments)
    job = _job(arguments, wrapper, prompt="")
    estimate, largest = wrapper.estimate_memory_usage(job), wrapper.what_fits(job)
    text = f"{format_estimate(estimate)}\n{largest}"
    return text, estimate.to_dict() | {"what_fits": largest}


def _generate(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    wrapper = _open(arguments)
    arguments.resume = wanted_resume(arguments.resume)  # told after an interrupt too
    job = _job(
        arguments,
        wrapper,
        sigmas=number_list(arguments.sigmas),
        window_schedule=arguments.schedule,
        window_fusion=arguments.fusion,
        window_mode=arguments.mode,
        window_anchor=arguments.anchor,
        prompts=read_text(arguments.prompts),
        audio=_read_audio(arguments, wrapper),
        output_path=arguments.output,
        return_frames=False,
        **{name: getattr(arguments, name) for name in _JOB},
    )
    result = _generated(wrapper, job, arguments)
    return wrapper.report(result), result.to_dict()


def _batch(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Carry out a file of jobs; what happens is told on stderr, line by line."""
    from .serve import Batch, base_of, crew_for

    def tell(text: str) -> None:
        if not arguments.json:
            _say(text, sys.stderr)

    path = Path(os.path.expanduser(arguments.path))
    given_folder = arguments.folder
    folder = base_of(path) if given_folder is None else Path(os.path.expanduser(given_folder))
    model = None if arguments.model is None else Path(os.path.expanduser(arguments.model))
    given = _given(arguments, _OF_ALL)
    batch = Batch(
        path, folder, model=model, tries=arguments.tries, optimization=given, tell=tell,
        crew=crew_for(arguments.at_once, arguments.cluster, given, tell),
        plan=arguments.cluster is None,
    )  # fmt: skip
    ledger = batch.run()
    counts = ledger.counts()
    said = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    success = not (counts["failed"] or counts["bad"])
    return f"{said or 'no jobs'}; {ledger.path}", {"success": success, **ledger.to_dict()}


def _serve(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Serve until Ctrl-C or SIGTERM."""
    from .serve import options_of, serve

    wishes = _given(arguments, _OF_ALL)
    serve(options_of(vars(arguments), wishes), lambda text: _say(text, sys.stderr))
    return "ended; what was in work goes on when the server starts again", {}


def _read_audio(arguments: argparse.Namespace, wrapper: Any) -> Any:
    """Read as much of the sound as the clip takes."""
    if arguments.audio is None:
        return None
    from .render import read_audio

    defaults = wrapper.architecture.variant.defaults
    frames = defaults.num_frames if arguments.frames is None else arguments.frames
    frames = max(frames, 1) if frames else MOST_FRAMES  # 0: as long as the control's video
    fps = defaults.fps if arguments.fps is None else arguments.fps
    # An fps that is not allowed is refused later, with all other values.
    return read_audio(arguments.audio, seconds=frames / fps if fps > 0 else 0)


def _generated(wrapper: Any, job: GenerationConfig, arguments: argparse.Namespace) -> Any:
    """Generate, with progress bars and warnings on stderr; raise an expected failure.

    With ``--json`` neither is shown. Warnings are always collected in ``arguments.warnings``.
    """
    from tqdm import tqdm

    quiet, told = arguments.json, Told(sys.stderr)
    bar: Any = None

    def warn(text: str) -> None:
        arguments.warnings.append(text)
        if not quiet:
            tqdm.write(f"warning: {text}", file=told)

    def show(unit: str, done: int, total: int, what: str = "") -> None:
        nonlocal bar
        if bar is None or (bar.unit, bar.desc) != (unit, what and f"{what}: "):
            if bar is not None:
                bar.close()
            bar = tqdm(
                total=total, unit=unit, file=told, desc=what or None,
                unit_scale=unit == "B", unit_divisor=1024,
            )  # fmt: skip
        bar.update(done - bar.n)

    job.warning_callback = warn
    if not quiet:
        job.progress_callback = lambda done, total, latents: show("step", done, total)
        job.decode_callback = lambda done, total: show("frame", done, total)
        job.load_callback = lambda part, done, total: show("B", done, total, f"load {part}")
    try:
        result = wrapper.generate(job)
    finally:
        if bar is not None:
            bar.close()
    return result.raise_for_error()


def _download(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Show what would be fetched and its size, ask, fetch it, and say what it is."""
    from .loading import fetch, plan_download

    plan = plan_download(arguments.variant, arguments.to, arguments.endpoint)
    _say(plan.describe(), sys.stderr)
    if not arguments.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise InvalidRequest("Nothing was fetched: there is nobody to ask. Add --yes.")
        print("Fetch it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise InvalidRequest("Nothing was fetched: the answer was not yes.")
    found = fetch(plan, lambda line: _say(line, sys.stderr))
    text = f"{plan.folder} is whole and was recognised: {found.variant.title} ({found.name})"
    return text, {"folder": str(plan.folder), "bytes": plan.nbytes, "variant": found.name}


def _preferences(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Show what is preferred; with values, keep them first. An empty one is forgotten."""
    found = read_preferences()
    given = {name: getattr(arguments, name) for name in FIELDS}
    asked = {name: text for name, text in given.items() if text is not None}
    if asked:
        read = {name: plain_word(text) for name, text in asked.items()}
        write_preferences(Preferences(**{**found.chosen(), **read}))
        found = read_preferences()
    lines = [str(preferences_path())] + [f"warning: {text}" for text in found.warnings]
    chosen = found.chosen()
    lines += [f"  {name:<14} {chosen.get(name, 'built-in')}" for name in FIELDS]
    return "\n".join(lines), {"path": str(preferences_path()), "preferences": chosen}


def _demo(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .files import atomic_path
    from .render import WanPipelineLoader, contact_sheet

    wrapper = WanPipelineLoader().load_wan_pipeline(demo_model())
    job = GenerationConfig(
        prompt=arguments.prompt,
        seed=arguments.seed,
        **wrapper.architecture.variant.defaults.shape(),
        output_path=arguments.output,
    )
    result = _generated(wrapper, job, arguments)
    sheet = result.output_path.with_suffix(".frames.png")  # a .png of that name is somebody's own
    with atomic_path(sheet) as temporary:
        contact_sheet(result.frames).save(temporary, format="PNG")
    report = f"{wrapper.report(result)}\nframes side by side: {sheet}"
    return report, result.to_dict() | {"contact_sheet": str(sheet)}


if __name__ == "__main__":
    close_gaps()
    sys.exit(main())
