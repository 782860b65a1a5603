"""Writing Hugging Face folders: safetensors files, their index, ``config.json`` and the files beside them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, pieces, whole
from spmd_infer.checkpoints.copying import Advance, CopyPlan, copy_tensors, plan_copy, work_key
from spmd_infer.checkpoints.folder_files import CONFIG_NAME
from spmd_infer.checkpoints.reader import Reader, TensorInfo
from spmd_infer.checkpoints.safetensors_reader import DTYPES, INDEX_NAME, SINGLE_NAME, SafetensorsReader
from spmd_infer.checkpoints.side_files import copy_side_files
from spmd_infer.checkpoints.target_folder import Journal, check_space, new_folder
from spmd_infer.errors import CheckpointError

SHARD_BYTES = 5_000_000_000
"""The most bytes of tensors in one file; a larger tensor gets a file to itself."""

JOURNAL_NAME = "journal.jsonl"
_PIECE_BYTES = 16 << 20
_CHECKERS = 4
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Shard:
    """One file: its name, header, and where each tensor begins."""

    name: str
    header: bytes
    starts: Mapping[str, int]
    nbytes: int


class SafetensorsSink:
    """Tensors into the files of a work folder, each at its place; a journal notes their digests."""

    def __init__(self, work: Path, key: str, infos: Sequence[TensorInfo]) -> None:
        self._work = work
        self.shards = _plan(infos)
        self._home = {name: shard for shard in self.shards for name in shard.starts}
        self._journal = Journal(work / JOURNAL_NAME, key, lambda: _empty(work))
        self.digests: dict[str, str] = {str(step["name"]): str(step["sha256"]) for step in self._journal.steps}
        for shard in self.shards:
            path = work / shard.name
            if not path.exists():
                with path.open("wb") as file:
                    file.write(shard.header)
                    file.truncate(len(shard.header) + shard.nbytes)

    @property
    def done(self) -> set[str]:
        """Tensors that need not be written again."""
        return set(self.digests)

    def write(self, info: TensorInfo, values: Callable[[Box], Array]) -> None:
        """Write one tensor."""
        shard, digest = self._home[info.name], hashlib.sha256()
        descriptor = os.open(self._work / shard.name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            offset = len(shard.header) + shard.starts[info.name]
            with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-write") as writing:
                for piece in _pieces(info):
                    raw = np.ascontiguousarray(values(piece)).reshape(-1).view(np.uint8).data
                    written = writing.submit(_write, descriptor, raw, offset)
                    digest.update(raw)
                    written.result()
                    offset += len(raw)
        finally:
            os.close(descriptor)
        self.digests[info.name] = digest.hexdigest()
        self._journal.add({"name": info.name, "sha256": self.digests[info.name]})

    def end(self) -> None:
        """Write the index, where there are several files, and remove the journal."""
        if len(self.shards) > 1:
            total = sum(shard.nbytes for shard in self.shards)
            weight_map = {name: shard.name for shard in self.shards for name in shard.starts}
            document = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._work / INDEX_NAME).write_text(json.dumps(document, indent=2) + "\n")
        self._journal.end()


def store_hugging_face(
    reader: Reader,
    target: Path,
    *,
    overwrite: bool = False,
    check: bool = True,
    advance: Advance = lambda count: None,
) -> CopyPlan:
    """Write a checkpoint as a Hugging Face folder, tensor by tensor.

    A run that is killed is taken up by the next one with the same source and options.

    Args:
        reader: what to write, under Hugging Face names; its ``config`` becomes ``config.json``.
        target: the new folder.
        overwrite: replace what is at the target.
        check: read everything again at the end and compare.
        advance: called with bytes as they are written, then as they are checked.

    Raises:
        CheckpointError: the source is damaged, a tensor's dtype is one that safetensors does not have, the disk too
            small or not writable, or what was written differs.
    """
    plan = plan_copy(reader)
    infos = list(reader.tensors.values())
    key = work_key(reader, {"format": "safetensors", "config": dict(reader.config)})
    with new_folder(target, "convert", overwrite=overwrite, resumable=True) as work:
        sink = SafetensorsSink(work, key, infos)
        left = sum(info.size * info.dtype.itemsize for info in infos if info.name not in sink.done)
        check_space(work, left)
        copy_tensors(reader, sink, advance)
        sink.end()
        if reader.config:
            (work / CONFIG_NAME).write_text(json.dumps(dict(reader.config), indent=2) + "\n")
        copy_side_files(reader.folder, work)
        if check:
            _check(work, sink.digests, advance, target)
    return plan


def _check(work: Path, digests: Mapping[str, str], advance: Advance, target: Path) -> None:
    written = SafetensorsReader(work)

    def digest_of(info: TensorInfo) -> str:
        digest = hashlib.sha256()
        for piece in _pieces(info):
            values = written.read(info.name, tuple(slice(*bounds) for bounds in piece))
            digest.update(values.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    infos = list(written.tensors.values())
    with ThreadPoolExecutor(_CHECKERS, thread_name_prefix="checkpoint-check") as pool:
        for info, found in zip(infos, pool.map(digest_of, infos), strict=True):
            advance(info.nbytes)
            if found != digests.get(info.name):
                raise CheckpointError(
                    f"{target}: tensor {info.name!r} differs from what was written; the disk or memory may be failing"
                )


def _write(descriptor: int, raw: memoryview, offset: int) -> None:
    done = 0
    while done < len(raw):
        done += os.pwrite(descriptor, raw[done:], offset + done)


def _pieces(info: TensorInfo) -> list[Box]:
    return list(pieces(whole(info.shape), info.dtype.itemsize, _PIECE_BYTES))


def _plan(infos: Sequence[TensorInfo]) -> list[_Shard]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if info.dtype not in _NAMES:
            raise CheckpointError(f"tensor {info.name!r} is {info.dtype.name}, which safetensors files cannot hold")
        nbytes = info.size * info.dtype.itemsize
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += nbytes
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE_NAME]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, infos: Sequence[TensorInfo]) -> _Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, offset = {}, 0
    for info in sorted(infos, key=lambda item: -item.dtype.itemsize):  # wide numbers first: all stay aligned
        nbytes = info.size * info.dtype.itemsize
        header[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        starts[info.name], offset = offset, offset + nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _Shard(name, len(text).to_bytes(8, "little") + text, starts, offset)


def _empty(work: Path) -> None:
    for item in work.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
