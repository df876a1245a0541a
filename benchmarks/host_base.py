"""What RAM do interpreter, libraries and CUDA take in a fresh process, and which step takes it?

    python benchmarks/host_base.py [--output FOLDER] [--folder FOLDER] [--tiny]

Memory that counts (``host_memory``) is looked at after each step of a process that does nothing
else: imports, CUDA's context, the first product, attention, convolution, Triton kernel, page lock
and transfer through the ring. Then, in a process of its own, the product makes three clips of a
few blocks of true width: twice with all blocks resident, once with them streamed. Beside what each
stage takes stands what was planned for it in this process. Triton's kernels are compiled anew by
the first two processes; a third one makes the clips with them on the disk. One CUDA device, 6 GB of
shared memory or disk, a minute. Results: ``results/host_base_<device>.json``, and a table is
printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from support.ram_peaks import anonymous  # imports nothing that counts

MIB = 2**20
FEW = 7
"""Blocks of a transformer in scaled fp8 whose file is large enough to stay mapped."""
WANTED = 7e9
ENOUGH = 60.0
"""Seconds after which the third process is left out."""


class Marks:
    """What is held after each step, and at most during it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._before = anonymous()
        self.rows.append({"step": "interpreter", "held": self._before, "peak": self._before})

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Look a few hundred times a second, and once after."""
        done, seen = threading.Event(), [anonymous()]

        def watch() -> None:
            while not done.wait(0.003):
                seen.append(anonymous())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        begun = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begun
            done.set()
            thread.join()
            gc.collect()
            held = anonymous()
            row = {"step": name, "held": held, "peak": max(*seen, held), "seconds": seconds}
            self.rows.append(row)


def steps(folder: Path, tiny: bool) -> dict[str, Any]:
    """Go through what a render needs, one thing at a time."""
    marks = Marks()
    with marks.step("what is left of plan"):
        import wan_core.plan.manager
        from wan_core.memory import close_gaps

        close_gaps()
    with marks.step("torch"):
        import torch
    with marks.step("diffusers and transformers"):
        from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
        from transformers import PreTrainedTokenizerFast, UMT5EncoderModel  # noqa: F401
    with marks.step("wan_core"):
        from stored_model import StoredModel  # noqa: F401

        import wan_core.render.pipeline  # noqa: F401
        from wan_core.loading import load_tokenizer
    with marks.step("tokenizer"):
        tokenizer = load_tokenizer(next(folder.glob("umt5*")))
    del tokenizer
    if torch.cuda.is_available() and not tiny:
        on_card(marks, torch)
    return {"steps": marks.rows}


def on_card(marks: Marks, torch: Any) -> None:
    """The steps that need a device."""
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from wan_core.formats import Storage
    from wan_core.loading import Slab, dequantize_kernels, move
    from wan_core.loading.dequantize import Scales

    device, bf16, wide = torch.device("cuda:0"), torch.bfloat16, torch.float32

    def random(*shape: int, dtype: Any = bf16) -> Any:
        return torch.randn(*shape, device=device, dtype=dtype)

    def convolve(dtype: Any) -> None:
        for channels in (96, 192, 384):
            kernel = random(channels, channels, 3, 3, 3, dtype=dtype)
            clip = random(1, channels, 3, 60, 104, dtype=dtype)
            functional.conv3d(clip, kernel, padding=(0, 1, 1))

    def attend(backend: Any) -> None:
        heads = random(1, 40, 4096, 128)
        with sdpa_kernel(backend):
            functional.scaled_dot_product_attention(heads, heads, heads)

    def take_apart(*kinds: tuple[Any, ...]) -> None:
        for stored, width in kinds:
            bits = torch.zeros(256, width, dtype=torch.int8, device=device)
            dequantize_kernels.run(bits, Scales(None, 0.5), stored, bf16)

    shape = (256, 1024)
    fp8 = (Storage("fp8", "F8_E4M3", shape, "s", "t"), 1024)
    others = (
        (Storage("gguf", "Q4_K", shape), 576),
        (Storage("gguf", "Q8_0", shape), 1088),
        (Storage("int8", "I8", shape, "s", "t", group=256), 1024),
    )
    slabs: list[Any] = []

    def lock() -> None:
        slabs.append(Slab(32 * MIB, torch.device("cpu")))
        slabs[-1].lock()

    work: list[tuple[str, Callable[[], object]]] = [
        ("context", lambda: (torch.cuda.mem_get_info(0), torch.zeros(1, device=device))),
        ("product, bf16", lambda: random(512, 5120) @ random(5120, 5120)),
        ("product, fp32", lambda: random(512, 5120, dtype=wide) @ random(5120, 512, dtype=wide)),
        ("attention, flash", lambda: attend(SDPBackend.FLASH_ATTENTION)),
        ("attention, cuDNN", lambda: attend(SDPBackend.CUDNN_ATTENTION)),
        ("convolution, fp32", lambda: convolve(wide)),
        ("convolution, bf16", lambda: convolve(bf16)),
        ("Triton, first kernel", lambda: take_apart(fp8)),
        ("Triton, three kernels more", lambda: take_apart(*others)),
        ("page lock of 32 MiB", lock),
    ]  # fmt: skip
    for name, run in work:
        with marks.step(name):
            run()
            torch.cuda.synchronize()
    slabs.clear()
    module = torch.nn.Module()
    with marks.step("512 MiB to send"):
        for index in range(8):
            weight = torch.zeros(64 * MIB, dtype=torch.uint8)
            module.register_buffer(f"b{index}", weight)
        wrapped = torch.nn.ParameterList(
            torch.nn.Parameter(t, requires_grad=False) for t in module.buffers()
        )
    with marks.step("the ring"):
        move(wrapped, device)
        torch.cuda.synchronize()


# -- the product ------------------------------------------------------------------------------


def shapes_of(tiny: bool) -> Any:
    """A few blocks of true width."""
    from random_model import UMT5_XXL, Shapes
    from stored_layers import TINY_SHAPES

    if tiny:
        return TINY_SHAPES
    whole = Shapes()
    return Shapes(replace(whole.transformer, layers=FEW), whole.vae, {**UMT5_XXL, "num_layers": 3})


def files(folder: Path, tiny: bool, write: bool = False) -> Any:
    """The files of the small model, written first where asked."""
    from stored_model import StoredModel

    model = StoredModel(folder, shapes_of(tiny), 2**14 if tiny else 2**22)
    if write:
        model.write_rest()
        model.transformer("fp8_scaled")
    model.kind = "fp8_scaled"
    return model.files()


def clips(folder: Path, tiny: bool) -> dict[str, Any]:
    """Make three clips; return what each stage held, and what is planned for it."""
    from wan_core.memory import close_gaps

    close_gaps()
    from host_memory import HostWatch

    from wan_core import GenerationConfig, WanPipelineLoader

    watch = HostWatch()
    named, rows = files(folder, tiny), []
    size = {"width": 64, "height": 32, "num_frames": 9} if tiny else {
        "width": 832, "height": 480, "num_frames": 17,
    }  # fmt: skip
    config = GenerationConfig(
        prompt="a cat moves right", negative_prompt="a dog", num_inference_steps=2, switch_step=1,
        seed=0, **size,
    )  # fmt: skip
    device = "cpu" if tiny else "cuda:0"
    for turn, offload in enumerate(("model", "model", "stream")):
        wishes: dict[str, Any] = {"device": device, "offload": offload, "precision": "bf16"}
        wrapper = WanPipelineLoader().load_wan_pipeline(named, optimization_config=wishes)
        if turn == 2:
            wrapper.unload()
        gc.collect()
        plan = wrapper.plan(config)[1]
        planned = {s.name: s.host_bytes + s.locked_bytes for s in plan.estimate.stages}
        watch.forget()
        before = watch.look()
        with watch.stages():
            wrapper.generate(config).raise_for_error()
        for name, begun, ended in sorted(watch.spans, key=lambda span: span[1]):
            top = watch.peak(begun, ended)
            rows.append(
                {
                    "clip": turn, "offload": offload, "stage": name, "at plan": before.counted,
                    "peak": top.counted, "locked": top.locked, "planned": planned.get(name),
                    "seconds": ended - begun,
                }
            )  # fmt: skip
    watch.close()
    return {"clips": rows}


# -- the whole --------------------------------------------------------------------------------


def in_process(part: str, folder: Path, cache: Path, tiny: bool) -> dict[str, Any]:
    """Run a part in a process of its own; Triton's kernels lie in ``cache``."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
    done = subprocess.run(
        command + (["--tiny"] if tiny else []), capture_output=True, text=True, check=False,
        env=environment, timeout=240,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{part}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(found: dict[str, Any]) -> str:
    """Return what was found as text."""
    lines = [f"{found['device']}, {found['versions']}", ""]
    before = 0
    for row in found["steps"]:
        more = (row["held"] - before) / MIB
        lines.append(
            f"{row['step']:32} {row['held'] / MIB:7,.0f} MiB held, {more:+6,.0f}; "
            f"{(row['peak'] - row['held']) / MIB:5,.0f} more at the peak"
        )
        before = row["held"]
    for name in ("cold", "warm"):
        lines += ["", f"Clips, Triton's kernels {name}:"]
        for row in found.get(name, ()):
            planned = row["planned"]
            rest = "" if planned is None else (
                f", planned {planned / MIB:6,.0f}: {planned / row['peak'] - 1:+.1%}"
            )  # fmt: skip
            lines.append(
                f"{row['clip']} {row['offload']:7} {row['stage']:20} at plan "
                f"{row['at plan'] / MIB:6,.0f}, peak {row['peak'] / MIB:6,.0f}{rest}"
            )
    return "\n".join(lines)


def room(wanted: Path | None) -> Path | None:
    """Choose where the files go: as told, else shared memory where there is room."""
    memory = Path("/dev/shm")
    if wanted is not None or not memory.is_dir():
        return wanted
    status = os.statvfs(memory)
    return memory if status.f_bavail * status.f_frsize > WANTED else None


def run_all(tiny: bool, wanted: Path | None) -> dict[str, Any]:
    """Write the files, run the parts."""
    import torch

    from wan_core.journal import versions

    begun = time.perf_counter()
    found: dict[str, Any] = {
        "device": "cpu" if tiny else torch.cuda.get_device_name(), "versions": versions(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=None if tiny else room(wanted)) as made:
        folder = Path(made)
        (folder / "model").mkdir()
        files(folder / "model", tiny, write=True)
        model = folder / "model"
        found["steps"] = in_process("steps", model, folder / "a", tiny)["steps"]
        found["cold"] = in_process("clips", model, folder / "b", tiny)["clips"]
        if time.perf_counter() - begun < ENOUGH:
            found["warm"] = in_process("clips", model, folder / "b", tiny)["clips"]
    found["seconds"] = time.perf_counter() - begun
    return found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--folder", type=Path, help="where to put the files")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--part", choices=("steps", "clips"), help=argparse.SUPPRESS)
    told = parser.parse_args(given)
    if told.part:
        work = steps if told.part == "steps" else clips
        print("\n" + json.dumps(work(told.folder, told.tiny)))
        return 0
    found = run_all(told.tiny, told.folder)
    from gpu_memory import short_name

    name = short_name(found["device"])
    told.output.mkdir(parents=True, exist_ok=True)
    (told.output / f"host_base_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
