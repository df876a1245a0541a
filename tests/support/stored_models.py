"""A small Wan 2.2 T2V-A14B stored as people have it: both experts and umT5, of every kind.

What a file means is written beside it as a bf16 file, by code that is not the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import reference_layouts as layouts
from support import single_files
from support import stored_files as files
from support.tiny_models import make_transformer

Meaning = Callable[[torch.dtype], Tensor]
LAYERS = 2 * 19
"""Layers of both experts that are stored in a kind: all matrices of their blocks but one each."""


def states() -> Iterator[layouts.State]:
    """The two experts' tensors under their official names, in bf16."""
    for seed in (11, 12):
        torch.manual_seed(seed)
        model = make_transformer("wan2.2-t2v-a14b", attention_head_dim=128, ffn_dim=512)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        state = {name: value.to(torch.bfloat16) for name, value in layouts.state_of(model).items()}
        yield layouts.original_transformer(state)


def experts(folder: Path, kind: str) -> tuple[list[Path], list[Path]]:
    """Write both experts as ``kind``, and what those files mean in bf16; once for each kind."""
    stored, meant = [], []
    for role, state in zip(("high_noise", "low_noise"), states(), strict=True):
        end = "gguf" if kind in files.GGUF_KINDS else "safetensors"
        path, plain = folder / f"{role}_{kind}.{end}", folder / f"{role}_{kind}_meant.safetensors"
        stored.append(path)
        meant.append(plain)
        if path.exists():
            continue
        meanings = write_expert(path, state, kind)
        save_file({**state, **{n: m(torch.bfloat16) for n, m in meanings.items()}}, plain)
    return stored, meant


def write_expert(
    path: Path, state: layouts.State, kind: str, style: str = ""
) -> dict[str, Meaning]:
    """Write one expert, and return what its stored matrices mean.

    All matrices of the blocks but one are stored as ``kind``: files mix what is quantised and what
    is not. ``style``: see ``stored_files.pack``.
    """
    chosen = {n for n, v in state.items() if n.startswith("blocks.") and v.ndim == 2}
    chosen = {n for n in chosen if n.endswith(".weight")} - {"blocks.1.cross_attn.v.weight"}
    if path.suffix == ".gguf":
        meanings = write_gguf(path, state, chosen, kind)
    else:
        style = style or ("old" if kind == "fp8_scaled_e5m2" else "notes")
        meanings = write_safetensors(path, state, chosen, kind, style)
    assert set(meanings) == chosen
    return meanings


def write_safetensors(
    path: Path, state: layouts.State, chosen: set[str], kind: str, style: str
) -> dict[str, Meaning]:
    tensors, metadata, meanings = files.pack(state, chosen, kind, style)
    files.write(path, tensors, metadata)
    return meanings


def write_gguf(path: Path, state: layouts.State, chosen: set[str], kind: str) -> dict[str, Meaning]:
    writer = gguf.GGUFWriter(path, "wan")
    meanings: dict[str, Meaning] = {}
    for index, (name, value) in enumerate(state.items()):
        if name in chosen:
            data = files.gguf_blocks(value, kind, seed=index)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            meanings[name] = lambda dtype, data=data: files.gguf_meaning(data, kind, dtype)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meanings


def encoder(home: Path, kind: str, style: str = "notes") -> tuple[Path, Path]:
    """The small umT5 as ``kind``, with its tokenizer, and what that means in bf16."""
    path = home / f"umt5_{kind}_{style}.safetensors"
    meant = home / f"umt5_{kind}_{style}_meant.safetensors"
    if not path.exists():
        state = {
            name: value.to(torch.bfloat16) if value.is_floating_point() else value
            for name, value in load_file(home / "text_encoders" / single_files.TEXT).items()
        }
        assert "spiece_model" in state
        chosen = {n for n, v in state.items() if v.ndim == 2 and n.endswith(".weight")}
        chosen = {n for n in chosen if "relative_attention_bias" not in n and n != "shared.weight"}
        tensors, metadata, meanings = files.pack(state, chosen, kind, style)
        files.write(path, tensors, metadata)
        save_file({**state, **{n: m(torch.bfloat16) for n, m in meanings.items()}}, meant)
    return path, meant
