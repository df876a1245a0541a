"""The live plan on the nodes of a real page, in each ComfyUI that is there, in both renderers."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import single_files
from support.comfy_browser import IN_A_BROWSER, fresh_page, run_in, shows
from support.comfy_graphs import graph, with_values, workflow
from support.comfy_server import ComfyServer

PANEL = "[...document.querySelectorAll('.wanfit-plan')].map(e => e.innerText).join('\\n')"
SHOTS = os.environ.get("WANFIT_SCREENSHOTS")
"""A folder for pictures of the page, to look at."""

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer) -> Iterator[ComfyServer]:
    with comfyui.starting():
        single_files.write(comfyui.base / "models")
        comfyui.await_start()
        yield comfyui


def shoot(page: Any, server: ComfyServer, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{server.checkout.name}-{name}.png")


def load(page: Any, saved: dict[str, Any]) -> None:
    page.evaluate("async workflow => await app.loadGraphData(workflow)", saved)


def set_widget(page: Any, kind: str, name: str, value: Any) -> None:
    page.evaluate(
        """([kind, name, value]) => {
            const node = app.graph._nodes.find(n => n.comfyClass === kind);
            const widget = node.widgets.find(w => w.name === name);
            widget.value = value; widget.callback?.(value);
        }""",
        [kind, name, value],
    )


def widget(page: Any, kind: str, name: str) -> Any:
    return page.evaluate(
        "([kind, name]) => app.graph._nodes.find(n => n.comfyClass === kind)"
        ".widgets.find(w => w.name === name).value",
        [kind, name],
    )


def says(page: Any, text: str, seconds: float = 120) -> None:
    try:
        page.wait_for_function(f"t => ({PANEL}).includes(t)", arg=text, timeout=seconds * 1000)
    finally:
        assert text in page.evaluate(PANEL)  # shows what is there instead


def test_the_plan_follows_the_widgets_before_anything_runs(page: Any, server: ComfyServer) -> None:
    saved = with_values(workflow("text_to_video"))
    load(page, saved)
    before = page.evaluate("app.graph.serialize().nodes.map(n => n.widgets_values)")
    says(page, "Fits: ")
    says(page, "guidance official")
    shoot(page, server, "plan")
    set_widget(page, "WanGenerate", "width", 160)
    says(page, "160x")
    set_widget(page, "WanGenerate", "width", widget_of(saved, "width"))
    after = page.evaluate("app.graph.serialize().nodes.map(n => n.widgets_values)")
    assert after == before  # what is shown is no part of the saved workflow
    language = "language => app.extensionManager.setting.set('Comfy.Locale', language)"
    for name, told in (("zh", "可以运行：内存"), ("en", "Fits: ")):
        page.evaluate(language, name)
        says(page, told)
    assert page.wanfit_errors == []
    assert server.state()["weight_bytes"] == 0


SAMPLER_INTO_SUBGRAPH = """() => {
    const sampler = app.graph._nodes.filter(n => n.comfyClass === 'WanGenerate');
    app.graph.convertToSubgraph(new Set(sampler));
    const outer = app.graph._nodes.find(n => n.subgraph);
    const inner = outer.subgraph.nodes[0];
    const slot = inner.inputs.findIndex(input => input.name === 'width');
    outer.subgraph.addInput('width', 'INT').connect(inner.inputs[slot], inner);
    outer.widgets.find(widget => widget.name === 'width').value = 128;
}"""


def test_what_is_muted_and_a_subgraph_s_widget_count_as_they_run(page: Any) -> None:
    saved = with_values(workflow("text_to_video"))
    (optimize,) = [node for node in saved["nodes"] if node["type"] == "WanOptimize"]
    for mode, told in ((2, "No model is connected"), (4, "Fits: ")):
        load(page, with_values(saved))
        says(page, "Fits: ")
        optimize["mode"] = mode
        load(page, saved)
        says(page, told)
    assert "No model is connected" not in page.evaluate(PANEL)
    optimize["mode"] = 0
    load(page, saved)
    page.evaluate(SAMPLER_INTO_SUBGRAPH)
    says(page, "128x64")
    assert page.wanfit_errors == []


def widget_of(saved: dict[str, Any], name: str) -> Any:
    node = next(node for node in saved["nodes"] if node["type"] == "WanGenerate")
    names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    return node["widgets_values"][names.index(name)]


def test_a_clip_that_does_not_fit_has_buttons_that_make_it_fit(
    page: Any, server: ComfyServer
) -> None:
    load(page, with_values(workflow("text_to_video")))
    for name, value in (("width", 4096), ("height", 4096), ("num_frames", 2001)):
        set_widget(page, "WanGenerate", name, value)
    says(page, "Does not fit: ")
    button = page.locator(".wanfit-plan button", has_text="Make it").first
    button.wait_for()
    shoot(page, server, "does-not-fit")
    button.dispatch_event("click")
    says(page, "Fits: ")
    assert widget(page, "WanGenerate", "width") < 4096
    assert page.wanfit_errors == []


def test_swapped_experts_are_swapped_back_by_a_button(page: Any, server: ComfyServer) -> None:
    load(page, with_values(workflow("single_files")))
    set_widget(page, "WanLoader", "model", single_files.LOW)
    set_widget(page, "WanLoader", "low_noise_model", single_files.HIGH)
    says(page, "The experts are swapped")
    shoot(page, server, "swapped")
    page.locator(".wanfit-plan button", has_text="Swap").first.dispatch_event("click")
    says(page, "Fits: ")
    assert widget(page, "WanLoader", "model") == single_files.HIGH
    assert widget(page, "WanLoader", "low_noise_model") == single_files.LOW
    says(page, "switch of experts after step")
    assert page.wanfit_errors == []


def test_a_render_is_watched_on_its_node(page: Any, server: ComfyServer) -> None:
    load(page, with_values(workflow("text_to_video"), num_frames=33, steps=12))
    says(page, "Fits: ")
    page.evaluate(
        "() => { window.told = [];"
        "window.comfyAPI.api.api.addEventListener('wanfit.run', e => told.push(e.detail)); }"
    )
    before = page.evaluate("app.graph.serialize().nodes.map(n => n.widgets_values)")
    page.evaluate("() => app.queuePrompt(0)")
    page.wait_for_selector(".wanfit-run img[src^='data:image/webp']", state="attached")
    page.wait_for_function("document.querySelector('.wanfit-run').innerText.includes('so far')")
    shoot(page, server, "running")
    page.wait_for_selector(".wanfit-run[data-stage=done]", state="attached")
    told = page.evaluate("told")
    steps = [one for one in told if one["stage"].startswith("denoise")]
    assert [one["step"] for one in steps] == list(range(1, 13))
    assert {one["expert"] for one in steps} == {"high noise", "low noise"}
    assert all(one["memory"]["now_gib"] > 0.1 for one in told)
    assert steps[5]["left"] > 0 and steps[5]["step_seconds"] > 0
    page.wait_for_function("document.querySelector('.wanfit-run video').readyState >= 1")
    assert (
        abs(page.evaluate("document.querySelector('.wanfit-run video').duration") - 33 / 16) < 0.1
    )
    assert page.evaluate("document.querySelector('.wanfit-report').open") is False
    shoot(page, server, "finished")
    after = page.evaluate("app.graph.serialize().nodes.map(n => n.widgets_values)")
    assert after == before
    # Opened again, the node is as tall as without a run.
    height = "app.graph._nodes.find(n => n.comfyClass === 'WanGenerate').size[1]"
    tall = page.evaluate(height)
    load(page, page.evaluate("app.graph.serialize()"))
    says(page, "Fits: ")
    assert page.evaluate(height) < tall - 100
    assert page.wanfit_errors == []


def test_a_render_that_was_interrupted_says_so(page: Any, server: ComfyServer) -> None:
    load(page, with_values(workflow("text_to_video"), num_frames=81, steps=60, seed=77))
    says(page, "Fits: ")
    page.evaluate("() => app.queuePrompt(0)")
    page.wait_for_selector(".wanfit-run img", state="attached")
    page.evaluate("() => window.comfyAPI.api.api.interrupt()")
    page.wait_for_selector(".wanfit-run[data-stage=cut]", state="attached")
    assert "Interrupted" in page.evaluate("document.querySelector('.wanfit-run').innerText")


def test_both_renderers_show_it(page: Any, server: ComfyServer) -> None:
    known = page.evaluate("!!app.ui.settings.settingsLookup?.['Comfy.VueNodes.Enabled']")
    if not known:
        known = page.evaluate("app.extensionManager.setting.get('Comfy.VueNodes.Enabled') != null")
    if not known:
        return  # this front end has one renderer, which the tests above used
    setting = "value => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', value)"
    page.evaluate(setting, True)
    try:
        load(page, with_values(workflow("text_to_video")))
        page.wait_for_selector("[data-node-id] .wanfit-plan")
        says(page, "Fits: ")
        shoot(page, server, "nodes-2")
        set_widget(page, "WanGenerate", "width", 160)
        says(page, "160x")
        set_widget(page, "WanGenerate", "width", 64)
        run_in(page, server)
        shows(page, "document.querySelector('[data-node-id] .wanfit-run[data-stage=done] video')")
        tall = "document.querySelector('[data-node-id] .wanfit-run').getBoundingClientRect().height"
        assert page.evaluate(tall) > 60
        assert page.evaluate("told.some(one => one.preview)")
        shoot(page, server, "nodes-2-run")
        assert page.wanfit_errors == []
    finally:
        page.evaluate(setting, False)


def ask(server: ComfyServer, **inputs: Any) -> tuple[float, Any]:
    values = {"width": 64, "height": 48, "num_frames": 9, **inputs}
    nodes = {
        "1": graph(model="WanFit demo (text to video)")["1"],
        "3": {"class_type": "WanGenerate", "inputs": {"pipeline": ["1", 0], **values}},
    }
    began = time.perf_counter()
    answer = server.post("/wanfit/plan", {"node": "3", "nodes": nodes})
    return time.perf_counter() - began, answer


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    worst = ordered[int(0.95 * len(ordered))]
    return {"median_ms": 1e3 * statistics.median(ordered), "p95_ms": 1e3 * worst}


def test_answers_come_quickly_also_while_a_render_runs(server: ComfyServer) -> None:
    ask(server)  # headers are read, modules imported
    idle = []
    for number in range(40):
        seconds, answer = ask(server, num_frames=5 + 4 * (number % 5))
        assert answer["ok"], answer
        idle.append(seconds)
    model = "WanFit demo (text to video)"
    queued = server.queue(graph(model=model, num_frames=81, width=96, height=96, steps=30))
    server.wait_until(lambda: server.get("/queue")["queue_running"])
    busy = []
    while len(busy) < 60 and server.get("/queue")["queue_running"]:
        seconds, answer = ask(server, num_frames=5 + 4 * (len(busy) % 5))
        assert answer["ok"], answer
        busy.append(seconds)
        time.sleep(0.05)
    server.wait(queued)
    assert len(busy) >= 10, "the render ended before it could be asked beside it"
    found = {"idle": spread(idle), "render": spread(busy), "comfyui": server.checkout.name}
    if SHOTS:
        Path(SHOTS, f"latency-{server.checkout.name}.json").write_text(json.dumps(found))
    assert found["idle"]["median_ms"] < 50, found  # type: ignore[index]
    assert "Traceback" not in server.log()


def test_the_defaults_are_those_of_the_nodes(server: ComfyServer) -> None:
    from support.as_pack import load_pack, part

    for kind, defaults in part(load_pack(), "nodes.wired").DEFAULTS.items():
        groups = server.get(f"/object_info/{kind}")[kind]["input"]
        inputs = {**groups.get("required", {}), **groups.get("optional", {})}
        shown = {name: spec[1].get("default") for name, spec in inputs.items()}
        for name, value in defaults.items():
            free = value is None or (shown[name] is None and isinstance(value, str))
            assert shown[name] == value or free, name


def test_junk_leaves_no_traceback(server: ComfyServer) -> None:
    for body in ({}, [], {"node": "1"}, {"node": "1", "nodes": {"1": 7}}):
        assert server.post("/wanfit/plan", body)["status"] == 400
    _, answer = ask(server, width="wide")
    assert answer["status"] == 400 and "width" in answer["error"]
    assert "Traceback" not in server.log()


def watched(page: Any, server: ComfyServer) -> None:
    """Press Run before any plan was answered: the node shows what the run tells."""
    load(page, with_values(workflow("text_to_video"), num_frames=17, steps=3))
    run_in(page, server)
    shows(page, "document.querySelector('.wanfit-run[data-stage=done]')")
    told = page.evaluate("told.filter(one => one.stage.startsWith('denoise')).map(one => one.step)")
    assert told == [1, 2, 3]
    assert page.query_selector(".wanfit-plan") is None


def test_a_run_is_watched_before_the_first_plan_and_after_a_restart(
    page: Any, server: ComfyServer
) -> None:
    # A page that the server has not met.
    with fresh_page(page.context.browser, server.url) as page:
        page.route("**/wanfit/plan", lambda route: route.abort())
        watched(page, server)
        page.evaluate(
            "() => { window.again = 0; window.comfyAPI.api.api.addEventListener("
            "'reconnected', () => { window.again += 1; }) }"
        )
        server.stop()
        server.start()
        server.await_start()
        shows(page, "window.again > 0")
        watched(page, server)
