"""A crew of machines that Ray knows: an actor with a card for each hand, a job at a time for each.

Ray places actors, tells when one is gone, and carries jobs and outcomes, some kilobytes of plain
values. Models, journals and clips lie on storage that all machines share, under the same
paths; no frame and no tensor goes through Ray. A job whose machine was lost goes back into the
queue, and another machine goes on from its journal.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..config import TOKEN
from ..errors import InvalidRequest, MissingDependency, WorkerFailed, first_line
from .carry import Carrier, Outcome
from .crew import IDLE_SECONDS, Hand, Progress
from .jobs import BatchJob

_ELSEWHERE = ("MissingFile", "DoesNotFit", "MissingDependency", "OutputError")
"""Errors of a machine rather than of a job: another machine may have the file, or the memory."""
_REST_SECONDS, _LONGEST_REST = 60.0, 3600.0
"""So long a machine that lacks something gets no job, twice as long each time, and at most."""
_MOST_FAILED_STARTS = 3
_ANSWER_SECONDS = 10.0
"""For a connection to the machine that a cluster is asked of."""
_STATE_SECONDS = 2.0
"""How often a hand is asked how far it is: a thousand hands are 500 small calls a second."""


def _say_nothing(_: str) -> None:
    return None


class _Actor:
    """What runs on a machine. One thread carries jobs out, another answers how far it is."""

    def __init__(self, place: dict[str, Any]) -> None:
        self._carrier = Carrier(place)
        self._percent, self._unwanted = 0, -1

    def prove(self) -> dict[str, Any]:
        """Return what must be equal on all machines for equal clips: versions, code, the card."""
        import ray
        import torch

        from ..journal import code_digest, device_name, versions

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {
            "versions": versions(), "code": code_digest(), "device": device_name(device),
            "machine": platform.node(), "node": ray.get_runtime_context().get_node_id(),
        }  # fmt: skip

    def carry_out(self, values: dict[str, Any]) -> dict[str, Any]:
        """Make a job's clip; return its outcome as plain values."""
        job = BatchJob.from_dict(values)
        self._percent = 0

        def tell(percent: int) -> None:
            self._percent = percent

        outcome = self._carrier.carry_out(job, tell, lambda: self._unwanted == job.number)
        return outcome.to_dict()

    def state(self, unwanted: int) -> int:
        """Return percent; the job ``unwanted``, if it is the one in work, is to stop."""
        self._unwanted = unwanted
        return self._percent


class _Placed(Hand):
    """A hand that is an actor, perhaps one that still waits for its place."""

    def __init__(self, name: str, actor: Any, group: Any) -> None:
        super().__init__(name)
        self.actor, self.placement = actor, group
        self.starting: Any = actor.prove.remote()
        self.machine = self.node = ""
        self.result: Any = None
        self.state: Any = None
        self.asked = 0.0
        self.retired = False
        self.idle_since = time.monotonic()
        """Since when it has no job although none waits."""


