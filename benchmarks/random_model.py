"""A Wan 2.2 model with random weights, written as the diffusers folder a user would have.

Both experts' files are one file under two names (a hard link): they are read, placed and streamed
as two models, but lie on the disk, or in /dev/shm, once. Within the file 64 MiB of noise repeat.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import make_scheduler, make_tokenizer
from support.true_models import autoencoder, transformer

from wan_core.models import VAE_21, VARIANTS, TransformerShape, VaeShape

UMT5_XXL = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64,
    "vocab_size": 256384, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """What is built: the published shapes, unless said otherwise."""

    transformer: TransformerShape = VARIANTS["wan2.2-t2v-a14b"].transformer
    vae: VaeShape = VAE_21
    text: Mapping[str, Any] = field(default_factory=lambda: UMT5_XXL)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of a few words whose size is that of the encoder's embeddings."""
    from stored_model import PIECES, spiece_model

    if vocabulary < PIECES:
        make_tokenizer().save_pretrained(folder)
    else:
        (folder / "spiece.model").write_bytes(spiece_model(PIECES))


def write_model(
    folder: Path,
    shapes: Shapes,
    noise_bytes: int = 64 * 2**20,
    *,
    experts: int = 2,
    texts: bool = True,
) -> int:
    """Write the folder; return the bytes that were written.

    One of ``experts`` is a 5B, which has a timestep for each token. Without ``texts`` the text
    encoder's file is a hole of its size: nothing reads it where embeddings are given.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    noise = torch.randn(noise_bytes // 2, generator=torch.manual_seed(0)).mul_(0.02).bfloat16()
    block = noise.view(torch.uint8)
    alone = experts == 1
    index = {"_class_name": "WanPipeline", "boundary_ratio": None if alone else 0.875}
    index |= {"expand_timesteps": alone}
    classes = {
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    if alone:
        del classes["transformer_2"]
        index |= {"transformer_2": [None, None]}
    for part in classes:
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index | classes))
    write_tokenizer(folder / "tokenizer", shapes.text["vocab_size"])
    make_scheduler().save_pretrained(folder / "scheduler")
    config = UMT5Config(**shapes.text)
    config.architectures = ["UMT5EncoderModel"]
    config.save_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        model, encoder = transformer(shapes.transformer), UMT5EncoderModel(config)
    name = "diffusion_pytorch_model.safetensors"
    total = write_tensors(folder / "transformer" / name, sizes_of(model), block)
    model.save_config(folder / "transformer")
    if not alone:
        model.save_config(folder / "transformer_2")
        os.link(folder / "transformer" / name, folder / "transformer_2" / name)
    tied = "encoder.embed_tokens.weight"  # is shared.weight
    weights = {key: size for key, size in sizes_of(encoder).items() if key != tied}
    encoded = folder / "text_encoder" / "model.safetensors"
    written = write_tensors(encoded, weights, block if texts else None)
    total += written if texts else 0
    torch.manual_seed(0)
    vae = autoencoder(shapes.vae)
    vae.save_pretrained(folder / "vae")  # its own beginning values: noise would decode to nothing
    return total + sum(p.nbytes for p in vae.parameters())


def sizes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def write_tensors(path: Path, sizes: Mapping[str, list[int]], block: torch.Tensor | None) -> int:
    """Write a safetensors file in bf16 whose contents repeat ``block``; return its bytes.

    None writes no contents: a hole, which reads as zeros and takes no room.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, shape in sizes.items():
        end = total + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [total, end]}
        total = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors does, so that tensors are aligned
    first = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(first + total)
    if block is None:
        return first + total
    # Through a mapping, which many threads fill at once.
    file = torch.from_file(str(path), shared=True, size=first + total, dtype=torch.uint8)[first:]
    whole = total // len(block) * len(block)
    file[:whole].view(-1, len(block)).copy_(block)
    file[whole:].copy_(block[: total - whole])
    return first + total
