"""A prompt of ComfyUI's own nodes, read: constants that are computed, nodes that only pass on.

A prompt in API format maps ids to {"class_type", "inputs"}; an input is a plain value or a link
[id, slot]. Does not import ComfyUI.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Container, Mapping
from typing import Any

from ..wan_core.errors import InvalidRequest

Link = tuple[str, int]
_PLAIN = str | int | float | bool
_PRIMITIVES = (
    "PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline",
    "PrimitiveBoolean",
    "INTConstant", "FloatConstant", "BOOLConstant",  # of KJNodes
    "easy int", "easy float", "easy string", "easy boolean",
)  # fmt: skip
"""Nodes that give the value of their only widget."""
_DEEPEST, _LONGEST = 60, 200
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floor": math.floor, "ceil": math.ceil, "round": round, "int": int, "float": float,
    "abs": abs, "min": min, "max": max,
}  # fmt: skip


class Prompt:
    """The nodes of a prompt; methods look through what only passes a value on."""

    def __init__(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        self.nodes = nodes
        # Kept: in a shared workflow the same value may be asked for along very many ways.
        self._values: dict[tuple[str, str], Any] = {}
        self._users: dict[str, list[tuple[str, str, int]]] | None = None

    def kind(self, node: str) -> str:
        """Return the class of a node, "" for one that is not there."""
        return str(self.nodes.get(node, {}).get("class_type", ""))

    def source(self, node: str, name: str) -> Link | None:
        """Return what an input comes from, through reroutes and switches; None if not linked."""
        return self._through(as_link(self.nodes[node]["inputs"].get(name)))

    def above(self, node: str, name: str, kinds: Container[str]) -> Link | None:
        """Return what an input comes from, past nodes of ``kinds`` by their inputs of that name."""
        found = self.source(node, name)
        for _ in range(_DEEPEST):
            if found is None or self.kind(found[0]) not in kinds:
                return found
            found = self.source(found[0], name)
        return None

    def _through(self, link: Link | None) -> Link | None:
        for _ in range(_DEEPEST):
            if link is None or (above := self.passed(link)) is None:
                return link
            link = above
        return link

    def passed(self, link: Link) -> Link | None:
        """Return what a node that only passes a value on takes it from; None for any other."""
        node = link[0]
        inputs = self.nodes.get(node, {}).get("inputs", {})
        if self.kind(node) in ("Reroute", "Any Switch (rgthree)"):  # the first that is wired
            return next((found for one in inputs.values() if (found := as_link(one))), None)
        if self.kind(node) == "ComfySwitchNode":
            on = self.value(node, "switch")
            return None if on is None else as_link(inputs.get("on_true" if on else "on_false"))
        return None

    def value(self, node: str, name: str, depth: int = 0) -> Any:
        """Return an input's plain value, also one that primitives and arithmetic give, or None."""
        if (node, name) not in self._values:
            self._values[node, name] = None  # a value that depends on itself is not known
            self._values[node, name] = self._value(node, name, depth)
        return self._values[node, name]

    def _value(self, node: str, name: str, depth: int) -> Any:
        given = self.nodes[node]["inputs"].get(name)
        if as_link(given) is None:
            return given if isinstance(given, _PLAIN) else None
        link = self._through(as_link(given))
        if link is None or depth > _DEEPEST:
            return None
        kind = self.kind(link[0])
        if kind in _PRIMITIVES:
            return self.value(link[0], "value", depth + 1)
        if kind == "ComfyMathExpression":
            return self._computed(link, depth + 1)
        return None

    def _computed(self, link: Link, depth: int) -> Any:
        node, slot = link
        names = {
            name.partition(".")[2]: self.value(node, name, depth)
            for name in self.nodes[node]["inputs"]
            if name.startswith("values.")
        }
        text = self.value(node, "expression", depth)
        known = all(isinstance(value, int | float) for value in names.values())
        found = arithmetic(text, names) if isinstance(text, str) and known else None
        if found is None:
            return None
        return (float(found), int(found), bool(found))[slot] if slot < 3 else None

    def users(self, node: str) -> list[tuple[str, str, int]]:
        """Return (node, input, slot) for each link that comes from a node."""
        if self._users is None:
            self._users = {}
            for other, one in self.nodes.items():
                for name, value in one["inputs"].items():
                    if (link := as_link(value)) is not None:
                        self._users.setdefault(link[0], []).append((other, name, link[1]))
        return self._users.get(node, [])


def as_link(value: Any) -> Link | None:
    """Return a link of a prompt, or None for a plain value."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
        return str(value[0]), value[1]
    return None


def arithmetic(text: str, names: Mapping[str, Any]) -> float | int | None:
    """Compute an expression of numbers, names and a few functions; None for anything else."""
    if len(text) > _LONGEST:
        return None
    try:
        found = _evaluate(ast.parse(text.strip(), mode="eval").body, names)
        return found if math.isfinite(found) else None
    except (SyntaxError, ValueError, ArithmeticError, TypeError, LookupError, RecursionError):
        return None


def _evaluate(part: ast.AST, names: Mapping[str, Any]) -> Any:
    if isinstance(part, ast.Constant) and isinstance(part.value, int | float):
        return part.value
    if isinstance(part, ast.Name) and part.id in names:
        return names[part.id]
    if isinstance(part, ast.BinOp) and type(part.op) in _OPERATORS:
        left, right = _evaluate(part.left, names), _evaluate(part.right, names)
        return _OPERATORS[type(part.op)](left, right)
    if isinstance(part, ast.UnaryOp) and type(part.op) in _OPERATORS:
        return _OPERATORS[type(part.op)](_evaluate(part.operand, names))
    if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and not part.keywords:
        return _FUNCTIONS[part.func.id](*[_evaluate(one, names) for one in part.args])
    raise ValueError(ast.dump(part)[:80])


def read_prompt(asked: Any, most: int) -> Prompt:
    """Check a prompt in API format; raises InvalidRequest for what is none."""
    if not isinstance(asked, dict) or not 0 < len(asked) <= most:
        raise InvalidRequest(f"prompt must be an object with 1 to {most} nodes.")
    nodes = {}
    for name, node in asked.items():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        kind = node.get("class_type") if isinstance(node, dict) else None
        if not isinstance(inputs, dict) or not isinstance(kind, str | None):
            raise InvalidRequest(f"Node {str(name)[:40]!r} must have a class_type and inputs.")
        # Of a node whose pack is missing the page does not know the kind: it is one like any other.
        nodes[str(name)] = {"class_type": kind or "", "inputs": inputs}
    return Prompt(nodes)
