"""What blocks of experts add to a plan: found in the model, costed by ``parallel_costs``.

Their work depends on which tokens choose which expert, so it cannot be read off a trace. The model is traced with each
block replaced by one that only writes down what comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import nnx

from spmd_infer.axes import ATTN_BATCH, BATCH, DATA, EMBED, EXPERT, SEQ, AxisRules, constrain
from spmd_infer.functional import ModelFunction, model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.experts import Experts, ExpertSizes
from spmd_infer.planning.cost import MeshCost, Traffic
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.parallel_costs import ExpertWork, expert_cost, expert_messages, expert_scratch

ROWS_OVER_EXPERTS = AxisRules(
    activations={BATCH: (DATA, EXPERT), ATTN_BATCH: (DATA, EXPERT)}, name="1-D, rows over experts"
)
"""1-D, with rows split over the experts' devices too: no other layer is computed twice, and tokens are brought together
for the experts and scattered back."""


@dataclass(eq=False)
class SeenExperts:
    """The blocks of experts of a model.

    Attributes:
        sizes: of each block that the model has.
        work: tokens and sizes of each block in the order of execution, known once the model has been traced.
        dtype: in which they compute.
    """

    sizes: list[ExpertSizes]
    work: list[ExpertWork] = field(default_factory=list)
    dtype: Any = None


def without_experts(model: ModelFunction) -> tuple[ModelFunction, SeenExperts]:
    """The model with its blocks of experts passing tokens on unchanged; the model itself where it has none."""
    seen = SeenExperts([])
    if model.kind != "nnx":
        return model, seen
    module = model.rebuild({path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in model.params.items()})
    if not isinstance(module, nnx.Module):  # an ensemble's parameters
        return model, seen
    blocks = [(path, block) for path, block in nnx.iter_modules(module) if isinstance(block, Experts)]
    seen.sizes += [block.sizes for _, block in blocks]
    for path, block in blocks:
        passing = _Passing(block.sizes, seen)
        if not path:
            module = passing
            continue
        owner: Any = module
        for part in path[:-1]:
            owner = owner[part] if isinstance(part, int) else getattr(owner, str(part))
        if isinstance(path[-1], int):
            owner[path[-1]] = passing
        else:
            setattr(owner, str(path[-1]), passing)
    if not blocks:
        return model, seen
    return replace(model_function(module), name=model.name, call=model.call), seen


class _Passing(nnx.Module):
    """A block of experts that computes nothing and writes down its tokens."""

    def __init__(self, sizes: ExpertSizes, seen: SeenExperts) -> None:
        self.sizes, self.seen = sizes, seen

    def __call__(self, x: jax.Array) -> jax.Array:
        sizes, tokens = self.sizes, x.shape[0] * x.shape[1]
        self.seen.dtype = x.dtype
        self.seen.work.append(
            ExpertWork(
                tokens,
                x.shape[0],
                sizes.embed_dim,
                sizes.mlp_dim,
                sizes.num_experts,
                sizes.experts_per_token,
                x.dtype.itemsize,
            )
        )
        return constrain(x, BATCH, SEQ, EMBED)


def with_experts(
    cost: MeshCost, blocks: Sequence[ExpertWork], dtype: Any, mesh: MeshSpec, rules: AxisRules, cluster: Cluster
) -> MeshCost:
    """The cost of a step with its blocks of experts, from that of the rest.

    Args:
        cost: of the model without them; its memory counts their weights.
        blocks: their tokens and sizes.
        dtype: in which they compute.
        mesh: the mesh.
        rules: where logical axes go.
        cluster: the devices.
    """
    if not blocks or cost.time is None:
        return cost
    time, traffic, scratch = cost.time, dict(cost.collectives), 0
    for block in blocks:
        own = expert_cost(mesh, rules, block, cluster, dtype)
        time = replace(
            time,
            compute=time.compute + own.compute,
            memory=time.memory + own.memory,
            collectives=time.collectives + own.collectives,
        )
        for message in expert_messages(mesh, rules, block):
            known = traffic.get((message.kind, message.axes), Traffic())
            traffic[message.kind, message.axes] = Traffic(known.count + 1, known.nbytes + message.nbytes)
        scratch = max(scratch, expert_scratch(mesh, rules, block, cluster))
    memory = replace(cost.memory, activations=max(cost.memory.activations, scratch))
    return MeshCost(memory, time, traffic)
