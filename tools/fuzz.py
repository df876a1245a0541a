"""Breaks model files in seeded ways and loads each: only named errors, soon, and within bounds.

Run from the repository's root::

    python -m tools.fuzz --kinds safetensors gguf --count 300
    python -m tools.fuzz --count 20000 --write

Small whole files of real classes are made (transformers, VAEs, encoders, LoRAs, a folder), each
mutant has one to three faults, most of them in the header. A mutant is inspected (identified, or
the whole model detected) and then loaded, or its LoRA attached. Whatever is raised has to be one of
WanFit's errors. ``--write`` puts the figures into ``benchmarks/results/fuzz.md``.
"""

from __future__ import annotations

import argparse
import collections
import copy
import io
import json
import logging
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support import bad_files, gguf_umt5, layout_models, stored_files  # noqa: E402
from support import reference_layouts as layouts  # noqa: E402
from support.tiny_models import make_folder, make_transformer  # noqa: E402

from wan_core.config import WanLoRA  # noqa: E402
from wan_core.detect import ArchitectureDetector, identify, with_loras  # noqa: E402
from wan_core.errors import WanError  # noqa: E402
from wan_core.formats import read_table  # noqa: E402
from wan_core.loading import load_component, load_tokenizer  # noqa: E402
from wan_core.loras import apply_loras  # noqa: E402

SECONDS = 5.0
"""Processor time after which a mutant hangs; a whole file here takes some ten milliseconds."""
HEADROOM = 1 << 30
"""Bytes of address space that a mutant may take beyond what the process had at the start."""
PIECES = 512
"""Rows of the encoder's embedding in GGUF, pieces of its tokenizer and padding."""
REPORT = ROOT / "benchmarks" / "results" / "fuzz.md"
TORCH_TOKENS = (b"\x80\x02", b"c__builtin__\neval\n", b"(", b".", b"R", b"K\xff", b"PK\x05\x06",
                b"ctorch\nFloatStorage\n", b"\xff" * 4, b"data.pkl")  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1e308, "", "x" * 300, [], {}, [[]], [None], {"a": {}}, "../x",
    ["diffusers"], ["diffusers", "WanPipeline"], [1, 2], "torch.float16", "AutoencoderKLWan",
)  # fmt: skip


Mutants = Callable[[bytes, int, int], Iterator[bytes]]
"""From a good file, a count and a seed to that many broken ones."""


@dataclass(frozen=True)
class Subject:
    """A good file, what is tried with it, and where its header ends."""

    name: str
    path: Path
    attempt: Callable[[], object]
    mutants: Mutants


@dataclass
class Figures:
    """What became of the mutants of one kind."""

    mutants: int = 0
    loaded: int = 0
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest: float = 0.0
    seconds: float = 0.0
    grown: int = 0
    """Bytes by which the process's peak resident set rose."""
    faults: list[str] = field(default_factory=list)


def overwritten(good: bytes, count: int, seed: int, head: int) -> Iterator[bytes]:
    """Mutants of the same length: one to three bytes or numbers of the header are others."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at, size = rng.randrange(head), rng.choice((1, 1, 1, 4, 8))
            number = rng.choice((rng.randrange(256), 0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            if size == 1 and rng.random() < 0.5:
                number = data[at] ^ (1 << rng.randrange(8))
            data[at : at + size] = (number % 256**size).to_bytes(size, "little")
        yield bytes(data[: len(good)])


def in_header(head: int, tokens: tuple[bytes, ...]) -> Mutants:
    """Mutants that are broken within the first ``head`` bytes, and in every fourth anywhere."""

    def made(good: bytes, count: int, seed: int) -> Iterator[bytes]:
        early = bad_files.mutants(good[:head], count, seed, tokens)
        same = overwritten(good, count, seed + 1, head)
        anywhere = bad_files.mutants(good, count, seed + 2, tokens)
        for number in range(count):
            if number % 4 == 0:
                yield next(early) + good[head:]
            else:
                yield next(anywhere) if number % 4 == 1 else next(same)

    return made


def in_json_header(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Mutants of a safetensors file; in half of them the header is valid JSON with odd values."""
    head = 8 + int.from_bytes(good[:8], "little")
    plain = in_header(head, bad_files.SAFETENSORS_TOKENS)(good, count, seed)
    odd = of_json(good[8:head], 2 * count, seed)
    for number in range(count):
        text = next(odd)
        next(odd)
        if number % 2:
            yield next(plain)
        else:
            yield len(text).to_bytes(8, "little") + text + good[head:]


