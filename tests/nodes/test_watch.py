"""What the page is told while a clip is made, and the moving preview of it."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from support.as_pack import part

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.models import VAE_21, VAE_22

DEMO = "wan_core/demo_model/t2v"
PLAN = SimpleNamespace(
    device="cuda:0",
    step_seconds=2.0,
    seconds=48.0,
    estimate=SimpleNamespace(
        stages=[
            SimpleNamespace(name="denoise_high", device_bytes=3 * 2**30),
            SimpleNamespace(name="decode", device_bytes=2**30),
        ]
    ),
)


@pytest.fixture(scope="module")
def demo() -> Any:
    return WanPipelineLoader().load_wan_pipeline(DEMO)


class Told:
    """A Watch of 20 steps on a clock of its own, with a preview that takes ``cost`` seconds."""

    def __init__(self, pack: ModuleType, demo: Any, plan: Any = PLAN, cost: float = 0.0) -> None:
        self.now, self.cost, self.messages, self.shown = 100.0, cost, [], 0
        config = GenerationConfig(prompt="", width=64, height=64, num_frames=17)
        config.num_inference_steps = 20
        request = demo.plan(config)[0]
        self.watch = part(pack, "nodes.watch").Watch(
            request, plan, demo.architecture, self.messages.append,
            lambda: (2**29, "on a card"), self.preview, lambda: self.now,
        )  # fmt: skip

    def preview(self, clean: torch.Tensor, seconds: float) -> str:
        assert seconds == 17 / 16
        self.now += self.cost
        self.shown += 1
        return "data:"

    def step(self, done: int, seconds: float) -> dict[str, Any]:
        self.now += seconds
        self.watch.step(done, 20, torch.zeros(1, 16, 5, 8, 8))
        return dict(self.messages[-1])


def test_the_time_left_is_the_plans_in_the_proportion_that_steps_take(
    pack: ModuleType, demo: Any
) -> None:
    told = Told(pack, demo)
    first = told.step(1, 9.0)  # with warm-up: says nothing of the next
    assert (first["step_seconds"], first["spent"]) == (None, 9.0)
    assert first["left"] == 19 * 2.0 + 8.0  # as planned: 20 steps of 2 s and 8 s of decoding
    second = told.step(2, 3.0)
    assert second["step_seconds"] == 3.0
    assert second["left"] == 18 * 3.0 + 8.0 * 1.5  # steps and decoding take half as long again
    told.now += 4.0
    told.watch.decoded(5, 17)
    assert told.messages[-1]["left"] == 4.0 * 12 / 5
    assert told.messages[-1]["frames"] == [5, 17]


def test_without_a_card_only_measured_steps_count(pack: ModuleType, demo: Any) -> None:
    told = Told(pack, demo, SimpleNamespace(**{**vars(PLAN), "device": "cpu"}))
    assert told.step(1, 9.0)["left"] is None
    last = told.step(2, 3.0)
    assert last["left"] == 18 * 3.0 and last["only_steps"]


def test_the_expert_and_its_memory_are_told_and_a_new_expert_does_not_count_its_reading(
    pack: ModuleType, demo: Any
) -> None:
    told = Told(pack, demo)
    seen = [told.step(step, 100.0 if step in (1, 14) else 1.0) for step in range(1, 21)]
    assert [one["expert"] for one in seen] == ["high noise"] * 13 + ["low noise"] * 7
    assert seen[0]["memory"] == {"now_gib": 0.5, "plan_gib": 3.0, "where": "on a card"}
    assert {one["step_seconds"] for one in seen[1:]} == {1.0}  # and not the 100 s of reading
    told.watch.loaded("transformer_2", 2**29, 2**30)
    assert told.messages[-1]["reading"] == {"part": "transformer 2", "gib": [0.5, 1.0]}
    told.watch.window(1, 3)
    assert told.messages[-1]["window"] == [2, 3]


def test_previews_take_a_twentieth_of_the_time_at_most_and_the_last_step_has_one(
    pack: ModuleType, demo: Any
) -> None:
    told = Told(pack, demo, cost=0.5)
    with_picture = [step for step in range(1, 21) if "preview" in told.step(step, 3.0)]
    assert with_picture == [1, 5, 9, 13, 17, 20]  # 10 s apart at least, and the last
    told.watch._preview = lambda *_: None  # as after a failure
    assert "preview" not in told.step(20, 99.0)


def test_the_demo_is_shown_as_what_it_becomes(pack: ModuleType, demo: Any) -> None:
    preview, clean = part(pack, "nodes.preview"), {}
    config = GenerationConfig(
        prompt="a red circle moves right on a dark background", num_frames=17, width=64,
        height=64, num_inference_steps=8, preview_callback=lambda n, _, x: clean.update({n: x}),
    )  # fmt: skip
    frames = demo.generate(config).raise_for_error().frames[::4]
    shown = preview.pictures(preview.demo_decoder(demo.architecture.vae), clean[8])
    assert shown.shape == (5, 32, 32, 3) and shown.dtype == torch.uint8
    wanted = torch.nn.functional.avg_pool2d(frames.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    left = (shown / 255 - wanted).square().sum()
    # Wan's own map would be a blob: it explains nothing of the demo's pictures.
    assert left < 0.3 * (wanted - wanted.mean((0, 1, 2))).square().sum()


def test_each_vae_has_its_own_decoder_and_an_unknown_one_none(pack: ModuleType, demo: Any) -> None:
    preview = part(pack, "nodes.preview")
    assert preview.demo_decoder(VAE_21) is None and preview.demo_decoder(VAE_22) is None
    assert preview.same_latents(VAE_22, list(VAE_22.latents_mean))
    other = replace(VAE_21, latents_mean=(0.5, *VAE_21.latents_mean[1:]))
    assert not preview.same_latents(other, list(VAE_21.latents_mean))


def test_a_linear_decoder_is_a_product_with_its_factors(pack: ModuleType) -> None:
    preview = part(pack, "nodes.preview")
    factors, bias = torch.randn(16, 3).tolist(), [0.1, -0.2, 0.3]
    latents = torch.randn(2, 16, 3, 4, 5) / 8
    found = preview.pictures(preview.linear(factors, bias), latents)
    for frame, row, column in ((0, 0, 0), (2, 3, 4)):
        for colour in range(3):
            total = sum(
                float(latents[0, c, frame, row, column]) * factors[c][colour] for c in range(16)
            )
            wanted = min(max((total + bias[colour]) / 2 + 0.5, 0), 1) * 255
            assert abs(int(found[frame, row, column, colour]) - wanted) <= 0.501


def test_large_and_long_clips_are_made_small(pack: ModuleType) -> None:
    preview = part(pack, "nodes.preview")
    decode = preview.linear([[0.1] * 3] * 16, [0.0] * 3)
    frames = preview.pictures(decode, torch.randn(1, 16, 90, 60, 448))
    assert frames.shape == (48, 30, 224, 3)


def test_the_preview_moves_as_long_as_the_clip(pack: ModuleType) -> None:
    frames = torch.randint(0, 255, (5, 30, 52, 3), dtype=torch.uint8)
    url = part(pack, "nodes.preview").moving(frames, 2.0)
    head, _, data = url.partition(",")
    assert head == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.n_frames, image.size) == (5, (52, 30))
        durations = []
        for index in range(5):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
    assert sum(durations) == 2000
