"""Dtypes: their names, which one a device computes well in, and which parameters stay in fp32.

Wan's time embedder, scale-shift tables and norms stay in fp32, as the classes ask for in
``_keep_in_fp32_modules``. Each of them in bf16 would change the result by 1e-4 to 1e-3 of its
range.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InvalidRequest

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
STORAGE_DTYPES: dict[str, torch.dtype] = {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_ALIASES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
}

# Components that compute in fp32 whatever the transformer's dtype is: they are small, and half
# precision would be visible in the picture.
_FP32_COMPONENTS = frozenset({"vae", "image_encoder"})


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype called ``name`` ("bf16", "fp16", "fp32", or torch's own names).

    Raises InvalidRequest for any other name.
    """
    key = name.lower().removeprefix("torch.")
    try:
        return DTYPES[_ALIASES.get(key, key)]
    except KeyError:
        raise InvalidRequest(
            f"precision is {name!r}; allowed are auto, {', '.join(DTYPES)}.", field="precision"
        ) from None


def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, or torch's own name where there is no short one."""
    for name, known in (*DTYPES.items(), *STORAGE_DTYPES.items()):
        if known == dtype:
            return name
    return str(dtype).removeprefix("torch.")


def resolve_dtype(
    precision: str, device: torch.device | str, stored: torch.dtype | None = None
) -> tuple[torch.dtype, str]:
    """Return the dtype to compute in, and the reason, for ``precision`` "auto" or a dtype's name.

    ``stored`` is the dtype of most of the checkpoint's weights. "auto" means bf16 where the device
    supports it (CUDA compute capability 8.0 and above, ROCm, MPS from macOS 14 on) and fp16 on
    older cards. On a CPU it means fp32, or bf16 if the checkpoint is in half precision.
    """
    if precision.lower() != "auto":
        dtype = dtype_of(precision)
        return dtype, f"{name_of(dtype)} was asked for"
    kind = torch.device(device).type
    if kind == "cpu":
        if stored in (None, torch.float32, torch.float64):
            return torch.float32, "fp32: a CPU, and the weights are not half precision"
        return torch.bfloat16, "bf16: a CPU, and the weights are half precision or less"
    if kind == "cuda":
        return _resolve_cuda(torch.device(device))
    if kind == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return torch.float16, "fp16: bf16 needs macOS 14"
    return torch.bfloat16, f"bf16: the native half precision of {kind}"


def _resolve_cuda(device: torch.device) -> tuple[torch.dtype, str]:
    if torch.version.hip is not None:
        return torch.bfloat16, "bf16: the native half precision of this card"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"bf16: compute capability {major}.{minor} runs it natively"
    return torch.float16, f"fp16: compute capability {major}.{minor} has no bf16 units"


def component_dtype(component: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a component when the transformers compute in ``dtype``.

    The VAE and the image encoder stay in fp32, as in the published pipelines. The text encoder has
    the transformers' dtype, except that it takes bf16 in place of fp16, which umT5 overflows.
    """
    if component in _FP32_COMPONENTS:
        return torch.float32
    if component == "text_encoder" and dtype == torch.float16:
        return torch.bfloat16
    return dtype


def keep_in_fp32(module: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the module names whose parameters stay in fp32 when ``module`` is cast to ``dtype``.

    Follows ``from_pretrained`` of either library. In diffusers ``_keep_in_fp32_modules`` applies to
    bf16 and fp16. In transformers it applies to fp16 only, and
    ``_keep_in_fp32_modules_strict`` to both. Empty when ``dtype`` is fp32.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return ()
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    plain = getattr(module, "_keep_in_fp32_modules", None) or ()
    plain = {plain} if isinstance(plain, str) else set(plain)
    from_diffusers = any(base.__module__.startswith("diffusers.") for base in type(module).__mro__)
    if from_diffusers or dtype == torch.float16:
        kept |= plain
    return tuple(sorted(kept))


def stays_fp32(parameter_name: str, kept: tuple[str, ...]) -> bool:
    """Say whether a parameter (dotted name) belongs to a module named in ``kept``."""
    return not set(kept).isdisjoint(parameter_name.split("."))


def cast_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters of ``module`` to ``dtype`` in place, and return it.

    Like ``from_pretrained(dtype=...)`` and unlike ``module.to(dtype)``, this leaves in fp32 what
    :func:`keep_in_fp32` lists. Non-persistent buffers (rotary tables) keep their dtype.
    """
    kept = keep_in_fp32(module, dtype)

    def wanted(name: str) -> torch.dtype:
        return torch.float32 if stays_fp32(name, kept) else dtype

    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted(name))
    saved = module.state_dict(keep_vars=True).keys()
    for prefix, owner in module.named_modules():
        for local, buffer in owner._buffers.items():
            name = f"{prefix}.{local}" if prefix else local
            if buffer is not None and buffer.is_floating_point() and name in saved:
                owner._buffers[local] = buffer.to(wanted(name))
    return module
