"""Jobs on a Ray cluster that the test starts: each made once, with the bits of one process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_models import make_folder

from wan_core.serve import Batch, BatchJob, Cluster, Outcome

ray = pytest.importorskip("ray", reason="pip install 'wanfit[cluster]': jobs on a Ray cluster")

ROOT = Path(__file__).parents[2]
CPU = {"device": "cpu", "precision": "fp32"}
SHAPE = {"num_frames": 5, "width": 32, "height": 32, "num_inference_steps": 30}


@pytest.fixture
def nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A head without room for jobs, and two machines with room for one each."""
    from ray.cluster_utils import Cluster as Nodes

    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 0})
    found.machines = [found.add_node(num_cpus=1) for _ in range(2)]
    yield found
    ray.shutdown()
    found.shutdown()


KILLED = (3, 9)
"""Lines under whose jobs a machine is lost; they take longer."""


def lines(path: Path, count: int) -> Path:
    jobs = [
        {"model": "tiny", "output": f"{i}.mp4", "prompt": f"{i}", "seed": i, **SHAPE}
        for i in range(count)
    ]
    for line in KILLED:
        jobs[line - 1]["num_inference_steps"] = 240
    path.write_text("\n".join(json.dumps(one) for one in jobs))
    return path


@pytest.mark.slow
def test_twenty_jobs_and_two_machines_that_are_lost(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "tiny", "wan2.1-t2v")
    path = lines(tmp_path / "jobs.jsonl", 20)
    serial = Batch(path, tmp_path / "serial", optimization=CPU).run()
    assert serial.counts()["done"] == 20
    told: list[str] = []
    lost: list[int] = []
    made: list[Cluster] = []
    monkeypatch.setattr("wan_core.serve.cluster._STATE_SECONDS", 0.1)

    def progress(number: int, percent: int) -> None:
        """Kill a machine while its job is at work."""
        if percent > 3 and number in KILLED and number not in lost:
            lost.append(number)
            hand = next(h for h in made[0].hands if h.job is not None and h.job.number == number)
            nodes.remove_node(node_of(hand, nodes), allow_graceful=False)
            # Here and not in a thread: what a thread of Ray's harness starts ends with it.
            nodes.add_node(num_cpus=1)

    class Watched(Cluster):
        """Asks so often how far its jobs are that none ends before it is seen at work."""

        def wait(self, seconds: float) -> list[tuple[BatchJob, Outcome]]:
            return super().wait(min(seconds, 0.05))

    def crew() -> Cluster:
        made.append(Watched(nodes.address, progress=progress, tell=told.append))
        return made[0]

    ledger = Batch(path, tmp_path / "many", optimization=CPU, crew=crew, tell=told.append).run()
    assert ledger.counts()["done"] == 20, told
    assert len(lost) == 2 and sum(one.losses for one in ledger.entries.values()) >= 2, told
    assert sum("was lost" in text for text in told) >= 2
    # Done once: a job that was lost was begun again, and no other.
    for line, entry in ledger.entries.items():
        assert sum(f"line {line}: done" in text for text in told) == 1 and entry.tries == 1
    assert all(ledger.entries[line].resumed.startswith("after step") for line in KILLED)
    for i in range(20):
        one, other = (
            (tmp_path / folder / f"{i}.mp4").read_bytes() for folder in ("serial", "many")
        )
        assert one == other, i


def node_of(hand: Any, nodes: Any) -> Any:
    """The machine on which an actor runs."""
    return next(node for node in nodes.worker_nodes if node.node_id == hand.node)


LOCAL = """
import sys
from pathlib import Path
import psutil
from wan_core.serve.cluster import _connect
ray, ours = _connect("local")
ray.get(ray.remote(lambda: 1).remote())
for one in (psutil.Process(), *psutil.Process().children(recursive=True)):
    for at in one.net_connections("inet"):
        if at.status == psutil.CONN_LISTEN:
            print(one.pid, at.laddr.ip)
sys.stdout.flush()
ray.shutdown()
"""


