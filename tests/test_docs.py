"""Documents name what is there: links, files, modules, functions and tests, and the glossary."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from test_architecture import FLOORS

from wan_core.models import VARIANTS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
"""Not the changelog: it may name what is gone."""
FOLDERS = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
SUFFIXES = (".py", ".md", ".txt", ".toml")
IN_RESULTS = ROOT / "benchmarks" / "results"

Missing = list[str]


def spans(text: str) -> Iterator[str]:
    """What stands in backticks, outside blocks of code."""
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def words(text: str) -> Iterator[str]:
    """The words of spans, and of blocks of code: a command names its script among other words."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.S | re.M)
    for span in (*spans(text), *blocks):
        yield from (word.strip("\"'(),;:") for word in span.split())


# The rules ---------------------------------------------------------------------------------------


def bad_links(text: str, page: Path) -> Missing:
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:", t)]
    return [target for target in local if not (page.parent / target).exists()]


def bad_paths(text: str, page: Path) -> Missing:
    """Paths from the repository's root, and names of files that stand beside the page or there."""
    found = [word for word in words(text) if "<" not in word and "output/" not in word]
    paths = [word for word in found if word.startswith(FOLDERS) and "://" not in word]
    missing = [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]
    names = [w for w in found if "/" not in w and w.endswith(SUFFIXES) and w not in SUFFIXES]
    places = (ROOT, page.parent, ROOT / "benchmarks", IN_RESULTS)
    return missing + [n for n in names if not any((place / n).exists() for place in places)]


def bad_modules(text: str, _: Path) -> Missing:
    """Dotted names below ``wan_core`` that no import finds."""
    dotted = {span for span in spans(text) if re.fullmatch(r"wan_core(\.\w+)+", span)}
    return [name for name in sorted(dotted) if not there(name)]


def bad_names(text: str, _: Path) -> Missing:
    """Identifiers with an underscore or two capitals that no file of the repository knows."""
    names = [
        part
        for span in spans(text)
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", span)
        for part in span.removesuffix("()").split(".")
        if "_" in part or re.search(r"[a-z][A-Z]", part)
    ]
    return [name for name in names if name not in known_words()]


def bad_tests(text: str, _: Path) -> Missing:
    """Tests that a page names as examples, and that no file of tests defines."""
    return [n for n in spans(text) if re.fullmatch(r"test_\w+", n) and n not in known_tests()]


def there(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute reached from one."""
    thing: object = import_module("wan_core")
    for part in name.split(".")[1:]:
        if isinstance(thing, ModuleType) and not hasattr(thing, part):
            try:
                thing = import_module(f"{thing.__name__}.{part}")
            except ModuleNotFoundError:
                return False
        elif hasattr(thing, part):
            thing = getattr(thing, part)
        else:
            return False
    return True


@cache
def sources() -> dict[Path, str]:
    folders = ("wan_core", "nodes", "tests", "benchmarks", "tools")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {path: path.read_text(encoding="utf-8") for path in paths if path != Path(__file__)}


@cache
def known_words() -> set[str]:
    return {word for text in sources().values() for word in re.findall(r"\w+", text)}


@cache
def known_tests() -> set[str]:
    return {
        node.name
        for path, text in sources().items()
        if path.name.startswith("test_")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }


RULES = (bad_links, bad_paths, bad_modules, bad_names, bad_tests)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert {rule.__name__: rule(text, page) for rule in RULES if rule(text, page)} == {}


MUTANTS = {
    "[a guide](docs/add-a-colour.md)": bad_links,
    "`wan_core/header.py`": bad_paths,
    "`tests/detect/`, `tests/nothing/`": bad_paths,
    "`python benchmarks/gpu_colour.py --quick`": bad_paths,
    "```\npython benchmarks/gpu_colour.py\n```": bad_paths,
    "`gpu_memory_h900.md`": bad_paths,
    "`wan_core.header`": bad_modules,
    "`wan_core.job.Wish`": bad_modules,
    "`wan_core.plan.ladder.Candidate.colour`": bad_modules,
    "`_colour_of_blocks`": bad_names,
    "`OptimizationPlan.colour_of`": bad_names,
    "`ColourOfBlocks`": bad_names,
    "`test_colours_are_bright`": bad_tests,
}


@pytest.mark.parametrize("text", MUTANTS)
def test_a_name_that_is_not_there_is_found(text: str) -> None:
    assert MUTANTS[text](text, ROOT / "README.md")


def test_every_word_of_the_glossary_is_in_the_code() -> None:
    """Each row: a word, its one meaning, the name it has in ``wan_core``."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| `(wan_core[^`]+)` \|$", text, flags=re.M)
    assert 10 <= len(rows) <= 24
    assert len({word for word, _ in rows}) == len(rows)
    for word, name in rows:
        assert there(name), word
        if re.fullmatch(r"([A-Z][a-z]+)+", word):
            assert name.endswith(f".{word}")


def test_the_map_has_the_floors_from_the_ground_up() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## The map")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `(\w+)` \|", table, flags=re.M)
    assert tuple(shown) == FLOORS


def test_templates_that_can_be_made_are_counted() -> None:
    text = (ROOT / "docs" / "templates.md").read_text()
    first = text.partition("## What 0 means")[0]
    rows = [line for line in first.splitlines() if line.startswith("| ")][1:]
    made = [row for row in rows if "| not yet" not in row]
    by_structure = [row for row in made if "by structure" in row]
    assert f"\n{len(made)} of the {len(rows)} can be made, two of them" in text
    assert len(by_structure) == 2
    last = first.rstrip().splitlines()[-1]
    assert all(row.split("|")[1].strip() in last for row in by_structure)


def test_what_0_means_is_what_the_models_say() -> None:
    text = (ROOT / "docs" / "templates.md").read_text().partition("## What 0 means")[2]
    told = re.findall(r"\| `([\w.-]+)`: (.*) \|", text)
    assert len(told) == 10
    for name, said in told:
        usual, two = VARIANTS[name].defaults, VARIANTS[name].experts == 2
        second = f" / {usual.guidance_scale_2:g}" if two else ""
        small = usual.flow_shift_480p
        low = "" if small is None else f" ({small:g} at 480p)"
        steps, shift = usual.num_inference_steps, usual.flow_shift
        scales = f"{usual.guidance_scale:g}{second}"
        assert said == f"{steps} steps, {scales}, shift {shift:g}{low}", name
