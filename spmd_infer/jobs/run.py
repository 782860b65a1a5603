"""One run of a job on all its ranks: prepared by rank 0, worked on by all, put together by rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from spmd_infer.errors import JobError
from spmd_infer.jobs.engines import WAIT_S, fingerprint_of, load_engine
from spmd_infer.jobs.folder import Figures, JobFolder, JobRecord
from spmd_infer.jobs.log import Log
from spmd_infer.jobs.outputs import check_suffix, put_together
from spmd_infer.jobs.preparing import Brief, next_run, planned, prepared
from spmd_infer.jobs.sources import open_source
from spmd_infer.jobs.spec import JobSpec, RunOptions
from spmd_infer.jobs.state import read_state
from spmd_infer.jobs.tasks import row_task
from spmd_infer.jobs.units import WorkPlan, deal
from spmd_infer.jobs.watching import watched
from spmd_infer.jobs.worker import Work, Worker
from spmd_infer.progress import progress

if TYPE_CHECKING:
    from spmd_infer.multihost.job import Job

SHOWN_S = 70.0
"""For what one host has written to be seen by another: NFS keeps what it knows of a folder for up to a minute."""


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended.

    Attributes:
        finished: whether the job is done; else it was told to stop, and the same call goes on.
        figures: what came of it, on rank 0.
    """

    finished: bool
    figures: Figures | None = None


def run_job(spec: JobSpec, job: Job, options: RunOptions) -> Outcome:
    """Run a job until it is done or told to stop; all ranks call this.

    Args:
        spec: the job.
        job: the processes.
        options: how to work.

    Raises:
        JobHeldError: the same job is under way elsewhere; names its holder.
        JobError: it cannot begin or go on.
        SpmdInferError: model, mesh, task or input cannot be used.
    """
    if job.should_stop():
        return Outcome(False)
    folder = JobFolder(Path(spec.output))
    began = time.time()
    with ExitStack() as stack:
        brief, record, log = None, None, None
        if job.rank == 0:
            stack.enter_context(folder.held())
            record = prepared(folder, spec, options)
            brief, log = next_run(folder, record, options, stack)
        brief = _from_first(job, "batch job", brief)
        if brief.figures is not None:
            return Outcome(True, brief.figures)
        if not _in_time(lambda: folder.sees(brief.run)):
            raise JobError(
                f"{job.name_of(job.rank)} does not see {folder.path}, which rank 0 has made: the output must lie on "
                "storage that all ranks see"
            )
        plan = folder.plan()
        engine, together = load_engine(spec, job, options)
        if job.rank == 0:
            folder.check_checkpoint(fingerprint_of(engine))
        if job.rank != 0 and not together:
            log = stack.enter_context(closing(Log(folder.log(brief.run, job.rank))))
        chosen = {unit.index: unit for unit in plan.units}
        work = Work(
            brief.run,
            [chosen[index] for index in brief.units],
            brief.banned,
            frozenset(brief.apart),
            together,
            options.unit_s,
        )
        source = open_source(Path(spec.input), spec.format, spec.column)
        worker = Worker(job, folder, work, source, row_task(spec, brief.created), engine, log)
        watch = _watching(job, folder, work, plan, options) if job.rank == 0 else nullcontext()
        with watch:
            finished = worker.run()
        if not finished:
            return Outcome(False)
        _all_here(job, "end of the work")
        figures = None
        if job.rank == 0:
            assert record is not None
            figures = _finished(folder, record, plan, brief, began)
        _all_here(job, "end of the batch job")
        return Outcome(True, figures)


def plan_job(spec: JobSpec, job: Job) -> WorkPlan | None:
    """The units of a job, nothing written; on rank 0, the others wait and get None.

    Raises:
        SpmdInferError: the input, the task or the model's tokenizer cannot be used.
    """
    plan = None
    if job.rank == 0:
        check_suffix(Path(spec.output), spec.format)
        plan = planned(open_source(Path(spec.input), spec.format, spec.column), row_task(spec), spec)
    _all_here(job, "plan of a batch job")
    return plan


def shares(plan: WorkPlan, ranks: int) -> list[dict[str, int]]:
    """Rows, units and cost of what each rank is dealt."""
    return [
        {
            "rank": rank,
            "units": len(units),
            "rows": sum(unit.count for unit in units),
            plan.counts: sum(unit.cost for unit in units),
        }
        for rank, units in enumerate(deal(plan.units, ranks))
    ]


def _in_time(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold: a shared file system may show a host late what another one wrote."""
    until = time.monotonic() + SHOWN_S
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(1.0)
    return True


def _all_here(job: Job, where: str) -> None:
    if job.channel is not None:
        job.channel.gather(where, b"", WAIT_S)


def _from_first(job: Job, what: str, brief: Brief | None) -> Brief:
    if job.channel is None:
        assert brief is not None
        return brief
    own = b"" if brief is None else msgspec.msgpack.encode(brief)
    return msgspec.msgpack.decode(job.channel.gather(what, own, WAIT_S)[0], type=Brief)


@contextmanager
def _watching(job: Job, folder: JobFolder, work: Work, plan: WorkPlan, options: RunOptions) -> Iterator[None]:
    """Show how far all ranks have come."""
    costs: Mapping[int, int] = {unit.index: unit.cost for unit in work.units}
    logs = [folder.log(work.run, rank) for rank in range(job.size)]
    with (
        progress("batch", sum(costs.values()), quiet=options.quiet, unit=plan.counts) as advance,
        watched(logs, costs, advance),
    ):
        yield


def _finished(folder: JobFolder, record: JobRecord, plan: WorkPlan, brief: Brief, began: float) -> Figures:
    state = read_state(folder.logs())

    def missing() -> list[int]:
        return [unit.index for unit in plan.units if unit.index not in state.done]

    def complete() -> bool:
        nonlocal state
        if missing():
            state = read_state(folder.logs())
        return not missing()

    if not _in_time(complete):
        raise JobError(
            f"units {missing()[:8]} are not there although all ranks have ended their work: {folder.path} cannot be "
            "read whole from rank 0; start the job again"
        )
    units = [state.done[unit.index] for unit in plan.units]
    put_together(folder.output, folder.errors, units)
    figures = Figures(
        rows=sum(unit.done.rows for unit in units),
        failed=sum(unit.done.failed for unit in units),
        quarantined=sum(len(state.banned(unit.index)) for unit in plan.units),
        cut=sum(unit.done.cut for unit in units),
        cost=plan.cost,
        counts=plan.counts,
        runs=brief.run,
        seconds=time.time() - (record.created if brief.run > 1 else began),
    )
    folder.finish(figures)
    return figures
