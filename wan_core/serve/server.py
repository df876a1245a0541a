"""``wanfit serve``: opens a model, listens, and ends in order.

It listens on this machine alone unless told otherwise, and then only with a token.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, MissingDependency, MissingFile, OutputError
from ..render import WanPipelineLoader
from .cluster import Cluster
from .crew import Crew
from .desk import Desk
from .fields import Served
from .http import make_app
from .jobs import placed_lora
from .processes import processes_for
from .queue import Queue

TOKEN = "WANFIT_TOKEN"
"""The environment's name of the token; a command line can be read by every user of a machine."""
_LEAST_TOKEN = 16
_END_SECONDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a server is asked for."""

    model: Path
    folder: Path
    host: str = "127.0.0.1"
    port: int = 8091
    token: str | None = None
    optimization: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    use_recipe: bool = False
    lora_folder: Path | None = None
    upload_mb: float = 64.0
    tries: int = 2
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
            f"The server needs FastAPI and uvicorn ({err}): pip install 'wanfit[serve]'."
        ) from err
    check_token(options.host, options.token)
    served = open_served(options)
    queues: list[Queue] = []
    crew = _crew(options, served, tell, queues)
    try:
        listening = _listen(options.host, options.port)
        desk = Desk(
            served, options.folder, lambda _: crew,
            most_bytes=int(options.upload_mb * 2**20), tries=options.tries,
            plan=options.cluster is None,
        )  # fmt: skip
        queues.append(desk.queue)
        app = make_app(desk, options.token, options.host)
        desk.start()
    except BaseException:
        crew.close()
        raise
    listening.listen(2048)  # from here on nobody is turned away
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=_END_SECONDS,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    tell(
        f"http://{shown}:{port}/ makes clips with {served.name}; they are kept in {options.folder}"
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        desk.stop()
        listening.close()


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
    if token is not None and (len(token) < _LEAST_TOKEN or not token.isascii()):
        raise InvalidRequest(
            f"The token has {len(token)} characters; {_LEAST_TOKEN} or more of ASCII are needed.",
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
        return os.environ.get(TOKEN) or None
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8").strip()
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
        width=usual.width,
        height=usual.height,
        num_frames=usual.num_frames,
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
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as err:
        raise OutputError(
            f"{host}:{port} cannot be listened to: {err}. Choose another port."
        ) from err
    return listening


def options_of(given: Mapping[str, Any], optimization: Mapping[str, Any]) -> ServerOptions:
    """Return the options of a command line's values; raises MissingFile for a token's file."""
    loras = given["lora_folder"]
    same = ("host", "port", "use_recipe", "upload_mb", "tries", "at_once", "cluster")
    return ServerOptions(
        model=Path(os.path.expanduser(given["model"])),
        folder=Path(os.path.expanduser(given["folder"])),
        token=read_token(given["token_file"]),
        optimization=dict(optimization),
        loras=tuple(given["lora"]),
        lora_folder=None if loras is None else Path(os.path.expanduser(loras)),
        **{name: given[name] for name in same},
    )


def crew_for(
    at_once: str | None, cluster: str | None, optimization: Mapping[str, Any],
    tell: Callable[[str], object], **told: Any,
) -> Callable[[], Crew] | None:  # fmt: skip
    """Return what makes a crew; None where neither several jobs at once nor a cluster is asked for.

    ``told`` are a crew's ``progress`` and ``stopped``.
    """
    if cluster is not None:
        devices, most = str(optimization.get("devices", "1")), at_once or "all"
        return lambda: Cluster(cluster, devices=devices, at_once=most, tell=tell, **told)
    return None if at_once is None else lambda: processes_for(at_once, optimization, **told)
