"""The translations: complete, without leftovers, with the names and words that must stay.

That the English texts are those of the nodes, all of them, is looked at in a running ComfyUI
(``tests/nodes``); here, that each tooltip in the sources is among them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LOCALES = ROOT / "locales"
FILES = ("main.json", "nodeDefs.json", "commands.json", "settings.json")
LANGUAGES = ("zh", "ja", "ko", "de")
KEPT = re.compile(
    r"(?<!\w)'[^']+'(?!\w)|(?:^|(?<=\. ))[a-z0-9_]+(?=:)|\bmodels/\w+"
    r"|\b[a-z]+(?:_[a-z0-9]+)+\b|\d{2,}"
)
"""What a translation must not lose: quoted values, choices explained ("auto:"), folders, inputs."""


def read(language: str, name: str) -> Any:
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}")
    else:
        yield name, value


def lost(english: str, translated: str) -> set[str]:
    words = {word.replace("1,000", "1") for word in KEPT.findall(english)}
    return {word for word in words if word not in translated}


def test_there_are_these_languages_and_nothing_else() -> None:
    assert {path.name for path in LOCALES.iterdir()} == {"en", *LANGUAGES}
    for language in LOCALES.iterdir():
        assert {path.name for path in language.iterdir()} == set(FILES)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_language_has_every_text_and_no_other(language: str, name: str) -> None:
    english, found = dict(leaves(read("en", name))), dict(leaves(read(language, name)))
    assert found.keys() == english.keys()
    assert all(isinstance(text, str) and text.strip() == text != "" for text in found.values())
    for key, text in found.items():
        if len(english[key]) > 20:
            assert text != english[key], f"{key} is not translated"
        if not key.endswith("/name"):
            assert not lost(english[key], text), f"{key} lost {lost(english[key], text)}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_input_that_has_another_name_tells_the_one_that_errors_use(language: str) -> None:
    for node, texts in read(language, "nodeDefs.json").items():
        for name, one in texts["inputs"].items():
            assert one["name"].lower() == name or one["tooltip"].endswith(f"({name})"), node


def tooltips() -> Iterator[str]:
    """Yield the tooltips that are written out in the nodes."""
    for path in (ROOT / "nodes").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                named = [word.value for word in call.keywords if word.arg == "tooltip"]
                for value in (
                    *named,
                    *(call.args[1:2] if ast.unparse(call.func) == "_float" else ()),
                ):
                    if isinstance(value, ast.Constant):
                        yield str(value.value)


def test_a_tooltip_that_is_changed_is_missed() -> None:
    english = set(dict(leaves(read("en", "nodeDefs.json"))).values())
    found = list(tooltips())
    assert len(found) > 70
    assert [text for text in found if text not in english] == []


def test_what_must_stay_is_noticed() -> None:
    assert lost("auto: by models/vae, see 'fps' of num_frames, 832", "") == {
        "auto", "models/vae", "'fps'", "num_frames", "832"
    }  # fmt: skip


def test_the_settings_and_the_command_are_those_of_the_page() -> None:
    script = (ROOT / "web" / "wanfit_tab.js").read_text(encoding="utf-8")
    table = dict(re.findall(r'^  (\w+): \["([^"]+)",', script, re.MULTILINE))
    settings = read("en", "settings.json")
    assert {name: texts["name"] for name, texts in settings.items()} == {
        f"WanFit_{name}": title for name, title in table.items()
    }
    assert set(table.values()) < set(read("en", "main.json")["settingsCategories"])
    convert = (ROOT / "web" / "wanfit_convert.js").read_text(encoding="utf-8")
    identity, label = re.findall(r'ENTRY = \{ id: "([\w.]+)", label: "([^"]+)"', convert)[0]
    assert read("en", "commands.json") == {identity.replace(".", "_"): {"label": label}}
