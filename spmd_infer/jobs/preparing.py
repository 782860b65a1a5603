"""Before a run: the job is begun or found, what is left of it, and suspects looked at. All of this is rank 0's."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec

from spmd_infer.errors import JobError
from spmd_infer.jobs.folder import Figures, JobFolder, JobRecord
from spmd_infer.jobs.log import Log
from spmd_infer.jobs.outputs import check_suffix
from spmd_infer.jobs.row_task import RowTask
from spmd_infer.jobs.rows import Source
from spmd_infer.jobs.sources import open_source
from spmd_infer.jobs.spec import JobSpec, RunOptions
from spmd_infer.jobs.state import read_state
from spmd_infer.jobs.suspects import try_rows
from spmd_infer.jobs.tasks import row_task, unit_sizes
from spmd_infer.jobs.units import Unit, WorkPlan, plan_units


class Brief(msgspec.Struct, frozen=True):
    """What rank 0 tells the others of a run."""

    run: int
    created: int
    units: list[int]
    banned: dict[int, dict[int, str]]
    apart: list[int]
    figures: Figures | None = None


def prepared(folder: JobFolder, spec: JobSpec, options: RunOptions) -> JobRecord:
    """The job in the folder, begun now where there was none.

    Raises:
        JobError: there is another one, or another file where the output goes.
    """
    check_suffix(folder.output, spec.format)
    record = folder.record()
    source = open_source(Path(spec.input), spec.format, spec.column)
    now = source.fingerprint()
    if record is not None:
        same = record.spec == spec and record.source == now
        if not same and not options.overwrite:
            folder.check_same(record, spec)
            raise JobError(
                f"{spec.input} is not what it was when the job began ({record.source}, now {now}); restore it, or give "
                "--overwrite to begin anew"
            )
        if same:
            return record
    elif folder.output.exists() and not options.overwrite:
        raise JobError(f"{folder.output} exists and is of no job that could go on; remove it, or give --overwrite")
    task = row_task(spec)
    plan = planned(source, task, spec)
    if not plan.units:
        raise JobError(f"{spec.input} has no rows")
    record = JobRecord(spec, now, int(time.time()))
    folder.create(record, plan)
    return record


def planned(source: Source, task: RowTask, spec: JobSpec) -> WorkPlan:
    """Cut the rows into units of the size that suits the task and the devices."""
    import jax

    least, most = unit_sizes(task, spec, jax.default_backend())
    return plan_units(source, task.costs, task.counts, least=least, most=most)


def next_run(folder: JobFolder, record: JobRecord, options: RunOptions, stack: ExitStack) -> tuple[Brief, Log | None]:
    """What is left to do, after suspects have been looked at; with rank 0's log for what follows."""
    figures = folder.figures()
    if figures is not None:
        if not folder.output.exists():
            raise JobError(
                f"{folder.path} says that the job is done, but {folder.output} is gone; remove the folder to run it "
                "again"
            )
        return Brief(0, record.created, [], {}, [], figures), None
    state = read_state(folder.logs())
    plan = folder.plan()
    run = folder.new_run()
    log = stack.enter_context(closing(Log(folder.log(run, 0))))
    for index in state.suspects():
        judged = try_rows(folder.output, plan.units[index], options.unit_s, _say)
        log.judge(judged)
        state.judge(judged)
    left = [unit for unit in plan.units if unit.index not in state.done]
    banned = {unit.index: state.banned(unit.index) for unit in left}
    if not options.quiet:
        _tell(record.spec, plan, left, run)
    brief = Brief(
        run,
        record.created,
        [unit.index for unit in left],
        {unit: rows for unit, rows in banned.items() if rows},
        sorted(state.apart - state.done.keys()),
    )
    return brief, log


def _tell(spec: JobSpec, plan: WorkPlan, left: list[Unit], run: int) -> None:
    rows, cost = sum(unit.count for unit in left), sum(unit.cost for unit in left)
    so_far = f"run {run}: {plan.rows - rows:,} of {plan.rows:,} rows are done, " if run > 1 else ""
    _say(f"{spec.task} of {spec.input}: {so_far}{rows:,} rows with {cost:,} {plan.counts} to do in {len(left)} units")


def _say(text: str) -> None:
    sys.stderr.write(f"[spmd-infer batch] {text}\n")
    sys.stderr.flush()
