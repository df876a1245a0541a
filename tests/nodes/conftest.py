"""What the tests of nodes share, in a running ComfyUI or without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.as_pack import load_pack
from support.comfy_browser import find_browser, open_page
from support.comfy_server import ComfyServer, find_checkouts, find_python

CHECKOUTS = find_checkouts()


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    """The nodes, loaded as ComfyUI loads a custom node, without ComfyUI."""
    return load_pack()


@pytest.fixture(scope="module", params=CHECKOUTS or ["none"])
def checkout(request: pytest.FixtureRequest) -> Path:
    """Each ComfyUI that is there."""
    return CHECKOUTS[request.param]


@pytest.fixture(scope="module")
def comfyui(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> ComfyServer:
    """A ComfyUI in folders of its own that has not been started."""
    python = find_python(checkout)
    if isinstance(python, str):
        pytest.skip(python)
    return ComfyServer(tmp_path_factory.mktemp("comfyui"), checkout, python)


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer) -> Iterator[ComfyServer]:
    """The same, running."""
    with comfyui:
        yield comfyui


@pytest.fixture(scope="module")
def page(server: ComfyServer) -> Iterator[Any]:
    """Its page, past the dialog that greets a fresh profile and hides the graph."""
    browser = find_browser()
    assert isinstance(browser, Path), browser
    server.post("/settings/Comfy.TutorialCompleted", True)
    with open_page(server.url, browser, (1600, 1000)) as opened:
        yield opened
