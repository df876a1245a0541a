"""What is asked of a plan: bounds, plain numbers, and the windows that may be fallen back to."""

from __future__ import annotations

import numpy as np
import pytest
from support.machines import cpu, gpu

from wan_core import OptimizationConfig
from wan_core.config import GIB
from wan_core.errors import InvalidRequest
from wan_core.memory import Workload


@pytest.mark.parametrize(
    ("field", "least", "below"),
    [("resident_blocks", 0, -1), ("chunk_size", 2, 1), ("chunk_size", 0, -1)],
)
def test_the_least_that_is_allowed(field: str, least: int, below: int) -> None:
    assert getattr(OptimizationConfig.from_mapping({field: least}), field) == least
    with pytest.raises(InvalidRequest) as caught:
        OptimizationConfig.from_mapping({field: below})
    assert caught.value.field == field and str(below) in str(caught.value)


def test_numbers_of_other_libraries_are_kept_as_plain_ones() -> None:
    given = {
        "resident_blocks": np.int64(3), "chunk_size": np.int32(5), "vram_limit_gb": np.float64(8.5),
        "ram_limit_gb": np.int16(12), "min_vram_mb": np.uint32(6144),
    }  # fmt: skip
    kept = OptimizationConfig.from_mapping(given)
    for name, value in given.items():
        assert type(getattr(kept, name)) in (int, float) and getattr(kept, name) == value
    for name in given:
        assert getattr(OptimizationConfig(), name) is None


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [("step_cache_threshold", 0, 1), ("guidance_gate", 0.05, 1), ("step_cache_factor", 1, 4)],
)
def test_shares_and_factors_have_two_ends(field: str, least: float, most: float) -> None:
    for inside in (least, (least + most) / 2, most):
        assert getattr(OptimizationConfig.from_mapping({field: inside}), field) == inside
    for outside in (least - 0.01, most + 0.01):
        with pytest.raises(InvalidRequest, match=f"a number from {least} to {most}") as caught:
            OptimizationConfig.from_mapping({field: outside})
        assert caught.value.field == field


@pytest.mark.parametrize("field", ["vram_limit_gb", "ram_limit_gb", "min_vram_mb"])
def test_half_a_gigabyte_is_a_limit(field: str) -> None:
    assert getattr(OptimizationConfig.from_mapping({field: 0.5}), field) == 0.5


@pytest.mark.parametrize("value", ["8", True, [8], float("nan"), 0, -0.5, b"8"])
@pytest.mark.parametrize("field", ["vram_limit_gb", "ram_limit_gb", "min_vram_mb"])
def test_a_limit_is_a_number_above_zero(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        OptimizationConfig.from_mapping({field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("offload", ["none", "model", "sequential", "group"])
def test_resident_blocks_stay_beside_streamed_ones_only(offload: str) -> None:
    with pytest.raises(InvalidRequest, match="Choose offload 'stream'") as caught:
        OptimizationConfig(resident_blocks=4, offload=offload)
    assert caught.value.field == "resident_blocks"
    for allowed in ("auto", "stream"):
        assert OptimizationConfig(resident_blocks=0, offload=allowed).placement == "stream"
    assert OptimizationConfig(offload=offload).placement == offload


def test_the_least_memory_of_a_device() -> None:
    wish = OptimizationConfig(min_vram_mb=8192)
    wish.check_device(gpu(8))
    wish.check_device(cpu(2))
    OptimizationConfig().check_device(gpu(1))
    with pytest.raises(InvalidRequest, match="has 8191 MiB"):
        wish.check_device(gpu(8, device_total_bytes=8 * GIB - 2**20))


def clip(frames: int, window: int | None = None, overlap: int = 16) -> Workload:
    return Workload(
        width=832, height=480, num_frames=frames, window_frames=window, window_overlap=overlap
    )


@pytest.mark.parametrize(
    ("size", "job", "own", "windows"),
    [
        (0, clip(801), 81, ()),
        (None, clip(81), 81, ()),
        (None, clip(85), 81, (81, 49, 33, 17)),
        (None, clip(161), 121, (121, 49, 33, 17)),
        (None, clip(801), 49, (49, 33, 17)),  # none as long as the model's own twice
        (None, clip(801, window=81), 81, ()),
        (None, clip(801, window=97), 81, (81, 49, 33, 17)),
        (4, clip(81), 81, (13,)),
        (4, clip(13), 81, ()),
        (4, clip(17), 81, (13,)),
        (21, clip(801, window=81), 81, ()),
    ],
)
def test_windows_to_fall_back_to(
    size: int | None, job: Workload, own: int, windows: tuple[int, ...]
) -> None:
    assert OptimizationConfig(chunk_size=size).fallback_windows(job, own) == windows


def test_windows_share_what_was_asked_for_and_at_most_half() -> None:
    wish = OptimizationConfig()
    shared = {window: wish.overlap_for(clip(801, overlap=16), window) for window in (81, 33, 17, 5)}
    assert shared == {81: 16, 33: 16, 17: 8, 5: 4}
    assert wish.overlap_for(clip(801, overlap=4), 81) == 4


def test_whole_numbers_of_json_from_elsewhere() -> None:
    """JavaScript and other tools write 4 as 4.0."""
    found = OptimizationConfig(chunk_size=4.0, resident_blocks=np.float64(2))  # type: ignore[arg-type]
    assert (found.chunk_size, found.resident_blocks) == (4, 2)
    assert type(found.chunk_size) is int and type(found.resident_blocks) is int
    with pytest.raises(InvalidRequest, match="chunk_size is 4.5"):
        OptimizationConfig(chunk_size=4.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("precision", np.array(["fp16", "bf16"])), ("speed", np.array([1, 2])), ("offload", ["none"]),
     ("devices", "0,0"), ("devices", "cuda:1,1"), ("devices", np.array([0, 1]))],
)  # fmt: skip
def test_values_that_are_no_choice_are_named_by_their_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        OptimizationConfig.from_mapping({field: value})
    assert caught.value.field == field and str(caught.value).startswith(f"{field} is ")


def test_the_precision_of_one_job_is_named_as_the_job_names_it() -> None:
    config = OptimizationConfig(precision="fp32")
    assert config.overridden(None) is config
    assert config.overridden("bf16").precision == "bf16"
    with pytest.raises(InvalidRequest, match="^precision_override is 'half'") as caught:
        config.overridden("half")
    assert caught.value.field == "precision_override"


def test_none_asks_for_nothing() -> None:
    """As in a form whose field was left empty; of what a user prefers there is the same None."""
    nothing = dict.fromkeys(OptimizationConfig().to_dict())
    assert OptimizationConfig.from_mapping(nothing) == OptimizationConfig()


@pytest.mark.parametrize("value", [2, 2.0, np.int64(2), "2", " 2 "])
def test_a_number_of_cards_in_any_form(value: object) -> None:
    assert OptimizationConfig.from_mapping({"devices": value}).devices == "2"
