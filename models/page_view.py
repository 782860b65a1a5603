"""Which pages the rows of a step use."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageView:
    """Which pages the rows of a step use, the same in every layer. There are ``b`` rows in each part.

    Attributes:
        tables: ``[D, b, M]`` int32, the pages of each row in order.
        limits: ``[D, b]`` int32, positions of each row that may be written; 0 for a row that only fills up the batch.
        owners: ``[D, P]`` int32, the row that alone uses a page; ``b`` where none or several do.
        places: ``[D, P]`` int32, which page of its row it is.
        shared: ``[D, X]`` int32, the pages that several rows use, filled up with any page; X may be 0.
        shared_places: ``[D, X]`` int32, which page of its rows it is.
        members: ``[D, X, b]`` bool, which rows use it.
        way: how pages are attended over, one of ``page_attention.WAYS``.
    """

    tables: jax.Array
    limits: jax.Array
    owners: jax.Array
    places: jax.Array
    shared: jax.Array
    shared_places: jax.Array
    members: jax.Array
    way: str = field(default="in_place", metadata={"static": True})
