"""The plan of the house, held by its syntax trees: floors, faces, circles, and where torch begins.

Each rule is a function from the sources to a list of complaints. It must find nothing in the house
as it stands, and must find the mutants below: a rule that cannot fail holds nothing.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "wan_core"

GROUND = ("errors", "lazy", "config", "files", "preferences")
"""Modules anyone may import, in their own order."""
TORCH_FREE = ("formats", "models", "detect", "job", "memory", "plan")
WITH_TORCH = (
    "loading", "kernels", "forward", "decoding", "placing", "loras", "sampling", "journal",
    "workers", "render", "serve",
)  # fmt: skip
LAZY = ("loading", "forward", "journal", "workers", "render", "serve")
"""Those whose faces import a name when it is asked for: something else needs none of torch."""
FLOORS = (*TORCH_FREE, *WITH_TORCH)
"""From the ground up: a package imports only from those before it."""
ROOF = ("__init__", "__main__", "arguments", "load", "generate")
"""What stands on everything: the public names, the command line, and old places of names."""
FILES_A_PACKAGE = range(5, 15)
HEAVY = {"torch", "diffusers", "transformers", "numpy", "safetensors", "av", "gguf", "accelerate"}
COMFY = {"comfy", "folder_paths", "nodes", "server", "execution", "latent_preview", "comfy_api"}

House = dict[str, ast.Module]
"""Syntax trees by dotted name below ``wan_core``: "errors", "detect.pairing", "detect"."""


@lru_cache
def sources() -> dict[str, str]:
    found = {}
    for path in sorted(CORE.rglob("*.py")):
        name = ".".join(path.relative_to(CORE).with_suffix("").parts)
        found[name.removesuffix(".__init__") or "__init__"] = path.read_text(encoding="utf-8")
    return found


@lru_cache
def house() -> House:
    return {name: ast.parse(source) for name, source in sources().items()}


def with_line(name: str, line: str) -> House:
    """The house with one more line at the end of a module, or with one more module."""
    return {**house(), name: ast.parse(f"{sources().get(name, '')}\n{line}\n")}


@lru_cache(None)
def imports(tree: ast.Module) -> tuple[tuple[ast.ImportFrom | ast.Import, bool], ...]:
    """Every import, and whether it is only reached by a call or by a type checker."""
    return tuple(_imports(tree, False))


def _imports(tree: ast.AST, inside: bool) -> Iterator[tuple[ast.ImportFrom | ast.Import, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            yield node, inside
        if isinstance(node, ast.expr):
            continue  # no statement is in one
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        lazy = lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        yield from _imports(node, inside or lazy)


def own_imports(found: House, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module below wan_core, names) of each import from our own packages."""
    package = name if name in FLOORS else name.rpartition(".")[0]
    for node, _ in imports(found[name]):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        names = tuple(alias.name for alias in node.names)
        levels = node.level - (1 if package else 0)
        base = (package, "")[levels] if package and levels < 2 else ""
        target = ".".join(part for part in (base, node.module or "") if part)
        if target in ("", *FLOORS):  # from . import name: a module, or a name of the face
            modules = [f"{target}.{n}".lstrip(".") for n in names]
            for module, one in zip(modules, names, strict=True):
                yield (module, ()) if module in found else (target or "__init__", (one,))
        else:
            yield target, names


def package_of(name: str) -> str:
    head = name.split(".")[0]
    return head if head in FLOORS else ""


def floor_of(name: str) -> int:
    """The height of a module: ground modules below all packages, the roof above."""
    head = name.split(".")[0]
    if head in FLOORS:
        return FLOORS.index(head)
    return len(FLOORS) if head in ROOF else -1


def all_of(found: House, package: str) -> list[str]:
    for node in found[package].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


# The rules ---------------------------------------------------------------------------------------


def unknown_rooms(found: House) -> list[str]:
    known = {*GROUND, *ROOF, *FLOORS}
    return [name for name in found if name.split(".")[0] not in known or name.count(".") > 1]


def upward_imports(found: House) -> list[str]:
    """A package imports only from packages below its own; functions and type checks included."""
    return [
        f"{name} imports {target}"
        for name in found
        for target, _ in own_imports(found, name)
        if package_of(name) != package_of(target) or not package_of(name)
        if (floor_of(target), GROUND.index(target) if target in GROUND else 0)
        >= (floor_of(name), GROUND.index(name) if name in GROUND else 0)
        if name not in ROOF
    ]


def past_the_face(found: House) -> list[str]:
    """Outside a package only the names of its face are imported, never a module within."""
    out = []
    for name in found:
        for target, names in own_imports(found, name):
            package = package_of(target)
            if not package or package == package_of(name):
                continue
            if target != package:
                out.append(f"{name} imports {target}, past the face of {package}")
            hidden = set(names) - set(all_of(found, package)) if target == package else ()
            out += [f"{name} imports {one}, which {package} does not show" for one in hidden]
    return out


