"""Seconds of a job's stages: reading, texts, pictures, page locks, decode, mp4. Standard library.

Each is a sum of named terms, bytes or pixels over a rate. The rates are medians of what runs on an
H100 and on H200s have shown (``benchmarks/results``): hosts of 16 to 64 cores, behind PCIe 5 x16.
On other cards compute goes by the card's rate, copies by its bus; the rest was measured on those
hosts alone. How long denoising steps take is in ``timing``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..config import StageEstimate
from ..memory import (
    BANDS,
    RAM_RESERVE,
    Choices,
    Workload,
    latent_size,
    lean_decode_bytes,
    spread,
)
from ..models import BYTES, TEXT_TOKENS, ModelArchitecture, all_blocks, part_bytes, stays_in_file

if TYPE_CHECKING:
    from ..memory import SystemResources

_RATES = {
    (7, 5): (1024, 1.5e9, 0.40),
    (8, 0): (2048, 1.41e9, 0.45),
    (8, 6): (512, 1.7e9, 0.80),
    (8, 9): (512, 2.5e9, 0.75),
    (9, 0): (4096, 1.75e9, 0.53),
    (10, 0): (8192, 1.9e9, 0.35),
    (12, 0): (512, 2.4e9, 0.75),
}
"""Per compute capability: half-precision operations per multiprocessor and clock, clocks per
second, and the share of both that a Wan forward reaches in eager PyTorch."""
_OTHER_GPU = 3e13
"""Operations per second where the architecture is not known. Assumed, not measured."""
_CPU_CORE = 3e10
"""Operations per second of one CPU core, of which four are assumed. Neither was measured."""
_FP32_SHARE = 0.25
"""Share of the half-precision rate that fp32 reaches, with TF32 off. Assumed, not measured."""
PAGEABLE = 0.5
"""Share of the bus that copies from pageable memory reach through page-locked pieces: 26.8, 23 and
16 of the 50 GB/s that count for PCIe 5 x16, on H200s (``dequantise_h200.json``), 22 on an H100."""
DISK = 1.5e9
"""Bytes per second of a cold read. Disks of three rented hosts read 1.5, 1.6 and 2.0 GB/s when cold
(``files_people_have``); an NVMe SSD of one's own may be several times as fast."""
_CACHED = 5e9
"""The same where the file is in the system's cache, weights looked through and sent to the card:
14.3 GB of an expert in 2.1 s (H100), 2.6 and 3.6 to 4.2 (H200s), 6.7 GB of umT5 in 0.7 to 2.0."""
_COPIED = 1.2e9
"""The same where weights are copied or cast and not used as they lie in the file: 4 GB in 3.3 s of
one core's time (``load_time.md``)."""
_TO_FP8 = 9.3e8
"""The same where the host rounds bf16 to fp8 for storage: on one busy processor, and 1.0e9 on two.
A card rounds what is sent to it and gives half the bytes back, into new memory: assumed to take
what sending and filling page-locked memory do. No such load was measured on a card's host since."""
_OPENED = 0.3
"""Seconds until a component's file is open and its modules are made: VAEs of 0.5 GB took 0.2 to 0.7
s altogether."""
_TOKENIZER = 1.5
"""Seconds of building umT5's tokenizer of 256,000 pieces: 1.45 of one core, measured alone."""
_TEXTS = 0.1
"""Seconds of encoding texts beside their operations: 0.1 to 0.4 s on an H100 and on H200s."""
_LOCKED = 2e9
"""Bytes per second that are copied into new page-locked memory: 10 GB in 4.5 to 5.8 s, 26 GB in 13
s, on an H100 and an H200."""
_UNLOCKED = 1.5e10
"""Bytes of page-locked memory that are given back in a second: 20 GB in 1.0 to 2.1 s."""
_PER_PIXEL = {
    ("fp32", "diffusers"): 1.23e7,
    ("fp32", "lean"): 1.0e7,
    ("fp32", "quick"): 9.4e6,
    ("fp32", "rows"): 1.9e7,
    ("half", "diffusers"): 3.1e7,
    ("half", "lean"): 2.45e7,
    ("half", "quick"): 2.1e7,
    ("half", "rows"): 5.4e7,
}
"""What a decoded pixel counts for at ``device_rate`` in the VAE's dtype, frames on the host: an
effective figure, the median of VAE 2.1 at 480p81 and 720p81 and VAE 2.2 at 704p41 and 704p121
(``speed_h100.md``, ``speed_h200_decode.md``, ``many_2_nvidia_h200.md``); they differ by 20 %. Bands
of rows ("rows") were measured in half precision on an H100 (``gpu_memory_h100.md``) before the
norms were fused; fp32 is assumed to lose as much."""
_ENCODED = {False: 0.65, True: 0.31}
"""What an encoded pixel counts for beside a decoded one, VAE 2.1 and 2.2: by the operations and the
maps of their layers. Not measured."""
_CLIP = 0.2
"""Seconds of a picture's encode by CLIP. Assumed, not measured."""
_X264 = 1.6e7
"""Pixels that x264 encodes in a second on frames of random weights, which hardly compress, with 8
threads of a host of 32 cores (``speed.py --part clip``, H200). Other hosts were not measured."""
_HELD_BACK = 40
"""Frames that x264 has in hand when the last one comes: they are encoded after the decode."""
FIRST = {"encode": 0.8, "denoise": 0.8, "decode": 0.2}
"""Seconds that a process takes for the first use of libraries in stages of a kind, on CUDA: the
same run in a new process, its kernels compiled before."""
COMPILED = {"denoise": 4.5, "decode": 0.9}
"""Seconds of Triton's compiler, the first time on a machine: a first forward of 7.4 s beside 2.9,
8.7 beside 2.8 and 4.2 beside 0.9, first decodes of 3.6 beside 2.7 and 2.1 beside 1.3."""


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """What a stage is expected to take, named as in a result's stages."""

    name: str
    warm: float
    """As things stand: what this process holds is not read, and other files are in the system's
    cache if RAM can hold them all."""
    cold: float
    """In a new process, every file read from disk."""
    first: float = 0.0
    """Of ``warm``, what later runs of this process do not take: libraries' first use, kernels."""


