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
from spmd_infer.checkpoints.copying import BUDGET_BYTES, Advance, CopyPlan, copy_tensors, plan_copy, work_key
from spmd_infer.checkpoints.file_bytes import Scratch
from spmd_infer.checkpoints.folder_files import CONFIG_NAME
from spmd_infer.checkpoints.manifest import Chunk
from spmd_infer.checkpoints.native_writer import bands_of
from spmd_infer.checkpoints.output_file import OutputFile
from spmd_infer.checkpoints.pipeline import Pipeline
from spmd_infer.checkpoints.reader import Reader, TensorInfo
from spmd_infer.checkpoints.remote import is_remote
from spmd_infer.checkpoints.remote_target import OBJECT_BYTES
from spmd_infer.checkpoints.safetensors_reader import DTYPES, INDEX_NAME, SINGLE_NAME, SafetensorsReader
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


class _Writing:
    """One tensor on its way to its place in a file."""

    def __init__(self, info: TensorInfo, file: OutputFile, start: int, known: Collection[Box]) -> None:
        self._info, self._file, self._start = info, file, start
        self.bands = bands_of(info.shape, info.dtype, [(whole(info.shape), 0)], known)
        self.digests: dict[Box, str] = {}

    def put(self, band: Box, values: Array, known: Mapping[Box, Chunk] | None = None) -> None:
        """Write one band; see ``copying.Writing``."""
        self.put_blocks(band, (block for _, block in digests.blocks(digests.flat_bytes(values))), known)

    def streams(self, band: Box, dtype: np.dtype[Any]) -> bool:
        """Whether a band may be put block by block: always, it lies in one run; see ``copying.Writing``."""
        return dtype == self._info.dtype

    def put_blocks(
        self, band: Box, blocks: Iterable[npt.NDArray[np.uint8]], known: Mapping[Box, Chunk] | None = None
    ) -> None:
        """Write one band from its bytes; see ``copying.Writing``."""
        first = run_of(self._info.shape, band)
        assert first is not None
        offset = self._start + first * self._info.dtype.itemsize
        same = known[band].blake3 if known and band in known else ""
        digest = digests.new("blake3")
        for block in blocks:
            if not same:
                digest.update(block.data)
            self._file.write(block, offset)
            offset += block.size
        self.digests[band] = same or digest.hexdigest()


class SafetensorsSink:
    """Tensors into the files of a work folder, each at its place; a journal notes their digests."""

    def __init__(self, work: Path, key: str, infos: Sequence[TensorInfo], shard_bytes: int = SHARD_BYTES) -> None:
        self._work = work
        self.shards = _plan(infos, shard_bytes)
        self._home = {name: shard for shard in self.shards for name in shard.starts}
        self._journal = Journal(work / JOURNAL_NAME, key, lambda: _empty(work))
        self.digests: dict[str, dict[Box, str]] = {}
        for step in self._journal.steps:
            found: Any = step["blake3"]
            self.digests[str(step["name"])] = {tuple((a, b) for a, b in band): digest for band, digest in found}
        self._files: dict[str, OutputFile] = {}
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

    def begin(self, info: TensorInfo, known: Mapping[Box, Chunk]) -> _Writing:
        """Begin to write one tensor."""
        shard = self._home[info.name]
        if shard.name not in self._files:
            self._files[shard.name] = OutputFile(self._work / shard.name)
        start = len(shard.header) + shard.starts[info.name]
        return _Writing(info, self._files[shard.name], start, known)

    def end(self, info: TensorInfo, writing: _Writing) -> None:
        """Note that one tensor is written."""
        self.digests[info.name] = writing.digests
        self._journal.add({"name": info.name, "blake3": list(writing.digests.items())})

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()

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
        sink = SafetensorsSink(work, key, infos, OBJECT_BYTES if is_remote(target) else SHARD_BYTES)
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
        if check:
            _check(work, sink.digests, advance, target)
    return plan


def _check(work: Path, wanted: Mapping[str, Mapping[Box, str]], advance: Advance, target: Path) -> None:
    written, scratch = SafetensorsReader(work), Scratch()

    def check(info: TensorInfo, band: Box) -> None:
        digest, blocks = digests.new("blake3"), written.stream(info.name, band, scratch)
        assert blocks is not None  # a band lies in one run
        for block in blocks:
            digest.update(block.data)
        if digest.hexdigest() != wanted[info.name][band]:
            raise CheckpointError(
                f"{target}: tensor {info.name!r} differs from what was written; the disk or memory may be failing"
            )

    with Pipeline(BUDGET_BYTES, "checkpoint-check") as line:
        for info in written.tensors.values():
            for band in wanted[info.name]:
                line.run(elements(band) * info.dtype.itemsize, partial(check, info, band))
            line.then(partial(advance, info.nbytes))


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
