"""The native library of the CPU: where it lies and whether it is there."""

from __future__ import annotations

import ctypes


def why_not_built() -> str | None:
    """Why there is no native library for this machine, or None."""
    return "it is not built: run `sparseprefill build-cpu`, once on this machine (it needs a C++ compiler)"


def library() -> ctypes.CDLL | None:
    """The library of this machine, if it is built."""
    return None
