"""folders: diffusers folders and official releases, and every way they can be broken."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import bad_files, tiny_models
from support import wan_layouts as layouts

from wan_core.config import WanModelFiles
from wan_core.detect.detector import ArchitectureDetector
from wan_core.errors import (
    CorruptFile,
    MissingFile,
    ModelMismatch,
    UnsafeFile,
    UnsupportedModel,
    WanError,
)

detect = ArchitectureDetector().detect_model_architecture


def sparse(path: Path, shapes: layouts.Shapes) -> Path:
    return layouts.write_sparse(path, layouts.stored(shapes, "bf16"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for family in tiny_models.FAMILIES:
        tiny_models.make_folder(root / family, family)
    tiny_models.make_folder(root / "sharded", "wan2.1-t2v", max_shard_size="40KB")
    return root


@pytest.fixture
def folder(folders: Path, tmp_path: Path) -> Any:
    def copy(family: str) -> Path:
        target = tmp_path / family
        if target.exists():
            shutil.rmtree(target)
        return Path(shutil.copytree(folders / family, target))

    return copy


EXPECTED = {
    "wan2.1-t2v": ("wan2.1-t2v-1.3b", "WanPipeline", 16),
    "wan2.1-i2v": ("wan2.1-i2v-14b", "WanImageToVideoPipeline", 16),
    "wan2.1-flf2v": ("wan2.1-flf2v-14b", "WanImageToVideoPipeline", 16),
    "wan2.2-t2v-a14b": ("wan2.2-t2v-a14b", "WanPipeline", 16),
    "wan2.2-i2v-a14b": ("wan2.2-i2v-a14b", "WanImageToVideoPipeline", 16),
    "wan2.2-ti2v-5b": ("wan2.2-ti2v-5b", "WanPipeline", 32),
    "sharded": ("wan2.1-t2v-1.3b", "WanPipeline", 16),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_diffusers_folders(folders: Path, family: str) -> None:
    name, pipeline, multiple = EXPECTED[family]
    found = detect(folders / family)
    assert (found.name, found.pipeline_class, found.size_multiple) == (name, pipeline, multiple)
    assert found.custom_size and found.layout == "diffusers" and found.weight_kind == "fp32"
    assert (found.transformer.heads, found.transformer.head_dim) == (2, 12)
    assert found.two_experts == ("a14b" in family) and not found.warnings
    config = json.loads((folders / family / "vae" / "config.json").read_text())
    assert found.vae and list(found.vae.latents_mean) == config["latents_mean"]
    assert found.vae.base_dim == 3 and found.vae.dim_mult == (1, 1, 1, 1)
    files = [f for c in found.components.values() for f in c.files]
    assert all(file.is_file() for file in files)
    if family == "sharded":
        assert len(found.components["transformer"].files) > 2


def test_the_class_name_in_the_folder_does_not_decide(folder: Any) -> None:
    path = folder("wan2.2-i2v-a14b")
    change_json(path / "model_index.json", _class_name="WanPipeline")
    found = detect(path)
    assert found.pipeline_class == "WanImageToVideoPipeline"
    assert any("says WanPipeline; the structure calls for" in reason for reason in found.reasons)


def change_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data.pop(key, None) if value is ... else data.update({key: value})
    path.write_text(json.dumps(data))


def weights(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def spoil_config(component: str, **changes: Any) -> Any:
    def spoil(path: Path) -> None:
        change_json(path / component / "config.json", **changes)

    return spoil


def spoil_index(**changes: Any) -> Any:
    return lambda path: change_json(path / "model_index.json", **changes)


def remove(name: str) -> Any:
    return lambda path: shutil.rmtree(path / name)


def to_pickle(path: Path) -> None:
    file = weights(path / "transformer")
    file.rename(file.with_suffix(".bin"))


def cut(path: Path) -> None:
    file = weights(path / "vae")
    file.write_bytes(file.read_bytes()[:-1204])


def swap(component: str, other: str, other_component: str | None = None) -> Any:
    """Replace a component by that of another family."""

    def spoil(path: Path, folders: Path) -> None:
        shutil.rmtree(path / component)
        shutil.copytree(folders / other / (other_component or component), path / component)

    return spoil


FAULTS: dict[str, tuple[str, Any, type[WanError], str]] = {
    "no folder": ("wan2.1-t2v", lambda p: shutil.rmtree(p), MissingFile, "does not exist"),
    "no transformer": ("wan2.1-t2v", remove("transformer"), MissingFile, "lacks transformer"),
    "no vae": ("wan2.1-t2v", remove("vae"), MissingFile, r"lacks vae \(it holds scheduler"),
    "no tokenizer": ("wan2.1-t2v", remove("tokenizer"), MissingFile, "lacks tokenizer"),
    "no scheduler": ("wan2.1-t2v", remove("scheduler"), MissingFile, "lacks scheduler"),
    "no second expert": (
        "wan2.2-t2v-a14b", remove("transformer_2"), MissingFile, "lacks transformer_2"),
    "no image encoder": (
        "wan2.1-i2v", spoil_index(image_encoder=[None, None]), MissingFile,
        "image tokens of width 16, and there is no image encoder"),
    "second expert not listed": (
        "wan2.2-t2v-a14b", spoil_index(transformer_2=[None, None]), MissingFile,
        "boundary_ratio 0.875 in model_index.json calls for two experts"),
    "second expert of i2v not listed": (
        "wan2.2-i2v-a14b", spoil_index(transformer_2=[None, None], boundary_ratio=None),
        MissingFile, "has two experts and this folder holds one"),
    "transformer not listed": (
        "wan2.1-t2v", spoil_index(transformer=[None, None]), MissingFile, "does not list"),
    "another pipeline": (
        "wan2.1-t2v", spoil_index(_class_name="FluxPipeline"), UnsupportedModel,
        "is a FluxPipeline folder, not a Wan model"),
    "index is no JSON": (
        "wan2.1-t2v", lambda p: (p / "model_index.json").write_text("{"), CorruptFile,
        "not valid JSON"),
    "no config": (
        "wan2.1-t2v", lambda p: (p / "vae" / "config.json").unlink(), MissingFile,
        "config.json' is missing"),
    "empty tokenizer": (
        "wan2.1-t2v", lambda p: [f.unlink() for f in (p / "tokenizer").iterdir()], MissingFile,
        "holds none of tokenizer.json"),
    "pickles only": ("wan2.1-t2v", to_pickle, UnsafeFile, r"holds its weights only as .*\.bin"),
    "half downloaded": ("wan2.1-t2v", cut, CorruptFile, "ends 1,204 bytes early"),
    "layers": (
        "wan2.1-t2v", spoil_config("transformer", num_layers=3), ModelMismatch,
        "says num_layers 3, the weights have 2"),
    "heads": (
        "wan2.1-t2v", spoil_config("transformer", num_attention_heads=3), ModelMismatch,
        r"3 heads of 12 \(width 36\), the weights have width 24"),
    "head count no number": (
        "wan2.1-t2v", spoil_config("transformer", num_attention_heads="2"), CorruptFile,
        "not a whole number"),
    "field absent": (
        "wan2.1-t2v", spoil_config("transformer", ffn_dim=...), ModelMismatch,
        "says ffn_dim 13824, the weights have 32"),
    "image_dim": (
        "wan2.1-i2v", spoil_config("transformer", image_dim=None), ModelMismatch,
        "says image_dim none, the weights have 16"),
    "z_dim": (
        "wan2.1-t2v", spoil_config("vae", z_dim=8), ModelMismatch,
        "says z_dim 8, the weights have 16"),
    "VAE scale": (
        "wan2.2-ti2v-5b", spoil_config("vae", scale_factor_spatial=8), ModelMismatch,
        "says scale_factor_spatial 8, the weights have 16"),
    "latent statistics": (
        "wan2.2-ti2v-5b", spoil_config("vae", latents_mean=[0.0] * 16), ModelMismatch,
        "has 16 values, the VAE has 48"),
    "latent deviation 0": (
        "wan2.1-t2v", spoil_config("vae", latents_std=[0.0] * 16), CorruptFile, "not above 0"),
    "text width in config": (
        "wan2.1-t2v", spoil_config("text_encoder", d_model=64), ModelMismatch,
        "says d_model 64, the weights have 32"),
    "VAE of the 5B": (
        "wan2.1-t2v", swap("vae", "wan2.2-ti2v-5b"), ModelMismatch,
        "makes 48 latent channels, the transformer .* works on 16. Use the Wan 2.1 VAE"),
    "VAE of 2.1 with the 5B": (
        "wan2.2-ti2v-5b", swap("vae", "wan2.1-t2v"), ModelMismatch,
        "makes 16 latent channels, the transformer .* works on 48. Use the Wan 2.2 VAE"),
    "VAE as transformer": (
        "wan2.1-t2v", swap("transformer", "wan2.1-t2v", "vae"), UnsupportedModel,
        r"is a Wan 2.1 VAE \(16 channels\), not a Wan transformer"),
    "image encoder as text encoder": (
        "wan2.1-t2v", swap("text_encoder", "wan2.1-i2v", "image_encoder"), UnsupportedModel,
        "is a CLIP image encoder .* not a umT5 text encoder"),
    "experts of two families": (
        "wan2.2-t2v-a14b", swap("transformer_2", "wan2.2-i2v-a14b"), ModelMismatch,
        "experts are of different kinds"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_folder_faults(folder: Any, folders: Path, name: str) -> None:
    family, spoil, kind, text = FAULTS[name]
    path = folder(family)
    if spoil.__code__.co_argcount == 2:
        spoil(path, folders)
    else:
        spoil(path)
    with pytest.raises(WanError, match=text) as caught:
        detect(path)
    assert type(caught.value) is kind


def test_shard_faults_in_a_folder(folder: Any) -> None:
    path = folder("sharded")
    shards = sorted((path / "transformer").glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(MissingFile, match=rf"1 of {len(shards)} shards"):
        detect(path)


def test_another_text_width(folder: Any) -> None:
    path = folder("wan2.1-t2v")
    model = tiny_models.make_transformer("wan2.1-t2v", text_dim=48)
    shutil.rmtree(path / "transformer")
    model.save_pretrained(path / "transformer")
    with pytest.raises(ModelMismatch, match="gives text of width 32, the transformer .* takes 48"):
        detect(path)


def test_a_folder_of_models_is_none(folders: Path) -> None:
    with pytest.raises(MissingFile, match="holds the models sharded, wan2.1-flf2v, .* Choose one"):
        detect(folders)
    assert detect(folders / "wan2.1-t2v" / "model_index.json").name == "wan2.1-t2v-1.3b"


def test_parts_named_one_by_one_keep_their_configs(folders: Path) -> None:
    """A component folder's config.json counts as it does inside a whole folder."""
    path = folders / "wan2.2-ti2v-5b"
    found = detect(
        WanModelFiles(
            transformer=path / "transformer",
            vae=path / "vae",
            text_encoder=path / "text_encoder",
            tokenizer=path / "tokenizer",
        )
    )
    whole = detect(path)
    assert found.transformer == whole.transformer and found.vae == whole.vae
    assert found.name == whole.name


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "text_encoder", "vae"])
def test_a_quantisation_asked_for_by_a_config_is_refused_at_once(folder: Any, part: str) -> None:
    """Not when the weights are read, after the text was encoded."""
    path = folder("wan2.2-t2v-a14b")
    file = path / part / "config.json"
    how = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | how))
    names = ("transformer", "transformer_2", "text_encoder", "vae", "tokenizer")
    alone = WanModelFiles(**{name: path / name for name in names})
    for model in (path, alone):
        with pytest.raises(UnsupportedModel, match=rf"{part}.*config.json.*bitsandbytes"):
            detect(model)


