"""A model whose blocks are stored in different ways, streamed by a gang that shares it.

What is here runs in a process of a gang, or in a thread that stands for one: every function takes
the group of those who share, and returns plain numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import nn

from support import stored_files
from support.lean_models import inputs_of, model_of
from support.stored_layers import stored
from wan_core import WanLoRA
from wan_core.formats import Storage
from wan_core.forward import cut_tokens, lean_forward
from wan_core.loading.dequantize import Scales
from wan_core.loading.quantized import StoredLinear
from wan_core.loras import apply_loras
from wan_core.placing import Sharing, stream_blocks, streaming

LAYERS = 5
KINDS = ("plain", "fp8", "int8", "Q8_0", "Q4_K")
"""How the matrices of each block are stored: no two blocks have equally many bytes."""


class Stopped(Exception):
    """Ends a forward between two blocks, in all processes at the same one."""


def gguf_layer(layer: nn.Linear, kind: str) -> StoredLinear:
    made = StoredLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    data = torch.from_numpy(stored_files.gguf_blocks(layer.weight.data, kind)).contiguous()
    shape = (layer.out_features, layer.in_features)
    made.set_stored(data.view(torch.uint8), Scales(None), Storage("gguf", kind, shape))
    made.bias = layer.bias
    return made


def mixed_model(**numbers: Any) -> Any:
    """A transformer in bf16, one kind of storage for each block; the same in every process."""
    numbers = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 512} | numbers
    model = model_of("wan2.1-t2v", torch.bfloat16, num_layers=LAYERS, **numbers)
    for parameter in model.parameters():
        parameter.data.mul_(0.25)
    for number, (block, kind) in enumerate(zip(model.blocks, KINDS, strict=True)):
        # So that two and four parts of it leave a rest.
        block.register_buffer("more", torch.zeros(64 * (number + 1)), persistent=False)
        if kind == "plain":
            continue
        for name, layer in [*block.named_modules()]:
            if isinstance(layer, nn.Linear):
                owner, _, last = name.rpartition(".")
                eight = kind in ("fp8", "int8")
                made = stored(layer, kind) if eight else gguf_layer(layer, kind)
                setattr(block.get_submodule(owner), last, made)
    return model


def calls_of(model: Any, count: int = 4, device: str = "cpu") -> list[dict[str, Any]]:
    """Calls of 80 tokens: two or four processes can share them."""
    dtype, calls = model.patch_embedding.weight.dtype, []
    for seed in range(count):
        call = inputs_of(model, dtype, seed=seed)
        g = torch.Generator().manual_seed(seed)
        channels = model.config.in_channels
        call["hidden_states"] = torch.randn(1, channels, 5, 8, 8, generator=g).to(dtype)
        call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :16]
        calls.append({k: v.to(device) if torch.is_tensor(v) else v for k, v in call.items()})
    return calls


def write_lora(path: Path) -> None:
    """A LoRA for matrices of three blocks."""
    g, tensors = torch.Generator().manual_seed(5), {}
    for block in (0, 1, 3):
        for name, out, into in (("self_attn.q", 256, 256), ("ffn.0", 512, 256)):
            layer = f"diffusion_model.blocks.{block}.{name}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(4, into, generator=g) / 10
            tensors[f"{layer}.lora_B.weight"] = torch.randn(out, 4, generator=g) / 10
    save_file(tensors, path)


@contextmanager
def cut(model: Any, among: Any) -> Iterator[None]:
    """Have the gang compute together, as a cut unit is: each its part of the tokens."""
    with cut_tokens(model, among):
        yield


def units(
    among: Any,
    device: str,
    lora: str,
    resident: int,
    buffers: int,
    pin_bytes: int = 0,
    in_file: bool = False,
    model: Any = None,
    late: bool = False,
) -> dict[str, Any]:
    """Two units together, one alone, one that all leave at block 3, and another together.

    Each is computed first with all weights on the device, in the same way. Returns whether the bits
    were equal, what was copied from RAM after each, and the order of what was done. With ``late``
    no gather begins with its copy. ``in_file`` takes the weights to stay in a mapped file, so that
    each process page-locks its part.
    """
    model = model or mixed_model()  # threads share a generator of random numbers
    calls = calls_of(model, device=device)
    found: dict[str, Any] = {"equal": [], "copied": [], "events": []}

    def placed_model(stack: ExitStack) -> None:
        assert stack.enter_context(lean_forward(model)) is None
        if lora:
            loras = [WanLoRA(Path(lora), "both", 0.7)]
            stack.enter_context(apply_loras(model, loras, device=device, dtype=torch.bfloat16))

    def computed(number: int, together: bool = True) -> torch.Tensor:
        with cut(model, among if together else None):
            out: torch.Tensor = model(**calls[number])[0]
        return out

    with ExitStack() as stack:
        model.to(device)
        placed_model(stack)
        expected = [computed(number) for number in range(len(calls))]
        alone = computed(2, together=False)
    model.to("cpu")
    sharing = Sharing(among)
    streamed = stream_blocks(
        model, device, resident_blocks=resident, buffers=buffers, sharing=sharing,
        pin_bytes=pin_bytes, events=lambda *event: found["events"].append(event),
    )  # fmt: skip
    with ExitStack() as stack:
        with patch.object(streaming, "is_mapped", lambda tensor: in_file):
            state = stack.enter_context(streamed)
        placed_model(stack)
        sharing._can_at_once = sharing._can_at_once and not late

        def check(number: int, right: torch.Tensor, together: bool = True) -> None:
            sharing.begin(together=together)
            found["equal"].append(torch.equal(computed(number, together), right))
            found["copied"].append(sharing.copied_bytes)

        check(0, expected[0])
        check(1, expected[1])
        if among.rank == 0:
            check(2, alone, together=False)

        def stop(*_: object) -> None:
            raise Stopped

        sharing.begin(together=True)
        handle = model.blocks[3].register_forward_pre_hook(stop)
        try:
            computed(2)
            raise AssertionError("nobody stopped it")
        except Stopped:
            handle.remove()
        check(3, expected[3])
        found["pinned"] = state.pinned
        found["at_once"], found["buffer_bytes"] = sharing.at_once, state.buffer_bytes
        found["streamed"] = state.streamed
    return found


Way = tuple[int, int, int, bool]
"""Resident blocks, buffers, bytes that may be page-locked, and whether weights stay in a file."""
WAYS: tuple[Way, ...] = tuple(
    (*way, in_file)
    for way in ((0, 2, 1 << 40), (1, 3, 1 << 40), (0, 1, 1 << 40), (0, 2, 0), (0, 2, 1 << 21))
    for in_file in (False, True)
)
"""Page-locked as a whole, not at all, and in part."""


def units_in_turn(
    among: Any, device: str, lora: str, ways: Sequence[Way], timed: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Do ``units`` in each of ``ways``, one after the other, and then ``hidden`` of ``timed``.

    One gang for all: its processes begin once. Raises RuntimeError that names the way that failed.
    """
    found: dict[str, Any] = {"ways": []}
    for way in ways:
        try:
            found["ways"].append(units(among, device, lora, *way))
        except Exception as error:
            raise RuntimeError(f"of {ways} it was {way} that failed") from error
    if timed is not None:
        found["hidden"] = hidden(among, device, *timed)
    return found


