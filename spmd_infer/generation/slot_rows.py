"""Rows of per-slot state: taken for a batch, put when a request enters. For any tree of arrays ``[slots, ...]``."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def take_rows(tree: Tree, rows: jax.Array) -> Tree:
    """The arrays' ``rows``, ``[B, ...]``; scalars are kept.

    Args:
        tree: arrays ``[slots, ...]``, and scalars that hold for all slots.
        rows: ``[B]`` int32.
    """
    taken: Tree = jax.tree.map(lambda leaf: leaf[rows] if jnp.ndim(leaf) else leaf, tree)
    return taken


def put_rows(tree: Tree, rows: jax.Array, entering: Tree) -> Tree:
    """The arrays with ``rows`` replaced; scalars are kept as they were.

    Args:
        tree: arrays ``[slots, ...]``, and scalars; donate them, and the update happens in place.
        rows: ``[B]`` int32; of equal ones any may win, so rows that fill a batch up share a slot that nobody uses.
        entering: the same tree with arrays ``[B, ...]``.
    """

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[rows].set(new) if jnp.ndim(leaf) else leaf

    merged: Tree = jax.tree.map(put, tree, entering)
    return merged


__all__ = ["put_rows", "take_rows"]
