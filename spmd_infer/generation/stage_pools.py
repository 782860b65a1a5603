"""The pools of an engine's pages where its layers lie: together, or each stage's layers with their stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax

from spmd_infer.axes import LAYERS
from spmd_infer.generation.kv_pages import page_bytes
from spmd_infer.model_program import is_axes
from spmd_infer.models.cache_formats import CacheFormat

if TYPE_CHECKING:
    from spmd_infer.engine import Engine


@dataclass(frozen=True)
class StagePools:
    """How pools of pages lie over stages: those of layers at the same place are stacked, ``[stages, ...]``.

    Attributes:
        sizes: the decoder's, with as many layers as a stage has.
        stages: over how many stages the layers are spread; 1 for none, and nothing is stacked.
    """

    sizes: Any
    stages: int

    @classmethod
    def of(cls, engine: Engine, config: Any) -> StagePools:
        """The pools of an engine that holds a decoder of these sizes."""
        stages = engine.stages
        sizes = config if stages == 1 else replace(config, num_layers=-(-config.num_layers // stages))
        return cls(sizes, stages)

    def each(self, fn: Callable[..., Any], own: int = 1) -> Callable[..., Any]:
        """``fn`` for the pools of every stage.

        Args:
            fn: takes one stage's pools.
            own: how many of its first arguments are of the stage; the others are the same for all.
        """
        if self.stages == 1:
            return fn

        def for_all(*args: Any) -> Any:
            in_axes = tuple(0 if index < own else None for index in range(len(args)))
            return jax.vmap(fn, in_axes=in_axes or None, axis_size=self.stages)(*args)

        return for_all

    def page_bytes(self, fmt: CacheFormat) -> int:
        """Bytes of one page in all layers, on all devices together."""
        return self.stages * page_bytes(self.sizes, fmt)

    def axes(self, own: Any) -> Any:
        """The logical axes of the pools, from those of one stage's."""
        if self.stages == 1:
            return own
        return jax.tree.map(lambda names: (LAYERS, *names), own, is_leaf=is_axes)


def of_pools(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of pools as one of the model and pools, which engines compile."""
    return lambda _, *args: fn(*args)
