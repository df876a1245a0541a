"""``wanfit serve``: opens a model, listens, and ends in order.

It listens on this machine alone unless told otherwise, and then only with a token.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import TOKEN
from ..errors import InvalidRequest, MissingDependency, MissingFile, OutputError
from ..files import decode_text
from ..render import WanPipelineLoader
from .cluster import Cluster
from .crew import Crew
from .desk import Desk
from .fields import Served
from .http import make_app
from .jobs import placed_lora
from .processes import check_at_once, processes_for
from .queue import MOST_WAITING, Queue

_LEAST_TOKEN = 16
_END_SECONDS = 5
_MOST_CONNECTIONS = 1024
"""Connections of all clients together; one more is answered 503 and closed."""
HEAD_SECONDS = 20.0
"""How long a connection may take to the end of a request's head. Assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a server is asked for."""

    model: Path
    folder: Path
    host: str = "127.0.0.1"
    port: int = 8091
    token: str | None = field(default=None, repr=False)
    optimization: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    use_recipe: bool = False
    lora_folder: Path | None = None
    upload_mb: float = 64.0
    tries: int = 2
    most_waiting: int = MOST_WAITING
    folder_gb: float | None = None
    at_once: str | None = None
    cluster: str | None = None


def serve(options: ServerOptions, tell: Callable[[str], object] = print) -> None:
    """Serve until the process is asked to end (Ctrl-C, SIGTERM).

    ``tell`` is called with the address once it is listened to. Raises InvalidRequest, a
    ModelFileError, OutputError or WorkerFailed (no cluster answers) before it listens,
    MissingDependency without FastAPI or uvicorn.
    """
    try:
        import uvicorn
    except ImportError as err:
        raise MissingDependency(
            f"The server needs FastAPI and uvicorn ({err}): pip install fastapi uvicorn "
            "python-multipart (WanFit's extra [serve])."
        ) from err
    check_token(options.host, options.token)
    _check_bounds(options)
    served = open_served(options)
    queues: list[Queue] = []
    crew = _crew(options, served, tell, queues)
    try:
        listening = _listen(options.host, options.port)
        desk = Desk(
            served, options.folder, lambda _: crew,
            most_bytes=int(options.upload_mb * 2**20), tries=options.tries,
            plan=options.cluster is None, most_waiting=options.most_waiting,
            most_kept=None if options.folder_gb is None else int(options.folder_gb * 1e9),
        )  # fmt: skip
        queues.append(desk.queue)
        app = make_app(desk, options.token, options.host)
        server = uvicorn.Server(uvicorn.Config(app, **listening_as()))
        desk.start()
    except BaseException:
        crew.close()
        raise
    with _asked_to_end(server):
        try:
            listening.listen(2048)  # from here on nobody is turned away
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            tell(
                f"http://{shown}:{port}/ makes clips with {served.name}; they are kept in "
                f"{options.folder}"
            )
            server.run(sockets=[listening])
        finally:
            desk.stop()
            listening.close()


