"""What the factors of LoKr and LoHa hold beside a layer: counted in a dry run, as it is planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import wan_layouts as layouts
from support.dry_run import LiveBytes
from support.machines import architecture
from support.true_models import dry_transformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_core.detect import with_loras
from wan_core.forward import lean_forward
from wan_core.loading import Undo
from wan_core.loras.attach import attach
from wan_core.loras.delta import Delta, Hadamard, Kronecker, Term

LAYERS = {"ffn.0": (13824, 5120), "ffn.2": (5120, 13824), "self_attn.q": (5120, 5120)}
FACTORS = {"lokr": ((8, 8), 0), "lokr of many pieces": ((128, 64), 0), "lokr w2": ((4, 4), 512),
           "loha": ((1, 1), 32), "loha of a high rank": ((1, 1), 256)}  # fmt: skip


def shapes(kind: str, layer: str) -> dict[str, tuple[int, int]]:
    """The shapes of the factors by the names in a file."""
    (out, wide), ((rows, columns), rank) = LAYERS[layer], FACTORS[kind]
    if "loha" in kind:
        halves = {"a": (out, rank), "b": (rank, wide)}
        return {f"hada_w{n}_{half}": size for n in (1, 2) for half, size in halves.items()}
    w2 = (out // rows, wide // columns)
    second = {"lokr_w2_a": (w2[0], rank), "lokr_w2_b": (rank, w2[1])} if rank else {"lokr_w2": w2}
    return {"lokr_w1": (rows, columns), **second}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", FACTORS)
def test_what_factors_hold_is_planned(tmp_path: Path, kind: str, layer: str) -> None:
    (out, wide), path = LAYERS[layer], tmp_path / "l.safetensors"
    stem = f"diffusion_model.blocks.3.{layer}."
    header = {stem + name: ("BF16", size) for name, size in shapes(kind, layer).items()}
    layouts.write_sparse(path, layouts.Stored(header))
    model = with_loras(architecture("wan2.1-t2v-14b"), [path])
    for tokens in (300, 32760):
        with FakeTensorMode(), torch.no_grad():
            made = [torch.empty(size, dtype=torch.bfloat16) for _, size in header.values()]
            term: Term = Kronecker(made[0], made[1:])
            if "loha" in kind:
                term = Hadamard(made[:2], made[2:])
            given, output = (torch.empty(tokens, n, dtype=torch.bfloat16) for n in (wide, out))
            counted = LiveBytes()
            for tensor in (*made, given, output):
                counted.know(tensor)
            with counted:
                term(output, given)
        planned = model.lora_room("transformer", tokens, 2)
        assert counted.peak <= planned + 2**20
        assert planned <= 1.15 * counted.peak + 2**20


@pytest.mark.parametrize("kind", ["tables", "norms"])
def test_changed_norms_and_tables_do_not_raise_the_peak_of_a_forward(kind: str) -> None:
    """Attention decides it; what they hold in float32 is less, and is there at other times."""
    shape, dtype = architecture("wan2.1-t2v-14b").transformer, torch.bfloat16

    def peak(deltas: dict[str, tuple[int, ...]]) -> int:
        def run(model: nn.Module) -> None:
            with lean_forward(model) as refused, Undo() as undo:
                assert refused is None
                for target, size in deltas.items():
                    change = Delta(torch.float32, weight=torch.empty(size))
                    attach(undo, model, target, [change])
                given = torch.empty(1, 16, 21, 60, 104, dtype=dtype)
                text = torch.empty(1, 512, shape.text_dim, dtype=dtype)
                model(given, torch.empty(1), text, return_dict=False)

        return dry_transformer(shape, "bf16", 1).peak(run)

    norms = [f"blocks.0.attn{n}.norm_{what}" for n in (1, 2) for what in "qk"]
    changes = {
        "tables": {"scale_shift_table": (1, 2, shape.dim)},
        "norms": dict.fromkeys([*norms, "blocks.0.norm2"], (shape.dim,)),
    }
    assert peak(changes[kind]) <= peak({}) + 2**20
