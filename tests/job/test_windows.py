"""windows: schedules, overlaps and fusion weights, checked exhaustively."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
from support.blending import normalised

from wan_core.errors import InvalidRequest
from wan_core.job.windows import (
    FUSIONS,
    SCHEDULES,
    Window,
    WindowPlan,
    filling_overlap,
    halving,
    latent_frames,
    plan_windows,
    round_up_frames,
    video_frames,
    video_range,
)

LONGEST = 300
PAIRS = tuple(itertools.product(SCHEDULES, FUSIONS))
WINDOWS = (1, 2, 3, 5, 8, 13, 21, 33)


def overlaps_of(window: int) -> list[int]:
    """Every overlap to half a window (beyond it each frame is computed more than twice).

    Of windows longer than Wan's 21 every fourth: theirs are the same shapes, longer.
    """
    return list(range(0, min(window // 2, window - 1) + 1, 1 if window <= 21 else 4))


def deep_overlaps_of(window: int) -> list[int]:
    """Overlaps where three and more windows meet, to the largest there is."""
    return sorted({window // 2 + 1, 2 * window // 3, window - 2, window - 1} & set(range(window)))


def plan_for(total: int, window: int, overlap: int, schedule: str, fusion: str) -> WindowPlan:
    return plan_windows(total, video_frames(window), 4 * overlap, schedule, fusion)


def dense(plan: WindowPlan, windows: tuple[Window, ...]) -> np.ndarray:
    """Raw weights as (windows, clip frames), zero where a window does not look."""
    out = np.zeros((len(windows), plan.total))
    for row, window in zip(out, windows, strict=True):
        row[list(window.indices)] = window.weights
    return out


def matrix(plan: WindowPlan, step: int) -> np.ndarray:
    return dense(plan, plan.windows(step))


def largest_jump(weights: np.ndarray, closed: bool = False) -> float:
    """The most a frame can differ from the one before when windows disagree by 1.

    The worst disagreement is 1 in the windows whose share grows there and 0 in the others: half
    the sum of absolute changes.
    """
    shares = weights / weights.sum(axis=0)
    if closed:
        shares = np.concatenate([shares, shares[:, :1]], axis=1)
    if shares.shape[1] < 2:
        return 0.0
    return float(np.abs(np.diff(shares, axis=1)).sum(axis=0).max() / 2)


# --- frames ---------------------------------------------------------------------------------


def test_frame_arithmetic() -> None:
    assert [latent_frames(n) for n in (1, 2, 4, 5, 8, 9, 80, 81)] == [1, 1, 1, 2, 2, 3, 20, 21]
    assert [round_up_frames(n) for n in (1, 2, 5, 6, 16, 80, 81)] == [1, 5, 5, 9, 17, 81, 81]
    for latents in range(1, LONGEST):
        assert latent_frames(video_frames(latents)) == latents
        assert round_up_frames(video_frames(latents)) == video_frames(latents)


def test_video_ranges_tile_the_clip() -> None:
    frames = list(itertools.chain.from_iterable(video_range(i) for i in range(21)))
    assert frames == list(range(81))


def test_halving_visits_every_place_evenly() -> None:
    assert [halving(i) for i in range(5)] == [0.0, 0.5, 0.25, 0.75, 0.125]
    for power in range(1, 9):
        run = sorted(halving(i) for i in range(2**power))
        assert run == [i / 2**power for i in range(2**power)]


def test_defaults_are_81_frames_and_16_of_overlap() -> None:
    plan = plan_windows(latent_frames(161))
    assert (plan.window, plan.overlap, plan.total) == (21, 4, 41)
    assert plan.notes == ()
    assert plan.starts() == (0, 17, 20)
    assert "3 windows of 81 frames" in plan.describe()
    assert "1.54x" in plan.describe()


def test_rounding_is_reported() -> None:
    plan = plan_windows(50, 80, 15)
    assert (plan.window, plan.overlap) == (21, 4)
    assert any("80 -> 81" in note for note in plan.notes)
    assert any("15 -> 16" in note for note in plan.notes)


def test_short_window_gets_half_of_itself_as_overlap() -> None:
    plan = plan_windows(latent_frames(17), window=4)
    assert (plan.window, plan.overlap) == (2, 1)


def test_an_overlap_as_long_as_the_window_becomes_half_of_it_and_says_so() -> None:
    plan = plan_windows(50, 17, 20)
    assert (plan.window, plan.overlap) == (5, 2)
    assert plan.notes == ("overlap 20 does not fit a window of 17 frames; 8 is used",)
    assert plan_windows(50, 17, 16).overlap == 4
    assert plan_windows(50, 1, 16).overlap == 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"total_latent_frames": 0}, "num_frames"),
        ({"window": 0}, "window"),
        ({"overlap": -1}, "overlap"),
        ({"schedule": "zigzag"}, "schedule"),
        ({"fusion": "linear"}, "fusion"),
    ],
)
def test_what_is_not_allowed_is_named(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        plan_windows(**{"total_latent_frames": 50, **arguments})  # type: ignore[arg-type]
    assert caught.value.field == name


# --- every plan -----------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_plan_covers_the_clip_and_bounds_the_jump(schedule: str, apart: int) -> None:
    """Ramps over all lengths, windows, overlaps and several steps; P2, P6 and the seams."""
    for window in WINDOWS:
        for overlap in overlaps_of(window):
            # A seventh of the lengths for each overlap, every length for some.
            for total in range(1 + overlap % apart, LONGEST + 1, apart):
                # Another step for each length, so that all eight meet every window and overlap.
                check_plan(plan_for(total, window, overlap, schedule, "ramp"), total % 8)
        for overlap in deep_overlaps_of(window):
            for total in range(1, LONGEST + 1, 37):
                check_plan(plan_for(total, window, overlap, schedule, "ramp"), total % 8)
    for total in range(1, LONGEST + 1, apart):
        for step in range(8):
            check_plan(plan_for(total, 21, 4, schedule, "ramp"), step)


def check_plan(plan: WindowPlan, step: int) -> None:
    windows = plan.windows(step)
    indices = np.array([w.indices for w in windows])
    weights = np.array([w.weights for w in windows])
    assert indices.shape == weights.shape == (plan.count, plan.window), (plan, step)
    assert indices.min() >= 0 and indices.max() < plan.total, (plan, step)
    bound = 1 / (plan.overlap + 1)
    covered = np.bincount(indices.ravel(), weights.ravel(), minlength=plan.total)
    # The ramps telescope: their raw sum is one already, so above 1/(O+1) everywhere.
    assert covered.min() >= bound and abs(covered - 1).max() < 1e-12, (plan, step)
    assert weights.min() >= 0, (plan, step)
    if plan.count > 1:
        assert jump_of(plan, indices, weights) <= bound + 1e-12, (plan, step)
        assert len(plan.seams(step)) == plan.count - (plan.schedule != "looped"), (plan, step)


def jump_of(plan: WindowPlan, indices: np.ndarray, shares: np.ndarray) -> float:
    """``largest_jump`` without a dense matrix: change i belongs between frames i - 1 and i."""
    changes = abs(np.diff(shares, axis=1, prepend=0, append=0))
    places = np.concatenate([indices, indices[:, -1:] + 1], axis=1)
    if plan.schedule == "looped":
        places %= plan.total
    jumps = np.bincount(places.ravel(), changes.ravel()) / 2
    # An open clip has no frame before its first or after its last.
    return float(jumps.max() if plan.schedule == "looped" else jumps[1 : plan.total].max())


def test_causal_gives_a_frame_to_the_first_window_that_sees_it() -> None:
    for total, window, overlap, step in itertools.product((17, 33), (5, 9), (1, 2, 4), range(6)):
        for schedule in ("static", "uniform"):
            plan = plan_for(total, window, overlap, schedule, "causal")
            seen: set[int] = set()
            for made in plan.windows(step):
                assert made.weights == tuple(float(i not in seen) for i in made.indices)
                seen.update(made.indices)
            starts = plan.starts(step)
            assert plan.seams(step) == tuple(start + window for start in starts[:-1])
        looped = plan_for(total, window, overlap, "looped", "causal").windows(step)
        shares = [0.0] * total
        for made in looped:
            for index, weight in zip(made.indices, made.weights, strict=True):
                shares[index] += weight
        assert shares == [1.0] * total


@pytest.mark.parametrize("apart", [7, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fusion", ["pyramid", "flat"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_fusions_cover_every_frame(schedule: str, fusion: str, apart: int) -> None:
    for window, total in itertools.product((1, 2, 5, 9, 21), range(1, LONGEST + 1, apart)):
        for overlap in {0, 1, 4, window // 2} & set(range(window)):
            plan = plan_for(total, window, overlap, schedule, fusion)
            for step in (0, 5) if plan.count > 1 else (0,):
                assert matrix(plan, step).sum(axis=0).min() >= 1.0, (plan, step)


@pytest.mark.parametrize(("schedule", "fusion"), PAIRS)
def test_normalised_weights_are_a_partition_of_unity(schedule: str, fusion: str) -> None:
    for total, window, overlap, step in itertools.product(
        range(1, 90, 3), (2, 5, 21), (0, 1, 4), range(3)
    ):
        if overlap >= window:
            continue
        plan = plan_for(total, window, overlap, schedule, fusion)
        sums = np.zeros(total)
        for win, row in zip(plan.windows(step), normalised(plan, step), strict=True):
            sums[list(win.indices)] += row
        assert abs(sums - 1).max() < 1e-12


def test_indices_run_on_and_only_a_loop_wraps() -> None:
    for schedule in SCHEDULES:
        wrapped = False
        for total, step in itertools.product(range(22, 120), range(6)):
            for window in plan_for(total, 21, 4, schedule, "ramp").windows(step):
                follow = [(i + 1) % total for i in window.indices[:-1]]
                assert list(window.indices[1:]) == follow
                wrapped |= window.indices[-1] < window.indices[0]
        assert wrapped == (schedule == "looped")


# --- cost, whole clip, movement -------------------------------------------------------------


def test_static_cost_is_the_formula() -> None:
    """P12: (1 + ceil((T - L) / (L - O))) L / T."""
    for total, window in itertools.product(range(1, LONGEST + 1), WINDOWS):
        for overlap in overlaps_of(window):
            plan = plan_for(total, window, overlap, "static", "ramp")
            frames = sum(len(w.indices) for w in plan.windows())
            assert plan.cost_factor == frames / total
            if total > window:
                count = 1 + -(-(total - window) // (window - overlap))
                assert plan.cost_factor == count * window / total
                assert plan.starts()[-1] == total - window
            else:
                assert plan.cost_factor == 1.0


def test_cost_does_not_change_from_step_to_step_and_stays_within_one_window() -> None:
    for total, overlap in itertools.product(range(22, LONGEST), (0, 2, 4, 8, 10)):
        static = plan_for(total, 21, overlap, "static", "ramp")
        for schedule in ("uniform", "looped"):
            plan = plan_for(total, 21, overlap, schedule, "ramp")
            assert plan.count <= static.count + 1
            assert {len(plan.starts(step)) for step in range(9)} == {plan.count}


@pytest.mark.parametrize(("schedule", "fusion"), PAIRS)
def test_a_window_that_covers_the_clip_is_the_plain_run(schedule: str, fusion: str) -> None:
    """P1: one window, in order, every weight exactly one."""
    for total, extra in itertools.product(range(1, 60), (0, 1, 30)):
        plan = plan_windows(total, video_frames(total + extra), 16, schedule, fusion)
        for step in range(3):
            (only,) = plan.windows(step)
            assert only.indices == tuple(range(total))
            assert set(only.weights) == {1.0}
            assert normalised(plan, step) == plan.blend_fractions(step) == (only.weights,)
            assert plan.seams(step) == ()
        assert plan.cost_factor == 1.0


def test_a_loop_too_short_to_close_says_so() -> None:
    assert any("does not flow" in note for note in plan_windows(10, schedule="looped").notes)
    assert plan_windows(40, schedule="looped").notes == ()


def test_static_seams_stand_still_and_uniform_seams_move() -> None:
    for total in range(22, LONGEST):
        static = plan_for(total, 21, 4, "static", "ramp")
        assert len({static.starts(step) for step in range(8)}) == 1
        uniform = plan_for(total, 21, 4, "uniform", "ramp")
        if uniform.count > 2:
            assert len({uniform.starts(step) for step in range(8)}) >= min(5, total - 21), total
        else:  # two windows: the one seam is a ramp at least twice as wide instead
            assert len(matrix(uniform, 0)) == 2
            assert largest_jump(matrix(uniform, 0)) <= 1 / (2 * 4 + 2) + 1e-12
        looped = plan_for(total, 21, 4, "looped", "ramp")
        assert len({looped.starts(step) for step in range(8)}) >= 7


def test_uniform_wears_no_frame_more_than_others() -> None:
    """Over many steps no interior frame is a seam much more often than chance."""
    plan = plan_for(200, 21, 4, "uniform", "ramp")
    hits = np.zeros(200)
    for step in range(64):
        for seam in plan.seams(step):
            hits[seam] += 1
    assert hits.max() <= 64 / 4


def test_longer_clip_keeps_the_static_windows_of_its_beginning() -> None:
    """P8: what the last window does not reach is windowed as in the shorter clip."""
    for total, longer in itertools.product(range(60, 100), (101, 150)):
        short = plan_for(total, 21, 4, "static", "ramp").windows()
        long = plan_for(longer, 21, 4, "static", "ramp").windows()
        untouched = [w for w in short if w.indices[-1] < short[-1].start]
        assert long[: len(untouched)] == tuple(untouched) != ()


# --- disagreement between windows -----------------------------------------------------------


def test_the_two_ways_to_measure_a_jump_agree() -> None:
    for schedule, fusion in PAIRS:
        plan = plan_for(45, 9, 5, schedule, fusion)
        windows = plan.windows(1)
        shares = np.array(normalised(plan, 1))
        quick = jump_of(plan, np.array([w.indices for w in windows]), shares)
        assert quick == pytest.approx(largest_jump(dense(plan, windows), schedule == "looped"))


def peers_jump(ramp: list[float], window: int, overlap: int, total: int) -> float:
    """Jump of a fusion that puts ``ramp`` at both ends of every window but the clip's ends."""
    starts = plan_for(total, window, overlap, "static", "ramp").starts()
    weights = np.zeros((len(starts), total))
    for k, (row, start) in enumerate(zip(weights, starts, strict=True)):
        own = np.ones(window)
        if k > 0:
            own[:overlap] *= ramp
        if k < len(starts) - 1:
            own[window - overlap :] *= ramp[::-1]
        row[start : start + window] = own
    return largest_jump(weights)


