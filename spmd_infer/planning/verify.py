"""A plan held against what XLA makes of it: the model compiled with abstract weights on as many simulated devices.

Communication and memory of the compiled program are compared with those that the planner foresees for the same program.
Both are taken in float32: XLA on CPU widens 16-bit operands, and those copies exist on no accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from spmd_infer.axes import STAGE, AxisRules, axis_scope
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.phases import Phase
from spmd_infer.models.pipeline import MOST_PARTS
from spmd_infer.planning.audit import collective_in
from spmd_infer.planning.cost import Traffic, is_cache
from spmd_infer.planning.estimates import Pipeline
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.program_loops import runs
from spmd_infer.planning.values import Value
from spmd_infer.planning.verify_inputs import foreseen
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import for_stages
from spmd_infer.tensors import InputSpec

SMALL_TRAFFIC = 0.05
"""Bytes that differ by less than this part of a step's communication are small."""

MEMORY_TOLERANCE = 0.1
"""The part by which memory may differ."""

_OFFSET = 0.1  # differences that leave less than this part of themselves when added up explain each other

_OPEN_BOOKS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""No kernels of a library that keeps its intermediate results to itself: a small CNN's 1.1 GB are 0.13 to XLA then."""

_QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
"""Machine code is not optimised: collectives and buffers are decided before it is made."""

_LIKE_ACCELERATORS: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""XLA on CPU starts whatever can start; accelerators take an operation's memory into account."""

Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class TrafficLine:
    """Collectives of one kind along the same mesh axes, planned and found.

    Attributes:
        kind: the kind of collective.
        axes: mesh axes.
        planned: how many.
        planned_bytes: bytes of their results on a device.
        found: how many XLA put in.
        found_bytes: likewise.
        verdict: ``as planned``, or what explains the difference, or that nothing does.
        explained: whether something does.
    """

    kind: str
    axes: tuple[str, ...]
    planned: int
    planned_bytes: int
    found: int
    found_bytes: int
    verdict: str
    explained: bool


@dataclass(frozen=True)
class PhaseReport:
    """One phase's program.

    Attributes:
        phase: its name.
        layout: the layout that it was compiled with.
        traffic: communication, planned and found.
        held: bytes of weights, cache, inputs and results on a device: ``(planned, found)``.
        memory: bytes in all on a device: ``(planned, found)``.
        seconds: what tracing and compiling took.
    """

    phase: str
    layout: str
    traffic: tuple[TrafficLine, ...]
    held: tuple[int, int]
    memory: tuple[int, int]
    seconds: float

    @property
    def memory_difference(self) -> float:
        """How much more memory the program takes than planned, as a part of the planned."""
        planned, found = self.memory
        return found / planned - 1 if planned else 0.0

    @property
    def agrees(self) -> bool:
        """Whether every difference is explained or within its tolerance."""
        return all(line.explained for line in self.traffic) and abs(self.memory_difference) <= MEMORY_TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "memory_difference": self.memory_difference, "agrees": self.agrees}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PhaseReport:
        """Read what ``as_dict`` wrote."""
        lines = tuple(TrafficLine(**{**line, "axes": tuple(line["axes"])}) for line in data["traffic"])
        held, memory = data["held"], data["memory"]
        return cls(
            data["phase"],
            data["layout"],
            lines,
            (held[0], held[1]),
            (memory[0], memory[1]),
            data["seconds"],
        )


def verify_phase(
    model: ModelFunction,
    phase: Phase,
    spec: MeshSpec,
    rules: AxisRules,
    workload: Workload,
    cluster: Cluster,
    *,
    most_parts: int = MOST_PARTS,
) -> PhaseReport:
    """Compile one phase on the devices of this process and compare.

    Args:
        model: the model; its parameters may be abstract.
        phase: the phase.
        spec: the mesh; there must be as many devices.
        rules: where logical axes go in this phase.
        workload: the traffic; its rows must divide as the rules want.
        cluster: what was planned for.
        most_parts: into how many micro-batches a stage's rows are cut at most, on a mesh with stages.
    """
    begin = time.perf_counter()
    mesh = spec.build()
    model = model.with_params({path: _in_float32(param) for path, param in model.params.items()})
    model, rules = for_stages(model, rules, spec.shape, most_parts)
    phase = replace(phase, inputs=jax.tree.map(_spec_in_float32, phase.inputs))
    program = foreseen(model, phase, spec, rules, workload, cluster)
    weights = {layout.path: NamedSharding(mesh, layout.spec) for layout in program.layouts}
    compiled = _compile(
        program.model, program.batch, weights, program.inputs, rules, mesh, shared=cluster.device.shared
    )
    found = _traffic(compiled, mesh, program.pipeline)
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    own = program.cost.memory
    return PhaseReport(
        phase=phase.name,
        layout=rules.name,
        traffic=tuple(compare(program.cost.collectives, found)),
        held=(own.weights + own.cache + own.inputs, int(held)),
        memory=(own.total, int(held + memory.temp_size_in_bytes)),
        seconds=time.perf_counter() - begin,
    )


def _traffic(compiled: jax.stages.Compiled, mesh: Mesh, pipeline: Pipeline | None) -> dict[Key, Traffic]:
    """The collectives of one step. A stage works in M of the ticks, and hands something on in all of them."""
    found: dict[Key, Traffic] = {}
    for run in runs(compiled):
        collective = collective_in(run.line)
        if collective is None:
            continue
        key = (collective.kind, collective.axes(mesh))
        times = 1
        if pipeline is not None and run.times == pipeline.ticks:
            times = pipeline.ticks if STAGE in key[1] else pipeline.microbatches
        known = found.get(key, Traffic())
        found[key] = Traffic(known.count + times, known.nbytes + times * collective.nbytes)
    return found


