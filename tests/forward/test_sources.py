"""Which diffusers the lean paths can stand in for: by what it computes, not by its text."""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from support.lean_models import model_of
from support.vae_models import make_vae

from wan_core.decoding import decoder
from wan_core.decoding.lean import lean_decoder, lean_encoder
from wan_core.forward import sources
from wan_core.forward.sources import DECODER, ENCODER, TRANSFORMER, VACE, Table, why_no_lean
from wan_core.forward.transformer import lean_forward

NAMES = [
    (table, module, name)
    for table in (TRANSFORMER, DECODER, ENCODER, VACE)
    for module, names in table.items()
    for name in names
    if table is not VACE or module not in TRANSFORMER
    if table is not ENCODER or name not in DECODER[module]
]
CALLABLE = [entry for entry in NAMES if entry[2] != "CACHE_T"]
INSTALLED = Path(str(diffusers.__file__)).parent


def digest(code: str) -> str:
    return sources.computation_digest(ast.parse(code).body[0])


# ------------------------------------------------------------------------------- the digest

CODE = "def f(x, y=2):\n    z = x.norm(2.0, dim=1) * y\n    return z if y else -x\n"
SAME = {
    "a docstring": CODE.replace("    z", '    """What it does."""\n    z', 1),
    "a comment": CODE.replace("\n    r", "  # why\n    r"),
    "layout": CODE.replace("norm(2.0, dim=1)", "norm(\n        2.0,\n        dim=1,\n    )"),
    "quotes and parentheses": CODE.replace("x.norm(2.0, dim=1) * y", "((x.norm(2.0, dim=1)) * y)"),
    "annotations": "def f(x: 'Tensor', y: int | None = 2) -> Tensor:\n" + CODE.partition("\n")[2],
    "an annotated name": CODE.replace("    z =", "    w: int\n    z: Tensor ="),
}
OTHER = {
    "an operator": CODE.replace("*", "+"),
    "a constant": CODE.replace("2.0", "2"),
    "a default": CODE.replace("y=2", "y=3"),
    "a name": CODE.replace("norm", "sum"),
    "a keyword": CODE.replace("dim=1", "p=1"),
    "the order of arguments": CODE.replace("x, y=2", "y, x=2"),
    "a sign": CODE.replace("-x", "x"),
    "a text that is no docstring": CODE.replace("return z", "return 'z'"),
    "a decorator": "@no_grad()\n" + CODE,
    "async": "async " + CODE,
}


@pytest.mark.parametrize("code", SAME.values(), ids=SAME)
def test_what_changes_no_result_changes_no_digest(code: str) -> None:
    assert code != CODE
    assert digest(code) == digest(CODE)


@pytest.mark.parametrize("code", OTHER.values(), ids=OTHER)
def test_what_may_change_a_result_changes_the_digest(code: str) -> None:
    assert digest(code) != digest(CODE)


def test_a_digest_is_the_same_in_every_python() -> None:
    code = (
        "class A(B):\n    '''x'''\n    def f(self, *a: int, **k):\n        return f'{a!r} {k:>3}'\n"
    )
    assert digest(code) == "8c8f4fef9758"


# ------------------------------------------------------------------- the installed diffusers


def test_the_installed_diffusers_is_known_without_loading_it() -> None:
    assert why_no_lean() is None
    code = (
        "import sys; from wan_core.forward import why_no_lean; assert why_no_lean() is None;"
        "sys.exit(any(name in sys.modules for name in ('diffusers', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the installed files that the tables name, in place of the installed package."""
    for _, module, _ in NAMES:
        path = tmp_path / module.replace(".", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        original = INSTALLED / module.replace(".", "/")
        shutil.copy(original.with_suffix(".py"), path.with_suffix(".py"))
    monkeypatch.setattr(sources, "_root", lambda: tmp_path)
    return tmp_path


def edit(root: Path, module: str, change: Any) -> None:
    path = (root / module.replace(".", "/")).with_suffix(".py")
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    sources._definitions.cache_clear()


class Described(ast.NodeTransformer):
    """Gives every function another docstring and other annotations."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        node.body.insert(0, ast.Expr(ast.Constant("Another text.")))
        node.returns = ast.Name("Tensor")
        for argument in node.args.args:
            argument.annotation = ast.Name("Tensor")
        return node


def test_another_docstring_or_annotation_anywhere_is_nothing(copied: Path) -> None:
    for module in {module for _, module, _ in NAMES}:

        def described(text: str) -> str:
            tree = Described().visit(ast.parse(text))
            return ast.unparse(ast.fix_missing_locations(tree))

        edit(copied, module, described)
    assert "Another text." in (copied / "models/attention.py").read_text()
    assert why_no_lean(vace=True) is None


@pytest.mark.parametrize(("table", "module", "name"), NAMES, ids=[name for *_, name in NAMES])
def test_another_computation_is_noticed_and_named(
    copied: Path, table: Table, module: str, name: str
) -> None:
    def changed(text: str) -> str:
        tree = ast.parse(text)
        node: Any = tree
        for part in name.split("."):
            found = [n for n in node.body if getattr(n, "name", None) == part]
            node = found[0] if found else None
            if node is None:
                return text.replace("CACHE_T = 2", "CACHE_T = 3")
        node.body.append(ast.parse("result = result + 1e-6").body[0])
        return ast.unparse(ast.fix_missing_locations(tree))

    assert why_no_lean(vace=True) is None
    edit(copied, module, changed)
    reason = why_no_lean(vace=True)
    assert why_no_lean() == (None if table is VACE else reason)
    assert reason is not None and f"computes {name} in a way not known here" in reason
    assert diffusers.__version__ in reason
    other = TRANSFORMER if table in (DECODER, ENCODER) else DECODER
    assert sources.why_not(table) == reason
    assert sources.why_not(other) is None


@pytest.mark.parametrize("damage", ["missing", "not Python", "not text", "empty"])
@pytest.mark.parametrize("module", sorted({module for _, module, _ in NAMES}))
def test_a_broken_diffusers_promises_nothing(copied: Path, module: str, damage: str) -> None:
    path = (copied / module.replace(".", "/")).with_suffix(".py")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"not Python": b"def (", "not text": b"\0\xff", "empty": b""}[damage])
    sources._definitions.cache_clear()
    assert "in a way not known here" in str(why_no_lean(vace=True))


def raising(error: Exception) -> Any:
    def find(name: str) -> None:
        raise error

    return find


@pytest.mark.parametrize(
    "found",
    [lambda name: None, raising(ValueError("diffusers.__spec__ is None")), raising(ImportError())],
)
def test_without_diffusers_nothing_is_promised(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", found)
    assert why_no_lean() == "diffusers is not installed"


def test_a_folder_that_is_called_diffusers_is_not_the_package(tmp_path: Path) -> None:
    (tmp_path / "diffusers/models").mkdir(parents=True)
    paths = [str(tmp_path), str(Path(__file__).parents[2])]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "from wan_core.forward import why_no_lean; print(why_no_lean())"
    )
    bare = [sys.executable, "-I", "-S", "-c", code]  # without the installed packages
    found = subprocess.run(bare, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "diffusers is not installed"


# ----------------------------------------------------------------------------- what is loaded


def replaced(module: str, name: str) -> tuple[Any, str, Any]:
    """The owner, attribute and value of a name; for a class those of its ``forward``."""
    owner: Any = import_module(f"diffusers.{module}")
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    found = getattr(owner, last)
    return (found, "forward", found.forward) if isinstance(found, type) else (owner, last, found)


@pytest.mark.parametrize("how", ["another", "wrapped"])
@pytest.mark.parametrize(("table", "module", "name"), CALLABLE, ids=[name for *_, name in CALLABLE])
def test_what_another_program_replaced_is_not_stood_in_for(
    table: Table, module: str, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, original = replaced(module, name)

    def other(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    # functools.wraps makes a function look like the one it calls.
    monkeypatch.setattr(
        owner, attribute, functools.wraps(original)(other) if how == "wrapped" else other
    )
    assert sources.why_not(table) == f"another program has replaced diffusers' {name}"
    family = "wan2.1-vace" if table is VACE else "wan2.1-t2v"
    vae = table in (DECODER, ENCODER)
    model = make_vae("2.1") if vae else model_of(family, torch.float32)
    lean: Any = lean_encoder if table is ENCODER else lean_decoder if vae else lean_forward
    context = lean(model)
    with context as reason:
        assert "replaced" in str(reason)


def test_a_class_put_in_anothers_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    monkeypatch.setattr(wan, "WanResample", type("WanResample", (wan.WanResample,), {}))
    assert "WanResample" in str(sources.why_not(DECODER))


# --------------------------------------------------------------- norms before diffusers 0.38


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widens", [True, False])
def test_norms_of_both_kinds(
    dtype: torch.dtype, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 0.37 the VAE's norms computed half precision in half precision."""
    monkeypatch.setattr(decoder, "norms_widen", lambda: widens)
    norm = make_vae("2.1", dtype).decoder.norm_out
    torch.nn.init.normal_(norm.gamma)
    x = torch.randn(1, norm.gamma.shape[0], 2, 5, 7, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype)
    wide = x.float() if widens else x
    expected = F.normalize(wide, dim=1).to(dtype) * norm.scale * norm.gamma + norm.bias
    out = torch.empty_like(x)
    decoder._normalize(norm, x, out)
    assert torch.equal(out, expected)


OLD_NORM = """
class WanRMS_norm(nn.Module):
    def __init__(self, dim, channel_first=True, images=True, bias=False):
        super().__init__()
        broadcastable_dims = (1, 1, 1) if not images else (1, 1)
        shape = (dim, *broadcastable_dims) if channel_first else (dim,)

        self.channel_first = channel_first
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else 0.0

    def forward(self, x):
        return F.normalize(x, dim=(1 if self.channel_first else -1)) * self.scale * self.gamma + self.bias
"""  # noqa: E501


def test_the_kind_of_norms_is_read_from_the_source(copied: Path) -> None:
    def older(text: str) -> str:
        before, _, rest = text.partition("class WanRMS_norm")
        return before + OLD_NORM + "\n\nclass WanUpsample" + rest.partition("class WanUpsample")[2]

    sources.norms_widen.cache_clear()
    try:
        major, minor = map(int, diffusers.__version__.split(".")[:2])
        assert sources.norms_widen() is ((major, minor) >= (0, 38))
        edit(copied, sources._VAE, older)
        sources.norms_widen.cache_clear()
        assert not sources.norms_widen()
        assert why_no_lean() is None
    finally:
        sources.norms_widen.cache_clear()
