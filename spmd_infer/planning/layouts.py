"""The layouts that the planner knows: sets of rules, each a different way to spread a model over data × model.

Names follow Pope et al. 2022, "Efficiently Scaling Transformer Inference".
"""

from __future__ import annotations

from collections.abc import Mapping

from spmd_infer.axes import (
    ATTN_BATCH,
    ATTN_HEADS,
    ATTN_KV_HEADS,
    BATCH,
    CHANNELS,
    DATA,
    DEFAULT_RULES,
    EMBED,
    HEADS,
    KEY_SEQ,
    KV_HEADS,
    MLP,
    MODEL,
    SEQUENCE,
    VOCAB,
    AxisRules,
)
from spmd_infer.errors import PlanError

ONE_D = AxisRules()
"""Weights over ``model`` (Megatron), rows over ``data``: one all-reduce after attention and one after the MLP."""

TWO_D = AxisRules(
    rules={**DEFAULT_RULES, EMBED: DATA},
    activations={BATCH: None},
    name="2-D weight-stationary",
)
"""Weights over both axes, width of the residual over ``data``: every device holds 1/N of every matrix and only
activations travel. For decoding few rows of a model that is large for its devices."""

WEIGHT_GATHERED = AxisRules(
    rules={**DEFAULT_RULES, EMBED: DATA},
    activations={
        BATCH: (DATA, MODEL),
        ATTN_BATCH: (DATA, MODEL),
        **dict.fromkeys((EMBED, MLP, CHANNELS, VOCAB)),
        **dict.fromkeys((HEADS, KV_HEADS, ATTN_HEADS, ATTN_KV_HEADS)),
    },
    name="weight-gathered",
)
"""Weights stored over both axes and brought together layer by layer; rows over all devices. For large prefills, whose
activations outweigh the weights."""

KV_OVER_BATCH = AxisRules(
    activations={ATTN_BATCH: (DATA, MODEL), ATTN_HEADS: None, ATTN_KV_HEADS: None},
    name="1-D, attention over batch",
)
"""1-D, with keys and values split by rows instead of heads: two all-to-alls a layer, and no key head is held twice
where there are fewer of them than devices."""

RING = AxisRules(activations={KEY_SEQ: SEQUENCE}, name="ring attention")
"""1-D, with long rows split over ``seq`` and keys and values passed around the ring (Liu et al. 2023). In the other
layouts they are gathered."""

LAYOUTS: Mapping[str, AxisRules] = {
    "1d": ONE_D,
    "2d": TWO_D,
    "gathered": WEIGHT_GATHERED,
    "kv-batch": KV_OVER_BATCH,
    "ring": RING,
}


def find_layout(name: str) -> AxisRules:
    """A layout by its short name.

    Raises:
        PlanError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise PlanError(f"unknown layout {name!r}; layouts are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
