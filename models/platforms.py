"""What models do differently by the platform that their program is traced for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd_infer.axes import current_platform, current_scope


def computed_once(x: jax.Array) -> jax.Array:
    """``x [..., width]`` float32, which XLA computes before what uses it instead of anew inside each of its users.

    XLA on CPU drops optimization barriers before it fuses, but keeps products apart: there ``x`` is multiplied by the
    identity, which changes no finite number. Outside an engine nothing is done.
    """
    if current_scope() is None:
        return x
    alone: jax.Array
    if current_platform() != "cpu":
        alone = jax.lax.optimization_barrier(x)
    else:
        alone = jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST)
    return alone
