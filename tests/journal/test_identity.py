"""What a saved render is known by: each thing that decides its latents, and nothing else."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from PIL import Image
from support.tiny_models import make_folder, open_wan

from wan_core import GenerationConfig
from wan_core.config import WanControl, WanLoRA
from wan_core.job import Request
from wan_core.job.fields import PromptPart
from wan_core.journal import content, identity
from wan_core.journal.content import code_digest, content_digest
from wan_core.journal.identity import identity_key, plain_identity, render_identity
from wan_core.memory import Choices
from wan_core.models import FoundLora
from wan_core.plan import OptimizationPlan

JOB = GenerationConfig(prompt="a red cat", width=32, height=32, num_frames=9, seed=1)
NOT_OF_A_REQUEST = {
    "output_path", "warnings", "resume", "journal_folder", "wanted_frames", "fps", "codec", "crf",
    "pix_fmt",
}  # fmt: skip
OF_CHOICES = {
    "dtypes", "by_rows", "fp8_storage", "easycache", "magcache", "guidance_gate", "quick",
    "eight_bit", "attention_8bit", "window_frames", "window_overlap",
}  # fmt: skip


class Made:
    """A render's identity, of which one thing at a time can be changed."""

    def __init__(self, model: Path) -> None:
        self.wrapper = open_wan(model)
        self.config: GenerationConfig = JOB
        self.request: Request
        self.plan: OptimizationPlan
        request, plan = self.wrapper.plan(JOB)
        # In windows whose overlap was asked for: how they share frames counts only there.
        self.request = replace(request, overlap_free=False)
        self.plan = plan.with_choices(window_frames=17)
        self.model = self.wrapper.architecture

    def key(self, **changed: Any) -> str:
        made = {"config": self.config, "request": self.request, "model": self.model,
                "plan": self.plan, **changed}  # fmt: skip
        values = (made["config"], made["request"], made["model"], made["plan"])
        return identity_key(plain_identity(render_identity(*values)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("identity") / "t2v", "wan2.1-t2v")


@pytest.fixture(scope="module")
def made(model: Path) -> Iterator[Made]:
    found = Made(model)
    yield found
    found.wrapper.unload()


def other(name: str, value: Any) -> Any:
    """Return another value of a field."""
    special: dict[str, Any] = {
        "prompts": (PromptPart(0, "a dog"),), "sigmas": (1.0, 0.5), "sigma_schedule": "simple",
        "control": "a control", "dtypes": MappingProxyType({"transformer": "bf16"}),
        "part_offload": MappingProxyType({"vae": "model"}), "journal_folder": Path("j"),
        "output_path": Path("o.mp4"), "warnings": ("x",),
    }  # fmt: skip
    if name in special:
        return special[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value} otherwise"
    return 1 if value is None else value + 1


def test_every_field_of_a_request_but_those_of_the_file(made: Made) -> None:
    usual, request = made.key(), made.request
    changed = set()
    for name in Request.__slots__:
        value = other(name, getattr(request, name))
        if made.key(request=replace(request, **{name: value})) != usual:
            changed.add(name)
    assert changed == set(Request.__slots__) - NOT_OF_A_REQUEST


def test_every_choice_that_changes_a_number_and_no_placement(made: Made) -> None:
    usual, changed = made.key(), set()
    for name in (part.name for part in fields(Choices)):
        value = other(name, getattr(made.plan.choices, name))
        if made.key(plan=made.plan.with_choices(**{name: value})) != usual:
            changed.add(name)
    assert changed == OF_CHOICES


def test_the_kind_of_device_and_not_how_many_or_which(made: Made) -> None:
    on_cuda = replace(made.plan, device="cuda:0")
    assert made.key(plan=on_cuda) != made.key()
    spread = replace(on_cuda, device="cuda:1", workers=("cuda:0", "cuda:1"), gang=2, pin_limit=0)
    assert made.key(plan=spread) == made.key(plan=on_cuda)


@pytest.mark.parametrize(
    "name",
    ["image", "last_image", "latents", "continue_from", "prompt_embeds", "negative_prompt_embeds"],
)
def test_what_is_given_by_its_content(made: Made, name: str) -> None:
    first = torch.arange(12.0).reshape(2, 2, 3)
    given = made.key(config=replace(JOB, **{name: first}))
    assert given != made.key()
    assert given == made.key(config=replace(JOB, **{name: first.clone()}))
    assert given != made.key(config=replace(JOB, **{name: first + 1}))


@pytest.mark.parametrize("name", [part.name for part in fields(WanControl)])
def test_every_field_of_a_control(made: Made, name: str) -> None:
    video = torch.zeros(5, 4, 4, 3)
    usual = WanControl(video=video)
    values: dict[str, Any] = {
        "video": video + 1, "positions": "0", "tracks": "[]", "strength": 0.5, "denoise": 0.5,
        "clear_masked": True,
    }  # fmt: skip
    changed = replace(usual, **{name: values.get(name, video)})
    assert made.key(config=replace(JOB, control=changed)) != made.key(
        config=replace(JOB, control=usual)
    )


def test_a_picture_by_what_its_file_holds(made: Made, tmp_path: Path) -> None:
    keys = []
    for colour in ("red", "blue", "red"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "in.png")
        keys.append(made.key(config=replace(JOB, image=str(tmp_path / "in.png"))))
    assert keys[0] == keys[2] != keys[1]


def test_a_picture_by_what_its_pixels_mean(made: Made) -> None:
    """Colours may stand in a palette, and which side is up in a tag."""
    keys = []
    for palette in ([255, 0, 0], [0, 0, 255], [255, 0, 0]):
        image = Image.new("P", (8, 4), 0)
        image.putpalette(palette * 256)
        keys.append(made.key(config=replace(JOB, image=image)))
    assert keys[0] == keys[2] != keys[1]
    turned = Image.linear_gradient("L").convert("RGB")
    upright = turned.copy()
    turned.getexif()[0x0112] = 3
    as_it_is, as_tagged = (made.key(config=replace(JOB, image=i)) for i in (upright, turned))
    assert as_it_is != as_tagged
    pixels = upright.transpose(Image.Transpose.ROTATE_180)
    assert as_tagged == made.key(config=replace(JOB, image=pixels))


def test_loras_by_file_expert_and_strength(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"1234")

    def key(**more: Any) -> str:
        found = FoundLora(lora=WanLoRA(path=path, **more), parameters=1, rank=1, files=(path,))
        return made.key(model=replace(made.model, loras=(found,)))

    usual = key()
    assert usual != made.key() and usual == key(strength=1.0)
    assert usual != key(strength=0.5) and usual != key(expert="high")
    assert key(strength=0.0) == made.key()
    path.write_bytes(b"12345")
    assert usual != key()


def test_files_replaced_with_their_size_and_time_kept(made: Made) -> None:
    usual = made.key()
    for name, part in made.model.components.items():
        for path in part.files:
            data, before = path.read_bytes(), path.stat()
            for place in (len(data) // 2, len(data) - 1):
                changed = bytearray(data)
                changed[place] ^= 1
                path.write_bytes(changed)
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
                assert made.key() != usual, name
            path.write_bytes(data)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert made.key() == usual


def test_a_large_file_is_looked_at_in_spread_pieces(tmp_path: Path) -> None:
    path, size = tmp_path / "w", 4_000_000

    def digest(*changes: int) -> str:
        with path.open("wb") as file:
            file.truncate(size)
            for place in changes:
                file.seek(place)
                file.write(b"x")
        return content_digest(path)

    usual = digest()
    assert usual == digest() and len(usual) == 32
    assert all(digest(place) != usual for place in (0, 2**20 - 1, size - 2**14, size - 1))
    # Whatever is changed throughout is seen: no stretch of a 32nd of the file is left out.
    assert all(
        digest(*range(begin, begin + size // 32 + 2**14, 2**13)) != usual
        for begin in range(0, size - size // 32 - 2**14, size // 32)
    )
    size += 1
    assert digest() != usual
    size = 5
    path.write_bytes(b"12345")
    short = content_digest(path)
    path.write_bytes(b"12346")
    assert content_digest(path) != short


def test_a_disk_that_gives_less_than_it_is_asked_for_changes_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As file systems of a program (FUSE) may."""
    path = tmp_path / "w"
    path.write_bytes(bytes(range(256)) * 6000)
    usual = content_digest(path)

    class Sparing(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            return super().read(min(size, 100_000))

    @contextmanager
    def opened(path: Path) -> Iterator[tuple[io.FileIO, int]]:
        with Sparing(path, "rb") as file:
            yield file, path.stat().st_size

    monkeypatch.setattr(content, "open_regular", opened)
    assert content_digest(path) == usual


def test_the_sources_are_part_of_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = made.key()
    monkeypatch.setattr(identity, "code_digest", lambda: "another")
    assert made.key() != usual

    def digest(**files: str) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            path = root / f"{name.replace('_', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (root / "__pycache__").mkdir(parents=True)
        (root / "__pycache__" / "a.py").write_text(str(root))
        (root / "notes.txt").write_text(str(root))
        return code_digest(str(root))

    found = {digest(a="1", b_c="2"), digest(a="12", b_c=""), digest(a="1", b="2"),
             digest(a="1", b_c="3"), digest(a="1")}  # fmt: skip
    assert len(found) == 5
    assert digest(a="1", b_c="2") == digest(b_c="2", a="1") and digest() == ""
    packed = tmp_path / "packed.zip"
    packed.write_bytes(b"")  # as where Python imports from an archive
    assert code_digest(str(packed / "wan_core")) == code_digest(str(tmp_path / "none")) == ""
    assert len(code_digest()) == 32


def test_sources_are_those_that_were_loaded_and_not_those_of_a_later_edit(tmp_path: Path) -> None:
    """Workers that start later load other ones, and are to be found out by that."""
    root = Path(content.__file__).parents[1]
    copied = shutil.copytree(
        root, tmp_path / root.name, ignore=shutil.ignore_patterns("demo_model")
    )
    edit = "open('wan_core/errors.py', 'a').write('# by another version')"
    code = f"from wan_core.journal import content; {edit}; print(content.code_digest())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == code_digest(), ran.stderr
    assert code_digest(str(copied)) != code_digest()


def test_model_files_and_versions(made: Made, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = made.key()
    for name, part in made.model.components.items():
        for path in part.files:
            before = path.stat()
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
            assert made.key() != usual, name
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    named = replace(made.model, variant=replace(made.model.variant, name="another"))
    assert made.key(model=named) != usual
    assert made.key() == usual
    monkeypatch.setattr(identity, "versions", lambda: {"torch": "9"})
    assert made.key() != usual
