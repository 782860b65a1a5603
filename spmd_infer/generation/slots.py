"""What the devices know of each running request, in one slot each, so that a step need not wait for the host.

The arrays are ``[D, S + 1, ...]``: parts of the rows, slots of a part and one more, which rows that only fill up a
batch use. A step takes the slots of its rows, and puts back what changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_BATCH, constrain
from spmd_infer.generation.sampling import SamplingArrays
from spmd_infer.generation.token_rules import TokenRules
from spmd_infer.generation.token_state import TokenState
from spmd_infer.tensors import Axes

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The state of every slot.

    Attributes:
        tokens: ``[D, S + 1]`` int32, the token that was chosen last and is run next.
        lengths: ``[D, S + 1]`` int32, positions whose keys and values are in the cache.
        generated: ``[D, S + 1]`` int32, tokens chosen so far: where the random stream stands.
        sampling: the parameters of each; its flags are those of the last step.
    """

    tokens: jax.Array
    lengths: jax.Array
    generated: jax.Array
    sampling: SamplingArrays

    @classmethod
    def empty(cls, sampling: SamplingArrays, parts: int, slots: int) -> Slots:
        """Slots that nobody has; ``sampling`` shows what the parameters of one row are. For tracing."""

        def zeros() -> jax.Array:  # a buffer each, since each is donated
            return jnp.zeros((parts, slots + 1), jnp.int32)

        return cls(zeros(), zeros(), zeros(), empty_slots(sampling, parts, slots))

    def advanced(self, slots: jax.Array, tokens: jax.Array, lengths: jax.Array, generated: jax.Array) -> Slots:
        """After a step of the rows in ``slots``; all ``[D, b]``."""
        return replace(
            self,
            tokens=put(self.tokens, slots, tokens),
            lengths=put(self.lengths, slots, lengths),
            generated=put(self.generated, slots, generated),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotRules:
    """What slots need besides where some request has rules about single tokens.

    Attributes:
        rules: the rules of each; flags are those of the last step.
        seen: the tokens of each so far.
    """

    rules: TokenRules
    seen: TokenState

    def only(self, ruled: jax.Array) -> SlotRules:
        """With rules that change nothing in the rows where ``ruled [D, b]`` is false: their slots hold another's."""

        def where(values: jax.Array, neutral: float) -> jax.Array:
            return jnp.where(ruled.reshape(ruled.shape + (1,) * (values.ndim - 2)), values, neutral)

        rules = self.rules
        return replace(
            self,
            rules=replace(
                rules,
                repetition_penalty=where(rules.repetition_penalty, 1.0),
                frequency_penalty=where(rules.frequency_penalty, 0.0),
                presence_penalty=where(rules.presence_penalty, 0.0),
                bias_ids=where(rules.bias_ids, -1),
                bad_words=where(rules.bad_words, -1),
            ),
        )

    def counted(self, slots: jax.Array, tokens: jax.Array) -> SlotRules:
        """With one token ``[D, b]`` more in each of ``slots [D, b]``."""
        return replace(self, seen=jax.vmap(lambda seen, rows, new: seen.count(rows, new))(self.seen, slots, tokens))


def empty_slots(tree: Tree, parts: int, slots: int) -> Tree:
    """Zeros for every slot, where ``tree`` shows dtypes and further dimensions as ``[rows, ...]``; for tracing."""

    def fit(row: Any) -> jax.Array:
        return jnp.zeros(row.shape if row.ndim == 0 else (parts, slots + 1, *row.shape[1:]), row.dtype)

    zeros: Tree = jax.tree.map(fit, tree)
    return zeros


def slot_axes(tree: Any) -> Any:
    """The logical axes of arrays ``[D, ...]`` and scalars."""
    return jax.tree.map(lambda x: _axes(x.ndim), tree)


def _axes(rank: int) -> Axes:
    return (ATTN_BATCH, *(None,) * (rank - 1)) if rank else ()


def take(tree: Tree, slots: jax.Array) -> Tree:
    """The entries ``[D, b, ...]`` of ``slots [D, b]``; scalars stay as they are."""
    taken: Tree = jax.tree.map(lambda x: x if x.ndim == 0 else jax.vmap(lambda a, i: a[i])(x, slots), tree)
    return taken


def put(tree: Tree, slots: jax.Array, rows: Tree) -> Tree:
    """``tree`` with ``rows [D, b, ...]`` at ``slots [D, b]``; scalars are replaced."""

    def one(x: jax.Array, new: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return jnp.asarray(new)
        written = jax.vmap(lambda a, i, v: a.at[i].set(v))(x, slots, jnp.asarray(new, x.dtype))
        return constrain(written, *_axes(x.ndim))

    merged: Tree = jax.tree.map(one, tree, rows)
    return merged


def flat(tree: Tree) -> Tree:
    """Rows of all parts behind one another: ``[D, b, ...]`` as ``[D b, ...]``."""
    behind: Tree = jax.tree.map(lambda x: x if x.ndim == 0 else x.reshape(-1, *x.shape[2:]), tree)
    return behind