def compare(planned: Mapping[Key, Traffic], found: Mapping[Key, Traffic]) -> list[TrafficLine]:
    """Planned and found communication side by side, each line with what explains its difference.

    Explained are: several collectives combined into one with the same bytes; an all-reduce done as a reduce-scatter and
    an all-gather; one collective along several axes instead of one along each, or the reverse; and what is small beside
    the rest of the step.
    """
    whole = max(sum(t.nbytes for t in planned.values()), sum(t.nbytes for t in found.values()), 1)
    lines = []
    for key in sorted(planned.keys() | found.keys()):
        ours, theirs = planned.get(key, Traffic()), found.get(key, Traffic())
        lines.append(
            TrafficLine(*key, ours.count, ours.nbytes, theirs.count, theirs.nbytes, *_verdict(ours, theirs, whole))
        )
    return _across_lines(lines)


def _verdict(planned: Traffic, found: Traffic, whole: int) -> tuple[str, bool]:
    apart = abs(planned.nbytes - found.nbytes)
    if apart <= 0.01 * max(planned.nbytes, found.nbytes):
        if planned.count == found.count:
            return "as planned", True
        return ("combined" if found.count < planned.count else "in more pieces") + ", same bytes", True
    if apart <= SMALL_TRAFFIC * whole:
        return (
            f"{'more' if found.nbytes > planned.nbytes else 'less'}, but small: {apart / whole:.1%} of the step",
            True,
        )
    return f"{found.nbytes / planned.nbytes:.3g}x the bytes" if planned.nbytes else "not planned", False


def _across_lines(lines: Sequence[TrafficLine]) -> list[TrafficLine]:
    """Explain lines that only differ together: the same bytes of one kind over other axes, or of another kind."""
    explained = list(lines)
    for group, words in ((_kind, "over other axes, same bytes in all"), (_everything, "another way to the same sum")):
        for name in {group(line) for line in explained}:
            members = [i for i, line in enumerate(explained) if group(line) == name]
            if all(explained[i].explained for i in members):
                continue
            apart = [
                _moved(line.kind, line.found_bytes - line.planned_bytes) for line in map(explained.__getitem__, members)
            ]
            # What is too much in one line must be missing in another.
            if abs(sum(apart)) > _OFFSET * sum(map(abs, apart)):
                continue
            for i in members:
                line = explained[i]
                if not line.explained:
                    data = {**vars(line), "verdict": words, "explained": True}
                    explained[i] = TrafficLine(**data)
    return explained


def _kind(line: TrafficLine) -> str:
    return line.kind


def _everything(line: TrafficLine) -> str:
    """All-reduces, and what they can be made of, are one sum."""
    return "sum" if line.kind in ("all-reduce", "reduce-scatter", "all-gather") else line.kind


def _moved(kind: str, nbytes: int) -> int:
    """An all-reduce sends its bytes twice."""
    return 2 * nbytes if kind == "all-reduce" else nbytes


def _compile(
    model: ModelFunction,
    batch: Any,
    weights: Mapping[str, NamedSharding],
    inputs: Sequence[Value],
    rules: AxisRules,
    mesh: Mesh,
    *,
    shared: bool,
) -> jax.stages.Compiled:
    activations = rules.of_activations

    def placed(value: Value) -> NamedSharding:
        return NamedSharding(mesh, activations.resolve(value.labels, value.shape, dict(mesh.shape)).spec)

    leaves, treedef = jax.tree_util.tree_flatten(batch)
    caches = {(value.shape, value.dtype): placed(value) for value in inputs if is_cache(value)}

    def as_given(result: jax.Array) -> jax.Array:
        """The cache comes back as it was, so that its memory is used again."""
        sharding = caches.get((result.shape, result.dtype))
        return result if sharding is None else jax.lax.with_sharding_constraint(result, sharding)

    def step(params: Any, *given: Any) -> Any:
        with axis_scope(rules, mesh):
            return jax.tree.map(as_given, model(params, jax.tree_util.tree_unflatten(treedef, given)))

    donated = tuple(1 + i for i, value in enumerate(inputs) if is_cache(value))
    jitted = jax.jit(step, in_shardings=(dict(weights), *(placed(value) for value in inputs)), donate_argnums=donated)
    lowered = jitted.lower(dict(model.params), *leaves)
    quantised = any(param.dtype == jnp.int8 for param in model.params.values())
    books = {} if quantised else _OPEN_BOOKS  # without that library int8 weights are widened to int32
    try:
        return lowered.compile(compiler_options=_QUICK | books | ({} if shared else _LIKE_ACCELERATORS))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile(compiler_options=_QUICK)  # another version of XLA


def _in_float32(param: Any) -> jax.ShapeDtypeStruct:
    """An abstract weight in float32; the numbers of quantised ones stay as small as they are."""
    wide = jnp.issubdtype(param.dtype, jnp.floating) and param.dtype.itemsize > 1
    return jax.ShapeDtypeStruct(param.shape, jnp.float32 if wide else param.dtype)


def _spec_in_float32(spec: InputSpec) -> InputSpec:
    wide = jnp.issubdtype(np.dtype(spec.dtype), jnp.floating)
    return InputSpec(spec.shape, np.float32, spec.axes, spec.required) if wide else spec
