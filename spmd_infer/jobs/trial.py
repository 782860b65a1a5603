"""The process that tries the rows of a unit one by one; see ``suspects``."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from spmd_infer.errors import DoesNotFitError
from spmd_infer.jobs.folder import JobFolder
from spmd_infer.jobs.rows import Row
from spmd_infer.jobs.sources import open_source
from spmd_infer.jobs.suspects import TOGETHER, Word
from spmd_infer.jobs.tasks import row_task


def main(output: str, number: str, begin: str, guilty: str) -> None:
    """Compute the rows of one unit, each alone, then together, and say when that begins and ends.

    Args:
        output: the job's output.
        number: the unit's.
        begin: the first row to compute alone.
        guilty: rows to leave out, with commas between.
    """
    pipe = int(os.environ["SPMD_INFER_TRIAL_FD"])

    def say(word: Word) -> None:
        os.write(pipe, msgspec.json.encode(word) + b"\n")

    from spmd_infer.compile_cache import use_compile_cache
    from spmd_infer.engine import Engine

    folder = JobFolder(Path(output))
    record = folder.record()
    assert record is not None
    spec = record.spec
    unit = folder.plan().units[int(number)]
    rows = open_source(Path(spec.input), spec.format, spec.column).read(unit.first, unit.count, unit.place)
    task = row_task(spec, record.created)
    use_compile_cache()
    try:
        engine = Engine.load(spec.model, dtype=spec.dtype, quantize=spec.quantize)
    except DoesNotFitError:
        say(Word("unable"))
        return
    say(Word("ready"))
    out = {int(row) for row in guilty.split(",") if row}

    def compute(name: int, some: list[Row]) -> None:
        say(Word("begin", name))
        raised = ""
        try:
            task.answer(engine, some)
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"[:2000]
            if name != TOGETHER:
                out.add(name)
        say(Word("end", name, raised))

    for row in rows[int(begin) - unit.first :]:
        if row.index not in out:
            compute(row.index, [row])
    rest = [row for row in rows if row.index not in out]
    if rest:
        compute(TOGETHER, rest)
    say(Word("all"))
