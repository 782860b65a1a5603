"""Compiling once for all processes of a job, by way of a compile cache that they share.

On accelerators a program has one name in JAX's cache for all processes. Rank 0 compiles and writes it; the others wait
for its word and then find it. On CPUs JAX's name for a program holds the process's own topology, and JAX lets only
process 0 write: there each process compiles and writes its own, so that at least a second start compiles nothing.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import distributed  # the coordination service's client has no public name

from spmd_infer.compile_cache import use_compile_cache
from spmd_infer.errors import ClusterError
from spmd_infer.multihost.job import Job, this_job

WAIT_S = 1800
_MARK = "shared-by-job"

_lock = threading.Lock()
_writers = 0


def share_compile_cache(job: Job) -> bool:
    """Use the compile cache on all ranks, and find out whether this rank sees what rank 0 writes; all must call it.

    Returns:
        Whether it does; a rank that has a cache but does not warns.
    """
    folder = use_compile_cache()
    mark = b""
    if job.rank == 0 and folder is not None:
        mark = f"{job.hosts[0]}.{job.pids[0]}".encode()
        (folder / _MARK).write_bytes(mark)
    theirs = job.channel.gather("compile cache", mark)[0]
    try:
        sees = folder is not None and bool(theirs) and (folder / _MARK).read_bytes() == theirs
    except OSError:
        sees = False
    if folder is not None and theirs and not sees:
        warnings.warn(
            f"rank {job.rank} does not see what rank 0 writes in the compile cache {folder}, and compiles for itself; "
            "put it on storage that all hosts share: SPMD_INFER_COMPILE_CACHE=...",
            RuntimeWarning,
            stacklevel=2,
        )
    job.shares_cache = sees
    return sees


def compile_together(lowered: jax.stages.Lowered, name: str, shapes: Any, platform: str) -> jax.stages.Compiled:
    """Compile a program that all processes of this job compile.

    Args:
        lowered: the program.
        name: what it computes.
        shapes: what it takes and gives on what mesh, as text the same on all ranks.
        platform: of its devices.

    Raises:
        ClusterError: rank 0 has another program of this name for these shapes.
    """
    job = this_job()
    if not job.shares_cache:
        return lowered.compile()
    if platform == "cpu":
        with _as_writer():
            return lowered.compile()
    return in_turn(job, lowered, f"{name} {hashlib.sha256(str(shapes).encode()).hexdigest()}")


def compile_apart(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program of this process's own devices; it too is kept for the next start."""
    with _as_writer():
        return lowered.compile()


def in_turn(job: Job, lowered: jax.stages.Lowered, identity: str) -> jax.stages.Compiled:
    """Rank 0 compiles first; the others begin when it has."""
    client: Any = distributed.global_state.client
    key = f"spmd_infer/compiled/{identity}"
    digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    if job.rank == 0:
        try:
            return lowered.compile()
        finally:
            # A program that was compiled again, for another engine, say, has been announced before.
            client.key_value_set(key, digest, allow_overwrite=True)
    try:
        theirs = client.blocking_key_value_get(key, 1000 * WAIT_S)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        warnings.warn(f"rank 0 has not compiled {identity} within {WAIT_S} s", RuntimeWarning, stacklevel=2)
        return lowered.compile()
    if theirs != digest:
        raise ClusterError(
            f"{job.name_of(0)} and {job.name_of(job.rank)} differ in program {identity.split()[0]}: lowered modules "
            f"{theirs[:12]} and {digest[:12]}"
        )
    return lowered.compile()


@contextmanager
def _as_writer() -> Iterator[None]:
    """JAX asks for its process number only to let process 0 alone write the cache; several threads may be in here."""
    global _writers
    state = distributed.global_state
    with _lock:
        _writers += 1
        state.process_id = 0
    try:
        yield
    finally:
        with _lock:
            _writers -= 1
            if _writers == 0:
                state.process_id = this_job().rank
