"""An expert is read while it is placed, or while the other one computes where RAM allows that."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import single_files
from support.crashes import Crash
from support.machines import gpu
from support.stored_models import experts
from torch import Tensor

from wan_core import GenerationConfig, WanModelFiles, WanPipelineLoader
from wan_core.errors import CorruptFile
from wan_core.formats import read_table
from wan_core.loading import reader, to_look_at
from wan_core.loading.mapped import Looker, stored_at
from wan_core.memory import RAM_RESERVE, estimate
from wan_core.memory import stages as memory_stages
from wan_core.render import stages
from wan_core.render.report import workload_of

pytestmark = pytest.mark.usefixtures("mapped")
JOB = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 5, "seed": 1,
       "num_inference_steps": 2, "switch_step": 1, "guidance_scale": 1.0,
       "guidance_scale_2": 1.0}  # fmt: skip
GIB = 2**30
WAYS: tuple[dict[str, Any], ...] = (
    {"offload": "none"},
    {"offload": "model"},
    {"offload": "stream", "resident_blocks": 0},
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    single_files.write(folder)
    experts(folder, "fp8_scaled")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is loaded: name of the file, and name of the thread."""
    made: list[tuple[str, str]] = []
    load = stages.load_component

    def spy(path: Path, *args: Any, **kwargs: Any) -> Any:
        made.append((Path(path).name, threading.current_thread().name))
        return load(path, *args, **kwargs)

    monkeypatch.setattr(stages, "load_component", spy)
    return made


def opened(home: Path, low: Path | None = None, **wishes: Any) -> Any:
    pair, _ = experts(home, "fp8_scaled")
    given = WanModelFiles(
        transformer=pair[0], transformer_2=low or pair[1], vae=home / "vae" / single_files.VAE,
        text_encoder=home / "text_encoders" / single_files.TEXT,
    )  # fmt: skip
    wishes = {"device": "cpu", "precision": "bf16", "offload": "none"} | wishes
    return WanPipelineLoader().load_wan_pipeline(given, optimization_config=wishes)


def generated(wrapper: Any, **job: Any) -> Any:
    return wrapper.generate(GenerationConfig(**(JOB | job))).raise_for_error()


def second(reads: list[tuple[str, str]]) -> list[str]:
    return [thread for name, thread in reads if name.startswith("low_noise")]


def is_there(wrapper: Any) -> bool:
    return any(key.kind == "transformer_2" for key, _ in wrapper._cache.loaded())


def waits_for(done: Callable[[], bool]) -> Callable[..., None]:
    """A callback for the high-noise expert's only step: goes on when what is meant is done."""

    def step(steps: int, *_: Any) -> None:
        end = time.monotonic() + 60
        while steps == 1 and not done() and time.monotonic() < end:
            time.sleep(0.005)
        assert done(), "it was not done while the first expert computed"

    return step


