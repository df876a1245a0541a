"""What goes beyond the range of fp16 in the VAE is made in bf16 from there, and said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from support.clips import read
from support.tiny_models import make_folder, open_wan

from wan_core import GenerationConfig
from wan_core.render import decode
from wan_core.render.pipeline import WanPipelineWrapper
from wan_core.sampling import Leaving, StreamingDecoder

JOB: dict[str, Any] = {
    "prompt": "a cat", "width": 64, "height": 32, "num_frames": 13, "num_inference_steps": 2,
    "seed": 3,
}  # fmt: skip


def vae_in(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = WanPipelineWrapper._plan

    def plan(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        dtypes = {**found.choices.dtypes, "vae": kind}
        return replace(found, choices=replace(found.choices, dtypes=dtypes))

    monkeypatch.setattr(WanPipelineWrapper, "_plan", plan)


def as_on_a_card(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """Have chunks leave while the next one is computed, as on CUDA."""
    if ahead:
        monkeypatch.setattr(
            decode, "leaves", lambda chunk, decoder: isinstance(decoder, StreamingDecoder)
        )


@pytest.mark.parametrize("ahead", [False, True])
def test_frames_beyond_the_range_are_decoded_in_bf16(
    ahead: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", "wan2.1-t2v")
    made: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("fp16", "bf16"):
            vae_in(kind, patch)
            result = open_wan(folder).generate(GenerationConfig(**JOB)).raise_for_error()
            made[kind] = result.frames
            assert not any("fp16" in text for text in result.warnings)
            patch.undo()
    vae_in("fp16", monkeypatch)
    as_on_a_card(monkeypatch, ahead)
    run, calls = StreamingDecoder._run, []

    def overflowing(self: Any, index: int, cache: Any) -> Any:
        chunk = run(self, index, cache)
        calls.append((index, chunk.dtype))
        if index == 2 and chunk.dtype == torch.float16:
            chunk[0, 0, 1, 3, 3] = float("inf")
        return chunk

    monkeypatch.setattr(StreamingDecoder, "_run", overflowing)
    config = GenerationConfig(**JOB, output_path=tmp_path / "clip.mp4")
    result = open_wan(folder).generate(config).raise_for_error()
    assert torch.equal(result.frames[:5], made["fp16"][:5])
    assert torch.equal(result.frames[5:], made["bf16"][5:])
    assert not torch.equal(made["fp16"], made["bf16"])
    # A chunk that leaves is looked at when the next one is there.
    half = [(i, torch.float16) for i in range(4 if ahead else 3)]
    assert calls == half + [(i, torch.bfloat16) for i in range(4)]
    (text,) = (text for text in result.warnings if "fp16" in text)
    assert "after 5 frames" in text and "decoded in bf16" in text
    assert "vae bf16" in result.applied_optimizations
    assert len(read(tmp_path / "clip.mp4")[0]) == 13


@pytest.mark.parametrize(
    "family", ["wan2.2-i2v-a14b", pytest.param("wan2.2-ti2v-5b", marks=pytest.mark.slow)]
)
def test_pictures_beyond_the_range_are_encoded_in_bf16(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Latents in fp16 are nearer to those in fp32; where a number is not finite, bf16 has its."""
    folder, made = make_folder(tmp_path / "model", family), dict[str, torch.Tensor]()
    picture = torch.rand(32, 64, 3, generator=torch.Generator().manual_seed(0))
    job = JOB | {"num_frames": 5, "num_inference_steps": 1, "image": picture}

    def run(kind: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            vae_in(kind, patch)
            return open_wan(folder).generate(GenerationConfig(**job)).raise_for_error()

    for kind in ("fp32", "fp16", "bf16"):
        result = run(kind)
        made[kind] = result.latents
        assert not any("fp16" in text for text in result.warnings)
    near, far = ((made[kind] - made["fp32"]).norm() for kind in ("fp16", "bf16"))
    assert 0 < 3 * near < far
    plain = torch.nn.Conv3d.forward

    def overflowing(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = plain(self, x)
        return out * float("inf") if x.dtype == torch.float16 else out

    monkeypatch.setattr(torch.nn.Conv3d, "forward", overflowing)
    result = run("fp16")
    assert torch.equal(result.latents, made["bf16"])
    (text,) = (text for text in result.warnings if "fp16" in text)
    assert "when it encoded" in text and "vae bf16" in result.applied_optimizations


def test_page_locked_memory_of_one_chunk_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next chunk's pictures may have the memory of those that were handed on."""
    as_on_a_card(monkeypatch, True)
    alive: WeakSet[Leaving] = WeakSet()

    class One(Leaving):
        def __init__(self, chunk: torch.Tensor, *, whole_bytes: bool) -> None:
            assert not alive
            super().__init__(chunk, whole_bytes=whole_bytes)
            alive.add(self)

    monkeypatch.setattr(decode, "Leaving", One)
    latents, frames = torch.zeros(1, 16, 3, 2, 2), torch.zeros(1, 9, 4, 4, 3)
    progress = decode.Decoding(latents, frames, [], wanted=9)
    progress.decoder = StreamingDecoder(None, latents)
    handed_on = []
    for count in (1, 4, 4):
        progress.pending = torch.ones(1, 3, count, 4, 4)
        handed_on.append(progress.hand_on_before())
    handed_on.append(progress.hand_on_before())
    assert handed_on == [False, True, True, True] and progress.done == 9
    assert bool((frames == 1).all())


@pytest.mark.parametrize(("fails", "kept"), [(None, True), (1, False), (3, True)])
def test_a_chunk_leaves_while_the_next_one_is_computed(
    fails: int | None, kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same clip, also where memory ran out meanwhile; each frame is written once."""
    folder = make_folder(tmp_path / "model", "wan2.1-t2v")
    plain, told = tmp_path / "plain.mp4", []
    expected = open_wan(folder).generate(GenerationConfig(**JOB, output_path=plain))
    as_on_a_card(monkeypatch, True)
    run, calls = StreamingDecoder._run, []

    def lacking(self: Any, index: int, cache: Any) -> Any:
        calls.append(index)
        if index == fails and calls.count(index) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, index, cache)

    def callback(done: int, wanted: int) -> None:
        told.append((done, wanted))

    monkeypatch.setattr(StreamingDecoder, "_run", lacking)
    config = GenerationConfig(
        **JOB, output_path=tmp_path / "clip.mp4", decode_callback=callback, return_frames=kept
    )
    result = open_wan(folder).generate(config).raise_for_error()
    if kept:
        assert torch.equal(result.frames, expected.frames)
    assert (tmp_path / "clip.mp4").read_bytes() == plain.read_bytes()
    assert told == [(done, 13) for done in (1, 5, 9, 13)]
    if fails is None:
        assert calls == [0, 1, 2, 3]
