"""Help pages in the real page, in a panel of 300 px: nothing is cut, in either renderer."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support.comfy_browser import IN_A_BROWSER, shows
from support.comfy_schemas import NODES

SHOTS = os.environ.get("WANFIT_SCREENSHOTS")
WIDTH = 300
"""Of the panel, in pixels."""

pytestmark = IN_A_BROWSER

NARROW = """width => {
    const help = document.querySelector('.node-help-content');
    Object.assign(help.style, {
        width: `${width}px`, minWidth: 0, maxWidth: `${width}px`, boxSizing: 'border-box',
    });
    const edge = help.getBoundingClientRect().right + 1;
    const inline = one => getComputedStyle(one).display === 'inline';
    return [help, ...help.querySelectorAll('*')].filter(one =>
        one.getBoundingClientRect().right > edge
        || (!inline(one) && one.scrollWidth > one.clientWidth + 1)
    ).map(one => `${one.tagName}: ${one.textContent.slice(0, 60)}`);
}"""


def open_help(page: Any, node: str) -> None:
    """Put a node alone on the canvas and open its help as a user does, by the button over it."""
    page.evaluate(
        """kind => {
            app.graph.clear();
            const node = LiteGraph.createNode(kind);
            node.pos = [600, 350];
            app.graph.add(node);
        }""",
        node,
    )
    for _ in range(20):  # of a page that has just been loaded the buttons may be incomplete
        page.evaluate("() => { app.canvas.deselectAll?.(); app.canvas.setDirty(true, true); }")
        page.wait_for_timeout(100)
        page.evaluate(
            "() => { app.canvas.selectNode(app.graph._nodes[0]); app.canvas.setDirty(true, true); }"
        )
        page.wait_for_timeout(500)
        if page.locator("[data-testid=info-button]").count():
            break
    # Where it lies depends on the zoom of the canvas: under the bar, for some.
    page.locator("[data-testid=info-button]").first.dispatch_event("click")
    shows(page, f"document.querySelector('.node-help-content h1')?.textContent === '{node}'")
    shows(page, "[...document.querySelectorAll('.node-help-content img')].every(i => i.complete)")


@pytest.mark.parametrize("nodes_2", [False, True])
def test_help_is_readable_in_a_narrow_panel(page: Any, nodes_2: bool) -> None:
    setting = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(setting, nodes_2)
    try:
        for node in NODES if not nodes_2 else ("WanGenerate",):
            open_help(page, node)
            assert page.evaluate(NARROW, WIDTH) == [], node
            if SHOTS and not nodes_2:
                version = page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
                page.screenshot(path=f"{SHOTS}/help-{version}-{node}.png")
    finally:
        page.evaluate(setting, False)


def test_what_is_cut_is_noticed(page: Any) -> None:
    open_help(page, "WanLoRA")
    page.evaluate(
        "() => { const wide = document.createElement('table');"
        "wide.innerHTML = '<tr>' + '<td>unbreakable_words</td>'.repeat(6) + '</tr>';"
        "document.querySelector('.node-help-content').append(wide); }"
    )
    assert page.evaluate(NARROW, WIDTH) != []
