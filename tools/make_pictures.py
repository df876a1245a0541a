"""Makes the pictures of the README, the help pages and the example workflows, in a real ComfyUI.

Run from the repository's root: ``python tools/make_pictures.py``, or with the names of some
workflows for theirs alone. Needs what tests/nodes/test_comfyui.py needs: a ComfyUI checkout and a
Chromium. Model and videos are those of the demo model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.comfy_browser import find_browser, open_page  # noqa: E402
from support.comfy_server import ComfyServer, find_checkout, find_python  # noqa: E402

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.WorkflowTabsPosition": "Sidebar",
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.Notification.ShowVersionUpdates": False,
}
NODES = ("WanLoader", "WanOptimize", "WanEstimateMemory", "WanGenerate", "WanChunkedSampler")
WINDOW = (1500, 760)
CONTROLLED = (
    "video_to_video", "key_frames", "vace_inpaint", "vace_outpaint", "vace_control",
    "vace_reference", "fun_control",
)  # fmt: skip
"""Workflows that the help page of WanControl shows."""
WORKFLOWS = ("text_to_video", "long_video", *CONTROLLED)
GRAPHS = ("single_files", "animate_character", "animate_replace_character")
"""Workflows of files that do not ship along: their thumbnail is the graph itself."""
LOOK = """([scale, x, y]) => {
  app.canvas.ds.scale = scale; app.canvas.ds.offset = [x, y]; app.canvas.setDirty(true, true);
}"""
FIT = """() => {
  const nodes = app.graph._nodes, ds = app.canvas.ds;
  const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
  ds.scale = Math.min((innerWidth - 160) / (right - left), (innerHeight - 200) / (bottom - top));
  ds.offset = [70 / ds.scale - left, 70 / ds.scale - top]; app.canvas.setDirty(true, true);
}"""
EXTENT = """() => {
  const nodes = app.graph._nodes, ds = app.canvas.ds, edge = 12;
  const canvas = app.canvas.canvas.getBoundingClientRect();
  const at = nodes.map(n => [ds.convertOffsetToCanvas([n.pos[0], n.pos[1] - 30]),
    ds.convertOffsetToCanvas([n.pos[0] + n.size[0], n.pos[1] + n.size[1]])]);
  const x = Math.min(...at.map(b => b[0][0])) - edge, y = Math.min(...at.map(b => b[0][1])) - edge;
  return {x: x + canvas.x, y: y + canvas.y, width: Math.max(...at.map(b => b[1][0])) + edge - x,
    height: Math.max(...at.map(b => b[1][1])) + edge - y};
}"""
ADD_LORA = """() => {
  for (const n of app.graph._nodes) n.mode = 4;
  const loader = app.graph._nodes.find(n => n.type === "WanLoader");
  loader.mode = 0;
  const add = (type, x) => {
    const node = LiteGraph.createNode(type);
    node.pos = [loader.pos[0] + x, loader.pos[1] + 900];
    app.graph.add(node);
    return node;
  };
  const lora = add("WanLoRA", 0), shown = add("WanEstimateMemory", 700);
  lora.setSize([460, lora.size[1]]);
  loader.connect(0, lora, 0);
  lora.connect(0, shown, 0);
  app.queuePrompt(0);
}"""
BOX = """type => {
  const node = app.graph._nodes.find(n => n.type === type), ds = app.canvas.ds;
  const [x, y] = ds.convertOffsetToCanvas([node.pos[0], node.pos[1] - 30]);
  const area = app.canvas.canvas.getBoundingClientRect();
  return {x: area.x + x - 8, y: area.y + y - 8,
          width: node.size[0] * ds.scale + 16, height: (node.size[1] + 30) * ds.scale + 16};
}"""


def main() -> None:
    """Start ComfyUI, take the pictures, and say where they are."""
    checkout, browser = find_checkout(), find_browser()
    assert isinstance(checkout, Path), checkout
    assert isinstance(browser, Path), browser
    python = find_python(checkout)
    assert isinstance(python, Path), python
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(SETTINGS))
        write_lora(base / "models" / "loras")
        server = ComfyServer(base, checkout, python)
        with server, open_page(server.url, browser, WINDOW) as page:
            page.wait_for_timeout(2000)
            if not sys.argv[1:]:
                help_pictures(page)
            asked = sys.argv[1:] or (*WORKFLOWS, *GRAPHS)
            workflow_pictures(page, server, [name for name in asked if name not in GRAPHS])
            for name in GRAPHS:
                if name in asked:
                    graph_picture(page, name)


def help_pictures(page: Any) -> None:
    """Take one picture per node, the loader and the estimate with what they report."""
    load(page, "long_video")
    page.evaluate(
        "() => { for (const n of app.graph._nodes) if (n.id > 2) n.mode = 4; app.queuePrompt(0); }"
    )
    page.wait_for_function(
        "app.graph._nodes[1].widgets.some(w => w.name === 'wanfit_report')", timeout=60000
    )
    page.evaluate("() => { for (const n of app.graph._nodes) n.mode = 0; }")
    for name in ("WanLoader", "WanEstimateMemory", "WanChunkedSampler"):
        node_picture(page, name)
    load(page, "text_to_video")
    node_picture(page, "WanGenerate")
    lora_picture(page)


def lora_picture(page: Any) -> None:
    """Put a WanLoRA on the page, run it with the loader alone, and take its picture."""
    page.evaluate(ADD_LORA)
    page.wait_for_function(
        "app.graph._nodes.find(n => n.type === 'WanLoRA')"
        ".widgets.some(w => w.name === 'wanfit_report')",
        timeout=60000,
    )
    node_picture(page, "WanLoRA")


def write_lora(folder: Path) -> None:
    """Write a LoRA that fits the demo model."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = ROOT / "wan_core" / "demo_model" / "t2v" / "transformer"
    tensors = {}
    with safe_open(next(weights.glob("*.safetensors")), "pt") as file:
        for name in (key for key in file.keys() if key.endswith("to_q.weight")):  # noqa: SIM118
            outer, inner = file.get_slice(name).get_shape()
            layer = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.zeros(8, inner)
            tensors[f"{layer}.lora_B.weight"] = torch.zeros(outer, 8)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "my_style.safetensors")


