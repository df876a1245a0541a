"""The WanFit tab in a real page, in each ComfyUI that is there: renders, going on, preferences."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.comfy_browser import IN_A_BROWSER, find_browser, open_page, run_in, shows
from support.comfy_graphs import with_values, workflow
from support.comfy_server import REPOSITORY, ComfyServer

BROWSER = find_browser()
SHOTS = os.environ.get("WANFIT_SCREENSHOTS")
"""A folder for pictures of the page, to look at."""
TEXT = "document.querySelector('.wanfit-sidebar')?.innerText ?? ''"

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def preferred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preferred") / "preferences.json"


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer, preferred: Path) -> Iterator[ComfyServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANFIT_PREFERENCES", str(preferred))
        preferred.unlink(missing_ok=True)
        with comfyui:
            # A fresh profile is greeted with a dialog that hides the graph.
            comfyui.post("/settings/Comfy.TutorialCompleted", True)
            yield comfyui


def load(page: Any, saved: dict[str, Any]) -> None:
    page.evaluate("async workflow => await app.loadGraphData(workflow)", saved)


def says(page: Any, text: str, seconds: float = 40) -> None:
    try:
        page.wait_for_function(f"t => ({TEXT}).includes(t)", arg=text, timeout=seconds * 1000)
    finally:
        assert text in page.evaluate(TEXT)  # shows what is there instead


def shoot(page: Any, server: ComfyServer, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{server.checkout.name}-{name}.png")


def test_the_tab_tells_goes_on_and_keeps_what_is_preferred(
    server: ComfyServer, preferred: Path
) -> None:
    with open_page(server.url, BROWSER, (1400, 1000)) as page:  # type: ignore[arg-type]
        size = {"width": 64, "height": 64, "num_frames": 81}
        windows = {"window_frames": 33, "window_overlap": 8}
        long = with_values(workflow("long_video"), **size, **windows, steps=40, seed=77)
        load(page, long)
        page.locator(".wanfit-tab-button, [aria-label='WanFit: renders, what can go on, "
                     "preferences']").first.click()  # fmt: skip
        says(page, "No render yet.")
        page.evaluate("() => app.queuePrompt(0)")
        says(page, "running")
        page.wait_for_selector(".wanfit-run[data-stage^=denoise]", state="attached")
        server.wait_until(lambda: any(server.base.glob("output/.wanfit/*/a.safetensors")))
        shoot(page, server, "tab-running")
        page.evaluate("() => window.comfyAPI.api.api.interrupt()")
        says(page, "interrupted")
        says(page, "of 40")
        shoot(page, server, "tab-interrupted")
        # The open graph may be another one by now: the workflow that made it is opened.
        load(page, with_values(workflow("text_to_video"), num_frames=9, steps=1))
        page.locator(".wanfit-sidebar button", has_text="Go on").click()
        says(page, "done", 240)
        says(page, "Nothing was cut off")
        page.locator(".wanfit-sidebar summary").first.click()
        says(page, "Went on after step")
        shoot(page, server, "tab-done")
        # A preference goes to the file and to ComfyUI's settings, and one of these to the file.
        page.locator(".wanfit-sidebar select[name=speed]").select_option("fast")
        server.wait_until(lambda: preferred.exists() and "fast" in preferred.read_text())
        get = "name => app.extensionManager.setting.get(name)"
        page.wait_for_function(f"({get})('WanFit.speed') === 'fast'")
        page.locator(".wanfit-sidebar select[name=journal]").select_option("off")
        server.wait_until(lambda: json.loads(preferred.read_text()).get("journal") is False)
        page.wait_for_function(f"({get})('WanFit.journal') === 'off'")
        page.evaluate("() => app.extensionManager.setting.set('WanFit.ram_limit_gb', 12)")
        server.wait_until(lambda: json.loads(preferred.read_text()).get("ram_limit_gb") == 12)
        assert page.wanfit_errors == []
    # Another day, the file counts: also where it was changed meanwhile.
    preferred.write_text('{"codec": "h265"}')
    with open_page(server.url, BROWSER, (1400, 1000)) as page:  # type: ignore[arg-type]
        page.wait_for_function(f"({get})('WanFit.codec') === 'h265'")
        page.wait_for_function(f"({get})('WanFit.speed') === 'built-in'")
        page.wait_for_timeout(1000)
        assert json.loads(preferred.read_text()) == {"codec": "h265"}
        load(page, workflow("text_to_video"))
        new = (
            "() => LiteGraph.createNode('WanGenerate').widgets.find(w => w.name === 'codec').value"
        )
        assert page.evaluate(new) == "h265"  # new nodes begin with it
        assert page.wanfit_errors == []
    assert "Traceback" not in server.log()


def words(language: str) -> dict[str, str]:
    path = REPOSITORY / "web" / "words" / f"{language}.json"
    return dict(json.loads(path.read_text("utf-8")))


def test_the_page_speaks_the_language_that_is_set(server: ComfyServer) -> None:
    """The tab, the plan and the run: in Chinese from the start, then in Japanese at once."""
    server.post("/settings/Comfy.Locale", "zh")  # newer pages do not offer German
    chinese, japanese = words("zh"), words("ja")
    try:
        with open_page(server.url, BROWSER, (1400, 1000)) as page:  # type: ignore[arg-type]
            page.locator(f"[aria-label='{chinese['tab.tooltip']}']").first.click()
            says(page, chinese["tab.session"])
            load(page, with_values(workflow("text_to_video"), num_frames=9, steps=2, seed=5))
            note = chinese["plan.official"].format(value=2)
            shows(page, "app.graph._nodes.find(n => n.comfyClass === 'WanGenerate').widgets"
                        f".some(widget => widget.label?.endsWith({note!r}))")  # fmt: skip
            run_in(page, server)
            shows(page, "document.querySelector('.wanfit-run[data-stage=done]')")
            report = "document.querySelector('.wanfit-report summary').textContent"
            assert page.evaluate(report) == chinese["run.report"]
            says(page, chinese["tab.done"])
            shoot(page, server, "tab-zh")
            shown = page.evaluate(TEXT)
            left = [text for key, text in words("en").items()
                    if key.startswith("tab.") and len(text) > 9 and "{" not in text
                    and text in shown]  # fmt: skip
            assert left == []
            page.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'ja')")
            says(page, japanese["tab.session"])
            shoot(page, server, "tab-ja")
            assert page.wanfit_errors == []
    finally:
        server.post("/settings/Comfy.Locale", "en")
