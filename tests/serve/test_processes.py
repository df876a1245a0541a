"""Processes that carry jobs out: cards of their own, deaths, and the same clips as one process."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from support.tiny_models import make_folder

from wan_core import VideoGenerationResult
from wan_core.errors import InvalidRequest, WorkerFailed
from wan_core.memory import Card
from wan_core.models import VARIANTS
from wan_core.serve import Batch, BatchJob, Cluster, Outcome, Processes, Relay, processes_for
from wan_core.serve.carry import Carrier
from wan_core.serve.cluster import _Placed
from wan_core.serve.processes import _Process, visible
from wan_core.workers import close_workers

CPU = {"device": "cpu", "precision": "fp32"}


@pytest.mark.parametrize(("strips", "trial", "free"), [(1, 0, True), (2, 0, False), (1, 2, False)])
def test_other_cards_are_free_in_a_decode_unless_they_decode_too_or_try_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, strips: int, trial: int, free: bool
) -> None:
    plan, told = SimpleNamespace(decode_strips=strips, decode_trial=trial), list[bool]()

    def generate(config: Any) -> VideoGenerationResult:
        config.decode_callback(1, 5)
        return VideoGenerationResult(success=True)

    model = SimpleNamespace(variant=VARIANTS["wan2.2-t2v-a14b"])
    wrapper = SimpleNamespace(
        plan=lambda config: (None, plan), generate=generate, architecture=model
    )
    monkeypatch.setattr(Carrier, "open", lambda self, job: wrapper)
    job = BatchJob(number=1, model=tmp_path, output=tmp_path / "a.mp4", values={"prompt": "a"})
    Carrier().carry_out(job, decoding=lambda: told.append(True))
    assert told == [True] * free


def test_a_process_sees_cards_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible([], {"CUDA_VISIBLE_DEVICES": "3"}) == {}
    assert visible([1, 2], {}) == {"CUDA_VISIBLE_DEVICES": "1,2"}
    # Counted among those that this process is shown.
    assert visible([1], {"CUDA_VISIBLE_DEVICES": "4, GPU-7"}) == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    assert visible([0], {"HIP_VISIBLE_DEVICES": "2"}) == {"HIP_VISIBLE_DEVICES": "2"}
    cards = tuple(Card(f"cuda:{i}", "H100", 8, 8) for i in range(4))
    monkeypatch.setattr("wan_core.memory.all_cards", lambda: cards)
    seen = [hand._seen for hand in processes_for("all", {"devices": "2"}).hands]
    assert seen == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert processes_for("all", {}).hands[3]._place == {"device": None, "devices": "1"}
    # One job has the host as it is; without cards all share the CPU.
    assert [hand._seen for hand in processes_for("1", {"devices": "auto"}).hands] == [{}]
    assert [hand._seen for hand in processes_for("2", {"device": "cpu"}).hands] == [{}, {}]


@pytest.mark.parametrize(("at_once", "devices", "why"), [
    ("5", "1", "need 5 cards; there are 4"), ("3", "2", "need 6 cards; there are 4"),
    ("0", "1", "at_once is '0'"), ("many", "1", "or all"), ("2", "auto", "devices is 'auto'"),
])  # fmt: skip
def test_numbers_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, at_once: str, devices: str, why: str
) -> None:
    cards = tuple(Card(f"cuda:{i}", "H100", 8, 8) for i in range(4))
    monkeypatch.setattr("wan_core.memory.all_cards", lambda: cards)
    with pytest.raises(InvalidRequest, match=why):
        processes_for(at_once, {"devices": devices})


def test_a_job_travels_as_json(tmp_path: Path) -> None:
    job = BatchJob(
        number=3, model=tmp_path / "m", output=tmp_path / "o.mp4", values={"prompt": "ü"},
        control={"video": "v.mp4"}, loras=("a:both:1.0",), use_recipe=True, priority=2.0,
        optimization={"speed": "fast"},
    )  # fmt: skip
    assert BatchJob.from_dict(json.loads(json.dumps(job.to_dict()))) == job


def hanging(tmp_path: Path) -> BatchJob:
    return BatchJob(number=1, model=tmp_path / "m", output=tmp_path / "x.mp4")


def test_a_job_longer_than_a_pipe_does_not_wait_for_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of a batch may have a mebibyte, and a process that hangs reads none of it."""
    monkeypatch.setattr("wan_core.serve.processes._START", "import time; time.sleep(600)")
    crew = Processes(1, stopped=lambda number: True)
    values = {"prompt": "x" * 2**20}
    job = BatchJob(number=1, model=tmp_path, output=tmp_path / "x.mp4", values=values)
    begun = threading.Thread(target=crew.begin, args=(crew.hands[0], job), daemon=True)
    begun.start()
    begun.join(60)
    stuck = begun.is_alive()
    crew.hands[0].kill()
    assert not stuck and lost_job(crew).lost
    crew.close()


