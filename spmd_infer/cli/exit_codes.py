"""Exit codes of the command line, as its help lists them."""

from __future__ import annotations

from spmd_infer.errors import (
    AxisError,
    BatchError,
    JobError,
    JobHeldError,
    MeshError,
    PlanError,
    SpmdInferError,
    TaskError,
)

UNUSABLE_MODEL = 3
REFUSED_INPUT = 4
NO_LAYOUT = 5
JOB_FAILED = 7
JOB_HELD = 8
ROWS_FAILED = 9


def exit_code(error: SpmdInferError) -> int:
    """The exit code that tells a script what kind of error this was."""
    if isinstance(error, MeshError | AxisError | PlanError):
        return NO_LAYOUT
    if isinstance(error, BatchError | TaskError):
        return REFUSED_INPUT
    if isinstance(error, JobError):
        return JOB_HELD if isinstance(error, JobHeldError) else JOB_FAILED
    return UNUSABLE_MODEL
