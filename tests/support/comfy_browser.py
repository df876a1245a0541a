"""Opens ComfyUI's page in a headless Chromium; says plainly what is missing where it cannot."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # The page's own server is all that can be reached; cheaper than to route every request.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def find_browser() -> Path | str:
    """Return a Chromium, or a sentence that says what is missing."""
    named = os.environ.get("CHROMIUM_PATH")
    if named:
        return Path(named)
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return Path(found)
    return "no Chromium on PATH (set CHROMIUM_PATH)"


@contextmanager
def open_page(url: str, browser: Path, size: tuple[int, int] = (1600, 900)) -> Iterator[Any]:
    """Yield ComfyUI's page, loaded, in a fresh profile; only 127.0.0.1 can be reached.

    ``page.wanfit_errors`` collects what the console said that names this pack.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(browser), headless=True, args=FLAGS
        )
        try:
            context = chromium.new_context(viewport={"width": size[0], "height": size[1]})
            page = context.new_page()
            page.wanfit_errors = []
            page.on("console", lambda message: _note(page, message.type, message.text))
            page.on("pageerror", lambda error: _note(page, "error", str(error)))
            page.goto(url)
            page.wait_for_function("window.app?.graph !== undefined && app.extensionManager")
            page.wait_for_function("Object.keys(LiteGraph.registered_node_types).length > 50")
            # Before the socket has its id, what a run reports goes nowhere.
            page.wait_for_function("window.comfyAPI.api.api.clientId")
            yield page
        finally:
            chromium.close()


def _note(page: Any, kind: str, text: str) -> None:
    if kind == "error" and "wan" in text.lower():
        page.wanfit_errors.append(text)


def api_prompt(page: Any, workflow: dict[str, Any]) -> dict[str, Any]:
    """Load a saved workflow into the page and return the API prompt that Run would send."""
    page.evaluate("async workflow => await app.loadGraphData(workflow)", workflow)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    return {
        key: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for key, node in prompt.items()
    }
