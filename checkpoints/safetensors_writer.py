"""Writing Hugging Face folders: safetensors files, their index, ``config.json`` and the files beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import digests
from spmd_infer.checkpoints.boxes import Box, elements, run_of, whole
from spmd_infer.checkpoints.copying import Advance, Check, CopyPlan, copy_tensors, damaged_before, plan_copy, work_key
from spmd_infer.checkpoints.folder_files import CONFIG_NAME
from spmd_infer.checkpoints.manifest import Chunk
from spmd_infer.checkpoints.native_writer import bands_of
from spmd_infer.checkpoints.output_files import OutputFiles
from spmd_infer.checkpoints.reader import Reader, TensorInfo
from spmd_infer.checkpoints.remote import is_remote
from spmd_infer.checkpoints.remote_target import OBJECT_BYTES
from spmd_infer.checkpoints.safetensors_reader import DTYPES, INDEX_NAME, SINGLE_NAME
from spmd_infer.checkpoints.side_files import copy_side_files
from spmd_infer.checkpoints.target_folder import Journal, check_space, new_folder
from spmd_infer.errors import CheckpointError

SHARD_BYTES = 5_000_000_000
"""The most bytes of tensors in one file; a larger tensor gets a file to itself."""

JOURNAL_NAME = "journal.jsonl"
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Shard:
    """One file: its name, header, and where each tensor begins."""

    name: str
    header: bytes
    starts: Mapping[str, int]
    nbytes: int

    def place(self, info: TensorInfo, band: Box) -> int:
        """Where in the file a box of a tensor begins that lies in one run."""
        first = run_of(info.shape, band)
        assert first is not None
        return len(self.header) + self.starts[info.name] + first * info.dtype.itemsize


class _Writing:
    """One tensor on its way to its place in a file."""

    def __init__(self, info: TensorInfo, files: OutputFiles, shard: _Shard, known: Collection[Box]) -> None:
        self._info, self._files, self._shard = info, files, shard
        self.bands = bands_of(info.shape, info.dtype, [(whole(info.shape), 0)], known)
        self.digests: dict[Box, str] = {}

    def put(self, band: Box, values: Array, known: Mapping[Box, Chunk] | None = None) -> None:
        """Write one band; see ``copying.Writing``."""
        self.put_blocks(band, (block for _, block in digests.blocks(digests.flat_bytes(values))))

    def streams(self, band: Box, dtype: np.dtype[Any]) -> bool:
        """Whether a band may be put block by block: always, it lies in one run; see ``copying.Writing``."""
        return dtype == self._info.dtype

    def put_blocks(
        self, band: Box, blocks: Iterable[npt.NDArray[np.uint8]], known: Mapping[Box, Chunk] | None = None
    ) -> None:
        """Write one band from its bytes; see ``copying.Writing``."""
        begin = self._shard.place(self._info, band)
        same = known[band].blake3 if known and band in known else ""
        digest = digests.new("blake3")
        offset = begin
        for block in blocks:
            if not same:
                digest.update(block.data)
            self._files.write_compared(self._shard.name, offset, block, self._info.name)
            offset += block.size
        self._files.let_go(self._shard.name, begin, offset - begin)
        self.digests[band] = same or digest.hexdigest()


class SafetensorsSink:
    """Tensors into the files of a work folder, each at its place; a journal notes their digests."""

    def __init__(
        self, work: Path, key: str, infos: Sequence[TensorInfo], shard_bytes: int = SHARD_BYTES, keep: bool = False
    ) -> None:
        self._work = work
        self.shards = _plan(infos, shard_bytes)
        self._home = {name: shard for shard in self.shards for name in shard.starts}
        self._journal = Journal(work / JOURNAL_NAME, key, lambda: _empty(work))
        self.digests: dict[str, dict[Box, str]] = {}
        for step in self._journal.steps:
            found: Any = step["blake3"]
            self.digests[str(step["name"])] = {tuple((a, b) for a, b in band): digest for band, digest in found}
        self._files = OutputFiles(work, keep=keep)
        self._before = dict(self.digests)
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

    def checks(self, info: TensorInfo) -> list[Check]:
        """Compare what a run before wrote of a tensor; see ``copying.Sink``."""
        itemsize = info.dtype.itemsize
        return [
            (elements(band) * itemsize, partial(self._check, info, band, blake3))
            for band, blake3 in self._before[info.name].items()
        ]

    def _check(self, info: TensorInfo, band: Box, blake3: str) -> None:
        shard, nbytes = self._home[info.name], elements(band) * info.dtype.itemsize
        try:
            self._files.check(shard.name, shard.place(info, band), nbytes, blake3, info.name)
        except CheckpointError as error:
            raise damaged_before(error, self._work) from error

    def begin(self, info: TensorInfo, known: Mapping[Box, Chunk]) -> _Writing:
        """Begin to write one tensor."""
        return _Writing(info, self._files, self._home[info.name], known)

    def end(self, info: TensorInfo, writing: _Writing) -> None:
        """Note that one tensor is written."""
        self.digests[info.name] = writing.digests
        self._journal.add({"name": info.name, "blake3": list(writing.digests.items())})

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def finish(self) -> None:
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
    advance: Advance = lambda count: None,
) -> CopyPlan:
    """Write a checkpoint as a Hugging Face folder, tensor by tensor.

    A run that is killed is taken up by the next one with the same source and options. What is written is read again and
    compared as in ``native_store.store``.

    Args:
        reader: what to write, under Hugging Face names; its ``config`` becomes ``config.json``.
        target: the new folder.
        overwrite: replace what is at the target.
        advance: called with bytes of the source as they are done.

    Raises:
        CheckpointError: the source is damaged, a tensor's dtype is one that safetensors does not have, the disk too
            small or not writable, or what was written differs.
    """
    plan = plan_copy(reader)
    infos = list(reader.tensors.values())
    key = work_key(reader, {"format": "safetensors", "config": dict(reader.config)})
    with new_folder(target, "convert", overwrite=overwrite, resumable=True) as work:
        remote = is_remote(target)
        sink = SafetensorsSink(work, key, infos, OBJECT_BYTES if remote else SHARD_BYTES, remote)
        left = sum(info.size * info.dtype.itemsize for info in infos if info.name not in sink.done)
        check_space(work, left)
        try:
            copy_tensors(reader, sink, advance)
        finally:
            sink.close()
        sink.finish()
        if reader.config:
            (work / CONFIG_NAME).write_text(json.dumps(dict(reader.config), indent=2) + "\n")
        copy_side_files(reader.folder, work)
    return plan


def _plan(infos: Sequence[TensorInfo], shard_bytes: int) -> list[_Shard]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if info.dtype not in _NAMES:
            raise CheckpointError(f"tensor {info.name!r} is {info.dtype.name}, which safetensors files cannot hold")
        nbytes = info.size * info.dtype.itemsize
        if groups[-1] and size + nbytes > shard_bytes:
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
