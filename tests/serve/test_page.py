"""The server's page in a real browser: type a prompt, watch, see the clip."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.comfy_browser import FLAGS, find_browser
from support.tiny_models import make_folder

pytest.importorskip("fastapi", reason="pip install 'wanfit[serve]': the server (wanfit serve)")
pytest.importorskip("uvicorn", reason="pip install 'wanfit[serve]': the server (wanfit serve)")

from support.http_server import serving

TOKEN = "a-token-of-some-length"


@contextmanager
def page_of(port: int) -> Iterator[Any]:
    browser = find_browser()
    if isinstance(browser, str):
        pytest.skip(browser)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(browser), headless=True, args=FLAGS
        )
        try:
            page = chromium.new_page()
            page.errors = []
            page.on("console", lambda said: said.type == "error" and page.errors.append(said.text))
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/")
            yield page
        finally:
            chromium.close()


def test_a_prompt_is_typed_and_its_clip_is_seen(tmp_path: Path) -> None:
    model = make_folder(tmp_path / "tiny", "wan2.1-t2v")
    with (
        serving(model, tmp_path / "videos", token=TOKEN) as (client, _),
        page_of(client.port) as page,
    ):
        page.wait_for_selector("#locked:not([hidden])")
        page.fill("#token", TOKEN)
        page.dispatch_event("#token", "change")
        page.fill("#prompt", "<img src=x onerror=alert(1)> a cat")
        page.fill("#width", "32")
        page.fill("#height", "32")
        page.fill("#num_frames", "5")
        page.fill("#num_inference_steps", "0")
        page.evaluate("() => { document.getElementById('ask').noValidate = true }")
        page.click("#make")
        page.wait_for_selector("#said:has-text('steps')")
        page.fill("#num_inference_steps", "2")
        page.click("#make")
        page.wait_for_selector("li video", timeout=60_000)
        # Not wait_for_function: the page's policy forbids what it does.
        for _ in range(200):
            if page.evaluate("() => document.querySelector('li video').videoWidth") == 32:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the clip does not play")
        assert "<img src=x" in page.text_content("li div") and not page.query_selector("li img")
        assert page.text_content("#model") == "tiny" and page.text_content("#said") == ""
        page.click("li button")
        page.wait_for_selector("li", state="detached")
        assert client.ask("GET", "/v1/videos")[1]["data"] == []
        # 401 before the token, 400 for the wrong steps: nothing else, and nothing of the policy.
        assert all("401" in said or "400" in said for said in page.errors), page.errors
