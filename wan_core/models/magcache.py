"""MagCache: which steps a model may take its blocks' work from the step before, by its own curve.

The blocks of a transformer add a residual to the hidden states. From step to step its size
changes by a ratio that hardly depends on the prompt (Ma et al. 2025, arXiv 2506.09045). The curves
of ratios are published, measured by its authors: ``mag_ratios`` of ``MagCache4Wan2.1`` and
``MagCache4Wan2.2`` in github.com/Zehong-Ma/MagCache (df81cb1). With acc the product and n the
number of the ratios since the last computed step, a step is left out while the sum of |1 - acc|
stays below a threshold and n at most ``MOST_IN_A_ROW``. So a curve and a number of steps say
beforehand which steps are left out. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

MOST_IN_A_ROW: Final = 2
"""Steps that may be left out one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MagCurve:
    """Ratios of one model, of the conditional and the unconditional pass in turn.

    In hundred-thousandths above 1, as published, from the second step on. ``retained`` is the
    share of an expert's steps, from its first on, that is always computed; ``low_only`` says that
    the high-noise expert computes all of its steps.
    """

    ratios: tuple[int, ...]
    retained: float = 0.2
    low_only: bool = False

    def at(self, steps: int) -> tuple[tuple[float, float], ...]:
        """Return (conditional, unconditional) ratios for ``steps`` steps, by the nearest one."""
        pairs = [(1.0, 1.0)]
        for index in range(0, len(self.ratios), 2):
            first, second = self.ratios[index : index + 2]
            pairs.append((1 + first / 1e5, 1 + second / 1e5))
        if steps == 1:
            return (pairs[-1],)
        scale = (len(pairs) - 1) / (steps - 1)
        return tuple(pairs[round(index * scale)] for index in range(steps))


Skips = tuple[tuple[bool, bool], ...]
"""For each step whether the conditional and the unconditional pass leave the blocks out."""


def magcache_skips(curve: MagCurve, steps: int, switch: int, threshold: float) -> Skips:
    """Return what is left out of ``steps`` steps, of which those from ``switch`` on are the low's.

    With one expert ``switch`` is ``steps``. Each expert begins anew.
    """
    ratios = curve.at(steps)
    found: list[tuple[bool, bool]] = []
    for part in (range(min(switch, steps)), range(min(switch, steps), steps)):
        kept = part.start + int(len(part) * curve.retained + 0.5)
        if curve.low_only and part.start == 0 and switch < steps:
            kept = part.stop
        passes = [_skipped([pair[which] for pair in ratios], part, max(kept, part.start + 1),
                           threshold) for which in (0, 1)]  # fmt: skip
        found += zip(*passes, strict=True)
    return tuple(found)


def _skipped(ratios: Sequence[float], part: range, kept: int, threshold: float) -> list[bool]:
    product, error, count, out = 1.0, 0.0, 0, []
    for step in part:
        if step >= kept:
            product *= ratios[step]
            error += abs(1 - product)
            count += 1
        skip = step >= kept and error < threshold and count <= MOST_IN_A_ROW
        if not skip:
            product, error, count = 1.0, 0.0, 0
        out.append(skip)
    return out


def magcache_plan(curve: MagCurve, steps: int, switch: int, factor: float) -> tuple[float, Skips]:
    """Return the smallest threshold that makes the blocks ``factor`` times rarer, and its skips.

    Where no threshold does, because of the steps that are always computed, the largest is taken
    that still changes something. A ``factor`` of 1 leaves nothing out.
    """
    best = magcache_skips(curve, steps, switch, 0.0)
    if factor <= 1:
        return 0.0, best
    threshold = 0.0
    for number in range(1, 200):
        found = magcache_skips(curve, steps, switch, number / 400)
        if computed(found) < computed(best):
            threshold, best = number / 400, found
        if 2 * steps >= factor * computed(best):
            break
    return threshold, best


def computed(skips: Skips) -> int:
    """Return how many passes compute their blocks."""
    return sum(not one for pair in skips for one in pair)


