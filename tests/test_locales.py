"""The translations: complete, without leftovers, with the names and words that must stay.

That the English texts are those of the nodes, all of them, is looked at in a running ComfyUI
(``tests/nodes``); here, that each tooltip in the sources is among them, and that no text of the
page stands in its scripts.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wan_core import errors

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


WEB = ROOT / "web"
FAMILIES = ("time", "server", "stage", "part", "plan", "verdict", "error", "run", "where",
            "convert", "tab", "prefer")  # fmt: skip
WHOLE = {"stage", "part", "verdict", "error", "where", "prefer"}
"""Families of which the scripts put the keys together: the server's words, the preferences."""
MADE = {f"tab.{word}" for word in ("running", "done", "failed", "interrupted", "on", "off",
        "stage", "seconds", "predicted", "measured")}  # fmt: skip
ENGLISH_BY_DESIGN = {
    "Convert to WanFit": "the command: ComfyUI translates it (commands.json)",
    "WanFit": "a name",
    "Preferences": "a category of settings: ComfyUI translates it (main.json)",
}
STRINGS = re.compile(
    r'//[^\n]*|"((?:[^"\\\n]|\\.)*)"|`((?:[^`\\$]|\\.|\$\{(?:[^{}]|\{[^{}]*\})*\}|\$)*)`'
)
STYLE = re.compile(r"[a-z-]+:\S")
PROSE = re.compile(r"[A-Za-z]{2,},? [a-z]{2,}|^[A-Z][a-z]+[.:?!]?$")
CODE = re.compile(r"^(?:Wan\w+|Reroute|Infinity|PrimitiveNode|MarkdownNote|KSampler\w*)$"
                  r"|^(?:INPUT|SELECT|Comfy\.\w+)$|^pi pi-")  # fmt: skip


def words(language: str) -> dict[str, str]:
    found: dict[str, str] = json.loads((WEB / "words" / f"{language}.json").read_text("utf-8"))
    return found


def prose(script: str) -> list[str]:
    """Return the string literals of a script that read as English, without what is filled in."""
    found = []
    for match in STRINGS.finditer(script):
        text = next((one for one in match.groups() if one is not None), "")
        text = re.sub(r"\$\{(?:[^{}]|\{[^{}]*\})*\}", "", text).strip()
        if PROSE.search(text) and not STYLE.search(text) and not CODE.search(text):
            found.append(text)
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_text_of_the_page(language: str) -> None:
    assert {path.stem for path in (WEB / "words").iterdir()} == {"en", *LANGUAGES}
    english, found = words("en"), words(language)
    assert list(found) == list(english)
    for key, text in found.items():
        assert text.strip(), key
        places = re.compile(r"\{\w+\}").findall
        assert sorted(places(text)) == sorted(places(english[key])), key
        if len(english[key]) > 20:
            assert text != english[key], f"{key} is not translated"


def test_the_texts_of_the_page_are_those_that_it_shows() -> None:
    keys = re.compile(rf'"((?:{"|".join(FAMILIES)})\.[^"]+)"')
    used = {key for path in WEB.glob("*.js") for key in keys.findall(path.read_text("utf-8"))}
    english = words("en")
    assert used <= set(english)
    made = {key for key in english if key.partition(".")[0] in WHOLE} | MADE
    assert set(english) == used | made


def test_the_words_of_the_server_and_the_settings_are_among_them() -> None:
    english = words("en")
    kinds = [key.partition(".")[2] for key in english if key.startswith("error.")]
    assert kinds and all(issubclass(getattr(errors, kind), errors.WanError) for kind in kinds)
    labels = (ROOT / "nodes" / "answer.py").read_text("utf-8")
    table = ast.literal_eval(re.search(r"_STAGES = (\{.*?\n\})", labels, re.DOTALL)[1])  # type: ignore[index]
    for name, label in table.items():
        assert english[f"stage.{label}"] == label == english[f"stage.{name.replace('_', ' ')}"]
    for name, texts in read("en", "settings.json").items():
        assert english[f"prefer.{name.removeprefix('WanFit_')}"] == texts["name"]


def test_no_text_that_a_person_reads_stands_in_a_script() -> None:
    for path in WEB.glob("*.js"):
        script = path.read_text("utf-8")
        if path.name == "wanfit_tab.js":  # what it registers as settings, translated by ComfyUI
            script = re.sub(r"const MEANS = \{.*?\n\};", "", script, flags=re.DOTALL)
        known = {*ENGLISH_BY_DESIGN, *words("en")}
        left = [text for text in prose(script) if text not in known]
        assert left == [], path.name


def test_a_text_in_a_script_is_noticed() -> None:
    script = 'line("No render yet."); make("b", "color:red", `${n} frames are left`); x("Report")'
    assert prose(script) == ["No render yet.", "frames are left", "Report"]
    assert prose('// a comment with words\nmake("div", "margin:0 2px;color:red")') == []
