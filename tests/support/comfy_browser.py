"""Opens ComfyUI's page in a headless Chromium; says plainly what is missing where it cannot."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.comfy_server import ComfyServer, find_checkouts

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


def _marks() -> list[pytest.MarkDecorator]:
    browser = find_browser()
    return [
        pytest.mark.comfyui,
        pytest.mark.slow,
        pytest.mark.skipif(not find_checkouts(), reason="no ComfyUI checkout (set COMFYUI_PATH)"),
        pytest.mark.skipif(isinstance(browser, str), reason=str(browser)),
    ]


IN_A_BROWSER = _marks()
"""Marks of a file whose tests look at ComfyUI's page."""


READY = (
    "window.app?.graph && app.extensionManager && window.comfyAPI.api.api.clientId"
    # Before the socket has its id, what a run reports goes nowhere.
    " && Object.keys(LiteGraph.registered_node_types).length > 50"
)
"""What is true in a page that is loaded."""


@contextmanager
def open_page(
    url: str, browser: Path, size: tuple[int, int] = (1600, 900), wait: str | None = READY
) -> Iterator[Any]:
    """Yield ComfyUI's page in a fresh profile, once ``wait`` is true in it; only 127.0.0.1 is
    reached.

    ``page.wanfit_errors`` collects what the console said that names this pack.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(browser), headless=True, args=FLAGS
        )
        try:
            with fresh_page(chromium, url, size, wait) as page:
                yield page
        finally:
            chromium.close()


@contextmanager
def fresh_page(
    chromium: Any, url: str, size: tuple[int, int] = (1600, 900), wait: str | None = READY
) -> Iterator[Any]:
    """The same in a browser that runs already: a thread can have one alone."""
    context = chromium.new_context(viewport={"width": size[0], "height": size[1]})
    try:
        page = context.new_page()
        page.set_default_timeout(120_000)  # of a busy machine, too
        page.wanfit_errors = []
        page.on("console", lambda message: _note(page, message.type, message.text))
        page.on("pageerror", lambda error: _note(page, "error", str(error)))
        page.goto(url)
        if wait is not None:
            page.wait_for_function(f"window.LiteGraph && {wait}")
        yield page
    finally:
        context.close()


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


def run_in(page: Any, server: ComfyServer, seconds: float = 240) -> None:
    """Press Run in the page and wait until ComfyUI has run it; ``told`` is what its nodes say.

    That it has run is asked of ComfyUI itself: what the page is told comes on another way, at
    another time. Fails where the run failed.
    """
    page.evaluate(
        "() => { window.told = []; if (window.tells) return; window.tells = true;"
        "window.comfyAPI.api.api.addEventListener('wanfit.run', e => window.told.push(e.detail)); }"
    )
    before = set(server.get("/history"))
    page.evaluate("() => app.queuePrompt(0)")

    def ended() -> list[dict[str, Any]]:
        return [entry for key, entry in server.get("/history").items() if key not in before]

    (entry,) = server.wait_until(ended, seconds, pause=0.1)
    assert entry["status"]["status_str"] == "success", str(entry["status"])[:6000]


def shows(page: Any, condition: str, seconds: float = 60) -> None:
    """Wait until an expression is true in the page, asked ten times a second.

    Not with each picture that it draws, which is how Playwright waits unless told otherwise: on a
    busy machine a page that nobody looks at may draw none. What the page was told goes into the
    error.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(f"() => Boolean({condition})"):
        if time.monotonic() > end:
            told = page.evaluate("() => (window.told ?? []).map(({preview, ...rest}) => rest)")
            raise AssertionError(f"waited {seconds} s in vain for {condition}; told: {told}")
        page.wait_for_timeout(100)
