"""The table of Wan variants: shapes, size multiples, official defaults, latent statistics.

Only data; standard library only; no file is looked at.

Sources. Shapes: ``wan/configs/*.py`` of github.com/Wan-Video/Wan2.1 and Wan2.2 and
``scripts/convert_wan_to_diffusers.py`` of diffusers. Defaults: ``wan/configs/*.py`` and
``generate.py::_validate_args`` of the same repositories (Wan 2.1: shift 5, 3 for image-to-video at
480p, 16 for FLF2V and VACE; 50 steps, 40 for image-to-video), for T2V-1.3B the README's
recommendation (shift 8, guidance 6). Latent statistics: ``wan/modules/vae2_1.py``, ``vae2_2.py``.
Fun models: github.com/aigc-apps/VideoX-Fun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

ImageInput = Literal["none", "optional", "required"]

TEXT_TOKENS: Final = 512
"""Length of the text embeddings: shorter texts are padded with zeros to it."""
IMAGE_TOKENS: Final = 257
"""Tokens that CLIP makes of an image: 16 x 16 patches and the class token."""

NEGATIVE_PROMPT: Final = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_NEGATIVE_I2V_21: Final = "镜头晃动，" + NEGATIVE_PROMPT
_NEGATIVE_FLF2V: Final = "镜头切换，" + _NEGATIVE_I2V_21
_NEGATIVE_S2V: Final = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)

LATENTS_MEAN_21: Final = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD_21: Final = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LATENTS_MEAN_22: Final = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENTS_STD_22: Final = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceShape:
    """The numbers of what Animate reads faces with: motion encoder, face encoder and adapters."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    """Channels of the motion encoder at each resolution, which halves down to 4 x 4."""
    style_dim: int = 512
    motion_dim: int = 20
    out_dim: int = 512
    linears: int = 5
    hidden: int = 1024
    heads: int = 4
    adapters: int = 8
    """Cross attentions to the face: one after each of so many blocks, evenly from the first on."""

    @property
    def size(self) -> int:
        """Width and height of a crop of the face, in pixels."""
        return 4 << (len(self.widths) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """The numbers that define a Wan transformer. Detection reads them from the file."""

    heads: int
    head_dim: int = 128
    ffn_dim: int
    layers: int
    in_channels: int
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    image_dim: int | None = None
    """Width of the CLIP image tokens; None if the model takes no image tokens."""
    added_kv_dim: int | None = None
    pos_embed_seq_len: int | None = None
    """Length of the learned position embedding for the tokens of two images: 514 in
    first/last-frame models, None in others."""
    vace_layers: tuple[int, ...] = ()
    vace_in_channels: int | None = None
    patch_size: tuple[int, int, int] = (1, 2, 2)
    heads_known: bool = True
    """False: it is not known how the width divides into heads; ``heads`` is then 1."""
    reference_channels: int | None = None
    """Latent channels of the reference picture that Fun Control puts before the tokens
    (``ref_conv``); None where the model takes no reference that way."""
    camera_channels: int | None = None
    """Channels of the camera's rays that Fun Camera reads (``control_adapter``): 24, or None."""
    animate: int | None = None
    """1: Animate, with a face adapter and a patch convolution for poses. 2: Animate 2, which reads
    a driving video in a second stream. None in other models."""
    face: FaceShape | None = None
    """What Animate reads faces with; None in other models."""

    @property
    def dim(self) -> int:
        """Width of the hidden states, heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def face_every(self) -> int:
        """Blocks from one face adapter to the next; 0 where there is none."""
        return 0 if self.face is None else -(-self.layers // self.face.adapters)

    @property
    def mask_channels(self) -> int:
        """Input channels that say which video frames are known: 4, or 0."""
        return 4 if (self.in_channels - self.out_channels) % self.out_channels == 4 else 0

    @property
    def known_channels(self) -> int:
        """Input channels for the latents of known frames, the last ones: as many as the latents
        have, or 0."""
        return self.out_channels if self.in_channels - self.out_channels >= self.out_channels else 0

    @property
    def video_channels(self) -> int:
        """Input channels for the latents of a control video (Fun Control), the first ones after the
        noisy latents: as many as those have, or 0."""
        return max(
            0, self.in_channels - self.out_channels - self.mask_channels - self.known_channels
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeShape:
    """The numbers that define a Wan VAE and its latent space."""

    z_dim: int
    base_dim: int
    decoder_base_dim: int
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_spatial: int = 8
    scale_factor_temporal: int = 4
    latents_mean: tuple[float, ...] = LATENTS_MEAN_21
    latents_std: tuple[float, ...] = LATENTS_STD_21

    @property
    def statistics(self) -> dict[str, tuple[float, ...]]:
        """Mean and deviation of each latent channel, by their names in diffusers' config."""
        return {"latents_mean": self.latents_mean, "latents_std": self.latents_std}


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Official sampling values of one variant; ``None`` in a GenerationConfig means these."""

    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    guidance_scale_2: float | None = None
    """Guidance scale of the low-noise expert; None where there is one expert."""
    boundary: float | None = None
    """The high-noise expert takes the steps at timesteps >= boundary * 1000."""
    flow_shift_480p: float | None = None
    fps: int = 16
    num_frames: int = 81
    width: int = 1280
    height: int = 720
    scheduler: str = "unipc"
    negative_prompt: str = NEGATIVE_PROMPT
    sigma_schedule: str = "official"
    sigmas: tuple[float, ...] = ()
    """Noise levels that a distilled file was trained at; empty where they follow from the rest."""

    def shape(
        self, width: int | None = None, height: int | None = None, num_frames: int | None = None
    ) -> dict[str, Any]:
        """Return a clip's width and height in pixels and its frames; None is the model's own."""
        given = {"width": width, "height": height, "num_frames": num_frames}
        return {n: getattr(self, n) if one is None else one for n, one in given.items()}

    def flow_shift_for(self, width: int, height: int) -> float:
        """Return the official shift for a size in pixels (Wan 2.1 I2V uses 3 at 480p, else 5)."""
        if self.flow_shift_480p is not None and width * height <= 832 * 480:
            return self.flow_shift_480p
        return self.flow_shift


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One published Wan model: its inputs, its structure and its official settings."""

    name: str
    title: str
    transformer: TransformerShape
    vae: VaeShape
    defaults: Defaults
    experts: int = 1
    image_input: ImageInput = "none"
    last_image: bool = False
    expand_timesteps: bool = False
    """True: every token has its own timestep, so that a given first frame stays at t = 0
    (TI2V-5B)."""
    transformer_class: str | None = "WanTransformer3DModel"
    """diffusers' class for the transformer; None if diffusers has none."""
    pipeline_class: str | None = "WanPipeline"
    """diffusers' pipeline for it; None if diffusers has none, as for the Fun models."""
    supported: bool = True
    why_not: str = ""
    note: str = ""

    @property
    def image_encoder(self) -> bool:
        """Whether the model needs CLIP image tokens."""
        return self.transformer.image_dim is not None

    @property
    def size_multiple(self) -> int:
        """Width and height in pixels must be multiples of this: 16, and 32 for TI2V-5B."""
        return self.vae.scale_factor_spatial * self.transformer.patch_size[1]


