"""One stage of training: AdamW, a warm-up and cosine, an average of the weights, resumable.

On a GPU the whole step is captured once as a CUDA graph and replayed, because these models are so
small that launching their kernels costs more than running them.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Say = Callable[[str], None]
Loss = Callable[[], torch.Tensor]

WARMUP = 100
FLOOR = 0.01
"""Learning rate at the end, as a share of the peak."""
SAVE_EVERY = 120.0
"""Seconds between checkpoints of an unfinished stage."""


@dataclass
class Clock:
    """Seconds this run may still take; None is for ever."""

    limit: float | None

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.start

    def over(self) -> bool:
        """Say whether the limit has passed."""
        return self.limit is not None and self.elapsed() > self.limit


class Run:
    """What the stages of a training share: the device, the folder, the log, the clock."""

    def __init__(self, args: Namespace, log: str, seed: int, limit: float | None) -> None:
        self.args = args
        self.work = Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(args.device)
        self.clock = Clock(limit)
        self.log = self.work / log
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True

    def say(self, line: str) -> None:
        """Write a line with the time to the log and the terminal."""
        line = f"[{self.clock.elapsed():6.0f} s] {line}"
        with self.log.open("a") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class Trainer:
    """Trains modules together on losses that draw their own batches."""

    def __init__(
        self,
        name: str,
        modules: Sequence[nn.Module],
        peak: float,
        work: Path,
        clock: Clock,
        say: Say,
        decay: float,
    ) -> None:
        self.name, self.modules, self.peak = name, list(modules), peak
        self.work, self.clock, self.say = work, clock, say
        self.parameters = [p for m in self.modules for p in m.parameters()]
        self.cuda = self.parameters[0].is_cuda
        rate: Any = torch.tensor(peak, device="cuda") if self.cuda else peak
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            **({"capturable": True, "fused": True} if self.cuda else {}),
        )
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        self.phase = 0
        self.progress = 0.0
        self.resumed: tuple[int, int, int] = (0, 0, 0)

    def _update(self, loss: Loss) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            now = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(self.average, now, 1 - self.decay)
        return value.detach()

    def _captured(self, loss: Loss) -> Callable[[], torch.Tensor]:
        """Return a function that runs one update: a replay of a CUDA graph on a GPU."""
        if not self.cuda:
            return lambda: self._update(loss)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._update(loss)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        refused = ""
        try:
            with torch.cuda.graph(graph):
                value = self._update(loss)
        except RuntimeError as error:
            refused = str(error)
        if refused:
            self.say(f"{self.name}: no CUDA graph, slower: {refused[:300]}")
            torch.cuda.synchronize()
            return lambda: self._update(loss)

        def replay() -> torch.Tensor:
            graph.replay()
            return value

        return replay

    def _set_rate(self, progress: float) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        rate = self.peak * (FLOOR + (1 - FLOOR) * cosine) * min(1.0, (self.step + 1) / WARMUP)
        for group in self.optimizer.param_groups:
            if self.cuda:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _measured(self, update: Callable[[], torch.Tensor], seconds: float) -> int:
        """Run 30 updates and return how many fit into so many seconds."""
        for index in range(30):
            if index == 10:
                self._wait()
                began = time.monotonic()
            self._set_rate(self.progress)
            update()
            self.step += 1
        self._wait()
        per_step = (time.monotonic() - began) / 20
        total = 30 + max(30, int(seconds / per_step))
        self.say(f"{self.name}: {1000 * per_step:.1f} ms a step, {total} steps")
        return total

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def run(
        self,
        loss: Loss,
        until: float,
        steps: int | None,
        seconds: float,
        report: Callable[[], str] | None = None,
    ) -> None:
        """Train until `until` (0..1) of the schedule, for so many steps or else about so long.

        Ends early, and says so, when the clock runs out; raises FloatingPointError when a loss is
        not finite.
        """
        self.phase += 1
        if self.phase < self.resumed[0]:
            return
        start = self.progress
        self._set_rate(start)
        update = self._captured(loss)
        done, total = 0, steps
        if self.phase == self.resumed[0]:
            _, done, total = self.resumed
        elif total is None:
            total = self._measured(update, seconds)
            done = 30
        began = last_save = time.monotonic()
        for index in range(done, total):
            self.progress = start + (until - start) * index / total
            self._set_rate(self.progress)
            value = update()
            self.step += 1
            if index % max(1, total // 12) == 0:
                note = report() if report and index > 30 else ""
                passed = time.monotonic() - began
                self.say(
                    f"{self.name} {index}/{total} loss {float(value):.5f} {note} {passed:.0f} s"
                )
                if not math.isfinite(float(value)):
                    raise FloatingPointError(f"{self.name}: the loss is {value} at step {index}")
            if index % 50 == 49:
                self._wait()
                if self.clock.over():
                    self.say(f"{self.name}: the clock ran out at step {index}")
                    break
                if time.monotonic() - last_save > SAVE_EVERY:
                    self._save(start, index + 1, total)
                    last_save = time.monotonic()
        self.progress = until

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average; twice is nothing."""
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)

    def _save(self, start: float, done: int, total: int) -> None:
        """Write what `resume` needs, whole or not at all."""
        state = {
            "modules": [m.state_dict() for m in self.modules],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "progress": start,
            "resumed": (self.phase, done, total),
        }
        partial = self.work / f"{self.name}.partial"
        torch.save(state, partial.with_suffix(".tmp"))
        partial.with_suffix(".tmp").replace(partial)

    def resume(self) -> None:
        """Continue from where this stage was last saved, if it was."""
        partial = self.work / f"{self.name}.partial"
        if not partial.exists():
            return
        state = torch.load(partial, map_location=self.parameters[0].device, weights_only=True)
        for module, weights in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.progress, self.resumed = state["step"], state["progress"], state["resumed"]
        self.say(f"{self.name}: resumed at step {self.step}")
