"""The time model: against reported runs within its stated factor, and in what it compares."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.machines import architecture, cpu, gpu

from wan_core.config import GIB
from wan_core.memory.calibration import Calibration
from wan_core.memory.choices import Choices, Workload
from wan_core.models import (
    PARTS,
    ModelArchitecture,
    all_blocks,
    experts_of,
    magcache_curve,
    magcache_plan,
)
from wan_core.models.sizes import part_bytes
from wan_core.models.stored import StoredSize, StoredSizes
from wan_core.plan import timing as constants
from wan_core.plan.stage_seconds import _RATES, PAGEABLE, device_rate
from wan_core.plan.timing import (
    blocks_that_hide_the_bus,
    forward_operations,
    passes_of,
    reads_from_disk,
    stream_seconds,
    timing,
    windows_per_step,
)

JOB = Workload(width=832, height=480, num_frames=81)
BF16 = Choices(dtypes=dict.fromkeys(PARTS, "bf16"))
T2V = architecture("wan2.1-t2v-14b")
H100 = gpu(80, compute_capability=(9, 0), multiprocessors=132, pcie_generation=5)


@pytest.mark.parametrize(
    ("name", "width", "height", "frames", "tera"),
    [
        ("wan2.1-t2v-14b", 832, 480, 81, 1678),
        ("wan2.1-t2v-14b", 1280, 720, 81, 6523),
        ("wan2.2-ti2v-5b", 1280, 704, 121, 517),
        ("wan2.1-t2v-1.3b", 832, 480, 81, 283),
    ],
)
def test_operations_of_one_forward(
    name: str, width: int, height: int, frames: int, tera: float
) -> None:
    job = Workload(width=width, height=height, num_frames=frames)
    counted = forward_operations(architecture(name), job, BF16)
    assert counted == pytest.approx(tera * 1e12, rel=0.02)


def test_a_vace_block_is_a_block_and_a_projection() -> None:
    """Six square matrices (keys and values of the text are few tokens' work), the projection to the
    hint, the two of the feed-forward, and attention to all tokens and to 512 of the text."""
    found = architecture("wan2.1-vace-1.3b")
    shape, tokens = found.transformer, 21 * 30 * 52
    more, less = (
        forward_operations(
            replace(found, transformer=replace(shape, vace_layers=layers)), JOB, BF16
        )
        for layers in ((0, 2), (0,))
    )
    weights = 7 * shape.dim**2 + 2 * shape.dim * shape.ffn_dim
    expected = 2 * tokens * weights + 4 * tokens * (tokens + 512) * shape.dim
    assert more - less == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_magcache_computes_its_share_of_the_passes(factor: float) -> None:
    """Two passes in each of 50 steps, of which the curve leaves some out; by its own count."""
    small, job = architecture("wan2.1-t2v-1.3b"), replace(JOB, steps=50)
    curve = magcache_curve("wan2.1-t2v-1.3b", 832, 480, False)
    assert curve is not None
    skips = magcache_plan(curve, 50, 50, factor)[1]
    share = 1 - sum(skip for pair in skips for skip in pair) / 100
    assert 0.3 < share < 0.9
    cached = timing(small, job, replace(BF16, magcache=factor), H100).step
    assert cached == pytest.approx(share * timing(small, job, BF16, H100).step)


def test_face_adapters_are_counted_as_torch_counts_them() -> None:
    """But for the few tokens of a face, which are the same in every step."""
    import torch
    from diffusers.models.transformers import transformer_wan_animate as theirs
    from torch.utils.flop_counter import FlopCounterMode

    found = architecture("wan2.2-animate-14b")
    shape, job = found.transformer, Workload(width=832, height=480, num_frames=77, references=1)
    assert shape.face is not None
    with torch.device("meta"):
        adapter = theirs.WanAnimateFaceBlockCrossAttention(
            shape.dim, shape.heads, shape.dim // shape.heads,
            cross_attention_dim_head=shape.dim // shape.heads,
        )  # fmt: skip
        hidden = torch.empty(1, 21 * 30 * 52, shape.dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        adapter(hidden, torch.empty(1, 21, 5, shape.dim, device="meta"))
    fewer = replace(found, transformer=replace(shape, face=replace(shape.face, adapters=7)))
    more, less = (forward_operations(one, job, BF16) for one in (found, fewer))
    assert more - less == pytest.approx(counter.get_total_flops(), rel=0.01)
    # They are 1.5 % of a forward at this size.
    none = replace(found, transformer=replace(shape, face=None))
    assert more / forward_operations(none, job, BF16) == pytest.approx(1.015, abs=0.002)


def test_a_camera_s_layers_are_counted_as_torch_counts_them() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from wan_core.forward.fun import camera_tokens
    from wan_core.loading.blueprint import add_fun_layers

    found, module = architecture("wan2.1-fun-camera-1.3b"), torch.nn.Module()
    add_fun_layers(module, found.transformer)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        camera_tokens(module.control_adapter, torch.empty(1, 24, 21, 480, 832, device="meta"))
    more, less = (
        forward_operations(found, replace(JOB, camera=given), BF16) for given in (True, False)
    )
    assert more - less == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_reported_runs_within_a_third() -> None:
    unguided = replace(JOB, guidance_high=False, guidance_low=False)
    # One forward on an H100, eager: 3.44 s; two on a 4090D (114 multiprocessors): 30.5 s.
    assert timing(T2V, unguided, BF16, H100).step == pytest.approx(3.44, rel=0.05)
    ada = gpu(24, multiprocessors=114)
    assert timing(T2V, JOB, BF16, ada).step == pytest.approx(30.5, rel=0.33)


def test_guidance_doubles_a_step_of_the_expert_that_has_it() -> None:
    experts = architecture("wan2.2-t2v-a14b")
    steps = [
        timing(experts, replace(JOB, guidance_high=a, guidance_low=b), BF16, H100).step
        for a, b in [(False, False), (True, False), (True, True)]
    ]
    assert steps[1] == pytest.approx(1.5 * steps[0])
    assert steps[2] == pytest.approx(2 * steps[0])


def test_streaming_is_free_where_a_block_computes_longer_than_it_travels() -> None:
    streamed = replace(BF16, offload="model", stream=True, lean=True, resident_blocks=0)
    still = replace(JOB, num_frames=1)
    resident = replace(BF16, offload="model", lean=True)
    assert timing(T2V, JOB, streamed, H100).step == timing(T2V, JOB, resident, H100).step
    slow = timing(T2V, still, streamed, H100).step
    assert slow > 2 * timing(T2V, still, resident, H100).step
    half = replace(streamed, resident_blocks=20)
    assert timing(T2V, still, half, H100).step == pytest.approx(slow / 2)
    alone = replace(streamed, lean=False)  # conditional and unconditional pass fetch apart
    assert timing(T2V, still, alone, H100).step == pytest.approx(2 * slow)
    fp8 = replace(streamed, fp8_storage=True)
    assert timing(T2V, still, fp8, H100).step == pytest.approx(slow / 2, rel=0.02)


def test_resident_blocks_that_hide_the_bus() -> None:
    streamed = replace(BF16, offload="model", stream=True, lean=True)
    assert blocks_that_hide_the_bus(T2V, JOB, streamed, H100) == 0
    still = replace(JOB, num_frames=1)
    count = blocks_that_hide_the_bus(T2V, still, streamed, H100)
    assert 20 < count < 40
    enough = timing(T2V, still, replace(streamed, resident_blocks=count), H100).step
    resident = replace(BF16, offload="model", lean=True)
    assert enough == timing(T2V, still, resident, H100).step


def test_fused_kernels_count_on_cuda_only() -> None:
    """The lean forward is the faster one there; cutting products costs most of that again."""
    ways = [BF16, replace(BF16, lean=True), replace(BF16, lean=True, by_rows=True)]
    plain, lean, rows = (timing(T2V, JOB, way, H100).step for way in ways)
    assert 0.7 * plain < lean < rows < plain
    quick = timing(T2V, JOB, replace(ways[1], attention_8bit=True), H100).step
    assert 0.84 < quick / lean < 0.89  # attention is 0.48 of the operations of 480p81
    plain, lean, rows = (timing(T2V, JOB, way, cpu(64)).step for way in ways)
    assert plain == lean < rows


@pytest.mark.parametrize(
    ("high", "low", "share"),
    [
        ("fp8", "fp8 scaled per tensor", 1),
        ("fp8", "bf16", 1 / 2),
        ("GGUF Q8_0", "int8 scaled per row", 1 / 2),
        ("fp8 e5m2", "bf16", 0),
    ],
)
def test_products_in_8_bit_count_for_the_expert_that_has_them(
    high: str, low: str, share: float
) -> None:
    pair = stored_as(architecture("wan2.2-t2v-a14b"), high, low)
    lean = replace(BF16, lean=True)
    slow, quick = (
        timing(pair, JOB, replace(lean, eight_bit=on), H100).step for on in (False, True)
    )
    assert quick / slow == pytest.approx(1 - share * (1 - constants._EIGHT_BIT_COST))
    # What fp8 storage makes of plain files is multiplied so too.
    stored = replace(lean, fp8_storage=True)
    slow, quick = (
        timing(pair, JOB, replace(stored, eight_bit=on), H100).step for on in (False, True)
    )
    share += (low == "bf16") / 2
    assert quick / slow == pytest.approx(1 - share * (1 - constants._EIGHT_BIT_COST))


def stored_as(pair: ModelArchitecture, *kinds: str) -> ModelArchitecture:
    parts = {
        name: replace(pair.components["transformer"], stored_as=kind)
        for name, kind in zip(experts_of(pair), kinds, strict=True)
    }
    return replace(pair, components={**pair.components, **parts})


def test_of_a_pair_each_expert_is_copied_as_it_is_stored() -> None:
    """The mean of two pairs whose experts are alike is the pair with one of each."""
    pair = architecture("wan2.2-t2v-a14b")
    streamed = replace(BF16, offload="model", stream=True, lean=True)
    big, small = (
        StoredSizes(
            blocks=(StoredSize(kept=each),) * 40,
            rest=StoredSize(kept=each),
            tables=StoredSize(),
            largest=1,
        )
        for each in (700_000_000, 350_000_000)
    )
    steps = {}
    for sizes in ((big, big), (small, small), (big, small)):
        parts = {
            name: replace(pair.components["transformer"], stored=stored)
            for name, stored in zip(experts_of(pair), sizes, strict=True)
        }
        found = replace(pair, components={**pair.components, **parts})
        still = replace(JOB, num_frames=1)
        steps[sizes] = timing(found, still, streamed, H100).step
    assert steps[big, small] == pytest.approx((steps[big, big] + steps[small, small]) / 2)
    assert steps[big, big] > 1.5 * steps[small, small]


def test_every_window_fetches_the_streamed_blocks_again() -> None:
    streamed = replace(BF16, offload="model", stream=True, lean=True, window_frames=17)
    long = replace(JOB, num_frames=401)
    slow_bus = replace(H100, pcie_generation=3, pcie_width=8)
    one = stream_seconds(T2V, JOB, replace(streamed, window_frames=None), slow_bus, 2)
    assert windows_per_step(T2V, long, streamed) == 97
    assert stream_seconds(T2V, long, streamed, slow_bus, 2) == pytest.approx(97 * one)
    assert blocks_that_hide_the_bus(T2V, long, streamed, slow_bus) > 20
    by_layer = replace(BF16, offload="sequential", window_frames=17)
    assert timing(T2V, long, by_layer, H100).step > 97 * 40 * 14 * 1e-3


def test_layer_by_layer_is_the_slowest() -> None:
    steps = [timing(T2V, JOB, replace(BF16, offload=o), H100).step for o in ("none", "sequential")]
    assert steps[1] > 1.3 * steps[0]


def test_windows_cost_their_overlap() -> None:
    long = replace(JOB, num_frames=241)
    whole = forward_operations(T2V, long, BF16)
    windowed = forward_operations(T2V, replace(long, window_frames=81), BF16)
    one = forward_operations(T2V, JOB, BF16)
    assert windowed == pytest.approx(4 * one)  # 61 latent frames, 21 at a time, 17 further each
    assert windowed < whole


def test_on_a_cpu_nothing_travels() -> None:
    job = replace(JOB, num_frames=5)
    found = timing(T2V, job, replace(BF16, offload="model"), cpu(64))
    still = timing(T2V, replace(job, steps=0), replace(BF16, offload="model"), cpu(64))
    assert found.total == pytest.approx(found.step * job.steps + still.total)
    longer = replace(job, num_frames=9, steps=0)
    assert timing(T2V, longer, replace(BF16, offload="model"), cpu(64)).total > still.total


# ------------------------------------------------------------- constants, pinned to their origin

# Published steps on one card, guided unless it says otherwise: seconds per step, model and size.
# H100: one forward, huggingface/diffusers issue 11605. 4090D: LightX2V's README (diffusers' row).
# A100: 785.7 s for 40 steps, Wan2.2's assets/comp_effic.png. 5090: 3182 s for 50 steps without
# offload, TurboDiffusion's assets/acceleration_decomposition.png. 4090: 534 s for 50 steps of the
# 5B, Wan2.2's README.
PUBLISHED = {
    "H100": ("wan2.1-t2v-14b", (832, 480, 81), (9, 0), 132, False, 4.6),
    "A100": ("wan2.2-t2v-a14b", (832, 480, 81), (8, 0), 108, True, 785.7 / 40),
    "RTX 4090D": ("wan2.1-t2v-14b", (832, 480, 81), (8, 9), 114, True, 30.5),
    "RTX 4090": ("wan2.2-ti2v-5b", (1280, 704, 121), (8, 9), 128, True, 534 / 50),
    "RTX 5090": ("wan2.1-t2v-14b", (1280, 720, 81), (12, 0), 170, True, 3182 / 50),
}


@pytest.mark.parametrize("card", PUBLISHED)
def test_published_steps(card: str) -> None:
    name, (width, height, frames), capability, count, guided, seconds = PUBLISHED[card]
    job = Workload(
        width=width, height=height, num_frames=frames, guidance_high=guided, guidance_low=guided
    )
    system = gpu(80, compute_capability=capability, multiprocessors=count)
    found = timing(architecture(name), job, BF16, system).step
    assert 1 / 1.4 < found / seconds < 1.4


# Dense half-precision tera-operations per second with float32 sums, and multiprocessors, from
# NVIDIA's white papers (Turing: with half-precision sums, which are twice as fast there).
WHITE_PAPERS = {
    (7, 5): (113.8, 68), (8, 0): (312, 108), (8, 6): (71, 82), (8, 9): (165.2, 128),
    (9, 0): (989, 132), (10, 0): (2250, 148), (12, 0): (209.5, 170),
}  # fmt: skip


@pytest.mark.parametrize("capability", WHITE_PAPERS)
def test_peaks_are_those_of_the_white_papers(capability: tuple[int, int]) -> None:
    assert set(_RATES) == set(WHITE_PAPERS)
    tera, count = WHITE_PAPERS[capability]
    per_clock, clock, share = _RATES[capability]
    assert count * per_clock * clock == pytest.approx(tera * 1e12, rel=0.09)
    # No forward is faster than its card, and none in eager PyTorch half as slow again as the
    # slowest that was published. Turing sums in float32 at half its rate; a B200 is not kept busier
    # than an H100.
    assert 0.3 <= share <= 0.85
    if capability in ((7, 5), (10, 0)):
        assert share <= (0.5 if capability == (7, 5) else _RATES[9, 0][2])


def test_a_card_between_two_known_ones_counts_as_the_older() -> None:
    for capability, known in (((8, 7), (8, 6)), ((11, 0), (10, 0)), ((6, 1), (7, 5))):
        rates = [
            device_rate(gpu(8, compute_capability=found, multiprocessors=10), "bf16")
            for found in (capability, known)
        ]
        assert rates[0] == rates[1]


def test_what_was_assumed_and_what_was_measured() -> None:
    """Numbers that nothing published holds: each is what its documentation says it is."""
    assert device_rate(gpu(8, compute_capability=None), "bf16") == 3e13
    assert device_rate(gpu(8, multiprocessors=None), "bf16") == 3e13
    assert device_rate(cpu(64), "fp32") == 4 * 3e10  # four cores; fp32 is what a CPU is fast in
    assert device_rate(H100, "fp32") == device_rate(H100, "bf16") / 4
    # 26.8 GB/s from pageable memory on an H200 behind PCIe 5 x16 (dequantise_h200.json).
    assert H100.bus_bytes_per_second * PAGEABLE == pytest.approx(26.8e9, rel=0.1)
    # 16 to 25 ms a pass of 1.6 s (the same file).
    assert 1.01 <= constants._CAST_COST <= 1.03


# ----------------------------------------------------------------------------------- what adds up


def test_rows_and_casts_cost_compute_and_pace_corrects_it() -> None:
    plain = timing(T2V, JOB, BF16, H100).step
    rows = timing(T2V, JOB, replace(BF16, lean=True, by_rows=True), H100).step
    assert rows == pytest.approx(0.91 * plain)  # speed_h200_forward.md
    assert timing(T2V, JOB, replace(BF16, fp8_storage=True), H100).step / plain == pytest.approx(
        constants._CAST_COST
    )
    slow = replace(H100, calibration=Calibration(pace=1.7, runs=3))
    assert timing(T2V, JOB, BF16, slow).step == pytest.approx(1.7 * plain)


def test_a_step_is_bound_by_compute_or_by_the_bus() -> None:
    streamed = replace(BF16, offload="model", stream=True, lean=True, resident_blocks=0)
    still, slow = replace(JOB, num_frames=1), replace(H100, pcie_generation=3, pcie_width=4)
    assert timing(T2V, JOB, BF16, H100).compute_bound
    assert timing(T2V, JOB, streamed, H100).compute_bound
    assert not timing(T2V, still, streamed, slow).compute_bound
    assert not timing(T2V, JOB, replace(streamed, stream_buffers=1), H100).compute_bound
    for guided in (True, False):
        job = replace(JOB, guidance_high=guided, guidance_low=False)
        assert timing(architecture("wan2.2-t2v-a14b"), job, BF16, H100).compute_bound
        arriving = stream_seconds(T2V, job, streamed, H100, 1)
        alone = timing(T2V, job, replace(BF16, lean=True), H100).step
        assert timing(T2V, job, replace(streamed, stream_buffers=1), H100).step == pytest.approx(
            alone + arriving
        )


def test_layer_by_layer_is_compute_copies_and_hooks() -> None:
    by_layer = replace(BF16, offload="sequential")
    for guided in (True, False):
        job = replace(JOB, guidance_high=guided, guidance_low=guided)
        passes = 2 if guided else 1
        copy = part_bytes(T2V, "transformer", "bf16") / (H100.bus_bytes_per_second / 2)
        hooks = 40 * 14 * 1e-3
        expected = timing(T2V, job, BF16, H100).step + passes * (copy + hooks)
        assert timing(T2V, job, by_layer, H100).step == pytest.approx(expected)


def test_weights_that_ram_cannot_hold_come_from_the_disk() -> None:
    streamed = replace(BF16, offload="model", stream=True, lean=True, resident_blocks=0)
    nbytes = sum(all_blocks(T2V, "transformer", "bf16"))
    growth = H100.process_ram(("denoise",)) - (H100.held_bytes or 0)
    exactly = replace(H100, ram_available_bytes=nbytes + growth - GIB, ram_evictable_bytes=GIB)
    assert not reads_from_disk(T2V, streamed, exactly)
    short = replace(exactly, ram_evictable_bytes=GIB - 1)
    assert reads_from_disk(T2V, streamed, short)
    assert not reads_from_disk(T2V, replace(streamed, fp8_storage=True), short)
    # What stays on the card need not stay in the file's cache; by layer, everything moves.
    assert not reads_from_disk(T2V, replace(streamed, resident_blocks=1), short)
    by_layer = replace(streamed, offload="sequential", stream=False, resident_blocks=1)
    assert reads_from_disk(T2V, by_layer, exactly)
    ratio = stream_seconds(T2V, JOB, streamed, short, 1) / stream_seconds(
        T2V, JOB, streamed, exactly, 1
    )
    assert ratio == pytest.approx(H100.bus_bytes_per_second / 1.5e9)
    # A bus that is slower than the disk stays the limit.
    narrow = replace(short, pcie_generation=1, pcie_width=1)
    assert stream_seconds(T2V, JOB, streamed, narrow, 1) == pytest.approx(
        stream_seconds(T2V, JOB, streamed, replace(narrow, ram_available_bytes=nbytes + growth), 1)
    )


def test_a_slow_card_needs_fewer_resident_blocks() -> None:
    """The transfers may take half of the compute's time, by the pace that was measured."""
    streamed = replace(BF16, offload="model", stream=True, lean=True)
    still = replace(JOB, num_frames=1)
    for passes, job in ((2, still), (1, replace(still, guidance_high=False, guidance_low=False))):
        compute = timing(T2V, job, BF16, H100).step
        for pace in (1.0, 1.5):
            system = replace(H100, calibration=Calibration(pace=pace, runs=3))
            count = blocks_that_hide_the_bus(T2V, job, streamed, system)
            none, enough = (
                stream_seconds(T2V, job, replace(streamed, resident_blocks=n), system, passes)
                for n in (count - 1, count)
            )
            assert enough <= pace * compute / 2 < none
    pair = architecture("wan2.2-t2v-a14b")
    low = replace(still, guidance_high=True, guidance_low=False)
    both = blocks_that_hide_the_bus(pair, still, streamed, H100)
    assert blocks_that_hide_the_bus(pair, low, streamed, H100) > both


def test_an_idle_expert_takes_no_part_in_a_step() -> None:
    pair = architecture("wan2.2-t2v-a14b")
    job = replace(JOB, guidance_high=True, guidance_low=False)
    once = timing(pair, replace(JOB, guidance_high=False, guidance_low=False), BF16, H100).step
    for idle, passes in (((), 1.5), (("transformer",), 1), (("transformer_2",), 2)):
        found = timing(pair, replace(job, idle=idle), BF16, H100)
        assert found.step == pytest.approx(passes * once)
        assert found.compute_bound
    # Where neither has a step, the first stands for both.
    assert passes_of(pair, replace(job, idle=("transformer", "transformer_2"))) == {
        "transformer": 2
    }