@contextlib.contextmanager
def _asked_to_end(server: Any) -> Iterator[None]:
    """Have SIGTERM, which uvicorn sends itself again when it has ended, leave time for an end.

    Without this the process would be gone before what is in work is stopped, and each orderly end
    would count as a death under that job. One that comes before uvicorn listens to signals ends
    uvicorn's ``server`` as soon as it begins. A terminal that is closed (SIGHUP) asks for the same,
    unless that is ignored, as under ``nohup``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        server.should_exit = True

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, end)}
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        before[hangup] = signal.signal(hangup, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listening_as() -> dict[str, Any]:
    """Return how uvicorn listens: what it is to say, and how many and how slow clients may be."""
    return {
        "log_level": "warning", "access_log": False, "lifespan": "off", "server_header": False,
        "timeout_graceful_shutdown": _END_SECONDS, "limit_concurrency": _MOST_CONNECTIONS,
        "http": _patient(), "ws": "none",
    }  # fmt: skip


def _patient() -> Any:
    """Return uvicorn's protocol, which hangs up on who does not get to the end of a head.

    uvicorn waits for the first byte, and for the last one of a head, without end.
    """
    import asyncio

    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def _between(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _wait(self) -> None:
            """Begin to wait for a head, or go on with it; a request in work takes its time."""
            if not self._between():
                if self._head is not None:
                    self._head.cancel()
                self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(HEAD_SECONDS, self._late)

        def _late(self) -> None:
            self._head = None
            if self._between():
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head is not None:
                self._head.cancel()
            super().connection_lost(exc)

    return Patient


def _check_bounds(options: ServerOptions) -> None:
    """Raise InvalidRequest for bounds that would let nothing in."""
    for name, value in (
        ("queue_limit", options.most_waiting), ("folder_gb", options.folder_gb),
        ("upload_mb", options.upload_mb),
    ):  # fmt: skip
        if value is not None and not 0 < value < 1e15:
            raise InvalidRequest(f"{name} is {value}; a number above 0 is needed.", field=name)
    lora_folder = options.lora_folder
    if lora_folder is not None and not lora_folder.is_dir():
        raise MissingFile(f"lora_folder {str(lora_folder)!r} is no folder; name one that is there.")
    if options.tries < 1:
        raise InvalidRequest(f"tries is {options.tries}; 1 or more are needed.", field="tries")
    # The system would take the last 16 bits of a larger one.
    if not 0 <= options.port < 2**16:
        raise InvalidRequest(
            f"port is {options.port}; 0 (any that is free) to 65535 are allowed.", field="port"
        )


def _crew(
    options: ServerOptions, served: Served, tell: Callable[[str], object], queues: list[Queue]
) -> Crew:
    """Return who carries the jobs out, for the queue that ``queues`` has when the first one begins.

    Raises InvalidRequest for numbers that do not go together, WorkerFailed for a cluster that does
    not answer.
    """
    at_once = options.at_once or (None if options.cluster else "1")
    made = crew_for(
        at_once, options.cluster, served.optimization, tell,
        progress=lambda number, percent: queues[0].progress(number, percent),
        stopped=lambda number: queues[0].stopped(number),
    )  # fmt: skip
    assert made is not None
    return made()


def check_token(host: str, token: str | None) -> None:
    """Raise InvalidRequest where others could reach the server and nothing would keep them out."""
    if token is not None and (
        len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable()
    ):
        raise InvalidRequest(
            f"The token has {len(token)} characters; {_LEAST_TOKEN} or more of ASCII "
            "are needed, on one line.",
            field="token",
        )
    if token is None and not _is_loopback(host):
        raise InvalidRequest(
            f"host is {host!r}, which others can reach: a token is needed. Put one into the "
            f"environment as {TOKEN}, or into a file and give --token-file.",
            field="host",
        )


def read_token(path: str | None) -> str | None:
    """Return the token of a file, or of the environment; None where there is neither.

    Raises MissingFile for a file that cannot be read.
    """
    if path is None:
        return os.environ.get(TOKEN, "").strip() or None
    try:
        return decode_text(Path(os.path.expanduser(path)).read_bytes()).strip()
    except (OSError, UnicodeDecodeError) as err:
        raise MissingFile(f"The token {path} cannot be read: {err}.") from err


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_served(options: ServerOptions) -> Served:
    """Open the model from its headers, and return what is known of it."""
    from ..detect import parse_lora

    loras = tuple(placed_lora(text, Path.cwd()) for text in options.loras)
    wrapper = WanPipelineLoader().load_wan_pipeline(
        options.model, optimization_config=dict(options.optimization),
        loras=[parse_lora(text) for text in loras], use_recipe=options.use_recipe,
    )  # fmt: skip
    usual = wrapper.architecture.variant.defaults
    return Served(
        name=options.model.resolve().name,
        model=options.model.resolve(),
        optimization=dict(options.optimization),
        two_experts=wrapper.architecture.two_experts,
        **usual.shape(),
        fps=usual.fps,
        use_recipe=options.use_recipe,
        loras=loras,
        lora_folder=options.lora_folder,
    )


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before a model is looked at for minutes; 0 is any that is free."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        # On Windows that name means that another program may take the port away.
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
        listening.setsockopt(socket.SOL_SOCKET, exclusive or socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as err:
        raise OutputError(
            f"{host}:{port} cannot be listened to: {err}. Choose another port."
        ) from err
    return listening


def options_of(given: Mapping[str, Any], optimization: Mapping[str, Any]) -> ServerOptions:
    """Return the options of a command line's values; raises MissingFile for a token's file."""
    loras = given["lora_folder"]
    same = ("host", "port", "use_recipe", "upload_mb", "tries", "folder_gb", "at_once", "cluster")
    return ServerOptions(
        model=Path(os.path.expanduser(given["model"])),
        folder=Path(os.path.expanduser(given["folder"])),
        token=read_token(given["token_file"]),
        optimization=dict(optimization),
        loras=tuple(given["lora"]),
        lora_folder=None if loras is None else Path(os.path.expanduser(loras)),
        most_waiting=given["queue_limit"],
        **{name: given[name] for name in same},
    )


def crew_for(
    at_once: str | None, cluster: str | None, optimization: Mapping[str, Any],
    tell: Callable[[str], object], **told: Any,
) -> Callable[[], Crew] | None:  # fmt: skip
    """Return what makes a crew; None where neither several jobs at once nor a cluster is asked for.

    ``told`` are a crew's ``progress`` and ``stopped``. Raises InvalidRequest for a wrong number
    or no address.
    """
    check_at_once(at_once)
    if cluster is not None and not cluster.strip():  # Ray would start one that others can reach
        raise InvalidRequest(
            "cluster is empty, as of a variable that is not set; auto, local or HOST:PORT is "
            "needed.",
            field="cluster",
        )
    if cluster is not None:
        devices, most = str(optimization.get("devices", "1")), at_once or "all"
        return lambda: Cluster(cluster, devices=devices, at_once=most, tell=tell, **told)
    return None if at_once is None else lambda: processes_for(at_once, optimization, **told)
