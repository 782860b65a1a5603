"""A job's output: results and failed rows, put together in the order of the input, each file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from spmd_infer.checkpoints.target_folder import flush
from spmd_infer.errors import JobError
from spmd_infer.jobs.folder import written
from spmd_infer.jobs.log import DoneAt

SUFFIXES = (".jsonl", ".parquet")


def check_suffix(output: Path, source_format: str) -> None:
    """Refuse an output that no format here has.

    Raises:
        JobError: says which there are.
    """
    if output.suffix not in SUFFIXES:
        raise JobError(f"{output}: the output must end in {' or '.join(SUFFIXES)}")
    if source_format == "openai" and output.suffix != ".jsonl":
        raise JobError(f"{output}: responses in OpenAI's batch format are written as .jsonl")
    if output.suffix == ".parquet":
        from spmd_infer.jobs.parquet import require_pyarrow

        require_pyarrow()


def encoder(output: Path) -> Callable[[Sequence[dict[str, Any]]], bytes]:
    """What makes bytes of a unit's results."""
    if output.suffix == ".parquet":
        from spmd_infer.jobs.parquet import encode_table

        return encode_table
    return json_lines


def json_lines(records: Sequence[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return b"".join(msgspec.json.encode(record, enc_hook=_plain) + b"\n" for record in records)


def put_together(output: Path, errors: Path, units: Sequence[DoneAt]) -> None:
    """Write the output from what the ranks have written, and the failed rows beside it where there are any.

    Args:
        output: the output; what was there before is replaced at the very end.
        errors: where failed rows go; removed where there are none.
        units: in the order of the input.

    Raises:
        JobError: it cannot be written; what was there before is as it was.
    """
    with written(output):
        if any(unit.done.errors for unit in units):
            with _whole(errors) as part:
                _join(part, (unit.errors() for unit in units))
        else:
            errors.unlink(missing_ok=True)
        with _whole(output) as part:
            if output.suffix == ".parquet":
                from spmd_infer.jobs.parquet import write_parquet

                write_parquet(part, (unit.results() for unit in units), (unit.results() for unit in units))
            else:
                _join(part, (unit.results() for unit in units))


def _join(path: Path, parts: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write, which then gets its name."""
    part = path.with_name(f".{path.name}.partial")
    try:
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """NumPy arrays and scalars as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else os.fspath(value)
