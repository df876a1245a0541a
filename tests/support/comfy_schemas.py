"""What the nodes declare, without a ComfyUI: its modules are stand-ins while they are imported."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from support.as_pack import ROOT

COMFY = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server")
NODES = {
    "WanLoader": "loader", "WanOptimize": "loader", "WanLoRA": "lora", "WanControl": "control",
    "WanEstimateMemory": "estimate", "WanGenerate": "generate", "WanChunkedSampler": "generate",
}  # fmt: skip
_PACK = "wanfit_declared"


def help_names(page: str) -> list[str]:
    """Return the inputs and outputs that a help page explains, in its order."""
    parts = re.split(r"^## ", page, flags=re.MULTILINE)
    told = [part for part in parts if re.match(r"(?:In|Out)puts?\n", part)]
    rows = re.findall(r"^- ((?:\*\*\w+\*\*(?:, )?)+): \S", "".join(told), flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"\w+", row)]


class _Io:
    """``comfy_api.latest.io``, whose schemas, inputs and outputs are what they were made from."""

    ComfyNode = object

    def Schema(self, **fields: Any) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    def Custom(self, kind: str) -> Any:
        return getattr(self, kind)

    def __getattr__(self, kind: str) -> Any:
        def made(id: str | None = None, **fields: Any) -> SimpleNamespace:
            return SimpleNamespace(id=id, kind=kind, **fields)

        return MagicMock(Input=made, Output=made, Type=object)


class _StandIn(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Io() if name == "io" else MagicMock()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in COMFY:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    before, finder = dict(sys.modules), _Finder()
    for name in [n for n in sys.modules if n.partition(".")[0] in COMFY]:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] in (*COMFY, _PACK)]:
            del sys.modules[name]
        sys.modules.update({n: m for n, m in before.items() if n.partition(".")[0] in COMFY})


def schemas() -> dict[str, Any]:
    """Return each node's schema, by its id: ``inputs`` and ``outputs`` with their ids."""
    with _stand_ins():
        spec = importlib.util.spec_from_file_location(
            _PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[_PACK] = pack = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        return {
            node: getattr(importlib.import_module(f"{_PACK}.nodes.{module}"), node).define_schema()
            for node, module in NODES.items()
        }
