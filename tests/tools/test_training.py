"""The shortcuts the demo model's training takes are exact, and a cut-off stage goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tools import clips, demo_models, train_demo, training
from tools.training import Clock, Trainer

DEMO = Path(__file__).parents[2] / "wan_core" / "demo_model" / "t2v"


def small_noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_few_text_positions_stand_for_all_512() -> None:
    torch.manual_seed(0)
    model = demo_models.build_transformer().eval()
    latents, timestep = small_noise(2, *demo_models.LATENT_SHAPE), torch.tensor([900.0, 40.0])
    text = small_noise(2, demo_models.PIPELINE_TEXT_LENGTH, 96)
    text[:, 10:] = 0
    with torch.no_grad():
        whole = model(latents, timestep, text).sample
        trimmed = model(latents, timestep, text[:, : demo_models.TEXT_LENGTH]).sample
        model.set_attn_processor(demo_models.PaddingProcessor())
        short = model(latents, timestep, text[:, : demo_models.TEXT_LENGTH]).sample
    assert (short - whole).abs().max() < 2e-5
    assert (trimmed - whole).abs().max() > 1e-3


def test_a_widened_expert_is_the_old_one_until_it_learns() -> None:
    torch.manual_seed(0)
    old: Any = demo_models.build_transformer().eval()
    wide: Any = demo_models.widened(old).eval()
    latents, timestep = small_noise(1, *demo_models.LATENT_SHAPE), torch.tensor([500.0])
    condition = small_noise(1, 20, *demo_models.LATENT_SHAPE[1:])
    text = small_noise(1, 8, 96)
    with torch.no_grad():
        wanted = old(latents, timestep, text).sample
        got = wide(torch.cat([latents, condition], 1), timestep, text).sample
    assert (got - wanted).abs().max() < 2e-5


def test_unclamped_decode_is_the_vae_s_own_but_for_the_clamp() -> None:
    torch.manual_seed(0)
    vae: Any = demo_models.build_vae().eval()
    latents = small_noise(1, 16, 3, 4, 4)
    with torch.no_grad():
        ours = demo_models.decode_unclamped(vae, latents)
        assert torch.equal(ours.clamp(-1, 1), vae.decode(latents).sample)


def test_the_shipped_tokenizer_reads_every_sentence_as_whole_words() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    ids, mask = demo_models.token_table(tokenizer)
    for row, cell in enumerate(clips.grid()):
        words = clips.sentence(*cell).split()
        assert int(mask[row].sum()) == len(words) + 1
        assert tokenizer.unk_token_id not in ids[row].tolist()


def test_the_vocabulary_can_be_made_again(tmp_path: Path) -> None:
    demo_models.build_tokenizer(tmp_path / "tokenizer")
    made = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert made == (DEMO / "tokenizer" / "tokenizer.json").read_bytes()


def trained(work: Path, cut_at: int | None) -> tuple[torch.Tensor, list[str]]:
    """Fit a line in 200 steps, in one go or cut off and resumed; batches depend on the step."""
    lines: list[str] = []
    stops = [cut_at, None] if cut_at else [None]
    for stop in stops:
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        trainer = Trainer("line", [model], 0.1, work, Clock(None), lines.append, 0.9)
        trainer.resume()

        def loss(
            trainer: Trainer = trainer, model: nn.Linear = model, stop: int | None = stop
        ) -> torch.Tensor:
            if stop is not None and trainer.step == stop:
                raise KeyboardInterrupt
            g = torch.Generator().manual_seed(trainer.step)
            x = torch.randn(16, 3, generator=g)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        if stop is None:
            trainer.run(loss, 1.0, 200, 0.0)
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.run(loss, 1.0, 200, 0.0)
    trainer.swap()
    return model.weight.detach().clone(), lines


def test_a_stage_that_was_cut_off_ends_where_an_uncut_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, _ = trained(tmp_path / "a", None)
    resumed, lines = trained(tmp_path / "b", 130)
    assert any("resumed at step 100" in line for line in lines)
    assert torch.equal(resumed, whole)
    assert (whole - 1).abs().max() < 0.05


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_by_frame_are_the_vae_s_with_the_older_taps_zero(channels_last: bool) -> None:
    torch.manual_seed(0)
    vae: Any = demo_models.frame_by_frame(demo_models.build_vae()).eval()
    whole: Any = demo_models.build_vae().eval()
    whole.load_state_dict(demo_models.all_taps(vae.state_dict()))
    clip = small_noise(1, 3, 9, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        wanted = whole.encode(clip).latent_dist.mode()
        for flat in (False, True):
            train_demo.lay_out(vae, train_demo.Way("fp32", channels_last, flat))
            assert (vae.encode(clip).latent_dist.mode() - wanted).abs().max() < 1e-5


def test_windows_begin_with_the_clip_or_where_latents_no_longer_depend_on_its_start() -> None:
    run: Any = SimpleNamespace(device="cpu")
    windows = train_demo.draw_windows(run, batch=64, length=5, frames=15, firsts=0.25)
    begins = windows[:, 0]
    assert begins[:16].eq(0).all()
    assert set(begins[16:].tolist()) == set(range(train_demo.LATER, 11))
    assert torch.equal(windows, begins[:, None] + torch.arange(5))
    clips_ = small_noise(64, 2, 15, 3, 4)
    parts = train_demo.cut(clips_, windows)
    for clip, part, begin in zip(clips_, parts, begins.tolist(), strict=True):
        assert torch.equal(part, clip[:, begin : begin + 5])