def test_processes_take_turns_at_the_same_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next job begins when one is decoded, on all cards but that one, which joins later."""
    cards = tuple(Card(f"cuda:{i}", "H100", 8, 8) for i in range(4))
    monkeypatch.setattr("wan_core.memory.all_cards", lambda: cards)
    sent: list[tuple[str, Any]] = []
    monkeypatch.setattr(_Process, "send", lambda self, line: sent.append((self.home, line)))
    crew = processes_for("overlap", {"devices": "3"})
    assert isinstance(crew, Relay)
    first, second = crew.hands
    for index, hand in enumerate((first, second)):
        assert hand._place == {"device": f"cuda:{index}", "devices": "all"}
        assert hand._seen == {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    one, two, three = (
        BatchJob(number=n, model=tmp_path, output=tmp_path / f"{n}.mp4") for n in (1, 2, 3)
    )
    done = {"outcome": Outcome().to_dict()}

    def told(hand: _Process, line: Any) -> list[tuple[BatchJob, Outcome]]:
        sent.clear()
        return crew._heard(hand, line)

    assert crew.free(3) == [first]
    crew.begin(first, one)
    # The other process starts while the first one computes, and has no job yet.
    assert sent == [("cuda:0", {"job": one.to_dict(), "held": []}), ("cuda:1", {})]
    assert crew.free(2) == () and told(first, {"number": 1, "percent": 95}) == []
    assert crew.free(2) == () and told(first, {"number": 1, "decoding": True}) == []
    assert crew.free(2) == [second]
    crew.begin(second, two)
    assert sent[0] == ("cuda:1", {"job": two.to_dict(), "held": ["cuda:0"]})
    assert crew.free(1) == ()
    assert [job for job, _ in told(first, done | {"number": 1})] == [one]
    assert sent == [("cuda:1", {"joined": "cuda:0"})] and crew.free(1) == ()
    told(second, {"number": 2, "decoding": True})
    assert crew.free(1) == [first]
    crew.begin(first, three)
    told(first, {"number": 3, "decoding": True})
    assert not crew.free(0), "both decode: nobody is free to begin a third"
    # One that dies while it decodes: its card is free, its job goes on elsewhere.
    ((job, outcome),) = told(second, None)
    assert job is two and outcome.lost and sent == [("cuda:0", {"joined": "cuda:1"})]
    assert crew.free(1) == [second]
    told(first, done | {"number": 3})
    # No job is left: neither is started for nothing, and both give their cards back.
    assert crew.free(1) == [first]
    crew.begin(first, three)
    assert [where for where, _ in sent] == ["cuda:0"]
    told(first, done | {"number": 3})
    monkeypatch.setattr(_Process, "pid", 7)
    assert crew.free(0) == [first]
    monkeypatch.setattr("wan_core.serve.processes.IDLE_SECONDS", -1.0)
    crew.free(0)
    assert [hand.home for hand in crew.hands] == ["cuda:0", "cuda:1"]
    assert not {first, second} & set(crew.hands)


@pytest.mark.parametrize(("devices", "why"), [("1", "two cards or more"), ("auto", "auto")])
def test_turns_need_two_cards(devices: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        processes_for("overlap", {"devices": devices, "device": "cpu"})


def lost_job(crew: Processes | Cluster) -> Outcome:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for job, outcome in crew.wait(0.02):
            assert job.number == 1
            return outcome
    raise AssertionError("the hand is still blocked")


def test_a_process_that_hangs_under_an_unwanted_job_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_core.serve.processes._START", "import time; time.sleep(600)")
    unwanted: set[int] = set()
    crew = Processes(1, stopped=lambda number: number in unwanted)
    crew.begin(crew.hands[0], hanging(tmp_path))
    unwanted.add(1)
    # It has some time to stop of itself.
    assert crew.wait(0.01) == crew.wait(0.01) == [] and crew.hands[0].job is not None
    monkeypatch.setattr("wan_core.serve.crew.STOP_SECONDS", 0.01)
    assert lost_job(crew).lost and crew.free(1) == crew.hands
    crew.close()


def settled(crew: Processes, seconds: float = 60.0) -> Outcome:
    """Wait for the job in work; its number is 1."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for job, outcome in crew.wait(0.05):
            assert job.number == 1
            return outcome
    raise AssertionError("no outcome")


