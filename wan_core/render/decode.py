"""A clip's decode: how far it has come, where its frames go, and the strips that workers make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import GenerationConfig
from ..errors import OutputError, WorkerFailed, is_oom
from ..forward import alike
from ..memory import CHUNKS, CardRecords, Trial, strips_of
from ..sampling import Leaving, OutOfRange, StreamingDecoder, denormalize_latents, to_frames
from ..workers import StripsDecoder, StripsLost, WorkerPool
from .experts import in_workers
from .stages import StageRunner
from .video import VideoWriter


@dataclass(slots=True)
class Decoding:
    """How far a decode has come, and where its frames go."""

    latents: Tensor
    frames: Tensor | None
    writers: list[VideoWriter]
    wanted: int
    done: int = 0
    decoder: Any = None
    pending: Tensor | None = None
    """Decoded frames (B, 3, f, H, W) that have not been handed on yet."""
    leaving: Leaving | None = None
    """Frames before those, on their way from the card."""
    alone: bool = False
    """Whether this process decodes by itself what is left: the workers could not."""
    keep_first: int = 0
    """How many chunks of pictures are kept for a trial of strips."""
    first: dict[int, Tensor] = field(default_factory=dict)
    """These, by the number of frames before each."""
    overflowed: bool = False
    """Whether the VAE has gone beyond the range of fp16."""

    def check_whole(self) -> None:
        """Raise OutputError where frames are missing."""
        if self.done < self.wanted:
            raise OutputError(f"Only {self.done} of {self.wanted} frames could be decoded.")

    @property
    def needs_decoder(self) -> bool:
        """Whether a decoder for this process is still to be made, or one in another dtype."""
        return self.overflowed or self.decoder is None or isinstance(self.decoder, StripsDecoder)

    def go_on_with(self, decoder: Any) -> Any:
        """Have another decoder go on where the one before is; returns it."""
        if self.decoder is not None:
            decoder.go_on_from(self.decoder)
        self.decoder = decoder
        return decoder

    def overflows(self, *, at_once: bool = False) -> bool:
        """Say whether frames are beyond fp16's range; if so, they and later ones are taken back.

        Those that leave by themselves are looked at when they have left, or ``at_once``.
        """
        chunk = self.pending
        if self.leaving is not None:
            pictures, finite = self.leaving.arrived()
            if not finite:
                if chunk is not None:
                    self.decoder.take_back(chunk)
                self.decoder.take_back(pictures.permute(0, 4, 1, 2, 3))
                self.leaving = self.pending = None
                self.overflowed = True
                return True
        if chunk is None or chunk.dtype != torch.float16 or (self.ahead and not at_once):
            return False
        if bool(torch.isfinite(chunk).all()):
            return False
        self.decoder.take_back(chunk)
        self.pending, self.overflowed = None, True
        return True

    @property
    def ahead(self) -> bool:
        """Whether the pending frames leave while the next ones are computed.

        Not those of a clip in segments, whose decoder takes back no more than its last chunk.
        """
        return self.pending is not None and leaves(self.pending, self.decoder)

    def hand_on_before(self) -> bool:
        """Hand on what has left before the pending frames, which leave next; False: nothing had.

        Where frames do not leave by themselves the pending ones are handed on.
        """
        if self.pending is not None and not self.ahead:
            return self.hand_on()
        had = self._take_left()
        if self.pending is not None:
            whole_bytes = self.frames is None and not self.keep_first
            self.leaving = Leaving(self.pending, whole_bytes=whole_bytes)
            self.pending = None
        return had

    def hand_on(self) -> bool:
        """Hand on the leaving and the pending frames; False: there are none.

        Those beyond ``wanted`` are dropped. If memory runs out here it can be called again: no
        frame is written twice.
        """
        had = self._take_left()
        if self.pending is None:
            return had
        self.take(to_frames(self.pending))
        self.pending = None
        return True

    def _take_left(self) -> bool:
        """Hand on the frames that have left the card; False: there are none."""
        if self.leaving is None:
            return False
        self.take(self.leaving.arrived()[0])
        self.leaving = None  # and no other name: its page-locked memory is the next one's
        return True

    def take(self, pictures: Tensor) -> None:
        """Hand on pictures (B, f, H, W, 3), as ``hand_on`` does."""
        pictures = pictures[:, : self.wanted - self.done]
        if len(self.first) < self.keep_first:
            self.first[self.done] = pictures.clone()
        if self.frames is not None:
            self.frames[:, self.done : self.done + pictures.shape[1]] = pictures
        # A writer may be ahead of ``done`` after a failure: it gets only the frames it lacks.
        for index, writer in enumerate(self.writers):
            writer.write(pictures[index, writer.frames_written - self.done :])
        self.done += pictures.shape[1]


def leaves(chunk: Tensor, decoder: Any) -> bool:
    """Say whether a chunk of this decoder is copied to RAM while the next one is computed."""
    return chunk.is_cuda and isinstance(decoder, StreamingDecoder)


def decode_frames(stages: StageRunner, config: GenerationConfig, progress: Decoding) -> None:
    """Decode what is left by ``progress.decoder``; ends early where fp16's range did not hold.

    On CUDA the next chunk is computed while the one before leaves the card, is handed on and is
    encoded. After a failure the same call goes on from there.
    """
    decoder = progress.decoder
    # Frames that an earlier attempt decoded before it failed, looked at or not.
    if progress.overflows(at_once=True):
        return
    if progress.hand_on():
        stages.callbacks.call(config.decode_callback, progress.done, progress.wanted)
    while not decoder.done or progress.leaving is not None:
        if not decoder.done:
            progress.pending = decoder.decode_next(check=stages.check_interrupt)
        if progress.overflows():
            return
        if progress.hand_on_before():
            stages.callbacks.call(config.decode_callback, progress.done, progress.wanted)


def decode_in_strips(stages: StageRunner, config: GenerationConfig, progress: Decoding) -> bool:
    """Decode what is left in strips, where the plan wants that and its workers are there.

    Where one of them ends and no other is free, those that are left share out the rest, unless
    every bit is to stay: strips of another size were not tried. Returns False where this process
    has to go on, True where all is done or fp16's range did not hold (``progress.overflowed``).
    """
    plan = stages.plan
    progress.keep_first = CHUNKS if plan.decode_trial else 0
    if plan.decode_strips < 2 or progress.alone:
        return False
    if not stages.has_workers:  # no step was left for them to compute
        stages.say_once("No worker was started in this run, so that one card decoded the clip.")
        return False
    for count in range(plan.decode_strips, 1, -1):  # each time around a worker has ended
        lost = _shared_out(stages, config, progress, count)
        if lost is None:
            return True
        if plan.must_equal or not lost.again or count == 2:
            break
        stages.say_once(f"{lost}: what was left of the decode was shared out among the others.")
    progress.alone = True
    stages.say_once(f"The decode in strips was given up ({lost}); one card decoded the rest.")
    predicted = {stage.name: stage.device_bytes for stage in plan.estimate.stages}
    stages.timeline.predict({**predicted, "decode": plan.decode_whole_bytes})
    return False


def _shared_out(
    stages: StageRunner, config: GenerationConfig, progress: Decoding, count: int
) -> StripsLost | None:
    """Decode what is left in ``count`` strips, or as many as workers are there; None: it is done.

    Else returns why not, and ``progress`` says how far it has come.
    """
    lost: StripsLost | None = None
    with stages.timeline.stage("decode") as report, in_workers(stages) as pool:
        whole_bytes = progress.frames is None
        decoder = _strips(stages, progress.latents, pool, count, whole_bytes=whole_bytes)
        if decoder is None:
            too_few = f"{count} workers" if stages.plan.must_equal else "two workers"
            lost = StripsLost(f"fewer than {too_few} are there")
        else:
            report.note = f"in {decoder.count} strips on as many cards"
            progress.go_on_with(decoder)
            with decoder:
                lost = _take_all(stages, config, progress, decoder)
            for text in decoder.moved:
                stages.say_once(text)
    # The stage's own peak is that of this process, which has only looked on.
    peaks = [one.get("decode_peak_bytes", 0) for one in pool.describe()]
    if report.measured_peak_bytes is not None and max(peaks, default=0):
        report.measured_peak_bytes = max(peaks)
    return lost


def _take_all(
    stages: StageRunner, config: GenerationConfig, progress: Decoding, decoder: StripsDecoder
) -> StripsLost | None:
    """Take the pictures that are left; return why no more come, if a strip was lost."""
    try:
        while not decoder.done:
            progress.take(decoder.pictures(stages.check_interrupt))
            decoder.taken()
            stages.callbacks.call(config.decode_callback, progress.done, progress.wanted)
    except OutOfRange:
        progress.overflowed = True
    except StripsLost as err:
        return err.with_traceback(None)
    return None


@contextmanager
def _no_harm() -> Iterator[None]:
    """Have what a trial may meet, a shortage of memory too, end it and nothing else."""
    try:
        yield
    except (WorkerFailed, StripsLost, OutOfRange):
        return
    except Exception as err:
        if not is_oom(err):
            raise


def try_strips(stages: StageRunner, progress: Decoding) -> None:
    """Decode the first chunks in strips as well, where the plan asks for it; keep what that shows.

    The clip is finished: whatever happens here, nothing of it changes.
    """
    count, chunks = stages.plan.decode_trial, list(progress.first.values())
    if not count or len(chunks) < CHUNKS or stages.steps_down or not stages.has_workers:
        return
    if progress.overflowed:  # the first were decoded in another dtype than a trial would be
        return
    with (
        _no_harm(),
        stages.timeline.stage("try_strips"),
        in_workers(stages) as pool,
    ):
        decoder = _strips(stages, progress.latents, pool, count, whole_bytes=False)
        if decoder is None or decoder.count < count:
            return
        equal, error = True, 0.0
        with decoder:
            for expected in chunks:
                found = decoder.pictures(lambda: None)[:, : expected.shape[1]]
                same, apart = alike(expected, found)
                equal, error = equal and same, max(error, apart)
                decoder.taken()
        CardRecords().keep_trial(stages.plan.decode_kind, Trial(equal, error))


def _strips(
    stages: StageRunner, latents: Tensor, pool: WorkerPool, count: int, *, whole_bytes: bool
) -> StripsDecoder | None:
    """Return what decodes the latents in strips; None where too few workers are there.

    Where every bit is to stay, these are fewer than ``count``.
    """
    ranks = pool.free_ranks(count)
    shape = stages.architecture.vae_shape
    batch, _, _, height, width = latents.shape
    strips = strips_of(shape, height, width, len(ranks))
    if len(strips) < (count if stages.plan.must_equal else 2):
        return None
    # Cast and denormalised where one card would do it too: the order and place affect rounding.
    latents = denormalize_latents(latents.to(stages.device, stages.dtype("vae")), shape.statistics)
    size = height * shape.scale_factor_spatial, width * shape.scale_factor_spatial
    return StripsDecoder(
        pool,
        stages.weights("vae", distilled=True),
        latents,
        strips,
        ranks[: len(strips)],
        (batch, shape.scale_factor_temporal, *size, 3),
        whole_bytes=whole_bytes,
    )
