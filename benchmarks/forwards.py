"""How fast is one forward of a transformer? Each way beside diffusers, with the same numbers.

    python benchmarks/speed.py --part forward [--only forward-14b-480p]

A transformer of true shape with random weights stands on the device: in bf16, once more sharing its
weights for ``compile_repeated_blocks``, and where a case asks for it with the matrices of its
blocks stored in fp8. Those in bf16 are then what the stored ones are when taken apart, so that all
ways compute with the same numbers and have one reference, diffusers' own eager forward:

- compiled: diffusers' forward with its blocks compiled, for each size anew;
- unfused, exact: the lean forward without and with fused kernels; both must have diffusers' bits;
- rows: the lean forward that cuts products by rows and heads, for the least memory;
- fast: the fastest 16-bit attention beside that;
- fastest: attention in 8 bit too, by the kernel that proves the fastest;
- fp8, ...: the same of the stored ones: exact takes matrices apart at each use, fast multiplies in
  fp8, or the feed-forwards alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from speed_bench import BASE, Bench, in_turns, keep
from speed_report import split_of
from support.true_models import KEEP_FP32, transformer
from torch import Tensor, nn

from wan_core.forward import lean_forward
from wan_core.kernels.attention_ways import ways as attention_kernels
from wan_core.loading.quantized import layer_of_fp8, replace_layer, rounded_to_fp8
from wan_core.models import VARIANTS, TransformerShape

TINY_SHAPE = replace(
    VARIANTS["wan2.1-t2v-1.3b"].transformer, heads=2, head_dim=16, ffn_dim=64, layers=3, text_dim=32
)
PLAIN = (BASE, "compiled", "exact", "fast", "fastest")
STORED = ("fp8, exact", "fp8, feed-forwards in 8 bit", "fp8, fast", "fp8, fastest")


@dataclass(frozen=True)
class Case:
    """One forward: a model and the size of its latents (frames, height, width)."""

    name: str
    title: str
    model: str
    grid: tuple[int, int, int]
    needs: float
    """About how many seconds it takes on an H200."""
    ways: tuple[str, ...]
    turns: int = 2
    details: tuple[str, ...] = ()
    """Ways that a brief run leaves out."""
    profile: tuple[str, ...] = (BASE, "exact")


CASES = (
    Case(
        "forward-14b-480p", "14B, 480p81", "wan2.2-t2v-a14b", (21, 60, 104), 105,
        (BASE, "compiled", "exact", "fastest", *STORED), details=("unfused", "rows", "fast"),
        profile=(BASE, "exact", "fp8, fast"),
    ),
    Case(
        "forward-14b-720p", "14B, 720p81", "wan2.2-t2v-a14b", (21, 90, 160), 140,
        (BASE, "compiled", "exact", "fp8, fast", "fp8, fastest"), turns=1,
        profile=(BASE, "exact", "fp8, fast"),
    ),
    Case("forward-5b-704p", "5B, 704p121, first frame held", "wan2.2-ti2v-5b", (31, 44, 80), 35,
         PLAIN, details=("unfused",)),
    Case("forward-1.3b-480p", "1.3B, 480p81", "wan2.1-t2v-1.3b", (21, 60, 104), 25, PLAIN,
         turns=3, details=("unfused",)),
)  # fmt: skip


# ------------------------------------------------------------------------------- models


def random_transformer(shape: TransformerShape, device: torch.device) -> Any:
    """A transformer in bf16, but for what diffusers keeps in fp32, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with device:
            model = transformer(shape)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if any(part in name for part in KEEP_FP32):
            parameter.data = parameter.data.float()
        if parameter.ndim == 1 and "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def twin(model: Any) -> Any:
    """Return a second module over the same weights."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Models:
    """One transformer in the forms that ways need; each is made when it is first asked for."""

    def __init__(self, name: str, shape: TransformerShape, device: torch.device) -> None:
        self.name = name
        self.plain = random_transformer(shape, device)
        self._compiled: Any = None
        self._stored: Any = None

    def as_is(self) -> Any:
        """Return the model in bf16."""
        return self.plain

    def compiled(self) -> Any:
        """Return the model with its blocks compiled."""
        if self._compiled is None:
            self._compiled = twin(self.plain)
            self._compiled.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return self._compiled

    def stored(self) -> Any:
        """Return the model with the matrices of its blocks stored in fp8, a scale each, as
        published files do; those of the plain model become what these are when taken apart."""
        if self._stored is not None:
            return self._stored
        self._stored = twin(self.plain)
        for block in self._stored.blocks:
            for name, layer in list(block.named_modules()):
                if isinstance(layer, nn.Linear):
                    new = layer_of_fp8(layer, *rounded_to_fp8(layer.weight.data))
                    layer.weight.data.copy_(new.dequantized(layer.weight.dtype))
                    replace_layer(block, name, new)
        return self._stored


def models_of(bench: Bench, case: Case) -> Models:
    """Return the models of a case: the last ones, if they are the same."""
    shape = VARIANTS[case.model].transformer
    if bench.tiny:
        channels = {"in_channels": shape.in_channels, "out_channels": shape.out_channels}
        shape = replace(TINY_SHAPE, **channels)
    if bench.models is None or bench.models.name != case.model:
        bench.drop_models()
        bench.models = Models(case.model, shape, bench.device)
    found: Models = bench.models
    return found


def inputs_of(model: Any, grid: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """The inputs of one forward; with 48 channels (the 5B) each token of frame 0 has time 0."""
    generator = torch.Generator().manual_seed(1)
    config, (frames, height, width) = model.config, grid

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    time_step = torch.full((1,), 777.7, device=device)
    if config.in_channels == 48:
        frame = height * width // 4
        time_step = torch.full((1, frames * frame), 777.7, device=device)
        time_step[:, :frame] = 0
    return {
        "hidden_states": noise(1, config.in_channels, frames, height, width),
        "timestep": time_step,
        "encoder_hidden_states": noise(1, 512, config.text_dim),
        "return_dict": False,
    }


# ------------------------------------------------------------------------------ forwards


@contextmanager
def lean(model: Any, **options: Any) -> Iterator[None]:
    with lean_forward(model, **options) as refused:
        if refused:
            raise RuntimeError(refused)
        yield


WAYS: dict[str, dict[str, bool]] = {
    "unfused": {"fuse": False},
    "exact": {},
    "rows": {"exact": False},
    "feed-forwards in 8 bit": {"quick": True, "eight_bit": True, "eight_bit_projections": False},
    "fast": {"quick": True, "eight_bit": True},
    "fastest": {"quick": True, "eight_bit": True, "attention_8bit": True},
}
"""What each way of ours asks of the lean forward."""


def calls_of(bench: Bench, case: Case, models: Models) -> dict[str, Callable[[], Tensor]]:
    """Return the ways of a case that this machine has, in order."""
    grid = (3, 4, 6) if bench.tiny else case.grid
    given = inputs_of(models.plain, grid, bench.device)
    eight_bit = any(way.eight_bit for way in attention_kernels().values())

    def run(model: Callable[[], Any], options: dict[str, bool] | None) -> Tensor:
        made = model()
        way: AbstractContextManager[Any] = (
            nullcontext() if options is None else lean(made, **options)
        )
        with torch.no_grad(), way:
            out: Tensor = made(**given)[0]
        return out

    calls: dict[str, Callable[[], Tensor]] = {}
    for name in (*case.ways, *(() if bench.brief else case.details)):
        kind, _, way = name.rpartition(", ")
        if (way == "fastest" and not eight_bit) or (way == "compiled" and not bench.cuda):
            continue
        model = models.stored if kind else models.compiled if way == "compiled" else models.as_is
        calls[name] = partial(run, model, WAYS.get(way))
    return calls


def forwards(bench: Bench, case: Case) -> None:
    """Measure one case; rows go to ``bench.found["forwards"]``."""
    models = models_of(bench, case)
    if any(way.startswith("fp8") for way in case.ways):
        models.stored()  # changes the numbers of the plain one
    calls = calls_of(bench, case, models)
    # What the clock chooses is chosen in the first pass: the trials would be in its split.
    first = [name for name in case.profile if name in (BASE, "exact")]
    found = in_turns(bench, calls, case.turns, profiled=first)
    for name in {*case.profile}.intersection(found).difference(first):
        if bench.cuda:
            found[name]["split"] = split_of(calls[name])[0]
    keep(bench, "forwards", case.title, found)


def parts(bench: Bench) -> dict[str, tuple[float, Callable[[], None]]]:
    """Return what can be measured: seconds it needs, and the work."""
    return {case.name: (case.needs, partial(forwards, bench, case)) for case in CASES}
