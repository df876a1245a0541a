"""Whether the installed diffusers computes what the lean forward and decoder were written after.

They stand in for functions of diffusers and must give their bits, so they act only where those
functions are known. A function is known by a digest of what it computes: of its syntax tree
without docstrings, annotations, comments and layout, none of which change a result. The tables
below hold the digests with which the tests of this package found equal bits.

The question is asked twice. A plan asks the files of the installed package (``why_no_lean``): that
takes milliseconds and imports nothing. A run asks, besides, whether the functions that are loaded
are those of the files, or whether another program has replaced one (``why_not``).
"""

from __future__ import annotations

import ast
import functools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

Table = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Module below diffusers -> name in it -> digests that are known."""

TRANSFORMER: Table = {
    "models.transformers.transformer_wan": {
        # 0.35.0 on; 0.35.2 and 0.36; 0.37 to 0.39; 0.40 on
        "WanTransformer3DModel.forward": (
            "b639b9e93891", "6491cc51724e", "3f968a794dc5", "c4daa6fa337b",
        ),
        "WanTransformerBlock.forward": ("db75421cfdce",),
        "WanAttention.forward": ("c8e5c0b42665",),
        # 0.35; 0.36, which can split tokens over devices; 0.37 on
        "WanAttnProcessor.__call__": ("66062658fab2", "5b2d7f394d57", "c90ea4b96f01"),
        "_get_qkv_projections": ("fc63c17ad6f2", "7100321bfcbf"),  # to 0.36; 0.37 on
        "_get_added_kv_projections": ("e5da94495702",),
        "WanTimeTextImageEmbedding.forward": ("73a72cbdde04",),
        "WanRotaryPosEmbed.forward": ("488c5f1561a3", "4ffcb94a1e53"),  # 0.35; 0.36 on
    },
    "models.attention": {"FeedForward.forward": ("0a07b21c5743",)},
    "models.activations": {
        "GELU.forward": ("3fe1dcafd907",),
        "GELU.gelu": ("22dd131ccbc0",),
    },
    "models.normalization": {"FP32LayerNorm.forward": ("afbb0fa6af1b",)},
}  # fmt: skip
"""What the lean forward replaces and relies on. Where there are several digests, diffusers was
changed without a change of the result."""

VACE: Table = {
    **TRANSFORMER,
    "models.transformers.transformer_wan_vace": {
        # 0.35.0; 0.35.2 and 0.36; 0.37; 0.38 on
        "WanVACETransformer3DModel.forward": (
            "d0c85122b31a", "610a28f1aeae", "14904087d6a4", "b85d7d30c140",
        ),
        "WanVACETransformerBlock.forward": ("daef83268a43", "6402c118cb69"),  # 0.35.0; 0.35.2 on
    },
}  # fmt: skip
"""The same for a transformer with VACE blocks."""

_WAN = "models.transformers.transformer_wan"
ANIMATE: Table = {
    **{module: names for module, names in TRANSFORMER.items() if module != _WAN},
    # Copies of the plain classes in a module of their own, and what is between the blocks.
    "models.transformers.transformer_wan_animate": {
        **{name: TRANSFORMER[_WAN][name] for name in TRANSFORMER[_WAN] if "3DModel" not in name},
        "WanTimeTextImageEmbedding.forward": ("4008f852bdc5",),  # 0.37 on
        "WanAnimateTransformer3DModel.forward": ("a2f573bfd50d",),  # 0.37 on
        "WanAnimateFaceBlockCrossAttention.forward": ("de3fb3b721c6",),
        "WanAnimateFaceBlockAttnProcessor.__call__": ("a62f0304d040",),  # 0.38 on
    },
}  # fmt: skip
"""The same for Animate. Before 0.38 its adapters compute in another way, not compared here."""

_VAE = "models.autoencoders.autoencoder_kl_wan"
_NARROW_NORM, _WIDE_NORM = "8237d2b5d90e", "8c411cf20f89"
DECODER: Table = {
    _VAE: {
        "CACHE_T": ("5bdf30b86afa",),
        # Of each pair, the first is that of 0.35, which passes the cache by position.
        "WanDecoder3d.forward": ("23d14b08469f", "7aeb01278efb"),
        "WanMidBlock.forward": ("c52ac420f9ba", "2504238cea86"),
        "WanUpBlock.forward": ("3e1033751e32", "e983168177ad"),
        "WanResidualUpBlock": ("9b7f4287cfd3", "00433f324427"),
        "WanResidualBlock": ("ba3ac1e2040c",),
        "WanCausalConv3d": ("5f9edb4137bf",),
        "WanRMS_norm": (_NARROW_NORM, _WIDE_NORM),  # to 0.37; 0.38 on
        "WanResample": ("ca096255c66e",),
        "WanUpsample": ("65a07467a7aa",),
        "DupUp3D": ("5bde228b07d4",),
    },
}
"""What the lean decoder replaces and relies on; of classes everything counts."""

_SHARED = (
    "CACHE_T", "WanMidBlock.forward", "WanResidualBlock", "WanCausalConv3d", "WanRMS_norm",
    "WanResample",
)  # fmt: skip
ENCODER: Table = {
    _VAE: {
        **{name: DECODER[_VAE][name] for name in _SHARED},
        "WanEncoder3d.forward": ("cd1a3b076a64", "4583e120a78c"),
        "WanResidualDownBlock": ("8a567ba2675c", "d08de5258be9"),
        "AvgDown3D": ("0486d556907a", "c6ef1a629407"),  # to 0.40; 0.41 on
    },
}
"""The same for the lean encoder."""


@dataclass(frozen=True)
class Definition:
    """A function, class or constant as a source file has it."""

    node: ast.AST
    line: int
    """Its first line, that of the first decorator if there is one."""

    @functools.cached_property
    def digest(self) -> str:
        """See ``computation_digest``. Made when asked for: a file defines much that is not."""
        return computation_digest(self.node)


def why_no_lean(*, vace: bool = False, faces: bool = False) -> str | None:
    """Return why a plan must do without lean forward and VAE, or None if they can be used.

    ``vace`` says whether the transformer has VACE blocks, ``faces`` whether it has face adapters.
    """
    table = VACE if vace else ANIMATE if faces else TRANSFORMER
    return _unknown(table) or _unknown(DECODER) or _unknown(ENCODER)


def why_not(table: Table) -> str | None:
    """Return why the functions of a table are not the known ones, as they are loaded, or None."""
    reason = _unknown(table)
    if reason is not None:
        return reason
    for module, names in table.items():
        loaded = import_module(f"diffusers.{module}")
        known = _definitions(_file_of(module))
        for name in names:
            if not _is_own(loaded, name, known):
                return f"another program has replaced diffusers' {name}"
    return None


@functools.cache
def norms_widen() -> bool:
    """Say whether the VAE's norms compute half precision in float32, as they do since 0.38."""
    return _digest(_VAE, "WanRMS_norm") != _NARROW_NORM


