"""A new user's way in a real page: clicks counted, seconds taken, and what is made looked at.

COMFYUI_FRONTEND chooses another front end; WANFIT_SCREENSHOTS a folder for pictures and figures.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from support.comfy_browser import IN_A_BROWSER, READY, find_browser, open_page, shows
from support.comfy_graphs import read_video
from support.comfy_server import ComfyServer

from tools import judge

BROWSER = find_browser()
SHOTS = os.environ.get("WANFIT_SCREENSHOTS")
TEMPLATE = "video_wan2_2_14B_i2v"
HAS = "app.graph._nodes.some(node => node.comfyClass === '{}')"

pytestmark = IN_A_BROWSER


class User:
    """Clicks as a person does, and keeps count and time from the page's first request on."""

    def __init__(self, page: Any) -> None:
        self.page, self.began = page, time.monotonic()
        self.clicks: list[float] = []

    def click(self, what: Any) -> None:
        what.click()
        self.clicks.append(time.monotonic() - self.began)

    def done(self, server: ComfyServer, name: str) -> None:
        """Write down what it took; a picture of the page lies beside it."""
        seconds = time.monotonic() - self.began
        front_end = self.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
        figures = {
            "comfyui": server.checkout.name, "front end": front_end, "clicks": len(self.clicks),
            "start of ComfyUI": server.start_seconds, "page and clicks": self.clicks,
            "seconds": seconds,
        }  # fmt: skip
        if SHOTS:
            self.page.wait_for_timeout(1000)
            stem = f"{SHOTS}/{server.checkout.name}-{front_end}-{name}"
            self.page.screenshot(path=f"{stem}.png")
            Path(f"{stem}.json").write_text(json.dumps(figures, indent=1))


def new_user(server: ComfyServer) -> None:
    """Have ComfyUI greet the next page as its first one: with its templates."""
    server.post("/settings/Comfy.TutorialCompleted", False)


def recognisable(server: ComfyServer) -> None:
    """Look at the only video that ComfyUI has saved: is it what the example asks for?"""
    (path,) = (server.base / "output" / "wanfit").glob("*.mp4")
    frames, _, rate = read_video(path)
    seen = judge.read_clip(torch.stack([torch.from_numpy(one) for one in frames]) / 255)
    assert (seen.colour, seen.shape, seen.direction) == ("red", "circle", "right")
    assert seen.background == "dark" and seen.steady()
    assert len(frames) == 17 and rate == 16
    path.unlink()


def run(user: User) -> None:
    # That of the canvas: older pages have a second, hidden one.
    user.click(user.page.get_by_role("button", name="Run", exact=True).first)
    shows(user.page, "document.querySelector('.wanfit-run[data-stage=done] video')", 120)


def test_the_first_video_takes_three_clicks(server: ComfyServer) -> None:
    """Where the page opens ComfyUI's templates: ours, the example, Run."""
    assert isinstance(BROWSER, Path)
    new_user(server)
    with open_page(server.url, BROWSER, (1600, 1000), wait=None) as page:
        user = User(page)
        user.click(page.get_by_text("wanfit", exact=True).last)
        user.click(page.get_by_text("text_to_video", exact=True).last)
        shows(page, READY + "&& " + HAS.format("WanGenerate"))
        run(user)
        recognisable(server)
        user.done(server, "first-video")
        assert len(user.clicks) == 3
        assert page.wanfit_errors == []


def test_from_the_tab_it_takes_three_clicks_too(server: ComfyServer) -> None:
    """Where ComfyUI was used before: the WanFit tab, its example, Run."""
    assert isinstance(BROWSER, Path)
    server.stop()  # a clip that was made is not made again
    server.start()
    server.await_start()
    server.post("/settings/Comfy.TutorialCompleted", True)
    with open_page(server.url, BROWSER, (1600, 1000)) as page:
        user = User(page)
        user.click(page.locator("[aria-label^='WanFit: renders']").first)
        user.click(page.locator(".wanfit-sidebar button", has_text="Open the first example"))
        shows(page, HAS.format("WanGenerate"))
        run(user)
        recognisable(server)
        user.done(server, "from-the-tab")
        assert len(user.clicks) == 3
        assert page.wanfit_errors == []


def stand_ins(server: ComfyServer) -> None:
    """Put files of the names that the official template asks for where they belong."""
    root = server.python.parent.parent
    (path,) = root.glob(
        f"lib/python*/site-packages/comfyui_workflow_templates*/templates/{TEMPLATE}.json"
    )
    for name, folder in re.findall(
        r'"name":\s*"([^"]+)",\s*"url":[^}]*?"directory":\s*"(\w+)"', path.read_text()
    ):
        place = server.base / "models" / folder / name
        place.parent.mkdir(exist_ok=True)
        place.touch()


def test_the_official_template_becomes_ours_in_two_clicks(server: ComfyServer) -> None:
    """The template in ComfyUI's list, the button in the bar."""
    assert isinstance(BROWSER, Path)
    stand_ins(server)
    new_user(server)
    with open_page(server.url, BROWSER, (1600, 1000), wait=None) as page:
        user = User(page)
        card = page.get_by_text("Wan 2.2 14B Image to Video", exact=True).last
        page.get_by_text("Templates").last.wait_for()
        page.wait_for_timeout(2000)
        if page.get_by_text("No templates found").count():
            page.get_by_text("Popular", exact=True).last.click()  # 1.49 begins with an empty list
        page.mouse.move(1000, 700)
        for _ in range(60):  # 1.27 lists as far as one scrolls
            if card.count():
                break
            page.mouse.wheel(0, 1500)
            page.wait_for_timeout(250)
        user.click(card)
        user.click(page.locator("button.wanfit-convert"))
        shows(page, HAS.format("WanGenerate") + "&& " + HAS.format("WanLoader"))
        loader = page.evaluate(
            "app.graph._nodes.find(node => node.comfyClass === 'WanLoader')"
            ".widgets.slice(0, 2).map(widget => widget.value)"
        )
        assert [re.search("(high|low)_noise_14B", name)[1] for name in loader] == ["high", "low"]
        shows(page, "getComputedStyle(document.querySelector('.wanfit-convert')).display == 'none'")
        user.done(server, "official-template")
        assert len(user.clicks) == 2
        assert page.wanfit_errors == []