def device_rate(system: SystemResources, dtype: str) -> float:
    """Return the operations per second that eager PyTorch is expected to reach."""
    if system.device_kind == "cpu":
        return _CPU_CORE * 4
    rate = _OTHER_GPU
    capability = system.compute_capability
    if capability is not None and system.multiprocessors:
        older = [known for known in _RATES if known <= capability]
        per_clock, clock, share = _RATES[max(older, default=min(_RATES))]
        rate = system.multiprocessors * per_clock * clock * share
    return rate * (_FP32_SHARE if dtype == "fp32" else 1.0)


def _pixel_seconds(
    architecture: ModelArchitecture, choices: Choices, system: SystemResources
) -> float:
    """Return the seconds of a decoded pixel."""
    shape, dtype = architecture.vae_shape, choices.dtypes.get("vae", "fp32")
    way = "diffusers"
    if choices.lean_vae and choices.by_rows:
        way = "rows"
    elif choices.lean_vae and system.device_kind == "cuda":
        way = "quick" if choices.quick else "lean"
    kind = "fp32" if dtype == "fp32" else "half"
    # A pruned VAE has narrower maps, which are read and written more than multiplied.
    width = shape.decoder_base_dim / (256 if shape.is_residual else 96)
    return width * _PER_PIXEL[kind, way] / device_rate(system, dtype)


def decode_seconds(
    architecture: ModelArchitecture, workload: Workload, choices: Choices, system: SystemResources
) -> float:
    """Return the seconds of the decode: its pixels, and the cache's way to RAM and back.

    A cache that is kept in RAM is page-locked once, and crosses the bus both ways for each latent
    frame.
    """
    pixels = workload.width * workload.height * workload.num_frames * workload.batch_size
    took = pixels * _pixel_seconds(architecture, choices, system)
    away = choices.lean_vae and (choices.by_rows or choices.cache_in_ram)
    if not away or system.device_kind == "cpu":
        return took
    frames, height, width = latent_size(architecture, workload)
    cache = lean_decode_bytes(
        architecture.vae_shape, batch=workload.batch_size, latent_frames=frames,
        latent_height=height, latent_width=width, size=BYTES[choices.dtypes["vae"]],
        bands=BANDS if choices.by_rows else 1, cache_on_host=True,
    )[1]  # fmt: skip
    return took + cache / _LOCKED + 2 * frames * cache / system.bus_bytes_per_second


