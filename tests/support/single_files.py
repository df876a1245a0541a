"""A small Wan 2.2 T2V-A14B, once as a diffusers folder and once as the single files people have."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support import reference_layouts as layouts
from support import tiny_models

FAMILY = "wan2.2-t2v-a14b"
HIGH = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
LOW = "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"
TEXT = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "wan_2.1_vae.safetensors"
# Heads are not in the shapes of a single file: 128 wide, as in every published model.
TRANSFORMER = {"attention_head_dim": 128, "ffn_dim": 320}
VAE_NUMBERS = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}


def spiece_model() -> bytes:
    """Train a SentencePiece model with umT5's special pieces."""
    import sentencepiece

    generator, out = random.Random(0), io.BytesIO()
    lines = [" ".join(generator.choices(tiny_models.WORDS, k=8)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=120, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2,
        normalization_rule_name="nmt_nfkc", hard_vocab_limit=False,
    )  # fmt: skip
    return out.getvalue()


def components(spiece: bytes) -> dict[str, Any]:
    """Return the modules of the small A14B, with the tokenizer of ``spiece``."""
    from transformers import UMT5Config, UMT5EncoderModel

    from wan_core.loading.tokenizer import build_tokenizer

    parts = tiny_models.components(FAMILY, seed=7, transformer=TRANSFORMER, vae=VAE_NUMBERS)
    parts["tokenizer"] = build_tokenizer(spiece, "spiece.model")
    state = torch.get_rng_state()
    torch.manual_seed(8)
    try:
        parts["text_encoder"] = UMT5EncoderModel(
            UMT5Config(
                d_model=tiny_models.TEXT_DIM, d_ff=64, num_layers=2, num_heads=4, d_kv=8,
                vocab_size=len(parts["tokenizer"]), feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        ).eval()  # fmt: skip
    finally:
        torch.set_rng_state(state)
    return parts


def write(models: Path) -> None:
    """Put both forms below ``models``: diffusers/tiny-a14b, and files in ComfyUI's folders."""
    spiece = spiece_model()
    parts = components(spiece)
    tiny_models.make_folder(models / "diffusers" / "tiny-a14b", FAMILY, parts=parts)
    for name, part in ((HIGH, "transformer"), (LOW, "transformer_2")):
        stored = layouts.original_transformer(layouts.state_of(parts[part]))
        _save(models / "diffusion_models" / name, stored)
    text = layouts.state_of(parts["text_encoder"])
    text["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    _save(models / "text_encoders" / TEXT, text)
    vae = layouts.original_vae(layouts.state_of(parts["vae"]), VAE_NUMBERS["num_res_blocks"])
    _save(models / "vae" / VAE, vae)


def _save(path: Path, state: layouts.State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
