"""Checkpoints: reading, writing, converting and checking them; used as ``spmd_infer.checkpoints``.

Names are imported when they are first used: looking into a checkpoint does not need JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "spmd_infer.checkpoints":
    raise ImportError(
        f"this package is 'spmd_infer.checkpoints', not {__name__!r}: write 'import spmd_infer.checkpoints'"
    )

if TYPE_CHECKING:
    from spmd_infer.checkpoints.background import Saving, save_async
    from spmd_infer.checkpoints.formats import Format, open_checkpoint
    from spmd_infer.checkpoints.loading import load_onto, unused_tensors
    from spmd_infer.checkpoints.reader import Index, Reader, TensorInfo
    from spmd_infer.checkpoints.saving import save
    from spmd_infer.checkpoints.verifying import verify

_HOME = {
    "Format": "formats",
    "Index": "reader",
    "Reader": "reader",
    "Saving": "background",
    "TensorInfo": "reader",
    "load_onto": "loading",
    "open_checkpoint": "formats",
    "save": "saving",
    "save_async": "background",
    "unused_tensors": "loading",
    "verify": "verifying",
}

__all__ = [
    "Format",
    "Index",
    "Reader",
    "Saving",
    "TensorInfo",
    "load_onto",
    "open_checkpoint",
    "save",
    "save_async",
    "unused_tensors",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
