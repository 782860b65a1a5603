"""Ways to attend over pages of keys and values: one interface, several back ends.

Each is ``attend(queries, keys, values, positions, view)``:

    queries: ``[D, b, T, K, G, H]``, scaled; ``b`` rows in each of ``D`` parts, query heads beside their key head.
    keys, values: the pools of one layer, ``[D, P, K, H, S]`` and ``[D, P, K, S, H]``, packed.
    positions: ``[D, b, T]`` int32, of each query in its row; it sees the positions up to its own.
    view: who uses which page.

and gives float32 ``[D, b, T, K, G, H]``, zeros for rows that use no page. Which is the fastest depends on the devices
and on sizes. All are held to one test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax

from spmd_infer.models.cache_formats import Packed
from spmd_infer.models.page_view import PageView
from spmd_infer.models.pages_gathered import attend_gathered
from spmd_infer.models.pages_in_place import attend_in_place

AttendPages = Callable[[jax.Array, Packed, Packed, jax.Array, PageView], jax.Array]


def attend_mosaic(queries: jax.Array, keys: Packed, values: Packed, positions: jax.Array, view: PageView) -> jax.Array:
    """The kernel for Hopper GPUs, which is imported when it is first asked for: Mosaic takes a third of a second."""
    from spmd_infer.models import pages_mosaic

    return pages_mosaic.attend_mosaic(queries, keys, values, positions, view)


IN_PLACE, GATHERED, MOSAIC = "in_place", "gathered", "mosaic"
WAYS: Mapping[str, AttendPages] = MappingProxyType(
    {IN_PLACE: attend_in_place, GATHERED: attend_gathered, MOSAIC: attend_mosaic}
)
"""Every way to attend over pages, by name."""