ANSWERS = """
import json, os, sys
for line in sys.stdin:
    told = {"token": os.environ.get("WANFIT_TOKEN"), "here": os.environ.get("WANFIT_HERE")}
    number = json.loads(line)["job"]["number"]
    print(json.dumps({"number": number, "outcome": {"prompt": json.dumps(told)}}), flush=True)
"""


def test_processes_that_nobody_needs_end_and_the_next_job_starts_one_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while another one works. No job is given to one that leaves; none sees the token."""
    monkeypatch.setattr("wan_core.serve.processes._START", ANSWERS)
    monkeypatch.setenv("WANFIT_TOKEN", "a server's secret")
    monkeypatch.setenv("WANFIT_HERE", "yes")
    crew = Processes(2)
    first, second = crew.hands
    for _ in range(2):
        hand = crew.free(1)[0]
        crew.begin(hand, hanging(tmp_path))
        assert json.loads(settled(crew).prompt) == {"token": None, "here": "yes"}
    assert first.pid is not None and second.pid is None and crew.free(0) == [first, second]
    second.job = hanging(tmp_path)  # as if it worked
    monkeypatch.setattr("wan_core.serve.processes.IDLE_SECONDS", -1.0)
    assert crew.free(1) == [first]  # it is about to get the job
    assert crew.free(0) != [first] and crew.hands[1] is second
    crew.begin(crew.hands[0], hanging(tmp_path))
    assert not settled(crew).lost and crew.hands[0].pid is not None
    deadline = time.monotonic() + 60
    while first.pid is not None:
        assert not crew.wait(0.05) and time.monotonic() < deadline
    second.job = None
    crew.close()


def test_a_process_that_cannot_be_started_costs_its_job_a_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no memory is left for it; another time there may be."""
    monkeypatch.setattr("wan_core.serve.processes._START", ANSWERS)
    crew = Processes(1)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(tmp_path / "nowhere"))
        crew.begin(crew.free(1)[0], hanging(tmp_path))
        outcome = settled(crew)
    assert outcome.lost and "cannot be started" in outcome.error
    crew.begin(crew.free(1)[0], hanging(tmp_path))
    assert not settled(crew).error
    crew.close()


def test_a_process_that_does_not_leave_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "wan_core.serve.processes._START",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
    )
    crew = Processes(1)
    stuck = crew.hands[0]
    stuck.send({"job": hanging(tmp_path).to_dict()})
    monkeypatch.setattr("wan_core.serve.processes.IDLE_SECONDS", -1.0)
    monkeypatch.setattr("wan_core.serve.processes._END_SECONDS", 0.05)
    deadline = time.monotonic() + 60
    while stuck.pid is not None:
        crew.free(0)
        assert not crew.wait(0.05) and time.monotonic() < deadline
    crew.close()


