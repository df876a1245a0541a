"""Products in 8 bit: the file's weights exactly, rounded activations, and when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.fused_eager import quantize_rows, scale_rows
from support.lean_models import inputs_of, model_of
from support.stored_layers import stored
from torch import Tensor, nn

from wan_core.config import WanLoRA
from wan_core.formats import Storage
from wan_core.forward import lean_forward
from wan_core.kernels import Addition, products
from wan_core.kernels.trials import Trials, trials_of_a_render
from wan_core.loading import rotation, stored_weight
from wan_core.loading.dequantize import Scales
from wan_core.loading.quantized import StoredLinear, layer_of_fp8, replace_layer, rounded_to_fp8
from wan_core.loras import apply_loras

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
        return layer_of_fp8(plain, *rounded_to_fp8(plain.weight.data))
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
    codes = product.quantized(x.clone(), gelu)
    numbers, group = codes.numbers.double() * codes.scales, product.weight.stored.group
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
    monkeypatch.setattr(products, "_trials", Trials("products"))


class OnCard:
    """A stored weight that says it is on a card."""

    def __init__(
        self, shape: tuple[int, int], kind: str, dtype: str, *, full: bool = False
    ) -> None:
        self.bits: Any = SimpleNamespace(is_cuda=True, device="cuda:0")
        self.stored = Storage(kind, dtype, shape, per="row", full_precision=full)


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
    products.used_products()
    assert (products.product_for(layer, torch.bfloat16) is not None) is used
    assert products.product_for(layer, torch.float32) is None
    assert products.used_products() == (used, 1) and products.used_products() == (0, 0)
    told = OnCard(shape, kind, dtype, full=True)  # by the file's note on the layer
    with monkeypatch.context() as patch:
        patch.setattr(products, "stored_weight", lambda layer: told)
        assert products.product_for(layer, torch.bfloat16) is None
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
        with pytest.raises(AttributeError):  # what does not run ends in ``Trials``
            products._pays(product, layer, torch.bfloat16)
    assert "8 bit is used" in caplog.text and "16 bit is used" in caplog.text


def test_a_trial_without_memory_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _patch_card(monkeypatch, (9, 0))
    monkeypatch.setattr(products, "stored_weight", lambda layer: OnCard((64, 32), "int8", "I8"))
    made: list[Any] = []

    def pays(product: Any, layer: Any, dtype: torch.dtype) -> bool:
        made.append(layer)
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    monkeypatch.setattr(products, "_pays", pays)
    layer = nn.Linear(32, 64)
    for used in (False, True):
        with trials_of_a_render([]):
            for _ in range(3):
                assert (products.product_for(layer, torch.bfloat16) is not None) is used
    assert len(made) == 2


def test_ada_cards_scale_rows_after_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for capability, version, row in (
        ((8, 9), "2.11.0+cu130", False), ((8, 9), "2.12.1", True), ((9, 0), "2.8.0", True),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(products.torch, "__version__", version)
        assert products._scales_rows(torch.device("cuda")) is row


LINEAR = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0",
    "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip
"""The layers of a block that read all tokens."""
KINDS = {"fp8": LAYERS["fp8 by tensor"], "int8": LAYERS["int8, rotated by 16"]}


def stored_model(kind: str, family: str = "wan2.1-t2v", **numbers: Any) -> Any:
    """A model whose blocks' linear layers are all stored in 8 bit."""
    sizes = {"num_layers": 4, "ffn_dim": 64, "attention_head_dim": 16, "num_attention_heads": 4}
    model = model_of(family, torch.bfloat16, **{**sizes, **numbers})
    for block in model.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                replace_layer(block, name, stored(layer, kind))
    return model


