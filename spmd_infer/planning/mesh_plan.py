"""The outcome of planning: a mesh, how everything lies on it, what that costs, and what was rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from spmd_infer.axes import AxisRules
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device.

    Attributes:
        weights: the pieces of the weights that it holds.
        cache: keys and values of the requests in flight.
        activations: intermediate results of one step.
        inputs: the batch and the results.
    """

    weights: int
    cache: int
    activations: int
    inputs: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.activations + self.inputs


@dataclass(frozen=True)
class StepTime:
    """Seconds that one step is estimated to take, by what limits it.

    Attributes:
        compute: arithmetic at the device's peak rate.
        memory: weights, cache and activations read at the device's bandwidth.
        collectives: communication that the layout needs.
        total_seconds: the whole, where the parts are sums over different steps.
    """

    compute: float
    memory: float
    collectives: float
    total_seconds: float | None = None

    @property
    def total(self) -> float:
        """Of one step: arithmetic and memory overlap, collectives are added. Of several: their sum."""
        if self.total_seconds is not None:
            return self.total_seconds
        return max(self.compute, self.memory) + self.collectives


@dataclass(frozen=True)
class PhaseEstimate:
    """What one kind of step is estimated to cost.

    Attributes:
        name: ``prefill``, ``decode``, or ``infer`` for models that take one kind of step.
        layout: how the model lies in it.
        times: how many such steps one batch of requests takes.
        time: of one step.
        collectives: kinds and numbers of collectives in one step, in words.
    """

    name: str
    layout: str
    times: int
    time: StepTime
    collectives: str


@dataclass(frozen=True)
class Candidate:
    """One mesh and layout that was looked at.

    Attributes:
        mesh: its axes and sizes.
        memory: what it needs on the fullest device.
        time: what a batch of requests is estimated to take in all; None where no batch is known.
        collectives: kinds and numbers of collectives in a step (the last kind of step), in words.
        rejected: why it was not chosen; empty for the chosen one.
        layout: the layout's name; two names where phases differ.
        phases: the estimate for each kind of step.
        rules: the rules of each phase by name.
        switch: seconds of moving keys and values, and weights where they differ, between phases; part of ``time``.
        most_rows: how many rows of this length fit in memory at once.
        rows: rows that the estimates are for, padding included.
    """

    mesh: MeshSpec
    memory: Memory
    time: StepTime | None
    collectives: str
    rejected: str
    layout: str = ""
    phases: tuple[PhaseEstimate, ...] = ()
    rules: Mapping[str, AxisRules] = field(default_factory=dict)
    switch: float = 0.0
    most_rows: int = 0
    rows: int = 0


@dataclass(frozen=True)
class MeshPlan:
    """How a model is laid over devices, and why.

    Attributes:
        model: the model's name.
        cluster: the devices that were planned for.
        chosen: the mesh and its estimates.
        candidates: every mesh that was looked at, best first.
        rules: where each logical axis goes.
        weights: where each weight goes.
        workload: the batch that was planned for, in words.
        given: whether the caller chose the mesh.
        notes: what the reader should know: whole weights, assumptions.
    """

    model: str
    cluster: Cluster
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    rules: AxisRules
    weights: tuple[WeightLayout, ...]
    workload: str
    given: bool
    notes: tuple[str, ...] = ()

    @property
    def phase_rules(self) -> Mapping[str, AxisRules]:
        """The rules of each phase that has its own; other programs follow ``rules``."""
        return {name: rules for name, rules in self.chosen.rules.items() if rules is not self.rules}

    @property
    def mesh(self) -> MeshSpec:
        """The chosen mesh."""
        return self.chosen.mesh

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The chosen mesh over ``devices`` (default: all there are)."""
        return self.mesh.build(devices)

    def explain(self) -> str:
        """The plan as a table with the rejected meshes and the reasons, and a picture of one weight on the mesh."""
        from spmd_infer.planning.explain import explain

        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json``."""
        from spmd_infer.planning.explain import to_dict

        return to_dict(self)
