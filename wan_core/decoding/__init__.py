"""How a VAE decodes and encodes: diffusers' bits, with a few rows of a few frames alive at once.

In: a VAE built by ``loading``. Out: ``lean_decoder`` and ``lean_encoder``, context managers inside
which that half of the VAE runs frame by frame and in bands of rows, its feature cache in RAM if
asked, or the reason why it cannot. What ``forward`` offers for replacing a module's own forward is
used here for the VAE. Nothing here knows on which device weights are.
"""

from __future__ import annotations

from .lean import lean_decoder, lean_encoder

__all__ = ["lean_decoder", "lean_encoder"]
