"""What RAM do interpreter, libraries and CUDA take in a fresh process, and which step takes it?

    python benchmarks/host_base.py [--output FOLDER] [--folder FOLDER] [--tiny]
    python benchmarks/host_base.py --read results/host_base_nvidia_h200.json

Memory that counts (``host_memory``) is looked at after each step of a process that does nothing
else, when freed memory has gone back to the system: imports, CUDA's context, the tokenizer, a text
encoder sent from its mapped file, then kernels one library at a time. The product makes clips of a
few blocks of true width in processes of their own: texts first ("cold", where Triton's kernels are
compiled anew, and "warm", where they lie on the disk), or embeddings first and a text in a second
clip ("embeds"). The first has its blocks resident twice, then streamed.

``constants`` reads from that what ``wan_core/memory/process.py`` adds to what a process holds; the
program prints them beside those that are there, and ``--read`` does so from a file. Beside what
each stage takes stands what was planned for it in this process. One CUDA device, 6 GB of shared
memory or disk, a minute. Results: ``results/host_base_<device>.json``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from support.ram_peaks import anonymous  # imports nothing that counts

MIB = 2**20
FEW = 7
"""Blocks of a transformer in scaled fp8 whose file is large enough to stay mapped."""
WANTED = 7e9
USES = {"text_encode": "text_encoder", "denoise_high": "transformer",
        "denoise_low": "transformer_2", "decode": "vae"}  # fmt: skip
"""The part that each stage uses, and that is in RAM from then on, as far as its file is not."""


def trim() -> None:
    """Return freed memory to the system, where the C library keeps it."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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
            trim()
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
    text = next(folder.glob("umt5*"))
    with marks.step("tokenizer"):
        tokenizer = load_tokenizer(text)
    tokens = len(tokenizer)
    with marks.step("tokenizer dropped"):
        del tokenizer
    if torch.cuda.is_available() and not tiny:
        sent(marks, torch, text)
        on_card(marks, torch)
    return {"steps": marks.rows, "tokens": tokens}


def sent(marks: Marks, torch: Any, text: Path) -> None:
    """Send a text encoder from its mapped file, as a stage does, before anything is computed."""
    from wan_core.loading import first_look, load_component, move

    device = torch.device("cuda:0")
    with marks.step("context"):
        torch.cuda.mem_get_info(0)
        torch.zeros(1, device=device)
    with marks.step("text encoder, mapped"):
        module = load_component(
            text, torch.bfloat16, kind="text_encoder", keep_quantized=True, map_file=True,
            look_later=True,
        )  # fmt: skip
    with (
        marks.step("sent to the card"),
        torch.no_grad(),
        first_look(module, lambda: None, lambda done, total: None),
    ):
        move(module, device)
        torch.cuda.synchronize()
    with marks.step("text encoder dropped"):
        del module


def on_card(marks: Marks, torch: Any) -> None:
    """The steps that need a device."""
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from wan_core.formats import Storage
    from wan_core.loading import Slab, dequantize_kernels
    from wan_core.loading.dequantize import Scales

    device, bf16, wide = torch.device("cuda:0"), torch.bfloat16, torch.float32

    def random(*shape: int, dtype: Any = bf16) -> Any:
        return torch.randn(*shape, device=device, dtype=dtype)

    def convolve(dtype: Any) -> None:
        for channels in (96, 192, 384):
            kernel = random(channels, channels, 3, 3, 3, dtype=dtype)
            clip = random(1, channels, 3, 60, 104, dtype=dtype)
            functional.conv3d(clip, kernel, padding=(0, 1, 1))

    def elementwise() -> None:
        states = random(512, 5120)
        normed = states.float() * torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        functional.gelu(normed.to(bf16), approximate="tanh") + functional.silu(states)
        functional.embedding(torch.arange(512, device=device), states).softmax(-1, dtype=wide)
        torch.cat([states, states]).clamp(-1, 1).isfinite().all()

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
        ("elementwise kernels", elementwise),
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


def clips(folder: Path, tiny: bool, *, embeds_first: bool = False) -> dict[str, Any]:
    """Make clips; return what each stage held, and what is planned for it.

    ``known`` are the bytes of weights and frames among what is held after a stage.
    """
    from wan_core.memory import close_gaps

    close_gaps()
    from host_memory import HostWatch

    from wan_core import WanPipelineLoader
    from wan_core.models import ram_bytes

    watch = HostWatch()
    named, rows, loaded = files(folder, tiny), [], set()
    turns = ("model", "model") if embeds_first else ("model", "model", "stream")
    for turn, offload in enumerate(turns):
        config = wanted(tiny, embeds=embeds_first and turn == 0)
        device = "cpu" if tiny else "cuda:0"
        wishes: dict[str, Any] = {"device": device, "offload": offload, "precision": "bf16"}
        wrapper = WanPipelineLoader().load_wan_pipeline(named, optimization_config=wishes)
        if turn == 2:
            wrapper.unload()
            loaded.clear()
        trim()
        plan = wrapper.plan(config)[1]
        planned = {s.name: s.host_bytes + s.locked_bytes for s in plan.estimate.stages}
        watch.forget()
        before = watch.look()
        with watch.stages():
            frames = wrapper.generate(config).raise_for_error().frames
        for name, begun, ended in sorted(watch.spans, key=lambda span: span[1]):
            top, after = watch.peak(begun, ended), watch.after[name, begun]
            loaded |= {USES[name]} if name in USES else set()
            known = sum(
                ram_bytes(wrapper.architecture, part, plan.choices.dtypes[part], on_cpu=tiny)
                for part in loaded
            )
            rows.append(
                {
                    "clip": turn, "offload": offload, "stage": name, "at plan": before.counted,
                    "peak": top.counted, "locked": top.locked, "planned": planned.get(name),
                    "held": after.anonymous, "locked after": after.locked,
                    "known": known + (frames.nbytes if name == "decode" else 0),
                    "seconds": ended - begun,
                }
            )  # fmt: skip
        del frames
    watch.close()
    return {"clips": rows}