@pytest.mark.parametrize("overlap", [2, 4, 5, 8])
def test_ramps_beat_the_linspace_others_use(overlap: int) -> None:
    """P6 beside the fusions other projects use, window 21 of 81 latent frames.

    Linear from 0 to 1 includes the two end frames, so it crosses in overlap - 1 steps: a hard
    cut at an overlap of 2. Half-sample ramps cross in ``overlap`` steps.
    """
    linear = peers_jump(list(np.linspace(1e-37, 1, overlap)), 21, overlap, 81)
    half = peers_jump([(k + 0.5) / overlap for k in range(overlap)], 21, overlap, 81)
    ours = largest_jump(matrix(plan_for(81, 21, overlap, "static", "ramp"), 0))
    flat = largest_jump(matrix(plan_for(81, 21, overlap, "static", "flat"), 0))
    pyramid = largest_jump(matrix(plan_for(81, 21, overlap, "static", "pyramid"), 0))
    assert ours == pytest.approx(1 / (overlap + 1), abs=1e-12)
    assert pyramid == pytest.approx(1 / (overlap + 1), abs=1e-12)
    assert linear == pytest.approx(1 / (overlap - 1))
    assert half == pytest.approx(max(1 / overlap, 0.5 / overlap))
    assert flat == pytest.approx(0.5)
    assert ours < min(linear, half, flat)


