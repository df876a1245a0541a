"""The noise that a clip starts from, drawn on the CPU so that it is the same for every device.

``clip`` is one draw for the whole clip, as in diffusers' pipelines. ``frame`` seeds every latent
frame by its absolute index, so that a longer clip begins with the noise of a shorter one.
``freenoise`` repeats the first window's noise in shuffled order, which keeps distant windows
similar (FreeNoise, Qiu et al. 2023, arXiv 2310.15169, section 3.2).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .windows import WindowPlan

NoiseName = Literal["clip", "frame", "freenoise"]
NOISES: tuple[str, ...] = get_args(NoiseName)

Shape = tuple[int, int, int, int, int]


def draw_noise(
    name: str, shape: Shape, seed: int, windows: WindowPlan | None = None, references: int = 0
) -> Tensor:
    """Draw float32 noise (B, C, T, h, w) on the CPU, standard normal in every frame.

    ``name`` is one of ``NOISES``. ``windows`` gives the length and the stride of the windows, which
    only ``freenoise`` uses; without windows it is the same as ``clip``. The first ``references`` of
    the T frames stand before the clip: for ``clip`` they are part of the one draw, as in diffusers.
    """
    import torch

    repeats = name == "freenoise" and windows is not None and windows.count > 1
    if references and (name == "frame" or repeats):
        batch, channels, frames, height, width = shape
        before = _by_frame((batch, channels, references, height, width), seed, -references)
        own = (batch, channels, frames - references, height, width)
        return torch.cat([before, draw_noise(name, own, seed, windows)], dim=2)
    if name == "frame":
        return _by_frame(shape, seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    if repeats and windows is not None:
        return _repeated(shape, windows, generator)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


class StepNoise:
    """The noise that a sampler adds in each step: the same whenever a step asks for it.

    ``clip`` and ``freenoise`` take one draw after the other from a generator seeded with seed + 1,
    which is what ComfyUI does on a CPU; ``frame`` seeds every frame of every step. The segments of
    a clip have seeds of their own.
    """

    def __init__(self, name: str, seed: int) -> None:
        self._name, self._seed = name, seed
        self._next: tuple[int, int, tuple[int, ...]] | None = None
        self._generator: Generator | None = None

    def draw(self, step: int, shape: Shape, segment: int = 0) -> Tensor:
        """Draw float32 noise (B, C, T, h, w) on the CPU for a step, counted from 0."""
        import torch

        seed = (self._seed + 1) % 2**64
        if segment:
            # By a hash: the generator looks at the lower half of a seed's bits only.
            text = f"wanfit noise {seed} segment {segment}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
        if self._name == "frame":
            return _by_frame(shape, seed + (step << 64))
        skipped = 0
        if self._generator is None or self._next != (step, segment, shape):
            # Another step than the next one: after an error, or in a render that is resumed.
            self._generator, skipped = torch.Generator("cpu").manual_seed(seed), step
        for _ in range(skipped):
            torch.randn(shape, generator=self._generator, dtype=torch.float32)
        self._next = (step + 1, segment, shape)
        return torch.randn(shape, generator=self._generator, dtype=torch.float32)


def _by_frame(shape: Shape, seed: int, first: int = 0) -> Tensor:
    import torch

    batch, channels, frames, height, width = shape
    noise = torch.empty(shape, dtype=torch.float32)
    generator = torch.Generator("cpu")
    for sample in range(batch):
        for frame in range(frames):
            # Seeded by a hash, because with seed + index neighbouring seeds would share their
            # frames, moved by one.
            text = f"wanfit noise {seed} {sample} {first + frame}".encode()
            generator.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))
            noise[sample, :, frame] = torch.randn((channels, height, width), generator=generator)
    return noise


def _repeated(shape: Shape, windows: WindowPlan, generator: Generator) -> Tensor:
    """Draw the first window; fill each stride after it with frames one window back, shuffled."""
    import torch

    batch, channels, frames, height, width = shape
    length, stride = windows.window, windows.stride
    noise = torch.empty(shape, dtype=torch.float32)
    first = (batch, channels, length, height, width)
    noise[:, :, :length] = torch.randn(first, generator=generator, dtype=torch.float32)
    for start in range(length, frames, stride):
        # A whole stride is shuffled and then cut, so that a longer clip begins with the same noise.
        order = start - length + torch.randperm(stride, generator=generator)
        wanted = min(stride, frames - start)
        noise[:, :, start : start + wanted] = noise[:, :, order[:wanted]]
    return noise