_T2V_1_3B: Final = (
    1240, 2213, 166, 410, -209, 61, -318, -238, -366, -315, -433, -414, -584, -578, -422, -425,
    -430, -437, -489, -494, -465, -469, -448, -451, -459, -461, -460, -464, -511, -515, -482,
    -486, -516, -522, -519, -521, -585, -587, -581, -584, -604, -607, -612, -614, -651, -651,
    -691, -696, -730, -730, -772, -774, -829, -830, -863, -865, -932, -937, -995, -997, -1056,
    -1058, -1151, -1151, -1242, -1243, -1356, -1357, -1496, -1497, -1640, -1641, -1798, -1799,
    -2023, -2022, -2283, -2282, -2590, -2589, -2997, -2998, -3462, -3459, -4070, -4067, -4914,
    -4911, -5987, -5981, -7598, -7586, -9759, -9740, -13179, -13132, -18162, -18061,
)  # fmt: skip
_T2V_14B: Final = (
    2504, 3017, 25, 251, -150, -38, -221, -229, -340, -342, -518, -524, -533, -549, -336, -344,
    -566, -569, -467, -455, -532, -535, -562, -566, -484, -483, -616, -620, -596, -599, -483,
    -484, -591, -592, -572, -574, -653, -657, -582, -584, -729, -731, -687, -689, -785, -785,
    -782, -785, -784, -783, -837, -839, -862, -865, -1018, -1020, -1004, -1005, -1130, -1134,
    -1228, -1230, -1233, -1235, -1427, -1430, -1499, -1502, -1620, -1624, -1823, -1827, -1963,
    -1965, -2322, -2323, -2454, -2457, -2816, -2817, -3289, -3292, -3651, -3655, -4371, -4375,
    -5074, -5071, -6036, -6039, -7489, -7496, -9307, -9322, -12040, -12055, -13889, -13811,
)  # fmt: skip
_I2V_480P: Final = (
    -1217, -1007, -2441, -2407, -1689, -1681, -1798, -1775, -1120, -1122, -1238, -1241, -1043,
    -1029, -948, -957, -617, -616, -1143, -1140, -935, -932, -1155, -1153, -943, -943, -1043,
    -1039, -1399, -1390, -1177, -1177, -1244, -1241, -1192, -1186, -1279, -1276, -1429, -1428,
    -1457, -1456, -1843, -1835, -1589, -1587, -2048, -2047, -1851, -1850, -2260, -2258, -2175,
    -2174, -2645, -2639, -2915, -2913, -2944, -2945, -3412, -3413, -3887, -3876, -4330, -4319,
    -5039, -5031, -6027, -6012, -6783, -6776, -8122, -8104, -9045, -9046, -7383, -7384,
)  # fmt: skip
_I2V_720P: Final = (
    -572, -502, -1412, -1379, -1727, -1719, -982, -977, -1089, -1083, -1354, -1348, -546, -544,
    -1090, -1091, -876, -873, -898, -897, -785, -788, -485, -485, -424, -428, -932, -928, -903,
    -903, -834, -831, -959, -958, -799, -802, -899, -899, -1401, -1397, -1155, -1156, -1152,
    -1149, -1138, -1143, -1282, -1281, -1503, -1503, -1736, -1737, -1611, -1607, -2062, -2060,
    -2465, -2464, -2502, -2501, -2700, -2699, -3173, -3172, -3739, -3737, -4665, -4660, -5351,
    -5345, -6603, -6586, -8364, -8350, -10912, -10891, -13210, -13232,
)  # fmt: skip
_T2V_A14B: Final = (
    124, 155, -178, -149, -304, -313, -297, -268, -340, -321, -398, -342, -422, -336, -516, -510,
    -367, -400, -341, -317, -466, -451, -416, -423, -319, -306, -437, -446, -560, -527, -406,
    -360, -534, -539, -547, -519, -611, -635, -609, -594, -646, -639, -717, -722, -732, -737,
    -943, -909, -875, -874, -34477, -34748, -1192, -1148, -1235, -1264, -1490, -1465, -1689,
    -1661, -1950, -1940, -2224, -2229, -2722, -2714, -3269, -3272, -4143, -4145, -5615, -5615,
    -7882, -7900, -11892, -11924, -19737, -19819,
)  # fmt: skip
_I2V_A14B: Final = (
    -809, -856, -644, -663, -674, -715, -749, -736, -607, -634, -570, -570, -724, -712, -611,
    -607, -726, -711, -684, -690, -621, -623, -732, -729, -778, -773, -825, -840, -8924, -8954,
    -1069, -1067, -913, -912, -1148, -1145, -1105, -1104, -1194, -1192, -1290, -1289, -1387,
    -1382, -1566, -1565, -1700, -1693, -1815, -1813, -1869, -1869, -2170, -2165, -2381, -2380,
    -2736, -2730, -2912, -2902, -3432, -3420, -3955, -3945, -4678, -4665, -5421, -5406, -6703,
    -6689, -8301, -8280, -10826, -10798, -14590, -14554, -20177, -20098,
)  # fmt: skip
_TI2V_5B_TEXT: Final = (
    -495, -611, -559, -430, -442, -449, -501, -550, -466, -452, -532, -540, -537, -542, -540,
    -547, -592, -596, -550, -559, -591, -602, -597, -603, -618, -623, -651, -657, -623, -622,
    -670, -672, -697, -699, -783, -784, -800, -799, -799, -798, -867, -868, -888, -890, -845,
    -845, -1042, -1043, -1041, -1042, -1162, -1165, -1174, -1175, -1170, -1172, -1289, -1291,
    -1438, -1439, -1489, -1490, -1586, -1588, -1716, -1718, -1896, -1899, -2019, -2021, -2151,
    -2151, -2443, -2446, -2602, -2605, -2829, -2834, -3083, -3087, -3489, -3493, -3737, -3743,
    -4161, -4165, -4517, -4525, -5058, -5064, -5320, -5322, -5417, -5406, -5157, -5128, -3051,
    -2985,
)  # fmt: skip
_TI2V_5B_IMAGE: Final = (
    -488, -441, -441, -439, -405, -423, -488, -488, -454, -466, -457, -469, -504, -509, -496,
    -501, -556, -551, -519, -519, -565, -565, -570, -569, -589, -594, -627, -624, -587, -595,
    -637, -641, -665, -669, -756, -757, -771, -771, -761, -764, -837, -840, -851, -849, -809,
    -808, -1020, -1019, -1010, -1013, -1151, -1151, -1154, -1154, -1139, -1139, -1260, -1262,
    -1412, -1411, -1461, -1466, -1556, -1561, -1690, -1691, -1881, -1882, -1999, -2000, -2138,
    -2141, -2445, -2442, -2608, -2612, -2848, -2855, -3129, -3130, -3565, -3566, -3871, -3873,
    -4361, -4362, -4824, -4825, -5554, -5548, -6028, -6026, -6425, -6410, -6463, -6448, -3345,
    -3384,
)  # fmt: skip

