"""Prints how long detection takes and how much it reads: ``python benchmarks/detect_time.py``.

The files are sparse: true headers of published models, holes for their weights. Bytes are counted
at the one place that opens model files.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import wan_layouts as layouts

from wan_core.detect import ArchitectureDetector
from wan_core.formats import open as header

RUNS = 15


def single(folder: Path, name: str, kind: str) -> Path:
    file = layouts.stored(layouts.FILES[name][0], kind)
    return layouts.write_sparse(folder / f"{name} {kind}.safetensors", file)


def sharded(folder: Path, name: str, count: int) -> Path:
    root = folder / f"{name} in {count} shards"
    root.mkdir()
    return layouts.write_shards(root, layouts.stored(layouts.FILES[name][0], "bf16"), count)


def gguf(folder: Path, name: str) -> Path:
    path = folder / f"{name} Q4_K.gguf"
    return layouts.write_sparse_gguf(path, layouts.FILES[name][0], 12, 256, 144)


@contextmanager
def counting() -> Any:
    """Count the bytes read through ``header.open_regular``."""
    total, real = [0], header.open_regular

    @contextmanager
    def counted(path: Path) -> Any:
        with real(path) as (file, size):
            yield layouts.Counted(file, total), size

    header.open_regular = counted
    try:
        yield total
    finally:
        header.open_regular = real


def measure(path: Path) -> dict[str, Any]:
    """Detect a model several times; milliseconds (median, worst) and bytes."""
    detect = ArchitectureDetector().detect_model_architecture
    with counting() as total:
        found = detect(path)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        detect(path)
        times.append(1000 * (time.perf_counter() - start))
    return {
        "model": path.name, "variant": found.name, "weights_gb": round(found.nbytes / 1e9, 1),
        "median_ms": round(statistics.median(times), 1), "worst_ms": round(max(times), 1),
        "bytes_read": total[0],
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [
            single(folder, "t2v-14b", "bf16"), single(folder, "i2v-14b", "bf16"),
            single(folder, "i2v-14b", "fp8_scaled old"),
            single(folder, "i2v-14b", "fp8_scaled new"), gguf(folder, "i2v-14b"),
            sharded(folder, "t2v-14b", 20),
        ]  # fmt: skip
        rows = [measure(path) for path in paths]
    for row in rows:
        print(
            f"{row['model']:34} {row['variant']:18} {row['weights_gb']:5} GB "
            f"{row['median_ms']:7} ms (worst {row['worst_ms']}) {row['bytes_read']:>9,} bytes read"
        )
    result = {"machine": platform.platform(), "python": platform.python_version(), "rows": rows}
    out = ROOT / "benchmarks" / "results" / "detect_time.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