def wanted(tiny: bool, embeds: bool) -> Any:
    """Return what is asked for: of two texts, or of embeddings in their place."""
    import torch

    from wan_core import GenerationConfig

    size = {"width": 64, "height": 32, "num_frames": 9} if tiny else {
        "width": 832, "height": 480, "num_frames": 17,
    }  # fmt: skip
    given: dict[str, Any] = {"prompt": "a cat moves right", "negative_prompt": "a dog"}
    if embeds:
        width = shapes_of(tiny).transformer.text_dim
        given = {f"{name}_embeds": torch.zeros(1, 512, width) for name in given}
    return GenerationConfig(num_inference_steps=2, switch_step=1, seed=0, **size, **given)


# -- what follows -----------------------------------------------------------------------------


def constants(found: dict[str, Any]) -> dict[str, int]:
    """Return the terms of ``wan_core/memory/process.py`` in bytes, from what was found on a card.

    Imports, tokenizer, context and sending are steps of the first process. A library is what is
    held after a stage beside weights, frames, and the tokenizer, less what was held before: an
    encoder's after everything else has run ("embeds"), the others' in the order of a usual clip
    ("warm"). "card" is what the first stage takes beyond an encoder's own. "compiler" is what all
    three take more where Triton's kernels are compiled ("cold").
    """
    grown, rise, before = {}, {}, 0
    for row in found["steps"]:
        grown[row["step"]], rise[row["step"]] = row["held"] - before, row["peak"] - before
        before = row["held"]
    tokenizer = grown["tokenizer"]

    def beside(rows: list[dict[str, Any]], clip: int, stage: str, tokens: int = tokenizer) -> int:
        row = next(r for r in rows if (r["clip"], r["stage"]) == (clip, stage))
        return int(row["held"] - row["locked after"] - row["known"] - tokens)

    warm, late, cold = found["warm"], found["embeds"], found["cold"]
    imports = grown["diffusers and transformers"]
    after = [beside(warm, 0, stage) for stage in ("text_encode", "denoise_low", "decode")]
    first = after[0] - warm[0]["at plan"] - imports
    encode = max(0, beside(late, 1, "text_encode") - beside(late, 0, "decode", 0))
    cold_after = beside(cold, 0, "decode") - cold[0]["at plan"]
    return {
        "imports": imports,
        "card": first - encode,
        "encode": encode,
        "denoise": after[1] - after[0],
        "decode": after[2] - after[1],
        "compiler": cold_after - (after[2] - warm[0]["at plan"]),
        "tokenizer": tokenizer,
        "a token": round(tokenizer / found["tokens"]),
        "tokenizer while it is made": rise["tokenizer"],
        "sending": rise.get("sent to the card", 0),
        "interpreter with torch and context": sum(
            grown.get(step, 0) for step in ("interpreter", "what is left of plan", "torch",
                                            "context")
        ),
    }  # fmt: skip


def beside_present(found: dict[str, Any]) -> str:
    """Return the constants beside those that are there."""
    from wan_core.memory import process

    present: dict[str, int] = {
        **process.FIRST, "a token": process.TOKEN_BYTES, "sending": process.SENDING,
        "interpreter with torch and context": process._BARE,
    }  # fmt: skip
    lines = ["Terms of wan_core/memory/process.py, measured and as they are there:"]
    for name, value in constants(found).items():
        unit, scale = ("bytes", 1) if name == "a token" else ("MiB", MIB)
        there = f"{present[name] / scale:6,.0f}" if name in present else "     -"
        lines.append(f"{name:36} {value / scale:6,.0f} {there} {unit}")
    return "\n".join(lines)


# -- the whole --------------------------------------------------------------------------------


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "steps": steps, "clips": clips, "embeds": partial(clips, embeds_first=True),
}  # fmt: skip


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
    for name in ("cold", "warm", "embeds"):
        lines += ["", f"Clips, {name}:"]
        for row in found.get(name, ()):
            planned = row["planned"]
            rest = "" if planned is None else (
                f", planned {planned / MIB:6,.0f}: {planned / row['peak'] - 1:+.1%}"
            )  # fmt: skip
            libraries = row["held"] - row["locked after"] - row["known"]
            lines.append(
                f"{row['clip']} {row['offload']:7} {row['stage']:20} at plan "
                f"{row['at plan'] / MIB:6,.0f}, peak {row['peak'] / MIB:6,.0f}{rest}; after "
                f"{row['held'] / MIB:6,.0f}, weights aside {libraries / MIB:6,.0f}"
            )
    return "\n".join([*lines, "", beside_present(found)])


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
        cold, other = folder / "cold", folder / "other"
        with ThreadPoolExecutor(2) as pool:  # two at once: each counts its own memory
            first = pool.submit(in_process, "steps", model, other, tiny)
            found["cold"] = in_process("clips", model, cold, tiny)["clips"]
            found |= first.result()
            late = pool.submit(in_process, "embeds", model, cold, tiny)
            found["warm"] = in_process("clips", model, cold, tiny)["clips"]
            found["embeds"] = late.result()["clips"]
    found["seconds"] = time.perf_counter() - begun
    return found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--folder", type=Path, help="where to put the files")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--read", type=Path, help="print the constants that follow from results")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    told = parser.parse_args(given)
    if told.part:
        print("\n" + json.dumps(PARTS[told.part](told.folder, told.tiny)))
        return 0
    if told.read is not None:
        print(beside_present(json.loads(told.read.read_text())))
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
