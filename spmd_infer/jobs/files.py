"""Rows of a folder: pictures, one a file; arrays, as many rows to a file as their first dimension has."""

from __future__ import annotations

import zipfile
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from spmd_infer.errors import BatchError
from spmd_infer.jobs.rows import Row, file_fingerprint, files_fingerprint

PICTURES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
ARRAYS = frozenset((".npy", ".npz"))

LONE = ""
"""The name of the one array in a .npy file."""


def files_below(path: Path, suffixes: frozenset[str]) -> list[Path]:
    """The files with these suffixes in a folder and the folders below it, sorted; or the one file itself."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())


class PictureFiles:
    """A folder of pictures; a row's value is its file's path, its id the path below the folder.

    Args:
        folder: the folder, or one picture.
    """

    format = "images"

    def __init__(self, folder: Path) -> None:
        self._folder = folder if folder.is_dir() else folder.parent
        self._files = files_below(folder, PICTURES)

    def scan(self) -> Iterator[tuple[int, Row]]:
        """Every row in order, each with its place."""
        for index in range(len(self._files)):
            yield index, self._row(index)

    def read(self, first: int, count: int, place: int) -> list[Row]:
        """Some consecutive rows."""
        return [self._row(index) for index in range(first, first + count)]

    def fingerprint(self) -> str:
        """Another one where the content is another."""
        return files_fingerprint(self._folder, self._files)

    def _row(self, index: int) -> Row:
        file = self._files[index]
        return Row(index, str(file), file.relative_to(self._folder).as_posix())


class ArrayFiles:
    """A folder of .npy and .npz files, rows along the first dimension; or one such file.

    A row's value holds one array for each name in its .npz file; that of a .npy file has the name ``LONE``.

    Args:
        folder: the folder, or one file.
    """

    format = "arrays"

    def __init__(self, folder: Path) -> None:
        self._folder = folder if folder.is_dir() else folder.parent
        self._files = files_below(folder, ARRAYS)
        self._counts = [_rows_of(file) for file in self._files]
        self._ends = list(accumulate(self._counts))
        self._held: tuple[int, dict[str, npt.NDArray[Any]]] = (-1, {})

    def scan(self) -> Iterator[tuple[int, Row]]:
        """Every row in order, each with its place."""
        for index in range(self._ends[-1] if self._ends else 0):
            yield index, self._row(index)

    def read(self, first: int, count: int, place: int) -> list[Row]:
        """Some consecutive rows."""
        return [self._row(index) for index in range(first, first + count)]

    def fingerprint(self) -> str:
        """Another one where the content is another."""
        if len(self._files) == 1:
            return file_fingerprint(self._files[0])
        return files_fingerprint(self._folder, self._files)

    def _row(self, index: int) -> Row:
        number = bisect_right(self._ends, index)
        within = index - (self._ends[number] - self._counts[number])
        name = f"{self._files[number].relative_to(self._folder).as_posix()}:{within}"
        try:
            arrays = self._arrays(number)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            return Row(index, None, name, f"{self._files[number]} cannot be read: {error}")
        return Row(index, {key: array[within] for key, array in arrays.items()}, name)

    def _arrays(self, number: int) -> dict[str, npt.NDArray[Any]]:
        """A file's arrays; those of the last file are kept, since units follow each other in it."""
        if self._held[0] != number:
            file = self._files[number]
            if file.suffix.lower() == ".npy":
                arrays = {LONE: np.load(file, mmap_mode="r", allow_pickle=False)}
            else:
                with np.load(file, allow_pickle=False) as loaded:
                    arrays = {name: loaded[name] for name in loaded.files}
            self._held = (number, arrays)
        return self._held[1]


def _rows_of(file: Path) -> int:
    """How many rows a file has, from its headers.

    Raises:
        BatchError: it does not hold plain arrays, or their first dimensions differ.
    """
    try:
        if file.suffix.lower() == ".npy":
            with file.open("rb") as content:
                shapes = {LONE: _shape(content)}
        else:
            with zipfile.ZipFile(file) as archive:
                shapes = {}
                for name in archive.namelist():
                    with archive.open(name) as member:
                        shapes[name.removesuffix(".npy")] = _shape(member)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BatchError(f"{file} does not hold plain arrays in NumPy's .npz or .npy format: {error}") from error
    rows = {shape[0] if shape else None for shape in shapes.values()}
    if len(rows) != 1 or None in rows:
        raise BatchError(f"the arrays of {file} must have as many rows each, in their first dimension; got {shapes}")
    (count,) = rows
    assert count is not None
    return count


def _shape(file: IO[bytes]) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape
