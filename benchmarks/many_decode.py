"""One clip's latents decoded on one card and in strips on several: seconds, error, peaks.

Called by ``many.py``, or by itself with a model folder that it writes (VAEs of true structure with
their classes' beginning weights): ``python benchmarks/many_decode.py [--devices 2] [--tiny]``. What
a trial shows is kept for the plans that come after, as a render would.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.loading import dtype_of, load_component
from wan_core.memory import CardRecords, Trial, estimate, strips_of
from wan_core.plan import strips_forecast
from wan_core.sampling import StreamingDecoder, to_pictures
from wan_core.workers import StripsDecoder, Weights, WorkerPool, placed

MIB = 2**20


@dataclass(frozen=True)
class Decode:
    """A clip, and the speed whose decode is measured: "exact" in fp32, "fast" in fp16."""

    width: int
    height: int
    frames: int
    speed: str
    model: str = "wan2.2-t2v-a14b"
    seconds: float = 25.0
    """About what a measurement takes on one number of cards, its processes' start included."""

    @property
    def name(self) -> str:
        return f"{self.model} {self.width}x{self.height}, {self.frames} frames, {self.speed}"


DECODES = (
    Decode(832, 480, 81, "fast"),
    Decode(832, 480, 81, "exact"),
    Decode(1280, 720, 81, "fast"),
    Decode(1280, 704, 121, "fast", "wan2.2-ti2v-5b"),
)
TINY_DECODES = (Decode(80, 48, 13, "fast"),)


class Made:
    """What a decode gives: its pictures, seconds from beginning to end, and peak bytes."""

    def __init__(self) -> None:
        self.pictures: list[torch.Tensor] = []
        self.seconds = 0.0
        self.first_seconds = 0.0


def _timed(made: Made, pictures: Any) -> Made:
    began = time.perf_counter()
    made.pictures.clear()
    for one in pictures:
        if not made.pictures:
            made.first_seconds = time.perf_counter() - began
        made.pictures.append(one.clone())
    made.seconds = time.perf_counter() - began
    return made


def alone(model: Any, plan: Any, latents: torch.Tensor) -> tuple[Made, int]:
    """Decode on one card, the second time with what the first has compiled and allocated."""
    part, dtype = model.architecture.components["vae"], dtype_of(plan.choices.dtypes["vae"])
    on_card = plan.device.startswith("cuda")
    vae = load_component(part.path, dtype, kind="vae", map_file=False)
    made = Made()
    with torch.no_grad(), placed(vae, "vae", plan, check=lambda: None):
        for _ in range(2):
            if on_card:
                torch.cuda.reset_peak_memory_stats()
            decoder = StreamingDecoder(vae, latents.to(plan.device, dtype))

            def all_of_it(decoder: StreamingDecoder = decoder) -> Any:
                while not decoder.done:
                    yield to_pictures(decoder.decode_next(), whole_bytes=False).to("cpu")

            _timed(made, all_of_it())
            decoder.close()
        peak = torch.cuda.max_memory_allocated() if on_card else 0
    if on_card:
        del vae, decoder
        torch.cuda.empty_cache()
    return made, peak


def in_strips(
    model: Any, plan: Any, latents: torch.Tensor, count: int, size: tuple[int, int]
) -> tuple[Made, list[int], dict[str, float]]:
    """Decode in strips by ``count`` workers, the second time with all in its place."""
    architecture, dtype = model.architecture, plan.choices.dtypes["vae"]
    shape = architecture.vae_shape
    devices = [f"cuda:{i}" for i in range(count)]
    devices = devices if plan.device.startswith("cuda") else ["cpu"] * count
    weights = Weights.of(
        "vae", architecture.components["vae"], plan, (), fp8=False, mapped=False, nbytes=2**29,
        pin_limit=None, shape=architecture.transformer,
    )  # fmt: skip
    began, made = time.perf_counter(), Made()
    pool = WorkerPool(devices)
    took = {}
    try:
        while len(ranks := pool.free_ranks(count)) < count:
            pool.wait(0.05)
        took["start"] = time.perf_counter() - began
        strips = strips_of(shape, latents.shape[3], latents.shape[4], count)
        chunk = (latents.shape[0], shape.scale_factor_temporal, size[1], size[0], 3)
        for turn in ("with loading", "again"):
            decoder = StripsDecoder(
                pool, weights, latents.to(dtype_of(dtype)), strips, ranks, chunk,
                whole_bytes=False,
            )  # fmt: skip

            def all_of_it(decoder: StripsDecoder = decoder) -> Any:
                with decoder:
                    while not decoder.done:
                        yield decoder.pictures(lambda: None)
                        decoder.taken()

            _timed(made, all_of_it())
            took[turn] = made.seconds
            while len(pool.free_ranks(count)) < count:
                pool.wait(0.02)
        peaks = [one.get("decode_peak_bytes", 0) for one in pool.describe()]
    finally:
        pool.close()
    return made, peaks, took


def decode(folder: Path, case: Decode, counts: list[int], tiny: bool) -> list[dict[str, Any]]:
    """Measure a clip's decode on one card and on each of ``counts``."""
    wishes: dict[str, Any] = {"speed": case.speed}
    wishes |= {"device": "cpu", "precision": "fp32"} if tiny else {}
    model = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        folder, optimization_config=wishes
    )
    config = GenerationConfig(
        prompt="", width=case.width, height=case.height, num_frames=case.frames
    )
    told = model.foresee(config)
    assert told.plan is not None
    plan = replace(told.plan, choices=replace(told.plan.choices, lean=True))
    shape = model.architecture.vae_shape
    space = shape.scale_factor_spatial
    latents = torch.randn(
        1, shape.z_dim, 1 + (case.frames - 1) // 4, case.height // space, case.width // space,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    whole, peak = alone(model, plan, latents)
    # The VAE is by itself here: what other parts would leave on the card is not counted.
    choices = replace(plan.choices, offload="model", stream=False)
    stages = estimate(model.architecture, told.workload, choices, told.system).stages
    stage = next(one for one in stages if one.name == "decode")
    foreseen = {
        count: strips_forecast(model.architecture, told.workload, plan.choices, told.system, count)
        for count in counts
    }
    common = {"case": case.name, "vae": plan.choices.dtypes["vae"]}
    found = [
        common | {
            "devices": 1, "seconds": whole.seconds, "peak_mib": [round(peak / MIB)],
            "predicted_seconds": next(iter(foreseen.values())).whole_seconds,
            "predicted_peak_mib": round(stage.device_bytes / MIB),
        }
    ]  # fmt: skip
    expected = torch.cat(whole.pictures, 1)
    for count, strips in foreseen.items():
        made, peaks, took = in_strips(model, plan, latents, count, (case.width, case.height))
        given = torch.cat(made.pictures, 1)
        equal, apart = torch.equal(given, expected), (given - expected).double()
        error = float(apart.norm() / expected.double().norm())
        CardRecords().keep_trial(strips.kind, Trial(equal, 0.0 if equal else error))
        found.append(common | {
            "devices": count, "seconds": made.seconds, "first_pictures": made.first_seconds,
            "took": took, "equal": equal, "error": error, "largest": float(apart.abs().max()),
            "predicted_seconds": strips.seconds,
            "peak_mib": [round(one / MIB) for one in peaks],
            "predicted_peak_mib": round(strips.peak_bytes / MIB),
        })  # fmt: skip
    for one in found:
        print(json.dumps(one), flush=True)
    return found


def decode_table(found: list[dict[str, Any]]) -> list[str]:
    """Return the results as lines of Markdown; none where there are no results."""
    if not found:
        return []
    lines = [
        "", "| decode | cards | s | predicted | speed-up | bits | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    alone = 0.0
    for one in found:
        strips = one["devices"] > 1
        alone = alone if strips else one["seconds"]
        bits = f"rounding, relative error {one.get('error', 0):.1e}"
        bits = "equal" if one.get("equal") else bits
        # Reports of before have no prediction for one card beside the first strips'.
        predicted = one.get("predicted_seconds")
        lines.append(
            f"| {one['case']}, VAE {one['vae']} | {one['devices']} | {one['seconds']:.2f} | "
            f"{'-' if predicted is None else f'{predicted:.2f}'} | {alone / one['seconds']:.2f} | "
            f"{bits if strips else 'the reference'} | "
            f"{', '.join(map(str, one['peak_mib']))} ({one['predicted_peak_mib']}) |"
        )
    return lines


def vae_folder(folder: Path, name: str, tiny: bool) -> Path:
    """Write a model whose transformer is a hole, and return its folder."""
    if tiny:
        from support.tiny_models import make_folder

        return make_folder(folder / name, name)
    from random_model import Shapes, write_model

    from wan_core.models import VARIANTS

    variant = VARIANTS[name]
    assert variant.vae is not None
    shapes = Shapes(variant.transformer, variant.vae)
    write_model(folder / name, shapes, experts=variant.experts, texts=False)
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[2], help="(2)")
    parser.add_argument("--folder", type=Path, help="where to put the weights")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="wanfit_decode_", dir=arguments.folder) as place:
        for case in TINY_DECODES if arguments.tiny else DECODES:
            folder = Path(place) / case.model
            model = folder
            if not folder.exists():
                model = vae_folder(Path(place), case.model, arguments.tiny)
            rows += decode(model, case, arguments.devices, arguments.tiny)
    print("\n".join(decode_table(rows)))


if __name__ == "__main__":
    main()
