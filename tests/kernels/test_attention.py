"""The fastest attention: by the clock, checked against torch's choice, asked for once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lean_models import inputs_of, model_of
from torch import Tensor

from wan_core.forward import block as block_module
from wan_core.forward import lean_forward
from wan_core.kernels import attention, attention_ways
from wan_core.kernels.attention_ways import Way
from wan_core.loading import load_component
from wan_core.memory import ATTENTION_8BIT, AttentionTimes


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(attention, "_chosen", {})
    monkeypatch.setattr(attention, "_used", {})
    monkeypatch.setattr(
        attention, "AttentionTimes", lambda: AttentionTimes(tmp_path / "times.json")
    )
    attention_ways.ways.cache_clear()
    with torch.no_grad():
        yield
    attention_ways.ways.cache_clear()


def states() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, 4, 16, generator=generator).bfloat16() for n in (70, 50, 50)]


def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value) * 1.1


def broken(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("not on this card")


def noisy(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value)
    out[:, 2] = torch.randn_like(out[:, 2])  # one head is noise
    return out


OWN = F.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({"cuDNN": (OWN, 5.0), "flash": (OWN, 7.0)}, "cuDNN"),
        ({"cuDNN": (OWN, 9.9)}, attention.OWN),  # not worth other bits
        ({"cuDNN": (OWN, 12.0)}, attention.OWN),
        ({"cuDNN": (wrong, 1.0), "flash": (OWN, 8.0)}, "flash"),
        ({"cuDNN": (broken, 1.0), "flash": (noisy, 2.0)}, attention.OWN),
    ],
)
def test_the_fastest_that_agrees(
    others: dict[str, tuple[Callable[..., Tensor], float]], chosen: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """torch's choice takes 10 ms here."""
    table = {attention.OWN: (OWN, 10.0), **others}
    calls = {name: Way(one) for name, (one, _) in table.items()}
    times = iter([taken for one, taken in table.values() if one is OWN])
    monkeypatch.setattr(attention, "ways", lambda: calls)
    monkeypatch.setattr(attention, "milliseconds", lambda call, runs: next(times))
    query, key, _ = states()
    with caplog.at_level("INFO"):
        assert attention._fastest(key_of(query, key), query, key) == chosen
    assert f"{chosen} is used" in caplog.text and "70 x 50 tokens, 4 heads of 16" in caplog.text


def key_of(query: Tensor, key: Tensor, eight_bit: bool = False) -> attention.Key:
    return attention.Key(query.device, query.dtype, tuple(query.shape), tuple(key.shape), eight_bit)