def mp4_seconds(workload: Workload, decode: float) -> float:
    """Return the seconds of an mp4 that are not hidden behind a decode of so many."""
    if not workload.to_file:
        return 0.0
    each = workload.width * workload.height * workload.batch_size / _X264
    behind = min(_HELD_BACK, workload.num_frames) * each
    return max(behind, workload.num_frames * each - decode)


def encoded_frames(architecture: ModelArchitecture, workload: Workload) -> dict[str, int]:
    """Return the frames that the VAE encodes, by stage: pictures, videos, controls.

    A model with a mask of known frames is shown the whole clip. VACE encodes it twice: what is to
    be made, and what is kept.
    """
    shape, found = architecture.transformer, {}
    if workload.image or workload.reference_picture:
        masked = shape.mask_channels > 0 and (workload.image or shape.animate is not None)
        found["condition_encode"] = workload.num_frames if masked else max(1, workload.keyframes)
    vace = shape.vace_in_channels is not None
    if workload.start_video or vace:
        found["control_encode"] = workload.num_frames * (1 + vace) + workload.references
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """A job whose stages' seconds are counted."""

    architecture: ModelArchitecture
    workload: Workload
    choices: Choices
    system: SystemResources
    stages: Sequence[StageEstimate] = ()
    """Those of its estimate: what is page-locked and what is read ahead."""

    def all_stages(self, steps: Mapping[str, float]) -> tuple[StageSeconds, ...]:
        """Return the stages in their order; ``steps`` are the seconds of each expert's steps."""
        found = [*self._texts(), *self._pictures(), *self._denoising(steps)]
        if all(stage.name != "load vae" for stage in found):
            found.append(self._load("vae"))
        locked = [s.locked_bytes for s in self.stages if s.name.startswith("denoise")]
        if any(locked):
            back = max(locked) / _UNLOCKED
            found.append(StageSeconds("give back page locks", back, back))
        decode = decode_seconds(self.architecture, self.workload, self.choices, self.system)
        found.append(self._with_first("decode", "decode", decode))
        if self.workload.to_file:
            mp4 = mp4_seconds(self.workload, decode)
            found.append(StageSeconds("mp4", mp4, mp4))
        return tuple(found)

    def _texts(self) -> list[StageSeconds]:
        if not self.workload.encode_text:
            return []
        system, part = self.system, "text_encoder"
        # A token costs two operations for each weight; the embedding's are looked up, and few.
        weights = part_bytes(self.architecture, part, "bf16") / 2
        texts = 1 + (self.workload.guidance_high or self.workload.guidance_low)
        dtype = self.choices.dtypes.get(part) or "bf16"
        encode = _TEXTS + 2 * weights * TEXT_TOKENS * texts / device_rate(system, dtype)
        known = 0.0 if "tokenizer" in system.loaded else _TOKENIZER
        encode += self._locks("text_encode")
        return [
            self._read_beside(self._load(part), part, known),
            StageSeconds("load tokenizer", known, _TOKENIZER),
            self._with_first("text_encode", "encode", encode, self._sent(part)),
        ]

    def _read_beside(self, load: StageSeconds, part: str, making: float) -> StageSeconds:
        """Return a part's loading where its file is read while a tokenizer is made.

        That takes ``making`` seconds of this process, and ``_TOKENIZER`` of a new one. On Linux
        alone, and where RAM has room for the file beside the job.
        """
        file, system = self.architecture.components.get(part), self.system
        needed = max((s.host_bytes + s.locked_bytes for s in self.stages), default=0)
        free = system.ram_available_bytes + system.ram_evictable_bytes - RAM_RESERVE - needed
        if system.os != "Linux" or file is None or file.nbytes > free:
            return load
        # What is left is what the system's cache gives.
        hidden = file.nbytes / DISK - file.nbytes / self._file_rate(part)
        cold = load.cold - max(0.0, min(_TOKENIZER, hidden))
        warm = load.warm
        if warm and not self._all_cached:
            warm -= max(0.0, min(making, hidden))
        return replace(load, warm=warm, cold=cold)

    def _pictures(self) -> list[StageSeconds]:
        found = []
        pictures = self.workload.image or self.workload.reference_picture
        if pictures and self.architecture.transformer.image_dim is not None:
            found += [self._load("image_encoder"), StageSeconds("image_encode", _CLIP, _CLIP)]
        pixel = _pixel_seconds(self.architecture, self.choices, self.system)
        pixel *= _ENCODED[self.architecture.vae_shape.is_residual]
        for name, frames in encoded_frames(self.architecture, self.workload).items():
            if all(stage.name != "load vae" for stage in found):
                found.append(self._load("vae"))
            took = pixel * frames * self.workload.width * self.workload.height
            found.append(StageSeconds(name, took, took))
        return found

    def _denoising(self, steps: Mapping[str, float]) -> list[StageSeconds]:
        """Return the experts' stages; the second is read and locked while the first computes."""
        found: list[StageSeconds] = []
        names = {"transformer": "denoise", "transformer_2": "denoise_low"}
        if self.architecture.two_experts:
            names["transformer"] = "denoise_high"
        locks = self._locks(names["transformer"]) / max(1, len(steps))
        for part, took in steps.items():
            load = self._load(part)
            load = replace(load, warm=load.warm + locks, cold=load.cold + locks)
            denoise = self._with_first(names[part], "denoise", took, self._sent(part))
            if found:
                load, denoise = self._second(found[-1], load, denoise, part)
            found += [load, denoise]
        return found

    def _second(
        self, before: StageSeconds, load: StageSeconds, denoise: StageSeconds, part: str
    ) -> tuple[StageSeconds, StageSeconds]:
        """Return the second expert's stages: libraries are in use, and it may be read by now."""
        first, cold = denoise.first, self._first_cold("denoise")
        denoise = replace(denoise, warm=denoise.warm - first, cold=denoise.cold - cold, first=0.0)
        if not any(stage.ahead_bytes for stage in self.stages):
            return load, denoise
        sent = self._moved(part)  # from RAM: it was not sent while it was read
        here = 0.0 if part in self.system.loaded else sent
        load = replace(
            load, warm=max(0.0, load.warm - before.warm), cold=max(0.0, load.cold - before.cold)
        )
        return load, replace(denoise, warm=denoise.warm + here, cold=denoise.cold + sent)

    def _locks(self, stage: str) -> float:
        locked = next((s.locked_bytes for s in self.stages if s.name == stage), 0)
        return locked / _LOCKED

    def _load(self, part: str) -> StageSeconds:
        """Return what reading a component takes, looking through it and sending it included."""
        file = self.architecture.components.get(part)
        nbytes = 0 if file is None else file.nbytes
        rate, sent = self._file_rate(part), 0.0
        if self.system.device_kind == "cuda" and not self._mapped(part):
            sent = self._moved(part)
        warm = _OPENED + nbytes / (rate if self._all_cached else min(rate, DISK)) + sent
        cold = _OPENED + nbytes / min(rate, DISK) + sent
        return StageSeconds(f"load {part}", 0.0 if part in self.system.loaded else warm, cold)

    def _file_rate(self, part: str) -> float:
        dtype = self.choices.dtypes.get(part) or "bf16"
        file = self.architecture.components.get(part)
        quantised = file is not None and file.stored is not None and file.stored.quantised
        on_cpu = self.system.device_kind == "cpu"
        mapped = stays_in_file(self.architecture, part, dtype, on_cpu=on_cpu)
        if self.choices.fp8_storage and part.startswith("transformer") and not quantised:
            there = mapped and self.system.backend == "cuda"
            return 1 / (1 / _CACHED + 0.5 / _LOCKED) if there else _TO_FP8
        return _CACHED if mapped else _COPIED

    def _mapped(self, part: str) -> bool:
        return self._file_rate(part) == _CACHED

    @property
    def _all_cached(self) -> bool:
        """Whether RAM can hold every file that is read, so that the system's cache keeps them."""
        files = {
            part.path: part.nbytes
            for name, part in self.architecture.components.items()
            if name not in self.workload.unread and name not in self.system.loaded
        }
        free = self.system.ram_available_bytes + self.system.ram_evictable_bytes
        return sum(files.values()) <= max(0, free - RAM_RESERVE)

    def _moved(self, part: str) -> float:
        """Return the seconds that sending a component to the device takes, from RAM.

        What of a transformer does not stay there is counted with the steps.
        """
        offload, expert = self.choices.offload_of(part), part.startswith("transformer")
        if expert and offload in ("sequential", "group"):
            return 0.0
        dtype = self.choices.dtypes.get(part) or "bf16"
        fp8 = self.choices.fp8_storage and expert
        nbytes = part_bytes(self.architecture, part, dtype, fp8=fp8)
        if expert and offload == "stream":
            blocks = all_blocks(self.architecture, part, dtype, fp8=fp8)
            stay = spread(len(blocks), min(self.choices.resident_blocks or 0, len(blocks)))
            nbytes -= sum(blocks) - sum(blocks[index] for index in stay)
        slow = 2 if offload == "sequential" else 1
        return slow * nbytes / (self.system.bus_bytes_per_second * PAGEABLE)

    def _sent(self, part: str) -> float:
        """Return the same of a component that this process holds: with "none" it is there."""
        held = part in self.system.loaded and self.choices.offload_of(part) != "none"
        return self._moved(part) if held else 0.0

    def _with_first(self, name: str, kind: str, took: float, sent: float = 0.0) -> StageSeconds:
        """Return a stage with what it takes once: ``sent`` is counted where files are held."""
        cold = self._first_cold(kind)
        first = 0.0 if kind in self.system.done_here else cold
        if first and self.system.calibration.runs:  # this machine has compiled its kernels
            first = FIRST[kind]
        return StageSeconds(name, took + sent + first, took + cold, first)

    def _first_cold(self, kind: str) -> float:
        if self.system.device_kind != "cuda":
            return 0.0
        return FIRST[kind] + (COMPILED.get(kind, 0.0) if self.choices.lean else 0.0)


