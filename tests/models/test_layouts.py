"""Layouts and leftovers: what detection recognises, loading reads, with the same numbers.

Both ask ``models.layouts`` and ``models.leftovers``. Each test walks one of the tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from support import reference_layouts as references
from support import wan_layouts as layouts
from support.layout_models import assert_equal, clip, umt5, vae
from support.tiny_models import make_transformer

from wan_core.detect.detector import ArchitectureDetector, inspect_file
from wan_core.errors import UnsupportedModel, WanError
from wan_core.loading.component import load_component
from wan_core.models.layouts import LAYOUTS, find_layouts, likely_layout, own_names
from wan_core.models.leftovers import LEFTOVERS, LORA, find_leftovers
from wan_core.models.names import map_names

State = dict[str, torch.Tensor]
PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "model.", "net.", "module."),
    "vae": ("", "vae.", "first_stage_model.", "model.", "module."),
    "text_encoder": ("", "text_encoders.umt5xxl.transformer.", "text_encoder.", "model."),
    "image_encoder": ("", "vision_model.", "visual.", "clip_vision.", "clip.vision_model."),
}  # fmt: skip
"""Prefixes that files have: of ComfyUI's checkpoints, of other packs and of trainers."""


def modules() -> dict[str, tuple[Any, dict[str, State]]]:
    """By kind: a module with random weights, and its tensors in each layout."""
    torch.manual_seed(3)
    transformer = make_transformer(
        "wan2.1-i2v", attention_head_dim=128, ffn_dim=320, image_dim=160, added_kv_proj_dim=256
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    made = {"transformer": transformer, "vae": vae("2.1"), "text_encoder": umt5(),
            "image_encoder": clip()}  # fmt: skip
    states = {kind: references.state_of(module) for kind, module in made.items()}
    image = {k.removeprefix("vision_model."): v for k, v in states["image_encoder"].items()}
    official = references.original_clip(image)
    visual = {k.removeprefix("visual."): v for k, v in official.items() if k.startswith("visual.")}
    forms = {
        "transformer": {"original": references.original_transformer(states["transformer"])},
        "vae": {"original": references.original_vae(states["vae"], 2)},
        "text_encoder": {
            "original": references.original_umt5(states["text_encoder"]),
            "gguf": references.gguf_umt5(states["text_encoder"]),
        },
        "image_encoder": {"original": visual},
    }
    plain = states | {"image_encoder": image}
    return {k: (m, forms[k] | {"diffusers": plain[k]}) for k, m in made.items()}


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Any, dict[str, State]]]:
    return modules()


def write(path: Path, state: State) -> Path:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    return path


def check(path: Path, kind: str, module: Any) -> None:
    """What is recognised as ``kind`` is loaded as it, with the module's numbers."""
    assert inspect_file(path).kind == kind
    state = references.state_of(module)
    assert_equal(load_component(path, kind=kind), state)


CASES = [(one.kind, one.name, p) for one in LAYOUTS for p in PREFIXES[one.kind]]


@pytest.mark.parametrize(("kind", "layout", "prefix"), CASES)
def test_every_layout_under_every_prefix(
    tmp_path: Path, made: Any, kind: str, layout: str, prefix: str
) -> None:
    module, states = made[kind]
    state = references.with_prefix(states[layout], prefix)
    path = write(tmp_path / "part.safetensors", state)
    check(path, kind, module)
    part = inspect_file(path)
    assert part.prefix == prefix and part.layout in (layout, "comfyui")
    # A file's bytes are those of its own tensors.
    over = find_leftovers(kind, states[layout])
    whole = {name: value for name, value in states[layout].items() if name not in over}
    assert part.own.nbytes == sum(value.nbytes for value in whole.values())


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_compiled_module_s_names(tmp_path: Path, made: Any, kind: str) -> None:
    """torch.compile puts a word into names, at their beginning or inside."""
    module, states = made[kind]
    for layout, state in states.items():
        first = {f"_orig_mod.{name}": value for name, value in state.items()}
        inside = {re.sub(r"(\.\d+\.)", r"\1_orig_mod.", n, count=1): v for n, v in state.items()}
        both = {f"model._orig_mod.{name}": value for name, value in inside.items()}
        for names in (first, inside, both):
            check(write(tmp_path / "part.safetensors", names), kind, module)
        assert inside != state, layout


