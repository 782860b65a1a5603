"""Compiled programs: one for each function and set of input shapes, compiled once, counted, reused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from spmd_infer.axes import axis_scope
from spmd_infer.models.microbatches import no_stage_rests
from spmd_infer.multihost.job import current_job
from spmd_infer.placement import Placement
from spmd_infer.planning.program_loops import permutes_in_branches
from spmd_infer.scratch import keep_scratch
from spmd_infer.staging import stage_count


@dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
        name: what it computes.
        compiled: the executable; call it with the arguments it was lowered for.
        seconds: how long tracing and compiling took.
    """

    name: str
    compiled: jax.stages.Compiled
    seconds: float

    def __call__(self, *args: Any) -> Any:
        """Dispatch it; over several processes that must happen within the job's time."""
        job = current_job()
        if job is None or job.size == 1:
            return self.compiled(*args)
        with job.device_step(self.name):
            return self.compiled(*args)

    @property
    def temporary_bytes(self) -> int:
        """Scratch memory per device while it runs, as XLA planned it; 0 where the backend does not say."""
        analysis = self.compiled.memory_analysis()
        return int(getattr(analysis, "temp_size_in_bytes", 0) or 0)


@dataclass
class Programs:
    """The programs of one engine. Safe to use from several threads: each program is compiled by one of them.

    Attributes:
        placement: the model that they run, and where it is. Programs compiled for an earlier placement are kept, and
            found again when the model is back there.
        compile_seconds: seconds spent compiling, summed over programs.
    """

    placement: Placement
    compile_seconds: float = 0.0
    _programs: dict[Hashable, Future[Program]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def compiles(self) -> int:
        """How many programs have been compiled."""
        return sum(1 for future in list(self._programs.values()) if future.done() and not future.exception())

    def finished(self) -> list[Program]:
        """The programs compiled so far."""
        return [f.result() for f in list(self._programs.values()) if f.done() and not f.exception()]

    def find(self, key: Hashable, phase: str | None = None) -> Program | None:
        """The program for ``key`` at the present placement, if it has been compiled."""
        future = self._programs.get((self.placement.key(phase), key))
        return future.result() if future is not None else None

    def get(
        self,
        key: Hashable,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        name: str,
        in_shardings: Any = None,
        donate: tuple[int, ...] = (),
        phase: str | None = None,
    ) -> Program:
        """The program for ``key`` at the present placement, compiled now if it is new.

        Args:
            key: names function, shapes, dtypes and shardings.
            fn: traced inside the axis scope.
            args: what to lower for: arrays or ``jax.ShapeDtypeStruct``.
            name: for messages.
            in_shardings: a pytree prefix of shardings for ``args``; None takes them from the arrays.
            donate: positions in ``args`` whose buffers the program may reuse.
            phase: the phase whose rules it is traced under.
        """
        key = (self.placement.key(phase), key)
        future = self._programs.get(key)
        if future is not None:
            return future.result()
        with self._lock:
            future = self._programs.get(key)
            mine = future is None
            if future is None:
                future = self._programs[key] = Future()
        if mine:
            try:
                program = self._compile(fn, args, name, in_shardings, donate, phase)
                with self._lock:
                    self.compile_seconds += program.seconds
                future.set_result(program)
            except BaseException as error:
                del self._programs[key]  # a program that failed to compile may be tried again
                future.set_exception(error)
        return future.result()

    def _compile(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        name: str,
        in_shardings: Any,
        donate: tuple[int, ...],
        phase: str | None,
    ) -> Program:
        started = time.perf_counter()
        rules, mesh = self.placement.rules(phase), self.placement.mesh
        if mesh.devices.flat[0].platform == "cpu":
            keep_scratch()

        def traced(*values: Any) -> Any:
            with axis_scope(rules, mesh):
                return fn(*values)

        traced.__name__ = name
        options = {} if in_shardings is None else {"in_shardings": in_shardings}
        compiled = _compiled(jax.jit(traced, donate_argnums=donate, **options), args, name, mesh)
        if stage_count(self.placement.model) > 1 and permutes_in_branches(compiled):
            # XLA itself has let devices of a stage permute: then no stage may rest.
            with no_stage_rests():
                again = jax.jit(lambda *values: traced(*values), donate_argnums=donate, **options)
                compiled = _compiled(again, args, name, mesh)
        return Program(name, compiled, time.perf_counter() - started)


def _compiled(jitted: Any, args: tuple[Any, ...], name: str, mesh: Mesh) -> jax.stages.Compiled:
    lowered = jitted.lower(*args)
    if mesh.is_multi_process:
        from spmd_infer.multihost.compiling import compile_together

        given = [(result.shape, result.dtype) for result in jax.tree.leaves(lowered.out_info)]
        sizes = (lowered.in_avals, given, dict(mesh.shape))
        return compile_together(lowered, name, sizes, mesh.devices.flat[0].platform)
    if jax.process_count() > 1:
        from spmd_infer.multihost.compiling import compile_apart

        return compile_apart(lowered)
    compiled: jax.stages.Compiled = lowered.compile()
    return compiled