def longer(stages: Sequence[StageSeconds], by: float, name: str) -> tuple[StageSeconds, ...]:
    """Return the stages with ``by`` seconds more for those whose name begins so, as they last."""
    whole = sum(stage.warm for stage in stages if stage.name.startswith(name)) or 1.0

    def changed(stage: StageSeconds) -> StageSeconds:
        more = by * stage.warm / whole
        return replace(stage, warm=stage.warm + more, cold=stage.cold + more)

    return tuple(changed(one) if one.name.startswith(name) else one for one in stages)


def decoded_in(
    stages: Sequence[StageSeconds], workload: Workload, before: float, after: float
) -> tuple[StageSeconds, ...]:
    """Return the stages where the decode takes ``after`` seconds instead of ``before``."""
    mp4 = mp4_seconds(workload, after) - mp4_seconds(workload, before)
    return longer(longer(stages, after - before, "decode"), mp4, "mp4")


def on_workers(
    stages: Sequence[StageSeconds], start: float, steps: float
) -> tuple[StageSeconds, ...]:
    """Return the stages where processes start, and all steps take ``steps`` seconds more."""
    begun = StageSeconds("start workers", start, start)
    return (begun, *longer(stages, steps, "denoise"))


def before_steps(stages: Sequence[StageSeconds]) -> float:
    """Return the seconds that pass before an expert is read."""
    names = [stage.name for stage in stages]
    count = names.index("load transformer") if "load transformer" in names else 0
    return sum(stage.warm for stage in stages[:count])
