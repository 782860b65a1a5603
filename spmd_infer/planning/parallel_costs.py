"""What pipelines and expert layouts cost: ticks, messages between stages, tokens brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from spmd_infer.axes import BATCH, EXPERTS, LAYERS, MLP, AxisRules
from spmd_infer.errors import PlanError
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.cost import MeshCost, collective_time
from spmd_infer.planning.estimates import Pipeline, StepTime
from spmd_infer.planning.hardware import Cluster


@dataclass(frozen=True)
class Message:
    """A collective that a layout needs.

    Attributes:
        kind: as ``collective_time`` names it.
        axes: the mesh axes along which devices talk.
        nbytes: bytes of its result on one device.
        times: how often it happens in one step.
    """

    kind: str
    axes: tuple[str, ...]
    nbytes: int
    times: int = 1


@dataclass(frozen=True)
class PipelineCost:
    """What one step of a pipeline costs.

    Attributes:
        time: of the whole step, embedding and head included.
        bubble: the part of the ticks in which a stage works on no micro-batch.
        permutes: messages between neighbouring stages: activations go on to the next stage, and others make room behind
            them, once a tick.
    """

    time: StepTime
    bubble: float
    permutes: Message


def pipeline_cost(
    whole: MeshCost,
    outside: MeshCost,
    layer_weights: int,
    row_bytes: int,
    rows: int,
    shape: Pipeline,
    mesh: MeshSpec,
    rules: AxisRules,
    cluster: Cluster,
) -> PipelineCost:
    """Estimate a step of a pipeline from the same step without one.

    A step takes M + S - 1 ticks. In each, every stage passes one of M micro-batches through its own layers, for which
    it reads their weights, and then passes it on; the fullest stage sets the pace. Simulated devices share one machine:
    there a stage that has nothing to do leaves it to the others, and what counts is the work of all stages together.

    Args:
        whole: the model with its layers one by one, on ``mesh`` with rows split over the stages (as ``rules`` say).
        outside: likewise without any layer.
        layer_weights: bytes of all layers' weights on one device, were there no stages.
        row_bytes: bytes of one row of the activations that travel through the pipeline.
        rows: rows of the batch.
        shape: stages, layers and micro-batches.
        mesh: the mesh, with its stages.
        rules: where logical axes go; the rows over the stages too.
        cluster: the devices.

    Raises:
        PlanError: the costs hold no times.
    """
    if whole.time is None or outside.time is None:
        raise PlanError("the cost of a pipeline needs the work of a step; give the inputs")
    stages, count = shape.stages, shape.microbatches
    shared = cluster.device.shared
    pace = 1.0 if shared else shape.fullest  # of the fullest stage against the mean
    working = count if shared else shape.ticks
    reads = layer_weights / _bandwidth(cluster)
    compute = (whole.time.compute - outside.time.compute) / count * pace
    memory = (max(0.0, whole.time.memory - outside.time.memory - reads) / count + reads / stages) * pace
    talk = 0.0
    for (kind, along), traffic in whole.collectives.items():
        before = outside.collectives.get((kind, along))
        times = traffic.count - (before.count if before else 0)
        nbytes = traffic.nbytes - (before.nbytes if before else 0)
        if times > 0:
            size = nbytes / times * stages / count
            talk += times / stages * pace * collective_time(kind, int(size), mesh, along, cluster)
    axes = tuple(axis for axis in rules.mesh_axes(LAYERS) if mesh.shape.get(axis, 1) > 1)
    parts = rules.row_parts(mesh.shape) // stages
    permutes = Message("collective-permute", axes, row_bytes * rows // count // parts, 2 * shape.ticks)
    tick = StepTime(compute, memory, talk, overlaps=not shared).total
    passing = message_time((permutes,), mesh, cluster)
    return PipelineCost(
        StepTime(
            compute=outside.time.compute + working * compute,
            memory=outside.time.memory + working * memory,
            collectives=outside.time.collectives + working * talk + passing,
            total_seconds=outside.time.total + working * tick + passing,
            overlaps=not shared,
        ),
        shape.bubble,
        permutes,
    )


@dataclass(frozen=True)
class ExpertWork:
    """The tokens and sizes of one block of experts.

    Attributes:
        tokens: how many tokens there are in all.
        rows: the rows of the batch that they come in.
        embed_dim: width of a token.
        mlp_dim: hidden width of one expert.
        num_experts: how many experts there are.
        experts_per_token: how many of them each token gets.
        itemsize: bytes of one number of weights and tokens.
        imbalance: how many times the mean the busiest device's tokens are.
    """

    tokens: int
    rows: int
    embed_dim: int
    mlp_dim: int
    num_experts: int
    experts_per_token: int
    itemsize: int = 4
    imbalance: float = 1.0


def expert_messages(mesh: MeshSpec, rules: AxisRules, work: ExpertWork) -> tuple[Message, ...]:
    """The collectives of a block of experts (see ``spmd_infer.models.experts``).

    Tokens that are split over an axis of the weights are brought together along it, and their outputs scattered back;
    over axes of the weights along which devices hold the same tokens, the partial outputs are summed.
    """
    split = _expert_axes(mesh, rules, work)
    own = work.tokens * work.embed_dim * work.itemsize // _parts(mesh, split.rows)
    messages = []
    if split.shared:
        messages.append(Message("all-gather", split.shared, own * _parts(mesh, split.shared)))
        messages.append(Message("reduce-scatter", split.shared, own))
    if split.summed:
        messages.append(Message("all-reduce", split.summed, own))
    return tuple(messages)


def expert_cost(mesh: MeshSpec, rules: AxisRules, work: ExpertWork, cluster: Cluster, dtype: str) -> StepTime:
    """Estimate one block of experts.

    Weights are read of those experts that tokens choose: of E experts, ``E (1 - (1 - k/E)^n)`` where n tokens choose
    evenly. On devices of their own the busiest one sets the time; simulated ones share the machine, so that only the
    sum counts.

    Args:
        mesh: the mesh.
        rules: where logical axes go.
        work: tokens and sizes.
        cluster: the devices.
        dtype: in which the products are computed.
    """
    split = _expert_axes(mesh, rules, work)
    device = cluster.device.running(cluster.count)
    share = cluster.count if device.shared else 1
    imbalance = 1.0 if device.shared else work.imbalance
    group = work.tokens * _parts(mesh, split.shared) / _parts(mesh, split.rows)  # tokens that a device sees
    chosen = group * work.experts_per_token  # and how often they choose an expert
    of_experts, of_hidden = _parts(mesh, split.experts), _parts(mesh, split.hidden)
    matrix = work.embed_dim * work.mlp_dim
    flops = 2 * 3 * matrix * chosen * imbalance / of_experts / of_hidden
    used = work.num_experts * (1 - (1 - work.experts_per_token / work.num_experts) ** group)
    weights = 3 * matrix * work.itemsize * used / of_experts / of_hidden
    # Rows in and out of the experts, their hidden width, and the sums by token; the latter begin as zeros everywhere.
    # On a CPU the former stay in its caches, and what they take is part of the products' rate.
    active = chosen * imbalance / of_experts * (work.itemsize * work.embed_dim + 3 * 4 * work.embed_dim)
    active += chosen * imbalance / of_experts * 4 * 3 * work.mlp_dim / of_hidden
    active = 0 if device.shared else active
    sums = 2 * group * 4 * work.embed_dim
    rate = device.peak(dtype) * device.matmul_efficiency * device.expert_efficiency / share
    return StepTime(
        compute=flops / rate,
        memory=(weights + active + sums) / _bandwidth(cluster),
        collectives=message_time(expert_messages(mesh, rules, work), mesh, cluster),
    )


def expert_scratch(mesh: MeshSpec, rules: AxisRules, work: ExpertWork, cluster: Cluster) -> int:
    """Bytes of intermediate results of a block of experts on a device.

    The tokens that it sees and their sums in float32; on accelerators also the rows of all experts one after another,
    with their hidden width, which CPUs work through in blocks.
    """
    split = _expert_axes(mesh, rules, work)
    group = work.tokens * _parts(mesh, split.shared) // _parts(mesh, split.rows)
    chosen = group * work.experts_per_token
    size = group * work.embed_dim * (work.itemsize + 4) + 4 * 4 * chosen
    if not cluster.device.shared:
        size += chosen * (work.embed_dim * (work.itemsize + 4) + 3 * 4 * work.mlp_dim // _parts(mesh, split.hidden))
    return size


def message_time(messages: Sequence[Message], mesh: MeshSpec, cluster: Cluster) -> float:
    """Seconds that the messages of a step take, one after the other."""
    return sum(m.times * collective_time(m.kind, m.nbytes, mesh, m.axes, cluster) for m in messages)


@dataclass(frozen=True)
class _ExpertAxes:
    """Mesh axes that split tokens' rows, experts, and their hidden width; and those that rows share with weights."""

    rows: tuple[str, ...]
    experts: tuple[str, ...]
    hidden: tuple[str, ...]

    @property
    def shared(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.rows if axis in (*self.experts, *self.hidden))

    @property
    def summed(self) -> tuple[str, ...]:
        return tuple(axis for axis in (*self.experts, *self.hidden) if axis not in self.rows)


def _expert_axes(mesh: MeshSpec, rules: AxisRules, work: ExpertWork) -> _ExpertAxes:
    return _ExpertAxes(
        rules.of_activations.split(BATCH, work.rows, mesh.shape),
        rules.split(EXPERTS, work.num_experts, mesh.shape),
        rules.split(MLP, work.mlp_dim, mesh.shape),
    )


def _parts(mesh: MeshSpec, axes: Sequence[str]) -> int:
    shape: Mapping[str, int] = mesh.shape
    return prod(shape.get(axis, 1) for axis in axes)


def _bandwidth(cluster: Cluster) -> float:
    """Bytes per second that one device reads from its memory."""
    device = cluster.device.running(cluster.count)
    return device.bandwidth * device.bandwidth_efficiency / (cluster.count if device.shared else 1)
