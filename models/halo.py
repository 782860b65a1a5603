"""Convolutions of images whose rows or columns are split over devices.

A device computes its own part of the output. For that it needs, besides its part of the input, the edges of its
neighbours' parts: a halo, passed by one collective-permute in each direction. Left to itself, XLA does about the same
where only rows or columns are split. Where channels are split too, over another mesh axis, its results are wrong (seen
in jaxlib 0.10.2, whatever the annotations of operands and result). So the halo is exchanged by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spmd_infer.axes import BATCH, HEIGHT, WIDTH, current_scope, mark_window

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and after the rows, and before and after the columns."""

Convolve = Callable[[jax.Array, jax.Array, Padding], jax.Array]
"""Takes images ``[B, height, width, in]``, a weight ``[window, window, in, out]`` and the padding."""


def convolve(
    compute: Convolve,
    x: jax.Array,
    weight: jax.Array,
    *,
    stride: int,
    inputs: str | None,
    outputs: str | None,
    depthwise: bool = False,
) -> jax.Array:
    """A convolution with TensorFlow's "SAME" padding, however the image is split in the current scope.

    A dimension of the image is split where every device gets as many outputs and no halo is larger than a part.
    Otherwise it is brought together first: left to itself, XLA cuts it unevenly and exchanges pieces for every place
    of the window.

    Args:
        compute: the convolution itself; it may see parts of the images and of the channels.
        x: ``[B, height, width, in]``.
        weight: ``[window, window, in, out]``.
        stride: rows and columns between outputs.
        inputs: logical axis of the input channels, which are summed.
        outputs: logical axis of the output channels.
        depthwise: whether each channel is convolved by itself: the images then have the output channels.

    Returns:
        ``[B, ceil(height / stride), ceil(width / stride), out]``.
    """
    window = weight.shape[0]
    (_, *sizes, in_channels), out_channels = x.shape, weight.shape[3]
    padding = same_padding(sizes[0], window, stride), same_padding(sizes[1], window, stride)
    scope = current_scope()
    if scope is None:
        if depthwise:  # a convolution proper says so itself
            reaches = zip(padding, (1, 2), strict=True)
            x = mark_window(
                x, tuple((d, before, max(0, window - stride - before), stride) for (before, _), d in reaches)
            )
        return compute(x, weight, padding)
    rules, mesh = scope[0].of_activations, scope[1]
    shape = {str(name): int(size) for name, size in mesh.shape.items()}
    wished = {axis for name in (HEIGHT, WIDTH) for axis in rules.mesh_axes(name) if shape.get(axis, 1) > 1}
    if not wished:
        return compute(x, weight, padding)
    spatial = [
        _axis_of_halo(rules.split(name, size, shape), size, shape, around, stride)
        for name, size, around in zip((HEIGHT, WIDTH), sizes, padding, strict=True)
    ]
    summed = () if depthwise else _free(rules.split(inputs, in_channels, shape), wished)
    made = _free(rules.split(outputs, out_channels, shape), {*wished, *summed})
    rows = _free(rules.split(BATCH, x.shape[0], shape), {*wished, *summed, *made})

    def on_part(x: jax.Array, weight: jax.Array) -> jax.Array:
        left = list(padding)
        for dimension, axis in enumerate(spatial):
            if axis is not None:
                x = _with_halo(x, dimension + 1, axis, shape[axis], *padding[dimension])
                left[dimension] = (0, 0)
        y = compute(x, weight, (left[0], left[1]))
        return jax.lax.psum(y, summed) if summed else y

    channels = made if depthwise else summed
    convolved: jax.Array = jax.shard_map(
        on_part,
        mesh=mesh,
        in_specs=(
            PartitionSpec(rows or None, *spatial, channels or None),
            PartitionSpec(None, None, summed or None, made or None),
        ),
        out_specs=PartitionSpec(rows or None, *spatial, made or None),
    )(x, weight)
    return convolved


def same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a dimension, so that it has ``ceil(size / stride)`` outputs; an odd one goes after."""
    missing = max((-(-size // stride) - 1) * stride + window - size, 0)
    return missing // 2, missing - missing // 2


def _axis_of_halo(
    axes: tuple[str, ...], size: int, shape: dict[str, int], around: tuple[int, int], stride: int
) -> str | None:
    """The mesh axis that a dimension of the image is split over, if its halos can be had from direct neighbours."""
    if len(axes) != 1:
        return None
    part = size // prod(shape[axis] for axis in axes)
    return axes[0] if part % stride == 0 and max(around) <= part else None


def _free(axes: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    """Mesh axes that split nothing else of the tensor."""
    return () if taken & set(axes) else axes


def _with_halo(x: jax.Array, dimension: int, axis: str, parts: int, before: int, after: int) -> jax.Array:
    """A part of an image with the edges of its neighbours; zeros at the border, where there is none."""
    size = x.shape[dimension]
    pieces = [x]
    if before:
        edge = jax.lax.slice_in_dim(x, size - before, size, axis=dimension)
        pieces.insert(0, jax.lax.ppermute(edge, axis, [(part, part + 1) for part in range(parts - 1)]))
    if after:
        edge = jax.lax.slice_in_dim(x, 0, after, axis=dimension)
        pieces.append(jax.lax.ppermute(edge, axis, [(part + 1, part) for part in range(parts - 1)]))
    return jnp.concatenate(pieces, axis=dimension) if len(pieces) > 1 else x


__all__ = ["Convolve", "Padding", "convolve", "same_padding"]
