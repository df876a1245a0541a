"""How LoRA files name their tensors: endings, kinds of adapters, prefixes, and foreign parts.

The one table of it. Detection asks it whether a file is a LoRA, the reader what each of its tensors
does, and both ask it which names in a whole model are only left over from a LoRA. Works on names
alone; standard library only.

Sources: ``comfy/weight_adapter``, ``comfy/lora.py``; PEFT ``tuners``; LyCORIS; musubi-tuner,
ai-toolkit, DiffSynth-Studio, VideoX-Fun.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from .variants import TransformerShape

ENDINGS: Final = {
    "down": (
        r"\.lora_(?:A|down)(?:\.[^.]+)?\.weight", r"[._]lora\.down\.weight",
        r"\.lora_linear_layer\.down\.weight", r"\.lora_(?:A|down)",
    ),
    "up": (
        r"\.lora_(?:B|up)(?:\.[^.]+)?\.weight", r"[._]lora\.up\.weight",
        r"\.lora_linear_layer\.up\.weight", r"\.lora_(?:B|up)",
    ),
    "up_bias": (r"\.lora_(?:B|up)(?:\.[^.]+)?\.bias",),
    "alpha": (r"\.alpha",),
    "diff": (r"\.diff", r"\.w_norm", r"\.diff_m"),
    "diff_bias": (r"\.diff_b", r"\.b_norm"),
    **{
        role: (rf"\.{role}(?:\.default(?:_\d+)?)?",)
        for role in (
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
        )
    },
    "dora_scale": (r"\.dora_scale",),
    "lora_magnitude_vector": (r"\.lora_magnitude_vector(?:\.[^.]+?)?(?:\.weight)?",),
}  # fmt: skip
"""What a tensor does, and the endings of its name (regular expressions). Between ``lora_A`` and
``weight`` stands the name of the adapter: ``default``, ``default_0``, whatever PEFT was given."""
ADAPTERS: Final = {
    "DoRA by 'magnitude'": r"\.magnitude",
    "LoKr with a Tucker core": r"\.lokr_t\w+",
    "LoHa with a Tucker core": r"\.hada_t\w+",
    "BOFT": r"\.boft_\w+(?:\..+)?",
    "OFT or BOFT": r"\.oft_\w+(?:\..+)?",
    "GLoRA": r"\.(?:[ab][12]|bm)\.weight",
    "GLoRA of PEFT": r"\.glora_[A-E](?:\..+)?",
    "LoCon with a middle matrix": r"\.lora_mid\.weight",
    "weights to be replaced": r"\.(?:set_weight|reshape_weight)",
    "IA3": r"\.ia3_l(?:\..+)?|\.on_input",
    "VeRA": r"\.p?vera_lambda_[bd](?:\..+)?",
    "AdaLoRA": r"\.(?:lora_E|ranknum)(?:\..+)?",
    "T-LoRA": r"\.(?:lambda_layer|[qp]_layer\.weight)",
    "RandLoRA": r"\.randlora_\w+(?:\..+)?",
    "VB-LoRA": r"\.vblora_\w+(?:\..+)?",
    "DeLoRA": r"\.delora_\w+(?:\..+)?",
    "GraLoRA": r"\.gralora_\w+(?:\..+)?",
    "HiRA": r"\.hira_\w+(?:\..+)?",
    "RoAd": r"\.road_(?:theta|alpha)(?:\..+)?",
    "C3A": r"\.c3a_kernel(?:\..+)?",
    "SHiRA": r"\.shira_weight(?:\..+)?",
    "WaveFT": r"\.waveft_spectrum(?:\..+)?",
    "embedding LoRA": r"\.lora_embedding_[AB](?:\..+)?",
    "FourierFT": r"\.fourierft_spectrum(?:\..+)?",
    "Bone": r"\.(?:bone|miss)_block(?:\..+)?",
    "HRA": r"\.hra_u(?:\..+)?",
    "Stand-In": r"\.(?:[qkv]_loras|add_[qkv]_lora)\.(?:down|up)\.weight",
}
"""Kinds of adapters that are no plain LoRA, and the endings of their tensors' names."""
NEEDS: Final = {
    "DoRA by 'magnitude'": "some trainers divide by the norm of the model's weight, others by that "
    "of the changed one, and the name does not say which; dora_scale and lora_magnitude_vector do",
    "Stand-In": "its matrices change only the tokens of a picture of a face, which its own code "
    "puts beside those of the clip: it needs that picture and an attention of its own",
}
"""What an adapter would need besides its tensors, for kinds of which a user cannot guess it."""
PREFIXES: Final = (
    "base_model.model", "model.diffusion_model", "diffusion_model", "transformer", "model", "unet",
    "pipe", "dit", "module", "net", "lora_unet", "lora_transformer", "lycoris",
)  # fmt: skip
"""What trainers write before a module's name, in any combination and with dots or underscores."""
SEPARATORS: Final = (".", "_", "__", "$$")
"""What trainers write between the parts of a module's name; one file may mix them."""