def test_variant_files(folder: Any) -> None:
    path = folder("wan2.1-t2v")
    file = weights(path / "transformer")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert detect(path).components["transformer"].file_variant == "fp16"


def test_a_component_folder_alone(folders: Path) -> None:
    found = detect(folders / "wan2.1-i2v" / "transformer")
    assert found.name == "wan2.1-i2v-14b" and found.transformer.heads == 2
    with pytest.raises(UnsupportedModel, match="is a umT5 text encoder"):
        detect(folders / "wan2.1-i2v" / "text_encoder")


def test_official_releases(tmp_path: Path) -> None:
    """Safetensors transformers with an official config, .pth files beside them."""
    torch = pytest.importorskip("torch")
    config = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "in_dim": 36,
              "out_dim": 16}  # fmt: skip
    shapes = layouts.FILES["i2v-a14b"][0]
    for name in ("high_noise_model", "low_noise_model"):
        (tmp_path / name).mkdir()
        sparse(tmp_path / name / "diffusion_pytorch_model.safetensors", shapes)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    small = {n: torch.zeros(shape) for n, shape in layouts.vae_21(16, 4).items()}
    torch.save(small, tmp_path / "Wan2.1_VAE.pth")
    found = detect(tmp_path)
    assert found.name == "wan2.2-i2v-a14b" and found.two_experts and not found.custom_size
    assert found.layout == "original" and found.vae and found.vae.z_dim == 16
    assert found.components["vae"].format == "pickle"
    change_json(tmp_path / "low_noise_model" / "config.json", num_layers=30)
    with pytest.raises(ModelMismatch, match="says num_layers 30, the weights have 40"):
        detect(tmp_path)
    shutil.rmtree(tmp_path / "low_noise_model")
    with pytest.raises(MissingFile, match="Download both experts"):
        detect(tmp_path)


def test_a_release_with_the_wrong_vae(tmp_path: Path) -> None:
    sparse(tmp_path / "diffusion_pytorch_model.safetensors", layouts.FILES["ti2v-5b"][0])
    sparse(tmp_path / "Wan2.1_VAE.safetensors", layouts.vae_21())
    with pytest.raises(ModelMismatch, match="makes 16 latent channels"):
        detect(tmp_path)


def test_bad_bytes_never_give_another_error(folder: Any) -> None:
    """Mutants of a folder's JSON files and header: a WanError or an answer, nothing else."""
    path = folder("wan2.1-t2v")
    for file in (path / "model_index.json", path / "transformer" / "config.json",
                 path / "vae" / "config.json", path / "text_encoder" / "config.json",
                 weights(path / "transformer")):  # fmt: skip
        good = file.read_bytes()
        for data in bad_files.mutants(good, 60, 3, bad_files.SAFETENSORS_TOKENS):
            file.write_bytes(data)
            with contextlib.suppress(WanError):
                detect(path)
        file.write_bytes(good)
    assert detect(path).name == "wan2.1-t2v-1.3b"
