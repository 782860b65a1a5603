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
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import lcm, prod
from typing import TYPE_CHECKING

from spmd_infer.errors import AxisError
from spmd_infer.tensors import Axes

if TYPE_CHECKING:
    import jax
    from jax import Device
    from jax.sharding import Mesh, PartitionSpec

# Mesh axes, outermost first: neighbours along the last one talk most.
STAGE, DATA, MEMBER, SEQUENCE, EXPERT, MODEL = "stage", "data", "member", "seq", "expert", "model"
MESH_AXES = (STAGE, DATA, MEMBER, SEQUENCE, EXPERT, MODEL)

MeshAxes = str | tuple[str, ...] | None
"""What a logical axis is split over: one mesh axis, several (the first one outermost), or none."""

# Logical axes of activations.
BATCH = "batch"
SEQ = "seq"
HEIGHT = "height"
WIDTH = "width"

# Logical axes of activations inside attention, which may be laid out otherwise than outside it.
ATTN_BATCH = "attn_batch"
ATTN_HEADS = "attn_heads"
ATTN_KV_HEADS = "attn_kv_heads"
KEY_SEQ = "key_seq"  # positions of keys and values: whole in the default rules, so that every query sees all of them

# Logical axes of weights (and of the activations that they produce).
EMBED = "embed"  # residual width: whole on every device in the default rules
MLP = "mlp"  # hidden width of a feed-forward block, or the expanded channels of a convolution block
HEADS = "heads"  # query heads (times head dim where a projection fuses the two)
KV_HEADS = "kv_heads"  # key and value heads, likewise
HEAD_DIM = "head_dim"
VOCAB = "vocab"  # tokens or classes
LAYERS = "layers"
CHANNELS = "channels"  # output channels of a plain convolution
EXPERTS = "experts"  # experts of a mixture
ENSEMBLE = "ensemble"  # members of an ensemble

LOGICAL_AXES = frozenset(
    {BATCH, SEQ, HEIGHT, WIDTH, ATTN_BATCH, ATTN_HEADS, ATTN_KV_HEADS, KEY_SEQ}
    | {EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS, CHANNELS, EXPERTS, ENSEMBLE}
)

# 1-D weight-stationary (Megatron): widths over `model`, rows over `data`, columns over `seq`.
DEFAULT_RULES: Mapping[str, MeshAxes] = {
    BATCH: DATA,
    SEQ: SEQUENCE,
    WIDTH: SEQUENCE,
    ATTN_BATCH: DATA,
    ATTN_HEADS: MODEL,
    ATTN_KV_HEADS: MODEL,
    MLP: MODEL,
    HEADS: MODEL,
    KV_HEADS: MODEL,
    VOCAB: MODEL,
    CHANNELS: MODEL,
    LAYERS: STAGE,
    EXPERTS: EXPERT,
    ENSEMBLE: MEMBER,
}


Replicated = tuple[str, int, str, int]
"""A dimension that a rule wanted split but whose size the mesh axis does not divide: ``(logical axis, size, mesh axis,
mesh axis size)``; it stays whole."""


@dataclass(frozen=True)
class Resolved:
    """The outcome of laying one tensor on a mesh.

    Attributes:
        spec: the partition spec.
        replicated: dimensions that stay whole though a rule would split them.
    """

    spec: PartitionSpec
    replicated: tuple[Replicated, ...] = ()


