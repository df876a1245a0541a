"""By which tensors the components of a Wan model are recognised, in each style of names.

The one table of it: detection finds a component and its prefix by it, and the mapping of names
chooses its rules by it, so that what one recognises the other can read. Works on names alone;
standard library only. The names are those of the models' own repositories (see ``names``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

WRAPPER: Final = "_orig_mod."
"""What ``torch.compile`` puts into the names of a compiled module, at its begin or inside."""
APART: Final = (
    "vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.",
    "clip_vision.", "model_ema.", "model_sampling.",
)  # fmt: skip
"""Prefixes under which an all-in-one checkpoint keeps what is not its transformer."""
TOKENIZER: Final = "spiece_model"
"""The tensor in which repackaged text encoders carry their SentencePiece model."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A style of names of one kind of component.

    ``marks`` are tensors that every such component has, names without prefix. Where one of several
    names will do, they are a tuple.
    """

    kind: str
    name: str
    marks: tuple[str | tuple[str, ...], ...]

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Return the marks that are not among ``names``, under whatever prefix."""
        known = set(names)
        absent = [mark for mark in self.marks if known.isdisjoint(_some(mark))]
        return [
            _some(mark)[0]
            for mark in absent
            if not any(_ends(name, one) for one in _some(mark) for name in known)
        ]

    def count(self, names: Iterable[str]) -> int:
        """Return how many of the marks are among ``names``, under whatever prefix."""
        return len(self.marks) - len(self.lacking(names))


LAYOUTS: Final = (
    Layout("transformer", "original", (
        "blocks.0.modulation", "patch_embedding.weight", "head.modulation",
        "time_projection.1.weight", "text_embedding.0.weight",
    )),
    Layout("transformer", "diffusers", (
        "condition_embedder.time_proj.weight", "patch_embedding.weight", "scale_shift_table",
        "condition_embedder.text_embedder.linear_1.weight", "blocks.0.scale_shift_table",
    )),
    Layout("vae", "original", (
        "decoder.middle.0.residual.0.gamma", "encoder.conv1.weight", "conv2.weight",
    )),
    Layout("vae", "diffusers", (
        "decoder.mid_block.resnets.0.norm1.gamma", "encoder.conv_in.weight",
        "post_quant_conv.weight",
    )),
    # umT5 and T5; detection tells them apart.
    Layout("text_encoder", "diffusers", (
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        ("shared.weight", "encoder.embed_tokens.weight"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    )),
    Layout("text_encoder", "original", (
        "blocks.0.attn.q.weight", "token_embedding.weight",
        "blocks.0.pos_embedding.embedding.weight",
    )),
    Layout("text_encoder", "gguf", (
        "enc.blk.0.attn_q.weight", "token_embd.weight", "enc.blk.0.attn_rel_b.weight",
    )),
    Layout("image_encoder", "diffusers", (
        "encoder.layers.0.self_attn.q_proj.weight", "embeddings.class_embedding",
    )),
    # With the prefix "visual." in the official file, which also holds the text side.
    Layout("image_encoder", "original", (
        "transformer.0.attn.to_qkv.weight", "cls_embedding",
    )),
)  # fmt: skip
"""Every layout of every kind. The first mark of each is the name that prefixes are found by."""


def find_layouts(names: Iterable[str]) -> dict[str, tuple[Layout, str]]:
    """Return the components among ``names``: by kind, the layout and the prefix of its names.

    All marks must be there under one prefix. The shortest prefix is taken where several do.
    """
    plain = plain_names(names)
    found: dict[str, tuple[Layout, str]] = {}
    for layout in LAYOUTS:
        for prefix in _prefixes(plain, layout.marks[0]) if layout.kind not in found else ():
            if all(any(prefix + one in plain for one in _some(mark)) for mark in layout.marks):
                found[layout.kind] = layout, prefix
                break
    return found


def likely_layout(kind: str, names: Iterable[str]) -> str:
    """Return the name of the layout that has the most marks among ``names``."""
    found = [layout for layout in LAYOUTS if layout.kind == kind]
    if not found:
        raise ValueError(f"no tensor names are known for {kind!r}")
    known = list(names)
    whole = next((layout for layout in found if not layout.lacking(known)), None)
    return (whole or max(found, key=lambda layout: layout.count(known))).name


def own_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Map the names under ``prefix``, without it, to the names in the file.

    What ``torch.compile`` puts into names is left out of the former. Where the component's names
    have no prefix, those under a prefix of ``APART`` are not its own.
    """
    cut = len(prefix)
    return {
        plain[cut:]: stored
        for plain, stored in plain_names(names).items()
        if plain.startswith(prefix) and (prefix or not plain.startswith(APART))
    }


def plain_names(names: Iterable[str]) -> Mapping[str, str]:
    """Map names without what ``torch.compile`` puts into them to the names in the file.

    At the beginning of a name it stays: there it is a prefix like any other. Blocks of Animate 2
    are named as in every other Wan (see ``nests_blocks``).
    """
    return {
        _plain_block(name[:1] + name[1:].replace(WRAPPER, "") if WRAPPER in name else name): name
        for name in names
    }


_NESTED: Final = re.compile(r"((?:^|\.)blocks\.\d+\.)block\.")
_RENAMED: Final = re.compile(
    r"((?:^|\.)blocks\.\d+\.(?:block\.)?(?:self|cross)_attn\.)"
    r"(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj|norm_added_k)(?=\.)"
)
_ATTENTION: Final = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img",
    "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
}  # fmt: skip


def nests_blocks(name: str) -> bool:
    """Say whether a tensor's name is one that only releases of Animate 2 have.

    The official files nest each block in another (``blocks.N.block.X``); diffusers' class keeps the
    original names, but for the layers of attention.
    """
    if "blocks." not in name:
        return False
    return _NESTED.search(name) is not None or _RENAMED.search(name) is not None


def _plain_block(name: str) -> str:
    if ".block." in name:
        name = _NESTED.sub(r"\1", name)
    if "_attn." in name:
        name = _RENAMED.sub(lambda found: found[1] + _ATTENTION[found[2]], name)
    return name


def tokenizer_tensor(names: Iterable[str]) -> str | None:
    """Return the name of the tensor that holds a SentencePiece model, under whatever prefix."""
    return next((n for n in names if n == TOKENIZER or n.endswith("." + TOKENIZER)), None)


def _prefixes(names: Iterable[str], mark: str | tuple[str, ...]) -> list[str]:
    """Return the prefixes under which a mark occurs, shortest first."""
    found = {n[: -len(one)] for one in _some(mark) for n in names if _ends(n, one)}
    return sorted(found, key=len)


def _ends(name: str, mark: str) -> bool:
    return name.endswith(mark) and (len(name) == len(mark) or name[-len(mark) - 1] == ".")


def _some(mark: str | tuple[str, ...]) -> tuple[str, ...]:
    return (mark,) if isinstance(mark, str) else mark
