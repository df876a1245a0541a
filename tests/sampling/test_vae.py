"""Streamed encode and decode: diffusers' bits, flat memory, nothing left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.video_processor import VideoProcessor
from support.cases import pairs
from support.decoding import decode_frames, decode_into, decode_to_tensor, output_shape
from support.traced import TracedMemory
from support.vae_models import make_latents, make_vae
from torch import Tensor

from wan_core.errors import InvalidRequest
from wan_core.sampling.encode import keyframe_chunks
from wan_core.sampling.vae import (
    StreamingDecoder,
    denormalize_latents,
    encode_latents,
    normalize_latents,
    to_frames,
)


def reference_decode(vae: Any, latents: Tensor) -> Tensor:
    decoded: Tensor = vae.decode(latents.to(vae.dtype)).sample
    vae.clear_cache()
    return decoded


def state(vae: Any) -> dict[str, Any]:
    """What hangs on the model, to see that nothing was added, replaced or left in a list."""
    return {key: list(v) if isinstance(v, list) else v for key, v in vars(vae).items()}


@pytest.fixture(params=["2.1", "2.2"])
def vae(request: pytest.FixtureRequest) -> Any:
    return make_vae(request.param)


VERSIONS = pytest.mark.parametrize("version", ["2.1", "2.2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


# Decoding


@VERSIONS
@DTYPES
@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_chunks_are_the_bits_of_decode(version: str, dtype: torch.dtype, frames: int) -> None:
    vae = make_vae(version, dtype)
    latents = make_latents(vae, frames, batch=2)
    chunks = list(decode_frames(vae, latents))
    assert [chunk.shape[2] for chunk in chunks] == [1] + [4] * (frames - 1)
    wanted = reference_decode(vae, latents)
    assert wanted.abs().max() > 0.01
    assert chunks[0].dtype == dtype
    assert torch.equal(torch.cat(chunks, dim=2), wanted)


@VERSIONS
def test_chunks_are_clamped(version: str) -> None:
    vae = make_vae(version)
    vae.decoder.conv_out.weight.mul_(200)
    latents = make_latents(vae, 3)
    decoded = torch.cat(list(decode_frames(vae, latents)), dim=2)
    assert decoded.max() == 1 and decoded.min() == -1
    assert torch.equal(decoded, reference_decode(vae, latents))


@VERSIONS
@DTYPES
def test_frames_are_those_of_the_video_processor(version: str, dtype: torch.dtype) -> None:
    vae = make_vae(version, dtype)
    vae.decoder.conv_out.weight.mul_(20)
    latents = make_latents(vae, 3, batch=2)
    decoded = reference_decode(vae, latents)
    processor = VideoProcessor()
    frames = decode_to_tensor(vae, latents)
    assert frames.dtype == torch.float32 and frames.device.type == "cpu"
    assert torch.equal(frames, torch.from_numpy(processor.postprocess_video(decoded, "np")))
    as_tensor = processor.postprocess_video(decoded, "pt").permute(0, 1, 3, 4, 2)
    assert torch.equal(frames, as_tensor.float())
    pieces = [to_frames(chunk) for chunk in decode_frames(vae, latents)]
    assert torch.equal(frames, torch.cat(pieces, dim=1))


@pytest.mark.parametrize("shape", [(16, 3, 2, 2), (1, 16, 0, 2, 2)])
def test_latents_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="latents have shape"):
        StreamingDecoder(make_vae("2.1"), torch.zeros(shape))


def test_the_model_is_left_as_it_was(vae: Any) -> None:
    vae.clear_cache()
    before = state(vae)
    decode_to_tensor(vae, make_latents(vae, 3))
    encode_latents(vae, keyframe_chunks({0: torch.rand(1, 3, 32, 32)}, 9))
    next(decode_frames(vae, make_latents(vae, 3)))
    assert state(vae) == before


def test_no_autograd_graph_is_built_and_the_mode_is_not_leaked() -> None:
    vae = make_vae("2.1").requires_grad_(True)
    walk = decode_frames(vae, make_latents(vae, 2))
    assert not next(walk).requires_grad
    assert torch.is_grad_enabled()
    assert not encode_latents(vae, [torch.zeros(1, 3, 1, 16, 16)]).requires_grad


@pytest.mark.parametrize("where", [decode_frames, decode_to_tensor])
def test_check_runs_before_each_latent_frame_and_stops_the_work(
    vae: Any, where: Callable[..., Any]
) -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in where(vae, make_latents(vae, 5), check=check):
            pass
    assert len(calls) == 3


# Memory


def traced_peak(work: Callable[[], object]) -> int:
    gc.collect()
    with TracedMemory() as traced:
        work()
    assert traced.ops > 100
    return traced.peak_bytes


@VERSIONS
def test_decoding_needs_the_same_memory_at_17_and_at_81_frames(version: str) -> None:
    vae = make_vae(version)

    def peak(latent_frames: int) -> int:
        latents = make_latents(vae, latent_frames)
        decoder = StreamingDecoder(vae, latents)
        out = torch.empty(output_shape(vae, latents))
        return traced_peak(lambda: decode_into(decoder, out))

    short, long = peak(5), peak(21)
    *_, chunk = decode_frames(vae, make_latents(vae, 2))
    assert 0 <= long - short < chunk.nbytes
    whole = make_latents(vae, 21)
    assert long < traced_peak(lambda: vae.decode(whole)) / 2


@VERSIONS
def test_decoding_into_a_new_tensor_adds_only_that_tensor(version: str) -> None:
    vae = make_vae(version)
    latents = make_latents(vae, 17)
    out = torch.empty(output_shape(vae, latents))
    given = traced_peak(lambda: decode_to_tensor(vae, latents, out=out))
    assert traced_peak(lambda: decode_to_tensor(vae, latents)) == given + out.nbytes


@VERSIONS
def test_encoding_needs_the_same_memory_at_17_and_at_81_frames(version: str) -> None:
    vae = make_vae(version)
    image = torch.rand(1, 3, 32, 48)

    def peak(frames: int) -> int:
        # Clones, because the blank chunks are one tensor and keeping them would cost nothing.
        chunks = keyframe_chunks({0: image, frames - 1: image}, frames)
        return traced_peak(lambda: encode_latents(vae, (chunk.clone() for chunk in chunks)))

    short, long = peak(17), peak(81)
    latent_frame = 2 * vae.config.z_dim * (32 * 48 // vae.config.scale_factor_spatial**2) * 4
    # The moments (2 z channels) of 16 more latent frames: the output, twice while it is joined.
    assert 0 <= long - short - 16 * latent_frame <= 2 * 16 * latent_frame
    assert short < traced_peak(lambda: vae.encode(torch.zeros(1, 3, 17, 32, 48)))


# Failure, retry, threads


class Injected(RuntimeError):
    pass


@pytest.fixture
def failing_conv() -> Iterator[Callable[[Any, int, int], None]]:
    """Make the n-th convolution of a half raise, when it runs for the k-th time from now."""
    handles: list[Any] = []

    def arm(half: Any, conv: int, run: int) -> None:
        convs = [m for m in half.modules() if type(m).__name__ == "WanCausalConv3d"]
        count = 0

        def hook(module: Any, args: Any) -> None:
            nonlocal count
            count += 1
            if count == run:
                raise Injected

        handles.append(convs[conv % len(convs)].register_forward_pre_hook(hook))

    yield arm
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("version", "conv", "run"), pairs(("2.1", "2.2"), (0, 3, -2, -1), (1, 2, 4))
)
def test_a_failed_decode_goes_on_with_the_right_bits(
    version: str, conv: int, run: int, failing_conv: Any
) -> None:
    vae = make_vae(version)
    latents = make_latents(vae, 5)
    wanted = decode_to_tensor(vae, latents)
    before = state(vae)
    decoder = StreamingDecoder(vae, latents)
    out = torch.full(output_shape(vae, latents), float("nan"))
    failing_conv(vae.decoder, conv, run)
    with pytest.raises(Injected):
        decode_into(decoder, out)
    assert 0 < run - decoder.position <= 2  # (a convolution of an upsampler rests on frame 0)
    done = decoder.frames_done
    assert torch.equal(out[:, :done], wanted[:, :done])
    assert state(vae) == before
    assert torch.equal(decode_into(decoder, out), wanted)


def test_a_retry_repeats_no_more_than_it_says(failing_conv: Any) -> None:
    vae = make_vae("2.1")
    latents = make_latents(vae, 6)
    decoder = StreamingDecoder(vae, latents)
    failing_conv(vae.decoder, -1, 4)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    vae.decoder.register_forward_pre_hook(count)
    with pytest.raises(Injected):
        decode_into(decoder, torch.empty(output_shape(vae, latents)))
    assert (decoder.position, runs) == (3, 4)
    decoder.decode_next()
    assert runs == 4 + 3 + 1


def test_a_replay_that_is_interrupted_or_fails_can_go_on(failing_conv: Any) -> None:
    vae = make_vae("2.2")
    latents = make_latents(vae, 5)
    wanted = list(decode_frames(vae, latents))
    decoder = StreamingDecoder(vae, latents)
    failing_conv(vae.decoder, -1, 4)
    failing_conv(vae.decoder, -1, 5)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt

    got: list[Tensor] = []
    errors: list[type[BaseException]] = []
    while not decoder.done:
        try:
            got.append(decoder.decode_next(check=check))
        except (Injected, KeyboardInterrupt) as err:
            errors.append(type(err))
    # Frame 3 fails; so does frame 1 of the first replay; the check stops the second one.
    assert errors == [Injected, Injected, KeyboardInterrupt]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_chunk_that_is_taken_back_is_made_once_more() -> None:
    vae = make_vae("2.1")
    wanted = list(decode_frames(vae, latents := make_latents(vae, 4)))
    for index, chunk in enumerate(wanted):
        decoder = StreamingDecoder(vae, latents)
        for _ in range(index + 1):
            last = decoder.decode_next()
        decoder.take_back(last)
        assert (decoder.position, decoder.frames_done) == (index, 4 * index - 3 * (index > 0))
        rest = [decoder.decode_next() for _ in wanted[index:]]
        assert all(map(torch.equal, rest, wanted[index:])) and torch.equal(rest[0], chunk)


@VERSIONS
@pytest.mark.parametrize("end", ["fails", "closed", "finished"])
def test_nothing_is_alive_after_a_decode(version: str, end: str, failing_conv: Any) -> None:
    vae = make_vae(version)
    latents = make_latents(vae, 3)
    gc.collect()
    gc.disable()  # what only the collector would free is not freed
    try:
        with TracedMemory() as traced:
            walk = decode_frames(vae, latents)
            if end == "fails":
                failing_conv(vae.decoder, -2, 2)
                with pytest.raises(Injected):
                    list(walk)
            elif end == "closed":
                next(walk)
                next(walk)
                assert traced.live_bytes > 0
                walk.close()  # type: ignore[attr-defined]
            else:
                for _ in walk:
                    pass
                _ = None
        if end == "fails":
            gc.collect()  # the traceback pytest keeps is a cycle
        assert traced.live_bytes == 0
    finally:
        gc.enable()


def test_the_cache_is_gone_while_the_error_is_still_held(failing_conv: Any) -> None:
    vae = make_vae("2.1")
    cached: list[weakref.ref[Tensor]] = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cached.extend(weakref.ref(t) for t in kwargs["feat_cache"] if isinstance(t, Tensor))

    vae.decoder.register_forward_pre_hook(watch, with_kwargs=True)
    failing_conv(vae.decoder, 0, 3)
    with pytest.raises(Injected) as held:
        decode_to_tensor(vae, make_latents(vae, 4))
    assert held.value is not None and len(cached) > 5
    # Only what the frame of the failed convolution was given as its argument.
    assert sum(ref() is not None for ref in cached) <= 1


@VERSIONS
def test_two_threads_share_one_vae(version: str) -> None:
    vae = make_vae(version)
    latents = [make_latents(vae, 6, seed=seed) for seed in (1, 2)]
    wanted = [decode_to_tensor(vae, z) for z in latents]
    video = [torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)]
    encoded = [encode_latents(vae, keyframe_chunks({0: image}, 17)) for image in video]
    meeting = threading.Barrier(2)
    right = [False, False]

    def work(index: int) -> None:
        frames = decode_to_tensor(vae, latents[index], check=lambda: meeting.wait(30))
        back = encode_latents(
            vae, keyframe_chunks({0: video[index]}, 17), check=lambda: meeting.wait(30)
        )
        right[index] = torch.equal(frames, wanted[index]) and torch.equal(back, encoded[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True, True]


def test_two_decoders_taking_turns(vae: Any) -> None:
    latents = [make_latents(vae, 4, seed=seed) for seed in (1, 2)]
    wanted = [reference_decode(vae, z) for z in latents]
    pairs = list(zip(*(decode_frames(vae, z) for z in latents), strict=True))
    for index in range(2):
        assert torch.equal(torch.cat([pair[index] for pair in pairs], dim=2), wanted[index])


def test_an_offload_hook_of_decode_acts(vae: Any) -> None:
    from accelerate import cpu_offload, cpu_offload_with_hook

    latents, image = make_latents(vae, 3), torch.rand(1, 3, 32, 32)
    wanted = decode_to_tensor(vae, latents)
    encoded = encode_latents(vae, keyframe_chunks({0: image}, 9))
    _, hook = cpu_offload_with_hook(vae, torch.device("cpu"))
    calls: list[int] = []
    pre_forward = vae._hf_hook.pre_forward
    vae._hf_hook.pre_forward = lambda *args: (calls.append(1), pre_forward(*args))[1]
    assert torch.equal(decode_to_tensor(vae, latents), wanted) and calls
    calls.clear()
    assert torch.equal(encode_latents(vae, keyframe_chunks({0: image}, 9)), encoded) and calls
    hook.remove()
    cpu_offload(vae, torch.device("cpu"))  # weights on meta, brought in layer by layer
    assert vae.decoder.conv_in.weight.device.type == "meta"
    assert torch.equal(decode_to_tensor(vae, latents), wanted)
    assert torch.equal(encode_latents(vae, keyframe_chunks({0: image}, 9)), encoded)


# Encoding


def chunks_of(video: Tensor) -> Iterator[Tensor]:
    yield video[:, :, :1]
    for start in range(1, video.shape[2], 4):
        yield video[:, :, start : start + 4]


@VERSIONS
@DTYPES
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encoding_chunks_is_the_bits_of_encode(
    version: str, dtype: torch.dtype, frames: int
) -> None:
    vae = make_vae(version, dtype)
    torch.manual_seed(frames)
    video = torch.rand(2, 3, frames, 32, 64) * 2 - 1
    wanted = vae.encode(video.to(dtype)).latent_dist.mode()
    latents = encode_latents(vae, chunks_of(video))
    assert latents.dtype == dtype and wanted.abs().max() > 0
    assert torch.equal(latents, wanted)


@VERSIONS
@DTYPES
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frames", [5, 13])
def test_conditioning_video_is_that_of_the_pipeline(
    version: str, dtype: torch.dtype, last: bool, frames: int
) -> None:
    vae = make_vae(version, dtype)
    torch.manual_seed(3)
    image, last_image = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    blank = image.new_zeros(1, 3, frames - 1 - last, 32, 32)
    parts = [image.unsqueeze(2), blank] + ([last_image.unsqueeze(2)] if last else [])
    video = torch.cat(parts, dim=2)
    given = list(keyframe_chunks({0: image} | ({frames - 1: last_image} if last else {}), frames))
    assert torch.equal(torch.cat(given, dim=2), video)
    assert torch.equal(encode_latents(vae, given), vae.encode(video.to(dtype)).latent_dist.mode())


def test_a_single_frame_is_the_image(vae: Any) -> None:
    image = torch.rand(1, 3, 32, 32)
    wanted = vae.encode(image.unsqueeze(2)).latent_dist.mode()
    assert torch.equal(encode_latents(vae, keyframe_chunks({0: image}, 1)), wanted)


@pytest.mark.parametrize("lengths", [[], [4], [1, 1], [1, 4, 3], [1, 5]])
def test_chunks_of_a_wrong_length_are_refused(lengths: list[int]) -> None:
    video = (torch.zeros(1, 3, length, 16, 16) for length in lengths)
    with pytest.raises(InvalidRequest, match="video to encode"):
        encode_latents(make_vae("2.1"), video)


def test_a_failed_encode_leaves_nothing_and_can_be_repeated(vae: Any, failing_conv: Any) -> None:
    image = torch.rand(1, 3, 32, 32)
    wanted = encode_latents(vae, keyframe_chunks({0: image}, 9))
    before = state(vae)
    failing_conv(vae.encoder, -2, 2)
    with TracedMemory() as traced:
        with pytest.raises(Injected):
            encode_latents(vae, keyframe_chunks({0: image}, 9))
        gc.collect()
        assert traced.live_bytes == 0
    assert state(vae) == before
    assert torch.equal(encode_latents(vae, keyframe_chunks({0: image}, 9)), wanted)


# Latent statistics


@VERSIONS
@DTYPES
def test_statistics_are_the_operations_of_the_pipelines(version: str, dtype: torch.dtype) -> None:
    vae = make_vae(version)
    latents = make_latents(vae, 3, batch=2).to(dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    assert torch.equal(denormalize_latents(latents, vae.config), latents / std + mean)
    assert torch.equal(normalize_latents(latents, vae.config), (latents - mean) * std)
    back = normalize_latents(denormalize_latents(latents, vae.config), vae.config)
    assert back.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(back.float(), latents.float(), atol=tolerance)


# The measure itself


def test_traced_memory_counts_storages_once_and_until_they_die() -> None:
    outside = torch.zeros(1000)
    with TracedMemory() as traced:
        first = outside + 1
        views = [first.view(10, 100), first[5:], outside[3:], outside.add_(1)]
        assert traced.live_bytes == 4000
        del first
        assert traced.live_bytes == 4000
        del views
        assert traced.live_bytes == 0
        second = (outside + 1) * 2
        assert (traced.live_bytes, traced.peak_bytes) == (4000, 8000)
        traced.reset_peak()
        assert traced.peak_bytes == 4000
        del second
    assert traced.live_bytes == 0


@pytest.mark.parametrize("way", ["whole", "hooked", "hooked inside", "in groups"])
def test_the_device_to_compute_on_with_every_diffusers(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers has a function for it since 0.41; before, its answer is found without."""
    from diffusers.hooks import group_offloading
    from diffusers.utils import torch_utils

    from wan_core.sampling import vae as module

    vae = make_vae("2.1")
    if way.startswith("hooked"):
        owner = vae if way == "hooked" else vae.decoder.conv_in
        owner._hf_hook = SimpleNamespace(execution_device="meta")
    elif way == "in groups":
        there = SimpleNamespace(config=SimpleNamespace(onload_device=torch.device("meta")))
        monkeypatch.setattr(
            group_offloading, "_get_top_level_group_offload_hook", lambda module: there
        )
    expected = torch.device("cpu" if way == "whole" else "meta")
    assert torch.device(module._execution_device(vae)) == expected
    monkeypatch.delattr(torch_utils, "get_module_execution_device", raising=False)
    assert torch.device(module._execution_device(vae)) == expected
