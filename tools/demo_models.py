"""The demo model's classes and numbers: the real Wan classes, made small."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from . import clips

TEXT_LENGTH = 32
"""Token positions used in training; every sentence is shorter, so the last is always padding."""
PIPELINE_TEXT_LENGTH = 512
"""Token positions the pipelines attend; those after the sentence are zeros."""
LATENT_SHAPE = (16, 5, 8, 8)
"""Of a window of clips.FRAMES."""
LONG_LATENTS = 13
"""Latent frames of the longer windows the transformers also see: 49 frames."""
NEGATIVE_PROMPTS = (
    "",
    "",
    "",
    "blurry, distorted, low quality",
    "worst quality, blurry, static",
    "\u8272\u8c03\u8273\u4e3d\uff0c\u9759\u6001",
)
"""What a dropped prompt becomes; the empty one most often.

The last begins like Wan's official one: to this vocabulary all such text is one unknown piece.
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz,."
WORDS = (
    *clips.COLOURS,
    *clips.SHAPES,
    *clips.DIRECTIONS,
    *clips.BACKGROUNDS,
    *("a", "moves", "moving", "stays", "staying", "on", "background", "it"),
)
"""Words that are one piece each; any other is spelled."""
VOCABULARY = 80


def build_vae() -> AutoencoderKLWan:
    """Return an untrained VAE with the structure of Wan 2.1's: 16 channels, 4x8x8."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )


class FrameConv(WanCausalConv3d):
    """A 1x3x3 convolution that may run as a 2D one over all frames: the same sums, faster."""

    flat = False

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve (B, C, T, H, W) frame by frame; there is no cache to look at."""
        if not self.flat:
            out: torch.Tensor = super().forward(x)
            return out
        frames = x.transpose(1, 2).flatten(0, 1)
        done = torch.nn.functional.conv2d(frames, self.weight[:, :, 0], self.bias, 1, 1)
        return done.unflatten(0, (len(x), -1)).transpose(1, 2)


def frame_by_frame(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Return the VAE with its 3x3x3 kernels cut down to their newest frame, in place.

    Only the temporal resampling then looks back, a few frames, so that a latent frame deep in a
    long clip is made and read as one near the start is: 17-frame clips are enough to train on.
    `all_taps` gives the kernels their usual shape back.
    """
    for name, layer in list(vae.named_modules()):
        if isinstance(layer, WanCausalConv3d) and layer.kernel_size == (3, 3, 3):
            short = FrameConv(layer.in_channels, layer.out_channels, (1, 3, 3), 1, (0, 1, 1))
            short.weight.data = layer.weight.data[:, :, -1:].clone()
            if short.bias is not None and layer.bias is not None:
                short.bias.data = layer.bias.data.clone()
            parent, _, child = name.rpartition(".")
            setattr(vae.get_submodule(parent), child, short)
    return vae


def all_taps(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a `frame_by_frame` state with zeros for the older frames: it fits `build_vae`."""
    return {
        name: torch.nn.functional.pad(value, (0, 0, 0, 0, 2, 0))
        if value.dim() == 5 and value.shape[2:] == (1, 3, 3)
        else value
        for name, value in state.items()
    }


def build_transformer(in_channels: int = 16) -> WanTransformer3DModel:
    """Return an untrained expert with the structure of Wan 2.2's: 16 channels in, or 36 for I2V."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=in_channels,
        out_channels=16,
        text_dim=96,
        freq_dim=256,
        ffn_dim=256,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
    )


def build_text_encoder() -> UMT5EncoderModel:
    """Return an untrained umT5 encoder of two layers for the demo's vocabulary."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=VOCABULARY,
            d_model=96,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )


def widened(expert: WanTransformer3DModel) -> WanTransformer3DModel:
    """Return an I2V copy of a T2V expert whose new input channels have zero weights."""
    wide = build_transformer(in_channels=36)
    state = expert.state_dict()
    kernel = state["patch_embedding.weight"]
    padded = kernel.new_zeros(kernel.shape[0], 36, *kernel.shape[2:])
    padded[:, :16] = kernel
    wide.load_state_dict({**state, "patch_embedding.weight": padded})
    return wide


def all_sentences() -> list[str]:
    """Return every sentence the model is trained on: each template over the grid, then negatives.

    Row t * 270 + g is template t of grid row g.
    """
    lines = [
        clips.sentence(*cell, template=template)
        for template in clips.TEMPLATES
        for cell in clips.grid()
    ]
    return lines + list(NEGATIVE_PROMPTS)


def build_tokenizer(folder: Path) -> T5TokenizerFast:
    """Train a SentencePiece vocabulary on the sentences; write spiece.model and tokenizer.json."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*filter(str.isascii, NEGATIVE_PROMPTS), *LETTERS] * 2),
        user_defined_symbols=["\u2581" + word for word in WORDS],
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = T5TokenizerFast(
        vocab=vocabulary, extra_ids=0, model_max_length=PIPELINE_TEXT_LENGTH
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_table(tokenizer: T5TokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, each (number of sentences, TEXT_LENGTH), of `all_sentences()`."""
    out = tokenizer(
        all_sentences(), padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    )
    if out.input_ids.shape[1] != TEXT_LENGTH or bool(out.attention_mask[:, -1].any()):
        raise ValueError(f"a sentence has {TEXT_LENGTH} tokens or more; raise TEXT_LENGTH")
    return out.input_ids, out.attention_mask


class PaddingProcessor(WanAttnProcessor):
    """Cross-attention over few positions that equals attention over all 512.

    The pipelines pad text with zeros, so all padded positions have the same key and value; n of
    them weigh as much as one whose score is raised by log n. This computes 32 positions, not 512.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend, with the last text position standing for all the padding that was left out."""
        if encoder_hidden_states is not None:
            length = encoder_hidden_states.shape[1]
            raised = math.log(PIPELINE_TEXT_LENGTH - length + 1)
            position = torch.arange(length, device=hidden_states.device)
            bias = (position == length - 1).to(hidden_states.dtype) * raised
            attention_mask = bias[None, None, None]
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
        )


def embed(text_encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what WanPipeline.encode_prompt gives: the encoder's output, zero at padding."""
    hidden: torch.Tensor = text_encoder(ids, mask).last_hidden_state
    return hidden * mask[..., None].to(hidden.dtype)


def decode_unclamped(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode as AutoencoderKLWan does, without its final clamp, which has no gradient."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    return torch.cat(frames, 2)