def test_two_windows_that_disagree_by_two_move_by_two_over_o_plus_one() -> None:
    """The bound on fused values themselves: biases -1 and +1 in turn."""
    plan = plan_for(38, 21, 4, "static", "ramp")
    assert plan.count == 2
    fused = np.zeros(38)
    for k, (win, row) in enumerate(zip(plan.windows(), normalised(plan), strict=True)):
        fused[list(win.indices)] += np.array(row) * (-1) ** k
    assert abs(np.diff(fused)).max() == pytest.approx(2 / 5)
    assert fused[0] == 1 and fused[-1] == -1


def test_shifted_back_window_fades_in_over_all_it_shares() -> None:
    plan = plan_for(40, 21, 4, "static", "ramp")
    assert plan.starts() == (0, 17, 19)
    last = matrix(plan, 0)[-1]
    assert last[19:38] == pytest.approx([k / 20 for k in range(1, 20)])
    two = plan_for(22, 21, 4, "static", "ramp")
    assert largest_jump(matrix(two, 0)) == pytest.approx(1 / 21)


def test_blend_fractions_equal_the_weighted_mean_and_keep_agreement_exact() -> None:
    rng = random.Random(0)
    for schedule, fusion in itertools.product(SCHEDULES, FUSIONS):
        for total, window, overlap in ((40, 21, 4), (59, 9, 8), (31, 6, 5), (50, 5, 0)):
            plan = plan_for(total, window, overlap, schedule, fusion)
            for step in range(4):
                blend_matches(plan, step, rng)


