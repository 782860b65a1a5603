"""A checkpoint made in an object store: staged on the local disk, uploaded, and there once its last object is.

Objects cannot be renamed, but a checkpoint does not exist before its manifest (or, for a Hugging Face folder, its index
or its only file) does: that one is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from spmd_infer.checkpoints.pipeline import Pipeline
from spmd_infer.checkpoints.remote import keys_of, open_store
from spmd_infer.errors import CheckpointError

OBJECT_BYTES = 256 << 20
"""A data file for an object store that has reached this size is followed by another: each is sent from memory."""

_LOCK = ".spmd-infer-lock.json"
_LAST = ("manifest.json", "model.safetensors.index.json", "model.safetensors")


def staging_folder(url: str) -> Path:
    """Where a remote checkpoint is made before it is uploaded, the same for every run of this user."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"spmd-infer-staging-{os.getuid()}" / name


@contextmanager
def remote_lock(url: str, what: str) -> Iterator[Any]:
    """Hold the lock of a remote place, an object that only one writer can make.

    Raises:
        CheckpointError: another process holds it, or has left it; says which, and what to do.
    """
    store = open_store(url)
    holder = {"what": what, "process": os.getpid(), "host": socket.gethostname()}
    try:
        found = store.read(_LOCK).result()
        if found.state == "value" and not _left_behind(found.value):
            raise CheckpointError(
                f"{url}: cannot {what}: it is being written by {found.value[:200].decode('utf-8', 'replace')}; if that "
                f"process is no more, delete {url}/{_LOCK}"
            )
        made = store.write(_LOCK, json.dumps(holder).encode(), if_equal=found.stamp.generation).result()
        if made.generation == b"":
            raise CheckpointError(f"{url}: cannot {what}: another process has just begun to write it")
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{url}: {what} failed: {error}") from error
    try:
        yield store
    finally:
        store.write(_LOCK, None).result()


def upload(work: Path, store: Any, url: str, what: str) -> None:
    """Send a folder's files, and those last that make it a checkpoint.

    Raises:
        CheckpointError: an object could not be written; the checkpoint then does not exist.
    """
    files = [path.relative_to(work).as_posix() for path in sorted(work.rglob("*")) if path.is_file()]

    def send(name: str) -> None:
        try:
            store.write(name, (work / name).read_bytes()).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{url}: {what} failed: {name} could not be written: {error}") from error

    with Pipeline(2 * OBJECT_BYTES, "checkpoint-upload") as line:
        for name in files:
            if name not in _LAST:
                line.run((work / name).stat().st_size, partial(send, name))
    for name in reversed(_LAST):
        if name in files:
            send(name)


def refuse_existing(store: Any, url: str) -> None:
    """Refuse a place that holds a checkpoint: objects cannot be replaced all at once."""
    there = [key for key in keys_of(store, url) if key in _LAST or key.endswith(".safetensors")]
    if there:
        raise CheckpointError(
            f"{url}: exists ({there[0]}); choose another name, or delete it first: in an object store a checkpoint "
            f"cannot be replaced in one step"
        )


def clear(work: Path) -> None:
    """Remove what was staged."""
    shutil.rmtree(work, ignore_errors=True)


def _left_behind(holder: bytes) -> bool:
    """Whether a lock's holder ran on this host and is no more."""
    try:
        found = json.loads(holder)
        if found["host"] != socket.gethostname():
            return False
        os.kill(int(found["process"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, PermissionError):
        return False
    return False