@pytest.mark.slow
def test_a_local_cluster_listens_on_this_machine_alone(tmp_path: Path) -> None:
    """Whoever reaches a port of Ray's runs code: the sockets of all its processes are looked at."""
    pytest.importorskip("psutil", reason="pip install psutil: it tells who listens where")
    env = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    shown = subprocess.run(
        [sys.executable, "-c", LOCAL], cwd=ROOT, env=env, check=True, capture_output=True,
        text=True, timeout=120,
    ).stdout  # fmt: skip
    found = [line.split() for line in shown.splitlines()]
    assert len({pid for pid, _ in found}) >= 4, found  # driver, store of state, node, workers
    assert {ip.removeprefix("::ffff:") for _, ip in found} == {"127.0.0.1"}, found


def test_what_travels_is_small(tmp_path: Path) -> None:
    """Ray sends what is below 100 KB with the call, and puts nothing into its store of objects."""
    job = BatchJob(
        number=1, model=tmp_path / "model", output=tmp_path / "clip.mp4",
        values={"prompt": "word " * 500, "image": "/in.png"}, optimization=CPU,
    )  # fmt: skip
    outcome = Outcome(warnings=["a warning " * 20] * 20, seed=1, prompt="word " * 500, size=1)
    assert len(pickle.dumps(job.to_dict())) < 10_000
    assert len(pickle.dumps(outcome.to_dict())) < 10_000


def test_a_machine_with_other_code_under_the_same_version_is_named_and_not_used() -> None:
    told: list[str] = []
    crew: Any = object.__new__(Cluster)
    crew._proof, crew._tell = None, told.append
    same = {"versions": {"wanfit": "0.9"}, "device": "H200"}
    used = {}
    for machine, code, version in (
        ("one", "a" * 32, "0.9"), ("two", "a" * 32, "0.9"), ("three", "b" * 32, "0.9"),
        ("archive", "", "0.9"), ("four", "b" * 32, "1.0"),
    ):  # fmt: skip
        hand: Any = SimpleNamespace(machine=machine, retired=False)
        proof = {"machine": machine, "code": code} | same | {"versions": {"wanfit": version}}
        crew._compare(hand, proof)
        used[machine] = not hand.retired
    assert used == {"one": True, "two": True, "three": False, "archive": True, "four": False}
    assert len(told) == 2 and told[0].startswith("three is not used: its WanFit 0.9 has other")
    assert "than one's" in told[0] and told[1].startswith("four is not used: its versions")


@pytest.mark.slow
def test_a_gang_is_placed_on_one_machine_as_a_whole(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one CPU cannot hold a job of two; a third of two can."""
    make_folder(tmp_path / "tiny", "wan2.1-t2v")
    told: list[str] = []
    crew = Cluster(nodes.address, devices="2", tell=told.append)
    assert crew.free(1) == [] and crew.free(1) == []
    assert [text for text in told if "No machine of the cluster has 2 CPUs" in text] == told
    assert len(told) == 1 and len(crew.hands) == 1
    machine = nodes.add_node(num_cpus=2)
    deadline = time.monotonic() + 100
    while not crew.free(1):
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    hand = crew.hands[0]
    assert hand.placement is not None and hand.node == machine.node_id
    job = BatchJob(
        number=1, model=tmp_path / "tiny", output=tmp_path / "x.mp4", optimization=CPU,
        values={"prompt": "x", **SHAPE},
    )  # fmt: skip
    missing = BatchJob(number=2, model=tmp_path / "none", output=tmp_path / "y.mp4")
    outcomes = []
    for one in (missing, job):
        crew.begin(hand, one)
        while not (ended := crew.wait(0.5)):
            pass
        outcomes.append(ended[0][1])
    # Another machine may have the file: the error names this one, and is not final.
    assert outcomes[0].kind == "MissingFile" and not outcomes[0].final
    assert outcomes[0].error.startswith(f"On {hand.machine}: ")
    assert outcomes[1].error == "" and (tmp_path / "x.mp4").is_file()
    # Nobody needs it for a while: another gang gets the machine, as it would of another size.
    monkeypatch.setattr("wan_core.serve.cluster.IDLE_SECONDS", 0.1)
    time.sleep(0.2)
    assert crew.free(0) == [] and crew.hands == []
    other = Cluster(nodes.address, devices="2")
    deadline = time.monotonic() + 100
    while not other.free(1):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert other.hands[0].node == machine.node_id
    other.close()
    assert crew.free(1) == [] and len(crew.hands) == 1  # asks for a place again
    crew.close()
    assert crew.hands == []
