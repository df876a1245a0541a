"""Peak memory and step time against diffusers: same model, same shape.

    python benchmarks/traced_peak.py [--quick] [--output FILE.md]

Memory: true shapes with fake tensors (``tests/support/dry_run.py``). Every operator runs, nothing
is computed, each storage counts from its birth until Python drops it; weights are left out, and
what libraries take inside one operator is not seen. Transformers are run with two blocks; one case
is repeated with all forty, which shows that the peak does not depend on their number. Decoders are
run for as many latent frames as it takes until the peak repeats.

Time: real tensors on one thread of the CPU, small sizes, diffusers and WanFit taking turns; the
median of the ratios, in seconds of the thread, so that what else the machine does counts little.

Writes ``results/traced_peak.md`` and ``.json``. About ten minutes; ``--quick`` is for a look.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from support.casting import cast_module
from support.dry_run import DryModel
from support.true_models import DTYPES, KEEP_FP32, autoencoder, transformer

from wan_core.decoding import host_cache as decode_cache
from wan_core.decoding import lean_decoder
from wan_core.forward import timestep as lean_timestep
from wan_core.forward import transformer as lean_forward
from wan_core.journal import versions
from wan_core.memory import BANDS, CHUNKS, decode_peak, lean_decode_bytes
from wan_core.models import VAE_21, VAE_22, VARIANTS, TransformerShape, VaeShape
from wan_core.sampling import StreamingDecoder, to_frames

MIB = 2**20
A14B, TI2V_5B = "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"


@dataclass
class Row:
    """One figure beside diffusers'; ``goal`` is the ratio aimed at, None where there is none."""

    case: str
    way: str
    value: float
    theirs: float
    goal: float | None = None
    ratio: float = 0.0

    def __post_init__(self) -> None:
        self.ratio = self.ratio or self.value / self.theirs


# -- memory of a denoising pass ---------------------------------------------------------------


@cache
def dry_transformer(shape: TransformerShape, layers: int, dtype: str) -> DryModel:
    return DryModel(lambda: transformer(shape, layers), DTYPES[dtype], KEEP_FP32)


def forward_peak(
    name: str, video: tuple[int, int, int], *, per_token: bool, exact: bool | None,
    layers: int = 2, dtype: str = "bf16",
) -> int:  # fmt: skip
    """Return the peak of one pass; ``exact`` None is diffusers' own forward."""
    variant, kind = VARIANTS[name], DTYPES[dtype]
    shape, scale = variant.transformer, variant.vae.scale_factor_spatial
    frames, height, width = (video[2] - 1) // 4 + 1, video[1] // scale, video[0] // scale
    frame = (height // 2) * (width // 2)

    def run(model: torch.nn.Module) -> object:
        on: Any = nullcontext() if exact is None else lean_forward.lean_forward(model, exact=exact)
        with on as refused:
            assert refused is None, refused
            return model(
                torch.empty(1, shape.in_channels, frames, height, width, dtype=kind),
                torch.empty(1, frames * frame) if per_token else torch.empty(1),
                torch.empty(1, 512, shape.text_dim, dtype=kind),
                return_dict=False,
            )

    with _timesteps_without_values(frame, bool(exact)):
        return dry_transformer(shape, layers, dtype).peak(run)


@contextmanager
def _timesteps_without_values(frame: int, exact: bool) -> Iterator[None]:
    """Let the lean forward find two runs of timesteps in fake tensors, the way it goes on a GPU."""
    embed = lean_timestep._all_tokens if exact else lean_timestep._one_per_run
    with (
        patch.object(lean_forward, "_runs_of", lambda timestep: (0, frame)),
        patch.object(lean_timestep, "_alike", lambda values, starts: True),
        patch.object(lean_timestep, "_one_per_run", embed),
    ):
        yield


DENOISE = [
    (A14B, (832, 480, 81), 0.48, 0.36),
    (A14B, (1280, 720, 81), 0.48, 0.36),
    (TI2V_5B, (1280, 704, 121), 0.25, None),
]
"""Model, size, and the ratios aimed at: with equal bits, and with products cut."""


def denoise_rows(cases: list[Any]) -> Iterator[Row]:
    for name, video, equal, further in cases:
        peak = partial(forward_peak, name, video)
        size = "x".join(map(str, video))
        case = f"{'5B' if name == TI2V_5B else '14B'} {size}, bf16"
        # diffusers' pipelines give the 5B a timestep for every token, WanFit only where an image
        # is held; then on a GPU it embeds every token once, to keep the bits.
        token = name == TI2V_5B
        theirs = peak(per_token=token, exact=None)
        yield Row(case, "diffusers", theirs, theirs)
        if token:
            yield Row(case, "lean, image to video", peak(per_token=True, exact=True), theirs, equal)
            yield Row(case, "lean, text to video", peak(per_token=False, exact=True), theirs, equal)
        else:
            yield Row(case, "lean", peak(per_token=False, exact=True), theirs, equal)
        rows = peak(per_token=token, exact=False)
        yield Row(case, "lean, products by rows and heads", rows, theirs, further)


def depth_rows(video: tuple[int, int, int], layers: int) -> Iterator[Row]:
    """The peak with two blocks beside that with ``layers``."""
    ways = (("diffusers", None), ("lean", True), ("lean, products by rows and heads", False))
    for way, exact in ways:
        two, all_of_them = (
            forward_peak(A14B, video, per_token=False, exact=exact, layers=n) for n in (2, layers)
        )
        yield Row(f"14B {'x'.join(map(str, video))}, {layers} blocks / 2", way, all_of_them, two)


# -- memory of a decode -----------------------------------------------------------------------


@cache
def dry_vae(shape: VaeShape, dtype: str) -> DryModel:
    return DryModel(lambda: autoencoder(shape), DTYPES[dtype])


DECODE = [
    (VAE_21, "VAE 2.1", (832, 480, 81)),
    (VAE_21, "VAE 2.1", (1280, 720, 81)),
    (VAE_22, "VAE 2.2", (1280, 704, 121)),
]


def decode_rows(cases: list[Any], dtypes: tuple[str, ...] = ("fp32", "bf16")) -> Iterator[Row]:
    for shape, name, video in cases:
        for dtype in dtypes:
            case = f"{name} {'x'.join(map(str, video))}, {dtype}"
            peak = partial(decode_dry, shape, video, dtype)
            theirs = peak(None)
            yield Row(case, "diffusers' decoder, frame by frame", theirs, theirs)
            yield Row(case, "diffusers' vae.decode", whole_decode(shape, video, dtype), theirs)
            yield Row(case, "lean", peak({}), theirs, 0.75)
            in_ram = peak({"cache_on_host": True})
            yield Row(case, "lean, its cache in RAM", in_ram, theirs, 0.75)
            yield Row(case, f"{BANDS} bands, cache in RAM", peak({"bands": BANDS}), theirs, 0.4)


def _latents(shape: VaeShape, video: tuple[int, int, int], dtype: str) -> torch.Tensor:
    scale = shape.scale_factor_spatial
    size = (1, shape.z_dim, (video[2] - 1) // 4 + 1, video[1] // scale, video[0] // scale)
    return torch.empty(size, dtype=DTYPES[dtype])


def decode_dry(
    shape: VaeShape, video: tuple[int, int, int], dtype: str, lean: dict[str, Any] | None
) -> int:
    """Return the peak of a streamed decode; ``lean`` None is diffusers' own decoder."""

    def run(vae: Any) -> None:
        on: Any = nullcontext() if lean is None else lean_decoder(vae, **lean)
        with on as refused:
            assert refused is None, refused
            decoder = StreamingDecoder(vae, _latents(shape, video, dtype))
            for _ in range(CHUNKS):
                to_frames(decoder.decode_next())

    with patch.object(decode_cache, "_HOST", torch.device("meta")):  # does not count
        return dry_vae(shape, dtype).peak(run)


def whole_decode(shape: VaeShape, video: tuple[int, int, int], dtype: str) -> int:
    def run(vae: Any) -> object:
        return vae.decode(_latents(shape, video, dtype), return_dict=False)

    return dry_vae(shape, dtype).peak(run)


def workspace_lines() -> Iterator[str]:
    """The decode's ratios where cuDNN's channels-last copies count, which no trace shows."""
    for shape, name, video in DECODE:
        scale = shape.scale_factor_spatial
        numbers: dict[str, Any] = {
            "batch": 1, "latent_frames": (video[2] - 1) // 4 + 1, "size": 4,
            "latent_height": video[1] // scale, "latent_width": video[0] // scale,
        }  # fmt: skip
        theirs = decode_peak(shape, **numbers)
        ways = ({}, {"cache_on_host": True}, {"bands": BANDS, "cache_on_host": True})
        ratios = [lean_decode_bytes(shape, **numbers, **way)[0] / theirs for way in ways]
        yield (
            f"- {name}, {video[0]}x{video[1]}, fp32: diffusers {theirs / MIB:,.0f} MiB; lean "
            f"{ratios[0]:.2f}, its cache in RAM {ratios[1]:.2f}, bands {ratios[2]:.2f}"
        )


# -- time -------------------------------------------------------------------------------------


def seconds_by_turns(ways: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Run each way ``runs`` times, in turn and then in reverse, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(runs + 1):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            begun = time.thread_time()
            ways[name]()
            if turn:
                taken[name].append(time.thread_time() - begun)
    return taken


def time_rows(case: str, ways: dict[str, Callable[[], object]], runs: int) -> Iterator[Row]:
    """Compare with the first way."""
    taken = seconds_by_turns(ways, runs)
    theirs = taken[next(iter(ways))]
    for name, seconds in taken.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, theirs, strict=True))
        yield Row(case, name, statistics.median(seconds), statistics.median(theirs), ratio=ratio)


def under(on: AbstractContextManager[Any], call: Callable[[], object]) -> object:
    with on:
        return call()


STEPS = [  # heads, width of a head, feed-forward, latent size, blocks, turns
    (4, 64, 691, (5, 32, 32), 2, 31),
    (8, 64, 1408, (5, 32, 32), 2, 15),
    (4, 64, 691, (9, 64, 64), 1, 7),
    (12, 128, 8960, (5, 32, 32), 1, 7),
]


def step_rows(cases: list[Any], dtypes: tuple[str, ...] = ("fp32", "bf16")) -> Iterator[Row]:
    from support.tiny_models import make_transformer

    for heads, width, ffn, grid, layers, runs in cases:
        for dtype in dtypes:
            torch.manual_seed(0)
            model = make_transformer(
                "wan2.1-t2v", num_attention_heads=heads, attention_head_dim=width, ffn_dim=ffn,
                num_layers=layers,
            )  # fmt: skip
            cast_module(model, DTYPES[dtype])
            text = model.config.text_dim
            call = partial(
                model, torch.randn(1, 16, *grid).to(DTYPES[dtype]), torch.tensor([500.0]),
                torch.randn(1, 512, text).to(DTYPES[dtype]), return_dict=False,
            )  # fmt: skip

            def lean(exact: bool, model: Any = model, call: Any = call) -> object:
                return under(lean_forward.lean_forward(model, exact=exact), call)

            tokens = grid[0] * grid[1] * grid[2] // 4
            case = f"step, width {heads * width}, {tokens:,} tokens, {layers} blocks, {dtype}"
            further = "lean, products by rows and heads"
            ways = {"diffusers": call, "lean": partial(lean, True), further: partial(lean, False)}
            yield from time_rows(case, ways, runs)


def decode_time_rows(size: int, runs: int) -> Iterator[Row]:
    """The 2.1 decoder in full width, three latent frames."""
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(0)
        vae = autoencoder(VAE_21).eval().to(DTYPES[dtype])
        latents = torch.randn(1, 16, 3, size, size).to(DTYPES[dtype])

        def decode(vae: Any = vae, latents: Any = latents) -> None:
            decoder = StreamingDecoder(vae, latents)
            while not decoder.done:
                decoder.decode_next()

        def lean(bands: int | None, vae: Any = vae, decode: Any = decode) -> object:
            return under(lean_decoder(vae, bands=bands), decode)

        bands = f"{BANDS} bands, cache in RAM"
        ways = {"diffusers": decode, "lean": partial(lean, None), bands: partial(lean, BANDS)}
        yield from time_rows(f"decode, VAE 2.1, {8 * size}x{8 * size}x9, {dtype}", ways, runs)


# -- report -----------------------------------------------------------------------------------


def table(rows: list[Row], unit: str, scale: float, digits: int) -> list[str]:
    lines = [f"| case | way | {unit} | of diffusers' | goal | |", "|---|---|---|---|---|---|"]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:.2f}"
        met = "" if row.goal is None else "met" if row.ratio <= row.goal else "missed"
        lines.append(
            f"| {row.case} | {row.way} | {row.value / scale:,.{digits}f} | {row.ratio:.3f} "
            f"| {goal} | {met} |"
        )
    return lines


