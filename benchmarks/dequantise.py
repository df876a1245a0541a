"""Dequantising on the GPU at hand: bits against the reference, and time against one bf16 forward.

    python benchmarks/dequantise.py [--output FILE.json]

For each kind of storage one matrix of a 14B's feed-forward (13824 x 5120) is taken apart by the
kernel and by the reference code: whether the bits are equal, milliseconds (median of 20) and the
bytes per second that are read and written. From the milliseconds follows what a whole pass of the
14B costs. Rotated int8 is turned back in every way that ``dequantize_kernels.TURNINGS`` has, in
turns: the fastest of equal bits is the one to use. Then a module of 4 GiB goes to the device by
torch's own copy and through the ring, and from a mapped file of the page cache through the ring:
with its numbers looked at on the way, without, and only read, with several numbers of threads.
Taken for bf16 the same file is rounded to fp8, on the card and on the host.
``--only transfer`` does this alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from torch import Tensor

from wan_core.formats import Storage
from wan_core.loading import dequantize_kernels as kernels
from wan_core.loading import mapped, moving
from wan_core.loading.dequantize import Scales, dequantize
from wan_core.loading.moving import move
from wan_core.loading.quantized import Rounding, rounded_to_fp8

ROWS, COLUMNS = 13824, 5120
WEIGHTS_14B = 14.2e9
GGUF = {
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "Q3_K": (256, 110),
}  # fmt: skip


def cases() -> list[tuple[str, Storage, int]]:
    """Name, storage and bytes of a row of each kind."""
    shape = (ROWS, COLUMNS)
    out = [
        ("fp8, per tensor", Storage("fp8", "F8_E4M3", shape, "s", per="tensor"), COLUMNS),
        ("fp8, per row", Storage("fp8", "F8_E4M3", shape, "s", per="row"), COLUMNS),
        ("fp8 e5m2, per tensor", Storage("fp8", "F8_E5M2", shape, "s", per="tensor"), COLUMNS),
        ("int8, per row", Storage("int8", "I8", shape, "s", per="row"), COLUMNS),
        ("int8 rotated", Storage("int8", "I8", shape, "s", per="row", group=256), COLUMNS),
        ("mxfp8", Storage("mxfp8", "F8_E4M3", shape, "s", per="block"), COLUMNS),
        ("nvfp4", Storage("nvfp4", "U8", shape, "s", "t", "block"), COLUMNS // 2),
    ]
    for kind, (size, nbytes) in GGUF.items():
        out.append((f"GGUF {kind}", Storage("gguf", kind, shape), COLUMNS // size * nbytes))
    return out


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a run on the device."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def scales_of(stored: Storage) -> Scales:
    """Random scales of the right form."""
    if stored.per == "row":
        return Scales(torch.rand(ROWS, device="cuda") * 0.01)
    if stored.per == "block":
        blocks = COLUMNS // (16 if stored.kind == "nvfp4" else 32)
        each = torch.randint(60, 120, (ROWS, blocks), dtype=torch.uint8, device="cuda")
        return Scales(each, 1e-3 if stored.kind == "nvfp4" else 1.0)
    return Scales(None, 0.0123)


def measure(name: str, stored: Storage, width: int) -> dict[str, Any]:
    """Compare and time one kind."""
    bits = torch.randint(0, 256, (ROWS, width), dtype=torch.uint8, device="cuda") & 0x37
    bits = bits.view(torch.int8)
    scales = scales_of(stored)
    found: dict[str, Any] = {"kind": name, "has_kernel": kernels.has_kernel(stored)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = dequantize(bits, scales, stored, dtype)
        if kernels.has_kernel(stored):
            got = kernels.run(bits, scales, stored, dtype)
            found[f"equal {dtype}"] = torch.equal(got, expected)
            found[f"differing {dtype}"] = float((got != expected).float().mean())
        del expected
    if kernels.has_kernel(stored):
        ms = milliseconds(lambda: kernels.run(bits, scales, stored, torch.bfloat16))
        found["kernel_ms"] = ms
        found["kernel_gb_s"] = (ROWS * width + 2 * ROWS * COLUMNS) / ms / 1e6
        found["pass_14b_ms"] = ms * WEIGHTS_14B / (ROWS * COLUMNS)
    reference = milliseconds(lambda: dequantize(bits, scales, stored, torch.bfloat16))
    found["reference_ms"] = reference
    found["reference_pass_14b_ms"] = reference * WEIGHTS_14B / (ROWS * COLUMNS)
    return found


def turnings() -> list[dict[str, Any]]:
    """Compare the ways of turning rotated int8 back: bits, and the medians of three turns."""
    stored = Storage("int8", "I8", (ROWS, COLUMNS), "s", per="row", group=256)
    bits = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8, device="cuda")
    scales = scales_of(stored)
    expected = dequantize(bits.view(torch.int8), scales, stored, torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in kernels.TURNINGS}
    found = []
    for turn in range(3):
        for name in list(times)[:: -1 if turn % 2 else 1]:
            way = kernels.TURNINGS[name]
            run = partial(kernels.turned, bits, scales, 256, torch.bfloat16, way)
            times[name].append(milliseconds(run))
    for name, way in kernels.TURNINGS.items():
        got = kernels.turned(bits, scales, 256, torch.bfloat16, way)
        ms = statistics.median(times[name])
        found.append(
            {
                "way": name, "equal": torch.equal(got, expected), "ms": ms,
                "pass_14b_ms": ms * WEIGHTS_14B / (ROWS * COLUMNS),
                "used": way is kernels.TURNING,
            }
        )  # fmt: skip
    return found


class Holder(torch.nn.Module):
    """Tensors as parameters, to be moved."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.all = torch.nn.ParameterList(
            torch.nn.Parameter(t, requires_grad=False) for t in tensors
        )


