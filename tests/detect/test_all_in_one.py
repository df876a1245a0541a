"""All-in-one checkpoints: every part is used from the one file, and counted by its own bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from support import published
from support import wan_layouts as layouts

from wan_core.config import GenerationConfig, WanModelFiles
from wan_core.detect.companions import find_companions
from wan_core.detect.detector import ArchitectureDetector, inspect_file
from wan_core.errors import MissingFile
from wan_core.job.request import resolve

detect = ArchitectureDetector().detect_model_architecture
VISION = {
    name.removeprefix("vision_model."): shape
    for name, shape in layouts.clip_vision().items()
    if name.startswith("vision_model.")
}
SHAPES = {name: layouts.shallow(shapes) for name, (shapes, _) in layouts.FILES.items()}
PREFIXES = {
    "transformer": "model.diffusion_model.", "vae": "vae.",
    "text_encoder": "text_encoders.umt5xxl.transformer.", "image_encoder": "clip_vision.",
}  # fmt: skip
SPIECE = "text_encoders.spiece_model"
STRAYS = ("model_sampling.sigmas", "model_ema.decay", "text_encoders.umt5xxl.logit_scale",
          "text_encoders.umt5xxl.scaled_fp8")  # fmt: skip


def parts(model: str = "t2v-14b", *names: str, kind: str = "bf16") -> dict[str, layouts.Stored]:
    """The parts of a model, each as a file of its own would have it."""
    every = {
        "transformer": layouts.stored(SHAPES[model], kind),
        "vae": layouts.stored(layouts.vae_21(), "fp32"),
        "text_encoder": layouts.stored(published.umt5(layers=2), "fp16"),
        "image_encoder": layouts.stored(VISION, "fp16"),
    }
    wanted = names or ("transformer", "vae", "text_encoder")
    return {name: every[name] for name in wanted}


def bundle(
    path: Path, made: dict[str, layouts.Stored], prefixes: dict[str, str] = PREFIXES,
    *, spiece: str = SPIECE, strays: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    tensors, notes = {}, {}
    for name, part in made.items():
        tensors |= {prefixes[name] + n: tensor for n, tensor in part.tensors.items()}
        notes |= {prefixes[name] + n: note for n, note in part.notes.items()}
    if spiece:
        tensors[spiece] = ("U8", (4_548_313,))
    tensors |= dict.fromkeys(strays, ("F32", (8,)))
    return layouts.write_sparse(path, layouts.Stored(tensors, {}, notes))


def nbytes(file: layouts.Stored) -> int:
    sizes = (math.prod(s) * layouts.BITS[d] // 8 for d, s in file.tensors.values())
    return sum(sizes)


FORMS = {
    "ComfyUI's": PREFIXES,
    "an older one": PREFIXES | {"vae": "first_stage_model.", "text_encoder": "cond_stage_model."},
    "bare": PREFIXES | {"transformer": ""},
    "another pack's": {"transformer": "model.", "vae": "vae.model.", "text_encoder": "t5.",
                       "image_encoder": "clip.vision_model."},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bf16", "fp8_scaled old", "fp8_scaled new"])
@pytest.mark.parametrize("form", FORMS)
def test_every_part_is_used_and_counted(tmp_path: Path, form: str, kind: str) -> None:
    """Given as a path, as the transformer, or named for each part: the same, with own bytes."""
    made = parts("i2v-14b", "transformer", "vae", "text_encoder", "image_encoder", kind=kind)
    path = bundle(tmp_path / "rapid-aio.safetensors", made, FORMS[form], strays=STRAYS)
    named = WanModelFiles(transformer=path, vae=path, text_encoder=path, image_encoder=path)
    alone = {}
    for name, part in made.items():
        alone[name] = layouts.write_sparse(tmp_path / f"{name}.safetensors", part)
    apart = detect(WanModelFiles(**alone))
    for source in (path, WanModelFiles(transformer=path), named):
        found = detect(source)
        assert (found.name, found.transformer, found.vae) == (
            apart.name, apart.transformer, apart.vae)  # fmt: skip
        assert found.components["tokenizer"].path == path
        for name, part in made.items():
            own, other = found.components[name], apart.components[name]
            assert own.path == path and own.prefix == FORMS[form][name]
            assert own.nbytes == nbytes(part) and own.parameters == other.parameters
            assert (own.weight_kind, own.dtypes) == (other.weight_kind, other.dtypes)
            assert own.stored == other.stored
        assert not [text for text in found.warnings if "not used" in text and "model_" in text]
    said = " ".join(detect(path).reasons)
    assert "a Wan 2.1 VAE (16 channels) is taken from rapid-aio.safetensors itself" in said


def test_what_is_given_comes_before_what_is_inside(tmp_path: Path) -> None:
    path = bundle(tmp_path / "aio.safetensors", parts())
    other = layouts.write_sparse(
        tmp_path / "wan_vae.safetensors", layouts.stored(layouts.vae_21(), "fp16")
    )
    found = detect(WanModelFiles(transformer=path, vae=other))
    assert found.components["vae"].path == other
    assert found.components["text_encoder"].path == path


def test_what_is_inside_comes_first_where_all_is_left_to_be_found(tmp_path: Path) -> None:
    """The file's own VAE and encoder were chosen by who made it, though others are more precise."""
    path = bundle(tmp_path / "aio.safetensors", parts())
    vae = layouts.write_sparse(
        tmp_path / "wan_vae.safetensors", layouts.stored(layouts.vae_21(), "fp32")
    )
    text = layouts.write_sparse(tmp_path / "umt5.safetensors", published.comfy_umt5_fp16(layers=2))
    present = {"vae": [vae], "text_encoder": [text]}
    found = find_companions(WanModelFiles(transformer=path), present, inspect_file)
    assert found.files.vae == path and found.files.text_encoder == path
    assert any("VAE: aio.safetensors itself" in reason for reason in found.reasons)
    # An encoder without its tokenizer is of no use, wherever it lies.
    path = bundle(tmp_path / "aio.safetensors", parts(), spiece="")
    found = find_companions(WanModelFiles(transformer=path), present, inspect_file)
    assert found.files.vae == path and found.files.text_encoder == text


