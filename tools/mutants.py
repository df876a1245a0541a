"""Every change that ``tools.mutate`` can make to a module, one at a time, in its order."""

from __future__ import annotations

import ast
import hashlib
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip
_LOG = ("_log.debug", "_log.info")
_TEXTS = (ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.Set)


@dataclass(frozen=True)
class Site:
    """A place in a syntax tree, and a change to make there."""

    operator: str
    node: ast.AST
    change: Callable[[], None]
    """Makes the change, in the tree that the site was found in."""


@dataclass(frozen=True)
class Mutant:
    """The change at the site with this number in the module."""

    module: str
    number: int
    operator: str
    line: int
    text: str
    """The line of the source."""
    before: str
    after: str
    source: str
    """The whole changed module."""
    digest: str
    """Of the module before the change: the number is one of this text only."""

    @property
    def id(self) -> str:
        """The same for the same change of the same module, in every run."""
        return f"{self.module}#{self.number}#{self.digest}"

    @property
    def key(self) -> str:
        """What it is called where reasons are given; line numbers would not last."""
        return f"{self.module}: {self.text}: {self.before} -> {self.after}"


# -------------------------------------------------------------------------------- mutants


def sites(node: ast.AST) -> Iterator[Site]:
    """Find every change in a tree, in the order of the source.

    Left out is what makes no difference to a result: annotations, decorators, documentation, the
    texts of errors and of the log, lists of names.
    """
    if _is_passive(node):
        return
    yield from _at(node)
    passive = {"annotation", "returns", "decorator_list", "type_params"}
    for field, value in ast.iter_fields(node):
        if field not in passive:
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, ast.AST):
                    yield from sites(inner)


def _is_passive(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) in ("__all__", "__slots__", "__getattr__")
    if isinstance(node, ast.Expr):  # documentation, also that below a name, and the log
        value = node.value
        is_log = isinstance(value, ast.Call) and ast.unparse(value.func) in _LOG
        return is_log or isinstance(value, ast.Constant)
    return isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert)


def _at(node: ast.AST) -> Iterator[Site]:
    """Find the changes of one node."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            yield Site("compare", node, _setter(node.ops, index, _COMPARE[type(operator)]()))
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC:
        right = node.right if isinstance(node, ast.BinOp) else node.value
        left = node.left if isinstance(node, ast.BinOp) else node.target
        if not any(map(_is_text, (left, right))):
            new = _ARITHMETIC[type(node.op)]()
            yield Site("arithmetic", node, lambda: setattr(node, "op", new))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield Site("boolean", node, lambda: setattr(node, "op", other))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        twice = ast.UnaryOp(ast.Not(), node.operand)
        yield Site("boolean", node, lambda: setattr(node, "operand", twice))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield Site("boolean", node, lambda: setattr(node, "value", not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        doubled = isinstance(node.value, float) and node.value != 0
        value = node.value * 2 if doubled else node.value + 1
        yield Site("constant", node, lambda: setattr(node, "value", value))
    elif isinstance(node, ast.Return) and node.value is not None and _is_more_than_none(node.value):
        yield Site("return None", node, lambda: setattr(node, "value", ast.Constant(None)))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield Site("drop call", node, lambda: setattr(node, "value", ast.Constant(None)))


def _setter(where: list[ast.cmpop], index: int, new: ast.cmpop) -> Callable[[], None]:
    def change() -> None:
        where[index] = new

    return change


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, _TEXTS) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _is_more_than_none(node: ast.AST) -> bool:
    return not (isinstance(node, ast.Constant) and node.value is None)


def count_of(module: str) -> int:
    """Return how many mutants a module has."""
    return sum(1 for _ in sites(ast.parse(_source(module))))


def mutant_of(module: str, number: int) -> Mutant:
    """Return a mutant of a module ("memory/machine") by its number."""
    source = _source(module)
    tree = ast.parse(source)
    site = list(sites(tree))[number]
    line, before = getattr(site.node, "lineno", 1), _in_context(site.node)
    site.change()
    return Mutant(
        module=module,
        number=number,
        operator=site.operator,
        line=line,
        text=source.splitlines()[line - 1].strip(),
        before=before,
        after=_in_context(site.node),
        source=ast.unparse(ast.fix_missing_locations(tree)),
        digest=hashlib.sha256(source.encode()).hexdigest()[:12],
    )


def mutant_like(module: str, key: str) -> Mutant | None:
    """Return the mutant with this ``key`` in a module as it is now, None where it is gone."""
    every = (mutant_of(module, number) for number in range(count_of(module)))
    return next((mutant for mutant in every if mutant.key == key), None)


def _source(module: str) -> str:
    return (ROOT / "wan_core" / f"{module}.py").read_text(encoding="utf-8")


def _in_context(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:90]


def modules_of(package: str) -> list[str]:
    """Return the modules of a package of wan_core, without its face."""
    files = sorted((ROOT / "wan_core" / package).glob("*.py"))
    return [f"{package}/{path.stem}" for path in files if path.stem != "__init__"]


def unknown_modules(modules: Sequence[str]) -> list[str]:
    """Return those that are no module of wan_core, such as "memory/machine"."""
    known = {each.relative_to(ROOT / "wan_core") for each in (ROOT / "wan_core").rglob("*.py")}
    return [module for module in modules if Path(f"{module}.py") not in known]


def lines_since(commit: str) -> dict[str, set[int]]:
    """Return the lines of each module, by its name, that are not as they were at a commit."""
    command = ["git", "diff", "--unified=0", "--no-color", "--no-ext-diff", commit]
    command += ["--", "wan_core"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    found: dict[str, set[int]] = {}
    module = ""
    for line in said.stdout.splitlines():
        if line.startswith("+++ "):
            module = line.removeprefix("+++ b/wan_core/").removesuffix(".py")
        elif line.startswith("@@ "):  # @@ -first,count +first,count @@
            first, _, count = line.split(" ")[2].partition(",")
            numbers = range(int(first), int(first) + int(count or 1))
            found.setdefault(module, set()).update(numbers)
    return found


def choose(
    modules: Sequence[str], count: int | None, seed: int, lines: dict[str, set[int]] | None = None
) -> list[Mutant]:
    """Return ``count`` mutants of these modules (None: all), the same for the same seed.

    ``lines`` are those that may be changed, by module; without it all may.
    """
    every = [
        (module, number)
        for module in modules
        for number, site in enumerate(sites(ast.parse(_source(module))))
        if lines is None or getattr(site.node, "lineno", 1) in lines.get(module, ())
    ]
    if count is not None and count < len(every):
        every = sorted(random.Random(seed).sample(every, count))
    return [mutant_of(module, number) for module, number in every]