def keeps_every_bit(found: Sequence[dict[str, Any]], resident: int) -> None:
    """Assert that the bits of all units are right, and each part was copied by one process.

    ``found`` is what ``units`` returned in each process of a gang.
    """
    others = [[True] * 3] * (len(found) - 1)
    assert [one["equal"] for one in found] == [[True] * 4, *others]
    steady = [one["copied"][1] - one["copied"][0] for one in found]
    assert sum(steady) == most_bytes(resident)


def most_bytes(resident: int = 0) -> int:
    """What the streamed blocks take in their slabs."""
    from wan_core.placing.buffers import BufferSchedule
    from wan_core.placing.transport import Block

    blocks = [Block(block).nbytes for block in mixed_model().blocks]
    return sum(blocks[i] for i in BufferSchedule(LAYERS, resident, 2).streamed)


def plain_model(dim: int) -> Any:
    """Four blocks of a width, in bf16: 5120 is the 14B's."""
    from support.tiny_models import make_transformer

    numbers = {"num_attention_heads": dim // 128, "attention_head_dim": 128}
    with torch.device("meta"):
        model = make_transformer(
            "wan2.1-t2v", num_layers=4, ffn_dim=dim * 27 // 10, **numbers
        ).requires_grad_(False).bfloat16()  # fmt: skip
    model = model.to_empty(device="cpu")
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for tensor in [*model.parameters()]:
        flat = tensor.data.view(-1)
        for start in range(0, len(flat), len(noise)):
            piece = flat[start : start + len(noise)]
            piece.copy_(noise[: len(piece)])
    rope = make_transformer("wan2.1-t2v", num_layers=1, ffn_dim=64, **numbers).rope
    model.rope = rope
    return model.eval()


def hidden(among: Any, device: str, dim: int, frames: int) -> dict[str, Any]:
    """Time cut forwards with weights in their place, streamed together, and streamed by each.

    Returns milliseconds, and of the gathers' time which share lies within that of kernels which
    compute, by the profiler.
    """
    model, on_card = plain_model(dim), device.startswith("cuda")
    g = torch.Generator().manual_seed(0)
    height, width = (60, 104) if on_card else (8, 8)
    call = {
        "hidden_states": torch.randn(1, model.config.in_channels, frames, height, width,
                                     generator=g).bfloat16().to(device),
        "timestep": torch.tensor([777.0]).to(device),
        "encoder_hidden_states": torch.randn(1, 512, model.config.text_dim,
                                             generator=g).bfloat16().to(device),
        "return_dict": False,
    }  # fmt: skip
    found: dict[str, Any] = {}

    def timed() -> tuple[torch.Tensor, float]:
        with cut(model, among):
            model(**call)
            among.all_say(True)
            _wait(device)
            begun = time.perf_counter()
            for _ in range(3):
                out: torch.Tensor = model(**call)[0]
            _wait(device)
        return out.clone(), 1e3 * (time.perf_counter() - begun) / 3

    model.to(device)
    with lean_forward(model):
        expected, found["resident_ms"] = timed()
    model.to("cpu")
    for name in ("shared", "by each"):
        sharing = Sharing(among) if name == "shared" else None
        with (
            stream_blocks(model, device, sharing=sharing, pin_bytes=1 << 40),
            lean_forward(model),
        ):
            if sharing is not None:
                sharing.begin(together=True)
            out, found[f"{name}_ms".replace(" ", "_")] = timed()
            found["equal"] = torch.equal(out, expected) and found.get("equal", True)
            if sharing is not None:
                found |= _profiled(model, call, among, device)
    return found


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _profiled(model: Any, call: dict[str, Any], among: Any, device: str) -> dict[str, Any]:
    """Return what the profiler saw of gathers, copies and kernels in three forwards."""
    activities = torch.profiler.ProfilerActivity
    kinds = [activities.CUDA] if device.startswith("cuda") else [activities.CPU]
    with torch.profiler.profile(activities=kinds) as profile, cut(model, among):
        for _ in range(3):
            model(**call)
        _wait(device)
    names = ("gather", "copy", "exchange", "compute")
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for event in profile.events():
        if str(event.device_type).endswith("CUDA"):
            span = (event.time_range.start, event.time_range.end)
            spans[_kind(event.name)].append(span)
    gathers = overlap(spans["gather"], spans["compute"])
    copies = overlap(spans["copy"], spans["compute"])
    return {
        "gathers": len(spans["gather"]), "gather_ms": gathers[0] / 1e3,
        "gather_hidden": gathers[1] / max(gathers[0], 1e-9), "copy_ms": copies[0] / 1e3,
        "copy_hidden": copies[1] / max(copies[0], 1e-9),
    }  # fmt: skip


def _kind(name: str) -> str:
    """Say what an activity of the device is.

    The parts of a result are gathered too, once a forward, where the last block has computed; it is
    told apart by nothing, and counts as a gather that is not hidden.
    """
    if "nccl" in name.lower():
        return "gather" if "AllGather" in name else "exchange"
    return "copy" if "Memcpy HtoD" in name else "compute"


def overlap(
    some: list[tuple[float, float]], others: list[tuple[float, float]]
) -> tuple[float, float]:
    """Return how long ``some`` are in all, and how long of that one of ``others`` is there too."""
    whole, covered = 0.0, 0.0
    others = sorted(others)
    for begin, end in some:
        whole += end - begin
        reached = begin
        for first, last in others:
            if first >= end:
                break
            first, last = max(first, reached), min(last, end)
            if last > first:
                covered += last - first
                reached = last
    return whole, covered
