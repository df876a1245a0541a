"""Downloads against a small hub on this machine: asked first, resumed, checked, never guessed."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import make_folder

from wan_core import __main__ as cli
from wan_core.errors import (
    CorruptFile,
    DownloadError,
    InvalidRequest,
    ModelMismatch,
    OutputError,
    UnsafeFile,
)
from wan_core.loading.download import REPOSITORIES, fetch, plan_download
from wan_core.models.variants import VARIANTS

REPOSITORY = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
REVISION = "0123456789abcdef0123456789abcdef01234567"
BIG = "transformer/diffusion_pytorch_model.safetensors"
PIECE = 1024
"""Bytes huggingface_hub writes at once; 10 MB unless told otherwise."""


class Hub:
    """Serves one repository as the hub's API does; can cut connections and refuse."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.hidden: dict[str, Any] = {}
        self.cuts: dict[str, list[int]] = {}
        """Bytes after which the next answers for a file are cut off."""
        self.refused: set[str] = set()
        self.ranges_ignored = False
        self.log: list[tuple[str, str]] = []
        """(file, Range) of every file asked for."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        serve = partial(self.server.serve_forever, poll_interval=0.02)
        threading.Thread(target=serve, daemon=True).start()

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if not name.endswith((".json", ".md")):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPOSITORY, "sha": REVISION, "siblings": siblings, **self.hidden}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        if path == f"/api/models/{REPOSITORY}":
            self._send(request, 200, json.dumps(self.info()).encode())
            return
        start = f"/{REPOSITORY}/resolve/{REVISION}/"
        name = path.removeprefix(start)
        if not path.startswith(start) or name not in self.files:
            self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        asked = request.headers.get("Range", "")
        self.log.append((name, asked))
        if name in self.refused:
            self._send(request, 503, b"{}")
            return
        data, first = self.files[name], 0
        extra = {"Accept-Ranges": "bytes"}
        if asked and not self.ranges_ignored:
            first = int(asked.removeprefix("bytes=").split("-")[0])
            extra["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._send(request, 206 if first else 200, data[first:], extra, self._cut(name))

    def _cut(self, name: str) -> int | None:
        return self.cuts[name].pop(0) if self.cuts.get(name) else None

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes,
        headers: dict[str, str] | None = None, cut: int | None = None,
    ) -> None:  # fmt: skip
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Content-Type", "application/octet-stream")
        request.end_headers()
        request.wfile.write(body[:cut])
        if cut is not None:
            request.close_connection = True  # fewer bytes than promised: the line was cut

    def asked(self, name: str) -> list[str]:
        return [ranged for file, ranged in self.log if file == name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_folder(tmp_path_factory.mktemp("hub") / "5b", "wan2.2-ti2v-5b")
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    assert BIG in files
    return files | {
        "README.md": b"read me", "transformer/pytorch_model.bin": b"a pickle",
        "assets/clip.mp4": b"video",
    }  # fmt: skip


@pytest.fixture
def hub(model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", PIECE)
    made = Hub(dict(model))
    yield made
    made.server.shutdown()
    made.server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: d for n, d in files.items() if not n.endswith((".md", ".bin", ".mp4"))}


def test_sizes_first_then_the_files_and_what_they_are(hub: Hub, tmp_path: Path) -> None:
    plan = plan_download("wan2.2-ti2v-5b", tmp_path, hub.url)
    assert not list(tmp_path.iterdir())
    assert not hub.log, "nothing is fetched for the plan"
    expected = wanted(hub.files)
    assert plan.nbytes == sum(len(data) for data in expected.values())
    assert "in all" in plan.describe()
    assert BIG in plan.describe()
    assert "pytorch_model.bin" not in plan.describe()
    found = fetch(plan)
    assert found.name == "wan2.2-ti2v-5b"
    assert plan.folder == tmp_path / "Wan2.2-TI2V-5B-Diffusers"
    assert contents(plan.folder) == expected


def test_a_second_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    fetch(plan_download("wan2.2-ti2v-5b", tmp_path, hub.url))
    hub.log.clear()
    plan = plan_download("wan2.2-ti2v-5b", tmp_path, hub.url)
    assert plan.present == plan.nbytes
    fetch(plan)
    assert not hub.log


def test_a_cut_connection_goes_on_where_it_was_cut(hub: Hub, tmp_path: Path) -> None:
    half = len(hub.files[BIG]) // 2 // PIECE * PIECE
    hub.cuts[BIG] = [half, PIECE]
    fetch(plan_download("wan2.2-ti2v-5b", tmp_path, hub.url))
    assert hub.asked(BIG)[0] == ""
    starts = [int(ranged.removeprefix("bytes=").rstrip("-")) for ranged in hub.asked(BIG)[1:]]
    assert starts == [half, half + PIECE]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_restart_goes_on_with_what_was_left(hub: Hub, tmp_path: Path, ranges: bool) -> None:
    half = len(hub.files[BIG]) // 2 // PIECE * PIECE
    hub.cuts[BIG] = [half]
    plan = plan_download("wan2.2-ti2v-5b", tmp_path, hub.url)
    answer = hub.answer

    def refuse_after_the_cut(request: Any) -> None:
        answer(request)
        if hub.asked(BIG):
            hub.refused.add(BIG)

    hub.answer = refuse_after_the_cut  # type: ignore[method-assign]
    with pytest.raises(DownloadError, match=f"{BIG}.*same command again"):
        fetch(plan)
    hub.answer = answer  # type: ignore[method-assign]
    assert not plan.target(next(f for f in plan.files if f.name == BIG)).exists()
    hub.refused.clear()
    hub.log.clear()
    hub.ranges_ignored = not ranges
    again = plan_download("wan2.2-ti2v-5b", tmp_path, hub.url)
    assert 0 < again.present < again.nbytes
    fetch(again)
    assert hub.asked(BIG) == [f"bytes={half}-"]
    assert contents(again.folder) == wanted(hub.files)


def test_a_damaged_file_is_found_and_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    plan = plan_download("wan2.2-ti2v-5b", tmp_path, hub.url)
    right = hub.files[BIG]
    hub.files[BIG] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(CorruptFile, match=f"{BIG} arrived damaged"):
        fetch(plan)
    assert not any(path.name.endswith(".part") for path in plan.folder.rglob("*"))
    hub.files[BIG] = right
    fetch(plan)
    for name in (BIG, "transformer/config.json"):  # a bit that flips later, on the disk
        path = plan.folder / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    hub.log.clear()
    fetch(plan)
    assert sorted(name for name, _ in hub.log) == sorted([BIG, "transformer/config.json"])
    assert contents(plan.folder) == wanted(hub.files)


def test_another_model_than_the_name_says(hub: Hub, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "other", "wan2.1-t2v")
    hub.files = contents(folder)
    with pytest.raises(ModelMismatch, match=r"fetched as wan2\.2-ti2v-5b and holds wan2\.\d-t2v"):
        fetch(plan_download("wan2.2-ti2v-5b", tmp_path / "to", hub.url))


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.safetensors"])
def test_names_from_the_hub_stay_in_the_folder(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.files[name] = b"{}"
    with pytest.raises(UnsafeFile):
        plan_download("wan2.2-ti2v-5b", tmp_path / "to", hub.url)
    assert not (tmp_path / "to").exists()


def test_a_full_disk_is_said_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "wan_core.loading.download.shutil.disk_usage", lambda path: usage(1, 1, 1000)
    )
    with pytest.raises(OutputError, match="1000 B are free"):
        fetch(plan_download("wan2.2-ti2v-5b", tmp_path, hub.url))
    assert not hub.log


def test_what_the_hub_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="Wan2.1-T2V-14B-Diffusers could not be fetched"):
        plan_download("wan2.1-t2v-14b", tmp_path, hub.url)
    hub.files.pop("model_index.json")
    with pytest.raises(DownloadError, match=r"no model_index\.json"):
        plan_download("wan2.2-ti2v-5b", tmp_path, hub.url)


def test_a_hub_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1.*[^.]\. What has"):
        plan_download("wan2.2-ti2v-5b", tmp_path, hub.url)


@pytest.mark.parametrize(
    ("variant", "endpoint", "field"),
    [("wan3", None, "variant"), ("", None, "variant"), ("wan2.1-i2v-14b", None, "variant"),
     ("wan2.2-ti2v-5b", "file:///etc", "endpoint")],
)  # fmt: skip
def test_wrong_requests_name_the_field(
    tmp_path: Path, variant: str, endpoint: str | None, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan_download(variant, tmp_path, endpoint)
    assert caught.value.field == field


def test_an_ambiguous_name_is_answered_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="wan2.1-i2v-14b-480p, wan2.1-i2v-14b-720p. Choose"):
        plan_download("wan2.1-i2v-14b", tmp_path)


def test_every_repository_is_of_a_variant_that_can_be_run() -> None:
    supported = {name for name, variant in VARIANTS.items() if variant.supported}
    assert {name.removesuffix("-480p").removesuffix("-720p") for name in REPOSITORIES} <= supported


# The command -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_cli(hub: Hub, to: Path, *more: str) -> int:
    return cli.main(["download", "wan2.2-ti2v-5b", "--to", str(to), "--endpoint", hub.url, *more])


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_nothing_is_fetched_without_a_yes(
    hub: Hub, tmp_path: Path, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert run_cli(hub, tmp_path) == 1
    shown = capsys.readouterr()
    assert "in all" in shown.err
    assert "Nothing was fetched" in shown.err
    assert not hub.log
    assert not list(tmp_path.iterdir())


def test_nobody_to_ask_means_no(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run_cli(hub, tmp_path) == 1
    assert "Add --yes" in capsys.readouterr().err
    assert not hub.log


def test_yes_fetches_and_says_what_it_is(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert cli.main(["download", "wan2.2-ti2v-5b", "--to", str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["variant"] == "wan2.2-ti2v-5b"
    assert BIG in shown.err


def test_yes_on_the_command_line_asks_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run_cli(hub, tmp_path, "--yes") == 0
    assert "was recognised: Wan 2.2" in capsys.readouterr().out
