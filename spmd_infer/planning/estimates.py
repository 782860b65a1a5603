"""What a layout is estimated to cost: bytes on a device, seconds of a step, and all of it for one candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spmd_infer.axes import AxisRules
from spmd_infer.mesh import MeshSpec

RESERVE = 0.1
"""The part of a device's memory that plans leave free, for what they cannot foresee."""


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
        overlaps: whether memory is read while something else is computed. The cores of simulated devices do both: a
            weight that eight of them hold passes through the caches eight times, and nothing is computed meanwhile.
    """

    compute: float
    memory: float
    collectives: float
    total_seconds: float | None = None
    overlaps: bool = True

    @property
    def total(self) -> float:
        """Of one step: the longer of arithmetic and memory where they overlap, and collectives; of several the sum."""
        if self.total_seconds is not None:
            return self.total_seconds
        worked = max(self.compute, self.memory) if self.overlaps else self.compute + self.memory
        return worked + self.collectives


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
class Pipeline:
    """How a batch passes through a model spread over stages.

    Attributes:
        stages: how many there are.
        layers: of the model; the first stages have one more than the others where stages do not divide them.
        microbatches: into how many parts a batch is cut.
    """

    stages: int
    layers: int
    microbatches: int

    @property
    def depth(self) -> int:
        """Layers of the fullest stage."""
        return -(-self.layers // self.stages)

    @property
    def fullest(self) -> float:
        """Layers of the fullest stage over their mean."""
        return self.depth * self.stages / self.layers

    @property
    def ticks(self) -> int:
        """Ticks of a step: in each, every stage works on one micro-batch or on none."""
        return self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The part of the ticks in which a stage has nothing to do."""
        return (self.stages - 1) / self.ticks

    def __str__(self) -> str:
        each = f"{self.layers // self.stages}{f' or {self.depth}' if self.layers % self.stages else ''} layers each"
        return (
            f"pipeline of {self.stages} stages, {each}: a batch passes in {self.microbatches} "
            f"micro-batches, and a stage idles {self.bubble:.0%} of the time ({self.stages - 1} of {self.ticks} ticks)"
        )


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
        pipeline: how a batch passes through the stages of a mesh that has some.
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
    pipeline: Pipeline | None = None


def gigabytes(size: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"