def blend_matches(plan: WindowPlan, step: int, rng: random.Random) -> None:
    truth = [rng.uniform(-3, 3) for _ in range(plan.total)]
    agreed, blended, mean = ([0.0] * plan.total for _ in range(3))
    parts = zip(plan.windows(step), plan.blend_fractions(step), normalised(plan, step), strict=True)
    for win, fractions, shares in parts:
        for i, fraction, share in zip(win.indices, fractions, shares, strict=True):
            said = truth[i] + win.index
            mean[i] += share * said
            # How torch.lerp picks its form: exact at both ends and where both sides agree.
            for buffer, new in ((agreed, truth[i]), (blended, said)):
                old = buffer[i]
                buffer[i] = (
                    old + fraction * (new - old)
                    if fraction < 0.5
                    else new - (new - old) * (1 - fraction)
                )
    assert agreed == truth
    assert blended == pytest.approx(mean, abs=1e-12)


def turns(windows: int, passes: tuple[int, ...], gangs: int) -> list[int]:
    return [-(-windows * each // gangs) for each in passes]


@pytest.mark.parametrize("window", [5, 8, 13, 21])
@pytest.mark.parametrize("passes", [(1,), (2,), (2, 1)], ids=str)
def test_an_overlap_that_fills_cards_costs_no_turn_and_never_gets_shorter(
    window: int, passes: tuple[int, ...]
) -> None:
    """Against every overlap to half a window: none has more windows within the same turns."""
    grown = 0
    for total, gangs in itertools.product(range(1, 160), (1, 2, 3, 4, 5, 8)):
        for overlap in {0, 1, window // 4, window // 2}:
            plan = plan_for(total, window, overlap, "static", "ramp")
            found = filling_overlap(total, window, overlap, passes, gangs)
            assert overlap <= found <= window // 2
            if gangs == 1 or total <= window:
                assert found == overlap
                continue
            filled = plan_for(total, window, found, "static", "ramp")
            before = turns(plan.count, passes, gangs)
            assert turns(filled.count, passes, gangs) == before
            others = (plan_for(total, window, o, "static", "ramp") for o in range(window // 2 + 1))
            fitting = (o.count for o in others if turns(o.count, passes, gangs) == before)
            assert filled.count == max(fitting)
            assert (found > overlap) == (filled.count > plan.count)
            grown += found > overlap
    assert grown > 100


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, wan_core.job.windows as w; w.plan_windows(41)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
