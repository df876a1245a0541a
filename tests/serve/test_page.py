"""The server's page in a real browser: type a prompt, watch, see the clip."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comfy_browser import FLAGS, find_browser
from support.tiny_models import make_folder

pytest.importorskip("fastapi", reason="pip install 'wanfit[serve]': the server (wanfit serve)")
pytest.importorskip("uvicorn", reason="pip install 'wanfit[serve]': the server (wanfit serve)")

from support.http_server import Idle, serving

from wan_core.render.video import VideoWriter
from wan_core.serve.jobs import BatchJob
from wan_core.serve.queue import new_id

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


def wait_until_seen(page: Any) -> None:
    """Until the first clip knows its size: from its file. The page's policy forbids what
    ``wait_for_function`` does."""
    for _ in range(200):
        if page.evaluate("() => document.querySelector('li video').videoWidth") == 32:
            return
        time.sleep(0.05)
    raise AssertionError("the clip does not play")


@contextmanager
def three_clips(tmp_path: Path, **more: Any) -> Iterator[Any]:
    """A server with three clips that are done."""
    model = make_folder(tmp_path / "tiny", "wan2.1-t2v")
    with serving(model, tmp_path / "videos", crew=Idle(), **more) as (client, desk):
        ids = []
        for _ in range(3):
            id, row = new_id(), {"prompt": "x", "size": "32x32", "seconds": "1", "seed": 1}
            clip = desk.queue.folder_of(id) / "clip.mp4"
            clip.parent.mkdir(parents=True)
            with VideoWriter(clip, fps=8, width=32, height=32) as writer:
                writer.write(torch.rand(9, 32, 32, 3))
            number = desk.queue.add(id, BatchJob(number=0, model=model, output=clip), row).number
            desk.queue._file.execute(
                "UPDATE jobs SET status = 'completed', ended = 1 WHERE number = ?", (number,)
            )
            ids.append(id)
        yield client, ids


def test_clips_are_asked_for_in_parts(tmp_path: Path) -> None:
    """Without a token the browser fetches of a clip what it shows, and the page holds none."""
    requests: list[Any] = []
    with three_clips(tmp_path) as (client, ids), page_of(client.port) as page:
        # No more than that: a call of Playwright amid an event may hang it.
        page.on("request", lambda one: requests.append(one))
        page.reload()
        page.wait_for_selector("li:nth-child(3) video")
        wait_until_seen(page)
        found = page.eval_on_selector_all("li video", "all => all.map(v => [v.src, v.preload])")
        base = f"http://127.0.0.1:{client.port}/v1/videos"
        assert found == [[f"{base}/{id}/content", "metadata"] for id in reversed(ids)]
        clips = [one for one in requests if one.url.endswith("/content")]
        asked = [(one.url, one.all_headers().get("range", "")) for one in clips]
        assert asked and all(said.startswith("bytes=") for _, said in asked), asked
        assert page.errors == []
        page.route("**/v1/videos?*", lambda route: route.abort())
        page.wait_for_selector("#said:has-text('does not answer')")
        page.unroute("**/v1/videos?*")
        page.wait_for_selector("#said:empty", state="attached")


@pytest.mark.slow
def test_with_a_token_one_clip_at_a_time_lies_in_memory(tmp_path: Path) -> None:
    with three_clips(tmp_path, token=TOKEN) as (client, _), page_of(client.port) as page:
        page.fill("#token", TOKEN)
        page.dispatch_event("#token", "change")
        page.wait_for_selector("li:nth-child(3) .play")
        addresses = []
        for number in (1, 3):
            page.click(f"li:nth-child({number}) .play")
            page.wait_for_selector(f"li:nth-child({number}) video")
            wait_until_seen(page)
            found = page.eval_on_selector_all("li video", "all => all.map(v => v.src)")
            assert len(found) == 1 and found[0].startswith("blob:")
            addresses += found
        gone = "address => fetch(address).then(() => false, () => true)"
        assert page.evaluate(gone, addresses[0]), "the first clip is still held"
        page.click("li:nth-child(3) > button")
        page.wait_for_selector("li:nth-child(3)", state="detached")
        assert page.query_selector("li video") is None


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
        page.wait_for_selector("li .play", timeout=60_000)
        assert page.query_selector("li video") is None  # nothing is fetched before it is wanted
        page.click("li .play")
        page.wait_for_selector("li video")
        wait_until_seen(page)
        assert "<img src=x" in page.text_content("li div") and not page.query_selector("li img")
        assert page.text_content("#model") == "tiny" and page.text_content("#said") == ""
        page.click("li > button")
        page.wait_for_selector("li", state="detached")
        assert client.ask("GET", "/v1/videos")[1]["data"] == []
        # 401 before the token, 400 for the wrong steps: nothing else, and nothing of the policy.
        assert all("401" in said or "400" in said for said in page.errors), page.errors
