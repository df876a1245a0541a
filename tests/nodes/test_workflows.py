"""The example workflows as graphs: their links, and their nodes beside what the nodes declare."""

from __future__ import annotations

from typing import Any

import pytest
from support.as_pack import ROOT
from support.comfy_graphs import as_api, workflow
from support.comfy_schemas import schemas

NAMES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
CHARACTERS = {
    "animate_character": {"reference": "LoadImage", "video": "GetVideoComponents"},
    "animate_replace_character": {
        "reference": "LoadImage", "video": "GetVideoComponents",
        "face_video": "GetVideoComponents", "background_video": "GetVideoComponents",
        "mask": "ImageToMask",
    },
}  # fmt: skip
WIDGETS = {"Int": int, "Float": (int, float), "String": str, "Boolean": bool, "Combo": str}


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    return schemas()


@pytest.mark.parametrize("name", NAMES)
def test_links_are_the_same_from_both_ends(name: str) -> None:
    saved = workflow(name)
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert len(nodes) == len(saved["nodes"])
    assert max(nodes) <= saved["last_node_id"]
    told = {link[0]: link for link in saved["links"]}
    assert len(told) == len(saved["links"]) and max(told) <= saved["last_link_id"]
    for number, source, out, target, into, kind in told.values():
        socket = nodes[source]["outputs"][out]
        assert number in socket["links"] and socket["type"] == kind
        assert nodes[target]["inputs"][into]["link"] == number
        assert nodes[target]["inputs"][into]["type"] == kind
    ends = [e["link"] for n in nodes.values() for e in n["inputs"] if e["link"] is not None]
    begins = [one for n in nodes.values() for e in n["outputs"] for one in e.get("links") or []]
    assert sorted(ends) == sorted(begins) == sorted(told)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_are_as_declared(name: str, declared: dict[str, Any]) -> None:
    """Widgets are stored by position: those of an older file are the first of today's."""
    for node in workflow(name)["nodes"]:
        schema = declared.get(node["type"])
        if schema is None:
            continue
        inputs = {one.id: one for one in schema.inputs}
        widgets = [one["name"] for one in node["inputs"] if "widget" in one]
        wanted = [one.id for one in schema.inputs if one.kind in WIDGETS]
        assert widgets == wanted[: len(widgets)], node["type"]
        assert len(node["widgets_values"]) == len(widgets) + ("seed" in widgets)
        values = list(node["widgets_values"])
        if "seed" in widgets:
            del values[widgets.index("seed") + 1]  # what becomes of it, a widget without an input
        for field, value in zip(widgets, values, strict=True):
            kind = inputs[field].kind
            assert isinstance(value, WIDGETS[kind]), field
            assert isinstance(value, bool) == (kind == "Boolean"), field
            if kind == "Combo" and node["type"] != "WanLoader":  # its options are files
                assert value in inputs[field].options, field
        assert {one["name"] for one in node["inputs"]} <= set(inputs)
        assert all((one.get("shape") == 7) == bool(getattr(inputs[one["name"]], "optional", False))
                   for one in node["inputs"])  # fmt: skip
        assert [one["name"] for one in node["outputs"]] == [
            one.display_name for one in schema.outputs
        ][: len(node["outputs"])]
        if name in CHARACTERS:
            assert widgets == wanted and {one["name"] for one in node["inputs"]} == set(inputs)


@pytest.mark.parametrize("name", CHARACTERS)
def test_a_character_is_wired_as_its_model_reads_it(name: str) -> None:
    prompt = as_api(workflow(name))
    by_type = {node["class_type"]: node["inputs"] for node in prompt.values()}
    control, sampler = by_type["WanControl"], by_type["WanChunkedSampler"]
    wired = {
        field: prompt[value[0]]["class_type"]
        for field, value in control.items()
        if isinstance(value, list)
    }
    assert wired == CHARACTERS[name]
    assert len({tuple(control[field]) for field in wired}) == len(wired)
    assert sampler["num_frames"] == 0 and sampler["window_overlap"] == 1
    assert sampler["fps"][0] == sampler["audio"][0]  # rate and sound of one video
    assert prompt[sampler["fps"][0]]["class_type"] == "GetVideoComponents"
