"""Saving while the program goes on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import jax

from spmd_infer.checkpoints.manifest import ModelEntry
from spmd_infer.checkpoints.reader import Reader
from spmd_infer.checkpoints.saving import check_arrays, save
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Axes


class Saving:
    """A save under way. The interpreter does not exit before it has ended."""

    def __init__(self, path: Path, thread: threading.Thread, failure: list[BaseException]) -> None:
        self.path = path
        self._thread, self._failure = thread, failure

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is whole, under its name and on the disk.

        Args:
            timeout: seconds to wait at most.

        Raises:
            CheckpointError: it could not be saved, for the reasons that ``save`` gives; or it has not ended in time.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise CheckpointError(f"{self.path}: is still being saved after {timeout} s")
        if self._failure:
            raise self._failure[0]


def save_async(
    params: Mapping[str, jax.Array],
    path: str | Path,
    *,
    axes: Mapping[str, Axes] | None = None,
    model: ModelEntry | None = None,
    source: Reader | None = None,
    overwrite: bool = False,
) -> Saving:
    """Begin to save arrays as they are now, and return at once; see ``save`` for the arguments.

    Arrays cannot change, so none is copied: they are held until the save has ended. An array that is donated to a
    computation before that is gone, and the save fails. In a job of several processes all of them call this.

    Returns:
        What to wait for.

    Raises:
        CheckpointError: something in ``params`` cannot be saved. What goes wrong later is raised by ``Saving.wait``.
    """
    check_arrays(params)
    held, failure = dict(params), list[BaseException]()

    def run() -> None:
        try:
            save(held, path, axes=axes, model=model, source=source, overwrite=overwrite)
        except RuntimeError as error:  # what JAX says of a deleted array
            gone = sorted(name for name, array in held.items() if array.is_deleted())
            named = f"{', '.join(gone[:4])} donated to a computation before it was saved" if gone else str(error)
            failure.append(CheckpointError(f"{path}: save failed: {named}"))
        except BaseException as error:  # raised again by whoever waits
            failure.append(error)
        finally:
            held.clear()

    thread = threading.Thread(target=run, name=f"save {path}")
    thread.start()
    return Saving(Path(path), thread, failure)
