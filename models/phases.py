"""The kinds of steps that a model takes for one batch of requests, for a planner to trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.axes import BATCH
from spmd_infer.models.attention import KEY_AXES, SCALE_AXES, VALUE_AXES, ContiguousCache
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.tensors import InputSpec


@dataclass(frozen=True)
class Phase:
    """One kind of step.

    Attributes:
        name: ``prefill``, ``decode`` or ``infer``.
        call: ``call(model, batch)``; None for the model's own call.
        inputs: a pytree of ``InputSpec``, all sizes but the batch fixed.
        times: how many such steps one batch of requests takes.
    """

    name: str
    call: Callable[[Any, Any], Any] | None
    inputs: Any
    times: int = 1


def decoder_phases(
    config: Any, input_len: int, output_len: int, dtype: npt.DTypeLike, cache_dtype: str = "auto"
) -> tuple[Phase, ...]:
    """Prefill of whole prompts, then one decode step a token.

    Args:
        config: a decoder's sizes: ``num_layers``, ``num_kv_heads``, ``head_dim``.
        input_len: tokens of a prompt.
        output_len: tokens generated; the first one comes from the prefill.
        dtype: what the model computes in, and caches keys and values in by default.
        cache_dtype: what the cache holds, as ``CacheFormat.of`` takes it.
    """
    total, heads, width = input_len + output_len, config.num_kv_heads, config.head_dim
    fmt = None if cache_dtype == "auto" else CacheFormat.of(cache_dtype, "accelerator", np.dtype(dtype))
    held: Any = dtype if fmt is None else fmt.dtype
    scales: Any = InputSpec((BATCH, heads, total), np.float32, SCALE_AXES) if fmt is not None and fmt.scaled else None
    layer = ContiguousCache(
        InputSpec((BATCH, heads, width, total), held, KEY_AXES),  # type: ignore[arg-type]  # specs for arrays
        InputSpec((BATCH, heads, total, width), held, VALUE_AXES),  # type: ignore[arg-type]  # specs for arrays
        scales,
        scales,
        fmt,
    )
    caches = (layer,) * config.num_layers
    rows = InputSpec((BATCH,), np.int32)
    prompts = {"input_ids": InputSpec((BATCH, input_len), np.int32, (BATCH, "seq")), "lengths": rows, "caches": caches}
    tokens = {"tokens": rows, "positions": rows, "caches": caches}
    phases = [Phase("prefill", lambda model, batch: model.prefill(**batch), prompts)]
    if output_len > 1:
        phases.append(Phase("decode", lambda model, batch: model.decode(**batch), tokens, output_len - 1))
    return tuple(phases)
