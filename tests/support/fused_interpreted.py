"""Run the Triton kernels in Triton's interpreter beside eager code; a program of its own.

Triton decides at its import whether it compiles or interprets (TRITON_INTERPRET=1), so a test
starts this with ``python -m support.fused_interpreted``. Sums are taken in another order here than
on a card, and the interpreter cuts bfloat16 off where a card rounds: float32 and float16 are
compared closely, bfloat16 within two of its units.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support import fused_eager
from wan_core.kernels import attention_kernels, fused_kernels, map_kernels

BOUNDS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}


def compare(dtype: torch.dtype, times: int = 1, **numbers: Tensor) -> None:
    for name in ("ours", "theirs"):
        assert bool(torch.isfinite(numbers[name].float()).all()), name
    far = (numbers["ours"].float() - numbers["theirs"].float()).abs()
    bound = times * BOUNDS[dtype]
    assert bool((far <= bound * (1 + numbers["theirs"].float().abs())).all()), far.max()


def norms(dtype: torch.dtype, dim: int, generator: torch.Generator) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Spans of longer tensors: neither begins nor batches are where a whole tensor has them.
    whole, changes = random(2, 5, dim).to(dtype), random(2, 7, dim).to(dtype)
    parts, per_token, table = random(2, 1, 6, dim), random(2, 3, 6, dim), random(6, dim)
    affine = random(dim), random(dim)
    alike: list[Any] = [(parts[:, :, i], None) for i in range(3)]
    each: list[Any] = [(per_token[:, :, i], table[i]) for i in range(3)]
    for kwargs in (
        {"scale": alike[1], "shift": alike[0]},
        {"gate": alike[2], "affine": affine},
        {"scale": each[1], "shift": each[0], "gate": each[2]},
        {"scale": each[1], "shift": each[0], "add": True},
    ):
        adds = kwargs.pop("add", None) is not None or "gate" in kwargs
        results = []
        for code in (fused_kernels, fused_eager):
            hidden, change = whole.clone(), changes.clone()
            rows, more = hidden[:, 1:4], change[:, 2:5]
            code.norm_rows(rows, more, 1e-6, change=more if adds else None, **kwargs)
            results.append((hidden, change))
        for ours, theirs in zip(*results, strict=True):
            compare(dtype, ours=ours, theirs=theirs)
        coded = []
        for code in (fused_kernels, fused_eager):
            hidden, codes = whole.clone(), torch.zeros(2, 6, dim, dtype=torch.int8)
            scales = torch.zeros(2, 6)
            code.norm_codes(
                hidden[:, 1:4], codes[:, 2:5], scales[:, 2:5], 1e-6,
                change=changes[:, 2:5] if adds else None, **kwargs,
            )  # fmt: skip
            coded.append((hidden, scales, codes))
        for ours, theirs in zip(*(pair[:2] for pair in coded), strict=True):
            compare(dtype, ours=ours, theirs=theirs)
        # Where the norm's last bit differs, a number may fall on the other side of a half.
        far = (coded[0][2].int() - coded[1][2].int()).abs()
        often = 0.06 if dtype == torch.bfloat16 else 0.002
        assert int(far.max()) <= 1 and float(far.float().mean()) < often
    results = []
    for code in (fused_kernels, fused_eager):
        hidden = whole.clone()
        code.add_rows(hidden[:, 1:4], changes[:, 2:5], each[2])
        results.append((hidden,))
    compare(dtype, ours=results[0][0], theirs=results[1][0])


def rotations(dtype: torch.dtype, dim: int, heads: int, generator: torch.Generator) -> None:
    whole = torch.randn(2, 5, dim, generator=generator).to(dtype)
    weight = torch.randn(dim, generator=generator).to(dtype)
    angles = torch.rand(1, 3, 1, dim // heads, generator=generator) * 7
    for rotary in (None, (angles.cos(), angles.sin())):
        results = []
        for code in (fused_kernels, fused_eager):
            states = whole.clone()
            code.rotate_rows(states[:, 1:4], weight, 1e-6, rotary, heads)
            results.append(states)
        compare(dtype, ours=results[0], theirs=results[1])


def quantizing(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Whole numbers: a cast to fp8 is the card's own, which no interpreter shows."""
    x = torch.randn(3, 48, generator=generator).to(dtype)[:, 4:44]  # of wider rows
    for gelu in (False, True):
        (ours, scales), (theirs, expected) = (
            code.quantize_rows(x, torch.int8, gelu) for code in (fused_kernels, fused_eager)
        )
        compare(dtype, ours=scales, theirs=expected)
        # The GELU's last bit may fall on the other side of a half.
        assert int((ours.int() - theirs.int()).abs().max()) <= (1 if gelu else 0)
    sums = torch.randint(-9999, 9999, (3, 40), generator=generator, dtype=torch.int32)
    each, bias = torch.rand(40, generator=generator), torch.randn(40, generator=generator)
    for given in (bias.to(dtype), None):
        results = []
        for code in (fused_kernels, fused_eager):
            out = torch.full((3, 40), float("nan"), dtype=dtype)
            code.scale_rows(sums, scales / 100, each, given, out)
            results.append(out)
        compare(dtype, ours=results[0], theirs=results[1])