_CURVES: Final[Mapping[str, MagCurve]] = {
    "wan2.1-t2v-1.3b": MagCurve(ratios=_T2V_1_3B),
    "wan2.1-t2v-14b": MagCurve(ratios=_T2V_14B),
    "wan2.1-i2v-14b": MagCurve(ratios=_I2V_720P),
    "wan2.2-t2v-a14b": MagCurve(ratios=_T2V_A14B, retained=0.4),
    "wan2.2-i2v-a14b": MagCurve(ratios=_I2V_A14B, retained=0.1, low_only=True),
    "wan2.2-ti2v-5b": MagCurve(ratios=_TI2V_5B_TEXT),
}
_I2V_SMALL: Final = MagCurve(ratios=_I2V_480P)
_TI2V_IMAGE: Final = MagCurve(ratios=_TI2V_5B_IMAGE)


def magcache_curve(variant: str, width: int, height: int, image: bool) -> MagCurve | None:
    """Return the published curve of a variant, or None.

    Wan 2.1's two image-to-video checkpoints look alike; the one for 480p is taken up to 832x480
    pixels. The 5B has one curve from text and one from an image.
    """
    if variant == "wan2.1-i2v-14b" and width * height <= 832 * 480:
        return _I2V_SMALL
    if variant == "wan2.2-ti2v-5b" and image:
        return _TI2V_IMAGE
    return _CURVES.get(variant)


_WARM = 0.2
"""Share of an expert's steps, from its first on, that EasyCache always computes (authors: 10 of
50)."""


def easycache_warm(steps: int) -> int:
    """Return how many of an expert's ``steps`` EasyCache computes before it may leave one out."""
    return max(2, math.ceil(_WARM * steps))
