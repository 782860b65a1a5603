"""One checkpoint written by several processes: who writes which tensors, and how the first learns what the others did.

They meet in the work folder, which must be on storage that all of them share. The first process makes it and says in
``run.json`` what the work is; each of the others then holds a lock for its share while it works, and leaves a file that
says what it wrote. The first waits for those files. A process that was killed is started again with the same command.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from spmd_infer.checkpoints.manifest import ArrayEntry, StoredFile
from spmd_infer.checkpoints.target_folder import is_locked
from spmd_infer.errors import CheckpointError

PATIENCE_SECONDS = 60.0
"""How long to wait for a process that is not there before giving up."""

_RUN_NAME = "run.json"
_POLL_SECONDS = 0.1


class Part(msgspec.Struct):
    """What one process has written: its share of the arrays, and its files."""

    arrays: dict[str, ArrayEntry]
    data: list[StoredFile]


def joined(parts: Sequence[Part]) -> Part:
    """All processes' parts as one; boxes of one array that several of them wrote are put together."""
    entries: dict[str, ArrayEntry] = {}
    data: list[StoredFile] = []
    for part in parts:
        for name, entry in part.arrays.items():
            moved = [msgspec.structs.replace(chunk, file=chunk.file + len(data)) for chunk in entry.chunks]
            before = entries[name].chunks if name in entries else ()
            entries[name] = msgspec.structs.replace(entry, chunks=(*before, *moved))
        data.extend(part.data)
    return Part(entries, data)


@dataclass(frozen=True)
class Share:
    """Which of how many processes this is.

    Attributes:
        index: counted from 0; the first puts everything together.
        count: how many there are.
        patience: seconds to wait for a process that is not running.
    """

    index: int = 0
    count: int = 1
    patience: float = PATIENCE_SECONDS

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise CheckpointError(f"process {self.index} of {self.count}: expected one from 0 to {self.count - 1}")

    @property
    def journal(self) -> str:
        """The name of this process's journal."""
        return f"journal-{self.index:05d}.jsonl"

    def names(self, sizes: Mapping[str, int]) -> set[str]:
        """The tensors that are this process's: neighbours, with about the same number of bytes for each process."""
        total, before, mine = sum(sizes.values()) or 1, 0, set()
        for name, nbytes in sizes.items():
            if min(self.count - 1, (2 * before + nbytes) * self.count // (2 * total)) == self.index:
                mine.add(name)
            before += nbytes
        return mine

    def clear(self, work: Path) -> None:
        """Remove what other work left in the folder; the first process does."""
        if self.index:
            return
        (work / _RUN_NAME).unlink(missing_ok=True)  # first, so that nobody takes the rest for this work's
        for item in work.iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()

    def announce(self, work: Path, key: str) -> None:
        """Have the others begin, now that the folder holds nothing but this work."""
        (work / _RUN_NAME).write_text(json.dumps({"key": key, "processes": self.count}) + "\n")

    def await_announcement(self, work: Path, key: str) -> None:
        """Wait for the first process to make the folder.

        Raises:
            CheckpointError: it has not done so in time, or has begun other work there.
        """
        wanted = {"key": key, "processes": self.count}
        found: object = None

        def announced() -> bool:
            nonlocal found
            try:
                found = json.loads((work / _RUN_NAME).read_bytes())
            except (OSError, ValueError):
                found = None
            return found == wanted

        if not _wait(announced, self.patience):
            raise CheckpointError(
                f"{work}: process 0 of {self.count} has not begun within {self.patience:.0f} s"
                + ("; other work is in its folder" if found is not None else "")
            )

    def lock_path(self, work: Path) -> Path:
        """What is locked while this process works."""
        return work / f"share-{self.index:05d}"

    def post(self, work: Path, part: Part) -> None:
        """Leave word of what was written."""
        file = work / f"part-{self.index:05d}.json"
        partial = file.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(part))
        partial.replace(file)

    def collect(self, work: Path) -> list[Part]:
        """Wait for the other processes, and take their word files away.

        Raises:
            CheckpointError: one of them is neither done nor at work.
        """
        others = [Share(index, self.count) for index in range(1, self.count)]
        files = {share.index: work / f"part-{share.index:05d}.json" for share in others}
        seen = {share.index: time.monotonic() for share in others}

        def settled() -> bool:
            missing = [share for share in others if not files[share.index].exists()]
            for share in missing:
                if is_locked(share.lock_path(work)):
                    seen[share.index] = time.monotonic()
            lost = [share.index for share in missing if time.monotonic() - seen[share.index] > self.patience]
            if lost:
                raise CheckpointError(
                    f"{work}: {len(lost)} of {self.count} processes are neither done nor at work: "
                    f"{', '.join(map(str, lost))}; start them, and this one, again with the same command"
                )
            return not missing

        _wait(settled, None)
        parts = [msgspec.json.decode(file.read_bytes(), type=Part) for file in files.values()]
        for file in files.values():
            file.unlink()
        (work / _RUN_NAME).unlink(missing_ok=True)
        for journal in work.glob("journal-*.jsonl"):
            journal.unlink()
        return parts


def _wait(until: Callable[[], bool], seconds: float | None) -> bool:
    begin = time.monotonic()
    while not until():
        if seconds is not None and time.monotonic() - begin > seconds:
            return False
        time.sleep(_POLL_SECONDS)
    return True
