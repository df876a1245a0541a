"""The server's addresses: ``/v1/videos`` as vLLM-Omni and OpenAI's clients know it, and a page.

Every request is checked here before its body is read: who asks (``Guard``), and from where. Answers
are JSON, errors ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

import hmac
import json
import re
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from ..errors import (
    DoesNotFit,
    InvalidRequest,
    MissingDependency,
    OutputError,
    WanError,
)
from .desk import Desk, OutOfOrder
from .fields import MOST_DIGITS
from .queue import QueueFull, Row
from .uploads import TooLarge, TooSlow, check_length, paced, read_form

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

_ID = re.compile(r"video_gen_[0-9a-f]{32}")
_OPEN = ("/", "/health")
"""Addresses that need no token: they tell nothing of anybody's jobs."""
_MOST_LISTED = 100
_STATUS = (
    (TooLarge, 413), (TooSlow, 408), (QueueFull, 429), (DoesNotFit, 422), (InvalidRequest, 400),
    (OutputError, 507), (OutOfOrder, 503),
)  # fmt: skip
MOST_REQUESTS = 512
"""Requests that are answered at the same time; more are told to ask again."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """Refuses who may not ask, before anything of a request but its head is read.

    With a token every address but the page and ``/health`` needs it. Without one the server listens
    on this machine alone, and asks for a Host of this machine, or for ``host``, the address it
    listens on: a page of another site that resolves its own name to 127.0.0.1 has another. What a
    browser sends from another site's page, which carries that site's Origin, is refused in both
    cases.
    """

    def __init__(self, app: Any, token: str | None, host: str = "127.0.0.1") -> None:
        self._app = app
        self._hosts = {"localhost", "127.0.0.1", "::1", host}
        self._token = None if token is None else token.encode()
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "http":
            head = {name.lower(): value for name, value in scope["headers"]}
            refused = self._refused(scope["path"], head)
            if refused is not None:
                await _answer(send, *refused)
                return
            if self._in_work >= MOST_REQUESTS:
                await _answer(send, 503, f"{MOST_REQUESTS} requests are in work already.")
                return
        self._in_work += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_work -= 1

    def _refused(self, path: str, head: Mapping[bytes, bytes]) -> tuple[int, str] | None:
        host, origin = head.get(b"host", b""), head.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != host:
            return 403, "A page of another site may not use this server."
        if self._token is None:
            name = (
                host.decode("latin-1").rpartition(":")[0]
                if b":" in host
                else host.decode("latin-1")
            )
            if name.strip("[]") not in self._hosts:
                return 403, "Without a token this server answers to localhost only."
            return None
        if path in _OPEN:
            return None
        kind, _, given = head.get(b"authorization", b"").partition(b" ")
        # In a time that does not depend on how much of it is right.
        right = hmac.compare_digest(given.strip(), self._token)
        if kind.lower() != b"bearer" or not right:
            return 401, "The token is missing or wrong: send Authorization: Bearer TOKEN."
        return None


async def _answer(send: Send, status: int, message: str) -> None:
    kind = "too_many_requests" if status == 503 else "authentication_error"
    body = json.dumps(error_body(message, kind)).encode()
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]  # fmt: skip
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": kind}}


def shown(row: Row) -> dict[str, Any]:
    """Return a job as a client sees it, with vLLM-Omni's fields."""
    outcome, done = row.outcome, row.status == "completed"
    failed = row.status == "failed"
    return {
        "id": row.id,
        "object": "video",
        "status": row.status,
        "progress": row.percent,
        "created_at": int(row.created),
        "completed_at": None if row.ended is None else int(row.ended),
        "expires_at": None,
        **row.shown,
        "quality": "default",
        "remixed_from_video_id": None,
        "media_type": "video/mp4",
        "file_name": f"{row.id}.mp4" if done else None,
        "inference_time_s": outcome.get("seconds") if done else None,
        "stage_durations": outcome.get("stages", {}) if done else {},
        "resumed": outcome.get("resumed", ""),
        "warnings": outcome.get("warnings", []),
        "tries": row.tries,
        "error": {"code": outcome["kind"], "message": outcome["error"]} if failed else None,
    }


def make_app(desk: Desk, token: str | None, host: str = "127.0.0.1") -> Any:
    """Return the ASGI application, heard on ``host``; raises MissingDependency without FastAPI."""
    try:
        from fastapi import FastAPI
    except ImportError as err:
        raise MissingDependency(
            f"The server needs FastAPI and uvicorn ({err}): pip install fastapi uvicorn "
            "python-multipart (WanFit's extra [serve])."
        ) from err
    # No pages of documentation: they would load scripts from other sites.
    app = FastAPI(title="WanFit", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app, desk)
    _add_videos(app, desk)
    _add_state(app, desk)
    return Guard(app, token, host)