def _digest(module: str, name: str) -> str | None:
    found = _definitions(_file_of(module)).get(name)
    return None if found is None else found.digest


def _unknown(table: Table) -> str | None:
    if _root() is None:
        return "diffusers is not installed"
    for module, names in table.items():
        for name, digests in names.items():
            if _digest(module, name) not in digests:
                return f"diffusers {_version()} computes {name} in a way not known here"
    return None


# ------------------------------------------------------------------------------ source files


def _root() -> Path | None:
    """Return the folder of the installed diffusers, which need not be loaded."""
    try:
        spec = find_spec("diffusers")
    except (ImportError, ValueError):  # something else goes by its name
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _version() -> str:
    try:
        return version("diffusers")
    except PackageNotFoundError:
        return "of unknown version"


def _file_of(module: str) -> Path | None:
    root = _root()
    return None if root is None else root.joinpath(*module.split(".")).with_suffix(".py")


_parsing = threading.Lock()
"""Two threads that parse at once confuse CPython 3.11 (python/cpython#106905): SystemError."""


@functools.cache
def _definitions(path: Path | None) -> Mapping[str, Definition]:
    """Return what a source file defines at its top and in its classes; nothing if unreadable."""
    if path is None:
        return {}
    try:
        with _parsing:
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    return dict(_named(tree, ""))


def _named(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = prefix + node.name
            line = min([node.lineno, *(part.lineno for part in node.decorator_list)])
            yield name, Definition(node, line)
            if isinstance(node, ast.ClassDef):
                yield from _named(node, f"{name}.")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield prefix + node.targets[0].id, Definition(node, node.lineno)


_NO_COMPUTATION = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind", "simple"}
"""Fields of syntax trees that say nothing about the result. Some exist in a few Pythons only."""


def computation_digest(node: ast.AST) -> str:
    """Return a digest of what a piece of code computes, the same for all versions of Python.

    ``ast.dump`` and ``ast.unparse`` would not do: what they print differs between versions.
    """
    return sha256(" ".join(_words(node)).encode()).hexdigest()[:12]


def _words(value: object) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _words(part)
    elif isinstance(value, ast.Constant):
        yield repr(value.value)
    elif isinstance(value, ast.AnnAssign):
        if value.value is not None:  # "x: int = 1" is "x = 1"; "x: int" is nothing
            yield from _words(ast.Assign(targets=[value.target], value=value.value))
    elif isinstance(value, ast.AST):
        yield f"({type(value).__name__}"
        for field, inner in ast.iter_fields(value):
            if field == "body" and isinstance(inner, list) and _has_docstring(value):
                inner = inner[1:]
            if field not in _NO_COMPUTATION and inner is not None and inner != []:
                yield field
                yield from _words(inner)
        yield ")"
    else:
        yield repr(value)


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    return ast.get_docstring(node, clean=False) is not None


# --------------------------------------------------------------------------- what is loaded


def _is_own(module: ModuleType, name: str, known: Mapping[str, Definition]) -> bool:
    """Say whether a name of a loaded module is what the module's file defines."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        return not callable(found) or _is_function_of(found, module, known[name].line)
    if (found.__module__, found.__qualname__) != (module.__name__, name):
        return False
    members = {f"{name}.{key}": value for key, value in vars(found).items()}
    functions = {key: value for key, value in members.items() if isinstance(value, FunctionType)}
    return all(
        key in known and _is_function_of(value, module, known[key].line)
        for key, value in functions.items()
    )


def _is_function_of(found: Any, module: ModuleType, line: int) -> bool:
    """Say whether a function is the one on this line of a module, in diffusers' own decorators."""
    root = Path(str(module.__file__)).resolve().parents[module.__name__.count(".") - 1]
    while True:
        code = getattr(found, "__code__", None)
        if code is None or not Path(code.co_filename).resolve().is_relative_to(root):
            return False
        if not hasattr(found, "__wrapped__"):
            break
        found = found.__wrapped__
    same_file = Path(code.co_filename).resolve() == Path(str(module.__file__)).resolve()
    return same_file and code.co_firstlineno == line
