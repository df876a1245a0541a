"""What is wired to a node, as the page sends it: nodes in API format, bounded and checked.

A request is a JSON object: ``nodes`` maps ids to {"class_type", "inputs"} as in a prompt in API
format, ``node`` names the one that asks. An input is a plain value, or a link [id, slot] whose
value is not known before the run. Does not import ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..wan_core.errors import InvalidRequest
from .job import LATER, LONG_CLIP, OPTIMIZE, require_kind

MOST_BYTES = 256 * 1024
MOST_NODES, MOST_INPUTS = 64, 80
SAMPLERS = ("WanGenerate", "WanChunkedSampler")
SIZED = (*SAMPLERS, "WanEstimateMemory")
"""Nodes whose inputs say how large the clip is."""
_SIZE: dict[str, Any] = {"width": 832, "height": 480, "num_frames": 81}
_SAMPLING: dict[str, Any] = {
    **_SIZE, "prompt": "", "negative_prompt": "", "steps": 0, "guidance_scale": 0.0,
    "guidance_scale_2": 0.0, "flow_shift": 0.0, "scheduler": "unipc", "seed": 0, "boundary": 0.0,
    "switch_step": 0, "fps": 0.0, **LATER,
}  # fmt: skip
_WINDOWS: dict[str, Any] = {"window_frames": 81, "window_overlap": 16}
DEFAULTS: dict[str, dict[str, Any]] = {
    "WanLoader": {"use_recipe": False},
    "WanLoRA": {"expert": "both", "strength": 1.0, "use_recipe": False},
    "WanOptimize": OPTIMIZE,
    "WanEstimateMemory": {**_SIZE, "window_frames": 0, "window_overlap": 16},
    "WanGenerate": _SAMPLING,
    "WanChunkedSampler": {**_SAMPLING, **_WINDOWS, **LONG_CLIP},
}
"""What the nodes' widgets hold when nothing was set."""


@dataclass(frozen=True)
class Node:
    """One node: its widgets with defaults filled in, and the names of the inputs that are wired."""

    id: str
    kind: str
    values: Mapping[str, Any]
    wired: Mapping[str, str] = field(default_factory=dict)
    """Inputs that another node gives -> that node's id."""


@dataclass(frozen=True)
class Wired:
    """The node that asks, and what its pipeline comes from, the loader first."""

    asking: Node
    chain: tuple[Node, ...]
    beside: Node | None = None
    """For an estimate: the sampler that uses the same pipeline."""

    def of_kind(self, kind: str) -> list[Node]:
        """Return the nodes of a kind that the pipeline passes, in its order."""
        return [node for node in self.chain if node.kind == kind]


def read_wired(body: bytes) -> Wired:
    """Read a request; raises InvalidRequest for what is none, or for a graph wired half."""
    asked = _parsed(body)
    nodes = asked.get("nodes")
    if not isinstance(nodes, dict) or not 0 < len(nodes) <= MOST_NODES:
        raise InvalidRequest(f"nodes must be an object with 1 to {MOST_NODES} nodes.")
    found = {str(name): _node(str(name), node) for name, node in nodes.items()}
    asking = found.get(str(asked.get("node")))
    if asking is None:
        raise InvalidRequest("node must be the id of one of the nodes.", field="node")
    return Wired(asking, _chain(asking, found), found.get(str(asked.get("beside"))))


def sampler_after(prompt: Mapping[str, Any], node: str) -> Node | None:
    """Return the first sampler of a prompt in API format whose pipeline passes ``node``, or None.

    Samplers of which something cannot be read are left out: they say so themselves.
    """
    for name, one in prompt.items():
        if one.get("class_type") not in SAMPLERS:
            continue
        above, seen = one, set()
        while isinstance(link := above["inputs"].get("pipeline"), list) and link[0] not in seen:
            seen.add(link[0])
            above = prompt.get(str(link[0]), {"inputs": {}})
        if node in seen:
            with suppress(InvalidRequest):
                return _node(str(name), one)
    return None


def wants_fixes(body: bytes) -> bool:
    """Whether a request asks for what would fit, which takes longer than the plan itself."""
    try:
        return _parsed(body).get("fixes") is True
    except InvalidRequest:
        return False


def _parsed(body: bytes) -> dict[str, Any]:
    if len(body) > MOST_BYTES:
        raise InvalidRequest(f"The request has more than {MOST_BYTES} bytes.")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("The request is not JSON.") from error
    if not isinstance(asked, dict):
        raise InvalidRequest("The request must be a JSON object.")
    return asked


def _node(name: str, node: Any) -> Node:
    kind = node.get("class_type") if isinstance(node, dict) else None
    inputs = node.get("inputs") if isinstance(node, dict) else None
    if not isinstance(kind, str) or not isinstance(inputs, dict) or len(inputs) > MOST_INPUTS:
        raise InvalidRequest(
            f"Node {name[:40]!r} must have a class_type and at most {MOST_INPUTS} inputs."
        )
    values, wired = dict(DEFAULTS.get(kind, {})), {}
    for field_name, value in inputs.items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
            wired[field_name] = str(value[0])
        elif value is not None and not isinstance(value, list | dict):
            values[field_name] = require_kind(field_name, value, values.get(field_name))
        elif value is not None:
            raise InvalidRequest(f"{field_name} is not a plain value.", field=field_name)
    return Node(name, kind, values, wired)


def _chain(asking: Node, nodes: Mapping[str, Node]) -> tuple[Node, ...]:
    """Follow the pipeline from the asking node up to its loader."""
    chain: list[Node] = []
    node = asking
    while node.kind != "WanLoader":
        if node.kind not in DEFAULTS:
            raise InvalidRequest(
                f"The pipeline comes from {node.kind[:60]!r}, which says what it gives only when "
                "it runs."
            )
        above = node.wired.get("pipeline")
        if above is None or above not in nodes:
            raise InvalidRequest(
                "No model is connected: wire the pipeline of a Wan Loader to 'pipeline'.",
                field="pipeline",
            )
        node = nodes[above]
        if node in chain:
            raise InvalidRequest("The pipeline goes round in a circle.", field="pipeline")
        chain.append(node)
    return tuple(reversed(chain or [node]))
