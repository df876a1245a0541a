"""On a GPU: fused kernels give torch's bits, whole forwards too, whatever the length."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from support.lean_models import inputs_of, model_of
from support.stored_layers import stored

from wan_core.forward import lean_forward
from wan_core.kernels import attention_ways, fused
from wan_core.kernels.codes import norms_to_codes
from wan_core.kernels.fused import Fused
from wan_core.kernels.fused_trial import fused_for
from wan_core.kernels.products import Shared, product_for
from wan_core.memory.forward_lean import CODED_SHARE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

WIDTHS = [(5120, 40), (3072, 24), (1536, 12)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "heads"), WIDTHS)
def test_torch_s_bits(dim: int, heads: int, dtype: torch.dtype, per_token: bool) -> None:
    with torch.no_grad():
        hidden = torch.empty(1, 2, dim, device="cuda", dtype=dtype)
        assert fused_for(hidden, heads, per_token) == Fused(norms=True, rotations=True)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("dim", [dim for dim, _ in WIDTHS])
def test_norms_in_8_bit(dim: int, dtype: torch.dtype, kind: torch.dtype, per_token: bool) -> None:
    if kind != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    with torch.no_grad():
        hidden = torch.empty(1, 2, dim, device="cuda", dtype=dtype)
        assert norms_to_codes(hidden, kind, per_token)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["wan2.1-t2v", "wan2.1-i2v", "wan2.2-ti2v-5b"])
def test_a_forward_of_wide_blocks(family: str, dtype: torch.dtype, per_token: bool) -> None:
    if per_token and family != "wan2.2-ti2v-5b":
        family = "wan2.2-ti2v-5b"
    numbers = {"added_kv_proj_dim": 512} if family == "wan2.1-i2v" else {}
    model = model_of(family, dtype, num_attention_heads=4, attention_head_dim=128, **numbers)
    for parameter in model.parameters():
        parameter.mul_(0.2)  # as wide as this, float16 would overflow otherwise
    model.to("cuda")
    with torch.no_grad():
        for batch in (1, 2):
            call: dict[str, Any] = {
                name: value.to("cuda") if isinstance(value, torch.Tensor) else value
                for name, value in inputs_of(model, dtype, batch).items()
            }
            if per_token:
                count = call["timestep"].shape[1]
                call["timestep"] = torch.arange(count, device="cuda").repeat(batch, 1) * 3.5
            expected = model(**call)[0]
            for options in ({}, {"fuse": False}, {"rows": 16}):
                with lean_forward(model, **options):
                    assert torch.equal(model(**call)[0], expected), options


def test_nothing_is_compiled_for_another_length() -> None:
    kernels = fused.triton_kernels()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1, 6, 512, generator=generator).cuda()
    taken = []
    for count in (33, 32, 17, 1, 4096, 75):
        hidden = torch.randn(1, count, 512, generator=generator).cuda().bfloat16()
        begun = time.perf_counter()
        kernels.norm_rows(
            hidden, torch.empty_like(hidden), 1e-6,
            scale=(values[:, :, 1], None), shift=(values[:, :, 0], None),
        )  # fmt: skip
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    assert max(taken[1:]) < 0.2  # compiling takes a second


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_products_in_8_bit_of_any_number_of_tokens(kind: str) -> None:
    """Whole, and in spans as a feed-forward's: nothing refuses, and the numbers are right."""
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    torch.manual_seed(0)
    first, second = (
        stored(torch.nn.Linear(*sizes, device="cuda", dtype=torch.bfloat16), kind)
        for sizes in ((5120, 13824), (13824, 5120))
    )
    tokens = torch.randn(20_011, 5120, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        inner, outer = (product_for(one, torch.bfloat16) for one in (first, second))
        assert inner is not None and outer is not None
        for count in (*range(1, 40), 8190, 16_380, 20_011):
            x = tokens[:count]
            shared = Shared((first,), (inner,))
            shared.read(x)
            found, expected = shared.feed(outer), outer(inner(tokens), True)[:count]
            assert relative(found, expected) < 3e-2, count
            plain = second(torch.nn.functional.gelu(first(x), approximate="tanh"))
            assert relative(found, plain) < 6e-2, count


@pytest.mark.parametrize("name", attention_ways.OWN_8BIT)
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 128), (torch.float16, 64)])
def test_attention_in_8_bit(name: str, dtype: torch.dtype, size: int) -> None:
    """Near torch's at every length, compiled once, in no more memory than is counted."""
    if "fp8" in name and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    way, generator = attention_ways.ways()[name], torch.Generator("cuda").manual_seed(0)
    taken = []
    for count, keys in ((1000, 1000), (1, 512), (33, 27), (20_011, 20_011), (4096, 512)):
        sizes = [(1, n, 12, size) for n in (count, keys, keys)]
        query, key, value = (torch.randn(s, generator=generator, device="cuda") for s in sizes)
        key = key + 5 * torch.randn(1, 1, 12, size, generator=generator, device="cuda")
        states = [x.to(dtype).transpose(1, 2) for x in (query * 3, key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(*states)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, begun = torch.cuda.memory_allocated(), time.perf_counter()
        found = way.run(*states)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
        held = torch.cuda.max_memory_allocated() - before - found.nbytes
        if count == keys == 20_011:
            assert held <= CODED_SHARE * found.nbytes, held / found.nbytes
        assert relative(found, expected) < 5e-2, (count, keys)
    assert max(taken[1:]) < 0.2  # compiling takes seconds


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())
