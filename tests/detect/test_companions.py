"""companions: the parts of a pipeline are found among the files that are there, with reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import wan_layouts as layouts

from wan_core.config import WanModelFiles
from wan_core.detect.companions import Found, find_companions
from wan_core.detect.detector import ArchitectureDetector, inspect_file
from wan_core.detect.identified import IdentifiedFile
from wan_core.errors import MissingFile, UnsupportedModel
from wan_core.formats import KINDS, TensorInfo, TensorTable, WeightKind
from wan_core.models.variants import VAE_21, VARIANTS

FILES = {
    "diffusion_models": {
        "wan2.2_i2v_high_noise_14B_fp16": ("i2v-a14b", "fp16"),
        "wan2.2_i2v_low_noise_14B_fp16": ("i2v-a14b", "fp16"),
        # Of another set, and the same expert again: neither is the partner.
        "a_finetune_i2v_low_noise_14B_fp16": ("i2v-a14b", "fp16"),
        "wan2.2_i2v_HIGH_noise_14B_fp16": ("i2v-a14b", "fp16"),
        "wan2.2_t2v_low_noise_14B_fp16": ("t2v-14b", "fp16"),
        "wan2.2_ti2v_5B_fp16": ("ti2v-5b", "fp16"), "wan2.1_i2v_480p_14B_bf16": ("i2v-14b", "bf16"),
    },
    "vae": {"wan_2.1_vae": ("vae 2.1", "bf16"), "wan2.2_vae": ("vae 2.2", "fp16"),
            "another_wan_2.1_vae": ("vae 2.1", "fp16")},
    "text_encoders": {"umt5_xxl_fp8_e4m3fn_scaled": ("umt5", "fp8_scaled old"),
                      "umt5_xxl_fp16": ("umt5", "fp16"), "t5xxl_fp16": ("t5", "fp16")},
    "clip_vision": {"clip_vision_h": ("clip", "fp16"), "clip_l": ("clip small", "fp16")},
}  # fmt: skip
SHAPES = {name: layouts.shallow(shapes) for name, (shapes, _) in layouts.FILES.items()} | {
    "vae 2.1": layouts.vae_21(), "vae 2.2": layouts.vae_22(), "umt5": layouts.umt5(layers=2),
    "t5": layouts.umt5(layers=2, every_block=False), "clip": layouts.clip_vision(),
    "clip small": layouts.clip_vision(768),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for folder, files in FILES.items():
        (root / folder).mkdir()
        for name, (shapes, kind) in files.items():
            file = layouts.stored(SHAPES[shapes], kind)
            if shapes == "umt5":
                file.tensors["spiece_model"] = ("U8", (4_548_313,))
            layouts.write_sparse(root / folder / f"{name}.safetensors", file)
        (root / folder / "broken.safetensors").write_bytes(b"\0" * 100)
    return root


def present(models: Path) -> dict[str, list[Path]]:
    folders = {"vae": "vae", "text_encoder": "text_encoders", "image_encoder": "clip_vision",
               "transformer_2": "diffusion_models"}  # fmt: skip
    return {name: sorted((models / folder).iterdir()) for name, folder in folders.items()}


def find(models: Path, name: str, **given: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    path = models / "diffusion_models" / f"{name}.safetensors"
    found = find_companions(WanModelFiles(transformer=path, **given), present(models), inspect_file)
    ArchitectureDetector().detect_model_architecture(found.files)
    fields = ("transformer_2", "vae", "text_encoder", "image_encoder")
    chosen = {n: getattr(found.files, n) for n in fields}
    return {n: Path(p).stem for n, p in chosen.items() if p}, found.reasons


def test_a_pair(models: Path) -> None:
    chosen, reasons = find(models, "wan2.2_i2v_high_noise_14B_fp16")
    assert chosen == {
        "transformer_2": "wan2.2_i2v_low_noise_14B_fp16", "vae": "wan_2.1_vae",
        "text_encoder": "umt5_xxl_fp16",
    }  # fmt: skip
    assert any("another_wan_2.1_vae.safetensors would do too" in text for text in reasons)
    assert any("a proposal" in text for text in reasons)


def test_the_low_noise_file_finds_no_partner(models: Path) -> None:
    """The socket says it is the only or the high-noise model; nothing is swapped silently."""
    chosen, _ = find(models, "wan2.2_i2v_low_noise_14B_fp16")
    assert "transformer_2" not in chosen


def test_the_5b_finds_its_own_vae(models: Path) -> None:
    chosen, _ = find(models, "wan2.2_ti2v_5B_fp16")
    assert chosen == {"vae": "wan2.2_vae", "text_encoder": "umt5_xxl_fp16"}


def test_an_image_encoder_only_where_one_is_needed(models: Path) -> None:
    chosen, _ = find(models, "wan2.1_i2v_480p_14B_bf16")
    assert chosen["image_encoder"] == "clip_vision_h" and "transformer_2" not in chosen


def test_what_is_named_stays(models: Path) -> None:
    vae = models / "vae" / "another_wan_2.1_vae.safetensors"
    chosen, reasons = find(models, "wan2.2_i2v_high_noise_14B_fp16", vae=vae)
    assert chosen["vae"] == "another_wan_2.1_vae" and not any(r.startswith("VAE") for r in reasons)


def text_encoders(folder: Path) -> dict[str, Path]:
    """Encoders of the same width: with a tokenizer in their file, without, or with a broken one."""
    shapes = layouts.umt5(layers=2)
    names = {"token_embd.weight": (256384, 4096), "enc.blk.0.attn_q.weight": (4096, 4096)}
    names |= {f"enc.blk.{block}.attn_rel_b.weight": (32, 64) for block in range(2)}
    key = "tokenizer.ggml."
    words = [f"word{number}" for number in range(40)]
    arrays = {f"{key}model": "t5", f"{key}tokens": words, f"{key}scores": [-1.0] * 40}
    broken = arrays | {f"{key}scores": [-1.0] * 39}
    bare = layouts.stored(shapes, "bf16")
    whole = layouts.stored(shapes, "bf16")
    whole.tensors["spiece_model"] = ("U8", (4_548_313,))
    folder.mkdir()
    return {
        "bare": layouts.write_sparse(folder / "a-bf16.safetensors", bare),
        "whole": layouts.write_sparse(folder / "b-bf16.safetensors", whole),
        "gguf": layouts.write_sparse_gguf(folder / "c.gguf", names, 12, 256, 144, arrays),
        "bare gguf": layouts.write_sparse_gguf(folder / "d.gguf", names, 12, 256, 144),
        "broken gguf": layouts.write_sparse_gguf(folder / "e.gguf", names, 12, 256, 144, broken),
    }


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (("bare", "whole", "gguf"), "whole"),
        (("bare", "whole", "bare gguf"), "whole"),
        (("bare", "bare gguf", "gguf"), "gguf"),
        (("bare", "broken gguf", "whole"), "whole"),
        (("bare", "bare gguf"), "bare"),
        (("broken gguf", "bare"), "bare"),
    ],
)
def test_an_encoder_that_carries_its_tokenizer_comes_first(
    models: Path, tmp_path: Path, there: tuple[str, ...], chosen: str
) -> None:
    encoders = text_encoders(tmp_path / "text_encoders")
    main = models / "diffusion_models" / "wan2.2_ti2v_5B_fp16.safetensors"
    files = present(models) | {"text_encoder": [encoders[name] for name in there]}
    found = find_companions(WanModelFiles(transformer=main), files, inspect_file)
    assert found.files.text_encoder == encoders[chosen]
    # With a tokenizer named, precision alone decides.
    named = WanModelFiles(transformer=main, tokenizer=tmp_path)
    found = find_companions(named, files, inspect_file)
    assert found.files.text_encoder == encoders["bare" if "bare" in there else chosen]


def test_nothing_fits(models: Path) -> None:
    path = models / "diffusion_models" / "wan2.2_ti2v_5B_fp16.safetensors"
    vaes = [models / "vae" / "wan_2.1_vae.safetensors"]
    with pytest.raises(MissingFile, match=r"No VAE with 48 .* \(looked at wan_2.1_vae.safeten"):
        find_companions(WanModelFiles(transformer=path), {"vae": vaes}, inspect_file)
    with pytest.raises(
        MissingFile, match="its folder is empty\\). .*usually wan2.2_vae.safetensors"
    ):
        find_companions(WanModelFiles(transformer=path), {"vae": []}, inspect_file)


def test_what_is_not_looked_for_stays_open(models: Path) -> None:
    """A field without candidates at all was not left to be found: "none" in the loader."""
    path = models / "diffusion_models" / "wan2.2_ti2v_5B_fp16.safetensors"
    found = find_companions(WanModelFiles(transformer=path), {}, inspect_file)
    assert found.files == WanModelFiles(transformer=path) and not found.reasons


def test_a_transformer_that_is_none(models: Path) -> None:
    path = models / "vae" / "wan_2.1_vae.safetensors"
    found = find_companions(WanModelFiles(transformer=path), present(models), inspect_file)
    with pytest.raises(UnsupportedModel, match="is a Wan 2.1 VAE"):
        ArchitectureDetector().detect_model_architecture(found.files)


# Ranked by fitness -------------------------------------------------------------------------------


def odd_vae(**heads: int) -> layouts.Shapes:
    """A 2.1 VAE whose decoder or encoder has another number of colours."""
    shapes = layouts.vae_21()
    if "out" in heads:
        shapes |= {"decoder.head.2.weight": (heads["out"], 96, 3, 3, 3),
                   "decoder.head.2.bias": (heads["out"],)}  # fmt: skip
    if "into" in heads:
        shapes["encoder.conv1.weight"] = (96, heads["into"], 3, 3, 3)
    return shapes


def uneven(layers: int = 3) -> layouts.Shapes:
    """A text encoder of which one block lacks a tensor."""
    shapes = layouts.umt5(layers=layers)
    del shapes["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    return shapes


# What is there, in the order of the alphabet, and which of it is taken and why the others are not.
VAES: dict[str, tuple[dict[str, tuple[layouts.Shapes, str]], str, tuple[str, ...]]] = {
    "another model's, by its name": (
        {"qwen_image_vae": (layouts.vae_21(), "fp32"), "wan_2.1_vae": (layouts.vae_21(), "bf16")},
        "wan_2.1_vae", ("qwen_image_vae.safetensors (its name says 'qwen')",)),
    "no name": (
        {"ae": (layouts.vae_21(), "fp32"), "Wan2_1_VAE_bf16": (layouts.vae_21(), "bf16")},
        "Wan2_1_VAE_bf16", ("ae.safetensors (its name does not say Wan)",)),
    "no name before another model's": (
        {"ae": (layouts.vae_21(), "bf16"), "anima_vae": (layouts.vae_21(), "fp32")}, "ae",
        ("anima_vae.safetensors (its name says 'anima')",)),
    "an upscaler's head": (
        {"Wan2.1_VAE_upscale2x": (odd_vae(out=12), "fp32"), "wan_vae": (layouts.vae_21(), "fp16")},
        "wan_vae", ("its decoder makes 12, where frames have 3",)),
    "transparency": (
        {"a_wan_vae": (odd_vae(into=4, out=4), "fp32"), "wan_vae": (layouts.vae_21(), "fp16")},
        "wan_vae", ("takes 4 channels",)),
    "Alpha, which has the plain structure": (
        {"wan_alpha_2.1_vae_rgb_channel": (layouts.vae_21(), "fp32"),
         "wan_2.1_vae": (layouts.vae_21(), "fp16")}, "wan_2.1_vae", ("says 'alpha'",)),
    "a pruned one": (
        {"lightvaew2_1": (layouts.vae_21(16, 24), "fp32"), "wan_vae": (layouts.vae_21(), "fp16")},
        "wan_vae", ("not of the published size",)),
    "precision, among equals": (
        {"wan_vae_a": (layouts.vae_21(), "fp16"), "wan_vae_b": (layouts.vae_21(), "bf16"),
         "wan_vae_c": (layouts.vae_21(), "fp32")}, "wan_vae_c", ()),
    "the name, among equal precisions": (
        {"wan_b": (layouts.vae_21(), "fp16"), "Wan_a": (layouts.vae_21(), "fp16")}, "Wan_a", ()),
}  # fmt: skip


def taken(
    folder: Path, files: dict[str, tuple[layouts.Shapes, str]], part: str, *, reverse: bool = False
) -> tuple[str, str]:
    """Return the name of what is taken of ``files`` for a T2V model, and the sentence about it."""
    paths = []
    for name, (shapes, kind) in files.items():
        file = layouts.stored(shapes, kind.removesuffix(" bare"))
        if part == "text_encoder" and not kind.endswith("bare"):
            file.tensors["spiece_model"] = ("U8", (10,))
        paths.append(layouts.write_sparse(folder / f"{name}.safetensors", file))
    main = layouts.write_sparse(folder / "x.safetensors", layouts.stored(SHAPES["t2v-14b"], "bf16"))
    paths = paths[::-1] if reverse else paths
    found = find_companions(WanModelFiles(transformer=main), {part: paths}, inspect_file)
    (reason,) = found.reasons
    return Path(str(getattr(found.files, part))).stem, reason


@pytest.mark.parametrize("case", VAES)
def test_vaes_are_ranked(tmp_path: Path, case: str) -> None:
    """The order of the files on the disk decides nothing, and what was passed over is said."""
    files, best, passed = VAES[case]
    for reverse in (False, True):
        name, reason = taken(tmp_path, files, "vae", reverse=reverse)
        assert name == best
        for words in passed:
            assert words in reason.partition("passed over")[2], reason


UMT5 = layouts.umt5(layers=3)
ENCODERS: dict[str, tuple[dict[str, tuple[layouts.Shapes, str]], str, str]] = {
    "without a tokenizer": (
        {"a-enc-bf16": (UMT5, "bf16 bare"), "b_fp8_scaled": (UMT5, "fp8_scaled old")},
        "b_fp8_scaled", "a-enc-bf16.safetensors (it carries no tokenizer"),
    "incomplete": (
        {"a_fp16": (uneven(), "fp16"), "b_fp8": (UMT5, "fp8")}, "b_fp8",
        "a_fp16.safetensors (it lacks 1 tensors)"),
    "the last block lost": (
        {"a_fp16": (layouts.umt5(layers=23), "fp16"), "b_fp8": (layouts.umt5(), "fp8")}, "b_fp8",
        "a_fp16.safetensors (it has 23 of 24 blocks)"),
    "only one without a tokenizer": (
        {"a": (UMT5, "fp16 bare")}, "a", "although it carries no tokenizer"),
    "a tokenizer before completeness": (
        {"a": (UMT5, "fp16 bare"), "b": (uneven(), "fp16")}, "b", "although it lacks 1 tensors"),
    "precision": ({"a": (UMT5, "fp8"), "b": (UMT5, "bf16")}, "b", "a.safetensors would do too"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODERS)
def test_text_encoders_are_ranked(tmp_path: Path, case: str) -> None:
    files, best, words = ENCODERS[case]
    for reverse in (False, True):
        name, reason = taken(tmp_path, files, "text_encoder", reverse=reverse)
        assert name == best and words in reason


def test_nothing_that_can_be_used(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"No VAE with 16 .* can be used .*a_vae.*decoder makes"):
        taken(tmp_path, {"a_vae": (odd_vae(out=12), "bf16")}, "vae")


def test_a_vae_that_gives_no_frames_is_refused_by_name(models: Path, tmp_path: Path) -> None:
    main = models / "diffusion_models" / "wan2.2_t2v_low_noise_14B_fp16.safetensors"
    for heads in ({"out": 12}, {"out": 4, "into": 4}, {"into": 4}):
        file = layouts.stored(odd_vae(**heads), "bf16")
        path = layouts.write_sparse(tmp_path / "wan_vae.safetensors", file)
        with pytest.raises(UnsupportedModel, match="wan_vae.* frames have 3: it is made for"):
            ArchitectureDetector().detect_model_architecture(
                WanModelFiles(transformer=main, vae=path)
            )


# Partners ----------------------------------------------------------------------------------------

PARTNERS = {
    "separators differ": ("Wan_HIGH_fp8", ["Wan-LOW_fp8"], "Wan-LOW_fp8"),
    "camel case": ("RemixI2V_i2vHighV30", ["RemixI2V_i2vLowV30"], "RemixI2V_i2vLowV30"),
    "of another version": ("mixHighV30", ["mixLowV20"], None),
    "of another model": ("mixHighV30", ["otherLowV30"], None),
    "one letter": ("mix_Q8H", ["mix_Q8L", "mix_Q4L"], "mix_Q8L"),
    "the same role again": ("mix_high", ["mix-high", "MIX_High"], None),
    "given the low one": ("mix_low", ["mix_high"], None),
    "two that would do": ("mix_high", ["mix-low", "mix_low"], "mix-low"),
    "two that would do, by name": ("mix_high", ["mix low", "mix_low"], "mix low"),
    "in the same folder first": ("mix_high", ["a/mix_low", "mix_low"], "mix_low"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTNERS)
def test_partners(tmp_path: Path, case: str) -> None:
    high, others, expected = PARTNERS[case]
    file = layouts.stored(SHAPES["i2v-a14b"], "fp16")
    paths = []
    for name in (high, *others):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        paths.append(layouts.write_sparse(path, file))
    for candidates in (paths, paths[::-1]):
        found = find_companions(
            WanModelFiles(transformer=paths[0]), {"transformer_2": candidates}, inspect_file
        )
        partner = found.files.transformer_2
        wanted = None if expected is None else tmp_path / f"{expected}.safetensors"
        assert partner == wanted
        for other in others if case.startswith("two that") else ():
            assert f"{other}.safetensors" in found.reasons[0]


def test_a_partner_must_be_whole_and_of_the_same_structure(tmp_path: Path) -> None:
    shapes = SHAPES["i2v-a14b"]
    lacking = {n: s for n, s in shapes.items() if n != "blocks.1.ffn.2.bias"}
    high = layouts.write_sparse(tmp_path / "m_high.safetensors", layouts.stored(shapes, "fp16"))
    for other in (lacking, SHAPES["t2v-14b"], SHAPES["i2v-14b"], layouts.vae_21()):
        low = layouts.write_sparse(tmp_path / "m_low.safetensors", layouts.stored(other, "fp16"))
        found = find_companions(
            WanModelFiles(transformer=high), {"transformer_2": [low]}, inspect_file
        )
        assert found.files.transformer_2 is None


def test_the_linked_file_itself_is_no_partner(tmp_path: Path) -> None:
    file = layouts.stored(SHAPES["i2v-a14b"], "fp16")
    high = layouts.write_sparse(tmp_path / "m_high.safetensors", file)
    (tmp_path / "m_low.safetensors").symlink_to(high)
    found = find_companions(
        WanModelFiles(transformer=high),
        {"transformer_2": [tmp_path / "m_low.safetensors"]},
        inspect_file,
    )
    assert found.files.transformer_2 is None


# Any folder ---------------------------------------------------------------------------------------

TRANSFORMER = VARIANTS["wan2.1-t2v-14b"].transformer


@dataclass(frozen=True)
class Made:
    """A VAE or text encoder as it could lie in a folder."""

    name: str
    kind: str
    precision: str = "bf16"
    usable: bool = True
    whole: bool = True
    size: bool = True
    """Of the published size, or with a tokenizer."""

    def identified(self, path: Path) -> IdentifiedFile:
        tensors = {"spiece_model": TensorInfo("spiece_model", "U8", (9,), path, 0, 9)}
        has = tensors if self.size and self.kind == "text_encoder" else {}
        table = TensorTable(path, (path,), has)
        name = "gguf" if self.precision.startswith(("Q", "IQ")) else self.precision
        weights = WeightKind(name, "" if self.usable else "it is of another kind",
                             title=f"GGUF {self.precision}")  # fmt: skip
        vae = replace(VAE_21, base_dim=96 if self.size else 32)
        return IdentifiedFile(
            kind=self.kind, title="a file", table=table, own=table, weights=weights,
            vae=vae if self.kind == "vae" else None, width=4096,
            missing=() if self.whole else ("x",),
        )  # fmt: skip

    def rank(self) -> tuple[Any, ...]:
        """Usable, same family and complete; then precision; then name: by the words of the rule."""
        name = self.name.lower()
        if self.kind == "vae":
            fit = (self.whole, "qwen" not in name, self.size, "wan" in name or "qwen" in name)
        else:
            fit = (self.size, self.whole)
        worse = tuple(not one for one in fit)
        return (not self.usable, *worse, KINDS.index(self.precision), name)


def folders_of(kind: str) -> st.SearchStrategy[list[Made]]:
    names = st.sampled_from([f"{stem}_{n}" for stem in ("wan", "qwen", "ae") for n in range(6)])
    made = st.builds(
        Made, name=names, kind=st.just(kind), precision=st.sampled_from(KINDS),
        usable=st.booleans(), whole=st.booleans(), size=st.booleans(),
    )  # fmt: skip
    return st.lists(made, max_size=4, unique_by=lambda one: one.name)


@pytest.mark.parametrize("kind", ["vae", "text_encoder"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_of_any_folder_the_fittest_is_taken_and_the_others_are_named(
    kind: str, data: st.DataObject
) -> None:
    there = data.draw(folders_of(kind))
    order = data.draw(st.permutations(there))
    by_path = {Path("models") / f"{one.name}.safetensors": one for one in order}
    main = Path("models") / "x.safetensors"
    table = TensorTable(main, (main,), {})
    own = IdentifiedFile(kind="transformer", title="a Wan transformer", table=table, own=table,
                         transformer=TRANSFORMER)  # fmt: skip

    def inspect(path: str | Path) -> IdentifiedFile:
        return own if Path(path) == main else by_path[Path(path)].identified(Path(path))

    def find() -> Found:
        return find_companions(WanModelFiles(transformer=main), {kind: [*by_path]}, inspect)

    usable = sorted((one for one in there if one.usable), key=Made.rank)
    if not usable:
        with pytest.raises(MissingFile) as caught:
            find()
        named = sum(one.name in str(caught.value) for one in there)
        assert named == min(3, len(there)), "of many the first three"
        return
    found = find()
    best = getattr(found.files, kind)
    assert by_path[best] == usable[0]
    (reason,) = found.reasons
    assert all(one.name in reason for one in there)
    said, _, passed = reason.partition("; passed over")
    for one in there:
        assert one.usable or one.name in passed
        fit = one.rank()[:-2] == usable[0].rank()[:-2]
        assert one is usable[0] or (one.name in said.partition("would do too")[0]) == fit, reason
