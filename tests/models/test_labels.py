"""labels: words of names, and the role of an expert that a name states."""

from __future__ import annotations

import pytest

from wan_core.models.labels import differ_in_h_and_l, role_of, without_role, words_of

WORDS = {
    "wan2.2_i2v_high_noise_14B": "wan2 2 i2v high noise 14b",
    "smoothMixWan22I2V14B_i2vHigh": "smooth mix wan22i2v14b i2v high",
    "nsfwV20High": "nsfw v20 high", "I2VHighV30": "i2v high v30",
    "TI2V_5B_LowVRAM": "ti2v 5b low vram", "lightx2v-4steps": "lightx2v 4steps", "": "",
    "HighNoise-Q8_0": "high noise q8 0", "Ünïcode_low": "n code low",
}  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
def test_words(text: str) -> None:
    assert words_of(text) == WORDS[text].split()


# The high-noise file of a published pair, and its partner.
PAIRS = {
    "wan2.2_i2v_high_noise_14B_fp16": "wan2.2_i2v_low_noise_14B_fp16",
    "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ": "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ",
    "Wan2.2-T2V-A14B-HighNoise-Q4_K_M": "Wan2.2-T2V-A14B-LowNoise-Q4_K_M",
    "wan22RemixT2VI2V_i2vHighV30": "wan22RemixT2VI2V_i2vLowV30",
    "smoothMixWan22I2V14B_i2vHigh": "smoothMixWan22I2V14B_i2vLow",
    "DasiwaWAN22I2V14B_synthseductionHighV9": "DasiwaWAN22I2V14B_synthseductionLowV9",
    "modelV20High": "modelV20Low", "i2v14bHIGH": "i2v14bLOW", "wan_i2vhigh_v2": "wan_i2vlow_v2",
    "wan2.2_remix_i2v_14b_high_lighting_v2.0": "wan2.2_remix_i2v_14b_low_lighting_v2.0",
    "wan_i2v_HighNoise": "wan_i2v_low_noise", "x-high-noise": "x_LowNoise", "xHighV2": "x_low_v2",
}  # fmt: skip


@pytest.mark.parametrize("high", PAIRS)
def test_published_pairs(high: str) -> None:
    low = PAIRS[high]
    assert (role_of(high), role_of(low)) == ("high", "low")
    assert without_role(high) == without_role(low)


def test_no_two_pairs_are_mixed() -> None:
    """A file is the partner of its own pair's other file only."""
    plain = [without_role(name) for name in PAIRS]
    assert len(set(plain)) == len(plain)
    for name in ("wan_i2v_high_v3", "wan_i2v_high_fp8", "wan_t2v_high_v2", "i2v_high_v2"):
        assert without_role(name) != without_role("wan_i2v_low_v2"), name


NO_ROLE = (
    "TI2V_5B_LowVRAM", "wan_low_denoise", "wan_LOWRes", "Low-Light_wan", "Low-Step-Lightning",
    "wan_high_quality", "low_noise_and_high_noise", "Wan2.2-TI2V-5B-high", "lowres_highres",
    "slow_motion", "highway", "flow14b", "14bflow", "below_v2", "low480p", "wan_v2slow", "high5",
)  # fmt: skip


@pytest.mark.parametrize("name", NO_ROLE)
def test_names_that_state_no_role(name: str) -> None:
    assert role_of(name) is None


LETTERS = {
    ("nsfwFASTMOVEV2Q8H", "nsfwFASTMOVEV2Q8L"): True, ("wan_H", "wan_L"): True,
    ("wan_H_fp8", "wan_L_fp8"): True, ("fp8H_v2", "fp8L_v2"): True,
    ("model_Q3_K_H", "model_Q3_K_L"): True,  # there is no such quantisation, so it is a role
    ("wan_L", "wan_H"): False, ("wan_h", "wan_l"): False, ("wanH", "wanL"): False,
    ("x_HD", "x_LD"): False, ("H_H", "L_L"): False, ("model_Q8H", "model_Q4L"): False,
    ("a", "a"): False, ("a_H", "a_LL"): False,
}  # fmt: skip


@pytest.mark.parametrize("pair", LETTERS)
def test_pairs_told_apart_by_one_letter(pair: tuple[str, str]) -> None:
    assert differ_in_h_and_l(*pair) == LETTERS[pair]