def test_a_part_can_be_taken_from_a_file_that_is_for_another(tmp_path: Path) -> None:
    """Of an all-in-one file named as the VAE, the VAE is used."""
    path = bundle(tmp_path / "aio.safetensors", parts())
    main = layouts.write_sparse(
        tmp_path / "wan.safetensors", layouts.stored(SHAPES["t2v-14b"], "bf16")
    )
    found = detect(WanModelFiles(transformer=main, vae=path))
    assert found.components["vae"].prefix == "vae."
    assert set(found.components) == {"transformer", "vae"}


def test_an_image_encoder_that_is_not_needed_is_not_used(tmp_path: Path) -> None:
    made = parts("t2v-14b", "transformer", "vae", "image_encoder")
    found = detect(bundle(tmp_path / "aio.safetensors", made))
    assert "image_encoder" not in found.components
    clip = layouts.write_sparse(tmp_path / "clip.safetensors", made["image_encoder"])
    named = detect(WanModelFiles(transformer=tmp_path / "aio.safetensors", image_encoder=clip))
    assert any("is not used: this model takes no CLIP" in text for text in named.warnings)


def test_what_else_is_in_the_file_is_mentioned(tmp_path: Path) -> None:
    path = bundle(tmp_path / "aio.safetensors", parts(), strays=("control_net.x", *STRAYS))
    (said,) = (text for text in detect(path).warnings if "also holds" in text)
    assert "also holds control_net, which is not used" in said


# One expert alone --------------------------------------------------------------------------------

JOB = GenerationConfig(prompt="", image=object(), width=64, height=64, num_frames=5)  # type: ignore[arg-type]
HALVES = {"wan22RemixT2VI2V_i2vHighV30": True, "wan2.2_i2v_low_noise": True, "a_finetune": True,
          "wan2.2-i2v-rapid-aio-v10": False, "i2v-all-in-one": False, "i2v_merged": False,
          "aio_high_noise": True}  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
def test_one_expert_of_a_pair_is_described_but_makes_no_video(tmp_path: Path, name: str) -> None:
    """A file that says that both experts were merged into it is whole."""
    path = tmp_path / f"{name}.safetensors"
    layouts.write_sparse(path, layouts.stored(SHAPES["i2v-a14b"], "bf16"))
    for source in (path, WanModelFiles(transformer=path)):
        found = detect(source)
        assert found.name == "wan2.2-i2v-a14b" and found.warnings
        assert bool(found.incomplete) == HALVES[name]
        if HALVES[name]:
            with pytest.raises(MissingFile, match="one of the two experts of wan2.2-i2v-a14b"):
                resolve(JOB, found)
        else:
            assert resolve(JOB, found) and "merged into one" in found.warnings[0]


def test_an_all_in_one_file_is_whole_unless_it_names_its_role(tmp_path: Path) -> None:
    made = parts("i2v-a14b")
    for name, whole in (("checkpoint", True), ("checkpoint_high", False)):
        found = detect(bundle(tmp_path / f"{name}.safetensors", made))
        assert (not found.incomplete) == whole
    only_vae = parts("i2v-a14b", "transformer", "vae")
    assert detect(bundle(tmp_path / "with_vae.safetensors", only_vae, spiece="")).incomplete


def test_a_pair_of_all_in_one_files(tmp_path: Path) -> None:
    """Both carry a VAE and an encoder; the first one's are used, and the pair is a pair."""
    high = bundle(tmp_path / "m_high.safetensors", parts("i2v-a14b"))
    low = bundle(tmp_path / "m_low.safetensors", parts("i2v-a14b"))
    found = find_companions(
        WanModelFiles(transformer=high),
        {"transformer_2": [low, high], "vae": [], "text_encoder": []},
        inspect_file,
    )
    assert found.files.transformer_2 == low
    model = detect(found.files)
    assert model.two_experts and not model.incomplete
    assert model.components["vae"].path == high
    assert replace(model, root=high).recipes() == ()