def in_zip(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Mutants of a torch checkpoint: in its pickle, as a sound zip; in its directory; anywhere."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        pickled = archive.read(name)
    start, tail = good.index(pickled), len(good) - good.rindex(b"PK\x01\x02") + 200
    front = bad_files.mutants(pickled, count, seed, TORCH_TOKENS)
    same = overwritten(pickled, count, seed + 1, len(pickled))
    back = overwritten(good[-tail:], count, seed + 2, tail)
    anywhere = bad_files.mutants(good, count, seed + 3, TORCH_TOKENS)
    for number in range(count):
        if number % 2 == 0:
            data = next(front) if number % 4 else next(same)
            yield _with_pickle(good, start, len(pickled), data)
        elif number % 4 == 1:
            yield good[:-tail] + next(back)
        else:
            yield next(anywhere)


def _with_pickle(good: bytes, start: int, size: int, data: bytes) -> bytes:
    """Put another pickle into a zip, with its length and checksum where they are stated."""
    data = (data + b"." * size)[:size]
    old, new = (zlib.crc32(part).to_bytes(4, "little") for part in (good[start:][:size], data))
    return (good[:start] + data + good[start + size :]).replace(old, new)


def of_json(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Mutants of a JSON text: every other one is valid JSON with odd values, keys and depth."""
    rng = random.Random(seed)
    broken = bad_files.mutants(good, count, seed, bad_files.SAFETENSORS_TOKENS)
    for number in range(count):
        if number % 2:
            yield next(broken)
            continue
        value = json.loads(good)
        for _ in range(rng.randint(1, 3)):
            _change(value, rng)
        yield json.dumps(value).encode()


def _change(value: Any, rng: random.Random) -> None:
    """Replace, remove, rename or move one value somewhere below ``value``."""
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.6:
            value = value[key]
            continue
        kind = rng.randrange(4)
        if kind == 0 or isinstance(value, list):
            value[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == 1:
            del value[key]
        elif kind == 2:
            value[rng.choice(("", "x", key + "_2", "a/b", "..", "\ud800"))] = value.pop(key)
        else:
            value[key] = copy.deepcopy(value[rng.choice(keys)])
        return


def _open_file(path: Path, kind: str | None = None) -> Callable[[], object]:
    def attempt() -> object:
        identify(read_table(path), kind)
        return load_component(path, torch.bfloat16, kind=kind, keep_quantized=True)

    return attempt


def _state(**numbers: Any) -> dict[str, torch.Tensor]:
    """A small transformer's tensors under their official names, in bf16."""
    torch.manual_seed(5)
    sizes = {"attention_head_dim": 128, "num_attention_heads": 1, "ffn_dim": 64, "num_layers": 1}
    model = make_transformer("wan2.1-t2v", **(sizes | numbers))
    state = layouts.original_transformer(layouts.state_of(model))
    return {name: value.to(torch.bfloat16) for name, value in state.items()}


def _matrices(state: dict[str, torch.Tensor]) -> set[str]:
    return {
        n for n, v in state.items() if n.startswith("blocks.") and v.ndim == 2 and ".weight" in n
    }


def _lora(folder: Path, state: dict[str, torch.Tensor]) -> tuple[Path, Callable[[], object]]:
    """Write a PEFT folder; what is tried: detect its model with it, and attach it."""
    model = make_folder(folder / "model", "wan2.1-t2v")
    transformer = load_component(model / "transformer")
    path = folder / "lora" / "adapter_model.safetensors"
    path.parent.mkdir()
    tensors = {}
    for name in ("attn1.to_q", "attn2.to_k", "ffn.net.2"):
        weight = transformer.get_submodule(f"blocks.0.{name}").weight
        stem = f"base_model.model.blocks.0.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.ones(2, weight.shape[1])
        tensors[f"{stem}.lora_B.weight"] = torch.ones(weight.shape[0], 2)
    save_file(tensors, path, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k"],
              "rank_pattern": {}, "alpha_pattern": {"blocks.0.attn1.to_q": 2}, "use_rslora": False,
              "base_model_name_or_path": "x", "modules_to_save": None}  # fmt: skip
    (path.parent / "adapter_config.json").write_text(json.dumps(config, indent=1))

    def attempt() -> object:
        architecture = ArchitectureDetector().detect_model_architecture(model)
        with_loras(architecture, [WanLoRA(path.parent)])
        with apply_loras(transformer, [WanLoRA(path)]):
            return None

    return path, attempt


def safetensors_subjects(folder: Path) -> list[Subject]:
    """A plain transformer, one in scaled fp8, one in int8 with notes, a VAE, a LoRA."""
    state = _state()
    paths = [folder / "bf16.safetensors"]
    save_file(state, paths[0])
    for kind, style in (("fp8_scaled", "metadata"), ("int8_rows", "notes")):
        tensors, metadata, _ = stored_files.pack(state, _matrices(state), kind, style)
        paths.append(stored_files.write(folder / f"{kind}_{style}.safetensors", tensors, metadata))
    vae = layouts.original_vae(layouts.state_of(layout_models.vae("2.1")), 2)
    paths.append(folder / "vae.safetensors")
    save_file({n: t.contiguous() for n, t in vae.items()}, paths[-1])
    found = [(path, _open_file(path)) for path in paths]
    found.append(_lora(folder, state))
    return [Subject(path.stem, path, attempt, in_json_header) for path, attempt in found]


def gguf_subjects(folder: Path) -> list[Subject]:
    """A transformer in Q8_0 and one in Q4_K, and an encoder that carries its tokenizer."""
    state, subjects = _state(attention_head_dim=256), []
    for kind in ("Q8_0", "Q4_K"):
        path = folder / f"{kind}.gguf"
        writer = gguf.GGUFWriter(path, "wan")
        writer.add_string("general.name", "tiny")
        for name, value in state.items():
            if name in _matrices(state) and value.shape[1] % 256 == 0:
                quant = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(name, stored_files.gguf_blocks(value, kind), raw_dtype=quant)
            else:
                writer.add_tensor(name, np.ascontiguousarray(value.float().numpy()))
        _finish(writer)
        subjects.append((path, _open_file(path)))
    spiece = gguf_umt5.spiece_model()
    encoder = layouts.gguf_umt5(
        layouts.state_of(layout_models.umt5(vocab_size=PIECES, num_layers=1))
    )
    path = gguf_umt5.write_encoder(folder / "umt5.gguf", encoder, spiece, rows=PIECES)[0]
    plain = _open_file(path)
    subjects.append((path, lambda: (load_tokenizer(path), plain())))
    data = [min(path.read_bytes().index(b"token_embd") + 4096, path.stat().st_size)
            for path, _ in subjects[2:]]  # fmt: skip
    heads = [4096, 4096, *data]
    return [
        Subject(path.stem, path, attempt, in_header(head, bad_files.GGUF_TOKENS))
        for (path, attempt), head in zip(subjects, heads, strict=True)
    ]


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def torch_subjects(folder: Path) -> list[Subject]:
    """An official VAE and encoder, and a nested training checkpoint."""
    vae = layouts.original_vae(layouts.state_of(layout_models.vae("2.1")), 2)
    text = layouts.original_umt5(layouts.state_of(layout_models.umt5(num_layers=1)))
    states = {"vae.pth": vae, "umt5.pth": text, "nested.pt": {"state_dict": vae, "epoch": 3}}
    subjects = []
    for name, state in states.items():
        path = folder / name
        torch.save(state, path)
        subjects.append(Subject(name, path, _open_file(path), in_zip))
    return subjects


def json_subjects(folder: Path) -> list[Subject]:
    """model_index.json, the configs beside the weights, and a LoRA's adapter_config.json."""
    model = make_folder(folder / "whole", "wan2.1-t2v")

    def whole(*names: str) -> Callable[[], object]:
        def attempt() -> object:
            architecture = ArchitectureDetector().detect_model_architecture(model)
            for name in names:
                part = architecture.components[name]
                load_component(part.path, torch.bfloat16, kind=part.kind)
            return architecture

        return attempt

    weights, attach = _lora(folder, {})
    parts = ("transformer", "vae", "text_encoder")
    subjects = [Subject("model_index.json", model / "model_index.json", whole(*parts), of_json)]
    for name in parts:
        path = model / name / "config.json"
        subjects.append(Subject(f"{name}/config.json", path, whole(name), of_json))
    adapter = weights.parent / "adapter_config.json"
    return [*subjects, Subject("adapter_config.json", adapter, attach, of_json)]


KINDS: dict[str, Callable[[Path], list[Subject]]] = {
    "safetensors": safetensors_subjects,
    "gguf": gguf_subjects,
    "torch": torch_subjects,
    "json": json_subjects,
}


class Hang(BaseException):
    """A mutant took longer than it may."""


def _hang(*_: object) -> None:
    raise Hang


def fuzz(kind: str, count: int, seed: int, folder: Path) -> Figures:
    """Try ``count`` mutants of a kind of file; ``folder`` is for the good files and the mutants."""
    figures, subjects = Figures(), KINDS[kind](folder)
    for subject in subjects:
        subject.attempt()  # whole files load: what is refused later is refused for its faults
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, began = signal.signal(signal.SIGPROF, _hang), time.perf_counter()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + HEADROOM, limits[1]))
    try:
        for number, subject in enumerate(subjects):
            share = count // len(subjects) + (number < count % len(subjects))
            good = subject.path.read_bytes()
            for index, data in enumerate(subject.mutants(good, share, seed + 1000 * number)):
                subject.path.write_bytes(data)
                _try(subject, index, figures)
            subject.path.write_bytes(good)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)
    figures.seconds = time.perf_counter() - began
    figures.grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    return figures