class FakeRay:
    """Ray as a cluster sees it: the one actor answers nothing, until it is killed."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self) -> None:
        self.killed: list[Any] = []
        self.sent: list[int] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def wait(self, refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return (refs, []) if self.killed and refs == ["result"] else ([], refs)

    def get(self, ref: Any) -> Any:
        raise self.exceptions.RayError

    def kill(self, actor: Any, no_restart: bool) -> None:
        self.killed.append(actor)


def test_an_actor_that_hangs_under_an_unwanted_job_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, actor, unwanted = FakeRay(), MagicMock(), set[int]()
    actor.carry_out.remote.return_value = "result"
    monkeypatch.setattr("wan_core.serve.cluster._connect", lambda _: (ray, False))
    crew = Cluster("x", stopped=lambda number: number in unwanted)
    crew.hands.append(_Placed("actor 1", actor, None))
    crew.begin(crew.hands[0], hanging(tmp_path))
    assert crew.wait(0) == []  # asked how far it is, which it never answers
    unwanted.add(1)
    assert crew.wait(0) == crew.wait(0) == [] and not ray.killed
    assert [call.args for call in actor.state.remote.call_args_list] == [(-1,), (1,)]
    monkeypatch.setattr("wan_core.serve.crew.STOP_SECONDS", -1.0)
    assert crew.wait(0) == [] and ray.killed == [actor]
    assert lost_job(crew).lost and crew.hands == []


def test_hands_that_nobody_needs_give_their_cards_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setattr("wan_core.serve.cluster._connect", lambda _: (ray, False))
    crew = Cluster("x")
    working, idle, waits = (_Placed(f"actor {i}", MagicMock(), None) for i in range(3))
    working.starting = idle.starting = None
    working.job = MagicMock()
    crew.hands += [working, idle, waits]
    assert idle in crew.free(0) and not ray.killed
    monkeypatch.setattr("wan_core.serve.cluster.IDLE_SECONDS", -1.0)
    assert idle in crew.free(1) and not ray.killed  # it is about to get the job
    # One that Ray has not placed would take the cards as soon as they are free.
    assert crew.free(0) == [] and ray.killed == [idle.actor, waits.actor]
    assert crew.hands == [working]


def test_a_machine_that_lacks_something_does_not_take_the_jobs_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It fails at once, and would fail all of them while the others work."""
    ray, told = FakeRay(), list[str]()
    ray.cluster_resources = lambda: {"CPU": 3.0}  # type: ignore[method-assign]
    ray.get = lambda ref: ref  # type: ignore[method-assign]
    monkeypatch.setattr("wan_core.serve.cluster._connect", lambda _: (ray, False))
    crew = Cluster("x", tell=told.append)
    bad, beside, good = (_Placed(f"actor {i}", MagicMock(), None) for i in range(3))
    for hand, node in ((bad, "a"), (beside, "a"), (good, "b")):
        hand.starting, hand.node, hand.machine = None, node, f"machine {node}"
    crew.hands += [bad, beside, good]

    def ends(hand: _Placed, outcome: Outcome) -> Outcome:
        hand.job, hand.result = MagicMock(), outcome.to_dict()
        return crew._ended(hand)[1]

    lacks = Outcome(error="no such file", kind="MissingFile", final=True)
    monkeypatch.setattr(crew, "_add", lambda: None)
    for seconds in (60, 120):
        if seconds > 60:  # the time passes
            crew._rests["a"] = (0.0, 60.0)
            assert crew.free(9) == [bad, beside, good]
        outcome = ends(bad, lacks)
        assert not outcome.final and outcome.error == "On machine a: no such file"
        assert crew.free(9) == [good] and f"machine a gets no job for {seconds} s" in told[-1]
        # A job that its other hand had meanwhile fails for the same reason: no further rest.
        said, rest = len(told), crew._rests["a"]
        ends(beside, lacks)
        assert crew._rests["a"] == rest and len(told) == said
    # Where no other is left it is asked: a job that can be made nowhere must come to its end.
    said = len(told)
    ends(good, lacks)
    assert crew.free(9) == [good] and len(told) == said
    # What it could make shows that it has all again.
    ends(beside, Outcome())
    assert crew.free(9) == [bad, beside, good]
    # Those that came in their place, and they themselves, are not more than were asked for.
    crew._at_once, good.job = "2", MagicMock()
    assert crew.free(9) == [bad]