VAE_21: Final = VaeShape(z_dim=16, base_dim=96, decoder_base_dim=96)
VAE_22: Final = VaeShape(
    z_dim=48, base_dim=160, decoder_base_dim=256, is_residual=True, in_channels=12,
    out_channels=12, patch_size=2, scale_factor_spatial=16,
    latents_mean=LATENTS_MEAN_22, latents_std=LATENTS_STD_22,
)  # fmt: skip

_T_1_3B: Final = TransformerShape(heads=12, ffn_dim=8960, layers=30, in_channels=16)
_T_14B: Final = TransformerShape(heads=40, ffn_dim=13824, layers=40, in_channels=16)
_T_5B: Final = TransformerShape(heads=24, ffn_dim=14336, layers=30, in_channels=48, out_channels=48)
_T_I2V_21: Final = replace(_T_14B, in_channels=36, image_dim=1280, added_kv_dim=5120)
_T_I2V_21_SMALL: Final = replace(_T_1_3B, in_channels=36, image_dim=1280, added_kv_dim=1536)

_T_DEMO: Final = TransformerShape(
    heads=4, head_dim=32, ffn_dim=256, layers=6, in_channels=16, text_dim=96
)
_DEMO_SIZE: Final[dict[str, Any]] = {
    "num_inference_steps": 20, "width": 64, "height": 64, "num_frames": 17, "negative_prompt": "",
}  # fmt: skip
_D_T2V_1_3B: Final = Defaults(
    num_inference_steps=50, guidance_scale=6.0, flow_shift=8.0, width=832, height=480
)
_D_T2V_14B: Final = Defaults(num_inference_steps=50, guidance_scale=5.0, flow_shift=5.0)
_D_I2V_21: Final = Defaults(
    num_inference_steps=40, guidance_scale=5.0, flow_shift=5.0, flow_shift_480p=3.0,
    negative_prompt=_NEGATIVE_I2V_21,
)  # fmt: skip
_D_VACE: Final = Defaults(num_inference_steps=50, guidance_scale=5.0, flow_shift=16.0)
_D_T2V_A14B: Final = Defaults(
    num_inference_steps=40, guidance_scale=4.0, guidance_scale_2=3.0, flow_shift=12.0,
    boundary=0.875,
)  # fmt: skip
_D_I2V_A14B: Final = Defaults(
    num_inference_steps=40, guidance_scale=3.5, guidance_scale_2=3.5, flow_shift=5.0,
    boundary=0.9,
)  # fmt: skip
_D_5B: Final = Defaults(
    num_inference_steps=50, guidance_scale=5.0, flow_shift=5.0, fps=24, num_frames=121,
    width=1280, height=704,
)  # fmt: skip

