"""A rank's part of a run: unit after unit until all are done or the job is to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spmd_infer.errors import JobError
from spmd_infer.jobs.folder import JobFolder
from spmd_infer.jobs.log import Log
from spmd_infer.jobs.outputs import encoder, json_lines
from spmd_infer.jobs.row_task import RowTask
from spmd_infer.jobs.rows import Answer, Failure, Row, Source
from spmd_infer.jobs.units import Unit, deal

if TYPE_CHECKING:
    from spmd_infer.engine import Engine
    from spmd_infer.multihost.job import Job

WAIT_S = 0.1


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        run: its number.
        units: those that are not done.
        banned: rows that are not to be tried again, by unit, with what happened.
        apart: units whose rows are computed one by one.
        together: all ranks compute each unit on one mesh, and rank 0 writes; otherwise each rank computes its own.
        unit_s: seconds that a unit may take.
    """

    run: int
    units: Sequence[Unit]
    banned: Mapping[int, Mapping[int, str]]
    apart: frozenset[int]
    together: bool
    unit_s: float


class Worker:
    """One rank at work.

    Args:
        job: the job of processes.
        folder: the batch job's folder.
        work: what there is to do.
        source: the rows.
        task: what they go through.
        engine: what computes.
        log: where to write what was done; None on a rank that only computes along.
    """

    def __init__(
        self,
        job: Job,
        folder: JobFolder,
        work: Work,
        source: Source,
        task: RowTask,
        engine: Engine,
        log: Log | None,
    ) -> None:
        self._job, self._folder, self._work = job, folder, work
        self._source, self._task, self._engine, self._log = source, task, engine, log
        self._encode: Callable[[Sequence[dict[str, object]]], bytes] = encoder(folder.output)

    def run(self) -> bool:
        """Work until nothing is left or the job is told to stop; whether all units are done."""
        return self._run_together() if self._work.together else self._run_apart()

    def _run_together(self) -> bool:
        for unit in self._work.units:
            if self._job.should_stop():
                return False
            self._compute(unit)
        return True

    def _run_apart(self) -> bool:
        mine = self._claims()
        waits = False
        while True:
            if self._job.should_stop():
                return self._all_through()
            if self._job.stopping:
                continue  # to the step that another rank has come to; nothing more is begun
            unit = None if waits else next(mine, None)
            if unit is not None:
                self._compute(unit)
                continue
            if not waits:
                self._folder.claim(self._work.run, _through(self._job.rank))
                waits = True
            if self._all_through():
                return True
            time.sleep(WAIT_S)

    def _claims(self) -> Iterator[Unit]:
        """The units that were dealt to this rank; then what other ranks have not come to, from their ends."""
        hands = deal(self._work.units, self._job.size)
        own = hands.pop(self._job.rank)
        for hand in [own, *([*reversed(other)] for other in sorted(hands, key=len, reverse=True))]:
            for unit in hand:
                if self._folder.claim(self._work.run, str(unit.index)):
                    yield unit

    def _all_through(self) -> bool:
        return all(self._folder.claimed(self._work.run, _through(rank)) for rank in range(self._job.size))

    def _compute(self, unit: Unit) -> None:
        with self._job.step(f"unit {unit.index}", self._work.unit_s):
            if self._log is not None:
                self._log.begin(unit.index)
            try:
                self._finish(unit)
            except BaseException as error:
                if self._log is not None and isinstance(error, JobError | KeyboardInterrupt | SystemExit):
                    self._log.leave(unit.index)
                raise

    def _finish(self, unit: Unit) -> None:
        rows = self._source.read(unit.first, unit.count, unit.place)
        banned = self._work.banned.get(unit.index, {})
        answers: dict[int, Answer] = {
            row.index: Failure("Quarantined", banned[row.index]) for row in rows if row.index in banned
        }
        good = [row for row in rows if row.index not in banned]
        cut = 0
        for part in self._parts(unit, good):
            if len(part) < len(good) and self._log is not None:
                self._log.begin(unit.index, part[0].index)
            answers |= zip((row.index for row in part), self._task.answer(self._engine, part), strict=True)
            cut += self._task.cut
            if len(part) < len(good) and self._log is not None:
                self._log.leave(unit.index, part[0].index)
        if self._log is not None:
            self._write(self._log, unit, rows, answers, cut)

    def _parts(self, unit: Unit, rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
        if unit.index in self._work.apart:
            return [[row] for row in rows]
        return [rows] if rows else []

    def _write(self, log: Log, unit: Unit, rows: Sequence[Row], answers: Mapping[int, Answer], cut: int) -> None:
        results, errors = [], []
        for row in rows:
            answer = answers[row.index]
            if isinstance(answer, Failure):
                errors.append(self._task.failure_record(row, answer))
            else:
                results.append(self._task.record(row, answer))
        log.done(unit.index, len(rows), len(errors), cut, self._encode(results), json_lines(errors))


def _through(rank: int) -> str:
    """What a rank claims when it finds nothing more to do."""
    return f"through-{rank}"
