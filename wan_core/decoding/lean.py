"""Attaches the lean decoder or the lean encoder to a VAE and detaches it again.

The forward of that half is replaced on the instance; no class is changed. The replacement acts only
in threads that asked for it, other threads get the forward that was there before. A half that
differs in any way from the one that ``decoding/decoder.py`` or ``decoding/encoder.py`` follows
keeps its own forward, and the caller is told the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..forward import DECODER, ENCODER, Installed, ReplacedForward, unknown_code
from ..kernels import FusedNorms, fused_norms
from ..memory import Strip
from .decoder import DecodeOptions, DecoderWalk
from .decoder_quick import quick_for
from .encoder import EncoderWalk
from .host_cache import HostCache

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def why_not(vae: Any, half: str = "decoder") -> str | None:
    """Return why the lean ``half`` cannot replace this VAE's own, or None if it can.

    ``half`` is "decoder" or "encoder".
    """
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    own = getattr(vae, half, vae)
    table = DECODER if half == "decoder" else ENCODER
    reason = unknown_code(vae, AutoencoderKLWan, own, table)
    if reason is not None:
        return reason
    names = ("Wan", "DupUp", "AvgDown")
    known = {getattr(wan, name) for name in dir(wan) if name.startswith(names)}
    known |= {nn.Conv2d, nn.SiLU, nn.Identity, nn.Dropout, nn.ModuleList, nn.Sequential}
    known |= {nn.ZeroPad2d}
    for name, module in own.named_modules():
        reason = _why_not_module(module, known)
        if reason is not None:
            return f"{half}.{name}: {reason}".replace(f"{half}.:", f"{half}:")
    dtypes = {parameter.dtype for parameter in own.parameters()}
    if len(dtypes) > 1 or not dtypes <= _DTYPES:
        return f"the {half}'s parameters are {', '.join(sorted(map(str, dtypes)))}"
    return None


def _why_not_module(module: nn.Module, known: set[Any]) -> str | None:
    if type(module) not in known:
        return f"it is a {type(module).__name__}"
    if module._compiled_call_impl is not None:
        return "it is compiled"
    # The lean halves read weights without calling their modules, so hooks would not run.
    hooked = any(getattr(module, name, None) for name in ("_hf_hook", "_diffusers_hook"))
    if hooked or module._forward_hooks or module._forward_pre_hooks:
        return "a hook (offload by layers or groups) is attached"
    if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
        return "its weights are quantised"
    return None


def lean_decoder(
    vae: Any,
    *,
    bands: int | None = None,
    cache_on_host: bool | None = None,
    pin_bytes: int = 0,
    quick: bool = False,
    fuse: bool = True,
    strip: Strip | None = None,
) -> AbstractContextManager[str | None]:
    """Decode with less memory in this thread, inside the ``with`` block.

    Yields None, or the reason why the VAE keeps its own forward. Without ``bands`` the result
    equals diffusers' bit for bit; with ``bands`` (a number of bands of rows) rounding may differ.
    With ``fuse`` norms are fused on CUDA where a trial, made once and here, found equal bits.
    ``cache_on_host`` keeps the feature cache in RAM between uses, which changes no bit; None does
    so when there are bands. ``quick`` takes what is faster on a GPU and may round differently (see
    ``decoder_quick``); it does not act on bands. ``pin_bytes`` limits all page-locked memory of the
    process. The lean decoder acts on calls that pass a feature cache, where gradients are off.
    With ``strip`` (see ``memory.strips_of``) only that part of the picture comes out, of a whole
    latent frame: what belongs to it has the same numbers, as far as kernels for the smaller maps
    round alike. Enter the context after weights have been placed. A decode with its cache in RAM
    must end inside the context.
    """
    return _lean_half(vae, "decoder", bands, cache_on_host, pin_bytes, quick, fuse, strip)


def lean_encoder(
    vae: Any,
    *,
    bands: int | None = None,
    cache_on_host: bool | None = None,
    pin_bytes: int = 0,
    quick: bool = False,
    fuse: bool = True,
) -> AbstractContextManager[str | None]:
    """Encode with less memory in this thread, inside the ``with`` block.

    As ``lean_decoder``, with its arguments: equal bits without ``bands`` and ``quick``, rounding
    with them; None, or the reason why the VAE keeps its own forward.
    """
    return _lean_half(vae, "encoder", bands, cache_on_host, pin_bytes, quick, fuse, None)


@contextmanager
def _lean_half(
    vae: Any, name: str, bands: int | None, cache_on_host: bool | None, pin_bytes: int,
    quick: bool, fuse: bool, strip: Strip | None,
) -> Iterator[str | None]:  # fmt: skip
    reason = why_not(vae, name)
    if reason is not None:
        yield reason
        return
    half = getattr(vae, name)
    with _host_cache(bands, cache_on_host, pin_bytes) as host:
        faster = quick_for(half) if quick else None
        norms = _norms(half) if fuse else None
        options = DecodeOptions(max(1, bands or 1), host, faster, strip, norms)
        with _lean(half, options):
            yield None


def _norms(half: Any) -> FusedNorms | None:
    """Return which norms of a half may be fused where its weights are."""
    channels = {module.gamma.numel() for module in half.modules() if hasattr(module, "gamma")}
    return fused_norms(half.conv_in.weight, channels)


@contextmanager
def _host_cache(
    bands: int | None, cache_on_host: bool | None, pin_bytes: int
) -> Iterator[HostCache | None]:
    """Yield where the feature cache rests in RAM, None where it stays on the device."""
    on_host = bands is not None if cache_on_host is None else cache_on_host
    host = HostCache(pin_bytes) if on_host else None
    try:
        yield host
    finally:
        if host is not None:
            host.close()


def _put_on(half: Any, installed: Installed[DecodeOptions]) -> None:
    walk = EncoderWalk if hasattr(half, "down_blocks") else DecoderWalk
    installed.set_forward(half, functools.partial(_forward, half, walk, installed))


_lean = ReplacedForward(_put_on)


def _forward(
    half: Any,
    walk: type[DecoderWalk],
    installed: Installed[DecodeOptions],
    before: Any,
    x: Tensor,
    feat_cache: list[Any] | None = None,
    feat_idx: list[int] | None = None,
    **first: bool,
) -> Tensor:
    """Stand for a half's forward; only a decoder's is told whether a chunk is the ``first``."""
    options = installed.mine()
    index = [0] if feat_idx is None else feat_idx
    if options is None or feat_cache is None:
        result: Tensor = before(x, feat_cache=feat_cache, feat_idx=index, **first)
        return result
    return walk(options, feat_cache, index).through(half, x, **first)
