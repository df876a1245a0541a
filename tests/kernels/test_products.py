"""Products in 8 bit: the file's weights exactly, rounded activations, and when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fused_eager import quantize_rows, scale_rows
from support.lean_models import inputs_of, model_of
from torch import Tensor, nn

from wan_core.formats import Storage
from wan_core.forward import lean_forward
from wan_core.kernels import products
from wan_core.loading import rotation, stored_weight
from wan_core.loading.dequantize import Scales
from wan_core.loading.quantized import StoredLinear, fp8_layer, replace_layer

KERNELS = SimpleNamespace(quantize_rows=quantize_rows, scale_rows=scale_rows)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels' formulas in eager code, and torch's products of a CPU."""
    monkeypatch.setattr(products, "triton_kernels", lambda: KERNELS)
    monkeypatch.setattr(products, "_scales_rows", lambda device: True)
    with torch.no_grad():
        yield


def layer_of(kind: str, per: str = "row", group: int = 0) -> StoredLinear:
    """A layer (48, 64) stored as ``kind``, made from random numbers."""
    torch.manual_seed(3)
    plain = nn.Linear(64, 48)
    if kind == "fp8" and per == "tensor":
        return fp8_layer(plain, plain.weight.data)
    weight = plain.weight.data
    if group:
        weight = (weight.view(-1, group) @ rotation(group)).view(weight.shape)
    largest = 127 if kind == "int8" else 448
    each = weight.abs().amax(1) / largest
    numbers = weight / each[:, None]
    bits = numbers.round().to(torch.int8) if kind == "int8" else numbers.to(torch.float8_e4m3fn)
    layer = StoredLinear(64, 48, bias=True)
    name = "I8" if kind == "int8" else "F8_E4M3"
    layer.set_stored(bits, Scales(each), Storage(kind, name, (48, 64), per=per, group=group))
    layer.bias = plain.bias
    return layer


LAYERS = {
    "int8": ("int8",),
    "int8, rotated by 16": ("int8", "row", 16),
    "int8, rotated by 64": ("int8", "row", 64),
    "fp8 by tensor": ("fp8", "tensor"),
    "fp8 by row": ("fp8", "row"),
}


def product_of(layer: StoredLinear, dtype: torch.dtype) -> products.EightBitProduct:
    weight = stored_weight(layer)
    assert weight is not None
    return products.EightBitProduct(weight, layer.bias, dtype)


