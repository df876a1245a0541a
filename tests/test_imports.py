"""The house's plan held by its syntax trees: who may import whom, and where torch begins."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "wan_core"

# From the ground up: a room imports only rooms that stand before it.
NO_TORCH = (
    "config", "errors", "convert", "files", "calibration", "hardware", "prompts", "render_identity",
    "saved_state", "journal_folder", "journal", "schedule", "turns", "variants",
    "activations", "lean_activations", "recipes", "architecture", "choices", "sizes",
    "structure", "timing", "vae_activations", "lean_vae_activations", "memory", "windows",
    "noise", "request",
    "wishes", "ladder", "reasons", "plan", "cache", "header", "configs", "foreign",
    "gguf_header", "lora_check", "lora_keys", "pickle_header", "shards", "tokenizer", "weights",
    "identify",
    "blueprint", "choose", "pairing", "assemble", "companions", "folders", "lora_choice",
    "detect", "download", "load",
)  # fmt: skip
WITH_TORCH = (
    "audio", "denoise", "continuation", "lean", "lean_timestep", "monitor", "offload",
    "own_forward", "transport", "decode_cache", "lean_forward", "lean_decode", "lean_vae",
    "precision", "resume", "tensors", "lora", "quantized", "component",
    "fp8_storage", "streaming", "placement", "stages", "vae", "encode", "conditions",
    "video", "render", "generate",
)  # fmt: skip
ORDER = (*NO_TORCH, *WITH_TORCH, "__init__", "__main__")

# Imports inside a function that look upwards, and why.
UPWARD = {
    ("header", "shards"): "read_table is the one door for every format",
    ("header", "gguf_header"): "read_table is the one door for every format",
    ("header", "pickle_header"): "read_table is the one door for every format",
    ("cache", "offload"): "moving weights off the device, only where there are weights",
    ("cache", "tensors"): "telling views of a mapped file from RAM, only where there are weights",
    ("plan", "placement"): "carrying out a plan that planning alone made, on request",
    ("load", "component"): "building a diffusers pipeline on request",
    ("load", "precision"): "building a diffusers pipeline on request",
    ("load", "generate"): "load describes, generate carries out: the wrapper is made last",
}
HEAVY = {"torch", "diffusers", "transformers", "numpy", "safetensors", "av", "gguf", "accelerate"}
COMFY = {"comfy", "folder_paths", "nodes", "server", "execution", "latent_preview", "comfy_api"}


@lru_cache
def trees() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text()) for path in CORE.glob("*.py")}


def imports(tree: ast.AST, inside: bool = False) -> list[tuple[str, int, bool]]:
    """(name, level, inside a function or TYPE_CHECKING) of every import below ``tree``."""
    found: list[tuple[str, int, bool]] = []
    for node in ast.iter_child_nodes(tree):
        lazy = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        lazy = lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(name, node.level, lazy) for name in names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, 0, lazy) for alias in node.names]
        found += imports(node, lazy)
    return found


def test_every_room_is_on_the_plan() -> None:
    assert sorted(trees()) == sorted(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_rooms_import_downwards_only(room: str) -> None:
    for name, level, lazy in imports(trees()[room]):
        if level == 0:
            assert name.split(".")[0] not in COMFY, f"{room} imports ComfyUI's {name}"
            continue
        assert level == 1, f"{room} reaches outside wan_core"
        target = name.split(".")[0]
        if ORDER.index(target) >= ORDER.index(room):
            lazily_typed = lazy and room == "__init__"
            assert lazy and ((room, target) in UPWARD or lazily_typed), f"{room} imports {target}"


@pytest.mark.parametrize("room", [*NO_TORCH, "__init__", "__main__"])
def test_torch_begins_right_of_the_plan(room: str) -> None:
    for name, level, lazy in imports(trees()[room]):
        assert lazy or level or name.split(".")[0] not in HEAVY, f"{room} imports {name}"


@pytest.mark.parametrize("room", ORDER)
def test_diffusers_and_transformers_are_imported_where_they_are_needed(room: str) -> None:
    for name, level, lazy in imports(trees()[room]):
        heavy = level == 0 and name.split(".")[0] in {"diffusers", "transformers"}
        assert lazy or not heavy, f"{room} imports {name} at its top"


def test_planning_works_where_torch_cannot_be_imported() -> None:
    """Blocking the heavy packages outright is stronger than reading the syntax."""
    code = (
        "import sys\n"
        f"for name in {sorted(HEAVY | COMFY)!r}: sys.modules[name] = None\n"
        f"for room in {NO_TORCH!r}: __import__('wan_core.' + room)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


BANNED = (
    "trust_remote_code=True", "eval(", "exec(", "subprocess", "os.system", "import pickle",
    "importlib.reload", "set_default_dtype", "set_default_device", "weights_only=False",
    "allow_tf32", "enable_flash_sdp", "set_attention_backend",
)  # fmt: skip


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
        for word in BANNED:
            assert word not in code, f"{path.relative_to(ROOT)}: {word}"
    for path in (ROOT / "web").rglob("*.js"):
        assert "innerHTML" not in path.read_text(encoding="utf-8"), path.name


def test_only_the_bridge_touches_comfyui() -> None:
    for path in (ROOT / "nodes").glob("*.py"):
        for name, level, _ in imports(ast.parse(path.read_text())):
            root = name.split(".")[0]
            if level == 0 and root in COMFY - {"comfy_api"}:
                assert path.name == "bridge.py", f"{path.name} imports {name}"


def test_no_model_is_called_inside_an_except_block() -> None:
    """A traceback keeps the failed call's tensors alive; a retry there runs out again."""
    callers = {"generate", "denoise_steps", "predict", "decode_next", "decode_frames", "forward"}
    for room, tree in trees().items():
        for handler in (n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)):
            for call in (n for n in ast.walk(handler) if isinstance(n, ast.Call)):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                assert name not in callers, f"{room}: {name} called inside except"


def test_files_and_functions_fit_a_screen() -> None:
    for path in [*CORE.glob("*.py"), *(ROOT / "nodes").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, f"{path.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 75, f"{path.name}:{node.lineno} {node.name} has {length} lines"