def mean_ratios(rows: list[Row]) -> Iterator[str]:
    """Geometric means over the cases, for steps and decodes."""
    for start in ("step", "decode"):
        ways = dict.fromkeys(row.way for row in rows if row.case.startswith(start))
        for way in list(ways)[1:]:
            found = [r.ratio for r in rows if r.way == way and r.case.startswith(start)]
            goal = " (goal 1.00)" if way == "lean" else ""
            mean = statistics.geometric_mean(found)
            yield f"- {start}, {way}: {mean:.3f} of diffusers' over {len(found)} cases{goal}"


def report(parts: dict[str, list[Row]], command: str) -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    load = os.getloadavg()[0]
    return "\n".join(
        [
            "# Memory and time beside diffusers", "",
            f"Made {time.strftime('%Y-%m-%d')} by `{command}`: {found}.", "",
            "## Denoising: bytes alive at the peak of one pass, weights not counted", "",
            "Traced with fake tensors at true shapes, two blocks.", "",
            *table(parts["denoise"], "MiB", MIB, 0), "",
            "More blocks do not change the peak:", "",
            *table(parts["depth"], "MiB", MIB, 0), "",
            "## Decoding: bytes alive at the peak, weights and finished frames not counted", "",
            "Beside diffusers' decoder driven frame by frame, which is the stricter measure: "
            "`vae.decode` also holds the whole video. `lean` has equal bits, also with its cache "
            "in RAM; bands cut convolutions.", "",
            *table(parts["decode"], "MiB", MIB, 0), "",
            "On a GPU cuDNN copies a convolution's input and output to channels-last, which a "
            "trace does not see. With these copies (counted as on an H100, see "
            "`gpu_estimate_h100.json`):", "",
            *workspace_lines(), "",
            "## Time on the CPU", "",
            f"{platform.machine()}, one thread, load {load:.1f} of {os.cpu_count()} cores at the "
            "end. Seconds of the thread, medians; the ratio is the median of the turns' ratios. "
            "One moves by about 0.03 from run to run here, so that the mean is what counts:", "",
            *mean_ratios(parts["time"]), "",
            *table(parts["time"], "seconds", 1, 3), "",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer turns")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/traced_peak.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    small = [(A14B, (256, 256, 17), 0.48, 0.36), (TI2V_5B, (256, 256, 17), 0.25, None)]
    quick = arguments.quick
    sources: dict[str, Callable[[], Iterator[Row]]] = {
        "denoise": partial(denoise_rows, small if quick else DENOISE),
        "depth": partial(depth_rows, small[0][1] if quick else DENOISE[0][1], 3 if quick else 40),
        "decode": partial(decode_rows, [(VAE_21, "VAE 2.1", (64, 64, 17))] if quick else DECODE),
        "time": partial(all_times, quick),
    }
    parts: dict[str, list[Row]] = {}
    for part, rows in sources.items():
        parts[part] = []
        for row in rows():
            parts[part].append(row)
            print(f"{row.case}: {row.way}: {row.value:,.4g}, {row.ratio:.3f}", file=sys.stderr)
    command = "python benchmarks/traced_peak.py" + " --quick" * quick
    text = report(parts, command)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    plain = {part: [asdict(row) for row in rows] for part, rows in parts.items()}
    header = {"command": command, "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    arguments.output.with_suffix(".json").write_text(json.dumps(header | plain, indent=1) + "\n")
    print(text)


def all_times(quick: bool) -> Iterator[Row]:
    yield from step_rows([(2, 32, 128, (2, 8, 8), 1, 2)] if quick else STEPS)
    yield from decode_time_rows(2 if quick else 12, 1 if quick else 5)


if __name__ == "__main__":
    main()
