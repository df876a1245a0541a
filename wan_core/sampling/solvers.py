"""Solvers of our own: how a step goes from one noise level to the next, as ComfyUI's KSampler does.

diffusers' schedulers are used for the official schedule of UniPC, Euler and DPM++ 2M. They cannot
give what people get from the same words in ComfyUI: its multistep solvers see a flow model's sigma
as the ratio of noise to signal, and end and begin at other orders. ``lcm`` needs noise that a
resumed render draws again, where diffusers' class draws from a generator that nobody keeps.

All are written for one equation. With x the latents, v the model's velocity and s the sigma, the
clean prediction is x0 = x - s v, and dx/ds = (x - x0) / s. If x0 stays the same from s to t, then
x_t = (t/s) x + (1 - t/s) x0, which is Euler's step; the multistep solvers let x0 change as it did
in the steps before, in the variable log(s). Latents are float32, whatever the velocity's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..job import LAST_SIGMA, Request, make_scheduler, solver_sigmas

_TRAIN_STEPS = 1000
Fresh = Callable[[int, Any], Tensor]


class Solver:
    """One run's steps, with the face of a diffusers scheduler as far as the loop uses it.

    ``sigmas`` are the noise levels, largest first, with the last one's 0. Everything it remembers
    is in its attributes, where the journal finds it.
    """

    history = 1
    """Clean predictions of earlier steps that it keeps, the present one included."""

    def __init__(self, sigmas: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        self.timesteps = (self.sigmas[:-1] * _TRAIN_STEPS).to(device)
        self.step_index = 0
        self.model_outputs: list[Tensor | None] = [None] * self.history

    def set_begin_index(self, begin: int) -> None:
        """Say which step is the first to be made."""
        self.step_index = begin

    def scaled(self, noise: Tensor) -> Tensor:
        """Return latents at the first noise level that are nothing but noise."""
        first = float(self.sigmas[0])
        return noise if first == 1.0 else noise * first

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return ``sample`` at the present noise level: (1 - s) sample + s noise."""
        sigma = float(self.sigmas[self.step_index])
        return (1.0 - sigma) * sample + sigma * noise

    def step(
        self, velocity: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return the latents of the next noise level, alone in a tuple.

        ``velocity`` and ``sample`` are (B, C, T, h, w). The timestep is not looked at: the steps
        are counted.
        """
        sigma, following = (float(self.sigmas[self.step_index + i]) for i in (0, 1))
        sample = sample.float()
        clean = sample - sigma * velocity.float()
        if self.history > 1:
            self.model_outputs = [*self.model_outputs[1:], clean]
        result = self._next(sample, clean, velocity, sigma, following)
        self.step_index += 1
        return (result,)

    def _next(
        self, sample: Tensor, clean: Tensor, velocity: Tensor, sigma: float, following: float
    ) -> Tensor:
        raise NotImplementedError

    def _known(self) -> list[Tensor]:
        """Return the clean predictions that are kept, the newest first."""
        return [one for one in reversed(self.model_outputs) if one is not None]

    def _log_of_last(self) -> float:
        """Return log(sigma of the step before / sigma of this step)."""
        index = self.step_index
        return math.log(float(self.sigmas[index - 1]) / float(self.sigmas[index]))


class EulerSolver(Solver):
    """x + (t - s) v. As diffusers' class, which rounds the latents to the model's dtype."""

    def _next(
        self, sample: Tensor, clean: Tensor, velocity: Tensor, sigma: float, following: float
    ) -> Tensor:
        return sample + (following - sigma) * velocity.float()


class LcmSolver(Solver):
    """The clean prediction, with fresh noise up to the next level: (1 - t) x0 + t noise.

    Luo et al. 2023, arXiv 2310.04378, algorithm 3, for a flow; rCM and DMD sample like this too.
    ``fresh(k, shape)`` returns the noise of step k, the same whenever it is asked.
    """

    # A slot, so that it is not among the attributes that the journal saves.
    __slots__ = ("_fresh",)

    def __init__(self, sigmas: Sequence[float], device: torch.device | str, fresh: Fresh) -> None:
        super().__init__(sigmas, device)
        self._fresh = fresh

    def _next(
        self, sample: Tensor, clean: Tensor, velocity: Tensor, sigma: float, following: float
    ) -> Tensor:
        if not following:
            return clean
        noise = self._fresh(self.step_index, tuple(clean.shape)).to(clean.device, torch.float32)
        return following * noise + (1.0 - following) * clean


class DpmSolver(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), in log(sigma)."""

    history = 2

    def _next(
        self, sample: Tensor, clean: Tensor, velocity: Tensor, sigma: float, following: float
    ) -> Tensor:
        known = self._known()
        if not following or len(known) < 2:
            return _held(sample, clean, following / sigma)
        h = math.log(sigma / following)
        ratio = self._log_of_last() / h
        half = 1.0 / (2.0 * ratio)
        return _held(sample, (1.0 + half) * clean - half * known[1], following / sigma)


class ResSolver(Solver):
    """Second-order exponential multistep (Zhang et al. 2023, arXiv 2308.02157, table 2)."""

    history = 2

    def _next(
        self, sample: Tensor, clean: Tensor, velocity: Tensor, sigma: float, following: float
    ) -> Tensor:
        known = self._known()
        if not following or len(known) < 2:
            return _held(sample, clean, following / sigma)
        h = math.log(sigma / following)
        c2 = -self._log_of_last() / h
        phi1 = math.expm1(-h) / -h
        phi2 = (phi1 - 1.0) / -h
        weights = (phi1 - phi2 / c2, phi2 / c2)
        return math.exp(-h) * sample + h * (weights[0] * clean + weights[1] * known[1])


class UniPcSolver(Solver):
    """UniPC with B(h) = h and orders up to 3 (Zhao et al. 2023, arXiv 2302.04867), in log(sigma).

    A step first corrects the latents it is given, whose prediction the model has now evaluated,
    then predicts the next ones. The order rises to 3 and falls again towards the end, as in
    ComfyUI: order 2 for the last level but one, 1 for the last.
    """

    history = 4

    def __init__(self, sigmas: Sequence[float], device: torch.device | str = "cpu") -> None:
        super().__init__([*sigmas[:-1], sigmas[-1] or LAST_SIGMA], device)
        self.last_sample: Tensor | None = None

    def _next(
        self, sample: Tensor, clean: Tensor, velocity: Tensor, sigma: float, following: float
    ) -> Tensor:
        index, steps = self.step_index, len(self.sigmas) - 1
        present, *older = self._known()
        if older and self.last_sample is not None:
            sample = self._update(self.last_sample, older, index, self._order(index, older), clean)
        self.last_sample = sample
        known = [present, *older[:2]]
        result = self._update(sample, known, index + 1, self._order(index + 1, known))
        return result / (1.0 - LAST_SIGMA) if index + 1 == steps else result

    def _order(self, target: int, known: list[Tensor]) -> int:
        """Return the order of the update to the level with index ``target``."""
        steps = len(self.sigmas) - 1
        most = max(1, min(3, steps - 1))
        wanted = target if target < most else min(most, steps + 1 - target)
        return min(wanted, len(known))

    def _update(
        self, sample: Tensor, known: list[Tensor], target: int, order: int,
        evaluated: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Go from level ``target - 1`` to ``target``: predict, or correct with ``evaluated``.

        ``known`` are the clean predictions at the levels before ``target``, the newest first.
        """
        levels = [_Level(self.sigmas[target - back]) for back in range(order + 1)]
        present, following = levels[1], levels[0]
        h = following.log_ratio - present.log_ratio
        # 1. Where the earlier predictions lie, in units of this step; the present target is at 1.
        places = [(level.log_ratio - present.log_ratio) / h for level in levels[2:]]
        changes = [
            (old - known[0]) / float(place) for old, place in zip(known[1:], places, strict=False)
        ]
        # 2. Weights that make the update exact for polynomials of that degree.
        places = [*places, torch.ones(())]
        if evaluated is not None:
            changes.append(evaluated - known[0])
        count = len(changes)
        weights = [0.5] * count if count < 2 else _weights(places[:count], h)
        # 3. x0 held, and what its change adds.
        kept = following.noise / present.noise * (present.signal / following.signal)
        result = float(kept) * sample - float(torch.expm1(-h)) * known[0]
        for weight, change in zip(weights, changes, strict=True):
            result = result + float(h) * weight * change
        return result


class _Level:
    """A noise level as ComfyUI's UniPC takes it: of noise with ``sigma`` times the signal's spread.

    Computed in float32 as there. Near the end, and where steps are short, that is off by up to a
    percent from what the formulas mean; computed better, the latents would be others.
    """

    def __init__(self, sigma: Tensor) -> None:
        log_signal = 0.5 * torch.log(1 / (sigma * sigma + 1))
        rest = 1.0 - torch.exp(2.0 * log_signal)
        self.signal, self.noise = torch.exp(log_signal), torch.sqrt(rest)
        self.log_ratio = log_signal - 0.5 * torch.log(rest)


def _weights(places: list[Tensor], h: Tensor) -> list[float]:
    """Solve the order conditions of UniPC for predictions at ``places`` (equation 5 of the paper).

    ``h`` is the step in the log of signal to noise. For the prediction of x0 the functions phi have
    -h.
    """
    phi, factorial = torch.expm1(-h) / -h - 1, 1
    wanted = []
    for k in range(1, len(places) + 1):
        wanted.append(phi * factorial / -h)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    row = torch.stack(places)
    system = torch.stack([torch.pow(row, k) for k in range(len(places))])
    return [float(value) for value in torch.linalg.solve(system, torch.stack(wanted))]


def _held(sample: Tensor, clean: Tensor, ratio: float) -> Tensor:
    """Return the latents at ``ratio`` times the noise level while ``clean`` stays the same."""
    return ratio * sample + (1.0 - ratio) * clean


def start_latents(noise: Tensor, scheduler: Any, start: int) -> Tensor:
    """Return the latents that the steps from ``start`` on begin with.

    Where the first noise level is below 1, a solver of ours begins with so much less noise.
    """
    return scheduler.scaled(noise) if isinstance(scheduler, Solver) and not start else noise


_SOLVERS: dict[str, type[Solver]] = {
    "unipc": UniPcSolver, "euler": EulerSolver, "dpm++2m": DpmSolver, "res_multistep": ResSolver,
}  # fmt: skip


def make_solver(request: Request, saved_config: Any, device: torch.device, fresh: Fresh) -> Any:
    """Make what a request's steps are taken with: a diffusers scheduler or a ``Solver``.

    Its timesteps are set. ``saved_config`` is the model folder's ``scheduler_config.json`` or None;
    ``fresh`` draws the noise of a step (``LcmSolver``).
    """
    sigmas = solver_sigmas(
        request.scheduler, request.sigma_schedule, request.num_inference_steps, request.flow_shift,
        request.sigmas,
    )  # fmt: skip
    if sigmas is None:
        scheduler = make_scheduler(request.scheduler, request.flow_shift, saved_config)
        scheduler.set_timesteps(request.num_inference_steps, device=device)
        return scheduler
    if request.scheduler == "lcm":
        return LcmSolver(sigmas, device, fresh)
    return _SOLVERS[request.scheduler](sigmas, device)