@pytest.fixture(scope="module")
def plain(home: Path) -> Tensor:
    """What comes out where nothing is read ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wan_core.models.sizes.MAP_FROM", 1)
        patch.setattr(stages, "ram", lambda: (GIB, 0, ()))
        found: Tensor = generated(opened(home)).latents
    return found


@pytest.mark.parametrize("wishes", WAYS, ids=lambda w: w["offload"])
def test_it_is_read_meanwhile_and_no_bit_changes(
    home: Path, reads: list[tuple[str, str]], plain: Tensor, wishes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    again: list[int] = []
    read_again = stages.read_again

    def spy(tensors: Any, check: Any) -> None:
        kept = list(tensors)
        read_again(kept, check)
        again.append(sum(tensor.nbytes for tensor in kept))

    monkeypatch.setattr(stages, "read_again", spy)
    wrapper = opened(home, **wishes)
    result = generated(wrapper, progress_callback=waits_for(lambda: is_there(wrapper)))
    assert torch.equal(result.latents, plain)
    assert second(reads) == ["wanfit-ahead"] and not again
    low = next(m for key, m in wrapper._cache.loaded() if key.kind == "transformer_2")
    names = [stage.name for stage in result.stages]
    assert names.index("denoise_high") < names.index("load transformer_2")
    note = next(stage.note for stage in result.stages if stage.name == "load transformer_2")
    assert note == ("fp8 scaled per tensor, computed in bf16, read while the other expert computed")
    # It is in the cache: its file is read again, as the system may have dropped it.
    result = generated(wrapper, progress_callback=waits_for(lambda: len(again) == 1))
    assert torch.equal(result.latents, plain) and len(second(reads)) == 1
    assert again == [sum(p.nbytes for p in low.parameters())]
    assert "load transformer_2" not in [stage.name for stage in result.stages]
    assert not [t for t in threading.enumerate() if t.name == "wanfit-ahead"]


def test_not_where_ram_is_short(
    home: Path, reads: list[tuple[str, str]], plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "ram", lambda: (GIB, RAM_RESERVE, ()))
    assert torch.equal(generated(opened(home)).latents, plain)
    assert second(reads) == ["MainThread"]


def test_an_expert_that_is_half_read_is_waited_for(
    home: Path, plain: Tensor, reads: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    slowly(monkeypatch, lambda: sum(name == "transformer_2" for name, *_ in told) > 1)
    result = generated(opened(home), load_callback=lambda *amount: told.append(amount))
    assert torch.equal(result.latents, plain)
    assert second(reads) == ["wanfit-ahead"]
    waited = [amount[1:] for amount in told if amount[0] == "transformer_2"]
    assert len(waited) >= 3 and waited[0] == (1, 2) and waited[-1][0] == waited[-1][1]


def slowly(monkeypatch: pytest.MonkeyPatch, done: Callable[[], bool]) -> None:
    """Have the second expert be half read until something is so, a minute at most."""
    load = stages.load_component

    def slow(path: Path, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name.startswith("low_noise"):
            kwargs["progress"](1, 2)
            end = time.monotonic() + 60
            while not done() and time.monotonic() < end:
                kwargs["interrupt_check"]()
                time.sleep(0.01)
        return load(path, *args, **kwargs)

    monkeypatch.setattr(stages, "load_component", slow)


@pytest.mark.parametrize("when", ["in a step", "while it is waited for"])
def test_an_interrupt_ends_it(
    home: Path, plain: Tensor, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    slowly(monkeypatch, lambda: False)

    def stop(*amount: Any) -> None:
        if when == "in a step" or amount[0] == "transformer_2":
            raise Crash

    name = "progress_callback" if when == "in a step" else "load_callback"
    wrapper = opened(home)
    began = time.monotonic()
    with pytest.raises(Crash):
        generated(wrapper, **{name: stop})
    assert time.monotonic() - began < 50
    assert not [t for t in threading.enumerate() if t.name == "wanfit-ahead"]
    assert not is_there(wrapper)
    monkeypatch.undo()
    assert torch.equal(generated(opened(home, offload="model")).latents, plain)


def test_what_goes_wrong_is_told_at_its_turn(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, threads = stages.load_component, []

    def broken(path: Path, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name.startswith("low_noise"):
            threads.append(threading.current_thread().name)
            raise CorruptFile("the file is damaged")
        return load(path, *args, **kwargs)

    monkeypatch.setattr(stages, "load_component", broken)
    steps: list[int] = []
    result = opened(home).generate(
        GenerationConfig(**JOB, progress_callback=lambda done, *_: steps.append(done))
    )
    assert isinstance(result.error, CorruptFile)
    assert steps == [1]  # the high-noise expert's work was done
    assert threads[:2] == ["wanfit-ahead", "MainThread"]


@pytest.mark.parametrize("offload", ["none", "model", "stream"])
def test_the_plan_counts_the_ram_it_takes(
    home: Path, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_stages, "SENDING", 0)  # which is over before anything is read ahead
    wrapper = opened(home)
    request, plan = wrapper.plan(GenerationConfig(**JOB))
    architecture = wrapper.architecture
    choices = replace(plan.choices, offload="none", part_offload={}, stream=offload == "stream")
    if offload != "stream":
        choices = replace(choices, offload=offload)
    card = gpu(24)
    job = workload_of(request, GenerationConfig(**JOB), architecture)

    def ahead(available: int) -> dict[str, int]:
        found = estimate(architecture, job, choices, replace(card, ram_available_bytes=available))
        return {stage.name: stage.ahead_bytes for stage in found.stages if stage.ahead_bytes}

    amount = ahead(32 * GIB)
    nbytes = sum(amount.values())
    assert list(amount) == ["denoise_high"] and nbytes > 0
    # Enough is enough, and a byte less is not.
    low, high = 0, 32 * GIB
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ahead(middle) else (middle, high)
    first = next(
        stage
        for stage in estimate(
            architecture, job, choices, replace(card, ram_available_bytes=low)
        ).stages
        if stage.name == "denoise_high"
    )
    assert not first.ahead_bytes
    taken = first.host_bytes + first.locked_bytes + first.mapped_bytes
    assert high == taken + nbytes + RAM_RESERVE


@pytest.mark.parametrize("chunk", [None, 5], ids=["one clip", "windows"])
def test_page_locks_stay_between_experts_and_go_before_the_decode(
    home: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    """Locked again for each expert they would cost seconds; beside the decode, room."""
    told: list[str] = []
    use = stages.StageRunner.use

    def told_of(self: Any, stage: str, component: str, **more: Any) -> Any:
        told.append(stage)
        return use(self, stage, component, **more)

    monkeypatch.setattr(stages.StageRunner, "use", told_of)
    monkeypatch.setattr(stages, "unpin", lambda *_: told.append("unlocked"))
    job = JOB | {"num_frames": 9, "max_chunk_size": chunk}
    result = opened(home, offload="stream", resident_blocks=0).generate(GenerationConfig(**job))
    result.raise_for_error()
    assert told[-2:] == ["decode", "unlocked"]
    assert told[: told.index("denoise_high")] == ["text_encode", "unlocked"]
    assert told[told.index("denoise_high") : -2] == ["denoise_high", "denoise_low"]


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read while they are placed, as on a GPU, and nothing is read ahead."""

    def cold(self: stages.StageRunner, component: str) -> bool:
        module = self._in_cache(component)
        return self._mapped(component) and (module is None or to_look_at(module))

    monkeypatch.setattr(stages.StageRunner, "_reads_while_sending", cold)
    monkeypatch.setattr(stages, "ram", lambda: (GIB, 0, ()))
    monkeypatch.setattr(reader, "_SMALL", 0)


