"""The bench of ``files_people_have``, and what it measures of a transformer by itself.

Load it by mapping, send it to the device, have it compute beside the same file dequantised at load,
take its weights apart alone, stream it.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from files_report import write_results
from gpu_memory import DECODED, TINY, Bench
from host_memory import HostWatch, forget_pages, in_memory, read_once
from random_model import Shapes
from stored_model import StoredModel
from torch import nn

from wan_core import WanPipelineLoader
from wan_core.forward import lean_forward, run_together
from wan_core.loading import (
    Undo,
    all_pinned_bytes,
    first_look,
    load_component,
    move,
    remember,
    unpin,
)
from wan_core.memory import STREAM_BUFFERS, pinned_budget_now, stage_was_run
from wan_core.placing import files_ahead, stream_blocks

TINY_SHAPES = replace(
    TINY, transformer=replace(TINY.transformer, head_dim=128, ffn_dim=512, text_dim=32)
)
"""As in ``gpu_memory``, with what single files and blocks of 256 ask for."""


CLOSE = ("fp8_scaled", "int8_convrot")
"""Kinds whose ratio is so near its goal that it is taken twice."""


def use_libraries(device: Any) -> None:
    """Have CUDA's libraries loaded, which takes RAM once: products, convolutions, attention."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(64, 64, device=device, dtype=dtype)
        torch.nn.functional.linear(x, x)
        clip = torch.randn(1, 16, 4, 16, 16, device=device, dtype=dtype)
        torch.nn.functional.conv3d(clip, torch.randn(16, 16, 3, 3, 3, device=device, dtype=dtype))
        heads = torch.randn(1, 2, 256, 128, device=device, dtype=dtype)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


class FileBench(Bench):
    """Device, budget, files and what was found so far."""

    def __init__(
        self, device: str, folder: Path, output: Path, budget: float, tiny: bool, *,
        fresh: bool = False,
    ) -> None:  # fmt: skip
        """With ``fresh`` CUDA's libraries are left to the product to load."""
        super().__init__(device, folder, output, budget, tiny)
        self.model = StoredModel(
            folder, TINY_SHAPES if tiny else Shapes(), 2**14 if tiny else 2**24
        )
        self.watch = HostWatch()
        self.others_mib = 0.0
        """MiB of the device that another program is known to hold."""
        # Libraries and CUDA's context belong to the interpreter's share.
        from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
        from transformers import PreTrainedTokenizerFast, UMT5EncoderModel  # noqa: F401

        gc.collect()
        self.alone = self.watch.look().counted
        """RAM of the interpreter with its packages, before the device is used."""
        if self.cuda and not fresh:
            use_libraries(self.device)
        gc.collect()
        self.base = self.watch.look().counted
        self.found = {"machine": self.found["machine"], "files": [], "layers": [], "runs": [],
                      "loads": [], "notes": []}  # fmt: skip

    def write(self) -> None:
        write_results(self.found, self.output)

    def clean(self) -> None:
        unpin()
        super().clean()
        self.watch.forget()

    def context_mib(self) -> float | None:
        held = super().context_mib()
        return None if held is None else held - self.others_mib

    def sync(self) -> float:
        """Wait for the device; return the clock."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def ensure(self, kind: str) -> Path:
        """Have the experts' file in a kind; return its path."""
        if self.model.kind != kind:
            self.drop_components()
            gc.collect()
            begun = time.perf_counter()
            nbytes = self.model.transformer(kind)
            seconds = time.perf_counter() - begun
            self.found["files"].append({"kind": kind, "bytes": nbytes, "write_seconds": seconds})
            self.say(f"{kind}: {nbytes / 1e9:.2f} GB written in {seconds:.1f} s")
        return self.model.path("high")

    def drop_components(self) -> None:
        """Drop what the product keeps of the files, but not the texts it has encoded."""
        if self.model.kind:
            WanPipelineLoader().load_wan_pipeline(self.model.files()).unload()


# -- the transformer by itself ----------------------------------------------------------------


def inputs(bench: FileBench) -> list[dict[str, Any]]:
    """Return the two passes of a guided step."""
    shape = bench.model.shapes.transformer
    size = (2, 4, 4) if bench.tiny else DECODED
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(1, shape.in_channels, *size, generator=g)
    texts = [torch.randn(1, 512, shape.text_dim, generator=g) for _ in range(2)]
    kind, device = torch.bfloat16, bench.device
    return [
        {
            "hidden_states": noise.to(device, kind), "encoder_hidden_states": text.to(device, kind),
            "timestep": torch.full((1,), 900.0, device=device), "return_dict": False,
        }
        for text in texts
    ]  # fmt: skip


def pair(bench: FileBench, model: nn.Module, together: bool = False) -> tuple[float, list[Any]]:
    """Return the seconds and the outputs of a guided pair of passes with the lean forward."""
    calls = inputs(bench)
    with torch.no_grad(), lean_forward(model) as refused:
        assert refused is None, refused
        begun = bench.sync()
        out = run_together(model, calls) if together else [model(**call) for call in calls]
        seconds = bench.sync() - begun
    return seconds, [one[0].cpu() for one in out]


def warm(bench: FileBench, model: Any) -> None:
    """Have two blocks compute, so that kernels are loaded and compiled."""
    blocks = model.blocks
    model.blocks = nn.ModuleList(list(blocks)[:2])
    try:
        pair(bench, model)
    finally:
        model.blocks = blocks