def rough(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = OWN(query, key, value)
    return out + 0.02 * out.std() * torch.randn_like(out)


@pytest.mark.parametrize(
    ("allowed", "kernel", "chosen"),
    [(True, rough, "8 bit"), (False, rough, attention.OWN), (True, noisy, attention.OWN)],
)
def test_8_bit_only_where_allowed_and_near(
    allowed: bool, kernel: Any, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same result in 16 bit would be another one than torch's."""
    table = {attention.OWN: Way(OWN), "8 bit": Way(kernel, eight_bit=True)}
    monkeypatch.setattr(attention, "ways", lambda: table)
    times = iter([10.0, 5.0])
    monkeypatch.setattr(attention, "milliseconds", lambda call, runs: next(times))
    query, key, _ = states()
    assert attention._fastest(key_of(query, key, allowed), query, key) == chosen
    if kernel is rough and allowed:
        table["8 bit"] = Way(kernel)
        times = iter([10.0, 5.0])
        assert attention._fastest(key_of(query, key, True), query, key) == attention.OWN


class OnCard(Tensor):
    """A tensor of the CPU that says it is on a card."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_a_call_is_timed_behind_work_that_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that starting its kernels, slow beside a thread that reads, is no part of the time."""
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            queue.append("event")
            self.at = len(queue)

        def synchronize(self) -> None:
            queue.append("waited for")

        def elapsed_time(self, other: Any) -> float:
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: queue.append("busy" if cycles > 1e6 else "")
    )
    assert attention.milliseconds(lambda: queue.append("call"), 2) == 2.0
    assert queue == ["busy", "event", "call", "event", "waited for"] * 2
    monkeypatch.delattr(torch.cuda, "_sleep")
    assert attention.milliseconds(lambda: queue.append("call"), 1) == 2.0


def test_times_without_a_kernel_that_lacked_memory_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be the fastest: the next process times it."""

    def lacking(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for way, kept in ((lacking, False), (broken, True)):
        table = {attention.OWN: Way(OWN), "flash": Way(way)}
        monkeypatch.setattr(attention, "ways", lambda table=table: table)
        monkeypatch.setattr(attention, "milliseconds", lambda call, runs: 1.0)
        monkeypatch.setattr(attention, "_machine", lambda device: ("H100", "cuDNN 9"))
        query, key = (x.as_subclass(OnCard) for x in states()[:2])
        assert attention._fastest(key_of(query, key), query, key) == attention.OWN
        assert bool(AttentionTimes(tmp_path / "times.json").of("H100", "cuDNN 9")) == kept
        assert ("too little memory to time attention by flash" in caplog.text) != kept
        caplog.clear()


def test_times_are_kept_for_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The winner is compared once more, not timed; other versions, or another result, time anew."""
    table = {attention.OWN: Way(OWN), "cuDNN": Way(OWN)}
    timed: list[float] = []

    def clock(call: Any, runs: int) -> float:
        timed.append(10.0 - len(timed) % 2 * 5)
        return timed[-1]

    where = ["H100, cuda, torch 2", "cuDNN 9"]
    monkeypatch.setattr(attention, "ways", lambda: table)
    monkeypatch.setattr(attention, "milliseconds", clock)
    monkeypatch.setattr(attention, "_machine", lambda device: tuple(where))
    query, key = (x.as_subclass(OnCard) for x in states()[:2])
    assert attention.chosen_for(query, key) == "cuDNN" and len(timed) == 2
    for change, times in (
        (None, 2),
        (lambda: where.__setitem__(1, "cuDNN 8"), 4),
        (lambda: table.__setitem__("cuDNN", Way(noisy)), 5),
        (lambda: where.__setitem__(1, "cuDNN 7"), 6),
    ):
        attention._chosen.clear()
        if change is not None:
            change()
        chosen = "cuDNN" if times < 5 else attention.OWN
        assert attention.chosen_for(query, key) == chosen
        assert len(timed) == times
    shape = "1 x 70 x 50 tokens, 4 heads of 16, bfloat16"
    kept = AttentionTimes(tmp_path / "times.json")
    (found,) = kept.of(where[0]).items()
    assert found == (shape, {attention.OWN: timed[-1]})
    assert kept.of(where[0], "other") == {} == kept.of("other")
    kept.path.write_text("[1")
    assert kept.of(where[0]) == {}


def test_times_without_our_kernels_are_not_those_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton that comes later adds kernels, which no kept time would ever let begin."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    table = {attention.OWN: Way(OWN), "flash": Way(OWN, package="flash-attn 3")}
    monkeypatch.setattr(attention, "ways", lambda: table)
    device = torch.device("cpu")
    name, before = attention._machine(device)
    table |= {own: Way(OWN, eight_bit=True) for own in attention_ways.OWN_8BIT}
    assert attention._machine(device)[0] == name
    assert attention._machine(device)[1] not in ("", before)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put modules in the place of packages: name -> what is in it."""

    def put(**modules: dict[str, Any]) -> None:
        for name, content in modules.items():
            module = ModuleType(name.replace("__", "."))
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def test_packages_that_are_installed(packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is called as it wants: tokens or heads first, one result or several."""
    asked: list[dict[str, Any]] = []

    def by_tokens(query: Tensor, key: Tensor, value: Tensor) -> Any:
        out = OWN(*(x.transpose(1, 2) for x in (query, key, value)))
        return out.transpose(1, 2), "lse"

    def sage(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        asked.append(options)
        return OWN(query, key, value)

    def kitchen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert all(x.is_contiguous() for x in (query, key, value))
        return OWN(query, key, value)

    packages(
        flash_attn_interface={"flash_attn_func": by_tokens},
        flash_attn={"flash_attn_func": lambda *x: by_tokens(*x)[0]},
        flash_attn__cute={"flash_attn_func": by_tokens},
        sageattention={"sageattn": sage, "sageattn_qk_int8_pv_fp16_cuda": sage},
        comfy_kitchen={"int8_attention": kitchen, "int8_attention_is_available": lambda: True},
    )
    found = {n: w for n, w in attention_ways.ways().items() if n not in attention_ways.OWN_8BIT}
    assert [name for name in found if name not in attention_ways.TORCH] == [
        package.name for package in attention_ways.PACKAGES
    ]
    heads = [x.transpose(1, 2) for x in states()]
    for name, way in found.items():
        if name not in attention_ways.TORCH:
            assert torch.equal(way.run(*heads), OWN(*heads)), name
            assert way.package.endswith("of unknown version")
    assert {name for name, way in found.items() if way.eight_bit} == {
        "Sage", "Sage, values in fp16", "comfy-kitchen int8"
    }  # fmt: skip
    assert asked[0] == {"tensor_layout": "HND", "is_causal": False}


def test_a_package_that_does_not_load_or_not_on_this_card(
    packages: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packages(
        comfy_kitchen={"int8_attention": OWN, "int8_attention_is_available": lambda: False},
        sageattention={"sageattn": OWN},
    )
    plain = attention_ways.importlib.import_module

    def load(name: str) -> Any:
        if name == "flash_attn":
            raise ImportError("undefined symbol")
        return plain(name)

    monkeypatch.setattr(attention_ways, "importlib", SimpleNamespace(import_module=load))
    with caplog.at_level("INFO"):
        found = attention_ways.ways()
        attention_ways.ways()
    own = attention_ways.TORCH.keys() | attention_ways.OWN_8BIT.keys()
    assert [name for name in found if name not in own] == ["Sage"]
    assert caplog.text.count("flash-attn 2 is installed but does not load: undefined symbol") == 1
    packages(comfy_kitchen={"int8_attention": OWN})  # older than the question
    attention_ways.ways.cache_clear()
    assert "comfy-kitchen int8" not in attention_ways.ways()


@pytest.mark.parametrize(("heads", "calls"), [(40, [4] * 10), (12, [2] * 6), (3, [1] * 3)])
def test_a_package_in_8_bit_computes_a_tenth_of_the_heads_at_a_time(
    heads: int, calls: list[int], packages: Any
) -> None:
    """So that its copies stay small; the result is that of all, each token's heads side by side."""
    seen: list[int] = []

    def kitchen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append(query.shape[1])
        return OWN(query, key, value)

    packages(comfy_kitchen={"int8_attention": kitchen, "int8_attention_is_available": lambda: True})
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, heads, 8, generator=generator).transpose(1, 2) for n in (7, 5, 5)
    )
    out = attention_ways.ways()["comfy-kitchen int8"].run(query, key, value)
    assert torch.equal(out, OWN(query, key, value)) and seen == calls
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "names"),
    [
        ((9, 0), torch.bfloat16, 128, ["fp8", "fp16"]),
        ((8, 6), torch.float16, 64, ["fp16"]),
        ((7, 5), torch.float16, 64, []),
        ((9, 0), torch.float32, 128, []),
        ((9, 0), torch.bfloat16, 96, []),
    ],
)
def test_our_kernels_refuse_what_they_do_not_multiply(
    capability: tuple[int, int], dtype: torch.dtype, size: int, names: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a ValueError, as the comparison expects of a kernel that a card does not have."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    called: list[str] = []

    def attend_8bit(query: Tensor, *_: Tensor, halves: bool, out: Tensor) -> None:
        called.append("fp16" if halves else "fp8")

    fake = SimpleNamespace(attend_8bit=attend_8bit)
    monkeypatch.setattr(attention_ways, "attention_kernels", lambda: fake)
    x = torch.zeros(1, 1, 3, size, dtype=dtype)
    for name in attention_ways.OWN_8BIT:
        way = attention_ways.ways()[name]
        assert way.eight_bit
        try:
            way.run(x, x, x)
        except ValueError as err:
            assert "16 bit, 64 or 128 can be" in str(err) or "does not multiply" in str(err)
    assert called == names


@pytest.mark.parametrize(
    ("capability", "choice", "cudnn", "environment", "words"),
    [
        ((9, 0), 3, 91900, {}, None),
        ((9, 0), 1, 91000, {}, "the cuDNN that was loaded is 91000"),
        ((9, 0), 1, 91900, {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}, "unset it"),
        ((10, 0), 1, 91900, {}, "torch says not why"),
        ((8, 9), 1, 91000, {}, None),
    ],
)
def test_sliding_from_cudnn_is_said(
    capability: tuple[int, int], choice: int, cudnn: int, environment: dict[str, str],
    words: str | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cuda = SimpleNamespace(get_device_capability=lambda device: capability)
    fake = SimpleNamespace(
        cuda=cuda, version=SimpleNamespace(hip=None), zeros=lambda *_, **__: None,
        bfloat16=torch.bfloat16, _fused_sdp_choice=lambda *_: choice,
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: cudnn)),
    )  # fmt: skip
    monkeypatch.setattr(attention, "torch", fake)
    monkeypatch.setattr(attention.os, "environ", environment)
    found = attention.slid_from_cudnn(torch.device("cuda"))
    assert (found is None) == (words is None)
    assert words is None or words in str(found)
    assert attention.slid_from_cudnn(torch.device("cpu")) is None


