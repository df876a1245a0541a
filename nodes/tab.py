"""The WanFit tab: the session's renders, what can go on, what was learnt, what is preferred.

A request is a JSON object: ``do`` is one of `DO`, ``id`` names a saved render by its key, and
``values`` are preferences. No path comes from the page. Does not import ComfyUI.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..wan_core.config import CODECS, GIB, SPEEDS
from ..wan_core.errors import InvalidRequest, WanError, first_line
from ..wan_core.preferences import (
    FIELDS,
    Preferences,
    preferences_path,
    read_preferences,
    shortened,
    write_preferences,
)
from .session import Session
from .words import in_words_of_the_nodes

if TYPE_CHECKING:
    from ..wan_core.journal import SavedRender

log = logging.getLogger("wanfit")

MOST_BYTES = 16 * 1024
DO = ("show", "delete", "workflow", "forget", "prefer", "example")
EXAMPLE = Path(__file__).parents[1] / "example_workflows" / "text_to_video.json"
"""Runs at once, with the model that ships along."""


class Tab:
    """Answers the tab's requests; ``journals`` returns the folder that saved renders lie in."""

    def __init__(self, session: Session, journals: Callable[[], Path]) -> None:
        self._session, self._journals = session, journals

    def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return an HTTP status and a JSON object for a request; never raises."""
        try:
            asked = _parsed(body)
            said = self._carried_out(asked)
            return 200, {"ok": True, **said, **({} if "workflow" in said else self._shown())}
        except WanError as error:
            status = 400 if isinstance(error, InvalidRequest) else 200
            return status, {"ok": False, "error": in_words_of_the_nodes(str(error))}
        # The boundary of the route: a question must not fill the log, nor break the page.
        except Exception as error:  # noqa: BLE001
            log.info("WanFit: the tab was not answered: %s: %s", type(error).__name__, error)
            text = f"That did not work ({type(error).__name__}: {first_line(error)})."
            return 500, {"ok": False, "error": text}

    def _carried_out(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        from ..wan_core.journal import remove_saved
        from ..wan_core.memory import AttentionTimes, Calibrations

        what = asked["do"]
        if what == "delete":
            freed = remove_saved(self._journals(), asked["id"])
            return {"said": f"Deleted; {freed / GIB:.2f} GiB are free again."}
        if what == "workflow":
            return {"workflow": self._workflow(asked["id"])}
        if what == "example":
            return {"workflow": json.loads(EXAMPLE.read_text("utf-8")), "name": EXAMPLE.stem}
        if what == "forget":
            Calibrations().forget()
            AttentionTimes().forget()
            return {"said": "Forgotten. Estimates are arithmetic alone until the next runs."}
        if what == "prefer":
            # All that count from now on; what is not among them goes back to what is built in.
            write_preferences(Preferences(**asked["values"]))
        return {}

    def _workflow(self, key: str) -> Any:
        """Return the workflow that a saved render was queued with."""
        for one in self._saved():
            if one.key == key and "workflow" in one.kept:
                return json.loads(one.kept["workflow"])
        raise InvalidRequest(
            "Its workflow was not kept. Open the workflow that made it, with the same settings and "
            "seed, and press Run: it goes on by itself.",
            field="id",
        )

    def _saved(self) -> list[SavedRender]:
        from ..wan_core.journal import saved_renders

        return saved_renders(self._journals())

    def _shown(self) -> dict[str, Any]:
        from ..wan_core.memory import Calibrations

        renders, known = self._session.told(), Calibrations()
        running = any(one["state"] == "running" for one in renders)
        saved = [_told(one) for one in self._saved()]
        for one in saved[:1]:  # the one that was opened last
            one["running"] = running and one["own"]
        preferences = read_preferences()
        learnt = [(key, known.of(key)) for key in known.keys()]  # noqa: SIM118
        return {
            "renders": renders,
            "saved": saved,
            "learnt": [
                {"what": key, "runs": one.runs, "pace": one.pace if one.paced else None,
                 "extra": one.extra} for key, one in learnt
            ],
            "preferences": {name: preferences.chosen().get(name) for name in FIELDS},
            "choices": {"speed": list(SPEEDS), "codec": list(CODECS)},
            "path": shortened(preferences_path()),
            "warnings": list(preferences.warnings),
        }  # fmt: skip


def _told(one: SavedRender) -> dict[str, Any]:
    return {
        "id": one.key,
        "model": one.variant,
        "prompt": one.prompt[:300],
        "job": {**one.job, "seed": str(one.job.get("seed", ""))},
        "step": one.next_step,
        "steps": one.job.get("num_inference_steps"),
        "only_decode": one.finished,
        "gib": one.nbytes / GIB,
        "touched": one.touched,
        "own": one.own,
        "running": False,
        "workflow": "workflow" in one.kept,
    }


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("The request is not JSON.") from error
    if not isinstance(asked, dict) or asked.get("do") not in DO:
        raise InvalidRequest(f"do must be one of {', '.join(DO)}.", field="do")
    if asked["do"] in ("delete", "workflow") and not isinstance(asked.get("id"), str):
        raise InvalidRequest("id must name a saved render.", field="id")
    if asked["do"] == "prefer":
        values = asked.get("values")
        if not isinstance(values, dict) or not set(values) <= set(FIELDS):
            raise InvalidRequest(
                f"values must be an object with some of {', '.join(FIELDS)}.", field="values"
            )
    return asked