def _try(subject: Subject, index: int, figures: Figures) -> None:
    figures.mutants += 1
    began = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            subject.attempt()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        figures.loaded += 1
    except WanError as err:
        figures.refused[type(err).__name__] += 1
    except (Hang, Exception) as err:  # noqa: BLE001  (that is what is looked for)
        where = traceback.extract_tb(err.__traceback__)[-1]
        kept = (
            Path(tempfile.gettempdir()) / f"fuzz-{subject.path.stem}-{index}{subject.path.suffix}"
        )
        shutil.copy(subject.path, kept)
        figures.faults.append(
            f"{subject.name} mutant {index}: {type(err).__name__}: {str(err)[:200]} "
            f"({Path(where.filename).name}:{where.lineno}; kept as {kept})"
        )
    figures.slowest = max(figures.slowest, time.process_time() - began)


def report(found: dict[str, Figures], seed: int) -> str:
    """Return the figures as a page of Markdown."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    rows = [
        "# Broken files",
        "",
        f"Measured {time.strftime('%Y-%m-%d')} on the CPU ({platform.machine()}, "
        f"{os.cpu_count()} cores), {versions}, by `python -m tools.fuzz --count "
        f"{max(f.mutants for f in found.values())} --seed {seed} --write`. A mutant is a whole "
        "small file with one to three faults; it is inspected and loaded. Named: refused with one "
        "of WanFit's errors. Loaded: the fault lies where any value is a weight, or changes "
        "nothing. Slowest: processor seconds of one mutant, inspected and loaded. Memory: how far "
        "the peak of the process rose over all mutants of the kind.",
        "",
        "| kind | mutants | named | loaded | other errors | slowest s | memory MiB | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, f in found.items():
        named = sum(f.refused.values())
        errors = ", ".join(f"{name} {count}" for name, count in f.refused.most_common())
        rows.append(
            f"| {kind} | {f.mutants} | {named} | {f.loaded} | {len(f.faults)} | {f.slowest:.2f} | "
            f"{f.grown / 2**20:.0f} | {errors} |"
        )
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=300, help="mutants of each kind")
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--json", action="store_true", help="end with the figures as JSON")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(ROOT)}")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    found: dict[str, Figures] = {}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = fuzz(kind, args.count, args.seed, Path(folder))
        figures = found[kind]
        print(
            f"{kind}: {figures.mutants} mutants in {figures.seconds:.0f} s, "
            f"{figures.loaded} loaded, {dict(figures.refused)}, {len(figures.faults)} faults"
        )
        for fault in figures.faults:
            print("  ", fault)
    if args.json:
        print(json.dumps({kind: vars(figures) for kind, figures in found.items()}))
    if args.write:
        REPORT.write_text(report(found, args.seed), encoding="utf-8")
    return 1 if any(figures.faults for figures in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
