"""Which class answers for each task: a table of names, so that the engine imports none of them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from spmd_infer.errors import TaskError

ENTRY_POINTS = "spmd_infer.tasks"
"""Entry-point group under which other packages add tasks."""

_OWN = {
    "embed": "spmd_infer.tasks.embed:Embed",
    "classify": "spmd_infer.tasks.classify:Classify",
    "generate": "spmd_infer.tasks.generate:Generate",
}


def needs_family(name: str) -> bool:
    """Whether a task answers only for families that name it; those of other packages see for themselves."""
    return name in _OWN


@runtime_checkable
class KeepsArrays(Protocol):
    """A task with arrays of its own on the devices."""

    def mesh_changed(self) -> None:
        """Lay them out anew, after the engine has moved to another mesh."""


@cache
def find_task(name: str) -> Any:
    """The class of a task; built with an engine, its instances are called with the task's input.

    Raises:
        TaskError: there is no such task.
    """
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        return getattr(import_module(module), attribute)
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            return entry.load()
    raise TaskError(f"there is no task {name!r}; there are {', '.join(_OWN)}")