def activations(dtype: torch.dtype, generator: torch.Generator) -> None:
    source = torch.randn(2, 6, 3, 4, 5, generator=generator).to(dtype)
    source = source.contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.randn(6, generator=generator).to(dtype)
    results = []
    for code in (fused_kernels, fused_eager):
        padded = torch.zeros(2, 6, 5, 6, 7).to(dtype, memory_format=torch.channels_last_3d)
        code.norm_silu(source, padded[:, :, 2:, 1:5, 1:6], gamma, 6**0.5)
        results.append(padded)
    compare(dtype, ours=results[0], theirs=results[1])


def attention(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Blocks that are whole and one that is not; keys and values far from 0, as Wan's are."""
    for halves, bound in ((True, 3e-2), (False, 0.12)):
        for batch, tokens, keys in ((1, 70, 140), (2, 3, 27)):
            query, key, value = (
                torch.randn(batch, n, 2, 64, generator=generator) for n in (tokens, keys, keys)
            )
            states = [query * 2, key + 5 * torch.randn(1, 1, 2, 64, generator=generator), value + 1]
            heads = [x.to(dtype).transpose(1, 2) for x in states]
            expected = F.scaled_dot_product_attention(*(x.float() for x in heads))
            found = attention_kernels.attend_8bit(*heads, halves=halves).float()
            assert found.transpose(1, 2).is_contiguous()
            error = float((found - expected).norm() / (expected - expected.mean(2, True)).norm())
            assert error < bound, (dtype, halves, tokens, keys, error)
        # Keys that are all alike and queries of nothing: every value counts as much.
        query, key = torch.zeros(1, 2, 5, 64), torch.ones(1, 2, 27, 64)
        heads = [x.to(dtype) for x in (query, key, heads[2][:1])]
        found = attention_kernels.attend_8bit(*heads, halves=halves).float()
        assert bool((found - heads[2].float().mean(2, True)).abs().max() < 0.1), (dtype, halves)


def maps(dtype: torch.dtype, generator: torch.Generator) -> None:
    """More channels and pixels than a program takes; into a frame of zeros, and in place."""
    wide = torch.randn(1, 11, 2, 23, 47, generator=generator).to(dtype)
    wide[0, :, 1, 3, 4] = 0
    wide[0, 2, 0, 4, 5] = float("nan")
    gamma = torch.randn(11, 1, 1, 1, generator=generator).to(dtype)
    other = torch.randn(2, 3, 9, 2, 5, generator=generator).to(dtype).transpose(1, 2)
    last = wide[..., :7, :5].contiguous(memory_format=torch.channels_last_3d)
    for source in (wide, other, last, wide[:, :, :, 3:9]):
        lengths = source.float().norm(dim=1, keepdim=True)
        results = []
        for code in (map_kernels, fused_eager):
            padded = F.pad(torch.zeros_like(source), (1, 1, 1, 1, 2, 0))
            inside = padded[:, :, 2:, 1:-1, 1:-1]
            weight = gamma[: source.shape[1]]
            code.scaled_silu(source, lengths, weight, 3.3, 1e-12, inside)
            assert torch.equal(inside.isnan().all(1), lengths.isnan().squeeze(1))
            results.append(padded)
        assert torch.equal(results[0].isnan(), results[1].isnan())
        # Rounded four times, where the interpreter cuts off.
        compare(dtype, 4, ours=results[0].nan_to_num(), theirs=results[1].nan_to_num())
    copy = source.clone()
    map_kernels.scaled_silu(copy, lengths, gamma, 3.3, 1e-12, copy)
    assert torch.equal(copy.nan_to_num(), results[0][:, :, 2:, 1:-1, 1:-1].nan_to_num())


def shortcuts(dtype: torch.dtype, generator: torch.Generator) -> None:
    """More channels and pixels than a program takes, in each layout; the first chunk and others."""
    first, last = torch.contiguous_format, torch.channels_last_3d
    for channels, wide, times, width, skipped, layout in (
        (6, 6, 2, 30, 1, first), (6, 3, 1, 5, 0, first), (2, 70, 2, 3, 0, last),
        (6, 3, 1, 5, 0, last),
    ):  # fmt: skip
        x = torch.randn(1, channels, 2, 3, width, generator=generator).to(dtype)
        size = (1, wide, 2 * times - skipped, 6, 2 * width)
        y = torch.randn(*size, generator=generator).to(dtype)
        results = []
        for code in (map_kernels, fused_eager):
            out, source = (part.contiguous(memory_format=layout).clone() for part in (y, x))
            code.duplicated(out, source, wide * times * 4 // channels, times, 2, skipped)
            results.append(out)
        compare(dtype, ours=results[0], theirs=results[1])


def far(count: int, *shape: int, strides: tuple[int, ...]) -> Tensor:
    """Return numbers in float16 that lie over so many, in a file of holes."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"{folder}/numbers"
        memory = torch.from_file(name, shared=True, size=count, dtype=torch.float16)
    return memory.as_strided(shape, strides)


def far_apart(generator: torch.Generator) -> None:
    """More than 2**31 numbers between the first and the last: no offset may be an int32."""
    step = 2**30 + 64
    kinds: dict[str, Any] = {"dtype": torch.float16}
    x = torch.randn(1, 3, 1, 2, 3, generator=generator).to(**kinds)
    y = torch.randn(1, 3, 1, 4, 6, generator=generator).to(**kinds)
    for layout in ((1, step, 0, 6, 1), (1, step, 0, 1, 4)):
        spread = far(3 * step, *y.shape, strides=layout).copy_(y)
        map_kernels.duplicated(spread, x, 4, 1, 2, 0)
        plain = y.clone()
        fused_eager.duplicated(plain, x, 4, 1, 2, 0)
        compare(torch.float16, ours=spread, theirs=plain)
    source, gamma = torch.randn(1, 3, 1, 3, 3, generator=generator).to(**kinds), x[0, :, 0, 0, 0]
    expected, lengths = torch.empty_like(source), source.float().norm(dim=1, keepdim=True)
    weight = gamma.view(3, 1, 1, 1).contiguous()
    fused_eager.scaled_silu(source, lengths, weight, 3.3, 1e-12, expected)
    for layout in ((1, step, 0, 3, 1), (1, 1, 0, step, 4), (1, 1, 0, 16, step)):
        spread = far(3 * step, *source.shape, strides=layout).copy_(source)
        map_kernels.scaled_silu(spread, lengths, weight, 3.3, 1e-12, spread)
        compare(torch.float16, 4, ours=spread, theirs=expected)
        if layout[1] == 1:
            spread.copy_(source)
            fused_kernels.norm_silu(spread, spread, gamma.contiguous(), 3.3)
            compare(torch.float16, 4, ours=spread, theirs=expected)
    rows = torch.randn(3, 512, generator=generator).to(**kinds)
    tokens = far(3 * step, 3, 1, 512, strides=(step // 512 * 512, 512, 1)).copy_(rows[:, None])
    results = [tokens, rows[:, None].clone()]
    for code, states in zip((fused_kernels, fused_eager), results, strict=True):
        code.rotate_rows(states, rows[0].contiguous(), 1e-6, None, 4)
        code.norm_rows(states, states, 1e-6, scale=(rows[:1, None].float(), None),
                       shift=(rows[1:2, None].float(), None))  # fmt: skip
    compare(torch.float16, 4, ours=results[0], theirs=results[1])
    heads = torch.randn(3, 40, 64, generator=generator).to(**kinds)
    keys = far(3 * step, 1, 3, 40, 64, strides=(1, step, 64, 1)).copy_(heads[None])
    found = attention_kernels.attend_8bit(keys, keys, keys, halves=True).float()
    expected = F.scaled_dot_product_attention(*3 * [heads[None].float()])
    assert float((found - expected).norm() / expected.norm()) < 5e-2


def main() -> None:
    generator, kinds = torch.Generator().manual_seed(0), 0
    for dtype, dim, heads in (
        (torch.float32, 512, 4), (torch.float16, 1024, 8), (torch.bfloat16, 512, 4),
    ):  # fmt: skip
        norms(dtype, dim, generator)
        rotations(dtype, dim, heads, generator)
        quantizing(dtype, generator)
        activations(dtype, generator)
        maps(dtype, generator)
        shortcuts(dtype, generator)
        if dtype != torch.float32:
            attention(dtype, torch.Generator().manual_seed(0))
        kinds += 1
    far_apart(generator)
    sys.stdout.write(f"{kinds} kinds agree\n")


if __name__ == "__main__":
    main()
