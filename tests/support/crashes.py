"""The end of a process, without one."""

from __future__ import annotations


class Crash(BaseException):
    """Stands for a process that ends: nothing may catch it."""