def transfer() -> dict[str, Any]:
    """Bring 4 GiB to the device by torch's own copy, and through the ring."""
    tensors = [torch.randint(0, 100, (64 * 2**20,), dtype=torch.int8) for _ in range(64)]
    found: dict[str, Any] = {"gib": 4}
    for name, run in (
        ("plain", lambda: [t.cuda() for t in tensors]),
        ("ring", lambda: move(Holder(tensors), "cuda")),
    ):
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
            torch.cuda.empty_cache()
        found[f"{name}_gb_s"] = 4 * 2**30 / statistics.median(times[1:]) / 1e9
    model = Holder(tensors)
    move(model, "cuda")
    found["equal"] = all(
        torch.equal(p.data.cpu(), t) for p, t in zip(model.all, tensors, strict=True)
    )
    return found


COUNT, EACH = 64, 64 * 2**20
"""Tensors of the file, and bytes of each."""


@contextmanager
def file_of_fp8() -> Iterator[io.FileIO]:
    """A file of 4 GiB of fp8 numbers in the page cache, in shared memory where there is some."""
    shared = Path("/dev/shm")
    folder = shared if shared.is_dir() else None
    part = torch.randint(0, 0x7F, (EACH,), dtype=torch.uint8).numpy().tobytes()
    with tempfile.NamedTemporaryFile(dir=folder) as made:
        for _ in range(COUNT):
            made.write(part)
        made.flush()
        with io.FileIO(made.name) as file:
            yield file


def as_fp8(raw: Tensor) -> tuple[Tensor]:
    """The numbers that bytes stand for."""
    return (raw.view(torch.float8_e4m3fn),)


def weights_in(file: io.FileIO) -> Holder:
    """Views of the mapped file that nobody has looked at."""
    whole = mapped.map_file(file)
    for start in range(0, COUNT * EACH, EACH):
        stored = mapped.InFile(range(start, start + EACH), 1, as_fp8, ValueError)
        whole.tensors[start] = stored
        whole.unseen.add(start)
    return Holder([whole.view(i * EACH, EACH, torch.float8_e4m3fn) for i in range(COUNT)])