class Cluster:
    """Hands on the machines of a Ray cluster.

    ``address`` is Ray's: "auto", HOST:PORT, or "local" for one that lasts as long as this.
    ``devices`` is how many cards a job has, all of one machine; ``at_once`` how many jobs run at
    most, or "all" for as many as the cluster has room for at that time, which may grow and shrink.
    A hand that nobody needs for ``IDLE_SECONDS`` gives its cards back, for whoever else asks Ray.
    Raises MissingDependency without Ray, WorkerFailed where no cluster answers.
    """

    def __init__(
        self,
        address: str,
        *,
        devices: str = "1",
        at_once: str = "all",
        progress: Progress | None = None,
        stopped: Callable[[int], bool] | None = None,
        tell: Callable[[str], object] = _say_nothing,
    ) -> None:
        for name, value in (("devices", devices), ("at_once", at_once)):
            number = value.isdigit() and int(value) > 0
            if not number and (name, value) != ("at_once", "all"):
                raise InvalidRequest(
                    f"{name} is {value!r}; with a cluster a number from 1 on is needed.", field=name
                )
        self._devices, self._at_once = int(devices), at_once
        self._progress, self._stopped, self._tell = progress, stopped, tell
        self._ray, self._ours = _connect(address)
        self._gpus = self._total("GPU") >= 1
        self.hands: list[_Placed] = []
        self._made = self._failed_starts = 0
        self._warned = False
        self._proof: dict[str, Any] | None = None
        self._rests: dict[str, tuple[float, float]] = {}
        """Until when a machine gets no job, and how long that is, by the name of its node."""

    def _total(self, kind: str) -> float:
        return float(self._ray.cluster_resources().get(kind, 0.0))

    def _share(self) -> dict[str, float]:
        """Return what a hand takes of a machine: cards, and the CPUs that go with them.

        Ray gives an actor's libraries as many threads as CPUs.
        """
        if not self._gpus:
            return {"CPU": float(self._devices)}
        each = max(1, int(self._total("CPU") // max(1.0, self._total("GPU"))))
        return {"GPU": float(self._devices), "CPU": float(each * self._devices)}

    def _room(self) -> int:
        """Return how many hands there should be at most."""
        if self._at_once != "all":
            return int(self._at_once)
        self._gpus = self._gpus or self._total("GPU") >= 1
        kind = "GPU" if self._gpus else "CPU"
        return max(1, int(self._total(kind) // self._devices))

    def free(self, waiting: int) -> Sequence[Hand]:
        """Ask for as many actors as there is work and room for; return those without a job.

        One that Ray has not placed yet, or that has not proved its versions, is given nothing.
        """
        self._give_back(waiting)
        busy = sum(hand.job is not None for hand in self.hands)
        idle = sum(hand.job is None and self._is_of_use(hand) for hand in self.hands)
        room = self._room() - busy
        wanted = min(waiting - idle, room - idle)
        if wanted > 0:
            self._say_where_none_fits()
        for _ in range(wanted):
            self._add()
        for hand in [hand for hand in self.hands if hand.starting is not None]:
            self._look_at_start(hand)
        ready = [
            hand for hand in self.hands
            if hand.starting is None and hand.job is None and self._is_of_use(hand)
        ]  # fmt: skip
        if not waiting:
            return ready
        # Those that took the place of others may be there together with them, after a rest.
        most = waiting if self._at_once == "all" else min(waiting, room)
        return ready[: max(0, most)]

    def _give_back(self, waiting: int) -> None:
        """End the hands, those that still wait for their place too, that were idle for long."""
        now = time.monotonic()
        for hand in list(self.hands):
            if waiting or hand.job is not None:
                hand.idle_since = now
            elif now - hand.idle_since > IDLE_SECONDS:
                self._drop(hand)

    def _say_where_none_fits(self) -> None:
        """Tell once that no machine has enough cards; one that has may still come."""
        kind = "GPU" if self._gpus else "CPU"
        nodes = [node["Resources"].get(kind, 0) for node in self._ray.nodes() if node["Alive"]]
        most = int(max(nodes, default=0))
        if most < self._devices and not self._warned:
            self._warned = True
            self._tell(
                f"No machine of the cluster has {self._devices} {kind}s, which each job is to "
                f"have; the largest has {most}. Waiting for one: end this, and ask for fewer "
                "devices, where none will come."
            )

    def _add(self) -> None:
        share, self._made = self._share(), self._made + 1
        place = {}
        if self._gpus:
            # Ray shows an actor its own cards alone.
            place = {"device": None, "devices": "1" if self._devices == 1 else "all"}
        options: dict[str, Any] = {
            "num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0.0), "max_concurrency": 2,
            "max_restarts": 0,
        }  # fmt: skip
        group = None
        if self._devices > 1:
            from ray.util.placement_group import placement_group
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            # Reserved as a whole: no other hand takes one of its cards while it starts.
            group = placement_group([share], strategy="STRICT_PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
        actor = self._ray.remote(_Actor).options(**options).remote(place)
        self.hands.append(_Placed(f"actor {self._made}", actor, group))

    def _look_at_start(self, hand: _Placed) -> None:
        if not self._ray.wait([hand.starting], timeout=0)[0]:
            return
        error: Exception | None = None
        try:
            proof = self._ray.get(hand.starting)
        except self._ray.exceptions.RayError as err:
            error = err
        hand.starting = None
        if error is not None:
            self._drop(hand)
            self._failed_starts += 1
            self._tell(f"{hand.name} did not start: {first_line(error)}")
            if self._failed_starts >= _MOST_FAILED_STARTS and not self._proof:
                raise WorkerFailed(
                    f"No machine of the cluster could start a worker: {str(error)[-600:]} Every "
                    "machine needs this package, and its packages, in the same versions."
                ) from error
            return
        self._failed_starts = 0
        hand.machine, hand.node = proof["machine"], proof["node"]
        self._compare(hand, proof)

    def _compare(self, hand: _Placed, proof: dict[str, Any]) -> None:
        """Leave a machine with other versions or code idle; say where a card changes the bits."""
        first = self._proof = self._proof or proof
        # Without sources to read, as in an archive, there is no digest.
        codes = [proof["code"], first["code"]]
        if proof["versions"] != first["versions"]:
            hand.retired = True  # it keeps its place, or the next actor would be put there
            self._tell(
                f"{hand.machine} is not used: its versions are {proof['versions']}, those of "
                f"{first['machine']} {first['versions']}. Install the same on all machines."
            )
        elif all(codes) and codes[0] != codes[1]:
            hand.retired = True
            self._tell(
                f"{hand.machine} is not used: its WanFit {proof['versions']['wanfit']} has other "
                f"sources than {first['machine']}'s of the same version (digest {codes[0][:12]}, "
                f"there {codes[1][:12]}). Copy the same sources to all machines."
            )
        elif proof["device"] != first["device"]:
            self._tell(
                f"{hand.machine} computes on {proof['device']}, {first['machine']} on "
                f"{first['device']}: clips of the same job differ by rounding."
            )

    def begin(self, hand: Hand, job: BatchJob) -> None:
        """Send the job, which is some kilobytes of plain values, to its actor."""
        assert isinstance(hand, _Placed)
        hand.job, hand.told_to_stop = job, None
        hand.result = hand.actor.carry_out.remote(job.to_dict())

    def wait(self, seconds: float) -> list[tuple[BatchJob, Outcome]]:
        """Wait until a job ended or a machine was lost, or for so long."""
        busy = [hand for hand in self.hands if hand.job is not None]
        if not busy:
            time.sleep(seconds)
            return []
        refs = [hand.result for hand in busy]
        done, _ = self._ray.wait(refs, num_returns=1, timeout=seconds)
        if done:
            done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        ended = [self._ended(hand) for hand in busy if hand.result in done]
        for hand in self.hands:
            if hand.job is not None:
                self._ask(hand)
        return ended

    def _ended(self, hand: _Placed) -> tuple[BatchJob, Outcome]:
        job = hand.job
        assert job is not None
        error: Exception | None = None
        values: dict[str, Any] = {}
        try:
            values = self._ray.get(hand.result)
        except self._ray.exceptions.RayError as err:
            error = err
        hand.job = hand.result = hand.state = None
        if error is not None:
            self._drop(hand)
            text = f"{hand.machine or hand.name} was lost ({type(error).__name__})."
            return job, Outcome(lost=True, kind="Lost", error=text)
        if values["kind"] in _ELSEWHERE:
            values |= {"final": False, "error": f"On {hand.machine}: {values['error']}"}
            self._have_rest(hand)
        else:
            self._rests.pop(hand.node, None)
        return job, Outcome(**values)

    def _is_of_use(self, hand: _Placed) -> bool:
        """Return whether it may get a job: its versions are right, and its machine does not rest.

        One that Ray has not placed yet is on no machine.
        """
        until, _ = self._rests.get(hand.node, (0.0, 0.0))
        return not hand.retired and time.monotonic() >= until

    def _have_rest(self, hand: _Placed) -> None:
        """Give the machine of a hand no job for a while, where other machines are at work.

        One without the shared folder fails at once, and would fail one job after the other.
        """
        others = [one for one in self.hands if one.node not in ("", hand.node)]
        if not any(self._is_of_use(one) for one in others):
            return
        until, before = self._rests.get(hand.node, (0.0, 0.0))
        if time.monotonic() < until:
            return  # its other hands had their jobs before, and fail for the same reason
        seconds = min(max(_REST_SECONDS, 2 * before), _LONGEST_REST)
        self._rests[hand.node] = (time.monotonic() + seconds, seconds)
        self._tell(
            f"{hand.machine} gets no job for {seconds:.0f} s, as others are there: look whether it "
            "has what they have (the shared folder, room, memory)."
        )

    def _ask(self, hand: _Placed) -> None:
        """Take the answer to how far a hand is, if it has come, and ask again now and then.

        One whose job was told to stop and hangs is killed; that it is gone is told by its result.
        """
        job = hand.job
        assert job is not None
        unwanted = self._stopped is not None and self._stopped(job.number)
        if unwanted and hand.told_to_stop is None:
            hand.told_to_stop, hand.asked, hand.state = time.monotonic(), 0.0, None
        elif unwanted and hand.hangs():
            self._ray.kill(hand.actor, no_restart=True)
            hand.told_to_stop = math.inf  # once is enough
            return
        if hand.state is not None and self._ray.wait([hand.state], timeout=0)[0]:
            # An actor that is gone is told by its result.
            with contextlib.suppress(self._ray.exceptions.RayError):
                percent = self._ray.get(hand.state)
                if self._progress is not None:
                    self._progress(job.number, percent)
            hand.state = None
        if hand.state is None and time.monotonic() - hand.asked >= _STATE_SECONDS:
            hand.state = hand.actor.state.remote(job.number if unwanted else -1)
            hand.asked = time.monotonic()

    def _drop(self, hand: _Placed) -> None:
        """Give back the place of an actor that is gone, or is not needed any more."""
        self.hands.remove(hand)
        with contextlib.suppress(Exception):  # what is gone cannot be ended
            self._ray.kill(hand.actor, no_restart=True)
        if hand.placement is not None:
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):
                remove_placement_group(hand.placement)

    def close(self) -> None:
        """End the actors; what they had in work is on the shared disk up to its last step."""
        for hand in list(self.hands):
            self._drop(hand)
        if self._ours:
            self._ray.shutdown()


def _connect(address: str) -> tuple[Any, bool]:
    """Return Ray's module, and whether the connection is ours to end."""
    own = address == "local"
    with _loopback_only() if own else contextlib.nullcontext():
        try:
            import ray
        except ImportError as err:
            raise MissingDependency(
                f"A cluster needs Ray ({err}): pip install ray, the same on every machine "
                "(WanFit's extra [cluster])."
            ) from err
        if ray.is_initialized():
            return ray, False
        if own:
            own_address: Any = ray.util.get_node_ip_address  # which Ray does not type
            _check_loopback(str(own_address()))
        dashboard = False if own else None  # None: as Ray has it
        try:
            _check_listened_to(address)
            ray.init(
                address=address, log_to_driver=False, configure_logging=False,
                include_dashboard=dashboard,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError, OSError) as err:
            raise WorkerFailed(
                f"No Ray cluster answers at {address!r} ({first_line(err)}). Start one with "
                "`ray start --head`, or name another address."
            ) from err
    return ray, True


def _check_listened_to(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT; Ray would ask for minutes, and say nothing.

    What else Ray takes for an address (auto, local, ray://...) is its own matter.
    """
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isascii() and port.isdigit() and int(port) < 2**16:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()


_REACHABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's name for: other machines are to reach this one. Read where Ray is imported first."""


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Have a Ray that starts meanwhile, and all it starts, listen on this machine alone.

    Who reaches its ports runs code here, and Ray alone would listen on all addresses. Nor is it to
    see a server's token.
    """
    before = {name: os.environ.get(name) for name in (_REACHABLE, TOKEN)}
    os.environ.pop(TOKEN, None)
    os.environ[_REACHABLE] = "0"
    try:
        yield
    finally:
        del os.environ[_REACHABLE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _check_loopback(address: str) -> None:
    """Raise WorkerFailed where Ray would give itself an address that others can reach."""
    if not ipaddress.ip_address(address).is_loopback:
        raise WorkerFailed(
            f"A local cluster would listen on {address}, because Ray was imported before: put "
            f"{_REACHABLE}=0 into the environment, or name the address of a cluster that runs."
        )