def rounded(layer: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    """A pre-hook that rounds a layer's input as its product in 8 bit does."""
    return (seen(product_of(layer, args[0].dtype), args[0], False).to(args[0].dtype),)


def distance(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every layer has a product in 8 bit; which were asked for."""
    found: list[Any] = []

    def product_for(layer: Any, dtype: torch.dtype) -> Any:
        found.append(layer)
        product = product_of(layer, dtype)
        hooks = tuple(layer._forward_hooks.values())
        return replace(product, layer=layer, additions=hooks)

    monkeypatch.setattr(products, "product_for", product_for)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [True, False])
def test_which_layers_of_which_blocks(exact: bool, kind: str, asked: list[Any]) -> None:
    """Those that read all tokens, of all blocks but the first and the last."""
    model = stored_model(kind)
    call = inputs_of(model, torch.bfloat16)
    with lean_forward(model, exact=exact):
        expected = model(**call)[0]
    assert not asked
    for attention, names in ((True, LINEAR), (False, LINEAR[-2:])):
        with lean_forward(
            model, exact=exact, rows=40, eight_bit=True, eight_bit_projections=attention
        ):
            out = model(**call)[0]
        wanted = {block.get_submodule(name) for block in model.blocks[1:3] for name in names}
        assert set(asked) == wanted
        assert 0 < distance(out, expected) < 0.05
        asked.clear()
    with lean_forward(model, exact=exact):
        assert torch.equal(model(**call)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [True, False])
def test_a_forward_is_that_of_rounded_inputs(
    exact: bool, kind: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where nothing else is rounded: products of each layer's input, rounded."""
    monkeypatch.setattr(products, "_ROWS", 32)
    model = stored_model(kind).float()
    call = inputs_of(model, torch.float32)
    with lean_forward(model, exact=exact, rows=40, eight_bit=True):
        out = model(**call)[0]
    assert asked
    with lean_forward(model, exact=exact, rows=40):
        plain = model(**call)[0]
    for block in model.blocks[1:3]:
        for name in LINEAR:
            block.get_submodule(name).register_forward_pre_hook(rounded)
    with lean_forward(model, exact=exact, rows=40):
        expected = model(**call)[0]
    # A number that lies between two codes may fall to either side.
    assert distance(out, expected) < distance(plain, expected) / 10


def test_shared_tokens_are_rounded_once(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated once too: q, k and v read the same; five inputs of a block are rounded, not eight."""
    made: list[torch.Size] = []

    def counted(x: Tensor, *args: Any) -> Any:
        made.append(x.shape)
        return quantize_rows(x, *args)

    kernels = SimpleNamespace(**{**vars(KERNELS), "quantize_rows": counted})
    monkeypatch.setattr(products, "triton_kernels", lambda: kernels)
    model = stored_model("int8")
    with lean_forward(model, eight_bit=True):
        model(**inputs_of(model, torch.bfloat16))
    assert len(asked) == 2 * 8 and len(made) == 2 * 6  # q k v, out, q, out, both of the ffn


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_lora_adds_is_not_rounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product in 8 bit, plus what the hook makes of the tokens as they were."""
    monkeypatch.setattr(products, "_ROWS", 32)
    layer = layer_of(*KINDS[kind])
    matrix = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = torch.randn(2, 35, 64, generator=torch.Generator().manual_seed(2)).bfloat16()

    def add(_: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out.add_(args[0] @ matrix.t())

    bare = product_of(layer, torch.bfloat16)
    adding = replace(bare, layer=layer, additions=(Addition(add), Addition(lambda *_: None)))
    shared = products.Shared((layer, layer), (adding, bare))
    assert shared.kind is None
    shared.read(x)
    expected = bare(x)
    for _ in range(2):
        assert distance(shared.project(0), expected + x @ matrix.t()) < 4e-3
    assert distance(shared.project(1, last=True), expected) < 4e-3
    # Before the GELU of a feed-forward too.
    torch.manual_seed(4)
    second = product_of(stored(nn.Linear(48, 64).bfloat16(), kind), torch.bfloat16)
    for first, inner in ((bare, expected), (adding, expected + x @ matrix.t())):
        shared = products.Shared((layer,), (first,))
        shared.read(x)
        assert distance(shared.feed(second), second(inner.clone(), True)) < 6e-3
        shared.read(x)
        more = replace(second, layer=layer, additions=(Addition(twice),))
        wanted = second(inner.clone(), True) + 2 * F.gelu(inner, approximate="tanh")[..., :1]
        assert distance(shared.feed(more), wanted) < 6e-3


def twice(_: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
    return out + 2 * args[0][..., :1]


def test_a_real_lora_leaves_a_layer_in_8_bit(tmp_path: Path) -> None:
    model = stored_model("fp8")
    target = model.blocks[1].attn1.to_q
    assert not products._hooked(target)
    path = tmp_path / "lora.safetensors"
    generator = torch.Generator().manual_seed(0)
    key = "diffusion_model.blocks.1.self_attn.q"
    save_file(
        {
            f"{key}.lora_A.weight": torch.randn(4, 64, generator=generator),
            f"{key}.lora_B.weight": torch.randn(64, 4, generator=generator),
        },
        path,
    )
    with apply_loras(model, (WanLoRA(path),)):
        assert target._forward_hooks and not products._hooked(target)
    target.register_forward_pre_hook(lambda *_: None)
    assert products._hooked(target)


def test_layers_that_differ_share_nothing(asked: list[Any]) -> None:
    """One rotated and one not; or one in 16 bit: then all of them are."""
    layers = [layer_of("int8"), layer_of("int8", "row", 16)]
    assert products.shared_by(layers[:1], torch.bfloat16, True).kind == torch.int8
    assert products.shared_by(layers[1:], torch.bfloat16, True).kind is None
    shared = products.shared_by(layers, torch.bfloat16, True)
    assert shared.kind is None and shared._products is None


def test_one_product_alone_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two products in 8 bit the GELU is rounded with them; with one it is as always."""
    model = stored_model("fp8")
    call = inputs_of(model, torch.bfloat16)
    with lean_forward(model):
        expected = model(**call)[0]
    firsts = [block.ffn.net[0].proj for block in model.blocks]

    def found(layer: Any, dtype: torch.dtype) -> Any:
        return product_of(layer, dtype) if layer in firsts else None

    monkeypatch.setattr(products, "product_for", found)
    with lean_forward(model, eight_bit=True):
        assert torch.equal(model(**call)[0], expected)


def test_fewer_tokens_than_torch_multiplies() -> None:
    layer = layer_of("int8")
    product = product_of(layer, torch.bfloat16)
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    many = torch.cat([x, torch.zeros(1, 60, 64, dtype=x.dtype)], dim=1)
    assert torch.equal(product(x), product(many)[:, :3])


@pytest.mark.parametrize("count", [1, 8, 31, 33, 94, 257])
def test_cublas_gets_what_it_takes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales and bias at multiples of 16 bytes, wherever spans begin; no bias of a few tokens."""
    monkeypatch.setattr(products, "_ROWS", 32)
    monkeypatch.setattr(products, "_FUSED", 30)
    multiply, seen_counts = torch._scaled_mm, []

    def strict(codes: Tensor, matrix: Tensor, bias: Any, **numbers: Any) -> Tensor:
        given = [numbers["scale_a"], numbers["scale_b"], *([] if bias is None else [bias])]
        assert all(x.data_ptr() % 16 == 0 for x in given)
        assert (bias is not None) is (len(codes) >= 30)
        seen_counts.append(len(codes))
        return multiply(codes, matrix, bias=bias, **numbers)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    first = product_of(layer_of("fp8"), torch.bfloat16)
    second = product_of(stored(nn.Linear(48, 64).bfloat16(), "fp8"), torch.bfloat16)
    # As views of a mapped file may lie.
    each = first.weight.scales.each
    assert each is not None and first.bias is not None
    moved = [torch.cat([x.new_zeros(1), x])[1:] for x in (each, first.bias)]
    scales = replace(first.weight.scales, each=moved[0])
    first = replace(first, weight=first.weight._replace(scales=scales), bias=moved[1])
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    shared = products.Shared((first.layer,), (first,))
    shared.read(x)
    out = shared.feed(second)
    assert out.shape == (count, 64) and sum(seen_counts) == 2 * count
    one_by_one = torch.cat([second(first(row[None]), True) for row in x])
    # A bias that is added after rounding may move a number to the next of fp8's codes.
    assert distance(out, one_by_one) < 3e-2
