"""Which task answers a job's rows, and how large its units are."""

from __future__ import annotations

from spmd_infer.errors import TaskError
from spmd_infer.jobs.row_task import ClassifyRows, EmbedRows, OtherRows, RowTask, ScoreRows
from spmd_infer.jobs.spec import JobSpec
from spmd_infer.task_table import find_task


def row_task(spec: JobSpec, created: int = 0) -> RowTask:
    """What a job's rows go through.

    Args:
        spec: the job.
        created: when it began.

    Raises:
        TaskError: there is no such task, or its options are wrong.
    """
    if spec.format == "openai":
        from spmd_infer.jobs.openai_rows import OpenAIRows

        return OpenAIRows(spec, created)
    if spec.task == "generate":
        from spmd_infer.jobs.generate_rows import GenerateRows

        return GenerateRows(spec)
    if spec.task == "infer":
        from spmd_infer.jobs.infer_rows import InferRows

        return InferRows(spec)
    simple: dict[str, type[RowTask]] = {"embed": EmbedRows, "classify": ClassifyRows, "score": ScoreRows}
    if spec.task not in simple:
        find_task(spec.task)
    return simple.get(spec.task, OtherRows)(spec)


def unit_sizes(task: RowTask, spec: JobSpec, platform: str) -> tuple[int, int]:
    """The least and the most cost of a unit.

    Raises:
        TaskError: the size asked for is not positive.
    """
    if spec.unit_cost is not None:
        if spec.unit_cost < 1:
            raise TaskError(f"a unit's cost must be 1 or more {task.counts}, not {spec.unit_cost}")
        return spec.unit_cost, spec.unit_cost
    return task.sizes if platform == "cpu" else task.sizes_elsewhere
