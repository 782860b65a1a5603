"""The traffic to plan for, and what to aim at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from spmd_infer.axes import BATCH, SEQ
from spmd_infer.tensors import Axes, InputSpec

DEFAULT_SIZE = 128
"""The size planned for where a varying dimension has none."""

DEFAULT_OUTPUT = 64
"""Tokens planned for that each request of a model that generates asks for."""

Objective = Literal["latency", "throughput", "cost"]


@dataclass(frozen=True)
class Workload:
    """The traffic to plan for.

    Attributes:
        rows: batch size, or concurrent requests.
        sizes: size of each other varying input dimension, such as ``{"seq": 128}``.
        output_len: tokens that each request of a model that generates asks for.
        cache_dtype: what the cache of a model that generates holds, as ``GenerationOptions`` takes it.
        objective: ``latency`` takes the plan that is done with these rows first; ``throughput`` the one with most rows
            a second when each plan takes as many rows as it has memory for; ``cost`` the one with least device time a
            row, which may use fewer devices than there are.
        ttft_limit: seconds to the first token that no plan may exceed.
        itl_limit: seconds between tokens that no plan may exceed.
    """

    rows: int = 8
    sizes: Mapping[str, int] = field(default_factory=lambda: {SEQ: DEFAULT_SIZE})
    output_len: int = DEFAULT_OUTPUT
    objective: Objective = "latency"
    ttft_limit: float | None = None
    itl_limit: float | None = None
    cache_dtype: str = "auto"

    def size(self, name: str) -> int:
        """The size of a varying dimension besides the batch."""
        return self.sizes.get(name, DEFAULT_SIZE)

    def describe(self, inputs: Any, *, generates: bool = False) -> str:
        """The traffic in words, with only those sizes that the inputs have."""
        if inputs is None:
            return "unknown (give inputs= or example= to let the batch count)"
        names = {d for spec in jax.tree_util.tree_leaves(inputs) for d in spec.shape if isinstance(d, str)} - {BATCH}
        parts = [f"{self.rows} rows"] + [f"{name}={self.size(name)}" for name in sorted(names)]
        if generates:
            parts.append(f"{self.output_len} tokens out")
        return ", ".join(parts)

    def batch(self, inputs: Any, rows: int) -> tuple[Any, list[Axes]]:
        """Abstract inputs of this size, and the axes of each."""
        kept = inputs
        if isinstance(inputs, Mapping):
            kept = {k: v for k, v in inputs.items() if not isinstance(v, InputSpec) or v.required}
        leaves, treedef = jax.tree_util.tree_flatten(kept)
        shapes = [
            jax.ShapeDtypeStruct(
                tuple(rows if d == BATCH else self.size(d) if isinstance(d, str) else d for d in spec.shape),
                np.dtype(spec.dtype),
            )
            for spec in leaves
        ]
        return jax.tree_util.tree_unflatten(treedef, shapes), [tuple(spec.axes) for spec in leaves]