def node_picture(page: Any, name: str) -> None:
    page.evaluate(
        "type => { const n = app.graph._nodes.find(n => n.type === type);"
        " app.canvas.ds.scale = 1; app.canvas.ds.offset = [80 - n.pos[0], 80 - n.pos[1]];"
        " app.canvas.setDirty(true, true); }",
        name,
    )
    page.set_viewport_size({"width": WINDOW[0], "height": 1700})  # a whole node fits in
    page.wait_for_timeout(700)
    target = ROOT / "web" / "docs" / "images" / f"{name}.png"
    page.screenshot(path=str(target), clip=page.evaluate(BOX, name))
    page.set_viewport_size({"width": WINDOW[0], "height": WINDOW[1]})


def workflow_pictures(page: Any, server: ComfyServer, names: Iterable[str]) -> None:
    """Run example workflows and take the README's and the help page's pictures, and thumbnails."""
    for name in names:
        load(page, name)
        server.free()  # so that every node runs, and reports, again
        before = set(server.get("/history"))
        page.evaluate("() => app.queuePrompt(0)")
        while not (new := set(server.get("/history")) - before):
            page.wait_for_timeout(500)
        entry = server.get("/history")[new.pop()]
        assert entry["status"]["status_str"] == "success", entry["status"]
        page.wait_for_timeout(2500)
        save_thumbnail(server, entry, ROOT / "example_workflows" / f"{name}.jpg")
        page.evaluate(LOOK, [0.84 if name == "text_to_video" else 0.66, 20, 0])
        page.wait_for_timeout(1000)
        if name == "text_to_video":
            page.screenshot(path=str(ROOT / "docs" / "workflow.png"))
            node_picture(page, "WanOptimize")
        if name in CONTROLLED:
            target = ROOT / "web" / "docs" / "images" / f"{name}.jpg"
            page.screenshot(path=str(target), type="jpeg", quality=75)


def graph_picture(page: Any, name: str) -> None:
    """Take the whole graph of a workflow as its thumbnail."""
    import io

    from PIL import Image

    # Large: from afar ComfyUI draws no words. What a node says of files that are missing is hidden.
    page.set_viewport_size({"width": 2600, "height": 1900})
    page.add_style_tag(content=".wanfit-plan { visibility: hidden }")
    load(page, name)
    page.evaluate(FIT)
    page.wait_for_timeout(1500)
    box = page.evaluate(EXTENT)
    picture = Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")
    picture.resize((640, 640 * picture.height // picture.width), Image.Resampling.LANCZOS).save(
        ROOT / "example_workflows" / f"{name}.jpg"
    )
    page.set_viewport_size({"width": WINDOW[0], "height": WINDOW[1]})
    if name == "animate_replace_character":  # which uses most of its sockets
        node_picture(page, "WanControl")


def save_thumbnail(server: ComfyServer, entry: dict[str, Any], target: Path) -> None:
    """Save an early frame of the video a run saved."""
    import av

    shown = [image for o in entry["outputs"].values() for image in o.get("images", [])]
    videos = [image for image in shown if image["filename"].endswith(".mp4")]
    saved = next((video for video in videos if target.stem in video["filename"]), videos[0])
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    frames[len(frames) // 4].resize((320, 320 * frames[0].height // frames[0].width)).save(target)


def load(page: Any, name: str) -> None:
    workflow = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text())
    page.evaluate("async ([w, n]) => await app.loadGraphData(w, true, true, n)", [workflow, name])
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")


if __name__ == "__main__":
    main()