def test_a_local_cluster_that_others_could_reach_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = MagicMock()
    ray.is_initialized.return_value = False
    ray.util.get_node_ip_address.return_value = "192.168.0.7"
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(WorkerFailed, match=r"would listen on 192\.168\.0\.7"):
        Cluster("local")
    assert not ray.init.called and "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


def test_an_address_that_nobody_listens_at_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray would ask for minutes."""
    ray = MagicMock()
    ray.is_initialized.return_value = False
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        Cluster(f"127.0.0.1:{port}")
    assert ray.init.call_count == 1
    with pytest.raises(WorkerFailed, match=f"answers at '127.0.0.1:{port}' .*refused"):
        Cluster(f"127.0.0.1:{port}")
    assert ray.init.call_count == 1


def test_a_local_cluster_does_not_see_the_token_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray, seen = MagicMock(), list[bool]()
    ray.is_initialized.return_value = False
    ray.util.get_node_ip_address.return_value = "127.0.0.1"
    ray.cluster_resources.return_value = {"CPU": 1.0}
    ray.init.side_effect = lambda **_: seen.append("WANFIT_TOKEN" in os.environ)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("WANFIT_TOKEN", "a server's secret")
    Cluster("local").close()
    assert seen == [False] and os.environ["WANFIT_TOKEN"] == "a server's secret"


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_make_the_clips_of_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", "wan2.1-t2v")
    shape = {"num_frames": 5, "width": 32, "height": 32, "num_inference_steps": 24}
    jobs = [
        {"model": "one", "output": f"{i}.mp4", "prompt": f"{i}", "seed": i, **shape}
        for i in range(4)
    ]
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in jobs))
    serial = Batch(path, tmp_path / "serial", optimization=CPU).run()
    killed: list[int] = []
    made: list[Processes] = []

    def crew() -> Processes:
        def progress(number: int, percent: int) -> None:
            hand = made[0].hands[0]
            mine = hand.pid is not None and hand.job is not None and hand.job.number == number
            if mine and not killed and percent > 20:
                killed.append(number)
                os.kill(hand.pid or 0, signal.SIGKILL)

        made.append(Processes(2, progress=progress))
        return made[0]

    told: list[str] = []
    ledger = Batch(path, tmp_path / "two", optimization=CPU, crew=crew, tell=told.append).run()
    assert ledger.counts()["done"] == serial.counts()["done"] == 4, told
    assert killed and sum(entry.losses for entry in ledger.entries.values()) == 1
    assert sum(entry.resumed.startswith("after step") for entry in ledger.entries.values()) == 1
    assert all(entry.tries == 1 for entry in ledger.entries.values())
    for i in range(4):
        same = [(tmp_path / folder / f"{i}.mp4").read_bytes() for folder in ("serial", "two")]
        assert same[0] == same[1], i
    assert all(hand.pid is None for hand in made[0].hands)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="stops a process as POSIX does")
@pytest.mark.parametrize("ended", [signal.SIGCONT, signal.SIGKILL])
def test_the_next_job_begins_beside_a_decode_that_goes_on_or_is_killed(
    tmp_path: Path, ended: signal.Signals
) -> None:
    """The process stands still in its decode until the next job has made a step."""
    make_folder(tmp_path / "one", "wan2.1-t2v")
    shape = {"num_frames": 33, "width": 128, "height": 96, "num_inference_steps": 2}
    jobs = [
        {"model": "one", "output": f"{i}.mp4", "prompt": f"{i}", "seed": i, **shape}
        for i in range(2)
    ]
    path, wishes = tmp_path / "jobs.jsonl", CPU | {"devices": 2}
    path.write_text("\n".join(json.dumps(one) for one in jobs))
    serial = Batch(path, tmp_path / "serial", optimization=wishes).run()
    close_workers()
    events: list[tuple[str, int]] = []

    class Watched(Relay):
        stopped: _Process | None = None

        def _heard(self, hand: _Process, line: Any) -> list[tuple[BatchJob, Outcome]]:
            if line is not None and "decoding" in line and ("decodes", 1) not in events:
                os.kill(hand.pid or 0, signal.SIGSTOP)
                self.stopped = hand
            found = super()._heard(hand, line)
            if line is not None and ("decoding" in line or line.get("percent", 0) > 0):
                kind = "decodes" if "decoding" in line else "computes"
                events.append((kind, line["number"]))
            events.extend(("ended", job.number) for job, _ in found)
            if self.stopped is not None and events[-1] == ("computes", 2):
                os.kill(self.stopped.pid or 0, ended)
                self.stopped = None
            return found

    told: list[str] = []
    ledger = Batch(
        path, tmp_path / "turns", optimization=wishes, crew=lambda: Watched(2), tell=told.append
    ).run()
    assert ledger.counts()["done"] == serial.counts()["done"] == 2, told
    decodes = events.index(("decodes", 1))
    assert decodes < events.index(("computes", 2)) < events.index(("ended", 1)), events
    killed = ended == signal.SIGKILL
    assert [entry.losses for entry in ledger.entries.values()] == [int(killed), 0]
    assert ledger.entries[1].resumed == (
        "the denoising was finished; only decoded" if killed else ""
    )
    for i in range(2):
        same = [(tmp_path / folder / f"{i}.mp4").read_bytes() for folder in ("serial", "turns")]
        assert same[0] == same[1], i


@pytest.mark.parametrize(("said", "code"), [(b'{}\n{"job": {"numb', 0), (b"{}\nnonsense\n", 1)])
def test_a_process_whose_driver_is_killed_within_a_line_ends(
    monkeypatch: pytest.MonkeyPatch, said: bytes, code: int
) -> None:
    """A line may be longer than a pipe holds, and the driver be killed before the rest is sent."""
    from wan_core.serve import processes

    ended: list[int] = []

    def leave(code: int) -> None:
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(processes.os, "_exit", leave)
    inbox: queue.Queue[tuple[BatchJob, bool]] = queue.Queue()
    with pytest.raises(SystemExit):
        processes._listen(BytesIO(said), inbox, set(), (lambda _: None, lambda _: None))
    assert ended[0] == code and inbox.empty()


@pytest.mark.slow
def test_a_process_ends_with_its_driver_and_stops_when_told(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "wan2.1-t2v")
    unwanted: set[int] = set()
    seen: list[int] = []
    values: dict[str, Any] = {"prompt": "x", "num_frames": 17, "width": 128, "height": 128,
                              "num_inference_steps": 500, "resume": "auto"}  # fmt: skip
    crew = Processes(1, progress=lambda number, percent: seen.append(percent),
                     stopped=lambda number: number in unwanted)  # fmt: skip
    job = BatchJob(number=1, model=tmp_path / "m", output=tmp_path / "o" / "x.mp4", values=values,
                   optimization=CPU)  # fmt: skip
    crew.begin(crew.hands[0], job)
    while not seen:
        assert crew.wait(0.2) == []
    for asked in ("SIGINT", "SIGTERM", "SIGHUP"):  # of the whole group: the driver ends it
        if hasattr(signal, asked) and sys.platform != "win32":
            os.kill(crew.hands[0].pid or 0, getattr(signal, asked))
    unwanted.add(1)
    ended = []
    while not ended:
        ended = crew.wait(0.2)
    assert ended[0][1].stopped and not (tmp_path / "o" / "x.mp4").exists()
    unwanted.clear()
    crew.begin(crew.hands[0], job)
    seen.clear()
    while not seen:
        assert crew.wait(0.2) == []
    pid = crew.hands[0].pid
    assert pid is not None
    began = time.monotonic()
    crew.close()
    assert time.monotonic() - began < 4
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    shutil.rmtree(tmp_path / "o")
