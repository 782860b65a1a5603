"""A folder or file that appears under its final name only when it is whole.

Work is done in a hidden folder beside the target, under a lock that the kernel gives back when its holder dies. What a
killed holder left behind is taken up by the next one where it can be, and cleared away where it cannot.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spmd_infer.checkpoints.remote import is_remote, url_of
from spmd_infer.checkpoints.remote_target import clear, refuse_existing, remote_lock, staging_folder, upload
from spmd_infer.errors import CheckpointError


def work_folder(target: Path) -> Path:
    """Where a target is made; on the same file system, so that it can be renamed."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def new_folder(target: Path, what: str, *, overwrite: bool = False, resumable: bool = False) -> Iterator[Path]:
    """Make a folder that appears whole or not at all.

    Args:
        target: the final name.
        what: what is being done, for the lock and for messages: ``"save"``.
        overwrite: replace what is at the target; otherwise an existing one is refused.
        resumable: keep the work of a run that failed or was killed, for the next one to go on with.

    Yields:
        The folder to write in, empty unless ``resumable``. On leaving, its files are flushed to the disk and it is
        renamed.

    Raises:
        CheckpointError: the target exists, another process is making it, or writing failed. A checkpoint that was there
            before is then as it was.
    """
    if is_remote(target):
        with _new_remote(url_of(target), what, overwrite, resumable) as work:
            yield work
        return
    target = target.absolute()
    with locked(target, what), described(target, what, work_folder(target) if resumable else None):
        _restore(target)
        if os.path.lexists(target) and not overwrite:
            raise CheckpointError(f"{target}: exists; choose another name, delete it, or allow it to be overwritten")
        work = work_folder(target)
        if work.exists() and not resumable:
            shutil.rmtree(work)
        work.mkdir(exist_ok=True)
        try:
            yield work
            flush_tree(work)
        except BaseException:
            if not resumable:
                shutil.rmtree(work, ignore_errors=True)
            raise
        replace(work, target)


@contextmanager
def _new_remote(url: str, what: str, overwrite: bool, resumable: bool) -> Iterator[Path]:
    work = staging_folder(url)
    work.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(work, what), described(work, what), remote_lock(url, what) as store:
        refuse_existing(store, url)
        if overwrite:
            raise CheckpointError(f"{url}: in an object store nothing can be overwritten in one step; delete it first")
        if work.exists() and not resumable:
            clear(work)
        work.mkdir(exist_ok=True)
        try:
            yield work
            upload(work, store, url, what)
        except BaseException:
            if not resumable:
                clear(work)
            raise
        clear(work)


def work_parent(target: Path) -> Path:
    """The nearest folder that is there, on the disk that a target is made on."""
    place = staging_folder(url_of(target)) if is_remote(target) else target.absolute()
    return next(folder for folder in place.parents if folder.exists())


def replace(work: Path, target: Path) -> None:
    """Give finished work its final name; what was there before is removed afterwards."""
    old = _replaced(target)
    if os.path.lexists(target):
        target.rename(old)
    work.rename(target)
    flush(target.parent)
    _remove(old)


@contextmanager
def described(target: Path, what: str, kept: Path | None = None) -> Iterator[None]:
    """Turn the operating system's errors while writing into ``CheckpointError``.

    Args:
        target: what is being made.
        what: what is being done.
        kept: where the work done so far is kept, so that the user may go on or throw it away.
    """
    try:
        yield
    except OSError as error:
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(target.parent).free} bytes are free there"
        place = error.filename or target
        rest = (
            f"; what was done is kept in {kept}: the same command goes on from there" if kept and kept.exists() else ""
        )
        raise CheckpointError(f"{target}: {what} failed: {place}: {error.strerror or error}{free}{rest}") from error


@contextmanager
def locked(target: Path, what: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a target.

    Args:
        target: what is locked; it need not exist.
        what: what is being done.
        patience: seconds to wait for another holder.

    Raises:
        CheckpointError: another process holds it; says which.
    """
    path = _lock_file(target)
    give_up = time.monotonic() + patience
    with described(target, what):
        while True:
            try:
                descriptor = _take(path, target, what)
                break
            except CheckpointError:
                if time.monotonic() >= give_up:
                    raise
                time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def is_locked(target: Path) -> bool:
    """Whether anybody holds the lock of a target."""
    try:
        descriptor = os.open(_lock_file(target), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _take(path: Path, target: Path, what: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 4096).decode("utf-8", "replace") or "another process"
            os.close(descriptor)
            raise CheckpointError(f"{target}: cannot {what}: it is being written by {holder}") from None
        try:
            same = path.stat().st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(descriptor)  # its last holder removed it between our opening and locking it
    os.ftruncate(descriptor, 0)
    text = f"{what}, process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.pwrite(descriptor, text.encode(), 0)
    return descriptor


def flush_tree(folder: Path) -> None:
    """Have the disk hold every file of a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush(path)
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        flush(path)


def flush(path: Path) -> None:
    """Have the disk hold one file, or the names in one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin where the disk has too little room.

    Raises:
        CheckpointError: says how much is needed and how much is free.
    """
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(f"{target}: needs {needed} bytes, but only {free} are free on its disk")


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _restore(target: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = _replaced(target)
    if os.path.lexists(old):
        if os.path.lexists(target):
            _remove(old)
        else:
            old.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Journal:
    """What has been done of a resumable piece of work, one JSON line a step; a line that was cut off does not count.

    Args:
        path: the file.
        key: identifies the work: a journal of other work is discarded, after ``forget`` has cleared its results.
        forget: removes what the steps of other work left.
    """

    def __init__(self, path: Path, key: str, forget: Callable[[], None]) -> None:
        self.path = path
        self.steps: list[dict[str, object]] = []
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = [json.loads(line) for line in lines[:-1]]
        if not whole or whole[0] != {"key": key}:
            forget()
            path.write_text(json.dumps({"key": key}) + "\n")
        else:
            self.steps = whole[1:]
            with path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def add(self, step: dict[str, object]) -> None:
        """Note one step; what it did must be in the files by now."""
        with self.path.open("ab") as file:
            file.write(json.dumps(step).encode() + b"\n")
        self.steps.append(step)

    def end(self) -> None:
        """Remove the journal: the work is done."""
        self.path.unlink()