@pytest.mark.usefixtures("on_a_card")
def test_what_is_read_while_it_is_placed_is_a_stage_of_its_own(home: Path, plain: Tensor) -> None:
    told: list[str] = []
    job = JOB | {"load_callback": lambda name, done, total: told.append(name)}
    wrapper = opened(home, offload="stream")
    result = generated(wrapper, **job)
    assert torch.equal(result.latents, plain)
    loads = ["load transformer", "denoise_high", "load transformer_2", "denoise_low"]
    names = [stage.name for stage in result.stages]
    assert names[names.index(loads[0]) :][:4] == loads
    notes = {stage.name: stage.note for stage in result.stages}
    assert {notes[name] for name in loads[::2]} == {"fp8 scaled per tensor, computed in bf16"}
    assert {"transformer", "transformer_2"} <= set(told)
    loaded = [module for key, module in wrapper._cache.loaded() if "transformer" in key.kind]
    assert len(loaded) == 2 and not any(map(to_look_at, loaded))
    again = generated(wrapper)
    assert torch.equal(again.latents, plain)
    assert "load transformer" not in [stage.name for stage in again.stages]


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no system is asked to read ahead")
def test_a_file_is_being_read_while_its_module_is_made(
    home: Path, plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are looked at after that: a disk need not wait until then."""
    asked = {path.name: threading.Event() for path in experts(home, "fp8_scaled")[0]}
    load, made = stages.load_component, []

    def ask(handle: int, *_: int) -> None:
        asked[Path(os.readlink(f"/proc/self/fd/{handle}")).name].set()

    def waiting(path: Path, *args: Any, **more: Any) -> Any:
        if path.name in asked:
            made.append(asked[path.name].wait(20))
        return load(path, *args, **more)

    monkeypatch.setattr(os, "posix_fadvise", ask)
    monkeypatch.setattr(stages, "load_component", waiting)
    assert torch.equal(generated(opened(home, offload="stream")).latents, plain)
    assert made == [True, True]


def test_what_a_card_looks_at_is_only_read_ahead(
    home: Path, plain: Tensor, reads: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are in RAM when its turn comes; it is looked at then, and nobody waited for it."""

    def cold(self: stages.StageRunner, component: str) -> bool:
        module = self._in_cache(component)
        return self._mapped(component) and (module is None or to_look_at(module))

    monkeypatch.setattr(stages.StageRunner, "_reads_while_sending", cold)
    monkeypatch.setattr(stages.StageRunner, "_is_sent_whole", lambda *_: True)
    monkeypatch.setattr(reader, "_SMALL", 0)
    ahead: list[tuple[int, bool]] = []
    read_again, fetch = stages.read_again, Looker.fetch

    def again(tensors: Any, check: Any) -> None:
        kept = list(tensors)
        read_again(kept, check)
        ahead.append((sum(t.nbytes for t in kept if stored_at(t)), any(looked)))

    def fetched(self: Any, file: Any, piece: range, unit: int, finite: Any, into: Any) -> Any:
        if os.path.samestat(os.fstat(file.fileno()), low_file):
            looked.append(finite is not None)
        return fetch(self, file, piece, unit, finite, into)

    looked: list[bool] = []
    low_file = experts(home, "fp8_scaled")[0][1].stat()
    monkeypatch.setattr(stages, "read_again", again)
    monkeypatch.setattr(Looker, "fetch", fetched)
    wrapper = opened(home, offload="none")
    result = generated(wrapper, progress_callback=waits_for(lambda: bool(ahead)))
    assert torch.equal(result.latents, plain)
    assert second(reads) == ["wanfit-ahead"]
    low = next(m for key, m in wrapper._cache.loaded() if key.kind == "transformer_2")
    assert ahead == [(sum(p.nbytes for p in low.parameters() if stored_at(p.data)), False)]
    assert any(looked) and not to_look_at(low)
    names = [stage.name for stage in result.stages]
    assert names.count("load transformer_2") == 1
    assert names.index("denoise_high") < names.index("load transformer_2")


@pytest.mark.parametrize(
    ("device", "offload", "whole"),
    [("cuda:0", "none", True), ("cuda:0", "model", True), ("cuda:0", "stream", False),
     ("cuda:0", "sequential", False), ("cpu", "none", False)],
)  # fmt: skip
def test_what_is_sent_as_a_whole_to_a_card(
    home: Path, device: str, offload: str, whole: bool
) -> None:
    wrapper, config = opened(home), GenerationConfig(**JOB)
    request, plan = wrapper.plan(config)
    stream = offload == "stream"
    plan = replace(plan, device=device).with_choices(
        stream=stream, offload="none" if stream else offload, part_offload={}
    )
    runner = wrapper._make_render(config, request, plan).stages
    assert runner._is_sent_whole("transformer_2") is whole


@pytest.mark.usefixtures("on_a_card")
def test_a_damaged_expert_is_told_as_often_as_it_is_tried(home: Path, tmp_path: Path) -> None:
    pair, _ = experts(home, "fp8_scaled")
    bad = tmp_path / "low_noise.safetensors"
    content = bytearray(pair[1].read_bytes())
    weight = read_table(pair[1]).tensors["blocks.1.ffn.2.weight"]
    content[weight.start + weight.nbytes - 1] = 0x7F
    bad.write_bytes(content)
    wrapper, steps = opened(home, bad), []
    job = GenerationConfig(**JOB, progress_callback=lambda done, *_: steps.append(done))
    for _ in range(2):
        error = wrapper.generate(job).error
        assert isinstance(error, CorruptFile)
        assert "low_noise" in str(error) and "'blocks.1.ffn.2.weight'" in str(error)
    assert steps == [1, 1]


@pytest.mark.usefixtures("on_a_card")
def test_an_interrupt_while_it_is_read_and_placed(
    home: Path, plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_core.loading.mapped._TOLD_SECONDS", 0.0)
    wrapper = opened(home)

    def stop(name: str, done: int, total: int) -> None:
        if name == "transformer" and done:
            raise Crash

    with pytest.raises(Crash):
        generated(wrapper, load_callback=stop)
    assert torch.equal(generated(wrapper).latents, plain)


def test_what_is_page_locked_ahead_is_not_read_before_the_first_expert_computes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(reader, "_SMALL", 0)
    monkeypatch.setattr("wan_core.loading.mapped.Looker.fetch", lambda *piece: read.append(piece))
    monkeypatch.setattr("wan_core.loading.page_lock._register", lambda memory: False)
    wrapper, config = opened(home, offload="stream"), GenerationConfig(**JOB)
    request, plan = wrapper.plan(config)
    streamed = replace(plan, device="cuda:0").with_choices(stream=True, resident_blocks=0)
    runner = wrapper._make_render(config, request, streamed).stages
    with runner.pin_next("transformer_2"):
        [module] = [m for key, m in wrapper._cache.loaded() if key.kind == "transformer_2"]
        assert to_look_at(module)
    assert not read