@dataclass(frozen=True)
class AxisRules:
    """Which mesh axes each logical axis is split over.

    Attributes:
        rules: logical axis name to mesh axis or axes; a logical axis that is not named is not split.
        units: how many indivisible units a logical axis has where that is not its size: a fused projection of 9 heads
            of 64 has size 576 but splits only into 9.
        activations: rules that are different for activations, inputs and caches than for weights.
        name: what the layout that these rules make is called.
    """

    rules: Mapping[str, MeshAxes] = field(default_factory=lambda: dict(DEFAULT_RULES))
    units: Mapping[str, int] = field(default_factory=dict)
    activations: Mapping[str, MeshAxes] = field(default_factory=dict)
    name: str = "1-D weight-stationary"

    def __post_init__(self) -> None:
        for logical, axes in (*self.rules.items(), *self.activations.items()):
            unknown = [axis for axis in axis_tuple(axes) if axis not in MESH_AXES]
            if unknown:
                raise AxisError(
                    f"rule {logical!r} -> {axes!r}: there is no mesh axis of that name; "
                    f"mesh axes are {', '.join(MESH_AXES)}"
                )

    def replace(self, **rules: MeshAxes) -> AxisRules:
        """These rules with some changed: ``rules.replace(height="seq", width=None)``."""
        return replace(self, rules={**self.rules, **rules}, name="custom")

    def with_units(self, units: Mapping[str, int]) -> AxisRules:
        """These rules for a model whose axes have the given numbers of indivisible units."""
        return replace(self, units={**self.units, **units})

    @cached_property
    def of_activations(self) -> AxisRules:
        """The rules that activations, inputs and caches follow."""
        return replace(self, rules={**self.rules, **self.activations}, activations={}) if self.activations else self

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over; a mesh axis used as a logical name stands for itself."""
        if logical is None:
            return ()
        return axis_tuple(self.rules.get(logical, logical if logical in MESH_AXES else None))

    def row_parts(self, mesh_shape: Mapping[str, int]) -> int:
        """The number that batch sizes must be a multiple of: the parts that rows are split into."""
        rules = self.of_activations
        return lcm(*(prod(mesh_shape.get(axis, 1) for axis in rules.mesh_axes(name)) for name in (BATCH, ATTN_BATCH)))

    def splits_positions(self, mesh_shape: Mapping[str, int]) -> bool:
        """Whether the positions of a row lie on several devices."""
        return any(mesh_shape.get(axis, 1) > 1 for axis in self.of_activations.mesh_axes(SEQ))

    def leaves_weights_whole(self, mesh_shape: Mapping[str, int]) -> bool:
        """Whether no rule splits a weight on a mesh: each of its axes of more than one device splits rows alone."""
        rows = (BATCH, ATTN_BATCH, SEQ, WIDTH)
        of_weights = {axis for name in self.rules if name not in rows for axis in self.mesh_axes(name)}
        return all(mesh_shape.get(axis, 1) == 1 for axis in of_weights)

    def split(self, logical: str | None, size: int, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes that really split a dimension of ``size``.

        Those that the rules name and the mesh has, from the first one on as long as their product divides the dimension
        and its units.
        """
        units = self.units.get(logical, size) if logical is not None else size
        taken: tuple[str, ...] = ()
        parts = 1
        for axis in self.mesh_axes(logical):
            length = mesh_shape.get(axis, 1)
            if length == 1:
                continue
            parts *= length
            if size % parts or units % parts:
                break
            taken += (axis,)
        return taken

    def resolve(self, axes: Axes, shape: Sequence[int], mesh_shape: Mapping[str, int]) -> Resolved:
        """Lay a tensor of ``shape`` with logical ``axes`` on a mesh of ``mesh_shape``.

        Raises:
            AxisError: the number of axes is not the tensor's rank, or one mesh axis would split two dimensions.
        """
        from jax.sharding import PartitionSpec

        entries, replicated = self.entries(axes, shape, mesh_shape)
        while entries and entries[-1] is None:
            entries.pop()
        return Resolved(PartitionSpec(*entries), replicated)

    def entries(
        self, axes: Axes, shape: Sequence[int], mesh_shape: Mapping[str, int]
    ) -> tuple[list[MeshAxes], tuple[Replicated, ...]]:
        """What splits each dimension of a tensor, and what stays whole though a rule would split it; needs no JAX.

        See ``resolve``.
        """
        if len(axes) != len(shape):
            raise AxisError(f"axes {axes} name {len(axes)} dimensions, but the tensor has shape {tuple(shape)}")
        entries: list[MeshAxes] = []
        owner: dict[str, str] = {}
        replicated: list[Replicated] = []
        for logical, size in zip(axes, shape, strict=True):
            if logical is None:
                entries.append(None)
                continue
            wanted = [axis for axis in self.mesh_axes(logical) if mesh_shape.get(axis, 1) > 1]
            for axis in wanted:
                if axis in owner:
                    raise AxisError(
                        f"logical axes {owner[axis]!r} and {logical!r} of one tensor {axes} are both split over mesh "
                        f"axis {axis!r}; change the rule of one of them"
                    )
                owner[axis] = logical
            split = self.split(logical, size, mesh_shape)
            if len(split) < len(wanted):
                parts = prod(mesh_shape[axis] for axis in wanted)
                replicated.append((logical, self.units.get(logical, size), "x".join(wanted), parts))
                for axis in wanted[len(split) :]:
                    del owner[axis]
            entries.append(None if not split else split[0] if len(split) == 1 else split)
        return entries, tuple(replicated)


