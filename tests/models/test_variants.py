"""variants: the table against its sources, and against diffusers' own numbers."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from wan_core.models.variants import NEGATIVE_PROMPT, VAE_21, VAE_22, VARIANTS

# The demo's models are small and of no published size.
PUBLISHED = {n: v for n, v in VARIANTS.items() if not n.startswith("wanfit-demo")}

# name: (steps, guidance, guidance 2, shift, boundary, frames, fps), from wan/configs of
# Wan-Video/Wan2.2, from generate.py and the README of Wan-Video/Wan2.1.
OFFICIAL = {
    "wan2.1-t2v-1.3b": (50, 6.0, None, 8.0, None, 81, 16),
    "wan2.1-t2v-14b": (50, 5.0, None, 5.0, None, 81, 16),
    "wan2.1-i2v-14b": (40, 5.0, None, 5.0, None, 81, 16),
    "wan2.1-flf2v-14b": (50, 5.0, None, 16.0, None, 81, 16),
    "wan2.1-vace-14b": (50, 5.0, None, 16.0, None, 81, 16),
    "wan2.2-vace-fun-a14b": (50, 5.0, 5.0, 12.0, 0.875, 81, 16),
    "wan2.2-t2v-a14b": (40, 4.0, 3.0, 12.0, 0.875, 81, 16),
    "wan2.2-i2v-a14b": (40, 3.5, 3.5, 5.0, 0.9, 81, 16),
    "wan2.2-ti2v-5b": (50, 5.0, None, 5.0, None, 121, 24),
    "wan2.2-animate-14b": (20, 1.0, None, 5.0, None, 77, 30),
    "wan2.2-s2v-14b": (40, 4.5, None, 3.0, None, 81, 16),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_defaults(name: str) -> None:
    d = VARIANTS[name].defaults
    found = (d.num_inference_steps, d.guidance_scale, d.guidance_scale_2, d.flow_shift, d.boundary,
             d.num_frames, d.fps)  # fmt: skip
    assert found == OFFICIAL[name]


def test_shift_of_the_480p_image_model() -> None:
    defaults = VARIANTS["wan2.1-i2v-14b"].defaults
    assert [defaults.flow_shift_for(*size) for size in ((832, 480), (480, 832), (1280, 720))] == [
        3.0, 3.0, 5.0,
    ]  # fmt: skip
    assert VARIANTS["wan2.2-i2v-a14b"].defaults.flow_shift_for(832, 480) == 5.0


def test_the_table_agrees_with_itself() -> None:
    for name, variant in PUBLISHED.items():
        assert variant.name == name and variant.supported == (not variant.why_not)
        assert variant.transformer.dim == variant.transformer.heads * 128
        assert variant.vae.z_dim == variant.transformer.out_channels
        assert (variant.defaults.boundary is not None) == (variant.experts == 2)
        assert (variant.defaults.guidance_scale_2 is not None) == (variant.experts == 2)
        assert variant.defaults.num_frames % 4 == 1
        assert variant.defaults.width % variant.size_multiple == 0
        assert variant.defaults.height % variant.size_multiple == 0
        assert variant.size_multiple == (32 if variant.vae is VAE_22 else 16)
        assert variant.image_encoder == (variant.transformer.image_dim is not None)
        # Of what diffusers has no plain pipeline for, the Fun models and Animate 2 are run.
        own = "-fun-" in variant.name or variant.transformer.animate == 2
        assert not variant.supported or variant.pipeline_class or own
        if variant.transformer.added_kv_dim:
            assert variant.transformer.added_kv_dim == variant.transformer.dim


def test_what_is_supported() -> None:
    assert [name for name, v in PUBLISHED.items() if v.supported] == [
        "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b",
        "wan2.1-vace-1.3b", "wan2.1-vace-14b", "wan2.2-t2v-a14b", "wan2.2-i2v-a14b",
        "wan2.2-ti2v-5b", "wan2.2-vace-fun-a14b", "wan2.2-animate-14b", "wan-animate-2-14b",
        "wan2.1-fun-inp-1.3b",
        "wan2.1-fun-control-1.3b", "wan2.1-fun-control-14b", "wan2.1-fun-camera-1.3b",
        "wan2.1-fun-camera-14b", "wan2.2-fun-control-a14b", "wan2.2-fun-camera-a14b",
        "wan2.2-fun-inp-5b", "wan2.2-fun-control-5b",
    ]  # fmt: skip


def test_the_channels_beside_the_latents_are_told_apart() -> None:
    """Of control video, mask and known frames, by the table of VideoX-Fun's models."""
    wanted = {
        "wan2.1-t2v-14b": (0, 0, 0), "wan2.2-i2v-a14b": (0, 4, 16), "wan2.1-vace-14b": (0, 0, 0),
        "wan2.2-ti2v-5b": (0, 0, 0), "wan2.1-fun-control-14b": (16, 0, 16),
        "wan2.1-fun-camera-14b": (0, 0, 16), "wan2.2-fun-control-a14b": (16, 4, 16),
        "wan2.2-fun-camera-a14b": (0, 4, 16), "wan2.2-fun-inp-5b": (0, 4, 48),
        "wan2.2-fun-control-5b": (48, 4, 48),
    }  # fmt: skip
    for name, channels in wanted.items():
        shape = VARIANTS[name].transformer
        found = shape.video_channels, shape.mask_channels, shape.known_channels
        assert found == channels, name


def test_classes_exist() -> None:
    diffusers = pytest.importorskip("diffusers")
    for variant in VARIANTS.values():
        for name in (variant.transformer_class, variant.pipeline_class):
            assert name is None or hasattr(diffusers, name), name


def test_vae_numbers_are_those_of_diffusers() -> None:
    """The 2.1 VAE's numbers are the defaults of its class."""
    diffusers = pytest.importorskip("diffusers")
    signature = inspect.signature(diffusers.AutoencoderKLWan.__init__)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    assert list(VAE_21.latents_mean) == defaults["latents_mean"]
    assert list(VAE_21.latents_std) == defaults["latents_std"]
    assert (VAE_21.base_dim, VAE_21.z_dim) == (defaults["base_dim"], defaults["z_dim"])
    assert list(VAE_21.dim_mult) == defaults["dim_mult"]
    assert VAE_21.scale_factor_spatial == defaults["scale_factor_spatial"]


def test_latent_statistics() -> None:
    for vae in (VAE_21, VAE_22):
        assert len(vae.latents_mean) == len(vae.latents_std) == vae.z_dim
        assert all(value > 0 for value in vae.latents_std)
    # Sums of the published lists: a digit changed anywhere changes them.
    assert round(sum(VAE_22.latents_mean), 4) == -0.5589
    assert round(sum(VAE_22.latents_std), 4) == 32.536


def test_negative_prompts() -> None:
    """The image models of 2.1 begin with words on camera shake and cuts."""
    assert NEGATIVE_PROMPT.startswith("色调艳丽，过曝") and NEGATIVE_PROMPT.endswith("倒着走")
    assert len(NEGATIVE_PROMPT) == 137
    assert VARIANTS["wan2.2-i2v-a14b"].defaults.negative_prompt == NEGATIVE_PROMPT
    assert VARIANTS["wan2.1-i2v-14b"].defaults.negative_prompt == "镜头晃动，" + NEGATIVE_PROMPT
    assert VARIANTS["wan2.1-flf2v-14b"].defaults.negative_prompt.startswith("镜头切换，镜头晃动，")


def test_data_is_frozen() -> None:
    variant = VARIANTS["wan2.2-ti2v-5b"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.defaults.flow_shift = 3.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        VARIANTS["x"] = variant  # type: ignore[index]
