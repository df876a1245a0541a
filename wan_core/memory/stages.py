"""How many bytes each stage of a render needs: pure arithmetic on shapes and file headers.

Weights are counted exactly (``models.sizes``). Activations are counted by replaying the models' own
code without tensors (``forward``, ``vae`` and their lean versions beside this module). What no code
tells, such as workspaces of libraries or the interpreter, is added by the constants below. Standard
library only; an estimate takes less than 5 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import MIB, MemoryEstimate, StageEstimate
from ..models import (
    BYTES,
    IMAGE_TOKENS,
    TEXT_TOKENS,
    VOCABULARY,
    ModelArchitecture,
    all_blocks,
    block_bytes,
    converted_bytes,
    experts_of,
    largest_leaf_bytes,
    part_bytes,
    parts_of,
    rest_bytes,
    stays_in_file,
    unpacked_bytes,
)
from .cards import EXPANDABLE_GAPS, GAPS
from .choices import (
    STREAM_BUFFERS,
    Choices,
    Workload,
    latent_size,
    rays_bytes,
    seen_latents,
    spread,
    windows_of,
)
from .forward import (
    camera_peak,
    face_peak,
    face_tokens,
    text_encoder_peak,
    transformer_peak,
    window_tokens,
)
from .forward_driven import driven_peak, kept_of
from .forward_lean import lean_peak
from .machine import RAM_RESERVE, unpinned_reserve
from .process import SENDING, stage_kind
from .text import assumed_warning, basis, confidence, gaps_warning
from .vae import decode_peak, encode_peak, heap_gaps, leaving_bytes
from .vae_lean import BANDS, lean_decode_bytes, lean_encode_bytes

if TYPE_CHECKING:
    from .machine import SystemResources

_LATENT_COPIES = 6
"""Tensors of the latents' size, float32, that are alive during a forward: the state, UniPC's
history and the first prediction."""
_STEP_COPIES = 12
"""The same while UniPC takes its step, when the activations of the forward are gone."""
_DEVICE_WORKSPACE = 40 * MIB
"""The workspace of cuBLAS (32 MiB on an H100, 8 MiB elsewhere) and small tables."""


def estimate(
    architecture: ModelArchitecture, workload: Workload, choices: Choices, system: SystemResources,
    *, available: int | None = None, cut: int = 1,
) -> MemoryEstimate:  # fmt: skip
    """Return what ``workload`` needs when it is run with ``choices``.

    ``cut`` is over how many cards each pass of the lean forward is cut; the bytes are one's.

    ``available`` is how many bytes may be used on the device. If it is given, the estimate says
    whether the workload fits, with the allocator's gaps. On a CPU the device's memory is the RAM,
    and the finished frames count as well.
    """
    ledger = _Ledger(architecture, workload, choices, system, cut)
    stages = ledger.stages()
    reserved = max(reserved_bytes(stage, choices, system) for stage in stages)
    gaps = reserved - max(stage.device_bytes for stage in stages)
    peak = max(stages, key=lambda stage: stage.device_bytes)
    output = workload.frames_bytes
    # On a CPU the finished frames are in the peak of the last two stages; they count once.
    there = output if system.device_kind == "cpu" and peak.name in ("decode", "output") else 0
    weights, overhead = peak.weights_bytes, peak.device_bytes - peak.weights_bytes - there
    return MemoryEstimate(
        base_model_mb=weights / MIB,
        generation_overhead_mb=overhead / MIB,
        output_tensors_mb=output / MIB,
        total_estimated_mb=(weights + overhead + output) / MIB,
        peak_usage_mb=peak.device_bytes / MIB,
        confidence=confidence(architecture, system, choices),
        basis=basis(system),
        warnings=(
            *assumed_warning(architecture),
            *gaps_warning(peak.device_bytes, reserved, available, system),
        ),
        stages=stages,
        host_ram_mb=max(stage.host_bytes for stage in stages) / MIB,
        device=system.device,
        fits=None if available is None else reserved <= available,
        # The gaps are subtracted here, so that a reader can compare this with the peak.
        available_mb=None if available is None else (available - gaps) / MIB,
    )


def reserved_bytes(stage: StageEstimate, choices: Choices, system: SystemResources) -> int:
    """Return what the allocator holds on the device at the peak of a stage, with its gaps."""
    if system.device_kind == "cpu":
        return stage.device_bytes
    kind = "other"
    if stage.name.startswith("denoise"):
        kind = "rows" if choices.by_rows else "lean" if choices.lean else "diffusers"
    elif stage.name in ("condition_encode", "control_encode", "decode"):
        kind = "vae"
    gaps = EXPANDABLE_GAPS if system.allocator == "expandable" else GAPS
    return stage.device_bytes + int(gaps[kind] * stage.activation_bytes)


class _Ledger:
    """Adds up the stages of one workload."""

    def __init__(
        self, architecture: ModelArchitecture, workload: Workload, choices: Choices,
        system: SystemResources, cut: int,
    ) -> None:  # fmt: skip
        self.cut = cut
        self.arch, self.workload, self.choices = architecture, workload, choices
        self.system = system
        self.on_cpu = system.device_kind == "cpu"
        self.together = self.on_cpu and choices.offload == "none"  # all in RAM from the first stage
        learnt = system.calibration.extra_of(choices.lean, choices.by_rows)
        self.learnt = 0.0 if self.on_cpu else learnt
        self.parts = tuple(p for p in parts_of(architecture) if p not in workload.unread)
        self.vae = architecture.vae_shape
        self.frames, self.height, self.width = latent_size(architecture, workload)
        self.bytes = {name: self._part_bytes(name) for name in self.parts}
        self.kinds: list[str] = []
        self.used: list[str] = []
        """Kinds and parts of the stages so far: what their libraries took, the process keeps."""

    def _part_bytes(self, name: str) -> int:
        return part_bytes(self.arch, name, self._dtype(name), fp8=self._in_fp8(name))

    def _in_fp8(self, name: str) -> bool:
        return self.choices.fp8_storage and name.startswith("transformer")

    def _dtype(self, name: str) -> str:
        return self.choices.dtypes.get(name) or self.choices.dtypes["transformer"]

    @property
    def latent_bytes(self) -> int:
        area = self.frames * self.height * self.width
        return 4 * self.workload.batch_size * self.vae.z_dim * area

    def stages(self) -> tuple[StageEstimate, ...]:
        """Return the stages in the order in which they run."""
        workload, found = self.workload, []
        if workload.encode_text:
            found.append(self._stage("text_encode", "text_encoder", self._text()))
        pictures = workload.image or workload.reference_picture
        if pictures and "image_encoder" in self.parts:
            tokens = IMAGE_TOKENS * (2 if workload.last_image else 1)
            size = BYTES[self._dtype("image_encoder")]
            # CLIP returns the hidden states (1280 wide) of all layers. One layer at a time has
            # temporaries of width 5120.
            clip = tokens * size * (1280 * 36 + 5120 * 3)
            found.append(self._stage("image_encode", "image_encoder", clip))
        if pictures:
            found.append(self._stage("condition_encode", "vae", *self._encode()))
        if workload.start_video or self.arch.transformer.vace_in_channels is not None:
            found.append(self._stage("control_encode", "vae", *self._encode_control()))
        experts = {"denoise": "transformer"}
        if self.arch.two_experts:
            experts = {"denoise_high": "transformer", "denoise_low": "transformer_2"}
        for name, part in experts.items():
            if part in workload.idle:
                continue
            found.append(self._stage(name, part, self._denoise(part), self._remembered(part)))
        decode, in_ram = self._decode()
        in_ram += workload.frames_bytes + workload.encoder_bytes
        found.append(self._stage("decode", "vae", decode, in_ram=in_ram))
        return (*found, self._output())

    def _stage(self, name: str, part: str, activations: int, in_ram: int = 0) -> StageEstimate:
        if self.on_cpu and stage_kind(name) == "decode":
            activations += heap_gaps(activations)
        weights, note = self._weights_on_device(part)
        learnt = int(activations * self.learnt)
        sent_beside = self._process()  # weights are sent before anything is computed by them
        self.kinds.append(stage_kind(name))
        loras = self.arch.lora_bytes(part, BYTES[self._dtype(part)])
        before = self._host_weights(part) + self.latent_bytes + self._left_of_others(part)
        host, extra = before + in_ram, _DEVICE_WORKSPACE
        if self.on_cpu:
            host += loras
            weights = self._host_weights(part) + loras
            extra = host - weights + self._process()
            note = "in RAM, with the interpreter and its libraries"
        elif loras:
            weights, note = weights + loras, f"{note}, with its LoRAs"
        locked = self._locked(part, host)
        needed = host + self._process() + (activations if self.on_cpu else 0)
        mapped = self.bytes[part] - self._ram_bytes(part) if self._mapped(part) else 0
        ahead = self._ahead(part, needed + locked + mapped)
        if ahead and self._mapped("transformer_2") and not self.together:
            needed += self._ram_bytes("transformer_2")  # of other files all counts there
        if locked:  # resident weights are sent before others are locked, or after
            needed += SENDING
        elif not self.on_cpu:
            needed = max(needed, before + SENDING + sent_beside)
        return StageEstimate(
            name=name,
            device_bytes=weights + activations + learnt + extra,
            weights_bytes=weights,
            activation_bytes=activations,
            host_bytes=needed,
            note=note,
            locked_bytes=locked,
            mapped_bytes=mapped,
            ahead_bytes=ahead,
        )

    def _ahead(self, part: str, taken: int) -> int:
        """Return the bytes of the low-noise expert if there is RAM to read it ahead of its turn.

        ``taken`` is what the high-noise expert's stage takes, the pages of its file included: they
        must not be given up for what comes later.
        """
        following = "transformer_2"
        if part != "transformer" or following not in self.bytes or self._in_fp8(following):
            return 0
        if self.choices.offload_of(following) == "group":
            return 0  # it copies everything into page-locked memory of its own
        spare = self.system.ram_available_bytes + self.system.ram_evictable_bytes
        spare -= taken + RAM_RESERVE
        wanted = self.bytes[following]
        counted = self._ram_bytes(following) if self.together else 0
        return wanted if spare >= wanted - counted else 0

    def _locked(self, part: str, host: int) -> int:
        """Return what is page-locked for streamed blocks, the next expert's included."""
        system, choices = self.system, self.choices
        if self.on_cpu or choices.offload_of(part) != "stream":
            return 0
        names = experts_of(self.arch) if part.startswith("transformer") else (part,)
        wanted = largest = 0
        for name in (name for name in names if name not in self.workload.idle):
            blocks = all_blocks(self.arch, name, self._dtype(name), fp8=self._in_fp8(name))
            resident = 0 if name == "text_encoder" else choices.resident_blocks or 0
            wanted += max(0, len(blocks) - resident) * max(blocks)
            largest = max(largest, *blocks)
        spare = system.ram_available_bytes + system.ram_evictable_bytes - host
        spare -= unpinned_reserve(system.ram_total_bytes)
        locked = max(0, min(wanted, system.pinned_budget_bytes, spare))
        if locked == wanted:
            return wanted
        # Whole blocks are locked, and two slabs through which the others travel.
        return locked // largest * largest + 2 * largest

    def _process(self) -> int:
        encoder = self.arch.components.get("text_encoder")
        tokens = VOCABULARY if encoder is None else encoder.vocabulary or VOCABULARY
        tokens *= self.workload.encode_text
        return self.system.process_ram(filter(None, self.kinds), tokens=tokens)

    def _output(self) -> StageEstimate:
        frames = self.workload.frames_bytes
        host = self._host_weights("vae") + self.latent_bytes + frames + self._process()
        return StageEstimate(
            name="output",
            device_bytes=host if self.on_cpu else 0,
            weights_bytes=self._host_weights("vae") if self.on_cpu else 0,
            activation_bytes=0,
            host_bytes=host,
            note="finished frames, float32, in RAM" if frames else "written to the file",
        )

    def _weights_on_device(self, part: str) -> tuple[int, str]:
        """Return the bytes of weights on the device while ``part`` computes, and a note on them."""
        choices = self.choices
        stay = [name for name in self.parts if self._stays(name)]
        resident = sum(self.bytes[name] for name in stay)
        if len(stay) == len(self.parts):
            return resident, "all parts stay on the device"
        beside = f", beside {len(stay)} parts that stay" if stay else ""
        if part in stay:
            return resident, "resident" + beside
        how = choices.offload_of(part)
        if how == "stream":
            nbytes, note = self._streamed(part)
        elif how == "group":
            nbytes = rest_bytes(self.arch, part, self._dtype(part))
            nbytes += STREAM_BUFFERS * block_bytes(self.arch, part, self._dtype(part))
            note = "diffusers' group offload, one block at a time"
        elif how == "sequential":
            nbytes = largest_leaf_bytes(self.arch, part, self._dtype(part))
            note = "one layer at a time"
        else:
            nbytes, note = self.bytes[part], f"only the {part.replace('_', ' ')}"
        return resident + nbytes, note + beside

    def _stays(self, part: str) -> bool:
        return self.choices.offload_of(part) == "none"

    def _streamed(self, part: str) -> tuple[int, str]:
        choices, dtype = self.choices, self._dtype(part)
        if part == "text_encoder":  # its embedding table stays in RAM, tokens are looked up there
            nbytes = STREAM_BUFFERS * block_bytes(self.arch, part, dtype)
            return nbytes, "streamed block by block"
        blocks = all_blocks(self.arch, part, dtype, fp8=choices.fp8_storage)
        resident = min(choices.resident_blocks or 0, len(blocks))
        moving = min(choices.stream_buffers, len(blocks) - resident)
        nbytes = rest_bytes(self.arch, part, dtype) + moving * max(blocks)
        nbytes += sum(blocks[index] for index in spread(len(blocks), resident))
        return nbytes, f"{resident} of {len(blocks)} blocks resident, the rest streamed"

    def _host_weights(self, part: str) -> int:
        """Return the bytes of weights that must be in RAM during a stage.

        Components that the stage does not use need not count: they can be freed and read again.
        """
        return sum(self._ram_bytes(name) for name in (self.parts if self.together else (part,)))

    def _left_of_others(self, part: str) -> int:
        """Return what parts of earlier stages hold: those that stay in their mapped files do."""
        self.used.append(part)
        if self.together:
            return 0  # they are all counted
        others = dict.fromkeys(name for name in self.used if name != part and self._mapped(name))
        return sum(map(self._ram_bytes, others))

    def _ram_bytes(self, part: str) -> int:
        dtype = self._dtype(part)
        if self._mapped(part):
            return converted_bytes(self.arch, part, dtype, on_cpu=self.on_cpu)
        return self.bytes[part]

    def _mapped(self, part: str) -> bool:
        """Whether a component stays in its mapped file, whose pages the system may drop."""
        # Diffusers' group offload page-locks a copy of everything.
        if self._in_fp8(part) or self.choices.offload_of(part) == "group":
            return False
        return stays_in_file(self.arch, part, self._dtype(part), on_cpu=self.on_cpu)

    def _unpacked(self, part: str) -> int:
        """Return the matrix that is taken apart for the time of one product."""
        dtype = self._dtype(part)
        return unpacked_bytes(self.arch, part, dtype, fp8=self._in_fp8(part))

    def _text(self) -> int:
        size = BYTES[self._dtype("text_encoder")]
        peak = text_encoder_peak(size, wide_softmax=not self.on_cpu)
        peak += self._unpacked("text_encoder")
        texts = 2 if self.workload.guidance_high or self.workload.guidance_low else 1
        return peak + texts * TEXT_TOKENS * self.arch.transformer.text_dim * 4

    def _encode(self, *, whole: bool = False) -> tuple[int, int]:
        """Return the activations of an encode, and the bytes of its feature cache kept in RAM.

        Of the ``whole`` clip, or of its pictures. A model with a mask of known frames is shown the
        whole clip, grey where nothing is known.
        """
        shape, workload = self.arch.transformer, self.workload
        masked = shape.mask_channels > 0 and (workload.image or shape.animate is not None)
        frames = workload.num_frames if whole or masked else max(1, workload.keyframes)
        # Later segments of Animate 1 begin with frames of each clip, encoded together.
        carried = shape.animate == 1 and workload.window_frames is not None and not whole
        numbers = {
            "batch": workload.batch_size if carried else 1,
            "num_frames": frames,
            "height": workload.height,
            "width": workload.width,
            "size": BYTES[self._dtype("vae")],
        }
        lean = self._lean_vae()
        if lean is None:
            return encode_peak(self.vae, **numbers), 0
        peak, cache = lean_encode_bytes(self.vae, **lean, **numbers)
        return peak, cache if lean["cache_on_host"] else 0

    def _encode_control(self) -> tuple[int, int]:
        """Return the same for a video, with VACE's other half and mask beside it."""
        channels = self.arch.transformer.vace_in_channels or 0
        frames = self.frames + self.workload.references
        peak, cache = self._encode(whole=True)
        return peak + 2 * 4 * channels * frames * self.height * self.width, cache

    def _lean_vae(self) -> dict[str, int] | None:
        """Return the arguments of the lean VAE's arithmetic; None where diffusers' own is used."""
        choices, rows = self.choices, self.choices.by_rows
        if not choices.lean_vae:
            return None
        away = (rows or choices.cache_in_ram) and not self.on_cpu
        quick = choices.quick and self.system.backend == "cuda"  # not known of MIOpen
        return {"bands": BANDS if rows else 1, "cache_on_host": away, "quick": quick}

    def _decode(self) -> tuple[int, int]:
        """Return the decode's activations, and its bytes in RAM: cache and leaving pictures."""
        workload = self.workload
        numbers = {
            "batch": workload.batch_size,
            "latent_frames": self.frames,
            "latent_height": self.height,
            "latent_width": self.width,
            "size": BYTES[self._dtype("vae")],
        }
        latents, lean, leaving = 2 * self.latent_bytes, self._lean_vae(), 0
        if not self.on_cpu:
            size = 4 if workload.return_frames else 1  # of a number; bytes go to a file alone
            leaving = leaving_bytes(workload.batch_size, workload.height, workload.width, size)
        if lean is None:
            return decode_peak(self.vae, **numbers) + latents, leaving
        peak, cache = lean_decode_bytes(self.vae, **lean, **numbers)
        return peak + latents, leaving + (cache if lean["cache_on_host"] else 0)

    def _denoise(self, part: str) -> int:
        workload, shape = self.workload, self.arch.transformer
        guided = workload.guided(part)
        size = BYTES[self._dtype(part)]
        # Only the part of the condition that a window sees is on the device.
        frames = seen_latents(workload, self.choices, self.frames)
        seen = frames / self.frames
        more = max(0, shape.in_channels - self.vae.z_dim) / self.vae.z_dim
        condition = int(more * seen * self.latent_bytes)
        condition += rays_bytes(self.arch, workload, int(seen * self.frames), size)
        if shape.face is not None:  # the pose's latents, and the face's tokens of both passes
            condition += int(seen * self.latent_bytes) * size // 4
            condition += (1 + guided) * workload.batch_size * face_tokens(shape, frames) * size
        texts = (1 if guided else 0) * workload.batch_size * TEXT_TOKENS * shape.text_dim * size
        tokens = self._hidden_state(1) // shape.dim // self.cut
        beside = self._unpacked(part) + self.arch.lora_room(part, tokens, size)
        # References are denoised as frames in front of the clip's.
        latents = self.latent_bytes * (self.frames + workload.references) // self.frames
        forward = self._forward(part, size, guided=guided) + beside + _LATENT_COPIES * latents
        if self.choices.magcache:  # the input of the first block, of each pass under way
            forward += self._hidden_state(size) * (2 if guided and self.choices.stream else 1)
        # The forward and the scheduler's step come one after the other; the larger one counts.
        return max(forward, _STEP_COPIES * latents) + condition + texts

    def _hidden_state(self, size: int) -> int:
        """Return the bytes of one pass's hidden states, (batch, tokens, width)."""
        seen = seen_latents(self.workload, self.choices, self.frames)
        tokens = window_tokens(self.arch.transformer, seen, self.height, self.width)
        return self.workload.batch_size * tokens * self.arch.transformer.dim * size

    def _remembered(self, part: str) -> int:
        """Return the RAM of MagCache's residuals, of a driving stream, of rays for windows."""
        workload, size = self.workload, BYTES[self._dtype(part)]
        windows = windows_of(workload, self.choices, self.frames)
        kept = kept_of(self.arch, workload, self.choices)[1]
        if windows > 1:  # each has its part of the rays sent
            kept += rays_bytes(self.arch, workload, self.frames, size)
        if not self.choices.magcache:
            return kept
        passes = 1 + workload.guided(part)
        return kept + windows * passes * self._hidden_state(size)

    def _forward(self, part: str, size: int, *, guided: bool) -> int:
        choices = self.choices
        numbers = {
            "batch": self.workload.batch_size,
            "latent_frames": seen_latents(self.workload, choices, self.frames),
            "latent_height": self.height,
            "latent_width": self.width,
            "size": size,
        }
        shape = self.arch.transformer
        face = face_peak(shape, size=size, frames=numbers["latent_frames"])
        per_token = self.arch.variant.expand_timesteps and self.workload.image
        # Both passes go through a streamed block together, so that it crosses the bus once.
        passes = 2 if guided and choices.stream else 1
        if shape.animate == 2:  # it has no other forward
            way, exact = choices.driving or "again", not choices.by_rows
            more = {"passes": passes, "coded": choices.attention_8bit, **numbers}
            return driven_peak(shape, way=way, exact=exact, **more)
        if not choices.lean:
            at_once = choices.hints_at_once(part)
            peak = transformer_peak(shape, per_token=per_token, hints_at_once=at_once, **numbers)
            return max(peak, face)
        peak = lean_peak(
            shape,
            per_token=per_token,
            exact=not choices.by_rows,
            embed_every_token=not self.on_cpu,
            passes=passes,
            cut=self.cut,
            coded=choices.attention_8bit,
            whole_values=bool(self._unpacked(part)) or bool(self.arch.loras_of(part)),
            **numbers,
        )
        if self.workload.camera:
            cudnn = not self.on_cpu
            peak = max(peak, camera_peak(shape, passes=passes, channels_last=cudnn, **numbers))
        return max(peak, face)