def dequantise_seconds(bench: FileBench, model: nn.Module) -> float:
    """Return the median seconds of taking every weight apart once."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "dequantized")]
    seconds = []
    with torch.no_grad():
        for _ in range(4):  # the first one does not count
            begun = bench.sync()
            for layer in layers:
                layer.dequantized(torch.bfloat16)
            seconds.append(bench.sync() - begun)
    return median(seconds[1:])


@contextmanager
def on_device(bench: FileBench, model: nn.Module) -> Iterator[float]:
    """Have the model on the device; yields the seconds of bringing it there.

    Where its file has not been read yet, it is read and looked at on the way.
    """
    with Undo() as undo, torch.no_grad():
        remember(undo, model)
        begun = time.perf_counter()
        with first_look(model, lambda: None, lambda *_: None):
            move(model, bench.device)
        yield bench.sync() - begun


def load_stored(bench: FileBench, path: Path) -> nn.Module:
    """Load a transformer as the product does: as stored, mapped, for a GPU not read yet."""
    with files_ahead([path] if bench.cuda else ()):
        return load_component(
            path, torch.bfloat16, kind="transformer", keep_quantized=True, map_file=True,
            look_later=bench.cuda,
        )  # fmt: skip


def bytes_read() -> int:
    """Return how many bytes this process has read from files so far, mapped pages apart."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


def layers(bench: FileBench, kind: str) -> None:
    """Load, send, compute, take apart, stream."""
    path = bench.ensure(kind)
    row: dict[str, Any] = {"kind": kind, "bytes": bench.model.nbytes, "file": forget_pages(path)}
    row["block"] = bench.model.block_bytes
    gc.collect()
    before = bench.watch.look()
    begun = before.at
    model = load_stored(bench, path)
    row["load_seconds"] = time.perf_counter() - begun
    row["load_host"] = bench.watch.peak(begun).counted - before.counted
    with on_device(bench, model) as moved:
        row["move_seconds"] = moved
        row["host"] = bench.watch.peak(begun).counted - before.counted
        bench.say(f"{kind}: loaded in {row['load_seconds']:.2f} s, sent in {moved:.2f} s")
        warm(bench, model)
        if kind != "bf16":
            row["dequantise_seconds"] = dequantise_seconds(bench, model)
        out = resident(bench, kind, model, path, row)
    streamed(bench, model, row, out)
    stage_was_run("denoise", str(bench.device))  # what its libraries take is held from now on
    bench.found["layers"].append(row)
    bench.say(json.dumps({k: v for k, v in row.items() if k not in ("kind", "bytes")}))


def resident(
    bench: FileBench, kind: str, model: nn.Module, path: Path, row: dict[str, Any]
) -> list[Any]:
    """Compute beside the same file dequantised at load; in turns, ours between two of the other."""
    if kind == "bf16":
        seconds, out = pair(bench, model)
        row |= {"pair_seconds": seconds, "plain_seconds": [seconds]}
        return out
    begun = time.perf_counter()
    plain = load_component(
        path, torch.bfloat16, bench.device, kind="transformer", keep_quantized=False
    )
    row["plain_load_seconds"] = bench.sync() - begun
    warm(bench, plain)
    first, expected = pair(bench, plain)
    row["pair_seconds"], out = pair(bench, model)
    row["plain_seconds"] = [first]
    if kind in CLOSE:
        row["plain_seconds"].append(pair(bench, plain)[0])
    row["ratio"] = row["pair_seconds"] / mean(row["plain_seconds"])
    row["share"] = 2 * row["dequantise_seconds"] / row["pair_seconds"]
    row["equal"] = all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    row["difference"] = max(
        float((a.float() - b.float()).abs().max()) for a, b in zip(out, expected, strict=True)
    )
    row["largest"] = max(float(b.float().abs().max()) for b in expected)
    return out


def streamed(bench: FileBench, model: nn.Module, row: dict[str, Any], expected: list[Any]) -> None:
    """The same pair with no block resident, both passes through each block as it arrives."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
    budget = pinned_budget_now(all_pinned_bytes())
    begun = time.perf_counter()
    with stream_blocks(
        model, bench.device, resident_blocks=0, buffers=STREAM_BUFFERS, pin_bytes=budget
    ) as state:
        row["enter_seconds"] = bench.sync() - begun
        row["streamed_seconds"], out = pair(bench, model, together=True)
        row["pinned_blocks"] = len(state.pinned)
    unpin()
    row["streamed_ratio"] = row["streamed_seconds"] / row["pair_seconds"]
    row["streamed_equal"] = all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def cold_load(bench: FileBench, kind: str, disk: Path) -> None:
    """Read a file from the disk once, load it and send it to the device, and read it once more.

    A disk is not equally fast at all times: the load is compared with the mean of both readings.
    """
    path = bench.ensure(kind)
    with ExitStack() as stack:
        if in_memory(path):
            room = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=disk)))
            path = Path(shutil.copyfile(path, room / path.name))
        row: dict[str, Any] = {
            "kind": kind,
            "bytes": bench.model.nbytes,
            "file": forget_pages(path),
        }
        readings = [read_once(path)]
        forget_pages(path)
        begun, before, mapped = time.perf_counter(), bytes_read(), bench.watch.look().mapped
        model = load_stored(bench, path)
        row["load_seconds"] = time.perf_counter() - begun
        with on_device(bench, model) as moved:
            row["move_seconds"] = moved
        # Of the file's size: once, and nothing through the mapping.
        row["read"] = (bytes_read() - before) / bench.model.nbytes
        row["mapped"] = (bench.watch.look().mapped - mapped) / bench.model.nbytes
        del model
        forget_pages(path)
        readings.append(read_once(path))
    row |= {"readings": readings, "read_seconds": mean(readings)}
    row["ratio"] = (row["load_seconds"] + row["move_seconds"]) / row["read_seconds"]
    bench.found["loads"].append(row)
    bench.say(json.dumps(row))