def _add_errors(app: FastAPI, desk: Desk) -> None:
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    @app.exception_handler(ClientDisconnect)
    async def gone(*_: Any) -> Response:
        return JSONResponse(error_body("The client has gone.", "gone"), 400)  # nobody reads it

    @app.exception_handler(WanError)
    async def expected(_: Any, err: WanError) -> Response:
        status = next((code for kind, code in _STATUS if isinstance(err, kind)), 400)
        body = error_body(str(err), type(err).__name__, getattr(err, "field", None))
        # What is left of a body that was not read must not be taken for another request.
        headers = {"connection": "close"} if isinstance(err, TooLarge | TooSlow) else {}
        if status in (429, 503):
            headers["retry-after"] = str(desk.ask_again_after())
        return JSONResponse(body, status, headers)

    @app.exception_handler(sqlite3.Error)
    async def unreadable(_: Any, err: sqlite3.Error) -> Response:
        text = f"The queue cannot be read just now: {err}."
        return JSONResponse(error_body(text, "queue_unreadable"), 503, {"retry-after": "10"})

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, err: Any) -> Response:
        text = f"There is no {request.method} {request.url.path[:200]} here."
        return JSONResponse(error_body(text, "not_found"), err.status_code)


def _add_videos(app: FastAPI, desk: Desk) -> None:
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import FileResponse, JSONResponse

    def missing(id: str) -> Response:
        return JSONResponse(error_body(f"There is no video {id[:80]!r}.", "not_found"), 404)

    def find(id: str) -> Row | None:
        return desk.queue.get(id) if _ID.fullmatch(id) else None

    async def create(request: Request) -> Response:
        declared = check_length(request.headers.get("content-length"), desk.most_bytes)
        await run_in_threadpool(desk.check_room)
        kind = request.headers.get("content-type", "")
        with desk.coming(declared) as coming:
            body = coming.counted(paced(request.stream()))
            form = await read_form(body, kind, desk.uploads, desk.most_bytes)
            try:
                row = await run_in_threadpool(desk.accept, form)
                coming.kept = form.nbytes
            finally:
                if form.file is not None:
                    form.file.unlink(missing_ok=True)
        return JSONResponse(shown(row))

    def list_all(request: Request) -> Response:
        asked = request.query_params
        limit, order = asked.get("limit", "20"), asked.get("order", "desc")
        digits = limit.isascii() and limit.isdigit() and len(limit) <= MOST_DIGITS
        if not (digits and 1 <= int(limit) <= _MOST_LISTED):
            raise InvalidRequest(
                f"limit is {limit[:20]!r}; 1 to {_MOST_LISTED} are allowed.", field="limit"
            )
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"order is {order[:20]!r}; asc or desc is needed.", field="order")
        rows = desk.queue.list(int(limit) + 1, asked.get("after"), order == "desc")
        data = [shown(row) for row in rows[: int(limit)]]
        return JSONResponse({
            "object": "list", "data": data, "has_more": len(rows) > int(limit),
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        })  # fmt: skip

    def get(request: Request) -> Response:
        row = find(request.path_params["id"])
        return missing(request.path_params["id"]) if row is None else JSONResponse(shown(row))

    def content(request: Request) -> Response:
        row = find(request.path_params["id"])
        if row is None:
            return missing(request.path_params["id"])
        variant = request.query_params.get("variant", "video")  # OpenAI's clients have others
        if variant != "video":
            raise InvalidRequest(
                f"variant is {variant[:20]!r}; 'video' is all that there is.", field="variant"
            )
        if row.status != "completed":
            text = f"The video is {row.status.replace('_', ' ')}; there is nothing to send."
            return JSONResponse(error_body(text, "not_ready"), 409)
        if not row.output.is_file():
            return JSONResponse(error_body("The clip is gone from the server's disk.", "gone"), 410)
        return FileResponse(row.output, media_type="video/mp4", filename=f"{row.id}.mp4")

    def delete(request: Request) -> Response:
        id = request.path_params["id"]
        if not (_ID.fullmatch(id) and desk.delete(id)):
            return missing(id)
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})

    app.add_route("/v1/videos", create, ["POST"])
    app.add_route("/v1/videos", list_all, ["GET"])
    app.add_route("/v1/videos/{id}", get, ["GET"])
    app.add_route("/v1/videos/{id}", delete, ["DELETE"])
    app.add_route("/v1/videos/{id}/content", content, ["GET", "HEAD"])


def _add_state(app: FastAPI, desk: Desk) -> None:
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

    def health(_: Request) -> Response:
        well = desk.failed is None
        body = {"status": "ok" if well else "failed", "model": desk.served.name}
        if well and not desk.shelf.has_room():  # nothing that starting it again would mend
            return JSONResponse(body | {"status": "full", "error": desk.shelf.full()})
        return JSONResponse(body if well else body | {"error": desk.failed}, 200 if well else 503)

    def metrics(_: Request) -> Response:
        return PlainTextResponse(desk.metrics(), media_type="text/plain; version=0.0.4")

    def page(_: Request) -> Response:
        text, policy = desk.page()
        headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
        return HTMLResponse(text, headers=headers)

    app.add_route("/health", health, ["GET"])
    app.add_route("/metrics", metrics, ["GET"])
    app.add_route("/", page, ["GET"])
