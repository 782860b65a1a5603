"""The programs of generation on one engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from spmd_infer.axes import constrain
from spmd_infer.generation.kv_pages import KVPages, pages_axes
from spmd_infer.generation.slots import slot_axes
from spmd_infer.generation.stage_pools import StagePools, of_pools
from spmd_infer.generation.step_sizes import StepSizes
from spmd_infer.generation.steps import choose, enter, forward, prefill, prefill_scored
from spmd_infer.models.cache_formats import CacheFormat

if TYPE_CHECKING:
    from spmd_infer.engine import Engine
    from spmd_infer.model_program import ModelProgram


class StepPrograms:
    """What one engine's executor dispatches; each compiled once for each combination of sizes.

    Args:
        engine: holds a decoder.
        config: the decoder's sizes.
        fmt: what the cache holds.

    Attributes:
        prefill: ``steps.prefill``.
        prefill_scored: ``steps.prefill_scored``.
        enter: ``steps.enter``.
        forward: ``steps.forward``.
        choose: ``steps.choose``.
        insert: ``KVPages.inserted``.
        copy: ``KVPages.copied``.
        gather: ``KVPages.gathered``.
        sizes: what they are compiled for.
    """

    def __init__(self, engine: Engine, config: Any, fmt: CacheFormat) -> None:
        self._engine, self._format = engine, fmt
        self._pools = StagePools.of(engine, config)
        self._axes = axes = self._pools.axes(pages_axes(self._pools.sizes, fmt))
        each = self._pools.each
        jit = partial(engine.jit, phase="decode")
        self.prefill = engine.jit(f"prefill_{fmt.name}", partial(prefill, fmt=fmt), phase="prefill")
        self.prefill_scored = engine.jit(
            f"prefill_scored_{fmt.name}", partial(prefill_scored, fmt=fmt), phase="prefill"
        )
        self.enter = jit("enter", told(engine, enter), donate=(1, 2))
        self.forward = jit("decode", forward, donate=(0,))
        self.choose = jit("choose", told(engine, choose), donate=(1, 2))
        self.insert = jit("insert", of_pools(each(KVPages.inserted, own=3)), donate=(0,), out_axes=axes)
        self.copy = jit("copy", of_pools(each(KVPages.copied)), donate=(0,), out_axes=axes)
        self.gather = jit("gather", of_pools(each(KVPages.gathered)))
        self.sizes = StepSizes()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, on all devices together."""
        return self._pools.page_bytes(self._format)

    def zeros(self, num_pages: int) -> KVPages:
        """An empty pool of so many pages in each part."""
        pools, parts, fmt = self._pools, self._engine.data_parts, self._format
        pages: KVPages = self._engine.jit(
            f"pages_{num_pages}_{fmt.name}",
            of_pools(pools.each(lambda: KVPages.zeros(pools.sizes, parts, num_pages, fmt))),
            out_axes=self._axes,
            phase="decode",
        )()
        return pages

    def resize(self, num_pages: int) -> ModelProgram:
        """``KVPages.resized`` to so many pages in each part."""
        return self._engine.jit(
            f"resize_{num_pages}",
            of_pools(self._pools.each(lambda pages: pages.resized(num_pages))),
            out_axes=self._axes,
            phase="decode",
        )

    def laid_out(self, name: str, make: Callable[[Any], Any]) -> Any:
        """What ``make(model)`` gives, made on the devices and laid out as slots are."""
        axes = slot_axes(jax.eval_shape(make, None))
        return self._engine.jit(name, make, out_axes=axes, phase="decode")()


def told(engine: Engine, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step whose first result is for the hosts: over several processes, all of it goes to every device."""
    if not engine.mesh.is_multi_process:
        return step

    def tell(*args: Any) -> Any:
        brought, *rest = step(*args)
        return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), brought), *rest

    return tell