def axis_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """One mesh axis, several or none as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


_scope: ContextVar[tuple[AxisRules, Mesh] | None] = ContextVar("spmd_infer_axis_scope", default=None)


@contextmanager
def axis_scope(rules: AxisRules, mesh: Mesh) -> Iterator[None]:
    """Make ``constrain`` use these rules and this mesh; entered inside the traced function, on its thread."""
    token = _scope.set((rules, mesh))
    try:
        yield
    finally:
        _scope.reset(token)


MARK = "logical axes: "
"""How a constraint is written into a jaxpr that is traced for planning: as a name, ``logical axes: batch,,embed``."""

_recording: ContextVar[bool] = ContextVar("spmd_infer_axis_recording", default=False)


@contextmanager
def recorded_constraints() -> Iterator[None]:
    """Make ``constrain`` leave its axes in the jaxpr, for a planner to read, instead of laying anything out."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def marked_axes(name: str) -> Axes | None:
    """The axes that a name in a jaxpr carries; None where it is somebody else's name."""
    if not name.startswith(MARK):
        return None
    return tuple(axis or None for axis in name.removeprefix(MARK).split(","))


WINDOW_MARK = "window: "
"""How the operand of an operation over windows is marked in such a jaxpr: ``window: 1,1,1,1;2,1,1,1``."""

Reaches = tuple[tuple[int, int, int, int], ...]
"""``(dimension, places before, places after, stride)`` that windows reach beyond each part of a dimension."""


def mark_window(x: jax.Array, reaches: Reaches) -> jax.Array:
    """Leave in a jaxpr that is traced for planning how far windows over ``x`` reach; otherwise ``x`` as it is."""
    if not _recording.get():
        return x
    from jax.ad_checkpoint import checkpoint_name

    marked: jax.Array = checkpoint_name(x, WINDOW_MARK + ";".join(",".join(map(str, reach)) for reach in reaches))
    return marked


def marked_window(name: str) -> Reaches | None:
    """The reaches that a name in a jaxpr carries; None where it is somebody else's name."""
    if not name.startswith(WINDOW_MARK):
        return None
    rows = [tuple(map(int, row.split(","))) for row in name.removeprefix(WINDOW_MARK).split(";")]
    return tuple((dimension, before, after, stride) for dimension, before, after, stride in rows)


def current_scope() -> tuple[AxisRules, Mesh] | None:
    """The rules and mesh that the model is being traced for; None outside an engine."""
    return _scope.get()


def current_device() -> Device:
    """A device like those that the model is being traced for; outside an engine one of this process."""
    import jax
    from jax.sharding import Mesh

    scope = current_scope()
    mesh = scope[1] if scope is not None else None
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.local_devices()[0]  # pipelines' are abstract


def current_platform() -> str:
    """The platform of ``current_device``."""
    return str(current_device().platform)


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
        if _recording.get():
            from jax.ad_checkpoint import checkpoint_name

            marked: jax.Array = checkpoint_name(x, MARK + ",".join(axis or "" for axis in axes))
            return marked
        return x
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    rules, mesh = scope
    resolved = rules.of_activations.resolve(axes, x.shape, dict(mesh.shape))
    wished = {logical for logical, *_ in resolved.replicated}
    entries = [*resolved.spec, *(None,) * (x.ndim - len(resolved.spec))]
    spec = [
        PartitionSpec.UNCONSTRAINED if logical in wished and entry is None else entry
        for logical, entry in zip(axes, entries, strict=True)
    ]
    laid: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
    return laid
