"""The engine of a rank: its own, or one with all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from spmd_infer.engine import Engine
from spmd_infer.errors import DoesNotFitError, MeshError
from spmd_infer.jobs.spec import JobSpec, RunOptions
from spmd_infer.mesh import MeshSpec
from spmd_infer.multihost.fingerprint import agree, of_checkpoint, of_environment
from spmd_infer.planning.resolve import LOCAL

if TYPE_CHECKING:
    from spmd_infer.multihost.job import Job

WAIT_S = 7 * 24 * 3600.0
"""For rank 0 to prepare a run, and for all to come to its end; a guard notices a rank that dies meanwhile."""


def load_engine(spec: JobSpec, job: Job, options: RunOptions) -> tuple[Engine, bool]:
    """This rank's engine, and whether it is one with the other ranks'.

    Raises:
        SpmdInferError: the model cannot be loaded.
    """

    def load(mesh: str) -> Engine:
        return Engine.load(spec.model, mesh=mesh, dtype=spec.dtype, verify=options.verify, quantize=spec.quantize)

    if job.size == 1:
        return load(options.mesh), False
    places = 1 if options.mesh == "auto" else MeshSpec.parse(options.mesh).size
    together = options.together == "yes" or (options.together == "auto" and places > jax.local_device_count())
    engine: Engine | None = None
    problem = ""
    if not together:
        try:
            engine = load(f"{LOCAL}{options.mesh}")
        except DoesNotFitError as error:
            if options.together == "no":
                raise
            problem = str(error)
        except MeshError as error:
            raise MeshError(f"{error}; --together yes lays one mesh over all {job.size} processes") from error
        answers = job.channel.gather("fits on one process", problem.encode(), WAIT_S)
        together = any(answers)
    if together:
        return load(options.mesh), True
    assert engine is not None
    own = {**of_environment(), "mesh": str(engine.plan.mesh), "dtype": str(engine.dtype)}
    own["checkpoint"] = fingerprint_of(engine)
    agree(job, "the engine", own)
    return engine, False


def fingerprint_of(engine: Engine) -> str:
    """Another one where the model's files are others, wherever they lie."""
    assert engine.reader is not None
    tensors = {name: (info.shape, str(info.dtype)) for name, info in engine.reader.tensors.items()}
    return of_checkpoint(engine.reader.path, tensors)
