"""Which kind of input a path is."""

from __future__ import annotations

from pathlib import Path

from spmd_infer.errors import BatchError
from spmd_infer.jobs.files import ARRAYS, PICTURES, ArrayFiles, PictureFiles, files_below
from spmd_infer.jobs.jsonl import JsonLines, looks_like_openai
from spmd_infer.jobs.parquet import ParquetRows
from spmd_infer.jobs.rows import Source

FORMATS = ("jsonl", "openai", "parquet", "arrays", "images")


def format_of(path: Path) -> str:
    """The format that a file's suffix, or a folder's content, speaks for.

    Raises:
        BatchError: there is nothing there, or it is of no known kind.
    """
    if not path.exists():
        raise BatchError(f"{path}: there is no such file or folder")
    suffix = path.suffix.lower()
    if path.is_dir():
        found = [kind for kind, suffixes in (("arrays", ARRAYS), ("images", PICTURES)) if files_below(path, suffixes)]
        if len(found) == 1:
            return found[0]
        what = "both arrays and pictures" if found else "neither arrays (.npy, .npz) nor pictures"
        raise BatchError(f"{path} holds {what}; say which with --format, or give a JSONL or Parquet file")
    if suffix in (".jsonl", ".ndjson"):
        return "openai" if looks_like_openai(path) else "jsonl"
    for kind, suffixes in (("parquet", {".parquet", ".pq"}), ("arrays", ARRAYS), ("images", PICTURES)):
        if suffix in suffixes:
            return kind
    raise BatchError(
        f"{path}: expected .jsonl, .parquet, .npy, .npz, a picture, or a folder of arrays or pictures; "
        "say what it is with --format"
    )


def open_source(path: Path, kind: str, column: str | None) -> Source:
    """The rows of a file or folder.

    Args:
        path: the file or folder.
        kind: one of ``FORMATS``.
        column: the one column that is needed; None for all.

    Raises:
        BatchError: it cannot be read, or is of another format.
    """
    if kind == "parquet":
        return ParquetRows(path, None if column is None else [column])
    if kind == "arrays":
        return ArrayFiles(path)
    if kind == "images":
        return PictureFiles(path)
    if kind not in FORMATS:
        raise BatchError(f"format {kind!r}: expected one of {', '.join(FORMATS)}")
    return JsonLines(path, "custom_id" if kind == "openai" else "id")
