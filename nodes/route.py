"""POST /wanfit/plan and /wanfit/convert: who may ask, how much, how often. No ComfyUI here.

The answers come from ``live``, one after the other on a thread of their own, so that neither the
server's loop nor a render waits for one. What takes longer than a plan has a second thread: what
would fit is searched for with many plans, a second long while a render computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from .live import Live, as_json
from .wired import MOST_BYTES, wants_fixes

MOST_WAITING = 8
"""Requests that may wait for an answer; the page asks again for what it is refused."""


def refusal(headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Return the status and the reason why a request is not read, or None.

    Only ComfyUI's own page asks: JSON, which no form of another site can send, of one origin.
    """
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "The request must be JSON (Content-Type: application/json)."
    site = headers.get("Sec-Fetch-Site", "same-origin")
    origin = headers.get("Origin")
    foreign = (
        origin is not None and urlsplit(origin).netloc.lower() != headers.get("Host", "").lower()
    )
    # Behind a proxy the host may be another one; the browser then still says where it asks from.
    if site not in ("same-origin", "none") or (foreign and "Sec-Fetch-Site" not in headers):
        return 403, "Only the page of this ComfyUI may ask."
    return None


class Route:
    """Takes requests and returns (status, JSON).

    ``live`` answers plans; ``searching`` finds what would fit: another, as each is for one thread.
    """

    def __init__(self, live: Live, searching: Live) -> None:
        self._live, self._searching = live, searching
        self._quick = ThreadPoolExecutor(1, thread_name_prefix="wanfit-plan")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="wanfit-search")
        self._waiting = 0

    async def answer(
        self,
        headers: Mapping[str, str],
        chunks: AsyncIterable[bytes],
        ask: Callable[[bytes], tuple[int, dict[str, Any]]] | None = None,
        most: int = MOST_BYTES,
    ) -> tuple[int, bytes]:
        """Answer a request whose body comes in chunks; more than ``most`` bytes are not read.

        ``ask`` answers the body, on the second thread; None asks for the live plan.
        """
        refused = refusal(headers)
        if refused is None and self._waiting >= MOST_WAITING:
            refused = 429, "Too many requests wait for an answer; ask again in a second."
        if refused is not None:
            return refused[0], _error(refused[1])
        body = bytearray()
        async for chunk in chunks:
            body += chunk
            if len(body) > most:
                return 413, _error(f"The request has more than {most} bytes.")
        self._waiting += 1
        try:
            given = bytes(body)
            quick = ask is None and not wants_fixes(given)
            live = self._live if quick else self._searching
            status, answer = await asyncio.get_running_loop().run_in_executor(
                self._quick if quick else self._slow, ask or live.answer, given
            )
        finally:
            self._waiting -= 1
        return status, as_json(answer)


def _error(text: str) -> bytes:
    return as_json({"ok": False, "error": text, "fixes": []})
