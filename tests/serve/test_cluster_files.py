"""What the pages tell people to run is taken by what they run it with, as far as that can be seen.

No Kubernetes and no cloud is here. The fields are those that KubeRay's RayJob (ray.io/v1, its types
in Go), Kubernetes' pods and SkyPilot's task files have, as published; only those in use are listed.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wan_core.__main__ import _parser

yaml = pytest.importorskip("yaml", reason="PyYAML, which diffusers' own dependencies bring along")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_CONTAINER = {"name": str, "image": str, "volumeMounts": ["MOUNT"], "resources": "RESOURCES"}
_FIELDS: dict[str, dict[str, Any]] = {
    "RAYJOB": {"apiVersion": str, "kind": str, "metadata": {"name": str}, "spec": "JOB"},
    "JOB": {"entrypoint": str, "shutdownAfterJobFinishes": bool, "rayClusterSpec": "CLUSTER"},
    "CLUSTER": {"rayVersion": str, "headGroupSpec": "HEAD", "workerGroupSpecs": ["WORKERS"]},
    "HEAD": {"rayStartParams": "PARAMS", "template": {"spec": "POD"}},
    "WORKERS": {"groupName": str, "replicas": int, "rayStartParams": "PARAMS",
                "template": {"spec": "POD"}},
    "PARAMS": {"num-cpus": str},  # all are texts
    "POD": {"containers": ["CONTAINER"], "volumes": ["VOLUME"]},
    "CONTAINER": _CONTAINER,
    "MOUNT": {"name": str, "mountPath": str},
    "VOLUME": {"name": str, "persistentVolumeClaim": {"claimName": str}},
    "RESOURCES": {"limits": {"nvidia.com/gpu": int, "cpu": int, "memory": str}},
    "TASK": {"name": str, "num_nodes": int, "resources": {"accelerators": str}, "volumes": dict,
             "workdir": str, "setup": str, "run": str},
}  # fmt: skip


def odd(value: Any, wanted: Any, where: str = "") -> list[str]:
    """Name what a file has that its schema does not, or has otherwise."""
    if isinstance(wanted, str):
        return odd(value, _FIELDS[wanted], where)
    if isinstance(wanted, list):
        if not (isinstance(value, list) and value):
            return [f"{where} is no list"]
        return [
            fault for i, one in enumerate(value) for fault in odd(one, wanted[0], f"{where}.{i}")
        ]
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return [f"{where} has no fields"]
        unknown = [f"{where}.{name} is not known" for name in value if name not in wanted]
        known = [name for name in value if name in wanted]
        return unknown + [
            fault for name in known for fault in odd(value[name], wanted[name], f"{where}.{name}")
        ]
    return [] if type(value) is wanted else [f"{where} is {value!r}"]


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command of this package in a text."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(r"\s*(?:\$ |entrypoint: )?(?:wanfit|python -m wan_core) +(.*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


def parsed(words: list[str]) -> Any:
    try:
        return _parser().parse_args(words)
    except SystemExit as err:
        raise AssertionError(f"wanfit {shlex.join(words)} is refused") from err


def test_every_command_that_a_page_shows_is_taken() -> None:
    found = [
        (page.name, words)
        for page in PAGES
        for block in blocks(page, r"[a-z]*")
        for words in commands(block)
    ]
    assert len(found) > 20 and {"cluster.md", "shell.md", "server.md"} <= {
        page for page, _ in found
    }
    for _, words in found:
        parsed(words)
    for wrong in (
        ["batch", "x", "--at-onze", "all"],
        ["batch", "x", "--tries", "two"],
        ["batches"],
    ):
        with pytest.raises(AssertionError):
            parsed(wrong)


@pytest.fixture(scope="module")
def files() -> tuple[dict[str, Any], dict[str, Any]]:
    """KubeRay's and SkyPilot's."""
    job, task = (yaml.safe_load(text) for text in blocks(ROOT / "docs" / "cluster.md", "yaml"))
    return job, task


def test_the_file_for_kuberay_has_its_fields(files: Any) -> None:
    job, _ = files
    assert odd(job, "RAYJOB") == [] and (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], workers)]
    for pod in pods:  # what is mounted is there, and the same for all
        (container,) = pod["containers"]
        assert [m["name"] for m in container["volumeMounts"]] == [v["name"] for v in pod["volumes"]]
        assert container["image"] == pods[0]["containers"][0]["image"]
        assert pod["volumes"] == pods[0]["volumes"]
    check_command(job["spec"]["entrypoint"], [m["mountPath"] for m in container["volumeMounts"]])
    # The head makes no clip; the cards are the workers', as many as the page counts with.
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "resources" not in pods[0]["containers"][0]
    cards = workers["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"{cards:,} H100s ({workers['replicas']} hosts of 8)" in page()
    least = extras()["cluster"][0].partition(">=")[2]
    assert version(cluster["rayVersion"]) >= version(least)


def test_the_file_for_skypilot_has_its_fields(files: Any) -> None:
    _, task = files
    assert odd(task, "TASK") == []
    assert re.fullmatch(r"[A-Z]\w+:\d+", task["resources"]["accelerators"])
    assert all(re.fullmatch(r"/\w+", path) for path in task["volumes"])
    wanted = re.fullmatch(r"pip install '\.\[([\w,]+)\]'", task["setup"])
    assert wanted is not None and set(wanted[1].split(",")) <= extras().keys()
    assert "~/sky_templates/ray/start_cluster" in task["run"].splitlines()[0]
    for words in commands(task["run"]):
        check_command(shlex.join(["wanfit", *words]), list(task["volumes"]))
        # Not "auto": SkyPilot may have a Ray of its own on the machine.
        assert parsed(words).cluster == "127.0.0.1:6379"
    assert len(list(commands(task["run"]))) == 1


def test_what_is_odd_is_noticed(files: Any) -> None:
    job, task = files
    assert odd(job | {"sepc": {}}, "RAYJOB") == [".sepc is not known"]
    assert odd(task | {"num_nodes": "4"}, "TASK") == [".num_nodes is '4'"]
    spec = job["spec"] | {"shutdownAfterJobFinishes": "true"}
    assert odd(job | {"spec": spec}, "RAYJOB") == [".spec.shutdownAfterJobFinishes is 'true'"]
    with pytest.raises(AssertionError):
        check_command("wanfit batch /shard/jobs.jsonl --cluster auto", ["/shared"])


def test_ray_has_the_options_that_the_page_names(files: Any) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts", reason="pip install 'wanfit[cluster]'")
    known = {option for one in scripts.start.params for option in one.opts}
    started = re.findall(r"^ray start (.*?)(?:#|$)", page(), re.M)
    asked = {word.partition("=")[0] for line in started for word in line.split()}
    job, _ = files
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        asked |= {f"--{name}" for name in group["rayStartParams"]}
    assert len(started) == 2 and asked <= known, asked - known


def check_command(text: str, mounted: list[str]) -> None:
    """The command is taken, goes to a cluster, and reads and writes what is mounted."""
    (words,) = commands(text)
    found = parsed(words)
    paths = [word for word in words if word.startswith("/")]
    assert found.cluster and len(paths) == 2
    assert all(any(path.startswith(f"{place}/") for place in mounted) for path in paths), paths


def page() -> str:
    return (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def extras() -> dict[str, list[str]]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return dict(tomllib.load(file)["project"]["optional-dependencies"])


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("."))