# VideoX-Fun's examples (examples/wan2.1_fun, wan2.2_fun): 50 steps, guidance 6; shift 3 and 5.
_D_FUN_1_3B: Final = replace(_D_T2V_1_3B, flow_shift=3.0)
_D_FUN_14B: Final = replace(_D_T2V_14B, guidance_scale=6.0, flow_shift=3.0)
_D_FUN_A14B: Final = replace(
    _D_I2V_A14B, num_inference_steps=50, guidance_scale=6.0, guidance_scale_2=6.0
)
_D_FUN_5B: Final = replace(_D_5B, guidance_scale=6.0)


# Fields that several variants share. _NO_CLASS is of variants that are recognised, but not run.
_VACE: Final[dict[str, Any]] = {
    "vae": VAE_21,
    "image_input": "optional",
    "last_image": True,
    "transformer_class": "WanVACETransformer3DModel",
    "pipeline_class": "WanVACEPipeline",
}
_NO_CLASS: Final[dict[str, Any]] = {
    "vae": VAE_21,
    "transformer_class": None,
    "pipeline_class": None,
    "supported": False,
    "why_not": "diffusers has no class for its transformer",
}
# The Fun models have diffusers' transformer with more input channels, and layers beside it.
_FUN: Final[dict[str, Any]] = {
    "vae": VAE_21,
    "image_input": "optional",
    "pipeline_class": None,
}
_I2V: Final[dict[str, Any]] = {
    "vae": VAE_21,
    "image_input": "required",
    "pipeline_class": "WanImageToVideoPipeline",
}


def _vace_shape(base: TransformerShape, every: int) -> TransformerShape:
    return replace(base, vace_layers=tuple(range(0, base.layers, every)), vace_in_channels=96)


