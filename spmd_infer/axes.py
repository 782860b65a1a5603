"""Logical axis names, and the rules that lay them on mesh axes.

Models name the dimensions of their weights and activations ("embed", "heads", …) and know nothing of devices. An
``AxisRules`` says on which mesh axis each name is split. The engine enters ``axis_scope(rules, mesh)`` while it
*traces* a model, so ``constrain`` inside the model finds the rules on whatever thread traces it; outside a scope
``constrain`` does nothing and the model is plain Flax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spmd_infer.errors import AxisError
from spmd_infer.tensors import Axes

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, PartitionSpec

# Mesh axes, outermost first: neighbours along the last one talk most.
STAGE, DATA, MEMBER, SEQUENCE, EXPERT, MODEL = "stage", "data", "member", "seq", "expert", "model"
MESH_AXES = (STAGE, DATA, MEMBER, SEQUENCE, EXPERT, MODEL)

# Logical axes of activations.
BATCH = "batch"
SEQ = "seq"
HEIGHT = "height"
WIDTH = "width"

# Logical axes of weights (and of the activations that they produce).
EMBED = "embed"  # residual width: whole on every device in the default rules
MLP = "mlp"  # hidden width of a feed-forward block, or the expanded channels of a convolution block
HEADS = "heads"  # query heads (times head dim where a projection fuses the two)
KV_HEADS = "kv_heads"  # key and value heads, likewise
HEAD_DIM = "head_dim"
VOCAB = "vocab"  # tokens or classes
LAYERS = "layers"
CHANNELS = "channels"  # output channels of a plain convolution
ENSEMBLE = "ensemble"  # members of an ensemble

LOGICAL_AXES = frozenset(
    {BATCH, SEQ, HEIGHT, WIDTH, EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS, CHANNELS, ENSEMBLE}
)

# 1-D weight-stationary (Megatron): widths over `model`, rows over `data`, columns over `seq`.
DEFAULT_RULES: Mapping[str, str] = {
    BATCH: DATA,
    SEQ: SEQUENCE,
    WIDTH: SEQUENCE,
    MLP: MODEL,
    HEADS: MODEL,
    KV_HEADS: MODEL,
    VOCAB: MODEL,
    CHANNELS: MODEL,
    ENSEMBLE: MEMBER,
}


@dataclass(frozen=True)
class Resolved:
    """The outcome of laying one tensor on a mesh.

    Attributes:
        spec: the partition spec.
        replicated: ``(logical axis, size, mesh axis, mesh axis size)`` of each dimension that a rule wanted split but
            whose size the mesh axis does not divide; those dimensions stay whole.
    """

    spec: PartitionSpec
    replicated: tuple[tuple[str, int, str, int], ...] = ()


@dataclass(frozen=True)
class AxisRules:
    """Which mesh axis each logical axis is split over.

    Attributes:
        rules: logical axis name to mesh axis name; a logical axis that is not named is not split.
        units: how many indivisible units a logical axis has where that is not its size: a fused projection of 9 heads
            of 64 has size 576 but splits only into 9.
    """

    rules: Mapping[str, str | None] = field(default_factory=lambda: dict(DEFAULT_RULES))
    units: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for logical, axis in self.rules.items():
            if axis is not None and axis not in MESH_AXES:
                raise AxisError(
                    f"rule {logical!r} -> {axis!r}: there is no mesh axis of that name; "
                    f"mesh axes are {', '.join(MESH_AXES)}"
                )

    def replace(self, **rules: str | None) -> AxisRules:
        """These rules with some changed: ``rules.replace(height="seq", width=None)``."""
        return AxisRules({**self.rules, **rules}, self.units)

    def with_units(self, units: Mapping[str, int]) -> AxisRules:
        """These rules for a model whose axes have the given numbers of indivisible units."""
        return AxisRules(self.rules, {**self.units, **units})

    def mesh_axis(self, logical: str | None) -> str | None:
        """The mesh axis that a logical axis is split over; a mesh axis used as a logical name stands for itself."""
        if logical is None:
            return None
        return self.rules.get(logical, logical if logical in MESH_AXES else None)

    def resolve(self, axes: Axes, shape: Sequence[int], mesh_shape: Mapping[str, int]) -> Resolved:
        """Lay a tensor of ``shape`` with logical ``axes`` on a mesh of ``mesh_shape``.

        Raises:
            AxisError: the number of axes is not the tensor's rank, or one mesh axis would split two dimensions.
        """
        from jax.sharding import PartitionSpec

        if len(axes) != len(shape):
            raise AxisError(f"axes {axes} name {len(axes)} dimensions, but the tensor has shape {tuple(shape)}")
        entries: list[str | None] = []
        taken: dict[str, str] = {}
        replicated: list[tuple[str, int, str, int]] = []
        for logical, size in zip(axes, shape, strict=True):
            axis = self.mesh_axis(logical)
            parts = mesh_shape.get(axis, 1) if axis is not None else 1
            if logical is None or axis is None or parts == 1:
                entries.append(None)
                continue
            if axis in taken:
                raise AxisError(
                    f"logical axes {taken[axis]!r} and {logical!r} of one tensor {axes} are both split over mesh axis "
                    f"{axis!r}; change the rule of one of them"
                )
            units = self.units.get(logical, size)
            if size % parts or units % parts:
                replicated.append((logical, units, axis, parts))
                entries.append(None)
                continue
            taken[axis] = logical
            entries.append(axis)
        while entries and entries[-1] is None:
            entries.pop()
        return Resolved(PartitionSpec(*entries), tuple(replicated))


_scope: ContextVar[tuple[AxisRules, Mesh] | None] = ContextVar("spmd_infer_axis_scope", default=None)


@contextmanager
def axis_scope(rules: AxisRules, mesh: Mesh) -> Iterator[None]:
    """Make ``constrain`` use these rules and this mesh; entered inside the traced function, on its thread."""
    token = _scope.set((rules, mesh))
    try:
        yield
    finally:
        _scope.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask XLA to lay an activation out by its logical axes.

    Args:
        x: an activation of rank ``len(axes)``.
        *axes: one logical axis name (or None) for each dimension.

    Returns:
        ``x``, annotated when called inside an ``axis_scope``; otherwise unchanged. A dimension that its mesh axis does
        not divide is left to XLA.

    Raises:
        AxisError: the number of axes is not ``x``'s rank, or two of them share a mesh axis.
    """
    scope = _scope.get()
    if scope is None:
        if len(axes) != x.ndim:
            raise AxisError(f"constrain was given {len(axes)} axes {axes} for an array of shape {x.shape}")
        return x
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    rules, mesh = scope
    resolved = rules.resolve(axes, x.shape, dict(mesh.shape))
    wished = {logical for logical, *_ in resolved.replicated}
    entries = [*resolved.spec, *(None,) * (x.ndim - len(resolved.spec))]
    spec = [
        PartitionSpec.UNCONSTRAINED if logical in wished else entry
        for logical, entry in zip(axes, entries, strict=True)
    ]
    laid: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
    return laid