def seen(product: products.EightBitProduct, x: Tensor, gelu: bool) -> Tensor:
    """The activations as they are after rounding, turned back."""
    codes, scales, _ = product.quantized(x.clone(), gelu)
    numbers, group = codes.double() * scales, product.weight.stored.group
    if group:
        numbers = (numbers.view(-1, group) @ rotation(group).double()).view(numbers.shape)
    return numbers.view(*x.shape)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_the_file_s_and_only_activations_are_rounded(
    name: str, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the product in float64 of the file's numbers and the rounded activations."""
    monkeypatch.setattr(products, "_scales_rows", lambda device: by_row)
    monkeypatch.setattr(products, "_AT_ONCE", 32)
    layer = layer_of(*LAYERS[name])
    product = product_of(layer, torch.bfloat16)
    x = torch.randn(2, 35, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[:, ::7] *= 100  # tokens of other sizes have scales of their own
    found = product(x)
    assert found.shape == (2, 35, 48) and found.dtype == torch.bfloat16
    weight = layer.dequantized(torch.float32).double()
    exact = F.linear(seen(product, x, False), weight, layer.bias.double())
    far = (found.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert float(far.max()) < 2**-7
    # And near the product that is not rounded: 2 to 3 % in fp8, 1 % in int8.
    plain = F.linear(x.double(), weight, layer.bias.double())
    error = float((found.double() - plain).norm() / plain.norm())
    assert 1e-3 < error < (0.04 if name.startswith("fp8") else 0.012)


@pytest.mark.parametrize("name", LAYERS)
def test_a_gelu_goes_in_before_it_is_rounded(name: str) -> None:
    product = product_of(layer_of(*LAYERS[name]), torch.bfloat16)
    x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    wanted = F.gelu(x, approximate="tanh").double()
    error = (seen(product, x, True) - wanted).norm() / wanted.norm()
    assert float(error) < 0.04


def _patch_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(products, "_tried", {})


class OnCard:
    """A stored weight that says it is on a card."""

    def __init__(self, shape: tuple[int, int], kind: str, dtype: str) -> None:
        self.bits: Any = SimpleNamespace(is_cuda=True, device="cuda:0")
        self.stored = Storage(kind, dtype, shape, per="row")


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "capability", "used"),
    [
        ("fp8", "F8_E4M3", (64, 32), (8, 9), True),
        ("fp8", "F8_E4M3", (64, 32), (8, 6), False),
        ("fp8", "F8_E5M2", (64, 32), (9, 0), False),
        ("fp8", "F8_E4M3", (64, 40), (9, 0), False),
        ("int8", "I8", (64, 32), (7, 5), True),
        ("int8", "I8", (64, 32), (7, 0), False),
        ("nvfp4", "U8", (64, 32), (10, 0), False),
    ],
)
def test_what_a_card_multiplies(
    kind: str, dtype: str, shape: tuple[int, int], capability: tuple[int, int], used: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _patch_card(monkeypatch, capability)
    monkeypatch.setattr(products, "stored_weight", lambda layer: OnCard(shape, kind, dtype))
    monkeypatch.setattr(products, "_pays", lambda *_: True)
    layer = nn.Linear(shape[1], shape[0])
    assert (products.product_for(layer, torch.bfloat16) is not None) is used
    assert products.product_for(layer, torch.float32) is None
    layer.register_forward_hook(lambda *_: None)  # a LoRA's
    assert products.product_for(layer, torch.bfloat16) is None


def test_it_is_used_where_it_is_right_and_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layer_of("int8").bfloat16()
    product = product_of(layer, torch.bfloat16)
    taken: Iterator[float]

    def clock(call: Any, runs: int) -> float:
        call()
        return next(taken)

    monkeypatch.setattr(products, "milliseconds", clock)
    with caplog.at_level("INFO"):
        for times, used in (([1.0, 1.2], True), ([1.0, 1.02], False)):
            taken = iter(times)
            assert products._pays(product, layer, torch.bfloat16) is used
        wrong = SimpleNamespace(**{**vars(KERNELS), "scale_rows": lambda *args: args[-1].fill_(1)})
        monkeypatch.setattr(products, "triton_kernels", lambda: wrong)
        taken = iter([1.0, 2.0])
        assert not products._pays(product, layer, torch.bfloat16)
        monkeypatch.setattr(products, "triton_kernels", lambda: None)
        assert not products._pays(product, layer, torch.bfloat16)
    assert "8 bit is used" in caplog.text and "the product in 8 bit failed" in caplog.text


def test_ada_cards_scale_rows_after_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for capability, version, row in (
        ((8, 9), "2.11.0+cu130", False), ((8, 9), "2.12.1", True), ((9, 0), "2.8.0", True),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(products.torch, "__version__", version)
        assert products._scales_rows(torch.device("cuda")) is row


def fp8_model() -> Any:
    model = model_of("wan2.1-t2v", torch.bfloat16, num_layers=4, ffn_dim=64)
    for block in model.blocks:
        for name in ("ffn.net.0.proj", "ffn.net.2"):
            layer = block.get_submodule(name)
            replace_layer(block, name, fp8_layer(layer, layer.weight.data))
    return model


@pytest.mark.parametrize("exact", [True, False])
def test_feed_forwards_of_inner_blocks(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the first and the last block; the result is near that in 16 bit."""
    model = fp8_model()
    call = inputs_of(model, torch.bfloat16)
    with lean_forward(model, exact=exact):
        expected = model(**call)[0]
    asked: list[Any] = []

    def found(layer: Any, dtype: torch.dtype) -> Any:
        asked.append(layer)
        return product_of(layer, dtype)

    monkeypatch.setattr(products, "product_for", found)
    with lean_forward(model, exact=exact, eight_bit=True):
        out = model(**call)[0]
    inner = [block.ffn.net[i] for block in model.blocks[1:3] for i in (0, 2)]
    assert asked == [getattr(layer, "proj", layer) for layer in inner]
    error = float((out.float() - expected.float()).norm() / expected.float().norm())
    assert 0 < error < 0.05
    asked.clear()
    with lean_forward(model, exact=exact):
        assert torch.equal(model(**call)[0], expected)
    assert not asked


def test_one_product_alone_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two products in 8 bit the GELU is rounded with them; with one it is as always."""
    model = fp8_model()
    call = inputs_of(model, torch.bfloat16)
    with lean_forward(model):
        expected = model(**call)[0]
    firsts = [block.ffn.net[0].proj for block in model.blocks]

    def found(layer: Any, dtype: torch.dtype) -> Any:
        return product_of(layer, dtype) if layer in firsts else None

    monkeypatch.setattr(products, "product_for", found)
    with lean_forward(model, eight_bit=True):
        assert torch.equal(model(**call)[0], expected)
