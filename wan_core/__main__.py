"""Command line: ``python -m wan_core inspect | estimate | generate | demo``.

Exit code 0 on success, 1 with one line on an expected error, 2 for a wrong command line, 130 after
Ctrl-C. ``--json`` prints one object with the fields of the API's result and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import GenerationConfig
from .errors import WanError

DEMO_PROMPT = "a red circle moves right on a dark background"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        text, values = arguments.run(arguments)
    except WanError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half written was left behind", file=sys.stderr)
        return 130
    print(json.dumps(values, indent=2, ensure_ascii=False, default=str) if arguments.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wan_core", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="say what a model folder or file is")
    inspect.set_defaults(run=_inspect)
    estimate = commands.add_parser("estimate", help="say what a run needs, without running it")
    estimate.set_defaults(run=_estimate)
    generate = commands.add_parser("generate", help="make a video")
    generate.set_defaults(run=_generate)
    demo = commands.add_parser("demo", help="make a video with the small model that ships along")
    demo.set_defaults(run=_demo)

    for command in (inspect, estimate, generate):
        command.add_argument("path", help="a diffusers folder or a model file")
    for command in (inspect, estimate, generate, demo):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    for command in (estimate, generate):
        _add_size(command)
        _add_plan(command)
    _add_job(generate)
    demo.add_argument("--prompt", default=DEMO_PROMPT)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--output", default="output/demo.mp4", metavar="FILE.mp4")
    return parser


def _add_size(command: argparse.ArgumentParser) -> None:
    command.add_argument("--width", type=int, help="pixels (default: the model's own)")
    command.add_argument("--height", type=int, help="pixels (default: the model's own)")
    command.add_argument("--frames", type=int, help="frames (default: the model's own)")
    command.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    command.add_argument("--window", type=int, help="frames the denoiser sees at once")
    command.add_argument("--overlap", type=int, default=16, help="frames windows share (16)")


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    command.add_argument("--offload", default="auto", help="auto, none, model or sequential")
    command.add_argument("--device", help="cuda:0, cpu ... (default: the best there is)")
    command.add_argument("--vram-limit-gb", type=float, help="use at most so much of the card")


def _add_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", required=True)
    command.add_argument("--negative-prompt", help="default: the model's official one")
    command.add_argument("--image", help="picture of the first frame")
    command.add_argument("--last-image", help="picture of the last frame")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--guidance-scale", type=float, help="of the only or high-noise expert")
    command.add_argument("--guidance-scale-2", type=float, help="of the low-noise expert")
    command.add_argument("--flow-shift", type=float)
    command.add_argument("--boundary", type=float, help="share of timesteps where experts switch")
    command.add_argument("--scheduler", help="unipc, euler or dpm++2m")
    command.add_argument("--fps", type=float)
    command.add_argument("--output", required=True, metavar="FILE.mp4")


def _inspect(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .detect import ArchitectureDetector, inspect_file

    path = Path(arguments.path)
    if path.exists() and not (path / "model_index.json").is_file() and not _is_release(path):
        part = inspect_file(path)
        if part.kind != "transformer":
            return _describe_part(part)
    found = ArchitectureDetector().detect_model_architecture(path)
    lines = [f"{found.variant.title} ({found.name})", f"layout: {found.layout}"]
    lines += [f"also possible: {name}" for name in found.candidates if name != found.name]
    for name, component in found.components.items():
        size = f", {component.nbytes / 2**20:,.0f} MiB" if component.nbytes else ""
        lines.append(f"  {name}: {component.path.name}{size} {component.weight_kind}".rstrip())
    lines += [f"because {reason}" for reason in found.reasons]
    lines += [f"warning: {warning}" for warning in found.warnings]
    if not found.variant.supported:
        lines.append(f"cannot be run: {found.variant.why_not}")
    return "\n".join(lines), found.to_json_dict()


def _is_release(path: Path) -> bool:
    from .folders import is_release

    return path.is_dir() and is_release(path)


def _describe_part(part: Any) -> tuple[str, dict[str, Any]]:
    """Describe a file that is one part of a pipeline, or none at all."""
    size = f"{part.table.nbytes / 2**20:,.0f} MiB {part.weights.name}, layout {part.layout}"
    lines = [f"{part.title}: {size}"]
    lines += [f"because {reason}" for reason in part.reasons]
    lines += [f"warning: {warning}" for warning in part.warnings]
    return "\n".join(lines), {
        "variant": None,
        "kind": part.kind,
        "title": part.title,
        "layout": part.layout,
        "weight_kind": part.weights.name,
        "bytes": part.table.nbytes,
        "reasons": list(part.reasons),
        "warnings": list(part.warnings),
    }


def _open(arguments: argparse.Namespace) -> Any:
    from .load import WanPipelineLoader

    wishes = {
        "precision": arguments.precision,
        "offload": arguments.offload,
        "device": arguments.device,
        "vram_limit_gb": arguments.vram_limit_gb,
    }
    given = {name: value for name, value in wishes.items() if value is not None}
    return WanPipelineLoader().load_wan_pipeline(arguments.path, optimization_config=given)


def _job(arguments: argparse.Namespace, wrapper: Any, **more: Any) -> GenerationConfig:
    defaults = wrapper.architecture.variant.defaults
    return GenerationConfig(
        width=defaults.width if arguments.width is None else arguments.width,
        height=defaults.height if arguments.height is None else arguments.height,
        num_frames=defaults.num_frames if arguments.frames is None else arguments.frames,
        num_inference_steps=arguments.steps,
        max_chunk_size=arguments.window,
        window_overlap=arguments.overlap,
        **more,
    )


def _estimate(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .memory import format_estimate

    wrapper = _open(arguments)
    needs_image = wrapper.architecture.variant.image_input == "required"
    # Only its presence counts here; no picture is read for an estimate.
    job = _job(arguments, wrapper, prompt="", image="first.png" if needs_image else None)
    estimate = wrapper.estimate_memory_usage(job)
    return format_estimate(estimate), estimate.to_dict()


def _generate(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    wrapper = _open(arguments)
    job = _job(
        arguments,
        wrapper,
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        image=arguments.image,
        last_image=arguments.last_image,
        seed=arguments.seed,
        guidance_scale=arguments.guidance_scale,
        guidance_scale_2=arguments.guidance_scale_2,
        flow_shift=arguments.flow_shift,
        boundary=arguments.boundary,
        scheduler=arguments.scheduler,
        fps=arguments.fps,
        output_path=arguments.output,
        return_frames=False,
    )
    result = _generated(wrapper, job, quiet=arguments.json)
    return wrapper.report(result), result.to_dict()


def _generated(wrapper: Any, job: GenerationConfig, *, quiet: bool) -> Any:
    """Generate with a progress bar on stderr; an expected failure is raised."""
    from tqdm import tqdm

    bar: Any = None

    def progress(step: int, total: int, latents: Any) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="step", disable=quiet, file=sys.stderr)
        bar.update(step - bar.n)

    job.progress_callback = progress
    try:
        result = wrapper.generate(job)
    finally:
        if bar is not None:
            bar.close()
    return result.raise_for_error()


def _demo(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .files import atomic_path
    from .load import WanPipelineLoader
    from .video import contact_sheet

    wrapper = WanPipelineLoader().load_wan_pipeline(demo_model_path())
    defaults = wrapper.architecture.variant.defaults
    job = GenerationConfig(
        prompt=arguments.prompt,
        seed=arguments.seed,
        width=defaults.width,
        height=defaults.height,
        num_frames=defaults.num_frames,
        output_path=arguments.output,
    )
    result = _generated(wrapper, job, quiet=arguments.json)
    sheet = Path(arguments.output).with_suffix(".png")
    with atomic_path(sheet) as temporary:
        contact_sheet(result.frames).save(temporary, format="PNG")
    report = f"{wrapper.report(result)}\nframes side by side: {sheet}"
    return report, result.to_dict() | {"contact_sheet": str(sheet)}


def demo_model_path(kind: str = "t2v") -> Path:
    """Return the folder of the small model that ships with the package, "t2v" or "i2v"."""
    return Path(__file__).parent / "demo_model" / kind


if __name__ == "__main__":
    sys.exit(main())