def test_a_cpu_keeps_torch_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_fastest", None)  # not asked
    query, key, value = states()
    expected = OWN(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    assert torch.equal(attention.attend(query, key, value), expected)
    assert (attention.used_attention(), attention.used_attention()) == (attention.OWN, "")


def test_each_shape_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []

    class Card:
        is_cuda, dtype, device = True, torch.bfloat16, "cuda:0"

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    def fastest(found: attention.Key, query: Any, key: Any) -> str:
        timed.append((query.shape, key.shape))
        return "flash"

    monkeypatch.setattr(attention, "_fastest", fastest)
    monkeypatch.setattr(attention, "_known", lambda *_: None)
    long, short = Card(1, 70, 4, 16), Card(1, 50, 4, 16)
    asked: list[Any] = [(long, long), (long, short), (long, long), (short, short)]
    assert {attention.chosen_for(*pair) for pair in asked} == {"flash"}
    assert len(timed) == 3


@pytest.mark.parametrize("exact", [True, False])
def test_a_block_asks_only_if_it_may_round(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where the user has set a backend of diffusers."""
    model = model_of("wan2.1-i2v", torch.float32)
    call = inputs_of(model, torch.float32)
    ran: list[tuple[int, ...]] = []
    plain = attention.attend

    def counted(query: Tensor, key: Tensor, value: Tensor, eight_bit: bool) -> Tensor:
        ran.append(tuple(query.shape))
        assert not eight_bit
        return plain(query, key, value)

    monkeypatch.setattr(block_module, "attend", counted)
    expected = model(**call)[0]
    with lean_forward(model, exact=exact):
        model(**call)
    assert not ran
    with lean_forward(model, exact=exact, quick=True):
        out = model(**call)[0]
    assert (out - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert len(ran) >= 3 * len(model.blocks)  # itself, the image, the text
    for block in model.blocks:
        for attn in (block.attn1, block.attn2):
            attn.processor._attention_backend = "_native_math"
    ran.clear()
    with lean_forward(model, quick=True):
        model(**call)
    assert not ran


@pytest.mark.parametrize("wish", [None, "native"])
def test_weights_that_are_loaded_attend_by_the_clock_too(
    wish: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom another program's setting does not reach; a wish for the whole process does."""
    if wish:
        monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", wish)
    model_of("wan2.1-t2v", torch.float32).save_pretrained(tmp_path / "transformer")
    model = load_component(tmp_path / "transformer", torch.float32)
    ran: list[bool] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, eight_bit: bool) -> Tensor:
        ran.append(eight_bit)
        return attention.attend(query, key, value)

    monkeypatch.setattr(block_module, "attend", counted)
    with lean_forward(model, quick=True, attention_8bit=True):
        model(**inputs_of(model, torch.float32))
    assert ran == ([] if wish else [True] * 2 * len(model.blocks))


def test_a_package_that_writes_to_its_keys_does_not_write_to_ours() -> None:
    """SageAttention 1 takes the keys' mean from what it is given."""

    def in_place(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        key -= key.mean(dim=2, keepdim=True)
        return F.scaled_dot_product_attention(query, key, value)

    query, key, value = torch.randn(3, 1, 2, 9, 16).unbind()
    kept = key.clone()
    out = attention_ways._sage(in_place)(query, key, value)
    assert torch.equal(key, kept)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out, expected)


def test_kernels_in_8_bit_are_named_as_a_plan_knows_them() -> None:
    ours = dict.fromkeys(attention_ways.OWN_8BIT, "triton")
    theirs = {one.name: one.module for one in attention_ways.PACKAGES if one.eight_bit}
    assert ours | theirs == ATTENTION_8BIT
