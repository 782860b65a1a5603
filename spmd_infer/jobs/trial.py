"""The process that tries the rows of a unit one by one; see ``suspects``."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from spmd_infer.errors import DoesNotFitError
from spmd_infer.jobs.folder import JobFolder
from spmd_infer.jobs.sources import open_source
from spmd_infer.jobs.suspects import Word
from spmd_infer.jobs.tasks import row_task


def main(output: str, number: int, begin: int) -> None:
    """Compute the rows of one unit, each alone, from row ``begin`` on, and say when each begins and ends."""
    pipe = int(os.environ["SPMD_INFER_TRIAL_FD"])

    def say(word: Word) -> None:
        os.write(pipe, msgspec.json.encode(word) + b"\n")

    from spmd_infer.compile_cache import use_compile_cache
    from spmd_infer.engine import Engine

    folder = JobFolder(Path(output))
    record = folder.record()
    assert record is not None
    spec = record.spec
    unit = folder.plan().units[number]
    rows = open_source(Path(spec.input), spec.format, spec.column).read(unit.first, unit.count, unit.place)
    task = row_task(spec, record.created)
    use_compile_cache()
    try:
        engine = Engine.load(spec.model, dtype=spec.dtype, quantize=spec.quantize)
    except DoesNotFitError:
        say(Word("unable"))
        return
    say(Word("ready"))
    for row in rows[begin - unit.first :]:
        say(Word("begin", row.index))
        raised = ""
        try:
            task.answer(engine, [row])
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"[:2000]
        say(Word("end", row.index, raised))
    say(Word("all"))