def circles(found: House) -> list[str]:
    """No module depends on itself by way of others, faces and lazy imports included."""
    graph = {}
    for name in found:
        targets = {t for t, _ in own_imports(found, name) if t in found}
        # A module is not held responsible for the face of the package it stands in.
        graph[name] = targets - {package_of(name), name, "__init__"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def heavy_imports(found: House) -> list[str]:
    """Left of the plan nothing imports torch; diffusers and transformers come only when called."""
    out = []
    for name in found:
        free = package_of(name) in TORCH_FREE or not package_of(name) or name in FLOORS
        banned = HEAVY if free else {"diffusers", "transformers"}
        for node, lazy in imports(found[name]):
            absolute = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                absolute = [node.module or ""]
            roots = {one.split(".")[0] for one in absolute}
            if roots & banned and not lazy:
                out.append(f"{name} imports {roots & banned} at its top")
            if roots & COMFY:
                out.append(f"{name} imports ComfyUI's {roots & COMFY}")
    return out


def package_sizes(found: House) -> list[str]:
    counts = {p: sum(package_of(name) == p for name in found) for p in FLOORS}
    return [f"{p} has {n} files" for p, n in counts.items() if n not in FILES_A_PACKAGE]


def without_docstring(found: House) -> list[str]:
    short = [name for name, tree in found.items() if not ast.get_docstring(tree)]
    # A face says what is here, what comes in, what goes out and what it imports.
    thin = [p for p in FLOORS if len(ast.get_docstring(found[p]) or "") < 150]
    return [*short, *thin]


def lists_that_differ(found: House) -> list[str]:
    """A face names each thing up to three times: shown, resolved lazily, known to type checkers."""
    out = []
    for package in FLOORS:
        taken = {
            (node.module, alias.name)
            for node, _ in imports(found[package])
            if isinstance(node, ast.ImportFrom) and node.level == 1
            for alias in node.names
        }
        names = {name for _, name in taken}
        if package == "memory":
            names.add("Job")  # an old name, set there
        if sorted(names) != sorted(all_of(found, package)):  # their order is the linter's matter
            out.append(f"{package}: __all__ is not the list of what is imported")
        for node in ast.walk(found[package]):
            if isinstance(node, ast.Call) and ast.unparse(node).startswith("lazy_names(__name__"):
                table = ast.literal_eval(node.args[1])
                lazy = {(module, name) for module, some in table.items() for name in some}
                if lazy != taken:
                    out.append(f"{package}: {sorted(lazy ^ taken)} on one list only")
    return out


RULES: tuple[Callable[[House], list[str]], ...] = (
    unknown_rooms, upward_imports, past_the_face, circles, heavy_imports, package_sizes,
    without_docstring, lists_that_differ,
)  # fmt: skip

MUTANTS = {
    "a room without a place": (unknown_rooms, "utils", "'''Odds and ends.'''"),
    "an import upwards": (upward_imports, "detect.pairing", "from ..plan import Planner"),
    "an import upwards inside a function": (
        upward_imports, "plan.ladder", "def f():\n    from ..placing import apply_plan",
    ),
    "an import upwards for types": (
        upward_imports, "memory.choices", "if TYPE_CHECKING:\n    from ..plan import Planner",
    ),
    "the ground on a package": (upward_imports, "files", "from .formats import read_table"),
    "the ground upside down": (upward_imports, "errors", "from .config import GIB"),
    "an import past a face": (past_the_face, "job.request", "from ..models.shapes import read_vae"),
    "a module past a face": (past_the_face, "render.render", "from ..sampling import vae"),
    "a name the face hides": (past_the_face, "job.request", "from ..models import _VARIANTS"),
    "the roof past a face": (past_the_face, "__main__", "from .plan.ladder import ladder"),
    "a circle": (circles, "formats.table", "from .open import read_table"),
    "a circle by way of a function": (
        circles, "detect.identified", "def f():\n    from .build import build",
    ),
    "torch left of the plan": (heavy_imports, "plan.timing", "import torch"),
    "torch in a face": (heavy_imports, "loading", "import torch"),
    "diffusers at the top": (heavy_imports, "loading.component", "from diffusers import x"),
    "ComfyUI in the library": (heavy_imports, "render.render", "def f():\n    import comfy.utils"),
    "a name on one list only": (
        lists_that_differ, "loading", "if TYPE_CHECKING:\n    from .dtypes import name_of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Callable[[House], list[str]]) -> None:
    assert rule(house()) == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_rule_finds_the_mutant(mutant: str) -> None:
    rule, name, line = MUTANTS[mutant]
    assert rule(with_line(name, line))


def test_sizes_and_docstrings_are_looked_at() -> None:
    crowd = {f"job.more_{i}": ast.parse("'''x'''") for i in range(10)}
    assert package_sizes({**house(), **crowd})
    assert package_sizes({k: v for k, v in house().items() if not k.startswith("job.")})
    assert without_docstring({**house(), "job.silent": ast.parse("x = 1")})
    assert without_docstring({**house(), "job": ast.parse("'''The job.'''")})


def test_every_module_is_in_the_picture() -> None:
    assert len(house()) == len(list(CORE.rglob("*.py"))) > 100
    assert set(FLOORS) <= set(house())


def test_planning_works_where_torch_cannot_be_imported() -> None:
    """Blocking the heavy packages outright is stronger than reading the syntax."""
    rooms = [n for n in house() if package_of(n) in TORCH_FREE or n in GROUND]
    rooms += LAZY
    code = (
        "import sys\n"
        f"for name in {sorted(HEAVY | COMFY)!r}: sys.modules[name] = None\n"
        f"for room in {rooms!r}: __import__('wan_core.' + room)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("folder", ["nodes", "tools"])
def test_others_import_faces_only(folder: str) -> None:
    """Nodes and tools see what a user sees; tests and benchmarks may look inside."""
    for path in (ROOT / folder).glob("*.py"):
        for node, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "wan_core"
            ):
                continue
            rooms = (node.module or "").split(".")[1:]
            assert len(rooms) < 2, f"{path.name} imports {node.module}, past a face"
            if rooms and rooms[0] in FLOORS:
                shown = all_of(house(), rooms[0])
                assert {alias.name for alias in node.names} <= set(shown), path.name


BANNED = (
    "trust_remote_code=True", "eval(", "exec(", "subprocess", "os.system", "import pickle",
    "importlib.reload", "torch.load(", "set_default_dtype", "set_default_device",
    "weights_only=False", "allow_tf32", "enable_flash_sdp", "set_attention_backend",
)  # fmt: skip


STARTS_PROCESSES = {
    "wan_core/workers/process.py": ("subprocess",), "wan_core/serve/processes.py": ("subprocess",),
}  # fmt: skip
"""Where a process is started: of this interpreter, with this package, without a shell."""


@pytest.mark.parametrize("module", STARTS_PROCESSES)
def test_workers_are_this_interpreter_with_this_package(module: str) -> None:
    text = (ROOT / module).read_text(encoding="utf-8")
    assert "[sys.executable, " in text and text.count("subprocess.Popen(") == 1
    assert not any(word in text for word in ("shell=", "os.popen", "subprocess.run", "pickle"))


def code_of(path: Path) -> str:
    """The source without comments and strings; method calls on objects keep their dot."""
    skipped = (tokenize.COMMENT, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    words = [t.string for t in tokens if t.type not in skipped]
    return " ".join(words).replace(" (", "(").replace(" . ", ".").replace(" = ", "=")


def test_nothing_that_ships_runs_code_or_changes_the_process() -> None:
    shipped = [*CORE.rglob("*.py"), *(ROOT / "nodes").rglob("*.py"), ROOT / "__init__.py"]
    for path in shipped:
        code = code_of(path).replace(".eval(", ".")
        allowed = STARTS_PROCESSES.get(path.relative_to(ROOT).as_posix(), ())
        for word in (one for one in BANNED if one not in allowed):
            assert word not in code, f"{path.relative_to(ROOT)}: {word}"
    for path in (ROOT / "web").rglob("*.js"):
        assert "innerHTML" not in path.read_text(encoding="utf-8"), path.name


def test_only_the_bridge_touches_comfyui() -> None:
    for path in (ROOT / "nodes").glob("*.py"):
        for node, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            else:
                roots = set() if node.level else {(node.module or "").split(".")[0]}
            if roots & (COMFY - {"comfy_api"}):
                assert path.name == "bridge.py", f"{path.name} imports {roots}"


def test_no_model_is_called_inside_an_except_block() -> None:
    """A traceback keeps the failed call's tensors alive; a retry there runs out again."""
    callers = {"generate", "denoise_steps", "predict", "decode_next", "forward"}
    for room, tree in house().items():
        for handler in (n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)):
            for call in (n for n in ast.walk(handler) if isinstance(n, ast.Call)):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                assert name not in callers, f"{room}: {name} called inside except"


def test_files_and_functions_fit_a_screen() -> None:
    for path in [*CORE.rglob("*.py"), *(ROOT / "nodes").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, f"{path.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 75, f"{path.name}:{node.lineno} {node.name} has {length} lines"
