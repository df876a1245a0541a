"""What a user prefers wherever a job does not say otherwise, kept in one small file.

An argument of a job wins over a preference, a preference over the built-in value. The file is JSON
that a person can edit; one that is broken, or holds a value that is not allowed, is told in a
warning and stops nothing. Nodes, Python and the command line read the same file.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import CODECS, SPEEDS, plain_number, shown
from .errors import InvalidRequest
from .files import atomic_write, decode_text, home_folder

VARIABLE = "WANFIT_PREFERENCES"
"""Environment variable that names another file."""
FIELDS = ("speed", "vram_limit_gb", "ram_limit_gb", "preview", "codec", "journal")
_OF_A_PLAN = ("speed", "vram_limit_gb", "ram_limit_gb")
_YES_OR_NO = ("preview", "journal")
_MOST_BYTES = 64 * 1024


def preferences_path() -> Path:
    """Return the path of the user's file, in the folder that is usual for settings here."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(os.path.expanduser(named))
    home = home_folder()
    if platform.system() == "Windows":
        folder = Path(os.environ.get("APPDATA") or home / "AppData" / "Roaming")
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return folder / "wanfit" / "preferences.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """What a user prefers; None leaves a value to what is built in.

    Raises InvalidRequest for a value that is not allowed, naming the field.
    """

    speed: str | None = None
    """What a plan may change to be faster, as ``OptimizationConfig.speed``."""
    vram_limit_gb: float | None = None
    """GiB of the card that a plan may use."""
    ram_limit_gb: float | None = None
    """GiB of RAM that a plan may use."""
    preview: bool | None = None
    """Whether ComfyUI's page shows a moving preview while a clip is made."""
    codec: str | None = None
    """Codec of mp4s, as ``GenerationConfig.codec``."""
    journal: bool | None = None
    """Whether a render that says nothing of ``resume`` keeps a journal, from which it goes on after
    a crash or an interrupt. Built in: nodes and the command line keep one, Python does not."""
    path: Path | None = None
    """The file they were read from, None where there was none."""
    warnings: tuple[str, ...] = ()
    """What the file says that could not be used."""

    def __post_init__(self) -> None:
        for name in FIELDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))

    def chosen(self) -> dict[str, Any]:
        """Return what is preferred, by name; nothing for what is left to the built-in value."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    def besides(self, given: Mapping[str, Any]) -> Preferences:
        """Return what is left of the preferences beside fields of an ``OptimizationConfig``.

        A field that is None counts as not given.
        """
        named: dict[str, Any] = {n: None for n in _OF_A_PLAN if given.get(n) is not None}
        return replace(self, **named)

    def under(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields of an ``OptimizationConfig``: those given, and below them the preferred."""
        chosen = self.besides(given).chosen()
        return {**given, **{name: chosen[name] for name in _OF_A_PLAN if name in chosen}}

    def reasons(self) -> tuple[str, ...]:
        """Say in a sentence what a plan has from here; nothing where it has nothing."""
        chosen = self.chosen()
        used = [f"{name} {chosen[name]}" for name in _OF_A_PLAN if name in chosen]
        if self.codec is not None:
            used.append(f"codec {self.codec} where a job names none")
        if self.journal is not None:
            used.append(f"{'a' if self.journal else 'no'} journal where a job does not ask for one")
        if not used:
            return ()
        where = "" if self.path is None else f" ({shortened(self.path)})"
        return (f"by your preferences{where}: {', '.join(used)}",)


def read_preferences(path: Path | None = None) -> Preferences:
    """Read the user's preferences; never raises. What cannot be used is in ``warnings``."""
    path = path or preferences_path()
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        plain = json.loads(decode_text(data))
        if not isinstance(plain, dict):
            raise ValueError("it is not a JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return Preferences()
    except (OSError, ValueError, RecursionError) as err:
        return Preferences(path=path, warnings=(_unusable(path, str(err)),))
    values: dict[str, Any] = {}
    warnings = []
    for name, value in plain.items():
        if name not in FIELDS:
            text = f"{str(name)[:40]!r} is unknown; known are {', '.join(FIELDS)}"
            warnings.append(_unusable(path, text))
            continue
        try:
            values[name] = _checked(name, value)
        except InvalidRequest as err:
            warnings.append(_unusable(path, str(err).rstrip(".")))
    return Preferences(**values, path=path, warnings=tuple(warnings))


def write_preferences(preferences: Preferences, path: Path | None = None) -> Path:
    """Keep preferences for the user, and return the file; it is complete or unchanged.

    Raises OutputError where it cannot be written.
    """
    path = path or preferences_path()
    text = json.dumps(preferences.chosen(), indent=1) + "\n"
    atomic_write(path, text.encode())
    return path


def shortened(path: Path) -> str:
    """Return a path with ``~`` for the user's home folder."""
    try:
        return "~/" + path.relative_to(home_folder()).as_posix()
    except ValueError:
        return str(path)


def _unusable(path: Path, why: str) -> str:
    return f"Preferences not used: {why}, in {shortened(path)}. Mend the file, or remove it."


def _checked(name: str, value: Any) -> Any:
    """Return a value as it is kept; raises InvalidRequest for one that is not allowed."""
    if value is None:
        return None
    if name in ("speed", "codec"):
        allowed = SPEEDS if name == "speed" else CODECS
        if isinstance(value, str) and value in allowed:
            return str.__str__(value)
        raise _bad(name, value, f"one of {', '.join(allowed)}")
    if name in _YES_OR_NO:
        if isinstance(value, bool):
            return value
        raise _bad(name, value, "true or false")
    number = plain_number(value)
    if number is None or not 0 < number <= 2**20:
        raise _bad(name, value, "a number of GiB above 0")
    return number


def _bad(name: str, value: Any, allowed: str) -> InvalidRequest:
    text = f"{name} is {shown(value)}; allowed is {allowed}."
    return InvalidRequest(text, field=name)
