"""Pairing: files that do not belong together are refused from their headers; roles only warn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support import wan_layouts as layouts

from wan_core.config import WanModelFiles
from wan_core.detect.detector import ArchitectureDetector, inspect_file
from wan_core.detect.pairing import check_lora, role_hint
from wan_core.errors import (
    CorruptFile,
    MissingFile,
    ModelMismatch,
    UnsafeFile,
    UnsupportedModel,
    WanError,
)

detect = ArchitectureDetector().detect_model_architecture

FILES = {name: layouts.shallow(shapes) for name, (shapes, _) in layouts.FILES.items()} | {
    "vae 2.1": layouts.vae_21(), "vae 2.2": layouts.vae_22(),
    "umt5": layouts.umt5(layers=2), "umt5 small": layouts.umt5(512, 2),
    "t5": layouts.umt5(layers=2, every_block=False),
    "clip": layouts.clip_vision(), "clip small": layouts.clip_vision(768),
    "t2v-14b copy": layouts.shallow(layouts.FILES["t2v-14b"][0]),
    "t2v-14b of 3 blocks": layouts.transformer(5120, 13824, 3, 16),
    "vace 14b": layouts.vace_module(5120, 13824, 2),
    "vace 1.3b": layouts.vace_module(1536, 8960, 2),
    "vace 14b of 3 blocks": layouts.vace_module(5120, 13824, 3),
    "vace 14b damaged": {
        name: size
        for name, size in layouts.vace_module(5120, 13824, 2).items()
        if "vace_blocks.1.ffn.2" not in name
    },
    "lora": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (16, 5120)},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for name, shapes in FILES.items():
        layouts.write_sparse(root / f"{name}.safetensors", layouts.stored(shapes, "bf16"))
    return root


def files(store: Path, **names: str) -> WanModelFiles:
    return WanModelFiles(**{field: store / f"{name}.safetensors" for field, name in names.items()})


# (the files, the error, what it must say: both files, both numbers)
REFUSED: dict[str, tuple[dict[str, str], type[WanError], str]] = {
    "t2v + i2v": ({"transformer": "t2v-14b", "transformer_2": "i2v-a14b"}, ModelMismatch,
                  "t2v-14b.* is a Wan text-to-video .*i2v-a14b.* is a Wan image-to-video"),
    "14b + 5b": ({"transformer": "t2v-14b", "transformer_2": "ti2v-5b"}, ModelMismatch,
                 "heads is 40 in .*t2v-14b.* and 24 in .*ti2v-5b"),
    "14b + 1.3b": ({"transformer": "t2v-14b", "transformer_2": "t2v-1.3b"}, ModelMismatch,
                   "heads is 40 .* and 12 "),
    "2.1 i2v + 2.2 i2v": ({"transformer": "i2v-14b", "transformer_2": "i2v-a14b"}, ModelMismatch,
                          "image_dim is 1280 .* and None"),
    "vace + plain": ({"transformer": "vace-14b", "transformer_2": "t2v-14b"}, ModelMismatch,
                     "a Wan VACE .* a Wan text-to-video"),
    "animate + plain": ({"transformer": "animate-14b", "transformer_2": "i2v-14b"}, ModelMismatch,
                        "a Wan Animate .* a Wan image-to-video"),
    "other depth": ({"transformer": "t2v-14b", "transformer_2": "t2v-14b of 3 blocks"},
                    ModelMismatch, "layers is 2 .* and 3 "),
    "same file twice": ({"transformer": "t2v-14b", "transformer_2": "t2v-14b"}, ModelMismatch,
                        "Both experts are the same file"),
    "lora as model": ({"transformer": "lora"}, UnsupportedModel, "is a LoRA for Wan"),
    "lora as expert": ({"transformer": "t2v-14b", "transformer_2": "lora"}, UnsupportedModel,
                       "is a LoRA for Wan"),
    "vae as model": ({"transformer": "vae 2.1"}, UnsupportedModel, "is a Wan 2.1 VAE"),
    "model as vae": ({"transformer": "t2v-14b", "vae": "t2v-14b"}, UnsupportedModel,
                     "is a Wan text-to-video transformer, not a Wan VAE"),
    "2.1 vae + 5b": ({"transformer": "ti2v-5b", "vae": "vae 2.1"}, ModelMismatch,
                     "vae 2.1.* makes 16 latent channels, .*ti2v-5b.* works on 48"),
    "2.2 vae + 14b": ({"transformer": "i2v-a14b", "vae": "vae 2.2"}, ModelMismatch,
                      "vae 2.2.* makes 48 latent channels, .*i2v-a14b.* works on 16"),
    "t5 of another family": ({"transformer": "t2v-14b", "text_encoder": "t5"}, UnsupportedModel,
                             "is a T5 text encoder .* not a umT5"),
    "umt5 of another width": ({"transformer": "t2v-14b", "text_encoder": "umt5 small"},
                              ModelMismatch, "text of width 512, .*t2v-14b.* takes 4096"),
    "clip as text encoder": ({"transformer": "t2v-14b", "text_encoder": "clip"},
                             UnsupportedModel, "is a CLIP image encoder"),
    "clip of another width": ({"transformer": "i2v-14b", "image_encoder": "clip small"},
                              ModelMismatch, "tokens of width 768, .*i2v-14b.* takes 1280"),
    "a vace module as the model": ({"transformer": "vace 14b"}, UnsupportedModel,
                                   "is a VACE module without its base model, not a Wan transf.*"
                                   "vace of WanModelFiles"),
    "a vace module as the vae": ({"transformer": "t2v-14b", "vae": "vace 14b"}, UnsupportedModel,
                                 "is a VACE module without its base model, not a Wan VAE"),
    "a model as the vace module": ({"transformer": "t2v-14b", "vace": "vace-14b"},
                                   UnsupportedModel, "is a Wan VACE transformer, not a VACE mod"),
    "a vace module of another width": ({"transformer": "t2v-14b", "vace": "vace 1.3b"},
                                       ModelMismatch, "vace 1.3b.* width 1536; .*t2v-14b.* 5120"),
    "a vace module with an i2v model": ({"transformer": "i2v-a14b", "vace": "vace 14b"},
                                        ModelMismatch, "belongs to a text-to-video .*i2v-a14b"),
    "more vace blocks than blocks": ({"transformer": "t2v-14b", "vace": "vace 14b of 3 blocks"},
                                     ModelMismatch, "has 3 blocks, .* only 2"),
    "a damaged vace module": ({"transformer": "t2v-14b", "vace": "vace 14b damaged"}, CorruptFile,
                              "lacks 2 tensors .*vace_blocks.1.ffn.2"),
    "a module for a model that is not there": (
        {"transformer": "t2v-14b", "vace": "vace 14b", "vace_2": "vace 14b"}, MissingFile,
        "transformer_2 is not given, and its module is"),
    "a module for one of two experts": (
        {"transformer": "t2v-14b", "transformer_2": "t2v-14b copy", "vace": "vace 14b"},
        MissingFile, r"transformer_2 has no VACE module.* \(vace_2; in ComfyUI vace_module_low\)"),
    "one module for both experts": (
        {"transformer": "t2v-14b", "transformer_2": "t2v-14b copy", "vace": "vace 14b",
         "vace_2": "vace 14b"}, ModelMismatch, "of both experts are the same file"),
    "no such file": ({"transformer": "gone"}, MissingFile, "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(store: Path, name: str) -> None:
    chosen, kind, text = REFUSED[name]
    start = time.process_time()
    with pytest.raises(WanError, match=text) as caught:
        detect(files(store, **chosen))
    assert type(caught.value) is kind and time.process_time() - start < 1


def test_a_link_to_the_same_file_is_the_same_file(store: Path, tmp_path: Path) -> None:
    (tmp_path / "low.safetensors").symlink_to(store / "t2v-14b.safetensors")
    chosen = WanModelFiles(
        transformer=store / "t2v-14b.safetensors", transformer_2=tmp_path / "low.safetensors"
    )
    with pytest.raises(ModelMismatch, match="same file"):
        detect(chosen)


def test_a_vae_whose_latents_nobody_knows(tmp_path: Path) -> None:
    shapes = layouts.transformer(256, 512, 2, 8, 8)
    transformer = layouts.write_sparse(tmp_path / "x.safetensors", layouts.stored(shapes, "bf16"))
    file = layouts.stored(layouts.vae_21(8), "bf16")
    vae = layouts.write_sparse(tmp_path / "vae.safetensors", file)
    with pytest.raises(UnsupportedModel, match="8 latent channels, .* statistics .* are unknown"):
        detect(WanModelFiles(transformer=transformer, vae=vae))


def test_a_whole_pipeline_of_single_files(store: Path, tmp_path: Path) -> None:
    low = layouts.write_sparse(
        tmp_path / "low.safetensors", layouts.stored(FILES["i2v-a14b"], "fp8_scaled old")
    )
    found = detect(
        WanModelFiles(
            transformer=store / "i2v-a14b.safetensors",
            transformer_2=low,
            vae=store / "vae 2.1.safetensors",
            text_encoder=store / "umt5.safetensors",
            tokenizer=store,
        )  # fmt: skip
    )
    assert found.name == "wan2.2-i2v-a14b" and found.two_experts
    assert found.vae and found.vae.z_dim == 16
    assert {n: c.weight_kind for n, c in found.components.items()} == {
        "transformer": "bf16", "transformer_2": "fp8_scaled", "vae": "bf16",
        "text_encoder": "bf16", "tokenizer": "",
    }  # fmt: skip


def test_two_t2v_files_are_wan_22_one_leaves_the_question(store: Path, tmp_path: Path) -> None:
    for name in ("a_high_noise", "a_low_noise"):
        layouts.write_sparse(
            tmp_path / f"{name}.safetensors", layouts.stored(layouts.FILES["t2v-14b"][0], "bf16")
        )
    high, low = tmp_path / "a_high_noise.safetensors", tmp_path / "a_low_noise.safetensors"
    pair = detect(WanModelFiles(transformer=high, transformer_2=low))
    assert pair.candidates == ("wan2.2-t2v-a14b",) and not pair.warnings
    alone = detect(WanModelFiles(transformer=low))
    assert alone.candidates == ("wan2.1-t2v-14b", "wan2.2-t2v-a14b")
    assert "probably the low-noise one, from the file name 'a_low_noise" in alone.warnings[0]
    with pytest.raises(ModelMismatch, match="The experts are swapped") as swapped:
        detect(WanModelFiles(transformer=low, transformer_2=high))
    for path in (low, high):
        assert f"{path.name}' was chosen as" in str(swapped.value)


ROLES = {"high": "high_noise", "low": "low_noise", None: "model"}


@pytest.mark.parametrize("first", ROLES)
@pytest.mark.parametrize("second", ROLES)
def test_one_name_only_warns(tmp_path: Path, first: str | None, second: str | None) -> None:
    """The socket decides; a name that contradicts it warns, two that do are refused."""
    paths = []
    for folder, hint in (("1", first), ("2", second)):
        (tmp_path / folder).mkdir()
        file = layouts.stored(FILES["i2v-a14b"], "bf16")
        path = tmp_path / folder / f"wan_{ROLES[hint]}.safetensors"
        paths.append(layouts.write_sparse(path, file))
    files = WanModelFiles(transformer=paths[0], transformer_2=paths[1])
    if (first, second) == ("low", "high"):
        with pytest.raises(ModelMismatch, match="The experts are swapped"):
            detect(files)
        return
    found = detect(files)
    assert found.name == "wan2.2-i2v-a14b"
    assert len(found.warnings) == (first == "low") + (second == "high")


HINTS = {
    "TI2V_5B_LowVRAM": None, "wan_low_denoise": None, "wan_LOWRes": None, "Low-Light_wan": None,
    "Low-Step-Lightning": None, "wan_high_quality": None, "low_noise_and_high_noise": None,
    "Wan2.2-TI2V-5B-high": None, "lowres_highres": None, "slow_motion": None, "highway": None,
    "highnoise": "high", "noise_high": "high", "wan2.2_t2v_high_noise_14B_fp8_scaled": "high",
    "Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ": "low", "Wan2.2-T2V-A14B-LowNoise-Q4_K_M": "low",
    "wan2.2_i2v_low_noise_14B_fp16": "low", "HighNoise-Q8_0": "high",
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_hints_are_whole_words(name: str) -> None:
    hint = role_hint(f"/models/{name}.safetensors")
    assert (hint[0] if hint else None) == HINTS[name]


NAMES_OF_21 = {
    "wan2.1_t2v_14B_bf16": True, "Wan2_1-T2V-14B_fp8": True, "wan21_t2v": True, "Wan-2.1 mix": True,
    "wan2.2_t2v_low_noise_14B": False, "wan2.14B": False, "my_wan_t2v_2.1": False, "swan21": False,
}  # fmt: skip


def test_a_file_named_2_1_as_an_expert_is_told(store: Path, tmp_path: Path) -> None:
    high, file = store / "t2v-14b.safetensors", layouts.stored(FILES["t2v-14b"], "bf16")
    for name, told in NAMES_OF_21.items():
        low = layouts.write_sparse(tmp_path / f"{name}.safetensors", file)
        parts = [(high, low), (low, high)] if told else [(high, low)]
        for one, two in parts:
            found = detect(WanModelFiles(transformer=one, transformer_2=two))
            warnings = [text for text in found.warnings if "its name says Wan 2.1" in text]
            assert len(warnings) == told and all(name in text for text in warnings), name


def test_metadata_comes_before_the_name() -> None:
    hint = role_hint("wan_low_noise.gguf", {"general.name": "Wan2.2 T2V HighNoise 14B"})
    assert hint == ("high", "metadata general.name 'Wan2.2 T2V HighNoise 14B'")


def test_loras(store: Path) -> None:
    lora = inspect_file(store / "lora.safetensors")
    large = inspect_file(store / "t2v-14b.safetensors")
    small = inspect_file(store / "t2v-1.3b.safetensors")
    assert large.transformer and small.transformer
    check_lora(large.transformer, lora, large.table.path)
    with pytest.raises(ModelMismatch, match=r"lora.safetensors.* width 5120; .*t2v-1.3b.* 1536"):
        check_lora(small.transformer, lora, small.table.path)


def test_a_chosen_pickle_is_looked_into_and_one_that_runs_code_refused(
    store: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    shapes = layouts.vae_21(16, 4)
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "vae.pth")
    found = detect(
        WanModelFiles(transformer=store / "t2v-14b.safetensors", vae=tmp_path / "vae.pth")
    )
    assert found.components["vae"].format == "pickle" and found.vae and found.vae.base_dim == 4
    torch.save({"a": print}, tmp_path / "vae.pth")
    with pytest.raises(UnsafeFile, match="asks for 'builtins.print'|asks for '__builtin__.print'"):
        detect(WanModelFiles(transformer=store / "t2v-14b.safetensors", vae=tmp_path / "vae.pth"))


# A VACE module beside its base -----------------------------------------------------------------


def module_file(path: Path, kind: str = "bf16", prefix: str = "", blocks: int = 8) -> Path:
    shapes = layouts.vace_module(5120, 13824, blocks)
    file = layouts.stored({prefix + name: size for name, size in shapes.items()}, kind)
    return layouts.write_sparse(path, file)


def test_a_module_and_its_base_are_the_checkpoint_of_both(tmp_path: Path) -> None:
    """The numbers, tensors and sizes of a pair are those of the published single file."""
    shapes, _ = layouts.FILES["vace-14b"]
    whole = detect(
        layouts.write_sparse(tmp_path / "whole.safetensors", layouts.stored(shapes, "bf16"))
    )
    base = layouts.write_sparse(
        tmp_path / "base.safetensors", layouts.stored(layouts.FILES["t2v-14b"][0], "bf16")
    )
    for prefix in ("", "model.diffusion_model."):
        module = module_file(tmp_path / "module.safetensors", prefix=prefix)
        found = detect(WanModelFiles(transformer=base, vace=module))
        assert found.name == whole.name == "wan2.1-vace-14b" and not found.custom_size
        assert found.transformer == whole.transformer
        assert found.transformer.vace_layers == (0, 5, 10, 15, 20, 25, 30, 35)
        part, one = found.components["transformer"], whole.components["transformer"]
        assert (part.nbytes, part.parameters, part.stored) == (
            one.nbytes,
            one.parameters,
            one.stored,
        )
        assert part.files == (base, module) and part.module == module
        assert any("module.safetensors is joined with base.safetensors" in r for r in found.reasons)


def test_a_module_is_stored_otherwise_than_its_base(tmp_path: Path) -> None:
    base = layouts.write_sparse(
        tmp_path / "base.safetensors",
        layouts.stored(layouts.FILES["t2v-14b"][0], "fp8_scaled old"),
    )
    plain, scaled = (
        module_file(tmp_path / f"{kind[:4]}.safetensors", kind)
        for kind in ("bf16", "fp8_scaled new")
    )
    first = detect(WanModelFiles(transformer=base, vace=plain)).components["transformer"]
    second = detect(WanModelFiles(transformer=base, vace=scaled)).components["transformer"]
    assert first.weight_kind == second.weight_kind == "fp8_scaled"
    assert first.stored and second.stored and first.stored.blocks == second.stored.blocks
    assert first.stored.rest == second.stored.rest
    in_bf16, in_fp8 = (sum(block.nbytes(2) for block in c.stored.vace) for c in (first, second))
    assert in_bf16 > in_fp8 > 0


def test_each_expert_has_a_module_of_its_own(tmp_path: Path) -> None:
    shapes = layouts.shallow(layouts.FILES["t2v-14b"][0])
    names = {}
    for role in ("high", "low"):
        names[role] = layouts.write_sparse(
            tmp_path / f"wan_{role}_noise.safetensors", layouts.stored(shapes, "bf16")
        )
        names["vace " + role] = module_file(tmp_path / f"vace_{role}_noise.safetensors", blocks=2)
    pair = {"transformer": names["high"], "transformer_2": names["low"]}
    found = detect(WanModelFiles(**pair, vace=names["vace high"], vace_2=names["vace low"]))
    assert found.name == "wan2.2-vace-fun-a14b" and found.two_experts and not found.warnings
    assert found.components["transformer_2"].module == names["vace low"]
    with pytest.raises(ModelMismatch, match="vace_low.* high-noise expert, but .* low, while"):
        detect(WanModelFiles(**pair, vace=names["vace low"], vace_2=names["vace high"]))


def test_only_the_names_of_a_pair_of_modules_disagree(tmp_path: Path) -> None:
    """A base whose name says nothing: the module's name is no proof, and a warning says so."""
    shapes = layouts.shallow(layouts.FILES["t2v-14b"][0])
    a, b = (
        layouts.write_sparse(tmp_path / f"{name}.safetensors", layouts.stored(shapes, "bf16"))
        for name in ("a", "b")
    )
    high, low = (module_file(tmp_path / f"vace_{r}.safetensors", blocks=2) for r in ("high", "low"))
    found = detect(WanModelFiles(transformer=a, transformer_2=b, vace=low, vace_2=high))
    assert sum("Check that the two are not swapped" in text for text in found.warnings) == 2