_ALL: Final = (
    Variant(
        name="wan2.1-t2v-1.3b", title="Wan 2.1 text to video 1.3B",
        transformer=_T_1_3B, vae=VAE_21, defaults=_D_T2V_1_3B,
    ),
    Variant(
        name="wan2.1-t2v-14b", title="Wan 2.1 text to video 14B",
        transformer=_T_14B, vae=VAE_21, defaults=_D_T2V_14B,
        note="One expert of wan2.2-t2v-a14b has the same structure.",
    ),
    Variant(
        name="wan2.1-i2v-14b", title="Wan 2.1 image to video 14B (480P and 720P)",
        transformer=_T_I2V_21, defaults=_D_I2V_21, last_image=True, **_I2V,
        note="The 480P and 720P checkpoints have identical structure and differ only in weights.",
    ),
    Variant(
        name="wan2.1-flf2v-14b", title="Wan 2.1 first and last frame to video 14B",
        transformer=replace(_T_I2V_21, pos_embed_seq_len=514), last_image=True, **_I2V,
        defaults=replace(_D_T2V_14B, flow_shift=16.0, negative_prompt=_NEGATIVE_FLF2V),
    ),
    Variant(
        name="wan2.1-vace-1.3b", title="Wan 2.1 VACE 1.3B", **_VACE,
        transformer=_vace_shape(_T_1_3B, 2), defaults=replace(_D_VACE, width=832, height=480),
    ),
    Variant(
        name="wan2.1-vace-14b", title="Wan 2.1 VACE 14B", **_VACE,
        transformer=_vace_shape(_T_14B, 5), defaults=_D_VACE,
        note="One expert of wan2.2-vace-fun-a14b has the same structure.",
    ),
    Variant(
        name="wan2.2-t2v-a14b", title="Wan 2.2 text to video A14B (two experts)",
        transformer=_T_14B, vae=VAE_21, defaults=_D_T2V_A14B, experts=2,
    ),
    Variant(
        name="wan2.2-i2v-a14b", title="Wan 2.2 image to video A14B (two experts)",
        transformer=replace(_T_14B, in_channels=36), defaults=_D_I2V_A14B, experts=2,
        last_image=True, **_I2V,
    ),
    Variant(
        name="wan2.2-ti2v-5b", title="Wan 2.2 text and image to video 5B",
        transformer=_T_5B, vae=VAE_22, defaults=_D_5B, image_input="optional",
        expand_timesteps=True,
    ),
    Variant(
        name="wan2.2-vace-fun-a14b", title="Wan 2.2 VACE-Fun A14B (two experts)", experts=2,
        transformer=_vace_shape(_T_14B, 5), **_VACE,
        defaults=replace(
            _D_T2V_A14B, num_inference_steps=50, guidance_scale=5.0, guidance_scale_2=5.0
        ),
    ),
    Variant(
        name="wan2.2-animate-14b", title="Wan 2.2 Animate 14B",
        transformer=replace(_T_I2V_21, animate=1, face=FaceShape()), vae=VAE_21,
        transformer_class="WanAnimateTransformer3DModel", pipeline_class="WanAnimatePipeline",
        defaults=Defaults(
            num_inference_steps=20, guidance_scale=1.0, flow_shift=5.0, fps=30, num_frames=77
        ),
    ),
    Variant(
        name="wan-animate-2-14b", title="Wan Animate 2 14B",
        transformer=replace(_T_I2V_21, animate=2), vae=VAE_21, pipeline_class=None,
        defaults=Defaults(
            num_inference_steps=40, guidance_scale=3.0, flow_shift=5.0, fps=24, width=640,
            height=800,
        ),
        note="Its weights have exactly the shapes of wan2.1-i2v-14b; metadata tells it apart.",
    ),
    Variant(
        name="wan2.2-s2v-14b", title="Wan 2.2 speech to video 14B", image_input="required",
        transformer=_T_14B, **_NO_CLASS,
        defaults=Defaults(
            num_inference_steps=40, guidance_scale=4.5, flow_shift=3.0,
            negative_prompt=_NEGATIVE_S2V,
        ),
    ),
    Variant(
        name="wan2.1-fun-inp-1.3b", title="Wan 2.1 Fun InP 1.3B (image to video)", last_image=True,
        transformer=_T_I2V_21_SMALL, **_I2V,
        defaults=replace(_D_T2V_1_3B, flow_shift=5.0),
        note="Trained as first/last-frame inpainting; run as image to video.",
    ),
    Variant(
        name="wan2.1-fun-control-1.3b", title="Wan 2.1 Fun Control 1.3B", **_FUN,
        transformer=replace(_T_I2V_21_SMALL, in_channels=48),
        defaults=_D_FUN_1_3B, note="V1.0 takes no reference picture, V1.1 does.",
    ),
    Variant(
        name="wan2.1-fun-control-14b", title="Wan 2.1 Fun Control 14B", **_FUN,
        transformer=replace(_T_I2V_21, in_channels=48, reference_channels=16),
        defaults=_D_FUN_14B, note="V1.0 takes no reference picture, V1.1 does.",
    ),
    Variant(
        name="wan2.1-fun-camera-1.3b", title="Wan 2.1 Fun Camera 1.3B", **_FUN,
        transformer=replace(_T_I2V_21_SMALL, in_channels=32, camera_channels=24),
        defaults=_D_FUN_1_3B,
    ),
    Variant(
        name="wan2.1-fun-camera-14b", title="Wan 2.1 Fun Camera 14B", **_FUN,
        transformer=replace(_T_I2V_21, in_channels=32, camera_channels=24),
        defaults=_D_FUN_14B,
    ),
    Variant(
        name="wan2.2-fun-control-a14b", title="Wan 2.2 Fun Control A14B (two experts)",
        transformer=replace(_T_14B, in_channels=52, reference_channels=16), experts=2,
        defaults=_D_FUN_A14B, last_image=True, **_FUN,
    ),
    Variant(
        name="wan2.2-fun-camera-a14b", title="Wan 2.2 Fun Camera A14B (two experts)",
        transformer=replace(_T_14B, in_channels=36, camera_channels=24), experts=2,
        defaults=_D_FUN_A14B, last_image=True, **_FUN,
    ),
    Variant(
        name="wan2.2-fun-inp-5b", title="Wan 2.2 Fun InP 5B", last_image=True,
        transformer=replace(_T_5B, in_channels=100), defaults=_D_FUN_5B, expand_timesteps=True,
        **{**_FUN, "vae": VAE_22, "image_input": "required"},
    ),
    Variant(
        name="wan2.2-fun-control-5b", title="Wan 2.2 Fun Control 5B", last_image=True,
        transformer=replace(_T_5B, in_channels=148, reference_channels=48), defaults=_D_FUN_5B,
        expand_timesteps=True, **{**_FUN, "vae": VAE_22},
    ),
    Variant(
        name="wanfit-demo-t2v", title="WanFit demo, text to video (two small experts)", experts=2,
        transformer=_T_DEMO, vae=VAE_21, defaults=replace(
            _D_T2V_A14B, guidance_scale=2.0, guidance_scale_2=1.5, **_DEMO_SIZE
        ),
        note="Ships with WanFit: 64x64 pixels, coloured shapes; the structure of wan2.2-t2v-a14b.",
    ),
    Variant(
        name="wanfit-demo-i2v", title="WanFit demo, image to video (two small experts)", experts=2,
        transformer=replace(_T_DEMO, in_channels=36), last_image=True, **_I2V,
        defaults=replace(_D_I2V_A14B, guidance_scale=2.0, guidance_scale_2=2.0, **_DEMO_SIZE),
        note="Ships with WanFit: 64x64 pixels, coloured shapes; the structure of wan2.2-i2v-a14b.",
    ),
    Variant(
        name="wanfit-demo-vace", title="WanFit demo, VACE (two small experts)", experts=2,
        transformer=_vace_shape(_T_DEMO, 1), **_VACE, defaults=replace(
            _D_T2V_A14B, guidance_scale=2.0, guidance_scale_2=1.5, **_DEMO_SIZE
        ),
        note="wanfit-demo-t2v with its VACE modules; the structure of wan2.2-vace-fun-a14b.",
    ),
    Variant(
        name="wanfit-demo-control", title="WanFit demo, Fun Control (two small experts)", experts=2,
        transformer=replace(_T_DEMO, in_channels=52, reference_channels=16), last_image=True,
        defaults=replace(_D_T2V_A14B, guidance_scale=2.0, guidance_scale_2=1.5, **_DEMO_SIZE),
        note="wanfit-demo-t2v trained further; the structure of wan2.2-fun-control-a14b.", **_FUN,
    ),
    Variant(
        name="wan2.1-humo-17b", title="HuMo (audio and reference to video)",
        transformer=replace(_T_14B, in_channels=36), defaults=_D_T2V_14B, **_NO_CLASS,
    ),
)  # fmt: skip

VARIANTS: Final[Mapping[str, Variant]] = MappingProxyType({v.name: v for v in _ALL})
"""Every variant WanFit knows by name, in the order they were published."""