def only_read(file: io.FileIO, memory: Tensor, threads: int) -> None:
    """Read the file into as much memory as the ring has, with some threads."""
    nbytes = moving._PIECE
    looker = mapped.Looker(mapped.Watch())

    def fetch(index: int) -> None:
        span = range(index * nbytes, (index + 1) * nbytes)
        assert looker.fetch(file, span, 1, None, memory[index % moving._SLOTS]) == ""

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fetch, range(COUNT * EACH // nbytes)))


def round_all(file: io.FileIO, device: torch.device) -> list[Tensor]:
    """Round the file to fp8 on a card; return what came back."""
    whole, names = mapped.map_file(file), [str(index) for index in range(COUNT)]
    found: dict[str, Tensor] = {}
    watch = mapped.Watch()
    rounding = Rounding(device, watch, lambda name, values, scale: found.update({name: values}))
    for name, start in zip(names, range(0, COUNT * EACH, EACH), strict=True):
        span = range(start, start + EACH)
        whole.tensors[start] = mapped.InFile(span, 2, None, ValueError)
        whole.unseen.add(start)
        rounding.add(name, whole.view(start, EACH // 2, torch.bfloat16))
    assert not rounding.run(), "the card has no room"
    return [found[name] for name in names]


def round_here(file: io.FileIO) -> Tensor:
    """Round the first tensor of the file to fp8 on the host."""
    return rounded_to_fp8(mapped.map_file(file).view(0, EACH // 2, torch.bfloat16))[0]


def from_file() -> dict[str, Any]:
    """Bring a mapped file of 4 GiB to the device through the ring: looked at, and not."""
    found: dict[str, Any] = {"gib": 4, "processors": os.cpu_count(), "threads": moving._threads()}
    with file_of_fp8() as file:

        def timed(run: Callable[[], object]) -> float:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            torch.cuda.synchronize()
            return COUNT * EACH / (time.perf_counter() - begun) / 1e9

        slots = (moving._SLOTS, moving._PIECE)
        memory = torch.empty(slots, dtype=torch.uint8, pin_memory=True)
        rates = [timed(partial(round_all, file, torch.device("cuda"))) for _ in range(2)]
        found["rounded on the card, gb_s"] = max(rates)
        rates = [timed(partial(round_here, file)) / COUNT for _ in range(3)]
        found["rounded on the host, gb_s"] = max(rates)
        found["rounded by threads"] = torch.get_num_threads()
        there = round_all(file, torch.device("cuda"))[0].view(torch.uint8)
        found["rounded equal"] = torch.equal(there, round_here(file).view(torch.uint8))
        for threads in (2, 4, 8, 12, 16):
            rates = [timed(partial(only_read, file, memory, threads)) for _ in range(2)]
            found[f"read by {threads}, gb_s"] = max(rates)
        rates = {}
        for turn in range(4):
            model = weights_in(file)
            for name in ("looked at", "seen before"):
                rates.setdefault(name, []).append(timed(partial(move, model, "cuda")))
                if turn == 0 and name == "looked at":
                    there = torch.stack([p.data.view(torch.uint8).sum() for p in model.all])
                    found["equal"] = bool((there == there[0]).all())
                move(model, "cpu")
            del model
            torch.cuda.empty_cache()
        found |= {
            f"{name}, gb_s": statistics.median(found_of[1:]) for name, found_of in rates.items()
        }
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=("transfer",))
    given = parser.parse_args()
    output, all_of_it = given.output, given.only is None
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "kinds": [measure(*case) for case in cases()] if all_of_it else [],
        "turnings": turnings() if all_of_it else [],
        "transfer": transfer(), "from_file": from_file(),
    }  # fmt: skip
    for row in [*result["kinds"], *result["turnings"]]:
        print(json.dumps(row))
    print(json.dumps(result["transfer"]))
    print(json.dumps(result["from_file"]))
    if output:
        output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