def write_gguf(
    path: Path, state: State, *, flat: bool = False, trimmed: bool = False, half: bool = False
) -> Path:
    """Write a GGUF of plain floats; ``flat`` leaves at most four axes, ``trimmed`` no leading 1."""
    writer = gguf.GGUFWriter(str(path), "wan")
    for name, value in state.items():
        shape = tuple(value.shape)
        if flat and len(shape) > 4:
            shape = (shape[0] * shape[1], *shape[2:])
        while trimmed and len(shape) > 2 and shape[0] == 1:
            shape = shape[1:]
        numbers = value.detach().reshape(shape)
        writer.add_tensor(name, (numbers.half() if half else numbers.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("form", ["whole", "flat", "trimmed", "flat and trimmed"])
@pytest.mark.parametrize("kind", PREFIXES)
def test_every_component_as_gguf(
    tmp_path: Path, made: Any, kind: str, form: str, half: bool
) -> None:
    """GGUF files keep five axes, or merge the first two, or leave out leading ones."""
    module, states = made[kind]
    for state in states.values():
        path = tmp_path / "part.gguf"
        write_gguf(path, state, flat="flat" in form, trimmed="trimmed" in form, half=half)
        assert inspect_file(path).kind == kind
        wanted = references.state_of(module)
        if half:
            wanted = {name: value.half().float() for name, value in wanted.items()}
        assert_equal(load_component(path, torch.float32, kind=kind), wanted)


def test_positions_without_their_leading_axis(tmp_path: Path) -> None:
    """A first-and-last-frame GGUF of a writer that trims axes is not taken for image-to-video."""
    torch.manual_seed(4)
    model = make_transformer(
        "wan2.1-flf2v", attention_head_dim=128, ffn_dim=320, image_dim=160, added_kv_proj_dim=256
    )
    state = references.original_transformer(references.state_of(model))
    path = write_gguf(tmp_path / "flf2v.gguf", state, trimmed=True)
    assert inspect_file(path).table.tensors["img_emb.emb_pos"].shape == (514, 160)
    check(path, "transformer", model)
    assert ArchitectureDetector().detect_model_architecture(path).name == "wan2.1-flf2v-14b"


def test_a_vae_of_pictures_is_none_of_ours(tmp_path: Path) -> None:
    """The same names with kernels of two axes belong to a VAE for pictures."""
    shapes = {n: s[:2] + s[3:] if len(s) == 5 else s for n, s in layouts.vae_21(16, 4).items()}
    file = layouts.stored(shapes, "bf16")
    assert inspect_file(layouts.write_sparse(tmp_path / "x.safetensors", file)).kind == "other"


# Leftovers -----------------------------------------------------------------------------------

# An example of each entry of the table, for each kind of component that may have it.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "a tag for the variant": ("model_type.Wan2_1-I2V-14B-720P",),
    "a norm no forward uses": (
        "blocks.0.attn2.norm_added_q.weight", "blocks.1.cross_attn.norm_added_q.weight"),
    "a rotary table, which is computed": (
        "freqs", "rope.freqs", "rope.freqs_cos", "rope.freqs_sin", "freqs_cis"),
    "a blur kernel, which is computed": ("motion_encoder.enc.net_app.convs.1.conv2.0.kernel",),
    "ComfyUI's sampling settings": ("model_sampling.sigmas",),
    "an averaged copy of the weights": ("model_ema.decay", "model_ema.num_updates", "ema.decay"),
    "latent statistics, which are known": ("mean", "std", "latents_mean", "latents_std"),
    "the VAE's training": ("loss.logvar", "loss.discriminator.main.0.weight", "logvar"),
    "a counter": ("loss.num_batches_tracked", "num_batches_tracked", "global_step"),
    "a table of positions": (
        "embeddings.position_ids", "vision_model.embeddings.position_ids", "position_ids"),
    "umT5's decoder": ("decoder.final_layer_norm.weight", "dec.output_norm.weight",
                       "lm_head.weight", "output.weight"),
    "a tokenizer": ("spiece_model",),
    "a scale of similarities": ("logit_scale", "log_scale"),
    "a projection of CLIP that Wan does not use": (
        "visual_projection.weight", "text_projection.weight", "head", "visual.proj"),
    "CLIP's text side": ("textual.token_embedding.weight", "text_model.final_layer_norm.weight"),
    LORA.what: (
        "blocks.0.self_attn.q.lora_down.weight", "blocks.0.self_attn.q.lora_up.weight",
        "blocks.0.self_attn.q.alpha", "blocks.1.cross_attn.k.diff_b",
        "diffusion_model.blocks.0.ffn.0.lora_A.default.weight"),
}  # fmt: skip
DTYPES = (torch.float32, torch.int64, torch.uint8, torch.float64)


def test_every_leftover_has_an_example() -> None:
    assert set(EXAMPLES) == {one.what for one in (*LEFTOVERS, LORA)}


@pytest.mark.parametrize("what", EXAMPLES)
def test_what_is_left_over_changes_nothing(tmp_path: Path, made: Any, what: str) -> None:
    """In every layout, whatever the dtype: the same answer, the same weights."""
    entry = next(one for one in (*LEFTOVERS, LORA) if one.what == what)
    for kind in entry.kinds:
        module, states = made[kind]
        for layout, state in states.items():
            extra = {name: torch.ones(3, dtype=DTYPES[0]) for name in EXAMPLES[what]}
            path = write(tmp_path / "part.safetensors", state | extra)
            check(path, kind, module)
            part = inspect_file(path)
            assert not part.unexpected and part.layout == layout
            told = any("not used" in text for text in part.warnings)
            assert told == entry.said, part.warnings


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_leftover_may_have_any_dtype(tmp_path: Path, made: Any, dtype: torch.dtype) -> None:
    for kind, (module, states) in made.items():
        names = [EXAMPLES[one.what][0] for one in LEFTOVERS if kind in one.kinds]
        extra = {name: torch.ones(1).to(dtype) for name in names}
        check(write(tmp_path / "part.safetensors", states["diffusers"] | extra), kind, module)


@pytest.mark.parametrize(
    "name", ["extra.weight", "blocks.0.gate.alpha", "a1.weight", "x.a1.weight"]
)
def test_what_stands_on_no_list_makes_a_derivative(tmp_path: Path, made: Any, name: str) -> None:
    for kind, (_, states) in made.items():
        for state in states.values():
            path = write(tmp_path / "part.safetensors", state | {name: torch.ones(8)})
            with pytest.raises(WanError, match=re.escape(name)):
                load_component(path, kind=kind)
            if kind == "transformer":
                with pytest.raises(UnsupportedModel, match=re.escape(name)):
                    ArchitectureDetector().detect_model_architecture(path)


def test_the_two_sides_agree_on_names() -> None:
    """For any file, what one calls left over the other ignores, and the rest has a parameter."""
    for name, (shapes, _) in layouts.FILES.items():
        extra = [one for what in EXAMPLES for one in EXAMPLES[what]]
        names = [*own_names([*shapes, *extra], "")]
        leftovers = find_leftovers("transformer", names)
        mapped = map_names("transformer", names)
        assert set(mapped.ignored) == set(leftovers), name
        used = {source.name for source in mapped.sources.values()}
        assert used == set(names) - set(leftovers), name


def test_the_layout_is_found_from_a_part_of_its_names(made: Any) -> None:
    """A file without some of the marks is still read by the rules of its own layout."""
    for kind, (_, states) in made.items():
        for layout, state in states.items():
            marks = next(one.marks for one in LAYOUTS if (one.kind, one.name) == (kind, layout))
            for mark in marks:
                gone = {mark} if isinstance(mark, str) else set(mark)
                names = [name for name in state if name not in gone]
                assert kind not in find_layouts(names)
                assert likely_layout(kind, names) == layout
    with pytest.raises(ValueError, match="no tensor names are known for 'scheduler'"):
        likely_layout("scheduler", [])


def test_names_apart_are_not_the_transformer_s() -> None:
    names = ["blocks.0.x.weight", "vae.conv1.weight", "model_ema.blocks.0.x.weight"]
    assert own_names(names, "") == {"blocks.0.x.weight": "blocks.0.x.weight"}
    assert own_names(names, "vae.") == {"conv1.weight": "vae.conv1.weight"}