_ROLES: Final = tuple(
    (role, re.compile("(.+?)(?:" + "|".join(endings) + ")")) for role, endings in ENDINGS.items()
)
_ADAPTERS: Final = tuple((kind, re.compile(f"(.+?)(?:{end})")) for kind, end in ADAPTERS.items())
# Any ending at all: most names have none, and then nothing else is tried.
_ANY: Final = re.compile(
    "(?:" + "|".join((*ADAPTERS.values(), *(e for some in ENDINGS.values() for e in some))) + r")\Z"
)
_PREFIXES: Final = tuple(re.sub(r"[._]+", "_", prefix) + "_" for prefix in PREFIXES)
# Projections whose input width is the model's width, as every style of Wan LoRA names them.
_WAN_LINEAR: Final = re.compile(
    r"blocks_\d+_(?:self_attn_[qkvo]|cross_attn_[qo]|attn1_to_[qkv]|attn2_to_q|ffn_0|ffn_net_0_proj)"
)
_OTHER_BLOCKS: Final = re.compile(r"(?<![^.])transformer_blocks(?=\.)")
# Endings that other models have too; only before a module of Wan do they mean a LoRA.
_WEAK: Final = frozenset({"alpha", "GLoRA", "T-LoRA", "DoRA by 'magnitude'"})
_BOTH_EXPERTS: Final = re.compile(r"(?:^|_)transformer_[12]_")
_TEXT_ENCODER: Final = re.compile(
    r"(?:base_model_model_)?(?:lora_te\d?|text_encoders?(?:_\d)?|te\d?|lora_clip|clip_[lg]|u?m?t5xxl)_"
)
_IMAGE_BRANCH: Final = re.compile(
    r"(?:^|_)(?:k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_[kq]"
    r"|image_embedder)(?:_|$)"
)
_VACE: Final = re.compile(r"(?:^|_)vace_(?:blocks|patch_embedding)(?:_|$)")
# Parts of models that read sound. None of them is run, so a patch of one is always foreign.
_SOUND: Final = re.compile(
    r"(?:^|_)(?:audio_proj|audio_cross_attn(?:_wrapper)?|norm1_audio|audio_injector"
    r"|casual_audio_encoder|cond_encoder|trainable_cond_mask|frame_packer|norm_x"
    r"|cross_attn_processor)(?:_|$)"
)
_CAMERA: Final = re.compile(r"(?:^|_)(?:control_adapter|cam_encoder)(?:_|$)")
_REFERENCE: Final = re.compile(r"(?:^|_)ref_conv(?:_|$)")
_FACES: Final = re.compile(
    r"(?:^|_)(?:face_adapter|face_encoder|motion_encoder|pose_patch_embedding)(?:_|$)"
)
_POSITIONS: Final = re.compile(r"(?:^|_)(?:img_emb_emb_pos|image_embedder_pos_embed)$")


@dataclass(frozen=True, slots=True)
class LoraKey:
    """A tensor's name taken apart."""

    stem: str
    """What it patches, as the file writes it."""
    role: str
    """A key of ``ENDINGS``; empty for another kind of adapter."""
    adapter: str = ""
    """The kind of adapter it belongs to, a key of ``ADAPTERS``; empty for one that is applied."""

    @property
    def marks(self) -> bool:
        """Whether the name alone says that its file is an adapter."""
        weak = (self.adapter or self.role) in _WEAK
        return not weak or is_wan_linear(self.stem)


def read_lora_key(name: str) -> LoraKey | None:
    """Take a tensor's name apart; None for a name that no kind of adapter has."""
    if _ANY.search(name) is None:
        return None
    for kind, pattern in _ADAPTERS:
        found = pattern.fullmatch(name)
        if found:
            return LoraKey(found[1], "", kind)
    for role, pattern in _ROLES:
        found = pattern.fullmatch(name)
        if found:
            return LoraKey(found[1], role)
    return None


def is_lora(names: Iterable[str]) -> bool:
    """Whether any of a file's tensor names is that of an adapter."""
    return any(key is not None and key.marks for key in map(read_lora_key, names))


def flat_stem(stem: str) -> str:
    """Return a module's name with single underscores between its parts, however it is written."""
    # Other models have "transformer_blocks": one word, not Wan's blocks with a prefix before them.
    stem = _OTHER_BLOCKS.sub("transformerblocks", stem.replace("_orig_mod.", ""))
    return re.sub(r"[._$]+", "_", stem).strip("_")


def spellings(stem: str) -> Iterator[str]:
    """Yield a module's name, flat, and again after each prefix that is taken off it."""
    bare = flat_stem(stem)
    while bare:
        yield bare
        prefix = next((prefix for prefix in _PREFIXES if bare.startswith(prefix)), None)
        if prefix is None:
            return
        bare = bare[len(prefix) :]


def is_wan_linear(stem: str) -> bool:
    """Whether a stem names a projection whose input is as wide as a Wan transformer."""
    return any(_WAN_LINEAR.fullmatch(bare) for bare in spellings(stem))


def foreign_part(stem: str, shape: TransformerShape) -> str | None:
    """Say what a stem belongs to that a transformer of this shape does not have, or None.

    Such tensors are left out and the rest of the LoRA is used: they are patches of a part that is
    not there, not a sign of another model.
    """
    flat = flat_stem(stem)
    if _TEXT_ENCODER.match(flat):
        return "a text encoder, which WanFit does not patch"
    if shape.image_dim is None and _IMAGE_BRANCH.search(flat):
        return "the CLIP image branch, which this model does not have"
    if not shape.vace_layers and _VACE.search(flat):
        return "VACE's own blocks, which this model does not have"
    if shape.animate is None and _FACES.search(flat):
        return "Animate's faces and poses, which this model does not read"
    if _SOUND.search(flat):
        return "a model that reads sound (HuMo, S2V, MultiTalk …), which this one does not"
    if shape.camera_channels is None and _CAMERA.search(flat):
        return "a model that reads a camera, which this one does not"
    if shape.reference_channels is None and _REFERENCE.search(flat):
        return "the layer for a reference picture, which this model does not have"
    if shape.pos_embed_seq_len is None and _POSITIONS.search(flat):
        return "the learned positions of a first-and-last-frame model, which this model is not"
    return None


def names_both_experts(stems: Iterable[str]) -> bool:
    """Whether stems tell two experts apart (``transformer_1.``, ``transformer_2.``)."""
    return any(_BOTH_EXPERTS.search(flat_stem(stem)) for stem in stems)
